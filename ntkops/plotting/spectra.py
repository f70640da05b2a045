"""Spectra and densities."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from ..errors import InputError, ShapeError
from ..results import Eigenpairs, SpectralDensity, TruncationRank
from ._axes import finite_array, legend, line_style, logarithmic, marker, new_axes, next_line

if TYPE_CHECKING:
    from matplotlib.axes import Axes


__all__ = [
    "plot_class_spectra",
    "plot_spectral_density",
    "plot_spectrum",
    "plot_truncation_ranks",
]


_MOST_LETTERS, _MOST_NUMBERS = 50, 16  # below an axis of the usual width


def _draw_spectrum(
    ax: Axes, values: np.ndarray, label: str | None, style: dict[str, Any], say_hidden: bool = True
) -> None:
    shown = values > 0
    hidden = int((~shown).sum())
    if hidden and say_hidden:  # a logarithmic axis would swallow them without a word
        label = f"{label or 'eigenvalues'} ({hidden} not positive, not shown)"
    index = np.arange(1, len(values) + 1)
    ax.plot(index[shown], values[shown], label=label, **style)


def _finish_spectrum(ax: Axes, count: int, ylabel: str) -> None:
    drawn = [np.asarray(line.get_ydata(), float) for line in ax.get_lines()]
    logarithmic(ax, np.concatenate(drawn) if drawn else np.empty(0))
    if count > 50:
        ax.set_xscale("log")
    elif ax.get_xscale() == "linear":  # a longer spectrum may be there already: its ticks stay
        from matplotlib.ticker import MaxNLocator

        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.set_xlabel("index $i$ of the eigenvalue, largest first")
    ax.set_ylabel(ylabel)
    ax.grid(visible=True, which="major", alpha=0.3)
    if ax.get_legend_handles_labels()[1]:
        legend(ax)


def plot_spectrum(
    x: Eigenpairs | Tensor | Sequence[float],
    ax: Axes | None = None,
    *,
    label: str | None = None,
    relative: bool = False,
    **kwargs: Any,
) -> Axes:
    """Draw eigenvalues against their index; call it again with the same axes to compare spectra.

    Residual norms of `Eigenpairs` become error bars, since an eigenvalue of K lies within the residual
    norm. Eigenvalues that are not positive cannot stand on a logarithmic axis: the legend counts them.

    Args:
        x: `Eigenpairs`, or ``(k,)`` eigenvalues in any order.
        ax: Axes to draw on; None for new ones.
        label: Entry of the legend.
        relative: Divide by the sum of the eigenvalues given, so that the axis shows shares.
        **kwargs: For `matplotlib.axes.Axes.plot`.

    Returns:
        The axes.

    Raises:
        ShapeError: If the eigenvalues are not one non-empty list.
        NonFiniteError: If one is not finite.
        MissingDependencyError: If matplotlib is missing.

    Example:
        >>> import torch
        >>> from matplotlib.figure import Figure
        >>> from ntkops.plotting import plot_spectrum
        >>> ax = plot_spectrum(torch.logspace(0, -6, 40), Figure().subplots())
        >>> ax.get_yscale(), len(ax.get_lines())
        ('log', 1)
    """
    pairs = x if isinstance(x, Eigenpairs) else None
    values = finite_array(x.values if isinstance(x, Eigenpairs) else x, "the spectrum")
    if values.ndim != 1 or not values.size:
        raise ShapeError(
            f"a spectrum is a list of eigenvalues, got shape {values.shape}; plot_class_spectra draws "
            "several, plot_kernel a matrix"
        )
    order = np.argsort(-values)
    values = values[order]
    scale = values.sum() if relative else 1.0
    ax = new_axes(ax)
    style = {**next_line(ax), "marker": "o" if values.size <= 30 else None, "markersize": 4, **kwargs}
    _draw_spectrum(ax, values / scale, label, style)
    if pairs is not None:
        errors = finite_array(pairs.residuals, "the residuals")[order] / scale
        shown = (values > 0) & (errors > 0)
        index = np.arange(1, len(values) + 1)[shown]
        low = np.minimum(errors, 0.999 * values / scale)[shown]  # a bar to zero has no place on a log axis
        bars = np.stack([low, errors[shown]])
        ax.errorbar(index, values[shown] / scale, bars, fmt="none", ecolor=style["color"], capsize=2)
    share = r"share of the sum, $\lambda_i / \sum_j \lambda_j$"
    _finish_spectrum(ax, values.size, share if relative else r"eigenvalue $\lambda_i$")
    return ax


def _name_classes(ax: Axes, names: Sequence[str]) -> None:
    """Write names under the classes, upright where they would overlap; too many numbers, sparsely."""
    step = -(-len(names) // _MOST_NUMBERS) if all(map(str.isdigit, names)) else 1
    upright = max(map(len, names)) * len(names) > _MOST_LETTERS and step == 1
    shown = range(0, len(names), step)
    ax.set_xticks(list(shown), [names[c] for c in shown], rotation=90 if upright else 0)


def plot_class_spectra(
    x: TruncationRank | Tensor | Sequence[Sequence[float]],
    ax: Axes | None = None,
    *,
    labels: Sequence[str] | None = None,
    ranks: Tensor | Sequence[int] | None = None,
    **kwargs: Any,
) -> Axes:
    """Draw one spectrum for each class, with a mark at its truncation rank.

    Args:
        x: ``(C, k)`` eigenvalues, or the `TruncationRank` of C kernels, which brings its ranks along.
        ax: Axes to draw on; None for new ones.
        labels: C entries of the legend; None for the numbers of the classes.
        ranks: ``(C,)`` truncation ranks, from 1; None for no marks.
        **kwargs: For `matplotlib.axes.Axes.plot`.

    Returns:
        The axes.

    Raises:
        ShapeError: If the eigenvalues are not ``(C, k)``, or labels or ranks do not number C.
        NonFiniteError: If an eigenvalue is not finite.
        MissingDependencyError: If matplotlib is missing.
    """
    if isinstance(x, TruncationRank):
        ranks = x.rank if ranks is None else ranks
        x = x.values
    values = finite_array(x, "the spectra")
    if values.ndim != 2 or not values.size:
        raise ShapeError(f"spectra of classes have shape (C, k), got {values.shape}")
    values = -np.sort(-values, axis=1)
    names = [str(c) for c in range(len(values))] if labels is None else [str(name) for name in labels]
    marks = None if ranks is None else finite_array(ranks, "the ranks").reshape(-1).astype(int)
    for what, given in (("labels", names), ("ranks", marks)):
        if given is not None and len(given) != len(values):
            raise ShapeError(f"{len(values)} spectra, but {len(given)} {what}; give one for each")
    ax = new_axes(ax)
    for position, (spectrum, name) in enumerate(zip(values, names, strict=True)):
        style = {"linewidth": 1.2, **line_style(position), **kwargs}
        _draw_spectrum(ax, spectrum, name, style, say_hidden=False)
        if marks is not None and 1 <= marks[position] <= spectrum.size and spectrum[marks[position] - 1] > 0:
            place = marks[position]
            ax.plot(place, spectrum[place - 1], color=style["color"], marker=marker(position), label="_mark")
    _finish_spectrum(ax, values.shape[1], r"eigenvalue $\lambda_i$ of the class's kernel")
    title = "class" if (values > 0).all() else "class (only values > 0)"
    legend(ax, title=title, ncols=2 if len(values) > 5 else 1)
    return ax


def plot_truncation_ranks(
    ranks: Mapping[str, TruncationRank | Tensor | Sequence[float]],
    ax: Axes | None = None,
    *,
    labels: Sequence[str] | None = None,
    limit: int | None = None,
    **kwargs: Any,
) -> Axes:
    """Draw the truncation rank of each class as bars, side by side for several kernels.

    Args:
        ranks: Name of a kernel to its ``(C,)`` ranks, or to the `TruncationRank` of its C classes.
        ax: Axes to draw on; None for new ones.
        labels: C names of the classes; None for their numbers.
        limit: Size of the kernels, drawn as a line: no rank can exceed it.
        **kwargs: For `matplotlib.axes.Axes.bar`.

    Returns:
        The axes.

    Raises:
        ShapeError: If the kernels have different numbers of classes, or there are none.
        MissingDependencyError: If matplotlib is missing.
    """
    plain = {name: x.rank if isinstance(x, TruncationRank) else x for name, x in ranks.items()}
    heights = {name: finite_array(x, f"ranks of {name}").reshape(-1) for name, x in plain.items()}
    counts = {len(values) for values in heights.values()}
    if len(counts) != 1:
        raise ShapeError(
            f"ranks need one number for each class of every kernel, got {sorted(counts)} classes"
        )
    classes = np.arange(counts.pop())
    ax = new_axes(ax)
    width = 0.8 / len(heights)
    for position, (name, values) in enumerate(heights.items()):
        shift = (position - (len(heights) - 1) / 2) * width
        style = {"color": line_style(position)["color"], **kwargs}
        ax.bar(classes + shift, values, width, label=name, **style)
    if limit is not None:
        ax.axhline(limit, color="0.4", linestyle=":", label=f"size of the kernel ({limit})")
    _name_classes(ax, [str(c) for c in classes] if labels is None else list(labels))
    ax.set_xlabel("class")
    ax.set_ylabel("truncation rank (number of eigenvalues)")
    ax.set_ylim(0, 1.2 * ax.get_ylim()[1])  # room for the legend
    legend(ax, loc="upper left", ncols=3)
    return ax


# -- densities of spectra


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
        legend(ax)
    return ax
