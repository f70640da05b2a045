"""Dense kernels, diagonals and Gram matrices from tiles of per-sample gradients.

A tile holds the gradients of a few samples, as large as the workspace allows, so that memory is that
of the result and two tiles, never the whole Jacobian.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..model import Inputs
from .differentiation import Parameters
from .summation import long_product
from .tiling import Part, fill_lower, over_parts, rows_of_parts, sample_slices

if TYPE_CHECKING:
    from .autograd import AutogradEngine

__all__ = ["dense_kernel", "gradient_gram", "kernel_diagonal"]


def _distinct(outputs: Tensor) -> tuple[Tensor, Tensor]:
    """Return the distinct output numbers and, in the shape given, where each is found among them."""
    return torch.unique(outputs, return_inverse=True)


def dense_kernel(
    engine: AutogradEngine,
    params: Parameters,
    left: Inputs,
    right: Inputs,
    left_outputs: Tensor,
    right_outputs: Tensor,
) -> Tensor:
    """Return ``(M, N₁·r₁, N₂·r₂)`` dense kernels; see `AutogradEngine.kernel`."""
    kernels, _, r1 = left_outputs.shape
    r2 = right_outputs.shape[2]
    pairs = torch.cat([left_outputs.flatten(1), right_outputs.flatten(1)], dim=1)
    unique, index = torch.unique(pairs, dim=0, return_inverse=True)
    if len(unique) < kernels:  # an expanded batch: each distinct kernel is made once
        split = left_outputs[0].numel()
        distinct = dense_kernel(
            engine,
            params,
            left,
            right,
            unique[:, :split].reshape(len(unique), -1, r1),
            unique[:, split:].reshape(len(unique), -1, r2),
        )
        return distinct[index.to(distinct.device)]
    widest = max(_distinct(left_outputs)[0].numel(), _distinct(right_outputs)[0].numel())
    if engine.tile_samples(widest) > 1 or widest == 1:
        return _kernel_by_samples(engine, params, left, right, left_outputs, right_outputs)
    return _kernel_by_outputs(engine, params, left, right, left_outputs, right_outputs)


def _kernel_by_samples(
    engine: AutogradEngine,
    params: Parameters,
    left: Inputs,
    right: Inputs,
    left_outputs: Tensor,
    right_outputs: Tensor,
) -> Tensor:
    symmetric = left is right and torch.equal(left_outputs, right_outputs)
    left_distinct, left_index = _distinct(left_outputs)
    right_distinct, right_index = _distinct(right_outputs)
    tile = engine.tile_share(max(len(left_distinct), len(right_distinct)))
    r1, r2 = left_outputs.shape[2], right_outputs.shape[2]
    shape = (len(left_outputs), left.num_samples, r1, right.num_samples, r2)
    blocks: list[tuple[slice, slice, Tensor]] = []
    made = 0

    def make(part: Part, distinct: Tensor) -> Tensor:
        nonlocal made
        made += (part[1] - part[0]) * len(distinct)
        return engine.jacobian_tile(params, part[2], distinct)  # (B, u, P)

    def add(rows: slice, columns: slice, first: Tensor, second: Tensor) -> None:
        block = _contract(first, second, left_index, right_index)
        if symmetric and rows == columns:  # exactly symmetric, whatever order the terms were summed in
            block = (block + block.permute(0, 3, 4, 1, 2)) / 2
        blocks.append((rows, columns, block))

    def fill_row(start: int, stop: int, part: Inputs) -> None:
        done = len(blocks)
        try:
            first = make((start, stop, part), left_distinct)
            for other in sample_slices(right, tile.read()):
                add(slice(start, stop), slice(*other[:2]), first, make(other, right_distinct))
        except BaseException:
            del blocks[done:]
            raise

    def clear(rows: slice) -> None:
        blocks[:] = [block for block in blocks if block[0] != rows]

    if symmetric:
        fill_lower(left, tile, lambda part: make(part, left_distinct), add, clear)
    else:
        for _ in over_parts(left, tile, fill_row, beside=right.num_samples):
            pass
    engine.count_rows(made, left)
    return _assemble(blocks, shape, symmetric)


def _contract(left: Tensor, right: Tensor, left_index: Tensor, right_index: Tensor) -> Tensor:
    """Return ``(M, B₁, r₁, B₂, r₂)``: for each kernel the sum over its R terms of a product of tiles."""
    kernels = []
    everything = left_index.shape[:2] == (1, 1) and left_index.shape[2] == left.shape[1]
    for rows, columns in zip(left_index, right_index, strict=True):
        total: Tensor | None = None
        for row, column in zip(rows, columns, strict=True):
            whole = everything and torch.equal(row, torch.arange(left.shape[1]))
            a = left if whole else left[:, row.to(left.device)]  # (B₁, r₁, P)
            whole = whole and right.shape[1] == len(column) and torch.equal(column, torch.arange(len(column)))
            b = right if whole else right[:, column.to(right.device)]
            term = long_product(a.flatten(0, 1), b.flatten(0, 1).mT)
            term = term.reshape(*a.shape[:2], *b.shape[:2])
            total = term if total is None else total + term
        assert total is not None
        kernels.append(total)
    return torch.stack(kernels)


def _assemble(blocks: list[tuple[slice, slice, Tensor]], shape: tuple[int, ...], symmetric: bool) -> Tensor:
    """Put the tiles into one kernel; differentiable where they are."""
    kernels, n1, r1, n2, r2 = shape
    if len(blocks) == 1:
        return blocks[0][2].reshape(kernels, n1 * r1, n2 * r2)
    result = blocks[0][2].new_empty(shape)
    for rows, columns, block in blocks:
        result[:, rows, :, columns] = block
        if symmetric and rows != columns:
            result[:, columns, :, rows] = block.permute(0, 3, 4, 1, 2)
    return result.reshape(kernels, n1 * r1, n2 * r2)


def _kernel_by_outputs(
    engine: AutogradEngine,
    params: Parameters,
    left: Inputs,
    right: Inputs,
    left_outputs: Tensor,
    right_outputs: Tensor,
) -> Tensor:
    """The same kernel where not even one sample's gradients of all outputs fit: outputs in groups."""
    size = 1
    while size < left_outputs.shape[2] and engine.tile_samples(2 * size) > 1:
        size *= 2
    kernels = []
    for m in range(len(left_outputs)):
        total: Tensor | None = None
        for r in range(left_outputs.shape[1]):
            rows = [
                torch.cat(
                    [
                        _kernel_by_samples(engine, params, left, right, i[None, None], j[None, None]).reshape(
                            left.num_samples, len(i), right.num_samples, len(j)
                        )
                        for j in right_outputs[m, r].split(size)
                    ],
                    dim=3,
                )
                for i in left_outputs[m, r].split(size)
            ]
            term = torch.cat(rows, dim=1)
            total = term if total is None else total + term
        assert total is not None
        kernels.append(total.flatten(2).flatten(0, 1))
    return torch.stack(kernels)


def kernel_diagonal(engine: AutogradEngine, params: Parameters, inputs: Inputs, outputs: Tensor) -> Tensor:
    """Return ``(M, N·r)`` kernel diagonals; see `AutogradEngine.diagonal`."""
    distinct, index = _distinct(outputs)
    group = max(1, min(len(distinct), engine.workspace_bytes() // _row_bytes(engine)))

    def lengths_of(start: int, stop: int, part: Inputs) -> Tensor:
        found = [_lengths(engine.jacobian_tile(params, part, chosen)) for chosen in distinct.split(group)]
        return found[0] if len(found) == 1 else torch.cat(found, dim=1)  # (n, u)

    tiles = over_parts(inputs, engine.tile_share(group), lengths_of)
    lengths = rows_of_parts(inputs.num_samples, tiles)  # (N, u)
    engine.count_rows(inputs.num_samples * len(distinct), inputs)
    gathered = lengths[:, index.to(lengths.device)].sum(2)  # (N, M, R, r) -> (N, M, r)
    return gathered.movedim(1, 0).flatten(1)


def _lengths(gradients: Tensor) -> Tensor:
    wide = gradients.dtype if gradients.device.type == "mps" else torch.float64
    return gradients.square().sum(-1, dtype=wide).to(gradients.dtype)


def _row_bytes(engine: AutogradEngine) -> int:
    return max(1, engine.num_parameters * engine.linearization.dtype.itemsize)


def gradient_gram(engine: AutogradEngine, params: Parameters, inputs: Inputs, cotangents: Tensor) -> Tensor:
    """Return the ``(N, r, N, r)`` Gram matrix of per-sample gradients; see `AutogradEngine.sample_gram`."""
    count = cotangents.shape[1]
    blocks: list[tuple[slice, slice, Tensor]] = []
    made = 0

    def make(part: Part) -> Tensor:
        nonlocal made
        start, stop, samples = part
        made += (stop - start) * count
        return engine._sample_tile(params, samples, cotangents[start:stop])

    def add(rows: slice, columns: slice, first: Tensor, second: Tensor) -> None:
        product = long_product(first.flatten(0, 1), second.flatten(0, 1).mT)
        blocks.append((rows, columns, product.reshape(1, len(first), count, len(second), count)))

    def clear(rows: slice) -> None:
        blocks[:] = [block for block in blocks if block[0] != rows]

    fill_lower(inputs, engine.tile_share(count), make, add, clear)
    engine.count_rows(made, inputs)
    shape = (1, inputs.num_samples, count, inputs.num_samples, count)
    return _assemble(blocks, shape, symmetric=True).reshape(shape[1:])
