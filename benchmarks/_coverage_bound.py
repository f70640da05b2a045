"""How narrow an interval that covers can be with few probes: a bound by Neyman and Pearson's lemma.

Of a kernel K, probes of one direction show W = Ωᵀ K Ω. Beside a flat bulk of many eigenvalues, whose entries
of W off the diagonal are normal numbers of one size, a single direction adds c z zᵀ with z normal. Where the
entries of z are small it is hidden. Let an interval for |K|_F² cover in .95 of the runs with a direction: its
upper end lies below the value there in at most .05 of them, and "the upper end lies below" is a test of the
direction at that level. On a bulk alone it happens at most with the power of the best test. Where that is
below one half, the median upper end is at least the value with the direction, whatever the interval is made
of, and even if it is told the size of the bulk.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["hidden_direction"]

_LEVEL = 0.05
_DRAWS = 3000
_STRENGTHS = (2.0, 2.5, 3.0, 3.5, 4.0, 5.0)  # c; the value is c² + 1 times that of the bulk


def hidden_direction(probes: int) -> list[dict[str, float]]:
    """Return, for directions of some strength, the value with them and the power of the best test.

    Args:
        probes: Number m of probes.

    Returns:
        Value in terms of the bulk's, the power on the bulk alone, and the ratio of that value to the width of
        the interval by the true quantiles of Σ W_ij² there. A power below one half makes it a bound.
    """
    generator = torch.Generator().manual_seed(0)
    rows, cols = torch.triu_indices(probes, probes, 1)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    def directions(strength: float) -> Tensor:
        z = normal(_DRAWS, probes)
        return strength * z[:, rows] * z[:, cols]

    low, high = normal(100_000, len(rows)).square().mean(1).quantile(torch.tensor([0.025, 0.975])).tolist()
    entries: list[dict[str, Any]] = []
    for strength in _STRENGTHS:
        candidates = directions(strength)

        def log_ratio(seen: Tensor, candidates: Tensor = candidates) -> Tensor:
            return (seen @ candidates.T - candidates.square().sum(1) / 2).logsumexp(1)

        beside = log_ratio(directions(strength) + normal(_DRAWS, len(rows)))
        alone = log_ratio(normal(_DRAWS, len(rows)))
        power = float((alone < beside.quantile(_LEVEL)).double().mean())
        value = strength**2 + 1
        ratio = value / (1 / low - 1 / high)
        entries.append({"value": value, "power": round(power, 3), "ratio": round(ratio, 2)})
    return entries
