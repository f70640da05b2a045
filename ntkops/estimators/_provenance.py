"""What a kernel was made of, and how it is computed, as far as a file must know to go on bit for bit."""

from __future__ import annotations

import re
from typing import Any

import torch
from linear_operator.operators import DenseLinearOperator, LinearOperator, RootLinearOperator
from torch import Tensor

from ..checkpoint import fingerprint
from ..distributed import ShardedKernelOperator
from ..engines import Engine, LayerwiseEngine
from ..errors import CheckpointError
from ..operators.axes import ParameterAxis, StateAxis
from ..operators.capabilities import capabilities
from ..operators.kernel import NTKOperator

__all__ = ["kernel_route", "made_of", "network_of", "place_of"]

_ADDRESS = re.compile(r" at 0x[0-9a-f]+")


def made_of(operator: LinearOperator | Tensor, what: str) -> dict[str, Any]:
    """Return model, parameters and data of an operator, for a fingerprint.

    Args:
        operator: A kernel of `ntkops.ntk`, a dense tensor, or a Gram matrix of one.
        what: What is kept in a file, for messages.

    Returns:
        What `ntkops.checkpoint.fingerprint` takes. Cost: data are read once.

    Raises:
        CheckpointError: If it is something else, which could not be recognised.
    """
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
