"""Figures 1 to 9 of the distilled-kernel paper, from a stored result."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import inf
from pathlib import Path
from statistics import fmean
from typing import Any

import _distilled_page as page
import matplotlib

matplotlib.use("Agg")

import numpy as np  # noqa: E402
from matplotlib import pyplot as plt  # noqa: E402
from matplotlib.axes import Axes  # noqa: E402
from matplotlib.patches import Rectangle  # noqa: E402
from matplotlib.ticker import NullLocator  # noqa: E402

from ntkops.plotting._axes import line_style, marker  # noqa: E402

__all__ = ["draw"]

Result = Mapping[str, Any]
Problem = Mapping[str, Any]
Groups = Sequence[tuple[str, list[Problem]]]
_SHOWN = ("random", "leverage", "kmedoids", "fps", "algorithm 1", "pca", "krylov", "als")
_LABELS = {
    "accuracy": "test accuracy", "fidelity": "test fidelity", "mse": "mean squared error of the logits",
    "condition": "condition number", "smallest": "smallest eigenvalue / mean diagonal",
    "coverage": "variance covered, stacked", "centred": "variance covered, centred, mean of classes",
    "reconstruction": "reconstruction error",
}  # fmt: skip
_LOG = ("mse", "condition", "smallest", "reconstruction")
_QUALITY = ("accuracy", "fidelity", "mse")


def _style(position: int) -> dict[str, Any]:
    return {**line_style(position), "marker": marker(position), "markersize": 4}


def _finish(ax: Axes, key: str, x: str, at: Sequence[float]) -> None:
    ax.set(xscale="log", xlabel=x, ylabel=_LABELS[key])
    # Labels that are nearer to the next than a factor of .6 would run into one: 350 and 500, say.
    apart = [value < 0.6 * after for value, after in zip(at, [*at[1:], inf], strict=True)]
    ax.set_xticks(at, [f"{value:g}" if clear else "" for value, clear in zip(at, apart, strict=True)])
    ax.xaxis.set_minor_locator(NullLocator())
    if key in _LOG:
        ax.set_yscale("log")
    ax.grid(alpha=0.3)


def _save(figure: Any, path: Path, title: str = "") -> None:
    if title:
        figure.suptitle(title)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _panels(count: int) -> tuple[Any, Sequence[Axes]]:
    """Return axes in rows of three."""
    rows = -(-count // 3)
    figure, axes = plt.subplots(rows, 3, figsize=(13, 4 * rows), layout="constrained", squeeze=False)
    return figure, list(axes.flat)


def _legend(figure: Any, axes: Sequence[Axes], used: int) -> None:
    """Put the legend into the panel that is left, or beside all of them."""
    handles = axes[0].get_legend_handles_labels()
    if len(axes) > used:
        axes[used].axis("off")
        axes[used].legend(*handles, loc="center")
    else:
        figure.legend(*handles, loc="outside right center", fontsize=8)


def _curves(
    groups: Groups, curve: str, at: str, label_x: str, keys: Sequence[str], path: Path, title: str
) -> None:
    """Draw a curve of each group, the mean over its networks; dotted: the networks' own accuracy."""
    figure, axes = _panels(len(keys))
    for ax, key in zip(axes, keys, strict=False):
        for position, (label, problems) in enumerate(groups):
            rows = [row for p in problems for row in p[curve]]
            xs = sorted({row[at] for row in rows})
            found = [[row[key] for row in rows if row[at] == x and row[key]] for x in xs]
            shown = [(x, fmean(values)) for x, values in zip(xs, found, strict=True) if values]
            ax.plot(*zip(*shown, strict=True), label=label, **_style(position))
            if key == "accuracy" and curve == "samples":
                level = fmean(p["accuracy"] for p in problems)
                ax.axhline(level, ls=":", lw=1, color=line_style(position)["color"])
        _finish(
            ax,
            key,
            label_x,
            sorted({row[at] for _, problems in groups for p in problems for row in p[curve]}),
        )
    _legend(figure, axes, len(keys))
    _save(figure, path, title)


def _spectra(problem: Problem, path: Path) -> None:
    figure, ax = plt.subplots(figsize=(6.2, 4), layout="constrained")
    for label, values in enumerate(problem["spectra"]["values"]):
        (line,) = ax.plot(range(1, len(values) + 1), values, lw=1, label=f"class {label}")
        rank = problem["spectra"]["ranks"][label]
        if rank <= len(values):
            ax.plot([rank], [values[rank - 1]], marker="o", ms=4, color=line.get_color())
    ax.set(yscale="log", xlabel="number", ylabel="eigenvalue / trace")
    title = f"{problem['name']} on {problem['data']}: class kernels of {problem['m']} points"
    ax.set_title(f"{title}; dots: rank at 5 %", fontsize=10)
    ax.grid(alpha=0.3)
    ax.legend(fontsize=7, ncols=2)
    _save(figure, path)


def _methods(problems: list[Problem], path: Path, title: str, keys: Sequence[str]) -> None:
    figure, axes = _panels(len(keys))
    sizes, m = sorted({row["s"] for p in problems for row in p["methods"]}), problems[0]["m"]
    for ax, key in zip(axes, keys, strict=False):
        for position, method in enumerate(_SHOWN):
            fit = "nystrom" if method == "als" else "sketch"
            points = []
            for s in sizes:
                found = [page.method_mean(p, method, s, key, fit) for p in problems]
                known = [value for value in found if value is not None]
                points += [(s, fmean(known))] if known else []
            if points:
                label = f"{method} (all labels)" if method == "als" else method
                ax.plot(*zip(*points, strict=True), label=label, **_style(position))
        if key in _QUALITY:
            level = fmean(p["full"][key] for p in problems)
            ax.axhline(level, color="black", lw=1, ls=":", label="all points")
        _finish(ax, key, "distilled gradients s", sizes)
        if key == keys[0]:
            top = ax.secondary_xaxis("top", functions=(lambda s: m / np.maximum(s, 1e-9),) * 2)
            top.set_xlabel("m / s")
    _legend(figure, axes, len(keys))
    _save(figure, path, title)


def _containment(ax: Axes, row: Mapping[str, Any]) -> None:
    values, random = np.array(row["cumulative"]), row["random_cumulative"]
    x = np.arange(1, values.shape[1] + 1)
    ax.fill_between(x, values.min(0), values.max(0), alpha=0.2, label="clusters, least to most")
    ax.plot(x, values.mean(0), label="mean")
    ax.plot(range(1, len(random) + 1), random, ls="--", color="black", lw=1, label="random partition, mean")
    ax.set(xlabel="global eigenvectors r", ylabel="local variance inside", ylim=(0, 1.02))
    ax.grid(alpha=0.3)


def _gap(ax: Axes, row: Mapping[str, Any]) -> None:
    for key, label, style in (
        ("alignment_max", "best cluster", {"color": "darkred", "lw": 1}),
        ("alignment_mean", "mean of clusters", {"color": "purple", "lw": 1}),
        ("union", "all clusters together", {"color": "C0"}),
        ("random_union", "random partition, together", {"color": "black", "lw": 1, "ls": "--"}),
    ):
        shown = row[key][: len(row["union"])]
        ax.plot(range(1, len(shown) + 1), shown, label=label, **style)
    ax.set(xlabel="global eigenvector", ylabel="covered", ylim=(0, 1.02))
    ax.set_title(
        f"left out: {100 * row['weighted_gap']:.1f} % of the variance, "
        f"{100 * row['mean_gap']:.0f} % per eigenvector",
        fontsize=8,
    )
    ax.grid(alpha=0.3)


def _variances(ax: Axes, row: Mapping[str, Any]) -> Any:
    return ax.imshow(np.array(row["variance"]), aspect="auto", cmap="viridis", vmax=0.2)


def _clusters(problem: Problem, path: Path) -> None:
    row = problem["clusters"][0]
    figure, axes = plt.subplots(3, 1, figsize=(7, 9), layout="constrained", height_ratios=(1, 0.8, 1))
    _containment(axes[0], row)
    figure.colorbar(_variances(axes[1], row), ax=axes[1])
    axes[1].set(xlabel="global eigenvector", yticks=range(len(row["variance"])), ylabel="cluster",
                title="share of a cluster's variance along each")  # fmt: skip
    _gap(axes[2], row)
    for ax in (axes[0], axes[2]):
        ax.legend(fontsize=8)
    title = f"{problem['name']} on {problem['data']}, class {row['class']}, rank {row['rank']} at 5 %"
    _save(figure, path, title)


def _all_classes(problem: Problem, path: Path) -> None:
    rows = [row for row in problem["clusters"] if "cumulative" in row]
    size = (2.6 * len(rows), 6.6)
    figure, axes = plt.subplots(3, len(rows), figsize=size, layout="constrained", sharey="row", squeeze=False)
    for column, row in enumerate(rows):
        _containment(axes[0, column], row)
        axes[0, column].set_title(f"class {row['class']}, rank {row['rank']}", fontsize=9)
        _variances(axes[1, column], row)
        _gap(axes[2, column], row)
        axes[2, column].set_title(f"{100 * row['weighted_gap']:.1f} % left out", fontsize=8)
        for ax in axes[:, column]:
            ax.set_xlabel("")
            if column:
                ax.set_ylabel("")
    axes[1, 0].set_ylabel("cluster")
    axes[0, -1].legend(fontsize=6)
    axes[2, -1].legend(fontsize=6)
    _save(figure, path)


def _settings(problem: Problem, path: Path) -> None:
    trials, front = problem["grid"]["trials"], set(problem["grid"]["frontier"])
    numbers = sorted({t["clusters"] for t in trials})
    size = (4.6 * len(numbers), 8)
    figure, axes = plt.subplots(2, len(numbers), figsize=size, layout="constrained", squeeze=False)
    for column, number in enumerate(numbers):
        own = [(i, t) for i, t in enumerate(trials) if t["clusters"] == number]
        variances, gaps = (sorted({t[key] for _, t in own}) for key in ("variance", "gap"))
        for ax, key in zip(axes[:, column], ("s", "fidelity"), strict=True):
            values = np.full((len(variances), len(gaps)), np.nan)
            for i, t in own:
                y, x = variances.index(t["variance"]), gaps.index(t["gap"])
                values[y, x] = np.log10(t["s"]) if key == "s" else t["fidelity"]
                text = f"{t['local']}+{t['gaps']}" if key == "s" else f"{t['fidelity']:.2f}"
                weight = "bold" if i in front else "normal"
                colour = "black" if key == "fidelity" and t["fidelity"] > 0.85 else "white"
                ax.text(x, y, text, ha="center", va="center", fontsize=7, fontweight=weight, color=colour)
                if i in front:
                    box = Rectangle((x - 0.5, y - 0.5), 1, 1, fill=False, edgecolor="red", lw=2)
                    ax.add_patch(box)
            low, high, colours = (0.3, 2.7, "viridis") if key == "s" else (0.4, 1.0, "cividis")
            ax.imshow(values, aspect="auto", cmap=colours, alpha=0.9, vmin=low, vmax=high)
            ax.set_xticks(range(len(gaps)), [f"{g:g}" for g in gaps])
            ax.set_yticks(range(len(variances)), [f"{v:g}" for v in variances])
            ax.set(xlabel="gap threshold", ylabel="variance threshold")
            what = "local + gap gradients" if key == "s" else "training fidelity"
            ax.set_title(f"H = {number}: {what}", fontsize=9)
    title = f"{problem['name']} on {problem['data']}: settings of Algorithm 1"
    _save(figure, path, f"{title}; boxed: none is smaller and fits better")


def _features(problems: list[Problem], path: Path) -> None:
    figure, axes = plt.subplots(1, 2, figsize=(9.5, 3.8), layout="constrained")
    rows = [row for p in problems for row in p["features"]]
    ridges, counts = (sorted({row[key] for row in problems[0]["features"]}) for key in ("ridge", "k"))
    for ax, key in zip(axes, ("accuracy", "mse"), strict=True):
        for position, ridge in enumerate(ridges):
            ys = [fmean(r[key] for r in rows if (r["k"], r["ridge"]) == (k, ridge)) for k in counts]
            ax.plot(counts, ys, label=f"ridge {ridge:g}", **_style(position))
        level = fmean(p["full"][key] for p in problems)
        ax.axhline(level, color="black", lw=1, ls=":", label="exact kernel")
        ax.axvline(problems[0]["m"], color="grey", lw=1, label="k = m")
        _finish(ax, key, "projected features k", counts)
    axes[0].legend(fontsize=8)
    _save(figure, path)


def _pareto(result: Result, path: Path) -> None:
    """Cost against fidelity, every choice of points at 20, 50 and 100 times fewer, and what nothing beats."""
    figure, axes = plt.subplots(1, 2, figsize=(13, 4.8), layout="constrained", sharey=True)
    for ax, key, stage, way, whole, label in (
        (axes[0], "jacobian_rows", page.STAGES[0], "", "projection",
         "Jacobian rows, those of the choice included"),
        (axes[1], "seconds", page.STAGES[2], "Galerkin", "projection + gradients",
         "CPU seconds, all three stages, everything included"),
    ):  # fmt: skip

        def at(wanted: Mapping[str, Any], key: str = key) -> list[tuple[float, float]]:
            """Return cost and what is lost, where there are any."""
            cost, kept = (page.headline_mean(result, name, **wanted) for name in (key, "fidelity"))
            return [] if cost is None or kept is None else [(cost, 1 - kept)]

        every: list[tuple[float, float]] = []
        for position, method in enumerate(page.METHODS):
            for balanced in (False, True):
                shared = {"method": method, "balanced": balanced, "stage": stage, "way": way}
                points = [p for ratio in page.ratios_of(result) for p in at({"ratio": ratio, **shared})]
                if points:
                    ax.plot(
                        *zip(*points, strict=True), label=method + (", balanced" if balanced else ""), lw=1,
                        color=f"C{position}", marker=marker(position), ms=5, ls="-" if balanced else ":",
                        mfc=None if balanced else "none",
                    )  # fmt: skip
                    every += points
        point = at({"method": "all", "stage": whole})
        ax.plot(*zip(*point, strict=True), "k*", ms=11, label="all images, projected")
        front: list[tuple[float, float]] = []
        for cost, lost in sorted([*every, *point]):
            if not front or lost < front[-1][1]:
                front.append((cost, lost))
        ax.step(*zip(*front, strict=True), where="post", color="black", lw=5, alpha=0.15, label="not beaten")
        ax.set(xscale="log", yscale="log", xlabel=label)
        ax.grid(alpha=0.3, which="both")
    axes[0].set_ylabel("1 - fidelity to the network")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right center", fontsize=8)
    seeds = page.seeds_of(result)
    title = f"CNN on {seeds[0]['data']}, n = {seeds[0]['n']:,}, mean of {len(seeds)} seeds"
    _save(figure, path, title)


def draw(result: Result, folder: Path) -> None:
    """Draw all figures."""
    folder.mkdir(parents=True, exist_ok=True)
    problems, every = page.whole_of(result), page.problems_of(result)
    label = f"CNN on {problems[0]['data']}, mean of {len(problems)} seeds"
    first = next((p for p in problems if "grid" in p), problems[0])

    def place(name: str) -> Path:
        return folder / f"distilled_{name}.png"

    titles = {
        "distilled points": "distilled points, pretrained network",
        "distilled data alone": "distilled points, network trained on them alone",
    }
    groups = [("real points, pretrained network", problems)]
    groups += [(titles[p["name"]], [p]) for p in every if p["name"] in titles]
    if page.ratios_of(result):
        _pareto(result, place("headline"))
    curve = ("samples", "m", "points", (*_QUALITY, "condition", "smallest"))
    rank = ("ranks", "rank", "rank of the cut-off", _QUALITY)
    _curves(groups, *curve, place("figure1"), f"{label}: regression on more and more points")
    _spectra(first, place("figure2"))
    title = f"{label}: regression on s distilled gradients and their own labels"
    _methods(problems, place("figure3"), title, (*_QUALITY, "condition", "smallest"))
    _clusters(first, place("figure4"))
    _curves(groups, *rank, place("figure5"), f"{label}: spectral cut-off")
    _methods(problems, place("figure6"), label, ("coverage", "centred", "reconstruction"))
    others = [p for p in every if p["name"].startswith(("mlp", "resnet"))]
    if others:
        named = [(f"{p['name']} on {p['data']}", [p]) for p in others]
        _curves(named, *curve, place("figure7a"), "other networks: more and more points")
        _curves(named, *rank, place("figure7b"), "other networks: spectral cut-off")
        _methods(others[-1:], place("figure7c"), f"{named[-1][0]}: distilled gradients", _QUALITY)
    _all_classes(first, place("figure8"))
    _settings(first, place("figure9"))
    _features(problems, place("features"))
