"""Exact work as a sum of terms, one after the other: a bar with the time left, and a file to go on from."""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor
from tqdm import tqdm

from ..checkpoint import threads
from ..errors import CheckpointError, InputError
from ..model.context import full_precision
from ._exact_file import ExactFile, Standing
from ._request import Operand

__all__ = ["DEFAULT_EVERY", "ExactWork", "Terms", "length_of", "require_no_checkpoint"]

logger = logging.getLogger(__name__)

Item = TypeVar("Item")
DEFAULT_EVERY = 60.0


@dataclass(frozen=True)
class Terms:
    """A sum that is made term by term.

    Attributes:
        unit: What is counted: "tile", "row".
        size: Given operands, returns how large a step is.
        count: Given operands and size, returns the number of units of all steps; None where it is not known.
        after: Given operands, size and the units that are done, yields each further term ``(*batch, q)``
            with the number of units that are done after it.
    """

    unit: str
    size: Callable[[Sequence[Operand]], int]
    count: Callable[[Sequence[Operand], int], int | None]
    after: Callable[[Sequence[Operand], int, int], Generator[tuple[int, Tensor]]]


class ExactWork:
    """How exact work is shown and kept.

    Args:
        name: What is computed.
        progress: Show a bar, with the time left.
        checkpoint: A file that an interrupted run goes on from, or None.
        every: Seconds from one writing of it to the next.

    Attributes:
        passes: Returns the passes that this run has made of it.
        passes_before: Passes that runs before it have made.
        seconds_before: Time that they took.

    Raises:
        InputError: If the file or the seconds are not understood.
    """

    def __init__(
        self,
        name: str,
        progress: bool = False,
        checkpoint: str | os.PathLike[str] | None = None,
        every: float = DEFAULT_EVERY,
    ) -> None:
        if checkpoint is not None and not isinstance(checkpoint, str | os.PathLike):
            raise InputError(f"checkpoint={checkpoint!r}: pass a path")
        if isinstance(every, bool) or not isinstance(every, int | float) or not every >= 0:
            raise InputError(f"checkpoint_every={every!r}: pass a number of seconds")
        self.name, self.progress, self._every = name, progress, float(every)
        self.passes: Callable[[], int] = lambda: 0
        self._path = None if checkpoint is None else Path(checkpoint)
        self.passes_before = 0
        self.seconds_before = 0.0

    def shown(
        self, items: Iterable[Item], total: int | None, unit: str, amount: Callable[[Item], int]
    ) -> Iterator[Item]:
        """Yield items, and move a bar after the work on each.

        Args:
            items: The items.
            total: Units in all of them.
            unit: What is counted.
            amount: Units of an item.
        """
        with tqdm(total=total, unit=unit, desc=self.name, disable=not self.progress) as bar:
            for item in items:
                yield item
                bar.update(amount(item))

    def add_up(self, operands: Sequence[Operand], zero: Tensor, terms: Terms) -> Tensor:
        """Return the sum of all terms, ``(*batch, q)``; what a file holds is not made again.

        Args:
            operands: What the terms are made of.
            zero: The sum of none.
            terms: The terms.

        Raises:
            CheckpointError: If a file belongs to other work, or cannot be read or written.
        """
        if self._path is None:
            size = terms.size(operands)
            return self._run(operands, Standing(0, zero), terms, size, None)
        file = ExactFile(self._path, self.name, terms.unit, operands)
        operands, standing, size = file.begin(zero, terms.size)
        self.passes_before, self.seconds_before = file.passes, file.seconds
        with threads(file.threads):
            return self._run(operands, standing, terms, size, file)

    def _run(
        self, operands: Sequence[Operand], standing: Standing, terms: Terms, size: int, file: ExactFile | None
    ) -> Tensor:
        started = written = time.perf_counter()
        space = operands[0].rows

        def write() -> None:
            assert file is not None
            spent = time.perf_counter() - started
            file.write(standing, self.passes_before + self.passes(), self.seconds_before + spent)

        count = terms.count(operands, size)
        bar = tqdm(
            total=count, initial=standing.done, unit=terms.unit, desc=self.name, disable=not self.progress
        )
        before = standing.done
        try:
            device = standing.sums.device
            cast = torch.is_autocast_enabled(device.type)  # which takes no digits from products of tiles
            exact = full_precision(device) if cast else contextlib.nullcontext()
            with exact, bar, contextlib.closing(terms.after(operands, size, standing.done)) as coming:
                for done, term in coming:
                    # One assignment: an interrupt finds both or neither.
                    standing = Standing(done, standing.sums + term)
                    bar.update(done - bar.n)
                    due = file is not None and time.perf_counter() - written >= self._every
                    if file is not None and space.any(due):
                        write()
                        written = time.perf_counter()
        except BaseException:
            if file is not None and standing.done > before and not space.is_spread:
                _in_passing(write)  # of several processes, the others are not there to agree
            raise
        if file is not None and standing.done > before:
            write()
        return standing.sums


def length_of(item: tuple[slice, Any]) -> int:
    """Return the length of the slice that an item belongs to."""
    return item[0].stop - item[0].start


def require_no_checkpoint(checkpoint: object) -> None:
    """Refuse a file for a value that carries a graph, which no file holds.

    Raises:
        InputError: If there is one.
    """
    if checkpoint is not None:
        raise InputError("checkpoint= does not go with differentiable=True: a file does not hold the graph")


def _in_passing(write: Callable[[], Any]) -> None:
    """Write a file while another exception is on its way, which must not be lost."""
    try:
        write()
    except CheckpointError as error:
        logger.warning("what was done could not be written: %s", error)
