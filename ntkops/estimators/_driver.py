"""One driver for all estimates: choose a method, draw probes until the tolerance is met, wrap the result."""

from __future__ import annotations

import math
import time
import warnings
from bisect import bisect_right
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from ..engines import PassCounter, count_passes
from ..errors import BackwardLimitError, InputError, NotConvergedWarning
from ..results import Estimate
from ..shortage import memory_for
from ._exact import ExactWork
from ._plans import Plan, Sampler
from ._request import Request
from ._statistics import LEVEL, Summary, interval_of
from ._stratified import Stratified

__all__ = ["run"]

# At 24 samples the hardest spectrum takes 2.8 standard errors, at 4 it takes 9.8 (`_statistics`): an earlier
# look would ask for more columns whatever it saw.
_FIRST = 24  # columns before the error is looked at for the first time
_PARTS_WORK = 2.0  # of a per-sample pass where the Gram matrix is made of pairs of parts
_DOUBT = 4.0  # by how much what is ahead may be overestimated: the first looks do
_FARTHEST = 1e6  # times the columns so far that is planned ahead
_GROWTH = (1.3, 4.0)  # least and greatest factor from one look to the next
_ONE_SIDED_CAP = 20_000  # passes of one direction where only a tolerance is given
_ONE_SIDED_RTOL = 1e-2  # finer than this, only with a limit of passes
# For positive semidefinite K the standard deviation of Hutch++ is at most 3/√2 tr K / m, whatever the
# spectrum; the interval is 1.96 of them.
_COLUMNS_FOR_RTOL = 1.96 * 3 / math.sqrt(2)


def run(plan: Plan, request: Request, work: ExactWork | None = None) -> Estimate:
    """Make the estimate that a request asks for."""
    # With ``rtol`` the error is looked at again and again, and a rule that stops at the first good look would
    # stop at lucky ones. The k-th look, from the second on, therefore uses an interval that misses with
    # probability 0.05 / (k (k - 1)): together they miss with 0.05 at most, and the interval that is reported
    # is that of the last look.
    request = request.shared(plan.space)
    with torch.no_grad(), request.capped(), _Account(plan, request, work) as account:
        cost = plan.exact_cost()
        if request.method == "exact" or request.method == "auto" and _exact_pays(plan, request, cost):
            found = account.exact(cost, needed=request.method == "exact")
            if found is not None:
                return found
            cost = math.inf
        method, sampler, limit = _affordable(plan, request)
        _require_within_reach(request, sampler, method)
        if request.rtol is None:
            return _spend(plan, request, account, sampler, method, cost, limit)
        weight = getattr(plan, "product_work", 1.0)
        courses = [_Course.begin(method, sampler, weight)]
        if request.method == "auto" and request.num_passes is None:
            courses += [
                _Course.begin(other, plan.sampler(other, request.generator), weight)
                for other in _first_methods(plan)
                if other != method
            ]
        return _reach(plan, request, account, courses, cost, limit)


def _affordable(plan: Plan, request: Request) -> tuple[str, Sampler, int | None]:
    """Return the method, its source of probes, and the columns that the cap pays for, if there is one."""
    least: dict[str, int] = {}
    for method in plan.choices() if request.method == "auto" else (request.method,):
        sampler = plan.sampler(method, request.generator)
        if request.num_passes is None:
            return method, sampler, None
        # A price does not fall with columns, so that the most that the cap pays for is found by bisection.
        price = _price(sampler, sampler.least)
        left = request.num_passes
        highest = left // max(sampler.unit, 1)
        prices = range(min(highest, _enough(plan, sampler)) + 1)
        limit = bisect_right(prices, left, key=partial(_price, sampler)) - 1
        # All that was priced is paid for: from there on a column costs its unit, or nothing is left to
        # chance.
        if limit == prices[-1]:
            limit = highest
        if limit >= sampler.least:
            return method, sampler, limit
        least[method] = price
    method = min(least, key=least.__getitem__)
    raise InputError(
        f"num_passes={request.num_passes} does not pay for {plan.name} by {method!r}, which takes at least "
        f"{least[method]} passes: that is num_passes={least[method]}"
    )


def _price(sampler: Sampler, columns: int) -> int:
    """Return the passes of going on to so many columns in all, none of them made before."""
    price = getattr(sampler, "price", None)
    return sampler.unit * columns if price is None else price(columns)


def _require_within_reach(request: Request, sampler: Sampler, method: str) -> None:
    """Raise where one direction would take passes without end."""
    # The passes that global probes of one direction need grow with 1 / rtol² (Townsend, Halikias &
    # Hochstenbach, arXiv 2606.01335).
    if request.rtol is None or request.num_passes is not None or not sampler.one_sided:
        return
    # 1 / rtol² is 1e4 at this limit, which the cap of 20,000 passes still pays for.
    if request.rtol < _ONE_SIDED_RTOL:
        raise InputError(
            f"rtol={request.rtol:g} from one direction ({method!r}) takes of the order of 1 / rtol² = "
            f"{request.rtol**-2:.0g} passes; use method='exact', 'stratified' or 'sketch' where they "
            "apply, or set a limit with num_passes"
        )


def _exact_pays(plan: Plan, request: Request, cost: float) -> bool:
    if not request.allows(cost):
        return False
    if request.rtol is None:
        return True
    # How fast the spectrum falls is not known before the first probe. Exact work is begun at once where the
    # worst spectrum would make sampling cost as much; where it would not, `_reach` may still come back to it.
    return cost <= min(_foreseen(plan, request, method) for method in _first_methods(plan))


def _first_methods(plan: Plan) -> tuple[str, ...]:
    """Return the methods that set out together under "auto"."""
    choices = plan.choices()
    return choices[: 2 if choices[0] == "stratified" else 1]


def _foreseen(plan: Plan, request: Request, method: str) -> float:
    """Return the work, in passes of exact work, that a method may take for a tolerance, before it begins."""
    assert request.rtol is not None
    sampler = plan.sampler(method, request.generator)
    if isinstance(sampler, Stratified):
        return sampler.unit * sampler.columns_for(request.rtol)
    return getattr(plan, "product_work", 1.0) * sampler.unit * _COLUMNS_FOR_RTOL / request.rtol


def _enough(plan: Plan, sampler: Sampler) -> int:
    """Return the columns with which nothing is left to chance."""
    return int(getattr(sampler, "size", plan.size))


def _spend(
    plan: Plan,
    request: Request,
    account: _Account,
    sampler: Sampler,
    method: str,
    cost: float,
    columns: int | None,
) -> Estimate:
    """Spend the passes that were given."""
    assert columns is not None
    if columns >= _enough(plan, sampler) and not sampler.one_sided and request.allows(cost):
        # As many columns as directions: nothing is left to chance, and the exact value is had. A method of
        # one direction stays one, for the other may not exist.
        found = account.exact(cost, needed=request.method != "auto")
        if found is not None:
            return found
    sampler.grow(columns)
    return account.wrap(plan.summary(sampler), method, LEVEL, converged=True)


@dataclass
class _Course:
    """One method on its way to a tolerance.

    Attributes:
        method: Its name.
        sampler: Its source of probes.
        columns: The next number of columns.
        goal: The number that the error so far says will be enough; that of the first look before it.
        product_work: What a pass of a product costs, in passes of exact work.
        held: The number so far.
        seen: Columns and relative error of the last look.
    """

    method: str
    sampler: Sampler
    columns: int
    goal: int
    product_work: float
    held: int = 0
    seen: tuple[int, float] | None = None

    @classmethod
    def begin(cls, method: str, sampler: Sampler, product_work: float) -> _Course:
        """Return a course before its first look."""
        first = getattr(sampler, "first", max(_FIRST, 4 * sampler.least))
        return cls(method, sampler, first, first, product_work)

    def work(self, columns: int) -> float:
        """Return what going on to so many columns costs, in passes of exact work."""
        plain = self.sampler.unit * (columns - self.held)
        price = getattr(self.sampler, "price", None)
        if price is None:
            return self.product_work * plain
        found: float = price(columns)
        return found if found <= plain else _PARTS_WORK * found

    def look(self, reached: float, rtol: float) -> None:
        """Plan the next step from the error that was reached."""
        rate = _rate(self.seen, (self.columns, reached), self.sampler.order / 2)
        self.seen, self.held = (self.columns, reached), self.columns
        excess = reached / rtol
        self.columns = _next_columns(self.held, excess, rate)
        whole = 1.1 * excess ** (1 / rate) if 0 < excess < math.inf else 2.0
        self.goal = max(self.columns, math.ceil(self.held * min(whole, _FARTHEST)))


def _reach(
    plan: Plan,
    request: Request,
    account: _Account,
    courses: Sequence[_Course],
    cost: float,
    limit: int | None,
) -> Estimate:
    """Go on until the tolerance is met, exactness is cheaper, or the passes are spent."""
    # Of several methods the one goes on that its error so far says has least work ahead. All of them together
    # do not work more than the exact value would have taken: then that is computed.
    assert request.rtol is not None
    auto, spent = request.method == "auto", 0.0
    if limit is None and courses[0].sampler.one_sided:
        limit = _ONE_SIDED_CAP // max(courses[0].sampler.unit, 1)
    for look in range(1, 1000):
        # Ahead of a method lies what its error so far says; before its first look, that look.
        course = min(courses, key=lambda one: one.work(one.goal))
        sampler = course.sampler
        capped = limit is not None and course.columns >= limit
        if limit is not None and capped:
            course.columns = limit
        step = course.work(course.columns)
        full = course.columns >= _enough(plan, sampler)
        # Rent or buy: as long as what was spent stays below the price of exactness, changing over costs at
        # most twice the better of both in hindsight. It is also bought at once where what lies ahead exceeds
        # it _DOUBT times over.
        costly = auto and cost <= max(course.work(course.goal) / _DOUBT, spent + step)
        possible = not sampler.one_sided and math.isfinite(cost) and request.allows(account.passes + cost)
        if possible and (full or costly):
            found = account.exact(cost, needed=not auto)
            if found is not None:
                return found
            cost = math.inf
        spent += step
        sampler.grow(course.columns)
        account.show()
        summary = plan.summary(sampler)
        # Σ_{k≥2} 1 / (k (k - 1)) = 1: all looks that may end it miss together with LEVEL. The first may end
        # it only at the cap, where it is the last as well, and has all of LEVEL.
        level = LEVEL / (look * (look - 1)) if look > 1 else LEVEL
        reached = _relative(account.reach(summary, level), summary.value, plan.vector)
        if reached <= request.rtol and (look > 1 or capped):
            return account.wrap(summary, course.method, level, converged=True)
        if capped:
            return account.not_converged(summary, course.method, level, reached)
        course.look(reached, request.rtol)
    raise AssertionError("unreachable: columns grow geometrically towards exactness")


def _rate(before: tuple[int, float] | None, now: tuple[int, float], prior: float) -> float:
    """Return the power of the columns with which the error falls: that of the last two looks, or a prior."""
    if before is None or not (0 < now[1] < before[1] < math.inf):
        return prior
    # Two looks share most of their probes, and by chance may seem to gain little: no method falls more slowly
    # than its variance does in theory.
    return max(math.log(before[1] / now[1]) / math.log(now[0] / before[0]), prior)


def _next_columns(columns: int, excess: float, rate: float) -> int:
    low, high = _GROWTH
    if not 0 < excess < math.inf:
        return math.ceil(columns * 2)
    # A tenth more than the rate says: a look that just misses costs another one.
    return math.ceil(columns * min(max(1.1 * excess ** (1 / rate), low), high))


def _relative(width: Tensor, value: Tensor, vector: bool) -> float:
    """Return the greatest width / |value| of a batch, for vectors in their norm; 0 where both vanish."""
    if vector:
        width, value = width.norm(dim=-1), value.norm(dim=-1)
    return float(torch.where(width == 0, 0.0, width / value.abs()).max())


class _Account:
    """Passes, seconds and the bar of one estimate, and the results made of them."""

    def __init__(self, plan: Plan, request: Request, work: ExactWork | None) -> None:
        self._plan, self._request = plan, request
        self._work = work or ExactWork(plan.name, request.progress)
        self._bar: tqdm[Any] | None = None
        self._start = time.perf_counter()

    def __enter__(self) -> _Account:
        self._inside = ExitStack()
        self._counter: PassCounter = self._inside.enter_context(count_passes())
        self._inside.enter_context(
            memory_for(self._plan.name, "give fewer passes with num_passes=, or call K.free() first")
        )
        return self

    def __exit__(self, *problem: Any) -> None:
        if self._bar is not None:
            self._bar.close()
        self._inside.__exit__(*problem)

    @property
    def passes(self) -> int:
        """Passes made so far."""
        return self._counter.total

    def show(self) -> None:
        """Move the bar."""
        if self._bar is None:  # exact work has a bar of its own
            total = self._request.num_passes
            self._bar = tqdm(
                total=total, desc=self._plan.name, unit="pass", disable=not self._request.progress
            )
        self._bar.update(self._counter.total - self._bar.n)

    @property
    def _seconds(self) -> float:
        return time.perf_counter() - self._start

    def exact(self, cost: float, *, needed: bool) -> Estimate | None:
        """Return the exact value; None where it is not needed and an engine's limit forbids it."""
        if math.isfinite(cost) and not self._request.allows(cost):  # else the engine says why it refuses
            raise InputError(
                f"the exact value of {self._plan.name} costs about {cost:.0f} passes, more than "
                f"num_passes={self._request.num_passes}; raise it, or choose an estimator"
            )
        work, before = self._work, self._counter.total
        work.passes = lambda: self._counter.total - before
        try:
            value = self._plan.exact(work).cpu()
        except BackwardLimitError:  # raised before any work
            if needed:
                raise
            return None
        return Estimate.of_exact(
            value,
            passes=self._counter.total + work.passes_before,
            seconds=self._seconds + work.seconds_before,
            checks=self._counter.count.checks,
        )

    def interval(self, summary: Summary, level: float) -> tuple[Tensor, Tensor]:
        """Return the interval: what chance may have done, and what rounding may have."""
        return interval_of(summary, level, eps=self._plan.eps, bounds=self._plan.bounds)

    def reach(self, summary: Summary, level: float) -> Tensor:
        """Return how far the interval reaches from the value."""
        low, high = self.interval(summary, level)
        return torch.maximum(high - summary.value, summary.value - low)

    def wrap(self, summary: Summary, method: str, level: float, *, converged: bool) -> Estimate:
        """Return what was found."""
        self.show()
        return Estimate(
            value=summary.value,
            stderr=summary.stderr,
            interval=self.interval(summary, level),
            method=method,
            exact=summary.exact,
            passes=self._counter.total,
            converged=converged,
            seed=self._request.seed,
            seconds=self._seconds,
            checks=self._counter.count.checks,
        )

    def not_converged(self, summary: Summary, method: str, level: float, reached: float) -> Estimate:
        """Return what was found, with a warning."""
        result = self.wrap(summary, method, level, converged=False)
        warnings.warn(
            f"{self._plan.name} by {method!r} ended after {result.passes} passes with a relative error of "
            f"up to {reached:.2g}, above rtol={self._request.rtol:g}; raise num_passes, or loosen rtol",
            NotConvergedWarning,
            stacklevel=7,
        )
        return result
