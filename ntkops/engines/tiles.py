"""Kernels, diagonals and Gram matrices from factors, in a sweep or tile by tile: the walk of all engines.

A sweep contracts the factors of all samples stage by stage, while the backward passes run; it is taken where
the graph of all samples and the gradients of one stage fit.

A tile holds the factors of as many samples as the workspace allows, for all outputs that are wanted; where
not even two samples fit, outputs are taken in groups. As few tiles are made as possible, smaller ones where
memory runs out. Memory is that of the result and two tiles, never the whole Jacobian.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from ..model import Inputs, Linearization
from .attribution import CoverageChanged
from .differentiation import Parameters
from .layer_factors import Factors, matched
from .memory import Share, even_size, if_it_fits, parts, retry
from .options import Layerwise
from .stages import Sweep
from .summation import Workspace

__all__ = [
    "Part",
    "Source",
    "diagonal",
    "fill_lower",
    "gram",
    "held_samples",
    "kernel",
    "mirror",
    "over_parts",
    "own_kernels",
    "part_kernels",
    "rows_of_parts",
    "sample_slices",
]

Part = tuple[int, int, Inputs]  # start, stop, samples
Tile = TypeVar("Tile")
Result = TypeVar("Result")
_HELD_BYTES = 2**23  # samples of a stream that are in memory as one part
_MIRRORED_ROWS = 512  # of a triangle that are transposed at a time: the copy of a block, not of the matrix
_OWN_OUTPUTS = 256  # gradients of one sample that meet each other at a time, where fewer suffice


class Source(Protocol):
    """Where factors of samples come from: layer structure, or differentiation."""

    linearization: Linearization
    workspace: Workspace
    options: Layerwise

    def of(self, params: Parameters, inputs: Inputs, cotangents: Tensor, compact: bool = False) -> Factors:
        """Return the factors of N samples for ``(C, N, O)`` cotangents."""
        ...

    def of_outputs(
        self, params: Parameters, inputs: Inputs, outputs: Tensor, compact: bool = False
    ) -> Factors:
        """Return the factors of N samples for single outputs, ``(C,)`` numbers."""
        ...

    def sweep(self, params: Parameters, inputs: Inputs, outputs: Tensor, rows: int) -> Sweep | None:
        """Return the factors of all samples for ``(r,)`` numbers, stage by stage; None for tiles.

        ``rows`` is the number of rows of the larger side.
        """
        ...

    def written_down(self, factors: Factors) -> Tensor:
        """Return ``(B, C, P)`` gradients."""
        ...

    def divided(self, factors: Factors, owners: Mapping[str, int], count: int) -> list[Factors]:
        """Return the factors of each part, given the part of each parameter by name."""
        ...

    def tile(self, directions: int) -> int:
        """Return how many samples' factors fit into the workspace."""
        ...

    def tile_share(self, directions: int) -> Share:
        """Return `tile` samples at a time, and less where memory runs out."""
        ...

    def passing_share(self, directions: int) -> Share:
        """Return how many samples go through at a time where no factor is needed twice."""
        ...

    def count_rows(self, rows: int, inputs: Inputs) -> None:
        """Report gradients of single samples as passes over all samples."""
        ...


def held_samples(inputs: Inputs) -> int:
    """Return how many consecutive samples may be in memory at a time: all of those that are."""
    if not inputs.is_streamed:
        return inputs.num_samples
    return max(1, min(inputs.num_samples, _HELD_BYTES // inputs.sample_bytes))


def sample_slices(inputs: Inputs, size: int, first: int = 0) -> Iterator[Part]:
    """Yield ``(start, stop, part)`` for consecutive parts of at most ``size`` samples, evenly filled.

    The parts are in memory; those of a re-iterable are read in one pass. Samples before ``first`` are not
    in them.
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

    The parts are in memory; those of a re-iterable are read in one pass. As many of ``beside`` other samples
    are taken at the same time.

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
    tiles. `clear` takes back what was added to rows that are done again; `add` is given one tile twice on the
    diagonal.
    """
    # Row i meets the tiles i, 0, 1, ..., i - 1, of which tile i is there: row i + 1 has ended with it. These
    # are i new tiles a row, and one more for the first of them: 1 + Σ_i i = 1 + T (T - 1) / 2.
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
            if retry(share, ends[0][1], row) is None:  # memory ran out: rows 0 to i again, in smaller tiles
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


class _Kernels:
    """Kernels ``(M, N₁·r₁, N₂·r₂)`` while tiles arrive.

    They are added to in place. What a derivative may be taken through is made out of place, and put together
    at the end: memory that is used again must not be part of a graph.
    """

    def __init__(
        self, source: Source, counts: tuple[int, int], indices: tuple[Tensor, Tensor], symmetric: bool
    ) -> None:
        self._source, self._indices, self._symmetric = source, indices, symmetric
        self._widths = indices[0].shape[2], indices[1].shape[2]
        self._shape = len(indices[0]), counts[0] * self._widths[0], counts[1] * self._widths[1]
        self._whole: Tensor | None = None
        self._recorded: list[tuple[slice, slice, Tensor]] = []

    def _span(self, samples: slice, side: int) -> slice:
        """Return the rows, or columns, of some samples: r of each."""
        width = self._widths[side]
        return slice(samples.start * width, samples.stop * width)

    def add(self, rows: slice, columns: slice, first: Factors, second: Factors) -> None:
        """Add the products of two tiles; of a symmetric kernel only those below the diagonal come."""
        own = self._symmetric and rows == columns
        rows, columns = self._span(rows, 0), self._span(columns, 1)
        if first.is_recorded or second.is_recorded:
            block = first.recorded_kernel(second, *self._indices)
            if own:  # exactly symmetric, whatever order the terms were summed in
                block = (block + block.mT) / 2
            self._recorded.append((rows, columns, block))
            return
        if self._whole is None:
            model = self._source.linearization
            self._whole = torch.zeros(self._shape, dtype=model.dtype, device=model.device)
        target, workspace = self._whole[:, rows, columns], self._source.workspace
        force = self._source.options.kernel
        first.kernel(second, target, *self._indices, same=own, workspace=workspace, force=force)

    def clear(self, samples: slice) -> None:
        """Take back what was added to the rows of some samples."""
        rows = self._span(samples, 0)
        if self._whole is not None:
            self._whole[:, rows].zero_()
        self._recorded = [block for block in self._recorded if block[0] != rows]

    def finish(self) -> Tensor:
        """Return the kernels, a symmetric one mirrored."""
        whole = self._whole
        if whole is not None and self._symmetric:
            mirror(whole)
        if not self._recorded:
            assert whole is not None  # inputs are never empty
            return whole
        # Tiles may be of both sorts: what was added in place, and over it what has a graph.
        first = self._recorded[0][2]
        if first.shape == self._shape:
            return first
        result = first.new_empty(self._shape)
        if whole is not None:
            result.copy_(whole)
        for rows, columns, block in self._recorded:
            result[:, rows, columns] = block
            if self._symmetric and rows != columns:
                result[:, columns, rows] = block.mT
        return result


class _PartKernels:
    """Kernels of parts of the parameters while tiles arrive."""

    def __init__(self, parts: list[_Kernels], source: Source, owners: Mapping[str, int]) -> None:
        self._parts, self._source, self._owners = parts, source, owners

    def add(self, rows: slice, columns: slice, first: Factors, second: Factors) -> None:
        """Add the products of two tiles, each part's to its own kernels."""
        if first is not second:
            first, second = matched((first, second))
        left = self._source.divided(first, self._owners, len(self._parts))
        right = left if first is second else self._source.divided(second, self._owners, len(self._parts))
        for part, one, two in zip(self._parts, left, right, strict=True):
            part.add(rows, columns, one, two)

    def clear(self, samples: slice) -> None:
        """Take back what was added to the rows of some samples."""
        for part in self._parts:
            part.clear(samples)

    def finish(self) -> Tensor:
        """Return the kernels of all parts, ``(L, M, N₁·r₁, N₂·r₂)``."""
        return torch.stack([part.finish() for part in self._parts])


def part_kernels(
    source: Source,
    params: Parameters,
    left: Inputs,
    right: Inputs,
    outputs: tuple[Tensor, Tensor],
    owners: Mapping[str, int],
    count: int,
) -> Tensor:
    """Return the kernels of L parts of the parameters, ``(L, M, N₁·r₁, N₂·r₂)``, from the same factors.

    The output numbers are ``(M, R, r₁)`` and ``(M, R, r₂)``; ``owners`` is the part of each parameter, by
    name.
    """

    def gather(*described: Any) -> _PartKernels:
        return _PartKernels([_Kernels(*described) for _ in range(count)], source, owners)

    found = _all_outputs(source, params, left, right, *outputs, gather)
    assert found is not None
    return found


def kernel(
    source: Source,
    params: Parameters,
    left: Inputs,
    right: Inputs,
    left_outputs: Tensor,
    right_outputs: Tensor,
) -> Tensor:
    """Return ``(M, N₁·r₁, N₂·r₂)`` kernels for output numbers ``(M, R, r₁)`` and ``(M, R, r₂)``."""
    few, widest = min(2, left.num_samples), 1
    if source.tile(max(left_outputs.numel(), right_outputs.numel())) < few:  # repeated ones count once
        widest = max(torch.unique(left_outputs).numel(), torch.unique(right_outputs).numel())
    in_one = widest == 1 or source.tile(widest) >= few
    sides = source, params, left, right, left_outputs, right_outputs
    found = _all_outputs(*sides, in_tiles=in_one)
    return _in_groups(*sides) if found is None else found


def _in_groups(
    source: Source,
    params: Parameters,
    left: Inputs,
    right: Inputs,
    left_outputs: Tensor,
    right_outputs: Tensor,
) -> Tensor:
    """The same kernels with fewer outputs at a time."""
    kernels, terms, r1 = left_outputs.shape
    r2 = right_outputs.shape[2]
    # Members of the batch are apart, terms add up: halves of either, then blocks of the rows of one kernel.
    if kernels > 1 or terms > 1:
        axis = 0 if kernels > 1 else 1
        half = left_outputs.shape[axis] // 2
        pieces = zip(
            left_outputs.tensor_split([half], axis), right_outputs.tensor_split([half], axis), strict=True
        )
        one, other = (kernel(source, params, left, right, rows, columns) for rows, columns in pieces)
        return torch.cat([one, other]) if axis == 0 else one.add_(other)
    size = max(r1, r2)
    while size > 1 and source.tile(size) < min(2, left.num_samples):
        size = -(-size // 2)
    symmetric = left is right and torch.equal(left_outputs, right_outputs)
    result: Tensor | None = None
    for a in range(0, r1, size):
        for b in range(a if symmetric else 0, r2, size):
            rows, columns = left_outputs[..., a : a + size], right_outputs[..., b : b + size]
            found = _all_outputs(source, params, left, right, rows, columns)
            assert found is not None
            block = found.view(left.num_samples, rows.shape[2], right.num_samples, columns.shape[2])
            if result is None:
                result = block.new_empty((left.num_samples, r1, right.num_samples, r2))
            result[:, a : a + size, :, b : b + size] = block
            if symmetric and b > a:  # K_{(i, o), (j, p)} = K_{(j, p), (i, o)}
                result[:, b : b + size, :, a : a + size] = block.permute(2, 3, 0, 1)
    assert result is not None  # there is an output
    return result.view(1, left.num_samples * r1, right.num_samples * r2)


def _all_outputs(
    source: Source,
    params: Parameters,
    left: Inputs,
    right: Inputs,
    left_outputs: Tensor,
    right_outputs: Tensor,
    gather: Callable[..., _Kernels | _PartKernels] = _Kernels,
    in_tiles: bool = True,
) -> Tensor | None:
    """The same kernels with all outputs at a time, in one sweep or else in tiles; None without tiles."""
    # Each output that occurs is one backward pass, however many kernels, terms and rows it is in.
    same = torch.equal(left_outputs, right_outputs)
    left_numbers, left_index = torch.unique(left_outputs, return_inverse=True)
    right_numbers, right_index = left_numbers, left_index
    if not same:
        right_numbers, right_index = torch.unique(right_outputs, return_inverse=True)
    symmetric, shared = left is right and same, left is right and torch.equal(left_numbers, right_numbers)
    result = gather(source, (left.num_samples, right.num_samples), (left_index, right_index), symmetric)
    numbers = left_numbers, left_numbers if shared else right_numbers
    if isinstance(result, _Kernels) and _swept(source, params, (left, right), numbers, shared, result):
        return result.finish()
    if not in_tiles:
        return None
    tile = source.tile_share(max(len(left_numbers), len(right_numbers)))
    made = 0

    def make(part: Part, numbers: Tensor) -> Factors:
        nonlocal made
        made += (part[1] - part[0]) * len(numbers)
        return source.of_outputs(params, part[2], numbers, compact=source.options.kernel != "gram")

    def fill_row(start: int, stop: int, part: Inputs) -> None:
        result.clear(slice(start, stop))
        first = make((start, stop, part), left_numbers)
        for other in sample_slices(right, tile.read()):
            same_part = shared and other[:2] == (start, stop)
            second = first if same_part else make(other, right_numbers)
            result.add(slice(start, stop), slice(*other[:2]), first, second)

    if symmetric:
        fill_lower(left, tile, lambda part: make(part, left_numbers), result.add, result.clear)
    else:
        for _ in over_parts(left, tile, fill_row, beside=right.num_samples):
            pass
    source.count_rows(made, left)
    return result.finish()


def _swept(
    source: Source,
    params: Parameters,
    sides: tuple[Inputs, Inputs],
    numbers: tuple[Tensor, Tensor],
    shared: bool,
    result: _Kernels,
) -> bool:
    """Add the kernels of all samples, contracted while the backward passes run.

    A kernel is the sum of those of the stages. Memory is that of the graph of all samples and of one stage.

    Returns:
        Whether it was done; if not, nothing was added, and tiles are to be made.
    """
    most = max(side.num_samples * len(some) for side, some in zip(sides, numbers, strict=True))
    first = source.sweep(params, sides[0], numbers[0], most)
    second = first if shared or first is None else source.sweep(params, sides[1], numbers[1], most)
    if first is None or second is None or first.units != second.units:
        return False
    rows, columns = (slice(0, side.num_samples) for side in sides)

    def work() -> None:
        for one in first.stages:
            result.add(rows, columns, one, one if shared else next(second.stages))

    try:
        done = if_it_fits(work)
    except CoverageChanged:  # tiles tell rounding from rows of other samples, and which parameters they lose
        done = ""
    if isinstance(done, str):
        result.clear(rows)
        return False
    for side, some in zip(sides[: 1 if shared else 2], numbers, strict=False):
        source.count_rows(side.num_samples * len(some), sides[0])
    return True


def diagonal(
    source: Source, params: Parameters, inputs: Inputs, outputs: Tensor, *, counted: bool = True
) -> Tensor:
    """Return ``(M, N·r)`` kernel diagonals for ``(M, R, r)`` output numbers.

    ``counted=False`` is for samples that are a part of those that passes go over.
    """
    distinct, index = torch.unique(outputs, return_inverse=True)
    group = len(distinct)  # outputs at a time: halves where not one sample fits with all of them
    while group > 1 and source.tile(group) < 1:
        group = -(-group // 2)
    forced = source.options.diagonal

    def lengths_of(start: int, stop: int, part: Inputs) -> Tensor:
        found = [
            source.of_outputs(params, part, chosen, forced != "gram").lengths(source.workspace, forced)
            for chosen in distinct.split(group)
        ]
        return found[0] if len(found) == 1 else torch.cat(found, dim=1)  # (n, u)

    tiles = over_parts(inputs, source.passing_share(group), lengths_of)
    lengths = rows_of_parts(inputs.num_samples, tiles)  # (N, u)
    if counted:
        source.count_rows(inputs.num_samples * len(distinct), inputs)
    return lengths[:, index.to(lengths.device)].sum(2).movedim(1, 0).flatten(1)


def gram(source: Source, params: Parameters, inputs: Inputs, cotangents: Tensor) -> Tensor:
    """Return the ``(N, r, N, r)`` Gram matrix of per-sample gradients for ``(N, r, O)`` cotangents."""
    count, width = cotangents.shape[:2]
    index = torch.arange(width).view(1, 1, -1)
    result = _Kernels(source, (count, count), (index, index), symmetric=True)
    vectors, made = cotangents.transpose(0, 1), 0  # (r, N, O)

    def make(part: Part) -> Factors:
        nonlocal made
        start, stop, samples = part
        made += (stop - start) * width
        return source.of(params, samples, vectors[:, start:stop], compact=source.options.kernel != "gram")

    fill_lower(inputs, source.tile_share(width), make, result.add, result.clear)
    source.count_rows(made, inputs)
    return result.finish().view(count, width, count, width)


def own_kernels(
    source: Source,
    params: Parameters,
    inputs: Inputs,
    numbers: tuple[Tensor, Tensor],
    left: Tensor,
    right: Tensor,
) -> Tensor:
    """Return ``(M, r₁, r₂)`` sums of kernels of single samples: Σ over terms l of J_n J_nᵀ at some outputs.

    The kernel and the sample of each of L terms are ``numbers``, ``(L,)`` each, its outputs ``(L, r₁)`` and
    ``(L, r₂)``.
    """
    kernels, samples = numbers
    width, count = left.shape[1], int(kernels.max()) + 1
    # The same outputs of other samples are in one pass; those that never meet need not be in one.
    patterns, which = torch.unique(torch.cat([left, right], dim=1), dim=0, return_inverse=True)
    step = max(1, _OWN_OUTPUTS // patterns.shape[1])
    whole: Tensor | None = None
    for first in range(0, len(patterns), step):
        outputs, place = torch.unique(patterns[first : first + step], return_inverse=True)
        terms = ((which >= first) & (which < first + step)).nonzero().flatten()
        terms = terms[samples[terms].argsort(stable=True)]

        def grams(start: int, stop: int, part: Inputs, outputs: Tensor = outputs) -> Tensor:
            return source.of_outputs(params, part, outputs).grams()  # (n, u, u)

        for start, stop, found in over_parts(inputs, source.passing_share(len(outputs)), grams):
            some = terms[(samples[terms] >= start) & (samples[terms] < stop)]
            at = place[which[some] - first].to(found.device)
            own = (samples[some] - start).to(found.device)[:, None, None]
            # found[n] holds all pairs of the u outputs of sample n; a term reads r₁ x r₂ of them.
            blocks = found[own, at[:, :width, None], at[:, None, width:]]
            if whole is None:
                whole = blocks.new_zeros((count, *blocks.shape[1:]))
            add = whole.index_add if blocks.requires_grad else whole.index_add_  # out of place under a graph
            whole = add(0, kernels[some].to(found.device), blocks)
        source.count_rows(inputs.num_samples * len(outputs), inputs)
    assert whole is not None  # there is a term
    return whole


def mirror(result: Tensor) -> None:
    """Copy what is below the diagonal of each square matrix to above it."""
    size = result.shape[1]
    for matrix in result:
        for start in range(0, size, _MIRRORED_ROWS):
            stop = min(start + _MIRRORED_ROWS, size)
            own = matrix[start:stop, start:stop]
            own.copy_(own.tril() + own.tril(-1).mT)
            matrix[start:stop, stop:] = matrix[stop:, start:stop].mT
