"""From right-hand sides to a trajectory: which method, errors in all, losses."""

from __future__ import annotations

import time

import torch
from torch import Tensor

from ..errors import InputError
from ..results import TrajectoryInfo
from ._filters import Filter
from ._linear import Solved, rounding_of, solve
from ._problem import Problem
from .trajectory import Trajectory

__all__ = ["assemble", "check_method", "linear_trajectory"]

_BASES = 4.0  # rounding units times n that a basis may be off from being orthogonal


def check_method(method: str, known: tuple[str, ...], problem: Problem) -> None:
    """Raise unless a method exists, and may be used for a kernel."""
    if method not in ("auto", *known):
        raise InputError(f"method={method!r}: choose 'auto' or one of {', '.join(map(repr, known))}")
    if method == "eigh" and not problem.is_dense:
        raise InputError(
            "method='eigh' needs the dense kernel on one process, which max_dense_bytes or the ranks forbid: "
            "take method='krylov'"
        )


def linear_trajectory(
    problem: Problem,
    filters: Filter,
    times: Tensor,
    *,
    method: str,
    tol: float,
    max_products: int | None,
) -> Trajectory:
    """Return training under the squared error."""
    started = time.perf_counter()
    method, solved = solve(problem, filters, method, tol, max_products)
    rounding, weight_rounding = _rounding(problem, filters, solved)
    errors = problem.output_bound(solved.residual_bounds, solved.dual_bounds) + rounding
    if filters.can_restart():  # p lies between -1 and 1, that of the method too
        errors = errors.clamp(max=2 * problem.lengths(problem.rhs))
        rounding = torch.minimum(rounding, errors)
    rest = solved.residual + problem.shift * solved.dual
    outputs = torch.stack([problem.targets - problem.layout.restore(part) for part in rest])
    return assemble(
        problem,
        times,
        outputs,
        torch.stack([problem.layout.restore(part) for part in solved.dual]),
        torch.stack([problem.space.sum(part.square().mT).sum() for part in rest]) / problem.count,
        errors,
        solved.weight_bounds + weight_rounding,
        rounding,
        filters=filters,
        method=method,
        tol=tol,
        largest=float(solved.largest.max()),
        products=solved.products,
        basis=solved.basis,
        restarts=solved.restarts,
        started=started,
        exhausted=max_products is not None and solved.products >= max_products,
    )


def _rounding(problem: Problem, filters: Filter, solved: Solved) -> tuple[Tensor, Tensor]:
    """Return what rounding may have added to outputs and weights, ``(T, *batch, k)``.

    With K + E for K, exp(-τ (K + E)) - exp(-τ K) = -∫ exp(-(τ - s) K) E exp(-s (K + E)) ds is at most
    τ |E|, and so for descent; the weights then have K^{1/2} q(A) in place of the first factor.
    """
    moved = rounding_of(solved.largest, problem.dtype, problem.space.size)
    eps = torch.finfo(torch.float64).eps  # of which bases are orthogonal
    lengths = problem.lengths(problem.rhs)
    shape = (-1, *(1 for _ in lengths.shape))
    # span: q(0), which bounds q; reach: max √λ q(λ), what weights see of it
    span, reach = problem.span(filters), filters.reach()
    if problem.shift > 0:
        reach = reach.clamp(max=problem.shift**-0.5)
    outputs = (span.reshape(shape) * moved + _BASES * eps * problem.space.size) * lengths
    # A product with a rounds by itself, which is all that there is where an eigenvalue is large.
    scale = torch.where(solved.largest > 0, solved.largest, 1.0).rsqrt()
    weights = (reach.reshape(shape) + scale) * outputs
    endless = ~span.isfinite()  # t = ∞, where what turns eigenvectors is in the bounds already
    if bool(endless.any()):
        sizes = torch.stack([problem.lengths(part) for part in solved.dual[endless]])
        outputs[endless], weights[endless] = moved * sizes + _BASES * eps * problem.space.size * lengths, 0.0
    return outputs, weights


def assemble(
    problem: Problem,
    times: Tensor,
    outputs: Tensor,
    dual: Tensor,
    losses: Tensor,
    errors: Tensor,
    weight_errors: Tensor,
    rounding: Tensor,
    *,
    filters: Filter | None,
    method: str,
    tol: float,
    largest: float,
    products: int,
    started: float,
    basis: int = 0,
    restarts: int = 0,
    exhausted: bool = False,
    reason: str = "",
) -> Trajectory:
    """Return the trajectory of float64 outputs, with errors of each right-hand side, ``(T, *batch, k)``."""
    start = problem.norm(problem.rhs)
    eps = torch.finfo(problem.dtype).eps
    sizes = torch.stack([torch.as_tensor(problem.norm(problem.layout.columns(part))) for part in outputs])
    # Outputs are kept in the kernel's dtype, and are differences of targets and residuals.
    digits = torch.finfo(torch.float64).eps * (start + problem.norm(problem.layout.columns(problem.targets)))
    stored = (eps * sizes + digits).to(errors)

    def total(parts: Tensor) -> Tensor:
        return torch.linalg.vector_norm(parts.flatten(1), dim=-1)

    bounds = total(errors) + stored
    noise = total(rounding) + stored
    met = start == 0 or bool((bounds <= tol * start).all())
    if not met and not reason:
        if bool((noise > tol * start).any()):
            reason = f"rounding in {problem.dtype} alone is above the tolerance"
        elif exhausted:
            reason = "max_products ended it"
        else:
            reason = "the bounds are above the tolerance; at t = ∞ the kernel may be singular"
    info = TrajectoryInfo(
        method=method,
        converged=met,
        tolerance=tol,
        rounding=noise,
        largest=largest,
        products=products,
        basis=basis,
        restarts=restarts,
        reason="" if met else reason,
        seconds=time.perf_counter() - started,
    )
    return Trajectory(
        times=times,
        outputs=outputs.to(problem.dtype),
        dual=dual,
        losses=losses,
        bounds=bounds,
        weight_bounds=total(weight_errors),
        info=info,
        _problem=problem,
        _column_bounds=weight_errors,
        _filters=filters,
        _tolerance=tol,
    )
