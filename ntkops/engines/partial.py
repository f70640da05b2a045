"""A linearization with respect to some of its parameters, the others held where they are."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Literal

import torch
from torch import Tensor

from ..model import Batch, Linearization
from ..model.verdict import Verdict
from .autograd import AutogradEngine
from .differentiation import Parameters

__all__ = ["PartialLinearization", "partial_engine"]


class PartialLinearization:
    """The same function of fewer parameters, for an `AutogradEngine`.

    Args:
        whole: The linearization with all selected parameters.
        chosen: Numbers of the parameters that stay free.
        params: Values of all selected parameters.
    """

    def __init__(self, whole: Linearization, chosen: Sequence[int], params: Sequence[Tensor]) -> None:
        self._whole = whole
        self._chosen = tuple(chosen)
        self._params = tuple(params)
        self.names = tuple(whole.names[i] for i in self._chosen)
        self.parameters = tuple(self._params[i] for i in self._chosen)
        self.shapes = tuple(whole.shapes[i] for i in self._chosen)
        self.sizes = tuple(whole.sizes[i] for i in self._chosen)
        self.num_parameters = sum(self.sizes)
        self.dtype: torch.dtype = whole.dtype
        self.device: torch.device = whole.device
        self.differentiable = whole.differentiable

    @property
    def verdict(self) -> Verdict:
        """What is known of the model; with fewer parameters no less."""
        return self._whole.verdict

    @property
    def activation_bytes(self) -> int:
        """The bytes of the whole linearization."""
        return self._whole.activation_bytes

    def function(self, params: Sequence[Tensor], batch: Batch) -> Tensor:
        """Evaluate the model at the free parameters, ``(B, O)``."""
        merged = list(self._params)
        for position, value in zip(self._chosen, params, strict=True):
            merged[position] = value
        return self._whole.function(merged, batch)

    def safe_context(self, math_attention: bool = True) -> AbstractContextManager[None]:
        """The settings of the whole linearization."""
        return self._whole.safe_context(math_attention)

    def full_precision(self) -> AbstractContextManager[None]:
        """The settings of the whole linearization."""
        return self._whole.full_precision()


def partial_engine(
    whole: AutogradEngine,
    sizes: tuple[int | Literal["auto"], int | Literal["auto"]],
    chosen: Sequence[int],
    params: Parameters,
) -> tuple[AutogradEngine, Parameters] | None:
    """Return an engine for some parameters that counts its passes with the whole one, and those.

    Args:
        whole: The engine for all selected parameters.
        sizes: Its batch_size and chunk_size.
        chosen: Numbers of the parameters.
        params: Values of all selected parameters.

    Returns:
        The engine and the chosen parameters; None if there are none.
    """
    if not chosen:
        return None
    part = PartialLinearization(whole.linearization, chosen, params)
    whole.differentiation  # noqa: B018 (found with all parameters, and shared)
    engine = AutogradEngine(part, None, batch_size=sizes[0], chunk_size=sizes[1])  # type: ignore[arg-type]
    engine._counter, engine._limits = whole._counter, whole._limits
    return engine, part.parameters
