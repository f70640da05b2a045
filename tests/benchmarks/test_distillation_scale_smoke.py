"""The benchmark of the chain at scale: it measures what it says, and the page shows the stored result."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType

import pytest
import torch

ROOT = Path(__file__).parents[2]
STORED = ROOT / "benchmarks/results/distillation_scale.json"


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("distillation_scale")


def test_images_are_shifted_copies(benchmark: ModuleType) -> None:
    x, y, x_test, y_test = benchmark.images(None, 700)
    assert x.shape == (700, 1, 28, 28) and len(x_test) == len(y_test) == 120
    assert torch.equal(y[:220], y[480:])
    assert not torch.equal(x[:220], x[480:])
    torch.testing.assert_close(x[:220].sum((1, 2, 3)), x[480:].sum((1, 2, 3)))


@pytest.mark.parametrize("memmap", [False, True])
def test_a_chain_is_measured(benchmark: ModuleType, memmap: bool) -> None:
    row = benchmark.chain_at(None, 300, 0, memmap)
    assert row["parameters"] == 2410 and row["n"] == 300 and row["k"] == 75
    assert [run["stages"] for run in row["runs"]] == [["projection"], ["projection", "gradients"]]
    assert row["cpu_s"] > 0 and (row["peak_mb"] is None or row["peak_mb"] >= 0)
    held = benchmark.met({"chain": [row | {"memmap": False}]})
    assert all(held.values()) or row["peak_mb"] is None
    assert "300" in benchmark.tables({"chain": [row | {"peak_mb": 1.0}]})


def test_a_miss_is_told(benchmark: ModuleType) -> None:
    row = {"memmap": False, "peak_mb": 2001.0, "cpu_s": 901.0}
    routes = [
        {"route": "leverage", "n": 9, "peak_mb": 9.0},
        {"route": "kmedoids", "n": 9, "peak_mb": 9.0, "refused": None},
    ]
    held = benchmark.met({"chain": [row], "routes": routes})
    assert list(held.values()) == [False, False, True, False]
