"""What may be passed where a model, its inputs, parameters or state, or numbers beside them are asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from torch import Tensor, nn

from ..arguments import ArrayLike
from .entries import Entries
from .inputs import Inputs
from .linearization import Linearization
from .selection import Selector

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = [
    "ArrayLike",
    "GroupLike",
    "InputsLike",
    "LossLike",
    "ModelLike",
    "OffsetLike",
    "OutputLike",
    "ParamsLike",
    "Pytree",
]

ModelLike: TypeAlias = nn.Module | Callable[..., Any] | Linearization
"""A module; a function ``(params, inputs) -> output`` of a dict of tensors and a batch; a `Linearization`."""

InputsLike: TypeAlias = Tensor | tuple[Any, ...] | Mapping[str, Any] | Iterable[Any] | Inputs
"""Samples: a tensor; a tuple of positional, a dict of keyword inputs; a re-iterable of batches of these."""

ParamsLike: TypeAlias = Selector | Entries
"""Parameters: None for all that require grad, names, glob patterns, modules, a predicate ``(name, parameter)
-> bool``, a dict of values at which to linearise, or `Entries` for single weights."""

OutputLike: TypeAlias = str | int | Callable[[Any], Any] | None
"""The state: None where the model returns a tensor; a key or position; a module path such as ``"rnn[0]"``; or
a function of the raw output."""

LossLike: TypeAlias = Literal["mse", "cross_entropy"] | Callable[[Tensor, Tensor], Tensor]
"""A loss: "mse", "cross_entropy", or a function ``(outputs, targets) -> ()`` of one sample."""

OffsetLike: TypeAlias = ArrayLike | Literal["network"] | None
"""What a regression is added to, or training starts from: None for zero, "network" for the outputs of the
network, a number, or a tensor."""

GroupLike: TypeAlias = "ProcessGroup | Literal['world'] | None"
"""Who shares the samples: a `torch.distributed.ProcessGroup`, "world" for all processes, None for nobody."""

Pytree: TypeAlias = Any
"""A tensor, or a dict, list or tuple of such, in any nesting."""
