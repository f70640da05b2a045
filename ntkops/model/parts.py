"""Consecutive samples of a stream, in memory, read in order."""

from __future__ import annotations

from collections.abc import Iterator

from .batches import Batch, concatenate, copied, cut
from .stream import Stream, require_matching

__all__ = ["StreamReader"]


class StreamReader:
    """Gives ranges of samples of a stream; ranges that follow each other are read in one pass.

    What was given last, and the rest of the batch after it, is kept: a range may be asked for again, or
    in smaller pieces. One that begins earlier starts another pass.

    Args:
        stream: The batches.
    """

    def __init__(self, stream: Stream) -> None:
        self._stream = stream
        self._arriving: Iterator[tuple[int, Batch]] | None = None
        self._held: list[Batch] = []
        self._start = self._stop = 0  # samples that are held

    def read(self, start: int, stop: int) -> Batch:
        """Return the samples from ``start`` up to ``stop``, in memory of their own.

        Raises:
            InputError: If they come from batches of different shapes.
            NonDeterministicDataError: If the source gives other data than at first.
        """
        if self._arriving is None or start < self._start or (start > self._stop and self._stream.seeks):
            self._arriving = self._stream.batches_from(start)
            self._held, self._start, self._stop = [], start, start
        self._forget(start)
        while self._stop < stop:
            first, batch = next(self._arriving)
            end = first + batch.num_samples
            if end > start:  # copied: a source may write its next batch over this one
                self._held.append(copied(cut(batch, max(0, start - first), batch.num_samples)))
            self._stop = end
        if stop == self._stream.num_samples:
            next(self._arriving, None)  # nothing may follow
        taken, at = [], self._start
        for batch in self._held:
            taken.append(cut(batch, 0, min(batch.num_samples, stop - at)))
            require_matching(taken[0], taken[-1], start, stop - 1)
            at += batch.num_samples
            if at >= stop:
                break
        return concatenate(taken)

    def _forget(self, start: int) -> None:
        """Drop the samples before the first one wanted."""
        while self._start < start:
            first = self._held.pop(0) if self._held else None
            if first is None:
                self._start = start
            elif self._start + first.num_samples <= start:
                self._start += first.num_samples
            else:
                self._held.insert(0, cut(first, start - self._start, first.num_samples))
                self._start = start
