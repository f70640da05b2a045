"""The benchmark of "auto": it finds the best method of a cell, and says what it left out."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    spec = importlib.util.spec_from_file_location("auto_methods", ROOT / "benchmarks/auto_methods.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_small_run(benchmark, tmp_path):
    out, page = tmp_path / "auto.json", tmp_path / "page.md"
    options = ["--quick", "--seeds", "1", "--tolerances", "0.1", "--quantities", "trace"]
    options += ["--networks", "mlp, n=640"]
    benchmark.main([*options, "--out", str(out)])
    result = json.loads(out.read_text())
    assert [entry["state"] for entry in result["entries"]] == ["untrained", "trained"]
    for entry in result["entries"]:
        assert entry["best"] in entry["seconds"] and {"auto", "exact"} <= set(entry["seconds"])
    page.write_text("<!-- auto -->\n<!-- /auto -->\n", encoding="utf-8")
    assert benchmark.main(["--markdown", str(out), "--page", str(page)]) == 0
    assert "| mlp, n=640, trained | trace | 0.1 |" in page.read_text(encoding="utf-8")
    late = benchmark.run(seeds=1, seconds=-1.0, quick=True, networks=["mlp, n=640"])
    assert len(late["left_out"]) == 2 * 4 * 3 and not late["entries"]
