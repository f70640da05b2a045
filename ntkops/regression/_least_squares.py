"""Fits in parameter space: min |J w - y|² + ridge |w|² from products with J and Jᵀ alone."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from linear_operator.operators import LinearOperator
from torch import Tensor

from ..errors import InputError, NotConvergedError
from ..operators.counting import column_space, multiply, row_space
from ..operators.structure import structure
from ..results import Solution, SolveInfo
from ..solvers import lsmr
from ._operands import Kernel

__all__ = ["least_squares_solver"]


def least_squares_solver(
    K: Kernel, ridge: float, *, tol: float, max_products: int | None
) -> Callable[[Tensor], Solution]:
    """Return a solver of (K + ridge) X = B by LSMR on J, one member of the batch after the other.

    Products run in float64, those of a float32 network too.

    Raises:
        InputError: If the ridge is zero, or the operator does not know its Jacobian.
    """
    if ridge == 0:
        raise InputError("method='lsmr' finds α = (y - J w) / ridge and needs a positive ridge")
    known = structure(K)
    factors = known.factors() if known.symmetric else None
    if factors is None:
        raise InputError(
            "method='lsmr' needs an operator that knows its Jacobian, K = J Jᵀ; "
            f"{type(K).__name__} does not: take 'cg'"
        )
    jacobian = factors[0].to(dtype=torch.float64)

    def solver(rhs: Tensor) -> Solution:
        started = time.perf_counter()
        steps = None if max_products is None else max(max_products // rhs.shape[-1], 1)
        if jacobian.dim() == 2:
            found = [_solve(jacobian, rhs, ridge, tol, steps)]
            return _finished(found[0].solution, found[0].info)
        count = jacobian.shape[0]
        found = [_solve(jacobian[c], rhs[c], ridge, tol, steps) for c in range(count)]
        info = _merged([part.info for part in found], time.perf_counter() - started)
        return _finished(torch.stack([part.solution for part in found]), info)

    return solver


def _solve(jacobian: LinearOperator, rhs: Tensor, ridge: float, tol: float, steps: int | None) -> Solution:
    transposed = jacobian.mT
    return lsmr(
        lambda block: multiply(jacobian, block),
        lambda block: multiply(transposed, block),
        rhs,
        row_space(jacobian),
        column_space(jacobian),
        ridge=ridge,
        tolerance=tol,
        max_iterations=steps,
        raise_on_failure=False,
    )


def _merged(infos: list[SolveInfo], seconds: float) -> SolveInfo:
    """Return the info of a batch from those of its members."""
    worst = max(infos, key=lambda info: float(info.residuals.max()))
    return SolveInfo(
        converged=all(info.converged for info in infos),
        residuals=torch.stack([info.residuals for info in infos]),
        tolerance=worst.tolerance,
        iterations=max(info.iterations for info in infos),
        products=sum(info.products for info in infos),
        reason=worst.reason,
        method=worst.method,
        seconds=seconds,
    )


def _finished(solution: Tensor, info: SolveInfo) -> Solution:
    found = Solution(solution, info)
    if not info.converged:
        raise NotConvergedError(
            f"LSMR ended ({info.reason}) with a relative residual of {float(info.residuals.max()):.2g} where "
            f"{info.tolerance:.2g} was asked: raise max_products, the ridge or the tolerance; the partial "
            "solution is in .result",
            found,
        )
    return found
