"""Peak memory of exact kernels, each in a process of its own, and how it grows with the samples."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from _kernel_peers import Kind, contraction
from _kernel_work import ours
from _measure import peak_memory
from _models import KERNEL_CASES, Case

import ntkops

__all__ = ["measure_frobenius", "measure_growth", "prepare_frobenius", "prepare_kernel"]

ROWS = 20_000


def prepare_kernel(
    variant: str, name: str, quick: bool, samples: int, kind: Kind, chunk: int | None
) -> Callable[[], object]:
    """Return the work whose memory is measured, after the same on two samples has loaded the code."""
    case = KERNEL_CASES[name]

    def work(count: int) -> Callable[[], object]:
        model, x = case.make(quick, count)
        return ours(model, x, kind) if variant == "layerwise" else contraction(model, x, kind, chunk)

    work(2)()
    return work(samples)


def measure_growth(name: str, sizes: Sequence[int], quick: bool) -> dict[str, Any]:
    """Return peak memory of the exact trace and the diagonal for several numbers of samples."""
    kinds: tuple[Kind, ...] = ("scalar", "diagonal") if name == "mlp" else ("diagonal",)
    return {
        "model": name,
        "samples": list(sizes),
        "memory_mb": {
            kind: [peak_memory(prepare_kernel, "layerwise", name, quick, n, kind, None) for n in sizes]
            for kind in kinds
        },
    }


def _frobenius_case(samples: int) -> tuple[Any, Any]:
    case: Case = KERNEL_CASES["mlp"]
    return case.make(samples=samples)


def prepare_frobenius(samples: int) -> Callable[[], object]:
    """Return the exact Frobenius norm of the MLP's kernel, without the dense kernel."""
    few = ntkops.ntk(*_frobenius_case(2), max_dense_bytes=0)
    ntkops.frobenius_norm(few, method="exact")
    kernel = ntkops.ntk(*_frobenius_case(samples), max_dense_bytes=0)
    return lambda: ntkops.frobenius_norm(kernel, method="exact")


def measure_frobenius(rows: int = ROWS) -> dict[str, Any]:
    """Return time and peak memory of the exact Frobenius norm of a kernel with many rows."""
    samples = rows // 10
    work = prepare_frobenius(samples)
    started = time.process_time()
    found = work()
    spent = time.process_time() - started
    assert isinstance(found, ntkops.Estimate) and found.exact and torch.isfinite(found.value).all()
    return {
        "model": "mlp",
        "n": rows,
        "value": float(f"{float(found.value):.7g}"),
        "cpu_s": float(f"{spent:.3g}"),
        "memory_mb": peak_memory(prepare_frobenius, samples),
    }
