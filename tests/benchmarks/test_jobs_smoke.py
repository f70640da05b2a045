"""The benchmark of jobs: both ways give the same, the stored result holds, the page shows it."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]
STORED = ROOT / "benchmarks/results/jobs.json"


@pytest.fixture
def jobs(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("jobs")


@pytest.mark.long
def test_the_command_measures_small_cases(
    jobs: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "made" / "jobs.json"
    assert jobs.main(["--quick", "--jobs", "partition", "pinn_60", "--out", str(out)]) == 0
    result = json.loads(out.read_text(encoding="utf-8"))
    assert [entry["job"] for entry in result["jobs"]] == ["partition", "pinn_60"]
    assert jobs.markdown(result) == capsys.readouterr().out
    for entry in result["jobs"]:
        cpu = entry["ratio"]["cpu"]
        assert 0 < cpu["min"] <= cpu["median"] <= cpu["max"]


def test_two_ways_that_differ_are_refused(jobs: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    wrong = jobs.Job("wrong", 1.0, lambda quick: (lambda: torch.ones(2), lambda: torch.zeros(2) + 1.1), 1e-6)
    monkeypatch.setitem(jobs.JOBS, "wrong", wrong)
    with pytest.raises(ArithmeticError, match="differ by"):
        jobs.measure("wrong", quick=True, repetitions=1)


def test_the_page_shows_the_stored_result(jobs: ModuleType) -> None:
    result = json.loads(STORED.read_text(encoding="utf-8"))
    assert result["options"]["quick"] is False and result["environment"]["threads"] == 1
    assert [entry["job"] for entry in result["jobs"]] == list(jobs.JOBS)
    for entry in result["jobs"]:
        assert entry["held"] == (entry["ratio"]["cpu"]["median"] <= entry["most"])
    page = (ROOT / "docs/jobs.md").read_text(encoding="utf-8")
    _, _, rest = page.partition("<!-- jobs -->\n")
    shown, closed, _ = rest.partition("<!-- /jobs -->")
    assert closed and shown.strip() == jobs.markdown(result).strip()
