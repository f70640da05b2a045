"""What is measured over the ranks of a process group: products against ranks, bytes, and a killed rank."""

from __future__ import annotations

import os
import signal
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from _scale_process import cores, launch, memory_mb, start
from _scale_work import CLASSES, network, samples
from torch import Tensor

import ntkops
from ntkops.solvers import conjugate_gradient

__all__ = ["gradients", "measure_kill", "measure_ranks", "products", "share"]

_LONGEST = 3  # most products of one series
_VICTIM = 1


def share(rank: int, count: int, total: int) -> tuple[int, int]:
    """Return the first sample of a rank, and that after its last."""
    return rank * total // count, (rank + 1) * total // count


@contextmanager
def _counted() -> Iterator[dict[str, int]]:
    """Count the bytes that torch.distributed is given inside the block, whoever gives them."""
    found = {"sums": 0, "bytes": 0}
    plain = dist.all_reduce

    def counting(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        found["sums"] += 1
        found["bytes"] += tensor.nbytes
        return plain(tensor, *args, **kwargs)

    dist.all_reduce = counting
    try:
        yield found
    finally:
        dist.all_reduce = plain


def _columns(total: int, first: int, last: int, k: int) -> Tensor:
    """Return this rank's rows of k columns that are the same for any number of ranks."""
    rows = torch.arange(first * CLASSES, last * CLASSES, dtype=torch.float64).unsqueeze(1)
    return torch.sin(0.37 * rows * (1 + torch.arange(k)) + 1.0).float()


def products(rank: int, count: int, name: str, total: int, widths: Sequence[int]) -> dict[str, Any]:
    """Measure products of one network's kernel on this rank, for each width of the block."""
    first, last = share(rank, count, total)
    x = samples(name, last, first)[0 : last - first]
    began = time.perf_counter()
    kernel: Any = ntkops.ntk(network(name), x, group="world")
    opened = time.perf_counter() - began
    found: dict[str, Any] = {"opening_s": opened, "widths": []}
    for k in widths:
        found["widths"].append(_timed(kernel, _columns(total, first, last, k), k))
    found["peak_mb"] = memory_mb()
    found["parameters"] = kernel.num_parameters
    found["cached"] = bool(kernel._engine.is_cached(kernel._rows.inputs))
    found["engine"] = kernel.engine_info.engine
    return found


def _timed(kernel: Any, block: Tensor, k: int) -> dict[str, Any]:
    before = kernel.ranks.payload
    with _counted() as counted:
        result = kernel @ block
    payload = kernel.ranks.payload - before
    times = []
    for _ in range(_LONGEST):
        dist.barrier()
        began = time.perf_counter()
        kernel @ block
        dist.barrier()
        times.append(time.perf_counter() - began)
    sums = kernel.space.inner(block, result)  # the same on all ranks
    reduced = torch.zeros(kernel.num_parameters, k)
    waited = []
    for _ in range(_LONGEST):
        dist.barrier()
        began = time.perf_counter()
        dist.all_reduce(reduced)
        waited.append(time.perf_counter() - began)
    return {
        "k": k,
        "s": statistics.median(times),
        "payload": payload,
        "all_bytes": counted["bytes"],
        "all_sums": counted["sums"],
        "all_reduce_s": statistics.median(waited),
        "forms": sums.diagonal().tolist(),
    }


def measure_ranks(
    plan: Sequence[tuple[str, int]], widths: Sequence[int], counts: Sequence[int], repetitions: int
) -> list[dict[str, Any]]:
    """Measure products for several numbers of ranks, in fresh processes, all numbers in turn.

    Args:
        plan: Networks and how many samples all ranks hold together.
        widths: Columns of a block.
        counts: Numbers of ranks.
        repetitions: Times that each is started.

    Returns:
        One entry for each network, width and number of ranks.
    """
    entries = []
    for name, total in plan:
        runs: dict[int, list[list[Any]]] = {count: [] for count in counts}
        for _ in range(repetitions):
            for count in counts:
                runs[count].append(launch(products, cores(count), name, total, list(widths)))
        for position, k in enumerate(widths):
            group = [_entry(name, total, k, position, count, runs[count]) for count in counts]
            for entry in group:
                entry["speedup"] = float(f"{group[0]['s'] / entry['s']:.4g}")
                entry["speedups"] = [
                    float(f"{a / b:.4g}") for a, b in zip(group[0]["all_s"], entry["all_s"], strict=True)
                ]
                entry["difference"] = _difference(group[0]["forms"], entry["forms"])
            entries += group
            for entry in group:
                del entry["forms"]
                print(f"{name}, k = {k}, {entry['ranks']} ranks: {entry['s']:.3g} s", flush=True)
    return entries


def _entry(name: str, total: int, k: int, position: int, count: int, runs: list[list[Any]]) -> dict[str, Any]:
    # A product is done when the slowest rank is.
    times = [max(rank["widths"][position]["s"] for rank in run) for run in runs]
    waits = [run[0]["widths"][position]["all_reduce_s"] for run in runs]
    first = runs[0][0]
    told = first["widths"][position]
    return {
        "network": name,
        "samples": total,
        "parameters": first["parameters"],
        "k": k,
        "ranks": count,
        "cores": len(set(cores(count))),
        "engine": first["engine"],
        "cached": first["cached"],
        "s": float(f"{statistics.median(times):.4g}"),
        "all_s": [float(f"{t:.4g}") for t in times],
        "all_reduce_s": float(f"{statistics.median(waits):.4g}"),
        "payload": told["payload"],
        "all_bytes": told["all_bytes"],
        "all_sums": told["all_sums"],
        "asked": first["parameters"] * k * 4,
        "peak_mb": max((rank["peak_mb"] or 0.0) for rank in runs[0]),
        "forms": told["forms"],
    }


def _difference(one: Sequence[float], other: Sequence[float]) -> float:
    """Return the largest relative difference of vᵀ K v."""
    return float(f"{max(abs(a - b) / abs(a) for a, b in zip(one, other, strict=True)):.2e}")


# a rank that dies


def gradients(rank: int, count: int, total: int, folder: Path, victim: int | None, at: int) -> dict[str, Any]:
    """Solve by conjugate gradients with a file; the victim kills itself after so many steps."""
    first, last = share(rank, count, total)
    x = samples("mlp", last, first)[0 : last - first]
    kernel: Any = ntkops.ntk(network("mlp"), x, group="world")
    b = _columns(total, first, last, 2)
    ridge = 1e-2 * float(kernel.space.sum(kernel.diagonal())) / kernel.space.size
    reached = [0]

    def after(iteration: Any) -> None:
        reached[0] = iteration.iterations
        if rank == victim and iteration.iterations == at:
            (folder / "killed").write_text(repr(time.time()))
            os.kill(os.getpid(), signal.SIGKILL)

    try:
        solution, info = conjugate_gradient(
            lambda V: kernel @ V + ridge * V,
            b,
            kernel.space,
            tolerance=1e-4,
            max_iterations=3 * at,
            checkpoint=folder / "solve.safetensors",
            checkpoint_every=5,
            callback=after,
            raise_on_failure=False,
        )
    except ntkops.NtkopsError as error:
        return {"raised": type(error).__name__, "time": time.time(), "reached": reached[0]}
    return {"solution": solution, "iterations": info.iterations, "products": info.products}


def measure_kill(total: int, at: int, repetitions: int) -> list[dict[str, Any]]:
    """Kill one of three ranks in the middle of conjugate gradients, and go on.

    Args:
        total: Samples of all ranks.
        at: The step after which it is killed.
        repetitions: Times that it is done.

    Returns:
        For each time the seconds until the others have raised, and whether the bits are the same.
    """
    with tempfile.TemporaryDirectory() as place:
        whole = launch(gradients, cores(3), total, Path(place), None, at)
    entries = []
    for _ in range(repetitions):
        with tempfile.TemporaryDirectory() as place, tempfile.TemporaryDirectory() as meeting:
            found = start(gradients, cores(3), Path(meeting), total, Path(place), _VICTIM, at).join(120)
            others = [one for rank, one in enumerate(found) if rank != _VICTIM]
            killed = float((Path(place) / "killed").read_text())
            resumed = launch(gradients, cores(3), total, Path(place), None, at)
            entries.append(
                {
                    "samples": total,
                    "ranks": 3,
                    "killed_after": at,
                    "raised": sorted({one["raised"] for one in others}),
                    "seconds": float(f"{max(one['time'] for one in others) - killed:.3g}"),
                    "victim_died": found[_VICTIM] is None,
                    "iterations": [whole[0]["iterations"], resumed[0]["iterations"]],
                    "same_bits": all(
                        torch.equal(a["solution"], b["solution"]) for a, b in zip(whole, resumed, strict=True)
                    ),
                }
            )
        print(entries[-1], flush=True)
    return entries
