"""Distillation: what clusters use and cover of a kernel, what a set of each size is worth, its images."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from ..arguments import ArrayLike
from ..errors import InputError, ShapeError
from ..results import ChainReport, Containment, LocalGlobalProperties, LocalGlobalTrial
from ._axes import COLOURS, finite_array, legend, logarithmic, marker, new_axes, next_line

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = [
    "plot_by_size",
    "plot_chain",
    "plot_cluster_variance",
    "plot_coverage_gap",
    "plot_images",
    "plot_local_containment",
    "plot_local_global_grid",
    "plot_properties",
]

_RANDOM = "0.65"  # grey: what any partition gives


def _whole_numbers(ax: Axes, axis: str = "x") -> None:
    from matplotlib.ticker import MaxNLocator

    (ax.xaxis if axis == "x" else ax.yaxis).set_major_locator(MaxNLocator(integer=True))


def plot_local_containment(x: Containment, ax: Axes | None = None, **kwargs: Any) -> Axes:
    """Draw how much of the clusters' variance the first r global eigenvectors hold: figure 4, top.

    Args:
        x: `Containment`, as `ntkops.distill.containment` returns it.
        ax: Axes to draw on; None for new ones.
        **kwargs: For `matplotlib.axes.Axes.plot` of the mean.

    Returns:
        The axes.

    Raises:
        MissingDependencyError: If matplotlib is missing.
    """
    curves = finite_array(x.cumulative, "the containment")
    rank = np.arange(1, curves.shape[1] + 1)
    ax = new_axes(ax)
    style = {**next_line(ax), "marker": "o", "markersize": 3, **kwargs}
    ax.plot(rank, curves.mean(0), label=f"mean of {len(curves)} clusters", **style)
    ax.fill_between(rank, curves.min(0), curves.max(0), color=style["color"], alpha=0.2, label="all clusters")
    ax.axhline(1 - x.epsilon, color="0.4", linestyle=":", label=rf"$1 - \varepsilon$ = {1 - x.epsilon:g}")
    ax.set_ylim(0, 1.02)
    ax.set_xlabel("number of leading global eigenvectors")
    ax.set_ylabel("share of local variance inside")
    ax.grid(visible=True, which="major", alpha=0.3)
    _whole_numbers(ax)
    legend(ax, loc="lower right")
    return ax


def plot_cluster_variance(x: Containment, ax: Axes | None = None, **kwargs: Any) -> Axes:
    """Draw the share of each cluster's variance along each global eigenvector: figure 4, middle.

    Args:
        x: `Containment`, as `ntkops.distill.containment` returns it.
        ax: Axes to draw on; None for new ones.
        **kwargs: For `matplotlib.axes.Axes.imshow`.

    Returns:
        The axes.

    Raises:
        MissingDependencyError: If matplotlib is missing.
    """
    shares = finite_array(x.variance, "the variances")
    ax = new_axes(ax)
    count, rank = shares.shape
    place = {"aspect": "auto", "extent": (0.5, rank + 0.5, count - 0.5, -0.5), "interpolation": "nearest"}
    image = ax.imshow(shares, **{"cmap": "viridis", "vmin": 0.0, **place, **kwargs})
    ax.figure.colorbar(image, ax=ax, label="share of the cluster's variance")
    _whole_numbers(ax)
    sizes = x.sizes.tolist()
    ax.set_yticks(range(count), [f"{h} ({size})" for h, size in enumerate(sizes)])
    ax.set_xlabel("global eigenvector")
    ax.set_ylabel("cluster (samples)")
    return ax


def plot_coverage_gap(x: Containment, ax: Axes | None = None, **kwargs: Any) -> Axes:
    """Draw how well local eigenvectors cover each global one, and what they leave: figure 4, bottom.

    The paper shades what the best single cluster leaves; what all of them together leave is another,
    the gap of property (B). Both are drawn, and the legend gives the share of variance in the latter.

    Args:
        x: `Containment`, as `ntkops.distill.containment` returns it.
        ax: Axes to draw on; None for new ones.
        **kwargs: For `matplotlib.axes.Axes.plot` of all lines.

    Returns:
        The axes.

    Raises:
        MissingDependencyError: If matplotlib is missing.
    """
    union, single = finite_array(x.union, "the coverage"), finite_array(x.alignment, "the alignment")
    values = finite_array(x.values, "the eigenvalues")
    index = np.arange(1, len(union) + 1)
    gap = float((values * (1 - union)).sum() / values.sum())
    ax = new_axes(ax)
    style = {"markersize": 3, "linewidth": 1.2, **kwargs}
    for number, (label, curve) in enumerate(
        (
            ("all clusters together", union),
            ("cluster that covers most", single.max(0)),
            ("mean over clusters", single.mean(0)),
        )
    ):
        ax.plot(index, curve, color=COLOURS[number], marker=marker(number), label=label, **style)
    label = f"gap: {gap:.1%} of the variance\n(mean over eigenvectors {float((1 - union).mean()):.1%})"
    ax.fill_between(index, union, 1, color=COLOURS[5], alpha=0.3, label=label)
    ax.set_ylim(0, 1.02)
    ax.set_xlabel("global eigenvector")
    ax.set_ylabel("share covered by local eigenvectors")
    ax.grid(visible=True, which="major", alpha=0.3)
    _whole_numbers(ax)
    legend(ax, loc="lower left")
    return ax


def plot_properties(x: LocalGlobalProperties, ax: Axes | None = None, **kwargs: Any) -> Axes:
    """Draw properties (A) and (B) of a partition beside those of random ones, and the bounds of any.

    Args:
        x: `LocalGlobalProperties`, best with ``num_random`` partitions to compare with.
        ax: Axes to draw on; None for new ones.
        **kwargs: For `matplotlib.axes.Axes.plot` of the partition's marks.

    Returns:
        The axes.

    Raises:
        MissingDependencyError: If matplotlib is missing.
    """
    rows = (
        ("(A) single clusters", lambda p: finite_array(p.local_containment, "(A)").tolist(), None),
        ("(A) pooled", lambda p: [p.pooled_containment], x.pooled_bound),
        ("(A) pooled, untruncated", lambda p: [p.untruncated_containment], x.untruncated_bound),
        ("(B) covered variance", lambda p: [1 - p.weighted_gap], 1 - x.weighted_gap_bound),
        ("(B) covered, mean of eigenvectors", lambda p: [1 - p.mean_gap], None),
    )
    ax = new_axes(ax)
    style = {"color": COLOURS[0], "marker": "o", "markersize": 5, "linestyle": "", **kwargs}
    for height, (_, read, bound) in enumerate(rows):
        found = read(x)
        others = [value for other in x.random for value in read(other)]
        first = height == 0
        if others:
            label = f"{len(x.random)} random partitions" if first else "_random"
            ax.plot(
                others, [height + 0.15] * len(others), color=_RANDOM, marker="|", linestyle="", label=label
            )
        name = "this partition" if first else "_partition"
        ax.plot(found, [height - 0.1] * len(found), label=name, **style)
        if bound is not None:
            seen = "_bound" if height > 1 else "least possible on any partition"
            ends = (height - 0.35, height + 0.35)
            ax.plot([bound] * 2, ends, color=COLOURS[1], linewidth=2, label=seen)
    ax.set_yticks(range(len(rows)), [row[0] for row in rows])
    ax.invert_yaxis()
    ax.set_xlabel(rf"share, $\varepsilon$ = {x.epsilon:g}")
    ax.grid(visible=True, axis="x", alpha=0.3)
    legend(ax)
    return ax


def plot_by_size(
    curves: Mapping[str, tuple[Sequence[int], Tensor | Sequence[float]]],
    ax: Axes | None = None,
    *,
    quantity: str = "share of variance covered",
    full: float | None = None,
    **kwargs: Any,
) -> Axes:
    """Draw a quantity against the number of distilled gradients, one line a method: figures 3 and 6.

    Args:
        curves: Name of a method to its sizes and its values: coverages, reconstruction errors,
            accuracies, whatever was measured.
        ax: Axes to draw on; None for new ones.
        quantity: What the values are, for the axis.
        full: Value of the whole set, drawn as a line.
        **kwargs: For `matplotlib.axes.Axes.plot`.

    Returns:
        The axes.

    Raises:
        InputError: If there is no method.
        ShapeError: If a method has not as many values as sizes.
        NonFiniteError: If a number is not finite.
        MissingDependencyError: If matplotlib is missing.

    Example:
        >>> from matplotlib.figure import Figure
        >>> from ntkops.plotting import plot_by_size
        >>> ax = plot_by_size(
        ...     {"pca": ([1, 10, 100], [0.2, 0.6, 0.9])}, Figure().subplots()
        ... )
        >>> ax.get_xscale()
        'log'
    """
    if not curves:
        raise InputError("there is no method to draw")
    ax = new_axes(ax)
    seen = []
    for name, (sizes, values) in curves.items():
        place, height = finite_array(sizes, f"the sizes of {name}"), finite_array(values, name)
        if place.ndim != 1 or place.shape != height.shape:
            raise ShapeError(f"{name}: {place.shape} sizes, but {height.shape} values; give one for each")
        order = np.argsort(place)
        shape = marker(len(ax.get_lines()))
        style = {**next_line(ax), "marker": shape, "markersize": 4, "linewidth": 1.2, **kwargs}
        ax.plot(place[order], height[order], label=name, **style)
        seen.append(height)
    if full is not None:
        ax.axhline(full, color="0.4", linestyle=":", label=f"all points ({full:.3g})")
    ax.set_xscale("log")
    logarithmic(ax, np.concatenate(seen))
    ax.set_xlabel("number $s$ of distilled gradients")
    ax.set_ylabel(quantity)
    ax.grid(visible=True, which="major", alpha=0.3)
    legend(ax)
    return ax


_COSTS = {
    "seconds": "seconds, distillation and prediction included",
    "passes": "passes through the network",
    "jacobian_rows": "gradients of logits on the training side",
    "gradient_bytes": "bytes of gradients that a predictor keeps",
    "kernel_bytes": "bytes of kernels",
    "kernel_flops": "operations of the kernels",
    "solve_flops": "operations of the solve",
}
_WORTH = ("fidelity", "accuracy", "mean_squared_error")


def plot_chain(
    report: ChainReport,
    ax: Axes | None = None,
    *,
    cost: str = "seconds",
    quantity: str = "fidelity",
    **kwargs: Any,
) -> Axes:
    """Draw what each run of the distilled chain costs and what it leaves, stage upon stage.

    Args:
        report: `ChainReport`, as `ntkops.distill.chain` returns it.
        ax: Axes to draw on; None for new ones.
        cost: "seconds", "passes", "jacobian_rows", "gradient_bytes", "kernel_bytes", "kernel_flops" or
            "solve_flops".
        quantity: "fidelity", "accuracy" or "mean_squared_error".
        **kwargs: For `matplotlib.axes.Axes.errorbar`.

    Returns:
        The axes. A line joins the runs with each stage added; open marks are runs with one left out. Of
        several seeds marks are means, and bars go from the least to the largest.

    Raises:
        InputError: If a name is not understood, or the runs have no such quantity.
        NonFiniteError: If a number is not finite.
        MissingDependencyError: If matplotlib is missing.
    """
    if cost not in _COSTS:
        raise InputError(f"cost={cost!r}: choose one of {', '.join(map(repr, _COSTS))}")
    if quantity not in _WORTH:
        raise InputError(f"quantity={quantity!r}: choose one of {', '.join(map(repr, _WORTH))}")
    if getattr(report.full, quantity) is None:
        raise InputError(f"the runs have no {quantity}: it needs labels, and a fidelity several outputs")
    ax, path = new_axes(ax), []
    seen: list[int] = []
    for position, (name, runs) in enumerate(report.runs().items()):
        if id(runs[0]) in seen:  # the chain without its last stage stands there already
            continue
        seen.append(id(runs[0]))
        drawn = [finite_array([getattr(run, key) for run in runs], key) for key in (cost, quantity)]
        (x, x_bars), (y, y_bars) = map(_mean_and_range, drawn)
        colour = COLOURS[position % len(COLOURS)]
        upon = position < len(report.stages)
        face = {"markerfacecolor": colour if upon else "white"}
        style = {"fmt": marker(position), "capsize": 3, "color": colour, "label": name, **face, **kwargs}
        ax.errorbar(x, y, xerr=x_bars, yerr=y_bars, **style)
        path += [(x, y)] if upon else []
    ax.plot(*zip(*path, strict=True), color="0.6", linewidth=1, zorder=0, label="_stages")
    ax.set_xscale("log")
    ax.set_xlabel(_COSTS[cost])
    ax.set_ylabel(quantity.replace("_", " "))
    ax.grid(visible=True, which="major", alpha=0.3)
    legend(ax)
    return ax


def _mean_and_range(values: np.ndarray) -> tuple[float, np.ndarray | None]:
    """Return the mean and the bars to the least and the largest, None for a single value."""
    mean = float(values.mean())
    bars = np.array([[mean - values.min()], [values.max() - mean]]).clip(min=0)
    return mean, bars if len(values) > 1 else None


def plot_local_global_grid(
    trials: Iterable[LocalGlobalTrial], ax: Axes | None = None, *, quantity: str = "fidelity", **kwargs: Any
) -> Axes:
    """Draw size and fit of Algorithm 1 for every setting, and the frontier that none beats: figure 9.

    Args:
        trials: As `ntkops.distill.local_global_grid` returns them.
        ax: Axes to draw on; None for new ones.
        quantity: "fidelity" or "mean_squared_error", on the training samples.
        **kwargs: For `matplotlib.axes.Axes.scatter`.

    Returns:
        The axes. Open marks are settings without gap vectors; colours are numbers of clusters.

    Raises:
        InputError: If there are no settings, or none has that quantity.
        MissingDependencyError: If matplotlib is missing.
    """
    if quantity not in ("fidelity", "mean_squared_error"):
        raise InputError(f"quantity={quantity!r}: choose 'fidelity' or 'mean_squared_error'")
    known = [trial for trial in trials if getattr(trial, quantity) is not None]
    if not known:
        raise InputError(f"no setting has a {quantity}: there is nothing to draw")
    ax = new_axes(ax)
    numbers = sorted({trial.clusters for trial in known})
    for position, number in enumerate(numbers):
        here = [trial for trial in known if trial.clusters == number]
        colour = COLOURS[position % len(COLOURS)]
        faces = [colour if trial.num_gaps else "none" for trial in here]
        heights = [getattr(trial, quantity) for trial in here]
        style = {"s": 22, "marker": marker(position), **kwargs}
        ax.scatter([t.size for t in here], heights, facecolors=faces, edgecolors=colour, **style)
        ax.scatter([], [], color=colour, label=f"H = {number}", **style)
    sizes, best = _frontier(known, quantity)
    ax.step(sizes, best, where="post", color="0.3", linewidth=1, label="frontier", zorder=0)
    ax.set_xscale("log")
    logarithmic(ax, np.array([getattr(trial, quantity) for trial in known]))
    ax.set_xlabel("number $s$ of distilled gradients (open: no gap vectors)")
    ax.set_ylabel(f"{quantity.replace('_', ' ')} on the training samples")
    ax.grid(visible=True, which="major", alpha=0.3)
    legend(ax)
    return ax


def _frontier(trials: list[LocalGlobalTrial], quantity: str) -> tuple[list[int], list[float]]:
    """Return sizes at which a better value is reached for the first time, and these values."""
    sign = 1 if quantity == "fidelity" else -1
    sizes: list[int] = []
    best: list[float] = []
    for trial in sorted(trials, key=lambda one: (one.size, -sign * getattr(one, quantity))):
        value = getattr(trial, quantity)
        if not best or sign * value > sign * best[-1]:
            sizes.append(trial.size)
            best.append(value)
    return sizes, best


# -- samples that are images: chosen, distilled, asked for


def plot_images(sets: Mapping[str, ArrayLike], ax: Axes | None = None, **kwargs: Any) -> Axes:
    """Draw sets of images below each other, a row for each: real samples beside distilled ones, say.

    Every set has its own scale, from its smallest to its largest entry, since distilled images leave the
    range of real ones.

    Args:
        sets: Name to images, ``(s, h, w)``, ``(s, 1, h, w)`` or, with colours, ``(s, 3, h, w)``; as
            ``distill.wasserstein(...).inputs`` are. Sets may differ in s, not in h and w.
        ax: Axes to draw on; None for new ones.
        **kwargs: For `matplotlib.axes.Axes.imshow`.

    Returns:
        The axes.

    Raises:
        ShapeError: If a set is no set of images, or their sizes differ.
        NonFiniteError: If an entry is not finite.
        MissingDependencyError: If matplotlib is missing.

    Example:
        >>> import torch
        >>> from matplotlib.figure import Figure
        >>> from ntkops.plotting import plot_images
        >>> rows = {"real": torch.rand(5, 8, 8), "distilled": torch.rand(3, 1, 8, 8)}
        >>> ax = plot_images(rows, Figure().subplots())
        >>> [label.get_text() for label in ax.get_yticklabels()]
        ['real', 'distilled']
    """
    if not sets:
        raise ShapeError("there is no set of images")
    rows = {name: _coloured(finite_array(images, f"the set {name!r}"), name) for name, images in sets.items()}
    sizes = {images.shape[1:3] for images in rows.values()}
    if len(sizes) > 1:
        raise ShapeError(f"images of unlike sizes {sorted(sizes)} cannot stand below each other")
    ((height, width),) = sizes
    count = max(map(len, rows.values()))
    # A line of white, the largest value, between neighbours.
    page = np.ones((len(rows) * (height + 1) - 1, count * (width + 1) - 1, 3))
    for r, images in enumerate(rows.values()):
        for c, image in enumerate(images):
            top, left = r * (height + 1), c * (width + 1)
            page[top : top + height, left : left + width] = image
    ax = new_axes(ax)
    ax.imshow(page, **{"interpolation": "nearest", **kwargs})
    ax.set_xticks([])
    ax.set_yticks([r * (height + 1) + (height - 1) / 2 for r in range(len(rows))], list(rows))
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)
    return ax


def _coloured(images: np.ndarray, name: str) -> np.ndarray:
    """Return images as ``(s, h, w, 3)`` between 0 and 1."""
    if images.ndim == 3:
        images = images[:, None]
    if images.ndim != 4 or images.shape[1] not in (1, 3) or not images.size:
        raise ShapeError(
            f"the set {name!r} has shape {images.shape}: images are (s, h, w), (s, 1, h, w) or (s, 3, h, w)"
        )
    low, high = images.min(), images.max()
    scaled = (images - low) / (high - low if high > low else 1.0)
    return np.broadcast_to(np.moveaxis(scaled, 1, -1), (len(images), *images.shape[2:], 3))
