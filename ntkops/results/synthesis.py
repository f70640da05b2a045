"""Samples that were synthesised: from a model's features, or from its kernel."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

__all__ = ["Barycenter", "InducingPoints", "SyntheticData"]


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
