"""Going on with less at a time where memory runs out.

Work on many things is done in parts. A part for which memory does not suffice is made smaller and tried
again, and what is finished is kept. Where parts are nested (samples inside columns), the outermost that
can still be made smaller is, so that no part is cut down for the sake of another.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import torch

from ..errors import OutOfMemoryError
from ..shortage import is_out_of_memory
from .budget import format_bytes, free_bytes, shared_store

__all__ = ["Portion", "attempt", "even_size", "if_it_fits", "in_parts"]

logger = logging.getLogger(__name__)

Result = TypeVar("Result")

_guarded: ContextVar[bool] = ContextVar("ntkops_memory_guarded", default=False)
_BYTES = re.compile(r"allocate ([0-9.]+) ?(bytes|KiB|MiB|GiB|TiB)")
_UNITS = {"bytes": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}


def _asked_for(error: BaseException) -> int:
    """Return the bytes that the failed allocation asked for, 0 where it does not say."""
    found = _BYTES.search(str(error))
    return int(float(found[1]) * _UNITS[found[2]]) if found else 0


@dataclass(frozen=True)
class Portion:
    """How many things are taken at a time.

    Attributes:
        what: The option or quantity that it is, for messages.
        read: Returns the number; it may change from one part to the next.
        lower: Makes ``read`` return less than what it is given.
        device: Where memory runs out.
        needed: Returns the bytes that one thing is thought to need.
        chosen: Whether the user chose the number, so that it stays.
    """

    what: str
    read: Callable[[], int]
    lower: Callable[[int], None]
    device: torch.device
    needed: Callable[[], int]
    chosen: bool = False


def attempt(portion: Portion, count: int, work: Callable[[], Result]) -> tuple[Result] | None:
    """Do some work on ``count`` things.

    Args:
        portion: How many are taken at a time.
        count: How many this work takes.
        work: The work.

    Returns:
        The result in a tuple; None where memory ran out and fewer things are to be taken: ``portion`` was
        lowered, and caches on its device were dropped.

    Raises:
        OutOfMemoryError: If memory ran out, and there is no smaller part.
        RuntimeError: What else the work raises, and torch's own error where the work around this one can be
            made smaller.
    """
    reducible = count > 1 and not portion.chosen
    outside = _guarded.get()
    token = _guarded.set(outside or reducible)
    try:
        return (work(),)
    except Exception as error:
        if outside or not is_out_of_memory(error):  # the work around this one is made smaller first
            raise
        asked, text = _asked_for(error), str(error).strip().splitlines()
        if not reducible:
            raise OutOfMemoryError(_last_words(portion, count, asked)) from error
    finally:
        _guarded.reset(token)
    # The exception, and with it what its frames held, is gone by now.
    freed = shared_store.clear(portion.device)
    if portion.device.type == "cuda":
        torch.cuda.empty_cache()
    portion.lower(count)
    logger.warning(
        "out of memory on %s with %s of %d (%s): going on with %d; %s of caches were dropped",
        portion.device,
        portion.what,
        count,
        text[0][:160] if text else "no message",
        portion.read(),
        format_bytes(freed),
    )
    return None


def if_it_fits(work: Callable[[], Result]) -> tuple[Result] | str:
    """Do work for which there is another way, without smaller parts.

    Args:
        work: The work.

    Returns:
        The result in a tuple; torch's message where memory ran out.
    """
    token = _guarded.set(True)
    try:
        return (work(),)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        return str(error).strip()[:160]
    finally:
        _guarded.reset(token)


def _last_words(portion: Portion, count: int, asked: int) -> str:
    needed, free = max(portion.needed() * count, asked), free_bytes(portion.device)
    if portion.chosen and count > 1:
        return (
            f"out of memory on {portion.device}: {portion.what}={count}, as chosen, needs about "
            f"{format_bytes(needed)}, and {format_bytes(free)} are free; pass a smaller {portion.what}, or "
            "'auto', which shrinks by itself"
        )
    return (
        f"out of memory on {portion.device}: even one at a time ({portion.what}) needs about "
        f"{format_bytes(needed)}, and {format_bytes(free)} are free; choose fewer parameters (params=) or "
        "outputs (outputs=), call K.free(), or move to a device with more memory"
    )


def even_size(count: int, size: int) -> int:
    """Return a part size of at most ``size`` that fills ``count`` evenly."""
    size = max(1, min(size, count))
    return -(-count // -(-count // size))


def in_parts(
    count: int,
    portion: Portion,
    work: Callable[[int, int], Result],
    *,
    even: bool = False,
    beside: int = 1,
) -> Iterator[tuple[int, int, Result]]:
    """Do work on ``count`` things, part by part, with smaller parts from where memory runs out.

    Args:
        count: Number of things.
        portion: How many of them are taken at a time.
        work: Given the first and one past the last.
        even: Whether parts are filled evenly.
        beside: Number of other things of which as many are taken at the same time.

    Yields:
        First, one past the last, and the result.
    """
    start, limit, size = 0, 0, 0
    while start < count:
        if limit != portion.read():
            limit = portion.read()
            size = even_size(count - start, limit) if even else limit
        stop = min(start + size, count)
        found = attempt(portion, max(stop - start, min(limit, beside)), partial(work, start, stop))
        if found is None:
            continue
        yield start, stop, found[0]
        start = stop
