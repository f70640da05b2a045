"""Products that go one way from the first to the last of an iteration."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar

__all__ = ["products_are_steady", "steady_products"]

_steady: ContextVar[bool] = ContextVar("steady", default=False)


@contextlib.contextmanager
def steady_products() -> Iterator[None]:
    """Let operators choose how they multiply at their first product in here, and by sizes alone.

    Otherwise they go over to a dense block, or to factors of layers, once products have cost as much as
    making it. That changes the last bits of a product in the middle of an iteration, at a place that hangs on
    what was multiplied before: an iteration that goes on from a file in a new process would have other bits.
    """
    token = _steady.set(True)
    try:
        yield
    finally:
        _steady.reset(token)


def products_are_steady() -> bool:
    """Whether a product is one of an iteration."""
    return _steady.get()
