"""Passes over parts of the samples, counted as passes over all of them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

from .tally import count_apart, report_passes

__all__ = ["SharedPasses"]


class SharedPasses:
    """Passes over parts of the samples, reported as passes over all of them.

    Args:
        samples: Number N of samples.
    """

    def __init__(self, samples: int) -> None:
        self._samples, self._spent, self._reported = samples, 0.0, 0

    def __enter__(self) -> SharedPasses:
        """Begin to count."""
        return self

    @contextmanager
    def over(self, count: int) -> Iterator[None]:
        """Count what is made inside as passes over so many samples."""
        with count_apart() as tally:
            yield
        self._spent += tally.total * (count / self._samples)
        self._report(math.floor(self._spent + 1e-9))

    def __exit__(self, *problem: object) -> None:
        """Report the rest, rounded up."""
        self._report(math.ceil(self._spent - 1e-9))

    def _report(self, passes: int) -> None:
        if passes > self._reported:
            report_passes(per_sample=passes - self._reported)
            self._reported = passes
