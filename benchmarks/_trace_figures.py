"""Figures 1 to 4 of the trace-estimation paper, from a stored result."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot as plt  # noqa: E402
from matplotlib.axes import Axes  # noqa: E402

from ntkops.plotting._axes import line_style, marker  # noqa: E402

__all__ = ["draw"]

# One colour and marker for a method, whoever's it is: the paper's are dashed, ours are solid.
_METHODS = ("hutch++", "rhutch", "fhutch", "sketch", "xtrace", "ntk-hutch++", "stratified", "auto", "reverse")
_COLOURS = plt.get_cmap("tab10").colors

_LABELS = {"frobenius_norm": "Frobenius norm", "effective_rank": "effective rank"}


def _curves(ax: Axes, problem: Mapping[str, Any], quantity: str, axis: str) -> None:
    for entry in (e for e in problem["curves"] if e["quantity"] == quantity):
        x = [point[axis] for point in entry["points"]]
        position = _METHODS.index(entry["method"])
        style: dict[str, Any] = {
            "color": _COLOURS[position],
            "marker": marker(position),
            "markersize": 4,
            "linewidth": 1.5,
            "linestyle": "--" if entry["by"] == "paper" else "-",
        }
        label = f"{entry['method']} ({'paper' if entry['by'] == 'paper' else 'ntkops'})"
        ax.plot(x, [point["error"] for point in entry["points"]], label=label, **style)
        low = [max(point["low"], 1e-9) for point in entry["points"]]
        ax.fill_between(x, low, [p["high"] for p in entry["points"]], color=style["color"], alpha=0.12, lw=0)
    ax.set_xscale("log")
    ax.set_yscale("log")
    ax.set_ylabel("relative error (median, quartiles)")
    ax.grid(alpha=0.3)


def _exact_line(ax: Axes, problem: Mapping[str, Any], quantity: str, products: float) -> None:
    ax.axvline(problem["exact_s"][quantity], color="black", lw=1.2, label="exact, layer structure")
    ax.axvline(products, color="black", lw=1.2, ls=":", label="exact, n products (extrapolated)")


def _trace_figure(problem: Mapping[str, Any], path: Path) -> None:
    figure, (left, right) = plt.subplots(1, 2, figsize=(13, 4.2), layout="constrained", sharey=True)
    _curves(left, problem, "trace", "passes")
    left.set_xlabel("passes (vjp + jvp)")
    _curves(right, problem, "trace", "seconds")
    _exact_line(right, problem, "trace", problem["n"] * problem["column_s"])
    right.set_xlabel("CPU seconds")
    right.set_ylabel("")
    figure.legend(*right.get_legend_handles_labels(), fontsize=8, loc="outside right center")
    figure.suptitle(f"trace: {problem['title']}")
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _speedup_figure(problems: list[Mapping[str, Any]], path: Path) -> None:
    figure, axes = plt.subplots(
        1, len(problems), figsize=(5.5 * len(problems), 4), layout="constrained", squeeze=False
    )
    for ax, problem in zip(axes[0], problems, strict=True):
        products = problem["n"] * problem["column_s"]
        for position, by in enumerate(("paper", "ntkops")):
            points = [
                (point["error"], products / point["seconds"])
                for entry in problem["curves"]
                if entry["quantity"] == "trace" and entry["by"] == by
                for point in entry["points"]
            ]
            best = sorted((e, max(s for f, s in points if f <= e)) for e, _ in points)
            label = "the paper's estimators, best of three" if by == "paper" else "ntkops, best estimator"
            ax.step(*zip(*best, strict=True), where="post", label=label, **line_style(position))
        ax.axhline(products / problem["exact_s"]["trace"], color="black", lw=1.2, label="ntkops, exact")
        ax.axhline(1, color="grey", lw=0.8)
        ax.set(xscale="log", yscale="log", title=problem["title"], xlabel="median relative error")
        ax.set_ylabel("times faster than n products")
        ax.invert_xaxis()
        ax.grid(alpha=0.3)
        ax.legend(fontsize=8)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _quantities_figure(problem: Mapping[str, Any], path: Path) -> None:
    names = [q for q in ("frobenius_norm", "alignment", "effective_rank") if q in problem["exact_s"]]
    if not names:
        return
    figure, axes = plt.subplots(
        1, len(names), figsize=(4.2 * len(names) + 2, 4), layout="constrained", sharey=True, squeeze=False
    )
    counts = {"frobenius_norm": 2, "effective_rank": 3, "alignment": 6}
    for ax, quantity in zip(axes[0], names, strict=True):
        _curves(ax, problem, quantity, "seconds")
        _exact_line(ax, problem, quantity, counts[quantity] * problem["n"] * problem["column_s"])
        ax.set(xlabel="CPU seconds", title=_LABELS.get(quantity, quantity))
        if ax is not axes[0, 0]:
            ax.set_ylabel("")
    figure.legend(*axes[0, -1].get_legend_handles_labels(), fontsize=8, loc="outside right center")
    figure.suptitle(problem["title"])
    figure.savefig(path, dpi=130)
    plt.close(figure)


def draw(result: Mapping[str, Any], folder: Path) -> None:
    """Draw the figures whose networks are in the result.

    Args:
        result: A result, new or read from JSON.
        folder: Where the PNG files go; made if it is missing.
    """
    folder.mkdir(parents=True, exist_ok=True)
    by_name = {problem["name"]: problem for problem in result["problems"]}
    both = [by_name[name] for name in ("mlp", "gru") if name in by_name]
    if both:
        _speedup_figure(both, folder / "trace_figure1.png")
    for name, number in (("mlp", "2"), ("gru", "3"), ("gru_printed", "3b")):
        if name in by_name:
            _trace_figure(by_name[name], folder / f"trace_figure{number}.png")
    if "classifier" in by_name:
        _quantities_figure(by_name["classifier"], folder / "trace_figure4.png")
    if "digits" in by_name:
        _quantities_figure(by_name["digits"], folder / "trace_figure4_digits.png")
