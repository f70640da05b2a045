"""Ridges and cut-offs as users give them."""

from __future__ import annotations

import math
from typing import Any

from ..errors import InputError

__all__ = ["check_cutoff", "read_ridges"]

_GRID = tuple(10.0 ** (exponent / 2) for exponent in range(-20, 5))  # 1e-10 ... 1e2


def read_ridges(given: Any, criteria: tuple[str, ...] = ("loo",)) -> tuple[float, ...]:
    """Return the ridges that a user named: one, several, or the grid for a criterion.

    Raises:
        InputError: If one of them is not a finite number ≥ 0, or there is none.
    """
    if isinstance(given, str):
        if given not in criteria:
            names = " or ".join(map(repr, criteria))
            raise InputError(f"ridge={given!r}: a number, a list of numbers, or {names}")
        return _GRID
    ridges = [given] if isinstance(given, int | float) else list(given)
    if not ridges:
        raise InputError("ridge=[]: name at least one ridge")
    for ridge in ridges:
        number = isinstance(ridge, int | float) and not isinstance(ridge, bool) and math.isfinite(ridge)
        if not number or ridge < 0:
            raise InputError(
                f"ridge={ridge!r}: a ridge is a finite number, 0 or more; with relative=True 1e-4 means "
                "1e-4 times the mean diagonal of the kernel"
            )
    return tuple(float(ridge) for ridge in ridges)


def check_cutoff(cutoff: Any, size: int) -> None:
    """Check a spectral cut-off of a kernel with ``size`` rows.

    Raises:
        InputError: If it is neither None, a number of eigenpairs, nor a share of the trace.
    """
    if cutoff is None:
        return
    if isinstance(cutoff, int) and not isinstance(cutoff, bool) and 1 <= cutoff <= size:
        return
    if isinstance(cutoff, float) and 0 < cutoff < 1:
        return
    raise InputError(
        f"cutoff={cutoff!r}: a number of eigenpairs from 1 to {size}, or the share of the trace to lose, a "
        "float between 0 and 1"
    )
