"""The structures of the operators that linear_operator knows, each made of those of its parts."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from functools import cached_property
from typing import Any

import torch
from linear_operator.operators import (
    BlockDiagLinearOperator,
    CatLinearOperator,
    ConstantMulLinearOperator,
    DenseLinearOperator,
    DiagLinearOperator,
    LinearOperator,
    MatmulLinearOperator,
    RootLinearOperator,
    SumLinearOperator,
)
from torch import Tensor

from ..engines.passes import SharedPasses
from ..errors import ShapeError
from ..vectors import Space
from .axes import ParameterAxis, StateAxis
from .block_diagonal import BlockDiagonal
from .chain import Chain, is_symmetric_chain, multiplied, product_factors, same_operator
from .counting import multiply, product_cost, row_space
from .jacobian import JacobianOperator, jacobian_rows
from .kernel_structure import AxisReader
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
    if isinstance(operator, MatmulLinearOperator | RootLinearOperator):
        return _of_product(operator, product_factors(operator), whole)
    return _ColumnStructure(operator, whole)


def _of_product(operator: LinearOperator, chain: Chain, whole: bool) -> Structure:
    """Return the structure of a product by its factors: diagonals at the ends scale what is between them."""
    if len(chain) == 1:
        return structure(chain[0], whole=whole)
    if isinstance(chain[0], DiagLinearOperator) or isinstance(chain[-1], DiagLinearOperator):
        return _WeightedStructure(operator, chain, whole)
    if isinstance(chain[0], BlockDiagonal) or isinstance(chain[-1], BlockDiagonal):
        return _BlockWeightedStructure(operator, chain, whole)
    rows_alone = operator.dim() == 2 and _has_rows(chain[-1]) and not _has_rows(chain[0])
    if rows_alone and _block_count(*chain[1:-1]) is not None and same_operator(chain[0].mT, chain[-1]):
        return _GramStructure(operator, chain, whole)
    return _ProductStructure(operator, chain, whole)


def _block_count(*factors: LinearOperator) -> int | None:
    """Return how many blocks (block) diagonals have, 0 for diagonals alone; None where one is neither."""
    counts = {factor.num_blocks for factor in factors if isinstance(factor, BlockDiagonal)}
    if len(counts) > 1 or not all(isinstance(f, BlockDiagonal | DiagLinearOperator) for f in factors):
        return None
    return counts.pop() if counts else 0


def _blocks_times(factor: LinearOperator, blocks: slice, count: int, block: Tensor) -> Tensor:
    """Return the product of some of ``count`` blocks of a (block) diagonal with what stands beside them."""
    if isinstance(factor, BlockDiagonal):
        return factor.part(blocks)._matmul(block)
    entries = factor._diagonal().detach()
    return entries[_scaled_slice(blocks, len(entries) // count)].unsqueeze(-1) * block


def _scaled_slice(blocks: slice, size: int) -> slice:
    return slice(blocks.start * size, blocks.stop * size)


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


class _ColumnStructure(_Base):
    """Any other operator: products with blocks of the identity, nothing assumed."""

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


class _ProductStructure(_ColumnStructure):
    """A product: by dense rows of its two ends where these are known, by columns where they are not.

    Args:
        operator: The product.
        chain: Its factors, two or more.
        whole: Whether all tiles are wanted.
    """

    def __init__(self, operator: LinearOperator, chain: Chain, whole: bool) -> None:
        super().__init__(operator, whole)
        self._chain = chain
        half = len(chain) // 2
        self._middle = structure(chain[half]) if len(chain) % 2 else None
        self._even = is_symmetric_chain(chain, self._middle is not None and self._middle.symmetric)
        self.symmetric = self._even and not whole
        left = Rows.of(chain[0])
        right = left if self._even else Rows.of(chain[-1].mT)
        self._ends = None if left is None or right is None else (left, right)

    def diagonal(self) -> Tensor:
        if self._ends is None:
            return super().diagonal()
        self._require_square()
        parts = []
        for rows in tile_slices(self.shape[-2], self.tile_size()):
            left = self._ends[0].take(rows)
            right = left if self._even else self._ends[1].take(rows)
            parts.append((left * self._inside(right).mT).sum(-1))
        return torch.cat(parts, dim=-1)

    def tiles(self, size: int | None = None) -> Iterator[Tile]:
        if self._ends is None:
            yield from super().tiles(size)
            return
        size = size or self.tile_size()
        for rows in tile_slices(self.shape[-2], size):
            left = self._ends[0].take(rows)
            for cols in tile_slices(self.shape[-1], size):
                if cols.start >= rows.start or not self.symmetric:
                    right = left if self._even and rows == cols else self._ends[1].take(cols)
                    yield Tile(rows, cols, left @ self._inside(right))

    def _inside(self, right: Tensor) -> Tensor:
        """Return the factors between the ends times Rᵀ, for rows R of the right end: ``(*batch, p, c)``."""
        block = right.mT
        for factor in reversed(self._chain[1:-1]):
            block = multiply(factor, block)
        return block

    def tile_size(self) -> int:
        if self._ends is None:
            return super().tile_size()
        return max(1, min(*(end.fit for end in self._ends), max(self.shape[-2:])))

    def exact_cost(self, quantity: str) -> float:
        if self._ends is None:
            return super().exact_cost(quantity)
        left, right = (end.passes for end in self._ends)
        inside = sum(product_cost(factor) for factor in self._chain[1:-1])
        if quantity == "diagonal":
            return left + (0 if self._even else right) + self.shape[-1] * inside
        slabs = -(-self.shape[-2] // self.tile_size())
        share = (slabs + 1) / 2 if self.symmetric else slabs
        # Of a symmetric one the tile on the diagonal takes the rows that are there.
        return left + (share - 1 if self._even else share) * right + share * self.shape[-1] * inside

    def factors(self) -> Factors | None:
        # A symmetric product has equal factors or none: where its middle has no known root, there are none.
        chain, half = self._chain, len(self._chain) // 2
        if not self._even:
            return multiplied(chain[:1]), multiplied(chain[1:]).mT
        if self._middle is None:
            root = multiplied(chain[:half])
            return root, root
        inner = _root_of(chain[half], self._middle)
        if inner is None:
            return None
        root = multiplied((*chain[:half], inner))
        return root, root


def _root_of(operator: LinearOperator, known: Structure) -> LinearOperator | None:
    """Return L with L Lᵀ the operator, or None where none is known."""
    if isinstance(operator, DiagLinearOperator):
        entries = operator._diagonal()
        return DiagLinearOperator(entries.sqrt()) if bool((entries >= 0).all()) else None
    found = known.factors()
    return None if found is None else found[0]


class Rows:
    """Dense rows of an operator that has them: stored ones, per-sample gradients, and stacks of these.

    Args:
        operator: A dense operator, a Jacobian, or several one below the other.

    Attributes:
        passes: Passes that all rows take.
        fit: Rows that one tile may have.
    """

    def __init__(self, operator: LinearOperator) -> None:
        self._operator = operator
        self.passes, self.fit = 0.0, _TILE
        self._parts: list[tuple[int, Rows]] = []  # first row, rows
        if isinstance(operator, CatLinearOperator | ConstantMulLinearOperator):
            start = 0
            for part in _stacked(operator):
                self._parts.append((start, Rows(part)))
                start += part.shape[-2]
            self.passes = sum(rows.passes for _, rows in self._parts)
            self.fit = min(rows.fit for _, rows in self._parts)
        if isinstance(operator, JacobianOperator):
            axis, engine = operator._state_axis(), operator._core.engine
            self._reader = AxisReader(axis)
            self.passes = float(len(axis.distinct_outputs))
            entries = operator.batch_shape.numel() * axis.terms * operator.num_parameters
            width = axis.outputs.shape[-1]
            fit = max(1, engine.workspace_bytes() // (entries * operator.dtype.itemsize))
            self.fit = fit // width * width if fit >= width else fit  # whole samples, where they fit

    @classmethod
    def of(cls, operator: LinearOperator) -> Rows | None:
        """Return the rows of an operator, or None where only products give them."""
        return cls(operator) if _has_rows(operator) else None

    def take(self, rows: slice) -> Tensor:
        """Return some rows, ``(*batch, r, p)``."""
        operator = self._operator
        if isinstance(operator, ConstantMulLinearOperator):
            return operator._constant.detach().reshape(()) * self._parts[0][1].take(rows)
        if self._parts:
            own = [
                (_overlap(rows, slice(start, start + part._operator.shape[-2])), start, part)
                for start, part in self._parts
            ]
            return torch.cat(
                [part.take(_shift(some, start)) for some, start, part in own if some.start < some.stop],
                dim=-2,
            )
        if isinstance(operator, DenseLinearOperator):
            return operator.tensor[..., rows, :].detach()
        operator._check_fresh()
        with torch.no_grad():
            found = jacobian_rows(operator._core.engine, operator._args, self._reader.take(rows))
        entries = operator._core.columns
        assert isinstance(entries, ParameterAxis)
        return found if entries.pick is None else found[..., entries.pick.to(found.device)]


def _has_rows(operator: LinearOperator) -> bool:
    if isinstance(operator, CatLinearOperator | ConstantMulLinearOperator):
        below = isinstance(operator, ConstantMulLinearOperator) or operator.cat_dim == -2
        plain = isinstance(operator, CatLinearOperator) or operator._constant.numel() == 1
        return below and plain and all(map(_has_rows, _stacked(operator)))
    jacobian = isinstance(operator, JacobianOperator) and isinstance(operator._core.rows, StateAxis)
    return jacobian or isinstance(operator, DenseLinearOperator)


def _stacked(operator: CatLinearOperator | ConstantMulLinearOperator) -> list[LinearOperator]:
    return list(operator.linear_ops) if isinstance(operator, CatLinearOperator) else [operator.base_linear_op]


class _WeightedStructure(_Base):
    """Diagonal factors at the ends of a product: rows and columns of what is between them, scaled.

    Args:
        operator: The product.
        chain: Its factors, two or more, of which the first or the last is diagonal.
        whole: Whether all tiles are wanted.
    """

    def __init__(self, operator: LinearOperator, chain: Chain, whole: bool) -> None:
        super().__init__(operator, whole)
        first, last = (isinstance(end, DiagLinearOperator) for end in (chain[0], chain[-1]))
        last = last and len(chain) > 1 + first
        self._inner_chain = chain[int(first) : len(chain) - int(last)]
        self._rows: Tensor | None = chain[0]._diagonal().detach() if first else None
        self._cols: Tensor | None = chain[-1]._diagonal().detach() if last else None
        inner = multiplied(self._inner_chain)
        middle = structure(inner)
        both = self._rows is not None and self._cols is not None
        self._even = both and middle.symmetric and same_operator(self._rows, self._cols)
        self.symmetric = self._even and not whole
        self._inner = middle if self.symmetric or not middle.symmetric else structure(inner, whole=True)
        self._chain = chain

    def tile_size(self) -> int:
        return self._inner.tile_size()

    def exact_cost(self, quantity: str) -> float:
        return self._inner.exact_cost(quantity)

    def _scaled(self, block: Tensor, rows: slice, cols: slice) -> Tensor:
        if self._rows is not None:
            block = self._rows[..., rows].unsqueeze(-1) * block
        return block if self._cols is None else block * self._cols[..., cols].unsqueeze(-2)

    def diagonal(self) -> Tensor:
        self._require_square()
        values = self._inner.diagonal()
        for entries in (self._rows, self._cols):
            values = values if entries is None else entries * values
        return values

    def tiles(self, size: int | None = None) -> Iterator[Tile]:
        for tile in self._inner.tiles(size):
            yield Tile(tile.rows, tile.cols, self._scaled(tile.block, tile.rows, tile.cols))

    def factors(self) -> Factors | None:
        found = self._inner.factors()
        if found is None:
            return None if self._inner.symmetric else (self._chain[0], multiplied(self._chain[1:]).mT)
        left, right = found
        if self._rows is not None:
            left = MatmulLinearOperator(DiagLinearOperator(self._rows), left)
        if self._even:
            return left, left
        if self._cols is not None:
            right = MatmulLinearOperator(DiagLinearOperator(self._cols), right)
        return left, right


class _BlockWeightedStructure(_ProductStructure):
    """Block diagonals at the ends of a product: tiles of what is between them, times their blocks.

    Args:
        operator: The product.
        chain: Its factors, two or more, of which the first or the last is a block diagonal.
        whole: Whether all tiles are wanted.
    """

    def __init__(self, operator: LinearOperator, chain: Chain, whole: bool) -> None:
        super().__init__(operator, chain, whole)
        first, last = chain[0], chain[-1]
        self._left = first if isinstance(first, BlockDiagonal) else None
        both = len(chain) > 2 or self._left is None
        self._right = last if both and isinstance(last, BlockDiagonal) else None
        start, stop = int(self._left is not None), len(chain) - int(self._right is not None)
        self._between = multiplied(chain[start:stop])
        middle = structure(self._between)
        mirrored = self.symmetric and middle.symmetric
        self._inner = middle if mirrored or not middle.symmetric else structure(self._between, whole=True)
        # Rows of a block, and columns: of the product, and of what is between.
        self._rows_of = (1, 1) if self._left is None else self._left.block_shape
        self._cols_of = (1, 1) if self._right is None else self._right.block_shape[::-1]

    def _step(self) -> tuple[int, int] | None:
        """Return rows of the product, and of what is between, that tiles of whole blocks are multiples of."""
        ends = [self._rows_of] * (self._left is not None) + [self._cols_of] * (self._right is not None)
        same = all(end == ends[0] for end in ends)
        even = len(ends) == 2 or ends[0][0] == ends[0][1]
        return ends[0] if same and even and self.symmetric in (False, self._inner.symmetric) else None

    def tile_size(self) -> int:
        step = self._step()
        if step is None:
            return super().tile_size()
        return max(1, min(self._inner.tile_size(), max(self._between.shape[-2:])) // step[1]) * step[0]

    def tiles(self, size: int | None = None) -> Iterator[Tile]:
        size, step = size or self.tile_size(), self._step()
        if step is None or size % step[0]:
            yield from self._cut(size)
            return
        outer, inner = step
        for tile in self._inner.tiles(size // outer * inner):
            rows, cols = (  # where there are no blocks rows need be no multiple of theirs
                part if end is None else slice(part.start // inner * outer, part.stop // inner * outer)
                for part, end in ((tile.rows, self._left), (tile.cols, self._right))
            )
            yield Tile(rows, cols, self._weighed(tile.block, rows, cols))

    def _cut(self, size: int) -> Iterator[Tile]:
        """Yield tiles that part blocks, from all columns of the blocks that have some of their rows."""
        everything = slice(0, self.shape[-1])
        for rows in tile_slices(self.shape[-2], size):
            height, inside = self._rows_of
            blocks = slice(rows.start // height, -(-rows.stop // height))
            part = self._between[..., _scaled_slice(blocks, inside), :]
            around = _scaled_slice(blocks, height)
            slab = self._weighed(dense_from_tiles(structure(part)), around, everything)
            slab = slab[..., _shift(rows, around.start), :]
            for cols in tile_slices(self.shape[-1], size):
                if cols.start >= rows.start or not self.symmetric:
                    yield Tile(rows, cols, slab[..., cols])

    def _weighed(self, block: Tensor, rows: slice, cols: slice) -> Tensor:
        """Return a block of what is between, times the blocks of the ends that it meets."""
        if self._left is not None:
            block = self._left.part(_whole_blocks(rows, self._rows_of[0]))._matmul(block)
        if self._right is not None:
            block = self._right.part(_whole_blocks(cols, self._cols_of[0])).mT._matmul(block.mT).mT
        return block

    def diagonal(self) -> Tensor:
        self._require_square()
        height = max(self._rows_of[0], self._cols_of[0])
        if len({end[0] for end in (self._rows_of, self._cols_of)} - {1}) > 1:
            return _ColumnStructure.diagonal(self)
        parts = []
        with SharedPasses(self._between.shape[-2]) as passes:
            for start, part in self._own_parts(height):
                with passes.over(part.shape[-2]):
                    block = dense_from_tiles(structure(part))
                rows = slice(start, start + part.shape[-2] // self._rows_of[1] * self._rows_of[0])
                parts.append(self._weighed(block, rows, rows).diagonal(dim1=-2, dim2=-1))
        return torch.cat(parts, dim=-1)

    def _own_parts(self, height: int) -> Iterator[tuple[int, LinearOperator]]:
        """Yield what is between for consecutive blocks alone, each with its first row of the product."""
        inner = self._inner
        samples, outputs = getattr(inner, "sample_shape", None) or (0, 0)
        if samples and inner.exact_cost("tiles") > 0:  # a re-iterable is read once
            for some, kernel in inner.sample_parts(max(1, _TILE // outputs)):  # type: ignore[attr-defined]
                yield some.start * (self.shape[-2] // samples), kernel
            return
        blocks = max(1, _TILE // max(height, self._rows_of[1], self._cols_of[1]))
        for rows in tile_slices(self.shape[-2], blocks * height):
            inside = (
                _scaled_slice(_whole_blocks(rows, end[0]), end[1]) for end in (self._rows_of, self._cols_of)
            )
            yield rows.start, self._between[(..., *inside)]

    def exact_cost(self, quantity: str) -> float:
        return self._inner.exact_cost(quantity)


def _whole_blocks(rows: slice, height: int) -> slice:
    return slice(rows.start // height, rows.stop // height)


class _GramStructure(_ProductStructure):
    """Jᵀ D J over the parameters, for a (block) diagonal D or a product of these: in sweeps over rows of J.

    Args:
        operator: The product.
        chain: Its factors, of which the last has rows and the first is its transpose.
        whole: Whether all tiles are wanted.
    """

    def __init__(self, operator: LinearOperator, chain: Chain, whole: bool) -> None:
        super().__init__(operator, chain, whole)
        self._rows = Rows(chain[-1])
        half = len(chain) // 2
        self._second = tuple(reversed(chain[half + len(chain) % 2 : -1]))
        self._first = tuple(factor.mT for factor in chain[1:half])
        self._center = chain[half] if len(chain) % 2 else None
        length = chain[-1].shape[-2]
        self._count = _block_count(*chain[1:-1]) or length

    def _sweep(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield L and R ``(r, P)`` for consecutive rows of J, Σ Lᵀ R being the operator."""
        length = self._chain[-1].shape[-2]
        unit = length // self._count
        for blocks in tile_slices(self._count, max(1, min(self._rows.fit, length) // unit)):
            found = self._rows.take(_scaled_slice(blocks, unit))
            right = left = found
            for factor in self._second:
                right = _blocks_times(factor, blocks, self._count, right)
            if self._even:
                left = right
            else:
                for factor in self._first:
                    left = _blocks_times(factor, blocks, self._count, left)
            if self._center is not None:
                right = _blocks_times(self._center, blocks, self._count, right)
            yield left, right

    def diagonal(self) -> Tensor:
        return sum((left * right).sum(-2) for left, right in self._sweep())  # type: ignore[return-value]

    def tiles(self, size: int | None = None) -> Iterator[Tile]:
        size = size or self.tile_size()
        for rows in tile_slices(self.shape[-2], size):
            start = rows.start if self.symmetric else 0
            slab = torch.zeros(
                (rows.stop - rows.start, self.shape[-1] - start), dtype=self.dtype, device=self.device
            )
            for left, right in self._sweep():
                slab.addmm_(left[:, rows].mT, right[:, start:])
            for cols in tile_slices(self.shape[-1], size):
                if cols.start >= start:
                    yield Tile(rows, cols, slab[:, _shift(cols, start)])

    def tile_size(self) -> int:
        return max(1, min(self._rows.fit, self.shape[-1]))  # a slab is as large as the rows of J beside it

    def exact_cost(self, quantity: str) -> float:
        sweeps = 1 if quantity == "diagonal" else -(-self.shape[-2] // self.tile_size())
        return sweeps * self._rows.passes


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
