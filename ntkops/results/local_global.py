"""Local-global distillation: how clusters and the whole kernel cover each other, and settings tried."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Containment", "LocalGlobalProperties", "LocalGlobalTrial", "VarianceTransfer"]


@dataclass(frozen=True, eq=False)
class LocalGlobalProperties:
    """Properties (A) and (B) of a partition, with what they are on any partition.

    Attributes:
        epsilon: ε, the share of each trace that truncation may lose.
        global_rank: r_g, the truncation rank of the kernel.
        local_ranks: r_h, those of its blocks.
        local_containment: ``(H,)`` (A) for each cluster: the share of its truncated variance inside the
            restricted global eigenvectors, float64, as all. No bound holds for one cluster.
        pooled_containment: The same share over all clusters together.
        pooled_bound: 1 - ε / (1 - ε), which it reaches on every partition.
        untruncated_containment: The share with all local eigenvectors.
        untruncated_bound: 1 - ε, which it reaches on every partition.
        coverage: ``(r_g,)`` (B): |Π_loc u_j|², what the local eigenvectors of all cover of each global one.
        weighted_gap: Share of the variance of the r_g eigenvectors outside that span.
        weighted_gap_bound: ε / (1 - ε), which it does not exceed on any partition.
        mean_gap: Mean of 1 - |Π_loc u_j|², each eigenvector counting alike; nothing bounds it.
        single_gap: Mean of 1 - max_h of the share that one cluster covers of what it holds of u_j.
        random: The same for random partitions into clusters of the same sizes.
    """

    epsilon: float
    global_rank: int
    local_ranks: tuple[int, ...]
    local_containment: Tensor
    pooled_containment: float
    pooled_bound: float
    untruncated_containment: float
    untruncated_bound: float
    coverage: Tensor
    weighted_gap: float
    weighted_gap_bound: float
    mean_gap: float
    single_gap: float
    random: tuple[LocalGlobalProperties, ...] = ()


@dataclass(frozen=True, eq=False)
class Containment:
    """Which global eigenvectors the clusters use, and which of them their own eigenvectors cover.

    Attributes:
        epsilon: ε of all truncation ranks.
        cumulative: ``(H, r_g)`` share of a cluster's truncated variance inside the first r global
            eigenvectors, restricted to it, float64, as all.
        variance: ``(H, r_g)`` u_jᵀ K_h u_j / tr K_h with u_j restricted to the cluster.
        energy: ``(H, r_g)`` |u_j|² on the cluster; columns sum to 1.
        covered: ``(H, r_g)`` what its truncated eigenvectors cover of that.
        values: ``(r_g,)`` global eigenvalues.
        sizes: ``(H,)`` numbers of samples, int64.
        local_ranks: r_h.
    """

    epsilon: float
    cumulative: Tensor
    variance: Tensor
    energy: Tensor
    covered: Tensor
    values: Tensor
    sizes: Tensor
    local_ranks: tuple[int, ...]

    @property
    def alignment(self) -> Tensor:
        """``(H, r_g)`` covered share of what a cluster holds of an eigenvector; 0 where it holds nothing."""
        held = self.energy > 100 * torch.finfo(self.energy.dtype).eps
        return torch.where(held, self.covered / torch.where(held, self.energy, 1.0), 0.0).clamp(max=1)

    @property
    def union(self) -> Tensor:
        """``(r_g,)`` |Π_loc u_j|², what all clusters together cover of each eigenvector."""
        return self.covered.sum(0).clamp(max=1)


@dataclass(frozen=True)
class LocalGlobalTrial:
    """One setting of Algorithm 1, and how well its distilled set fits the samples that it was made of.

    Attributes:
        clusters: H.
        variance_threshold: τ_v.
        gap_threshold: τ_g.
        size: s, the number of distilled gradients.
        num_local: How many of them belong to clusters.
        num_gaps: How many belong to gaps.
        fidelity: Share of the training samples on which the fit and the targets name the same class;
            None for a single target.
        mean_squared_error: Of the fit on the training samples' targets.
    """

    clusters: int
    variance_threshold: float
    gap_threshold: float
    size: int
    num_local: int
    num_gaps: int
    fidelity: float | None
    mean_squared_error: float

    @property
    def key(self) -> tuple[float, float]:
        """What settings are compared by, larger is better: fidelity, then the smaller error."""
        return (0.0 if self.fidelity is None else self.fidelity, -self.mean_squared_error)


@dataclass(frozen=True, eq=False)
class VarianceTransfer:
    """How far posterior variances from a distilled set are from those of all samples.

    Attributes:
        relative: ``(C,)`` or ``()`` mean of |v_s - v| over the mean of v, float64, as all.
        variance: ``(M,)`` or ``(M, C)`` posterior variances from all points.
        distilled: Those from the distilled set, in the same shape.
        ridge: Absolute ridge of both.
    """

    relative: Tensor
    variance: Tensor
    distilled: Tensor
    ridge: float
