"""Leaving the global random state as it was."""

from __future__ import annotations

import functools
import random
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

__all__ = ["disturb_randomness", "random_state_moved", "untouched_randomness"]


def _cuda(device: torch.device | None) -> bool:
    return device is not None and device.type == "cuda"


def _states(device: torch.device | None) -> list[tuple[Any, Callable[[Any], None]]]:
    """Return every global random state, each with what sets it."""
    states: list[tuple[Any, Callable[[Any], None]]] = [
        (torch.get_rng_state(), torch.set_rng_state),
        (random.getstate(), random.setstate),
    ]
    numpy = sys.modules.get("numpy")
    if numpy is not None:
        states.append((numpy.random.get_state(), numpy.random.set_state))
    if device is not None and device.type == "cuda":
        states.append(
            (torch.cuda.get_rng_state(device), functools.partial(torch.cuda.set_rng_state, device=device))
        )
    return states


@contextmanager
def untouched_randomness(device: torch.device | None = None) -> Iterator[None]:
    """Restore the global random states of torch, Python and NumPy afterwards, also after an exception.

    Args:
        device: A CUDA device whose state is kept too; other devices need none.
    """
    states = _states(device)
    try:
        yield
    finally:
        for state, put_back in states:
            put_back(state)


def disturb_randomness(seed: int) -> None:
    """Put all global generators into another state; only for use inside `untouched_randomness`."""
    torch.manual_seed(seed)
    random.seed(seed)
    numpy = sys.modules.get("numpy")
    if numpy is not None:
        numpy.random.seed(seed)


@contextmanager
def random_state_moved(device: torch.device | None = None) -> Iterator[list[bool]]:
    """Tell whether a global random state moved inside the block.

    Args:
        device: A CUDA device whose state is looked at too.

    Yields:
        A list that holds one flag after the block.
    """
    moved: list[bool] = []
    before = _states(device)
    yield moved
    moved.append(
        any(not _equal(old, new) for (old, _), (new, _) in zip(before, _states(device), strict=False))
    )


def _equal(left: Any, right: Any) -> bool:
    if isinstance(left, Tensor):
        return torch.equal(left, right)
    if isinstance(left, tuple):
        return all(map(_equal, left, right))
    return bool(left.tobytes() == right.tobytes()) if hasattr(left, "tobytes") else bool(left == right)
