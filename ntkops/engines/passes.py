"""Counting the passes that are really made.

Engines report every pass where they make it; whoever wants to know opens a `PassCounter` around the
work. Nested counters each see all passes inside them. Passes that only save time later, those of a cache,
are asked for before they are made.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from ..results import PassCount

__all__ = [
    "PassCounter",
    "SharedPasses",
    "count_apart",
    "count_passes",
    "report_passes",
    "spare_passes",
    "take_spare",
]

_KINDS = ("vjp", "jvp", "per_sample", "products", "checks")


class PassCounter:
    """A running count of passes, one per vector."""

    def __init__(self) -> None:
        self._counts = dict.fromkeys(_KINDS, 0)

    def add(
        self, *, vjp: int = 0, jvp: int = 0, per_sample: int = 0, products: int = 0, checks: int = 0
    ) -> None:
        """Add passes to the count."""
        for kind, number in zip(_KINDS, (vjp, jvp, per_sample, products, checks), strict=True):
            self._counts[kind] += int(number)

    @property
    def count(self) -> PassCount:
        """The passes counted so far."""
        return PassCount(**self._counts)

    @property
    def total(self) -> int:
        """All passes counted so far but those of checks."""
        return self.count.total


_open_counters: ContextVar[tuple[PassCounter, ...]] = ContextVar("ntkops_open_counters", default=())


@contextmanager
def _opened(around: tuple[PassCounter, ...]) -> Iterator[PassCounter]:
    """Open a counter beside those around it."""
    counter = PassCounter()
    token = _open_counters.set((*around, counter))
    try:
        yield counter
    finally:
        _open_counters.reset(token)


@contextmanager
def count_passes() -> Iterator[PassCounter]:
    """Count every pass made inside the block.

    Yields:
        The running `PassCounter`.

    Example:
        >>> from ntkops.engines.passes import count_passes, report_passes
        >>> with count_passes() as counter:
        ...     report_passes(vjp=3)
        >>> counter.total
        3
    """
    with _opened(_open_counters.get()) as counter:
        yield counter


@contextmanager
def count_apart() -> Iterator[PassCounter]:
    """Count passes inside the block and hide them from the counters around it.

    For work on a part of the samples at a time: the caller reports it in passes over all of them.

    Yields:
        The running `PassCounter`.
    """
    with _opened(()) as counter:
        yield counter


_spare: ContextVar[list[float] | None] = ContextVar("ntkops_spare_passes", default=None)


@contextmanager
def spare_passes(passes: float) -> Iterator[None]:
    """Allow inside the block only so many passes that nobody asked for; outside all are allowed."""
    token = _spare.set([passes])
    try:
        yield
    finally:
        _spare.reset(token)


def take_spare(passes: float) -> bool:
    """Whether so many passes may be made for the sake of later ones; if so, they are taken."""
    left = _spare.get()
    if left is None:
        return True
    if passes > left[0]:
        return False
    left[0] -= passes
    return True


def report_passes(
    *, vjp: int = 0, jvp: int = 0, per_sample: int = 0, products: int = 0, checks: int = 0
) -> None:
    """Report passes to every open counter; called by the engines where a pass is made."""
    for counter in _open_counters.get():
        counter.add(vjp=vjp, jvp=jvp, per_sample=per_sample, products=products, checks=checks)


class SharedPasses:
    """Passes over parts of N samples, reported as passes over all of them."""

    def __init__(self, samples: int) -> None:
        self._samples, self._spent, self._reported = samples, 0.0, 0

    def __enter__(self) -> SharedPasses:
        """Begin to count."""
        return self

    @contextmanager
    def over(self, count: int) -> Iterator[None]:
        """Count what is made inside as passes over so many samples."""
        with count_apart() as counter:
            yield
        report_passes(checks=counter.count.checks)  # one a batch, however few samples it has
        self._spent += counter.total * (count / self._samples)
        # Whole passes as they are complete, the rest at the end; 1e-9 is above the rounding of the shares'
        # sum.
        self._report(math.floor(self._spent + 1e-9))

    def __exit__(self, *problem: object) -> None:
        """Report the rest, rounded up."""
        self._report(math.ceil(self._spent - 1e-9))

    def _report(self, passes: int) -> None:
        """Report passes up to a number, those that have not been reported yet."""
        if passes > self._reported:
            report_passes(per_sample=passes - self._reported)
            self._reported = passes
