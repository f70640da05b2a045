"""Regression: ridges compared, the energy of labels, how often labels lie where predictions say."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from ..arguments import ArrayLike
from ..errors import InputError, OutOfRangeError, ShapeError
from ..results import ErrorTerms, RidgePath
from ._axes import finite_array, legend, new_axes, next_line

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = [
    "plot_calibration",
    "plot_label_energy",
    "plot_ridge_path",
]


def plot_ridge_path(x: RidgePath, ax: Axes | None = None, *, label: str | None = None, **kwargs: Any) -> Axes:
    """Draw the leave-one-out error or the log evidence against the ridge, with a mark at the best.

    Call it again with the same axes to compare kernels. A ridge of 0, and ridges that leave the kernel
    singular, have no place on logarithmic axes: the legend counts them.

    Args:
        x: `RidgePath`, as ``KernelRidge("loo").fit(K, Y).ridge_path_``, or that of "evidence".
        ax: Axes to draw on; None for new ones.
        label: Entry of the legend.
        **kwargs: For `matplotlib.axes.Axes.plot`.

    Returns:
        The axes.

    Raises:
        InputError: If no ridge has a finite, positive error, or a finite evidence.
        MissingDependencyError: If matplotlib is missing.

    Example:
        >>> import torch
        >>> from matplotlib.figure import Figure
        >>> from ntkops.plotting import plot_ridge_path
        >>> from ntkops.results import RidgePath
        >>> path = RidgePath(
        ...     torch.tensor([0.1, 1.0, 10.0]),
        ...     torch.tensor([2.0, 1.0, 3.0]),
        ...     scale=1.0,
        ...     best=1,
        ... )
        >>> ax = plot_ridge_path(path, Figure().subplots())
        >>> ax.get_xscale(), ax.get_yscale()
        ('log', 'log')
    """
    ridges = finite_array(x.ridges, "the ridges") / x.scale
    values = np.asarray(x.values.detach().cpu().double())
    is_error = x.criterion == "loo"
    name = "leave-one-out" if is_error else "evidence"
    shown = np.isfinite(values) & (ridges > 0)
    shown &= (values > 0) | (not is_error)
    if not shown.any():
        raise InputError(f"no ridge has a value of {name} that can be drawn: there is nothing to draw")
    hidden = int((~shown).sum())
    if hidden:
        label = f"{label or name} ({hidden} singular or zero, not shown)"
    # a line in the order of the axis, whatever the order in which ridges were tried
    order = np.argsort(ridges[shown])
    ax = new_axes(ax)
    style = {**next_line(ax), "marker": "o", "markersize": 4, **kwargs}
    ax.plot(ridges[shown][order], values[shown][order], label=label, **style)
    if shown[x.best]:
        best = {"color": style["color"], "marker": "*", "markersize": 14, "linestyle": "", "label": "_best"}
        ax.plot(ridges[x.best], values[x.best], **best)
    ax.set_xscale("log")
    if is_error:
        ax.set_yscale("log")
    ax.set_xlabel("ridge" if x.scale == 1 else "ridge, relative to the mean diagonal")
    ax.set_ylabel("mean squared leave-one-out residual" if is_error else "log marginal likelihood")
    ax.grid(visible=True, which="major", alpha=0.3)
    if label is not None:
        legend(ax)
    return ax


def plot_label_energy(
    x: ErrorTerms, ax: Axes | None = None, *, labels: Sequence[str] | None = None, **kwargs: Any
) -> Axes:
    """Draw how much of each target the leading eigenvectors of the kernel hold.

    A curve that rises fast is a target that the kernel learns first; where it ends below 1, the rest is out
    of reach of the features.

    Args:
        x: `ErrorTerms`, as `ntkops.regression.error_terms` returns them.
        ax: Axes to draw on; None for new ones.
        labels: One entry of the legend for each target; None for their numbers.
        **kwargs: For `matplotlib.axes.Axes.plot`.

    Returns:
        The axes.

    Raises:
        ShapeError: If labels and targets differ in number.
        MissingDependencyError: If matplotlib is missing.
    """
    energy = finite_array(x.label_energy, "the label energy")  # (n, k) or (C, n, 1)
    curves = energy[..., 0] if energy.ndim == 3 else energy.T
    names = [str(c) for c in range(len(curves))] if labels is None else [str(name) for name in labels]
    if len(names) != len(curves):
        raise ShapeError(f"{len(curves)} targets, but {len(names)} labels; give one for each")
    ax = new_axes(ax)
    for curve, name in zip(curves, names, strict=True):
        style = {**next_line(ax), "linewidth": 1.2, **kwargs}
        ax.plot(np.arange(1, len(curve) + 1), curve.cumsum(), label=name, **style)
    ax.set_xscale("log")
    ax.set_ylim(top=1.02)
    ax.set_xlabel("number of leading eigenvectors")
    ax.set_ylabel("share of the target's square that they hold")
    ax.grid(visible=True, which="major", alpha=0.3)
    legend(ax, title="target", ncols=2 if len(curves) > 5 else 1)
    return ax


# -- calibration: how often labels lie where predictions say


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
