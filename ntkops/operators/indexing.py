"""Slices, entries, transposes and batches: only the axes change."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Self

import numpy as np
import torch
from linear_operator.operators import LinearOperator
from torch import Tensor

from ..engines import tensor_bytes
from ..errors import ShapeError
from .capabilities import capabilities, dense_from_tiles, multiply
from .dense import DenseOperator
from .positions import require_index, resolve_index, same_index

__all__ = ["IndexedOperator"]

_SMALL = 2**27  # bytes of a dense block that may be made for columns, as it may for products
_GROUP = 64  # single entries that are read off one small grid: at most 64 x 64 entries are made for them


class IndexedOperator(DenseOperator):
    """An operator whose slices, transposes and batches share its engine."""

    def _getitem(self, row_index: Any, col_index: Any, *batch_indices: Any) -> LinearOperator:
        core = self._core
        if batch_indices and not all(isinstance(b, slice) and b == slice(None) for b in batch_indices):
            core = core.map_axes(lambda axis: axis.map_batch(lambda numbers: numbers[tuple(batch_indices)]))
        rows = core.rows.take(row_index)
        shared = core.symmetric and same_index(row_index, col_index)
        columns = rows if shared else core.columns.take(col_index)
        if rows is core.rows and columns is core.columns and core is self._core:
            return self
        return self._rebuild(core.with_axes(rows, columns))

    def submatrix(self, rows: Any, cols: Any) -> Self:
        """Return the lazy operator on the grid of some rows and some columns.

        ``K[rows, cols]`` with two index tensors gives single entries, as in torch; this gives
        ``K[rows][:, cols]``, and keeps the symmetry where both are the same.

        Args:
            rows: Slice, list or ``(m,)`` integer tensor.
            cols: Likewise for columns.

        Returns:
            Lazy operator of shape ``(*batch, len(rows), len(cols))``.

        Raises:
            OutOfRangeError: If an index lies outside the operator.
        """
        return self._grid(*(_as_index(i) for i in (rows, cols)))

    def _grid(self, rows: slice | Tensor, columns: slice | Tensor) -> Self:
        """Return the operator on a grid of rows and columns, with all of its batch."""
        part = self._getitem(rows, columns, *(slice(None),) * len(self.batch_shape))
        assert isinstance(part, type(self))
        return part

    def take_columns(self, chosen: Tensor) -> Tensor:
        """Return dense columns ``(*batch, n, b)``: the block between all rows and those, or what is stored.

        Args:
            chosen: ``(b,)`` numbers of columns.

        Raises:
            OutOfRangeError: If there is no such column.
        """
        chosen = resolve_index(_as_index(chosen), self.shape[-1])
        small = tensor_bytes(self.shape, self.dtype) <= _SMALL
        stored = self._dense_if_cheaper(len(chosen)) if small else self._stored_dense()
        if stored is not None:
            return stored[..., chosen.to(stored.device)]
        # A column that is wanted twice is made once; a block of a kernel has no repeated rows.
        numbers, place = torch.unique(chosen.cpu(), return_inverse=True)
        block = self._grid(slice(None), numbers)
        source, width = capabilities(block), len(numbers)
        # A product with the block pulls back a few samples alone, and pushes to all: half of one with K.
        products = width * source.product_cost() * (1 + width / self.shape[-1]) / 2
        tiles = source.exact_cost("tiles")
        # Asked last, as it finds the mode of differentiation: where J p does not exist tiles are the way.
        if tiles <= products or (math.isfinite(tiles) and not source.pushes):
            return dense_from_tiles(block)[..., place.to(self.device)]
        unit = torch.eye(width, dtype=self.dtype, device=self.device)
        return multiply(block, unit.expand(*self.batch_shape, width, width))[..., place.to(self.device)]

    def _get_indices(self, row_index: Tensor, col_index: Tensor, *batch_indices: Tensor) -> Tensor:
        shape = torch.broadcast_shapes(row_index.shape, col_index.shape, *(b.shape for b in batch_indices))
        rows, columns = (i.expand(shape).reshape(-1).cpu() for i in (row_index, col_index))
        if not batch_indices:
            return self._entries(rows, columns).reshape(shape)
        # One member after the other: entries of one kernel share grids, those of two have nothing in common.
        sizes = self.batch_shape
        flat = torch.zeros_like(rows)
        for size, index in zip(sizes, batch_indices, strict=True):
            index = index.expand(shape).reshape(-1).cpu()
            flat = flat * size + torch.where(index < 0, index + size, index)
        values = rows.new_zeros(len(rows), dtype=self.dtype).to(self.device)
        for entry in torch.unique(flat):
            chosen = (flat == entry).nonzero().flatten()
            position = torch.unravel_index(entry, sizes)
            member = self._getitem(slice(None), slice(None), *(int(p) for p in position))
            assert isinstance(member, IndexedOperator)
            values = values.index_put(
                (chosen.to(self.device),), member._entries(rows[chosen], columns[chosen])
            )
        return values.reshape(shape)

    def _entries(self, rows: Tensor, columns: Tensor) -> Tensor:
        """Return the entries (rows[i], columns[i]), by small dense grids of what they touch."""
        one = torch.unique(rows).numel() == 1 or torch.unique(columns).numel() == 1
        group = max(len(rows), 1) if one else _GROUP  # in one row or column a grid has no entry too many
        parts = []
        for row, column in zip(rows.split(group), columns.split(group), strict=True):
            unique_rows, i = torch.unique(row, return_inverse=True)
            unique_columns, j = torch.unique(column, return_inverse=True)
            grid = self._getitem(unique_rows, unique_columns)
            assert isinstance(grid, IndexedOperator)
            grid._check_fresh()
            parts.append(grid._dense_values(self._args)[i.to(self.device), j.to(self.device)])
        return torch.cat(parts)

    def _diagonal(self) -> Tensor:
        """Return the diagonal by single entries; kernels have a better way."""
        positions = torch.arange(self.shape[-1])
        batch = tuple(torch.arange(s) for s in self.batch_shape)
        grids = torch.meshgrid(*batch, positions, indexing="ij")
        return self._get_indices(grids[-1], grids[-1], *grids[:-1])

    # transposing and batches: only the axes change

    def _transpose_nonbatch(self) -> Self:
        core = self._core
        return self if core.symmetric else self._rebuild(core.with_axes(core.columns, core.rows))

    def _map_batch(self, change: Callable[[Tensor], Tensor]) -> Self:
        """Apply a change of ``(*batch, R, r)`` to the numbers of both axes."""
        return self._rebuild(self._core.map_axes(lambda axis: axis.map_batch(change)))

    def _permute_batch(self, *dims: int) -> Self:
        return self._map_batch(lambda numbers: numbers.permute(*dims, len(dims), len(dims) + 1))

    def _unsqueeze_batch(self, dim: int) -> Self:
        return self._map_batch(lambda numbers: numbers.unsqueeze(dim))

    def _expand_batch(self, batch_shape: torch.Size | Sequence[int]) -> Self:
        if tuple(batch_shape) == tuple(self.batch_shape):
            return self
        return self._map_batch(lambda numbers: numbers.expand(*batch_shape, *numbers.shape[-2:]))

    def repeat(self, *sizes: Any) -> Self:
        """Repeat along batch dimensions; the last two sizes must be 1.

        Args:
            *sizes: Repeats of each batch dimension, then 1, 1.

        Returns:
            The lazy operator over the larger batch.

        Raises:
            ShapeError: If a matrix dimension is to be repeated.
        """
        counts = tuple(sizes[0]) if len(sizes) == 1 and not isinstance(sizes[0], int) else sizes
        if len(counts) < self.dim() or tuple(counts[-2:]) != (1, 1):
            raise ShapeError(f"repeat{tuple(counts)}: only batch dimensions repeat; end with 1, 1")
        return self._map_batch(lambda numbers: numbers.repeat(*counts[:-2], 1, 1))


def _as_index(index: Any) -> slice | Tensor:
    """Return a slice, or the flat tensor of what is a list, a range, an array or one position."""
    if not isinstance(index, (slice, Tensor, np.ndarray, list, tuple, range)):
        require_index(index)
    found = index if isinstance(index, slice) else torch.as_tensor(index).flatten()
    require_index(found)
    return found
