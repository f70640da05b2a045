"""What the operators of linear_operator can do, each asked part by part."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property

import torch
from linear_operator.operators import (
    BlockDiagLinearOperator,
    CatLinearOperator,
    ConstantMulLinearOperator,
    DenseLinearOperator,
    DiagLinearOperator,
    LinearOperator,
    SumLinearOperator,
)
from torch import Tensor

from ..engines.passes import report_passes
from ..vectors import Space
from .capabilities import ByColumns, Capabilities, Factors, Tile, capabilities, dense_from_tiles, register

__all__ = ["overlap", "shift"]


@register(Tensor)
@register(DenseLinearOperator)
class _Dense(ByColumns):
    """A dense tensor: everything is there already."""

    is_recordable = True

    def __init__(self, operator: Tensor | DenseLinearOperator) -> None:
        super().__init__(operator)
        self._given = operator if isinstance(operator, Tensor) else operator.tensor
        self._tensor = self._given.detach()

    @cached_property
    def symmetric(self) -> bool:  # type: ignore[override]
        tensor = self._tensor
        if tensor.shape[-2] != tensor.shape[-1]:
            return False
        # Rounding that both triangles of a computed Gram matrix share is no asymmetry.
        allowed = 16 * torch.finfo(self.dtype).eps * float(tensor.abs().max())
        return bool((tensor - tensor.mT).abs().max() <= allowed)

    def diagonal(self) -> Tensor:
        self._require_square()
        return self._tensor.diagonal(dim1=-2, dim2=-1)

    def _tiles(self, size: int | None, *, upper: bool) -> Iterator[Tile]:
        for rows, cols in self._corners(size, upper):
            yield Tile(rows, cols, self._tensor[..., rows, cols])

    def take_columns(self, chosen: Tensor) -> Tensor:
        return self._tensor[..., chosen.to(self.device)]

    def recorded_tile(self, rows: slice, cols: slice) -> Tensor:
        return self._given[..., rows, cols]

    def exact_cost(self, quantity: str) -> float:
        return 0

    def counted_product(self, block: Tensor) -> Tensor:
        batch = torch.broadcast_shapes(self.shape[:-2], block.shape[:-2])
        report_passes(products=batch.numel() * block.shape[-1])
        return self._given @ block


@register(DiagLinearOperator)
class _Diagonal(ByColumns):
    """A diagonal operator."""

    symmetric = is_recordable = True

    def diagonal(self) -> Tensor:
        diagonal: Tensor = self.operator._diagonal()
        return diagonal.detach()

    def _tiles(self, size: int | None, *, upper: bool) -> Iterator[Tile]:
        diagonal = self.diagonal()
        for rows, cols in self._corners(size, upper):
            height, width = rows.stop - rows.start, cols.stop - cols.start
            block = diagonal.new_zeros((*self.shape[:-2], height, width))
            if rows == cols:
                block.diagonal(dim1=-2, dim2=-1).copy_(diagonal[..., rows])
            yield Tile(rows, cols, block)

    def exact_cost(self, quantity: str) -> float:
        return 0

    def counted_product(self, block: Tensor) -> Tensor:
        result: Tensor = self.operator._matmul(block)
        return result

    def recorded_tile(self, rows: slice, cols: slice) -> Tensor:
        full = torch.diag_embed(self.recorded_diagonal(rows))
        return full if rows == cols else full.new_zeros((*full.shape[:-1], cols.stop - cols.start))

    def recorded_diagonal(self, rows: slice) -> Tensor:
        diagonal: Tensor = self.operator._diagonal()
        return diagonal[..., rows]

    def product_cost(self) -> int:
        return 0


class _OfParts(ByColumns):
    """An operator whose products are made of those of its parts."""

    def __init__(self, operator: LinearOperator, parts: Sequence[LinearOperator]) -> None:
        super().__init__(operator)
        self.parts: list[Capabilities] = [capabilities(part) for part in parts]
        self.holds_ours = any(part.holds_ours for part in self.parts)

    def product_cost(self) -> int:
        return sum(part.product_cost() for part in self.parts)

    def cache_cost(self) -> float:
        return sum(part.cache_cost() for part in self.parts)


@register(CatLinearOperator)
class _Stack(_OfParts):
    """Operators below or beside each other."""

    def __init__(self, operator: CatLinearOperator) -> None:
        super().__init__(operator, operator.linear_ops)


@register(SumLinearOperator)
class _Sum(_OfParts):
    """A sum, also of an operator and a diagonal."""

    def __init__(self, operator: SumLinearOperator) -> None:
        super().__init__(operator, operator.linear_ops)

    @property
    def space(self) -> Space:
        own = getattr(self.operator, "space", None)
        if isinstance(own, Space):
            return own
        spaces = (getattr(part, "space", None) for part in self.operator.linear_ops)
        return next((space for space in spaces if isinstance(space, Space)), super().space)

    @cached_property
    def symmetric(self) -> bool:  # type: ignore[override]
        return all(part.symmetric for part in self.parts)

    @property
    def is_recordable(self) -> bool:  # type: ignore[override]
        return all(part.is_recordable for part in self.parts)

    def recorded_tile(self, rows: slice, cols: slice) -> Tensor:
        blocks = [part.recorded_tile(rows, cols) for part in self.parts]
        return sum(blocks[1:], start=blocks[0])

    def recorded_diagonal(self, rows: slice) -> Tensor:
        diagonals = [part.recorded_diagonal(rows) for part in self.parts]
        return sum(diagonals[1:], start=diagonals[0])

    def tile_size(self) -> int:
        return min(part.tile_size() for part in self.parts)

    def diagonal(self) -> Tensor:
        diagonals = [part.diagonal() for part in self.parts]  # type: ignore[attr-defined]
        return sum(diagonals[1:], start=diagonals[0])

    def _tiles(self, size: int | None, *, upper: bool) -> Iterator[Tile]:
        size = size or self.tile_size()
        groups = (part.tiles(size) if upper else part.all_tiles(size) for part in self.parts)
        for group in zip(*groups, strict=True):
            blocks = [tile.block for tile in group]
            yield Tile(group[0].rows, group[0].cols, sum(blocks[1:], start=blocks[0]))

    def exact_cost(self, quantity: str) -> float:
        # Of a part that is symmetric where the sum is not, the lower triangle is made, too.
        both = quantity == "tiles" and not self.symmetric
        return sum(part.exact_cost(quantity) * (2 if both and part.symmetric else 1) for part in self.parts)

    def take_columns(self, chosen: Tensor) -> Tensor:
        columns = [part.take_columns(chosen) for part in self.parts]
        return sum(columns[1:], start=columns[0])

    def counted_product(self, block: Tensor) -> Tensor:
        products = [part.counted_product(block) for part in self.parts]
        return sum(products[1:], start=products[0])


class _OfBase(_OfParts):
    """An operator that is made of one other."""

    def __init__(self, operator: ConstantMulLinearOperator | BlockDiagLinearOperator) -> None:
        super().__init__(operator, [operator.base_linear_op])
        (self._base,) = self.parts

    @property
    def symmetric(self) -> bool:  # type: ignore[override]
        return self._base.symmetric

    def exact_cost(self, quantity: str) -> float:
        return self._base.exact_cost(quantity)


@register(ConstantMulLinearOperator)
class _Multiple(_OfBase):
    """A constant multiple; the constant may differ along the batch."""

    def __init__(self, operator: ConstantMulLinearOperator) -> None:
        super().__init__(operator)
        constant = operator._constant.detach()
        self._constant = constant.reshape(()) if constant.numel() == 1 else constant

    @property
    def space(self) -> Space:
        own = getattr(self.operator, "space", None)
        return own if isinstance(own, Space) else self._base.space

    def tile_size(self) -> int:
        return self._base.tile_size()

    @property
    def is_recordable(self) -> bool:  # type: ignore[override]
        return self._base.is_recordable

    def recorded_tile(self, rows: slice, cols: slice) -> Tensor:
        constant: Tensor = self.operator.expanded_constant
        return constant * self._base.recorded_tile(rows, cols)

    def recorded_diagonal(self, rows: slice) -> Tensor:
        constant: Tensor = self.operator._constant
        return (constant.unsqueeze(-1) if constant.dim() else constant) * self._base.recorded_diagonal(rows)

    def diagonal(self) -> Tensor:
        diagonal: Tensor = self._base.diagonal()  # type: ignore[attr-defined]
        return self._constant.unsqueeze(-1) * diagonal

    def _tiles(self, size: int | None, *, upper: bool) -> Iterator[Tile]:
        for tile in self._base.tiles(size) if upper else self._base.all_tiles(size):
            yield Tile(tile.rows, tile.cols, self._constant[..., None, None] * tile.block)

    def factors(self) -> Factors | None:
        found = self._base.factors()
        if found is None or bool((self._constant < 0).any()):
            return None
        left, right = (ConstantMulLinearOperator(factor, self._constant.sqrt()) for factor in found)
        return left, right

    def take_columns(self, chosen: Tensor) -> Tensor:
        constant: Tensor = self.operator.expanded_constant
        return constant * self._base.take_columns(chosen)

    def counted_product(self, block: Tensor) -> Tensor:
        constant: Tensor = self.operator.expanded_constant
        return constant * self._base.counted_product(block)


@register(BlockDiagLinearOperator)
class _Blocks(_OfBase):
    """Square blocks along the diagonal: the last batch dimension of a base operator."""

    def diagonal(self) -> Tensor:
        diagonal: Tensor = self._base.diagonal()  # type: ignore[attr-defined]
        return diagonal.flatten(-2)

    def _tiles(self, size: int | None, *, upper: bool) -> Iterator[Tile]:
        base = self.operator.base_linear_op
        length = base.shape[-1]
        for rows, cols in self._corners(size, upper):
            height, width = rows.stop - rows.start, cols.stop - cols.start
            block = torch.zeros((*self.shape[:-2], height, width), dtype=self.dtype, device=self.device)
            for number in range(rows.start // length, (rows.stop - 1) // length + 1):
                inside = slice(number * length, (number + 1) * length)
                row_part, col_part = overlap(rows, inside), overlap(cols, inside)
                if row_part.start < row_part.stop and col_part.start < col_part.stop:
                    part = base[..., number, shift(row_part, inside.start), shift(col_part, inside.start)]
                    target = block[..., shift(row_part, rows.start), shift(col_part, cols.start)]
                    target.copy_(dense_from_tiles(part))
            yield Tile(rows, cols, block)

    def counted_product(self, block: Tensor) -> Tensor:
        base = self.operator.base_linear_op
        split = block.unflatten(-2, (base.shape[-3], base.shape[-1]))
        return self._base.counted_product(split).flatten(-3, -2)


def overlap(first: slice, second: slice) -> slice:
    """Return what two slices have in common; it may be empty."""
    return slice(max(first.start, second.start), min(first.stop, second.stop))


def shift(part: slice, start: int) -> slice:
    """Return a slice as it is counted from a start on."""
    return slice(part.start - start, part.stop - start)
