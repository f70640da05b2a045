"""How a trajectory of training was computed."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

__all__ = ["TrajectoryInfo"]


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
