"""A private copy of a classifier that shows its logits, its features, and what enters its normalisations."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..errors import InputError, OutputError, UnsupportedModelError
from ..model.call import uncompiled
from ..model.capture import inputs_of, outputs_of
from ..model.inspection import require_finite, require_supported

__all__ = ["Moments", "Teacher", "View", "class_moments"]


@dataclass(frozen=True, eq=False)
class Moments:
    """Moments of the inputs of one normalisation, class by class, over samples and positions.

    Attributes:
        counts: ``(C,)`` samples of each class.
        means: ``(C, channels)``.
        variances: ``(C, channels)``, not corrected for their degrees of freedom.
    """

    counts: Tensor
    means: Tensor
    variances: Tensor

    def double(self) -> Moments:
        """Return the moments in float64, without a graph."""
        return Moments(self.counts.double(), self.means.detach().double(), self.variances.detach().double())

    def joined(self, other: Moments) -> Moments:
        """Return the moments of both sets of samples; no large numbers cancel (Chan et al., 1979)."""
        counts = self.counts + other.counts
        share = (other.counts / counts.clamp(min=1)).unsqueeze(-1)
        step = other.means - self.means
        variances = (
            (1 - share) * self.variances + share * other.variances + share * (1 - share) * step.square()
        )
        return replace(self, counts=counts, means=self.means + share * step, variances=variances)


@dataclass(frozen=True, eq=False)
class View:
    """What one forward pass shows.

    Attributes:
        logits: ``(B, C)``.
        features: ``(B, d)``.
        moments: One for each use of a batch normalisation, in the order of the modules.
    """

    logits: Tensor
    features: Tensor
    moments: tuple[Moments, ...]


class Teacher:
    """A private copy of a model in evaluation mode, with constant parameters.

    Args:
        model: The classifier; it stays as it is.
        features: Path of the module whose output is the features, a callable ``(model, x) -> features`` that
            is given the copy, or None for what enters the last linear layer.
        statistics: Whether to look at what enters the batch normalisations.

    Raises:
        InputError: If there is no such module, or no batch normalisation where they are asked for.
        UnsupportedModelError: If the model is no module, or cannot be copied.
    """

    def __init__(
        self, model: nn.Module, features: str | Callable[..., Tensor] | None, statistics: bool
    ) -> None:
        if not isinstance(model, nn.Module):
            raise UnsupportedModelError(
                f"a {type(model).__name__} has no layers whose features could be matched; pass an nn.Module"
            )
        require_supported(model)
        require_finite(dict(model.named_parameters()))
        try:
            self.model = copy.deepcopy(uncompiled(model)).eval().requires_grad_(False)
        except (RuntimeError, TypeError) as error:
            raise UnsupportedModelError(f"the model cannot be copied ({error})") from error
        tensors = [*self.model.parameters(), *self.model.buffers()]
        self.device = tensors[0].device if tensors else torch.device("cpu")
        modules = dict(self.model.named_modules())
        norms = [module for module in modules.values() if isinstance(module, _BatchNorm)]
        if statistics and not norms:
            raise InputError(
                "the model has no batch normalisation whose statistics could be matched: pass "
                "statistics_weight=0"
            )
        self._norms = norms if statistics else []
        self._features = features
        self._tap = None if callable(features) else _tap(modules, features)

    def look(self, x: Tensor, labels: Tensor, num_classes: int | None) -> View:
        """Run the model once.

        Args:
            x: ``(B, ...)``.
            labels: ``(B,)`` classes, by which moments are grouped.
            num_classes: C; None to look at no moments.

        Returns:
            What it shows.

        Raises:
            OutputError: If logits or features are not one row for each sample.
        """
        groups: Any = None if num_classes is None else _membership(labels.to(x.device), num_classes)
        with ExitStack() as stack:
            seen = []
            if groups is not None:
                seen = [
                    stack.enter_context(inputs_of(norm, lambda value: class_moments(value, groups)))
                    for norm in self._norms
                ]
            tapped = None if self._tap is None else stack.enter_context(self._tap())
            logits = self.model(x)
        if not isinstance(logits, Tensor) or logits.dim() != 2 or not logits.is_floating_point():
            shown = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
            raise OutputError(f"the model has to return logits (B, C), got {shown}")
        if tapped is None:
            assert callable(self._features)
            found: Any = self._features(self.model, x)
        else:
            found = tapped[-1] if tapped else None
        if not isinstance(found, Tensor) or found.dim() < 1 or len(found) != len(x):
            raise OutputError(
                f"the features of {len(x)} samples are {_shown(found)}: they have to be one tensor with a "
                "row for each sample"
            )
        moments = tuple(moment for calls in seen for moment in calls)
        return View(logits, found.flatten(1), moments)


def _shown(value: Any) -> str:
    return f"of shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__


def _tap(modules: dict[str, nn.Module], features: str | None) -> Callable[[], Any]:
    """Return a context that collects the features of a forward pass."""
    if features is None:
        linear = [module for module in modules.values() if isinstance(module, nn.Linear)]
        if not linear:
            raise InputError(
                "the model has no linear layer whose input could be the features: name the module whose "
                "output they are, features='block4'"
            )
        return lambda: inputs_of(linear[-1], lambda value: value)
    if features not in modules:
        paths = ", ".join(repr(path) for path in modules if path)
        raise InputError(f"the model has no module {features!r}; it has {paths}")
    module = modules[features]
    return lambda: outputs_of(module, lambda value: value)


def _membership(labels: Tensor, num_classes: int) -> Tensor:
    """Return ``(C, B)``, one where a sample is of a class."""
    return torch.nn.functional.one_hot(labels, num_classes).mT


def class_moments(values: Tensor, members: Tensor) -> Moments:
    """Return the moments of ``(B, channels, ...)`` over the samples and positions of each class.

    Args:
        values: What enters a batch normalisation.
        members: ``(C, B)``, one where a sample is of a class.

    Returns:
        Means and variances ``(C, channels)``; zero for a class without samples. Differentiable.
    """
    rows = values.flatten(2) if values.dim() > 2 else values.unsqueeze(-1)  # (B, channels, positions)
    counts = members.sum(1)
    shares = members.to(rows.dtype) / counts.clamp(min=1).unsqueeze(-1).to(rows.dtype)
    means = shares @ rows.mean(-1)
    away = rows - (members.to(rows.dtype).mT @ means).unsqueeze(-1)
    return Moments(counts, means, shares @ away.square().mean(-1))
