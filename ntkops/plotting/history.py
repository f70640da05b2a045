"""Quantities along training, a panel each."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import ShapeError
from ..results import History
from ._axes import legend, line_style, logarithmic, marker, new_axes

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["plot_history"]

_LABELS = {
    "trace": r"trace, $\mathrm{tr}\,K$",
    "frobenius_norm": r"norm, $|K|_F$",
    "effective_rank": r"effective rank, $(\mathrm{tr}\,K)^2 / |K|_F^2$",
    "alignment": r"alignment with the first kernel",
    "kernel_distance": r"distance from the first kernel",
    "kernel_velocity": r"distance from the kernel before",
    "target_alignment": r"alignment with the targets",
    "top_eigenvalues": r"largest eigenvalues $\lambda_i$",
    "parameter_distance": r"$|\theta - \theta_0|$",
    "linearization_error": r"$|f - f_\mathrm{lin}| / |f - f_0|$",
}


def plot_history(
    history: History,
    axes: Axes | Sequence[Axes] | None = None,
    *,
    quantities: Sequence[str] | None = None,
    label: str | None = None,
    **kwargs: Any,
) -> list[Axes]:
    """Draw quantities against the step, one panel each, with 95 % intervals as bars.

    Call it again with the same axes to compare runs. A quantity with several numbers at each step has a line
    for each; what is not defined (NaN) is left out. Values that span decades get a logarithmic axis.

    Args:
        history: The table.
        axes: One for each quantity; None for those of a new figure.
        quantities: Which ones; None for all.
        label: Entry of the legend.
        **kwargs: For `matplotlib.axes.Axes.errorbar`.

    Returns:
        The axes, one for each quantity.

    Raises:
        ShapeError: If there is nothing to draw, or not one axes for each quantity.
        InputError: If there is no such quantity.
        MissingDependencyError: If matplotlib is missing.

    Example:
        >>> import torch
        >>> from matplotlib.figure import Figure
        >>> from ntkops.plotting import plot_history
        >>> from ntkops.results import Estimate, History
        >>> history = History.empty(["trace"])
        >>> for step in range(3):
        ...     row = {"trace": Estimate.of_exact(torch.tensor(2.0 + step), passes=1)}
        ...     history = history.appended(step, row)
        >>> (ax,) = plot_history(history, Figure().subplots())
        >>> ax.get_lines()[0].get_ydata().tolist()
        [2.0, 3.0, 4.0]
    """
    names = list(history.quantities if quantities is None else quantities)
    if not names or not len(history):
        raise ShapeError("there is nothing to draw: no quantity, or no checkpoint recorded yet")
    columns = {name: history[name] for name in names}
    panels = _panels(axes, len(names))
    for ax, (name, values) in zip(panels, columns.items(), strict=True):
        lines = values.reshape(len(values), -1).numpy()
        ends = history.intervals[name].reshape(len(values), 2, -1).numpy()
        start = len(ax.containers)  # one for each line of an earlier call
        for number in range(lines.shape[1]):
            shown = label if number == 0 else "_more"
            _draw(ax, history.steps, lines[:, number], ends[:, :, number], start + number, shown, kwargs)
        drawn = lines[np.isfinite(lines)]
        if drawn.size and (drawn > 0).all():
            logarithmic(ax, drawn)
        ax.set_xlabel("step")
        ax.set_ylabel(_LABELS.get(name, name))
        ax.grid(visible=True, which="major", alpha=0.3)
        if ax.get_legend_handles_labels()[1]:
            legend(ax)
    return panels


def _panels(axes: Axes | Sequence[Axes] | None, count: int) -> list[Axes]:
    if axes is None:
        first = new_axes(None)
        figure: Any = first.figure
        first.remove()
        width = min(3, count)
        height = math.ceil(count / width)
        figure.set_size_inches(4.2 * width, 3.2 * height)
        return [figure.add_subplot(height, width, position + 1) for position in range(count)]
    found = list(np.asarray(axes, dtype=object).reshape(-1))
    if len(found) != count:
        raise ShapeError(f"{count} quantities need one axes each, got {len(found)}")
    return found


def _draw(
    ax: Axes,
    steps: Sequence[float],
    values: np.ndarray,
    ends: np.ndarray,
    position: int,
    label: str | None,
    kwargs: dict[str, Any],
) -> None:
    shown = np.isfinite(values)
    style = {**line_style(position), "marker": marker(position), "markersize": 4, "capsize": 2, **kwargs}
    bars = np.abs(ends - values[:, None])[shown].T
    bars = np.where(np.isfinite(bars), bars, 0.0)
    ax.errorbar(
        np.asarray(steps, float)[shown],
        values[shown],
        yerr=bars if bars.any() else None,
        label="_line" if label is None else label,
        **style,
    )
