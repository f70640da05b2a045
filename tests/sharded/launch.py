"""Starting several processes that do the same job, each on its share, and collecting what they found."""

from __future__ import annotations

import datetime
import multiprocessing
import os
import pickle
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

TIMEOUT = 60  # seconds

Job = Callable[..., Any]


def launch(job: Job, count: int, folder: Path, *arguments: Any, timeout: float = TIMEOUT) -> list[Any]:
    """Run ``job(rank, count, *arguments)`` on so many processes and return what each has returned.

    An exception is returned as a pair of its class name and its text. None stands for a process that died.
    """
    folder.mkdir(parents=True, exist_ok=True)
    _started(count, folder, job, arguments, timeout, join=True)
    return [_load(folder / f"rank{rank}") for rank in range(count)]


def start(job: Job, count: int, folder: Path, *arguments: Any, timeout: float = TIMEOUT) -> Any:
    """Start the processes and return their context, without waiting for them."""
    folder.mkdir(parents=True, exist_ok=True)
    return _started(count, folder, job, arguments, timeout, join=False)


def _started(count: int, folder: Path, job: Job, arguments: Any, timeout: float, *, join: bool) -> Any:
    # One server imports everything once, and makes the processes from there.
    multiprocessing.set_forkserver_preload(["ntkops", "torch.distributed"])
    return mp.start_processes(
        _enter,
        (count, folder, job, arguments, timeout),
        nprocs=count,
        join=join,
        start_method="forkserver",
    )


def _load(path: Path) -> Any:
    return pickle.loads(path.read_bytes()) if path.exists() else None


def _enter(rank: int, count: int, folder: Path, job: Job, arguments: Any, timeout: float) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder / 'meeting'}",
        rank=rank,
        world_size=count,
        timeout=datetime.timedelta(seconds=timeout),
    )
    try:
        found = job(rank, count, *arguments)
    except Exception as error:
        found = type(error).__name__, str(error), traceback.format_exc()
    (folder / f"rank{rank}").write_bytes(pickle.dumps(found))
    # Connections that others have broken off are not taken down in order.
    os._exit(0)
