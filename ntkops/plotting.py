"""Drawings of results: spectra, classes, estimates with their errors, errors against passes.

Every function draws on the axes it is given, or on new ones, and returns them. None shows a window, changes a
style or keeps state: titles, limits and saving are the caller's. Colours are told apart with every common
kind of colour blindness, and lines that share a colour differ in their dashes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from .errors import MissingDependencyError, NonFiniteError, ShapeError
from .results import Eigenpairs, Estimate, TruncationRank

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = [
    # spectra
    "plot_spectrum",
    "plot_class_spectra",
    "plot_truncation_ranks",
    # estimates
    "plot_estimates",
    "plot_error_against_passes",
    # dense blocks
    "plot_kernel",
]

# Okabe and Ito's palette without its yellow, which is too pale for lines on white.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
_DASHES = ("-", "--", ":", "-.")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X")
_DECADES = 1.5  # data that span more than this many decades get a logarithmic axis


def _axes(ax: Axes | None) -> Axes:
    """Return the given axes, or those of a new figure."""
    if ax is not None:
        return ax
    try:
        from matplotlib import pyplot
    except ImportError as error:
        raise MissingDependencyError(
            "plots need matplotlib, which is not installed: pip install 'ntkops[demo]'"
        ) from error
    return pyplot.subplots(layout="constrained")[1]


def _array(x: Any, what: str) -> np.ndarray:
    """Return finite float64 numbers of a tensor, array or nested list."""
    numbers = x.detach().to("cpu", torch.float64).numpy() if isinstance(x, Tensor) else np.asarray(x, float)
    if not np.isfinite(numbers).all():
        place = tuple(int(i) for i in np.argwhere(~np.isfinite(numbers))[0])
        raise NonFiniteError(f"{what} is not finite at position {place}; only finite numbers can be drawn")
    return numbers


def _line(position: int) -> dict[str, Any]:
    """Return colour and dashes of the line with this number."""
    cycle, colour = divmod(position, len(_COLOURS))
    return {"color": _COLOURS[colour], "linestyle": _DASHES[cycle % len(_DASHES)]}


def _marker(position: int) -> str:
    return _MARKERS[position % len(_MARKERS)]


def _next_line(ax: Axes) -> dict[str, Any]:
    """Return colour and dashes that the lines already on the axes do not have."""
    labels = [str(line.get_label()) for line in ax.get_lines()]  # caps and marks have labels of their own
    return _line(sum(label[:1] != "_" or label.startswith("_child") for label in labels))


def _logarithmic(ax: Axes, values: np.ndarray) -> None:
    """Give the vertical axis a logarithmic scale where positive values span decades."""
    positive = values[values > 0]
    if positive.size and np.log10(positive.max() / positive.min()) > _DECADES:
        ax.set_yscale("log")


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
    _logarithmic(ax, np.concatenate(drawn) if drawn else np.empty(0))
    if count > 50:
        ax.set_xscale("log")
    else:
        from matplotlib.ticker import MaxNLocator

        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.set_xlabel("index $i$ of the eigenvalue, largest first")
    ax.set_ylabel(ylabel)
    ax.grid(visible=True, which="major", alpha=0.3)
    if ax.get_legend_handles_labels()[1]:
        ax.legend()


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
    values = _array(x.values if isinstance(x, Eigenpairs) else x, "the spectrum")
    if values.ndim != 1 or not values.size:
        raise ShapeError(
            f"a spectrum is a list of eigenvalues, got shape {values.shape}; plot_class_spectra draws "
            "several, plot_kernel a matrix"
        )
    order = np.argsort(-values)
    values = values[order]
    scale = values.sum() if relative else 1.0
    ax = _axes(ax)
    style = {**_next_line(ax), "marker": "o" if values.size <= 30 else None, "markersize": 4, **kwargs}
    _draw_spectrum(ax, values / scale, label, style)
    if pairs is not None:
        errors = _array(pairs.residuals, "the residuals")[order] / scale
        shown = (values > 0) & (errors > 0)
        index = np.arange(1, len(values) + 1)[shown]
        low = np.minimum(errors, 0.999 * values / scale)[shown]  # a bar to zero has no place on a log axis
        bars = np.stack([low, errors[shown]])
        ax.errorbar(index, values[shown] / scale, bars, fmt="none", ecolor=style["color"], capsize=2)
    share = r"share of the sum, $\lambda_i / \sum_j \lambda_j$"
    _finish_spectrum(ax, values.size, share if relative else r"eigenvalue $\lambda_i$")
    return ax


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
    values = _array(x, "the spectra")
    if values.ndim != 2 or not values.size:
        raise ShapeError(f"spectra of classes have shape (C, k), got {values.shape}")
    values = -np.sort(-values, axis=1)
    names = [str(c) for c in range(len(values))] if labels is None else [str(name) for name in labels]
    marks = None if ranks is None else _array(ranks, "the ranks").reshape(-1).astype(int)
    for what, given in (("labels", names), ("ranks", marks)):
        if given is not None and len(given) != len(values):
            raise ShapeError(f"{len(values)} spectra, but {len(given)} {what}; give one for each")
    ax = _axes(ax)
    for position, (spectrum, name) in enumerate(zip(values, names, strict=True)):
        style = {"linewidth": 1.2, **_line(position), **kwargs}
        _draw_spectrum(ax, spectrum, name, style, say_hidden=False)
        if marks is not None and 1 <= marks[position] <= spectrum.size and spectrum[marks[position] - 1] > 0:
            place = marks[position]
            ax.plot(place, spectrum[place - 1], color=style["color"], marker=_marker(position), label="_mark")
    _finish_spectrum(ax, values.shape[1], r"eigenvalue $\lambda_i$ of the class's kernel")
    title = "class" if (values > 0).all() else "class (only values > 0)"
    ax.legend(title=title, ncols=2 if len(values) > 5 else 1, fontsize="small")
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
    heights = {name: _array(x, f"ranks of {name}").reshape(-1) for name, x in plain.items()}
    counts = {len(values) for values in heights.values()}
    if len(counts) != 1:
        raise ShapeError(
            f"ranks need one number for each class of every kernel, got {sorted(counts)} classes"
        )
    classes = np.arange(counts.pop())
    ax = _axes(ax)
    width = 0.8 / len(heights)
    for position, (name, values) in enumerate(heights.items()):
        shift = (position - (len(heights) - 1) / 2) * width
        style = {"color": _line(position)["color"], **kwargs}
        ax.bar(classes + shift, values, width, label=name, **style)
    if limit is not None:
        ax.axhline(limit, color="0.4", linestyle=":", label=f"size of the kernel ({limit})")
    ax.set_xticks(classes, [str(c) for c in classes] if labels is None else list(labels))
    ax.set_xlabel("class")
    ax.set_ylabel("truncation rank (number of eigenvalues)")
    ax.set_ylim(0, 1.2 * ax.get_ylim()[1])  # room for the legend
    ax.legend(loc="upper left", ncols=3)
    return ax


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
    ax = _axes(ax)
    for row, ((value, low, high), estimate) in enumerate(zip(drawn, estimates.values(), strict=True)):
        colour = _COLOURS[0] if estimate.exact else _COLOURS[1]
        style = {"color": colour, "markerfacecolor": colour if estimate.exact else "white", **kwargs}
        ax.errorbar(value, row, xerr=[[value - low], [high - value]], fmt="o", capsize=3, **style)
    rows = [f"{name}\n{e.method}, {e.passes} passes" for name, e in estimates.items()]
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
    mean square of their errors, which is what a standard error predicts.

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
    ax = _axes(ax)
    passes = {name: np.array([e.passes for e in repeated]) for name, repeated in estimates.items()}
    for position, (name, repeated) in enumerate(estimates.items()):
        errors = np.array([abs(float(e) - exact) for e in repeated]) / abs(exact)
        style = {**_line(position), "marker": _marker(position), "markersize": 5, **kwargs}
        ax.plot(*_root_mean_squares(passes[name], errors), label=name, **style)
        if predicted:
            reported = np.array([float(e.stderr) for e in repeated]) / abs(exact)
            drawn = _root_mean_squares(passes[name], reported)
            ax.plot(*drawn, color=style["color"], linestyle=":", linewidth=1, label="_reported")
    if predicted:
        ax.plot([], [], color="0.4", linestyle=":", linewidth=1, label="standard error as reported")
    ax.set_xscale("log", base=2)
    ax.xaxis.set_major_formatter("{x:g}")
    ax.set_yscale("log")
    ax.set_xlabel("passes (vjp and jvp, one vector each)")
    ax.set_ylabel("error relative to the exact value")
    ax.grid(visible=True, which="major", alpha=0.3)
    ax.legend(fontsize="small", loc="upper right")  # errors fall: that corner stays empty
    return ax


def _root_mean_squares(passes: np.ndarray, errors: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the distinct numbers of passes, and the root mean square of the errors with each."""
    groups = np.unique(passes)
    means = np.array([np.sqrt(np.mean(errors[passes == count] ** 2)) for count in groups])
    return groups, np.maximum(means, np.finfo(float).eps)  # no error at all has no place on a log axis


def plot_kernel(matrix: Tensor | Sequence[Sequence[float]], ax: Axes | None = None, **kwargs: Any) -> Axes:
    """Draw a dense block of a kernel as an image; the colours start at zero, or are symmetric around it.

    Args:
        matrix: ``(r, c)`` entries, such as ``K[:50, :50].to_dense()``.
        ax: Axes to draw on; None for new ones.
        **kwargs: For `matplotlib.axes.Axes.imshow`.

    Returns:
        The axes.

    Raises:
        ShapeError: If the entries are not a matrix.
        NonFiniteError: If one is not finite.
        MissingDependencyError: If matplotlib is missing.
    """
    entries = _array(matrix, "the matrix")
    if entries.ndim != 2 or not entries.size:
        raise ShapeError(f"an image needs a matrix, got shape {entries.shape}")
    ax = _axes(ax)
    top = float(np.abs(entries).max()) or 1.0
    signed = bool((entries < 0).any())
    scale = {"cmap": "PuOr_r" if signed else "Oranges", "vmin": -top if signed else 0.0, "vmax": top}
    image = ax.imshow(entries, **{**scale, **kwargs})
    ax.figure.colorbar(image, ax=ax, label="entry of K", shrink=0.8)
    ax.set_xlabel("column")
    ax.set_ylabel("row")
    return ax
