"""How many times smaller a data set or a parameter space could be."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ..errors import EstimateError

__all__ = ["Redundancy"]


@dataclass(frozen=True, eq=False)
class Redundancy:
    """The largest r for which data or parameters are (r, ε)-redundant.

    Attributes:
        factor: ``(*batch)`` the largest such r, ``size / rank``, float64.
        interval: 95 % interval (low, high) of r; both ends are r where the rank is certain.
        rank: ``(*batch)`` the dimension that is enough, int64.
        size: What r is relative to: n for data, P for parameters.
        epsilon: ε.
        kind: "data" or "parameters".
        values: ``(*batch, k)`` leading eigenvalues that were used, largest first, float64.
        exact: Whether all eigenvalues were computed.
        converged: Whether every eigenvalue that decides the rank met its tolerance.
        passes: Passes made.
        seed: Seed of the starting vectors; None if none was drawn.
        seconds: Wall-clock time.
    """

    factor: Tensor
    interval: tuple[Tensor, Tensor]
    rank: Tensor
    size: int
    epsilon: float
    kind: str
    values: Tensor
    exact: bool
    converged: bool
    passes: int
    seed: int | None = None
    seconds: float = 0.0

    def __repr__(self) -> str:
        """Return one line, without the eigenvalues."""
        if self.factor.numel() != 1:
            shown = f"for {tuple(self.factor.shape)} kernels"
        else:
            low, high = (float(end) for end in self.interval)
            span = "" if low == high else f", 95% in [{low:.4g}, {high:.4g}]"
            shown = f"{float(self.factor):.4g}{span}: rank {int(self.rank)} of {self.size}"
        state = "" if self.converged else ", not converged"
        return f"Redundancy(of {self.kind}, {shown}, epsilon={self.epsilon:g}, {self.passes} passes{state})"

    def __float__(self) -> float:
        """Return the factor of a single kernel."""
        if self.factor.numel() != 1:
            raise EstimateError(
                f"there is one factor for each of {tuple(self.factor.shape)} kernels: index .factor"
            )
        return float(self.factor)
