"""What every solver checks before it begins and says when it ends."""

from __future__ import annotations

import math
from typing import Any

import torch

from ..errors import InputError, NotConvergedError
from ..results import Solution, SolveInfo

__all__ = ["check_options", "described", "finished"]

_ADVICE = {
    "max_iterations": "raise max_iterations, give a preconditioner of larger rank, or raise the tolerance",
    "stagnated": (
        "the products round too coarsely for it (their error times the condition number): multiply in "
        "float64 (method='refinement' needs few such products), raise the ridge or the tolerance"
    ),
    "indefinite": (
        "a direction v with vᵀ A v ≤ 0 was met: A is not positive definite in its own rounding; raise the "
        "ridge, or multiply in float64"
    ),
    "preconditioner": "the preconditioner is not positive definite: make it with a larger ridge",
}


def check_options(tolerance: float, max_iterations: int | None) -> None:
    """Check what all iterative solvers are asked.

    Raises:
        InputError: If the tolerance is not in (0, 1), or the number of iterations is not positive.
    """
    number = isinstance(tolerance, int | float) and not isinstance(tolerance, bool)
    if not number or not math.isfinite(tolerance) or not 0 < tolerance < 1:
        raise InputError(f"tolerance={tolerance!r}: a relative residual is a number between 0 and 1")
    whole = isinstance(max_iterations, int) and not isinstance(max_iterations, bool)
    if max_iterations is not None and not (whole and max_iterations > 0):
        raise InputError(f"max_iterations={max_iterations!r}: pass a positive integer, or None")


def described(preconditioner: Any) -> dict[str, Any]:
    """Return what `SolveInfo` says about a preconditioner."""
    if preconditioner is None:
        return {}
    return {
        "preconditioner": getattr(preconditioner, "name", type(preconditioner).__name__),
        "rank": int(getattr(preconditioner, "rank", 0)),
        "preconditioner_products": int(getattr(preconditioner, "products", 0)),
        "seed": getattr(preconditioner, "seed", None),
    }


def finished(solution: Solution, raise_on_failure: bool) -> Solution:
    """Return a solution, or raise with it where a column has failed.

    Raises:
        NotConvergedError: If a column misses its tolerance and that is to be raised.
    """
    info = solution.info
    if info.converged or not raise_on_failure:
        return solution
    raise NotConvergedError(_message(info), solution)


def _message(info: SolveInfo) -> str:
    missed = info.residuals > info.tolerance
    worst = int(torch.where(missed, info.residuals, torch.zeros_like(info.residuals)).argmax())
    column = worst % info.residuals.shape[-1]
    return (
        f"{info.method} ended ({info.reason}) after {info.iterations} iterations and {info.products} product "
        f"columns: {int(missed.sum())} of {info.residuals.numel()} columns miss the relative residual "
        f"{info.tolerance:.2g}, the worst is column {column} with {float(info.residuals.max()):.2g}. "
        f"{_ADVICE.get(info.reason, 'Raise the tolerance')}; the partial solution is in .result"
    )
