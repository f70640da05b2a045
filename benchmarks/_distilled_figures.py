"""Figures 1 to 9 of the distilled-kernel paper, from a stored result."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import matplotlib

matplotlib.use("Agg")

import numpy as np  # noqa: E402
from _distilled_headline import METHODS, STAGES
from _distilled_targets import headline_mean, method_mean, problems_of, ratios_of, seeds_of, whole_of  # noqa: E402
from matplotlib import pyplot as plt  # noqa: E402
from matplotlib.axes import Axes  # noqa: E402
from matplotlib.patches import Rectangle  # noqa: E402

from ntkops.plotting._axes import line_style, marker  # noqa: E402

__all__ = ["draw"]

Result = Mapping[str, Any]
Problem = Mapping[str, Any]
_SHOWN = ("random", "leverage", "kmedoids", "fps", "algorithm 1", "pca", "krylov", "als")
_LABELS = {
    "accuracy": "test accuracy", "fidelity": "test fidelity", "mse": "mean squared error of the logits",
    "condition": "condition number", "smallest": "smallest eigenvalue / mean diagonal",
    "coverage": "variance covered, stacked", "centred": "variance covered, centred, mean of classes",
    "reconstruction": "reconstruction error",
}  # fmt: skip
_LOG = ("mse", "condition", "smallest", "reconstruction")


def _style(position: int) -> dict[str, Any]:
    return {**line_style(position), "marker": marker(position), "markersize": 4}


def _finish(ax: Axes, key: str, x: str) -> None:
    ax.set(xscale="log", xlabel=x, ylabel=_LABELS[key])
    if key in _LOG:
        ax.set_yscale("log")
    ax.grid(alpha=0.3)


def _save(figure: Any, path: Path) -> None:
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _over(problems: Sequence[Problem], curve: str, key: str, at: str) -> tuple[list[float], list[float]]:
    """Return a curve as the mean over networks."""
    xs = sorted({row[at] for p in problems for row in p[curve]})
    ys = [fmean(row[key] for p in problems for row in p[curve] if row[at] == x and row[key]) for x in xs]
    return xs, ys


def _groups(result: Result) -> list[tuple[str, list[Problem]]]:
    groups = [("real points, pretrained network", whole_of(result))]
    titles = {
        "distilled points": "distilled points, pretrained network",
        "distilled data alone": "distilled points, network trained on them alone",
    }
    return groups + [(titles[p["name"]], [p]) for p in problems_of(result) if p["name"] in titles]


def _panels(count: int) -> tuple[Any, Sequence[Axes]]:
    """Return axes in rows of three."""
    rows = -(-count // 3)
    figure, axes = plt.subplots(rows, 3, figsize=(13, 4 * rows), layout="constrained", squeeze=False)
    return figure, list(axes.flat)


def _legend(axes: Sequence[Axes], used: int, skip: str = "") -> None:
    """Put the legend into the panel that is left, or into the last one."""
    if len(axes) > used:
        axes[used].axis("off")
        axes[used].legend(*axes[0].get_legend_handles_labels(), loc="center")
    elif not skip:
        axes[used - 1].legend(fontsize=7)


def _samples(groups: list[tuple[str, list[Problem]]], path: Path, title: str) -> None:
    keys = ("accuracy", "fidelity", "mse", "condition", "smallest")
    figure, axes = _panels(len(keys))
    for ax, key in zip(axes, keys, strict=False):
        for position, (label, problems) in enumerate(groups):
            ax.plot(*_over(problems, "samples", key, "m"), label=label, **_style(position))
            if key in ("accuracy",):
                level = fmean(p["accuracy"] for p in problems)
                ax.axhline(level, ls=":", lw=1, color=line_style(position)["color"])
        _finish(ax, key, "points")
    _legend(axes, len(keys), groups[0][0] if len(groups) == 1 else "")
    figure.suptitle(title)
    _save(figure, path)


def _ranks(groups: list[tuple[str, list[Problem]]], path: Path, title: str) -> None:
    figure, axes = plt.subplots(1, 3, figsize=(12, 3.6), layout="constrained")
    for ax, key in zip(axes, ("accuracy", "fidelity", "mse"), strict=True):
        for position, (label, problems) in enumerate(groups):
            ax.plot(*_over(problems, "ranks", key, "rank"), label=label, **_style(position))
        _finish(ax, key, "rank of the cut-off")
    axes[0].legend(fontsize=7, loc="lower right")
    figure.suptitle(title)
    _save(figure, path)


def _spectra(problem: Problem, path: Path) -> None:
    figure, ax = plt.subplots(figsize=(6.2, 4), layout="constrained")
    for label, values in enumerate(problem["spectra"]["values"]):
        (line,) = ax.plot(range(1, len(values) + 1), values, lw=1, label=f"class {label}")
        rank = problem["spectra"]["ranks"][label]
        if rank <= len(values):
            ax.plot([rank], [values[rank - 1]], marker="o", ms=4, color=line.get_color())
    ax.set(yscale="log", xlabel="number", ylabel="eigenvalue / trace")
    ax.set_title(f"{problem['name']}: class kernels of {problem['m']} points; dots: rank at 5 %")
    ax.grid(alpha=0.3)
    ax.legend(fontsize=7, ncols=2)
    _save(figure, path)


def _methods(problems: list[Problem], path: Path, title: str, keys: Sequence[str]) -> None:
    figure, axes = _panels(len(keys))
    m = problems[0]["m"]
    for ax, key in zip(axes, keys, strict=False):
        for position, method in enumerate(_SHOWN):
            fit = "nystrom" if method == "als" else "sketch"
            sizes = sorted({row["s"] for p in problems for row in p["methods"] if row["method"] == method})
            points = []
            for s in sizes:
                found = [method_mean(p, method, s, key, fit) for p in problems]
                known = [value for value in found if value is not None]
                if known:
                    points.append((s, fmean(known)))
            if points:
                label = f"{method} (all labels)" if method == "als" else method
                ax.plot(*zip(*points, strict=True), label=label, **_style(position))
        if key in ("accuracy", "fidelity", "mse"):
            ax.axhline(
                fmean(p["full"][key] for p in problems), color="black", lw=1, ls=":", label="all points"
            )
        _finish(ax, key, "distilled gradients s")
        if key == keys[0]:
            top = ax.secondary_xaxis("top", functions=(lambda s: m / np.maximum(s, 1e-9),) * 2)
            top.set_xlabel("m / s")
    _legend(axes, len(keys))
    figure.suptitle(title)
    _save(figure, path)


def _clusters(problem: Problem, path: Path) -> None:
    row = problem["clusters"][0]
    figure, axes = plt.subplots(3, 1, figsize=(7, 9), layout="constrained", height_ratios=(1, 0.8, 1))
    _containment(axes[0], row)
    image = axes[1].imshow(np.array(row["variance"]), aspect="auto", cmap="viridis", vmax=0.2)
    axes[1].set(
        xlabel="global eigenvector",
        yticks=range(len(row["variance"])),
        ylabel="cluster",
        title="share of a cluster's variance along each",
    )
    figure.colorbar(image, ax=axes[1])
    _gap(axes[2], row)
    for ax in (axes[0], axes[2]):
        ax.legend(fontsize=8)
    figure.suptitle(f"{problem['name']}, class {row['class']}, rank {row['rank']} at 5 %")
    _save(figure, path)


def _containment(ax: Axes, row: Mapping[str, Any]) -> None:
    values = np.array(row["cumulative"])
    x = np.arange(1, values.shape[1] + 1)
    ax.fill_between(x, values.min(0), values.max(0), alpha=0.2, label="clusters, least to most")
    ax.plot(x, values.mean(0), label="mean")
    random = row["random_cumulative"]
    ax.plot(range(1, len(random) + 1), random, ls="--", color="black", lw=1, label="random partition, mean")
    ax.set(xlabel="global eigenvectors r", ylabel="local variance inside", ylim=(0, 1.02))
    ax.grid(alpha=0.3)


def _gap(ax: Axes, row: Mapping[str, Any]) -> None:
    x = range(1, len(row["union"]) + 1)
    ax.plot(x, row["alignment_max"], color="darkred", lw=1, label="best cluster")
    ax.plot(x, row["alignment_mean"], color="purple", lw=1, label="mean of clusters")
    ax.plot(x, row["union"], color="C0", label="all clusters together")
    ax.plot(
        x, row["random_union"][: len(x)], color="black", lw=1, ls="--", label="random partition, together"
    )
    ax.set(xlabel="global eigenvector", ylabel="covered", ylim=(0, 1.02))
    ax.set_title(
        f"left out: {100 * row['weighted_gap']:.1f} % of the variance, "
        f"{100 * row['mean_gap']:.0f} % per eigenvector",
        fontsize=8,
    )
    ax.grid(alpha=0.3)


def _all_classes(problem: Problem, path: Path) -> None:
    rows = [row for row in problem["clusters"] if "cumulative" in row]
    figure, axes = plt.subplots(
        3, len(rows), figsize=(2.6 * len(rows), 6.6), layout="constrained", sharey="row", squeeze=False
    )
    for column, row in enumerate(rows):
        _containment(axes[0, column], row)
        axes[0, column].set_title(f"class {row['class']}, rank {row['rank']}", fontsize=9)
        axes[1, column].imshow(np.array(row["variance"]), aspect="auto", cmap="viridis", vmax=0.2)
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
    figure, axes = plt.subplots(
        2, len(numbers), figsize=(4.6 * len(numbers), 8), layout="constrained", squeeze=False
    )
    for column, number in enumerate(numbers):
        own = [(i, t) for i, t in enumerate(trials) if t["clusters"] == number]
        variances = sorted({t["variance"] for _, t in own})
        gaps = sorted({t["gap"] for _, t in own})
        for line, key in enumerate(("s", "fidelity")):
            ax = axes[line, column]
            values = np.full((len(variances), len(gaps)), np.nan)
            for i, t in own:
                place = variances.index(t["variance"]), gaps.index(t["gap"])
                values[place] = np.log10(t["s"]) if key == "s" else t["fidelity"]
                text = f"{t['local']}+{t['gaps']}" if key == "s" else f"{t['fidelity']:.2f}"
                bold = "bold" if i in front else "normal"
                ax.text(
                    place[1],
                    place[0],
                    text,
                    ha="center",
                    va="center",
                    fontsize=7,
                    fontweight=bold,
                    color="white",
                )
                if i in front:
                    box = Rectangle((place[1] - 0.5, place[0] - 0.5), 1, 1, fill=False, edgecolor="red", lw=2)
                    ax.add_patch(box)
            limits = {"vmin": 0.4, "vmax": 1.0} if key == "fidelity" else {"vmin": 0.3, "vmax": 2.7}
            ax.imshow(values, aspect="auto", cmap="viridis" if key == "s" else "cividis", alpha=0.9, **limits)
            ax.set_xticks(range(len(gaps)), [f"{g:g}" for g in gaps])
            ax.set_yticks(range(len(variances)), [f"{v:g}" for v in variances])
            ax.set(xlabel="gap threshold", ylabel="variance threshold")
            what = "local + gap gradients" if key == "s" else "training fidelity"
            ax.set_title(f"H = {number}: {what}", fontsize=9)
    figure.suptitle("Settings of Algorithm 1; boxed: none is smaller and fits better")
    _save(figure, path)


def _features(problems: list[Problem], path: Path) -> None:
    figure, axes = plt.subplots(1, 2, figsize=(9.5, 3.8), layout="constrained")
    ridges = sorted({row["ridge"] for row in problems[0]["features"]})
    for ax, key in zip(axes, ("accuracy", "mse"), strict=True):
        for position, ridge in enumerate(ridges):
            ks = sorted({row["k"] for row in problems[0]["features"]})
            ys = [
                fmean(r[key] for p in problems for r in p["features"] if (r["k"], r["ridge"]) == (k, ridge))
                for k in ks
            ]
            ax.plot(ks, ys, label=f"ridge {ridge:g}", **_style(position))
        ax.axhline(fmean(p["full"][key] for p in problems), color="black", lw=1, ls=":", label="exact kernel")
        ax.axvline(problems[0]["m"], color="grey", lw=1, label="k = m")
        _finish(ax, key, "projected features k")
    axes[0].legend(fontsize=8)
    _save(figure, path)


def _pareto(result: Result, path: Path) -> None:
    """Cost against fidelity, every choice of points at 20, 50 and 100 times fewer, and what nothing beats."""
    seeds = seeds_of(result)
    ratios = ratios_of(result)
    figure, axes = plt.subplots(1, 2, figsize=(13, 4.8), layout="constrained", sharey=True)
    shown = (
        ("jacobian_rows", STAGES[0], "", "Jacobian rows, those of the choice included"),
        ("seconds", STAGES[2], "Galerkin", "CPU seconds, all three stages, everything included"),
    )
    for ax, (key, stage, way, label) in zip(axes, shown, strict=True):
        every: list[tuple[float, float]] = []
        for position, method in enumerate(METHODS):
            for balanced in (False, True):
                points = []
                for ratio in ratios:
                    at = {"ratio": ratio, "method": method, "balanced": balanced, "stage": stage, "way": way}
                    cost, kept = headline_mean(result, key, **at), headline_mean(result, "fidelity", **at)
                    if cost is not None and kept is not None:
                        points.append((cost, 1 - kept))
                if points:
                    style = {"color": f"C{position}", "marker": marker(position), "markersize": 5, "lw": 1,
                             "ls": "-" if balanced else ":", "mfc": None if balanced else "none"}  # fmt: skip
                    ax.plot(
                        *zip(*points, strict=True), label=method + (", balanced" if balanced else ""), **style
                    )
                    every += points
        at = {"method": "all", "stage": "projection" if key == "jacobian_rows" else "projection + gradients"}
        point = headline_mean(result, key, **at), 1 - (headline_mean(result, "fidelity", **at) or 0)
        ax.plot(*([value] for value in point), "k*", ms=11, label="all images, projected")
        front, best = [], float("inf")
        for cost, lost in sorted([*every, point]):
            if lost < best:
                front.append((cost, lost))
                best = lost
        ax.step(*zip(*front, strict=True), where="post", color="black", lw=5, alpha=0.15, label="not beaten")
        ax.set(xscale="log", yscale="log", xlabel=label)
        ax.grid(alpha=0.3, which="both")
    axes[0].set_ylabel("1 - fidelity to the network")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right center", fontsize=8)
    figure.suptitle(f"CNN on {seeds[0]['data']}, n = {seeds[0]['n']:,}, mean of {len(seeds)} seeds")
    _save(figure, path)


def draw(result: Result, folder: Path) -> None:
    """Draw all figures.

    Args:
        result: A result, new or read from JSON.
        folder: Where the PNG files go; made if it is missing.
    """
    folder.mkdir(parents=True, exist_ok=True)
    problems = whole_of(result)
    groups = _groups(result)
    label = f"CNN on {problems[0]['data']}"
    if ratios_of(result):
        _pareto(result, folder / "distilled_headline.png")
    _samples(groups, folder / "distilled_figure1.png", f"{label}: regression on more and more points")
    _spectra(problems[0], folder / "distilled_figure2.png")
    quality = ("accuracy", "fidelity", "mse")
    title = f"{label}, mean of the seeds: regression on s distilled gradients and their own labels"
    _methods(problems, folder / "distilled_figure3.png", title, (*quality, "condition", "smallest"))
    _clusters(problems[0], folder / "distilled_figure4.png")
    _ranks(groups, folder / "distilled_figure5.png", f"{label}: spectral cut-off")
    _methods(problems, folder / "distilled_figure6.png", f"{label}, mean of the seeds",
             ("coverage", "centred", "reconstruction"))  # fmt: skip
    others = [p for p in problems_of(result) if p["name"].startswith(("mlp", "resnet"))]
    named = [(f"{p['name']} on {p['data']}", [p]) for p in others]
    if named:
        _samples(named, folder / "distilled_figure7a.png", "other networks: more and more points")
        _ranks(named, folder / "distilled_figure7b.png", "other networks: spectral cut-off")
        _methods(
            others[-1:], folder / "distilled_figure7c.png", f"{named[-1][0]}: distilled gradients", quality
        )
    _all_classes(problems[0], folder / "distilled_figure8.png")
    _settings(problems[0], folder / "distilled_figure9.png")
    _features(problems, folder / "distilled_features.png")
