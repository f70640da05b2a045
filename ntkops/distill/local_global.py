"""Algorithm 1: gradients distilled from the leading eigenvectors of clusters and from what these miss."""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ..arguments import checked
from ..engines import count_passes
from ..errors import InputError
from ..results import DistillationInfo
from ..vectors import resolve_generator
from ._features import KernelFeatures, narrow_features
from ._kernels import Kernels, read_square
from ._local_spectra import (
    LocalSpectra,
    check_weight,
    dense_mean,
    feature_spectra,
    feature_spectrum,
    gap_coverage,
    local_spectra,
    restricted_energy,
    spectrum,
)
from .clusters import Clusters, check_affinity, cluster_features, cluster_mean, read_clusters
from .distilled import Distilled

__all__ = ["local_global"]

_REDUNDANT = 1e-6  # the paper leaves its ε open


@checked
def local_global(
    K: Kernels,
    Y: Tensor,
    clusters: int | Clusters,
    variance_threshold: float,
    gap_threshold: float,
    *,
    coverage: str = "sum",
    orthogonalize: str = "basis",
    budget: int | None = None,
    order: str = "paper",
    class_weight: str | None = None,
    affinity: str = "cosine",
    generator: torch.Generator | None = None,
) -> Distilled:
    r"""Distil gradients by local-global gradient distillation, the paper's Algorithm 1.

    On the mean kernel over classes :math:`\bar K` of m samples:

    1. Spectral clustering into :math:`I_1, \dots, I_H`, with the cosines of the gradients, clipped at 0, or
       with :math:`\bar K` itself, as the paper prints it (``affinity="kernel"``).
    2. Eigenvectors :math:`u_j` of :math:`\bar K`; :math:`r_g` of them hold the share τ_v of its trace.
    3. Eigenvectors of each block :math:`\bar K[I_h, I_h]`; :math:`r_h` hold τ_v of its trace and span
       :math:`P_h`. A gap is a :math:`j \le r_g` with coverage :math:`c_j < \tau_g`.
    4. and 5. The columns of U: leading eigenvectors of all clusters, zero outside, then those at the gaps.
    6. What adds nothing is dropped.

    Distilled gradients are :math:`U^\top \Phi^c`, targets :math:`U^\top Y`. The defaults repair the published
    algorithm; ``coverage="max", orthogonalize="filter"`` is what its text says:

    * coverage "sum" is :math:`c_j = \sum_h |P_h u_j|_{I_h}|^2 = |\Pi^{loc} u_j|^2`, the definition in
      property (B). "max" is the largest share :math:`|P_h u_j|_{I_h}|^2 / |u_j|_{I_h}|^2` over clusters,
      which a cluster that holds 1 % of :math:`u_j` can set to 1. "last" is the printed listing, in which the
      last cluster overwrites the others, so that the result depends on their order.
    * orthogonalize "basis" returns an orthonormal basis, so that a ridge acts on the gradients' coefficients
      alike. "filter" drops redundant columns by a QR without pivoting and leaves the others as they
      are, and gap vectors are not orthogonal to local ones.

    The number of columns is an outcome of the thresholds. A budget cuts them: order "energy" sorts them by
    eigenvalue first; the order of the paper fills the budget with the first clusters and ruins the fit. For a
    wanted number `search_local_global` compares configurations instead.

    Args:
        K: Kernel ``(m, m)``, one for each class ``(C, m, m)`` (``outputs="each"``), or a sequence of them.
        Y: Targets ``(m, C)``, the network's logits, or ``(m,)``.
        clusters: H from 1 to m, or ``(m,)`` numbers of clusters found otherwise.
        variance_threshold: τ_v in (0, 1].
        gap_threshold: τ_g in [0, 1]; 0 leaves the gaps out.
        coverage: "sum", "max" or "last".
        orthogonalize: "basis" or "filter".
        budget: Largest number of columns; None for all.
        order: "paper" or "energy": the order in which columns meet orthogonalization and budget.
        class_weight: "trace" gives every class the same trace in the mean; None is the plain mean.
        affinity: "cosine" or "kernel", as for `spectral_clusters`.
        generator: CPU generator that seeds the clustering; None draws a seed.

    Returns:
        `Distilled` with U ``(m, s)``. Its ``info.details`` holds ``clusters`` (the number of each
        sample's cluster), ``global_rank``, ``local_ranks``, ``coverage`` (of each of the r_g
        eigenvectors), ``gaps``, ``column_cluster`` (-1 for a gap), ``column_position``, ``column_values``,
        and all options.
        Cost: the dense kernels and eigendecompositions of m x m and of the blocks. Of projected kernels
        whose dense matrix has no room the features stand in, as for `select`: O(m k²) operations.

    Raises:
        InputError: If an option is out of range, or a kernel is not positive semidefinite.
        ShapeError: If kernels, targets or clusters do not fit.
        ZeroKernelError: If the kernel is zero, or a sample has no gradient.
        DenseMemoryError: If a kernel refuses to be dense.
        MissingDependencyError: If clusters are to be found and scikit-learn is missing.

    References:
        Distilled NTK paper, section 4.3 and Algorithm 1, corrected.

    Example:
        >>> import torch
        >>> from ntkops.distill import local_global
        >>> F = torch.randn(12, 5, generator=torch.Generator().manual_seed(0)).double()
        >>> found = local_global(
        ...     F @ F.mT, torch.eye(12).double(), [0, 1, 2] * 4, 0.5, 0.9
        ... )
        >>> (
        ...     found.info.details["local_ranks"],
        ...     found.info.details["gaps"],
        ...     tuple(found.U.shape),
        ... )
        ((2, 2, 1), (0, 1), (12, 7))
    """
    check_thresholds(variance_threshold, gap_threshold)
    check_affinity(affinity)
    check_weight(class_weight)
    if budget is not None and (isinstance(budget, bool) or not isinstance(budget, int) or budget < 1):
        raise InputError(f"budget={budget!r}: a positive number of columns, or None")
    start = time.perf_counter()
    kernel = read_square(K)
    seed: int | None
    generator, seed = resolve_generator(generator)
    with count_passes() as counter:
        known = narrow_features(kernel, class_weight, generator)
        mean = ClassMean.of(kernel, known, class_weight, affinity)
    if isinstance(clusters, int):
        labels = mean.clustered(clusters, generator)
    else:
        labels = read_clusters(clusters, len(mean.matrix))
        seed = seed if known is not None and known.second else None
    spectra = mean.spectra(labels)
    stages = run_stages(spectra, variance_threshold, gap_threshold, coverage)
    columns = cut(reduce_columns(stages.columns, orthogonalize, order), budget)
    details = {
        **stages.describe(labels, columns),
        "variance_threshold": variance_threshold,
        "gap_threshold": gap_threshold,
        "coverage_rule": coverage,
        "orthogonalize": orthogonalize,
        "order": order,
        "budget": budget,
        "class_weight": class_weight,
        **mean.describe(),
    }
    info = DistillationInfo(
        method="local_global",
        class_mean=kernel.dim() == 3,
        passes=counter.total,
        seed=seed,
        seconds=time.perf_counter() - start,
        details=details,
    )
    return Distilled.of(kernel, columns.matrix.to(kernel.dtype), Y, info=info)


@dataclass(frozen=True, eq=False)
class ClassMean:
    """What steps 1 to 3 see of the kernels: their mean, or its features where it has no room.

    Attributes:
        matrix: The mean ``(m, m)``, or features ``(m, k)``, float64.
        known: The features, or None.
        affinity: Of the clustering.
    """

    matrix: Tensor
    known: KernelFeatures | None
    affinity: str

    @classmethod
    def of(
        cls, kernel: Kernels, known: KernelFeatures | None, class_weight: str | None, affinity: str
    ) -> ClassMean:
        """Make the mean of kernels that have no features to stand in for it."""
        found = dense_mean(kernel, "local_global", class_weight) if known is None else known.rows
        return cls(found, known, affinity)

    def clustered(self, number: int, generator: torch.Generator) -> Tensor:
        """Return step 1, ``(m,)`` numbers of clusters."""
        find = cluster_mean if self.known is None else cluster_features
        return find(self.matrix, number, generator, self.affinity)

    @cached_property
    def pairs(self) -> tuple[Tensor, Tensor]:
        """Eigenpairs of the mean."""
        return spectrum(self.matrix) if self.known is None else feature_spectrum(self.matrix)

    def spectra(self, labels: Tensor) -> LocalSpectra:
        """Return the eigenpairs of steps 2 and 3."""
        find = local_spectra if self.known is None else feature_spectra
        return find(self.matrix, labels, self.pairs)

    def describe(self) -> dict[str, Any]:
        """Return what a user reads of it."""
        found: dict[str, Any] = {"affinity": self.affinity}
        if self.known is not None:
            found |= {"features": self.matrix.shape[1], "second_projection": self.known.second}
        return found


# the columns that are collected: their order, and which of them add a direction


@dataclass(frozen=True, eq=False)
class Columns:
    """Unit coefficient vectors and where they come from.

    Attributes:
        matrix: ``(m, s)``.
        values: ``(s,)`` the eigenvalue of each.
        cluster: ``(s,)`` the number of its cluster; -1 for a gap vector of the whole kernel.
        position: ``(s,)`` its place among the eigenvectors of that cluster, or of the whole kernel, from 0.
    """

    matrix: Tensor
    values: Tensor
    cluster: Tensor
    position: Tensor

    def __len__(self) -> int:
        return self.matrix.shape[1]

    def __getitem__(self, chosen: Tensor | slice) -> Columns:
        if isinstance(chosen, Tensor):
            chosen = chosen.cpu()  # where origins are, whatever the device of the matrix
        parts = (self.values[chosen], self.cluster[chosen], self.position[chosen])
        return Columns(self.matrix[:, chosen], *parts)


def collect(spectra: LocalSpectra, local_ranks: tuple[int, ...], gaps: Tensor) -> Columns:
    """Return the leading eigenvectors of all clusters, lifted, then the gap vectors: the paper's order."""
    blocks = [spectra.lifted(h, rank) for h, rank in enumerate(local_ranks)] + [spectra.vectors[:, gaps]]
    values = [v[:rank] for v, rank in zip(spectra.local_values, local_ranks, strict=True)]
    origin = [torch.full((rank,), h) for h, rank in enumerate(local_ranks)]
    return Columns(
        matrix=torch.cat(blocks, dim=1),
        values=torch.cat([*values, spectra.values[gaps]]),
        cluster=torch.cat([*origin, torch.full((len(gaps),), -1)]),
        position=torch.cat([*(torch.arange(rank) for rank in local_ranks), gaps.cpu()]),
    )


def sorted_columns(columns: Columns, order: str) -> Columns:
    """Return the columns in the paper's order, or by eigenvalue, largest first.

    Raises:
        InputError: If the order is unknown.
    """
    if order == "paper":
        return columns
    if order != "energy":
        raise InputError(f"order={order!r}: choose 'paper' or 'energy'")
    return columns[torch.argsort(columns.values, descending=True, stable=True)]


def distinct(columns: Columns) -> Columns:
    """Return what the paper's filter keeps: columns with |R_ii| > ε max |R_jj| in one QR without pivoting.

    They stay as they were, not orthonormal. Two faults of the filter stay, too: columns after the m-th have
    no R_ii and are dropped, and a column that depends on earlier ones adds an arbitrary direction to Q, by
    which later ones may be dropped that add to the span. `orthonormal` has neither.

    Returns:
        The columns that are kept, in their order.
    """
    pivots = torch.linalg.qr(columns.matrix).R.diagonal().abs()
    return columns[(pivots > _REDUNDANT * pivots.max()).nonzero().squeeze(-1).cpu()]


def orthonormal(columns: Columns) -> Columns:
    """Replace the columns by an orthonormal basis of their span, each by what it adds to those before it."""
    matrix = columns.matrix
    basis = matrix.new_empty(matrix.shape[0], min(matrix.shape))
    kept: list[int] = []
    for number in range(len(columns)):
        if len(kept) == matrix.shape[0]:
            break
        done = basis[:, : len(kept)]
        vector = matrix[:, number]
        for _ in range(2):  # once leaves rounding errors of the size of what was subtracted
            vector = vector - done @ (done.mT @ vector)
        length = torch.linalg.vector_norm(vector)
        if bool(length > _REDUNDANT):
            basis[:, len(kept)] = vector / length
            kept.append(number)
    found = columns[torch.tensor(kept, dtype=torch.int64)]
    return Columns(basis[:, : len(kept)].contiguous(), found.values, found.cluster, found.position)


def cut(columns: Columns, budget: int | None) -> Columns:
    """Return the first columns, or all."""
    return columns if budget is None else columns[: min(budget, len(columns))]


# the stages


@dataclass(frozen=True, eq=False)
class Stages:
    """What steps 2 to 5 found: ranks, coverage, gaps, and the columns in the paper's order."""

    global_rank: int
    local_ranks: tuple[int, ...]
    coverage: Tensor
    gaps: Tensor
    columns: Columns

    def describe(self, labels: Tensor, kept: Columns) -> dict[str, Any]:
        """Return what a user reads of it."""
        return {
            "clusters": labels,
            "global_rank": self.global_rank,
            "local_ranks": self.local_ranks,
            "coverage": self.coverage,
            "gaps": tuple(self.gaps.tolist()),
            "column_cluster": kept.cluster,
            "column_position": kept.position,
            "column_values": kept.values,
        }


def run_stages(spectra: LocalSpectra, variance_threshold: float, gap_threshold: float, rule: str) -> Stages:
    """Return ranks, gaps and columns for one pair of thresholds."""
    rank, local_ranks = spectra.ranks(variance_threshold)
    found = gap_coverage(*restricted_energy(spectra, rank, local_ranks), rule)
    gaps = (found < gap_threshold).nonzero().squeeze(-1)
    return Stages(rank, local_ranks, found, gaps, collect(spectra, local_ranks, gaps))


def reduce_columns(columns: Columns, orthogonalize: str, order: str) -> Columns:
    """Return step 6: redundant columns dropped, by an orthonormal basis or by the paper's filter.

    Raises:
        InputError: If a way is unknown.
    """
    columns = sorted_columns(columns, order)
    if orthogonalize == "basis":
        return orthonormal(columns)
    if orthogonalize == "filter":
        return distinct(columns)
    raise InputError(f"orthogonalize={orthogonalize!r}: choose 'basis' or 'filter'")


def check_thresholds(variance_threshold: float, gap_threshold: float) -> None:
    """Raise where a threshold is no share.

    Raises:
        InputError: Naming it.
    """
    for name, value, lowest in (
        ("variance_threshold", variance_threshold, "above 0"),
        ("gap_threshold", gap_threshold, "from 0"),
    ):
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not (number and 0 <= value <= 1) or (lowest == "above 0" and value == 0):
            raise InputError(f"{name}={value!r}: a share, {lowest} to 1")
