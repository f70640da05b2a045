"""Eigenpairs and what is counted with them."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ..errors import EstimateError

__all__ = ["Eigenpairs", "TruncationRank"]


@dataclass(frozen=True, eq=False)
class Eigenpairs:
    """Leading eigenpairs of a symmetric operator.

    Attributes:
        values: ``(*batch, k)`` eigenvalues from the wanted end inwards (largest first unless the smallest
            were asked for), float64. Small negative ones are reported, not clamped.
        vectors: ``(*batch, n, k)`` orthonormal eigenvectors in the operator's dtype.
        residuals: ``(*batch, k)`` true residual norms |K v - λ v|, recomputed at the end.
        converged: Whether every residual met the tolerance, and no hidden copy was found.
        passes: Passes made.
        method: "lanczos" or "dense".
        seed: Seed of the starting vector; None if none was drawn.
        seconds: Wall-clock time.
    """

    values: Tensor
    vectors: Tensor
    residuals: Tensor
    converged: bool
    passes: int
    method: str
    seed: int | None = None
    seconds: float = 0.0

    def __repr__(self) -> str:
        """Return one line: how many pairs, from which value to which, and how good."""
        count, size = self.values.shape[-1], self.vectors.shape[-2]
        batch = f" for {tuple(self.values.shape[:-1])} kernels" if self.values.dim() > 1 else ""
        shown = ""
        if count and self.values.numel():
            first, last = float(self.values[..., 0].max()), float(self.values[..., -1].min())
            worst = float(self.residuals.max())
            shown = f", values {first:.4g} to {last:.4g}, residuals up to {worst:.1g}"
        state = "" if self.converged else ", not converged"
        return f"Eigenpairs({count} of {size}{batch}{shown}, {self.method!r}, {self.passes} passes{state})"


@dataclass(frozen=True, eq=False)
class TruncationRank:
    """How many leading eigenvalues hold a given share of the trace.

    Attributes:
        rank: ``(*batch)`` smallest r with Σ_{i≤r} λ_i ≥ (1 - ε) tr K, int64.
        captured: ``(*batch)`` the share that they hold, float64.
        epsilon: ε.
        values: ``(*batch, r_max)`` leading eigenvalues that were used, largest first, float64.
        exact: Whether all eigenvalues were computed (else Lanczos, converged as said).
        converged: Whether every eigenvalue that decides the rank met its tolerance.
        passes: Passes made.
        seed: Seed of the starting vectors; None if none was drawn.
        seconds: Wall-clock time.
        interval: The 95 % interval ``(low, high)`` of the rank, two int64 tensors ``(*batch)``; both ends
            are the rank where the trace is exact.
    """

    rank: Tensor
    captured: Tensor
    epsilon: float
    values: Tensor
    exact: bool
    converged: bool
    passes: int
    seed: int | None = None
    seconds: float = 0.0
    interval: tuple[Tensor, Tensor] | None = None

    def __repr__(self) -> str:
        """Return one line, without the eigenvalues."""
        if self.rank.numel() != 1:
            shown = f"for {tuple(self.rank.shape)} kernels"
        else:
            low, high = (None, None) if self.interval is None else (int(end) for end in self.interval)
            span = "" if low == high else f", 95% in [{low}, {high}]"
            shown = f"{int(self.rank)}{span}, holds {float(self.captured):.6g} of the trace"
        state = "" if self.converged else ", not converged"
        return f"TruncationRank({shown}, epsilon={self.epsilon:g}, {self.passes} passes{state})"

    def __int__(self) -> int:
        """Return the rank of a single kernel."""
        if self.rank.numel() != 1:
            raise EstimateError(
                f"there is one rank for each of {tuple(self.rank.shape)} kernels: index .rank"
            )
        return int(self.rank)
