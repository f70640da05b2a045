"""The tables of the distilled-kernel benchmark in Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from _distilled_headline import METHODS, STAGES
from _distilled_targets import (
    CHANCE,
    CHOSEN,
    differences,
    headline_mean,
    method_mean,
    problems_of,
    ratios_of,
    seeds_of,
    whole_of,
)

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
    place, parts = result["environment"], result["parts"].values()
    return (
        f"Measured on {max(part['date'] for part in parts)}: {place['cpu']} ({place['platform']}), "
        f"{place['threads']} thread, Python {place['python']}, torch {place['torch']}, ntkops "
        f"{place['ntkops']}, relative ridge {result['options']['ridge']:g}. The headline is in "
        "float32, the rest in float64."
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
    headline = (_headline, _pairs, _savings) if ratios_of(result) else ()
    for make in (*headline, _networks, _methods, _features, _transfer, _inducing, _chain, _costs):
        lines += make(result)
    return "\n".join(lines).rstrip()


def _over_seeds(result: Result) -> str:
    seeds = seeds_of(result)
    first = seeds[0]
    return (
        f"{first['network']} ({first['parameters']:,} parameters) on {first['data']}, n = {first['n']:,}, "
        f"{first['tests']:,} test images, mean of {len(seeds)} seeds"
    )


def _cell(result: Result, **wanted: Any) -> str:
    """Return fidelity and R² as means over seeds."""
    found = [headline_mean(result, key, **wanted) for key in ("fidelity", "r2")]
    return " / ".join(f"{value:.3f}" for value in found if value is not None) or "-"


def _headline(result: Result) -> list[str]:
    """Every choice of points at every stage, and how many Jacobian rows it really saves."""
    full = seeds_of(result)[0]["n"] * 10
    shown = [
        (STAGES[0], ""),
        (STAGES[1], ""),
        *((STAGES[2], way) for way in ("Galerkin", "Krylov", "Algorithm 1")),
    ]
    head = ("points", "looks at", "Jacobian rows saved", *("data", "+ projection"),
            *(f"+ {way}" for _, way in shown[2:]), "CPU s, data", "CPU s, all stages")  # fmt: skip
    lines = []
    for ratio in ratios_of(result):
        rows = []
        for method, looks in METHODS.items():
            for balanced in (False, True):
                at = {"ratio": ratio, "method": method, "balanced": balanced}
                taken = headline_mean(result, "jacobian_rows", stage=STAGES[0], **at)
                if taken is None:
                    continue
                seconds = [
                    headline_mean(result, "seconds", stage=s, way=w, **at) for s, w in (shown[0], shown[2])
                ]
                rows.append([
                    method + (", balanced" if balanced else ""), looks,
                    f"{full / taken:.1f}x" if taken < full else "none: every Jacobian was made",
                    *(_cell(result, stage=stage, way=way, **at) for stage, way in shown),
                    *(f"{value:.1f}" for value in seconds if value is not None),
                ])  # fmt: skip
        trained = {"ratio": ratio, "stage": "trained on the points"}
        kept = headline_mean(result, "fidelity", **trained)
        if kept is not None:
            seconds = headline_mean(result, "seconds", **trained)
            rows.append(["network trained on WMDD's points alone: its own fidelity", "activations", "-",
                         f"{kept:.3f}", "-", "-", "-", "-", f"{seconds:.1f}", "-"])  # fmt: skip
        title = f"### {ratio} times fewer points: fidelity / R²"
        m = seeds_of(result)[0]["n"] // ratio
        lines += [title, "", f"{_over_seeds(result)}; m = {m} points.", "", *_grid(head, rows), ""]
    return lines


def _pairs(result: Result) -> list[str]:
    rows = []
    for ratio in ratios_of(result):
        for key in ("fidelity", "r2"):
            mean, low, high = differences(result, ratio, key)
            own, chance = (
                headline_mean(result, key, ratio=ratio, stage=STAGES[0], method=m, balanced=b)
                for m, b in (CHOSEN, CHANCE)
            )
            verdict = (
                "better than chance" if low > 0 else "worse than chance" if high < 0 else "no difference seen"
            )
            name = f"{ratio}x, {'R²' if key == 'r2' else key}"
            numbers = [f"{own:.4f}", f"{chance:.4f}", f"{mean:+.4f}", f"{low:+.4f} to {high:+.4f}"]
            rows.append([name, *numbers, verdict])
    head = ("points", f"{CHOSEN[0]}, balanced", "random, balanced", "difference", "95 % interval", "")
    return ["### Selection beside chance, paired by seed", "", f"{_over_seeds(result)}; data stage.", "",
            *_grid(head, rows), ""]  # fmt: skip


def _savings(result: Result) -> list[str]:
    """Cost as the paper counts it and as the processor does, stage by stage."""
    first = seeds_of(result)[0]
    n, parameters, classes = first["n"], first["parameters"], 10
    whole = {
        "jacobian_rows": n * classes, "kernel_flops": n**2 * parameters * classes,
        "gradient_bytes": 4 * n * parameters * classes, "kernel_bytes": 4 * classes * n**2,
        "solve_flops": classes * n**3 / 3,
    }  # fmt: skip
    rows = [["nothing distilled: counted, not run", "-", f"{whole['jacobian_rows']:,}",
             *(f"{whole[key]:.1e}" for key in list(whole)[1:]), "-"]]  # fmt: skip
    wanted = [(f"all images: {stage}", {"method": "all", "stage": stage})
              for stage in ("projection", "projection + gradients")]  # fmt: skip
    method, balanced = CHOSEN
    wanted += [
        (f"{ratio}x: {stage}" + (f" ({way})" if way else ""),
         {"method": method, "balanced": balanced, "ratio": ratio, "stage": stage, "way": way})
        for ratio in ratios_of(result)
        for stage, way in ((STAGES[0], ""), (STAGES[1], ""), (STAGES[2], "Galerkin"))
    ]  # fmt: skip
    for name, at in wanted:
        found = {key: headline_mean(result, key, **at) for key in (*whole, "seconds")}
        rows.append(
            [
                name,
                _cell(result, **at),
                f"{found['jacobian_rows']:,.0f} ({n * classes / found['jacobian_rows']:.0f}x)",
            ]
            + [f"{found[key]:.1e} ({whole[key] / found[key]:.2g}x)" for key in list(whole)[1:]]
            + [f"{found['seconds']:.1f}"]
        )
    head = ("run", "fidelity / R²", "Jacobian rows", "kernel flops, n²PC", "bytes of gradients",
            "bytes of kernels", "flops of the solve", "CPU s, everything")  # fmt: skip
    text = f"{_over_seeds(result)}; points by {method}, balanced. The test images cost the same in every run."
    return ["### Cost, as the paper counts it and in seconds", "", text, "", *_grid(head, rows), ""]


def _networks(result: Result) -> list[str]:
    rows = [
        [
            p["name"], p["data"], f"{p['parameters']:,}", f"{p['m']}", f"{p['accuracy']:.3f}",
            f"{p['full']['accuracy']:.3f}",
            f"{p['full']['fidelity']:.3f}", f"{p['full']['mse']:.3f}",
            f"{fmean(p['spectra']['ranks']):.0f} ({min(p['spectra']['ranks'])}-{max(p['spectra']['ranks'])})",
            f"{p['spectra']['mean_rank']}",
        ]
        for p in problems_of(result)
    ]  # fmt: skip
    head = ("network and seed", "data", "parameters", "m", "network accuracy", "regression accuracy",
            "fidelity", "mse", "rank at 5 %, class kernels", "mean kernel")  # fmt: skip
    return ["### Networks and full regression", "", *_grid(head, rows), ""]


def _methods(result: Result) -> list[str]:
    lines = []
    whole = whole_of(result)
    groups = [(f"CNN on {whole[0]['data']}, m = {whole[0]['m']}, mean of {len(whole)} seeds", whole)]
    groups += [
        (f"{p['name']} on {p['data']}, m = {p['m']}", [p]) for p in problems_of(result) if "galerkin" not in p
    ]
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
    problems = whole_of(result)
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
    problems = whole_of(result)
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
    problems = whole_of(result)
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
    for report in result["parts"]["chain"]["found"]["reports"]:
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
        for row in result["parts"]["costs"]["found"]
    ]
    sizes = result["parts"]["costs"]["found"][0]["sizes"]
    head = ("method", *(f"n = {n}, ms" for n in sizes), "exponent")
    return ["### Table 1: time of choosing, one kernel given", "", *_grid(head, rows), ""]
