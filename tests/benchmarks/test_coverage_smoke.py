"""The benchmark of coverage: it counts what it says, and its table is made of its entries."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def coverage(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    # By its path: a package of the same name may be loaded.
    spec = importlib.util.spec_from_file_location("interval_coverage", ROOT / "benchmarks/coverage.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_small_run(coverage, tmp_path, capsys):
    out = tmp_path / "coverage.json"
    options = ["--size", "24", "--repetitions", "5", "--passes", "24", "--no-networks", "--spectra", "spike"]
    assert coverage.main([*options, "--methods", "sketch", "rhutch", "--out", str(out)]) == 0
    result = json.loads(out.read_text())
    assert {entry["quantity"] for entry in result["entries"]} == {
        "trace",
        "norm",
        "effective rank",
        "alignment",
        "inner",
    }
    assert all(0 <= entry["covered"] <= 5 == entry["repetitions"] for entry in result["entries"])
    assert not result["failures"]
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- coverage -->\n<!-- /coverage -->\nafter\n", encoding="utf-8")
    assert coverage.main(["--markdown", str(out), "--page", str(page)]) == 0
    assert "| trace | sketch | passes |" in page.read_text(encoding="utf-8")
    assert "Least coverage" in capsys.readouterr().out


def test_an_interval_that_misses_fails(coverage):
    def wrong(operator, **options):
        return coverage.ntkops.trace(operator) * 2.0

    entry = coverage.measure(wrong, [coverage.torch.eye(3)], 3.0, 20)
    assert entry["covered"] == 0 and coverage._failures([entry])
