"""Fits from products alone: conjugate gradients on K + ridge."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from linear_operator.operators import to_linear_operator
from torch import Tensor

from ..operators._ridge_system import RidgeSystem, SolverOptions
from ..operators.counting import row_space
from ..results import Solution, SolveInfo
from ..vectors import resolve_generator
from ._fits import LeftOut, Prediction, solve_block, unit_columns
from ._operands import Kernel, dense_rows
from ._rounding import is_stored, precise_product

__all__ = ["IterativeFit", "kernel_solver"]
Solver = Callable[[Tensor], Solution]

_CHUNK = 64  # right-hand sides of the identity solved at a time


class IterativeFit:
    """A fit by a solver that is given right-hand sides.

    Args:
        solver: ``(*batch, n, k)`` in float64 to the solution of (K + ridge) X = B, in float64.
        rhs: ``(*batch, n, k)`` right-hand sides, float64.
    """

    def __init__(self, solver: Solver, rhs: Tensor) -> None:
        self._solver, self._rhs = solver, rhs
        solution = solver(rhs)
        self.dual: Tensor = solution.solution
        self.active = self.dual
        self.info: SolveInfo = solution.info

    def predict(self, K_cross: Kernel) -> Prediction:
        return precise_product(K_cross, self.dual)

    def explained(self, K_cross: Kernel, start: int, stop: int) -> Tensor:
        rows = dense_rows(K_cross, start, stop)
        return (rows * self._solver(rows.mT.contiguous()).solution.mT).sum(-1)

    def explain(self, pulled: Tensor) -> Tensor:
        return self._solver(pulled).solution

    def energy(self) -> float:
        return float((self._rhs * self.dual).sum())

    def energy_error(self, ridge: float) -> float:
        """Return a bound of the error of `energy`."""
        # (K + r) α = y - ρ: yᵀ (K + r)⁻¹ y = yᵀ α + αᵀ ρ + ρᵀ (K + r)⁻¹ ρ.
        rest = self.info.residuals * torch.linalg.vector_norm(self._rhs, dim=-2)
        return float((rest * torch.linalg.vector_norm(self.dual, dim=-2) + rest.square() / ridge).sum())

    def evidence(self, K: Kernel) -> None:
        return None

    def left_out(self, group: int) -> Tensor:
        size = self._rhs.shape[-2]
        width = max(_CHUNK // group, 1) * group
        parts = []
        for start in range(0, size, width):
            rows = torch.arange(start, min(start + width, size), device=self._rhs.device)
            inverse = self._inverse_columns(rows)[..., rows, :]  # (*batch, w, w): a block of A⁻¹
            blocks = inverse.unflatten(-1, (-1, group)).unflatten(-3, (-1, group))  # (*batch, s, g, s, g)
            blocks = blocks.diagonal(dim1=-4, dim2=-2).movedim(-1, -3)  # (*batch, s, g, g)
            samples = self.dual[..., rows, :].unflatten(-2, (-1, group))
            parts.append(torch.linalg.solve(blocks, samples).flatten(-3, -2))
        return torch.cat(parts, dim=-2)

    def without(self, rows: Tensor) -> LeftOut:
        columns = torch.cat([self._inverse_columns(part) for part in rows.split(_CHUNK)], dim=-1)
        errors = solve_block(columns[..., rows, :], self.dual[..., rows, :])
        # It is zero at these rows by what `errors` solves, so that the other rows' equations hold as well as
        # those of the solves, whatever is rounded.
        dual = (self.dual - columns @ errors).index_fill(-2, rows, 0.0)
        return LeftOut(errors, dual, dual, 0.0)

    def _inverse_columns(self, rows: Tensor) -> Tensor:
        """Return columns of A⁻¹, ``(*batch, n, s)``."""
        return self._solver(unit_columns(rows, self._rhs).contiguous()).solution


def kernel_solver(
    K: Kernel, ridge: float, *, tol: float, max_products: int | None, generator: torch.Generator | None
) -> Solver:
    """Return a solver of (K + ridge) X = B by conjugate gradients, its preconditioner made once.

    Products of a float32 operator carry corrections whose residuals are float64 products of the same
    network, so that the tolerance is met where float32 alone would stagnate. Stored entries are multiplied in
    float64.
    """
    kernel = to_linear_operator(K)
    if is_stored(K):  # then float32 products save little, and round
        kernel = kernel.to(dtype=torch.float64)
    entries = torch.full(kernel.shape[:-1], ridge, dtype=kernel.dtype, device=kernel.device)
    drawn = row_space(K).common(resolve_generator(generator)[0])
    seed = int(torch.randint(2**31, (), generator=drawn))
    made = SolverOptions(tolerance=tol, seed=seed)

    def solver(rhs: Tensor) -> Solution:
        steps = None if max_products is None else max(max_products // rhs.shape[-1], 1)
        # `made` holds the preconditioner, which is one for all right-hand sides.
        options = dataclasses.replace(made, max_iterations=steps)
        return RidgeSystem(kernel, entries, options).solve(rhs, raise_on_failure=True)

    return solver
