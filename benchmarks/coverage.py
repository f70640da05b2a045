"""Whether 95 % intervals cover and tolerances are met, by simulation on spectra that are known.

Run it with ``python benchmarks/coverage.py``; docs/coverage.md explains and shows the result.

Probes are uniform on spheres, so that an estimate of the trace, the norm or the effective rank depends on the
eigenvalues of a kernel alone: diagonal kernels stand for all with their spectrum. Two kernels of an alignment
or an inner product are a diagonal one and one with turned eigenvectors. Of a partial trace each run looks at
one entry, the next one each time, so that runs stay independent. Runs that a number of
passes ends are made as one batch of equal kernels, each with its own probes; runs that a tolerance ends, and
those on networks, one by one.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import scipy.stats
import torch
from _coverage_bound import hidden_direction
from _coverage_spectra import HELD_OUT, Known, network_spectra, turned
from _coverage_spectra import networks as trained_networks
from _measure import environment, one_thread
from _tables import fill
from torch import Tensor

import ntkops
from ntkops.errors import InputError, NotConvergedWarning

__all__ = ["QUANTITIES", "markdown", "measure", "run"]

Truth = Callable[[Tensor], float]

_LEAST = 0.93  # coverage that no cell may be significantly below
_SIGNIFICANCE = 0.01  # after Holm's correction over all cells
_DOUBT = 0.05  # p-value below which a cell is run again with more repetitions
_MORE = 4
_SINGLE = ("sketch", "xtrace", "ntk-hutch++", "hutch++", "hutchinson")
QUANTITIES: dict[str, tuple[Callable[..., Any], Truth, tuple[str, ...]]] = {
    "trace": (ntkops.trace, lambda v: float(v.sum()), (*_SINGLE, "rhutch", "fhutch")),
    "norm": (ntkops.frobenius_norm, lambda v: float(v.norm()), (*_SINGLE, "reverse", "forward")),
    "effective rank": (
        ntkops.effective_rank,
        lambda v: float(v.sum().square() / v.square().sum()),
        (*_SINGLE, "reverse", "forward"),
    ),
}
_PAIRED = ("sketch", "ntk-hutch++", "hutch++", "hutchinson", "reverse", "forward")
_TOLERANCES = {"sketch": 0.03}  # where a tolerance ends it: what "auto" takes without layer structure
_ON_NETWORKS = {"passes": 2, "rtol": 0.05}  # stratified probes, whose blocks a spectrum does not show
_RIDGE = 1e-2  # of spectral sums, relative to the mean diagonal
_SPECTRAL = ("power law 1", "exponential", "step", "clusters", "spike")
_SPECTRAL_PASSES = 400
_PARTIAL_PASSES = 3
_ROUNDING = 1e-12


def measure(
    estimate: Callable[..., Any],
    operators: Sequence[Any],
    truth: float | Tensor,
    repetitions: int,
    **options: Any,
) -> dict[str, Any]:
    """Return how often the interval covered and the error was within the tolerance.

    Args:
        estimate: An estimator of ntkops.
        operators: What it is given.
        truth: The exact value, or all entries of one.
        repetitions: Times that it runs, each with its own seed.
        options: Further arguments: method, num_passes or rtol.

    Returns:
        Counts, the p-values of one-sided binomial tests, the median error, width and passes.
    """
    entries = torch.as_tensor(truth, dtype=torch.float64).reshape(-1)
    scale = float(entries.abs().max())
    values, widths, passes, covered, held = [], [], [], 0, 0
    slack = _ROUNDING * scale
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
    """Return the same for runs at a fixed number of passes, made as one batch.

    Args:
        estimate: An estimator of ntkops.
        operators: What it is given, once.
        truth: The exact value.
        repetitions: Size of the batch.
        options: Further arguments: method and num_passes.

    Returns:
        Counts, the p-value of the one-sided binomial test, the median error and width, and the ratio of the
        width to that of the interval which the true quantiles of the estimate give.
    """
    spent = options["num_passes"]
    batch = [operator.times(repetitions) for operator in operators]
    generator = torch.Generator().manual_seed(0)
    result = estimate(*batch, **options | {"num_passes": spent * repetitions}, generator=generator)
    low, high = result.interval
    slack = _ROUNDING * abs(truth)
    covered = int(((low - slack <= truth) & (truth <= high + slack)).sum())
    entry = _entry(repetitions, covered, result.value - truth, (high - low) / 2, truth)
    return entry | {"passes": float(spent), "width_ratio": _width_ratio(result.value, high - low, truth)}


def _width_ratio(values: Tensor, widths: Tensor, truth: float) -> float | None:
    """Return the median width over that of the interval by true quantiles; None where that has no end.

    The estimates are taken as multiples of the truth: the interval holds all truths for which the estimate
    lies between the 2.5 and the 97.5 % quantile.
    """
    low, high = (values / truth).quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    if not low > 0:
        return None
    inverted = float(values.abs().median()) * (1 / low - 1 / high)
    return float(f"{float(widths.median()) / inverted:.3g}") if inverted > _ROUNDING * abs(truth) else None


def _entry(repetitions: int, covered: int, errors: Tensor, widths: Tensor, truth: float) -> dict[str, Any]:
    return {
        "repetitions": repetitions,
        "covered": covered,
        "p_covered": float(scipy.stats.binom.cdf(covered, repetitions, _LEAST)),
        "error": float(f"{float(errors.abs().median()) / abs(truth):.4g}"),
        "half_width": float(f"{float(widths.median()) / abs(truth):.4g}"),
    }


def _cases(n: int, networks: bool) -> dict[str, Tensor]:
    cases = {name: make(n) for name, make in HELD_OUT.items()}
    return cases | network_spectra() if networks else cases


def run(
    *,
    size: int = 120,
    repetitions: int = 500,
    passes: Sequence[int] = (8, 24, 60),
    spectra: Iterable[str] | None = None,
    methods: Iterable[str] | None = None,
    quantities: Iterable[str] | None = None,
    networks: bool = True,
    tolerances: bool = False,
    kept: dict[str, Any] | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Measure and return what the JSON file holds.

    Args:
        size: Eigenvalues of the prescribed spectra.
        repetitions: Runs of each cell.
        passes: Passes of the runs that a number of passes ends; those of two kernels have as many, not twice.
        spectra: Names, or None for all.
        methods: Names, or None for all.
        quantities: Names among `QUANTITIES`, "alignment", "inner" and "partial trace", or None for all.
        networks: Whether the spectra of trained networks are among them.
        tolerances: Whether runs to a tolerance, made one by one, are repeated although ``kept`` has them.
        kept: An earlier result, whose cells stand as they are, with their date, where they are not measured
            again; stratified runs and spectral sums, made one by one, are not repeated.
        say: Told what comes next.

    Returns:
        Environment, options and one entry for each cell.
    """
    started = time.perf_counter()
    wanted = None if methods is None else set(methods)
    named = None if quantities is None else set(quantities)
    entries: list[dict[str, Any]] = []
    with one_thread():
        place = environment()
        for name, values in _cases(size, networks).items():
            if spectra is not None and name not in set(spectra):
                continue
            say(name)
            for label, estimate, operators, truth, known in _jobs(values):
                if named is None or label in named:
                    chosen = [method for method in known if wanted is None or method in wanted]
                    cell = {"spectrum": name, "quantity": label}
                    known_rtol = label != "inner" and (kept is None or tolerances)
                    entries += _cells(
                        cell, estimate, operators, truth, chosen, passes, repetitions, tolerances=known_rtol
                    )
        if networks and spectra is None and (named is None or "partial trace" in named):
            entries += _of_partial_traces(repetitions, wanted, say)
        if kept is not None:
            entries += _carried(kept, entries)
        elif networks and (wanted is None or "stratified" in wanted) and spectra is None:
            entries += _on_networks(repetitions, say)
        if kept is None and wanted is None and spectra is None and named is None:
            entries += _of_spectral_sums(size, repetitions, say)
    return {
        "benchmark": "coverage",
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "environment": place,
        "options": {"size": size, "repetitions": repetitions, "passes": list(passes), "dtype": "float64"},
        "entries": entries,
        "hidden_direction": hidden_direction(4),
        "failures": _failures(entries),
        "seconds": round(time.perf_counter() - started, 1),
    }


def _jobs(values: Tensor) -> Iterable[tuple[str, Callable[..., Any], list[Known], float, tuple[str, ...]]]:
    """Yield quantity, estimator, operators, exact value and methods."""
    diagonal = [Known.diagonal_of(values)]
    for label, (estimate, truth, methods) in QUANTITIES.items():
        yield label, estimate, diagonal, truth(values), methods
    first, second = turned(values, 0.3)
    one, other = first @ first.T, second @ second.T
    cosine = float((one * other).sum() / (one.norm() * other.norm()))
    kernels = [Known(first), Known(second)]
    yield "alignment", ntkops.alignment, kernels, cosine, _PAIRED
    yield "inner", ntkops.inner, kernels, float((one * other).sum()), _PAIRED


def _cells(
    cell: dict[str, Any],
    estimate: Callable[..., Any],
    operators: Sequence[Known],
    truth: float,
    methods: Sequence[str],
    passes: Sequence[int],
    repetitions: int,
    *,
    tolerances: bool,
) -> list[dict[str, Any]]:
    entries = []
    for method in methods:
        for count in passes:
            options: dict[str, Any] = {"method": method, "num_passes": count}
            try:
                found = measure_at_once(estimate, operators, truth, repetitions, **options)
            except InputError:  # fewer passes than the method takes
                continue
            if found["p_covered"] < _DOUBT:
                found = measure_at_once(estimate, operators, truth, _MORE * repetitions, **options)
            entries.append({**cell, **options, **found})
    for method, rtol in _TOLERANCES.items():
        if tolerances and method in methods:
            options = {"method": method, "rtol": rtol, "num_passes": 4000}
            found = measure(estimate, operators, truth, repetitions, **options)
            entries.append({**cell, "method": method, "rtol": rtol, **found})
    return entries


def _on_networks(repetitions: int, say: Callable[[str], None]) -> list[dict[str, Any]]:
    """Stratified probes on the kernels of trained networks, at fixed passes and to a tolerance."""
    entries = []
    for name, (model, x) in trained_networks().items():
        say(f"{name}, stratified")
        kernel = ntkops.ntk(model, x, max_dense_bytes=0)
        other = ntkops.ntk(_perturbed(model), x, max_dense_bytes=0)
        for label, estimate in (*((k, q[0]) for k, q in QUANTITIES.items()), ("alignment", ntkops.alignment)):
            operators = [kernel, other] if label == "alignment" else [kernel]
            truth = float(estimate(*operators, method="exact"))
            cell = {"spectrum": name, "quantity": label, "method": "stratified"}
            spent = _ON_NETWORKS["passes"] * len(operators)
            found = measure(estimate, operators, truth, repetitions, method="stratified", num_passes=spent)
            entries.append({**cell, "num_passes": spent, **found})
            rtol = _ON_NETWORKS["rtol"]
            found = measure(estimate, operators, truth, repetitions, method="stratified", rtol=rtol)
            entries.append({**cell, "rtol": rtol, **found})
    return entries


def _of_partial_traces(
    repetitions: int, wanted: set[str] | None, say: Callable[[str], None]
) -> list[dict[str, Any]]:
    """Partial traces of the kernels of trained networks, over outputs and over samples."""
    entries = []
    for name, (model, x) in trained_networks().items():
        say(f"{name}, partial traces")
        kernel = ntkops.ntk(model, x, max_dense_bytes=0)
        for over, method in (("outputs", "hutchinson"), ("samples", "stratified")):
            if wanted is not None and method not in wanted:
                continue
            truth = ntkops.partial_trace(kernel, over, method="exact").value
            options: dict[str, Any] = {"method": method, "num_passes": _PARTIAL_PASSES}

            def once(kernel: Any, over: str = over, **options: Any) -> Any:
                return ntkops.partial_trace(kernel, over, **options)

            found = measure(once, [kernel], truth, repetitions, **options)
            entries.append({"spectrum": name, "quantity": f"partial trace over {over}", **options, **found})
    return entries


def _carried(kept: dict[str, Any], fresh: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the entries of an earlier result that were not measured again, each with its date."""

    def cell(entry: dict[str, Any]) -> tuple[Any, ...]:
        return tuple(entry.get(key) for key in ("spectrum", "quantity", "method", "num_passes", "rtol"))

    measured = {cell(entry) for entry in fresh}
    entries = []
    for entry in kept["entries"]:
        if cell(entry) not in measured:
            again = float(scipy.stats.binom.cdf(entry["covered"], entry["repetitions"], _LEAST))
            entries.append({"date": kept["date"], **entry, "p_covered": again})
    return entries


def _perturbed(model: torch.nn.Module) -> torch.nn.Module:
    """Return the network a few steps away, for the alignment."""
    twin = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in twin.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
            parameter.add_(0.1 * parameter.std(unbiased=False) * noise)
    return twin


def _of_spectral_sums(size: int, repetitions: int, say: Callable[[str], None]) -> list[dict[str, Any]]:
    """Log-determinants and effective dimensions by quadrature."""
    entries = []
    for name in _SPECTRAL:
        say(f"{name}, spectral sums")
        values = HELD_OUT[name](size)
        operator, ridge = Known.diagonal_of(values), _RIDGE * float(values.mean())
        truths = {
            "log-determinant": (ntkops.logdet, float((values + ridge).log().sum())),
            "effective dimension": (ntkops.effective_dimension, float((values / (values + ridge)).sum())),
        }
        for label, (estimate, truth) in truths.items():

            def once(kernel: Known, estimate: Callable[..., Any] = estimate, **options: Any) -> Any:
                return estimate(kernel, ridge, **options)  # noqa: B023

            cell = {"spectrum": name, "quantity": label, "method": "slq"}
            options: dict[str, Any] = {"method": "slq", "num_passes": _SPECTRAL_PASSES}
            found = measure(once, [operator], truth, repetitions, **options)
            entries.append({**cell, "num_passes": _SPECTRAL_PASSES, **found})
    return entries


def _failures(entries: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the cells that are rejected, by Holm's procedure: the smallest p-value first."""
    values = [min(entry["p_covered"], entry.get("p_held", 1.0)) for entry in entries]
    failed = []
    for rank, position in enumerate(sorted(range(len(values)), key=values.__getitem__)):
        if values[position] > _SIGNIFICANCE / (len(values) - rank):
            break
        failed.append(entries[position])
    return failed


def markdown(result: dict[str, Any]) -> str:
    """Return the least coverage of each quantity and method, over all spectra, in Markdown."""
    place = result["environment"]
    least, most = (pick(e["repetitions"] for e in result["entries"]) for pick in (min, max))
    header = (
        "Quantity",
        "Method",
        "Ended by",
        "Least coverage",
        "on",
        "Median coverage",
        "Greatest width ratio",
        "Tolerance held",
    )
    rows = [
        f"Simulated on {result['date']} with torch {place['torch']}, ntkops {place['ntkops']}: "
        f"{least} to {most} repetitions of a cell on "
        f"{len({e['spectrum'] for e in result['entries']})} spectra. Coverage "
        f"of {_LEAST} is rejected (1 % after Holm's correction) in {len(result['failures'])} of "
        f"{len(result['entries'])} cells.",
        "",
        f"| {' | '.join(header)} |",
        "| :-- | :-- | :-- | --: | :-- | --: | --: | --: |",
    ]
    keys = dict.fromkeys((e["quantity"], e["method"], "rtol" in e) for e in result["entries"])
    for quantity, method, tolerant in keys:
        same = [
            e
            for e in result["entries"]
            if (e["quantity"], e["method"], "rtol" in e) == (quantity, method, tolerant)
        ]
        shares = sorted(e["covered"] / e["repetitions"] for e in same)
        worst = min(same, key=lambda e: e["covered"] / e["repetitions"])
        held = f"{min(e['held'] / e['repetitions'] for e in same):.3f}" if tolerant else "-"
        ended = f"rtol={worst['rtol']:g}" if tolerant else "passes"
        middle = shares[len(shares) // 2]
        cells = (
            quantity,
            method,
            ended,
            f"{shares[0]:.3f}",
            worst["spectrum"],
            f"{middle:.3f}",
            _ratios(same),
            held,
        )
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)


def _ratios(entries: Sequence[dict[str, Any]]) -> str:
    """Return the greatest width ratio with each number of passes, fewest first."""
    greatest: dict[int, float] = {}
    for entry in entries:
        if entry.get("width_ratio") is not None:
            passes = entry["num_passes"]
            greatest[passes] = max(greatest.get(passes, 0.0), entry["width_ratio"])
    return ", ".join(f"{greatest[passes]:.1f}" for passes in sorted(greatest)) or "-"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--size", type=int, default=120, help="eigenvalues of the prescribed spectra")
    parser.add_argument("--repetitions", type=int, default=500, help="runs of each cell")
    parser.add_argument("--passes", type=int, nargs="+", default=(8, 24, 60), help="passes of fixed runs")
    parser.add_argument("--spectra", nargs="+", help="names of spectra (all by default)")
    parser.add_argument("--methods", nargs="+", help="names of methods (all by default)")
    parser.add_argument("--quantities", nargs="+", help="names of quantities (all by default)")
    parser.add_argument("--no-networks", action="store_true", help="leave trained networks out")
    parser.add_argument("--tolerances", action="store_true", help="with --keep: repeat runs to a tolerance")
    parser.add_argument(
        "--keep", type=Path, metavar="JSON", help="an earlier result, of which runs made one by one stand"
    )
    parser.add_argument("--out", type=Path, help="JSON file to write (none by default)")
    parser.add_argument(
        "--markdown", type=Path, metavar="JSON", help="print a result as Markdown, run nothing"
    )
    parser.add_argument("--page", type=Path, help="with --markdown: put the table into this page")
    options = parser.parse_args(arguments)
    if options.markdown is not None:
        text = markdown(json.loads(options.markdown.read_text(encoding="utf-8")))
        print(text)
        if options.page is not None:
            page = options.page.read_text(encoding="utf-8")
            options.page.write_text(fill(page, "coverage", text + "\n"), encoding="utf-8")
        return 0
    result = run(
        size=options.size,
        repetitions=options.repetitions,
        passes=options.passes,
        spectra=options.spectra,
        methods=options.methods,
        quantities=options.quantities,
        networks=not options.no_networks,
        tolerances=options.tolerances,
        kept=None if options.keep is None else json.loads(options.keep.read_text(encoding="utf-8")),
        say=lambda text: print(text, file=sys.stderr, flush=True),
    )
    print(markdown(result))
    for entry in result["failures"]:
        print("FAILED", json.dumps(entry))
    if options.out is not None:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return 1 if result["failures"] else 0


if __name__ == "__main__":
    sys.exit(main())
