"""Whether 95 % intervals cover and tolerances are met, by simulation on known spectra (docs/coverage.md).

Probes are uniform on spheres, so that an estimate of the trace, the norm or the effective rank depends on the
eigenvalues of a kernel alone: diagonal kernels stand for all with their spectrum. Two kernels of an alignment
or an inner product are a diagonal one and one with turned eigenvectors. Of a partial trace each run looks at
one entry, the next one each time, so that runs stay independent. Runs that a number of passes ends are made
as one batch of equal kernels, each with its own probes; runs that a tolerance ends, and those on networks,
one by one.
"""

from __future__ import annotations

import argparse
import copy
import functools
import math
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import scipy.stats
import torch
from _measure import digits
from _models import States, cnn, fitted, seeded
from _tables import Benchmark, say, table, verdict
from linear_operator.operators import LinearOperator
from torch import Tensor, nn

import ntkops
from ntkops.engines import report_passes
from ntkops.errors import InputError, NotConvergedWarning
from ntkops.operators.capabilities import Capabilities

LEAST = 0.93  # coverage that no cell may be significantly below
SIGNIFICANCE = 0.01  # after Holm's correction over all cells
DOUBT, MORE = 0.05, 4  # p-value below which a cell is run again with more repetitions
SINGLE = ("sketch", "xtrace", "ntk-hutch++", "hutch++", "hutchinson")
PAIRED = ("sketch", "ntk-hutch++", "hutch++", "hutchinson", "reverse", "forward")
QUANTITIES: dict[str, tuple[Callable[..., Any], Callable[[Tensor], float], tuple[str, ...]]] = {
    "trace": (ntkops.trace, lambda v: float(v.sum()), (*SINGLE, "rhutch", "fhutch")),
    "norm": (ntkops.frobenius_norm, lambda v: float(v.norm()), (*SINGLE, "reverse", "forward")),
    "effective rank": (
        ntkops.effective_rank,
        lambda v: float(v.sum().square() / v.square().sum()),
        (*SINGLE, "reverse", "forward"),
    ),
}
TOLERANCES = {"sketch": 0.03}  # where a tolerance ends it: what "auto" takes without layer structure
ON_NETWORKS = {"passes": 2, "rtol": 0.05}  # stratified probes, whose blocks a spectrum does not show
SPECTRAL, SPECTRAL_PASSES, RIDGE = ("power law 1", "exponential", "step", "clusters", "spike"), 400, 1e-2
PARTIAL_PASSES = 3
ROUNDING = 1e-12


# spectra, and operators that have them


def _indices(n: int) -> Tensor:
    return torch.arange(1, n + 1, dtype=torch.float64)


def _levels(n: int, *parts: tuple[int, float]) -> Tensor:
    """Return values level by level: (count, value), the last level filling up."""
    values = torch.full((n,), parts[-1][1], dtype=torch.float64)
    start = 0
    for count, value in parts[:-1]:
        values[start : start + count] = value
        start += count
    return values


# No rule of an estimator was set on any of these: the quantiles come from squares of normal variables.
HELD_OUT: Mapping[str, Callable[[int], Tensor]] = {
    "power law 1/2": lambda n: _indices(n) ** -0.5, "power law 1": lambda n: _indices(n) ** -1.0,
    "power law 2": lambda n: _indices(n) ** -2.0, "exponential": lambda n: 0.7 ** _indices(n),
    "slow exponential": lambda n: 0.97 ** _indices(n),
    "step": lambda n: _levels(n, (n // 10, 1.0), (0, 1e-3)),
    "high step": lambda n: _levels(n, (n // 10, 1.0), (0, 0.1)),
    "clusters": lambda n: _levels(n, (2, 10.0), (7, 3.0), (20, 1.0), (0, 0.01)),
    "spike": lambda n: _levels(n, (1, float(n)), (0, 1.0)),
    "three spikes": lambda n: _levels(n, (3, float(n)), (0, 0.3)),
    "flat": lambda n: 1.0 + 0.1 * torch.sin(_indices(n)),
    "cliff at 9": lambda n: _levels(n, (9, 1.0), (0, 0.0)),
    "cliff at 30": lambda n: _levels(n, (30, 1.0), (0, 1e-9)),
}  # fmt: skip


def _perceptron() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 5))


@functools.cache
def networks(samples: int = 24) -> dict[str, tuple[nn.Module, Tensor]]:
    """Return three small networks after a few steps of training, with their samples."""
    generator = torch.Generator().manual_seed(7)
    flat = functools.partial(cnn, [1, 6, 6], 5, strides=(1, 2), padding=0, flat=24)
    cases: dict[str, tuple[Callable[..., nn.Module], tuple[int, ...]]] = {
        "trained MLP": (_perceptron, (samples, 8)),
        "trained CNN": (flat, (samples, 1, 8, 8)),
        "trained GRU": (lambda: States(3, 6), (samples // 4, 5, 3)),
    }
    found = {}
    for name, (make, shape) in cases.items():
        x = torch.randn(*shape, generator=generator, dtype=torch.float64)
        found[name] = fitted(seeded(make, seed=3).double(), x), x
    return found


class Known(LinearOperator, Capabilities):
    """K = J Jᵀ by its factor, counting a vjp and a jvp a column, and refusing to become dense.

    A batch of equal ones is so many runs at once: each entry has probes of its own.
    """

    def __init__(self, factor: Tensor) -> None:
        super().__init__(factor)
        self.factor = factor

    @classmethod
    def diagonal_of(cls, values: Tensor) -> Known:
        """Return the diagonal kernel with these eigenvalues, which stands for all with this spectrum."""
        return cls(torch.diag(values.sqrt()))

    def times(self, count: int) -> Known:
        """Return a batch of copies, for as many runs at once."""
        return Known(self.factor.expand(count, *self.factor.shape))

    def _size(self) -> torch.Size:
        return torch.Size((*self.factor.shape[:-1], self.factor.shape[-2]))

    def _matmul(self, rhs: Tensor) -> Tensor:
        made = rhs.shape[-1] * self.factor.shape[:-2].numel()
        report_passes(vjp=made, jvp=made)
        return self.factor @ (self.factor.mT @ rhs)

    def _transpose_nonbatch(self) -> Known:
        return self

    symmetric = True

    def factors(self) -> tuple[LinearOperator, LinearOperator]:
        """Return J twice."""
        factor = _Factor(self.factor)
        return factor, factor

    def exact_cost(self, quantity: str) -> float:
        """Return infinity: the exact value is out of reach."""
        return math.inf


class _Factor(LinearOperator):
    """J, or its transpose, by products alone."""

    def __init__(self, matrix: Tensor) -> None:
        super().__init__(matrix)
        self.matrix = matrix

    def _size(self) -> torch.Size:
        return self.matrix.shape

    def _matmul(self, rhs: Tensor) -> Tensor:
        return self.matrix @ rhs

    def _transpose_nonbatch(self) -> _Factor:
        return _Factor(self.matrix.mT)


def turned(values: Tensor, angle: float, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Return factors of two kernels: one diagonal, and another with its eigenvectors turned a little."""
    n = len(values)
    noise = torch.randn(n, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    turn = torch.matrix_exp(angle / math.sqrt(n) * (noise - noise.T))
    roots = values.sqrt()
    return torch.diag(roots), turn * roots


def measure_runs(
    estimate: Callable[..., Any], operators: Sequence[Any], truth: float | Tensor, repetitions: int,
    **options: Any,
) -> dict[str, Any]:  # fmt: skip
    """Return how often the interval covered and the error was within the tolerance, one run a seed."""
    entries = torch.as_tensor(truth, dtype=torch.float64).reshape(-1)
    scale = float(entries.abs().max())
    values, widths, passes, covered, held = [], [], [], 0, 0
    slack = ROUNDING * scale
    for seed in range(repetitions):
        generator = torch.Generator().manual_seed(seed)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", NotConvergedWarning)
            result = estimate(*operators, generator=generator, **options)
        found = result.value.reshape(-1)
        position = seed % len(entries)
        low, high = (float(end.reshape(-1)[position]) for end in result.interval)
        covered += low - slack <= float(entries[position]) <= high + slack
        error = float((found - entries).norm())
        held += not result.converged or error <= options.get("rtol", 1.0) * float(found.norm()) + slack
        values.append(float(found[position] - entries[position]))
        widths.append((high - low) / 2)
        passes.append(float(result.passes))
    entry = _entry(repetitions, covered, torch.tensor(values), torch.tensor(widths), scale)
    entry["passes"] = float(torch.tensor(passes).median())
    if "rtol" in options:
        entry |= {"held": held, "p_held": float(scipy.stats.binom.cdf(held, repetitions, 0.95))}
    return entry


def measure_at_once(
    estimate: Callable[..., Any], operators: Sequence[Known], truth: float, repetitions: int, **options: Any
) -> dict[str, Any]:
    """Return the same for runs at a fixed number of passes, made as one batch, and how wide intervals are."""
    spent = options["num_passes"]
    batch = [operator.times(repetitions) for operator in operators]
    generator = torch.Generator().manual_seed(0)
    result = estimate(*batch, **options | {"num_passes": spent * repetitions}, generator=generator)
    low, high = result.interval
    slack = ROUNDING * abs(truth)
    covered = int(((low - slack <= truth) & (truth <= high + slack)).sum())
    entry = _entry(repetitions, covered, result.value - truth, (high - low) / 2, truth)
    return entry | {"passes": float(spent), "width_ratio": _width_ratio(result.value, high - low, truth)}


def _width_ratio(values: Tensor, widths: Tensor, truth: float) -> float | None:
    """Return the median width over that of the interval by true quantiles; None where that has no end."""
    # Estimates are taken as multiples of the truth: the interval holds all truths for which the estimate lies
    # between the 2.5 and the 97.5 % quantile.
    low, high = (values / truth).quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    if not low > 0:
        return None
    inverted = float(values.abs().median()) * (1 / low - 1 / high)
    return digits(float(widths.median()) / inverted) if inverted > ROUNDING * abs(truth) else None


def _entry(repetitions: int, covered: int, errors: Tensor, widths: Tensor, truth: float) -> dict[str, Any]:
    return {
        "repetitions": repetitions, "covered": covered,
        "p_covered": float(scipy.stats.binom.cdf(covered, repetitions, LEAST)),
        "error": digits(float(errors.abs().median()) / abs(truth), 4),
        "half_width": digits(float(widths.median()) / abs(truth), 4),
    }  # fmt: skip


def _of_spectrum(
    name: str, values: Tensor, passes: Sequence[int], repetitions: int
) -> Iterator[dict[str, Any]]:
    """Single kernels, and pairs of them, at fixed passes and to a tolerance."""
    diagonal = [Known.diagonal_of(values)]
    first, second = turned(values, 0.3)
    one, other = first @ first.T, second @ second.T
    inner = float((one * other).sum())
    pair, cosine = [Known(first), Known(second)], inner / float(one.norm() * other.norm())
    jobs = [
        (label, estimate, diagonal, truth(values), m) for label, (estimate, truth, m) in QUANTITIES.items()
    ]
    jobs.append(("alignment", ntkops.alignment, pair, cosine, PAIRED))
    jobs.append(("inner", ntkops.inner, pair, inner, PAIRED))
    for label, estimate, operators, truth, methods in jobs:
        for method in methods:
            cell = {"spectrum": name, "quantity": label, "method": method}
            for count in passes:
                work = functools.partial(
                    measure_at_once, estimate, operators, truth, method=method, num_passes=count
                )
                try:
                    found = work(repetitions=repetitions)
                except InputError:  # fewer passes than the method takes
                    continue
                if found["p_covered"] < DOUBT:
                    found = work(repetitions=MORE * repetitions)
                yield {**cell, "num_passes": count, **found}
            if method in TOLERANCES and label != "inner":
                rtol = TOLERANCES[method]
                options = {"method": method, "rtol": rtol, "num_passes": 4000}
                yield {
                    **cell,
                    "rtol": rtol,
                    **measure_runs(estimate, operators, truth, repetitions, **options),
                }


def _stratified(repetitions: int) -> Iterator[dict[str, Any]]:
    """Stratified probes on the kernels of trained networks, at fixed passes and to a tolerance."""
    for name, (model, x) in networks().items():
        kernel = ntkops.ntk(model, x, max_dense_bytes=0)
        other = ntkops.ntk(_perturbed(model), x, max_dense_bytes=0)
        for label, estimate in (*((k, q[0]) for k, q in QUANTITIES.items()), ("alignment", ntkops.alignment)):
            operators = [kernel, other] if label == "alignment" else [kernel]
            truth = float(estimate(*operators, method="exact"))
            for ending in (
                {"num_passes": ON_NETWORKS["passes"] * len(operators)},
                {"rtol": ON_NETWORKS["rtol"]},
            ):
                found = measure_runs(estimate, operators, truth, repetitions, method="stratified", **ending)
                yield {"spectrum": name, "quantity": label, "method": "stratified", **ending, **found}


def _perturbed(model: nn.Module) -> nn.Module:
    """Return the network a few steps away, for the alignment."""
    twin = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in twin.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
            parameter.add_(0.1 * parameter.std(unbiased=False) * noise)
    return twin


def _partial_traces(repetitions: int) -> Iterator[dict[str, Any]]:
    """Partial traces of the kernels of trained networks, over outputs and over samples."""
    for name, (model, x) in networks().items():
        kernel = ntkops.ntk(model, x, max_dense_bytes=0)
        for over, method in (("outputs", "hutchinson"), ("samples", "stratified")):
            estimate = functools.partial(ntkops.partial_trace, over=over)
            options: dict[str, Any] = {"method": method, "num_passes": PARTIAL_PASSES}
            found = measure_runs(
                estimate, [kernel], estimate(kernel, method="exact").value, repetitions, **options
            )
            yield {"spectrum": name, "quantity": f"partial trace over {over}", **options, **found}


def _spectral_sums(size: int, repetitions: int) -> Iterator[dict[str, Any]]:
    """Log-determinants and effective dimensions by quadrature."""
    for name in SPECTRAL:
        values = HELD_OUT[name](size)
        ridge = RIDGE * float(values.mean())
        for label, estimate, truth in (
            ("log-determinant", ntkops.logdet, (values + ridge).log().sum()),
            ("effective dimension", ntkops.effective_dimension, (values / (values + ridge)).sum()),
        ):
            options: dict[str, Any] = {"method": "slq", "num_passes": SPECTRAL_PASSES}
            work = functools.partial(estimate, Known.diagonal_of(values), ridge)
            found = measure_runs(work, [], float(truth), repetitions, **options)
            yield {"spectrum": name, "quantity": label, **options, **found}


# How narrow an interval that covers can be with few probes: a bound by Neyman and Pearson's lemma. Of a
# kernel K, probes of one direction show W = Ωᵀ K Ω. Beside a flat bulk of many eigenvalues, whose entries of
# W off the diagonal are normal numbers of one size, a single direction adds c z zᵀ with z normal. Where the
# entries of z are small it is hidden. Let an interval for |K|_F² cover in .95 of the runs with a direction:
# its upper end lies below the value there in at most .05 of them, and "the upper end lies below" is a test of
# the direction at that level. On a bulk alone it happens at most with the power of the best test. Where that
# is below one half, the median upper end is at least the value with the direction, whatever the interval is
# made of, and even if it is told the size of the bulk.
LEVEL, DRAWS = 0.05, 3000
STRENGTHS = (2.0, 2.5, 3.0, 3.5, 4.0, 5.0)  # c; the value is c² + 1 times that of the bulk


def hidden_direction(probes: int) -> list[dict[str, float]]:
    """Return the value with directions of some strength, in terms of the bulk's, and the best test's power.

    The ratio is that of the value to the width of the interval by the true quantiles of Σ W_ij² on the bulk.
    """
    generator = torch.Generator().manual_seed(0)
    rows, cols = torch.triu_indices(probes, probes, 1)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    def directions(strength: float) -> Tensor:
        z = normal(DRAWS, probes)
        return strength * z[:, rows] * z[:, cols]

    low, high = normal(100_000, len(rows)).square().mean(1).quantile(torch.tensor([0.025, 0.975])).tolist()
    entries: list[dict[str, float]] = []
    for strength in STRENGTHS:
        candidates = directions(strength)

        def log_ratio(seen: Tensor, candidates: Tensor = candidates) -> Tensor:
            return (seen @ candidates.T - candidates.square().sum(1) / 2).logsumexp(1)

        beside = log_ratio(directions(strength) + normal(DRAWS, len(rows)))
        power = float((log_ratio(normal(DRAWS, len(rows))) < beside.quantile(LEVEL)).double().mean())
        value = strength**2 + 1
        ratio = value / (1 / low - 1 / high)
        entries.append({"value": value, "power": round(power, 3), "ratio": round(ratio, 2)})
    return entries


# the whole

NETWORKS = ("trained MLP", "trained CNN", "trained GRU")
OTHERS: dict[str, Callable[[int, int], Iterator[dict[str, Any]]]] = {
    "stratified": lambda size, repetitions: _stratified(repetitions),
    "partial traces": lambda size, repetitions: _partial_traces(repetitions),
    "spectral sums": _spectral_sums,
}


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Measure spectra, prescribed or of trained networks, and what is measured on networks alone."""
    size, passes, count = (
        (24, (24,), options.repetitions) if options.quick else (120, (8, 24, 60), options.repetitions)
    )
    entries: list[dict[str, Any]] = []
    for name in options.parts:
        say(name)
        if name in OTHERS:
            entries += OTHERS[name](size, count)
            continue
        if name in NETWORKS:
            kernel = ntkops.ntk(*networks()[name]).to_dense()
            values = torch.linalg.eigvalsh(kernel).flip(0).detach().clamp(min=0)
        else:
            values = HELD_OUT[name](size)
        entries += _of_spectrum(name, values, passes, count)
    noted = {"size": size, "passes": list(passes), "dtype": "float64"}
    return {"options": noted, "entries": entries, "hidden_direction": hidden_direction(4)}


def failures(entries: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Return the cells that are rejected, by Holm's procedure: the smallest p-value first."""

    def p_value(entry: Mapping[str, Any]) -> float:
        covered = float(scipy.stats.binom.cdf(entry["covered"], entry["repetitions"], LEAST))
        return min(covered, entry.get("p_held", 1.0))

    failed = []
    ranked = sorted(((p_value(entry), rank) for rank, entry in enumerate(entries)))
    for rank, (value, position) in enumerate(ranked):
        if value > SIGNIFICANCE / (len(entries) - rank):
            break
        failed.append(entries[position])
    return failed


def judge(result: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Say in how many cells coverage, or a tolerance, is rejected."""
    what = f"cells in which coverage of {LEAST} is rejected, 1 % after Holm's correction"
    of = f"{len(result['entries']):,} cells"
    return [verdict(what, of, len(failures(result["entries"])), most=0)]


def tables(result: Mapping[str, Any]) -> list[str]:
    """Return the least coverage of each quantity and method, over all spectra."""
    groups: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
    for entry in result["entries"]:
        groups.setdefault((entry["quantity"], entry["method"], "rtol" in entry), []).append(entry)
    rows = [_row(*key, group) for key, group in groups.items()]
    counts = [entry["repetitions"] for entry in result["entries"]]
    spectra = len({entry["spectrum"] for entry in result["entries"]})
    keys = ("Quantity", "Method", "Ended by", "Least coverage", "on", "Median coverage")
    keys += ("Greatest width ratio", "Tolerance held")
    failed = [f"{e['spectrum']}, {e['quantity']}, {e['method']}" for e in failures(result["entries"])]
    return [
        "",
        f"{min(counts)} to {max(counts)} repetitions of a cell on {spectra} spectra.",
        *table(rows, {key: key for key in keys}, left=3),
        *(["", f"Rejected: {'; '.join(failed)}."] if failed else []),
        *table(
            result["hidden_direction"],
            {"value, times that of the bulk": "value:g", "power of the best test": "power", "width": "ratio"},
            title="A hidden direction, 4 probes: where the power is below one half, no interval that covers "
            "is narrower, in multiples of the interval by true quantiles on the bulk:",
        ),
    ]


def _row(quantity: str, method: str, tolerant: bool, entries: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    shares = sorted((entry["covered"] / entry["repetitions"], entry["spectrum"]) for entry in entries)
    greatest: dict[int, float] = {}  # width ratio with each number of passes
    for entry in entries:
        if entry.get("width_ratio") is not None:
            passes = entry["num_passes"]
            greatest[passes] = max(greatest.get(passes, 0.0), entry["width_ratio"])
    held = min(entry["held"] / entry["repetitions"] for entry in entries) if tolerant else None
    return {
        "Quantity": quantity, "Method": method,
        "Ended by": f"rtol={entries[0]['rtol']:g}" if tolerant else "passes",
        "Least coverage": f"{shares[0][0]:.3f}",
        "on": min(entries, key=lambda e: e["covered"] / e["repetitions"])["spectrum"],
        "Median coverage": f"{shares[len(shares) // 2][0]:.3f}",
        "Greatest width ratio": ", ".join(f"{greatest[p]:.1f}" for p in sorted(greatest)) or "-",
        "Tolerance held": "-" if held is None else f"{held:.3f}",
    }  # fmt: skip


BENCHMARK = Benchmark(
    "coverage", __doc__, measure, tables, judge, parts=(*HELD_OUT, *NETWORKS, *OTHERS), repetitions=(500, 5),
    key=("spectrum", "quantity", "method", "num_passes", "rtol"),
)  # fmt: skip
main = BENCHMARK.main

if __name__ == "__main__":
    sys.exit(main())
