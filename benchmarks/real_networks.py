"""Exact kernels and first products of networks of the sizes that people have (docs/real_networks.md)."""

from __future__ import annotations

import argparse
import copy
import gc
import sys
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from _measure import distance, once
from _models import REAL_CASES, Case
from _peers import attention_with_derivatives, contraction, curvature, layer_hooks, loop
from _tables import Benchmark, say, shown, table, verdict
from torch import Tensor, nn

import ntkops

CHUNK = 4  # samples that torch.func takes at a time, so that it fits
COLUMNS = 8
ERROR = 1e-5


def _peer(name: str, work: Callable[[], Tensor], exact: Tensor, device: str) -> dict[str, Any]:
    """Return what another library takes, or why it takes nothing: it refuses the model, or is wrong on it."""
    try:
        found, taken = once(work, device)
    except Exception as error:
        return {name: {"left_out": (str(error).strip().splitlines() or [type(error).__name__])[0][:120]}}
    far = distance(found, exact)
    return {name: taken if far < 1e-2 else {"left_out": f"differs by {far:.1g}"}}


def _warm_up(device: str, dtype: torch.dtype) -> None:
    """Import, on a network of no size, what is imported with the first kernel of a process."""
    model = nn.Sequential(nn.Linear(2, 2), nn.Tanh(), nn.Linear(2, 1)).to(device, dtype)
    x = torch.ones(2, 2, dtype=dtype, device=device)
    ntkops.ntk(model, x).to_dense()
    contraction(model, x)()
    loop(model, x)(x[:, :1])
    gc.collect()
    gc.freeze()  # what was imported is there to stay: collections before what is timed pass it over


def measure_case(case: Case, *, quick: bool, device: str = "cpu", dtype: str = "float32") -> dict[str, Any]:
    """Measure making K, its kernel with and without a first check, K V, and in float32 the same by others."""
    kind = getattr(torch, dtype)
    model, x = case.make(quick)
    model = model.to(device, kind)
    x = x.to(device, kind) if x.is_floating_point() else x.to(device)
    entry: dict[str, Any] = {"model": case.name, "title": case.title, "samples": len(x), "dtype": dtype}
    _warm_up(device, kind)

    def note(name: str, work: Callable[[], Any]) -> Any:
        found, entry[name] = once(work, device)
        return found

    kernel = note("make", lambda: ntkops.ntk(model, x))
    entry["parameters"] = kernel.num_parameters
    with torch.no_grad():
        dense = note("dense", kernel.to_dense)
        exact = contraction(
            copy.deepcopy(model).double(), x[:2].double() if x.is_floating_point() else x[:2], "all", CHUNK
        )()
        entry["error"] = distance(dense[: len(exact), : len(exact)], exact)
        kernel.free()
        note("dense again", kernel.to_dense)  # its batch is known: no check
        kernel.free()
        note("trace", ntkops.ntk(model, x, outputs="trace").to_dense)
        note("scalar", lambda: ntkops.trace(kernel, method="exact"))
        fresh = ntkops.ntk(model, x)
        block = torch.randn(len(dense), COLUMNS, dtype=kind, device=device)
        product = note("K V", lambda: fresh @ block)
    if kind == torch.float32:
        exact = note("torch.func dense", contraction(model, x, "all", CHUNK)).double()
        wanted = exact @ block.double()
        entry["agreement"] = distance(product, wanted)
        note("torch.func trace", contraction(model, x, "trace", CHUNK))
        note("torch.func scalar", contraction(model, x, "scalar", CHUNK))
        with attention_with_derivatives():
            note("loop K V", partial(loop(model, x, kept=True), block))
        entry |= _peer("nngeometry dense", lambda: layer_hooks(model, x)(), exact, device)
        entry |= _peer("curvlinops K V", lambda: curvature(model, x)(block), wanted, device)
    return entry


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Measure networks until the time is up."""
    started, entries, left_out = time.perf_counter(), [], []
    for dtype in options.dtypes:
        for name in options.parts:
            if time.perf_counter() - started > options.seconds:
                left_out.append(f"{name} {dtype}")
                continue
            say(f"{name}, {dtype}")
            how = {"quick": options.quick, "device": options.device, "dtype": dtype}
            entries.append(measure_case(REAL_CASES[name], **how))
    noted = {"device": options.device, "dtypes": options.dtypes, "chunk": CHUNK, "columns": COLUMNS}
    return {"options": noted, "entries": entries, "left_out": left_out}


def judge(result: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Say whether what was timed in float32 is right; times are not claimed."""
    return [
        verdict(f"relative {what} of float32", entry["title"], entry[what], most=ERROR)
        for what in ("error", "agreement")
        for entry in result["entries"]
        if entry["dtype"] == "float32"
    ]


def tables(result: Mapping[str, Any]) -> list[str]:
    """Return one row a network."""
    Entry = Mapping[str, Any]

    def over(theirs: str, *own: str) -> Callable[[Entry], str | None]:
        def quotient(entry: Entry) -> str | None:
            if theirs not in entry:
                return None
            return f"{entry[theirs]['seconds'] / sum(entry[name]['seconds'] for name in own):.2f}"

        return quotient

    def beside(name: str) -> Callable[[Entry], Any]:
        def cell(entry: Entry) -> Any:
            taken = entry.get(name, {})
            if "left_out" in taken:
                return "wrong" if taken["left_out"].startswith("differs") else "refused"
            return taken.get("seconds")

        return cell

    func, made = over("torch.func dense", "make", "dense"), over("torch.func dense", "dense again")
    return table(
        result["entries"],
        {
            "network": lambda e: f"{e['title']} ({e['dtype']})", "N": "samples", "P": "parameters",
            "K made": "make.seconds:.3g",
            "dense, first (again)": lambda e: "{dense[seconds]:.3g} ({dense again[seconds]:.3g})".format(**e),
            "torch.func": beside("torch.func dense"),
            "ratio with, without making K": lambda e: func(e) and f"{func(e)}, {made(e)}",
            "peak MB": "dense.peak_mb",
            "torch.func's": lambda e: shown(e.get("torch.func dense", {}).get("peak_mb"), "d"),
            "error": "error:.1e", "traced ratio": over("torch.func trace", "trace"),
            "exact trace": over("torch.func scalar", "scalar"),
            "NNGeometry, dense": beside("nngeometry dense"),
            "K V, first: s (MB)": lambda e: "{K V[seconds]:.3g} ({K V[peak_mb]})".format(**e),
            "loop": beside("loop K V"), "curvlinops": beside("curvlinops K V"),
        },
    )  # fmt: skip


BENCHMARK = Benchmark(
    "real_networks", __doc__, measure, tables, judge, parts=tuple(REAL_CASES), key=("model", "dtype"),
    extra={
        "--device": {"default": "cpu", "help": "cpu, or cuda"},
        "--dtypes": {"nargs": "+", "default": ["float32"], "choices": ["float32", "bfloat16"]},
        "--seconds": {"type": float, "default": float("inf"), "help": "begin no network after so many"},
    },
)  # fmt: skip
main = BENCHMARK.main

if __name__ == "__main__":
    sys.exit(main())
