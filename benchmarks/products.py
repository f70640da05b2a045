"""K V for k columns: ntkops against what is written by hand with torch.

Run it with ``python benchmarks/products.py``; docs/performance.md explains and shows the result.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from _measure import agreement, interleaved, peak_memory, ratio, summaries
from _models import CASES, Case, normal
from _peers import PEERS, attention_with_derivatives
from _tables import Benchmark, say, table, verdict
from torch import Tensor, nn

import ntkops

COLUMNS = (1, 8, 64)
QUICK_COLUMNS = (1, 3)
FIRST_BLOCK = 8

Product = Callable[[Tensor], Tensor]

VARIANTS = {
    "loop": "torch.func vjp and jvp, one column at a time, forward pass recomputed for each",
    "vmap": "torch.func vmap over all columns, of the vjp, then of the jvp",
    "double": "double backward: forward and first backward pass once, then two passes a column",
    "fused": "ntkops.ntk(model, x, engine='autograd', max_dense_bytes=0) @ V",
    "auto": "ntkops.ntk(model, x, max_dense_bytes=0) @ V once what its engine keeps has been made",
    "dense": "ntkops.ntk(model, x) @ V once its dense block has been built",
}
# What is claimed: above, below, columns, least ratio of process CPU times.
TARGETS = (("loop", "fused", 8, 1.5), *(("vmap", "fused", columns, 0.9) for columns in COLUMNS))


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


def prepare(name: str, quick: bool, variant: str, columns: int) -> Callable[[], object]:
    """Return the work whose memory is measured, after the same on two samples has loaded the code."""
    model, x = CASES[name].make(quick)
    outputs = _num_outputs(model, x)
    calls = _until_settled(outputs, columns) if variant == "auto" else 1

    def work(multiply: Product, x: Tensor) -> object:
        with attention_with_derivatives():
            return [multiply(normal(len(x) * outputs, columns, seed=2)) for _ in range(calls)]

    work(product(variant, model, x[:2]), x[:2])
    if variant == "dense":  # building the block is part of what it costs
        return lambda: work(product(variant, model, x), x)
    return partial(work, product(variant, model, x), x)


def _until_settled(outputs: int, columns: int) -> int:
    """Return how many products see to it that an engine has made whatever it keeps for later ones."""
    return 1 + math.ceil(outputs / columns)


def _num_outputs(model: nn.Module, x: Tensor) -> int:
    with torch.no_grad():
        return model(x[:2])[0].numel()


def measure_case(
    case: Case, columns: int, *, quick: bool = False, repetitions: int = 9, memory: bool = True
) -> dict[str, Any]:
    """Check that all variants agree, then time them in turn."""
    model, x = case.make(quick)
    engines = {variant: operator(variant, model, x) for variant in ("fused", "auto")}
    variants = [v for v in VARIANTS if v != "auto" or engines[v].engine_info.engine != "autograd"]
    block = normal(engines["fused"].shape[0], columns, seed=2)
    with attention_with_derivatives():
        work = {variant: partial(product(variant, model, x), block) for variant in variants}
        close = agreement(case.name, {name: make() for name, make in work.items()}, work["loop"]())
        for _ in range(_until_settled(_num_outputs(model, x), columns) if "auto" in work else 0):
            work["auto"]()
        series = interleaved(work, repetitions, shortest=0.002 if quick else 0.02)
    pairs = [(peer, ours) for ours in series if ours not in PEERS for peer in PEERS]
    return {
        "model": case.name, "title": f"{case.name}, small" if quick else case.title, "samples": len(x),
        "n": len(block), "parameters": engines["fused"].num_parameters, "columns": columns,
        "engines": {name: _described(kernel) for name, kernel in engines.items()}, "agreement": close,
        "time": summaries(series),
        "ratios": {f"{above}/{below}": ratio(series[above], series[below]) for above, below in pairs},
        "memory_mb": {
            v: peak_memory(prepare, case.name, quick, v, columns) if memory else None for v in work
        },
    }  # fmt: skip


def _described(kernel: ntkops.NTKOperator) -> dict[str, Any]:
    info = kernel.engine_info
    reasons = list(info.reasons)
    return {"engine": info.engine, "rung": info.mode, "chunk_size": info.chunk_size, "reasons": reasons}


def measure_setup(case: Case, *, quick: bool = False, repetitions: int = 5) -> dict[str, Any]:
    """Time what comes before the first product, and the first product of an operator that is cold."""
    model, x = case.make(quick)
    kernel = ntkops.ntk(model, x)
    block = normal(kernel.shape[0], FIRST_BLOCK, seed=2)

    def build() -> object:
        kernel.free()
        return kernel.to_dense()

    work = {
        "operator": lambda: ntkops.ntk(model, x),
        "operator_and_block": lambda: operator("auto", model, x) @ block,
        "dense_block": build,
    }
    return {"model": case.name, **summaries(interleaved(work, repetitions, 0.002 if quick else 0.02))}


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Measure networks."""
    quick, count = options.quick, options.repetitions
    cases, setup = [], []
    for name in options.parts:
        for columns in QUICK_COLUMNS if quick else COLUMNS:
            say(f"{name}, k = {columns}")
            memory = options.memory and not (quick and cases)
            cases.append(measure_case(CASES[name], columns, quick=quick, repetitions=count, memory=memory))
        say(f"{name}, set-up")
        setup.append(measure_setup(CASES[name], quick=quick, repetitions=min(count, 5)))
    return {
        "options": {"dtype": "float32", "device": "cpu"}, "variants": VARIANTS, "cases": cases, "setup": setup
    }  # fmt: skip


def judge(result: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Say for each target and network whether the median ratio of process CPU times reaches it."""
    return [
        verdict(
            f"CPU time, {above}/{below}, k = {columns}", entry["model"],
            entry["ratios"][f"{above}/{below}"]["cpu"]["median"], least=least,
        )
        for above, below, columns, least in TARGETS
        for entry in result["cases"]
        if entry["columns"] == columns
    ]  # fmt: skip


def tables(result: Mapping[str, Any]) -> list[str]:
    """Return CPU times a column, peak memory, and what comes first."""
    cases = result["cases"]

    def each(variant: str) -> Callable[[Mapping[str, Any]], float | None]:
        return lambda e: (
            e["time"][variant]["cpu_ms"]["median"] / e["columns"] if variant in e["time"] else None
        )

    def paid_after(entry: Mapping[str, Any]) -> str:
        measured = [case for case in cases if case["model"] == entry["model"]]
        case = min(measured, key=lambda case: abs(case["columns"] - 8))
        return f"{entry['dense_block']['cpu_ms']['median'] / each('fused')(case):.0f} columns"

    titles = {case["model"]: case["title"] for case in cases}
    return [
        *table(
            cases,
            {"Network": "title", "n": "n", "P": "parameters", "k": "columns"}
            | {variant: each(variant) for variant in VARIANTS}
            | {pair: f"ratios.{pair}.cpu" for pair in ("loop/fused", "vmap/fused")},
            title="CPU milliseconds a column (medians), and ratios with smallest and largest repetition:",
        ),
        *table(
            cases,
            {"Network": "title", "k": "columns", **{v: f"memory_mb.{v}:.0f" for v in VARIANTS}},
            title="Peak memory of one call in MB, above what was resident before it:",
        ),
        *table(
            result["setup"],
            {
                "Network": lambda entry: titles[entry["model"]], "operator": "operator.cpu_ms.median",
                "operator and 8 columns": "operator_and_block.cpu_ms.median",
                "dense block": "dense_block.cpu_ms.median", "pays after": paid_after,
            },
            title="What comes before the first product, in CPU milliseconds:",
        ),
    ]  # fmt: skip


BENCHMARK = Benchmark(
    "products", __doc__, measure, tables, judge,
    parts=tuple(CASES), key=("model", "columns"), repetitions=(9, 2), memory=True,
)  # fmt: skip
main = BENCHMARK.main

if __name__ == "__main__":
    sys.exit(main())
