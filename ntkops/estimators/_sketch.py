"""The (R, M) sketch of one or two kernels, grown without repeating a product."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor

from ..errors import InputError
from ..vectors import Distribution, Space
from ._leave_out import SketchNumbers, held_out, leave_one_out, plain
from ._quantities import Inner, Trace
from ._request import Operand
from ._statistics import Combination, Mean, Summary, summarize_folds
from ._two_sided import by_parts, draw_probes, project_out

__all__ = ["SketchCore", "new_directions"]

_NEGATIVE = 1e3  # rounding units of the largest Ritz value below which a negative one is not rounding


class SketchCore:
    r"""Probes Ω shared by one or two kernels, and what they make of them.

    A kernel that knows its factors K = J Jᵀ takes one vjp and one jvp a column: G = Jᵀ Ω = Q R, F = J Q. One
    that is only multiplied takes a product, Y = K Ω: with :math:`\Omega^\top Y = R^\top R` and
    :math:`F = Y R^{-1}` the numbers are the same, save that of what is small in R a
    square root leaves half the digits.
    """

    one_sided = False
    order = 2.0
    least = 3

    def __init__(
        self,
        operands: Sequence[Operand],
        generator: torch.Generator,
        distribution: Distribution = "sphere",
    ) -> None:
        self._operands, self._generator, self._distribution = list(operands), generator, distribution
        self._space: Space = operands[0].columns
        self._batch = operands[0].batch_shape
        first = operands[0]
        empty = torch.empty((*self._batch, self._space.length, 0), dtype=first.dtype, device=first.device)
        self._probes = empty
        self._numbers: SketchNumbers | None = None

    @cached_property
    def _sides(self) -> list[_Factored | _Multiplied]:
        """What each kernel makes of the probes; not asked of a sketch that is only priced."""
        return [_side(operand, self._probes[..., :0]) for operand in self._operands]

    @cached_property
    def limit(self) -> int:
        """Columns that can be independent."""
        return min(self._space.size, *(side.limit for side in self._sides))

    @classmethod
    def joined(cls, first: SketchCore, second: SketchCore) -> SketchCore:
        """Return the sketch of two kernels from one of each, which must have drawn the same probes."""
        both = cls.__new__(cls)
        both.__dict__.update(first.__dict__)
        both._operands = first._operands + second._operands
        both._sides = first._sides + second._sides
        both._numbers = None
        both.limit = min(first.limit, second.limit)
        return both

    def shares_probes(self, other: SketchCore) -> bool:
        """Whether another sketch has drawn the same probes."""
        return self._probes.shape == other._probes.shape and torch.equal(self._probes, other._probes)

    @property
    def unit(self) -> int:
        """Passes of one column through every kernel."""
        return sum(operand.cost for operand in self._operands)

    @property
    def columns(self) -> int:
        """Probes so far."""
        return self._probes.shape[-1]

    @property
    def full(self) -> bool:
        """Whether the sketch holds the whole of its kernels."""
        return self.columns >= self.limit

    def grow(self, columns: int) -> None:
        """Go on to so many columns in all, or to the rank that is possible."""
        if columns < min(self.least, self.limit):
            raise InputError(
                f"a sketch with an error takes at least {self.least} columns, that is "
                f"num_passes={self.least * self.unit}; {columns} can be paid for"
            )
        count = min(columns, self.limit) - self.columns
        if count <= 0:
            return
        fresh = self._probes.new_empty((*self._probes.shape[:-1], count))
        for column in range(count):  # one by one, so that growing draws the same as a start
            fresh[..., column : column + 1] = draw_probes(
                self._space, self._batch, 1, self._generator, self._distribution
            )
        self._probes = beside(self._probes, fresh)
        for side in self._sides:
            side.extend(fresh)
        self._numbers = None

    @property
    def numbers(self) -> SketchNumbers:
        """The small matrices of all columns so far."""
        if self._numbers is None:
            gram = self._space.inner(self._probes, self._probes).cpu()
            found = [side.coordinates(self._probes) for side in self._sides]
            products = {}
            for a, one in enumerate(self._sides):
                for b, other in enumerate(self._sides):
                    C = self._operands[0].rows.inner(one.images, other.images)
                    # C = F_aᵀ F_b: the large blocks Y_aᵀ Y_b meet once, and the small turns act on the result
                    if one.turn is not None:
                        C = one.turn.mT @ C
                    products[a, b] = (C if other.turn is None else C @ other.turn).cpu()
            eps = torch.finfo(self._probes.dtype).eps
            self._numbers = SketchNumbers(self._space.size, gram, found, products, eps)
        return self._numbers

    def approximate(self, moments: Sequence[Trace | Inner]) -> Tensor:
        """Return the moments of the approximation, ``(*batch, q)``."""
        return plain(self.numbers, moments).movedim(0, -1)

    def summary(self, moments: Sequence[Trace | Inner], combine: Combination) -> Summary:
        """Return a function of moments: the value from leaving out each probe, the error from folds."""
        if self.full:
            value = combine(self.approximate(moments))
            # as many directions as there are: K̂ = K
            return Summary(value, torch.zeros_like(value), freedom=2**30, exact=True)
        value = combine(leave_one_out(self.numbers, moments).mean(-1).movedim(0, -1))

        def means(fold: Sequence[int]) -> list[Mean]:
            return held_out(self.numbers, moments, fold)

        # A trace alone knows the variance of each of its samples; of functions of several the jackknife
        # tells.
        alone = len(moments) == 1 and isinstance(moments[0], Trace)
        return summarize_folds(value, self.columns, means, None if alone else combine)


def _side(operand: Operand, empty: Tensor) -> _Factored | _Multiplied:
    found = operand.capabilities.factors()
    if found is not None and operand.capabilities.symmetric:
        return _Factored(Operand(found[0]), empty)
    return _Multiplied(operand, empty)


class _Factored:
    """One kernel by its factor: G = Jᵀ Ω, an orthonormal Q of it, and F = J Q.

    Attributes:
        limit: Columns that can be independent.
        images: F, ``(*batch, n, r)``.
        turn: Nothing is left to do with the images.
    """

    turn: Tensor | None = None

    def __init__(self, factor: Operand, empty: Tensor) -> None:
        self._factor = factor
        self._space: Space = factor.columns
        self.limit = min(factor.rows.size, self._space.size)
        self.images = empty
        shape = (*factor.batch_shape, self._space.length, 0)
        self._basis = torch.empty(shape, dtype=factor.dtype, device=factor.device)
        self._pulled = self._basis

    def extend(self, probes: Tensor) -> None:
        pulled = by_parts(self._factor.pull, probes)
        fresh = new_directions(self._space, self._basis, pulled)
        self._pulled = beside(self._pulled, pulled)
        if fresh.shape[-1]:
            self._basis = beside(self._basis, fresh)
            self.images = beside(self.images, by_parts(self._factor.multiply, fresh))

    def coordinates(self, probes: Tensor) -> Tensor:
        return self._space.inner(self._basis, self._pulled).cpu()


class _Multiplied:
    """One kernel by its products alone: Y = K Ω, with R from a square root of Ωᵀ Y.

    Attributes:
        limit: Columns that can be independent.
        images: Y, ``(*batch, n, m)``.
        turn: What makes F of Y, ``(*batch, m, m)``.
    """

    def __init__(self, operand: Operand, empty: Tensor) -> None:
        self._operand = operand
        self.limit = operand.rows.size
        self.images = empty
        self.turn: Tensor | None = None

    def extend(self, probes: Tensor) -> None:
        self.images = beside(self.images, by_parts(self._operand.multiply, probes))

    def coordinates(self, probes: Tensor) -> Tensor:
        gram = self._operand.columns.inner(probes, self.images)
        # Ωᵀ K Ω = V Λ Vᵀ gives R = Λ^{1/2} Vᵀ, so that RᵀR = Ωᵀ K Ω as with factors, and F = Y R⁺ = Y V
        # Λ^{-1/2}.
        values, vectors = _spectrum_of(gram, torch.finfo(probes.dtype).eps)
        roots = values.sqrt()
        self.turn = vectors * torch.where(roots > 0, 1 / roots.clamp(min=1e-300), 0.0).unsqueeze(-2)
        return (roots.unsqueeze(-1) * vectors.mT).cpu()


def _spectrum_of(gram: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Return eigenvalues and eigenvectors of Ωᵀ K Ω, with those that are rounding set to zero."""
    scale = gram.diagonal(dim1=-2, dim2=-1).abs().amax(-1, keepdim=True).unsqueeze(-1)
    lopsided = (gram - gram.mT).abs() > _NEGATIVE * eps * scale * gram.shape[-1]
    values, vectors = torch.linalg.eigh((gram + gram.mT) / 2)
    largest = values.abs().amax(-1, keepdim=True)
    if bool(lopsided.any()) or bool((values < -_NEGATIVE * eps * largest * gram.shape[-1]).any()):
        raise InputError(
            "a sketch needs a symmetric positive semidefinite operator, and the products with this one show "
            "that it is not; use method='hutch++' or 'hutchinson'"
        )
    # What is below rounding of the products has no digits: its root would enter F by 1 / √rounding.
    kept = values > largest * (eps * gram.shape[-1])
    return torch.where(kept, values, 0.0), vectors


def new_directions(space: Space, basis: Tensor, block: Tensor) -> Tensor:
    """Return orthonormal directions that a block adds to a basis, those of a hair's breadth too.

    They are found in float64 whatever the dtype, since what a direction adds to the trace is its square, and
    the cut of `Space.orthonormalize` in float32 would lose parts that count.
    """
    dtype = block.dtype
    wide = basis.double()
    fresh = project_out(space, wide, block.double())
    if block.dim() == 2:  # what is left of a dependent column is rounding
        kept = space.sum_squares(fresh).sqrt() > 10 * torch.finfo(dtype).eps * space.sum_squares(block).sqrt()
        fresh = fresh[:, kept]
    if not fresh.shape[-1]:
        return fresh.to(dtype)
    fresh = space.orthonormalize(fresh)
    if basis.shape[-1] and fresh.shape[-1]:
        fresh = space.orthonormalize(project_out(space, wide, fresh))
    return fresh.to(dtype)


def beside(left: Tensor, right: Tensor) -> Tensor:
    """Return two blocks side by side; a long one is not copied for the sake of an empty one."""
    return torch.cat([left, right], dim=-1) if left.shape[-1] else right.contiguous()
