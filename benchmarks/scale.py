"""Kernels of many samples: time and memory against N and against ranks, bytes sent, faults, and a cost sheet.

Run it with ``python benchmarks/scale.py``; docs/scale.md explains and shows the result.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from _measure import environment, one_thread
from _scale_process import cores
from _scale_ranks import measure_kill, measure_ranks
from _scale_stream import measure_streams
from _scale_tables import TARGETS, growth, judge, markdown
from _scale_workloads import cost_sheets, measure_machine, validate
from _tables import fill

__all__ = ["PARTS", "PLAN", "QUICK", "run"]

PARTS = ("streams", "ranks", "kill")
# What, samples, processes: the longest cases run once.
PLAN: dict[str, Any] = {
    "streams": (
        *(("trace, exact", count, 3) for count in (1000, 5000, 20_000, 50_000)),
        ("trace, exact", 100_000, 1),
        *(("trace, stratified", count, 3) for count in (1000, 5000, 20_000, 50_000)),
        *(("norm, sketch", count, 3) for count in (1000, 5000, 20_000)),
        ("norm, sketch", 50_000, 1),
        *(("norm, exact by tiles", count, 3) for count in (250, 500, 1000)),
    ),
    "compared": (5000, 50_000),
    "ranks": (("cnn", 2048), ("mlp", 4096)),
    "widths": (8, 32),
    "counts": (1, 2, 3, 4),
    "repetitions": 3,
    "kill": (3000, 20, 3),
}
QUICK: dict[str, Any] = {
    "streams": (
        *(("trace, exact", count, 1) for count in (250, 750)),
        *(("trace, stratified", count, 1) for count in (250, 750)),
        *(("norm, sketch", count, 1) for count in (250, 750)),
        ("norm, exact by tiles", 50, 1),
    ),
    "compared": (250, 750),
    "ranks": (("cnn", 60), ("mlp", 200)),
    "widths": (8,),
    "counts": (1, 2),
    "repetitions": 1,
    "kill": (120, 7, 1),
}


def _measured(part: str, plan: dict[str, Any]) -> list[dict[str, Any]]:
    if part == "streams":
        return measure_streams(plan["streams"])
    if part == "ranks":
        return measure_ranks(plan["ranks"], plan["widths"], plan["counts"], plan["repetitions"])
    return measure_kill(*plan["kill"])


def run(
    quick: bool = False,
    parts: Sequence[str] = PARTS,
    before: dict[str, Any] | None = None,
    note: str = "",
) -> dict[str, Any]:
    """Measure everything, or some parts of it.

    Args:
        quick: Smallest sizes.
        parts: What to measure.
        before: A result whose other parts are kept.
        note: Under what conditions it is measured.

    Returns:
        The result.
    """
    began, plan, kept = time.perf_counter(), QUICK if quick else PLAN, before or {}
    result: dict[str, Any] = {
        "benchmark": "scale",
        "date": datetime.now(UTC).date().isoformat(),
        "options": {
            "quick": quick,
            "compared": list(plan["compared"]),
            "cores": len(set(cores(64))),
            "note": note or kept.get("options", {}).get("note", ""),
        },
        "targets": TARGETS,
    }
    with one_thread():
        result["environment"] = environment()
    for part in PARTS:
        result[part] = _measured(part, plan) if part in parts else kept[part]
    # What the ranks are held to is measured with them.
    result["machine"] = measure_machine(quick, result["ranks"]) if "ranks" in parts else kept["machine"]
    result["validation"] = validate(result["machine"], result["streams"], result["ranks"])
    result["sheets"] = cost_sheets(result["machine"]["drawing"]["sphere"])
    result["growth"] = growth(result)
    result["met"] = judge(result)
    print(f"{time.perf_counter() - began:.0f} s")
    return result


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, or print the tables of a stored result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="small sizes: shows that it runs")
    parser.add_argument("--out", type=Path, default=None, help="JSON file to write")
    parser.add_argument(
        "--parts", nargs="+", choices=PARTS, default=PARTS, help="others are kept as in --out"
    )
    parser.add_argument("--note", default="", help="what the page is to say of the conditions")
    parser.add_argument("--markdown", type=Path, default=None, help="print the tables of this JSON")
    parser.add_argument("--page", type=Path, default=None, help="with --markdown: put them into this page")
    options = parser.parse_args(arguments)
    if options.markdown is not None:
        text = markdown(json.loads(options.markdown.read_text(encoding="utf-8")))
        if options.page is None:
            print(text, end="")
        else:
            page = options.page.read_text(encoding="utf-8")
            options.page.write_text(fill(page, "scale", text), encoding="utf-8")
        return 0
    before = None
    if set(options.parts) != set(PARTS):
        if options.out is None or not options.out.exists():
            parser.error("--parts needs --out, a stored result whose other parts are kept")
        before = json.loads(options.out.read_text(encoding="utf-8"))
        if before["options"]["quick"] != options.quick:
            parser.error(f"{options.out} was measured with other sizes (--quick)")
    result = run(options.quick, options.parts, before, options.note)
    print(markdown(result))
    if options.out is not None:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
