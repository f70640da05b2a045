"""The structures of the operators that linear_operator knows, each made of those of its parts."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from functools import cached_property
from typing import Any

import torch
from linear_operator.operators import (
    BlockDiagLinearOperator,
    ConstantMulLinearOperator,
    DenseLinearOperator,
    DiagLinearOperator,
    LinearOperator,
    MatmulLinearOperator,
    RootLinearOperator,
    SumLinearOperator,
)
from torch import Tensor

from ..errors import ShapeError
from ..vectors import Space
from .counting import multiply, product_cost, row_space
from .structure import Factors, Structure, Tile, dense_from_tiles, structure, tile_slices

__all__ = ["wrap"]

_TILE = 512


def wrap(operator: LinearOperator | Tensor, whole: bool) -> Structure:
    """Return the structure of an operator; see `ntkops.operators.structure.structure`."""
    own = getattr(operator, "structure", None)
    if own is not None:
        return _RowSlabs(operator, own) if whole and own.symmetric else own
    for kinds, kind in _KINDS:
        if isinstance(operator, kinds):
            return kind(operator, whole)
    return _ProductStructure(operator, whole)


class _Base:
    """Shape, dtype, device and space of an operator; no factors, no samples."""

    symmetric: bool = False

    def __init__(self, operator: Any, whole: bool) -> None:
        self._operator = operator
        self._whole = whole
        self.shape: torch.Size = operator.shape
        self.dtype: torch.dtype = operator.dtype
        self.device = torch.device(operator.device or "cpu")

    @property
    def space(self) -> Space:
        return row_space(self._operator)

    def tile_size(self) -> int:
        return _TILE

    def factors(self) -> Factors | None:
        return None

    def sample_gram(self, probes: Tensor) -> Tensor | None:
        return None

    def _corners(self, size: int | None) -> Iterator[tuple[slice, slice]]:
        size = size or self.tile_size()
        for rows, cols in itertools.product(
            tile_slices(self.shape[-2], size), tile_slices(self.shape[-1], size)
        ):
            if cols.start >= rows.start or not self.symmetric:
                yield rows, cols

    def _require_square(self) -> None:
        if self.shape[-2] != self.shape[-1]:
            raise ShapeError(f"only a square operator has a diagonal, this one is {tuple(self.shape)}")


class _DenseStructure(_Base):
    """A dense tensor: everything is there already."""

    def __init__(self, operator: Tensor | DenseLinearOperator, whole: bool) -> None:
        super().__init__(operator, whole)
        tensor = operator if isinstance(operator, Tensor) else operator.tensor
        self._tensor = tensor.detach()

    @cached_property
    def symmetric(self) -> bool:  # type: ignore[override]
        tensor = self._tensor
        if self._whole or tensor.shape[-2] != tensor.shape[-1]:
            return False
        # Rounding that both triangles of a computed Gram matrix share is no asymmetry.
        allowed = 16 * torch.finfo(self.dtype).eps * float(tensor.abs().max())
        return bool((tensor - tensor.mT).abs().max() <= allowed)

    def diagonal(self) -> Tensor:
        self._require_square()
        return self._tensor.diagonal(dim1=-2, dim2=-1)

    def tiles(self, size: int | None = None) -> Iterator[Tile]:
        for rows, cols in self._corners(size):
            yield Tile(rows, cols, self._tensor[..., rows, cols])

    def exact_cost(self, quantity: str) -> float:
        return 0


class _DiagonalStructure(_Base):
    """A diagonal operator."""

    def __init__(self, operator: DiagLinearOperator, whole: bool) -> None:
        super().__init__(operator, whole)
        self.symmetric = not whole

    def diagonal(self) -> Tensor:
        return self._operator._diagonal().detach()

    def tiles(self, size: int | None = None) -> Iterator[Tile]:
        diagonal = self.diagonal()
        for rows, cols in self._corners(size):
            height, width = rows.stop - rows.start, cols.stop - cols.start
            block = diagonal.new_zeros((*self.shape[:-2], height, width))
            if rows == cols:
                block.diagonal(dim1=-2, dim2=-1).copy_(diagonal[..., rows])
            yield Tile(rows, cols, block)

    def exact_cost(self, quantity: str) -> float:
        return 0


class _SumStructure(_Base):
    """A sum, also of an operator and a diagonal: part by part."""

    def __init__(self, operator: SumLinearOperator, whole: bool) -> None:
        super().__init__(operator, whole)
        parts = [structure(part, whole=whole) for part in operator.linear_ops]
        self.symmetric = all(part.symmetric for part in parts)
        if not self.symmetric and not whole:
            parts = [structure(part, whole=True) for part in operator.linear_ops]
        self._parts = parts

    def tile_size(self) -> int:
        return min(part.tile_size() for part in self._parts)

    def diagonal(self) -> Tensor:
        return sum((part.diagonal() for part in self._parts[1:]), start=self._parts[0].diagonal())

    def tiles(self, size: int | None = None) -> Iterator[Tile]:
        size = size or self.tile_size()
        for group in zip(*(part.tiles(size) for part in self._parts), strict=True):
            blocks = [tile.block for tile in group]
            yield Tile(group[0].rows, group[0].cols, sum(blocks[1:], start=blocks[0]))

    def exact_cost(self, quantity: str) -> float:
        return sum(part.exact_cost(quantity) for part in self._parts)


class _ScaledStructure(_Base):
    """A constant multiple; the constant may differ along the batch."""

    def __init__(self, operator: ConstantMulLinearOperator, whole: bool) -> None:
        super().__init__(operator, whole)
        self._base = structure(operator.base_linear_op, whole=whole)
        self.symmetric = self._base.symmetric
        constant = operator._constant.detach()
        self._constant = constant.reshape(()) if constant.numel() == 1 else constant

    def tile_size(self) -> int:
        return self._base.tile_size()

    def diagonal(self) -> Tensor:
        return self._constant.unsqueeze(-1) * self._base.diagonal()

    def tiles(self, size: int | None = None) -> Iterator[Tile]:
        for tile in self._base.tiles(size):
            yield Tile(tile.rows, tile.cols, self._constant[..., None, None] * tile.block)

    def exact_cost(self, quantity: str) -> float:
        return self._base.exact_cost(quantity)

    def factors(self) -> Factors | None:
        found = self._base.factors()
        if found is None or bool((self._constant < 0).any()):
            return None
        left, right = (ConstantMulLinearOperator(factor, self._constant.sqrt()) for factor in found)
        return left, right


class _BlockDiagonalStructure(_Base):
    """Square blocks along the diagonal: the last batch dimension of a base operator."""

    def __init__(self, operator: BlockDiagLinearOperator, whole: bool) -> None:
        super().__init__(operator, whole)
        self._base = operator.base_linear_op
        self._parts = structure(self._base)
        self.symmetric = self._parts.symmetric and not whole

    def diagonal(self) -> Tensor:
        return self._parts.diagonal().flatten(-2)

    def exact_cost(self, quantity: str) -> float:
        return self._parts.exact_cost(quantity)

    def tiles(self, size: int | None = None) -> Iterator[Tile]:
        length = self._base.shape[-1]
        for rows, cols in self._corners(size):
            height, width = rows.stop - rows.start, cols.stop - cols.start
            block = torch.zeros((*self.shape[:-2], height, width), dtype=self.dtype, device=self.device)
            for number in range(rows.start // length, (rows.stop - 1) // length + 1):
                inside = slice(number * length, (number + 1) * length)
                row_part, col_part = _overlap(rows, inside), _overlap(cols, inside)
                if row_part.start < row_part.stop and col_part.start < col_part.stop:
                    part = self._base[
                        ..., number, _shift(row_part, inside.start), _shift(col_part, inside.start)
                    ]
                    target = block[..., _shift(row_part, rows.start), _shift(col_part, cols.start)]
                    target.copy_(dense_from_tiles(structure(part)))
            yield Tile(rows, cols, block)


class _ProductStructure(_Base):
    """Any other operator: products with blocks of the identity, nothing assumed."""

    def __init__(self, operator: LinearOperator, whole: bool) -> None:
        super().__init__(operator, whole)
        # A square root that is written out is symmetric by what it is; nothing else is taken on trust.
        self.symmetric = isinstance(operator, RootLinearOperator) and not whole

    def diagonal(self) -> Tensor:
        self._require_square()
        parts = []
        for cols in tile_slices(self.shape[-1], self.tile_size()):
            columns = multiply(self._operator, self._identity(self.shape[-1], cols))
            parts.append(columns[..., cols, :].diagonal(dim1=-2, dim2=-1))
        return torch.cat(parts, dim=-1)

    def tiles(self, size: int | None = None) -> Iterator[Tile]:
        size = size or self.tile_size()
        narrow = self.shape[-1] <= size
        columns = multiply(self._operator, self._identity(self.shape[-1])) if narrow else None
        for rows in tile_slices(self.shape[-2], size):
            slab = self._row_slab(rows) if columns is None else columns[..., rows, :]
            for cols in tile_slices(self.shape[-1], size):
                if cols.start >= rows.start or not self.symmetric:
                    yield Tile(rows, cols, slab[..., cols])

    def _row_slab(self, rows: slice) -> Tensor:
        return multiply(self._operator.mT, self._identity(self.shape[-2], rows)).mT

    def _identity(self, length: int, cols: slice | None = None) -> Tensor:
        cols = slice(0, length) if cols is None else cols
        width = cols.stop - cols.start
        block = torch.zeros((length, width), dtype=self.dtype, device=self.device)
        block[cols].diagonal().fill_(1)
        return block.expand(*self.shape[:-2], length, width)

    def exact_cost(self, quantity: str) -> float:
        narrow = quantity == "diagonal" or self.shape[-1] <= self.tile_size()
        return self.shape[-1 if narrow else -2] * product_cost(self._operator)

    def factors(self) -> Factors | None:
        operator = self._operator
        if isinstance(operator, RootLinearOperator):
            return operator.root, operator.root
        if isinstance(operator, MatmulLinearOperator):
            return operator.left_linear_op, operator.right_linear_op.mT
        return None


class _RowSlabs(_Base):
    """A symmetric operator of ours whose lower triangle is wanted too: slab after slab of its rows."""

    def __init__(self, operator: Any, own: Structure) -> None:
        super().__init__(operator, True)
        self._own = own

    def tile_size(self) -> int:
        return self._own.tile_size()

    def diagonal(self) -> Tensor:
        return self._own.diagonal()

    def tiles(self, size: int | None = None) -> Iterator[Tile]:
        size = size or self.tile_size()
        if size >= self.shape[-1]:  # a single tile has no lower triangle to add
            yield from self._own.tiles(size)
            return
        for rows in tile_slices(self.shape[-2], size):
            for tile in structure(self._operator[..., rows, :]).tiles(size):
                yield Tile(rows, tile.cols, tile.block)

    def exact_cost(self, quantity: str) -> float:
        return (1 if quantity == "diagonal" else 2) * self._own.exact_cost(quantity)


def _overlap(first: slice, second: slice) -> slice:
    return slice(max(first.start, second.start), min(first.stop, second.stop))


def _shift(part: slice, start: int) -> slice:
    return slice(part.start - start, part.stop - start)


_KINDS: tuple[tuple[Any, Any], ...] = (
    ((Tensor, DenseLinearOperator), _DenseStructure),
    (DiagLinearOperator, _DiagonalStructure),
    (SumLinearOperator, _SumStructure),
    (ConstantMulLinearOperator, _ScaledStructure),
    (BlockDiagLinearOperator, _BlockDiagonalStructure),
)
