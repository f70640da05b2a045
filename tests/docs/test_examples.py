"""The examples in README and documentation run, and what they name exists."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest
import torch

import ntkops

ROOT = Path(__file__).parents[2]
PAGES = [
    ROOT / "README.md",
    *sorted((ROOT / "docs").glob("*.md")),
    *sorted((ROOT / "docs/rooms").glob("*.md")),
]
BLOCK = re.compile(r"^```python\n(.*?)^```$(?:\n\n```text\n(.*?)^```$)?", re.MULTILINE | re.DOTALL)
NUMBER = re.compile(r"-?\d+(?:\.\d+)?(?:[eE][-+]?\d+)?")


def page_name(page: Path) -> str:
    return str(page.relative_to(ROOT))


def blocks(page: Path) -> list[tuple[str, str | None]]:
    """Python blocks of a page and what the page says that they print.

    Each is preceded by blank lines, so that tracebacks give the page's line.
    """
    text = page.read_text(encoding="utf-8")
    return [
        ("\n" * text.count("\n", 0, found.start(1)) + found[1], found[2]) for found in BLOCK.finditer(text)
    ]


def assert_same_text(printed: str, written: str) -> None:
    """Words must be equal, and numbers to three digits: processors round differently."""
    assert NUMBER.split(" ".join(printed.split())) == NUMBER.split(" ".join(written.split())), printed
    for found, due in zip(NUMBER.findall(printed), NUMBER.findall(written), strict=True):
        assert float(found) == pytest.approx(float(due), rel=5e-3, abs=2e-3), printed


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page)], ids=page_name)
def test_examples_run_in_the_order_of_the_page(page: Path, capsys: pytest.CaptureFixture[str]) -> None:
    namespace: dict[str, object] = {"__name__": "example"}
    with torch.random.fork_rng(devices=[]):
        for block, written in blocks(page):
            capsys.readouterr()
            exec(compile(block, str(page), "exec"), namespace)
            if written is not None:
                assert_same_text(capsys.readouterr().out, written)


def test_the_start_pages_have_examples() -> None:
    assert blocks(ROOT / "README.md")
    assert blocks(ROOT / "docs/index.md")


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_names_in_prose_exist(page: Path) -> None:
    importlib.import_module("ntkops.gp")  # which needs gpytorch, and is not imported by itself
    names = set(re.findall(r"`(ntkops(?:\.\w+)+)", page.read_text(encoding="utf-8")))
    for name in sorted(names):
        found: object = ntkops
        for part in name.split(".")[1:]:
            assert hasattr(found, part), f"{page_name(page)} names {name}, which does not exist"
            found = getattr(found, part)


@pytest.mark.parametrize("page", [*PAGES, ROOT / ".ci/run"], ids=page_name)
def test_make_targets_exist(page: Path) -> None:
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    named = set(re.findall(r"(?:^|`)make ([a-z]+)", page.read_text(encoding="utf-8"), re.MULTILINE))
    assert named <= targets


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_links_between_files_lead_somewhere(page: Path) -> None:
    links = re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8"))
    for link in links:
        assert link.startswith("https://") or (page.parent / link).exists(), f"{page_name(page)}: {link}"
