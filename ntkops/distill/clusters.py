"""Partitions of the samples: by spectral clustering of a kernel, or at random as a baseline."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from ..arguments import checked
from ..errors import InputError, MissingDependencyError, ShapeError, ZeroKernelError
from ..vectors import resolve_generator
from ._features import narrow_features
from ._kernels import Kernels, read_square
from ._local_spectra import check_weight, dense_mean

__all__ = [
    "Clusters",
    "check_affinity",
    "cluster_features",
    "random_clusters",
    "read_clusters",
    "spectral_clusters",
]

Clusters: TypeAlias = Tensor | Sequence[int]


@checked
def spectral_clusters(
    K: Kernels,
    clusters: int,
    *,
    affinity: str = "cosine",
    class_weight: str | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    r"""Partition samples by spectral clustering, with the cosines of their gradients as affinity.

    The affinity "cosine" is :math:`A_{ij} = \mathrm{clip}(K_{ij} / \sqrt{K_{ii} K_{jj}}, 0, 1)`. The "kernel"
    itself, which the paper takes, may have negative entries, and with them vertices of negative degree, which
    are refused. Of projected kernels whose dense matrix has no room the features stand in, as for `select`,
    at O(n k²) operations, and the cosines are shifted, (1 + cos) / 2: to clip them takes all n² of them.

    Args:
        K: Kernel ``(n, n)``, or one for each class, ``(C, n, n)`` or a sequence of C: their mean is taken.
        clusters: H ≥ 1, at most n.
        affinity: "cosine" or "kernel".
        class_weight: "trace" gives every class the same trace first; None is the plain mean.
        generator: CPU generator, of which one number seeds the k-means inside; None draws a seed.

    Returns:
        ``(n,)`` numbers of clusters from 0, int64, none of them empty: there may be fewer than H.
        Cost: the dense kernel and an eigendecomposition.

    Raises:
        InputError: If the number of clusters is out of range, an affinity is unknown, or one of its vertices
            has a degree that is not positive.
        ShapeError: If a kernel is not square.
        ZeroKernelError: If a sample has no gradient, and so no cosine.
        DenseMemoryError: If a kernel refuses to be dense.
        MissingDependencyError: If scikit-learn is missing.

    References:
        Distilled NTK paper, Algorithm 1, step 1.
    """
    check_affinity(affinity)
    check_weight(class_weight)
    generator, _ = resolve_generator(generator)
    known = narrow_features(read_square(K), class_weight, generator)
    if known is not None:
        return cluster_features(known.rows, clusters, generator, affinity)
    return cluster_mean(dense_mean(K, "spectral_clusters", class_weight), clusters, generator, affinity)


def check_affinity(affinity: str) -> None:
    """Raise where an affinity is unknown.

    Raises:
        InputError: If it is.
    """
    if affinity not in ("cosine", "kernel"):
        raise InputError(f"affinity={affinity!r}: choose 'cosine' or 'kernel'")


def cluster_features(rows: Tensor, clusters: int, generator: torch.Generator, affinity: str) -> Tensor:
    """Return the partition for the kernel F Fᵀ of features ``(n, k)``, by O(n k²) operations.

    Raises:
        InputError: If the number of clusters is out of range, or a degree is not positive.
        ZeroKernelError: If a row is zero.
        MissingDependencyError: If scikit-learn is missing.
    """
    lengths = torch.linalg.vector_norm(rows, dim=-1)
    seed = _checked_seed(lengths, clusters, generator)
    if clusters in (1, len(rows)):
        return _trivial(clusters, len(rows))
    if affinity == "cosine":  # (1 + cos) / 2 is a kernel of one more feature, and what is clipped is not
        rows = torch.cat([rows / lengths.unsqueeze(-1), torch.ones_like(rows[:, :1])], dim=-1) / 2**0.5
    scale = _positive(rows @ rows.sum(0)).rsqrt().unsqueeze(-1)
    # Leading eigenvectors of D^-1/2 A D^-1/2, each entry over the root of its degree: as in scikit-learn.
    scaled = scale * rows
    _, vectors = torch.linalg.eigh(scaled.mT @ scaled)
    leading = scaled @ vectors[:, -clusters:]
    leading = scale * leading / torch.linalg.vector_norm(leading, dim=0)
    model = _sklearn("KMeans")(clusters, n_init=10, random_state=seed)
    return _renumbered(torch.as_tensor(model.fit_predict(leading.cpu().numpy())).long())


def cluster_mean(
    kernel: Tensor, clusters: int, generator: torch.Generator, affinity: str = "cosine"
) -> Tensor:
    """Return the partition for one dense kernel.

    Raises:
        InputError: If the number of clusters is out of range, or a degree is not positive.
        ZeroKernelError: If a diagonal entry is not positive.
        MissingDependencyError: If scikit-learn is missing.
    """
    diagonal, size = kernel.diagonal(), len(kernel)
    seed = _checked_seed(diagonal, clusters, generator)
    if clusters in (1, size):
        return _trivial(clusters, size)
    if affinity == "cosine":
        scale = diagonal.rsqrt()
        kernel = (scale[:, None] * kernel).mul_(scale).clamp_(0, 1)
    else:
        _positive(kernel.sum(-1))
    model = _sklearn("SpectralClustering")(clusters, affinity="precomputed", random_state=seed)
    with warnings.catch_warnings():
        # Blocks without any affinity between them are clusters, and found as such.
        warnings.filterwarnings("ignore", message="Graph is not fully connected")
        return _renumbered(torch.as_tensor(model.fit_predict(kernel.cpu().numpy())).long())


def _checked_seed(diagonal: Tensor, clusters: int, generator: torch.Generator) -> int:
    """Return the seed of the k-means inside, once the number of clusters and the diagonal are checked."""
    size = len(diagonal)
    if isinstance(clusters, bool) or not isinstance(clusters, int) or not 1 <= clusters <= size:
        raise InputError(f"clusters={clusters!r}: an integer from 1 to the {size} samples")
    if not bool((diagonal > 0).all()):
        row = int((diagonal <= 0).nonzero()[0])
        raise ZeroKernelError(f"sample {row} has no gradient (K[{row}, {row}] is not positive): drop it")
    return int(torch.randint(2**31 - 1, (), generator=generator))


def _trivial(clusters: int, size: int) -> Tensor:
    """Return the only partition into one cluster, or into as many as there are samples."""
    return torch.zeros(size, dtype=torch.int64) if clusters == 1 else torch.arange(size)


def _positive(degrees: Tensor) -> Tensor:
    """Return degrees that are all positive.

    Raises:
        InputError: If one is not.
    """
    if not bool((degrees > 0).all()):
        row = int((degrees <= 0).nonzero()[0])
        raise InputError(
            f"sample {row} has a degree of {float(degrees[row]):.3g}: its affinities to others are more "
            "negative than positive; take affinity='cosine', or pass the number of each sample's cluster"
        )
    return degrees


def _sklearn(name: str) -> Any:
    try:
        import sklearn.cluster
    except ImportError as error:
        raise MissingDependencyError(
            "spectral clustering needs scikit-learn, which is not installed: pip install scikit-learn; or "
            "pass the number of each sample's cluster"
        ) from error
    return getattr(sklearn.cluster, name)


@checked
def random_clusters(clusters: Clusters, *, generator: torch.Generator | None = None) -> Tensor:
    """Return a random partition into clusters of the same sizes: what any clustering must be compared with.

    Args:
        clusters: ``(n,)`` numbers of clusters.
        generator: CPU generator; None draws a seed.

    Returns:
        ``(n,)`` the same numbers in random order, int64.

    Raises:
        InputError: If the numbers are no integers ≥ 0.
        ShapeError: If they are not ``(n,)``.

    Example:
        >>> import torch
        >>> from ntkops.distill import random_clusters
        >>> shuffled = random_clusters(
        ...     [0, 0, 0, 1], generator=torch.Generator().manual_seed(0)
        ... )
        >>> shuffled.bincount().tolist()
        [3, 1]
    """
    numbers = torch.as_tensor(clusters)
    numbers = read_clusters(numbers, len(numbers) if numbers.dim() else 0)
    return numbers[torch.randperm(len(numbers), generator=resolve_generator(generator)[0])]


def read_clusters(clusters: Clusters, size: int) -> Tensor:
    """Return numbers of clusters without gaps, in the order of the given numbers.

    Raises:
        InputError: If they are no integers ≥ 0.
        ShapeError: If there is not one for each sample.
    """
    numbers = torch.as_tensor(clusters).detach().cpu()
    if numbers.dtype.is_floating_point or numbers.dtype == torch.bool:
        raise InputError(f"clusters are given by an integer for each sample, got {numbers.dtype}")
    if numbers.dim() != 1 or len(numbers) != size or not size:
        raise ShapeError(f"{size} samples need clusters of shape ({size},), got {tuple(numbers.shape)}")
    if bool((numbers < 0).any()):
        raise InputError("numbers of clusters are 0 or more")
    return _renumbered(numbers.long())


def _renumbered(numbers: Tensor) -> Tensor:
    return torch.unique(numbers, sorted=True, return_inverse=True)[1]
