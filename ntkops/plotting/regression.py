"""Ridges compared, and where the energy of labels lies."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import InputError, ShapeError
from ..results import ErrorTerms, RidgePath
from ._axes import finite_array, legend, new_axes, next_line

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["plot_label_energy", "plot_ridge_path"]


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
