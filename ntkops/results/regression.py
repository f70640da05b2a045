"""Regressions: what leaving samples out says, where the error comes from, what one step can gain."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from ..errors import UnsupportedOperationError

__all__ = [
    "ErrorTerms",
    "LeaveOneOut",
    "OneStepRegret",
    "ProjectionError",
    "RidgePath",
    "TruncationError",
]


@dataclass(frozen=True, eq=False)
class LeaveOneOut:
    """What each sample would get from all the others.

    Attributes:
        residuals: Labels minus predictions, in the shape of the labels.
        predictions: What the regression without the sample says at it, in the shape of the labels.
        mean_squared_error: Mean squared residual over samples and targets.
    """

    residuals: Tensor
    predictions: Tensor
    mean_squared_error: float


@dataclass(frozen=True, eq=False)
class RidgePath:
    """Ridges that were compared, by leave-one-out or by their evidence.

    Attributes:
        ridges: ``(k,)`` absolute ridges, as they were given, float64; ascending for "evidence".
        values: ``(k,)`` of the criterion, float64. "loo": mean squared leave-one-out residuals over samples
            and targets, infinite where K + ridge is singular. "evidence": log marginal likelihoods.
        scale: Mean diagonal of the kernel, of which relative ridges are multiples; 1 for absolute ones.
        best: Position of the best one: of the smallest error, or of the largest evidence.
        criterion: "loo" or "evidence".
    """

    ridges: Tensor
    values: Tensor
    scale: float
    best: int
    criterion: Literal["loo", "evidence"] = "loo"

    @property
    def errors(self) -> Tensor:
        """``values`` where they are leave-one-out errors.

        Raises:
            UnsupportedOperationError: If they are not.
        """
        if self.criterion != "loo":
            raise UnsupportedOperationError(
                "these ridges were compared by their evidence, which is in .values"
            )
        return self.values


@dataclass(frozen=True, eq=False)
class ErrorTerms:
    """Where the squared error of kernel ridge regression comes from, for each target.

    Attributes:
        approximation: Mean square of what no linear function of the features gives, float64, as all.
        r2: Share of the labels' mean square that they give, 1 - approximation / E[y²].
        bias: Mean square of what the ridge shrinks away.
        variance: Mean square of what ``num_samples`` noisy samples leave undetermined.
        variance_bound: σ² d(λ) / n, which the variance does not exceed.
        effective_dimension: ``(*batch)`` d(λ) = Σ μ / (μ + λ).
        eigenvalues: ``(*batch, n)`` eigenvalues of the kernel, largest first.
        label_energy: ``(*batch, n, k)`` share of each target's square along each eigenvector.
        num_samples: Size of the training sets that the variance is about.
    """

    approximation: Tensor
    r2: Tensor
    bias: Tensor
    variance: Tensor
    variance_bound: Tensor
    effective_dimension: Tensor
    eigenvalues: Tensor
    label_energy: Tensor
    num_samples: int

    @property
    def root_mean_square_bound(self) -> Tensor:
        """Sum of the three roots, which bounds the root mean square error."""
        # Minkowski: the error is a sum of three functions, and its norm at most the sum of theirs
        return self.approximation.sqrt() + self.bias.sqrt() + self.variance.sqrt()


@dataclass(frozen=True, eq=False)
class TruncationError:
    """How far a kernel is from its best approximation of truncation rank.

    Attributes:
        rank: ``(*batch)`` smallest r that holds a share 1 - δ of the trace.
        error: ``(*batch)`` |K - K_r|_F / |K|_F, float64.
        bound: ``(*batch)`` √(δ λ_{r+1} / mean λ), float64.
        delta: δ.
    """

    rank: Tensor
    error: Tensor
    bound: Tensor
    delta: float


@dataclass(frozen=True, eq=False)
class ProjectionError:
    """What projected features change in predictions; the two terms add up to f - f̃.

    Attributes:
        test_kernel: (I), from the cross kernel; ``(M, ...)`` like the predictions, float64, as all.
        inverse: (II), from the inverse.
        test_kernel_bound: Bound on the size of (I).
        inverse_bound: Bound on the size of (II).
        epsilon: Largest error of an inner product relative to the lengths of its two features.
    """

    test_kernel: Tensor
    inverse: Tensor
    test_kernel_bound: Tensor
    inverse_bound: Tensor
    epsilon: float

    @property
    def total(self) -> Tensor:
        """Return f - f̃, exact."""
        return self.test_kernel + self.inverse


@dataclass(frozen=True)
class OneStepRegret:
    """A realised step against the best one in its subspace, mean over tasks.

    Attributes:
        bound: Bound on E[L(θ + Δ) - L(θ + Δ*)]: `model_gap` plus `curvature_term`.
        model_gap: E[M(Δ) - M(Δ*)] = L/2 E|Δ - Δ*|²: what better coefficients would gain in the model.
        curvature_term: L E|Δ*|², half of it for convex losses: what the model leaves open at Δ*.
        realised_model: E[M(Δ)].
        best_model: E[M(Δ*)] = -E|Π g|² / (2 L).
        guaranteed_decrease: E|Π g|² / (2 L), by which the best step lowers the tasks' losses at least.
        residual: E|(I - Π) g|².
    """

    bound: float
    model_gap: float
    curvature_term: float
    realised_model: float
    best_model: float
    guaranteed_decrease: float
    residual: float
