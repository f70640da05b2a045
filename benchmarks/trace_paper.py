"""The experiments of the trace-estimation paper measured again: its estimators, ours, and exact values.

Run it with ``python benchmarks/trace_paper.py``; docs/trace_estimation.md explains and shows the result.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from _measure import environment, one_thread
from _tables import fill
from _trace_claims import claims, judge, markdown
from _trace_curves import exact_values, our_curves, paper_curves, slope
from _trace_methods import hutch_pp
from _trace_networks import NAMES, Problem, build

__all__ = ["run"]

# What is asked of each network: quantities, the paper's m, and our methods with their passes.
TRACE_GRID = (6, 12, 30, 60, 120, 240, 480, 960)
STATE_GRID = (6, 12, 30, 60, 126, 258, 540)
SKETCH_GRID = (20, 40, 60, 120, 240)
STRATIFIED_GRID = (1, 2, 4, 8, 16)
PAIR_GRID = (2, 4, 8)
TWO_KERNELS_GRID = (4, 8, 16)  # two per-sample passes of each
Plan = tuple[tuple[str, str, Sequence[int]], ...]
QUANTITIES = {
    "mlp": ("trace", "frobenius_norm", "effective_rank"),
    "gru": ("trace",),
    "gru_printed": ("trace",),
    "gru32": ("trace",),
    "digits": ("trace", "frobenius_norm", "effective_rank", "alignment"),
    "classifier": ("frobenius_norm", "effective_rank", "alignment"),
}
PAPER_GRIDS: dict[str, Sequence[int]] = {
    "mlp": TRACE_GRID,
    "gru": STATE_GRID,
    "gru_printed": (6, 30, 126),
    "gru32": (6, 12, 30, 60, 126, 258),
    "digits": (60, 120, 240, 480, 960),
    "classifier": (60, 120, 240, 480),
}
OURS: dict[str, Plan] = {
    "mlp": (
        ("trace", "sketch", SKETCH_GRID),
        ("trace", "xtrace", SKETCH_GRID),
        ("trace", "ntk-hutch++", (30, 60, 120, 240)),
        ("trace", "hutch++", (30, 60, 120, 240, 480)),
        ("trace", "rhutch", (6, 12, 30, 60, 120)),
        ("trace", "stratified", STRATIFIED_GRID),
        ("frobenius_norm", "sketch", SKETCH_GRID),
        ("frobenius_norm", "hutch++", (30, 60, 120, 240, 480)),
        ("frobenius_norm", "reverse", (12, 30, 60, 120)),
        ("frobenius_norm", "stratified", PAIR_GRID),
        ("effective_rank", "sketch", SKETCH_GRID),
        ("effective_rank", "hutch++", (30, 60, 120, 240, 480)),
        ("effective_rank", "stratified", PAIR_GRID),
    ),
    "gru": (
        ("trace", "rhutch", (6, 12, 30, 60)),
        ("trace", "fhutch", (6, 12, 30, 60)),
        ("trace", "sketch", (60, 126, 258, 540)),
        ("trace", "stratified", (1, 2, 4, 8)),
    ),
    "gru_printed": (("trace", "fhutch", (6, 30, 60)), ("trace", "stratified", (1, 4))),
    "gru32": (
        ("trace", "rhutch", (6, 12, 30, 60)),
        ("trace", "fhutch", (6, 12, 30, 60)),
        ("trace", "sketch", (30, 60, 126, 258, 540)),
        ("trace", "auto", (12, 30, 60)),
    ),
    "digits": (
        ("trace", "sketch", (40, 80, 160, 320)),
        ("trace", "xtrace", (40, 80, 160, 320)),
        ("trace", "hutch++", (40, 80, 160, 320, 640)),
        ("trace", "stratified", STRATIFIED_GRID[:-1]),
        ("frobenius_norm", "sketch", (40, 80, 160, 320)),
        ("frobenius_norm", "hutch++", (40, 80, 160, 320)),
        ("frobenius_norm", "stratified", PAIR_GRID),
        ("effective_rank", "sketch", (40, 80, 160, 320)),
        ("effective_rank", "stratified", PAIR_GRID),
        ("alignment", "sketch", (32, 64, 128)),
        ("alignment", "hutch++", (64, 128, 256)),
        ("alignment", "stratified", TWO_KERNELS_GRID),
    ),
    "classifier": (
        ("frobenius_norm", "sketch", (60, 120, 240)),
        ("frobenius_norm", "stratified", PAIR_GRID),
        ("effective_rank", "sketch", (60, 120, 240)),
        ("effective_rank", "stratified", PAIR_GRID),
        ("alignment", "sketch", (32, 64, 128, 256)),
        ("alignment", "stratified", TWO_KERNELS_GRID),
    ),
}
_QUICK: Plan = (("trace", "rhutch", (2, 4)), ("trace", "sketch", (8,)), ("trace", "stratified", (1,)))
_REPETITIONS = {"gru": 10, "gru_printed": 10, "gru32": 20}
_PAPER_REPETITIONS = {"mlp": 7, "gru": 3, "gru_printed": 3, "gru32": 7, "digits": 11, "classifier": 5}
_SHOWN = 20


def measure(problem: Problem, *, quick: bool, repetitions: int | None, paper: int | None) -> dict[str, Any]:
    """Measure one network: exact values, the paper's estimators, ours.

    Args:
        problem: The network.
        quick: Smallest sizes.
        repetitions: Repetitions of our estimators; None for the benchmark's own choice.
        paper: Repetitions of the paper's.

    Returns:
        One entry of the result.
    """
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
    """Return the time of Hutch++ at m = n relative to n products: the paper says 0.8 to 1.2.

    Args:
        problem: The network.

    Returns:
        Seconds of both and their ratio.
    """
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
    say: Callable[[str], None] = lambda text: None,
    keep: Callable[[dict[str, Any]], None] = lambda result: None,
) -> dict[str, Any]:
    """Measure the networks and return the result, ready for JSON.

    Args:
        names: Which networks.
        quick: Smallest sizes, few repetitions.
        repetitions: Repetitions of our estimators.
        paper_repetitions: Repetitions of the paper's.
        mnist: ``.npz`` file of MNIST for the classifier.
        before: The result of an interrupted run with the same options: its networks are not measured again.
        say: Told what is being done.
        keep: Given the result so far after each network.

    Returns:
        The result.

    Raises:
        ValueError: `before` was measured with other options or in another environment.
    """
    result: dict[str, Any] = {
        "benchmark": "trace_paper",
        "date": datetime.now(UTC).date().isoformat(),
        "environment": {**environment(), "threads": 1},
        "options": {"quick": quick, "data": "MNIST" if mnist else "digits"},
        "problems": [],
        "hutch_at_n": None,
        "seconds": 0.0,
    }
    if before is not None:
        if any(before[key] != result[key] for key in ("environment", "options")):
            raise ValueError("the result to go on from was measured with other options or elsewhere")
        result = before
    spent, started = result["seconds"], time.perf_counter()
    done = {entry["name"] for entry in result["problems"]}
    with one_thread():
        for name in (name for name in names if name not in done):
            problem = build(name, quick=quick, mnist=mnist)
            say(problem.title)
            result["problems"].append(
                measure(problem, quick=quick, repetitions=repetitions, paper=paper_repetitions)
            )
            if name == "mlp":
                say("Hutch++ at m = n")
                result["hutch_at_n"] = full_hutch_pp(problem)
            result["seconds"] = round(spent + time.perf_counter() - started, 1)
            keep(result)
    result["problems"].sort(key=lambda entry: NAMES.index(entry["name"]))
    result["targets"] = [] if quick else judge(result)
    result["claims"] = [] if quick else claims(result)
    return result


def main(arguments: Sequence[str] | None = None) -> int:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--networks", nargs="+", choices=NAMES, default=NAMES, help="which networks")
    parser.add_argument("--quick", action="store_true", help="small sizes: a smoke test, not a measurement")
    parser.add_argument("--repetitions", type=int, help="repetitions of our estimators (20, GRU 10)")
    parser.add_argument(
        "--paper-repetitions", type=int, help="repetitions of the paper's (20, slow ones 5 or 10)"
    )
    parser.add_argument("--data", type=Path, metavar="NPZ", help="MNIST for the classifier (else digits)")
    parser.add_argument("--out", type=Path, help="JSON file to write after each network (none by default)")
    parser.add_argument("--resume", action="store_true", help="keep the networks that --out holds already")
    parser.add_argument("--figures", type=Path, metavar="DIR", help="draw figures 1 to 4 into this folder")
    parser.add_argument(
        "--markdown", type=Path, metavar="JSON", help="print and draw a stored result, run nothing"
    )
    parser.add_argument("--page", type=Path, help="with --markdown: put the tables into this page")
    options = parser.parse_args(arguments)
    if options.markdown is not None:
        result = json.loads(options.markdown.read_text(encoding="utf-8"))
        text = markdown(result)
        print(text)
        if options.page is not None:
            page = options.page.read_text(encoding="utf-8")
            options.page.write_text(fill(page, "trace_paper", text + "\n"), encoding="utf-8")
    else:

        def keep(result: dict[str, Any]) -> None:
            if options.out is not None:
                options.out.parent.mkdir(parents=True, exist_ok=True)
                options.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")

        before = options.resume and options.out is not None and options.out.exists()
        result = run(
            options.networks,
            quick=options.quick,
            repetitions=options.repetitions,
            paper_repetitions=options.paper_repetitions,
            mnist=options.data,
            before=json.loads(options.out.read_text(encoding="utf-8")) if before else None,
            keep=keep,
            say=lambda text: print(text, file=sys.stderr, flush=True),
        )
        keep(result)
        print(markdown(result))
    if options.figures is not None:
        from _trace_figures import draw

        draw(result, options.figures)
    return 0


if __name__ == "__main__":
    sys.exit(main())
