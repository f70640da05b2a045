"""Densities of spectra."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..errors import InputError, ShapeError
from ..results import SpectralDensity
from ._axes import finite_array, new_axes, next_line

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["plot_spectral_density"]


def plot_spectral_density(
    x: SpectralDensity,
    ax: Axes | None = None,
    *,
    label: str | None = None,
    cumulative: bool = False,
    band: bool = True,
    **kwargs: Any,
) -> Axes:
    """Draw a spectral density, or the cumulative distribution, with the 95 % band of its probes.

    The band holds at each point by itself. What the quadrature may have left open is drawn as dotted lines
    around it, for the cumulative distribution alone: for the density that bound is too wide to be of use to
    the eye. Call it again with the same axes to compare spectra of one scale.

    Args:
        x: `SpectralDensity`.
        ax: Axes to draw on; None for new ones.
        label: Entry of the legend.
        cumulative: Draw the share of eigenvalues at or below each point.
        band: Draw the errors.
        **kwargs: For `matplotlib.axes.Axes.plot`.

    Returns:
        The axes.

    Raises:
        ShapeError: If it is no spectral density.
        InputError: If the axes show another scale already.
        NonFiniteError: If a value is not finite.
        MissingDependencyError: If matplotlib is missing.
    """
    if not isinstance(x, SpectralDensity):
        raise ShapeError(
            f"expected a SpectralDensity, got {type(x).__name__}; plot_spectrum draws eigenvalues"
        )
    grid = finite_array(x.grid, "the grid")
    curve, (low, high) = (x.cumulative, x.cumulative_band) if cumulative else (x.values, x.band)
    values = finite_array(curve, "the density")
    ax = new_axes(ax)
    axis = "log" if x.scale == "log" else "linear"
    if ax.get_lines() and ax.get_xscale() != axis:
        raise InputError(f"this density is on a {axis} scale, the axes are not; draw it on others")
    ax.set_xscale(axis)
    style = {**next_line(ax), **kwargs}
    (line,) = ax.plot(grid, values, label=label, **style)
    if band and not x.exact:
        ends = finite_array(low, "the band"), finite_array(high, "the band")
        ax.fill_between(grid, *ends, color=line.get_color(), alpha=0.25, linewidth=0)
        if cumulative:
            error = finite_array(x.cumulative_error, "the quadrature's error")
            for end in ((ends[0] - error).clip(0, 1), (ends[1] + error).clip(0, 1)):
                ax.plot(grid, end, color=line.get_color(), linestyle=":", linewidth=0.8, label="_bound")
    ax.set_xlabel(r"eigenvalue $\lambda$")
    unit = "decade" if x.scale == "log" else r"unit of $\lambda$"
    ax.set_ylabel(
        r"share of eigenvalues $\leq \lambda$" if cumulative else f"share of eigenvalues per {unit}"
    )
    ax.set_ylim(bottom=0)
    ax.grid(visible=True, which="major", alpha=0.3)
    if ax.get_legend_handles_labels()[1]:
        ax.legend()
    return ax
