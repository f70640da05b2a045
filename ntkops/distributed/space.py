"""The space of vectors whose rows are spread over ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..vectors import Distribution, Space, rank_cutoff
from .group import Ranks

__all__ = ["ShardedSpace"]

Result = TypeVar("Result")

_DRAWN = 2**22  # random numbers drawn at a time: 32 MiB
_GROUP = 16  # torch draws normal numbers in groups of so many


class ShardedSpace(Space):
    """A space whose vectors are spread over ranks, some rows on each.

    Blocks are columns ``(*batch, length, k)`` of the rows that this rank holds. Inner products, sums and
    bases are those of the whole vectors, the same on all ranks; each call is a collective, made by all of
    them.

    Args:
        ranks: The processes.
        lengths: Rows that each of them holds; 0 is allowed.
        dtype: Dtype of the vectors.
        device: Device of this rank's rows.
    """

    def __init__(
        self, ranks: Ranks, lengths: Sequence[int], dtype: torch.dtype, device: torch.device | str = "cpu"
    ) -> None:
        super().__init__(sum(lengths), dtype, device)
        self.ranks, self.lengths = ranks, tuple(int(length) for length in lengths)

    @property
    def length(self) -> int:
        """Number of entries of a vector that this rank holds."""
        return self.lengths[self.ranks.rank]

    @property
    def start(self) -> int:
        """Position of the first of them in the whole vector."""
        return sum(self.lengths[: self.ranks.rank])

    @property
    def part(self) -> tuple[int, int]:
        """Rank and number of ranks."""
        return self.ranks.rank, self.ranks.count

    @property
    def is_spread(self) -> bool:
        """Whether other ranks may hold parts of a vector: what is done with vectors is a collective."""
        return True

    def matches(self, other: Space) -> bool:
        """Return whether vectors of another space lie on the same ranks as those of this one."""
        return (
            isinstance(other, ShardedSpace)
            and self.lengths == other.lengths
            and self.ranks.group is other.ranks.group
        )

    def share(self, item: Any) -> list[Any]:
        """Return what every rank gives, in their order."""
        return self.ranks.share(item)

    def together(self, work: Callable[[], Result], what: str) -> Result:
        """Do work that may fail on some ranks; see `Ranks.together`."""
        return self.ranks.together(work, what)

    def common(self, generator: torch.Generator) -> torch.Generator:
        """Give the generator the state that it has on rank 0, so that all ranks draw the same."""
        state = self.ranks.broadcast_tensor(generator.get_state(), 0)
        generator.set_state(state)
        return generator

    def cast(self, dtype: torch.dtype) -> ShardedSpace:
        """Return the same space in another dtype."""
        return ShardedSpace(self.ranks, self.lengths, dtype, self.device)

    def take(self, block: Tensor, numbers: Tensor) -> Tensor:
        """Return some rows of vectors on all ranks; see `Space.take`."""
        own = numbers.to(block.device) - self.start
        here = (own >= 0) & (own < self.length)
        found = block.new_zeros((*block.shape[:-2], len(numbers), block.shape[-1]))
        found[..., here, :] = block[..., own[here], :]
        return self.total(found)  # one rank has each of them: nothing is rounded

    def whole(self, block: Tensor) -> Tensor:
        """Return the rows of all ranks, one below the other, on all of them."""
        return self.ranks.gather(block, self.lengths)

    def largest(self, value: float) -> float:
        """Return the largest of one number from each rank."""
        return self.ranks.largest(value)

    def total(self, partial: Tensor) -> Tensor:
        """Return the sum over ranks of numbers that each has made of its own rows."""
        return self.ranks.total(partial)

    def inner(self, left: Tensor, right: Tensor) -> Tensor:
        """Return all inner products ``leftᵀ right`` in float64, the same on all ranks."""
        return self.total(super().inner(left, right))

    def sum_squares(self, block: Tensor) -> Tensor:
        """Return the squared length of each column in float64, the same on all ranks."""
        return self.total(super().sum_squares(block))

    def any(self, flag: bool) -> bool:
        """Return whether the flag is set on any rank."""
        return self.ranks.any(flag)

    def orthonormalize(self, block: Tensor) -> Tensor:
        """Return this rank's rows of a basis of the columns' span; see `Space.orthonormalize`."""
        # B_i = Q_i R_i on rank i; the R_i below each other, k rows each at most, are R = U S Vᵀ on all ranks
        # alike. diag(Q_i) U then has orthonormal columns, and spans what B does.
        scale = self.ranks.largest(float(block.abs().max()) if block.numel() else 0.0)
        columns = block.shape[-1]
        if not scale > 0 and block.dim() == 2 or columns == 0:
            return block[..., :0]
        own, triangle = torch.linalg.qr(block.double() / (scale or 1.0))
        # R_i has as many rows as the smaller side of B_i.
        heights = [min(length, columns) for length in self.lengths]
        stacked = self.ranks.gather(triangle, heights)  # (*batch, sum of heights, k)
        first = sum(heights[: self.ranks.rank])
        rows = slice(first, first + heights[self.ranks.rank])
        if block.dim() > 2:
            return (own @ torch.linalg.qr(stacked)[0][..., rows, :]).to(block.dtype)
        basis, singular, _ = torch.linalg.svd(stacked, full_matrices=False)
        # The singular values of R are those of the whole block.
        cutoff = singular[0] * rank_cutoff(max(self.size, columns), block.dtype)
        return (own @ basis[rows, singular > cutoff]).to(block.dtype)

    def probes(
        self, count: int, generator: torch.Generator, distribution: Distribution = "rademacher"
    ) -> Tensor:
        """Draw this rank's rows of the columns that one process would draw; see `Space.probes`.

        All rows are drawn on every rank, some at a time, and the others' are dropped: a seed means the same
        for any number of ranks. The generator is set to the state of rank 0's.

        Returns:
            ``(length, count)``.
        """
        self.common(generator)
        kept, squares = [], torch.zeros(count, dtype=torch.float64)
        stop = self.start + self.length
        for first, last in self._draws(count):
            shape = (last - first, count)
            if distribution == "rademacher":
                drawn = torch.randint(0, 2, shape, generator=generator)
            else:
                drawn = torch.randn(shape, generator=generator, dtype=torch.float64)
                squares += drawn.square().sum(0)
            if first < stop and last > self.start:
                kept.append(drawn[max(self.start - first, 0) : stop - first].double())
        rows = torch.cat(kept) if kept else torch.zeros((0, count), dtype=torch.float64)
        if distribution == "rademacher":
            rows = rows.mul_(2).sub_(1)  # 0 and 1 to -1 and 1
        elif distribution == "sphere":
            rows *= self.size**0.5 / squares.sqrt()  # whole columns of length √n
        return rows.to(dtype=self.dtype, device=self.device)

    def _draws(self, count: int) -> Iterator[tuple[int, int]]:
        """Yield rows that are drawn at a time, so that all numbers are those of one draw."""
        step = max(_GROUP, _DRAWN // max(count, 1) // _GROUP * _GROUP)
        first = 0
        while first < self.size:
            last = first + step
            # Fewer numbers than a group, at the end, torch draws in another way.
            if last + _GROUP > self.size:
                last = self.size
            yield first, last
            first = last

    def __repr__(self) -> str:
        """Show size, share, dtype and device."""
        rank, count = self.part
        return (
            f"ShardedSpace(size={self.size}, length={self.length}, rank={rank} of {count}, {self.dtype}, "
            f"{self.device})"
        )
