"""What the driver of estimates needs to know of a quantity: its exact value, and how it is sampled."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Protocol

import torch
from torch import Tensor

from ..vectors import Space
from ._exact import ExactWork
from ._invariants import Invariants
from ._one_sided import OneSidedPairs, OneSidedTrace
from ._quantities import INNER, TRACE, Quantity, exact_cost, exact_moments
from ._request import Operand
from ._sketch import SketchCore
from ._statistics import Mean, Moment, Pairs, Summary, summarize, summarize_mean, summarize_product
from ._stratified import Stratified, pays
from ._two_sided import NtkAware, TwoSided
from ._xtrace import XTrace

__all__ = ["Plan", "Sampler", "ScalarPlan"]


class Sampler(Protocol):
    """A source of random probes."""

    @property
    def unit(self) -> int:
        """Passes of one column."""

    @property
    def least(self) -> int:
        """Fewest columns that it can do with."""

    @property
    def order(self) -> float:
        """Power of the number of columns with which the variance falls."""

    @property
    def one_sided(self) -> bool:
        """Whether one direction of differentiation is all there may be, so that exactness is no way out."""

    def grow(self, columns: int) -> None:
        """Go on to so many columns in all.

        A sampler whose columns do not all cost a unit says with ``price(columns)`` what growing so far takes.
        """


class Plan(Protocol):
    """What the driver needs to know of a quantity: exactly, and by sampling."""

    name: str
    space: Space
    size: int
    eps: float
    bounds: tuple[float, float]
    vector: bool

    @property
    def operands(self) -> Sequence[Operand]:
        """What is multiplied."""

    def exact_cost(self) -> float:
        """Return the passes of the exact value."""

    def exact(self, work: ExactWork) -> Tensor:
        """Return the exact value, shown and kept as ``work`` says."""

    def sampler(self, method: str, generator: torch.Generator) -> Sampler:
        """Return the source of probes of a method."""

    def summary(self, sampler: Sampler) -> Summary:
        """Return the estimate as it stands."""

    def choices(self) -> tuple[str, ...]:
        """Return the methods of "auto" where exact is too expensive: the first that passes pay for."""


class ScalarPlan:
    """A quantity of one or two operators."""

    vector = False

    def __init__(self, quantity: Quantity, operands: Sequence[Operand], *, orthogonalize: bool) -> None:
        self.quantity, self.operands = quantity, list(operands)
        self.name, self.bounds = quantity.name, quantity.bounds
        self.space = operands[0].rows
        self.size = min(operands[0].rows.size, operands[0].columns.size)
        self.eps = operands[0].rounding
        self.orthogonalize = orthogonalize
        self._grams = all(map(_is_gram, operands))
        if quantity in (TRACE, INNER) and self._grams:
            # tr J Jᵀ = |J|² and <J Jᵀ, L Lᵀ> = |Jᵀ L|² are never negative, and neither are their intervals.
            self.bounds = (0.0, torch.inf)
        if quantity.needs_square:
            operands[0].require_square(quantity.name)

    def exact_cost(self) -> float:
        return exact_cost(self.quantity, self.operands)

    def exact(self, work: ExactWork) -> Tensor:
        moments = exact_moments(self.quantity, self.operands, work)
        self.quantity.require_defined(moments)
        return self.quantity.combine(moments)

    @property
    def product_work(self) -> float:
        """What a pass of a product costs in passes of exact work, which also multiplies tiles; measured."""
        if not self.quantity.needs_pairs:
            return 1.0
        return 0.25 if all(operand.cache_cost for operand in self.operands) else 0.5

    def choices(self) -> tuple[str, ...]:
        first = ("stratified",) if pays(self.operands) else ()
        if not all(operand.capabilities.pushes for operand in self.operands):
            return (*first, "reverse" if self.quantity.needs_pairs else "rhutch")
        return (*first, "sketch" if self._grams else "hutch++", "hutchinson")

    def sampler(self, method: str, generator: torch.Generator) -> Sampler:
        return _SAMPLERS[method](self, generator)

    def summary(self, sampler: Sampler) -> Summary:
        if isinstance(sampler, Stratified):
            return sampler.summary()
        if isinstance(sampler, SketchCore | XTrace):
            self.quantity.require_defined(sampler.approximate(self.quantity.moments))
            return sampler.summary(self.quantity.moments, self.quantity.combine)
        assert isinstance(sampler, TwoSided | OneSidedTrace | OneSidedPairs)
        moments: Sequence[Moment] = sampler.moments()
        self.quantity.require_defined(torch.stack([moment.value() for moment in moments], dim=-1))
        # An inner product from one direction is quadratic in what the probes see: its root has the known
        # quantile.
        if isinstance(sampler, OneSidedPairs) and self.quantity is INNER:
            (pairs,) = sampler.moments()
            assert isinstance(pairs, Pairs | Invariants)
            return summarize_product(pairs)
        # Where the probes gave K v and not only vᵀ K v, each tells its variance: the interval takes 2.8
        # standard errors at four probes, and not 9.8 (`norm_quantile`).
        if self.quantity is TRACE and isinstance(moments[0], Mean) and moments[0].variances is not None:
            return summarize_mean(moments[0])
        if self.quantity.free is None:
            return summarize(moments, self.quantity.combine)
        # The jackknife sees the function without its bounds: replicates that are all cut off would show no
        # error.
        free = summarize(moments, self.quantity.free)
        return replace(free, value=free.value.clamp(*self.bounds), centre=free.value)


def _is_gram(operand: Operand) -> bool:
    """Whether an operator is known to be J Jᵀ, and so positive semidefinite."""
    return operand.capabilities.symmetric and operand.capabilities.factors() is not None


def _two_sided(name: str) -> Callable[[ScalarPlan, torch.Generator], Sampler]:
    return lambda plan, generator: TwoSided(
        plan.quantity, plan.operands, generator, sketched=name == "hutch++"
    )


def _one_sided(*, forward: bool) -> Callable[[ScalarPlan, torch.Generator], Sampler]:
    def sampler(plan: ScalarPlan, generator: torch.Generator) -> Sampler:
        if plan.quantity.needs_pairs:
            return OneSidedPairs(plan.quantity, plan.operands, generator, forward=forward)
        return OneSidedTrace(plan.operands[0], generator, forward=forward, orthogonalize=plan.orthogonalize)

    return sampler


# A further method is one line here, and its name in the types of `moments`.
_SAMPLERS: dict[str, Callable[[ScalarPlan, torch.Generator], Sampler]] = {
    "stratified": lambda plan, generator: Stratified(plan.quantity, plan.operands, generator),
    "sketch": lambda plan, generator: SketchCore(plan.operands, generator),
    "xtrace": lambda plan, generator: XTrace(plan.operands[0], generator),
    "ntk-hutch++": lambda plan, generator: NtkAware(plan.quantity, plan.operands, generator),
    "hutch++": _two_sided("hutch++"),
    "hutchinson": _two_sided("hutchinson"),
    "rhutch": _one_sided(forward=False),
    "reverse": _one_sided(forward=False),
    "fhutch": _one_sided(forward=True),
    "forward": _one_sided(forward=True),
}
