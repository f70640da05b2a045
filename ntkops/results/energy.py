"""What a low-rank kernel leaves out of the kernel that it approximates."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

__all__ = ["EnergyGap"]


@dataclass(frozen=True, eq=False)
class EnergyGap:
    """The energy of gradients outside the span of a few, and what it bounds.

    All tensors are float64, of the operator's batch shape.

    Attributes:
        gap: |Φ (I - Π)|_F² = tail + misalignment: the trace of K minus that of its approximation. It
            bounds |K - Φ Π Φᵀ| in the nuclear norm (as an equality), and so in every Schatten norm.
        tail: What the best projector of the same rank leaves out, the sum of eigenvalues past the rank.
        misalignment: What this one leaves out beyond that; not negative.
        total: tr K = |Φ|_F².
        rank: Rank r of the projector, int64.
        bound: |Φ|_F |Φ (I - Π)|_F, the bound on |K - Φ Π Φᵀ|_F of eq. 10; never below ``gap``.
        converged: Whether the eigenvalues that the tail needs have converged.
    """

    gap: Tensor
    tail: Tensor
    misalignment: Tensor
    total: Tensor
    rank: Tensor
    bound: Tensor
    converged: bool = True

    @property
    def share(self) -> Tensor:
        """Share of the energy that is left out, gap / total."""
        return self.gap / self.total
