"""Times and memory that mean something: one thread, interleaved repetitions, fresh processes."""

from __future__ import annotations

import ctypes
import gc
import multiprocessing
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

__all__ = ["Series", "environment", "interleaved", "one_thread", "peak_memory", "ratio", "spread"]

_STATUS = Path("/proc/self/status")
_RESET = Path("/proc/self/clear_refs")
# What a first product loads, in so far as names can say it; the preparation loads the rest.
_PRELOADED = ["ntkops", "torch._dynamo", "torch._decomp.decompositions_for_jvp"]


def environment() -> dict[str, Any]:
    """Return what the numbers depend on, without anything that names a machine or a user."""
    return {
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "cpu": _cpu_model(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "pinned": _is_pinned(),
        "torch": torch.__version__,
        "linear_operator": version("linear_operator"),
        "ntkops": _version_of_ntkops(),
    }


def _version_of_ntkops() -> str:
    """Return the version of the package that is measured."""
    import ntkops

    return ntkops.__version__


def _cpu_model() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or "unknown"


def _is_pinned() -> bool:
    return hasattr(os, "sched_getaffinity") and len(os.sched_getaffinity(0)) == 1


@contextmanager
def one_thread() -> Iterator[None]:
    """Compute with one thread on one processor inside the block, and put both settings back."""
    threads = torch.get_num_threads()
    allowed = os.sched_getaffinity(0) if hasattr(os, "sched_setaffinity") else None
    torch.set_num_threads(1)
    try:
        if allowed is not None:
            os.sched_setaffinity(0, {max(allowed)})
        yield
    finally:
        if allowed is not None:
            os.sched_setaffinity(0, allowed)
        torch.set_num_threads(threads)


# time


@dataclass
class Series:
    """Repeated times of one piece of work, in milliseconds a call.

    Attributes:
        cpu: Process CPU time, which other processes disturb least.
        wall: Time on the clock.
    """

    cpu: list[float] = field(default_factory=list)
    wall: list[float] = field(default_factory=list)

    def summary(self) -> dict[str, dict[str, float]]:
        """Return median, minimum and maximum of both."""
        return {"cpu_ms": spread(self.cpu), "wall_ms": spread(self.wall)}


def spread(values: Sequence[float]) -> dict[str, float]:
    """Return median, minimum and maximum, to four digits."""
    found = {"median": statistics.median(values), "min": min(values), "max": max(values)}
    return {key: float(f"{value:.4g}") for key, value in found.items()}


def ratio(above: Series, below: Series) -> dict[str, dict[str, float]]:
    """Return the ratio of two series, repetition by repetition: what disturbs both cancels."""
    return {
        "cpu": spread([a / b for a, b in zip(above.cpu, below.cpu, strict=True)]),
        "wall": spread([a / b for a, b in zip(above.wall, below.wall, strict=True)]),
    }


def interleaved(
    work: Mapping[str, Callable[[], object]], repetitions: int, shortest: float = 0.02
) -> dict[str, Series]:
    """Time pieces of work in turn, A B C, C B A, A B C, ..., after a warm-up.

    Args:
        work: The pieces by name.
        repetitions: Times that each is timed.
        shortest: Seconds; work that takes less is called several times in one timing; 0 for once.

    Returns:
        The times of each, in the order of the repetitions.
    """
    calls = {name: _calls(piece, shortest) for name, piece in work.items()}
    series = {name: Series() for name in work}
    names = list(work)
    with _no_collection():
        for turn in range(repetitions):
            for name in names if turn % 2 == 0 else reversed(names):
                gc.collect()
                cpu, wall = _timed(work[name], calls[name])
                series[name].cpu.append(cpu)
                series[name].wall.append(wall)
    return series


@contextmanager
def _no_collection() -> Iterator[None]:
    """Keep the collector out of the timings, and its own passes small enough to leave the cache warm."""
    collecting = gc.isenabled()
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        yield
    finally:
        gc.unfreeze()
        if collecting:
            gc.enable()


def _timed(piece: Callable[[], object], calls: int) -> tuple[float, float]:
    wall, cpu = time.perf_counter(), time.process_time()
    for _ in range(calls):
        piece()
    return 1e3 * (time.process_time() - cpu) / calls, 1e3 * (time.perf_counter() - wall) / calls


def _calls(piece: Callable[[], object], shortest: float) -> int:
    piece()
    if not shortest:
        return 1
    return max(1, int(1e3 * shortest / max(_timed(piece, 1)[1], 1e-6)))


# memory


def peak_memory(prepare: Callable[..., Callable[[], object]], *args: object) -> float | None:
    """Return how far one call drives resident memory above what it was just before.

    Everything happens in a fresh process, whose heap holds nothing that the call could reuse.

    Args:
        prepare: Function of a module; returns the work after loading what it needs.
        *args: Its arguments.

    Returns:
        Megabytes (1e6 bytes), or None where the system does not tell.
    """
    if not _STATUS.exists():
        return None
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOADED)
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(_peak, prepare, args).result()


def _peak(prepare: Callable[..., Callable[[], object]], args: tuple[object, ...]) -> float:
    with one_thread():
        work = prepare(*args)
        gc.collect()
        _return_free_memory()
        before = _resident("VmRSS")
        _forget_peak()
        kept = work()
        peak = _resident("VmHWM")
        del kept
    return round(max(peak - before, 0) / 1e6, 2)


def _return_free_memory() -> None:
    """Hand freed heap back to the system: otherwise the work would reuse it unseen."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _forget_peak() -> None:
    """Reset the high-water mark, which the preparation may have raised above what the work needs."""
    try:
        _RESET.write_text("5")
    except OSError:
        return


def _resident(key: str) -> int:
    for line in _STATUS.read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"the system does not report {key}")
