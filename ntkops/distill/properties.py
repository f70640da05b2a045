"""Properties (A) and (B) of a partition into clusters, with their bounds and a random baseline."""

from __future__ import annotations

import torch
from torch import Tensor

from ..arguments import checked
from ..errors import InputError
from ..results import Containment, LocalGlobalProperties
from ..vectors import resolve_generator
from ._kernels import Kernels
from ._local_spectra import (
    LocalSpectra,
    dense_mean,
    gap_coverage,
    local_spectra,
    restricted_energy,
    spectrum,
)
from .clusters import Clusters, cluster_mean, random_clusters, read_clusters

__all__ = ["containment", "local_global_properties"]

_DEPENDENT = 1e-8  # of a restricted eigenvector's length: what is left below it is rounding


@checked
def local_global_properties(
    K: Kernels,
    clusters: int | Clusters,
    epsilon: float = 0.05,
    *,
    num_random: int = 0,
    generator: torch.Generator | None = None,
) -> LocalGlobalProperties:
    r"""Measure how clusters of samples and the whole kernel cover each other.

    With the truncation ranks at ε, eigenpairs :math:`\lambda_j, u_j` of K and :math:`\sigma_{hj}, u_{hj}` of
    its blocks :math:`K_h`:

    * (A) is the share of the local variance inside the global eigenvectors restricted to the cluster,
      :math:`\sum_{j \le r_h} \sigma_{hj} |\Pi_h^{glob} u_{hj}|^2 / \sum_{j \le r_h} \sigma_{hj}`.
    * (B) asks how much of :math:`u_j`, :math:`j \le r_g`, the lifted local eigenvectors of all clusters
      leave out: :math:`1 - |\Pi^{loc} u_j|^2`.

    Pooled over clusters neither says anything about a partition. For the projector
    :math:`\Pi_h` onto the restricted vectors, :math:`\sum_h \mathrm{tr} (I - \Pi_h) K_h \le
    \sum_{j > r_g} \lambda_j \le \varepsilon\, \mathrm{tr} K`, so that (A) is at least
    :math:`1 - \varepsilon` with all local eigenvectors and :math:`1 - \varepsilon / (1 - \varepsilon)` with
    the truncated ones. Likewise :math:`\mathrm{tr} (I - \Pi^{loc}) K \le \varepsilon\, \mathrm{tr} K`, so
    that the variance-weighted gap of (B) is at most :math:`\varepsilon / (1 - \varepsilon)`: 5.3 % at
    ε = 5 %, and not the 12 to 15 % that the paper reads off. A single cluster of (A), as the paper writes it,
    can be anything down to 0; the unweighted gap is not bounded either. Compare with random partitions.

    Args:
        K: Kernel ``(n, n)``, such as ``ntk(..., outputs="each")[c]``; of several classes, ``(C, n, n)`` or
            a sequence, the mean is taken.
        clusters: H for a spectral clustering, or ``(n,)`` numbers of clusters.
        epsilon: Share of each trace that truncation may lose, in (0, 1/2).
        num_random: Random partitions into clusters of the same sizes that are measured, too.
        generator: CPU generator of the clustering and the random partitions; None draws a seed.

    Returns:
        `LocalGlobalProperties`. Cost: the dense kernel, its eigendecomposition, and those of its
        blocks for each partition.

    Raises:
        InputError: If epsilon or a number is out of range, or the kernel is not positive semidefinite.
        ShapeError: If kernels and clusters do not fit.
        ZeroKernelError: If the kernel is zero.
        DenseMemoryError: If the kernel refuses to be dense.
        MissingDependencyError: If clusters are to be found and scikit-learn is missing.

    References:
        Distilled NTK paper, section 3.4, corrected.

    Example:
        >>> import torch
        >>> from ntkops.distill import local_global_properties
        >>> F = torch.randn(12, 4, generator=torch.Generator().manual_seed(0)).double()
        >>> found = local_global_properties(F @ F.mT, [0, 1, 2] * 4, 0.05)
        >>> (
        ...     found.pooled_containment >= found.pooled_bound,
        ...     found.weighted_gap <= found.weighted_gap_bound,
        ... )
        (True, True)
    """
    check_epsilon(epsilon)
    if isinstance(num_random, bool) or not isinstance(num_random, int) or num_random < 0:
        raise InputError(f"num_random={num_random!r}: a number of partitions, 0 or more")
    generator, _ = resolve_generator(generator)
    mean = dense_mean(K, "local_global_properties")
    labels = partition(mean, clusters, generator)
    pairs = spectrum(mean)
    drawn = [random_clusters(labels, generator=generator) for _ in range(num_random)]
    return _measure(
        local_spectra(mean, labels, pairs),
        epsilon,
        tuple(_measure(local_spectra(mean, other, pairs), epsilon) for other in drawn),
    )


def check_epsilon(epsilon: float) -> None:
    """Raise where ε is out of range.

    Raises:
        InputError: If it is.
    """
    if isinstance(epsilon, bool) or not isinstance(epsilon, int | float) or not 0 < epsilon < 0.5:
        raise InputError(f"epsilon={epsilon!r}: the share of a trace that may be lost, between 0 and 1/2")


def partition(kernel: Tensor, clusters: int | Clusters, generator: torch.Generator) -> Tensor:
    """Return the numbers of the clusters, found or given."""
    if isinstance(clusters, int):
        return cluster_mean(kernel, clusters, generator)
    return read_clusters(clusters, len(kernel))


def _measure(
    spectra: LocalSpectra, epsilon: float, random: tuple[LocalGlobalProperties, ...] = ()
) -> LocalGlobalProperties:
    rank, local_ranks = spectra.ranks(1 - epsilon)
    inside = [
        _inside(spectra, h, rank) for h in range(len(local_ranks))
    ]  # σ |Π u|² of all local eigenvectors
    kept = torch.stack([part[:r].sum() for part, r in zip(inside, local_ranks, strict=True)])
    held = torch.stack([v[:r].sum() for v, r in zip(spectra.local_values, local_ranks, strict=True)])
    energy, covered = restricted_energy(spectra, rank, local_ranks)
    coverage = gap_coverage(energy, covered, "sum")
    values = spectra.values[:rank]
    return LocalGlobalProperties(
        epsilon=epsilon,
        global_rank=rank,
        local_ranks=local_ranks,
        local_containment=torch.where(held > 0, kept / torch.where(held > 0, held, 1.0), 1.0),
        pooled_containment=float(kept.sum() / held.sum()),
        pooled_bound=1 - epsilon / (1 - epsilon),
        untruncated_containment=float(torch.cat(inside).sum() / torch.cat(spectra.local_values).sum()),
        untruncated_bound=1 - epsilon,
        coverage=coverage,
        weighted_gap=float((values * (1 - coverage)).sum() / values.sum()),
        weighted_gap_bound=epsilon / (1 - epsilon),
        mean_gap=float((1 - coverage).mean()),
        single_gap=float((1 - gap_coverage(energy, covered, "max")).mean()),
        random=random,
    )


def _inside(spectra: LocalSpectra, cluster: int, rank: int) -> Tensor:
    """Return σ_hj |Π_h u_hj|² for all local eigenvectors of a cluster."""
    restricted = spectra.vectors[spectra.indices[cluster], :rank]
    basis, sizes, _ = torch.linalg.svd(restricted, full_matrices=False)
    basis = basis[:, sizes > max(restricted.shape) * torch.finfo(sizes.dtype).eps * sizes[:1]]
    share = (basis.mT @ spectra.local_vectors[cluster]).square().sum(0).clamp(max=1)
    return spectra.local_values[cluster] * share


# which global eigenvectors each cluster uses, and which of them local eigenvectors cover


@checked
def containment(
    K: Kernels,
    clusters: int | Clusters,
    epsilon: float = 0.05,
    *,
    generator: torch.Generator | None = None,
) -> Containment:
    r"""Map the clusters of a kernel onto its leading eigenvectors, as the paper's figure 4 does.

    With the truncation ranks at ε, :math:`r_g` of K and :math:`r_h` of its blocks :math:`K_h`, for each
    cluster:

    * the share of its truncated variance inside the first r global eigenvectors restricted to it, r from 1
      to :math:`r_g` (upper panel);
    * the variance :math:`u_j|_h^\top K_h\, u_j|_h / \mathrm{tr} K_h` along each (middle panel);
    * what it holds of each, :math:`|u_j|_h|^2`, and covers of it, :math:`|P_h u_j|_h|^2` (lower panel).

    Args:
        K: Kernel ``(n, n)``, such as ``ntk(..., outputs="each")[c]``; of several classes, ``(C, n, n)`` or
            a sequence, the mean is taken.
        clusters: H for a spectral clustering, or ``(n,)`` numbers of clusters.
        epsilon: Share of each trace that truncation may lose, in (0, 1/2).
        generator: CPU generator that seeds the clustering; None draws a seed.

    Returns:
        `Containment`. Cost: the dense kernel and eigendecompositions of it and of its blocks.

    Raises:
        InputError: If epsilon or a number is out of range, or the kernel is not positive semidefinite.
        ShapeError: If kernels and clusters do not fit.
        ZeroKernelError: If the kernel is zero.
        DenseMemoryError: If the kernel refuses to be dense.
        MissingDependencyError: If clusters are to be found and scikit-learn is missing.

    References:
        Distilled NTK paper, figures 4 and 8.

    Example:
        >>> import torch
        >>> from ntkops.distill import containment
        >>> found = containment(
        ...     torch.diag(torch.tensor([4.0, 1.0, 3.0, 2.0])), [0, 0, 1, 1]
        ... )
        >>> found.alignment.tolist()
        [[1.0, 0.0, 0.0, 1.0], [0.0, 1.0, 1.0, 0.0]]
    """
    check_epsilon(epsilon)
    generator, _ = resolve_generator(generator)
    kernel = dense_mean(K, "containment")
    labels = partition(kernel, clusters, generator)
    spectra = local_spectra(kernel, labels, spectrum(kernel))
    rank, local_ranks = spectra.ranks(1 - epsilon)
    energy, covered = restricted_energy(spectra, rank, local_ranks)
    return Containment(
        epsilon=epsilon,
        cumulative=torch.stack([_cumulative(spectra, h, r, rank) for h, r in enumerate(local_ranks)]),
        variance=torch.stack([_variance(spectra, h, rank) for h in range(len(local_ranks))]),
        energy=energy,
        covered=covered,
        values=spectra.values[:rank],
        sizes=torch.tensor([len(index) for index in spectra.indices]),
        local_ranks=local_ranks,
    )


def _cumulative(spectra: LocalSpectra, cluster: int, local_rank: int, rank: int) -> Tensor:
    """Return the share of truncated local variance inside the first 1, 2, ..., rank restricted vectors."""
    values, vectors = spectra.local_values[cluster], spectra.local_vectors[cluster][:, :local_rank]
    if not local_rank:
        return spectra.values.new_ones(rank)
    restricted = spectra.vectors[spectra.indices[cluster], :rank]
    basis = torch.zeros_like(restricted)  # nested: a column is zero where its vector adds nothing
    for number in range(rank):
        vector = restricted[:, number]
        for _ in range(2):  # once leaves rounding errors of the size of what was subtracted
            vector = vector - basis[:, :number] @ (basis[:, :number].mT @ vector)
        length = torch.linalg.vector_norm(vector)
        if bool(length > _DEPENDENT * torch.linalg.vector_norm(restricted[:, number])):
            basis[:, number] = vector / length
    weight = values[:local_rank]
    added = (basis.mT @ vectors).square() @ weight / weight.sum()
    return added.cumsum(0).clamp(max=1)


def _variance(spectra: LocalSpectra, cluster: int, rank: int) -> Tensor:
    values, vectors = spectra.local_values[cluster], spectra.local_vectors[cluster]
    if not len(values):
        return spectra.values.new_zeros(rank)
    coefficients = vectors.mT @ spectra.vectors[spectra.indices[cluster], :rank]
    return values @ coefficients.square() / values.sum()
