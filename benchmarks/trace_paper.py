"""The trace-estimation paper measured again: its networks, its estimators as its code has them, and ours.

Run it with ``python benchmarks/trace_paper.py``; docs/trace_estimation.md explains and shows the result.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _measure import environment, one_thread
from _models import PAPER_CASES, Size
from _peers import vmapped_route
from _tables import fill
from _trace_page import claims, draw, judge, markdown
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, interpolate

import ntkops
from ntkops.engines import count_passes

__all__ = ["NAMES", "run"]

Product = Callable[[Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class Problem:
    """A network at fixed parameters with its samples."""

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


def _classifier(
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


def _digits() -> tuple[Tensor, Tensor]:
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    order = torch.from_numpy(np.random.default_rng(0).permutation(len(labels)))
    return (torch.from_numpy(images).float() / 16)[order], torch.from_numpy(labels).long()[order]


def _mnist(path: Path) -> tuple[Tensor, Tensor]:
    """Read an ``.npz`` file: ``images`` and ``labels``, or those of Keras, training images first."""
    with np.load(path) as found:
        names = [("images",), ("labels",)]
        if "images" not in found:
            names = [("x_train", "x_test"), ("y_train", "y_test")]
        images, labels = (np.concatenate([found[name] for name in some]) for some in names)
    return torch.from_numpy(images.reshape(-1, 784) / 255).float(), torch.from_numpy(labels).long()


NAMES = ("mlp", "gru", "gru_printed", "gru32", "digits", "classifier")


def build(name: str, *, quick: bool = False, mnist: Path | None = None) -> Problem:
    """Return a problem by name, always the same one."""
    if name == "mlp":
        return _deep(quick)
    if name == "digits":
        widths, title = [64, 16 if quick else 256, 10], "64-256-10 on digits, 256 points"
        return _classifier(name, title, widths, *_digits(), steps=20 if quick else 600, test=540,
                           kept=4 if quick else 256)  # fmt: skip
    if name == "classifier":
        widths, kept = ([784, 16, 16, 10], 4) if quick else ([784, 256, 256, 10], 512)
        if mnist is None:
            images, labels = _digits()
            grown = interpolate(images.view(-1, 1, 8, 8), size=(28, 28), mode="bilinear").flatten(1)
            return _classifier(name, "784-256-256-10 on digits at 28 x 28", widths, grown, labels,
                               steps=20 if quick else 400, test=540, kept=kept)  # fmt: skip
        images, labels = _mnist(mnist)
        large = len(images) > 20_000
        return _classifier(
            name, f"784-256-256-10 on MNIST, {len(images):,} images", widths, images, labels,
            steps=2345 if large else 1000, test=10_000 if large else len(images) // 5, kept=kept,
        )  # fmt: skip
    title, size = {
        # The first is what the paper's code runs, the second what the paper says.
        "gru": ("GRU states, 50 steps, 15 inputs", Size(15, 64, 50)),
        "gru_printed": ("GRU states, 15 steps, 50 inputs", Size(50, 64, 15)),
        "gru32": ("GRU states, 32 units, 50 steps, 15 inputs", Size(15, 32, 50)),
    }[name]
    return _states(name, title, Size(2, 8, 4) if quick else size)


# The paper's estimators: Hutch++ spends a sixth of m on the range and half of the rest on the residual, about
# .75 m products; one-sided ones spend a sixth on a random orthonormal basis; the effective rank is two runs.

_CHUNK = 60  # columns in one vmap; the paper takes all at once, which is slower and does not fit for its GRU


def _signs(count: int, length: int, generator: torch.Generator) -> Tensor:
    return torch.randint(0, 2, (count, length), generator=generator).float().mul_(2).sub_(1)


def _chunked(product: Product, block: Tensor) -> Tensor:
    return torch.cat([product(part) for part in block.split(_CHUNK)])


def hutch_pp(product: Product, size: int, m: int, generator: torch.Generator) -> tuple[float, int]:
    """Return the estimate of tr A and the products that were made."""
    q = m // 6
    s = (m - q) // 2
    basis = torch.linalg.qr(_chunked(product, _signs(q, size, generator)).T)[0].T  # (q, n)
    probes = _signs(s, size, generator)
    probes = probes - (probes @ basis.T) @ basis
    low = (_chunked(product, basis) * basis).sum()
    rest = (_chunked(product, probes) * probes).sum() / s
    return float(low + rest), 2 * q + s


def one_sided(half: Product, length: int, m: int, generator: torch.Generator) -> tuple[float, int]:
    """Return the estimate of tr K = |J|² from products with one side, and their number."""
    q = m // 6
    basis = torch.linalg.qr(_signs(q, length, generator).T)[0].T
    probes = _signs(m - q, length, generator)
    probes = probes - (probes @ basis.T) @ basis
    low = _chunked(half, basis).square().sum() if q else torch.zeros(())
    return float(low + _chunked(half, probes).square().sum() / (m - q)), m


def frobenius_norm(product: Product, size: int, m: int, generator: torch.Generator) -> tuple[float, int]:
    """Return the estimate of |K|_F by Hutch++ on K², and the products with K."""
    value, made = hutch_pp(lambda v: product(product(v)), size, m, generator)
    return max(value, 0.0) ** 0.5, 2 * made


def effective_rank(product: Product, size: int, m: int, generator: torch.Generator) -> tuple[float, int]:
    """Return the estimate of (tr K)² / |K|², and the products with K."""
    trace, first = hutch_pp(product, size, m, generator)
    norm, second = frobenius_norm(product, size, m, generator)
    return trace**2 / norm**2, first + second


def alignment(
    product: Product, other: Product, size: int, m: int, generator: torch.Generator
) -> tuple[float, int]:
    """Return the estimate of the cosine of two kernels, and the products with either."""
    mixed, first = hutch_pp(lambda v: product(other(v)), size, m, generator)
    left, second = frobenius_norm(product, size, m, generator)
    right, third = frobenius_norm(other, size, m, generator)
    return mixed / (left * right), 2 * first + second + third


# error against passes and time: medians over repetitions, not first lucky crossings

Once = Callable[[int, torch.Generator], tuple[float, int]]


@dataclass(frozen=True)
class Exact:
    """The exact values of one network, in float64, and what they cost in float32."""

    values: dict[str, float]
    seconds: dict[str, float]
    columns_s: float
    identity: tuple[float, float] | None


def _seconds(work: Callable[[], object]) -> float:
    started = time.process_time()
    work()
    return time.process_time() - started


def exact_values(problem: Problem, quantities: Sequence[str], *, quick: bool) -> Exact:
    """Return exact values in float64, and the seconds of the float32 routes."""
    values, seconds = {}, {}
    double = [problem.kernel(double=True)]
    single = [problem.kernel()]
    if "alignment" in quantities:
        double.append(problem.kernel(double=True, before=True))
        single.append(problem.kernel(before=True))
    for quantity in quantities:
        count = 2 if quantity == "alignment" else 1
        values[quantity] = float(_quantity(quantity)(*double[:count], method="exact"))
        seconds[quantity] = _exact_seconds(quantity, single[:count])
    product = problem.product()
    block = torch.randn(2 if quick else 60, problem.size, generator=torch.Generator().manual_seed(0))
    product(block[:2])
    column = _seconds(lambda: product(block)) / len(block)
    return Exact(values, seconds, column, _identity(problem, values))


def _exact_seconds(quantity: str, kernels: Sequence[ntkops.NTKOperator]) -> float:
    """Return the median of three, after a first one that loads code; nothing is kept from one to the next."""
    spent = []
    for _ in range(4):
        for kernel in kernels:
            kernel.free()
        spent.append(_seconds(lambda: _quantity(quantity)(*kernels, method="exact")))
    return sorted(spent[1:])[1]


def _identity(problem: Problem, values: dict[str, float]) -> tuple[float, float] | None:
    """Return the effective rank beside n cos²(K, I), where both are known."""
    if "effective_rank" not in values:
        return None
    from linear_operator.operators import IdentityLinearOperator

    kernel = problem.kernel(double=True)
    same = IdentityLinearOperator(problem.size, dtype=torch.float64)
    cosine = float(ntkops.alignment(kernel, same, method="exact"))
    return values["effective_rank"], problem.size * cosine**2


def _quantity(name: str) -> Callable[..., ntkops.Estimate]:
    return getattr(ntkops, name)


def curve(once: Once, exact: float, grid: Sequence[int], repetitions: int) -> list[dict[str, float]]:
    """Return median and quartiles of the relative error, passes and seconds for each m."""
    points = []
    for m in grid:
        errors, spent, made = [], [], 0
        for repetition in range(repetitions):
            generator = torch.Generator().manual_seed(1000 * m + repetition)
            started = time.process_time()
            value, made = once(m, generator)
            spent.append(time.process_time() - started)
            errors.append(abs(value - exact) / abs(exact))
        low, middle, high = np.quantile(errors, [0.25, 0.5, 0.75])
        points.append(
            {
                "m": m,
                "passes": made,
                "error": float(f"{middle:.4g}"),
                "low": float(f"{low:.4g}"),
                "high": float(f"{high:.4g}"),
                "seconds": float(f"{np.median(spent):.4g}"),
                "repetitions": repetitions,
            }
        )
    return points


def paper_curves(
    problem: Problem, quantities: Sequence[str], exact: Exact, grid: Sequence[int], repetitions: int
) -> list[dict[str, Any]]:
    """Measure the paper's estimators on the products that the paper's code makes."""
    found = []
    for quantity in quantities:
        for method, once in _paper_methods(problem, quantity).items():
            points = curve(once, exact.values[quantity], grid, repetitions)
            found.append({"quantity": quantity, "method": method, "by": "paper", "points": points})
    return found


def _paper_methods(problem: Problem, quantity: str) -> dict[str, Once]:
    product, size = problem.product(), problem.size
    if quantity == "trace":
        reverse, forward = (problem.one_sided(forward=way) for way in (False, True))
        return {
            "hutch++": lambda m, g: _doubled(hutch_pp(product, size, m, g)),
            "rhutch": lambda m, g: one_sided(*reverse, m, g),
            "fhutch": lambda m, g: one_sided(*forward, m, g),
        }
    if quantity == "alignment":
        other = problem.product(before=True)
        return {"hutch++": lambda m, g: _doubled(alignment(product, other, size, m, g))}
    method = {"frobenius_norm": frobenius_norm, "effective_rank": effective_rank}[quantity]
    return {"hutch++": lambda m, g: _doubled(method(product, size, m, g))}


def _doubled(found: tuple[float, int]) -> tuple[float, int]:
    """A product is a vjp and a jvp."""
    return found[0], 2 * found[1]


def our_curves(
    problem: Problem, exact: Exact, plan: Sequence[tuple[str, str, Sequence[int]]], repetitions: int
) -> list[dict[str, Any]]:
    """Measure our estimators at fixed numbers of passes."""
    kernel = problem.kernel()
    first = problem.kernel(before=True) if problem.untrained is not None else None
    found = []
    for quantity, method, grid in plan:
        kernels = [kernel] if quantity != "alignment" else [kernel, first]

        once = _our_method(quantity, method, kernels)
        points = curve(once, exact.values[quantity], grid, repetitions)
        found.append({"quantity": quantity, "method": method, "by": "ntkops", "points": points})
    return found


def _our_method(quantity: str, method: str, kernels: Sequence[ntkops.NTKOperator | None]) -> Once:
    def once(passes: int, generator: torch.Generator) -> tuple[float, int]:
        with count_passes() as tally:
            estimate = _quantity(quantity)(*kernels, method=method, num_passes=passes, generator=generator)
        return float(estimate), tally.total

    return once


def slope(points: Sequence[dict[str, float]], floor: float = 1e-6) -> float | None:
    """Return the slope of log error against log m, above the level of rounding."""
    kept = [(p["m"], p["error"]) for p in points if p["error"] > floor]
    if len(kept) < 3:
        return None
    x, y = np.log([m for m, _ in kept]), np.log([e for _, e in kept])
    found = float(np.polyfit(x, y, 1)[0])
    return round(found, 3) if math.isfinite(found) else None


# what is measured

# What is asked of each network: quantities, the paper's m, and our methods with their passes.
Plan = tuple[tuple[str, str, Sequence[int]], ...]
_TRACE, _SKETCH, _PAIR = (6, 12, 30, 60, 120, 240, 480, 960), (20, 40, 60, 120, 240), (2, 4, 8)
_WIDE, _TWO = (40, 80, 160, 320), (4, 8, 16)  # two kernels: two per-sample passes of each
_STRATIFIED, _SIDED, _HUTCH = (1, 2, 4, 8, 16), (6, 12, 30, 60), (30, 60, 120, 240, 480)
QUANTITIES = {
    "mlp": ("trace", "frobenius_norm", "effective_rank"), "gru": ("trace",), "gru_printed": ("trace",),
    "gru32": ("trace",), "digits": ("trace", "frobenius_norm", "effective_rank", "alignment"),
    "classifier": ("frobenius_norm", "effective_rank", "alignment"),
}  # fmt: skip
PAPER_GRIDS: dict[str, Sequence[int]] = {
    "mlp": _TRACE, "gru": (6, 12, 30, 60, 126, 258, 540), "gru_printed": (6, 30, 126),
    "gru32": (6, 12, 30, 60, 126, 258), "digits": _TRACE[3:], "classifier": (60, 120, 240, 480),
}  # fmt: skip
OURS: dict[str, Plan] = {
    "mlp": (
        ("trace", "sketch", _SKETCH), ("trace", "xtrace", _SKETCH),
        ("trace", "ntk-hutch++", _HUTCH[:-1]), ("trace", "hutch++", _HUTCH),
        ("trace", "rhutch", (*_SIDED, 120)), ("trace", "stratified", _STRATIFIED),
        ("frobenius_norm", "sketch", _SKETCH), ("frobenius_norm", "hutch++", _HUTCH),
        ("frobenius_norm", "reverse", (12, 30, 60, 120)), ("frobenius_norm", "stratified", _PAIR),
        ("effective_rank", "sketch", _SKETCH), ("effective_rank", "hutch++", _HUTCH),
        ("effective_rank", "stratified", _PAIR),
    ),
    "gru": (
        ("trace", "rhutch", _SIDED), ("trace", "fhutch", _SIDED), ("trace", "sketch", (60, 126, 258, 540)),
        ("trace", "stratified", _STRATIFIED[:-1]),
    ),
    "gru_printed": (("trace", "fhutch", (6, 30, 60)), ("trace", "stratified", (1, 4))),
    "gru32": (
        ("trace", "rhutch", _SIDED), ("trace", "fhutch", _SIDED),
        ("trace", "sketch", (30, 60, 126, 258, 540)), ("trace", "auto", (12, 30, 60)),
    ),
    "digits": (
        ("trace", "sketch", _WIDE), ("trace", "xtrace", _WIDE), ("trace", "hutch++", (*_WIDE, 640)),
        ("trace", "stratified", _STRATIFIED[:-1]), ("frobenius_norm", "sketch", _WIDE),
        ("frobenius_norm", "hutch++", _WIDE), ("frobenius_norm", "stratified", _PAIR),
        ("effective_rank", "sketch", _WIDE), ("effective_rank", "stratified", _PAIR),
        ("alignment", "sketch", (32, 64, 128)), ("alignment", "hutch++", (64, 128, 256)),
        ("alignment", "stratified", _TWO),
    ),
    "classifier": (
        ("frobenius_norm", "sketch", (60, 120, 240)), ("frobenius_norm", "stratified", _PAIR),
        ("effective_rank", "sketch", (60, 120, 240)), ("effective_rank", "stratified", _PAIR),
        ("alignment", "sketch", (32, 64, 128, 256)), ("alignment", "stratified", _TWO),
    ),
}  # fmt: skip
_QUICK: Plan = (("trace", "rhutch", (2, 4)), ("trace", "sketch", (8,)), ("trace", "stratified", (1,)))
_REPETITIONS = {"gru": 10, "gru_printed": 10, "gru32": 20}
_PAPER_REPETITIONS = {"mlp": 7, "gru": 3, "gru_printed": 3, "gru32": 7, "digits": 11, "classifier": 5}
_SHOWN = 20


def measure(problem: Problem, *, quick: bool, repetitions: int | None, paper: int | None) -> dict[str, Any]:
    """Measure one network: exact values, the paper's estimators, ours."""
    name = problem.name
    quantities = ("trace",) if quick else QUANTITIES[name]
    exact = exact_values(problem, quantities, quick=quick)
    ours = repetitions or (2 if quick else _REPETITIONS.get(name, _SHOWN))
    theirs = paper or (2 if quick else _PAPER_REPETITIONS.get(name, _SHOWN))
    curves = paper_curves(problem, quantities, exact, (12,) if quick else PAPER_GRIDS[name], theirs)
    curves += our_curves(problem, exact, _QUICK if quick else OURS[name], ours)
    for entry in curves:
        entry["slope"] = slope(entry["points"])
    return {
        "name": name,
        "title": problem.title,
        "n": problem.size,
        "parameters": problem.num_parameters,
        "accuracy": problem.accuracy,
        "exact": {**_rounded(exact.values), "identity": exact.identity},
        "exact_s": _rounded(exact.seconds),
        "column_s": float(f"{exact.columns_s:.4g}"),
        "curves": curves,
    }


def _rounded(values: dict[str, float]) -> dict[str, float]:
    return {key: float(f"{value:.10g}") for key, value in values.items()}


def full_hutch_pp(problem: Problem) -> dict[str, float]:
    """Return the time of Hutch++ at m = n relative to n products: the paper says 0.8 to 1.2."""
    product, size = problem.product(), problem.size
    started = time.process_time()
    total = 0.0
    for rows in torch.arange(size).split(60):
        unit = torch.zeros(len(rows), size)
        unit[torch.arange(len(rows)), rows] = 1
        total += float(product(unit)[torch.arange(len(rows)), rows].double().sum())
    middle = time.process_time()
    value, products = hutch_pp(product, size, size, torch.Generator().manual_seed(0))
    ended = time.process_time()
    return {
        "products_s": round(middle - started, 3),
        "hutch_s": round(ended - middle, 3),
        "products": products,
        "ratio": round((ended - middle) / (middle - started), 3),
        "distance": abs(value - total) / abs(total),
    }


def run(
    names: Sequence[str] = NAMES,
    *,
    quick: bool = False,
    repetitions: int | None = None,
    paper_repetitions: int | None = None,
    mnist: Path | None = None,
    before: dict[str, Any] | None = None,
    resume: bool = False,
    say: Callable[[str], None] = lambda text: None,
    keep: Callable[[dict[str, Any]], None] = lambda result: None,
) -> dict[str, Any]:
    """Measure networks, keep others of `before` (named ones too, to resume), and return it all for JSON."""
    today, place = datetime.now(UTC).date().isoformat(), {**environment(), "threads": 1}
    result: dict[str, Any] = before or {
        "benchmark": "trace_paper", "date": today, "environment": place, "options": {"quick": quick},
        "problems": [], "hutch_at_n": None, "seconds": 0.0,
    }  # fmt: skip
    if any(result["environment"][key] != place[key] for key in ("cpu", "python", "torch", "threads")) or (
        result["options"]["quick"] != quick
    ):
        raise ValueError("the result to go on from was measured with other options or elsewhere")
    spent, started = result["seconds"], time.perf_counter()
    done = {entry["name"] for entry in result["problems"]} if resume else set()
    with one_thread():
        for name in (name for name in names if name not in done):
            problem = build(name, quick=quick, mnist=mnist)
            say(problem.title)
            entry = measure(problem, quick=quick, repetitions=repetitions, paper=paper_repetitions)
            others = [e for e in result["problems"] if e["name"] != name]
            entry |= {"measured": today, "ntkops": place["ntkops"]}
            result["problems"] = sorted([*others, entry], key=lambda entry: NAMES.index(entry["name"]))
            if name == "mlp":
                say("Hutch++ at m = n")
                result["hutch_at_n"] = full_hutch_pp(problem)
            result["seconds"] = round(spent + time.perf_counter() - started, 1)
            keep(result)
    result["targets"] = [] if quick else judge(result)
    result["claims"] = [] if quick else claims(result)
    return result


def main(arguments: Sequence[str] | None = None) -> int:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--networks", nargs="+", choices=NAMES, default=NAMES, help="which networks")
    parser.add_argument("--quick", action="store_true", help="small sizes: a smoke test, not a measurement")
    parser.add_argument("--repetitions", type=int, help="repetitions of our estimators (20, GRU 10)")
    parser.add_argument("--paper-repetitions", type=int, help="of the paper's (20, slow ones 5 or 10)")
    parser.add_argument("--data", type=Path, metavar="NPZ", help="MNIST for the classifier (else digits)")
    parser.add_argument("--out", type=Path, help="JSON file, whose other networks are kept")
    parser.add_argument("--resume", action="store_true", help="keep the networks that --out holds already")
    parser.add_argument("--figures", type=Path, metavar="DIR", help="draw figures 1 to 4 into this folder")
    parser.add_argument("--markdown", type=Path, metavar="JSON", help="print a stored result, run nothing")
    parser.add_argument("--page", type=Path, help="with --markdown: put the tables into this page")
    options = parser.parse_args(arguments)
    if options.markdown is not None:
        result = json.loads(options.markdown.read_text(encoding="utf-8"))
    else:

        def keep(result: dict[str, Any]) -> None:
            if options.out is not None:
                options.out.parent.mkdir(parents=True, exist_ok=True)
                options.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")

        some = options.resume or set(options.networks) != set(NAMES)
        known = some and options.out is not None and options.out.exists()
        result = run(
            options.networks, quick=options.quick, repetitions=options.repetitions,
            paper_repetitions=options.paper_repetitions, mnist=options.data, resume=options.resume, keep=keep,
            before=json.loads(options.out.read_text(encoding="utf-8")) if known else None,
            say=lambda text: print(text, file=sys.stderr, flush=True),
        )  # fmt: skip
        keep(result)
    print(markdown(result))
    if options.page is not None:
        page = options.page.read_text(encoding="utf-8")
        options.page.write_text(fill(page, "trace_paper", markdown(result) + "\n"), encoding="utf-8")
    if options.figures is not None:
        draw(result, options.figures)
    return 0


if __name__ == "__main__":
    sys.exit(main())
