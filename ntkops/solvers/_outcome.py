"""What a solver checks and says."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor

from ..errors import DtypeError, InputError, NonFiniteError, NotConvergedError, ShapeError
from ..results import Solution, SolveInfo
from ..vectors import Space

__all__ = [
    "Product",
    "as_block",
    "check_options",
    "column_norms",
    "column_products",
    "described",
    "finished",
    "power_of_two",
    "products_are_steady",
    "require_finite",
    "steady_products",
]


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


# -- columns of blocks: inner products pair by pair, and scales


Product = Callable[[Tensor], Tensor]


def column_products(space: Space, left: Tensor, right: Tensor) -> Tensor:
    """Return the inner product of each column of one block with the same column of another."""
    # Columns become members of the batch, so that the space gives k numbers and no k x k matrix.
    pairs = space.inner(left.mT.unsqueeze(-1), right.mT.unsqueeze(-1))  # (*batch, k, 1, 1)
    return pairs[..., 0, 0]


def column_norms(space: Space, block: Tensor) -> Tensor:
    """Return the length of each column, ``(*batch, k)`` in float64."""
    return space.sum_squares(block).sqrt()


def power_of_two(values: Tensor) -> Tensor:
    """Return the power of two below each positive value, 1 for zero: division by it rounds nothing."""
    exponent = torch.frexp(values.double()).exponent - 1
    scale = torch.ldexp(torch.ones_like(values, dtype=torch.float64), exponent)
    return torch.where(values > 0, scale, torch.ones_like(scale))


def as_block(rhs: Tensor, space: Space, what: str = "the right-hand side") -> Tensor:
    """Return right-hand sides as a block ``(*batch, n, k)``, checked."""
    # (n,) or (*batch, n, k)
    block = rhs.unsqueeze(-1) if rhs.dim() == 1 else rhs
    if block.dim() < 2 or block.shape[-2] != space.length:
        raise ShapeError(
            f"{what} needs shape ({space.length},) or (..., {space.length}, k), got {tuple(rhs.shape)}"
        )
    if block.dtype != space.dtype:
        raise DtypeError(f"{what} has dtype {block.dtype}, the space {space.dtype}: cast one of them")
    return require_finite(block, space, what)


def require_finite(block: Tensor, space: Space, what: str) -> Tensor:
    """Return a block."""
    finite = torch.isfinite(block)
    if space.any(not bool(finite.all())):
        bad = (~finite).flatten(0, -2).any(0).nonzero()
        where = f" in column {int(bad[0])}" if len(bad) else ""
        raise NonFiniteError(f"{what} holds NaN or infinity{where}")
    return block


# -- what every solver checks before it begins and says when it ends


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
    """Check what all iterative solvers are asked."""
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
    """Return a solution, or raise with it where a column has failed."""
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
