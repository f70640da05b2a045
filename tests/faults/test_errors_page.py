"""The page of errors has every exception, with its bases as they are."""

import re
from pathlib import Path

import pytest

from ntkops import errors

PAGE = Path(__file__).parents[2] / "docs" / "errors.md"
ROWS = {
    match[1]: [cell.strip() for cell in match[0].strip().strip("|").split("|")]
    for match in re.finditer(r"^\| `(\w+)` \|.*$", PAGE.read_text(encoding="utf-8"), flags=re.M)
}
PUBLIC = [name for name in errors.__all__ if name not in ("NtkopsError", "NtkopsWarning")]


@pytest.mark.parametrize("name", PUBLIC)
def test_every_exception_has_its_row(name):
    assert name in ROWS and all(ROWS[name]), name
    kind = getattr(errors, name)
    if issubclass(kind, Warning):
        assert len(ROWS[name]) == 3
        return
    assert len(ROWS[name]) == 5
    bases = re.findall(r"`(\w+)`", ROWS[name][1])
    for base in bases:
        found = getattr(errors, base, None) or __builtins__[base]
        assert issubclass(kind, found), (name, base)
    assert bases and issubclass(kind, errors.NtkopsError) and kind.__doc__


def test_no_row_is_left_over():
    assert set(ROWS) == set(PUBLIC)
    text = PAGE.read_text(encoding="utf-8")
    assert "`NtkopsError`" in text and "`NtkopsWarning`" in text


def test_none_that_guards_memory_or_accuracy_is_a_runtime_error():
    assert not any(issubclass(getattr(errors, name), RuntimeError) for name in errors.__all__)
