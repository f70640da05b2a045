"""How good a kernel's picture of a network is, and how hard its systems are to solve."""

from __future__ import annotations

import torch
from linear_operator.operators import LinearOperator
from torch import Tensor

from ..errors import InputError, NonFiniteError, ShapeError
from ._operands import read_kernel, to_float64

__all__ = [
    "accuracy",
    "condition_number",
    "fidelity",
    "mean_squared_error",
    "r2_score",
    "smallest_eigenvalue",
]


def _numbers(values: Tensor, what: str) -> Tensor:
    plain = torch.as_tensor(values).detach()
    if not plain.numel():
        raise ShapeError(f"{what} are empty")
    if plain.dtype.is_floating_point and not bool(torch.isfinite(plain).all()):
        raise NonFiniteError(f"{what} hold NaN or infinity")
    return plain


def _classes(scores: Tensor, what: str) -> Tensor:
    values = _numbers(scores, what)
    if values.dim() < 2:
        raise ShapeError(f"{what} need one column for each class, (M, C), got {tuple(values.shape)}")
    return values.argmax(-1)


def accuracy(predictions: Tensor, labels: Tensor) -> float:
    """Return the share of samples whose largest prediction is the label's.

    Args:
        predictions: ``(M, C)`` scores.
        labels: ``(M,)`` class numbers from 0, an integer dtype.

    Returns:
        A number from 0 to 1.

    Raises:
        ShapeError: If the shapes do not fit.
        InputError: If labels are no integers.
        NonFiniteError: If a score is NaN or infinite.

    Example:
        >>> import torch
        >>> from ntkops.regression.metrics import accuracy
        >>> accuracy(torch.eye(4), torch.tensor([0, 1, 2, 0]))
        0.75
    """
    truth = _numbers(labels, "the labels")
    if truth.dtype.is_floating_point or truth.dtype == torch.bool:
        raise InputError(
            f"accuracy takes class numbers, got {truth.dtype}: pass labels.argmax(-1), or use fidelity"
        )
    chosen = _classes(predictions, "the predictions")
    if chosen.shape != truth.shape:
        raise ShapeError(f"predictions for {tuple(chosen.shape)} samples, labels for {tuple(truth.shape)}")
    return float((chosen == truth.to(chosen.device)).double().mean())


def fidelity(predictions: Tensor, logits: Tensor) -> float:
    """Return the share of samples on which two predictors name the same class.

    Args:
        predictions: ``(M, C)`` scores.
        logits: ``(M, C)`` outputs of the network.

    Returns:
        A number from 0 to 1.

    Raises:
        ShapeError: If the shapes differ.
        NonFiniteError: If a number is NaN or infinite.

    Example:
        >>> import torch
        >>> from ntkops.regression.metrics import fidelity
        >>> fidelity(torch.eye(4), 3 * torch.eye(4) - 1)
        1.0
    """
    first, second = _classes(predictions, "the predictions"), _classes(logits, "the logits")
    if torch.as_tensor(predictions).shape != torch.as_tensor(logits).shape:
        raise ShapeError(
            f"predictions {tuple(predictions.shape)} and logits {tuple(logits.shape)} differ in shape"
        )
    return float((first == second.to(first.device)).double().mean())


def _pair(predictions: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    first, second = _numbers(predictions, "the predictions"), _numbers(targets, "the targets")
    if first.shape != second.shape:
        raise ShapeError(
            f"predictions {tuple(first.shape)} and targets {tuple(second.shape)} differ in shape"
        )
    return first.double(), second.double().to(first.device)


def mean_squared_error(predictions: Tensor, targets: Tensor) -> float:
    """Return the mean squared difference over samples and outputs.

    Args:
        predictions: ``(M, ...)``.
        targets: ``(M, ...)``, such as the network's logits.

    Returns:
        A number ≥ 0, in float64.

    Raises:
        ShapeError: If the shapes differ.
        NonFiniteError: If a number is NaN or infinite.
    """
    first, second = _pair(predictions, targets)
    return float((first - second).square().mean())


def r2_score(predictions: Tensor, targets: Tensor) -> float:
    """Return the coefficient of determination 1 - Σ(y - f)² / Σ(y - ȳ)², averaged over targets.

    Args:
        predictions: ``(M,)`` or ``(M, ...)``.
        targets: The same shape, at least two samples.

    Returns:
        A number up to 1. A target that is constant counts 1 if it is met exactly, else 0.

    Raises:
        ShapeError: If the shapes differ.
        NonFiniteError: If a number is NaN or infinite.
    """
    first, second = (values.reshape(len(values), -1) for values in _pair(predictions, targets))
    missed = (first - second).square().sum(0)
    total = (second - second.mean(0)).square().sum(0)
    constant = total == 0
    ratio = 1 - missed / torch.where(constant, torch.ones_like(total), total)
    return float(torch.where(constant, (missed == 0).double(), ratio).mean())


def smallest_eigenvalue(K: LinearOperator | Tensor) -> Tensor:
    """Return the smallest eigenvalue of a kernel, exact and unclamped: a negative one is a finding.

    Args:
        K: Square ``(*batch, n, n)``; made dense, within its ``max_dense_bytes``.

    Returns:
        ``(*batch)``, float64.

    Raises:
        ShapeError: If it is not square.
        DenseMemoryError: If the operator refuses to be dense.
        NonFiniteError: If an entry is NaN or infinite.
    """
    return _eigenvalues(K, "smallest_eigenvalue")[..., 0]


def condition_number(K: LinearOperator | Tensor) -> Tensor:
    """Return λ_max / λ_min of a kernel; infinite where the smallest eigenvalue is not positive.

    Args:
        K: Square ``(*batch, n, n)``; made dense, within its ``max_dense_bytes``.

    Returns:
        ``(*batch)``, float64. In a kernel computed in float32 anything beyond 1e7 is rounding.

    Raises:
        ShapeError: If it is not square.
        DenseMemoryError: If the operator refuses to be dense.
        NonFiniteError: If an entry is NaN or infinite.

    Example:
        >>> import torch
        >>> from ntkops.regression.metrics import condition_number
        >>> float(condition_number(torch.diag(torch.tensor([1.0, 4.0]))))
        4.0
    """
    values = _eigenvalues(K, "condition_number")
    low, high = values[..., 0], values[..., -1]
    return torch.where(low > 0, high / torch.where(low > 0, low, torch.ones_like(low)), torch.inf)


def _eigenvalues(K: LinearOperator | Tensor, name: str) -> Tensor:
    kernel = read_kernel(K)
    if kernel.shape[-1] != kernel.shape[-2]:
        raise ShapeError(f"{name} needs a square kernel, this one is {tuple(kernel.shape)}")
    return torch.linalg.eigvalsh(to_float64(kernel, name))
