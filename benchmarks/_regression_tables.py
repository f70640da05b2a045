"""Tables of what float32 leaves of a regression."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

__all__ = ["judge", "markdown"]


def judge(result: Mapping[str, Any]) -> dict[str, bool]:
    """Return which targets are met."""
    targets, fitted = result["targets"], [row for row in result["duals"] if row["refused"] is None]
    direct = [row for row in fitted if row["method"] != "cg"]
    ratio = targets["residual_ratio"]
    rows = result["near_duplicates"]
    outcomes = {(row["ridge"], row["method"]): row["outcome"] for row in rows}
    lost = [row for row in result["duals"] if row["params"] == "2.*" and row["ridge"] == 1e-6]
    return {
        "predictions of direct methods": max(row["predictions"] for row in direct) <= targets["predictions"],
        "reported residuals": all(
            row["reported"] / ratio <= row["residual"] <= ratio * row["reported"] for row in fitted
        ),
        "ridges that the kernel's rounding decides are refused": all(row["refused"] for row in lost),
        "no answer is wrong without a word": all(
            row["outcome"] != "silent" or row["error"] <= targets["silent"] for row in rows
        ),
        "direct methods agree on what they refuse": all(
            outcome == outcomes[ridge, "cholesky"]
            for (ridge, method), outcome in outcomes.items()
            if method == "eigh"
        ),
        "rounding of lazy products is covered": result["lazy_products"]["covered"] >= targets["coverage"],
    }


def _power(value: float) -> str:
    return f"{value:.0e}".replace("e-0", "e-")


def markdown(result: Mapping[str, Any]) -> str:
    """Return the tables of a result for docs/solvers.md."""
    lines = [
        f"A stored float32 kernel of {result['samples']} samples, 8-64-1, against the same kernel solved in "
        "float64: relative errors of predictions, and residuals of `dual_coef_`. The last column is what a "
        "dual rounded to float32 would give.",
        "",
        "| parameters | ridge | method | predictions | residual | reported | dual in float32 |",
        "|:--|--:|:--|--:|--:|--:|--:|",
    ]
    for row in result["duals"]:
        start = f"| {row['params']} | {_power(row['ridge'])} | {row['method']} |"
        if row["refused"]:
            lines.append(f"{start} refused | - | - | {row['rounded_dual']:.1e} |")
        else:
            lines.append(
                f"{start} {row['predictions']:.1e} | {row['residual']:.1e} | {row['reported']:.1e} | "
                f"{row['rounded_dual']:.1e} |"
            )
    lines += [
        "",
        "Inputs that differ by a hundredth, a convolution net: errors of fitted values against float64.",
        "",
        "| ridge | cholesky | eigh | cg |",
        "|--:|:--|:--|:--|",
    ]
    cells = {(row["ridge"], row["method"]): row for row in result["near_duplicates"]}
    for ridge in dict.fromkeys(row["ridge"] for row in result["near_duplicates"]):
        shown = []
        for method in ("cholesky", "eigh", "cg"):
            row = cells[ridge, method]
            error = "" if row["error"] is None else f"{row['error']:.1e}, "
            shown.append(f"{error}{row['outcome']}".replace(", silent", ""))
        lines.append(f"| {_power(ridge)} | {' | '.join(shown)} |")
    lazy, values = result["lazy_products"], result["eigenvalues"]
    lines += [
        "",
        f"Lazy float32 cross kernels of {lazy['cases']} random networks: `rounding_` covered the error in "
        f"{100 * lazy['covered']:.1f} %, in the median {lazy['bound_over_error']:.0f} times the error; one "
        f"product in place of two had {lazy['one_product_over_two']:.2g} times the error. Of "
        f"{values['kernels']} float32 kernels |E|₂ / (eps λmax) was {values['least']:.2f} to "
        f"{values['largest']:.2f}.",
        "",
        "| what was asked | held |",
        "|:--|:--|",
    ]
    lines += [f"| {name} | {'yes' if met else 'no'} |" for name, met in result["met"].items()]
    return "\n".join(lines) + "\n"
