"""The table in a file: what an interrupted run goes on from, and what it must agree with."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from .. import checkpoint
from ..model import Inputs, Linearization
from ..model.call import ModuleCall
from ..results import History

__all__ = ["Ledger", "data_digest", "parameter_digest", "structure_of"]

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
