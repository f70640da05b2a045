"""The networks of the trace-estimation paper, and two of its kind with harder spectra."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from _kernel_peers import vmapped_route
from _models import PAPER_CASES, Size
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, interpolate

import ntkops

__all__ = ["NAMES", "Problem", "build"]

Product = Callable[[Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class Problem:
    """A network at fixed parameters with its samples.

    Attributes:
        name: Short name, as on the command line.
        title: What the tables say.
        model: The network, in float32.
        x: Its samples.
        untrained: The same network before training, where there was any.
        output: Which output is the state.
        batch_dim: Axis of the samples.
        accuracy: Share of test samples that the trained network gets right.
    """

    name: str
    title: str
    model: nn.Module
    x: Tensor
    untrained: nn.Module | None = None
    output: int | None = None
    batch_dim: int = 0
    accuracy: float | None = None

    def kernel(
        self, *, before: bool = False, double: bool = False, engine: str = "auto"
    ) -> ntkops.NTKOperator:
        """Return the lazy kernel; nothing dense is ever built by it."""
        model, x = self._network(before), self.x
        if double:
            model, x = copy.deepcopy(model).double(), x.double()
        return ntkops.ntk(
            model, x, output=self.output, batch_dim=self.batch_dim, engine=engine, max_dense_bytes=0
        )

    def _network(self, before: bool) -> nn.Module:
        if not before:
            return self.model
        assert self.untrained is not None
        return self.untrained

    @cached_property
    def state_shape(self) -> torch.Size:
        """Shape of the state of all samples together."""
        with torch.no_grad():
            found = self.model(self.x)
        return (found if self.output is None else found[self.output]).shape

    @property
    def size(self) -> int:
        """Number n of states."""
        return self.state_shape.numel()

    @property
    def num_parameters(self) -> int:
        """Number P of parameters."""
        return sum(p.numel() for p in self.model.parameters())

    def product(self, *, before: bool = False) -> Product:
        """Return K V as the paper's code computes it, for blocks ``(k, n)``: one vmap over the columns."""
        route = vmapped_route(self._network(before), self.x, state=self.output)
        return lambda block: route(block.view(-1, *self.state_shape)).reshape(len(block), -1)

    def one_sided(self, *, forward: bool) -> tuple[Product, int]:
        """Return Jᵀ (reverse) or J (forward) for rows ``(k, ·)``, and the length of the rows it takes."""
        params = {name: p.detach() for name, p in self.model.named_parameters()}
        shapes = [p.shape for p in params.values()]
        sizes = [shape.numel() for shape in shapes]

        def state(values: dict[str, Tensor]) -> Tensor:
            found = torch.func.functional_call(self.model, values, (self.x,))
            return found if self.output is None else found[self.output]

        def push(row: Tensor) -> Tensor:
            parts = [part.view(shape) for part, shape in zip(row.split(sizes), shapes, strict=True)]
            return torch.func.jvp(state, (params,), (dict(zip(params, parts, strict=True)),))[1].flatten()

        def pull(row: Tensor) -> Tensor:
            _, back = torch.func.vjp(state, params)[:2]
            return torch.cat([part.flatten() for part in back(row.view(self.state_shape))[0].values()])

        return torch.func.vmap(push if forward else pull), sum(sizes) if forward else self.size


def _deep(quick: bool) -> Problem:
    model, x = PAPER_CASES["deep"].make(quick)
    return Problem("mlp", "MLP, 15 x 64, 50 inputs", model, x)


def _states(name: str, title: str, size: Size) -> Problem:
    case = PAPER_CASES["states"]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = case.network(size).eval()
    x = case.inputs(size, torch.Generator().manual_seed(1))
    return Problem(name, title, model, x, output=0, batch_dim=1)


def _train(
    widths: list[int], images: Tensor, labels: Tensor, *, steps: int, batch: int = 128, seed: int = 1337
) -> tuple[nn.Module, nn.Module]:
    """Return a ReLU network before and after training by Adam."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        pairs = list(zip(widths, widths[1:], strict=False))
        layers: list[nn.Module] = []
        for a, b in pairs:
            layers += [nn.Linear(a, b), nn.ReLU()]
        model = nn.Sequential(*layers[:-1])
        untrained = copy.deepcopy(model)
        optimiser = torch.optim.Adam(model.parameters(), lr=1e-3)
        for _ in range(steps):
            index = torch.randint(len(images), (batch,))
            optimiser.zero_grad()
            cross_entropy(model(images[index]), labels[index]).backward()
            optimiser.step()
    return untrained.eval(), model.eval()


def _digits() -> tuple[Tensor, Tensor]:
    from sklearn.datasets import load_digits

    bunch = load_digits()
    order = torch.from_numpy(np.random.default_rng(0).permutation(len(bunch.target)))
    images = torch.from_numpy(bunch.data).float() / 16
    return images[order], torch.from_numpy(bunch.target).long()[order]


def _mnist(path: Path) -> tuple[Tensor, Tensor]:
    """Read an ``.npz`` file: ``images`` and ``labels``, or those of Keras, training images first."""
    with np.load(path) as found:
        if "images" in found:
            images, labels = found["images"], found["labels"]
        else:
            images = np.concatenate([found["x_train"], found["x_test"]])
            labels = np.concatenate([found["y_train"], found["y_test"]])
    return torch.from_numpy(images.reshape(-1, 784) / 255).float(), torch.from_numpy(labels).long()


def _trained(
    name: str,
    title: str,
    widths: list[int],
    images: Tensor,
    labels: Tensor,
    *,
    steps: int,
    test: int,
    kept: int,
) -> Problem:
    untrained, model = _train(widths, images[:-test], labels[:-test], steps=steps)
    with torch.no_grad():
        right = model(images[-test:]).argmax(-1) == labels[-test:]
    return Problem(
        name, title, model, images[-test:][:kept], untrained=untrained, accuracy=float(right.double().mean())
    )


def _classifier(quick: bool, mnist: Path | None) -> Problem:
    widths = [784, 16, 16, 10] if quick else [784, 256, 256, 10]
    kept = 4 if quick else 512
    if mnist is not None:
        images, labels = _mnist(mnist)
        return _trained(
            "classifier",
            f"784-256-256-10 on MNIST, {len(images):,} images",
            widths,
            images,
            labels,
            steps=2345 if len(images) > 20_000 else 1000,
            test=10_000 if len(images) > 20_000 else len(images) // 5,
            kept=kept,
        )
    images, labels = _digits()
    grown = interpolate(images.view(-1, 1, 8, 8), size=(28, 28), mode="bilinear").flatten(1)
    title = "784-256-256-10 on digits at 28 x 28"
    return _trained(
        "classifier", title, widths, grown, labels, steps=20 if quick else 400, test=540, kept=kept
    )


def _small_classifier(quick: bool) -> Problem:
    widths = [64, 16, 10] if quick else [64, 256, 10]
    images, labels = _digits()
    title = "64-256-10 on digits, 256 points"
    return _trained(
        "digits",
        title,
        widths,
        images,
        labels,
        steps=20 if quick else 600,
        test=540,
        kept=4 if quick else 256,
    )


NAMES = ("mlp", "gru", "gru_printed", "gru32", "digits", "classifier")


def build(name: str, *, quick: bool = False, mnist: Path | None = None) -> Problem:
    """Return a problem by name.

    Args:
        name: One of `NAMES`. "gru" is what the paper's code runs (50 steps, batch of 15), "gru_printed" what
            the paper says (15 steps, batch of 50).
        quick: Small sizes.
        mnist: ``.npz`` file of MNIST for the classifier; None takes digits.

    Returns:
        The problem; always the same one.
    """
    if name == "mlp":
        return _deep(quick)
    if name == "digits":
        return _small_classifier(quick)
    if name == "classifier":
        return _classifier(quick, mnist)
    sizes = {
        "gru": ("GRU states, 50 steps, 15 inputs", Size(15, 64, 50)),
        "gru_printed": ("GRU states, 15 steps, 50 inputs", Size(50, 64, 15)),
        "gru32": ("GRU states, 32 units, 50 steps, 15 inputs", Size(15, 32, 50)),
    }
    title, size = sizes[name]
    return _states(name, title, Size(2, 8, 4) if quick else size)
