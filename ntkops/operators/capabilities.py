"""What an operator can do beyond products, under one name: diagonal, tiles, factors, counted products, costs.

Estimators and solvers ask `capabilities` and never look at the kind of an operator. Operators of ours answer
themselves. A kind of linear_operator has one line in a table (`foreign`, `product_tiles`): sums, multiples
and block diagonals answer by asking their parts, so that K + ridge is as exact as K. An operator that offers
nothing is multiplied with blocks of the identity, and every column is counted.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import singledispatch
from typing import Any

import torch
from linear_operator.operators import LinearOperator
from torch import Tensor

from ..engines import count_passes
from ..engines.passes import report_passes
from ..errors import InputError, NonFiniteError, OutOfRangeError, ShapeError
from ..model.context import full_precision
from ..vectors import Space

__all__ = [
    "ByColumns",
    "Capabilities",
    "Factors",
    "Tile",
    "capabilities",
    "dense_bytes_allowed",
    "dense_from_tiles",
    "fits_dense",
    "by_unit_columns",
    "multiply",
    "paired_tiles",
    "register",
    "taken_columns",
    "tile_corners",
    "tile_count",
    "tile_slices",
]

Factors = tuple[LinearOperator, LinearOperator]
TILE = 512  # rows of a tile where nothing says otherwise: 2 MiB in float64


@dataclass(frozen=True, eq=False)
class Tile:
    """A dense block of an operator.

    Attributes:
        rows: Rows of the operator, a slice with start and stop.
        cols: Columns of the operator, a slice with start and stop.
        block: ``(*batch, r, c)``.
    """

    rows: slice
    cols: slice
    block: Tensor


class Capabilities:
    """What may be asked of an operator K, ``(*batch, n, m)``; an operator of ours inherits it.

    `shape`, `dtype`, `device`, `diagonal` and `tiles` are the operator's own; what stands here holds where a
    kind has nothing better to say.

    Attributes:
        symmetric: Whether K equals its transpose; `tiles` then leaves the lower triangle out, and
            `factors`, where there are any, are equal.
        is_coupled: Whether its samples are coupled, so that a pass is one over all of them.
        of_samples: Whether its rows are states of samples, for which estimators have ways of their own.
        sample_shape: Samples and outputs, where the rows are all outputs of all samples; else None.
        layered: Whether layer structure covers all parameters: a per-sample pass costs a backward pass then.
        holds_ours: Whether an operator of ours, which counts its own passes, is inside.
        is_recordable: Whether dense parts can be made with their graph.
    """

    symmetric: bool = False
    holds_ours: bool = True
    is_recordable: bool = False
    is_coupled: bool = False
    of_samples: bool = False
    sample_shape: tuple[int, int] | None = None
    layered: bool = False

    @property
    def pushes(self) -> bool:
        """Whether products with J exist; not so where a model has no mode of differentiation but Jᵀ."""
        return True

    @property
    def space(self) -> Space:
        """The space of the rows."""
        own: Any = self
        return Space(own.shape[-2], own.dtype, own.device)

    @property
    def domain(self) -> Space:
        """The space of the columns: of the vectors that K multiplies."""
        own: Any = self
        return self.space if own.shape[-2] == own.shape[-1] else capabilities(own.mT).space

    # dense parts

    def tile_size(self) -> int:
        """Return the length of the slices that `tiles` cuts by itself."""
        return TILE

    def tiles(self, size: int | None = None) -> Iterator[Tile]:
        """Yield dense tiles over slices of length ``size``, row after row.

        Of a symmetric operator only those on and above the diagonal, or, over several ranks, their mirror
        images: one off the diagonal stands for two.
        """
        raise NotImplementedError

    def tiles_after(self, size: int, skip: int) -> Iterator[Tile]:
        """Yield what `tiles` yields after the first ``skip`` tiles."""
        return itertools.islice(self.tiles(size), skip, None)

    def all_tiles(self, size: int | None = None) -> Iterator[Tile]:
        """Yield the tiles of both triangles, row after row."""
        own: Any = self
        size = size or self.tile_size()
        if not self.symmetric or size >= own.shape[-1]:  # a single tile has no lower triangle to add
            yield from self.tiles(size)
            return
        for rows in tile_slices(own.shape[-2], size):
            for tile in capabilities(own[..., rows, :]).tiles(size):
                yield Tile(rows, tile.cols, tile.block)

    def take_columns(self, chosen: Tensor) -> Tensor:
        """Return dense columns ``(*batch, n, b)``, given ``(b,)`` numbers: products with unit columns."""
        return by_unit_columns(self, chosen)

    def diagonal_step(self) -> int:
        """Return the samples of the parts in which a diagonal is made; the rows where there are no parts."""
        own: Any = self
        return int(own.shape[-2])

    def diagonal_parts(self, size: int, first: int = 0) -> Iterator[tuple[slice, Tensor]]:
        """Yield the exact diagonal in parts ``(*batch, k)``, each with its rows.

        Args:
            size: Samples of a part, for a kernel of ours; anything else has one part.
            first: Number of rows, a whole number of parts, that are left out.
        """
        own: Any = self
        if first == 0:
            yield slice(0, own.shape[-2]), own.diagonal()

    def recorded_tile(self, rows: slice, cols: slice) -> Tensor:
        """Return a dense block ``(*batch, r, c)`` with its graph, where the operator is recordable."""
        raise NotImplementedError

    def recorded_diagonal(self, rows: slice) -> Tensor:
        """Return a part of the diagonal ``(*batch, r)`` with its graph."""
        return self.recorded_tile(rows, rows).diagonal(dim1=-2, dim2=-1)

    def exact_cost(self, quantity: str) -> float:
        """Return the passes that the exact "diagonal" or all "tiles" take, products of tiles included."""
        raise NotImplementedError

    # factors

    def factors(self) -> Factors | None:
        """Return L and R with K = L Rᵀ, ``(*batch, n, p)`` and ``(*batch, m, p)``, or None."""
        return None

    def sample_gram(self, cotangents: Tensor) -> Tensor | None:
        """Return the Gram matrix of per-sample gradients, or None where there are no samples."""
        return None

    def output_traced(self, outputs: Tensor) -> LinearOperator | None:
        """Return the operator summed over some outputs of each sample, or None where there are no samples."""
        return None

    # products

    def counted_product(self, block: Tensor) -> Tensor:
        """Return K V for ``(*batch, m, k)``; engines of ours count what they do."""
        own: Any = self
        result: Tensor = own._matmul(block)
        return result

    def product_cost(self) -> int:
        """Return the passes that one column of a product takes: what `multiply` will count."""
        own: Any = self
        found = self.factors()
        return sum(capabilities(factor).product_cost() for factor in found) if found else _batch(own)

    def cache_cost(self) -> float:
        """Return the most passes that caches may take once, which make products faster."""
        return max((capabilities(factor).cache_cost() for factor in self.factors() or ()), default=0.0)


class ByColumns(Capabilities):
    """An operator that is not ours: products with blocks of the identity, nothing assumed."""

    holds_ours = False

    def __init__(self, operator: Any) -> None:
        self.operator = operator
        self.shape: torch.Size = operator.shape
        self.dtype: torch.dtype = operator.dtype
        self.device = torch.device(operator.device or "cpu")  # an identity may have none

    @property
    def space(self) -> Space:
        """The space of the rows: the operator's own, or a local one."""
        own = getattr(self.operator, "space", None)
        return own if isinstance(own, Space) else Space(self.shape[-2], self.dtype, self.device)

    @property
    def domain(self) -> Space:
        """The space of the columns."""
        own = getattr(self.operator, "domain", None)
        if isinstance(own, Space):
            return own
        square = self.shape[-2] == self.shape[-1]
        return self.space if square else capabilities(self.operator.mT).space

    def diagonal(self) -> Tensor:
        """Return the exact diagonal, ``(*batch, n)``."""
        self._require_square()
        parts = []
        # Products give whole columns, n entries for each one that is wanted: nothing less is known of K.
        for cols in tile_slices(self.shape[-1], self.tile_size()):
            columns = multiply(self.operator, self._identity(self.shape[-1], cols))
            parts.append(columns[..., cols, :].diagonal(dim1=-2, dim2=-1))
        return torch.cat(parts, dim=-1)

    def tiles(self, size: int | None = None) -> Iterator[Tile]:
        """Yield tiles, those below the diagonal of a symmetric operator left out."""
        return self._tiles(size, upper=self.symmetric)

    def all_tiles(self, size: int | None = None) -> Iterator[Tile]:
        """Yield the tiles of both triangles."""
        return self._tiles(size, upper=False)

    def _tiles(self, size: int | None, *, upper: bool) -> Iterator[Tile]:
        """Yield tiles, row after row; ``upper``: those below the diagonal left out."""
        # A row of tiles is m x r of Kᵀ I; where all columns fit into one tile, K I of n x m makes all rows.
        size = size or self.tile_size()
        narrow = self.shape[-1] <= size
        columns = multiply(self.operator, self._identity(self.shape[-1])) if narrow else None
        for rows in tile_slices(self.shape[-2], size):
            block = self._dense_rows(rows) if columns is None else columns[..., rows, :]
            for cols in tile_slices(self.shape[-1], size):
                if cols.start >= rows.start or not upper:
                    yield Tile(rows, cols, block[..., cols])

    def _corners(self, size: int | None, upper: bool) -> Iterator[tuple[slice, slice]]:
        """Yield rows and columns of the tiles; of this size, where none is given."""
        return tile_corners(self.shape, size or self.tile_size(), upper=upper)

    def _dense_rows(self, rows: slice) -> Tensor:
        """Return dense rows, columns of the transpose."""
        return multiply(self.operator.mT, self._identity(self.shape[-2], rows)).mT

    def _identity(self, length: int, cols: slice | None = None) -> Tensor:
        """Return columns of the identity, ``(*batch, length, c)``; None for all."""
        cols = slice(0, length) if cols is None else cols
        width = cols.stop - cols.start
        block = torch.zeros((length, width), dtype=self.dtype, device=self.device)
        block[cols].diagonal().fill_(1)
        return block.expand(*self.shape[:-2], length, width)

    def exact_cost(self, quantity: str) -> float:
        """Return the passes of the columns, or rows, that are made."""
        narrow = quantity == "diagonal" or self.shape[-1] <= self.tile_size()
        return self.shape[-1 if narrow else -2] * self.product_cost()

    def counted_product(self, block: Tensor) -> Tensor:
        """Return K V; columns are counted where nothing inside has counted passes."""
        # An operator of ours that is hidden inside reports its own passes; these are not counted again.
        with count_passes() as counter:
            result: Tensor = self.operator._matmul(block)
        if counter.total == 0:
            batch = torch.broadcast_shapes(self.shape[:-2], block.shape[:-2])
            report_passes(products=batch.numel() * block.shape[-1])
        return result

    def product_cost(self) -> int:
        """Return one pass for each batch entry."""
        return _batch(self.operator)

    def cache_cost(self) -> float:
        """Return none."""
        return 0.0

    def _require_square(self) -> None:
        """Raise where there is no diagonal."""
        if self.shape[-2] != self.shape[-1]:
            raise ShapeError(f"only a square operator has a diagonal, this one is {tuple(self.shape)}")


def _batch(operator: Any) -> int:
    """Return the number of members of an operator's batch, 1 where it has none."""
    return int(operator.shape[:-2].numel())


_kind = singledispatch(ByColumns)
register = _kind.register  # a further kind is one function, from an operator to its capabilities


def capabilities(operator: LinearOperator | Tensor | Capabilities) -> Any:
    """Return what an operator can do beyond products, as `Capabilities` says.

    Args:
        operator: One of ours, which is returned itself; a dense tensor ``(*batch, n, m)``; or any
            LinearOperator, which is never made dense.

    Returns:
        Its `Capabilities`. Making them costs nothing.

    Example:
        >>> import torch
        >>> from linear_operator.operators import DenseLinearOperator
        >>> from ntkops.operators.capabilities import capabilities
        >>> K = DenseLinearOperator(torch.ones(3, 3)).add_jitter(1.0)
        >>> capabilities(K).diagonal().tolist(), capabilities(K).exact_cost("tiles")
        ([2.0, 2.0, 2.0], 0)
    """
    return operator if isinstance(operator, Capabilities) else _kind(operator)


def multiply(operator: LinearOperator | Tensor | Capabilities, block: Tensor) -> Tensor:
    """Return ``operator @ block`` without a graph, its passes counted and its entries checked.

    Our engines report the passes that they make; columns that another operator or a dense tensor multiplies
    are reported here, once, wherever it stands inside a sum or a multiple.

    Args:
        operator: ``(*batch, n, m)``.
        block: ``(*batch, m, k)``.

    Returns:
        ``(*batch, n, k)``.

    Raises:
        NonFiniteError: If the product is not finite.
    """
    with torch.no_grad(), full_precision(block.device):  # autocast takes no digits
        result: Tensor = capabilities(operator).counted_product(block)
    if not bool(torch.isfinite(result).all()):
        column = int((~torch.isfinite(result)).flatten(0, -2).any(0).nonzero()[0])
        own: Any = getattr(operator, "operator", operator)
        raise NonFiniteError(
            f"the product of a {tuple(own.shape)} operator ({type(own).__name__}) with column "
            f"{column} holds NaN or infinity: entries of the operator do, or they overflow {own.dtype}"
        )
    return result


def taken_columns(operator: LinearOperator | Tensor, chosen: Tensor) -> Tensor:
    """Return dense columns of an operator, without a graph.

    A product with unit columns makes what a product with any columns makes: gradients of all samples for each
    of them, or factors that pay for many. The columns themselves are a block between all rows and a few.

    Args:
        operator: ``(*batch, n, m)``.
        chosen: ``(b,)`` numbers of columns, int64; over several ranks those of the whole operator, the same
            on all of them.

    Returns:
        ``(*batch, n, b)``; over several ranks this rank's rows. Cost: of a network's kernel the block, one
        per-sample pass for each output; of a projected one b dot products a row; of what knows no entries b
        products.

    Raises:
        NonFiniteError: If an entry is not finite.
        OutOfRangeError: If rows lie on several ranks, and a column does not exist.
    """
    source = capabilities(operator)
    space, size = source.space, source.domain.size
    if space.is_spread and len(chosen) and not 0 <= int(chosen.min()) <= int(chosen.max()) < size:
        raise OutOfRangeError(f"columns of all ranks are counted from 0 to {size - 1}, got {chosen.tolist()}")
    with torch.no_grad():
        found: Tensor = source.take_columns(chosen)

    def check() -> None:
        finite = torch.isfinite(found)
        if not bool(finite.all()):
            column = int((~finite).flatten(0, -2).any(0).nonzero()[0])
            raise NonFiniteError(
                f"column {int(chosen[column])} of a {tuple(operator.shape)} operator "
                f"({type(operator).__name__}) holds NaN or infinity"
            )

    space.together(check, "columns of the kernel")
    return found


def by_unit_columns(operator: Any, chosen: Tensor) -> Tensor:
    """Return the product of an operator with some unit columns."""
    domain = capabilities(operator).domain
    unit = torch.zeros((operator.shape[-1], len(chosen)), dtype=operator.dtype, device=operator.device)
    own, columns = chosen.to(unit.device) - domain.start, torch.arange(len(chosen), device=unit.device)
    if domain.is_spread:  # the ones of other columns stand in another rank's rows
        here = (own >= 0) & (own < domain.length)
        own, columns = own[here], columns[here]
    unit[own, columns] = 1
    return multiply(operator, unit.expand(*operator.shape[:-2], *unit.shape))


# -- tiles


def tile_slices(length: int, size: int) -> Iterator[slice]:
    """Cut ``range(length)`` into slices of a size; the last may be shorter.

    Yields:
        The slices, in order.

    Raises:
        InputError: If the size is no positive number.
    """
    if size < 1:
        raise InputError(f"size={size!r}: a tile has at least one row")
    for start in range(0, length, size):
        yield slice(start, min(start + size, length))


def tile_corners(shape: torch.Size, size: int, *, upper: bool) -> Iterator[tuple[slice, slice]]:
    """Yield rows and columns of tiles, row after row; ``upper``: of those on and above the diagonal alone."""
    for rows in tile_slices(shape[-2], size):
        for cols in tile_slices(shape[-1], size):
            if cols.start >= rows.start or not upper:
                yield rows, cols


def tile_count(first: Capabilities, second: Capabilities, size: int) -> int:
    """Return the number of tiles, or pairs of tiles, of a size."""
    own: Any = first
    # b (b + 1) / 2 of b rows of tiles where both leave their lower triangle out; see `paired_tiles`.
    rows, columns = (-(-length // size) for length in own.shape[-2:])
    return rows * (rows + 1) // 2 if first.symmetric and second.symmetric else rows * columns


def paired_tiles(
    first: Capabilities, second: Capabilities, size: int | None = None, skip: int = 0
) -> Iterator[tuple[Tile, Tile, bool]]:
    """Yield the tiles of two operators of one shape side by side, after the first ``skip`` pairs.

    Yields:
        Two tiles over the same rows and columns, and whether they stand for their mirror images as
        well. Where only one operator is symmetric, all of its tiles are made.
    """
    size = size or min(first.tile_size(), second.tile_size())
    if first.symmetric and second.symmetric:
        for left, right in zip(first.tiles_after(size, skip), second.tiles_after(size, skip), strict=True):
            yield left, right, left.cols.start != left.rows.start
        return
    for left, right in zip(
        _both_triangles(first, size, skip), _both_triangles(second, size, skip), strict=True
    ):
        yield left, right, False


def _both_triangles(source: Capabilities, size: int, skip: int) -> Iterator[Tile]:
    """Yield all tiles, each made once; those below the diagonal are kept until their turn comes."""
    if not source.symmetric:
        yield from source.tiles_after(size, skip)
        return
    yield from itertools.islice(_mirrored_tiles(source, size), skip, None)


def _mirrored_tiles(source: Capabilities, size: int) -> Iterator[Tile]:
    """Yield the tiles of both triangles of a symmetric operator, row after row."""
    # Tile (i, j), i < j, is the mirror image of (j, i), which comes j - i rows later. After row i there wait
    # (i + 1)(b - 1 - i) tiles, a quarter of all b² at most.
    kept: dict[tuple[int, int], Tile] = {}
    row = -1
    for tile in source.tiles(size):
        if tile.rows.start != row:
            row = tile.rows.start
            for start in range(0, row, size):
                yield kept.pop((row, start))
        if tile.cols.start > tile.rows.start:
            kept[tile.cols.start, tile.rows.start] = Tile(tile.cols, tile.rows, tile.block.mT)
        yield tile


def dense_from_tiles(operator: LinearOperator | Tensor | Capabilities, size: int | None = None) -> Tensor:
    """Return the dense operator, ``(*batch, n, m)``, put together from its tiles."""
    source = capabilities(operator)
    with full_precision(source.device):  # which leaves inference mode: what is written to is made inside
        dense = torch.empty(source.shape, dtype=source.dtype, device=source.device)
        for tile in source.tiles(size):
            dense[..., tile.rows, tile.cols] = tile.block
            if source.symmetric and tile.cols.start > tile.rows.start:
                dense[..., tile.cols, tile.rows] = tile.block.mT
    return dense


def dense_bytes_allowed(operator: Any) -> int:
    """Return the smallest ``max_dense_bytes`` of the parts of an operator; 2⁶³ - 1 where none has one."""
    own = getattr(operator, "max_dense_bytes", None)
    if own is not None:
        return int(own)
    inner = [arg for arg in getattr(operator, "_args", ()) if isinstance(arg, LinearOperator)]
    return min((dense_bytes_allowed(part) for part in inner), default=2**63 - 1)


def fits_dense(operator: LinearOperator | Tensor) -> bool:
    """Whether the dense matrix may be made: no part's limit of bytes or of backward passes forbids it."""
    allowed = dense_bytes_allowed(operator)
    # 0 means never, also for a process that has none of the rows.
    if allowed == 0 or operator.shape.numel() * operator.dtype.itemsize > allowed:
        return False
    return math.isfinite(capabilities(operator).exact_cost("tiles"))
