"""The benchmark of solvers: it measures what it says, and the page shows the stored result."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    pytest.importorskip("sklearn")
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("solvers")


@pytest.mark.parametrize("inputs", ["plain", "standardised", "normalised"])
def test_columns_are_counted_for_every_way(benchmark: ModuleType, inputs: str) -> None:
    rows = benchmark.columns_of(inputs, 0, 120, 24)
    assert len(rows) == 8
    for row in rows:
        assert row["converged"] and row["residual"] <= benchmark.TOLERANCE
        assert (row["precise"] > 0) == (row["dtype"] == "float32")
        if row["preconditioner"] is not None:
            assert row["preconditioner_columns"] == 24
    columns = {(row["dtype"], row["preconditioner"]): row["columns"] for row in rows}
    assert columns["float64", "nystrom"] < columns["float64", None]


def test_the_large_solve_is_lazy(benchmark: ModuleType) -> None:
    found = benchmark.large_solve(300)
    assert found["converged"] and found["residual"] <= benchmark.TOLERANCE
    assert found["peak_megabytes"] >= found["start_megabytes"] > 0


def test_the_page_shows_the_stored_result(
    benchmark: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stored = ROOT / "benchmarks/results/solvers.json"
    result = json.loads(stored.read_text(encoding="utf-8"))
    assert result["quick"] is False and result["benchmark"] == "solvers"
    assert result["met"]["every solve converged"] and result["met"]["memory of the large solve"]
    assert benchmark.main(["--markdown", str(stored)]) == 0
    printed = capsys.readouterr().out
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- solvers -->\n<!-- /solvers -->\nafter\n", encoding="utf-8")
    assert benchmark.main(["--markdown", str(stored), "--page", str(page)]) == 0
    assert printed.strip() in page.read_text(encoding="utf-8")
    assert printed.strip() in (ROOT / "docs/solvers.md").read_text(encoding="utf-8")
