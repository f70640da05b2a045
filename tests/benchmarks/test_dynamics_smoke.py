"""The benchmark of training dynamics measures what it says."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("dynamics")


def test_small_runs_hold_what_does_not_hang_on_size(benchmark: ModuleType) -> None:
    found = benchmark.run(10, 120, 120, 1)
    assert found["targets"]["violations"]["held"] and found["targets"]["products"]["held"]
    for row in found["large"]:
        assert row["converged"] == (row["dtype"] == "float64")
        assert row["dtype"] == "float64" or row["rounding"] >= 1e4 * 2.0**-23
    for row in found["eigenbasis"]:
        assert row["error"] <= row["bound"]
