"""Points that stand for others: medoids and farthest points in the distances of a kernel."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["farthest_points", "medoids", "nearest_points", "seed_points", "vector_medoids"]

_ROUNDS = 100  # alternations after which a start is left as it is; each of them lowers the cost
_SLAB = 2**13  # rows whose distances to their means are there at once
_ENTRIES = 2**22  # of distances, and of rows, that are held at a time

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


def vector_medoids(
    rows: Tensor, count: int, generator: torch.Generator, num_starts: int = 1
) -> tuple[list[int], float]:
    """Return k-medoids of the rows of a matrix, by alternation from the best start: no distance matrix.

    The member of a cluster with the least sum of squared distances is the one nearest to the mean, as
    Σ_j |φ_i - φ_j|² = |I_h| |φ_i - μ_h|² + Σ_j |φ_j - μ_h|².

    Args:
        rows: ``(m, k)``, float64.
        count: Number of medoids.
        generator: Source of the starts.
        num_starts: Number of starts.

    Returns:
        Distinct points and the sum of squared distances to them. Cost: m k for each medoid a round.
    """
    lengths = torch.linalg.vector_norm(rows, dim=-1).square()

    def start() -> Tensor:
        return torch.tensor(seed_points(lambda points: rows @ rows[points].mT, lengths, count, generator))

    starts = [start() for _ in range(num_starts)]
    if num_starts > 1:
        starts = [min(starts, key=lambda chosen: float(nearest_points(rows, chosen)[1].sum()))]
    (chosen,) = starts
    for _ in range(_ROUNDS):
        owner, _ = nearest_points(rows, chosen)
        moved = _central(rows, owner, count)
        if torch.equal(moved, chosen):
            break
        chosen = moved
    return chosen.tolist(), float(nearest_points(rows, chosen)[1].sum())


def nearest_points(rows: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor]:
    """Return for each row which of the chosen ones is nearest, and the squared distance, ``(m,)``.

    A chosen one is its own, also where it is a copy of another.
    """
    points = rows[chosen]
    lengths = points.square().sum(1)
    owner = torch.empty(len(rows), dtype=torch.int64, device=rows.device)
    squares = torch.empty(len(rows), dtype=rows.dtype, device=rows.device)
    for start in range(0, len(rows), step := max(1, _ENTRIES // (len(chosen) + rows.shape[1]))):
        some = slice(start, start + step)
        distances = (lengths - 2 * rows[some] @ points.mT).add_(rows[some].square().sum(1, keepdim=True))
        found = distances.min(1)
        squares[some], owner[some] = found.values.clamp_(min=0), found.indices
    owner[chosen] = torch.arange(len(chosen), device=rows.device)
    return owner, squares


def _central(rows: Tensor, owner: Tensor, count: int) -> Tensor:
    """Return for each cluster the member nearest to its mean, of equals the first."""
    counts = torch.bincount(owner, minlength=count)  # a medoid is in its own cluster: none is empty
    means = torch.zeros(count, rows.shape[1], dtype=rows.dtype, device=rows.device)
    means = means.index_add_(0, owner, rows) / counts.unsqueeze(1)
    parts = zip(rows.split(_SLAB), owner.split(_SLAB), strict=True)
    order = torch.cat([(part - means[own]).square_().sum(1) for part, own in parts]).argsort(stable=True)
    order = order[owner[order].argsort(stable=True)]  # cluster by cluster, the nearest first
    return order[counts.cumsum(0) - counts]


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
