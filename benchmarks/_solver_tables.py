"""Tables of what solving took."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ["judge", "markdown"]

Rows = Sequence[Mapping[str, Any]]


def judge(rows: Rows, large: Mapping[str, Any], targets: Mapping[str, Any]) -> dict[str, bool]:
    """Return which targets are met, by the default preconditioner."""
    ours = [row for row in rows if row["preconditioner"] == "nystrom"]
    double = [row for row in ours if row["dtype"] == "float64"]
    plain = [row["columns"] for row in double if row["inputs"] == "plain"]
    others = [row["columns"] for row in double if row["inputs"] != "plain"]
    return {
        "every solve converged": all(row["converged"] for row in rows if row["preconditioner"]),
        "columns, first network, plain pixels": plain[0] <= targets["columns"],
        "columns, every network, plain pixels": max(plain) <= targets["columns"],
        "columns, every network, other scalings": max(others) <= targets["columns"],
        "float64 products of float32 systems": max(row["precise"] for row in ours) <= targets["precise"],
        "memory of the large solve": bool(large["converged"])
        and large["peak_megabytes"] <= targets["megabytes"],
    }


def _cell(rows: Rows, key: str) -> str:
    failed = "not met" if key == "columns" else "-"
    counts = key == "preconditioner_columns"
    return " / ".join(str(row[key]) if row["converged"] or counts else failed for row in rows)


def markdown(result: Mapping[str, Any]) -> str:
    """Return the tables of a result for docs/solvers.md."""
    rows, seeds = result["rows"], result["seeds"]
    lines = [
        f"Product columns to a relative residual of {result['tolerance']:g}, for the networks with seeds "
        f"{', '.join(map(str, seeds))}; n = {result['samples']}, relative ridge {result['ridge']:g}, rank "
        f"{result['rank']}. The columns that made the preconditioner are counted apart.",
        "",
        "| inputs | products | preconditioner | columns | of these float64 | to make the preconditioner |",
        "|:--|:--|:--|--:|--:|--:|",
    ]
    groups: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["inputs"], row["dtype"], row["preconditioner"]), []).append(row)
    for (inputs, dtype, name), group in groups.items():
        precise = _cell(group, "precise") if dtype == "float32" else "all"
        lines.append(
            f"| {inputs} | {dtype} | {name or 'none'} | {_cell(group, 'columns')} | {precise} | "
            f"{_cell(group, 'preconditioner_columns')} |"
        )
    large = result["large"]
    lines += [
        "",
        f"n = {large['samples']:,} by float32 products with nothing dense (tanh 64-{large['width']}-1, "
        f"{large['preconditioner_columns']} columns for the preconditioner): relative residual "
        f"{large['residual']:.1e} after {large['columns']} product columns, {large['precise']} of them "
        f"float64, in {large['seconds']:.0f} s; the process's peak was {large['peak_megabytes']} MB, "
        f"{large['start_megabytes']} MB of them before the solve.",
        "",
        "| what was asked | held |",
        "|:--|:--|",
    ]
    lines += [f"| {name} | {'yes' if met else 'no'} |" for name, met in result["met"].items()]
    return "\n".join(lines) + "\n"
