"""Kernels of many samples: time and memory against N and ranks, bytes sent, faults (docs/scale.md)."""

from __future__ import annotations

import argparse
import math
import os
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from _measure import Clock, alone, cores, digits, launch, memory_mb, settle
from _models import CASES, cnn, resnet50, seeded
from _tables import Benchmark, say, shown, table, verdict
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import ntkops
from ntkops.engines.cost import LayerShape, product_costs
from ntkops.solvers import conjugate_gradient
from ntkops.vectors import Distribution, Space

CLASSES, BATCH, SKETCH_COLUMNS = 10, 250, 32
# Blocks N·O x m of float32 at the peak. Six hold something: probes, images, and in an inner product two
# float64 copies, of twice the size. About two more are pieces that have been put together and freed, which
# the allocator keeps: handing them back before the inner product leaves six.
LIVE_BLOCKS = 6
SKETCH_BLOCKS = LIVE_BLOCKS + 2
# What is claimed: growth of memory, speed-up of two ranks, bytes against P k, seconds to raise, differences.
MEMORY, SPEEDUP, PAYLOAD, SECONDS, DIFFERENCE = 0.10, 1.6, 1.1, 60.0, 1e-5

# What, samples, processes: the longest cases run once.
PLAN: dict[str, Any] = {
    "streams": (
        *(("trace, exact", count, 3) for count in (1000, 5000, 20_000, 50_000)), ("trace, exact", 100_000, 1),
        *(("trace, stratified", count, 3) for count in (1000, 5000, 20_000, 50_000)),
        *(("norm, sketch", count, 3) for count in (1000, 5000, 20_000)), ("norm, sketch", 50_000, 1),
        *(("norm, exact by tiles", count, 3) for count in (250, 500, 1000)),
    ),
    "compared": (5000, 50_000), "ranks": (("cnn", 2048), ("mlp", 4096)), "widths": (8, 32),
    "counts": (1, 2, 3, 4), "repetitions": 3, "kill": (3000, 20, 3),
}  # fmt: skip
QUICK: dict[str, Any] = {
    "streams": (
        *((what, n, 1) for what in ("trace, exact", "trace, stratified", "norm, sketch") for n in (250, 750)),
        ("norm, exact by tiles", 50, 1),
    ),
    "compared": (250, 750), "ranks": (("cnn", 60), ("mlp", 200)), "widths": (8,), "counts": (1, 2),
    "repetitions": 1, "kill": (120, 7, 1),
}  # fmt: skip


# networks, and data that take no memory: made slice by slice from a seed whenever they are read

_BLOCK = 250  # rows that are drawn together, whoever asks for one of them


class Vectors:
    """Rows of 64 normal numbers that are never stored; a rank's share begins where the one before ends."""

    shape: tuple[int, ...] = (64,)

    def __init__(self, stop: int, start: int = 0) -> None:
        self._start, self._stop = start, stop

    def __len__(self) -> int:
        """Return their number."""
        return self._stop - self._start

    def __getitem__(self, rows: slice) -> Tensor:
        """Return a slice of them."""
        first, last, _ = rows.indices(len(self))
        first, last = first + self._start, last + self._start
        parts = []
        for number in range(first // _BLOCK, -(-last // _BLOCK)):
            block = self._block(torch.Generator().manual_seed(1 + number))
            parts.append(block[max(first - number * _BLOCK, 0) : last - number * _BLOCK])
        return torch.cat(parts)

    def _block(self, generator: torch.Generator) -> Tensor:
        return torch.randn(_BLOCK, *self.shape, generator=generator)


class Images(Vectors):
    """Images 3 x 32 x 32 of random pixels in [-1, 1)."""

    shape = (3, 32, 32)

    def _block(self, generator: torch.Generator) -> Tensor:
        pixels = torch.randint(0, 256, (_BLOCK, *self.shape), generator=generator, dtype=torch.uint8)
        return pixels.float().div_(128).sub_(1)


def network(name: str) -> nn.Module:
    """Return the CNN or the MLP, with ten outputs, always the same one."""
    if name == "mlp":
        return CASES["mlp"].make()[0]
    return seeded(partial(cnn, [3, 8, 16, 16], strides=(2, 2, 2), flat=256))


def samples(name: str, stop: int, start: int = 0) -> Vectors:
    """Return the data set of a network."""
    return Vectors(stop, start) if name == "mlp" else Images(stop, start)


# one core, streamed images: time and memory against their number


def _work(what: str, kernel: Any) -> ntkops.Estimate:
    generator = torch.Generator().manual_seed(0)
    if what == "trace, exact":
        return ntkops.trace(kernel, method="exact")
    if what == "trace, stratified":
        return ntkops.trace(kernel, method="stratified", num_passes=1, generator=generator)
    if what == "norm, exact by tiles":
        return ntkops.frobenius_norm(kernel, method="exact")
    passes = 2 * SKETCH_COLUMNS  # a vjp and a jvp a column
    return ntkops.frobenius_norm(kernel, method="sketch", num_passes=passes, generator=generator)


def streamed(what: str, count: int) -> dict[str, Any]:
    """Measure one piece of work in this process: time, and resident memory at the start and at most."""
    model = network("cnn")

    def kernel(size: int) -> Any:
        return ntkops.ntk(model, ntkops.Batches(samples("cnn", size), BATCH), max_dense_bytes=0)

    warm = kernel(min(2 * BATCH, count))
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
        "what": what, "samples": count, "value": digits(float(found.value), 10), "exact": found.exact,
        "passes": int(found.passes), "opening_s": opened, **spent, "start_mb": start, "peak_mb": peak,
    }  # fmt: skip


def state_block_mb(count: int, columns: int = SKETCH_COLUMNS) -> float:
    """Return the megabytes of one block N·O x m of float32 numbers."""
    return count * CLASSES * columns * 4 / 1e6


def measure_streams(plan: Sequence[tuple[str, int, int]]) -> list[dict[str, Any]]:
    """Measure all cases in turn, in fresh processes: medians, and each repetition's numbers."""
    runs: dict[tuple[str, int], list[dict[str, Any]]] = {case[:2]: [] for case in plan}
    for turn in range(max(times for _, _, times in plan)):
        for what, count, times in plan:
            if turn < times:
                say(f"{what}, N = {count}")
                runs[what, count].append(alone(streamed, what, count))
    return [
        {
            **{key: found[0][key] for key in ("what", "samples", "value", "exact", "passes")},
            "same_value": len({run["value"] for run in found}) == 1,
            **{
                key: None if None in (values := [run[key] for run in found]) else statistics.median(values)
                for key in ("wall_s", "cpu_s", "opening_s", "start_mb", "peak_mb")
            },
            "all_cpu_s": [run["cpu_s"] for run in found], "all_peak_mb": [run["peak_mb"] for run in found],
        }
        for found in runs.values()
    ]  # fmt: skip


# the ranks of a process group


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
    for _ in range(3):
        dist.barrier()
        began = time.perf_counter()
        kernel @ block
        dist.barrier()
        times.append(time.perf_counter() - began)
    sums = kernel.space.inner(block, result)  # the same on all ranks
    reduced = torch.zeros(kernel.num_parameters, k)
    waited = []
    for _ in range(3):
        dist.barrier()
        began = time.perf_counter()
        dist.all_reduce(reduced)
        waited.append(time.perf_counter() - began)
    return {
        "k": k, "s": statistics.median(times), "payload": payload, "all_bytes": counted["bytes"],
        "all_sums": counted["sums"], "all_reduce_s": statistics.median(waited),
        "forms": sums.diagonal().tolist(),
    }  # fmt: skip


def measure_ranks(
    plan: Sequence[tuple[str, int]], widths: Sequence[int], counts: Sequence[int], repetitions: int
) -> list[dict[str, Any]]:
    """Measure products for several numbers of ranks, in fresh processes, all numbers in turn."""
    entries = []
    for name, total in plan:
        say(f"{name} over ranks")
        runs: dict[int, list[list[Any]]] = {count: [] for count in counts}
        for _ in range(repetitions):
            for count in counts:
                runs[count].append(launch(products, cores(count), name, total, list(widths)))
        for place, k in enumerate(widths):
            group = [_entry(name, total, k, place, count, runs[count]) for count in counts]
            one = group[0]
            for entry in group:
                pairs = zip(one["all_s"], entry["all_s"], strict=True)
                forms = zip(one["forms"], entry["forms"], strict=True)  # vᵀ K v
                entry["speedup"] = digits(one["s"] / entry["s"], 4)
                entry["speedups"] = [digits(a / b, 4) for a, b in pairs]
                entry["difference"] = digits(max(abs(a - b) / abs(a) for a, b in forms))
            entries += [{key: value for key, value in e.items() if key != "forms"} for e in group]
    return entries


def _entry(name: str, total: int, k: int, position: int, count: int, runs: list[list[Any]]) -> dict[str, Any]:
    # A product is done when the slowest rank is.
    times = [max(rank["widths"][position]["s"] for rank in run) for run in runs]
    waits = [run[0]["widths"][position]["all_reduce_s"] for run in runs]
    first = runs[0][0]
    told = first["widths"][position]
    return {
        "network": name, "samples": total, "parameters": first["parameters"], "k": k, "ranks": count,
        "cores": len(set(cores(count))), "engine": first["engine"], "cached": first["cached"],
        "s": digits(statistics.median(times), 4), "all_s": [digits(t, 4) for t in times],
        "all_reduce_s": digits(statistics.median(waits), 4), "payload": told["payload"],
        "all_bytes": told["all_bytes"], "all_sums": told["all_sums"], "asked": first["parameters"] * k * 4,
        "peak_mb": max((rank["peak_mb"] or 0.0) for rank in runs[0]), "forms": told["forms"],
    }  # fmt: skip


# a rank that dies

VICTIM = 1


def solve(rank: int, count: int, total: int, folder: Path, victim: int | None, at: int) -> dict[str, Any]:
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
            lambda V: kernel @ V + ridge * V, b, kernel.space, tolerance=1e-4, max_iterations=3 * at,
            checkpoint=folder / "solve.safetensors", checkpoint_every=5, callback=after,
            raise_on_failure=False,
        )  # fmt: skip
    except ntkops.NtkopsError as error:
        return {"raised": type(error).__name__, "time": time.time(), "reached": reached[0]}
    return {"solution": solution, "iterations": info.iterations, "products": info.products}


def measure_kill(total: int, at: int, repetitions: int) -> list[dict[str, Any]]:
    """Kill one of three ranks in the middle of conjugate gradients, and go on."""
    with tempfile.TemporaryDirectory() as place:
        whole = launch(solve, cores(3), total, Path(place), None, at)
    entries = []
    for _ in range(repetitions):
        say("a rank is killed")
        with tempfile.TemporaryDirectory() as place:
            found = launch(solve, cores(3), total, Path(place), VICTIM, at, timeout=120)
            others = [one for rank, one in enumerate(found) if rank != VICTIM]
            killed = float((Path(place) / "killed").read_text())
            resumed = launch(solve, cores(3), total, Path(place), None, at)
        pairs = zip(whole, resumed, strict=True)
        entries.append(
            {
                "samples": total, "ranks": 3, "killed_after": at,
                "raised": sorted({one["raised"] for one in others}),
                "seconds": digits(max(one["time"] for one in others) - killed),
                "victim_died": found[VICTIM] is None,
                "iterations": [whole[0]["iterations"], resumed[0]["iterations"]],
                "same_bits": all(torch.equal(a["solution"], b["solution"]) for a, b in pairs),
            }
        )  # fmt: skip
    return entries


# the cost model: what work takes, predicted from the costs of one sample and of a machine

MONTH = 30 * 86_400.0  # what takes longer is not feasible
RANKS = (1, 8, 64)


@dataclass(frozen=True)
class Workload:
    """A kernel, and what one of its samples costs; operations of a column are those beyond a forward pass."""

    title: str
    samples: int
    outputs: int
    parameters: int
    forward: float  # operations of a forward pass of one sample
    pull: float  # of one column of Jᵀv
    push: float  # of one column of J p
    kept_bytes: float  # of one sample, by a backward pass
    weight_bytes: float  # of the whole model
    itemsize: int = 4  # of a number in vectors over states and parameters
    batch: int = 8  # samples of a pass
    chunk: int = 8  # columns of a pass: each pass makes its forward pass again
    reading: float = 0.0  # seconds in which one process reads and checks one sample

    @property
    def states(self) -> int:
        """Rows N·O of the kernel."""
        return self.samples * self.outputs

    def of_one_output(self) -> Workload:
        """Return the kernel of one of the outputs."""
        return replace(self, outputs=1)


@dataclass(frozen=True)
class Machine:
    """One device, and what lies between several: numbers a second that are reached, not peaks."""

    title: str
    rate: float  # operations
    bandwidth: float  # bytes between memory and processor
    memory: float  # bytes of a device
    wire: Callable[[int], float]  # from the number of ranks to bytes a second that leave a rank in a ring
    latency: float  # seconds of a collective of no bytes, for each step of the ring
    drawing: float  # seconds in which one random number is drawn


@dataclass
class Cost:
    """What work takes on one rank: seconds, bytes given to sums, and bytes by what holds them."""

    compute: float = 0.0
    wire: float = 0.0
    drawing: float = 0.0  # every rank draws probes for all rows
    reading: float = 0.0
    sent: float = 0.0
    memory: dict[str, float] = field(default_factory=dict)

    @property
    def seconds(self) -> float:
        """All of it, nothing overlapped."""
        return self.compute + self.wire + self.drawing + self.reading

    def repeated(self, times: float) -> Cost:
        """Return the cost of the same work several times, in the same memory."""
        kinds = ("compute", "wire", "drawing", "reading", "sent")
        return Cost(**{key: times * getattr(self, key) for key in kinds}, memory=dict(self.memory))


# building blocks


def _passes(cost: Cost, work: Workload, machine: Machine, ranks: int, operations: float) -> None:
    """Add operations on every sample, and what a pass holds."""
    cost.compute += math.ceil(work.samples / ranks) * operations / machine.rate
    cost.memory["weights"] = work.weight_bytes
    cost.memory["activations"] = work.batch * work.kept_bytes * (1 + work.chunk)


def _read(cost: Cost, work: Workload, ranks: int, times: float) -> None:
    cost.reading += times * work.reading * math.ceil(work.samples / ranks)


def _sum(cost: Cost, machine: Machine, ranks: int, size: float) -> None:
    """Add one sum over ranks by a ring: each rank sends and receives 2 (R - 1) / R of it."""
    cost.sent += size
    if ranks > 1:
        cost.wire += 2 * (ranks - 1) / ranks * size / machine.wire(ranks)
        cost.wire += 2 * (ranks - 1) * machine.latency


def _blocks(cost: Cost, work: Workload, ranks: int, columns: float, name: str = "state blocks") -> None:
    """Note blocks over the states, of which a rank holds its rows."""
    cost.memory[name] = math.ceil(work.samples / ranks) * work.outputs * columns * work.itemsize


def product(work: Workload, machine: Machine, ranks: int, columns: int) -> Cost:
    """Return the cost of K V for so many columns."""
    cost = Cost()
    chunks = math.ceil(columns / work.chunk)
    _passes(cost, work, machine, ranks, 2 * chunks * work.forward + columns * (work.pull + work.push))
    _read(cost, work, ranks, 2 * chunks)
    _sum(cost, machine, ranks, work.parameters * columns * work.itemsize)
    _blocks(cost, work, ranks, 2 * columns)
    cost.memory["parameter blocks"] = work.parameters * columns * work.itemsize
    return cost


def held_product(work: Workload, machine: Machine, ranks: int, columns: int, operations: float) -> Cost:
    """Return the cost of K V from factors that are held, with so many operations a sample and column."""
    cost = Cost(compute=math.ceil(work.samples / ranks) * columns * operations / machine.rate)
    _sum(cost, machine, ranks, work.parameters * columns * work.itemsize)
    return cost


def gradients(work: Workload, machine: Machine, ranks: int, columns: int) -> Cost:
    """Return the cost of per-sample gradients of so many output combinations, reduced as they come."""
    cost = Cost()
    _passes(cost, work, machine, ranks, work.forward + columns * work.pull)
    _read(cost, work, ranks, 1)
    cost.memory["activations"] = 2 * work.batch * work.kept_bytes
    return cost


# methods


def exact_diagonal(work: Workload, machine: Machine, ranks: int) -> Cost:
    """Trace from the exact diagonal: every output of every sample."""
    cost = gradients(work, machine, ranks, work.outputs)
    _sum(cost, machine, ranks, 8)
    return cost


def stratified_trace(work: Workload, machine: Machine, ranks: int) -> Cost:
    """Trace from one combination of outputs a sample; ranks draw for their own samples, and add up."""
    cost = gradients(work, machine, ranks, 1)
    cost.drawing += math.ceil(work.states / ranks) * machine.drawing
    # The combinations, what makes them, and what comes of them, in float64: 7.6 blocks were measured.
    cost.memory["combinations (host)"] = 8 * math.ceil(work.states / ranks) * 8
    _sum(cost, machine, ranks, 8)
    return cost


def sketch(work: Workload, machine: Machine, ranks: int, columns: int) -> Cost:
    """Trace, norm and effective rank from the (R, M) sketch."""
    cost = product(work, machine, ranks, columns)
    _blocks(cost, work, ranks, 6 * columns)  # probes, images, and two float64 copies in an inner product
    # Jᵀ Ω, its basis, and float64 copies of both while the basis is made.
    cost.memory["parameter blocks"] = work.parameters * columns * (2 * work.itemsize + 2 * 8)
    cost.drawing += work.states * columns * machine.drawing
    return cost


def tiles(work: Workload, machine: Machine, ranks: int) -> Cost:
    """Exact norm, tile by tile, each of two blocks of per-sample gradients made again."""
    cost = Cost()
    row = work.outputs * work.parameters * work.itemsize
    size = max(1, min(work.samples, int(machine.memory / 4 // row)))
    rows = math.ceil(work.samples / size)
    _passes(cost, work, machine, ranks, (rows + 1) / 2 * (work.forward + work.outputs * work.pull))
    cost.compute += work.states**2 / ranks * work.parameters / machine.rate
    cost.memory["activations"] = 2 * work.batch * work.kept_bytes
    cost.memory["gradients of two tiles"] = 2 * size * row
    cost.memory["a tile"] = (size * work.outputs) ** 2 * work.itemsize
    return cost


def lanczos(work: Workload, machine: Machine, ranks: int, pairs: int, products: int) -> Cost:
    """Leading eigenpairs: a Krylov space of 3 k + 60 columns, kept twice."""
    cost = product(work, machine, ranks, work.chunk).repeated(products / work.chunk)
    space = 3 * pairs + 60
    # Reorthogonalisation, twice, against half the space on average, in float64.
    cost.compute += products * 4 * math.ceil(work.states / ranks) * space / machine.rate
    _blocks(cost, work, ranks, 2 * space)
    return cost


def conjugate_gradients(work: Workload, machine: Machine, ranks: int, iterations: int) -> Cost:
    """Kernel ridge regression without a preconditioner."""
    cost = product(work, machine, ranks, 1).repeated(iterations)
    cost.wire += iterations * 4 * 2 * (ranks - 1) * machine.latency
    _blocks(cost, work, ranks, 6)
    return cost


def traced(work: Workload, machine: Machine, ranks: int, iterations: int) -> Cost:
    """Kernel ridge regression with the kernel summed over outputs: O pulls and pushes a column."""
    single = work.of_one_output()
    cost = product(single, machine, ranks, work.chunk).repeated(iterations * work.outputs / work.chunk)
    _blocks(cost, single, ranks, 6)
    return cost


def projected(work: Workload, machine: Machine, ranks: int, features: int) -> Cost:
    """All of it from features J Pᵀ: per-sample gradients once, then matrices of the features."""
    cost = gradients(work, machine, ranks, work.outputs)
    own = math.ceil(work.samples / ranks) * work.outputs
    cost.compute += (2 * own * features**2 + 10 * features**3) / machine.rate
    # A gradient is written, and read twice.
    cost.compute += 3 * own * work.parameters * work.itemsize / machine.bandwidth
    _sum(cost, machine, ranks, features**2 * 8)
    _blocks(cost, work, ranks, features, "features")
    cost.memory["matrices of features"] = 3 * features**2 * 8
    cost.memory["gradients"] = work.batch * work.parameters * work.itemsize
    return cost


Method = Callable[[Workload, Machine, int], Cost]
_SKETCH, _LANCZOS = partial(sketch, columns=32), partial(lanczos, pairs=100, products=600)
_STEPS, _TRACED = partial(conjugate_gradients, iterations=200), partial(traced, iterations=200)
_PROJECTED = partial(projected, features=4096)
# What is asked, the method, and whether it is for the kernel of one output.
METHODS: tuple[tuple[str, str, Method, bool], ...] = (
    ("trace", "exact", exact_diagonal, False),
    ("trace", "stratified, 1 combination", stratified_trace, False), ("norm", "exact by tiles", tiles, False),
    ("norm, effective rank", "sketch, m = 32", _SKETCH, False),
    ("norm, effective rank", "sketch, m = 32, one output", _SKETCH, True),
    ("top 100 eigenvalues", "Lanczos, 600 columns", _LANCZOS, False),
    ("top 100 eigenvalues", "Lanczos, 600 columns, one output", _LANCZOS, True),
    ("ridge regression", "conjugate gradients, 200 steps", _STEPS, False),
    ("ridge regression", "conjugate gradients, 200 steps, one output", _STEPS, True),
    ("ridge regression", "traced kernel, conjugate gradients, 200 steps", _TRACED, False),
    ("all five", "projected kernel, 4,096 features", _PROJECTED, False),
    ("all five", "projected kernel, 4,096 features, one output", _PROJECTED, True),
)  # fmt: skip


def predict(method: Method, work: Workload, machine: Machine, ranks: int) -> dict[str, Any]:
    """Return seconds, bytes and a verdict for one method."""
    cost = method(work, machine, ranks)
    on_device = {key: size for key, size in cost.memory.items() if "host" not in key}
    fits = sum(on_device.values()) <= machine.memory
    return {
        "ranks": ranks, "seconds": digits(cost.seconds, 4),
        **{f"{key}_s": digits(getattr(cost, key), 4) for key in ("compute", "wire", "drawing")},
        "sent_gb": digits(cost.sent / 1e9, 4),
        "memory_gb": {key: digits(size / 1e9, 4) for key, size in cost.memory.items()},
        "device_gb": digits(sum(on_device.values()) / 1e9, 4), "fits": fits,
        "largest": max(on_device, key=lambda key: on_device[key]), "feasible": fits and cost.seconds <= MONTH,
    }  # fmt: skip


def sheet(work: Workload, machine: Machine) -> list[dict[str, Any]]:
    """Return what every method takes on several numbers of devices."""
    rows = []
    for quantity, title, method, single in METHODS:
        if work.outputs > 1 or not (single or "traced" in title):
            wanted = work.of_one_output() if single else work
            on = [predict(method, wanted, machine, count) for count in RANKS]
            rows.append({"quantity": quantity, "method": title, "single": single, "on": on})
    return rows


# what one sample costs: operations that torch counts, and bytes that a backward pass keeps


def _memory(tensor: Tensor) -> int:
    """Return what tells memory apart, also that of tensors that have none."""
    return int(tensor.untyped_storage()._cdata)


def _flops(work: Callable[[], Any]) -> int:
    with FlopCounterMode(display=False) as counter:
        work()
    return int(counter.get_total_flops())


def counted(model: nn.Module, sample: Tensor, **known: Any) -> Workload:
    """Return a workload in float32 whose operations are counted on a batch of one, perhaps without memory."""
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    ones = {name: torch.ones_like(p) for name, p in parameters.items()}

    def call(given: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(model, given, (sample,))

    forward = _flops(lambda: model(sample))
    weights = {_memory(p) for p in model.parameters()}
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        if _memory(tensor) not in weights:
            kept[_memory(tensor)] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(sample)
    number = sum(p.numel() for p in model.parameters())
    return Workload(
        parameters=number, forward=forward,
        pull=_flops(lambda: torch.autograd.grad(model(sample).sum(), list(model.parameters()))) - forward,
        push=_flops(lambda: torch.func.jvp(call, (parameters,), (ones,))) - forward,
        kept_bytes=sum(tensor.untyped_storage().nbytes() for tensor in kept.values()),
        weight_bytes=4 * number, **known,
    )  # fmt: skip


# workloads and machines that are not here


def resnet50_on_imagenet() -> Workload:
    """Return ResNet-50 on 1.28 million images, 1000 outputs, in float32."""
    title = "ResNet-50, 1.28 M images 3 x 224 x 224, 1000 outputs, all parameters, float32"
    sample = torch.empty(1, 3, 224, 224, device="meta")
    return counted(resnet50(), sample, title=title, samples=1_280_000, outputs=1000)


def lora_1b() -> Workload:
    """Return a language model of 1.2 billion parameters with adapters, one loss a sequence; by formula.

    16 layers of width 2048, 32 heads of which keys and values share 8, gated feed-forward of 8192, a
    vocabulary of 128,256; adapters of rank 16 on all seven matrices of a layer.
    """
    layers, width, inner, shared, words, heads, rank, tokens = 16, 2048, 8192, 512, 128_256, 32, 16, 512
    shapes = [(width, width)] * 2 + [(width, shared)] * 2 + [(width, inner)] * 3
    frozen = layers * sum(a * b for a, b in shapes) + words * width
    adapters = layers * sum(rank * (a + b) for a, b in shapes)
    attention = 4.0 * layers * tokens**2 * width
    dense, own = 2.0 * tokens * frozen, 2.0 * tokens * adapters
    return Workload(
        title=f"1.2 B-parameter language model, LoRA of rank {rank}, 50,000 sequences of {tokens} tokens, "
        "one loss a sequence, bfloat16 products, float32 vectors",
        samples=50_000, outputs=1, parameters=adapters, forward=dense + own + attention,
        pull=dense + 2 * own + 2 * attention, push=dense + 2 * own + 2 * attention,
        kept_bytes=layers * (34 * tokens * width + 5 * heads * tokens**2) + 6 * tokens * words,
        weight_bytes=2.0 * (frozen + adapters), batch=2,
    )  # fmt: skip


_FRACTION = 0.4  # of the peak that is reached
_WIRES = {1: float("inf"), 8: 300e9, 64: 40e9}  # eight devices are in a node


def cost_sheets(drawing: float) -> list[Mapping[str, Any]]:
    """Return the sheets of both workloads on 80 GB devices, given the seconds of a random number here."""
    sheets = []
    for work, title, peak in ((resnet50_on_imagenet(), "float32", 67e12), (lora_1b(), "bfloat16", 989e12)):
        machine = Machine(
            f"80 GB GPU, {title}", _FRACTION * peak, 0.7 * 3.35e12, 80e9, _WIRES.__getitem__, 10e-6, drawing
        )
        wires = {str(count): speed for count, speed in _WIRES.items() if count > 1}
        taken = {**vars(machine), "fraction": _FRACTION, "wire": wires}
        sheets.append({"workload": vars(work), "machine": taken, "rows": sheet(work, machine)})
    return sheets


# this machine, and the cost model held to what was measured on it


def _rates(rank: int, count: int, seconds: float) -> dict[str, float]:
    """Return the operations a second that plain backward passes reach, all ranks at once."""
    found = {}
    for name in ("cnn", "mlp"):
        model, x = network(name), samples(name, BATCH)[0:BATCH]
        cost = _workload(name, 1)
        dist.barrier()
        began, steps = time.perf_counter(), 0
        while time.perf_counter() - began < seconds:
            torch.autograd.grad(model(x).sum(), list(model.parameters()))
            steps += 1
        spent = time.perf_counter() - began
        found[name] = steps * BATCH * (cost.forward + cost.pull) / spent
    return found


def _drawing(quick: bool) -> dict[str, float]:
    """Return the seconds of one random number of each distribution."""
    count = 2**18 if quick else 2**22
    space, generator = Space(count, torch.float32), torch.Generator().manual_seed(0)
    found: dict[str, float] = {}
    kinds: tuple[Distribution, ...] = ("rademacher", "sphere")
    for kind in kinds:
        times = []
        for _ in range(3):
            began = time.perf_counter()
            space.probes(1, generator, kind)
            times.append((time.perf_counter() - began) / count)
        found[kind] = digits(statistics.median(times))
    return found


def measure_machine(quick: bool, ranks: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return what the model needs to know of this machine; the largest sum over two ranks gives the wire."""
    one, both = [], []
    for _ in range(1 if quick else 3):
        one.append(launch(_rates, cores(1), 0.1 if quick else 2.0)[0])
        both.append(launch(_rates, cores(2), 0.1 if quick else 2.0))
    found: dict[str, Any] = {"rate": {}, "two_cores": {}, "drawing": alone(_drawing, quick)}
    for name in one[0]:
        rate = statistics.median(run[name] for run in one)
        together = statistics.median(sum(rank[name] for rank in run) for run in both)
        found["rate"][name] = digits(rate, 4)
        found["two_cores"][name] = digits(together / rate)
    largest = max((entry for entry in ranks if entry["ranks"] == 2), key=lambda entry: entry["asked"])
    found["wire"] = digits(largest["asked"] / largest["all_reduce_s"], 4)  # 2 (R - 1) / R = 1
    return found


def _workload(name: str, count: int, reading: float = 0.0) -> Workload:
    known = {"title": name, "samples": count, "outputs": CLASSES, "batch": BATCH, "reading": reading}
    return counted(network(name), samples(name, 1)[0:1], **known)


def _held(name: str) -> float:
    """Return operations of a sample and column of K V from factors, by the engine's own formulas."""
    shapes = [LayerShape(1, 64, 256), *[LayerShape(1, 256, 256)] * 2, LayerShape(1, 256, CLASSES)]
    if name == "cnn":
        shapes = [LayerShape(256, 27, 8), LayerShape(64, 72, 16), LayerShape(16, 144, 16)]
        shapes.append(LayerShape(1, 256, CLASSES))
    costs = [product_costs(shape, 1, 1, CLASSES) for shape in shapes]
    return float(sum(min(found["factors"], found["gradient"]) for found in costs))


def validate(result: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return what the model says of work that was measured here, beside it."""
    machine, entries = result["machine"], []

    def here(name: str, drawing: float) -> Machine:
        inf, wire = float("inf"), float(machine["wire"])
        return Machine("this machine", machine["rate"][name], inf, inf, lambda ranks: wire, 0.0, drawing)

    def compare(what: str, count: int, ranks: int, predicted: float, measured: float) -> None:
        seconds = {"predicted_s": digits(predicted), "measured_s": digits(measured)}
        ratio = digits(measured / predicted)
        entries.append({"what": what, "samples": count, "ranks": ranks, **seconds, "ratio": ratio})

    model = {
        "trace, exact": partial(gradients, columns=CLASSES),
        "trace, stratified": stratified_trace,
        "norm, sketch": partial(sketch, columns=SKETCH_COLUMNS),
    }
    place = here("cnn", machine["drawing"]["sphere"])
    for run in result.get("streams", []):
        if run["what"] in model:
            # Opening reads everything once, and does little else where there is much of it.
            work = _workload("cnn", run["samples"], run["opening_s"] / run["samples"])
            cost = model[run["what"]](work, place, 1)
            compare(run["what"], run["samples"], 1, cost.seconds, run["cpu_s"])
    for entry in result["ranks"]:
        if entry["ranks"] <= entry["cores"] and entry["cached"]:
            name, count, ranks, k = (entry[key] for key in ("network", "samples", "ranks", "k"))
            cost = held_product(_workload(name, count), here(name, 0.0), ranks, k, _held(name))
            compare(f"product, {name.upper()}, k = {k}", count, ranks, cost.seconds, entry["s"])
    return entries


# the whole

PARTS = ("streams", "ranks", "kill")


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Measure parts; what the ranks are held to is measured with them."""
    plan = QUICK if options.quick else PLAN
    noted = {"compared": list(plan["compared"]), "cores": len(set(cores(64))), "note": options.note}
    found: dict[str, Any] = {"options": noted}
    if "streams" in options.parts:
        found["streams"] = measure_streams(plan["streams"])
    if "ranks" in options.parts:
        found["ranks"] = measure_ranks(plan["ranks"], plan["widths"], plan["counts"], plan["repetitions"])
        found["machine"] = measure_machine(options.quick, found["ranks"])
    if "kill" in options.parts:
        found["kill"] = measure_kill(*plan["kill"])
    return found


def derive(result: Mapping[str, Any]) -> dict[str, Any]:
    """Return what follows from what was measured: the model beside it, and its sheets."""
    if "machine" not in result:
        return {}
    sheets = cost_sheets(result["machine"]["drawing"]["sphere"])
    return {"validation": validate(result), "sheets": sheets, "growth": growth(result)}


def growth(result: Mapping[str, Any]) -> dict[str, float | None]:
    """Return by how much peaks differ between the numbers of samples compared, without a sketch's blocks."""
    small, large = result["options"]["compared"]
    peaks = {(run["what"], run["samples"]): run["peak_mb"] for run in result.get("streams", [])}

    def grows(what: str, blocks: int = 0) -> float | None:
        ends = [peaks.get((what, count)) for count in (small, large)]
        if None in ends:
            return None
        one, other = (e - blocks * state_block_mb(n) for e, n in zip(ends, (small, large), strict=True))
        return digits(abs(other - one) / one)

    found = {what: grows(what) for what in ("trace, exact", "trace, stratified")}
    found["norm, sketch"] = grows("norm, sketch", SKETCH_BLOCKS)
    return {**found, "norm, sketch, live blocks": grows("norm, sketch", LIVE_BLOCKS)}


def judge(result: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Say of each claim what was found."""
    grown, ranks = growth(result), result.get("ranks", [])

    def of(entry: Mapping[str, Any]) -> str:
        return f"{entry['network']}, k = {entry['k']}, {entry['ranks']} ranks"

    claims = [
        verdict("growth of peak memory", "exact trace", grown["trace, exact"], most=MEMORY),
        verdict("growth of peak memory", "sketch, without its blocks", grown["norm, sketch"], most=MEMORY),
    ]
    for entry in ranks:
        if entry["ranks"] == 2:
            claims.append(verdict("speed-up by a second core", of(entry), entry["speedup"], least=SPEEDUP))
    for entry in ranks:
        if entry["ranks"] > 1:
            far, given = entry["difference"], entry["all_bytes"] / entry["asked"]
            claims.append(verdict("products: difference from one rank", of(entry), far, most=DIFFERENCE))
            claims.append(verdict("bytes given to sums, against P k numbers", of(entry), given, most=PAYLOAD))
    for number, killed in enumerate(result.get("kill", [])):
        seconds = killed["seconds"] if killed["raised"] == ["RankFailedError"] else float("inf")
        claims.append(
            verdict("seconds until the others raise RankFailedError", f"kill {number}", seconds, most=SECONDS)
        )
        claims.append(verdict("same bits after a kill", f"kill {number}", int(killed["same_bits"]), least=1))
    return claims


def tables(result: Mapping[str, Any]) -> list[str]:
    """Return streams, ranks, the killed rank, the model beside all that, and its predictions."""
    options = result["options"]
    place = f"{options['cores']} cores, each process on one. No GPU: not run. {options.get('note', '')}"
    parts = {"streams": _streams, "ranks": _ranks, "kill": _kill, "validation": _validation}
    parts["sheets"] = _sheets
    return [
        "",
        place.strip(),
        *(line for part, make in parts.items() if result.get(part) for line in make(result)),
    ]


def _streams(result: Mapping[str, Any]) -> list[str]:
    small, large = result["options"]["compared"]
    grown = {what: "-" if v is None else f"{100 * v:.1f} %" for what, v in growth(result).items()}
    return [
        "",
        "### Streamed images",
        "",
        "CNN with 6,282 parameters and 10 outputs on N images 3 x 32 x 32, one process on one core. Medians "
        "over fresh processes; opening is making the operator, which reads everything once and checks it. "
        "Times are process CPU time; the JSON has the clock's, too.",
        *table(
            result["streams"],
            {
                "what": "what", "N": "samples", "runs": lambda run: len(run["all_cpu_s"]),
                "opening, s": "opening_s", "CPU s": "cpu_s",
                "us a sample": lambda run: f"{1e6 * run['cpu_s'] / run['samples']:,.0f}",
                "peak, MB": "peak_mb:.0f", "of these before, MB": "start_mb:.0f",
            },
        ),
        "",
        f"Peaks at N = {large:,} differ from those at N = {small:,} by {grown['trace, exact']} (exact "
        f"trace), {grown['trace, stratified']} (stratified trace), and {grown['norm, sketch']} (sketch with "
        f"m = {SKETCH_COLUMNS}, without its {SKETCH_BLOCKS} blocks N·O x m in float32, of "
        f"{state_block_mb(large):.0f} MB each at the larger N). {LIVE_BLOCKS} of these blocks hold "
        "something: probes, images, and in an inner product two float64 copies of twice the size; two are "
        f"freed pieces that the allocator keeps. Without the {LIVE_BLOCKS} alone the difference is "
        f"{grown['norm, sketch, live blocks']}.",
    ]  # fmt: skip


def _ranks(result: Mapping[str, Any]) -> list[str]:
    def several(shown_as: Callable[[Mapping[str, Any]], str], one: str = "-") -> Callable[..., str]:
        return lambda entry: one if entry["ranks"] == 1 else shown_as(entry)

    def speedup(e: Mapping[str, Any]) -> str:
        return shown({"median": e["speedup"], "min": min(e["speedups"]), "max": max(e["speedups"])})

    return [
        "",
        "### Products over ranks",
        "",
        "K V for k columns by several ranks (gloo), each on a core of its own, or sharing one where there "
        "are more ranks than cores (marked *). Seconds are those of the slowest rank; speed-up is against 1 "
        "rank on 1 core, median and range; difference is the largest relative one of vᵀ K v; bytes are all "
        "that a rank gives to `all_reduce` in a product, flags included, against P · k · 4.",
        *table(
            result["ranks"],
            {
                "network": lambda e: e["network"].upper(), "N": "samples", "P": "parameters", "k": "k",
                "ranks": lambda e: f"{e['ranks']}{'*' if e['ranks'] > e['cores'] else ''}", "s": "s",
                "speed-up": several(speedup, "1"),
                "sum over ranks, s": several(lambda e: f"{e['all_reduce_s']:.2g}"),
                "MB given": lambda e: f"{e['all_bytes'] / 1e6:.2f}",
                "against P k": lambda e: f"{e['all_bytes'] / e['asked']:.4f}",
                "difference": several(lambda e: f"{e['difference']:.0e}"), "peak a rank, MB": "peak_mb:.0f",
            },
        ),
    ]  # fmt: skip


def _kill(result: Mapping[str, Any]) -> list[str]:
    entries = result["kill"]
    first, seconds = entries[0], ", ".join(f"{entry['seconds']:.2g}" for entry in entries)
    same = "the same bits as" if all(entry["same_bits"] for entry in entries) else "OTHER bits than"
    return [
        "",
        "### A rank that dies",
        "",
        f"One of {first['ranks']} ranks is killed (SIGKILL) after step {first['killed_after']} of conjugate "
        f"gradients on {first['samples'] * 10:,} rows, {len(entries)} times. The others raised "
        f"`{'`, `'.join(first['raised'])}` after {seconds} s. Started again, the solve went on from its file "
        f"to {same} a solve that was not interrupted.",
    ]


def _validation(result: Mapping[str, Any]) -> list[str]:
    machine = result["machine"]
    rates = ", ".join(f"{rate / 1e9:.0f} GFLOP/s ({name.upper()})" for name, rate in machine["rate"].items())
    both = ", ".join(f"{ratio:.2f} ({name.upper()})" for name, ratio in machine["two_cores"].items())
    draws = ", ".join(f"{1e9 * s:.1f} ns ({kind})" for kind, s in machine["drawing"].items())
    return [
        "",
        "### The cost model held to these numbers",
        "",
        f"Measured on one core: {rates} in plain backward passes over a batch; two "
        f"processes that do this on both cores, and exchange nothing, reach {both} times that; {draws} for a "
        f"random number, {machine['wire'] / 1e9:.2g} GB/s of a sum over 2 ranks. From these and the "
        "operations that torch counts the model predicts:",
        *table(
            result["validation"],
            {
                "what": "what", "N": "samples", "ranks": "ranks", "predicted, s": "predicted_s",
                "measured, s": "measured_s", "measured / predicted": "ratio:.2f",
            },
        ),
    ]  # fmt: skip


def _sheets(result: Mapping[str, Any]) -> list[str]:
    return [line for sheet in result["sheets"] for line in _sheet(sheet)]


def _sheet(sheet: Mapping[str, Any]) -> list[str]:
    work, machine, rows = sheet["workload"], sheet["machine"], sheet["rows"]
    best = _chosen(rows)

    def time_on(place: int) -> Callable[[Mapping[str, Any]], str]:
        def cell(row: Mapping[str, Any]) -> str:
            entry = row["on"][place]
            text = _human(entry["seconds"]) if entry["fits"] else entry["largest"]
            if not entry["feasible"]:
                return f"no: {text}"
            return f"**{text}**" if (row["quantity"], entry["ranks"], row["method"]) in best else text

        return cell

    def sent(row: Mapping[str, Any]) -> str:
        value = row["on"][-1]["sent_gb"]
        return "-" if value < 1e-3 else f"{value:,.2g} GB" if value < 100 else f"{value:,.0f} GB"

    def gigabytes(value: float) -> str:
        return f"{value:,.0f}" if value >= 10 else f"{value:.1f}"

    counts = [entry["ranks"] for entry in rows[0]["on"]]
    return [
        "",
        f"### Predicted: {work['title']}",
        "",
        f"N = {work['samples']:,}, O = {work['outputs']:,}, P = {work['parameters']:,}; a sample takes "
        f"{work['forward'] / 1e9:,.1f} GFLOP forward, {work['pull'] / 1e9:,.1f} for a column of Jᵀv and "
        f"{work['push'] / 1e9:,.1f} for one of J p beyond that, and keeps "
        f"{work['kept_bytes'] / 1e6:,.0f} MB; {work['batch']} samples and {work['chunk']} columns a pass. "
        f"{machine['title']}: {machine['rate'] / 1e12:,.0f} TFLOP/s reached "
        f"({100 * machine['fraction']:.0f} % of the peak), ring of {machine['wire']['8'] / 1e9:.0f} GB/s "
        f"among 8 and {machine['wire']['64'] / 1e9:.0f} GB/s among 64.",
        *table(
            rows,
            {
                "wanted": "quantity", "method": "method",
                **{f"{n} GPU{'s' if n > 1 else ''}": time_on(place) for place, n in enumerate(counts)},
                "GB a GPU": lambda row: " / ".join(gigabytes(entry["device_gb"]) for entry in row["on"]),
                "drawing probes": lambda row: _human(row["on"][-1]["drawing_s"]), "sent a rank": sent,
            },
            left=2,
        ),
    ]  # fmt: skip


def _chosen(rows: Sequence[Mapping[str, Any]]) -> set[tuple[str, int, str]]:
    """Return the cheapest feasible methods: those of one output only where there is no other."""
    best: dict[tuple[str, int], tuple[bool, float, str]] = {}
    for row in rows:
        for entry in row["on"]:
            key, found = (row["quantity"], entry["ranks"]), (row["single"], entry["seconds"], row["method"])
            if entry["feasible"] and (key not in best or found < best[key]):
                best[key] = found
    return {(*key, method) for key, (_, _, method) in best.items()}


def _human(seconds: float) -> str:
    if seconds < 0.5:
        return "-"
    for limit, unit, name in ((90, 1, "s"), (5400, 60, "min"), (172_800, 3600, "h"), (3.2e7, 86_400, "days")):
        if seconds < limit:
            return f"{seconds / unit:.0f} {name}"
    years = seconds / 3.156e7
    if years < 10:
        return f"{years:.1f} years"
    return f"{years:,.0f} years" if years < 1e5 else f"{years:.0e} years"


BENCHMARK = Benchmark(
    "scale", __doc__, measure, tables, judge, derive=derive, parts=PARTS,
    key=("what", "samples", "network", "k", "ranks", "killed_after"),
    extra={"--note": {"default": "", "help": "what the page is to say of the conditions"}},
)  # fmt: skip
main = BENCHMARK.main

if __name__ == "__main__":
    sys.exit(main())
