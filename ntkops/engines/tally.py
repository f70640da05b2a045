"""Counting the passes that are really made.

Engines report every pass where they make it; whoever wants to know opens a `Tally` around the
work. Nested tallies each see all passes inside them. Passes that only save time later, those of a cache,
are asked for before they are made.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from ..results import PassCount

__all__ = ["Tally", "count_apart", "count_passes", "report_passes", "spare_passes", "take_spare"]

_KINDS = ("vjp", "jvp", "per_sample", "products")


class Tally:
    """A running count of passes, one per vector."""

    def __init__(self) -> None:
        self._counts = dict.fromkeys(_KINDS, 0)

    def add(self, *, vjp: int = 0, jvp: int = 0, per_sample: int = 0, products: int = 0) -> None:
        """Add passes to the count."""
        for kind, number in zip(_KINDS, (vjp, jvp, per_sample, products), strict=True):
            self._counts[kind] += int(number)

    @property
    def count(self) -> PassCount:
        """The passes counted so far."""
        return PassCount(**self._counts)

    @property
    def total(self) -> int:
        """All passes counted so far."""
        return self.count.total


_open_tallies: ContextVar[tuple[Tally, ...]] = ContextVar("ntkops_open_tallies", default=())


@contextmanager
def count_passes() -> Iterator[Tally]:
    """Count every pass made inside the block.

    Yields:
        The running `Tally`.

    Example:
        >>> from ntkops.engines.tally import count_passes, report_passes
        >>> with count_passes() as tally:
        ...     report_passes(vjp=3)
        >>> tally.total
        3
    """
    tally = Tally()
    token = _open_tallies.set((*_open_tallies.get(), tally))
    try:
        yield tally
    finally:
        _open_tallies.reset(token)


@contextmanager
def count_apart() -> Iterator[Tally]:
    """Count passes inside the block and hide them from the tallies around it.

    For work on a part of the samples at a time: the caller reports it in passes over all of them.

    Yields:
        The running `Tally`.
    """
    tally = Tally()
    token = _open_tallies.set((tally,))
    try:
        yield tally
    finally:
        _open_tallies.reset(token)


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


def report_passes(*, vjp: int = 0, jvp: int = 0, per_sample: int = 0, products: int = 0) -> None:
    """Report passes to every open tally; called by the engines where a pass is made."""
    for tally in _open_tallies.get():
        tally.add(vjp=vjp, jvp=jvp, per_sample=per_sample, products=products)
