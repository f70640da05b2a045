"""What a distillation took, noted while it runs."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from ..engines import count_passes
from ..results import DistillationInfo

__all__ = ["Record", "recording"]


class Record:
    """Passes and time since it was opened; `info` closes it."""

    def __init__(self, counter: Any) -> None:
        self._counter, self._start = counter, time.perf_counter()

    def info(
        self,
        method: str,
        *,
        class_mean: bool,
        seed: int | None = None,
        converged: bool = True,
        details: Mapping[str, Any] | None = None,
    ) -> DistillationInfo:
        """Return the info of a method that has ended."""
        seconds = time.perf_counter() - self._start
        return DistillationInfo(
            method, class_mean, converged, self._counter.total, seed, seconds, dict(details or {})
        )


@contextmanager
def recording() -> Iterator[Record]:
    """Count passes and time without recording a graph.

    Yields:
        The record.
    """
    with torch.no_grad(), count_passes() as counter:
        yield Record(counter)
