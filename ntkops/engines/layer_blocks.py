"""Kernels, diagonals and Gram matrices of the covered parameters, tile by tile.

A tile holds the factors of as many samples as the workspace allows, for all outputs that are wanted;
where not even two samples fit, outputs are taken in groups. Memory is that of the result and two tiles.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..model import Inputs
from .contract import accumulate_kernel, factor_lengths
from .differentiation import Parameters
from .factors import Factors
from .gathering import FactorSource
from .recurrent import states_diagonal, states_kernel
from .tiling import Part, fill_lower, over_parts, sample_slices

__all__ = ["layer_diagonal", "layer_gram", "layer_kernel", "mirror"]

_MIRRORED_ROWS = 512


def layer_kernel(
    source: FactorSource,
    params: Parameters,
    left: Inputs,
    right: Inputs,
    left_outputs: Tensor,
    right_outputs: Tensor,
) -> Tensor:
    """Return ``(M, N₁·r₁, N₂·r₂)`` kernels of the covered parameters.

    Args:
        source: Makes the factors.
        params: All selected parameters.
        left: N₁ samples.
        right: N₂ samples.
        left_outputs: ``(M, R, r₁)`` output numbers.
        right_outputs: ``(M, R, r₂)``.
    """
    kernels, _, r1 = left_outputs.shape
    r2 = right_outputs.shape[2]
    pairs = torch.cat([left_outputs.flatten(1), right_outputs.flatten(1)], dim=1)
    if kernels > 1:
        unique, index = torch.unique(pairs, dim=0, return_inverse=True)
    if kernels > 1 and len(unique) < kernels:  # an expanded batch: each distinct kernel is made once
        split = left_outputs[0].numel()
        one = unique[:, :split].reshape(len(unique), -1, r1)
        other = unique[:, split:].reshape(len(unique), -1, r2)
        distinct = layer_kernel(source, params, left, right, one, other)
        return distinct[index.to(distinct.device)]
    over_time = states_kernel(source, params, left, right, left_outputs, right_outputs)
    if over_time is not None:
        return over_time
    few = min(2, left.num_samples)
    if source.tile(max(left_outputs.numel(), right_outputs.numel())) < few:  # repeated ones count once
        widest = max(torch.unique(left_outputs).numel(), torch.unique(right_outputs).numel())
    else:
        widest = 1
    if widest > 1 and source.tile(widest) < few:
        return _in_parts(source, params, left, right, left_outputs, right_outputs)
    return _filled(source, params, left, right, left_outputs, right_outputs)


def _in_parts(
    source: FactorSource,
    params: Parameters,
    left: Inputs,
    right: Inputs,
    left_outputs: Tensor,
    right_outputs: Tensor,
) -> Tensor:
    """The same kernels with fewer outputs at a time."""
    kernels, terms, r1 = left_outputs.shape
    r2 = right_outputs.shape[2]

    def part(kernel: slice, term: slice) -> Tensor:
        return layer_kernel(
            source, params, left, right, left_outputs[kernel, term], right_outputs[kernel, term]
        )

    everything = slice(None)
    if kernels > 1:
        half = kernels // 2
        return torch.cat([part(slice(0, half), everything), part(slice(half, None), everything)])
    if terms > 1:
        half = terms // 2
        return part(everything, slice(0, half)).add_(part(everything, slice(half, None)))
    size = max(r1, r2)
    while size > 1 and source.tile(size) < min(2, left.num_samples):
        size = -(-size // 2)
    shape = (left.num_samples, r1, right.num_samples, r2)
    result = torch.empty(shape, dtype=source.dtype, device=source.device)
    symmetric = left is right and torch.equal(left_outputs, right_outputs)
    for a in range(0, r1, size):
        for b in range(0, r2, size):
            if symmetric and b < a:
                continue
            rows, columns = left_outputs[..., a : a + size], right_outputs[..., b : b + size]
            block = _filled(source, params, left, right, rows, columns)
            block = block.view(shape[0], rows.shape[2], shape[2], columns.shape[2])
            result[:, a : a + size, :, b : b + size] = block
            if symmetric and b > a:
                result[:, b : b + size, :, a : a + size] = block.permute(2, 3, 0, 1)
    return result.view(1, shape[0] * r1, shape[2] * r2)


def _filled(
    source: FactorSource,
    params: Parameters,
    left: Inputs,
    right: Inputs,
    left_outputs: Tensor,
    right_outputs: Tensor,
) -> Tensor:
    """The same kernels with all outputs at a time, tile by tile."""
    kernels, _, r1 = left_outputs.shape
    r2 = right_outputs.shape[2]
    shape = (kernels, left.num_samples * r1, right.num_samples * r2)
    result = torch.zeros(shape, dtype=source.dtype, device=source.device)
    same = torch.equal(left_outputs, right_outputs)
    symmetric = left is right and same
    left_numbers, left_index = torch.unique(left_outputs, return_inverse=True)
    right_numbers, right_index = left_numbers, left_index
    if not same:
        right_numbers, right_index = torch.unique(right_outputs, return_inverse=True)
    tile = source.tile_share(max(len(left_numbers), len(right_numbers)))
    shared = left is right and torch.equal(left_numbers, right_numbers)
    made = 0

    def make(part: Part, numbers: Tensor) -> Factors:
        nonlocal made
        made += (part[1] - part[0]) * len(numbers)
        return source.of_outputs(params, part[2], numbers, compact=source.options.kernel != "gram")

    def add(rows: slice, columns: slice, first: Factors, second: Factors) -> None:
        target = result[:, rows.start * r1 : rows.stop * r1, columns.start * r2 : columns.stop * r2]
        own, force = symmetric and rows == columns, source.options.kernel
        accumulate_kernel(target, first, second, left_index, right_index, own, source.workspace, force)

    def clear(rows: slice) -> None:
        result[:, rows.start * r1 : rows.stop * r1].zero_()

    def fill_row(start: int, stop: int, part: Inputs) -> None:
        clear(slice(start, stop))
        first = make((start, stop, part), left_numbers)
        for other in sample_slices(right, tile.read()):
            same_part = shared and other[:2] == (start, stop)
            second = first if same_part else make(other, right_numbers)
            add(slice(start, stop), slice(*other[:2]), first, second)

    if symmetric:
        fill_lower(left, tile, lambda part: make(part, left_numbers), add, clear)
        mirror(result)
    else:
        for _ in over_parts(left, tile, fill_row, beside=right.num_samples):
            pass
    source.count_rows(made, left)
    return result


def layer_diagonal(
    source: FactorSource, params: Parameters, inputs: Inputs, outputs: Tensor, *, counted: bool = True
) -> Tensor:
    """Return ``(M, N·r)`` kernel diagonals of the covered parameters for ``(M, R, r)`` output numbers.

    Args:
        source: Makes the factors.
        params: All selected parameters.
        inputs: N samples.
        outputs: The output numbers.
        counted: Report the passes; False where the samples are a part of those that passes go over.
    """
    over_time = states_diagonal(source, params, inputs, outputs)
    if over_time is not None:
        return over_time
    distinct, index = torch.unique(outputs, return_inverse=True)
    group = len(distinct)
    while group > 1 and source.tile(group) < 1:
        group = -(-group // 2)
    compact = source.options.diagonal != "gram"
    # In one piece, made first: many small tensors would keep the memory between them from being used again.
    shape = (inputs.num_samples, len(distinct))
    lengths = torch.empty(shape, dtype=source.dtype, device=source.device)

    def fill(start: int, stop: int, part: Inputs) -> None:
        for first in range(0, len(distinct), group):
            chosen = distinct[first : first + group]
            factors = source.of_outputs(params, part, chosen, compact)
            lengths[start:stop, first : first + group] = factor_lengths(
                factors, source.workspace, source.options.diagonal
            )

    for _ in over_parts(inputs, source.tile_share(min(group, len(distinct)), passing=True), fill):
        pass
    if counted:
        source.count_rows(inputs.num_samples * len(distinct), inputs)
    return lengths[:, index.to(lengths.device)].sum(2).movedim(1, 0).flatten(1)


def layer_gram(source: FactorSource, params: Parameters, inputs: Inputs, cotangents: Tensor) -> Tensor:
    """Return the ``(N, r, N, r)`` Gram matrix of covered gradients for ``(N, r, O)`` cotangents."""
    count, width = cotangents.shape[:2]
    result = cotangents.new_zeros((1, count * width, count * width))
    index = torch.arange(width).view(1, 1, -1)
    vectors, made = cotangents.transpose(0, 1), 0  # (r, N, O)

    def make(part: Part) -> Factors:
        nonlocal made
        start, stop, samples = part
        made += (stop - start) * width
        return source.of(params, samples, vectors[:, start:stop], compact=source.options.kernel != "gram")

    def add(rows: slice, columns: slice, first: Factors, second: Factors) -> None:
        target = result[
            :, rows.start * width : rows.stop * width, columns.start * width : columns.stop * width
        ]
        own, force = rows == columns, source.options.kernel
        accumulate_kernel(target, first, second, index, index, own, source.workspace, force)

    def clear(rows: slice) -> None:
        result[:, rows.start * width : rows.stop * width].zero_()

    fill_lower(inputs, source.tile_share(width), make, add, clear)
    mirror(result)
    source.count_rows(made, inputs)
    return result.view(count, width, count, width)


def mirror(result: Tensor) -> None:
    """Copy what is below the diagonal of each square matrix to above it."""
    size = result.shape[1]
    for matrix in result:
        for start in range(0, size, _MIRRORED_ROWS):
            stop = min(start + _MIRRORED_ROWS, size)
            own = matrix[start:stop, start:stop]
            own.copy_(own.tril() + own.tril(-1).mT)
            matrix[start:stop, stop:] = matrix[stop:, start:stop].mT
