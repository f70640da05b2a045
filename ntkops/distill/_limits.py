"""When a dense matrix may be made."""

from __future__ import annotations

import torch
from linear_operator.operators import LinearOperator

from ..engines import format_bytes, tensor_bytes
from ..engines.memory import budget_bytes
from ..errors import DenseMemoryError
from ..operators.capabilities import dense_bytes_allowed

__all__ = ["has_room", "require_room"]


def require_room(operator: LinearOperator, why: str = "", copies: int = 0) -> None:
    """Raise unless the dense result, and what is made of it, fit into ``max_dense_bytes``.

    Args:
        operator: The operator.
        why: What needs it, and what does not, for the message.
        copies: Float64 matrices of its shape that the work holds at once; 0 where the result is all there is.

    Raises:
        DenseMemoryError: If it does not.
    """
    needed, allowed = _room(operator, copies)
    if needed > allowed:
        beside = f", with what is made of it {format_bytes(needed)}" if copies else ""
        raise DenseMemoryError(
            f"{why or 'the dense matrix'}: the dense {' x '.join(map(str, operator.shape))} kernel takes "
            f"{format_bytes(tensor_bytes(operator.shape, operator.dtype))}{beside}, above max_dense_bytes="
            f"{format_bytes(allowed)}; raise it, or use products"
        )


def has_room(operator: LinearOperator, copies: int) -> bool:
    """Whether `require_room` passes."""
    needed, allowed = _room(operator, copies)
    return needed <= allowed


def _room(operator: LinearOperator, copies: int) -> tuple[int, int]:
    """Return the bytes that are needed and those that are allowed."""
    allowed = dense_bytes_allowed(operator)
    if not copies:
        return tensor_bytes(operator.shape, operator.dtype), allowed
    # A dense kernel that was given has no limit of its own: what is free bounds the work on it.
    free = budget_bytes(operator.device or "cpu")
    return copies * tensor_bytes(operator.shape, torch.float64), min(allowed, free)
