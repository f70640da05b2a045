"""The tables of the distilled-kernel benchmark in Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from _distilled_targets import digits_of, method_mean

__all__ = ["markdown"]

Result = Mapping[str, Any]
_SIGNS = {"<=": "at most", ">=": "at least"}
_METHODS = (
    "random", "leverage", "kmedoids", "fps", "rpcholesky", "greedy", "algorithm 1", "algorithm 1, printed",
    "pca", "kmeans", "krylov", "galerkin", "als",
)  # fmt: skip


def _grid(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [
        "| " + " | ".join(head) + " |",
        "|" + "|".join([":--", *["--:"] * (len(head) - 1)]) + "|",
        *("| " + " | ".join(row) + " |" for row in rows),
    ]


def _head(result: Result) -> str:
    place = result["environment"]
    return (
        f"Measured on {result['date']}: {place['cpu']} ({place['platform']}), {place['threads']} thread, "
        f"Python {place['python']}, torch {place['torch']}, ntkops {place['ntkops']}, float64, relative "
        f"ridge {result['options']['ridge']:g}; {result['seconds']:.0f} s on the clock, "
        f"{result['cpu_seconds']:.0f} s of the processor."
    )


def markdown(result: Result) -> str:
    """Return the tables of a result in Markdown.

    Args:
        result: A result, new or read from JSON.

    Returns:
        Claims, targets, and the curves as tables.
    """
    lines = [_head(result), ""]
    if result["claims"]:
        rows = [[r["claim"], r["paper"], r["measured"], r["verdict"]] for r in result["claims"]]
        lines += ["### Claim by claim", "", *_grid(("claim", "paper", "measured", "verdict"), rows), ""]
    if result["targets"]:
        rows = [
            [
                t["what"],
                f"{_SIGNS[t['sense']]} {t['bound']:g}",
                f"{t['measured']:.3g}",
                "yes" if t["holds"] else "no",
            ]
            for t in result["targets"]
        ]
        lines += ["### What has to be reached", "", *_grid(("what", "bound", "measured", "holds"), rows), ""]
    for make in (_networks, _methods, _features, _transfer, _inducing, _chain, _costs):
        lines += make(result)
    return "\n".join(lines).rstrip()


def _networks(result: Result) -> list[str]:
    rows = [
        [
            p["name"], p["data"], f"{p['m']}", f"{p['accuracy']:.3f}", f"{p['full']['accuracy']:.3f}",
            f"{p['full']['fidelity']:.3f}", f"{p['full']['mse']:.3f}",
            f"{fmean(p['spectra']['ranks']):.0f} ({min(p['spectra']['ranks'])}-{max(p['spectra']['ranks'])})",
            f"{p['spectra']['mean_rank']}",
        ]
        for p in result["problems"]
    ]  # fmt: skip
    head = ("network", "data", "m", "network accuracy", "regression accuracy", "fidelity", "mse",
            "rank at 5 %, class kernels", "mean kernel")  # fmt: skip
    return ["### Networks and full regression", "", *_grid(head, rows), ""]


def _methods(result: Result) -> list[str]:
    lines = []
    groups = [("digits, mean of the networks", digits_of(result))]
    groups += [(f"{p['name']} ({p['data']})", [p]) for p in result["problems"] if "galerkin" not in p]
    for title, problems in groups:
        sizes = sorted({row["s"] for p in problems for row in p["methods"]})
        for key, fits in (("accuracy", ("sketch", "nystrom")), ("centred", ("sketch",))):
            if key == "centred" and len(problems) == 1:
                continue
            rows = []
            for method in _METHODS:
                for fit in fits:
                    cells = []
                    for s in sizes:
                        found = [method_mean(p, method, s, key, fit) for p in problems]
                        known = [value for value in found if value is not None]
                        cells.append(f"{fmean(known):.3f}" if known else "-")
                    if any(cell != "-" for cell in cells):
                        rows.append([method if key == "centred" else f"{method}, {fit}", *cells])
            name = "centred variance coverage" if key == "centred" else "accuracy"
            lines += [f"### {name[0].upper() + name[1:]}: {title}", "",
                      *_grid(("method", *(f"s = {s}" for s in sizes)), rows), ""]  # fmt: skip
    return lines


def _features(result: Result) -> list[str]:
    problems = digits_of(result)
    ridges = sorted({row["ridge"] for row in problems[0]["features"]})
    rows = []
    for k in sorted({row["k"] for row in problems[0]["features"]}):
        cells = []
        for ridge in ridges:
            found = [r for p in problems for r in p["features"] if (r["k"], r["ridge"]) == (k, ridge)]
            cells.append(
                f"{fmean(r['accuracy'] for r in found):.3f}, {fmean(r['mse'] for r in found):.2f}"
                + (" (warned)" if all(r["warned"] for r in found) else "")
            )
        rows.append([f"{k}", *cells])
    head = ("k", *(f"ridge {ridge:g}" for ridge in ridges))
    return [
        f"### Projected kernels, m = {problems[0]['m']}: accuracy, mean squared error",
        "",
        *_grid(head, rows),
        "",
    ]


def _transfer(result: Result) -> list[str]:
    problems = digits_of(result)
    keys = dict.fromkeys((row["method"], row["s"]) for row in problems[0]["transfer"])
    rows = []
    for method, s in keys:
        found = [r for p in problems for r in p["transfer"] if (r["method"], r["s"]) == (method, s)]
        rows.append(
            [f"{method}, {fmean(r['size'] for r in found):.0f}"]
            + [f"{fmean(r[key] for r in found):.3f}" for key in ("even_odd", "variance", "nystrom")]
        )
    head = ("set, s", "accuracy, even or odd", "error of posterior variances", "error of the Nyström kernel")
    return ["### Beyond the targets", "", *_grid(head, rows), ""]


def _inducing(result: Result) -> list[str]:
    problems = digits_of(result)
    kinds = dict.fromkeys(row["kind"] for row in problems[0]["inducing"])
    rows = []
    for kind in kinds:
        found = [r for p in problems for r in p["inducing"] if r["kind"] == kind]
        count = len({p["name"] for p in problems if any(r["kind"] == kind for r in p["inducing"])})
        rows.append(
            [f"{kind} ({count})"]
            + [
                f"{fmean(r[key] for r in found):.3f}"
                for key in ("gap", "coverage", "accuracy", "fidelity", "mse")
            ]
            + [f"{fmean(r['seconds'] for r in found):.2g}"]
        )
    head = ("points (networks)", "share of tr K left out", "coverage of test gradients", "accuracy",
            "fidelity", "mse", "seconds")  # fmt: skip
    title = f"### {problems[0]['inducing'][0]['points']} points for the kernel of {problems[0]['m']}"
    return [title, "", *_grid(head, rows), ""]


def _chain(result: Result) -> list[str]:
    lines: list[str] = []
    for report in result["chain"]["reports"]:
        named = [("stages: " + (" + ".join(r["stages"]) or "none"), r) for r in report["stages"]]
        named += [(f"without {name}", r) for name, r in report["ablations"].items()]
        rows = [
            [
                name, f"{r['num_points']}", f"{r['num_features']}", f"{r['num_gradients']}",
                f"{r['accuracy']:.3f}", f"{r['fidelity']:.3f}", f"{r['passes']}",
                f"{r['jacobian_rows']:,}", f"{r['gradient_bytes'] / 1e6:,.2f}",
                f"{r['kernel_bytes'] / 1e6:,.2f}", f"{r['solve_flops']:.1e}",
                " / ".join(f"{step['seconds']:.2g}" for step in r["steps"]),
            ]
            for name, r in named
        ]  # fmt: skip
        head = ("run", "points", "features", "gradients", "accuracy", "fidelity", "passes", "Jacobian rows",
                "gradients, MB", "kernels, MB", "solve, flops", "seconds of each step")  # fmt: skip
        lines += [f"### The chain: {report['points']} points, {report['way']}", "", *_grid(head, rows), ""]
    return lines


def _costs(result: Result) -> list[str]:
    rows = [
        [row["method"], *(f"{1e3 * t:.3g}" for t in row["seconds"]), f"{row['growth']:.2f}"]
        for row in result["costs"]
    ]
    sizes = result["costs"][0]["sizes"]
    head = ("method", *(f"n = {n}, ms" for n in sizes), "exponent")
    return ["### Table 1: time of choosing, one kernel given", "", *_grid(head, rows), ""]
