"""Some rows and columns of a diagonal matrix, lazily."""

from __future__ import annotations

from typing import Any, Self

import torch
from linear_operator.operators import LinearOperator
from torch import Tensor

__all__ = ["DiagonalPart"]


class DiagonalPart(LinearOperator):
    """D[rows][:, cols] of a diagonal D: entry (i, j) is d[rows[i]] where rows[i] = cols[j], else 0.

    linear_operator makes two sparse interpolation matrices for the same; this moves rows instead. It is made
    of d, ``(*batch, n)``, and positions ``(r,)`` and ``(c,)`` int64.
    """

    def __init__(self, entries: Tensor, *, rows: Tensor, cols: Tensor) -> None:
        super().__init__(entries, rows=rows, cols=cols)
        self._entries, self._rows, self._cols = entries, rows, cols

    def _like(self, entries: Tensor, rows: Tensor | None = None, cols: Tensor | None = None) -> Self:
        """Return other entries, rows or columns of a diagonal."""
        return type(self)(
            entries,
            rows=self._rows if rows is None else rows,
            cols=self._cols if cols is None else cols,
        )

    def _size(self) -> torch.Size:
        return torch.Size((*self._entries.shape[:-1], len(self._rows), len(self._cols)))

    def _matmul(self, rhs: Tensor) -> Tensor:
        if rhs.dim() == 1:
            return self._matmul(rhs.unsqueeze(-1)).squeeze(-1)
        # D[rows][:, cols] v = (D C v)[rows] with C = I[:, cols]: C v adds v_j at cols[j], which may repeat.
        size = self._entries.shape[-1]
        spread = rhs.new_zeros((*rhs.shape[:-2], size, rhs.shape[-1])).index_add(-2, self._cols, rhs)
        return self._entries[..., self._rows].unsqueeze(-1) * spread[..., self._rows, :]

    def _transpose_nonbatch(self) -> Self:
        return self._like(self._entries, self._cols, self._rows)

    def _diagonal(self) -> Tensor:
        chosen = self._entries[..., self._rows]
        return torch.where(self._rows == self._cols, chosen, torch.zeros_like(chosen))

    def _get_indices(self, row_index: Tensor, col_index: Tensor, *batch_indices: Tensor) -> Tensor:
        rows, cols = self._rows[row_index], self._cols[col_index]
        chosen = self._entries[(*batch_indices, rows)]
        return torch.where(rows == cols, chosen, torch.zeros_like(chosen))

    def _getitem(self, row_index: Any, col_index: Any, *batch_indices: Any) -> LinearOperator:
        entries = self._entries[(*batch_indices, slice(None))] if batch_indices else self._entries
        return self._like(entries, self._rows[row_index], self._cols[col_index])

    def _expand_batch(self, batch_shape: Any) -> Self:
        return self._like(self._entries.expand(*batch_shape, self._entries.shape[-1]))

    def _unsqueeze_batch(self, dim: int) -> Self:
        return self._like(self._entries.unsqueeze(dim))

    def _permute_batch(self, *dims: int) -> Self:
        return self._like(self._entries.permute(*dims, len(dims)))

    def _mul_constant(self, other: float | Tensor) -> Self:
        return self._like(self._entries * (other.unsqueeze(-1) if isinstance(other, Tensor) else other))
