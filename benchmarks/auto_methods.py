"""Whether ``method="auto"`` is about as fast as the best of its own methods (docs/coverage.md).

Each cell is a network, trained or not, a quantity and a tolerance. Every method runs with each seed on a
kernel of its own, so that no cache is shared; its time is the median of its CPU times. The best method is the
fastest of those that met the tolerance in 19 of 20 seeds (with fewer: in all of them); methods are given up
beyond some multiple of the passes of the exact value. Cells below 20 ms may take 20 ms more.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from _measure import digits
from _models import CASES, KERNEL_CASES, States, fitted, normal, seeded
from _tables import Benchmark, say, table, verdict
from torch import Tensor, nn

import ntkops
from ntkops.errors import NotConvergedWarning, NtkopsError

METHODS = ("exact", "stratified", "sketch")
SMALL = 0.02  # seconds that a cell may take more
GIVEN_UP = 6  # times the passes of the exact value
HELD = 0.95  # share of the seeds in which a method that counts has met the tolerance
TIMES = 2.0  # the best that a cell may take

QUANTITIES: dict[str, Callable[..., Any]] = {
    "trace": ntkops.trace, "norm": ntkops.frobenius_norm, "effective rank": ntkops.effective_rank,
    "alignment": ntkops.alignment,
}  # fmt: skip


def states(samples: int, quick: bool) -> tuple[nn.Module, Tensor]:
    """Return hidden states of a GRU over time, and samples."""
    width, length = (4, 3) if quick else (32, 8)
    return seeded(States, 4, width), normal(4 if quick else samples, length, 4)


NETWORKS: dict[str, Callable[[bool], tuple[nn.Module, Tensor]]] = {
    "mlp, n=640": CASES["mlp"].make, "mlp, n=12800": partial(KERNEL_CASES["mlp"].make, samples=1280),
    "cnn, n=160": CASES["cnn"].make, "transformer, n=160": CASES["transformer"].make,
    "gru over time, n=12800": partial(states, 50), "gru over time, n=32000": partial(states, 125),
}  # fmt: skip


def _time(
    estimate: Callable[..., Any], models: Sequence[nn.Module], x: Tensor, seed: int, **options: Any
) -> tuple[float, Any]:
    """Return the CPU seconds of one estimate on fresh kernels, and what it gave: None if it was refused."""
    kernels = [ntkops.ntk(model, x, max_dense_bytes=0) for model in models]
    generator = torch.Generator().manual_seed(seed)
    start = time.process_time()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NotConvergedWarning)
        try:
            found = estimate(*kernels, generator=generator, **options)
        except NtkopsError:
            found = None
    return time.process_time() - start, found


def measure_cell(
    estimate: Callable[..., Any], models: Sequence[nn.Module], x: Tensor, rtol: float, seeds: int
) -> dict[str, Any]:
    """Return the time of each method that met the tolerance, and which is best."""
    kernel_time, reference = _time(estimate, models, x, 0, method="exact")
    times: dict[str, float] = {"exact": kernel_time}
    cap = int(GIVEN_UP * reference.passes) + 100
    for method in ("auto", *METHODS):
        spent, held = [], 0
        for seed in range(1 if method == "exact" else seeds):
            options = {"method": method, "rtol": rtol}
            if method not in ("auto", "exact"):
                options["num_passes"] = cap
            seconds, found = _time(estimate, models, x, seed, **options)
            if found is None:
                break
            spent.append(seconds)
            error = abs(float(found) - float(reference))
            held += found.converged and error <= rtol * abs(float(found)) + 1e-5 * abs(float(reference))
        if method == "auto" or spent and held >= HELD * len(spent):
            times[method] = statistics.median(spent)
    best = min((name for name in times if name != "auto"), key=times.__getitem__)
    seconds_of = {name: digits(value) for name, value in times.items()}
    return {"seconds": seconds_of, "best": best, "ratio": digits(times["auto"] / times[best])}


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Measure all cells of the networks, until the time is up."""
    entries, left_out, started = [], [], time.process_time()
    # Quantiles load SciPy when they are first asked for.
    few = torch.Generator().manual_seed(0)
    ntkops.trace(torch.eye(9), method="hutchinson", num_passes=4, generator=few)
    for name in options.parts:
        model, x = NETWORKS[name](options.quick)
        after = fitted(copy.deepcopy(model), x)
        for state, current in (("untrained", model), ("trained", after)):
            for quantity, estimate in QUANTITIES.items():
                models = [model, after] if quantity == "alignment" else [current]
                for rtol in options.tolerances:
                    cell = {"network": name, "state": state, "quantity": quantity, "rtol": rtol}
                    if time.process_time() - started > options.seconds:
                        left_out.append(cell)
                        continue
                    say(", ".join(map(str, cell.values())))
                    found = measure_cell(estimate, models, x, rtol, options.repetitions)
                    entries.append({**cell, "seeds": options.repetitions, **found})
    return {"entries": entries, "left_out": left_out, "options": {"tolerances": options.tolerances}}


def judge(result: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Say of each cell how many times the best it takes, beyond what small ones may take more."""

    def times(entry: Mapping[str, Any]) -> float:
        auto, best = (entry["seconds"][name] for name in ("auto", entry["best"]))
        return 1.0 if auto <= best + SMALL else entry["ratio"]

    what = "CPU time of auto over that of the best method, where it is 20 ms more"
    return [
        verdict(what, f"{e['network']}, {e['state']}, {e['quantity']}, {e['rtol']:g}", times(e), most=TIMES)
        for e in result["entries"]
    ]


def tables(result: Mapping[str, Any]) -> list[str]:
    """Return the median ratio, and a row a cell."""
    entries = result["entries"]
    if not entries:
        return []
    key = BENCHMARK.key
    cells = [{tuple(e[k] for k in key) for e in part} for part in (entries, result["left_out"])]
    left = len(cells[1] - cells[0])
    seeds = sorted({entry["seeds"] for entry in entries})

    def ms(entry: Mapping[str, Any], name: str) -> float:
        return 1e3 * entry["seconds"][name]

    return [
        "",
        f"The median ratio of {len(entries)} cells is {statistics.median(e['ratio'] for e in entries):.2f}, "
        f"with {' to '.join(map(str, dict.fromkeys((seeds[0], seeds[-1]))))} seeds each; {left} cells were "
        "left out for lack of time.",
        *table(
            entries,
            {
                "Network": lambda e: f"{e['network']}, {e['state']}", "Quantity": "quantity",
                "rtol": "rtol:g", "auto, ms": lambda e: ms(e, "auto"), "best, ms": lambda e: ms(e, e["best"]),
                "Best": "best", "Ratio": "ratio:.2f",
            },
        ),
    ]  # fmt: skip


BENCHMARK = Benchmark(
    "auto_methods", __doc__, measure, tables, judge, parts=tuple(NETWORKS),
    key=("network", "state", "quantity", "rtol"), repetitions=(5, 1),
    extra={
        "--tolerances": {"type": float, "nargs": "+", "default": [0.1, 0.05, 0.01], "help": "relative"},
        "--seconds": {"type": float, "default": float("inf"), "help": "begin no cell after this CPU time"},
    },
)  # fmt: skip
main = BENCHMARK.main

if __name__ == "__main__":
    sys.exit(main())
