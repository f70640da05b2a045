"""Exact kernels, traces, diagonals and lazy products of the layerwise engine, beside what else there is.

Run it with ``python benchmarks/exact_kernels.py``; docs/exact_kernels.md explains and shows the result.
"""

from __future__ import annotations

import argparse
import importlib.util
import math
import statistics
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, get_args

import torch
from _measure import (
    TOLERANCE,
    agreement,
    digits,
    distance,
    interleaved,
    once,
    peak_memory,
    ratio,
    summaries,
)
from _models import KERNEL_CASES, PAPER_CASES, Case, normal
from _peers import (
    PEERS,
    Kind,
    attention_with_derivatives,
    contraction,
    layer_hooks,
    linearized,
    reference,
    tutorial,
    vmapped_route,
)
from _tables import Benchmark, say, shown, table, verdict
from torch import Tensor, nn

import ntkops
from ntkops.engines.memory import free_bytes

KINDS: tuple[Kind, ...] = get_args(Kind)
# Everything at the small size, what is claimed at the large one.
SIZES: dict[str, dict[int, tuple[Kind, ...]]] = {
    "mlp": {32: KINDS, 128: ("all", "trace")}, "cnn": {32: KINDS, 96: ("all",)}, "resnet": {16: KINDS},
    "gru": {32: KINDS, 128: ("all",)}, "transformer": {32: KINDS, 96: ("all",)},
}  # fmt: skip
PRODUCTS = {"mlp": 64, "cnn": 16, "gru": 32, "transformer": 16}
COLUMNS = (1, 8, 64)
HOOKED = ("mlp", "cnn", "resnet")
TUTORIAL = 8  # samples
GROWTH = {
    "mlp": (512, 1024, 2048), "cnn": (128, 256, 512), "gru": (512, 1024, 2048), "transformer": (128, 256, 512)
}  # fmt: skip
ROWS = 20_000  # of the exact Frobenius norm

_TITLES = dict(zip(KINDS, ("all outputs", "traced", "per class", "scalar trace", "diagonal"), strict=True))
# neural-tangents 0.6.5 from its repository on JAX 0.4.30, on another machine, one thread, CPU
# milliseconds; "func" is torch.func there, so that ratios of one row can be compared.
RECORDED = [
    dict(zip(("model", "samples", "kind", "func", "jacobian", "structured"), row, strict=True))
    for row in (
        ("mlp", 32, "all", 397.7, 448.2, 4.1), ("mlp", 32, "trace", 131.7, 396.2, 3.4),
        ("mlp", 32, "each", 197.9, 304.9, 3.2), ("mlp", 128, "all", 6762.0, None, 68.2),
        ("cnn", 32, "all", 312.8, 381.0, 328.2), ("resnet", 16, "all", 1160.6, 1573.9, 935.6),
        ("gru", 32, "all", 114.1, 633.8, 459.7), ("transformer", 32, "all", 385.5, 467.1, 3623.3),
    )
]  # fmt: skip
# What is claimed: network, samples, kind, least ratio of CPU times; of the peers, and of products by columns.
TARGETS = (
    ("mlp", 32, "all", 40.0), ("mlp", 128, "all", 100.0), ("mlp", 32, "trace", 30.0),
    ("mlp", 32, "each", 30.0), ("gru", 32, "all", 2.0), ("gru", 128, "all", 4.0), ("resnet", 16, "all", 1.5),
    ("resnet", 16, "trace", 2.0), ("cnn", 32, "all", 1.2), ("cnn", 96, "all", 1.5),
    ("transformer", 32, "all", 1.2), ("transformer", 96, "all", 1.5),
)  # fmt: skip
HOOKS = {"cnn": 10.0, "resnet": 10.0}
LAZY = {1: 2.0, 8: 5.0, 64: 5.0}
PAPER = {"deep": 250.0, "states": 300.0}
FLAT, SLACK_MB = 1.25, 10.0  # largest over smallest peak
ERROR = 2e-7
FROBENIUS_MB = 2000.0


# kernels


def ours(model: nn.Module, x: Tensor, kind: Kind) -> Callable[[], Tensor]:
    """Return the work that makes a kernel, a trace or a diagonal from nothing that was kept."""
    outputs = kind if kind in ("all", "trace", "each") else "all"
    kernel = ntkops.ntk(model, x, outputs=outputs, engine="layerwise")

    def work() -> Tensor:
        kernel.free()
        if kind == "scalar":
            return ntkops.trace(kernel, method="exact").value
        return kernel.diagonal() if kind == "diagonal" else kernel.to_dense()

    return work


def converted(exact: Tensor, kind: Kind, outputs: int) -> Tensor:
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


def prepare_kernel(
    variant: str, name: str, quick: bool, samples: int, kind: Kind, chunk: int | None
) -> Callable[[], object]:
    """Return the work whose memory is measured, after the same on two samples has loaded the code."""

    def work(count: int) -> Callable[[], object]:
        model, x = KERNEL_CASES[name].make(quick, count)
        return ours(model, x, kind) if variant == "layerwise" else contraction(model, x, kind, chunk)

    work(2)()
    return work(samples)


def measure_case(
    case: Case, samples: int, kinds: Sequence[Kind], exact: Tensor, *, quick: bool = False,
    repetitions: int = 5, memory: bool = True,
) -> Iterator[dict[str, Any]]:  # fmt: skip
    """Check kernels against that of float64 Jacobians, then time them beside torch.func."""
    model, x = case.make(quick, samples)
    chunk = _faster_chunk(model, x)
    for kind in kinds:
        work = {"layerwise": ours(model, x, kind), "func": contraction(model, x, kind, chunk)}
        wanted = converted(exact, kind, len(exact) // len(x))
        close = agreement(f"{case.name} {kind}", {name: make() for name, make in work.items()}, wanted)
        series = interleaved(work, repetitions)
        peaks = {
            name: peak_memory(prepare_kernel, name, case.name, quick, samples, kind, chunk)
            for name in (work if memory and kind in ("all", "scalar") else ())
        }
        yield {
            "model": case.name, "title": f"{case.name}, small" if quick else case.title, "samples": samples,
            "kind": kind, "func_chunk": chunk, "agreement": close, "time": summaries(series),
            "ratio": ratio(series["func"], series["layerwise"]), "memory_mb": peaks,
        }  # fmt: skip


def _faster_chunk(model: nn.Module, x: Tensor) -> int | None:
    """Return whether torch.func is faster with all samples at once (None) or with eight at a time."""
    spent: dict[int | None, float] = {}
    for chunk in (None, 8):
        work = contraction(model, x, "all", chunk)
        if len(x) < 96:
            work()
        spent[chunk] = once(work)[1]["seconds"] or 0.0
    return min(spent, key=lambda chunk: spent[chunk])


def measure_peer(
    peer: str, case: Case, samples: int, exact: Tensor, *, quick: bool = False
) -> dict[str, Any]:
    """Time the kernel of all outputs beside another way."""
    model, x = case.make(quick, samples)
    other = {"nngeometry": layer_hooks, "tutorial": tutorial}[peer]
    work = {"layerwise": ours(model, x, "all"), peer: other(model, x)}
    close = agreement(f"{case.name} {peer}", {name: make() for name, make in work.items()}, exact)
    series = interleaved(work, 2, shortest=0)
    times = {"time": summaries(series), "ratio": ratio(series[peer], series["layerwise"])}
    return {"model": case.name, "samples": samples, "peer": peer, "agreement": close, **times}


# products


def measure_products(
    case: Case, samples: int, columns: Sequence[int], exact: Tensor, *, quick: bool = False,
    repetitions: int = 5,
) -> Iterator[dict[str, Any]]:  # fmt: skip
    """Time K V that stays lazy, once its factors are kept, beside every way of automatic differentiation."""
    model, x = case.make(quick, samples)
    layerwise = ntkops.ntk(model, x, engine="layerwise", max_dense_bytes=0)
    fused = ntkops.ntk(model, x, engine="autograd", max_dense_bytes=0)
    linear, setup = once(lambda: linearized(model, x))
    ways: dict[str, Callable[[Tensor], Tensor]] = {"layerwise": lambda block: layerwise @ block}
    ways |= {name: make(model, x) for name, make in PEERS.items()}
    ways |= {"fused": lambda block: fused @ block, "linearize": linear}
    for count in columns:
        block = normal(len(exact), count, seed=2)
        # One column at a time is the loop; the loops are far behind for many columns.
        left_out = {"vmap"} if count == 1 else ({"loop", "double"} if count > 8 else set())
        work = {name: partial(way, block) for name, way in ways.items() if name not in left_out}
        with attention_with_derivatives():
            for _ in range(math.ceil(len(exact) / len(x) / count) + 2):
                layerwise @ block
            wanted, found = exact @ block.double(), {name: make() for name, make in work.items()}
            # torch.func.linearize under vmap is silently wrong on some networks: named, not timed.
            far = {name: distance(found[name], wanted) for name in ("linearize",)}
            wrong = [name for name, value in far.items() if value > TOLERANCE]
            for name in wrong:
                del work[name], found[name]
            close = agreement(f"{case.name} K V", found, wanted) | {name: far[name] for name in wrong}
            series = interleaved(work, repetitions if count < 64 else min(repetitions, 3))
        spent = {name: statistics.median(series[name].cpu) for name in work if name != "layerwise"}
        best = min(spent, key=lambda name: spent[name])
        yield {
            "model": case.name, "samples": samples, "columns": count, "best": best, "wrong": wrong,
            "linearize_setup_ms": digits(1e3 * (setup["seconds"] or 0.0)), "agreement": close,
            "time": summaries(series), "ratio": ratio(series[best], series["layerwise"]),
        }  # fmt: skip


# memory


def measure_growth(name: str, sizes: Sequence[int], quick: bool) -> dict[str, Any]:
    """Return peak memory of the exact trace and the diagonal for several numbers of samples."""
    kinds: tuple[Kind, ...] = ("scalar", "diagonal") if name == "mlp" else ("diagonal",)
    peaks = {
        kind: [peak_memory(prepare_kernel, "layerwise", name, quick, n, kind, None) for n in sizes]
        for kind in kinds
    }
    return {"model": name, "samples": list(sizes), "memory_mb": peaks}


def prepare_frobenius(samples: int) -> Callable[[], ntkops.Estimate]:
    """Return the exact Frobenius norm of the MLP's kernel, without the dense kernel."""
    few, kernel = (ntkops.ntk(*KERNEL_CASES["mlp"].make(samples=n), max_dense_bytes=0) for n in (2, samples))
    ntkops.frobenius_norm(few, method="exact")
    return lambda: ntkops.frobenius_norm(kernel, method="exact")


def measure_frobenius(rows: int = ROWS) -> dict[str, Any]:
    """Return time and peak memory of the exact Frobenius norm of a kernel with many rows."""
    found, taken = once(prepare_frobenius(rows // 10))
    assert found.exact and torch.isfinite(found.value).all()
    return {
        "model": "mlp", "n": rows, "value": digits(float(found.value), 7),
        "cpu_s": digits(taken["seconds"] or 0.0), "memory_mb": peak_memory(prepare_frobenius, rows // 10),
    }  # fmt: skip


# the exact traces of a paper on trace estimation, beside the way its code computes them

_ROUTE_BYTES = 10e9  # what all columns of the MLP in one vmap need, generously
_SOME = 200  # products that stand for all of the GRU's
_BLOCK = 50


def _timed(work: Callable[[], Tensor]) -> tuple[float, Tensor]:
    found, taken = once(work)
    return taken["seconds"] or 0.0, found


def _trace(route: Callable[[Tensor], Tensor], shape: torch.Size, size: int, chosen: Tensor) -> Tensor:
    """Return the sum of the chosen diagonal entries, ``size`` products at a time."""
    total = torch.zeros((), dtype=torch.float64)
    for rows in chosen.split(size):
        unit = torch.zeros(len(rows), shape.numel())
        unit[torch.arange(len(rows)), rows] = 1
        products = route(unit.view(-1, *shape)).reshape(len(rows), -1)
        total += products[torch.arange(len(rows)), rows].double().sum()
    return total


def measure_deep(quick: bool) -> dict[str, Any]:
    """The MLP: all n products in one vmap where memory allows it, else 256 at a time."""
    model, x = PAPER_CASES["deep"].make(quick)
    kernel = ntkops.ntk(model, x, engine="layerwise", max_dense_bytes=0)
    rows = kernel.shape[0]
    shape = torch.Size([len(x), rows // len(x)])
    size = rows if quick or free_bytes() > _ROUTE_BYTES else 256
    route = vmapped_route(model, x)

    def own() -> Tensor:
        kernel.free()
        return ntkops.trace(kernel, method="exact").value

    own()
    _trace(route, shape, 8, torch.arange(8))
    times: dict[str, list[float]] = {"own": [], "products": []}
    for _ in range(1 if quick else 3):
        times["own"] += [_timed(own)[0] for _ in range(1 if quick else 5)]
        seconds, wanted = _timed(lambda: _trace(route, shape, size, torch.arange(rows)))
        times["products"].append(seconds)
    return {
        **_paper_entry("deep", kernel, size, *map(statistics.median, times.values())),
        "extrapolated": [],
        "agreement": agreement("the paper's MLP", {"layerwise": own()}, wanted),
    }


def measure_states(quick: bool) -> dict[str, Any]:
    """The hidden states of a GRU: n products extrapolated from some."""
    model, x = PAPER_CASES["states"].make(quick)
    how = {"output": 0, "batch_dim": 1, "engine": "layerwise", "max_dense_bytes": 0}
    kernels = [ntkops.ntk(model, x, **how) for _ in range(3)]  # each checks its rows
    spent = [_timed(lambda K=K: ntkops.trace(K, method="exact").value)[0] for K in kernels]
    kernel = kernels[-1]
    route, rows = vmapped_route(model, x, state=0), kernel.shape[0]
    with torch.no_grad():
        shape = model(x)[0].shape
    chosen = _everywhere(rows)
    _trace(route, shape, 2, chosen[:2])
    seconds, wanted = _timed(lambda: _trace(route, shape, _BLOCK, chosen))
    # Time comes first in the rows of the products, samples in ours.
    diagonal = kernel.diagonal().view(x.shape[1], x.shape[0], -1).transpose(0, 1).flatten()
    part = diagonal[chosen].double().sum()
    size, seconds = min(_BLOCK, len(chosen)), seconds * rows / len(chosen)
    return {
        **_paper_entry("states", kernel, size, statistics.median(spent), seconds),
        "extrapolated": ["products"] if len(chosen) < rows else [],
        "agreement": agreement("the hidden states", {"layerwise": part}, wanted),
    }


def _everywhere(count: int) -> Tensor:
    """Return some rows from everywhere, so that all time steps are checked."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(3))[:_SOME]


def _paper_entry(
    name: str, kernel: ntkops.NTKOperator, size: int, own: float, other: float
) -> dict[str, Any]:
    return {
        "name": name, "title": PAPER_CASES[name].title, "n": kernel.shape[0],
        "parameters": kernel.num_parameters, "columns_at_once": size, "layerwise_s": digits(own, 4),
        "products_s": digits(other, 4), "ratio": digits(other / own, 4),
    }  # fmt: skip


# the whole


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Measure networks, the exact Frobenius norm, and the networks of the paper."""
    hooked = importlib.util.find_spec("nngeometry") is not None
    result: dict[str, Any] = {"kernels": [], "peers": [], "products": [], "growth": [], "paper": []}
    for name in options.parts:
        if name in KERNEL_CASES:
            _measure_network(KERNEL_CASES[name], result, options, hooked)
    if "frobenius" in options.parts and options.memory and not options.quick:
        say("Frobenius norm")
        result["frobenius"] = measure_frobenius()
    if "paper" in options.parts:
        say("the paper")
        result["paper"] = [measure_deep(options.quick), measure_states(options.quick)]
    return {**result, "options": {"dtype": "float32", "device": "cpu"}, "recorded": RECORDED}


def _measure_network(case: Case, result: dict[str, Any], options: argparse.Namespace, hooked: bool) -> None:
    name, quick, count = case.name, options.quick, options.repetitions
    sizes = {case.quick.samples: KINDS} if quick else SIZES[name]
    say(f"{case.title}, float64 Jacobians")
    model, x = case.make(quick, max(sizes))
    exact = reference(model, x)
    outputs, small = len(exact) // len(x), min(sizes)

    def part(samples: int) -> Tensor:
        return exact[: samples * outputs, : samples * outputs]

    for samples, kinds in sizes.items():
        say(f"{case.title}, N = {samples}")
        times = {"quick": quick, "repetitions": min(count, 3) if samples >= 96 else count}
        result["kernels"] += measure_case(case, samples, kinds, part(samples), memory=options.memory, **times)
    for peer, few in (("nngeometry", small), ("tutorial", min(TUTORIAL, small))):
        if (hooked and name in HOOKED) if peer == "nngeometry" else name in PRODUCTS:
            say(f"{case.title}, {peer}")
            result["peers"].append(measure_peer(peer, case, few, part(few), quick=quick))
    if name in PRODUCTS:
        say(f"{case.title}, products")
        some, columns = (small, (1, 3)) if quick else (PRODUCTS[name], COLUMNS)
        result["products"] += measure_products(
            case, some, columns, part(some), quick=quick, repetitions=count
        )
    if options.memory and name in GROWTH:
        say(f"{case.title}, memory")
        result["growth"].append(measure_growth(name, (2, 3) if quick else GROWTH[name], quick))


def judge(result: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Say for each target what was measured and whether that reaches it, by medians of CPU times."""
    kernels, products = result["kernels"], result["products"]
    found = {(e["model"], e["samples"], e["kind"]): e["ratio"]["cpu"]["median"] for e in kernels}
    for name, samples, kind, least in TARGETS:
        if (name, samples, kind) in found:
            what = f"CPU time of torch.func over ours, {_TITLES[kind]}"
            yield verdict(what, f"{name}, N = {samples}", found[name, samples, kind], least=least)
    for e in result["peers"]:
        if e["peer"] == "nngeometry" and e["model"] in HOOKS:
            what, least = "CPU time of NNGeometry over ours, all outputs", HOOKS[e["model"]]
            yield verdict(what, f"{e['model']}, N = {e['samples']}", e["ratio"]["cpu"]["median"], least=least)
    for e in products:
        if e["columns"] in LAZY:
            what = f"CPU time of the best differentiation over ours, K V lazy, k = {e['columns']}"
            of = f"{e['model']}, N = {e['samples']}: {e['best']}"
            yield verdict(what, of, e["ratio"]["cpu"]["median"], least=LAZY[e["columns"]])
    for e in kernels:
        peaks = e["memory_mb"]
        if peaks.get("layerwise") and peaks.get("func"):
            what, least = (
                f"peak memory of torch.func over ours, {_TITLES[e['kind']]}",
                10.0 if e["model"] == "mlp" else 2.0,
            )
            found = peaks["func"] / peaks["layerwise"]
            yield verdict(what, f"{e['model']}, N = {e['samples']}", found, least=least)
    for growth in result["growth"]:
        for kind, peaks in growth["memory_mb"].items():
            if None not in peaks:
                of = f"{growth['model']}, N = {', '.join(map(str, growth['samples']))}"
                factor = max(peaks) / max(min(peaks), SLACK_MB)
                yield verdict(f"largest over smallest peak memory, {_TITLES[kind]}", of, factor, most=FLAT)
    norm = result.get("frobenius")
    if norm:
        yield verdict(
            "peak memory of the exact Frobenius norm, MB", f"n = {norm['n']:,}", norm["memory_mb"],
            most=FROBENIUS_MB,
        )  # fmt: skip
    for e in result["paper"]:
        what = "CPU time of n products over ours, exact trace"
        yield verdict(what, f"{e['title']}, n = {e['n']:,}", e["ratio"], least=PAPER[e["name"]])
    if kernels or products:
        worst = max([*kernels, *products], key=lambda e: e["agreement"]["layerwise"])
        error = worst["agreement"]["layerwise"]
        yield verdict("relative Frobenius error of float32, worst", worst["model"], error, most=ERROR)


# tables


def _median(name: str) -> str:
    return f"time.{name}.cpu_ms.median"


def tables(result: Mapping[str, Any]) -> list[str]:
    """Return kernels, peers, lazy products, memory, the paper's networks, and what was recorded elsewhere."""
    norm = result.get("frobenius")
    ways = ("layerwise", "fused", "loop", "vmap", "double", "linearize")

    def kind(entry: Mapping[str, Any]) -> str:
        return _TITLES[entry["kind"]]

    def way(name: str) -> Callable[[Mapping[str, Any]], Any]:
        return lambda e: (
            "wrong" if name in e["wrong"] else e["time"].get(name, {}).get("cpu_ms", {}).get("median")
        )

    def seconds(key: str) -> Callable[[Mapping[str, Any]], str]:
        return lambda e: shown(e[f"{key}_s"]) + (" (extrapolated)" if key in e["extrapolated"] else "")

    growth = [
        {"model": g["model"], "kind": k} | {str(i): f"{n}: {mb:.0f}" for i, (n, mb) in enumerate(pairs)}
        for g in result["growth"]
        for k, peaks in g["memory_mb"].items()
        if (pairs := list(zip(g["samples"], peaks, strict=True))) and None not in peaks
    ]
    return [
        *table(
            result["kernels"],
            {
                "Network": "title", "N": "samples", "kind": kind, "layerwise": _median("layerwise"),
                "torch.func": _median("func"), "ratio": "ratio.cpu", "MB": "memory_mb.layerwise:.0f",
                "MB torch.func": "memory_mb.func:.0f", "error": "agreement.layerwise:.0e",
            },
            title="**Kernels, CPU milliseconds and peak megabytes**, 3 repetitions for N of 96 and more",
        ),
        *table(
            result["peers"],
            {
                "Network": "model", "N": "samples",
                "other": lambda e: {"nngeometry": "NNGeometry", "tutorial": "functorch tutorial"}[e["peer"]],
                "layerwise": _median("layerwise"),
                "other's": lambda e: e["time"][e["peer"]]["cpu_ms"]["median"], "ratio": "ratio.cpu",
            },
            title="**Kernel of all outputs beside other ways, CPU milliseconds**",
        ),
        *table(
            result["products"],
            {"Network": "model", "N": "samples", "k": "columns"}
            | {name: way(name) for name in ways}
            | {"best / layerwise": "ratio.cpu"},
            title="**K V that stays lazy, CPU milliseconds a block**",
        ),
        *table(
            growth, {"Network": "model", "kind": kind, "N: MB": "0", "2 N: MB": "1", "4 N: MB": "2"}, left=2,
            title="**Peak megabytes for N samples**",
        ),
        *table(
            result["paper"],
            {
                "Network": "title", "n": "n", "P": "parameters", "layerwise": seconds("layerwise"),
                "n products": lambda e: f"{seconds('products')(e)} ({e['columns_at_once']} at once)",
                "ratio": "ratio",
            },
            title="**Exact traces of the paper's networks, CPU seconds**",
        ),
        *table(
            result["recorded"],
            {
                "Network": "model", "N": "samples", "kind": kind, "torch.func there": "func",
                "Jacobian contraction": "jacobian", "structured": "structured",
                "torch.func / structured": lambda e: f"{e['func'] / e['structured']:.2g}",
            },
            title="**neural-tangents, recorded elsewhere, CPU milliseconds**",
        ),
        *(
            [
                "",
                f"The exact Frobenius norm of the MLP's kernel, n = {norm['n']:,}, took {norm['cpu_s']:.3g} "
                f"CPU seconds and {shown(norm['memory_mb'], '.0f')} MB.",
            ]
            if norm
            else []
        ),
    ]  # fmt: skip


BENCHMARK = Benchmark(
    "exact_kernels", __doc__, measure, tables, judge,
    parts=(*KERNEL_CASES, "frobenius", "paper"), key=("model", "samples", "kind", "columns", "peer", "name"),
    repetitions=(5, 1), memory=True,
)  # fmt: skip
main = BENCHMARK.main

if __name__ == "__main__":
    sys.exit(main())
