"""Jobs in fresh processes, each on a core of its own, alone or as the ranks of a process group."""

from __future__ import annotations

import ctypes
import datetime
import gc
import multiprocessing
import os
import pickle
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

__all__ = ["Clock", "Started", "alone", "cores", "launch", "memory_mb", "settle", "start"]

_STATUS = Path("/proc/self/status")
_RESET = Path("/proc/self/clear_refs")
_PRELOADED = ["ntkops", "torch._dynamo", "torch._decomp.decompositions_for_jvp"]
_TIMEOUT = 900  # seconds after which a job is given up

Job = Callable[..., Any]


def cores(count: int) -> tuple[int, ...]:
    """Return a core for each of so many processes; they share cores where there are too few."""
    allowed = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else [0]
    return tuple(allowed[rank % len(allowed)] for rank in range(count))


@dataclass
class Started:
    """Processes on their way.

    Attributes:
        folder: Where they leave what they have found.
        processes: The processes, by rank.
    """

    folder: Path
    processes: list[BaseProcess]

    def join(self, timeout: float = _TIMEOUT) -> list[Any]:
        """Wait for all.

        Returns:
            What each has found; None for one that died.

        Raises:
            RuntimeError: If one of them raised, or is still there after the timeout.
        """
        until = time.monotonic() + timeout
        for process in self.processes:
            process.join(max(0.0, until - time.monotonic()))
        late = [process for process in self.processes if process.is_alive()]
        for process in late:
            process.kill()
        if late:
            raise RuntimeError(f"{len(late)} processes were still running after {timeout} s")
        found = [self._found(rank) for rank in range(len(self.processes))]
        for one in found:
            if isinstance(one, _Raised):
                raise RuntimeError(one.text)
        return found

    def _found(self, rank: int) -> Any:
        path = self.folder / f"rank{rank}"
        return pickle.loads(path.read_bytes()) if path.exists() else None


@dataclass
class _Raised:
    """What a job has raised."""

    text: str


def start(job: Job, places: Sequence[int], folder: Path, *arguments: Any, group: bool = True) -> Started:
    """Start a process on each of some cores.

    Args:
        job: Function of a module: ``job(*arguments)``, with ``(rank, count)`` in front in a group.
        places: The core of each process.
        folder: An empty folder of their own.
        *arguments: What the job is given.
        group: Whether they are the ranks of a process group (gloo).

    Returns:
        The processes.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOADED)
    processes: list[BaseProcess] = []
    for rank, core in enumerate(places):
        what = (rank, len(places), core, folder, job, arguments, group)
        process = context.Process(target=_enter, args=what)
        process.start()
        processes.append(process)
    return Started(folder, processes)


def launch(job: Job, places: Sequence[int], *arguments: Any, group: bool = True) -> list[Any]:
    """Run a job on some cores at once, and return what each process has found; see `start`."""
    with tempfile.TemporaryDirectory() as folder:
        return start(job, places, Path(folder), *arguments, group=group).join()


def alone(job: Job, *arguments: Any) -> Any:
    """Run a job in one fresh process on one core, and return what it has found."""
    return launch(job, cores(1)[-1:], *arguments, group=False)[0]


def _enter(
    rank: int, count: int, core: int, folder: Path, job: Job, arguments: tuple[Any, ...], group: bool
) -> None:
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


# what a process measures of itself


def settle() -> float | None:
    """Hand freed heap back to the system, forget the peak, and return the resident megabytes."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
    try:
        _RESET.write_text("5")
    except OSError:
        return None
    return memory_mb("VmRSS")


def memory_mb(key: str = "VmHWM") -> float | None:
    """Return resident megabytes (1e6 bytes) of this process, now ("VmRSS") or at most ("VmHWM")."""
    if not _STATUS.exists():
        return None
    for line in _STATUS.read_text().splitlines():
        if line.startswith(f"{key}:"):
            return round(int(line.split()[1]) * 1024 / 1e6, 1)
    return None


class Clock:
    """Seconds since it was made, on the clock and of the processor."""

    def __init__(self) -> None:
        self._wall, self._cpu = time.perf_counter(), time.process_time()

    def read(self) -> dict[str, float]:
        """Return both."""
        wall, cpu = time.perf_counter() - self._wall, time.process_time() - self._cpu
        return {"wall_s": float(f"{wall:.4g}"), "cpu_s": float(f"{cpu:.4g}")}
