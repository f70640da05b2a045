"""The benchmark of real networks runs on small ones, is right there, and its page shows the stored result."""

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
    return importlib.import_module("real_networks")


def test_every_network_is_measured_and_right(benchmark: ModuleType) -> None:
    result = benchmark.run(("vit", "resnet18", "gpt_lora", "gru_cell"), quick=True)
    assert [entry["model"] for entry in result["entries"]] == ["vit", "resnet18", "gpt_lora", "gru_cell"]
    for entry in result["entries"]:
        assert entry["error"] < 1e-5 and entry["agreement"] < 1e-5, entry["model"]
        assert entry["dense"]["seconds"] > 0 < entry["torch.func trace"]["seconds"]
    assert benchmark.run(("cell",), quick=True, seconds=-1)["left_out"] == ["cell float32"]
    assert "LoRA" in benchmark.markdown(result)


def test_the_page_shows_the_stored_result(benchmark: ModuleType) -> None:
    stored = json.loads((ROOT / "benchmarks/results/real_networks.json").read_text(encoding="utf-8"))
    assert benchmark.markdown(stored) in (ROOT / "docs/real_networks.md").read_text(encoding="utf-8")
