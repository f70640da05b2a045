"""The benchmark of projections: it measures what it says, and holds its results to the bars."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from types import ModuleType

import pytest
import torch

ROOT = Path(__file__).parents[2]


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("projections")


def test_times_adjoints_and_bits(benchmark: ModuleType) -> None:
    entry = benchmark.measure_times(
        20_000, 64, repetitions=1, memory=False, names=("CountSketch", "SJLT", "RowSample", "Rademacher")
    )
    assert [found["map"] for found in entry["maps"]] == ["CountSketch", "SJLT", "RowSample", "Rademacher"]
    for found in entry["maps"]:
        assert 0 < found["passes"]["min"] <= found["passes"]["median"] <= found["passes"]["max"]
        assert found["adjoint"] <= benchmark.ADJOINT
        assert found["same_bits"] is (None if found["map"] == "Rademacher" else True)


def test_errors_on_gradients(benchmark: ModuleType) -> None:
    pytest.importorskip("sklearn")
    sizes = {"width": 16, "steps": 20, "samples": 4, "seeds": 4}
    for network in benchmark.NETWORKS:
        entry = benchmark.measure_quality(network, 64, names=("CountSketch", "SJLT", "SRHT"), **sizes)
        assert entry["gradients"] == 40 and 1 <= entry["expected_off"] <= 2**0.5
        for found in entry["maps"]:
            assert 0.5 <= found["off"] <= benchmark.ERROR


def test_the_reference_is_a_projection_made_block_by_block(benchmark: ModuleType) -> None:
    x = benchmark.block(3000)
    whole = benchmark.basic_projector(x, 250)
    assert torch.equal(benchmark.basic_projector(x, 250, blocks=1)[:, :100], whole[:, :100])
    lengths = whole.square().sum(1) / 250 / x.square().sum(1)
    assert float((lengths - 1).abs().max()) < 0.5


def test_shapes_hold_every_parameter(benchmark: ModuleType) -> None:
    for params in (20_000, 99_999, 11_000_000):
        assert benchmark.make("LayerKronecker", benchmark.layers(params), 512).shape == (512, params)


def test_the_command_writes_json_and_fills_a_page(
    benchmark: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stored = json.loads((ROOT / "benchmarks/results/projections.json").read_text(encoding="utf-8"))
    assert stored["options"]["quick"] is False and stored["benchmark"] == "projections"
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- projections -->\n<!-- /projections -->\nafter\n", encoding="utf-8")
    path = tmp_path / "made.json"
    path.write_text(json.dumps(stored), encoding="utf-8")
    assert benchmark.main(["--markdown", str(path)]) == 0
    printed = capsys.readouterr().out
    assert benchmark.main(["--markdown", str(path), "--page", str(page)]) == 0
    assert page.read_text(encoding="utf-8") == (
        f"before\n<!-- projections -->\n{printed}<!-- /projections -->\nafter\n"
    )
    assert printed in (ROOT / "docs/rooms/projections.md").read_text(encoding="utf-8")
