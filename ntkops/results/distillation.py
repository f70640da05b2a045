"""How a distilled set came about."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

__all__ = ["DistillationInfo", "SelectedInputs"]


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
