"""The tables of docs/models.md, made from the rows: ``python -m tests.models.page`` writes them anew."""

from __future__ import annotations

import re
from pathlib import Path

from .layers import HOW, LAYERS, OPERATIONS
from .library_rows import LIBRARY_ROWS
from .refusals import REFUSALS
from .rows import Refusal, Row
from .torch_rows import TORCH_ROWS

PAGE = Path(__file__).parents[2] / "docs" / "models.md"


def _cells(*cells: str) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _row(row: Row) -> str:
    precision = str(row.precision).removeprefix("torch.")
    return _cells(row.name, row.engine, row.mode, row.samples, precision, row.note)


def _refusal(refusal: Refusal) -> str:
    return _cells(refusal.name, f"`{refusal.error.__name__}`", refusal.note)


def _table(head: tuple[str, ...], lines: list[str]) -> str:
    return "\n".join([_cells(*head), "|" + "---|" * len(head), *lines])


_BECAUSE = {
    "rows": "torch is wrong under vmap inside vmap",
    "loop": "an operation has no batching rule, or one that fails",
    "double": "no forward mode",
    "reverse": "neither forward mode nor double backward",
}


def _layers() -> str:
    """Return which layers and operations are not computed in the usual way, and why."""
    groups: dict[tuple[str, str], list[str]] = {}
    for name, how in HOW.items():
        groups.setdefault(how, []).append(f"`{name}`" if name in LAYERS else name)
    lines = [
        _cells(mode, samples, _BECAUSE.get(mode, _BECAUSE.get(samples, "")), ", ".join(names))
        for (mode, samples), names in groups.items()
    ]
    usual = f"the other {len(LAYERS) + len(OPERATIONS) - len(HOW)}"
    head = ("mode", "samples", "because", "layers of torch.nn, and operations")
    return _table(head, [_cells("forward", "vmap", "", usual), *lines])


def tables() -> dict[str, str]:
    """Return each table of the page under its name."""
    head = ("model", "engine", "mode", "samples", "precision", "way round")
    return {
        "torch": _table(head, [_row(row) for row in TORCH_ROWS]),
        "libraries": _table(head, [_row(row) for row in LIBRARY_ROWS]),
        "layers": _layers(),
        "refused": _table(("model", "exception", "way out"), [_refusal(r) for r in REFUSALS]),
    }


def rewritten(page: str) -> str:
    """Return the page with its tables made anew, between their comments."""
    for name, table in tables().items():
        pattern = rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)"
        page, count = re.subn(
            pattern, lambda found, t=table: f"{found[1]}\n{t}\n\n{found[2]}", page, flags=re.DOTALL
        )
        if count != 1:
            raise ValueError(f"{PAGE.name} has {count} places for the table {name!r}, not one")
    return page


if __name__ == "__main__":
    PAGE.write_text(rewritten(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
