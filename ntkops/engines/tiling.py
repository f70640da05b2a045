"""Blocks of samples by tiles, with as few tiles made as possible, and smaller ones where memory runs out."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import TypeVar

import torch

from ..model import Inputs
from .retries import Portion, attempt, even_size

__all__ = ["Part", "fill_lower", "sample_slices", "samples_between"]

Part = tuple[int, int, Inputs]  # start, stop, samples
Tile = TypeVar("Tile")


def sample_slices(inputs: Inputs, size: int) -> Iterator[Part]:
    """Yield ``(start, stop, part)`` for consecutive parts of at most ``size`` samples, evenly filled."""
    count = inputs.num_samples
    if size >= count:
        yield 0, count, inputs
        return
    even = even_size(count, size)
    for start in range(0, count, even):
        stop = min(start + even, count)
        yield start, stop, inputs.select(torch.arange(start, stop))


def samples_between(inputs: Inputs, start: int, stop: int) -> Inputs:
    """Return consecutive samples; all of them are the inputs themselves."""
    if stop - start == inputs.num_samples:
        return inputs
    return inputs.select(torch.arange(start, stop))


def fill_lower(
    inputs: Inputs,
    portion: Portion,
    make: Callable[[Part], Tile],
    add: Callable[[slice, slice, Tile, Tile], None],
    clear: Callable[[slice], None],
) -> None:
    """Work through the tiles on and below the diagonal of a symmetric block, two tiles at a time.

    Rows are taken from the last to the first and columns upwards, so that the last column's tile is the
    next row's: with T tiles 1 + T (T - 1) / 2 are made instead of T (T + 1) / 2. Where memory runs out, what
    is left of the block, again square, goes on with smaller tiles.

    Args:
        inputs: The samples.
        portion: Samples of a tile.
        make: Makes the tile of a part.
        add: Given rows, columns, the rows' tile and the columns' tile (the same object on the diagonal).
        clear: Takes back what was added to these rows: they are done again.
    """
    left = inputs.num_samples  # rows that are still to be done: the first ones
    while left:
        part = inputs if left == inputs.num_samples else inputs.select(torch.arange(left))
        parts = list(sample_slices(part, portion.read()))
        carried: list[Tile] = []
        for i in reversed(range(len(parts))):
            done = attempt(portion, parts[0][1], partial(_fill_row, parts, i, carried, make, add))
            if done is None:
                carried.clear()
                clear(slice(*parts[i][:2]))
                break
            left = parts[i][0]


def _fill_row(
    parts: list[Part],
    i: int,
    carried: list[Tile],
    make: Callable[[Part], Tile],
    add: Callable[[slice, slice, Tile, Tile], None],
) -> None:
    """Add one row of tiles, and carry the tile of the next."""
    rows = slice(*parts[i][:2])
    first = carried.pop() if carried else make(parts[i])
    add(rows, rows, first, first)
    for j in range(i):
        second = make(parts[j])
        add(rows, slice(*parts[j][:2]), first, second)
        if j == i - 1:
            carried.append(second)
        del second
