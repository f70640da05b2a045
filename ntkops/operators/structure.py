"""What an operator can do beyond products, under one name: diagonal, tiles, factors, and their cost.

Estimators ask `structure` and never look at the kind of an operator themselves. Sums, multiples, added
diagonals and block diagonals answer by asking their parts, so that K + ridge is as exact as K. An
operator that offers nothing is multiplied with blocks of the identity, and every column is counted.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from linear_operator.operators import LinearOperator
from torch import Tensor

from ..model.context import full_precision
from ..vectors import Space

__all__ = [
    "Structure",
    "Tile",
    "dense_bytes_allowed",
    "dense_from_tiles",
    "diagonal_parts",
    "diagonal_step",
    "fits_dense",
    "later_tiles",
    "paired_tiles",
    "structure",
    "tile_count",
    "tile_slices",
]

Factors = tuple[LinearOperator, LinearOperator]


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


@runtime_checkable
class Structure(Protocol):
    """What an estimator may ask of an operator K, ``(*batch, n, m)``.

    Attributes:
        shape: Shape of the operator.
        dtype: Dtype of its vectors.
        device: Device of its vectors.
        symmetric: Whether K equals its transpose; `tiles` then leaves the lower triangle out, and
            `factors`, where there are any, are equal.
    """

    shape: torch.Size
    dtype: torch.dtype
    device: torch.device
    symmetric: bool

    @property
    def space(self) -> Space:
        """The space of the rows."""

    def diagonal(self) -> Tensor:
        """Return the exact diagonal, ``(*batch, n)``."""

    def tile_size(self) -> int:
        """Return the length of the slices that `tiles` cuts by itself."""

    def tiles(self, size: int | None = None) -> Iterator[Tile]:
        """Yield dense tiles over slices of length ``size``, row after row.

        Of a symmetric operator only those on and above the diagonal, or, over several ranks, their mirror
        images: one off the diagonal stands for two.
        """

    def exact_cost(self, quantity: str) -> float:
        """Return the passes that the exact "diagonal" or all "tiles" take, products of tiles included."""

    def factors(self) -> Factors | None:
        """Return L and R with K = L Rᵀ, ``(*batch, n, p)`` and ``(*batch, m, p)``, or None."""

    def sample_gram(self, probes: Tensor) -> Tensor | None:
        """Return the Gram matrix of per-sample gradients, or None where there are no samples."""


def structure(operator: LinearOperator | Tensor, *, whole: bool = False) -> Structure:
    """Return what an operator can do beyond products.

    Args:
        operator: One of ours, a dense tensor ``(*batch, n, m)``, or any LinearOperator. Sums, constant
            multiples, added diagonals and block diagonals are asked part by part; an operator that is
            none of these is multiplied with blocks of the identity, and is never made dense.
        whole: Yield all tiles also of a symmetric operator, so that they pair with those of one that
            is not symmetric.

    Returns:
        The operator's `Structure`. Making it costs nothing.

    Example:
        >>> import torch
        >>> from linear_operator.operators import DenseLinearOperator
        >>> from ntkops.operators.structure import structure
        >>> K = DenseLinearOperator(torch.ones(3, 3)).add_jitter(1.0)
        >>> structure(K).diagonal().tolist(), structure(K).exact_cost("tiles")
        ([2.0, 2.0, 2.0], 0)
    """
    from .structure_kinds import wrap

    return wrap(operator, whole)


def tile_slices(length: int, size: int) -> Iterator[slice]:
    """Cut ``range(length)`` into slices of a size; the last may be shorter."""
    for start in range(0, length, size):
        yield slice(start, min(start + size, length))


def diagonal_parts(source: Structure, size: int, first: int = 0) -> Iterator[tuple[slice, Tensor]]:
    """Yield the exact diagonal in parts ``(*batch, k)``, each with its rows.

    Args:
        source: Structure of a square operator.
        size: Samples of a part, for a kernel of ours; anything else has one part.
        first: Number of rows, a whole number of parts, that are left out.

    Yields:
        The rows, and their part of the diagonal.
    """
    if hasattr(source, "diagonal_parts"):
        yield from source.diagonal_parts(size, first)
    elif first == 0:
        yield slice(0, source.shape[-2]), source.diagonal()


def diagonal_step(source: Structure) -> int:
    """Return the samples of the parts in which a diagonal is made; the rows where there are no parts."""
    return source.diagonal_step() if hasattr(source, "diagonal_step") else source.shape[-2]


def tile_count(first: Structure, second: Structure, size: int) -> int:
    """Return the number of tiles, or pairs of tiles, of a size."""
    rows, columns = (-(-length // size) for length in first.shape[-2:])
    return rows * (rows + 1) // 2 if first.symmetric and second.symmetric else rows * columns


def later_tiles(source: Structure, size: int, skip: int) -> Iterator[Tile]:
    """Yield the tiles after the first ``skip`` ones, which a kernel of ours does not make."""
    after = getattr(source, "tiles_after", None)
    return itertools.islice(source.tiles(size), skip, None) if after is None else after(size, skip)


def paired_tiles(
    first: Structure, second: Structure, size: int | None = None, skip: int = 0
) -> Iterator[tuple[Tile, Tile, bool]]:
    """Yield the tiles of two operators of one shape side by side.

    Args:
        first: Structure of an operator ``(*batch, n, m)``.
        second: Structure of another of the same shape.
        size: Rows and columns of a tile; None for what suits both.
        skip: Number of pairs that are left out, in their order.

    Yields:
        Two tiles over the same rows and columns, and whether they stand for their mirror images as
        well. Where only one operator is symmetric, all of its tiles are made.
    """
    size = size or min(first.tile_size(), second.tile_size())
    if first.symmetric and second.symmetric:
        pairs = zip(later_tiles(first, size, skip), later_tiles(second, size, skip), strict=True)
        for left, right in pairs:
            yield left, right, left.cols.start != left.rows.start
        return
    both = zip(_all_tiles(first, size, skip), _all_tiles(second, size, skip), strict=True)
    for left, right in both:
        yield left, right, False


def _all_tiles(source: Structure, size: int, skip: int) -> Iterator[Tile]:
    """Yield the tiles of both triangles; those below the diagonal are kept until their turn comes."""
    if not source.symmetric:
        yield from later_tiles(source, size, skip)
        return
    yield from itertools.islice(_mirrored_tiles(source, size), skip, None)


def _mirrored_tiles(source: Structure, size: int) -> Iterator[Tile]:
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


def dense_from_tiles(source: Structure, size: int | None = None) -> Tensor:
    """Return the dense operator, ``(*batch, n, m)``, put together from its tiles."""
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
    # 0 is "never", also for a process that has none of the rows.
    if allowed == 0 or operator.shape.numel() * operator.dtype.itemsize > allowed:
        return False
    return math.isfinite(structure(operator).exact_cost("tiles"))
