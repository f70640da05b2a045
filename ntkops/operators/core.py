"""What an operator is, apart from its parameters: an engine and two axes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import torch

from ..engines import Engine, free_bytes
from ..errors import ShapeError, UnsupportedOperationError
from .axes import Axis

__all__ = ["Core", "Spending", "dense_limit"]


def dense_limit(max_dense_bytes: int | Literal["auto"], device: torch.device) -> int:
    """Return the byte limit for dense results: a quarter of what is free now for "auto".

    Raises:
        ShapeError: If the limit is neither "auto" nor a non-negative integer.
    """
    if max_dense_bytes == "auto":
        return free_bytes(device) // 4
    if not isinstance(max_dense_bytes, int) or isinstance(max_dense_bytes, bool) or max_dense_bytes < 0:
        raise ShapeError(f"max_dense_bytes={max_dense_bytes!r}: pass 'auto', 0 (never) or a number of bytes")
    return max_dense_bytes


@dataclass
class Spending:
    """Passes spent on products so far: what decides when a dense block is the cheaper way.

    Attributes:
        passes: Their number.
        settled: Whether factors that pay for many products have been made.
    """

    passes: float = 0.0
    settled: bool = False


@dataclass(frozen=True, eq=False)
class Core:
    """What an operator is, apart from its parameters.

    It has no attribute that linear_operator looks for on tensors (``to``, ``clone``, ``dtype``,
    ``requires_grad``), so that it passes through every rebuild untouched.
    """

    engine: Engine
    rows: Axis
    columns: Axis
    limit: int | Literal["auto"]  # of dense results, in bytes
    spending: Spending = field(default_factory=Spending)

    def __post_init__(self) -> None:
        """Refuse a limit that is none; memory is looked at when a dense result is in question."""
        if self.limit != "auto":
            dense_limit(self.limit, self.engine.linearization.device)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Refuse what another version has pickled."""
        missing = [part.name for part in dataclasses.fields(self) if part.name not in state]
        if missing:
            raise UnsupportedOperationError(
                "this operator was pickled by another version of ntkops (it has no "
                f"{', '.join(map(repr, missing))}): build it again from the model"
            )
        vars(self).update(state)

    @property
    def max_dense_bytes(self) -> int:
        """Largest dense result allowed."""
        return self.engine.free_bytes // 4 if self.limit == "auto" else self.limit

    @cached_property
    def symmetric(self) -> bool:
        """Whether rows and columns are the same axis, so that the operator is J Jᵀ."""
        return self.rows is self.columns

    def with_axes(self, rows: Axis, columns: Axis) -> Core:
        """Return the same core over other axes."""
        return dataclasses.replace(self, rows=rows, columns=columns, spending=Spending())

    def map_axes(self, change: Callable[[Axis], Axis]) -> Core:
        """Apply a change to both axes, keeping a shared axis shared."""
        rows = change(self.rows)
        return self.with_axes(rows, rows if self.symmetric else change(self.columns))
