"""A sketch in a file: what it holds, what it was made of, and the route by which it goes on bit for bit."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from linear_operator.operators import LinearOperator
from torch import Tensor

from ..checkpoint import Checkpoint, fingerprint
from ..engines import LayerwiseEngine
from ..errors import CheckpointError
from ..operators.axes import StateAxis
from ..operators.kernel import NTKOperator
from ..operators.provenance import kernel_route, made_of
from ..operators.sharded import ShardedKernelOperator
from ..part_files import PartFiles
from ._request import Operand, operands
from ._sketch import SketchCore, _Factored, _Multiplied

if TYPE_CHECKING:
    from .sketch import Sketch

__all__ = ["load_sketch", "save_sketch"]

KIND = "sketch"
_PARTS = {_Factored: ("images", "_basis", "_pulled"), _Multiplied: ("images",)}


def save_sketch(sketch: Sketch, path: str | os.PathLike[str]) -> None:
    """Write a sketch atomically; see `Sketch.save`."""
    core = sketch._core
    (operand,), (side,) = core._operands, core._sides
    tensors = {"probes": core._probes, "generator": core._generator.get_state()}
    tensors |= {name: getattr(side, name) for name in _PARTS[type(side)]}
    metadata = {
        "seed": sketch._seed,
        "passes": sketch._passes,
        "seconds": sketch._seconds,
        "distribution": core._distribution,
        "route": _route(operand, side),
        "spent": _spent(operand.operator),
    }
    files = PartFiles(path, operand.rows, KIND)
    files.write(core.columns, tensors, metadata, _fingerprint(operand))


def load_sketch(empty: Sketch, path: str | os.PathLike[str], operator: LinearOperator | Tensor) -> Sketch:
    """Fill an empty sketch of an operator from a file; see `Sketch.load`."""
    (operand,) = operands(operator)
    operand.require_square("a sketch")
    files = PartFiles(path, operand.rows, KIND)
    found = files.read(_fingerprint(operand), lambda held: _require_route(operand, held, files.path))
    if found is None:
        raise CheckpointError(f"there is no file {path}, or no columns that all processes have saved")
    record, tensors = found.metadata, found.tensors
    generator = torch.Generator()
    generator.set_state(tensors["generator"])
    core = SketchCore([operand], generator, record["distribution"])
    (side,) = core._sides
    device = operand.device
    core._probes = tensors["probes"].to(device)
    for name in _PARTS[type(side)]:
        setattr(side, name, tensors[name].to(device))
    _restore_spent(operator, record["spent"])
    empty._seed, empty._passes, empty._seconds = record["seed"], record["passes"], record["seconds"]
    empty._eps, empty._shape, empty._core = torch.finfo(operand.dtype).eps, operand.shape, core
    return empty


# what it was made of


def _fingerprint(operand: Operand) -> dict[str, str]:
    return fingerprint(**made_of(operand.operator, "a sketch"))


# how it was computed


def _require_route(operand: Operand, held: Checkpoint, path: Path) -> None:
    (side,) = SketchCore([operand], torch.Generator(), held.metadata["distribution"])._sides
    route, then = _route(operand, side), held.metadata["route"]
    changed = [name for name in route if then.get(name) != route[name]]
    different = [f"{name} {then.get(name)!r}, now {route[name]!r}" for name in changed]
    if different:
        raise CheckpointError(
            f"{path} was computed by another route, and would not go on with the same bits: "
            f"{'; '.join(different)}; build the operator with the same engine=, batch_size= and chunk_size=, "
            "and call torch.set_num_threads with the same number"
        )


def _route(operand: Operand, side: _Factored | _Multiplied) -> dict[str, Any]:
    """Return what sums are split by: what decides the last bits."""
    route: dict[str, Any] = {
        "torch": str(torch.__version__),
        "threads": torch.get_num_threads(),
        "device": operand.device.type,
        "way": "factors" if isinstance(side, _Factored) else "products",
    }
    operator = operand.operator
    if isinstance(operator, ShardedKernelOperator):
        route |= kernel_route(operator)
    if isinstance(operator, NTKOperator):
        core = operator._core
        axis = core.rows
        assert isinstance(axis, StateAxis)
        route["engine"] = core.engine.name
        route["batch_size"] = min(core.engine.batch_size(axis.inputs), axis.inputs.num_samples)
        route["chunk_size"] = core.engine.chunk_size()
        route["max_dense_bytes"] = core.max_dense_bytes > 0
    return route


def _spent(operator: LinearOperator | Tensor) -> dict[str, float]:
    """Return what decides when products change over to caches: the passes spent so far."""
    if not isinstance(operator, NTKOperator):
        return {}
    core = operator._core
    spent = {"products": float(core.spending.passes)}
    if isinstance(core.engine, LayerwiseEngine) and isinstance(core.rows, StateAxis):
        spent["factors"] = core.engine._cache._spent.get(core.rows.inputs, 0.0)
    return spent


def _restore_spent(operator: LinearOperator | Tensor, spent: dict[str, float]) -> None:
    if not isinstance(operator, NTKOperator):
        return
    core = operator._core
    core.spending.passes = max(core.spending.passes, spent["products"])
    if "factors" in spent and isinstance(core.engine, LayerwiseEngine) and isinstance(core.rows, StateAxis):
        before = core.engine._cache._spent.get(core.rows.inputs, 0.0)
        core.engine._cache._spent[core.rows.inputs] = max(before, spent["factors"])
