"""Training: quantities along it, a panel each; losses; outputs of one sample with what bounds leave open."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from ..arguments import ArrayLike
from ..errors import ShapeError
from ..results import History
from ._axes import finite_array, legend, line_style, logarithmic, marker, new_axes, next_line

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = [
    "plot_history",
    "plot_losses",
    "plot_outputs",
]

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
    # an endless interval has no bar, and the value is drawn all the same
    bars = np.where(np.isfinite(bars), bars, 0.0)
    ax.errorbar(
        np.asarray(steps, float)[shown],
        values[shown],
        yerr=bars if bars.any() else None,
        label="_line" if label is None else label,
        **style,
    )


# -- trajectories: times may span decades, start at zero and end at infinity


def _over_time(ax: Axes, times: np.ndarray) -> None:
    """Give the time axis a logarithmic scale where times span decades; a start at 0 stays on it."""
    later = times[times > 0]
    if later.size > 1 and later.max() / later.min() > 30:
        ax.set_xscale("symlog", linthresh=float(later.min())) if (times == 0).any() else ax.set_xscale("log")
    ax.set_xlabel("time $t$")
    ax.grid(visible=True, which="major", alpha=0.3)
    if ax.get_legend_handles_labels()[1]:
        legend(ax)


def _finite_times(times: Any) -> tuple[np.ndarray, np.ndarray]:
    """Return finite times and where they stand: t = ∞ has no place on an axis."""
    numbers = np.asarray(times.detach().cpu().double() if isinstance(times, Tensor) else times, float)
    if numbers.ndim != 1 or not np.isfinite(numbers).any():
        raise ShapeError(f"times need shape (T,) with one that is finite, got shape {numbers.shape}")
    return numbers[np.isfinite(numbers)], np.isfinite(numbers)


def plot_losses(
    times: ArrayLike, losses: ArrayLike, ax: Axes | None = None, *, label: str | None = None, **kwargs: Any
) -> Axes:
    """Draw losses along training.

    Call it again with the same axes to compare: training with test samples, a network with its linearisation.
    What belongs to t = ∞ is a dotted line in the colour of the curve.

    Args:
        times: ``(T,)`` times or steps, ``path.times``.
        losses: ``(T,)``, ``path.losses``.
        ax: Axes to draw on; None for new ones.
        label: Entry of the legend.
        **kwargs: For `matplotlib.axes.Axes.plot`.

    Returns:
        The axes.

    Raises:
        ShapeError: If there is not one loss for each time, or no finite time.
        NonFiniteError: If a loss is not finite.
        MissingDependencyError: If matplotlib is missing.

    Example:
        >>> from matplotlib.figure import Figure
        >>> from ntkops.plotting import plot_losses
        >>> ax = plot_losses([0, 1, 10, 100], [1, 0.5, 0.1, 1e-3], Figure().subplots())
        >>> ax.get_xscale(), ax.get_yscale()
        ('symlog', 'log')
    """
    place, finite = _finite_times(times)
    values = finite_array(losses, "the losses")
    if values.shape != finite.shape:
        raise ShapeError(f"{len(finite)} times, but losses of shape {values.shape}; give one for each")
    ax = new_axes(ax)
    style = {**next_line(ax), **kwargs}
    (line,) = ax.plot(place, values[finite], label=label, **style)
    for limit in values[~finite]:
        ax.axhline(limit, color=line.get_color(), linestyle=":", linewidth=1, label="_limit")
    ax.set_ylabel("loss")
    shown = values[values > 1e-12 * values.max()]
    if ax.get_yscale() == "linear":
        logarithmic(ax, shown)
    _over_time(ax, place)
    return ax


def plot_outputs(
    times: ArrayLike,
    outputs: ArrayLike,
    bounds: ArrayLike | None = None,
    ax: Axes | None = None,
    *,
    labels: Sequence[str] | None = None,
    **kwargs: Any,
) -> Axes:
    """Draw the outputs of one sample along training, and the band in which the exact ones lie.

    Args:
        times: ``(T,)`` times or steps.
        outputs: ``(T, O)`` outputs of one sample, ``path.outputs[:, i]`` or ``path.predict(K_cross)[:, i]``.
        bounds: Errors at most: ``(T, O)``, ``path.test_bound(diagonal)[:, i]``; or ``(T,)``,
            ``path.bounds``, which hold for every output of training samples; None for no band.
        ax: Axes to draw on; None for new ones.
        labels: ``(O,)`` entries of the legend, one for each output.
        **kwargs: For `matplotlib.axes.Axes.plot`.

    Returns:
        The axes.

    Raises:
        ShapeError: If outputs, bounds and times do not fit, or no time is finite.
        NonFiniteError: If an output is not finite; bounds may be, and then have no band.
        MissingDependencyError: If matplotlib is missing.

    Example:
        >>> from matplotlib.figure import Figure
        >>> from ntkops.plotting import plot_outputs
        >>> outputs = [[0.0, 0.0], [0.5, -0.2], [0.9, -0.3]]
        >>> ax = plot_outputs([0, 1, 2], outputs, [0.1, 0.1, 0.1], Figure().subplots())
        >>> len(ax.get_lines()), len(ax.collections)
        (2, 2)
    """
    place, finite = _finite_times(times)
    values = finite_array(outputs, "the outputs")
    values = values[:, None] if values.ndim == 1 else values
    if values.ndim != 2 or len(values) != len(finite):
        raise ShapeError(
            f"{len(finite)} times, but outputs of shape {values.shape}: pass those of one sample"
        )
    room = None
    if bounds is not None:
        room = np.asarray(bounds.detach().cpu().double() if isinstance(bounds, Tensor) else bounds, float)
        room = room[:, None] if room.ndim == 1 else room
        if room.shape not in (values.shape, (len(values), 1)):
            raise ShapeError(f"bounds of shape {room.shape} do not fit outputs of shape {values.shape}")
        room = np.broadcast_to(room, values.shape)
    names = (
        [f"output {i}" for i in range(values.shape[1])] if labels is None else [str(one) for one in labels]
    )
    if len(names) != values.shape[1]:
        raise ShapeError(f"{len(names)} labels for {values.shape[1]} outputs")
    ax = new_axes(ax)
    for column, name in enumerate(names):
        style = {**line_style(column), **kwargs}
        (line,) = ax.plot(place, values[finite, column], label=name, **style)
        if room is not None:
            low, high = (values[:, column] + sign * room[:, column] for sign in (-1, 1))
            known = np.isfinite(low[finite])
            ax.fill_between(
                place, low[finite], high[finite], where=known, color=line.get_color(), alpha=0.2, linewidth=0
            )
        for limit in values[~finite, column]:
            ax.axhline(limit, color=line.get_color(), linestyle=":", linewidth=1, label="_limit")
    if room is not None:  # a bound that says nothing would make the curves flat
        low, high = values.min(), values.max()
        reach = max(high - low, 1e-12)
        ax.set_ylim(max(ax.get_ylim()[0], low - reach), min(ax.get_ylim()[1], high + reach))
    ax.set_ylabel("output")
    _over_time(ax, place)
    return ax
