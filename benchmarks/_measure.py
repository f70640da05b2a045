"""Times and memory that mean something: one thread, interleaved repetitions, fresh processes."""

from __future__ import annotations

import ctypes
import datetime
import gc
import multiprocessing
import os
import pickle
import platform
import statistics
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

TOLERANCE = 1e-5  # beyond this two float32 results are not of the same thing

_STATUS, _RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")
# What a first product loads, in so far as names can say it; the preparation loads the rest.
_PRELOADED = ["ntkops", "torch._dynamo", "torch._decomp.decompositions_for_jvp"]
_TIMEOUT = 900  # seconds after which a job is given up
# As the process was started, before it keeps to one of them.
_CORES = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else [0]


def environment() -> dict[str, Any]:
    """Return what the numbers depend on, without anything that names a machine or a user."""
    import ntkops

    return {
        "python": platform.python_version(), "platform": f"{platform.system()} {platform.machine()}",
        "cpu": _cpu_model(), "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "pinned": hasattr(os, "sched_getaffinity") and len(os.sched_getaffinity(0)) == 1,
        "torch": torch.__version__, "linear_operator": version("linear_operator"),
        "ntkops": ntkops.__version__,
    }  # fmt: skip


def _cpu_model() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or "unknown"


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


def digits(value: float, count: int = 3) -> float:
    """Return a number to so many digits, as the JSON has it."""
    return float(f"{value:.{count}g}")


# what is timed is right


class Disagreement(RuntimeError):
    """Two ways of computing one thing do not agree, so that their times say nothing."""


def distance(found: Tensor, wanted: Tensor) -> float:
    """Return the relative Frobenius distance, to two digits."""
    return digits(float((found.double() - wanted.double()).norm() / wanted.double().norm()), 2)


def agreement(
    what: str, found: Mapping[str, Tensor], wanted: Tensor, tolerance: float = TOLERANCE
) -> dict[str, float]:
    """Return how far each result is from what is wanted; `Disagreement` where one is beyond the tolerance."""
    far = {name: distance(value, wanted) for name, value in found.items()}
    for name, value in far.items():
        if not value <= tolerance:
            raise Disagreement(f"{what}: {name} differs by {value:.1e}")
    return far


# time


@dataclass
class Series:
    """Milliseconds a call, repetition by repetition: of the processor, and on the clock."""

    cpu: list[float] = field(default_factory=list)
    wall: list[float] = field(default_factory=list)

    def summary(self) -> dict[str, dict[str, float]]:
        """Return median, minimum and maximum of both."""
        return {"cpu_ms": spread(self.cpu), "wall_ms": spread(self.wall)}

    def times(self, factor: float) -> Series:
        """Return all of them scaled."""
        return Series([factor * t for t in self.cpu], [factor * t for t in self.wall])

    def minus(self, other: Series) -> Series:
        """Return what one takes more than the other, repetition by repetition."""
        cpu, wall = zip(self.cpu, other.cpu, strict=True), zip(self.wall, other.wall, strict=True)
        return Series([a - b for a, b in cpu], [a - b for a, b in wall])


def spread(values: Sequence[float]) -> dict[str, float]:
    """Return median, minimum and maximum, to four digits."""
    found = {"median": statistics.median(values), "min": min(values), "max": max(values)}
    return {key: digits(value, 4) for key, value in found.items()}


def summaries(series: Mapping[str, Series]) -> dict[str, dict[str, dict[str, float]]]:
    """Return the summary of each."""
    return {name: found.summary() for name, found in series.items()}


def ratio(above: Series, below: Series) -> dict[str, dict[str, float]]:
    """Return the ratio of two series, repetition by repetition: what disturbs both cancels."""
    return {
        "cpu": spread([a / b for a, b in zip(above.cpu, below.cpu, strict=True)]),
        "wall": spread([a / b for a, b in zip(above.wall, below.wall, strict=True)]),
    }


def interleaved(
    work: Mapping[str, Callable[[], object]], repetitions: int, shortest: float = 0.02
) -> dict[str, Series]:
    """Time work in turn, A B C, C B A, ..., after a warm-up; several calls a timing where it is short."""
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
    collecting, frozen = gc.isenabled(), gc.get_freeze_count()
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        yield
    finally:
        if not frozen:
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


class Clock:
    """Seconds since it was made, on the clock and of the processor."""

    def __init__(self) -> None:
        self._wall, self._cpu = time.perf_counter(), time.process_time()

    def read(self) -> dict[str, float]:
        """Return both."""
        wall, cpu = time.perf_counter() - self._wall, time.process_time() - self._cpu
        return {"wall_s": digits(wall, 4), "cpu_s": digits(cpu, 4)}


# memory


def memory_mb(key: str = "VmHWM") -> float | None:
    """Return resident megabytes (1e6 bytes) of this process, now ("VmRSS") or at most ("VmHWM")."""
    if not _STATUS.exists():
        return None
    for line in _STATUS.read_text().splitlines():
        if line.startswith(f"{key}:"):
            return round(int(line.split()[1]) * 1024 / 1e6, 2)
    return None


def settle() -> float | None:
    """Hand freed heap back to the system, forget the peak, and return the resident megabytes."""
    gc.collect()
    # Otherwise the work would reuse what is free unseen.
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
    try:
        _RESET.write_text("5")
    except OSError:
        return None
    return memory_mb("VmRSS")


def once(work: Callable[[], Any], device: str = "cpu") -> tuple[Any, dict[str, float | None]]:
    """Return the result of one call, its seconds (CPU time, or the clock of a device) and its peak in MB."""
    if device == "cuda":
        gc.collect()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before: float | None = torch.cuda.memory_allocated() / 1e6
        started = time.perf_counter()
        result = work()
        torch.cuda.synchronize()
        seconds, peak = time.perf_counter() - started, torch.cuda.max_memory_allocated() / 1e6
    else:
        before = settle()
        started = time.process_time()
        result = work()
        seconds, peak = time.process_time() - started, memory_mb() or 0.0
    taken = None if before is None else round(max(peak - before, 0.0))
    return result, {"seconds": digits(seconds, 4), "peak_mb": taken}


def peak_memory(prepare: Callable[..., Callable[[], object]], *args: object) -> float | None:
    """Return the MB that ``prepare(*args)()`` takes above what was there before it, in a fresh process."""
    return alone(_peak, prepare, args)


def _peak(prepare: Callable[..., Callable[[], object]], args: tuple[object, ...]) -> float | None:
    work = prepare(*args)
    before = settle()
    kept = work()
    peak = memory_mb()
    del kept
    return None if before is None or peak is None else round(max(peak - before, 0), 2)


# fresh processes, each on a core of its own, alone or as the ranks of a process group


def cores(count: int) -> tuple[int, ...]:
    """Return a core for each of so many processes; they share cores where there are too few."""
    return tuple(_CORES[rank % len(_CORES)] for rank in range(count))


class _Raised(str):
    """The traceback of a job that has raised."""


def launch(
    job: Callable[..., Any], places: Sequence[int], *arguments: Any, group: bool = True,
    timeout: float = _TIMEOUT,
) -> list[Any]:  # fmt: skip
    """Run a job in a process on each core, in a group as ``job(rank, count, *arguments)``; None: it died."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOADED)
    with tempfile.TemporaryDirectory() as place:
        folder, processes = Path(place), []
        for rank, core in enumerate(places):
            what = (rank, len(places), core, folder, job, arguments, group)
            processes.append(context.Process(target=_enter, args=what))
            processes[-1].start()
        until = time.monotonic() + timeout
        for process in processes:
            process.join(max(0.0, until - time.monotonic()))
        late = [process for process in processes if process.is_alive()]
        for process in late:
            process.kill()
        if late:
            raise RuntimeError(f"{len(late)} processes were still running after {timeout} s")
        paths = [folder / f"rank{rank}" for rank in range(len(places))]
        found = [pickle.loads(path.read_bytes()) if path.exists() else None for path in paths]
    for one in found:
        if isinstance(one, _Raised):
            raise RuntimeError(one)
    return found


def alone(job: Callable[..., Any], *arguments: Any) -> Any:
    """Run a job in one fresh process on one core, and return what it has found."""
    return launch(job, cores(1)[-1:], *arguments, group=False)[0]


def _enter(
    rank: int, count: int, core: int, folder: Path, job: Callable[..., Any], arguments: tuple[Any, ...],
    group: bool,
) -> None:  # fmt: skip
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {core})
    torch.set_num_threads(1)
    if group:
        meeting, wait = f"file://{folder / 'meeting'}", datetime.timedelta(seconds=120)
        dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=count, timeout=wait)
    found: Any
    try:
        found = job(rank, count, *arguments) if group else job(*arguments)
    except Exception:
        found = _Raised(traceback.format_exc())
    written = folder / f"writing{rank}"
    written.write_bytes(pickle.dumps(found))
    written.rename(folder / f"rank{rank}")
    if group and not isinstance(found, _Raised):
        dist.destroy_process_group()
