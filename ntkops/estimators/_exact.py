"""Exact work: a sum of terms, with a bar, in a file that it goes on from; and what that file has to know."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from linear_operator.operators import DenseLinearOperator, LinearOperator, RootLinearOperator
from torch import Tensor
from tqdm import tqdm

from ..checkpoint import PartFiles, fingerprint, threads
from ..distributed import ShardedKernelOperator
from ..engines import Engine, EngineChoice, LayerwiseEngine
from ..errors import CheckpointError, InputError
from ..model.context import full_precision
from ..operators.axes import ParameterAxis, StateAxis
from ..operators.capabilities import capabilities
from ..operators.kernel import NTKOperator
from ._request import Operand

__all__ = [
    "ExactWork",
    "Terms",
    "kernel_route",
    "length_of",
    "made_of",
    "network_of",
    "place_of",
]

logger = logging.getLogger(__name__)

KIND = "exact"
_FOLLOWED = ("batch_size", "chunk_size", "workspace")


@dataclass(frozen=True)
class Standing:
    """How far a sum is.

    Attributes:
        done: Units that are in it.
        sums: The sum of these, ``(*batch, q)``, float64.
    """

    done: int
    sums: Tensor


class ExactFile:
    """A file of one exact quantity.

    Attributes:
        passes: Passes made before this run.
        seconds: Time spent before this run.
        threads: Threads that the work began with.

    Raises:
        CheckpointError: If an operand could not be recognised, or the folder does not exist.
    """

    def __init__(self, path: Path, name: str, unit: str, operands: Sequence[Operand]) -> None:
        self._path, self._operands = path, list(operands)
        if not path.parent.is_dir():
            raise CheckpointError(f"there is no folder {path.parent} for {path.name}; make it first")
        parts: dict[str, Any] = {"quantity": [name, unit]}
        for number, operand in enumerate(operands):
            suffix = "" if len(operands) == 1 else str(number + 1)
            for key, part in made_of(operand.operator, name).items():
                parts[key + suffix] = part
        self._fingerprint = fingerprint(**parts)
        self._files = PartFiles(path, operands[0].rows, KIND)
        self.passes, self.seconds, self.threads = 0, 0.0, torch.get_num_threads()
        self._route: dict[str, Any] = {}

    def begin(
        self, zero: Tensor, size: Callable[[Sequence[Operand]], int]
    ) -> tuple[list[Operand], Standing, int]:
        """Return operands that take the file's route, how far the sum is, and the size of a step."""
        # The operands have engines of their own, in the first run too: what a kernel has kept from earlier
        # work would decide how it rounds.
        # The size of a step decides which numbers are added first, and so the last bits: a run that goes on
        # takes it, chunk sizes and threads from the file, however much memory is free by now.
        found = self._files.read(self._fingerprint)
        if found is None:
            operands = [_following(operand, kernel_route(operand.operator)) for operand in self._operands]
            self._route = self._route_of(operands, size(operands))
            return operands, Standing(0, zero), self._route["size"]
        record = found.metadata
        self._route = route = record["route"]
        self.threads, self.passes, self.seconds = route["threads"], record["passes"], record["seconds"]
        operands = [
            _following(operand, then) for operand, then in zip(self._operands, route["operands"], strict=True)
        ]
        self._require_same(self._route_of(operands, route["size"]))
        standing = Standing(record["done"], found.tensors["sums"].to(zero.device))
        logger.info("going on after %d steps of %s", standing.done, self._path)
        return operands, standing, route["size"]

    def write(self, standing: Standing, passes: int, seconds: float) -> None:
        """Put the sum into the file, atomically."""
        metadata = {"done": standing.done, "route": self._route, "passes": passes, "seconds": seconds}
        self._files.write(standing.done, {"sums": standing.sums}, metadata, self._fingerprint)

    def _route_of(self, operands: Sequence[Operand], size: int) -> dict[str, Any]:
        return {
            **place_of(operands[0].device),
            "threads": self.threads,
            "size": size,
            "operands": [kernel_route(operand.operator) for operand in operands],
        }

    def _require_same(self, now: dict[str, Any]) -> None:
        then = self._route
        pairs = [(then, now), *zip(then["operands"], now["operands"], strict=True)]
        different = [
            f"{name} {old.get(name)!r}, now {new[name]!r}"
            for old, new in pairs
            for name in new
            if name != "operands" and old.get(name) != new[name]
        ]
        if different:
            raise CheckpointError(
                f"{self._path} was computed by another route, and would not go on with the same bits: "
                f"{'; '.join(different)}; build the operator as it was built then, or use another path"
            )


def _following(operand: Operand, route: dict[str, Any]) -> Operand:
    """Return an operand whose sums are split as a route says, with an engine of its own."""
    operator = operand.operator
    if isinstance(operator, ShardedKernelOperator):
        same = operator.with_engine(
            batch_size=route.get("batch_size", "auto"), chunk_size=route.get("chunk_size", "auto")
        )
        _keep_workspace(same._engine.local, route)
        return Operand(same)
    if not isinstance(operator, NTKOperator) or not set(_FOLLOWED) <= set(route):
        return operand
    engine = operator._core.engine
    choice: EngineChoice = engine.options if isinstance(engine, LayerwiseEngine) else "autograd"
    same = operator.with_engine(choice, batch_size=route["batch_size"], chunk_size=route["chunk_size"])
    _keep_workspace(same._core.engine, route)
    return Operand(same)


def _keep_workspace(engine: Engine | None, route: dict[str, Any]) -> None:
    if engine is not None:
        engine.keep_workspace(route["workspace"])


# -- exact work as a sum of terms, one after the other: a bar with the time left, and a file to go on from


Item = TypeVar("Item")
DEFAULT_EVERY = 60.0


@dataclass(frozen=True)
class Terms:
    """A sum that is made term by term.

    Attributes:
        unit: What is counted: "tile", "row".
        size: Given operands, returns how large a step is.
        count: Given operands and size, returns the number of units of all steps; None where it is not known.
        after: Given operands, size and the units that are done, yields each further term ``(*batch, q)``
            with the number of units that are done after it.
    """

    unit: str
    size: Callable[[Sequence[Operand]], int]
    count: Callable[[Sequence[Operand], int], int | None]
    after: Callable[[Sequence[Operand], int, int], Generator[tuple[int, Tensor]]]


class ExactWork:
    """How exact work is shown and kept.

    Attributes:
        passes: Returns the passes that this run has made of it.
        passes_before: Passes that runs before it have made.
        seconds_before: Time that they took.

    Raises:
        InputError: If the file or the seconds are not understood.
    """

    def __init__(
        self,
        name: str,
        progress: bool = False,
        checkpoint: str | os.PathLike[str] | None = None,
        every: float = DEFAULT_EVERY,
    ) -> None:
        if checkpoint is not None and not isinstance(checkpoint, str | os.PathLike):
            raise InputError(f"checkpoint={checkpoint!r}: pass a path")
        if isinstance(every, bool) or not isinstance(every, int | float) or not every >= 0:
            raise InputError(f"checkpoint_every={every!r}: pass a number of seconds")
        self.name, self.progress, self._every = name, progress, float(every)
        self.passes: Callable[[], int] = lambda: 0
        self._path = None if checkpoint is None else Path(checkpoint)
        self.passes_before = 0
        self.seconds_before = 0.0

    def shown(
        self, items: Iterable[Item], total: int | None, unit: str, amount: Callable[[Item], int]
    ) -> Iterator[Item]:
        """Yield items, and move a bar after the work on each."""
        with tqdm(total=total, unit=unit, desc=self.name, disable=not self.progress) as bar:
            for item in items:
                yield item
                bar.update(amount(item))

    def add_up(self, operands: Sequence[Operand], zero: Tensor, terms: Terms) -> Tensor:
        """Return the sum of all terms, ``(*batch, q)``; what a file holds is not made again."""
        # Without a file nothing has to be repeatable: the operand is used as it is, with all that it has
        # kept.
        if self._path is None:
            size = terms.size(operands)
            return self._run(operands, Standing(0, zero), terms, size, None)
        file = ExactFile(self._path, self.name, terms.unit, operands)
        operands, standing, size = file.begin(zero, terms.size)
        self.passes_before, self.seconds_before = file.passes, file.seconds
        with threads(file.threads):
            return self._run(operands, standing, terms, size, file)

    def _run(
        self, operands: Sequence[Operand], standing: Standing, terms: Terms, size: int, file: ExactFile | None
    ) -> Tensor:
        started = written = time.perf_counter()
        space = operands[0].rows

        def write() -> None:
            assert file is not None
            spent = time.perf_counter() - started
            # counted from the first run on, whoever made them
            file.write(standing, self.passes_before + self.passes(), self.seconds_before + spent)

        count = terms.count(operands, size)
        bar = tqdm(
            total=count, initial=standing.done, unit=terms.unit, desc=self.name, disable=not self.progress
        )
        before = standing.done
        try:
            device = standing.sums.device
            cast = torch.is_autocast_enabled(device.type)  # which takes no digits from products of tiles
            exact = full_precision(device) if cast else contextlib.nullcontext()
            with exact, bar, contextlib.closing(terms.after(operands, size, standing.done)) as coming:
                for done, term in coming:
                    # One assignment: an interrupt finds both or neither.
                    standing = Standing(done, standing.sums + term)
                    bar.update(done - bar.n)
                    due = file is not None and time.perf_counter() - written >= self._every
                    if file is not None and space.any(due):
                        write()
                        written = time.perf_counter()
        except BaseException:
            if file is not None and standing.done > before and not space.is_spread:
                _in_passing(write)  # of several processes, the others are not there to agree
            raise
        if file is not None and standing.done > before:
            write()
        return standing.sums


def length_of(item: tuple[slice, Any]) -> int:
    """Return the length of the slice that an item belongs to."""
    return item[0].stop - item[0].start


def _in_passing(write: Callable[[], Any]) -> None:
    """Write a file while another exception is on its way, which must not be lost."""
    try:
        write()
    except CheckpointError as error:
        logger.warning("what was done could not be written: %s", error)


# -- what a kernel was made of, and how it is computed, as far as a file must know to go on bit for bit


_ADDRESS = re.compile(r" at 0x[0-9a-f]+")


def made_of(operator: LinearOperator | Tensor, what: str) -> dict[str, Any]:
    """Return model, parameters and data of an operator, for a fingerprint."""
    if isinstance(operator, Tensor):
        return {"operator": operator}
    if isinstance(operator, DenseLinearOperator):
        return {"operator": operator.tensor}
    if type(operator) is RootLinearOperator and isinstance(operator.root, DenseLinearOperator):
        return {"operator": ["root", operator.root.tensor]}
    if type(operator) not in (NTKOperator, ShardedKernelOperator):
        raise CheckpointError(
            f"{what} of a {type(operator).__name__} cannot be recognised in a file: those of kernels "
            "of ntkops.ntk and of dense tensors can"
        )
    assert isinstance(operator, NTKOperator | ShardedKernelOperator)
    core = operator._core
    axes = [_axis(core.rows)] if core.symmetric else [_axis(core.rows), _axis(core.columns)]
    return {**network_of(operator), "data": [capabilities(operator).space.part, axes]}


def network_of(operator: NTKOperator | ShardedKernelOperator) -> dict[str, Any]:
    """Return what the model and its parameters are, for a fingerprint; what its code does is not seen."""
    lin = operator._core.engine.linearization
    root = getattr(lin.call, "root", None)
    model = [lin.names, lin.batch_dim, _ADDRESS.sub("", repr(root)), _name_of(lin.selector.output)]
    return {"model": model, "parameters": [list(operator._args), list(lin.constants)]}


def _name_of(output: Any) -> Any:
    return getattr(output, "__qualname__", type(output).__name__) if callable(output) else output


def _axis(axis: StateAxis | ParameterAxis) -> list[Any]:
    assert isinstance(axis, StateAxis)
    data = []
    if axis.inputs.num_samples:
        data = [fingerprint(x=batch.inputs)["x"] for _, _, batch in axis.inputs.batches(None)]
    lengths = [] if axis.inputs.lengths is None else [axis.inputs.lengths]
    return [data, axis.outputs, axis.pick, *lengths]


def place_of(device: torch.device) -> dict[str, Any]:
    """Return what last bits hang on and no file can change: the version of torch, and the kind of device."""
    return {"torch": str(torch.__version__), "device": device.type}


def kernel_route(operator: LinearOperator | Tensor) -> dict[str, Any]:
    """Return what the sums of a kernel of ours are split by; nothing for other operators."""
    if not isinstance(operator, NTKOperator | ShardedKernelOperator):
        return {}
    axis = operator._core.rows
    assert isinstance(axis, StateAxis)
    sharded = isinstance(operator, ShardedKernelOperator)
    engine: Engine | None = operator._engine.local if sharded else operator._core.engine
    if engine is None or not axis.inputs.num_samples:
        return {}
    options = repr(engine.options) if isinstance(engine, LayerwiseEngine) else None
    return {
        "engine": engine.name,
        "options": options,
        "batch_size": min(engine.batch_size(axis.inputs), axis.inputs.num_samples),
        "chunk_size": engine.chunk_size(),
        "workspace": engine.workspace_bytes(),
    }
