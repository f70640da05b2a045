"""Calibration: how often labels lie where predictions say."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from ..arguments import ArrayLike
from ..errors import InputError, OutOfRangeError, ShapeError
from ._axes import finite_array, legend, new_axes, next_line

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["plot_calibration"]

_LEVELS = np.linspace(0.02, 0.98, 49)


def plot_calibration(
    y: ArrayLike,
    mean: ArrayLike,
    std: ArrayLike | None = None,
    ax: Axes | None = None,
    *,
    bins: int = 10,
    label: str | None = None,
    **kwargs: Any,
) -> Axes:
    """Draw how often labels lie where predictions say, beside the diagonal of those that are right.

    With deviations: the share of labels inside the central interval of a normal distribution, against the
    probability of that interval. Below the diagonal intervals are too narrow. Without: of class
    probabilities, the accuracy against the confidence, in bins of equally many samples, each with the
    standard error of its accuracy. Below the diagonal the network is too sure. Call it again with the same
    axes to compare.

    Args:
        y: Labels: ``(N, ...)`` numbers with deviations, ``(N,)`` class numbers without.
        mean: Predictions in the shape of the numbers; or ``(N, C)`` probabilities.
        std: Deviations of labels from predictions, in their shape: those of the noise are part of them,
            ``(std**2 + fit.noise_scale_**2).sqrt()``. None for probabilities.
        ax: Axes to draw on; None for new ones.
        bins: Number of bins of class probabilities, at most one for every sample.
        label: Entry of the legend; its mean distance from the diagonal is added.
        **kwargs: For `matplotlib.axes.Axes.plot`.

    Returns:
        The axes.

    Raises:
        ShapeError: If labels and predictions do not fit.
        InputError: If a deviation is not positive, or probabilities are none.
        OutOfRangeError: If a class does not exist.
        NonFiniteError: If a number is not finite.
        MissingDependencyError: If matplotlib is missing.

    Example:
        >>> import torch
        >>> from matplotlib.figure import Figure
        >>> from ntkops.plotting import plot_calibration
        >>> y = torch.randn(500, generator=torch.Generator().manual_seed(0))
        >>> ax = plot_calibration(
        ...     y, torch.zeros(500), torch.ones(500), Figure().subplots(), label="right"
        ... )
        >>> ax = plot_calibration(
        ...     y, torch.zeros(500), 0.5 * torch.ones(500), ax, label="too narrow"
        ... )
        >>> [text.get_text() for text in ax.get_legend().get_texts()]
        ['right (0.01 off)', 'too narrow (0.21 off)']
    """
    labels, predictions = finite_array(y, "the labels"), finite_array(mean, "the predictions")
    if std is not None:
        expected, found, errors = _LEVELS, _coverage(labels, predictions, std), None
        off = float(np.abs(found - expected).mean())
        names = ("probability of the central interval", "share of labels inside")
    else:
        expected, found, errors, counts = _reliability(labels, predictions, bins)
        off = float((np.abs(found - expected) * counts).sum() / counts.sum())
        names = ("confidence", "accuracy")
    ax = new_axes(ax)
    style = next_line(ax)
    if not ax.get_lines():
        ax.plot([0, 1], [0, 1], color="0.6", linewidth=1, linestyle=":", label="_ideal")
    style |= {"marker": None if errors is None else "o", "markersize": 4, **kwargs}
    shown = None if label is None else f"{label} ({off:.2f} off)"
    (line,) = ax.plot(expected, found, label=shown, **style)
    if errors is not None:
        ax.errorbar(expected, found, errors, color=line.get_color(), linestyle="", capsize=2, label="_errors")
    ax.set_xlabel(names[0])
    ax.set_ylabel(names[1])
    ax.set_xlim(0, 1)
    ax.set_ylim(0, 1)
    ax.grid(visible=True, which="major", alpha=0.3)
    if label is not None:
        legend(ax)
    return ax


def _coverage(labels: np.ndarray, mean: np.ndarray, std: Tensor | Any) -> np.ndarray:
    """Return the share of labels in each central interval."""
    deviations = finite_array(std, "the deviations")
    if not labels.size or labels.shape != mean.shape or labels.shape != deviations.shape:
        raise ShapeError(
            f"labels {labels.shape}, predictions {mean.shape} and deviations {deviations.shape} need one "
            "shape, with entries"
        )
    if not (deviations > 0).all():
        raise InputError(
            f"a deviation is {deviations.min():.3g}: pass those of labels, which the noise is part of, "
            "(std**2 + fit.noise_scale_**2).sqrt()"
        )
    sizes = np.abs(labels - mean) / deviations
    # A label lies inside the interval of probability erf(z / √2) for its own z and above.
    reached = np.sort(np.vectorize(math.erf)(sizes / math.sqrt(2)).flatten())
    return np.searchsorted(reached, _LEVELS, side="right") / reached.size


def _reliability(
    labels: np.ndarray, probabilities: np.ndarray, bins: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Return confidence, accuracy, its standard error and the number of samples of each bin."""
    if probabilities.ndim != 2 or labels.shape != probabilities.shape[:1] or not labels.size:
        raise ShapeError(
            f"class numbers {labels.shape} beside probabilities {probabilities.shape}: (N,) and (N, C) are "
            "needed; numbers need deviations, std="
        )
    if (probabilities < 0).any() or (np.abs(probabilities.sum(-1) - 1) > 1e-4).any():
        raise InputError("probabilities are not negative and sum to 1: pass logits.softmax(-1)")
    if (labels != np.round(labels)).any() or (labels < 0).any() or (labels >= probabilities.shape[1]).any():
        raise OutOfRangeError(f"class numbers go from 0 to {probabilities.shape[1] - 1}")
    if bins < 1:
        raise InputError(f"bins={bins}: pass a positive number")
    confidence, right = probabilities.max(-1), probabilities.argmax(-1) == labels
    parts = np.array_split(np.argsort(confidence, kind="stable"), min(bins, labels.size))
    counts = np.array([len(part) for part in parts])
    expected, found = (np.array([one[part].mean() for part in parts]) for one in (confidence, right))
    # With one more right and one more wrong, so that a bin of right ones alone is not taken for certain.
    smooth = (found * counts + 1) / (counts + 2)
    return expected, found, np.sqrt(smooth * (1 - smooth) / counts), counts
