"""What may be passed where a model, its inputs, its parameters or its state are asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeAlias

from torch import Tensor, nn

from .entries import Entries
from .inputs import Inputs
from .linearization import Linearization
from .selection import Selector

__all__ = ["InputsLike", "ModelLike", "OutputLike", "ParamsLike"]

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
