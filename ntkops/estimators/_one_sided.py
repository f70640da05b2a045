"""Estimators from one direction of differentiation: Algorithm 2 and Proposition 1 of the paper."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from ..errors import InputError
from ..vectors import Space
from ._invariants import Invariants, RootOfSquare
from ._quantities import Quantity, Trace
from ._request import Operand, factors_of
from ._statistics import Mean, Moment, Pairs
from ._two_sided import by_parts, column_dots, draw_probes, project_out, sphere_factor

__all__ = ["OneSidedPairs", "OneSidedTrace"]

_WIDTH = 64  # probes passed at a time


class OneSidedTrace:
    r"""The trace from vjps or from jvps alone (paper, Algorithm 2).

    .. math:: \mathrm{tr}(L R^\top) = E[(L^\top v)^\top (R^\top v)] = E[(R p)^\top (L p)]
    """

    one_sided = True
    order = 1.0
    least = 1

    def __init__(
        self, operand: Operand, generator: torch.Generator, *, forward: bool, orthogonalize: bool
    ) -> None:
        self._left, self._right = factors_of(operand)
        self._forward, self._orthogonalize, self._generator = forward, orthogonalize, generator
        self._space = self._left.columns if forward else operand.rows
        self._images = self._right.rows if forward else self._left.columns
        self._batch = operand.batch_shape
        self._samples = torch.zeros((*self._batch, 0), dtype=torch.float64)
        self._fixed: Tensor | float = 0.0

    @property
    def unit(self) -> int:
        """Passes of one probe."""
        return self._left.cost + (0 if self._right is self._left else self._right.cost)

    def grow(self, columns: int) -> None:
        """Go on to so many probes in all; an orthonormal basis cannot grow, so that it is drawn again."""
        # The basis knows nothing of K: it pays only where the probes are not few against the dimension, and
        # the other half of them alone decides the error elsewhere.
        if self._orthogonalize and columns > 1:
            half = min(columns // 2, self._space.size)
            drawn = draw_probes(self._space, self._batch, half, self._generator)
            basis = self._space.orthonormalize(drawn)
            # tr K = Σ_j q_jᵀ K q_j on the basis, exactly, plus the trace on its complement, by the other half
            self._fixed = self._terms(basis).sum(-1)
            rest = draw_probes(self._space, self._batch, columns - half, self._generator)
            rest = project_out(self._space, basis, rest)
            rest = rest * sphere_factor(self._space, rest, self._space.size - basis.shape[-1])
            self._samples = self._terms(rest)
            return
        count = columns - self._samples.shape[-1]
        if count > 0:
            fresh = self._terms(draw_probes(self._space, self._batch, count, self._generator))
            self._samples = torch.cat([self._samples, fresh], dim=-1)

    def _terms(self, probes: Tensor) -> Tensor:
        parts = []
        for block in probes.split(_WIDTH, dim=-1):
            left = self._apply(self._left, block)
            right = left if self._right is self._left else self._apply(self._right, block)
            parts.append(column_dots(self._images, left, right))
        return torch.cat(parts, dim=-1).cpu()

    def _apply(self, factor: Operand, block: Tensor) -> Tensor:
        return factor.multiply(block) if self._forward else factor.pull(block)

    def moments(self) -> list[Moment]:
        """Return the trace as it stands."""
        return [Mean(self._samples, self._fixed)]


class OneSidedPairs:
    r"""Traces and inner products from vjps or from jvps alone, over all pairs of probes (Proposition 1).

    For kernels :math:`K_i = L_i R_i^\top` and independent isotropic probes u, v of the states,

    .. math:: \mathrm{tr}(K_1^\top K_2) = E[(u^\top K_1 v)(u^\top K_2 v)],
              \qquad u^\top K_i v = (L_i^\top u)^\top (R_i^\top v),

    and for probes p of the parameters of K₁, q of those of K₂,

    .. math:: \mathrm{tr}(K_1^\top K_2) = E[(L_1 p)^\top (L_2 q) \cdot (R_1 p)^\top (R_2 q)].

    Square kernels share their probes, and so do kernels over equally many parameters, so that what cancels
    in a ratio does. Of m shared probes all pairs are used and each probe with itself, weighted for the least
    variance that is possible (`_invariants`), and the squared trace of a ratio is estimated without bias.
    Where rows and columns, or the two kernels, need probes of their own, all m² pairs are used.
    """

    one_sided = True
    order = 1.0
    least = 2

    def __init__(
        self, quantity: Quantity, operands: Sequence[Operand], generator: torch.Generator, *, forward: bool
    ) -> None:
        self._quantity, self._operands, self._generator = quantity, operands, generator
        self._factors = [factors_of(operand) for operand in operands]
        self._forward = forward
        self._batch = operands[0].batch_shape
        side = _ForwardSide if forward else _ReverseSide
        self._side = side(operands, self._factors)
        self._images: list[Tensor] = []

    @property
    def unit(self) -> int:
        """Passes of one probe through every factor."""
        return sum(factor.cost for factor, _ in self._side.jobs)

    def grow(self, columns: int) -> None:
        """Go on to so many probes in all, keeping what the old ones gave."""
        if columns < self.least:
            raise InputError(
                f"{self._quantity.name} from one direction takes at least {self.least} probes, that is "
                f"num_passes={self.least * self.unit}; {columns} can be paid for"
            )
        old = self._images[0].shape[-1] if self._images else 0
        if columns <= old:
            return
        spaces = self._side.spaces
        probes = [draw_probes(space, self._batch, columns - old, self._generator) for space in spaces]
        fresh = [
            by_parts(partial(self._side.apply, factor), probes[number]) for factor, number in self._side.jobs
        ]
        self._images = (
            [torch.cat(pair, dim=-1) for pair in zip(self._images, fresh, strict=True)] if old else fresh
        )

    def moments(self) -> list[Moment]:
        """Return the moments as they stand."""
        return [
            self._side.trace(self._images, moment.of, self._quantity.needs_pairs)
            if isinstance(moment, Trace)
            else self._side.inner(self._images, moment.first, moment.second)
            for moment in self._quantity.moments
        ]


class _Side:
    """Which factors multiply which probes, and how moments come from the images.

    Attributes:
        spaces: The spaces of the groups of probes.
        jobs: Pairs of a factor and the group of probes that it multiplies.
    """

    def __init__(self) -> None:
        self.spaces: list[Space] = []
        self.jobs: list[tuple[Operand, int]] = []

    def _job(self, factor: Operand, group: int) -> int:
        """Return the position of a job, a new one only where it is not there yet."""
        for position, (known, other) in enumerate(self.jobs):
            if known is factor and other == group:
                return position
        self.jobs.append((factor, group))
        return len(self.jobs) - 1


class _ReverseSide(_Side):
    """Probes of the states: one group where kernels are square, else one for rows and one for columns."""

    def __init__(self, operands: Sequence[Operand], factors: Sequence[tuple[Operand, Operand]]) -> None:
        super().__init__()
        first = operands[0]
        self.spaces = [first.rows] if first.is_square else [first.rows, first.columns]
        self._columns = len(self.spaces) - 1
        self._jobs = [(self._job(left, 0), self._job(right, self._columns)) for left, right in factors]
        self._inside = [left.columns for left, _ in factors]

    def apply(self, factor: Operand, block: Tensor) -> Tensor:
        return factor.pull(block)

    def inner(self, images: Sequence[Tensor], first: int, second: int) -> Moment:
        def forms(number: int, part: slice, *, turned: bool = False) -> Tensor:  # u_aᵀ K v_b
            left, right = self._jobs[number][::-1] if turned else self._jobs[number]
            return self._inside[number].inner(images[left][..., part], images[right])

        def rows(part: slice) -> tuple[Tensor, Tensor, Tensor]:
            one = forms(first, part)
            two = one if first == second else forms(second, part)
            # W₂ᵀ, for tr W₁W₂; where K₂ = J Jᵀ it is W₂
            symmetric = self._jobs[second][0] == self._jobs[second][1]
            return one, two, two if symmetric else forms(second, part, turned=True)

        count = images[self._jobs[first][0]].shape[-1]
        if not self._columns:
            return Invariants.of(rows, count, self.spaces[0].size)
        return Pairs.of(
            lambda part: forms(first, part) * forms(second, part), count, rows=0, cols=self._columns
        )

    def trace(self, images: Sequence[Tensor], number: int, squared: bool) -> Moment:
        if squared:
            return _root(self.inner(images, number, number))
        left, right = self._jobs[number]
        return Mean(column_dots(self._inside[number], images[left], images[right]).cpu())


class _ForwardSide(_Side):
    """Probes of the parameters: one group where kernels have equally many, else one for each kernel."""

    def __init__(self, operands: Sequence[Operand], factors: Sequence[tuple[Operand, Operand]]) -> None:
        super().__init__()
        parameters = [left.columns for left, _ in factors]
        shared = len({space.size for space in parameters}) == 1
        self.spaces = parameters[:1] if shared else parameters
        self._groups = [0 if shared else number for number in range(len(factors))]
        self._jobs = [
            (self._job(left, group), self._job(right, group))
            for (left, right), group in zip(factors, self._groups, strict=True)
        ]
        self._rows, self._columns = operands[0].rows, operands[0].columns

    def apply(self, factor: Operand, block: Tensor) -> Tensor:
        return factor.multiply(block)

    def inner(self, images: Sequence[Tensor], first: int, second: int) -> Moment:
        # tr K₁ᵀK₂ = tr R₁L₁ᵀ L₂R₂ᵀ = <L₁ᵀL₂, R₁ᵀR₂>: an inner product of two P x P matrices, which probes of
        # the parameters meet as those of the states meet K₁ and K₂.
        lefts = self._jobs[first][0], self._jobs[second][0]
        rights = self._jobs[first][1], self._jobs[second][1]

        def forms(space: Space, jobs: tuple[int, int], part: slice) -> Tensor:
            return space.inner(images[jobs[0]][..., part], images[jobs[1]])

        def rows(part: slice) -> tuple[Tensor, Tensor, Tensor]:
            one = forms(self._rows, lefts, part)
            two = one if lefts == rights else forms(self._columns, rights, part)
            turned = two if rights[0] == rights[1] else forms(self._columns, rights[::-1], part)
            return one, two, turned

        def products(part: slice) -> Tensor:
            one = forms(self._rows, lefts, part)
            return one * (one if lefts == rights else forms(self._columns, rights, part))

        count = images[lefts[0]].shape[-1]
        groups = self._groups[first], self._groups[second]
        if groups[0] == groups[1]:
            return Invariants.of(rows, count, self.spaces[groups[0]].size, groups[0])
        return Pairs.of(products, count, rows=groups[0], cols=groups[1])

    def trace(self, images: Sequence[Tensor], number: int, squared: bool) -> Moment:
        left, right = self._jobs[number]
        if squared:  # the probes meet LᵀR, whose trace is that of K

            def rows(part: slice) -> tuple[Tensor, Tensor, Tensor]:
                one = self._rows.inner(images[left][..., part], images[right])
                if left == right:
                    return one, one, one
                return one, one, self._rows.inner(images[right][..., part], images[left])

            group = self._groups[number]
            count = images[left].shape[-1]
            return _root(Invariants.of(rows, count, self.spaces[group].size, group))
        dots = column_dots(self._rows, images[left], images[right])
        return Mean(dots.cpu(), group=self._groups[number])


def _root(moment: Moment) -> RootOfSquare:
    assert isinstance(moment, Invariants)
    return RootOfSquare(moment)
