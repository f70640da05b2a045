"""How an iteration ended: a solution of linear systems, a trajectory of training."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor

__all__ = [
    "Solution",
    "SolveInfo",
    "TrajectoryInfo",
]


@dataclass(frozen=True, eq=False)
class SolveInfo:
    """How a solver ended, column by column.

    Attributes:
        converged: Whether every column met the tolerance.
        residuals: ``(*batch, k)`` true relative residuals |b - A x| / |b|, recomputed from x by products
            of their own, float64; 0 for a column b = 0.
        tolerance: The relative residual that was asked of every column.
        iterations: Steps of the iteration; 0 for a factorisation.
        products: Columns multiplied with the operator, those of the check included; the ones that made
            the preconditioner are counted apart.
        reason: Why it ended: "converged", or the reason of the column with the largest residual:
            "stagnated" (rounding in the products stops it), "indefinite" (a direction of no positive
            curvature was met), "preconditioner" (it is not positive definite), or "max_iterations".
        method: "conjugate gradient", "refinement", "lsmr" or "cholesky".
        preconditioner: Its name, or None.
        rank: Rank of the preconditioner; 0 without one.
        preconditioner_products: Columns multiplied to make it.
        precise_products: Columns multiplied in the higher precision, of those in ``products``.
        restarts: Times that a column went on from its true residual.
        history: ``(iterations,)`` largest relative residual of the columns still iterated, as the
            iteration itself keeps it, float64.
        seed: Seed of what was drawn; None if nothing was.
        seconds: Wall-clock time.
    """

    converged: bool
    residuals: Tensor
    tolerance: float
    iterations: int
    products: int
    reason: str
    method: str
    preconditioner: str | None = None
    rank: int = 0
    preconditioner_products: int = 0
    precise_products: int = 0
    restarts: int = 0
    history: Tensor | None = None
    seed: int | None = None
    seconds: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        """Return plain numbers and lists, ready for JSON."""
        plain = dict(self.__dict__)
        for name in ("residuals", "history"):
            plain[name] = None if plain[name] is None else plain[name].tolist()
        return plain

    def __str__(self) -> str:
        """Show how it ended, the largest residual, and what it took."""
        worst = float(self.residuals.max()) if self.residuals.numel() else 0.0
        helped = f", {self.preconditioner} rank {self.rank}" if self.preconditioner else ""
        return (
            f"{self.reason}: relative residual {worst:.2g} (asked {self.tolerance:.2g}) after "
            f"{self.iterations} iterations, {self.products} product columns ({self.method}{helped})"
        )


class Solution(NamedTuple):
    """A solution with its info; it unpacks as ``x, info``.

    Attributes:
        solution: ``(n,)`` or ``(*batch, n, k)``, in the dtype of the right-hand side.
        info: How the solver ended.
    """

    solution: Tensor
    info: SolveInfo


# -- a trajectory of training


@dataclass(frozen=True, eq=False)
class TrajectoryInfo:
    """How a trajectory was computed, and how exact it is.

    Attributes:
        method: "krylov", "eigh", "ode" or "steps".
        converged: Whether ``bounds`` meet the tolerance at every time, rounding included.
        tolerance: Error of the outputs that was asked for, relative to the length of the residual at the
            start.
        rounding: ``(T,)`` the part of ``bounds`` that rounding in the kernel and its products may have; no
            method goes below it in this dtype.
        largest: Largest eigenvalue of the kernel that was met, up to the accuracy of the method.
        products: Columns multiplied with the kernel.
        basis: Vectors of the Krylov basis, n for an eigendecomposition, 0 for the others.
        restarts: Times that the basis was given up because memory ended.
        reason: Why it did not converge, "" if it did.
        seconds: Wall-clock time.
    """

    method: str
    converged: bool
    tolerance: float
    rounding: Tensor
    largest: float
    products: int
    basis: int = 0
    restarts: int = 0
    reason: str = ""
    seconds: float = 0.0

    def __str__(self) -> str:
        """Show the method, what it took, and whether it converged."""
        state = "converged" if self.converged else f"not converged: {self.reason}"
        return f"{state} ({self.method}, {self.products} product columns, basis of {self.basis})"
