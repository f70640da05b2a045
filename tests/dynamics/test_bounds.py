"""Bounds of some dozens of random problems; the benchmark goes through ten thousand."""

import importlib
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]


@pytest.fixture
def benchmark(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("dynamics")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
def test_bounds_hold_on_random_spectra(benchmark, dtype):
    found = benchmark.violations(20, dtype, first=7)
    assert found["violations"] == [] and found["bounds"] >= 80
    if dtype == torch.float64:
        assert found["ratios"]["outputs"]["q50"] <= 3
