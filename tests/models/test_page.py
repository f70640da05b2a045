"""docs/models.md says what the tests hold the models to."""

from __future__ import annotations

from .library_rows import LIBRARY_ROWS
from .page import PAGE, rewritten
from .refusals import REFUSALS
from .torch_rows import TORCH_ROWS


def test_the_page_holds_the_tables() -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert page == rewritten(page), "run python -m tests.models.page"


def test_every_row_is_named_once() -> None:
    names = [row.name for row in (*TORCH_ROWS, *LIBRARY_ROWS, *REFUSALS)]
    assert len(set(names)) == len(names)


def test_every_exception_has_a_way_round() -> None:
    assert all(refusal.note for refusal in REFUSALS)
    assert all(row.note for row in (*TORCH_ROWS, *LIBRARY_ROWS) if row.mode == "reverse")
