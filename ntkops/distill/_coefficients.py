"""U: the coefficients of distilled gradients, as a matrix or as the numbers of the points that are chosen."""

from __future__ import annotations

from typing import Any

import torch
from linear_operator.operators import LinearOperator
from torch import Tensor

from ..operators.capabilities import capabilities, multiply, taken_columns
from ..vectors import Space
from ._operator import DistilledOperator

__all__ = ["Coefficients"]

_ROWS = 2**13  # rows that are in float64 at a time
_WIDTH = 64  # columns of K U that are made at a time
_ENTRIES = 2**23  # of columns of K U that are made at a time


class Coefficients:
    """U, ``(m, s)`` or ``(C, m, s)``; unit columns are never written down, unless they are asked for.

    Args:
        space: That of the m rows, of which a process may hold some.
        matrix: U, or None where points are chosen.
        indices: ``(s,)`` numbers of the points that U selects, among the rows of all ranks.
    """

    def __init__(self, space: Space, matrix: Tensor | None = None, indices: Tensor | None = None) -> None:
        self.space, self.matrix, self.indices = space, matrix, indices

    @property
    def shape(self) -> torch.Size:
        """Shape of U, whose rows are those of this process."""
        if self.indices is not None:
            return torch.Size((self.space.length, len(self.indices)))
        assert self.matrix is not None
        return self.matrix.shape

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of U."""
        return self.space.dtype

    @property
    def device(self) -> torch.device:
        """Where U is."""
        return self.space.device

    def dense(self) -> Tensor:
        """Return U; of chosen points m s numbers, all but s of them zero."""
        if self.indices is None:
            assert self.matrix is not None
            return self.matrix
        unit = torch.zeros(self.shape, dtype=self.dtype, device=self.device)
        here, rows = self._own()
        unit[rows, here] = 1
        return unit

    def _own(self) -> tuple[Tensor, Tensor]:
        """Return which chosen points this process holds, and in which of its rows."""
        assert self.indices is not None
        rows = self.indices - self.space.start
        here = ((rows >= 0) & (rows < self.space.length)).nonzero().flatten()
        return here, rows[here]

    # what U is for: K U, Uᵀ V, U β

    def combined_columns(self, kernel: LinearOperator) -> LinearOperator:
        """Return K U lazily: of chosen points their columns."""
        if self.indices is not None:
            return kernel[..., :, self.indices]
        assert self.matrix is not None
        return DistilledOperator(kernel, self.matrix, which="right")

    def products(self, kernel: LinearOperator) -> Tensor:
        """Return K U, ``(*batch, n, s)``: the columns that U selects, or products."""
        batch, size = kernel.shape[:-2], self.shape[-1]
        found = torch.empty((*kernel.shape[:-1], size), dtype=kernel.dtype, device=kernel.device)
        most = int(capabilities(kernel).space.largest(kernel.shape[:-1].numel()))  # all ranks take as many
        width = max(1, min(_WIDTH, _ENTRIES // max(1, most)))
        for start in range(0, size, width):
            some = slice(start, start + width)
            if self.indices is not None:
                found[..., some] = taken_columns(kernel, self.indices[some])
            else:
                assert self.matrix is not None
                part = self.matrix[..., some]
                found[..., some] = multiply(kernel, part.expand(*batch, *part.shape[-2:]).contiguous())
        return found

    def inside(self, block: Tensor) -> Tensor:
        """Return Uᵀ V in float64, ``(*batch, s, k)``, some rows at a time."""
        if self.indices is not None:
            return self.space.take(block, self.indices).double()
        assert self.matrix is not None
        parts = zip(self.matrix.split(_ROWS, dim=-2), block.split(_ROWS, dim=-2), strict=True)
        return torch.stack([some.double().mT @ rows.double() for some, rows in parts]).sum(0)

    def combined(self, beta: Tensor) -> Tensor:
        """Return U β in float64, ``(*batch, m, k)``."""
        if self.indices is not None:
            found = beta.new_zeros((*beta.shape[:-2], self.space.length, beta.shape[-1]))
            here, rows = self._own()
            return found.index_copy(-2, rows, beta[..., here, :])
        assert self.matrix is not None
        return torch.cat([rows.double() @ beta for rows in self.matrix.split(_ROWS, dim=-2)], dim=-2)

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what a matrix is a view of."""
        return vars(self) | {"matrix": None if self.matrix is None else self.matrix.clone()}
