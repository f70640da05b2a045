"""Lᵀ K R for narrow coefficient matrices L and R, lazily: a kernel between combinations of gradients."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from linear_operator.operators import LinearOperator
from torch import Tensor

from ..errors import DeviceError, DtypeError, ShapeError
from ..operators.capabilities import (
    Capabilities,
    Factors,
    Tile,
    capabilities,
    dense_bytes_allowed,
    tile_slices,
)
from ..operators.dense import DenseFallbacks
from ..vectors import Space
from ._kernels import apply, require_room

__all__ = ["DistilledOperator"]

_WIDTH = 64  # columns of K R that are made at a time


class DistilledOperator(DenseFallbacks, LinearOperator, Capabilities):
    """Lᵀ K R, where either side may be missing.

    Args:
        base: K, ``(*batch, n, m)``.
        *sides: The coefficient matrices that there are, L ``(*batch, n, s)`` before R ``(*batch, m, t)``,
            in the dtype of K. The same tensor twice makes the operator symmetric where K is.
        which: "both", "left" or "right".
    """

    def __init__(self, base: LinearOperator, *sides: Tensor, which: str = "both") -> None:
        super().__init__(base, *sides, which=which)
        self._base, self._which = base, which
        self._left = None if which == "right" else sides[0]
        self._right = None if which == "left" else sides[-1]

    @classmethod
    def between(cls, base: LinearOperator, left: Tensor | None, right: Tensor | None) -> LinearOperator:
        """Return Lᵀ K R for the sides that are given."""
        if left is None and right is None:
            return base
        which = "right" if left is None else "left" if right is None else "both"
        return cls(base, *(side for side in (left, right) if side is not None), which=which)

    @property
    def max_dense_bytes(self) -> int:
        """Limit for one dense result in bytes, that of K."""
        return dense_bytes_allowed(self._base)

    @property
    def symmetric(self) -> bool:  # type: ignore[override]
        """Whether this is Uᵀ K U of a symmetric K."""
        left, right = self._left, self._right
        if left is None or right is None or left.shape != right.shape:
            return False
        same = left.data_ptr() == right.data_ptr() and left.stride() == right.stride()
        return same and bool(capabilities(self._base).symmetric)

    @property
    def space(self) -> Space:
        """The space of the rows."""
        if self._left is None:
            space: Space = capabilities(self._base).space
            return space
        return Space(self.shape[-2], self.dtype, self._left.device)

    # tiles: narrow results by products, factors Lᵀ F of K = F Gᵀ

    def tile_size(self) -> int:
        return max(1, min(512, max(self.shape[-2:])))

    def tiles(self, size: int | None = None) -> Iterator[Tile]:
        size = size or self.tile_size()
        if self._right is None:  # few rows, many columns
            for tile in capabilities(self.mT).tiles(size):
                yield Tile(tile.cols, tile.rows, tile.block.mT)
            return
        parts = [self.columns(part) for part in tile_slices(self.shape[-1], _WIDTH)]
        narrow = torch.cat(parts, dim=-1)  # (*batch, rows, t)
        for rows in tile_slices(self.shape[-2], size):
            for cols in tile_slices(self.shape[-1], size):
                if not self.symmetric or cols.start >= rows.start:
                    yield Tile(rows, cols, narrow[..., rows, cols])

    def exact_cost(self, quantity: str) -> float:
        return float(self.shape[-1] * capabilities(self._base).product_cost())

    def factors(self) -> Factors | None:
        found = capabilities(self._base).factors()
        if found is None:
            return None
        left = DistilledOperator.between(found[0], self._left, None)
        if self.symmetric:
            return left, left
        return left, DistilledOperator.between(found[1], self._right, None)

    # products

    def _size(self) -> torch.Size:
        rows = self._base.shape[-2] if self._left is None else self._left.shape[-1]
        columns = self._base.shape[-1] if self._right is None else self._right.shape[-1]
        sides = [side.shape[:-2] for side in (self._left, self._right) if side is not None]
        return torch.Size((*torch.broadcast_shapes(self._base.shape[:-2], *sides), rows, columns))

    def _matmul(self, rhs: Tensor) -> Tensor:
        if rhs.dim() == 1:
            return self._matmul(rhs.unsqueeze(-1)).squeeze(-1)
        block = rhs if self._right is None else self._right @ rhs
        batch = torch.broadcast_shapes(self._base.shape[:-2], block.shape[:-2])
        product = apply(self._base._expand_batch(batch), block.expand(*batch, *block.shape[-2:]))
        return product if self._left is None else self._left.mT @ product

    def _transpose_nonbatch(self) -> LinearOperator:
        return self if self.symmetric else self.between(self._base.mT, self._right, self._left)

    def matmul(self, other: Tensor | LinearOperator) -> Tensor | LinearOperator:
        """Multiply with a vector, a block of columns, or another operator (lazily).

        Args:
            other: ``(n,)``, ``(*batch, n, k)``, or a LinearOperator.

        Returns:
            ``(n,)``, ``(*batch, n, k)``, or a lazy product. Cost: one product with K a column.

        Raises:
            ShapeError: If the number of rows does not fit.
            DtypeError: If the dtype differs from the operator's.
            DeviceError: If the device differs from the operator's.
        """
        if isinstance(other, Tensor):
            rows = other.shape[0] if other.dim() == 1 else other.shape[-2] if other.dim() > 1 else None
            if rows != self.shape[-1]:
                raise ShapeError(f"expected {self.shape[-1]} rows, got {tuple(other.shape)}")
            if other.dtype != self.dtype:
                raise DtypeError(f"the operator has dtype {self.dtype}, the vector {other.dtype}; cast one")
            if self.device is not None and other.device != self.device:
                raise DeviceError(f"the operator lives on {self.device}, the vector on {other.device}")
        return super().matmul(other)

    # dense results

    def columns(self, chosen: slice) -> Tensor:
        """Return dense columns ``(*batch, rows, c)``, by products with K."""
        if self._right is None:
            numbers = torch.arange(self.shape[-1])[chosen]
            right = torch.zeros(self.shape[-1], len(numbers), dtype=self.dtype, device=self.device)
            right[numbers, torch.arange(len(numbers))] = 1
        else:
            right = self._right[..., chosen]
        narrow = self.between(self._base, self._left, None)
        return narrow._matmul(right.expand(*self.batch_shape, *right.shape[-2:]))

    def to_dense(self) -> Tensor:
        """Return the dense matrix, by products with K, guarded by its ``max_dense_bytes``."""
        require_room(self)
        if self._right is None:
            return self.mT.to_dense().mT
        blocks = [self.columns(part) for part in tile_slices(self.shape[-1], _WIDTH)]
        return torch.cat(blocks, dim=-1)

    def _diagonal(self) -> Tensor:
        parts = [self.columns(part)[..., part, :] for part in tile_slices(self.shape[-1], _WIDTH)]
        return torch.cat([part.diagonal(dim1=-2, dim2=-1) for part in parts], dim=-1)

    def _get_indices(self, row_index: Tensor, col_index: Tensor, *batch_indices: Tensor) -> Tensor:
        shape = torch.broadcast_shapes(row_index.shape, col_index.shape, *(b.shape for b in batch_indices))
        rows, columns, *members = (
            i.expand(shape).reshape(-1) for i in (row_index, col_index, *batch_indices)
        )
        chosen, position = torch.unique(columns, return_inverse=True)
        part = self._getitem(slice(None), chosen, *(slice(None) for _ in self.batch_shape))
        assert isinstance(part, DistilledOperator)
        block = part.columns(slice(0, len(chosen)))
        return block[(*members, rows, position)].reshape(shape)

    # slices and batches

    def _getitem(self, row_index: Any, col_index: Any, *batch_indices: Any) -> LinearOperator:
        from ..operators.positions import same_index

        whole = slice(None)
        base, left, right = self._base, self._left, self._right
        if batch_indices:
            batch = self.batch_shape
            base = base._expand_batch(batch)._getitem(whole, whole, *batch_indices)
            left, right = (
                side if side is None else side.expand(*batch, *side.shape[-2:])[tuple(batch_indices)]
                for side in (left, right)
            )
        same = self.symmetric and same_index(row_index, col_index)
        if left is None:
            base = base._getitem(row_index, whole, *(whole for _ in base.batch_shape))
        else:
            left = left[..., row_index]
        if right is None:
            base = base._getitem(whole, col_index, *(whole for _ in base.batch_shape))
        else:
            right = left if same else right[..., col_index]
        return self.between(base, left, right)

    def _expand_batch(self, batch_shape: Any) -> LinearOperator:
        if tuple(batch_shape) == tuple(self.batch_shape):
            return self
        return self.between(self._base._expand_batch(batch_shape), self._left, self._right)
