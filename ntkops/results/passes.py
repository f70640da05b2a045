"""Passes through a network that were really made."""

from __future__ import annotations

from dataclasses import dataclass, field

__all__ = ["PassCount"]


@dataclass(frozen=True)
class PassCount:
    """Passes really made, one per vector: Jᵀv (vjp), Jp (jvp) and per-sample gradient passes.

    Attributes:
        vjp: Products with Jᵀ.
        jvp: Products with J.
        per_sample: Per-sample gradient passes (one for each output row of every sample).
        products: Columns multiplied by operators that are not ours.
        checks: Passes of trials and row checks, beside the others: no cap and no comparison counts them, as
            how many there are depends on what was verified before. A row check is one backward pass over a
            batch, the trial of layer rules two over four samples, that of a mode of differentiation a vjp and
            a jvp over two.
    """

    vjp: int = 0
    jvp: int = 0
    per_sample: int = 0
    products: int = 0
    checks: int = field(default=0, compare=False)

    @property
    def total(self) -> int:
        """Sum of all passes but those of checks."""
        return self.vjp + self.jvp + self.per_sample + self.products
