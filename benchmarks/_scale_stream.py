"""What is measured on one core over streamed images: time and memory against their number."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

import torch
from _scale_process import Clock, alone, memory_mb, settle
from _scale_work import CLASSES, network, samples

import ntkops

__all__ = [
    "BATCH",
    "LIVE_BLOCKS",
    "SKETCH_BLOCKS",
    "SKETCH_COLUMNS",
    "measure_streams",
    "state_block_mb",
    "streamed",
]

BATCH = 250
SKETCH_COLUMNS = 32
# Blocks N·O x m of float32 at the peak. Six hold something: probes, images, and in an inner product two
# float64 copies, of twice the size. About two more are pieces that have been put together and freed, which
# the allocator keeps: handing them back before the inner product leaves six.
LIVE_BLOCKS = 6
SKETCH_BLOCKS = LIVE_BLOCKS + 2
Plan = Sequence[tuple[str, int, int]]
_WARM = 2 * BATCH


def _work(what: str, kernel: Any) -> ntkops.Estimate:
    generator = torch.Generator().manual_seed(0)
    if what == "trace, exact":
        return ntkops.trace(kernel, method="exact")
    if what == "trace, stratified":
        return ntkops.trace(kernel, method="stratified", num_passes=1, generator=generator)
    if what == "norm, exact by tiles":
        return ntkops.frobenius_norm(kernel, method="exact")
    assert what == "norm, sketch"
    passes = 2 * SKETCH_COLUMNS  # a vjp and a jvp a column
    return ntkops.frobenius_norm(kernel, method="sketch", num_passes=passes, generator=generator)


def streamed(what: str, count: int) -> dict[str, Any]:
    """Measure one piece of work in this process: time, and resident memory at the start and at most."""
    model = network("cnn")

    def kernel(size: int) -> Any:
        return ntkops.ntk(model, ntkops.Batches(samples("cnn", size), BATCH), max_dense_bytes=0)

    warm = kernel(min(_WARM, count))
    _work(what, warm)  # loads the code
    del warm
    start = settle()
    clock = Clock()
    operator = kernel(count)
    opened = clock.read()["cpu_s"]
    clock = Clock()
    found = _work(what, operator)
    spent = clock.read()
    peak = memory_mb()
    return {
        "what": what,
        "samples": count,
        "value": float(f"{float(found.value):.10g}"),
        "exact": found.exact,
        "passes": int(found.passes),
        "opening_s": opened,
        **spent,
        "start_mb": start,
        "peak_mb": peak,
    }


def state_block_mb(count: int, columns: int = SKETCH_COLUMNS) -> float:
    """Return the megabytes of one block N·O x m of float32 numbers."""
    return count * CLASSES * columns * 4 / 1e6


def measure_streams(plan: Plan) -> list[dict[str, Any]]:
    """Measure every case in fresh processes, all cases in turn.

    Args:
        plan: What, for how many samples, and in how many processes.

    Returns:
        One entry a case: medians, and each repetition's numbers.
    """
    runs: dict[tuple[str, int], list[dict[str, Any]]] = {case[:2]: [] for case in plan}
    for turn in range(max(times for _, _, times in plan)):
        for what, count, times in plan:
            if turn < times:
                found = alone(streamed, what, count)
                runs[what, count].append(found)
                print(f"{what}, N = {count}: {found['cpu_s']:.3g} s, {found['peak_mb']} MB", flush=True)
    return [_summary(found) for found in runs.values()]


def _summary(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    first = runs[0]
    values = {run["value"] for run in runs}
    return {
        **{key: first[key] for key in ("what", "samples", "value", "exact", "passes")},
        "same_value": len(values) == 1,
        "wall_s": statistics.median(run["wall_s"] for run in runs),
        "cpu_s": statistics.median(run["cpu_s"] for run in runs),
        "opening_s": statistics.median(run["opening_s"] for run in runs),
        "all_cpu_s": [run["cpu_s"] for run in runs],
        "start_mb": _median([run["start_mb"] for run in runs]),
        "peak_mb": _median([run["peak_mb"] for run in runs]),
        "all_peak_mb": [run["peak_mb"] for run in runs],
    }


def _median(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.median(known) if len(known) == len(values) else None
