"""The benchmark of products measures what it says: variants that agree, in turn, on the same columns."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

ROOT = Path(__file__).parents[2]
PEERS = {"loop", "vmap", "double"}


@pytest.fixture
def products(load) -> ModuleType:
    return load("products")


def require_entry(entry: dict) -> None:
    """Assert that an entry is complete and consistent with itself."""
    variants = set(entry["time"])
    assert variants >= PEERS | {"fused", "dense"}
    assert variants == set(entry["agreement"]) == set(entry["memory_mb"])
    assert all(distance <= 1e-5 for distance in entry["agreement"].values())
    assert entry["n"] == 10 * entry["samples"]
    assert entry["engines"]["fused"]["engine"] == "autograd"
    for found in entry["time"].values():
        for clock in ("cpu_ms", "wall_ms"):
            assert 0 < found[clock]["min"] <= found[clock]["median"] <= found[clock]["max"]
    assert set(entry["ratios"]) == {f"{peer}/{ours}" for peer in PEERS for ours in variants - PEERS}
    for found in entry["ratios"].values():
        for clock in ("cpu", "wall"):
            assert 0 < found[clock]["min"] <= found[clock]["median"] <= found[clock]["max"]


@pytest.mark.parametrize("name", ["mlp", "cnn", "gru", "transformer"])
def test_all_variants_agree_on_every_network(products: ModuleType, name: str) -> None:
    entry = products.measure_case(products.CASES[name], 2, quick=True, repetitions=1, memory=False)
    require_entry(entry)
    assert (entry["model"], entry["columns"]) == (name, 2)
    for pair, found in entry["ratios"].items():  # one repetition: the ratio is that of the times
        above, below = pair.split("/")
        times = [entry["time"][variant]["cpu_ms"]["median"] for variant in (above, below)]
        assert found["cpu"]["median"] == pytest.approx(times[0] / times[1], rel=2e-3)


def test_variants_that_disagree_are_not_timed(products: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    right = products.PEERS["vmap"]
    wrong = lambda model, x: lambda vectors: 1.0001 * right(model, x)(vectors)  # noqa: E731
    monkeypatch.setitem(products.PEERS, "vmap", wrong)
    monkeypatch.setattr(products, "interleaved", lambda *_: pytest.fail("timed"))
    wrong_is = importlib.import_module("_measure").Disagreement
    with pytest.raises(wrong_is, match=r"mlp: vmap differs by 1\.0e-04"):
        products.measure_case(products.CASES["mlp"], 2, quick=True, repetitions=1, memory=False)


def test_the_command_writes_json_and_prints_tables(
    products: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "made" / "products.json"
    arguments = ["--quick", "--parts", "mlp", "--repetitions", "1", "--no-memory", "--out", str(out)]
    assert products.main(arguments) == 0
    assert "mlp, small" in capsys.readouterr().out
    text = out.read_text(encoding="utf-8")
    assert str(ROOT) not in text and str(Path.home()) not in text
    result = json.loads(text)
    assert result["environment"]["threads"] == 1
    assert result["environment"]["torch"] == torch.__version__
    assert result["options"]["quick"] is True
    assert [entry["columns"] for entry in result["cases"]] == list(products.QUICK_COLUMNS)
    for entry in result["cases"]:
        require_entry(entry)
    assert [entry["model"] for entry in result["setup"]] == ["mlp"]

    assert products.main(["--markdown", str(out)]) == 0
    printed = capsys.readouterr().out
    assert printed.count("| mlp, small | 40 | 1,754 |") == len(products.QUICK_COLUMNS)

    # Once more for another network: what is there stays, with its date.
    again = ["--quick", "--parts", "gru", "--repetitions", "1", "--no-memory", "--out", str(out)]
    assert products.main(again) == 0
    both = json.loads(out.read_text(encoding="utf-8"))["cases"]
    assert [entry["model"] for entry in both] == ["mlp"] * 2 + ["gru"] * 2
    assert [entry.get("date") for entry in both] == [result["date"]] * 2 + [None] * 2


def test_targets_are_judged_on_medians_of_cpu_time(products: ModuleType) -> None:
    def entry(columns: int, ratio: float) -> dict:
        spread = {"cpu": {"median": ratio}, "wall": {"median": 0.0}}
        return {"model": "m", "columns": columns, "ratios": {"loop/fused": spread, "vmap/fused": spread}}

    verdicts = products.judge({"cases": [entry(8, 1.49), entry(64, 0.9)]})
    assert [verdict["held"] for verdict in verdicts] == [False, True, True]
    assert [verdict["least"] for verdict in verdicts] == [1.5, 0.9, 0.9]


@pytest.mark.parametrize("variant", ["loop", "vmap", "double", "fused", "auto", "dense"])
def test_the_work_whose_memory_is_measured_is_the_product(products: ModuleType, variant: str) -> None:
    model, x = products.CASES["mlp"].make(quick=True)
    block = products.normal(10 * len(x), 2, seed=2)
    expected = products.product("loop", model, x)(block)
    results = products.prepare("mlp", True, variant, 2)()
    assert len(results) == (6 if variant == "auto" else 1)  # 10 outputs: 5 products settle it, and one more
    for result in results:
        assert float((result - expected).norm() / expected.norm()) <= 1e-5


def test_memory_of_a_product_is_measured_in_a_process_of_its_own(products: ModuleType) -> None:
    peak = products.peak_memory(products.prepare, "mlp", True, "fused", 2)
    assert 0 <= peak < 20 if sys.platform == "linux" else peak is None
