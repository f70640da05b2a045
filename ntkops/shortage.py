"""Memory that runs out: how torch and Python say it, and an exception that says what it was needed for."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from .errors import NtkopsError, OutOfMemoryError

__all__ = ["is_out_of_memory", "memory_for"]

_CPU_MESSAGE = re.compile(r"can't allocate memory|not enough memory|std::bad_alloc")


def is_out_of_memory(error: BaseException) -> bool:
    """Tell whether an exception says that memory ran out: torch's own on a device or the CPU, or Python's.

    Args:
        error: Any exception.

    Returns:
        Whether it does; exceptions of ours never do.

    Example:
        >>> from ntkops.shortage import is_out_of_memory
        >>> text = "DefaultCPUAllocator: can't allocate memory: you tried"
        >>> (
        ...     is_out_of_memory(RuntimeError(text)),
        ...     is_out_of_memory(RuntimeError("a size does not fit")),
        ... )
        (True, False)
    """
    if isinstance(error, NtkopsError):
        return False
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and _CPU_MESSAGE.search(str(error)) is not None


@contextmanager
def memory_for(what: str, way_out: str) -> Iterator[None]:
    """Name the work for which memory ran out, where there are no smaller parts.

    Args:
        what: The work, for the message.
        way_out: What to do about it.

    Raises:
        OutOfMemoryError: If memory runs out inside.
    """
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        said = (str(error).strip().splitlines() or [type(error).__name__])[0][:160]
        raise OutOfMemoryError(f"out of memory: {what} ({said}); {way_out}") from error
