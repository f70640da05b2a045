"""Which pairs of sample tiles a symmetric block needs, with as few tiles made as possible."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TypeVar

import torch

from ..model import Inputs

__all__ = ["Part", "lower_pairs", "sample_slices"]

Part = tuple[int, int, Inputs]  # start, stop, samples
Tile = TypeVar("Tile")


def sample_slices(inputs: Inputs, size: int) -> Iterator[Part]:
    """Yield ``(start, stop, part)`` for consecutive parts of at most ``size`` samples, evenly filled."""
    count = inputs.num_samples
    if size >= count:
        yield 0, count, inputs
        return
    even = -(-count // -(-count // size))
    for start in range(0, count, even):
        stop = min(start + even, count)
        yield start, stop, inputs.select(torch.arange(start, stop))


def lower_pairs(
    inputs: Inputs, size: int, make: Callable[[Part], Tile]
) -> Iterator[tuple[slice, slice, Tile, Tile]]:
    """Yield rows, columns and their tiles on and below the diagonal, two tiles at a time.

    Rows are taken from the last to the first and columns upwards, so that the last column's tile is the
    next row's: with T tiles 1 + T (T - 1) / 2 are made instead of T (T + 1) / 2.

    Args:
        inputs: The samples.
        size: Samples of a tile.
        make: Makes the tile of a part.

    Yields:
        Rows, columns, the rows' tile and the columns' tile (the same object on the diagonal).
    """
    parts = list(sample_slices(inputs, size))
    carried: list[Tile] = []
    for i in reversed(range(len(parts))):
        rows = slice(*parts[i][:2])
        first = carried.pop() if carried else make(parts[i])
        yield rows, rows, first, first
        for j in range(i):
            second = make(parts[j])
            yield rows, slice(*parts[j][:2]), first, second
            if j == i - 1:
                carried = [second]
            del second
        del first
