"""Partitions of the samples: by spectral clustering of a kernel, or at random as a baseline."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from ..arguments import checked
from ..errors import InputError, MissingDependencyError, ShapeError, ZeroKernelError
from ..vectors import resolve_generator
from ._kernels import Kernels
from ._local_spectra import dense_mean

__all__ = ["Clusters", "random_clusters", "read_clusters", "spectral_clusters"]

Clusters: TypeAlias = Tensor | Sequence[int]


@checked
def spectral_clusters(
    K: Kernels,
    clusters: int,
    *,
    class_weight: str | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    r"""Partition samples by spectral clustering, with the cosines of their gradients as affinity.

    The affinity is :math:`A_{ij} = \mathrm{clip}(K_{ij} / \sqrt{K_{ii} K_{jj}}, 0, 1)`. A kernel
    itself, which the paper takes, may have negative entries, and with them vertices of negative degree.

    Args:
        K: Kernel ``(n, n)``, or one for each class, ``(C, n, n)`` or a sequence of C: their mean is taken.
        clusters: H ≥ 1, at most n.
        class_weight: "trace" gives every class the same trace first; None is the plain mean.
        generator: CPU generator, of which one number seeds the k-means inside; None draws a seed.

    Returns:
        ``(n,)`` numbers of clusters from 0, int64, none of them empty: there may be fewer than H.
        Cost: the dense kernel and an eigendecomposition.

    Raises:
        InputError: If the number of clusters is out of range.
        ShapeError: If a kernel is not square.
        ZeroKernelError: If a sample has no gradient, and so no cosine.
        DenseMemoryError: If a kernel refuses to be dense.
        MissingDependencyError: If scikit-learn is missing.

    References:
        Distilled NTK paper, Algorithm 1, step 1.
    """
    kernel = dense_mean(K, "spectral_clusters", class_weight)
    return cluster_mean(kernel, clusters, resolve_generator(generator)[0])


def cluster_mean(kernel: Tensor, clusters: int, generator: torch.Generator) -> Tensor:
    """Return the partition for one dense kernel.

    Raises:
        InputError: If the number of clusters is out of range.
        ZeroKernelError: If a diagonal entry is not positive.
        MissingDependencyError: If scikit-learn is missing.
    """
    size = len(kernel)
    if isinstance(clusters, bool) or not isinstance(clusters, int) or not 1 <= clusters <= size:
        raise InputError(f"clusters={clusters!r}: an integer from 1 to the {size} samples")
    diagonal = kernel.diagonal()
    if not bool((diagonal > 0).all()):
        row = int((diagonal <= 0).nonzero()[0])
        raise ZeroKernelError(f"sample {row} has no gradient (K[{row}, {row}] is not positive): drop it")
    seed = int(torch.randint(2**31 - 1, (), generator=generator))
    if clusters in (1, size):  # nothing to decide
        return torch.zeros(size, dtype=torch.int64) if clusters == 1 else torch.arange(size)
    try:
        from sklearn.cluster import SpectralClustering
    except ImportError as error:
        raise MissingDependencyError(
            "spectral clustering needs scikit-learn, which is not installed: pip install scikit-learn; or "
            "pass the number of each sample's cluster"
        ) from error
    scale = diagonal.rsqrt()
    affinity = (scale[:, None] * kernel * scale).clamp(0, 1).cpu().numpy()
    model = SpectralClustering(clusters, affinity="precomputed", random_state=seed)
    with warnings.catch_warnings():
        # Blocks without any affinity between them are clusters, and found as such.
        warnings.filterwarnings("ignore", message="Graph is not fully connected")
        return _renumbered(torch.as_tensor(model.fit_predict(affinity)).long())


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
