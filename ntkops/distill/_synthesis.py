"""The loss of samples that are synthesised to match features and statistics."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from ._survey import Survey
from ._teacher import Teacher

__all__ = ["Augmentation", "Synthesis"]

Augmentation = Callable[[Tensor, torch.Generator], Tensor]


class Synthesis:
    """Cross entropy, distance of the features to their targets, and of the statistics to the real ones.

    Args:
        teacher: The private copy of the model.
        labels: ``(s,)`` classes of the samples.
        points: ``(s, d)`` targets of their features.
        survey: What the real samples show.
        weights: Of features and statistics.
        augmentation: What is done to the samples before each pass, and what it draws from.
    """

    sampled = False

    def __init__(
        self,
        teacher: Teacher,
        labels: Tensor,
        points: Tensor,
        survey: Survey,
        weights: tuple[float, float],
        augmentation: tuple[Augmentation, torch.Generator] | None,
    ) -> None:
        self._teacher, self._labels, self._points = teacher, labels, points
        self._num_classes, self._weights, self._augmentation = survey.num_classes, weights, augmentation
        self._real = [(m.means.to(points), m.variances.to(points)) for m in survey.moments]
        self.terms: tuple[str, ...] = ("cross_entropy", "features", "statistics")

    def evaluate(self, z: Tensor) -> tuple[float, Tensor, tuple[float, ...]]:
        """Return loss, gradient and terms."""
        moving = z.detach().clone().requires_grad_()
        x = moving if self._augmentation is None else self._augmentation[0](moving, self._augmentation[1])
        total, terms = self._loss(x)
        (gradient,) = torch.autograd.grad(total, moving)
        return float(total.detach()), gradient, terms

    def judge(self, z: Tensor) -> float:
        """Return the loss, without augmentation."""
        with torch.no_grad():
            return float(self._loss(z)[0])

    def state(self) -> dict[str, float]:
        """Return nothing: the generator is kept with the run."""
        return {}

    def restore(self, state: Mapping[str, float]) -> None:
        """Take nothing."""

    def _loss(self, x: Tensor) -> tuple[Tensor, tuple[float, ...]]:
        view = self._teacher.look(x, self._labels, self._num_classes)
        entropy = nn.functional.cross_entropy(view.logits, self._labels)
        distance = torch.linalg.vector_norm(view.features - self._points)
        statistics = entropy.new_zeros(())
        for found, (means, variances) in zip(view.moments, self._real, strict=True):
            statistics = statistics + torch.linalg.vector_norm(found.means - means, dim=1).mean()
            statistics = statistics + torch.linalg.vector_norm(found.variances - variances, dim=1).mean()
        total = entropy + self._weights[0] * distance + self._weights[1] * statistics
        return total, (float(entropy.detach()), float(distance.detach()), float(statistics.detach()))
