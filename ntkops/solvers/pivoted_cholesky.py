"""Partial Cholesky factors of a positive semidefinite K from its diagonal and a few of its columns.

The pivots are the rows whose columns span the factor. Taken greedily, each is where the diagonal of the
remainder is largest; taken at random with probabilities proportional to it (RPCholesky), outliers do not
draw all of them, and the error is within a factor of the best one of the same rank.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..arguments import checked
from ..errors import InputError, NonFiniteError, ShapeError
from ..vectors import Space, rank_cutoff, resolve_generator

__all__ = ["PivotedFactor", "pivoted_cholesky", "rpcholesky"]

_ROWS = 2**16  # of the factor that are in float64 at a time

Columns = Callable[[Tensor], Tensor]
Entries = Callable[[Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class PivotedFactor:
    """F with K ≈ F Fᵀ, where K - F Fᵀ is positive semidefinite and zero in the rows of the pivots.

    Attributes:
        factor: F, ``(n, r)``; where the rows lie on several processes, those of this one.
        pivots: ``(r,)`` rows of the pivots in the order in which they were taken, int64.
        residual: ``(n,)`` diagonal of K - F Fᵀ, float64, without negative rounding.
        trace: Sum of the diagonal of K, so that residual.sum() / trace is the share that is missing.
        products: Columns of K that were evaluated.
        method: "pivoted cholesky" or "rpcholesky".
        seed: Seed of the draws; None if nothing was drawn.
    """

    factor: Tensor
    pivots: Tensor
    residual: Tensor
    trace: float
    products: int
    method: str
    seed: int | None = None

    @property
    def rank(self) -> int:
        """Number r of columns."""
        return self.factor.shape[-1]


@checked
def pivoted_cholesky(
    columns: Columns,
    diagonal: Tensor,
    rank: int,
    *,
    tolerance: float = 0.0,
    space: Space | None = None,
) -> PivotedFactor:
    """Return the greedy partial Cholesky factor: each pivot where the remaining diagonal is largest.

    Args:
        columns: ``(b,) -> (n, b)``, the columns of K with these int64 numbers.
        diagonal: ``(n,)`` diagonal of K.
        rank: Most columns, at most n.
        tolerance: Stop once the remaining trace is below this share of the trace. What is no more than
            rounding always stops it, so that a smaller rank than asked for is the numerical rank.
        space: The space of the rows where they lie on several processes, each of which gives its rows of the
            diagonal and of columns; None for rows that are all here.

    Returns:
        The factor. Cost: one column of K a step, one after the other, and O(n r²) flops.

    Raises:
        InputError: If rank or tolerance is out of range, or a diagonal entry is negative.
        ShapeError: If the diagonal is no vector, or the columns do not fit it.
        NonFiniteError: If the diagonal or a column is not finite.

    References:
        Harbrecht, Peters, Schneider (2012), On the low-rank approximation by the pivoted Cholesky
        decomposition.

    Example:
        >>> import torch
        >>> from ntkops.solvers import pivoted_cholesky
        >>> K = torch.tensor([[1.0, 2.0, 0.0], [2.0, 4.0, 0.0], [0.0, 0.0, 3.0]])
        >>> found = pivoted_cholesky(lambda i: K[:, i], K.diagonal(), 3)
        >>> found.pivots.tolist(), found.rank  # the first row is half the second
        ([1, 2], 2)
    """
    growing = _Growing(columns, diagonal, rank, tolerance, space)
    while growing.wants_more:
        growing.add(growing.residual.argmax().reshape(1))
    return growing.result("pivoted cholesky", None)


@checked
def rpcholesky(
    columns: Columns,
    diagonal: Tensor,
    rank: int,
    *,
    block_size: int = 1,
    entries: Entries | None = None,
    tolerance: float = 0.0,
    generator: torch.Generator | None = None,
    space: Space | None = None,
) -> PivotedFactor:
    """Return a randomly pivoted partial Cholesky factor: pivots drawn in proportion to what remains.

    In blocks, that many pivots are proposed at once and each is accepted with the ratio of what then
    remains in its row to what remained before the block, which gives the same law of the pivots as taking
    them one by one.

    Args:
        columns: ``(b,) -> (n, b)``, the columns of K with these int64 numbers.
        diagonal: ``(n,)`` diagonal of K.
        rank: Most columns, at most n.
        block_size: Pivots proposed at a time: columns of K come in blocks of up to as many.
        entries: ``(b,) -> (b, b)``, the block of K in these rows and columns, where that is cheaper than
            the columns: rejected proposals then cost no column.
        tolerance: Stop once the remaining trace is below this share of the trace.
        generator: CPU generator of the pivots; None draws a seed.
        space: As for `pivoted_cholesky`; the generators of all processes are in the same state.

    Returns:
        The factor. Cost: one column of K for each pivot (for each proposal without ``entries``), and
        O(n r²) flops.

    Raises:
        InputError: If an option is out of range, or a diagonal entry is negative.
        ShapeError: If the diagonal is no vector, or the columns do not fit it.
        NonFiniteError: If the diagonal or a column is not finite.

    References:
        Chen, Epperly, Tropp, Webber (2025), Randomly pivoted Cholesky, Algorithm 2.1; Epperly, Tropp,
        Webber (2024), Embrace rejection, Algorithm 2.1.

    Example:
        >>> import torch
        >>> from ntkops.solvers import rpcholesky
        >>> K = torch.diag(torch.tensor([4.0, 1.0, 0.0]))
        >>> found = rpcholesky(
        ...     lambda i: K[:, i],
        ...     K.diagonal(),
        ...     3,
        ...     generator=torch.Generator().manual_seed(0),
        ... )
        >>> sorted(found.pivots.tolist()), float(found.residual.sum())
        ([0, 1], 0.0)
    """
    if not isinstance(block_size, int) or isinstance(block_size, bool) or block_size < 1:
        raise InputError(f"block_size={block_size!r}: pass a positive integer")
    generator, seed = resolve_generator(generator)
    growing = _Growing(columns, diagonal, rank, tolerance, space)
    while growing.wants_more:
        before = growing.worth.cpu()
        drawn = torch.multinomial(before / before.sum(), block_size, True, generator=generator)
        chances = torch.rand(block_size, generator=generator, dtype=torch.float64)
        growing.add(drawn.to(diagonal.device), before[drawn], chances, entries)
    return growing.result("rpcholesky", seed)


class _Growing:
    """A partial Cholesky factor that grows by pivots.

    Of rows on several processes each has its own of the factor, and all have the whole residual, one number a
    row, from which all take the same pivots.
    """

    def __init__(
        self, columns: Columns, diagonal: Tensor, rank: int, tolerance: float, space: Space | None
    ) -> None:
        if diagonal.dim() != 1:
            raise ShapeError(f"the diagonal needs shape (n,), got {tuple(diagonal.shape)}")
        self._space = space or Space(len(diagonal), diagonal.dtype, diagonal.device)
        self._diagonal = self._whole(diagonal.detach().double())
        _check(self._diagonal, rank, tolerance)
        self._columns, self._rank = columns, rank
        self._trace = float(self._diagonal.sum())
        self._dtype = diagonal.dtype
        # of the trace, and of the largest entry: what is below is no remainder any more
        rounding = rank_cutoff(len(self._diagonal), diagonal.dtype)
        self._floor = max(tolerance, rounding) * self._trace
        self._cutoff = rounding * float(self._diagonal.max()) if len(self._diagonal) else 0.0
        self._factor = diagonal.new_empty((len(diagonal), rank))
        self._pivots: list[int] = []
        self._products = 0
        self.residual = self._diagonal.clone()

    def _whole(self, values: Tensor) -> Tensor:
        """Return a number for each of all rows."""
        return self._space.whole(values.unsqueeze(-1)).squeeze(-1)

    @property
    def wants_more(self) -> bool:
        """Whether pivots are still to be taken."""
        if len(self._pivots) >= self._rank:
            return False
        return float(self.residual.sum()) > self._floor and float(self.residual.max()) > self._cutoff

    @property
    def worth(self) -> Tensor:
        """What remains of the rows that can be pivots: the others would be proposed only to be rejected."""
        return self.residual * (self.residual > self._cutoff)

    def add(
        self,
        proposed: Tensor,
        before: Tensor | None = None,
        chances: Tensor | None = None,
        entries: Entries | None = None,
    ) -> None:
        """Take those of the proposed pivots that are accepted: all of them without chances."""
        whole: Tensor | None = None
        if len(proposed) == 1:  # a single proposal is always accepted
            accepted = [0]
        elif entries is not None:
            accepted = self._accepted(proposed, entries(proposed), before, chances)
        else:
            whole = self._evaluate(proposed)
            accepted = self._accepted(proposed, self._space.take(whole, proposed), before, chances)
        accepted = accepted[: self._rank - len(self._pivots)]
        chosen = proposed[accepted]
        block = self._evaluate(chosen) if whole is None else whole[:, accepted]
        for position, pivot in enumerate(chosen.tolist()):
            self._take(pivot, block[:, position].double())

    def _evaluate(self, chosen: Tensor) -> Tensor:
        block = self._columns(chosen)
        self._products += len(chosen)
        if block.shape != (len(self._factor), len(chosen)):
            raise ShapeError(
                f"columns gave shape {tuple(block.shape)} for {len(chosen)} of {len(self._factor)} rows"
            )
        if self._space.any(not bool(torch.isfinite(block).all())):
            raise NonFiniteError("a column of the kernel holds NaN or infinity")
        return block.detach()

    def _accepted(
        self, proposed: Tensor, block: Tensor, before: Tensor | None, chances: Tensor | None
    ) -> list[int]:
        """Go through the proposals as if each were drawn after those before it had been taken."""
        assert before is not None and chances is not None
        rows = self._space.take(self._factor[:, : len(self._pivots)], proposed).double()
        rest = (block.double() - rows @ rows.mT).cpu()
        accepted: list[int] = []
        for i in range(len(proposed)):
            left = float(rest[i, i])
            # Proposed with probability d_i / Σ d of before the block; d_i now ≤ d_i then, so that accepting
            # with their ratio leaves the law of pivots that are taken one after the other.
            if left > self._cutoff and float(chances[i]) * float(before[i]) < left:
                column = rest[:, i] / left**0.5
                rest = rest - torch.outer(column, column)
                accepted.append(i)
        return accepted

    def _take(self, pivot: int, column: Tensor) -> None:
        """Add one column to the factor; what is left of a pivot is recomputed from the column."""
        size = len(self._pivots)
        known = self._factor[:, :size]
        number = torch.tensor([pivot], device=known.device)
        row, rest = self._space.take(known, number)[0].double(), column.clone()
        for start in range(0, len(rest), _ROWS):  # a float64 copy of the whole factor would double it
            rest[start : start + _ROWS] -= known[start : start + _ROWS].double() @ row
        # column k of F = (K e_p - F F_pᵀ) / √(what is left of K_pp)
        left = float(self._space.take(rest.unsqueeze(-1), number))
        if left <= self._cutoff:
            self.residual[pivot] = 0.0
            return
        self._factor[:, size] = (rest / left**0.5).to(self._dtype)
        self._pivots.append(pivot)
        explained = self._whole(self._factor[:, size].double().square())
        self.residual = (self.residual - explained).clamp(min=0)
        # exactly, in the rows of pivots: rounding would let a pivot be drawn again
        self.residual[self._pivots] = 0.0

    def result(self, method: str, seed: int | None) -> PivotedFactor:
        """Return the factor as it is."""
        rank = len(self._pivots)
        pivots = torch.tensor(self._pivots, dtype=torch.int64, device=self._factor.device)
        factor = self._factor if rank == self._factor.shape[1] else self._factor[:, :rank].clone()
        return PivotedFactor(factor, pivots, self.residual, self._trace, self._products, method, seed)


def _check(diagonal: Tensor, rank: Any, tolerance: float) -> None:
    if not isinstance(rank, int) or isinstance(rank, bool) or not 1 <= rank <= len(diagonal):
        raise InputError(f"rank={rank!r}: pass an integer from 1 to the number {len(diagonal)} of rows")
    if not 0 <= tolerance < 1:
        raise InputError(f"tolerance={tolerance!r}: a share of the trace is a number in [0, 1)")
    if not bool(torch.isfinite(diagonal).all()):
        row = int((~torch.isfinite(diagonal)).nonzero()[0])
        raise NonFiniteError(f"the diagonal holds NaN or infinity in row {row}")
    if bool((diagonal < 0).any()):
        row = int((diagonal < 0).nonzero()[0])
        raise InputError(f"the diagonal is negative in row {row}: the kernel is not positive semidefinite")
