"""What a row of the table of models is, and its dense reference."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from tests.cases import _cast as cast
from tests.cases import reference_jacobian


def _itself(value: Any) -> Any:
    return value


@dataclass(frozen=True)
class Row:
    """A kind of model with inputs, how ntkops is called on it, and how it must compute.

    Attributes:
        name: What docs/models.md calls it.
        build: Makes the model; the global random state is seeded.
        inputs: Makes N samples.
        engine: Engine that "auto" must choose.
        mode: Mode of differentiation that must be found.
        samples: Whether per-sample gradients must come from vmap or from a loop.
        options: Arguments of `ntkops.ntk`: ``output``, ``params``, ``batch_dim``.
        state: The same selection for the reference: from the raw output to ``(N, ...)``.
        twin: Makes, of a copy of the model, one with the same outputs whose derivative torch takes in full.
        precision: Coarsest dtype in which the model computes, which is what results can be held to.
        dtype: Dtype of parameters and inputs.
        training: Whether the model stays in training mode.
        samples_given: Number N of samples.
        note: The way round, for the page.
    """

    name: str
    build: Callable[[], nn.Module]
    inputs: Callable[[int], Any]
    engine: str = "layerwise"
    mode: str = "forward"
    samples: str = "vmap"
    options: dict[str, Any] = field(default_factory=dict)
    state: Callable[[Any], Tensor] = _itself
    twin: Callable[[nn.Module], nn.Module] = _itself
    precision: torch.dtype = torch.float64
    dtype: torch.dtype = torch.float64
    training: bool = False
    samples_given: int = 3
    note: str = ""

    def make(self) -> nn.Module:
        """Return the seeded model; the global random state is put back."""
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return self.build().to(self.dtype).train(self.training)

    def draw(self, seed: int = 1) -> Any:
        """Return the seeded samples."""
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return cast(self.inputs(self.samples_given), self.dtype)

    def reference(self, model: nn.Module, x: Any, selected: tuple[str, ...]) -> Tensor:
        """Return J, ``(N·O, P)`` in float64, one classic backward pass for each row, without ntkops."""
        with torch.random.fork_rng():
            double = self.twin(copy.deepcopy(model)).to(torch.float64)
        for name, parameter in double.named_parameters():
            parameter.requires_grad_(name in selected)
        return reference_jacobian(self, double, cast(x, torch.float64), list(selected))  # type: ignore[arg-type]


@dataclass(frozen=True)
class Refusal:
    """A model that cannot work as it stands: the exception, the words of its way out, the way out itself."""

    name: str
    build: Callable[[], Any]
    inputs: Callable[[int], Any]
    error: type[Exception]
    words: tuple[str, ...]
    repair: Callable[[Any], Any] | None = None
    options: dict[str, Any] = field(default_factory=dict)
    note: str = ""
