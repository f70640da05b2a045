"""K V for k columns: ntkops against what is written by hand with torch.

Run it with ``python benchmarks/products.py``; see README.md beside it for what is measured and how.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from _measure import Series, environment, interleaved, one_thread, peak_memory, ratio
from _models import CASES, Case
from _peers import PEERS, attention_with_derivatives
from _tables import fill, markdown, show
from torch import Tensor, nn

import ntkops

__all__ = ["measure_case", "prepare", "run"]

RESULTS = Path(__file__).parent / "results" / "products.json"
COLUMNS = (1, 8, 64)
QUICK_COLUMNS = (1, 3)
FIRST_BLOCK = 8
TOLERANCE = 1e-5

Product = Callable[[Tensor], Tensor]

VARIANTS = {
    "loop": "torch.func vjp and jvp, one column at a time, forward pass recomputed for each",
    "vmap": "torch.func vmap over all columns, of the vjp, then of the jvp",
    "double": "double backward: forward and first backward pass once, then two passes a column",
    "fused": "ntkops.ntk(model, x, engine='autograd', max_dense_bytes=0) @ V",
    "auto": "ntkops.ntk(model, x, max_dense_bytes=0) @ V once what its engine keeps has been made",
    "dense": "ntkops.ntk(model, x) @ V once its dense block has been built",
}
# What is claimed: (above, below, columns, least ratio of process CPU times).
TARGETS = (
    ("loop", "fused", 8, 1.5),
    ("vmap", "fused", 1, 0.9),
    ("vmap", "fused", 8, 0.9),
    ("vmap", "fused", 64, 0.9),
)


class Disagreement(RuntimeError):
    """Two ways of computing one product do not agree, so that their times say nothing."""


def operator(variant: str, model: nn.Module, x: Tensor) -> ntkops.NTKOperator:
    """Return the operator of one of our variants, before its first product."""
    if variant == "fused":
        return ntkops.ntk(model, x, engine="autograd", max_dense_bytes=0)
    return ntkops.ntk(model, x, max_dense_bytes=0 if variant == "auto" else "auto")


def product(variant: str, model: nn.Module, x: Tensor) -> Product:
    """Return V -> K V for one of the variants, ready to be called."""
    if variant in PEERS:
        return PEERS[variant](model, x)
    kernel = operator(variant, model, x)
    if variant == "dense":
        kernel.to_dense()
    return lambda vectors: kernel @ vectors


def vectors(rows: int, columns: int) -> Tensor:
    """Return the columns that everybody multiplies."""
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(2))


def prepare(name: str, quick: bool, variant: str, columns: int) -> Callable[[], object]:
    """Return the work whose memory is measured, after the same on two samples has loaded the code."""
    case = CASES[name]
    model, few = case.make(quick, samples=2)
    _, x = case.make(quick)
    outputs = _num_outputs(model, few)
    calls = _until_settled(outputs, columns) if variant == "auto" else 1

    def work(multiply: Product, x: Tensor) -> object:
        with attention_with_derivatives():
            return [multiply(vectors(len(x) * outputs, columns)) for _ in range(calls)]

    work(product(variant, model, few), few)
    if variant == "dense":  # building the block is part of what it costs
        return lambda: work(product(variant, model, x), x)
    ready = product(variant, model, x)
    return lambda: work(ready, x)


def _until_settled(outputs: int, columns: int) -> int:
    """Return how many products see to it that an engine has made whatever it keeps for later ones."""
    return 1 + math.ceil(outputs / columns)


def _num_outputs(model: nn.Module, x: Tensor) -> int:
    with torch.no_grad():
        return model(x)[0].numel()


def measure_case(
    case: Case, columns: int, *, quick: bool = False, repetitions: int = 9, memory: bool = True
) -> dict[str, Any]:
    """Check that all variants agree, then time them in turn.

    Args:
        case: Network and inputs.
        columns: Number k of columns.
        quick: Take the small size.
        repetitions: Times that each variant is timed.
        memory: Whether to start a process for each variant's peak memory.

    Returns:
        One entry of the JSON.

    Raises:
        Disagreement: If a variant differs from the loop by more than a relative 1e-5.
    """
    model, x = case.make(quick)
    engines = {variant: operator(variant, model, x) for variant in ("fused", "auto")}
    variants = [v for v in VARIANTS if v != "auto" or engines[v].engine_info.engine != "autograd"]
    rows = engines["fused"].shape[0]
    with attention_with_derivatives():
        products = {variant: product(variant, model, x) for variant in variants}
        block = vectors(rows, columns)
        agreement = _agreement(case, products, block)
        work = {name: _bound(multiply, block) for name, multiply in products.items()}
        for _ in range(_until_settled(_num_outputs(model, x), columns) if "auto" in work else 0):
            work["auto"]()
        series = interleaved(work, repetitions, shortest=0.002 if quick else 0.02)
    peaks = {v: peak_memory(prepare, case.name, quick, v, columns) if memory else None for v in variants}
    return {
        "model": case.name,
        "title": f"{case.name}, small" if quick else case.title,
        "samples": len(x),
        "n": rows,
        "parameters": engines["fused"].num_parameters,
        "columns": columns,
        "engines": {name: _described(kernel) for name, kernel in engines.items()},
        "agreement": agreement,
        "time": {name: found.summary() for name, found in series.items()},
        "ratios": _ratios(series),
        "memory_mb": peaks,
    }


def _described(kernel: ntkops.NTKOperator) -> dict[str, Any]:
    info = kernel.engine_info
    return {
        "engine": info.engine,
        "rung": info.mode,
        "chunk_size": info.chunk_size,
        "reasons": list(info.reasons),
    }


def _bound(multiply: Product, block: Tensor) -> Callable[[], object]:
    return lambda: multiply(block)


def _agreement(case: Case, products: dict[str, Product], block: Tensor) -> dict[str, float]:
    """Return the relative distance of each variant's result from the loop's."""
    reference = products["loop"](block).double()
    found = {}
    for name, multiply in products.items():
        distance = float((multiply(block).double() - reference).norm() / reference.norm())
        if not distance <= TOLERANCE:
            raise Disagreement(f"{case.name}: {name} differs from the loop by {distance:.1e}")
        found[name] = float(f"{distance:.2g}")
    return found


def _ratios(series: dict[str, Series]) -> dict[str, dict[str, dict[str, float]]]:
    pairs = [(peer, ours) for ours in series if ours not in PEERS for peer in PEERS]
    return {f"{above}/{below}": ratio(series[above], series[below]) for above, below in pairs}


def measure_setup(case: Case, *, quick: bool = False, repetitions: int = 5) -> dict[str, Any]:
    """Time what comes before the first product, and the first product of an operator that is cold."""
    model, x = case.make(quick)
    kernel = ntkops.ntk(model, x)
    block = vectors(kernel.shape[0], FIRST_BLOCK)

    def build() -> object:
        kernel.free()
        return kernel.to_dense()

    work = {
        "operator": lambda: ntkops.ntk(model, x),
        "operator_and_block": lambda: operator("auto", model, x) @ block,
        "dense_block": build,
    }
    series = interleaved(work, repetitions, shortest=0.002 if quick else 0.02)
    return {"model": case.name, **{name: found.summary() for name, found in series.items()}}


def _judge(cases: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Say for each target and network whether the median ratio of process CPU times reaches it."""
    verdicts = []
    for above, below, columns, least in TARGETS:
        for entry in cases:
            if entry["columns"] == columns:
                value = entry["ratios"][f"{above}/{below}"]["cpu"]["median"]
                verdicts.append(
                    {
                        "ratio": f"{above}/{below}",
                        "model": entry["model"],
                        "columns": columns,
                        "least": least,
                        "median": value,
                        "held": value >= least,
                    }
                )
    return verdicts


def run(
    models: Sequence[str] = tuple(CASES),
    *,
    quick: bool = False,
    repetitions: int | None = None,
    memory: bool = True,
    say: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Measure networks and return what the JSON file holds.

    Args:
        models: Names among `CASES`.
        quick: Small sizes, few repetitions.
        repetitions: Times that each variant is timed; None for 9, and 2 if quick.
        memory: Whether peak memory is measured; if quick, once.
        say: Told what comes next.

    Returns:
        Environment, options, cases, set-up times and whether the targets are held.
    """
    count = repetitions or (2 if quick else 9)
    cases, setup = [], []
    started = time.perf_counter()
    with one_thread():
        surroundings = environment()
        for name in models:
            case = CASES[name]
            for columns in QUICK_COLUMNS if quick else COLUMNS:
                say(f"{name}, k = {columns}")
                also_memory = memory and (not quick or (name == models[0] and columns == QUICK_COLUMNS[-1]))
                cases.append(measure_case(case, columns, quick=quick, repetitions=count, memory=also_memory))
            say(f"{name}, set-up")
            setup.append(measure_setup(case, quick=quick, repetitions=min(count, 5)))
    return {
        "benchmark": "products",
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "environment": surroundings,
        "options": {"quick": quick, "repetitions": count, "dtype": "float32", "device": "cpu"},
        "variants": VARIANTS,
        "cases": cases,
        "setup": setup,
        "targets": [] if quick else _judge(cases),
        "seconds": round(time.perf_counter() - started, 1),
    }


def _write(table: str, page: Path | None) -> int:
    if page is None:
        print(table)
    else:
        text = fill(page.read_text(encoding="utf-8"), "products", table)
        page.write_text(text, encoding="utf-8")
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument(
        "--models", nargs="+", choices=tuple(CASES), default=tuple(CASES), help="which networks"
    )
    parser.add_argument("--quick", action="store_true", help="small sizes: a smoke test, not a measurement")
    parser.add_argument("--repetitions", type=int, help="times that each variant is timed")
    parser.add_argument("--no-memory", action="store_true", help="leave peak memory out")
    parser.add_argument("--out", type=Path, help="JSON file to write (none by default)")
    parser.add_argument(
        "--markdown", type=Path, metavar="JSON", help="print a result as Markdown, run nothing"
    )
    parser.add_argument("--page", type=Path, help="with --markdown: put it into this page instead")
    options = parser.parse_args(arguments)
    if options.markdown is not None:
        return _write(markdown(json.loads(options.markdown.read_text(encoding="utf-8"))), options.page)
    result = run(
        options.models,
        quick=options.quick,
        repetitions=options.repetitions,
        memory=not options.no_memory,
        say=lambda text: print(text, file=sys.stderr),
    )
    show(result)
    if options.out is not None:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
