"""Distilled sets: how they were found, and what they keep."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

__all__ = [
    "Barycenter",
    "Containment",
    "DistillationInfo",
    "InducingPoints",
    "LocalGlobalProperties",
    "LocalGlobalTrial",
    "SelectedInputs",
    "SyntheticData",
    "VarianceTransfer",
]


@dataclass(frozen=True, eq=False)
class DistillationInfo:
    """What a method of distillation did.

    Attributes:
        method: Its name; "given" for coefficients that were passed in.
        class_mean: Whether it worked on the mean of the class kernels instead of on each.
        converged: Whether an iteration met its tolerance; True where there is none.
        passes: Passes made.
        seed: Seed of what was drawn; None if nothing was.
        seconds: Wall-clock time.
        details: What only this method has to say, by name.
    """

    method: str
    class_mean: bool = False
    converged: bool = True
    passes: int = 0
    seed: int | None = None
    seconds: float = 0.0
    details: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class SelectedInputs:
    """Samples that stand for all, chosen without a gradient.

    Attributes:
        indices: ``(m,)`` their positions, class by class where there were labels, each class in the order in
            which they were chosen.
        weights: ``(m,)`` float64: the number of samples that each stands for, those that are nearest to it
            among the chosen ones of its class, over their mean N/m. Their mean is 1, as
            `ntkops.KernelRidge.fit` takes them for ``sample_weight``.
        labels: ``(m,)`` their classes; None without.
        cost: Mean squared distance of the samples to those that stand for them: W₂² between the empirical
            measure and the weighted one on the chosen samples, within the classes.
        method: How they were chosen.
        seed: Seed of the draws.
        seconds: Wall-clock time.
    """

    indices: Tensor
    weights: Tensor
    labels: Tensor | None
    cost: float
    method: str
    seed: int
    seconds: float


# -- local-global distillation: how clusters and the whole kernel cover each other, and settings tried


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


# -- samples that were synthesised: from a model's features, or from its kernel


@dataclass(frozen=True, eq=False)
class Barycenter:
    """A measure on few points near a measure on many, in the 2-Wasserstein metric.

    Attributes:
        points: ``(k, d)`` float64.
        weights: ``(k,)`` float64, not negative; they sum to 1.
        cost: W₂² between the two measures: exact for these points and weights.
        seed: Seed of the draws.
    """

    points: Tensor
    weights: Tensor
    cost: float
    seed: int


@dataclass(frozen=True, eq=False)
class SyntheticData:
    """Labelled samples that stand for a data set; class by class, ``points_per_class`` each.

    Attributes:
        inputs: ``(s, *shape)``, as the model takes them.
        targets: ``(s, C)`` logits of the model at them.
        labels: ``(s,)`` int64 class of each.
        weights: ``(s,)`` float64 weight in the barycentre of its class; they sum to 1 over a class.
        transport: ``(C,)`` float64 W₂² between the features of a class and its barycentre.
        losses: ``(iterations + 1,)`` float64, from the start to the last iterate.
        terms: The parts that the losses are weighted sums of, of the same shape, by name.
        iteration: Which iterate this is.
        indices: ``(s,)`` samples at which the synthesis started; None where it started at noise.
        seed: Seed of the draws.
        seconds: Time of this call; that of a run that it continues is not counted.
    """

    inputs: Tensor
    targets: Tensor
    labels: Tensor
    weights: Tensor
    transport: Tensor
    losses: Tensor
    terms: Mapping[str, Tensor] = field(default_factory=dict)
    iteration: int = 0
    indices: Tensor | None = None
    seed: int | None = None
    seconds: float = 0.0

    @property
    def loss(self) -> float:
        """Loss of these samples."""
        return float(self.losses[self.iteration])


@dataclass(frozen=True, eq=False)
class InducingPoints:
    """Inputs that were moved until their gradients span what a kernel needs.

    Attributes:
        inputs: ``(m, *shape)``, as the model takes them.
        targets: ``(m, ...)`` targets of a regression on them; None for the objective "energy".
        objective: "energy" or "regression".
        loss: Their loss on all real samples: for "energy" the share of tr K that they leave out, for
            "regression" the squared error as a share of the squared targets.
        start_loss: That of the points that the descent started from; ``loss`` is never above it.
        losses: ``(iterations + 1,)`` float64 along the way; on batches, those of the batches.
        iteration: Which iterate this is.
        jitter: Largest multiple of the mean diagonal of K_ZZ that was added to it. With it the loss of
            "energy" is an upper bound: what `ntkops.operators.energy_gap` finds is not above.
        ridge: Absolute ridge of the regression; None for "energy".
        indices: Samples at which the descent started; None where these were inputs of their own.
        seed: Seed of the draws.
        seconds: Time of this call; that of a run that it continues is not counted.
    """

    inputs: Tensor
    targets: Tensor | None
    objective: str
    loss: float
    start_loss: float
    losses: Tensor
    iteration: int
    jitter: float
    ridge: float | None = None
    indices: Tensor | None = None
    seed: int | None = None
    seconds: float = 0.0
