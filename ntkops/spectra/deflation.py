"""How many leading eigenvectors to split off before more random directions are drawn."""

from __future__ import annotations

import math

from torch import Tensor

__all__ = ["choose_deflation"]

_SIZES = (1, 2, 4, 8, 16, 32, 64, 128)
_PER_VECTOR, _AT_ALL = 2.5, 40.0  # products that Lanczos takes for k eigenvectors, about
_GAIN = 0.7  # of the products that are left, below which the change pays


def choose_deflation(
    values: Tensor, counts: Tensor, *, steps: int, drawn: int, error: float | None, left: float
) -> int:
    """Return the number k of eigenvectors that saves most products, or the most error; 0 for none.

    Args:
        values: ``(m,)`` values of f at the nodes of a quadrature rule.
        counts: ``(m,)`` numbers of eigenvalues that the nodes stand for; their sum is the dimension.
        steps: Products of one direction.
        drawn: Directions that are drawn already, and lost by a change.
        error: Half width of the interval that is wanted, or None where the products are to be spent.
        left: Products that are left.

    Returns:
        The number k, less than half of the dimension.
    """
    dimension = float(counts.sum())
    order = values.argsort(descending=True)
    values, counts = values[order], counts[order]
    costs = {}
    for size in (0, *_SIZES):
        if size and size > dimension / 2:
            break
        before = counts.cumsum(0) - counts
        kept = (counts - (size - before).clamp(min=0)).clamp(min=0)  # what is left of each node
        rest = float(kept.sum())
        mean = float((kept * values).sum()) / rest
        spread = float((kept * (values - mean).square()).sum()) / rest
        variance = 2 * rest**2 / (rest + 2) * spread  # of one direction
        price = _AT_ALL + _PER_VECTOR * size if size else 0.0
        if error is not None:
            wanted = max(3.84 * variance / error**2, 8.0) if error else math.inf
            costs[size] = price + steps * max(wanted - (drawn if not size else 0), 0.0)
        else:
            remaining = left - price + (steps * drawn if not size else 0)
            costs[size] = variance / remaining if remaining > 8 * steps else math.inf
    best = min(costs, key=lambda size: costs[size])
    limit = _GAIN if error is not None else _GAIN**2
    pays = costs[best] < limit * costs[0] and (error is None or costs[0] - costs[best] > _AT_ALL)
    return best if pays and _PER_VECTOR * best + _AT_ALL < left / 2 else 0
