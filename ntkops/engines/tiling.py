"""Blocks of samples by tiles, with as few tiles made as possible, and smaller ones where memory runs out."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor

from ..model import Inputs
from .memory import Share, even_size, parts, retry

__all__ = ["Part", "fill_lower", "held_samples", "over_parts", "rows_of_parts", "sample_slices"]

Part = tuple[int, int, Inputs]  # start, stop, samples
Tile = TypeVar("Tile")
Result = TypeVar("Result")
_HELD_BYTES = 2**23  # samples of a stream that are in memory as one part


def held_samples(inputs: Inputs) -> int:
    """Return how many consecutive samples may be in memory at a time: all of those that are."""
    if not inputs.is_streamed:
        return inputs.num_samples
    return max(1, min(inputs.num_samples, _HELD_BYTES // inputs.sample_bytes))


def sample_slices(inputs: Inputs, size: int, first: int = 0) -> Iterator[Part]:
    """Yield ``(start, stop, part)`` for consecutive parts of at most ``size`` samples, evenly filled.

    The parts are in memory; those of a re-iterable are read in one pass.

    Args:
        inputs: N samples.
        size: Samples of a part.
        first: Number of samples whose parts are left out.
    """
    count, between = inputs.num_samples, inputs.in_order()
    even = even_size(count, min(size, held_samples(inputs)))
    for start in range(first, count, even):
        stop = min(start + even, count)
        yield start, stop, between(start, stop)


def over_parts(
    inputs: Inputs, share: Share, work: Callable[[int, int, Inputs], Result], *, beside: int = 1
) -> Iterator[tuple[int, int, Result]]:
    """Do work on consecutive parts of the samples, smaller ones from where memory runs out.

    Args:
        inputs: N samples. The parts are in memory; those of a re-iterable are read in one pass.
        share: How many samples are taken at a time.
        work: Given the first sample, one past the last, and the samples.
        beside: Number of other samples of which as many are taken at the same time.

    Yields:
        First sample, one past the last, and the result.
    """
    between, most = inputs.in_order(), held_samples(inputs)
    bounded = replace(share, read=lambda: min(share.read(), most))

    def part(start: int, stop: int) -> Result:
        return work(start, stop, between(start, stop))

    yield from parts(inputs.num_samples, bounded, part, even=True, beside=beside)


def rows_of_parts(count: int, found: Iterable[tuple[int, int, Tensor]]) -> Tensor:
    """Return the ``(n, ...)`` results of consecutive parts as one; differentiable where they are."""
    whole: Tensor | None = None
    recorded: list[Tensor] = []
    for start, stop, rows in found:
        if rows.requires_grad:
            recorded.append(rows)
            continue
        if whole is None:
            if stop - start == count:
                return rows
            # Made first: many small tensors would keep the memory between them from being used again.
            whole = rows.new_empty((count, *rows.shape[1:]))
        whole[start:stop] = rows
    if recorded:
        return recorded[0] if len(recorded) == 1 else torch.cat(recorded)
    assert whole is not None  # inputs are never empty
    return whole


def fill_lower(
    inputs: Inputs,
    share: Share,
    make: Callable[[Part], Tile],
    add: Callable[[slice, slice, Tile, Tile], None],
    clear: Callable[[slice], None],
) -> None:
    """Work through the tiles on and below the diagonal of a symmetric block, two tiles at a time.

    Rows are taken from the last to the first and columns upwards, so that the last column's tile is the
    next row's: with T tiles 1 + T (T - 1) / 2 are made instead of T (T + 1) / 2. Where memory runs out, what
    is left of the block, again square, goes on with smaller tiles. A re-iterable is read once for each row of
    tiles.

    Args:
        inputs: The samples.
        share: Samples of a tile.
        make: Makes the tile of a part.
        add: Given rows, columns, the rows' tile and the columns' tile (the same object on the diagonal).
        clear: Takes back what was added to these rows: they are done again.
    """
    between, most = inputs.in_order(), held_samples(inputs)
    left = inputs.num_samples  # rows that are still to be done: the first ones
    while left:
        size = even_size(left, min(share.read(), most))
        ends = [(start, min(start + size, left)) for start in range(0, left, size)]
        carried: list[Tile] = []

        def made(position: int, ends: list[tuple[int, int]] = ends) -> Tile:
            return make((*ends[position], between(*ends[position])))

        for i in reversed(range(len(ends))):
            row = partial(_fill_row, [slice(*end) for end in ends], i, carried, made, add)
            if retry(share, ends[0][1], row) is None:
                carried.clear()
                clear(slice(*ends[i]))
                break
            left = ends[i][0]


def _fill_row(
    parts: list[slice],
    i: int,
    carried: list[Tile],
    made: Callable[[int], Tile],
    add: Callable[[slice, slice, Tile, Tile], None],
) -> None:
    """Add one row of tiles, and carry the tile of the next."""
    first = carried.pop() if carried else made(i)
    add(parts[i], parts[i], first, first)
    for j in range(i):
        second = made(j)
        add(parts[i], parts[j], first, second)
        if j == i - 1:
            carried.append(second)
        del second
