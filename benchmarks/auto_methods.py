"""Whether ``method="auto"`` is about as fast as the best of its own methods.

Run it with ``python benchmarks/auto_methods.py``; docs/coverage.md shows the result.

Each cell is a network, trained or not, a quantity and a tolerance. Every method runs with each seed on a
kernel of its own, so that no cache is shared; its time is the median of its CPU times. The best method is the
fastest of those that met the tolerance in 19 of 20 seeds (with fewer: in all of them); methods are given up
beyond some multiple of the passes of the exact value. Cells below 20 ms may take 20 ms more. Cells of an
earlier file stand, with its date, where they are not measured again.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from _measure import environment, one_thread
from _models import CASES, KERNEL_CASES
from _tables import fill
from torch import Tensor, nn

import ntkops
from ntkops.errors import NotConvergedWarning, NtkopsError

__all__ = ["markdown", "run"]

_METHODS = ("exact", "stratified", "sketch")
_SMALL = 0.02  # seconds that a cell may take more
_GIVEN_UP = 6  # times the passes of the exact value
_HELD = 0.95  # share of the seeds in which a method that counts has met the tolerance
_STEPS = 60

QUANTITIES: dict[str, Callable[..., Any]] = {
    "trace": ntkops.trace,
    "norm": ntkops.frobenius_norm,
    "effective rank": ntkops.effective_rank,
    "alignment": ntkops.alignment,
}


class _Hidden(nn.Module):
    """Hidden states of a GRU over time."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.cell = nn.GRU(4, width, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        states: Tensor = self.cell(x)[0]
        return states


def _networks(quick: bool) -> dict[str, Callable[[], tuple[nn.Module, Tensor]]]:
    """Return what makes each network and its samples: n rows are samples times outputs."""

    def states(samples: int) -> tuple[nn.Module, Tensor]:
        width, length = (4, 3) if quick else (32, 8)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return _Hidden(width), torch.randn(4 if quick else samples, length, 4)

    return {
        "mlp, n=640": lambda: CASES["mlp"].make(quick),
        "mlp, n=12800": lambda: KERNEL_CASES["mlp"].make(quick, 1280),
        "cnn, n=160": lambda: CASES["cnn"].make(quick),
        "transformer, n=160": lambda: CASES["transformer"].make(quick),
        "gru over time, n=12800": lambda: states(50),
        "gru over time, n=32000": lambda: states(125),
    }


def _trained(model: nn.Module, x: Tensor) -> nn.Module:
    """Return a copy after some steps of regression on a function of the samples."""
    model = copy.deepcopy(model)
    target = torch.sin(x.flatten(1).double().sum(1)).float()
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(_STEPS):
        optimizer.zero_grad()
        (model(x).flatten(1).mean(1) - target).square().mean().backward()
        optimizer.step()
    return model.eval()


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
            return time.process_time() - start, None
    return time.process_time() - start, found


def _cell(
    estimate: Callable[..., Any], models: Sequence[nn.Module], x: Tensor, rtol: float, seeds: int
) -> dict[str, Any]:
    kernel_time, reference = _time(estimate, models, x, 0, method="exact")
    times: dict[str, float] = {"exact": kernel_time}
    cap = int(_GIVEN_UP * reference.passes) + 100
    for method in ("auto", *_METHODS):
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
        if method == "auto" or spent and held >= _HELD * len(spent):
            times[method] = statistics.median(spent)
    best = min((name for name in times if name != "auto"), key=times.__getitem__)
    ratio = times["auto"] / times[best]
    return {
        "seconds": {name: float(f"{value:.3g}") for name, value in times.items()},
        "best": best,
        "ratio": float(f"{ratio:.3g}"),
        "within": ratio <= 2 or times["auto"] <= times[best] + _SMALL,
    }


def run(
    *,
    seeds: int = 5,
    tolerances: Iterable[float] = (0.1, 0.05, 0.01),
    networks: Iterable[str] | None = None,
    quantities: Iterable[str] | None = None,
    states: Iterable[str] | None = None,
    seconds: float = float("inf"),
    quick: bool = False,
    kept: dict[str, Any] | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Measure and return what the JSON file holds.

    Args:
        seeds: Runs of each method in each cell.
        tolerances: Relative tolerances.
        networks: Names, or None for all.
        quantities: Names, or None for all.
        states: "untrained" or "trained", or None for both.
        seconds: CPU time after which no further cell is begun; the file lists what was left out.
        quick: Tiny networks.
        kept: An earlier result, whose cells stand where they are not measured again.
        say: Told what comes next.

    Returns:
        Environment, options, one entry for each cell, and the cells that were left out.
    """
    entries, left_out, started = [], [], time.process_time()
    tolerances, limit = tuple(tolerances), None if seconds == float("inf") else seconds
    with one_thread():
        place = environment()
        # Quantiles load SciPy when they are first asked for.
        ntkops.trace(
            torch.eye(9), method="hutchinson", num_passes=4, generator=torch.Generator().manual_seed(0)
        )
        for name, make in _networks(quick).items():
            if networks is not None and name not in set(networks):
                continue
            model, x = make()
            after = _trained(model, x)
            for state, current in (("untrained", model), ("trained", after)):
                for quantity, estimate in QUANTITIES.items():
                    if quantities is not None and quantity not in set(quantities):
                        continue
                    models = [model, after] if quantity == "alignment" else [current]
                    for rtol in tolerances:
                        cell = {"network": name, "state": state, "quantity": quantity, "rtol": rtol}
                        if states is not None and state not in set(states):
                            continue
                        if time.process_time() - started > seconds:
                            left_out.append(cell)
                            continue
                        say(f"{name}, {state}, {quantity}, {rtol:g}")
                        entries.append({**cell, "seeds": seeds, **_cell(estimate, models, x, rtol, seeds)})
    if kept is not None:
        entries, left_out = _joined(kept, entries), _joined({"entries": kept["left_out"]}, left_out, entries)
    return {
        "benchmark": "auto_methods",
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "environment": place,
        "options": {
            "seeds": seeds,
            "tolerances": list(tolerances),
            "seconds": limit,
        },
        "entries": entries,
        "left_out": left_out,
        "median_ratio": statistics.median(entry["ratio"] for entry in entries) if entries else None,
        "failures": [entry for entry in entries if not entry["within"]],
        "seconds": round(time.process_time() - started, 1),
    }


def _joined(
    kept: dict[str, Any], fresh: Sequence[dict[str, Any]], done: Sequence[dict[str, Any]] = ()
) -> list[dict[str, Any]]:
    """Return the cells of an earlier result that are not measured again, and the fresh ones."""

    def cell(entry: dict[str, Any]) -> tuple[Any, ...]:
        return tuple(entry[key] for key in ("network", "state", "quantity", "rtol"))

    known = {cell(entry) for entry in (*fresh, *done)}
    dated = {"date": kept["date"]} if "date" in kept else {}
    return [{**dated, **entry} for entry in kept["entries"] if cell(entry) not in known] + list(fresh)


def markdown(result: dict[str, Any]) -> str:
    """Return the table of all cells in Markdown."""
    count, failed, left = (len(result[part]) for part in ("entries", "failures", "left_out"))
    rows = [
        f"Measured on {result['date']}, one thread, {_range(entry['seeds'] for entry in result['entries'])} "
        f"seeds: the median ratio is "
        f"{result['median_ratio']:.2f}; {failed} of {count} cells take more than twice the best and 20 ms; "
        f"{left} were left out for lack of time.",
        "",
        "| Network | Quantity | rtol | auto, ms | best, ms | Best | Ratio |",
        "| :-- | :-- | --: | --: | --: | :-- | --: |",
    ]
    for entry in result["entries"]:
        auto, best = (1e3 * entry["seconds"][name] for name in ("auto", entry["best"]))
        rows.append(
            f"| {entry['network']}, {entry['state']} | {entry['quantity']} | {entry['rtol']:g} | "
            f"{auto:.3g} | {best:.3g} | {entry['best']} | {entry['ratio']:.2f} |"
        )
    return "\n".join(rows)


def _range(values: Iterable[int]) -> str:
    known = sorted(set(values))
    return str(known[0]) if len(known) == 1 else f"{known[0]} to {known[-1]}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--seeds", type=int, default=5, help="runs of each method in each cell")
    parser.add_argument("--tolerances", type=float, nargs="+", default=(0.1, 0.05, 0.01))
    parser.add_argument("--networks", nargs="+", help="names of networks (all by default)")
    parser.add_argument("--quantities", nargs="+", help="names of quantities (all by default)")
    parser.add_argument("--states", nargs="+", help="untrained, trained (both by default)")
    parser.add_argument("--keep", type=Path, metavar="JSON", help="an earlier result: its other cells stand")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="CPU time for all cells")
    parser.add_argument("--quick", action="store_true", help="tiny networks")
    parser.add_argument("--out", type=Path, help="JSON file to write (none by default)")
    parser.add_argument("--markdown", type=Path, metavar="JSON", help="print a result, run nothing")
    parser.add_argument("--page", type=Path, help="with --markdown: put the table into this page")
    options = parser.parse_args(arguments)
    if options.markdown is not None:
        text = markdown(json.loads(options.markdown.read_text(encoding="utf-8")))
        print(text)
        if options.page is not None:
            page = options.page.read_text(encoding="utf-8")
            options.page.write_text(fill(page, "auto", text + "\n"), encoding="utf-8")
        return 0
    result = run(
        seeds=options.seeds,
        tolerances=options.tolerances,
        networks=options.networks,
        quantities=options.quantities,
        states=options.states,
        kept=None if options.keep is None else json.loads(options.keep.read_text(encoding="utf-8")),
        seconds=options.seconds,
        quick=options.quick,
        say=lambda text: print(text, file=sys.stderr, flush=True),
    )
    print(markdown(result))
    if options.out is not None:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return 1 if result["failures"] else 0


if __name__ == "__main__":
    sys.exit(main())
