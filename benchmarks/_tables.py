"""The result of a benchmark as a table: on the terminal, and in Markdown."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ["fill", "markdown", "show"]

Row = Sequence[str]

_WIDTH = 130  # where the output goes into a file
_VARIANTS = ("loop", "vmap", "double", "fused", "auto", "dense")
_RATIOS = ("loop/fused", "vmap/fused")
_TIMES = ("Network", "n", "P", "k", *_VARIANTS, *_RATIOS)
_MEMORY = ("Network", "k", *_VARIANTS)
_SETUP = ("Network", "operator", "operator and 8 columns", "dense block", "pays after")


def time_rows(result: Mapping[str, Any]) -> list[Row]:
    """Return CPU milliseconds a column, and ratios with their range."""
    rows = []
    for case in result["cases"]:
        columns = case["columns"]
        times = [
            _number(case["time"][variant]["cpu_ms"]["median"] / columns) if variant in case["time"] else "-"
            for variant in _VARIANTS
        ]
        ratios = [_range(case["ratios"][key]["cpu"]) for key in _RATIOS]
        rows.append((case["title"], str(case["n"]), f"{case['parameters']:,}", str(columns), *times, *ratios))
    return rows


def memory_rows(result: Mapping[str, Any]) -> list[Row]:
    """Return peak megabytes of each variant."""
    return [
        (case["title"], str(case["columns"]), *(_megabytes(case["memory_mb"].get(v)) for v in _VARIANTS))
        for case in result["cases"]
    ]


def setup_rows(result: Mapping[str, Any]) -> list[Row]:
    """Return set-up times, and after how many fused columns the dense block has paid for itself."""
    rows = []
    for entry in result["setup"]:
        measured = [case for case in result["cases"] if case["model"] == entry["model"]]
        case = min(measured, key=lambda case: abs(case["columns"] - 8))
        block = entry["dense_block"]["cpu_ms"]["median"]
        column = case["time"]["fused"]["cpu_ms"]["median"] / case["columns"]
        times = [entry[key]["cpu_ms"]["median"] for key in ("operator", "operator_and_block")]
        rows.append((case["title"], *map(_number, times), _number(block), f"{block / column:.0f} columns"))
    return rows


def markdown(result: Mapping[str, Any]) -> str:
    """Return the tables of a result in Markdown."""
    place = result["environment"]
    lines = [
        f"Measured on {result['date']}: {place['cpu']} ({place['platform']}, {place['cpu_capability']}), "
        f"{_threads(place)}, Python {place['python']}, torch {place['torch']}, linear_operator "
        f"{place['linear_operator']}, ntkops {place['ntkops']}, {result['options']['dtype']}, "
        f"{result['options']['repetitions']} repetitions.",
        "",
        "CPU milliseconds a column (medians), and ratios with their smallest and largest repetition:",
        "",
        *_grid(_TIMES, time_rows(result), left=1),
        "",
        "Peak memory of one call in MB, above what was resident before it:",
        "",
        *_grid(_MEMORY, memory_rows(result), left=1),
        "",
        "What comes before the first product, in CPU milliseconds:",
        "",
        *_grid(_SETUP, setup_rows(result), left=1),
    ]
    if result["targets"]:
        lines += ["", "Targets, for the median ratio of CPU times:", "", *_verdicts(result["targets"])]
    return "\n".join(lines)


def _verdicts(targets: Sequence[Mapping[str, Any]]) -> list[str]:
    """Say of each target on which networks it is missed."""
    lines = []
    for ratio, columns, least in dict.fromkeys((t["ratio"], t["columns"], t["least"]) for t in targets):
        same = [t for t in targets if (t["ratio"], t["columns"]) == (ratio, columns)]
        missed = [f"{t['model']} ({t['median']:.2f})" for t in same if not t["held"]]
        verdict = f"missed on {', '.join(missed)}" if missed else "held on every network"
        lines.append(f"- {ratio} at least {least} at k = {columns}: {verdict}.")
    return lines


def fill(page: str, name: str, table: str) -> str:
    """Return a page with the text between the comments ``name`` and ``/name`` replaced.

    Raises:
        ValueError: If the page does not have both comments.
    """
    first, last = f"<!-- {name} -->\n", f"<!-- /{name} -->"
    before, found, rest = page.partition(first)
    _, closed, after = rest.partition(last)
    if not (found and closed):
        raise ValueError(f"the page needs the comments {first.strip()} and {last}")
    return f"{before}{first}{table.strip()}\n{last}{after}"


def show(result: Mapping[str, Any]) -> None:
    """Print the tables, with rich where it is installed, and which targets are held."""
    tables = [
        ("CPU milliseconds a column", _TIMES, [_without_ranges(row) for row in time_rows(result)]),
        ("Peak memory in MB", _MEMORY, memory_rows(result)),
        ("Set-up in CPU milliseconds", _SETUP, setup_rows(result)),
    ]
    try:
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        for title, header, rows in tables:
            print("\n".join(["", title, *_grid(header, rows, left=1)]))
    else:
        for title, header, rows in tables:
            table = Table(title=title)
            for position, name in enumerate(header):
                table.add_column(name, justify="left" if position == 0 else "right")
            for row in rows:
                table.add_row(*row)
            Console(width=None if sys.stdout.isatty() else _WIDTH).print(table)
    for target in result["targets"]:
        print(
            f"{'held  ' if target['held'] else 'MISSED'} {target['model']}, k = {target['columns']}: "
            f"{target['ratio']} = {target['median']:.2f}, at least {target['least']}"
        )


def _grid(header: Row, rows: Sequence[Row], left: int) -> list[str]:
    rule = [":--" if position < left else "--:" for position in range(len(header))]
    return [f"| {' | '.join(row)} |" for row in (header, rule, *rows)]


def _megabytes(value: float | None) -> str:
    return "-" if value is None else f"{value:.0f}"


def _number(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def _without_ranges(row: Row) -> Row:
    """Keep of each ratio its median, so that the row fits a terminal."""
    return [cell.split(" (")[0] for cell in row]


def _range(values: Mapping[str, float]) -> str:
    return f"{values['median']:.2f} ({values['min']:.2f} - {values['max']:.2f})"


def _threads(place: Mapping[str, Any]) -> str:
    count = "one thread" if place["threads"] == 1 else f"{place['threads']} threads"
    return f"{count} on one processor" if place["pinned"] else count
