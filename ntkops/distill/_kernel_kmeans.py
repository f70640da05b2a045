"""Kernel k-means: means of gradients, from products with indicator columns alone."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ._medoids import seed_points

__all__ = ["kernel_kmeans"]

_ROUNDS = 300  # reassignments after which a start is left as it is; each of them lowers the inertia


def kernel_kmeans(
    multiply: Callable[[Tensor], Tensor],
    columns: Callable[[Tensor], Tensor],
    diagonal: Tensor,
    count: int,
    generator: torch.Generator,
    num_starts: int,
) -> tuple[Tensor, float, bool]:
    r"""Return clusters of gradients with least :math:`\sum_h \sum_{i \in I_h} |\phi_i - \mu_h|^2`.

    Lloyd's iteration from the seeding of k-means++ in the feature space of the kernel. Clusters stay
    inhabited: one that empties takes the point that is farthest from its mean.

    Args:
        multiply: ``(m, b) -> (m, b)``, the product with the kernel.
        columns: ``(b,) -> (m, b)``, its columns.
        diagonal: ``(m,)``, float64.
        count: Number of clusters.
        generator: Source of the starts.
        num_starts: Number of starts; the best is returned.

    Returns:
        ``(m,)`` cluster numbers, the inertia, and whether the best start came to rest. Cost: a product with
        ``count`` columns a round, and a column for each seed.
    """
    best, least, settled = torch.zeros(len(diagonal), dtype=torch.int64), float("inf"), False
    for _ in range(num_starts):
        seeds = seed_points(columns, diagonal, count, generator)
        labels, inertia, rest = _lloyd(multiply, columns, diagonal, seeds)
        if inertia < least:
            best, least, settled = labels, inertia, rest
    return best, least, settled


def means(labels: Tensor, count: int, dtype: torch.dtype) -> Tensor:
    """Return the coefficients of cluster means, ``(m, count)``: 1 / |I_h| for its members."""
    members = torch.nn.functional.one_hot(labels, count).double()
    return (members / members.sum(0)).to(dtype)


def _lloyd(
    multiply: Callable[[Tensor], Tensor],
    columns: Callable[[Tensor], Tensor],
    diagonal: Tensor,
    seeds: list[int],
) -> tuple[Tensor, float, bool]:
    count = len(seeds)
    chosen = torch.tensor(seeds)
    kernel = columns(chosen).double()  # (m, s)
    distances = diagonal.unsqueeze(1) + diagonal[seeds] - 2 * kernel
    labels = _inhabited(distances, distances.argmin(-1), count)
    previous = float("inf")
    for _ in range(_ROUNDS):
        weights = means(labels, count, kernel.dtype)
        images = multiply(weights).double()  # (m, s): <φ_i, μ_h>
        lengths = (weights * images).sum(0)  # (s,): |μ_h|²
        distances = (diagonal.unsqueeze(1) + lengths - 2 * images).clamp(min=0)
        inertia = float(distances.gather(1, labels.unsqueeze(1)).sum())
        if inertia >= previous:  # rounding alone moves points now
            return labels, previous, True
        moved = _inhabited(distances, distances.argmin(-1), count)
        if torch.equal(moved, labels):
            return labels, inertia, True
        labels, previous = moved, inertia
    return labels, previous, False


def _inhabited(distances: Tensor, labels: Tensor, count: int) -> Tensor:
    """Give each empty cluster the point that is farthest from the mean of a cluster of several."""
    labels = labels.clone()
    for empty in (torch.bincount(labels, minlength=count) == 0).nonzero().flatten().tolist():
        sizes = torch.bincount(labels, minlength=count)
        own = distances.gather(1, labels.unsqueeze(1)).squeeze(1)
        own = torch.where(sizes[labels] > 1, own, torch.full_like(own, -1.0))
        labels[int(own.argmax())] = empty
    return labels
