"""What products of operators can do, by the factors that they are made of."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from linear_operator.operators import (
    CatLinearOperator,
    DenseLinearOperator,
    DiagLinearOperator,
    LinearOperator,
    MatmulLinearOperator,
    RootLinearOperator,
)
from torch import Tensor

from ..engines.passes import SharedPasses
from .algebra import unscaled
from .axes import AxisReader, ParameterAxis, StateAxis
from .block_diagonal import BlockDiagonal
from .capabilities import (
    TILE,
    ByColumns,
    Capabilities,
    Factors,
    Tile,
    capabilities,
    dense_from_tiles,
    multiply,
    register,
    tile_slices,
)
from .chain import Chain, is_symmetric_chain, multiplied, product_factors, same_operator
from .foreign import overlap, shift
from .jacobian import JacobianOperator, jacobian_rows

__all__ = ["Rows"]


@register(MatmulLinearOperator)
@register(RootLinearOperator)
def _of_product(operator: MatmulLinearOperator | RootLinearOperator) -> Capabilities:
    """Return what a product can do by its factors: diagonals at the ends scale what is between them."""
    chain = product_factors(operator)
    if len(chain) == 1:
        found: Capabilities = capabilities(chain[0])
        return found
    if isinstance(chain[0], DiagLinearOperator) or isinstance(chain[-1], DiagLinearOperator):
        return _ScaledProduct(operator, chain)
    if isinstance(chain[0], BlockDiagonal) or isinstance(chain[-1], BlockDiagonal):
        return _BlockProduct(operator, chain)
    # Jᵀ D J is P x P, and its ends are columns of J, which no engine has: rows of J are gone through instead.
    rows_alone = operator.dim() == 2 and _has_rows(chain[-1]) and not _has_rows(chain[0])
    if rows_alone and _block_count(*chain[1:-1]) is not None and same_operator(chain[0].mT, chain[-1]):
        return _ParameterGram(operator, chain)
    return _Product(operator, chain)


@register(JacobianOperator)
class _Jacobian(ByColumns):
    """J or its transpose: an engine of ours makes and counts its products."""

    holds_ours = True

    def counted_product(self, block: Tensor) -> Tensor:
        result: Tensor = self.operator._matmul(block)
        return result

    is_recordable = True

    def take_columns(self, chosen: Tensor) -> Tensor:
        found: Tensor = self.operator.take_columns(chosen)
        return found

    def recorded_tile(self, rows: slice, cols: slice) -> Tensor:
        found: Tensor = self.operator.recorded_tile(rows, cols)
        return found

    def product_cost(self) -> int:
        cost: int = self.operator.product_cost()
        return cost

    def cache_cost(self) -> float:
        cost: float = self.operator.cache_cost()
        return cost


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
    """Return the rows of some blocks of a size."""
    return slice(blocks.start * size, blocks.stop * size)


class _OfFactors(ByColumns):
    """A product, with the chain of its factors, two or more; these make its own products."""

    def __init__(self, operator: LinearOperator, chain: Chain) -> None:
        super().__init__(operator)
        self._chain = chain
        # What linear_operator multiplies with: R Rᵀ has its root on both sides.
        root = isinstance(operator, RootLinearOperator)
        sides = 2 * (operator.root,) if root else (operator.left_linear_op, operator.right_linear_op)
        self._sides = [found for found in map(capabilities, sides) if found.holds_ours]
        self.holds_ours = bool(self._sides)

    def product_cost(self) -> int:
        return sum(side.product_cost() for side in self._sides) or super().product_cost()

    def cache_cost(self) -> float:
        return sum(side.cache_cost() for side in self._sides)


class _Product(_OfFactors):
    """A product A M Bᵀ: by dense rows of A and B where these are known, by columns where they are not."""

    def __init__(self, operator: LinearOperator, chain: Chain) -> None:
        super().__init__(operator, chain)
        half = len(chain) // 2
        self._middle = capabilities(chain[half]) if len(chain) % 2 else None
        self._even = is_symmetric_chain(chain, self._middle is not None and self._middle.symmetric)
        self.symmetric = self._even
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
            parts.append((left * self._inside(right).mT).sum(-1))  # a_i · M b_i, (*batch, r)
        return torch.cat(parts, dim=-1)

    def _tiles(self, size: int | None, *, upper: bool) -> Iterator[Tile]:
        if self._ends is None:
            yield from super()._tiles(size, upper=upper)
            return
        size = size or self.tile_size()
        for rows in tile_slices(self.shape[-2], size):
            left = self._ends[0].take(rows)
            for cols in tile_slices(self.shape[-1], size):
                if cols.start >= rows.start or not upper:
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
        inside = sum(capabilities(factor).product_cost() for factor in self._chain[1:-1])
        if quantity == "diagonal":
            return left + (0 if self._even else right) + self.shape[-1] * inside
        # Rows of the left end are made once, those of the right end for each row of tiles: b times all of
        # them, or, above the diagonal of b x b tiles, b (b + 1) / 2 tiles of 1 / b each.
        steps = -(-self.shape[-2] // self.tile_size())
        share = (steps + 1) / 2 if self.symmetric else steps
        # Of a symmetric one the tile on the diagonal takes the rows that are there.
        return left + (share - 1 if self._even else share) * right + share * self.shape[-1] * inside

    def factors(self) -> Factors | None:
        # A symmetric product has equal factors or none: where its middle has no known root, there are none.
        chain, half = self._chain, len(self._chain) // 2
        if not self._even:
            return multiplied(chain[:1]), multiplied(chain[1:]).mT
        if self._middle is None:  # an even chain A Aᵀ
            root = multiplied(chain[:half])
            return root, root
        inner = _root_of(chain[half], self._middle)  # A M Aᵀ = (A L)(A L)ᵀ for M = L Lᵀ
        if inner is None:
            return None
        root = multiplied((*chain[:half], inner))
        return root, root


def _root_of(operator: LinearOperator, known: Capabilities) -> LinearOperator | None:
    """Return L with L Lᵀ the operator, or None where none is known."""
    if isinstance(operator, DiagLinearOperator):
        entries = operator._diagonal()
        return DiagLinearOperator(entries.sqrt()) if bool((entries >= 0).all()) else None
    found = known.factors()
    return None if found is None else found[0]


class Rows:
    """Dense rows of an operator that has them: stored ones, per-sample gradients, and stacks of these.

    Attributes:
        passes: Passes that all rows take.
        fit: Rows that one tile may have.
    """

    def __init__(self, operator: LinearOperator) -> None:
        operator, self._factor = unscaled(operator)
        self._operator = operator
        self.passes, self.fit = 0.0, TILE
        self._parts: list[tuple[int, Rows]] = []  # first row, rows
        if isinstance(operator, CatLinearOperator):
            start = 0
            for part in operator.linear_ops:
                self._parts.append((start, Rows(part)))
                start += part.shape[-2]
            self.passes = sum(rows.passes for _, rows in self._parts)
            self.fit = min(rows.fit for _, rows in self._parts)
        if isinstance(operator, JacobianOperator):
            axis, engine = operator._state_axis(), operator._core.engine
            self._reader = AxisReader(axis)
            self.passes = float(axis.num_distinct)
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
        found = self._rows(rows)
        return found if self._factor == 1 else self._factor * found

    def _rows(self, rows: slice) -> Tensor:
        """Return some rows before they are multiplied by a number."""
        operator = self._operator
        if self._parts:
            own = [
                (overlap(rows, slice(start, start + part._operator.shape[-2])), start, part)
                for start, part in self._parts
            ]
            return torch.cat(
                [part.take(shift(some, start)) for some, start, part in own if some.start < some.stop],
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
    """Whether `Rows` can be made of an operator: not of Jᵀ, whose rows are columns of J."""
    operator, _ = unscaled(operator)
    if isinstance(operator, CatLinearOperator):
        return operator.cat_dim == -2 and all(map(_has_rows, operator.linear_ops))
    jacobian = isinstance(operator, JacobianOperator) and isinstance(operator._core.rows, StateAxis)
    return jacobian or isinstance(operator, DenseLinearOperator)


class _ScaledProduct(_OfFactors):
    """A product with a diagonal at one end or both: rows and columns of what is between them, scaled."""

    def __init__(self, operator: LinearOperator, chain: Chain) -> None:
        super().__init__(operator, chain)
        first, last = (isinstance(end, DiagLinearOperator) for end in (chain[0], chain[-1]))
        last = last and len(chain) > 1 + first  # of two diagonals something stands in between
        self._inner_chain = chain[int(first) : len(chain) - int(last)]
        self._rows: Tensor | None = chain[0]._diagonal().detach() if first else None
        self._cols: Tensor | None = chain[-1]._diagonal().detach() if last else None
        inner = multiplied(self._inner_chain)
        self._inner = capabilities(inner)
        both = self._rows is not None and self._cols is not None
        self.symmetric = both and self._inner.symmetric and same_operator(self._rows, self._cols)

    def tile_size(self) -> int:
        return self._inner.tile_size()

    def exact_cost(self, quantity: str) -> float:
        return _cost_inside(self, self._inner, quantity)

    def _scaled(self, block: Tensor, rows: slice, cols: slice) -> Tensor:
        """Return d_i B_ij e_j for a block B of what is between."""
        if self._rows is not None:
            block = self._rows[..., rows].unsqueeze(-1) * block
        return block if self._cols is None else block * self._cols[..., cols].unsqueeze(-2)

    def diagonal(self) -> Tensor:
        self._require_square()
        values = self._inner.diagonal()
        for entries in (self._rows, self._cols):
            values = values if entries is None else entries * values
        return values

    def _tiles(self, size: int | None, *, upper: bool) -> Iterator[Tile]:
        for tile in self._inner.tiles(size) if upper else self._inner.all_tiles(size):
            yield Tile(tile.rows, tile.cols, self._scaled(tile.block, tile.rows, tile.cols))

    def factors(self) -> Factors | None:
        found = self._inner.factors()  # D L (E R)ᵀ for D L Rᵀ E
        if found is None:
            return None if self.symmetric else (self._chain[0], multiplied(self._chain[1:]).mT)
        left, right = found
        if self._rows is not None:
            left = MatmulLinearOperator(DiagLinearOperator(self._rows), left)
        if self.symmetric:
            return left, left
        if self._cols is not None:
            right = MatmulLinearOperator(DiagLinearOperator(self._cols), right)
        return left, right


class _BlockProduct(_Product):
    """A product S K Tᵀ, S or T or both block diagonal: tiles of K, times the blocks that they meet."""

    def __init__(self, operator: LinearOperator, chain: Chain) -> None:
        super().__init__(operator, chain)
        # S of B blocks (h, w) makes rows [h b, h (b + 1)) of the product of rows [w b, w (b + 1)) of K alone.
        first, last = chain[0], chain[-1]
        self._left = first if isinstance(first, BlockDiagonal) else None
        both = len(chain) > 2 or self._left is None
        self._right = last if both and isinstance(last, BlockDiagonal) else None
        start, stop = int(self._left is not None), len(chain) - int(self._right is not None)
        self._between = multiplied(chain[start:stop])
        self._inner = capabilities(self._between)
        # Rows of a block, and columns: of the product, and of what is between.
        self._rows_of = (1, 1) if self._left is None else self._left.block_shape
        self._cols_of = (1, 1) if self._right is None else self._right.block_shape[::-1]

    def _step(self) -> tuple[int, int] | None:
        """Return rows of the product, and of what is between, that tiles of whole blocks are multiples of."""
        # Tiles are square, of `size` rows and columns: both ends have to make the same of them, and where
        # there is one end alone its blocks are square.
        ends = [self._rows_of] * (self._left is not None) + [self._cols_of] * (self._right is not None)
        same = all(end == ends[0] for end in ends)
        even = len(ends) == 2 or ends[0][0] == ends[0][1]
        return ends[0] if same and even and (not self.symmetric or self._inner.symmetric) else None

    def tile_size(self) -> int:
        step = self._step()
        if step is None:
            return super().tile_size()
        return max(1, min(self._inner.tile_size(), max(self._between.shape[-2:])) // step[1]) * step[0]

    def _tiles(self, size: int | None, *, upper: bool) -> Iterator[Tile]:
        size, step = size or self.tile_size(), self._step()
        if step is None or size % step[0]:
            yield from self._cut(size, upper)
            return
        outer, inner = step
        size = size // outer * inner
        for tile in self._inner.tiles(size) if upper else self._inner.all_tiles(size):
            rows, cols = (  # where there are no blocks rows need be no multiple of theirs
                part if end is None else slice(part.start // inner * outer, part.stop // inner * outer)
                for part, end in ((tile.rows, self._left), (tile.cols, self._right))
            )
            yield Tile(rows, cols, self._weighed(tile.block, rows, cols))

    def _cut(self, size: int, upper: bool) -> Iterator[Tile]:
        """Yield tiles that part blocks, from all columns of the blocks that have some of their rows."""
        everything = slice(0, self.shape[-1])
        for rows in tile_slices(self.shape[-2], size):
            height, inside = self._rows_of
            blocks = slice(rows.start // height, -(-rows.stop // height))
            part = self._between[..., _scaled_slice(blocks, inside), :]
            around = _scaled_slice(blocks, height)
            block_row = self._weighed(dense_from_tiles(part), around, everything)
            block_row = block_row[..., shift(rows, around.start), :]
            for cols in tile_slices(self.shape[-1], size):
                if cols.start >= rows.start or not upper:
                    yield Tile(rows, cols, block_row[..., cols])

    def _weighed(self, block: Tensor, rows: slice, cols: slice) -> Tensor:
        """Return a block of what is between, times the blocks of the ends that it meets."""
        if self._left is not None:
            block = self._left.part(_whole_blocks(rows, self._rows_of[0]))._matmul(block)
        if self._right is not None:
            block = self._right.part(_whole_blocks(cols, self._cols_of[0])).mT._matmul(block.mT).mT
        return block

    def diagonal(self) -> Tensor:
        self._require_square()
        # Entry i is in block i // h of both ends, of one height; of two heights products give the diagonal.
        height = max(self._rows_of[0], self._cols_of[0])
        if len({end[0] for end in (self._rows_of, self._cols_of)} - {1}) > 1:
            return ByColumns.diagonal(self)
        parts = []
        with SharedPasses(self._between.shape[-2]) as passes:
            for start, part in self._own_parts(height):
                with passes.over(part.shape[-2]):
                    block = dense_from_tiles(part)
                rows = slice(start, start + part.shape[-2] // self._rows_of[1] * self._rows_of[0])
                parts.append(self._weighed(block, rows, rows).diagonal(dim1=-2, dim2=-1))
        return torch.cat(parts, dim=-1)

    def _own_parts(self, height: int) -> Iterator[tuple[int, LinearOperator]]:
        """Yield what is between for consecutive blocks alone, each with its first row of the product."""
        inner = self._inner
        samples, outputs = inner.sample_shape or (0, 0)
        if samples and inner.exact_cost("tiles") > 0:  # a re-iterable is read once
            for some, kernel in inner.sample_parts(max(1, TILE // outputs)):
                yield some.start * (self.shape[-2] // samples), kernel
            return
        blocks = max(1, TILE // max(height, self._rows_of[1], self._cols_of[1]))
        for rows in tile_slices(self.shape[-2], blocks * height):
            inside = (
                _scaled_slice(_whole_blocks(rows, end[0]), end[1]) for end in (self._rows_of, self._cols_of)
            )
            yield rows.start, self._between[(..., *inside)]

    def exact_cost(self, quantity: str) -> float:
        return _cost_inside(self, self._inner, quantity)


def _cost_inside(outer: Capabilities, inner: Capabilities, quantity: str) -> float:
    """Return what a quantity of a product costs that is read off what stands between its ends."""
    # Where that is symmetric and the product is not, its lower triangle is made, too.
    both = quantity == "tiles" and inner.symmetric and not outer.symmetric
    return inner.exact_cost(quantity) * (2 if both else 1)


def _whole_blocks(rows: slice, height: int) -> slice:
    """Return the blocks of a height that some rows, a whole number of blocks, are."""
    return slice(rows.start // height, rows.stop // height)


class _ParameterGram(_Product):
    """Jᵀ D J over the parameters, D (block) diagonal or a product of such: in sweeps over rows of J."""

    def __init__(self, operator: LinearOperator, chain: Chain) -> None:
        super().__init__(operator, chain)
        self._rows = Rows(chain[-1])
        # Jᵀ A₁ ... A_h C B_h ... B₁ J = Σ_b L_bᵀ R_b over blocks b of rows, with L_b = A_hᵀ ... A₁ᵀ J_b and
        # R_b = C B_h ... B₁ J_b: every factor maps rows of a block to rows of the same block.
        half = len(chain) // 2
        self._second = tuple(reversed(chain[half + len(chain) % 2 : -1]))
        self._first = tuple(factor.mT for factor in chain[1:half])
        self._center = chain[half] if len(chain) % 2 else None
        length = chain[-1].shape[-2]  # diagonals alone: every row is a block
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

    def _tiles(self, size: int | None, *, upper: bool) -> Iterator[Tile]:
        # The sum over samples is inside each tile: a row of tiles takes a sweep, and stays in memory whole.
        size = size or self.tile_size()
        for rows in tile_slices(self.shape[-2], size):
            start = rows.start if upper else 0
            block_row = torch.zeros(
                (rows.stop - rows.start, self.shape[-1] - start), dtype=self.dtype, device=self.device
            )
            for left, right in self._sweep():
                block_row.addmm_(left[:, rows].mT, right[:, start:])
            for cols in tile_slices(self.shape[-1], size):
                if cols.start >= start:
                    yield Tile(rows, cols, block_row[:, shift(cols, start)])

    def tile_size(self) -> int:
        return max(1, min(self._rows.fit, self.shape[-1]))  # beside rows of J

    def exact_cost(self, quantity: str) -> float:
        sweeps = 1 if quantity == "diagonal" else -(-self.shape[-2] // self.tile_size())
        return sweeps * self._rows.passes
