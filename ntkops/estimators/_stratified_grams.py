"""Gram matrices of per-sample gradients, reduced sample by sample and tile by tile."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..engines.passes import SharedPasses
from ..errors import InputError, UnsupportedOperationError
from ..operators.capabilities import capabilities, tile_slices
from ._request import Operand, require_finite

__all__ = ["SampleGrams", "Strata", "gram_passes", "sample_grams"]

_ENTRIES = 2**23  # entries of a Gram matrix that is held at a time


@dataclass(frozen=True)
class Strata:
    """The samples of kernels, and a way to their gradients.

    Attributes:
        operands: One or two kernels over the same samples and outputs.
        samples: Number N of samples.
        outputs: Number O of outputs of a sample.
    """

    operands: tuple[Operand, ...]
    samples: int
    outputs: int

    @classmethod
    def of(cls, operands: Sequence[Operand]) -> Strata | None:
        """Return the strata of some operands, or None where there are none."""
        shapes = {operand.capabilities.sample_shape for operand in operands}
        shape = shapes.pop()
        return None if shape is None or shapes else cls(tuple(operands), *shape)

    @classmethod
    def require(cls, operands: Sequence[Operand], what: str) -> Strata:
        """Return the strata of some operands."""
        found = cls.of(operands)
        if found is not None:
            return found
        for operand in operands:
            if operand.capabilities.sample_shape is None:
                raise UnsupportedOperationError(
                    f"method='stratified' draws probes sample by sample, so {what} must be that of a square "
                    "kernel over all outputs of its samples, ntkops.ntk(model, x), and not of a part, a sum "
                    f"or a multiple of one; this is a {type(operand.operator).__name__} of shape "
                    f"{tuple(operand.shape)}: use method='auto' or 'hutch++'"
                )
        shapes = [operand.capabilities.sample_shape for operand in operands]
        raise InputError(
            f"the kernels have {shapes[0]} and {shapes[1]} samples and outputs: shared probes need the same "
            "of both"
        )

    @property
    def layered(self) -> bool:
        """Whether layer structure makes a per-sample pass as cheap as a backward pass."""
        return all(operand.capabilities.layered for operand in self.operands)

    def gram(self, position: int, frames: Tensor, kernel: Any = None) -> Tensor:
        """Return the Gram matrix of the gradients of some samples."""
        operand = self.operands[position]
        operator: Any = operand.operator if kernel is None else kernel
        # frames (n, O, m) as cotangents (n, m, O); the Gram matrix is (n, m, n, m)
        probes = frames.mT.to(dtype=operand.dtype, device=operand.device)
        found = capabilities(operator).sample_gram(probes.contiguous())
        return require_finite(found, "the Gram matrix of per-sample gradients").double()

    def own(self, position: int, frames: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """Yield the Gram matrices ``(n, m, m)`` within each sample, some samples at a time.

        The samples are taken in parts that keep the work on pairs of different samples small; a re-iterable
        is read once.
        """
        # A Gram matrix (n, m, n, m) of which the diagonal n blocks are used: small n wastes little, an eighth
        # of what may be held at a time.
        size = max(1, math.isqrt(_ENTRIES // 8) // frames.shape[-1])
        source: Any = self.operands[position].capabilities
        space = self.operands[position].rows
        if space.is_spread:
            for part, kernel in source.sample_parts(size):
                make = partial(_own_of, self, position, frames[part], kernel)
                yield part, space.together(make, "Gram matrices of gradients")
            return
        with SharedPasses(self.samples) as passes:
            for part, kernel in source.sample_parts(size):
                with passes.over(part.stop - part.start):
                    block = _within(self.gram(position, frames[part], kernel))
                yield part, block

    def pair_reader(self) -> Callable[[slice, slice], list[Any]]:
        """Return what gives the kernels over two parts of the samples, to be asked for row after row."""
        sources: list[Any] = [operand.capabilities for operand in self.operands]
        readers = [source.sample_reader() for source in sources]
        return lambda one, other: [reader(one, other) for reader in readers]


@dataclass(frozen=True)
class SampleGrams:
    """What a block of columns of the frames says of the kernels.

    Attributes:
        own: ``(p, N, m, m)``: W_ii of each kernel.
        others: ``(q, N, m, m)``: for each pair of kernels the symmetric part of Σ_{j≠i} W¹_ij W²_ijᵀ.
    """

    own: Tensor
    others: Tensor


def sample_grams(strata: Strata, frames: Tensor, pairs: Sequence[tuple[int, int]]) -> SampleGrams:
    """Make the Gram matrices of all kernels in shared frames, and reduce them."""
    space = strata.operands[0].rows
    count, columns = strata.samples, frames.shape[-1]
    own = torch.zeros((len(strata.operands), count, columns, columns), dtype=torch.float64)
    others = torch.zeros((len(pairs), count, columns, columns), dtype=torch.float64)
    if not pairs:
        for position in range(len(strata.operands)):
            for part, block in strata.own(position, frames):
                own[position, part] = block.cpu()
        return SampleGrams(space.total(own), others)
    # m per-sample passes for each kernel, T - 1 times as many where its N·m rows need T parts; one tile is
    # held
    tiles = _spread_tiles if space.is_spread else _tiles
    for row, column, blocks in tiles(strata, frames):
        if row == column:
            own[:, row] = torch.stack([_within(block) for block in blocks]).cpu()
            for block in blocks:
                block.diagonal(dim1=0, dim2=2).zero_()
        for position, (first, second) in enumerate(pairs):
            # Σ_j W¹_ij W²_ijᵀ; a tile off the diagonal also stands for its mirror image, (i, j) for (j, i)
            others[position, row] += _row_products(blocks[first], blocks[second]).cpu()
            if row != column:
                flipped = [blocks[k].permute(2, 3, 0, 1) for k in (first, second)]
                others[position, column] += _row_products(*flipped).cpu()
    return SampleGrams(space.total(own), space.total(others + others.mT) / 2)


def gram_passes(samples: int, columns: int, pairs: bool) -> int:
    """Return the per-sample passes of one kernel that `sample_grams` makes for a block of columns."""
    if not pairs or (samples * columns) ** 2 <= _ENTRIES:
        return columns
    # T parts meet in T (T - 1) / 2 pairs, each over 2 / T of the samples: T - 1 passes over all of them.
    return columns * max(1, -(-samples // _part(columns)) - 1)


def _part(columns: int) -> int:
    """Return the samples of a part, of which two make a tile."""
    return max(1, math.isqrt(_ENTRIES) // (2 * columns))


def _tiles(strata: Strata, frames: Tensor) -> Iterator[tuple[slice, slice, list[Tensor]]]:
    """Yield ``(n, m, n', m)`` tiles on and above the diagonal, one for each kernel."""
    columns = frames.shape[-1]
    if (strata.samples * columns) ** 2 <= _ENTRIES:
        whole = slice(0, strata.samples)
        yield whole, whole, [strata.gram(k, frames) for k in range(len(strata.operands))]
        return
    size = _part(columns)
    parts = list(tile_slices(strata.samples, size))
    seen: set[int] = set()
    kernels_of = strata.pair_reader()
    with SharedPasses(strata.samples) as passes:
        for i, j in itertools.combinations(range(len(parts)), 2):
            one, other = parts[i], parts[j]
            both = torch.cat([frames[one], frames[other]])
            with passes.over(len(both)):
                blocks = [strata.gram(k, both, kernel) for k, kernel in enumerate(kernels_of(one, other))]
            split = one.stop - one.start
            inside = {i: slice(0, split), j: slice(split, None)}
            yield one, other, [block[inside[i]][:, :, inside[j]] for block in blocks]
            # Blocks within a part come with the first pair that it is in, at no further pass.
            for number in {i, j} - seen:
                seen.add(number)
                own = inside[number]
                yield parts[number], parts[number], [block[own][:, :, own].clone() for block in blocks]


def _spread_tiles(strata: Strata, frames: Tensor) -> Iterator[tuple[slice, slice, list[Tensor]]]:
    """Yield what `_tiles` does for samples over several processes: to each of them, an equal share."""
    size, space = _part(frames.shape[-1]), strata.operands[0].rows
    sources: list[Any] = [operand.capabilities for operand in strata.operands]
    for pairs in zip(*(source.sample_pairs(size) for source in sources), strict=True):
        one, other, _ = pairs[0]
        make = partial(_blocks_of, strata, frames, one, other, [kernel for _, _, kernel in pairs])
        blocks = space.together(make, "Gram matrices of gradients")
        if blocks:
            yield one, other, blocks


def _own_of(strata: Strata, position: int, frames: Tensor, kernel: Any) -> Tensor:
    """Return ``(n, m, m)`` of a part of the samples; of a part without any, nothing."""
    if kernel is None:
        return frames.new_zeros((0, frames.shape[-1], frames.shape[-1]))
    return _within(strata.gram(position, frames, kernel))


def _blocks_of(
    strata: Strata, frames: Tensor, one: slice, other: slice, kernels: Sequence[Any]
) -> list[Tensor]:
    """Return the tile of each kernel between two parts of the samples; none where it is not made here."""
    if kernels[0] is None:
        return []
    if one == other:
        return [strata.gram(k, frames[one], kernel) for k, kernel in enumerate(kernels)]
    both, split = torch.cat([frames[one], frames[other]]), one.stop - one.start
    blocks = [strata.gram(k, both, kernel) for k, kernel in enumerate(kernels)]
    return [block[:split][:, :, split:] for block in blocks]


def _within(block: Tensor) -> Tensor:
    """Return ``(n, m, m)`` of ``(n, m, n, m)``: what pairs a sample with itself."""
    return block.diagonal(dim1=0, dim2=2).movedim(-1, 0).clone()


def _row_products(first: Tensor, second: Tensor) -> Tensor:
    """Return ``(n, m, m)``: Σ_j W¹_ij W²_ijᵀ of ``(n, m, n', m)``."""
    return first.flatten(2) @ second.flatten(2).mT
