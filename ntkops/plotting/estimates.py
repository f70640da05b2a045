"""Estimates with their errors, and errors against passes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import ShapeError
from ..results import Estimate
from ._axes import COLOURS, legend, line_style, marker, new_axes

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["plot_error_against_passes", "plot_estimates"]


def plot_estimates(estimates: Mapping[str, Estimate], ax: Axes | None = None, **kwargs: Any) -> Axes:
    """Draw scalar estimates with their 95 % intervals, one row each; exact values are filled.

    Args:
        estimates: Name to scalar `Estimate`.
        ax: Axes to draw on; None for new ones.
        **kwargs: For `matplotlib.axes.Axes.errorbar`.

    Returns:
        The axes.

    Raises:
        ShapeError: If there is none.
        EstimateError: If one is not a scalar.
        MissingDependencyError: If matplotlib is missing.
    """
    if not estimates:
        raise ShapeError("there is no estimate to draw")
    drawn = [(float(e), float(e.interval[0]), float(e.interval[1])) for e in estimates.values()]
    ax = new_axes(ax)
    for row, ((value, low, high), estimate) in enumerate(zip(drawn, estimates.values(), strict=True)):
        colour = COLOURS[0] if estimate.exact else COLOURS[1]
        style = {"color": colour, "markerfacecolor": colour if estimate.exact else "white", **kwargs}
        ax.errorbar(value, row, xerr=[[value - low], [high - value]], fmt="o", capsize=3, **style)
    made = ["1 pass" if e.passes == 1 else f"{e.passes} passes" for e in estimates.values()]
    rows = [f"{name}\n{e.method}, {how}" for (name, e), how in zip(estimates.items(), made, strict=True)]
    ax.set_yticks(range(len(rows)), rows)
    ax.invert_yaxis()
    ax.margins(y=0.15)
    ax.set_xlabel("value with its 95 % interval")
    ax.grid(visible=True, axis="x", alpha=0.3)
    return ax


def plot_error_against_passes(
    estimates: Mapping[str, Sequence[Estimate]],
    reference: Estimate | float,
    ax: Axes | None = None,
    *,
    predicted: bool = True,
    **kwargs: Any,
) -> Axes:
    """Draw relative errors against the passes that were really made, one line for each method.

    Estimates of one method with the same number of passes are repetitions: the line goes through the root
    mean square of their errors, which is what a standard error predicts. Estimates without any error have no
    place on a logarithmic axis: the legend names the fewest passes that gave one.

    Args:
        estimates: Name of a method to scalar estimates with any numbers of passes.
        reference: The exact value.
        ax: Axes to draw on; None for new ones.
        predicted: Also draw the standard errors that the estimates themselves report, dotted.
        **kwargs: For `matplotlib.axes.Axes.plot`.

    Returns:
        The axes.

    Raises:
        ShapeError: If a method has no estimate, or the reference is zero.
        EstimateError: If an estimate is not a scalar.
        MissingDependencyError: If matplotlib is missing.
    """
    exact = float(reference)
    if not exact or not estimates or not all(estimates.values()):
        raise ShapeError("relative errors need a reference that is not zero and an estimate for each method")
    ax = new_axes(ax)
    for position, (name, repeated) in enumerate(estimates.items()):
        passes = np.array([e.passes for e in repeated])
        errors = np.array([abs(float(e) - exact) for e in repeated]) / abs(exact)
        # √(mean of squares) of repetitions estimates the standard deviation that a standard error speaks of
        groups, means = _root_mean_squares(passes, errors)
        drawn = (means > 0) & (groups > 0)  # neither no error nor no pass has a place on a logarithmic axis
        label = name if (means > 0).all() else f"{name} (exact with {groups[means == 0][0]} passes)"
        style = {**line_style(position), "marker": marker(position), "markersize": 5, **kwargs}
        ax.plot(groups[drawn], means[drawn], label=label, **style)
        if predicted:
            reported = np.array([float(e.stderr) for e in repeated]) / abs(exact)
            _, means = _root_mean_squares(passes, reported)
            drawn = (means > 0) & (groups > 0)
            ax.plot(
                groups[drawn],
                means[drawn],
                color=style["color"],
                linestyle=":",
                linewidth=1,
                label="_reported",
            )
    if predicted:
        ax.plot([], [], color="0.4", linestyle=":", linewidth=1, label="standard error as reported")
    ax.set_xscale("log", base=2)
    ax.xaxis.set_major_formatter("{x:g}")
    ax.set_yscale("log")
    ax.set_xlabel("passes (vjp and jvp, one vector each)")
    ax.set_ylabel("error relative to the exact value")
    ax.grid(visible=True, which="major", alpha=0.3)
    legend(ax)
    return ax


def _root_mean_squares(passes: np.ndarray, errors: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the distinct numbers of passes, and the root mean square of the errors with each."""
    groups = np.unique(passes)
    means = np.array([np.sqrt(np.mean(errors[passes == count] ** 2)) for count in groups])
    return groups, means
