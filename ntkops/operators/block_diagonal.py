"""Blocks along the diagonal, square or not: one for each sample, such as the Hessian of its loss."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, Self

import torch
from linear_operator.operators import LinearOperator
from linear_operator.utils.getitem import _noop_index
from torch import Tensor

from ..errors import DeviceError, DtypeError, ShapeError
from ..model.context import full_precision
from ._diagonal_part import DiagonalPart
from .expression import Expression

__all__ = ["BlockDiagonal", "DenseBlocks", "RankOneBlocks"]


class BlockDiagonal(Expression):
    """B blocks ``(h, w)`` along the diagonal: an operator ``(B·h, B·w)``.

    linear_operator's `BlockDiagLinearOperator` takes square blocks alone, and a slice of it takes rows of
    every block instead of whole blocks.
    """

    _args: tuple[Tensor, ...]

    @property
    @abstractmethod
    def block_shape(self) -> tuple[int, int]:
        """Rows and columns of one block."""

    @abstractmethod
    def multiply_blocks(self, vectors: Tensor) -> Tensor:
        """Return ``(B, h, k)``, the product of each block with its part of ``(B, w, k)``."""

    @abstractmethod
    def _entries(self, blocks: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
        """Return entries of blocks."""

    @property
    def num_blocks(self) -> int:
        """Number B of blocks."""
        return len(self._args[0])

    def part(self, blocks: slice) -> Self:
        """Return the operator of some blocks alone."""
        return type(self)(*(arg[blocks] for arg in self._args))

    def _size(self) -> torch.Size:
        height, width = self.block_shape
        return torch.Size((self.num_blocks * height, self.num_blocks * width))

    def _matmul(self, rhs: Tensor) -> Tensor:
        if rhs.dim() == 1:
            return self._matmul(rhs.unsqueeze(-1)).squeeze(-1)
        batch, columns = rhs.shape[:-2], rhs.shape[-1]
        # A batch of right-hand sides stands beside the columns: (B, w, batch · k).
        split = rhs.reshape(-1, self.num_blocks, self.block_shape[1], columns).permute(1, 2, 0, 3).flatten(2)
        product = self.multiply_blocks(split).unflatten(2, (-1, columns))  # (B, h, batch, k)
        return product.permute(2, 0, 1, 3).reshape(*batch, self.shape[-2], columns)

    def _getitem(self, row_index: Any, col_index: Any, *batch_indices: Any) -> LinearOperator:
        from .sandwich import Sandwich  # whose dense results are made of the blocks that are needed

        chosen: LinearOperator = self
        if row_index is not _noop_index:
            chosen = Sandwich(self._chosen(row_index, self.shape[-2]), chosen)
        if col_index is not _noop_index:
            chosen = Sandwich(chosen, self._chosen(col_index, self.shape[-1]).mT)
        return chosen

    def _chosen(self, index: Any, length: int) -> DiagonalPart:
        """Return the rows of the identity that an index chooses."""
        numbers = torch.arange(length, device=self.device)
        ones = torch.ones(length, dtype=self.dtype, device=self.device)
        return DiagonalPart(ones, rows=numbers[index], cols=numbers)

    def _get_indices(self, row_index: Tensor, col_index: Tensor, *batch_indices: Tensor) -> Tensor:
        # Entry (i, j) is in block i // h, and zero unless that is block j // w as well.
        (height, width), blocks = self.block_shape, row_index // self.block_shape[0]
        entries = self._entries(blocks, row_index % height, col_index % width)
        return torch.where(blocks == col_index // width, entries, torch.zeros_like(entries))

    def _expand_batch(self, batch_shape: torch.Size) -> Self:
        if len(batch_shape):
            raise ShapeError(f"blocks along the diagonal have no batch, asked for {tuple(batch_shape)}")
        return self


class DenseBlocks(BlockDiagonal):
    """Dense blocks along the diagonal.

    Args:
        blocks: ``(B, h, w)``.

    Raises:
        ShapeError: If they are not that.

    Example:
        >>> import torch
        >>> from ntkops.operators.block_diagonal import DenseBlocks
        >>> S = DenseBlocks(torch.tensor([[[1.0], [2.0]], [[3.0], [4.0]]]))
        >>> S.to_dense().tolist()
        [[1.0, 0.0], [2.0, 0.0], [0.0, 3.0], [0.0, 4.0]]
    """

    def __init__(self, blocks: Tensor) -> None:
        if blocks.dim() != 3:
            raise ShapeError(f"blocks need shape (B, h, w), got {tuple(blocks.shape)}")
        super().__init__(blocks)

    @property
    def block_shape(self) -> tuple[int, int]:
        """Rows and columns of one block."""
        return self._args[0].shape[1], self._args[0].shape[2]

    def multiply_blocks(self, vectors: Tensor) -> Tensor:
        """Return ``(B, h, k)`` from ``(B, w, k)``."""
        with full_precision(vectors.device):
            return self._args[0] @ vectors

    def _entries(self, blocks: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
        return self._args[0][blocks, rows, columns]

    def _transpose_nonbatch(self) -> Self:
        return type(self)(self._args[0].mT)

    def _diagonal(self) -> Tensor:
        return self._args[0].diagonal(dim1=-2, dim2=-1).flatten()  # asked of square operators alone


class RankOneBlocks(BlockDiagonal):
    r"""Blocks :math:`\mathrm{diag}(d) - u w^\top` along the diagonal, in memory of 3 B·h.

    Args:
        diagonal: d, ``(B, h)``.
        left: u, ``(B, h)``.
        right: w, ``(B, h)``.

    Raises:
        ShapeError: If their shapes differ.
        DtypeError: If their dtypes differ.
        DeviceError: If they live apart.

    Example:
        >>> import torch
        >>> from ntkops.operators.block_diagonal import RankOneBlocks
        >>> p = torch.tensor([[0.25, 0.75]])
        >>> S = RankOneBlocks(p.sqrt(), p, p.sqrt())
        >>> (S @ S.mT.to_dense()).tolist()
        [[0.1875, -0.1875], [-0.1875, 0.1875]]
    """

    def __init__(self, diagonal: Tensor, left: Tensor, right: Tensor) -> None:
        shapes = {tuple(part.shape) for part in (diagonal, left, right)}
        if len(shapes) > 1 or diagonal.dim() != 2:
            raise ShapeError(f"d, u and w need one shape (B, h), got {sorted(shapes)}")
        if len({part.dtype for part in (diagonal, left, right)}) > 1:
            raise DtypeError(f"d, u and w have dtypes {diagonal.dtype}, {left.dtype} and {right.dtype}")
        if len({part.device for part in (diagonal, left, right)}) > 1:
            raise DeviceError(f"d, u and w live on {diagonal.device}, {left.device} and {right.device}")
        super().__init__(diagonal, left, right)

    @property
    def block_shape(self) -> tuple[int, int]:
        """Rows and columns of one block."""
        return self._args[0].shape[1], self._args[0].shape[1]

    def multiply_blocks(self, vectors: Tensor) -> Tensor:
        """Return ``(B, h, k)`` from ``(B, h, k)``."""
        # (diag(d) - u wᵀ) v = d ∘ v - u (w · v) for each block: O(h) operations a column, no h x h block.
        diagonal, left, right = (arg.unsqueeze(-1) for arg in self._args)
        return diagonal * vectors - left * (right * vectors).sum(1, keepdim=True)

    def _entries(self, blocks: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
        diagonal, left, right = self._args
        on = torch.where(rows == columns, diagonal[blocks, rows], torch.zeros_like(diagonal[blocks, rows]))
        return on - left[blocks, rows] * right[blocks, columns]

    def _transpose_nonbatch(self) -> Self:
        diagonal, left, right = self._args
        return type(self)(diagonal, right, left)  # (u wᵀ)ᵀ = w uᵀ

    def _diagonal(self) -> Tensor:
        diagonal, left, right = self._args
        return (diagonal - left * right).flatten()
