"""The benchmark of projections: it measures what it says, and holds its results to the bars."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch


@pytest.fixture
def benchmark(load) -> ModuleType:
    return load("projections")


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
