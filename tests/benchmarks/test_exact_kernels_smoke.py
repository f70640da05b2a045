"""The benchmark of exact kernels: what it times is right, and its page shows its own numbers."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest
import torch

ROOT = Path(__file__).parents[2]
STORED = ROOT / "benchmarks/results/exact_kernels.json"
KINDS = {"all", "trace", "each", "scalar", "diagonal"}


@pytest.fixture
def exact_kernels(load) -> ModuleType:
    return load("exact_kernels")


def require_times(entry: dict) -> None:
    for found in entry["time"].values():
        for clock in ("cpu_ms", "wall_ms"):
            assert 0 < found[clock]["min"] <= found[clock]["median"] <= found[clock]["max"]
    assert 0 < entry["ratio"]["cpu"]["min"] <= entry["ratio"]["cpu"]["max"]


def require_shape(result: dict) -> None:
    """Assert that a result is complete, and that nothing in it was timed without agreeing."""
    assert result["benchmark"] == "exact_kernels"
    assert result["environment"]["threads"] == 1
    for entry in result["kernels"]:
        require_times(entry)
        assert set(entry["time"]) == set(entry["agreement"]) == {"layerwise", "func"}
        assert entry["kind"] in KINDS and entry["func_chunk"] in (None, 8)
        assert max(entry["agreement"].values()) <= 1e-5
    for entry in result["peers"]:
        require_times(entry)
        assert set(entry["time"]) == {"layerwise", entry["peer"]}
    for entry in result["products"]:
        require_times(entry)
        assert entry["best"] in entry["time"] and entry["best"] not in entry["wrong"]
        assert set(entry["agreement"]) == set(entry["time"]) | set(entry["wrong"])
    for entry in result["paper"]:
        assert entry["ratio"] == pytest.approx(entry["products_s"] / entry["layerwise_s"], rel=1e-2)
        assert max(entry["agreement"].values(), default=0.0) <= 1e-5


@pytest.mark.long
def test_the_command_measures_the_smallest_case(
    exact_kernels: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "made" / "exact_kernels.json"
    assert exact_kernels.main(["--quick", "--parts", "mlp", "paper", "--no-memory", "--out", str(out)]) == 0
    text = out.read_text(encoding="utf-8")
    assert str(ROOT) not in text and str(Path.home()) not in text
    result = json.loads(text)
    require_shape(result)
    assert result["environment"]["torch"] == torch.__version__
    assert result["options"]["quick"] is True and result["targets"] == []
    assert {entry["kind"] for entry in result["kernels"]} == KINDS
    for entry in [*result["kernels"], *result["products"]]:
        assert entry["agreement"]["layerwise"] <= 5e-7
    hooks = {"nngeometry"} if importlib.util.find_spec("nngeometry") else set()
    assert {entry["peer"] for entry in result["peers"]} == {"tutorial"} | hooks
    assert [entry["columns"] for entry in result["products"]] == [1, 3]
    assert [entry["n"] for entry in result["paper"]] == [24, 64]
    assert all(entry["agreement"] and not entry["extrapolated"] for entry in result["paper"])
    capsys.readouterr()

    assert exact_kernels.main(["--markdown", str(out)]) == 0
    printed = capsys.readouterr().out
    assert printed.count("| mlp, small | 4 |") == len(KINDS)


@pytest.mark.parametrize("name", ["cnn", "resnet", "gru", "transformer"])
def test_every_network_agrees_with_its_float64_jacobians(exact_kernels: ModuleType, name: str) -> None:
    case = exact_kernels.KERNEL_CASES[name]
    model, x = case.make(quick=True, samples=2)
    exact = exact_kernels.reference(model, x)
    for kind in sorted(KINDS):
        wanted = exact_kernels.converted(exact, kind, 10)
        assert exact_kernels.distance(exact_kernels.ours(model, x, kind)(), wanted) <= 5e-7
        assert exact_kernels.distance(exact_kernels.contraction(model, x, kind, None)(), wanted) <= 5e-7


def test_a_wrong_kernel_is_not_timed(exact_kernels: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    case = exact_kernels.KERNEL_CASES["mlp"]
    exact = exact_kernels.reference(*case.make(quick=True))
    monkeypatch.setattr(exact_kernels, "interleaved", lambda *_: pytest.fail("timed"))
    with pytest.raises(RuntimeError, match=r"mlp all: layerwise differs by 1\.0e-04"):
        next(exact_kernels.measure_case(case, 4, ("all",), exact / 1.0001, quick=True, memory=False))


def test_the_work_whose_memory_is_measured_is_the_kernel(exact_kernels: ModuleType) -> None:
    exact = exact_kernels.reference(*exact_kernels.KERNEL_CASES["mlp"].make(quick=True))
    for variant in ("layerwise", "func"):
        found = exact_kernels.prepare_kernel(variant, "mlp", True, 4, "all", None)()
        assert exact_kernels.distance(found, exact) <= 5e-7


def test_targets_are_judged_on_medians_of_cpu_time(exact_kernels: ModuleType) -> None:
    def entry(kind: str, median: float) -> dict:
        spread = {"cpu": {"median": median}, "wall": {"median": 1e9}}
        peaks = {"layerwise": 10.0, "func": 99.0}
        found = {"model": "mlp", "samples": 32, "kind": kind, "ratio": spread, "memory_mb": peaks}
        return {**found, "agreement": {"layerwise": 3e-7}}

    kernels = [entry("all", 40.0), entry("trace", 29.9)]
    growth = [{"model": "mlp", "samples": [1, 2], "memory_mb": {"diagonal": [20.0, 26.0]}}]
    result = {"kernels": kernels, "peers": [], "products": [], "growth": growth, "paper": []}
    held = {(verdict["what"], verdict["of"]): verdict["held"] for verdict in exact_kernels.judge(result)}
    assert held == {
        ("CPU time of torch.func over ours, all outputs", "mlp, N = 32"): True,
        ("CPU time of torch.func over ours, traced", "mlp, N = 32"): False,
        ("peak memory of torch.func over ours, all outputs", "mlp, N = 32"): False,
        ("peak memory of torch.func over ours, traced", "mlp, N = 32"): False,
        ("largest over smallest peak memory, diagonal", "mlp, N = 1, 2"): False,
        ("relative Frobenius error of float32, worst", "mlp"): False,
    }


def test_the_stored_result_is_complete(exact_kernels: ModuleType) -> None:
    require_shape(json.loads(STORED.read_text(encoding="utf-8")))
