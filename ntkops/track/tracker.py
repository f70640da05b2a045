"""A tracker, and its table in a file."""

from __future__ import annotations

import dataclasses
import logging
import os
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .. import checkpoint
from ..errors import CheckpointError, InputError, UnsupportedOperationError
from ..model import BatchDim, Inputs, Linearization, linearize
from ..model.call import ModuleCall, uncompiled
from ..results import Estimate, History
from .quantities import KernelOptions, Options, Point, Quantity, needs_first, needs_previous, target_columns
from .weights import Places, Weights, live_values, read_weights, stored_values

if TYPE_CHECKING:
    from ..model.accepted import InputsLike, ModelLike, OutputLike, ParamsLike

__all__ = ["Tracker"]


KIND = "track"
_COLUMNS = ("values", "stderrs", "intervals", "exact", "converged", "passes")
_ADDRESS = re.compile(r" at 0x[0-9a-fA-F]+")


@dataclass
class Ledger:
    """A table with what is needed to go on with it.

    Attributes:
        history: The finished rows.
        digests: A digest of the values of each row's checkpoint.
        route: Chunk sizes, threads and the like, as the first row had them.
        first: Values of the first checkpoint, where quantities compare with it.
        last: Values of the last checkpoint, likewise.
        fingerprint: Digests of model, data and options.
    """

    history: History
    digests: list[str] = field(default_factory=list)
    route: dict[str, Any] = field(default_factory=dict)
    first: dict[str, Tensor] = field(default_factory=dict)
    last: dict[str, Tensor] = field(default_factory=dict)
    fingerprint: dict[str, str] = field(default_factory=dict)

    def write(self, path: str | os.PathLike[str]) -> None:
        """Put the table into a file, atomically."""
        tensors = {f"first/{name}": value for name, value in self.first.items()}
        tensors |= {f"last/{name}": value for name, value in self.last.items()}
        for column in _COLUMNS:
            for name, value in getattr(self.history, column).items():
                tensors[f"{column}/{name}"] = value
        metadata = {
            "quantities": list(self.history.quantities),
            "steps": list(self.history.steps),
            "seed": self.history.seed,
            "digests": self.digests,
            "route": self.route,
        }
        checkpoint.save(path, tensors, metadata, self.fingerprint, kind=KIND)

    @classmethod
    def read(cls, path: str | os.PathLike[str], fingerprint: Mapping[str, str]) -> Ledger:
        """Read a table that was computed from the same model, data and options."""
        found = checkpoint.load(path, fingerprint, kind=KIND)
        metadata = found.metadata
        columns: dict[str, dict[str, Tensor]] = {column: {} for column in (*_COLUMNS, "first", "last")}
        for key, value in found.tensors.items():
            column, _, name = key.partition("/")
            columns[column][name] = value
        first, last = columns.pop("first"), columns.pop("last")
        history = History(
            quantities=tuple(metadata["quantities"]),
            steps=tuple(metadata["steps"]),
            seed=metadata["seed"],
            **columns,
        )
        return cls(history, metadata["digests"], metadata["route"], first, last, dict(fingerprint))


def structure_of(linearization: Linearization) -> tuple[Any, ...]:
    """Return what tells one model from another, whatever its values are."""
    tensors = {
        **dict(zip(linearization.names, linearization.parameters, strict=True)),
        **linearization.frozen,
        **linearization.buffers,
    }
    shapes = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}
    call = linearization.call
    kind = _ADDRESS.sub("", repr(call.root)) if isinstance(call, ModuleCall) else "function"
    selector = linearization.selector.output
    output = name_of(selector) if callable(selector) else selector
    return kind, linearization.names, shapes, linearization.batch_dim, output


def name_of(function: Any) -> str:
    """Return the name by which a function is known in a later run."""
    module, name = getattr(function, "__module__", ""), getattr(function, "__qualname__", None)
    return f"{module}.{name}" if name else type(function).__name__


def data_digest(inputs: Inputs) -> list[Any]:
    """Return what tells samples from others, batch by batch as they come."""
    digests = []
    for _, _, batch in inputs.batches(None):
        digests.append(checkpoint.fingerprint(x=batch.inputs)["x"])
    return digests


def parameter_digest(linearization: Linearization) -> str:
    """Return a digest of all values that the output depends on."""
    values = (linearization.parameters, linearization.constants)
    return checkpoint.fingerprint(values=values)["values"]


# -- a table of quantities that grows by a row whenever a checkpoint is recorded


logger = logging.getLogger(__name__)

Step = int | float
_PINNED = ("batch_size", "chunk_size", "max_dense_bytes")


class Tracker:
    """Records quantities inside a training loop; made by `ntkops.track` without checkpoints.

    ``tracker.record(step)`` reads the values that the model has now, computes a row, and leaves the model as
    it is. The mode is the one that the model had when the tracker was made: make it in evaluation mode, and
    train as you like.

    Attributes:
        history: The table so far.
    """

    def __init__(
        self,
        model: ModelLike,
        x: InputsLike,
        quantities: Mapping[str, Quantity],
        *,
        options: Options,
        kernel: KernelOptions,
        params: ParamsLike,
        output: OutputLike,
        batch_dim: BatchDim,
        path: str | os.PathLike[str] | None,
        seeded: bool,
    ) -> None:
        self._source = _source_of(model, params)
        base = linearize(model, params, output, batch_dim=batch_dim)
        self._places = Places(base)
        self._inputs = base.inputs(x)
        self._quantities, self._options, self._kernel = dict(quantities), options, kernel
        self._path = None if path is None else Path(path)
        self._first: Linearization | None = None
        self._previous: Linearization | None = None
        self._calls = 0
        names = tuple(quantities)
        self._keeps_first, self._keeps_last = needs_first(names), needs_previous(names)
        self._ledger = Ledger(History.empty(names, options.seed))
        if self._path is not None:
            self._ledger.fingerprint = self._fingerprint(base)
            if self._path.exists():
                self._resume(self._path, seeded)

    @property
    def history(self) -> History:
        """The table so far."""
        return self._ledger.history

    def record(self, step: Step | None = None, weights: Weights | None = None) -> dict[str, Estimate] | None:
        """Compute a row and, where there is a file, write it before returning.

        Args:
            step: Number of the row, as in plots; None counts the calls from 0.
            weights: A checkpoint to record instead of the model's values of now: a state dict, a module, or
                a path.

        Returns:
            The estimates by name; None if the row was there already, from the run that is resumed.

        Raises:
            InputError: If the step is no finite number, was recorded already with this tracker, or the
                checkpoint does not fit the model.
            CheckpointError: If a file cannot be read or written, or the step was recorded with other values
                in the run that is resumed.
            NtkopsError: What estimators and kernels raise; the rows before are kept.
        """
        number = self._calls if step is None else step
        # x - x is 0 for finite numbers alone
        if not isinstance(number, int | float) or isinstance(number, bool) or number - number != 0:
            raise InputError(f"step={step!r}: pass a finite number, or None to count")
        values = self._values_now() if weights is None else read_weights(weights)
        linearization = self._places.at(values, f"the checkpoint of step {number:g}")
        if number in self.history.steps:
            self._require_same(number, linearization)
            self._calls += 1
            return None
        start = time.perf_counter()
        point, first = self._points(linearization)
        try:
            # sums are split over threads: a table has rows of one split
            with checkpoint.threads(self._ledger.route["threads"]):
                row = {
                    name: quantity(point, first, self._options) for name, quantity in self._quantities.items()
                }
        finally:
            for used in (point, first, point.previous):
                if used is not None:
                    used.free()
        self._append(number, row, linearization)
        self._first = first.linearization
        self._previous = linearization if self._keeps_last else None
        self._calls += 1
        logger.info("step %g recorded in %.1f s", number, time.perf_counter() - start)
        return row

    def rewind(self, step: Step) -> None:
        """Drop the rows after a step, for training that is taken up again at an older state.

        Args:
            step: The last step to keep; rows follow the order in which they were recorded. Its values are not
                kept, so that the next row has no "kernel_velocity".

        Raises:
            InputError: If there is no row of that step.
        """
        if step not in self.history.steps:
            raise InputError(f"no row has step {step!r}; there are {list(self.history.steps)}")
        count = self.history.steps.index(step) + 1
        kept = self.history.head(count), self._ledger.digests[:count]
        if count < len(self.history):
            self._previous, self._ledger.last = None, {}
        self._ledger = dataclasses.replace(self._ledger, history=kept[0], digests=kept[1])
        self._calls = min(self._calls, count)
        self._write()

    # -- a row

    def _values_now(self) -> Mapping[str, Tensor]:
        if self._source is None:
            raise UnsupportedOperationError(
                "the model was linearised before it was given to track, which keeps the values of that time; "
                "pass the model itself, or record(step, weights=state_dict)"
            )
        return self._source()

    def _points(self, linearization: Linearization) -> tuple[Point, Point]:
        """Return the point of a checkpoint, and that of the first one.

        Both are new for every row. A kernel that has served several rows may have turned to a dense block or
        to cached factors, and a resumed run, whose kernel is new, would round otherwise.
        """
        if not self._ledger.route:
            self._ledger.route = _route_of(Point(linearization, self._inputs, self._kernel))
        point = Point(linearization, self._inputs, self._pinned())
        if self._options.targets is not None:
            target_columns(self._options.targets, point.kernel)  # before any work
        if self._first is None and self._ledger.first:
            self._first = self._places.at(self._ledger.first, "the first checkpoint")
        if self._previous is None and self._ledger.last:
            self._previous = self._places.at(self._ledger.last, "the last checkpoint")
        if self._previous is not None:
            point.previous = Point(self._previous, self._inputs, self._pinned())
        if self._first is None:
            return point, point
        return point, Point(self._first, self._inputs, self._pinned())

    def _pinned(self) -> KernelOptions:
        """Return the kernel's options with the chunk sizes of the first row."""
        route = self._ledger.route
        return dataclasses.replace(self._kernel, **{name: route[name] for name in _PINNED})

    def _append(self, step: Step, row: Mapping[str, Estimate], linearization: Linearization) -> None:
        ledger = self._ledger
        history = ledger.history.appended(step, row)
        digests = ledger.digests
        if self._path is not None:
            digests = [*digests, parameter_digest(linearization)]
            if self._keeps_first and not ledger.first:
                ledger.first = stored_values(self._places, linearization)
            if self._keeps_last:
                ledger.last = stored_values(self._places, linearization)
        self._ledger = dataclasses.replace(ledger, history=history, digests=digests)
        self._write()

    def _write(self) -> None:
        if self._path is not None:
            self._ledger.write(self._path)

    # -- going on

    def _fingerprint(self, base: Linearization) -> dict[str, str]:
        o, k = self._options, self._kernel
        engine = k.engine if isinstance(k.engine, str) else repr(k.engine)
        outputs = k.outputs if isinstance(k.outputs, str | int) else list(k.outputs)
        return checkpoint.fingerprint(
            model=structure_of(base),
            data=(data_digest(self._inputs), o.targets),
            options=(
                list(self._quantities),
                [o.rtol, o.num_passes, o.method, o.num_eigenvalues],
                [outputs, engine, k.batch_size, k.chunk_size, k.max_dense_bytes],
            ),
        )

    def _resume(self, path: Path, seeded: bool) -> None:
        found = Ledger.read(path, self._ledger.fingerprint)
        if seeded and found.history.seed != self._options.seed:
            raise CheckpointError(
                f"{path} was computed with probes of seed {found.history.seed}, and this generator draws "
                f"{self._options.seed}; pass the generator that it was started with, or none"
            )
        assert found.history.seed is not None
        self._options = dataclasses.replace(self._options, seed=found.history.seed)
        self._ledger = found
        now, then = _platform(), {key: found.route.get(key) for key in _platform()}
        if now != then:
            logger.warning("rows may differ in rounding: %s was computed with %s, now %s", path, then, now)
        logger.info("going on after %d rows of %s", len(found.history), path)

    def _require_same(self, step: Step, linearization: Linearization) -> None:
        """Raise unless a step that is there already was computed from these values."""
        position = self.history.steps.index(step)
        if self._path is None:
            raise InputError(f"step {step:g} was recorded already; give every row another step")
        if self._ledger.digests[position] != parameter_digest(linearization):
            raise CheckpointError(
                f"{self._path}: step {step:g} was recorded with other parameters: fingerprint differs: "
                "parameters; rewind the tracker to the step at which training went on, or use another path"
            )


def _source_of(model: Any, params: Any) -> Callable[[], Mapping[str, Tensor]] | None:
    """Return what reads the present values of a model; None where it has none."""
    if isinstance(model, Linearization):
        return None
    if isinstance(model, nn.Module):
        plain = uncompiled(model)
        return lambda: live_values(plain)
    return lambda: dict(params)


def _platform() -> dict[str, str]:
    return {"torch": str(torch.__version__)}


def _route_of(point: Point) -> dict[str, Any]:
    """Return how a kernel is computed: what results depend on up to rounding."""
    info = point.kernel.engine_info
    return {
        **{name: getattr(info, name) for name in _PINNED},
        "engine": info.engine,
        "rung": info.mode,  # as files of earlier releases have it
        "tile": point.kernel.tile_size(),
        "threads": torch.get_num_threads(),
        "device": str(point.linearization.device),
        **_platform(),
    }


def known_name(quantity: str | Callable[..., Any]) -> str:
    """Return the name of the column of a quantity."""
    return quantity if isinstance(quantity, str) else name_of(quantity).rpartition(".")[2]
