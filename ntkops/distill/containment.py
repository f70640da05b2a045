"""Which global eigenvectors each cluster uses, and which of them local eigenvectors cover."""

from __future__ import annotations

import torch
from torch import Tensor

from ..arguments import checked
from ..results import Containment
from ..vectors import resolve_generator
from ._kernels import Kernels
from ._local_spectra import LocalSpectra, dense_mean, local_spectra, restricted_energy, spectrum
from .clusters import Clusters
from .properties import check_epsilon, partition

__all__ = ["containment"]

_DEPENDENT = 1e-8  # of a restricted eigenvector's length: what is left below it is rounding


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
