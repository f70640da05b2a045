"""Barycentres with free support of one measure in the 2-Wasserstein metric: k-means, free or balanced."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from ..arguments import checked
from ..errors import InputError, MissingDependencyError, NonFiniteError, ShapeError
from ..results import Barycenter
from ..vectors import resolve_generator

__all__ = ["wasserstein_barycenter"]

_STARTS = 10  # of k-means
_ROUNDS = 100  # of assignments
_TOLERANCE = 1e-12  # relative decrease of the cost at which rounds end


@checked
def wasserstein_barycenter(
    features: Tensor,
    num_points: int,
    *,
    weights: Literal["free", "uniform"] = "free",
    generator: torch.Generator | None = None,
) -> Barycenter:
    r"""Return the measure on k points that is nearest in W₂ to the empirical measure of some vectors.

    For a single measure with free weights that is k-means: the best plan sends every vector to its nearest
    point, so that :math:`W_2^2 = \frac1n \sum_i \min_j |f_i - b_j|^2`, and the weights are the shares of the
    clusters. With uniform weights every point takes n/k vectors, or where k does not divide n one of the
    whole numbers beside it, since no vector is split: k-means with equal shares, by turns of an optimal
    assignment and of means. Both end in a local minimum.

    Args:
        features: ``(n, d)`` vectors of mass 1/n each.
        num_points: k, at most the number of different vectors.
        weights: "free" or "uniform".
        generator: CPU generator of the starts; None draws a seed.

    Returns:
        `Barycenter`, with W₂² to the measure of the vectors. Cost: ten runs of k-means; for "uniform"
        an assignment of n vectors to n places a round, by SciPy: O(n²) memory, O(n³) flops at worst.

    Raises:
        InputError: If there are too few different vectors, or an option is not understood.
        ShapeError: If the features are no matrix.
        NonFiniteError: If one of them is NaN or infinite.
        MissingDependencyError: If scikit-learn is not installed.

    References:
        Cuturi, Doucet (2014); the barycentres of Liu et al., "Dataset distillation via the Wasserstein
        metric" (2025).

    Example:
        >>> import torch
        >>> from ntkops.distill.barycenter import wasserstein_barycenter
        >>> line = torch.tensor([[0.0], [1.0], [2.0], [10.0]])
        >>> found = wasserstein_barycenter(
        ...     line, 2, generator=torch.Generator().manual_seed(0)
        ... )
        >>> sorted(zip(found.points.flatten().tolist(), found.weights.tolist()))
        [(1.0, 0.75), (10.0, 0.25)]
        >>> found = wasserstein_barycenter(
        ...     line, 2, weights="uniform", generator=torch.Generator().manual_seed(0)
        ... )
        >>> sorted(found.points.flatten().tolist()), found.cost
        ([0.5, 6.0], 8.125)
    """
    generator, seed = resolve_generator(generator)
    vectors = _checked(features, num_points, weights)
    centre = vectors.mean(0)  # distances are those of centred vectors, without the rounding of a large mean
    scale = np.abs(vectors - centre).max() or 1.0
    shifted = (vectors - centre) / scale
    points = _kmeans(shifted, num_points, int(torch.randint(0, 2**31 - 1, (1,), generator=generator)))
    points, shares, cost = (_free if weights == "free" else _uniform)(shifted, points)
    return Barycenter(
        torch.from_numpy(points * scale + centre), torch.from_numpy(shares), float(cost * scale**2), seed
    )


def _checked(features: Tensor, num_points: int, weights: str) -> Any:
    if weights not in ("free", "uniform"):
        raise InputError(f"weights={weights!r}: choose 'free' or 'uniform'")
    if features.dim() != 2:
        raise ShapeError(f"features need shape (n, d), got {tuple(features.shape)}")
    if not bool(torch.isfinite(features).all()):
        raise NonFiniteError("a feature is NaN or infinite, so that it has no distance to others")
    if isinstance(num_points, bool) or not isinstance(num_points, int) or num_points < 1:
        raise InputError(f"{num_points!r} points; it is a number, at least 1")
    vectors = features.detach().double().cpu().numpy()
    different = len(np.unique(vectors, axis=0))
    if different < num_points:
        raise InputError(
            f"{num_points} points for {different} different vectors of features: ask for fewer points, or "
            "take features that tell the samples apart"
        )
    return vectors


def _kmeans(vectors: Any, num_points: int, seed: int) -> Any:
    try:
        from sklearn.cluster import KMeans
    except ImportError as error:
        raise MissingDependencyError(
            "barycentres are found by scikit-learn, which is not installed: pip install scikit-learn"
        ) from error
    found = KMeans(num_points, n_init=_STARTS, random_state=seed, tol=0).fit(vectors)
    return found.cluster_centers_.astype(np.float64)


def _distances(vectors: Any, points: Any) -> Any:
    """Return squared distances, ``(n, k)``, from differences: nothing cancels."""
    return np.stack([((vectors - point) ** 2).sum(1) for point in points], axis=1)


def _free(vectors: Any, points: Any) -> tuple[Any, Any, float]:
    squares = _distances(vectors, points)
    shares = np.bincount(squares.argmin(1), minlength=len(points)) / len(vectors)
    return points, shares, squares.min(1).mean()


def _uniform(vectors: Any, points: Any) -> tuple[Any, Any, float]:
    before = np.inf
    for _ in range(_ROUNDS):
        squares = _distances(vectors, points)
        owner = _equal_shares(squares)
        cost = squares[np.arange(len(vectors)), owner].mean()
        if cost >= before * (1 - _TOLERANCE):
            break
        before = cost
        points = np.stack([vectors[owner == j].mean(0) for j in range(len(points))])
    shares = np.bincount(owner, minlength=len(points)) / len(vectors)
    return points, shares, cost


def _equal_shares(squares: Any) -> Any:
    """Return for each vector its point, at least cost among all shares of n // k or one more vector."""
    from scipy.optimize import linear_sum_assignment

    count, points = squares.shape
    least, spare = divmod(count, points)
    if spare == 0:
        return linear_sum_assignment(np.repeat(squares, least, axis=1))[1] // least
    # Each point has places that must be filled, and a spare one that a blank row may take.
    places = np.concatenate([np.repeat(squares, least, axis=1), squares], axis=1)
    blank = np.full((points - spare, places.shape[1]), np.inf)
    blank[:, points * least :] = 0.0
    place = linear_sum_assignment(np.concatenate([places, blank]))[1][:count]
    return np.where(place < points * least, place // least, place - points * least)
