"""Points that stand for others: medoids and farthest points in the distances of a kernel."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["farthest_points", "medoids", "seed_points"]

_ROUNDS = 100  # alternations after which a start is left as it is; each of them lowers the cost

Columns = Callable[[Tensor], Tensor]


def squared_distances(columns: Columns, diagonal: Tensor, point: int) -> Tensor:
    """Return |φ_i - φ_p|² = K_ii + K_pp - 2 K_ip for all i, ``(m,)``, float64."""
    column = columns(torch.tensor([point]))[:, 0].double()
    return (diagonal + diagonal[point] - 2 * column).clamp(min=0)


def farthest_points(columns: Columns, diagonal: Tensor, count: int, start: int) -> tuple[list[int], Tensor]:
    """Return points each of which is farthest from all before it, and the distances that are left.

    Args:
        columns: ``(b,) -> (m, b)``, columns of the kernel.
        diagonal: ``(m,)`` its diagonal, float64.
        count: Number of points.
        start: The first one.

    Returns:
        The points, and ``(m,)`` squared distances to the nearest of them. Cost: a column a point.
    """
    chosen, nearest = [start], squared_distances(columns, diagonal, start)
    while len(chosen) < count:
        free = nearest.clone()
        free[chosen] = -1.0  # a copy of a chosen point may come, but no point twice
        chosen.append(int(free.argmax()))
        nearest = torch.minimum(nearest, squared_distances(columns, diagonal, chosen[-1]))
    return chosen, nearest


def seed_points(columns: Columns, diagonal: Tensor, count: int, generator: torch.Generator) -> list[int]:
    """Return distinct points, each drawn in proportion to the squared distance to those before it.

    The seeding of k-means++ (Arthur, Vassilvitskii 2007) in the distances of a kernel.
    """
    size = len(diagonal)
    chosen = [int(torch.randint(size, (), generator=generator))]
    nearest = squared_distances(columns, diagonal, chosen[0])
    while len(chosen) < count:
        free = nearest.cpu().clone()
        free[chosen] = 0.0
        if not float(free.sum()) > 0:  # nothing but copies is left
            free = torch.ones(size, dtype=torch.float64)
            free[chosen] = 0.0
        chosen.append(int(torch.multinomial(free / free.sum(), 1, generator=generator)))
        nearest = torch.minimum(nearest, squared_distances(columns, diagonal, chosen[-1]))
    return chosen


def medoids(
    dense: Tensor, count: int, generator: torch.Generator, num_starts: int
) -> tuple[list[int], float]:
    """Return k-medoids in squared kernel distances: the best of some starts, by alternation and swaps.

    Each point goes to its nearest medoid, each cluster takes the member with the least sum of distances,
    until nothing changes (Park, Jun 2009). The best start is then improved by the best swap of a medoid
    and a point as long as one lowers the cost (PAM: Kaufman, Rousseeuw 1990).

    Args:
        dense: ``(m, m)`` kernel, float64.
        count: Number of medoids.
        generator: Source of the starts.
        num_starts: Number of starts.

    Returns:
        Distinct points and the sum of squared distances to them.
    """
    diagonal = dense.diagonal()
    distances = (diagonal.unsqueeze(0) + diagonal.unsqueeze(1) - 2 * dense).clamp(min=0)  # (m, m)
    best, least = list(range(count)), float("inf")
    for _ in range(num_starts):
        chosen = seed_points(lambda points: dense[:, points], diagonal, count, generator)
        chosen = _alternate(distances, chosen)
        cost = _cost(distances, chosen)
        if cost < least:
            best, least = chosen, cost
    best = _swap(distances, best)
    return best, _cost(distances, best)


def _cost(distances: Tensor, chosen: list[int]) -> float:
    return float(distances[:, chosen].amin(-1).sum())


def _alternate(distances: Tensor, chosen: list[int]) -> list[int]:
    for _ in range(_ROUNDS):
        nearest = distances[:, chosen].argmin(-1)
        moved = list(chosen)
        for cluster in range(len(chosen)):
            members = (nearest == cluster).nonzero().flatten()
            if len(members):  # a copy of another medoid may have none
                sums = distances[members][:, members].sum(0)
                moved[cluster] = int(members[sums.argmin()])
        if moved == chosen:
            break
        chosen = moved
    return chosen


def _swap(distances: Tensor, chosen: list[int]) -> list[int]:
    """Exchange a medoid for a point as long as that lowers the cost; O(m² s) a round."""
    size = len(distances)
    for _ in range(_ROUNDS):
        near = distances[:, chosen]
        first, owner = near.min(-1)
        second = near.scatter(1, owner.unsqueeze(1), float("inf")).amin(-1)
        now, best, step = float(first.sum()), 0.0, None
        for position in range(len(chosen)):
            without = torch.where(owner == position, second, first)  # (m,) distances without this medoid
            costs = torch.minimum(distances, without.unsqueeze(1)).sum(0)  # (m,) of each candidate
            costs[chosen] = float("inf")
            gain = now - float(costs.min())
            if gain > best + 1e-12 * now:
                best, step = gain, (position, int(costs.argmin()))
        if step is None or size == len(chosen):
            break
        chosen = [*chosen[: step[0]], step[1], *chosen[step[0] + 1 :]]
    return chosen
