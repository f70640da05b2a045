"""Exact kernels, traces, diagonals and lazy products of the layerwise engine, beside what else there is.

Run it with ``python benchmarks/exact_kernels.py``; docs/exact_kernels.md explains and shows the result.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, get_args

import torch
from _kernel_memory import measure_frobenius, measure_growth, prepare_kernel
from _kernel_paper import measure_deep, measure_states
from _kernel_peers import Kind, contraction, layer_hooks, linearized, reference, tutorial
from _kernel_tables import RECORDED, judge, markdown, show
from _kernel_work import TOLERANCE, Disagreement, distance, ours, paired, require_close
from _measure import Series, environment, interleaved, one_thread, peak_memory, ratio
from _models import KERNEL_CASES, Case
from _peers import PEERS, attention_with_derivatives
from _tables import fill
from torch import Tensor, nn

import ntkops

__all__ = ["Disagreement", "measure_case", "measure_products", "run"]

# Samples and kinds of each network: everything at the small size, what is claimed at the large one.
KINDS: tuple[Kind, ...] = get_args(Kind)
SIZES: dict[str, dict[int, tuple[Kind, ...]]] = {
    "mlp": {32: KINDS, 128: ("all", "trace")},
    "cnn": {32: KINDS, 96: ("all",)},
    "resnet": {16: KINDS},
    "gru": {32: KINDS, 128: ("all",)},
    "transformer": {32: KINDS, 96: ("all",)},
}
QUICK_KINDS: tuple[Kind, ...] = KINDS
PRODUCTS = {"mlp": 64, "cnn": 16, "gru": 32, "transformer": 16}
COLUMNS = (1, 8, 64)
HOOKED = ("mlp", "cnn", "resnet")
TUTORIAL = {"mlp": 8, "cnn": 8, "gru": 8, "transformer": 8}
GROWTH = {
    "mlp": (512, 1024, 2048),
    "cnn": (128, 256, 512),
    "gru": (512, 1024, 2048),
    "transformer": (128, 256, 512),
}


def _converted(exact: Tensor, kind: Kind, outputs: int) -> Tensor:
    """Return another kind from the kernel of all outputs."""
    if kind == "all":
        return exact
    samples = len(exact) // outputs
    each = exact.view(samples, outputs, samples, outputs).diagonal(dim1=1, dim2=3).permute(2, 0, 1)
    if kind == "trace":
        return each.sum(0)
    if kind == "each":
        return each
    return exact.trace() if kind == "scalar" else exact.diagonal()


def measure_case(
    case: Case,
    samples: int,
    kinds: Sequence[Kind],
    exact: Tensor,
    *,
    quick: bool = False,
    repetitions: int = 5,
    memory: bool = True,
) -> list[dict[str, Any]]:
    """Check kernels against float64 Jacobians, then time them beside torch.func.

    Args:
        case: Network and inputs.
        samples: Number N of samples.
        kinds: What is made.
        exact: The kernel of all outputs of these samples, in float64.
        quick: Take the small network.
        repetitions: Times that each is timed.
        memory: Whether to start processes for peak memory.

    Returns:
        One entry of the JSON for each kind.
    """
    model, x = case.make(quick, samples)
    outputs = len(exact) // len(x)
    chunk = _faster_chunk(model, x)
    entries = []
    for kind in kinds:
        work = {"layerwise": ours(model, x, kind), "func": contraction(model, x, kind, chunk)}
        wanted = _converted(exact, kind, outputs)
        agreement = {name: distance(make(), wanted) for name, make in work.items()}
        require_close(f"{case.name} {kind}", agreement)
        series = interleaved(work, repetitions)
        peaks = {
            name: peak_memory(prepare_kernel, name, case.name, quick, samples, kind, chunk)
            for name in (work if memory and kind in ("all", "scalar") else ())
        }
        entries.append(
            {
                "model": case.name,
                "title": f"{case.name}, small" if quick else case.title,
                "samples": samples,
                "kind": kind,
                "func_chunk": chunk,
                "agreement": agreement,
                "time": {name: found.summary() for name, found in series.items()},
                "ratio": ratio(series["func"], series["layerwise"]),
                "memory_mb": peaks,
            }
        )
    return entries


def _faster_chunk(model: nn.Module, x: Tensor) -> int | None:
    """Return whether torch.func is faster with all samples at once (None) or with eight at a time."""
    spent: dict[int | None, float] = {}
    for chunk in (None, 8):
        work = contraction(model, x, "all", chunk)
        if len(x) < 96:
            work()
        started = time.process_time()
        work()
        spent[chunk] = time.process_time() - started
    return min(spent, key=lambda chunk: spent[chunk])


def measure_hooks(case: Case, samples: int, exact: Tensor, *, quick: bool = False) -> dict[str, Any]:
    """Time the kernel of all outputs beside NNGeometry's."""
    model, x = case.make(quick, samples)
    work = {"layerwise": ours(model, x, "all"), "nngeometry": layer_hooks(model, x)}
    series, found = paired(work, 2)
    agreement = {name: distance(value, exact) for name, value in found.items()}
    require_close(f"{case.name} nngeometry", agreement)
    return _beside(case, samples, "nngeometry", series, agreement)


def measure_tutorial(case: Case, samples: int, exact: Tensor, *, quick: bool = False) -> dict[str, Any]:
    """Time the kernel of all outputs beside the products of the functorch tutorial."""
    model, x = case.make(quick, samples)
    work = {"layerwise": ours(model, x, "all"), "tutorial": tutorial(model, x)}
    series, found = paired(work, 3)
    agreement = {name: distance(value, exact) for name, value in found.items()}
    require_close(f"{case.name} tutorial", agreement)
    return _beside(case, samples, "tutorial", series, agreement)


def _beside(
    case: Case, samples: int, peer: str, series: Mapping[str, Series], agreement: dict[str, float]
) -> dict[str, Any]:
    return {
        "model": case.name,
        "samples": samples,
        "peer": peer,
        "agreement": agreement,
        "time": {name: found.summary() for name, found in series.items()},
        "ratio": ratio(series[peer], series["layerwise"]),
    }


def measure_products(
    case: Case,
    samples: int,
    columns: Sequence[int],
    exact: Tensor,
    *,
    quick: bool = False,
    repetitions: int = 5,
) -> list[dict[str, Any]]:
    """Time K V that stays lazy, once its factors are kept, beside every way of automatic differentiation."""
    model, x = case.make(quick, samples)
    layerwise = ntkops.ntk(model, x, engine="layerwise", max_dense_bytes=0)
    fused = ntkops.ntk(model, x, engine="autograd", max_dense_bytes=0)
    started = time.process_time()
    linear = linearized(model, x)
    setup = 1e3 * (time.process_time() - started)
    ways: dict[str, Callable[[Tensor], Tensor]] = {name: make(model, x) for name, make in PEERS.items()}
    ways |= {"fused": lambda block: fused @ block, "linearize": linear}
    entries = []
    for count in columns:
        block = torch.randn(len(exact), count, generator=torch.Generator().manual_seed(2))
        # One column at a time is the loop; the loops are far behind for many columns.
        left_out = {"vmap"} if count == 1 else ({"loop", "double"} if count > 8 else set())
        chosen = {name: way for name, way in ways.items() if name not in left_out}
        work = {name: _bound(way, block) for name, way in chosen.items()}
        with attention_with_derivatives():
            for _ in range(math.ceil(len(exact) / len(x) / count) + 2):
                layerwise @ block
            work = {"layerwise": _bound(lambda vectors: layerwise @ vectors, block), **work}
            wanted = exact @ block.double()
            agreement = {name: distance(make(), wanted) for name, make in work.items()}
            # torch.func.linearize under vmap is silently wrong on some networks: named, not timed.
            wrong = [name for name in ("linearize",) if agreement.get(name, 0) > TOLERANCE]
            chosen = {name: way for name, way in chosen.items() if name not in wrong}
            work = {name: make for name, make in work.items() if name not in wrong}
            require_close(f"{case.name} K V", {name: agreement[name] for name in work})
            series = interleaved(work, repetitions if count < 64 else min(repetitions, 3))
        best = min(chosen, key=lambda name: series[name].summary()["cpu_ms"]["median"])
        entries.append(
            {
                "model": case.name,
                "samples": samples,
                "columns": count,
                "best": best,
                "wrong": wrong,
                "linearize_setup_ms": float(f"{setup:.3g}"),
                "agreement": agreement,
                "time": {name: found.summary() for name, found in series.items()},
                "ratio": ratio(series[best], series["layerwise"]),
            }
        )
    return entries


def _bound(way: Callable[[Tensor], Tensor], block: Tensor) -> Callable[[], Tensor]:
    return lambda: way(block)


def run(
    models: Sequence[str] = tuple(KERNEL_CASES),
    *,
    quick: bool = False,
    repetitions: int | None = None,
    memory: bool = True,
    paper: bool = True,
    say: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Measure and return what the JSON file holds.

    Args:
        models: Names among `KERNEL_CASES`.
        quick: Small networks, few repetitions.
        repetitions: Times that each is timed; None for 5, and 1 if quick.
        memory: Whether peak memory is measured.
        paper: Whether the two networks of the paper are measured.
        say: Told what comes next.

    Returns:
        Environment, options, all entries, and whether the targets are held.
    """
    count = repetitions or (1 if quick else 5)
    started = time.perf_counter()
    result: dict[str, Any] = {"kernels": [], "peers": [], "products": [], "growth": [], "paper": []}
    with one_thread():
        surroundings = environment()
        for name in models:
            _measure_network(KERNEL_CASES[name], result, quick, count, memory, say)
        if memory and not quick:
            say("Frobenius norm")
            result["frobenius"] = measure_frobenius()
        for measure in (measure_deep, measure_states) if paper else ():
            say(f"the paper, {measure.__name__.removeprefix('measure_')}")
            result["paper"].append(measure(quick=quick))
    place = {**surroundings, "gpu": torch.cuda.is_available(), "nngeometry": _has_nngeometry()}
    return {
        "benchmark": "exact_kernels",
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "environment": place,
        "options": {"quick": quick, "repetitions": count, "dtype": "float32", "device": "cpu"},
        **result,
        "recorded": RECORDED,
        "targets": [] if quick else judge(result),
        "seconds": round(time.perf_counter() - started, 1),
    }


def _has_nngeometry() -> bool:
    return importlib.util.find_spec("nngeometry") is not None


def _measure_network(
    case: Case,
    result: dict[str, Any],
    quick: bool,
    count: int,
    memory: bool,
    say: Callable[[str], None],
) -> None:
    name = case.name
    sizes = {case.quick.samples: QUICK_KINDS} if quick else SIZES[name]
    say(f"{case.title}, float64 Jacobians")
    model, x = case.make(quick, max(sizes))
    exact = reference(model, x)
    outputs = len(exact) // len(x)

    def part(samples: int) -> Tensor:
        return exact[: samples * outputs, : samples * outputs]

    for samples, kinds in sizes.items():
        say(f"{case.title}, N = {samples}")
        repetitions = min(count, 3) if samples >= 96 else count
        result["kernels"] += measure_case(
            case, samples, kinds, part(samples), quick=quick, repetitions=repetitions, memory=memory
        )
    small = min(sizes)
    if name in HOOKED and _has_nngeometry():
        say(f"{case.title}, NNGeometry")
        result["peers"].append(measure_hooks(case, small, part(small), quick=quick))
    if name in TUTORIAL:
        say(f"{case.title}, tutorial")
        few = min(TUTORIAL[name], small)
        result["peers"].append(measure_tutorial(case, few, part(few), quick=quick))
    if name in PRODUCTS:
        say(f"{case.title}, products")
        some = small if quick else PRODUCTS[name]
        columns = (1, 3) if quick else COLUMNS
        result["products"] += measure_products(
            case, some, columns, part(some), quick=quick, repetitions=count
        )
    if memory and name in GROWTH:
        say(f"{case.title}, memory")
        result["growth"].append(measure_growth(name, (2, 3) if quick else GROWTH[name], quick))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    names = tuple(KERNEL_CASES)
    parser.add_argument("--models", nargs="+", choices=names, default=names, help="which networks")
    parser.add_argument("--quick", action="store_true", help="small sizes: a smoke test, not a measurement")
    parser.add_argument("--repetitions", type=int, help="times that each is timed")
    parser.add_argument("--no-memory", action="store_true", help="leave peak memory out")
    parser.add_argument("--no-paper", action="store_true", help="leave the two networks of the paper out")
    parser.add_argument("--out", type=Path, help="JSON file to write (none by default)")
    parser.add_argument(
        "--markdown", type=Path, metavar="JSON", help="print a result as Markdown, run nothing"
    )
    parser.add_argument("--page", type=Path, help="with --markdown: put the tables into this page")
    options = parser.parse_args(arguments)
    if options.markdown is not None:
        text = markdown(json.loads(options.markdown.read_text(encoding="utf-8")))
        print(text)
        if options.page is not None:
            page = options.page.read_text(encoding="utf-8")
            options.page.write_text(fill(page, "exact_kernels", text + "\n"), encoding="utf-8")
        return 0
    result = run(
        options.models,
        quick=options.quick,
        repetitions=options.repetitions,
        memory=not options.no_memory,
        paper=not options.no_paper,
        say=lambda text: print(text, file=sys.stderr, flush=True),
    )
    show(result)
    if options.out is not None:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
