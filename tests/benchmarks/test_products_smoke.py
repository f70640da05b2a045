"""The benchmark of products: it measures what it says, and its numbers in the documentation are its own."""

from __future__ import annotations

import functools
import importlib
import json
import operator
import os
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

ROOT = Path(__file__).parents[2]
STORED = ROOT / "benchmarks/results/products.json"
PEERS = {"loop", "vmap", "double"}


@pytest.fixture
def products(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("products")


@pytest.fixture
def measure(products: ModuleType) -> ModuleType:
    return importlib.import_module("_measure")


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
    with pytest.raises(products.Disagreement, match=r"mlp: vmap differs from the loop by 1\.0e-04"):
        products.measure_case(products.CASES["mlp"], 2, quick=True, repetitions=1, memory=False)


def test_the_command_writes_json_and_prints_tables(
    products: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "made" / "products.json"
    arguments = ["--quick", "--models", "mlp", "--repetitions", "1", "--no-memory", "--out", str(out)]
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

    page = tmp_path / "page.md"
    page.write_text("before\n<!-- products -->\n<!-- /products -->\nafter\n", encoding="utf-8")
    for _ in range(2):  # into an empty place, then over what is there
        assert products.main(["--markdown", str(out), "--page", str(page)]) == 0
        filled = page.read_text(encoding="utf-8")
        assert filled == f"before\n<!-- products -->\n{printed}<!-- /products -->\nafter\n"
    with pytest.raises(ValueError, match="needs the comments"):
        products.fill("no place", "products", printed)


def test_targets_are_judged_on_medians_of_cpu_time(products: ModuleType) -> None:
    def entry(columns: int, ratio: float) -> dict:
        spread = {"cpu": {"median": ratio}, "wall": {"median": 0.0}}
        return {"model": "m", "columns": columns, "ratios": {"loop/fused": spread, "vmap/fused": spread}}

    verdicts = products._judge([entry(8, 1.49), entry(64, 0.9)])
    found = {(v["ratio"], v["columns"]): v["held"] for v in verdicts}
    assert found == {("loop/fused", 8): False, ("vmap/fused", 8): True, ("vmap/fused", 64): True}
    lines = importlib.import_module("_tables")._verdicts(verdicts)
    assert lines == [
        "- loop/fused at least 1.5 at k = 8: missed on m (1.49).",
        "- vmap/fused at least 0.9 at k = 8: held on every network.",
        "- vmap/fused at least 0.9 at k = 64: held on every network.",
    ]


def test_repetitions_are_interleaved_there_and_back(measure: ModuleType) -> None:
    calls: list[str] = []
    work = {name: functools.partial(calls.append, name) for name in "abc"}
    series = measure.interleaved(work, 3, shortest=0.0)
    assert "".join(calls) == "abc" + "abc" + "cba" + "abc"  # a warm-up call each, first
    assert [len(found.cpu) for found in series.values()] == [3, 3, 3]


def test_ratios_are_taken_repetition_by_repetition(measure: ModuleType) -> None:
    above = measure.Series(cpu=[2.0, 30.0, 8.0], wall=[1.0, 1.0, 1.0])
    below = measure.Series(cpu=[1.0, 10.0, 2.0], wall=[1.0, 2.0, 4.0])
    assert measure.ratio(above, below) == {
        "cpu": {"median": 3.0, "min": 2.0, "max": 4.0},
        "wall": {"median": 0.5, "min": 0.25, "max": 1.0},
    }


def test_one_thread_is_put_back_after_an_error(measure: ModuleType) -> None:
    def state() -> tuple[object, ...]:
        allowed = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else None
        return torch.get_num_threads(), allowed

    before = state()
    with pytest.raises(KeyError), measure.one_thread():
        assert torch.get_num_threads() == 1
        raise KeyError
    assert state() == before


@pytest.mark.long
def test_peak_memory_is_that_of_the_work(measure: ModuleType) -> None:
    for size in (0, 64):
        peak = measure.peak_memory(functools.partial, operator.mul, b"x", size * 1_000_000)
        assert peak == (pytest.approx(size, abs=3) if sys.platform == "linux" else None)


@pytest.mark.parametrize("variant", ["loop", "vmap", "double", "fused", "auto", "dense"])
def test_the_work_whose_memory_is_measured_is_the_product(products: ModuleType, variant: str) -> None:
    model, x = products.CASES["mlp"].make(quick=True)
    block = products.vectors(10 * len(x), 2)
    expected = products.product("loop", model, x)(block)
    results = products.prepare("mlp", True, variant, 2)()
    assert len(results) == (6 if variant == "auto" else 1)  # 10 outputs: 5 products settle it, and one more
    for result in results:
        assert float((result - expected).norm() / expected.norm()) <= 1e-5


def test_memory_of_a_product_is_measured_in_a_process_of_its_own(
    products: ModuleType, measure: ModuleType
) -> None:
    peak = measure.peak_memory(products.prepare, "mlp", True, "fused", 2)
    assert 0 <= peak < 20 if sys.platform == "linux" else peak is None


def test_the_documentation_shows_the_stored_result(products: ModuleType) -> None:
    result = json.loads(STORED.read_text(encoding="utf-8"))
    assert result["options"]["quick"] is False
    for entry in result["cases"]:
        require_entry(entry)
    page = (ROOT / "docs/performance.md").read_text(encoding="utf-8")
    assert products.markdown(result) in page
