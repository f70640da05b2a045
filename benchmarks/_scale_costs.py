"""Time and memory that work on a kernel takes, predicted from the costs of one sample and of a machine."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

__all__ = [
    "METHODS",
    "Cost",
    "Machine",
    "Workload",
    "assumptions",
    "held_product",
    "gradients",
    "predict",
    "product",
    "sheet",
]

DAY = 86_400.0


@dataclass(frozen=True)
class Workload:
    """A kernel, and what one of its samples costs.

    Attributes:
        title: What it is.
        samples: Number N.
        outputs: Number O of outputs of a sample.
        parameters: Number P of selected parameters.
        forward: Operations of a forward pass of one sample.
        pull: Operations of one column of Jᵀv, beyond the forward pass.
        push: Operations of one column of J p, beyond the forward pass.
        kept_bytes: Bytes of one sample that a backward pass keeps.
        weight_bytes: Bytes of the whole model.
        itemsize: Bytes of a number in vectors over states and parameters.
        batch: Samples of a pass.
        chunk: Columns of a pass: each pass makes its forward pass again.
        reading: Seconds in which one process reads and checks one sample.
    """

    title: str
    samples: int
    outputs: int
    parameters: int
    forward: float
    pull: float
    push: float
    kept_bytes: float
    weight_bytes: float
    itemsize: int = 4
    batch: int = 8
    chunk: int = 8
    reading: float = 0.0

    @property
    def states(self) -> int:
        """Rows N·O of the kernel."""
        return self.samples * self.outputs

    def of_one_output(self) -> Workload:
        """Return the kernel of one of the outputs."""
        return Workload(**{**vars(self), "outputs": 1})


@dataclass(frozen=True)
class Machine:
    """One device, and what lies between several.

    Attributes:
        title: What it is.
        rate: Operations a second that are reached: the peak times the fraction assumed.
        bandwidth: Bytes a second between memory and processor that are reached.
        memory: Bytes of a device.
        wire: From the number of ranks to the bytes a second that leave a rank in a ring.
        latency: Seconds of a collective of no bytes, for each step of the ring.
        drawing: Seconds in which one random number is drawn.
    """

    title: str
    rate: float
    bandwidth: float
    memory: float
    wire: Callable[[int], float]
    latency: float
    drawing: float


@dataclass
class Cost:
    """What work takes on one rank.

    Attributes:
        compute: Seconds of arithmetic.
        wire: Seconds of collectives.
        drawing: Seconds of drawing probes, which every rank draws for all rows.
        reading: Seconds of reading the data.
        sent: Bytes that a rank gives to sums.
        memory: Bytes by what holds them.
    """

    compute: float = 0.0
    wire: float = 0.0
    drawing: float = 0.0
    reading: float = 0.0
    sent: float = 0.0
    memory: dict[str, float] = field(default_factory=dict)

    @property
    def seconds(self) -> float:
        """All of it, nothing overlapped."""
        return self.compute + self.wire + self.drawing + self.reading

    @property
    def bytes(self) -> float:
        """Memory of a rank."""
        return sum(self.memory.values())


# building blocks


def _passes(cost: Cost, work: Workload, machine: Machine, ranks: int, operations: float) -> None:
    """Add operations on every sample, and what a pass holds."""
    own = math.ceil(work.samples / ranks)
    cost.compute += own * operations / machine.rate
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


def _blocks(cost: Cost, name: str, work: Workload, ranks: int, columns: float) -> None:
    """Add blocks over the states, of which a rank holds its rows."""
    rows = math.ceil(work.samples / ranks) * work.outputs
    cost.memory[name] = cost.memory.get(name, 0.0) + rows * columns * work.itemsize


def product(work: Workload, machine: Machine, ranks: int, columns: int) -> Cost:
    """Return the cost of K V for so many columns."""
    cost = Cost()
    chunks = math.ceil(columns / work.chunk)
    _passes(cost, work, machine, ranks, 2 * chunks * work.forward + columns * (work.pull + work.push))
    _read(cost, work, ranks, 2 * chunks)
    _sum(cost, machine, ranks, work.parameters * columns * work.itemsize)
    _blocks(cost, "state blocks", work, ranks, 2 * columns)
    cost.memory["parameter blocks"] = work.parameters * columns * work.itemsize
    return cost


def held_product(work: Workload, machine: Machine, ranks: int, columns: int, operations: float) -> Cost:
    """Return the cost of K V from factors that are held, with so many operations a sample and column."""
    cost = Cost(compute=math.ceil(work.samples / ranks) * columns * operations / machine.rate)
    _sum(cost, machine, ranks, work.parameters * columns * work.itemsize)
    return cost


def _repeated(cost: Cost, times: float) -> Cost:
    """Return the cost of the same work several times, in the same memory."""
    spent = {key: times * getattr(cost, key) for key in ("compute", "wire", "drawing", "reading", "sent")}
    return Cost(**spent, memory=dict(cost.memory))


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


def sketch(columns: int) -> Callable[[Workload, Machine, int], Cost]:
    """Trace, norm and effective rank from the (R, M) sketch."""

    def of(work: Workload, machine: Machine, ranks: int) -> Cost:
        cost = product(work, machine, ranks, columns)
        # Probes, images, and two float64 copies in an inner product.
        cost.memory["state blocks"] = 0.0
        _blocks(cost, "state blocks", work, ranks, 6 * columns)
        # Jᵀ Ω, its basis, and float64 copies of both while the basis is made.
        cost.memory["parameter blocks"] = work.parameters * columns * (2 * work.itemsize + 2 * 8)
        cost.drawing += work.states * columns * machine.drawing
        return cost

    return of


def tiles(work: Workload, machine: Machine, ranks: int) -> Cost:
    """Exact norm, tile by tile, each of two blocks of per-sample gradients made again."""
    cost = Cost()
    row = work.outputs * work.parameters * work.itemsize
    room = machine.memory / 4
    size = max(1, min(work.samples, int(room // row)))
    rows = math.ceil(work.samples / size)
    _passes(cost, work, machine, ranks, (rows + 1) / 2 * (work.forward + work.outputs * work.pull))
    pairs = work.states**2 / 2 / ranks
    cost.compute += 2 * pairs * work.parameters / machine.rate
    cost.memory["activations"] = 2 * work.batch * work.kept_bytes
    cost.memory["gradients of two tiles"] = 2 * size * row
    cost.memory["a tile"] = (size * work.outputs) ** 2 * work.itemsize
    return cost


def lanczos(pairs: int, products: int) -> Callable[[Workload, Machine, int], Cost]:
    """Leading eigenpairs: a Krylov space of 3 k + 60 columns, kept twice."""

    def of(work: Workload, machine: Machine, ranks: int) -> Cost:
        chunk = work.chunk
        cost = _repeated(product(work, machine, ranks, chunk), products / chunk)
        space = 3 * pairs + 60
        # Reorthogonalisation, twice, against half the space on average, in float64.
        own = math.ceil(work.states / ranks)
        cost.compute += products * 4 * own * space / machine.rate
        cost.memory["state blocks"] = 0.0
        _blocks(cost, "state blocks", work, ranks, 2 * space)
        return cost

    return of


def gradient_descent(iterations: int, columns: int) -> Callable[[Workload, Machine, int], Cost]:
    """Kernel ridge regression by conjugate gradients without a preconditioner."""

    def of(work: Workload, machine: Machine, ranks: int) -> Cost:
        cost = _repeated(product(work, machine, ranks, columns), iterations)
        cost.wire += iterations * 4 * 2 * (ranks - 1) * machine.latency
        cost.memory["state blocks"] = 0.0
        _blocks(cost, "state blocks", work, ranks, 6 * columns)
        return cost

    return of


def traced_descent(iterations: int) -> Callable[[Workload, Machine, int], Cost]:
    """Kernel ridge regression with the kernel summed over outputs: O pulls and pushes a column."""

    def of(work: Workload, machine: Machine, ranks: int) -> Cost:
        single = work.of_one_output()
        cost = _repeated(product(single, machine, ranks, work.chunk), iterations * work.outputs / work.chunk)
        cost.memory["state blocks"] = 0.0
        _blocks(cost, "state blocks", single, ranks, 6)
        return cost

    return of


def projected(features: int) -> Callable[[Workload, Machine, int], Cost]:
    """All of it from features J Pᵀ: per-sample gradients once, then matrices of the features."""

    def of(work: Workload, machine: Machine, ranks: int) -> Cost:
        cost = gradients(work, machine, ranks, work.outputs)
        own = math.ceil(work.samples / ranks) * work.outputs
        cost.compute += (2 * own * features**2 + 10 * features**3) / machine.rate
        # A gradient is written, and read twice.
        cost.compute += 3 * own * work.parameters * work.itemsize / machine.bandwidth
        _sum(cost, machine, ranks, features**2 * 8)
        _blocks(cost, "features", work, ranks, features)
        cost.memory["matrices of features"] = 3 * features**2 * 8
        cost.memory["gradients"] = work.batch * work.parameters * work.itemsize
        return cost

    return of


Method = Callable[[Workload, Machine, int], Cost]
# What is asked, the method, and whether it is for the kernel of one output.
METHODS: tuple[tuple[str, str, Method, bool], ...] = (
    ("trace", "exact", exact_diagonal, False),
    ("trace", "stratified, 1 combination", stratified_trace, False),
    ("norm", "exact by tiles", tiles, False),
    ("norm, effective rank", "sketch, m = 32", sketch(32), False),
    ("norm, effective rank", "sketch, m = 32, one output", sketch(32), True),
    ("top 100 eigenvalues", "Lanczos, 600 columns", lanczos(100, 600), False),
    ("top 100 eigenvalues", "Lanczos, 600 columns, one output", lanczos(100, 600), True),
    ("ridge regression", "conjugate gradients, 200 steps", gradient_descent(200, 1), False),
    ("ridge regression", "conjugate gradients, 200 steps, one output", gradient_descent(200, 1), True),
    ("ridge regression", "traced kernel, conjugate gradients, 200 steps", traced_descent(200), False),
    ("all five", "projected kernel, 4,096 features", projected(4096), False),
    ("all five", "projected kernel, 4,096 features, one output", projected(4096), True),
)


def predict(method: Method, work: Workload, machine: Machine, ranks: int) -> dict[str, Any]:
    """Return seconds, bytes and a verdict for one method."""
    cost = method(work, machine, ranks)
    on_device = {key: size for key, size in cost.memory.items() if "host" not in key}
    largest = max(on_device, key=lambda key: on_device[key])
    fits = sum(on_device.values()) <= machine.memory
    return {
        "ranks": ranks,
        "seconds": _digits(cost.seconds),
        "compute_s": _digits(cost.compute),
        "wire_s": _digits(cost.wire),
        "drawing_s": _digits(cost.drawing),
        "sent_gb": _digits(cost.sent / 1e9),
        "memory_gb": {key: _digits(size / 1e9) for key, size in cost.memory.items()},
        "device_gb": _digits(sum(on_device.values()) / 1e9),
        "fits": fits,
        "largest": largest,
        "feasible": fits and cost.seconds <= 30 * DAY,
    }


def sheet(work: Workload, machine: Machine, counts: tuple[int, ...] = (1, 8, 64)) -> list[dict[str, Any]]:
    """Return what every method takes on several numbers of devices."""
    rows = []
    for quantity, title, method, single in METHODS:
        if work.outputs == 1 and (single or "traced" in title):
            continue
        wanted = work.of_one_output() if single else work
        predictions = [predict(method, wanted, machine, count) for count in counts]
        rows.append({"quantity": quantity, "method": title, "single": single, "on": predictions})
    return rows


def _digits(value: float) -> float:
    return float(f"{value:.4g}")


def assumptions(machine: Machine, counts: tuple[int, ...] = (1, 8, 64)) -> Mapping[str, Any]:
    """Return what a sheet takes for granted of a machine."""
    return {
        "title": machine.title,
        "rate": machine.rate,
        "bandwidth": machine.bandwidth,
        "memory": machine.memory,
        "wire": {str(count): machine.wire(count) for count in counts},
        "latency": machine.latency,
        "drawing": machine.drawing,
    }
