"""Columns of blocks: inner products pair by pair, and scales."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..errors import DtypeError, NonFiniteError, ShapeError
from ..vectors import Space

__all__ = ["Product", "as_block", "column_norms", "column_products", "power_of_two", "require_finite"]

Product = Callable[[Tensor], Tensor]


def column_products(space: Space, left: Tensor, right: Tensor) -> Tensor:
    """Return the inner product of each column of one block with the same column of another.

    Args:
        space: The space of the columns.
        left: ``(*batch, n, k)``.
        right: ``(*batch, n, k)``.

    Returns:
        ``(*batch, k)``, float64.
    """
    # Columns become members of the batch, so that the space gives k numbers and no k x k matrix.
    pairs = space.inner(left.mT.unsqueeze(-1), right.mT.unsqueeze(-1))  # (*batch, k, 1, 1)
    return pairs[..., 0, 0]


def column_norms(space: Space, block: Tensor) -> Tensor:
    """Return the length of each column, ``(*batch, k)`` in float64."""
    return space.sum_squares(block).sqrt()


def power_of_two(values: Tensor) -> Tensor:
    """Return the power of two below each positive value, 1 for zero: division by it rounds nothing."""
    exponent = torch.frexp(values.double()).exponent - 1
    scale = torch.ldexp(torch.ones_like(values, dtype=torch.float64), exponent)
    return torch.where(values > 0, scale, torch.ones_like(scale))


def as_block(rhs: Tensor, space: Space, what: str = "the right-hand side") -> Tensor:
    """Return right-hand sides as a block ``(*batch, n, k)``, checked.

    Args:
        rhs: ``(n,)`` or ``(*batch, n, k)``.
        space: The space of the columns.
        what: Name for messages.

    Returns:
        ``(*batch, n, k)``.

    Raises:
        ShapeError: If it is no vector or block of the space.
        DtypeError: If it has another dtype than the space.
        NonFiniteError: If it holds NaN or infinity.
    """
    block = rhs.unsqueeze(-1) if rhs.dim() == 1 else rhs
    if block.dim() < 2 or block.shape[-2] != space.length:
        raise ShapeError(
            f"{what} needs shape ({space.length},) or (..., {space.length}, k), got {tuple(rhs.shape)}"
        )
    if block.dtype != space.dtype:
        raise DtypeError(f"{what} has dtype {block.dtype}, the space {space.dtype}: cast one of them")
    return require_finite(block, space, what)


def require_finite(block: Tensor, space: Space, what: str) -> Tensor:
    """Return a block.

    Raises:
        NonFiniteError: If it holds NaN or infinity, naming the first such column.
    """
    finite = torch.isfinite(block)
    if space.any(not bool(finite.all())):
        bad = (~finite).flatten(0, -2).any(0).nonzero()
        where = f" in column {int(bad[0])}" if len(bad) else ""
        raise NonFiniteError(f"{what} holds NaN or infinity{where}")
    return block
