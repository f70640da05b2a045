"""Passes through a network that were really made."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["PassCount"]


@dataclass(frozen=True)
class PassCount:
    """Passes really made, one per vector: Jᵀv (vjp), Jp (jvp) and per-sample gradient passes.

    Attributes:
        vjp: Products with Jᵀ.
        jvp: Products with J.
        per_sample: Per-sample gradient passes (one for each output row of every sample).
        products: Columns multiplied by operators that are not ours.
    """

    vjp: int = 0
    jvp: int = 0
    per_sample: int = 0
    products: int = 0

    @property
    def total(self) -> int:
        """Sum of all passes."""
        return self.vjp + self.jvp + self.per_sample + self.products
