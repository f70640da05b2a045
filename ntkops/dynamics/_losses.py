"""Losses of outputs: values, gradients, and whether they are convex where training went."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from ..errors import InputError

__all__ = ["CrossEntropy", "Loss", "PerSample", "SquaredError", "read_loss"]

_CONCAVE = 1e-6  # share of the largest curvature, below which a negative one is rounding


class Loss(Protocol):
    """The mean over samples of a loss of their outputs."""

    def value(self, outputs: Tensor) -> Tensor:
        """Return the loss of ``(N, ...)`` outputs."""

    def gradient(self, outputs: Tensor) -> Tensor:
        """Return its gradient, ``(N, ...)``."""

    def curvature(self, outputs: Tensor) -> tuple[float, float]:
        """Return the least and the largest curvature that is known of."""


class SquaredError:
    """The mean of (f - Y)² over samples and outputs, as torch has it.

    Args:
        targets: ``(N, ...)``.
    """

    def __init__(self, targets: Tensor) -> None:
        self._targets = targets

    def value(self, outputs: Tensor) -> Tensor:
        return (outputs - self._targets).square().mean()

    def gradient(self, outputs: Tensor) -> Tensor:
        return 2 / self._targets.numel() * (outputs - self._targets)

    def curvature(self, outputs: Tensor) -> tuple[float, float]:
        return 2 / self._targets.numel(), 2 / self._targets.numel()


class CrossEntropy:
    """The mean over samples of -Σ y log softmax(f).

    Args:
        targets: ``(N, C)`` probabilities.
    """

    def __init__(self, targets: Tensor) -> None:
        self._targets = targets

    def value(self, outputs: Tensor) -> Tensor:
        return -(self._targets * outputs.log_softmax(-1)).sum(-1).mean()

    def gradient(self, outputs: Tensor) -> Tensor:
        shares = outputs.softmax(-1) * self._targets.sum(-1, keepdim=True)
        return (shares - self._targets) / (len(outputs) * max(outputs[0, ..., 0].numel(), 1))

    def curvature(self, outputs: Tensor) -> tuple[float, float]:
        # diag(p) - p pᵀ lies between 0 and 1/2 (Böhning 1992).
        return 0.0, 0.5 / len(outputs)


class PerSample:
    """The mean over samples of a function of one sample's outputs and targets.

    Args:
        function: ``(outputs, targets) -> ()``, of tensors without a sample axis, made of torch operations.
        targets: ``(N, ...)``.

    Raises:
        InputError: If it is not that.
    """

    def __init__(self, function: Callable[[Tensor, Tensor], Tensor], targets: Tensor) -> None:
        self._targets = targets
        self._values = torch.func.vmap(function)
        self._gradients = torch.func.vmap(torch.func.grad(function))
        self._hessians = torch.func.vmap(torch.func.hessian(function), chunk_size=256)
        try:
            shape = tuple(torch.as_tensor(function(targets[0], targets[0])).shape)
            found = self._gradients(targets[:1], targets[:1]) if shape == () else None
        except Exception as error:
            raise InputError(
                f"the loss {function!r} fails on the outputs and targets of one sample, both of shape "
                f"{tuple(targets.shape[1:])}: {error}"
            ) from error
        if shape != () or not isinstance(found, Tensor):
            raise InputError(f"the loss of one sample has to be a single number, this one has shape {shape}")

    def value(self, outputs: Tensor) -> Tensor:
        return self._values(outputs, self._targets).mean()

    def gradient(self, outputs: Tensor) -> Tensor:
        return self._gradients(outputs, self._targets) / len(outputs)

    def curvature(self, outputs: Tensor) -> tuple[float, float]:
        hessians = self._hessians(outputs, self._targets)
        size = self._targets[0].numel()
        values = torch.linalg.eigvalsh(hessians.reshape(len(outputs), size, size)) / len(outputs)
        return float(values.min()), float(values.max())


def read_loss(loss: Any) -> str:
    """Return the kind of a loss: "mse", "cross_entropy" or "callable".

    Raises:
        InputError: If it is none of these.
    """
    if callable(loss):
        return "callable"
    if loss not in ("mse", "cross_entropy"):
        raise InputError(
            f"loss={loss!r}: 'mse', 'cross_entropy', or a function (outputs, targets) -> number of one sample"
        )
    return str(loss)


def is_convex(least: float, largest: float) -> bool:
    """Whether a negative curvature is no more than rounding."""
    return least >= -_CONCAVE * max(abs(largest), abs(least))
