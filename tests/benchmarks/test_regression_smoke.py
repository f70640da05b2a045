"""The benchmark of float32 regressions: it measures what it says, and the page shows the stored result."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("regression")


def test_it_measures_what_it_says(benchmark: ModuleType) -> None:
    fitted = [row for row in benchmark.duals(40) if row["refused"] is None]
    assert fitted and all(row["residual"] <= 2e-6 for row in fitted)
    assert max(row["rounded_dual"] for row in fitted) > 10 * max(row["predictions"] for row in fitted)
    assert {row["outcome"] for row in benchmark.near_duplicates(12)} <= {"silent", "warned", "refused"}
    assert benchmark.lazy_products(4)["covered"] >= 0.75
    assert 0 < benchmark.eigenvalues(10)["largest"] < 2


def test_the_page_shows_the_stored_result(benchmark: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    stored = ROOT / "benchmarks/results/regression.json"
    result = json.loads(stored.read_text(encoding="utf-8"))
    assert result["quick"] is False and result["benchmark"] == "regression" and all(result["met"].values())
    assert benchmark.main(["--markdown", str(stored)]) == 0
    assert capsys.readouterr().out.strip() in (ROOT / "docs/solvers.md").read_text(encoding="utf-8")
