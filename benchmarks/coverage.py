"""Whether 95 % intervals cover and tolerances are met, by simulation on spectra that are known.

Run it with ``python benchmarks/coverage.py``; docs/coverage.md explains and shows the result.

Probes are uniform on spheres, so that an estimate of the trace, the norm or the effective rank depends on the
eigenvalues of a kernel alone: diagonal kernels stand for all with their spectrum. Two kernels of an alignment
are a diagonal one and one with turned eigenvectors. Runs that a number of passes ends are made as one batch
of equal kernels, each with its own probes; runs that a tolerance ends, and those on networks, one by one.
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
from _coverage_spectra import HELD_OUT, Known, network_spectra, turned
from _coverage_spectra import networks as trained_networks
from _measure import environment, one_thread
from _tables import fill
from torch import Tensor

import ntkops
from ntkops.errors import NotConvergedWarning

__all__ = ["QUANTITIES", "markdown", "measure", "run"]

Truth = Callable[[Tensor], float]

_SIGNIFICANCE = 1e-3
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
_ALIGNED = ("sketch", "ntk-hutch++", "hutch++", "hutchinson", "reverse", "forward")
_TOLERANCES = {"sketch": 0.03}  # where a tolerance ends it: what "auto" takes without layer structure
_ON_NETWORKS = {"passes": 2, "rtol": 0.05}  # stratified probes, whose blocks a spectrum does not show
_RIDGE = 1e-2  # of spectral sums, relative to the mean diagonal
_SPECTRAL = ("power law 1", "exponential", "step", "clusters", "spike")
_SPECTRAL_PASSES = 400
_ROUNDING = 1e-12


def measure(
    estimate: Callable[..., Any], operators: Sequence[Any], truth: float, repetitions: int, **options: Any
) -> dict[str, Any]:
    """Return how often the interval covered and the error was within the tolerance.

    Args:
        estimate: An estimator of ntkops.
        operators: What it is given.
        truth: The exact value.
        repetitions: Times that it runs, each with its own seed.
        options: Further arguments: method, num_passes or rtol.

    Returns:
        Counts, the p-values of one-sided binomial tests of .95, the median error, width and passes.
    """
    errors, widths, passes, covered, held = [], [], [], 0, 0
    slack = _ROUNDING * abs(truth)
    for seed in range(repetitions):
        generator = torch.Generator().manual_seed(seed)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", NotConvergedWarning)
            result = estimate(*operators, generator=generator, **options)
        low, high = (float(end) for end in result.interval)
        error = abs(float(result) - truth)
        covered += low - slack <= truth <= high + slack
        held += not result.converged or error <= options.get("rtol", 1.0) * abs(float(result)) + slack
        errors.append(error)
        widths.append((high - low) / 2)
        passes.append(float(result.passes))
    entry = _entry(repetitions, covered, torch.tensor(errors), torch.tensor(widths), truth)
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
        Counts, the p-value of the one-sided binomial test of .95, the median error and width.
    """
    spent = options["num_passes"]
    batch = [operator.times(repetitions) for operator in operators]
    generator = torch.Generator().manual_seed(0)
    result = estimate(*batch, **options | {"num_passes": spent * repetitions}, generator=generator)
    low, high = result.interval
    slack = _ROUNDING * abs(truth)
    covered = int(((low - slack <= truth) & (truth <= high + slack)).sum())
    errors, widths = (result.value - truth).abs(), (high - low) / 2
    return _entry(repetitions, covered, errors, widths, truth) | {"passes": float(spent)}


def _entry(repetitions: int, covered: int, errors: Tensor, widths: Tensor, truth: float) -> dict[str, Any]:
    return {
        "repetitions": repetitions,
        "covered": covered,
        "p_covered": float(scipy.stats.binom.cdf(covered, repetitions, 0.95)),
        "error": float(f"{float(errors.median()) / abs(truth):.4g}"),
        "half_width": float(f"{float(widths.median()) / abs(truth):.4g}"),
    }


def _cases(n: int, networks: bool) -> dict[str, Tensor]:
    cases = {name: make(n) for name, make in HELD_OUT.items()}
    return cases | network_spectra() if networks else cases


def run(
    *,
    size: int = 120,
    repetitions: int = 500,
    passes: Sequence[int] = (30, 96),
    spectra: Iterable[str] | None = None,
    methods: Iterable[str] | None = None,
    quantities: Iterable[str] | None = None,
    networks: bool = True,
    say: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Measure and return what the JSON file holds.

    Args:
        size: Eigenvalues of the prescribed spectra.
        repetitions: Runs of each cell.
        passes: Passes of the runs that a number of passes ends.
        spectra: Names, or None for all.
        methods: Names, or None for all.
        quantities: Names among `QUANTITIES` and "alignment", or None for all.
        networks: Whether the spectra of trained networks are among them.
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
                    entries += _cells(cell, estimate, operators, truth, chosen, passes, repetitions)
        if networks and (wanted is None or "stratified" in wanted) and spectra is None:
            entries += _on_networks(repetitions, say)
        if wanted is None and spectra is None and named is None:
            entries += _of_spectral_sums(size, repetitions, say)
    return {
        "benchmark": "coverage",
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "environment": place,
        "options": {"size": size, "repetitions": repetitions, "passes": list(passes), "dtype": "float64"},
        "entries": entries,
        "failures": [entry for entry in entries if _fails(entry)],
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
    yield "alignment", ntkops.alignment, [Known(first), Known(second)], cosine, _ALIGNED


def _cells(
    cell: dict[str, Any],
    estimate: Callable[..., Any],
    operators: Sequence[Known],
    truth: float,
    methods: Sequence[str],
    passes: Sequence[int],
    repetitions: int,
) -> list[dict[str, Any]]:
    entries = []
    for method in methods:
        for count in passes:
            spent = count * len(operators)
            options: dict[str, Any] = {"method": method, "num_passes": spent}
            found = measure_at_once(estimate, operators, truth, repetitions, **options)
            entries.append({**cell, "method": method, "num_passes": spent, **found})
    for method, rtol in _TOLERANCES.items():
        if method in methods:
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


def _fails(entry: dict[str, Any]) -> bool:
    return min(entry["p_covered"], entry.get("p_held", 1.0)) < _SIGNIFICANCE


def markdown(result: dict[str, Any]) -> str:
    """Return the least coverage of each quantity and method, over all spectra, in Markdown."""
    place, options = result["environment"], result["options"]
    header = ("Quantity", "Method", "Ended by", "Least coverage", "on", "Median coverage", "Tolerance held")
    rows = [
        f"Simulated on {result['date']} with torch {place['torch']}, ntkops {place['ntkops']}: "
        f"{options['repetitions']} repetitions on each of {len({e['spectrum'] for e in result['entries']})} "
        f"spectra. Coverage of .95 is rejected at level .001 in {len(result['failures'])} of "
        f"{len(result['entries'])} cells.",
        "",
        f"| {' | '.join(header)} |",
        "| :-- | :-- | :-- | --: | :-- | --: | --: |",
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
        cells = (quantity, method, ended, f"{shares[0]:.3f}", worst["spectrum"], f"{middle:.3f}", held)
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--size", type=int, default=120, help="eigenvalues of the prescribed spectra")
    parser.add_argument("--repetitions", type=int, default=500, help="runs of each cell")
    parser.add_argument("--passes", type=int, nargs="+", default=(30, 96), help="passes of fixed runs")
    parser.add_argument("--spectra", nargs="+", help="names of spectra (all by default)")
    parser.add_argument("--methods", nargs="+", help="names of methods (all by default)")
    parser.add_argument("--quantities", nargs="+", help="names of quantities (all by default)")
    parser.add_argument("--no-networks", action="store_true", help="leave trained networks out")
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
