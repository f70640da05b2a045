# ruff: noqa: D102  (what the attributes are is said where they are made)
"""What the trial of a model and the search for coupled samples know of it: a pure function of parameters."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
from torch import Tensor

from .batch import Batch
from .call import FunctionCall, ModuleCall, Reader
from .output import OutputSelector

__all__ = ["PureFunction"]


class PureFunction(Protocol):
    """A model at fixed parameters, as `Linearization` is one; its attributes are explained there."""

    names: tuple[str, ...]
    parameters: tuple[Tensor, ...]
    frozen_names: tuple[str, ...]
    buffer_names: tuple[str, ...]
    constants: tuple[Tensor, ...]
    differentiable: bool
    call: ModuleCall | FunctionCall
    selector: OutputSelector

    @property
    def state_dim(self) -> int | None: ...
    @property
    def dtype(self) -> torch.dtype: ...
    @property
    def device(self) -> torch.device: ...
    @property
    def lowest_dtype(self) -> torch.dtype: ...
    @property
    def output_name(self) -> str: ...
    @property
    def buffers(self) -> Mapping[str, Tensor]: ...

    def origins(self) -> Iterator[tuple[str, Tensor]]: ...
    def safe_context(self) -> AbstractContextManager[None]: ...
    def function(self, params: Sequence[Tensor], batch: Batch) -> Tensor: ...
    def output_shape(self, batch: Batch) -> torch.Size: ...
    def raw_state(
        self,
        params: Sequence[Tensor],
        batch: Batch,
        reader: Reader | None = None,
        constants: Sequence[Tensor] | None = None,
    ) -> Any: ...
