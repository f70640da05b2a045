"""The benchmark of the trace paper: its estimators are what they claim, its page shows its own numbers."""

from __future__ import annotations

import importlib
import json
import re
from pathlib import Path
from types import ModuleType

import pytest
import torch

ROOT = Path(__file__).parents[2]
STORED = ROOT / "benchmarks/results/trace_paper.json"


@pytest.fixture
def trace_paper(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("trace_paper")


@pytest.fixture
def kernel() -> torch.Tensor:
    root = torch.randn(20, 30, generator=torch.Generator().manual_seed(0))
    return root @ root.T


def test_the_paper_s_estimators_are_unbiased_and_count_their_products(
    trace_paper: ModuleType, kernel: torch.Tensor
) -> None:
    found = [
        trace_paper.hutch_pp(lambda v: v @ kernel, 20, 12, torch.Generator().manual_seed(seed))
        for seed in range(300)
    ]
    values = torch.tensor([value for value, _ in found], dtype=torch.float64)
    assert abs(values.mean() - kernel.trace()) <= 4 * values.std() / 300**0.5
    assert found[0][1] == 2 * 2 + 5  # q = 2, s = 5: 0.75 m products, not m
    assert 12 // 6 + (12 - 5 * 12 // 6) == 4  # the budget of 12 as printed; q and m - q probes add up to it
    root = torch.linalg.cholesky(kernel.double() + 1e-6 * torch.eye(20)).float()
    sided = [
        trace_paper.one_sided(lambda v: v @ root, 20, 12, torch.Generator().manual_seed(seed))[0]
        for seed in range(300)
    ]
    values = torch.tensor(sided, dtype=torch.float64)
    assert abs(values.mean() - kernel.trace()) <= 4 * values.std() / 300**0.5 + 1e-3


@pytest.mark.long
@pytest.mark.filterwarnings("ignore::ntkops.errors.NotConvergedWarning")
def test_the_command_measures_the_smallest_case(
    trace_paper: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "made" / "trace_paper.json"
    command = ["--quick", "--networks", "mlp", "gru", "--out", str(out), "--figures", str(tmp_path)]
    assert trace_paper.main(command) == 0
    text = out.read_text(encoding="utf-8")
    assert str(ROOT) not in text and str(Path.home()) not in text
    result = json.loads(text)
    assert [p["name"] for p in result["problems"]] == ["mlp", "gru"]
    for problem in result["problems"]:
        assert {entry["by"] for entry in problem["curves"]} == {"paper", "ntkops"}
        for entry in problem["curves"]:
            assert all(0 <= p["low"] <= p["error"] <= p["high"] for p in entry["points"])
    assert result["hutch_at_n"]["products"] == 18  # three quarters of n = 24
    assert (tmp_path / "trace_figure1.png").stat().st_size > 10_000
    assert "| trace | hutch++, paper |" in capsys.readouterr().out


def test_a_claim_is_judged_by_medians_that_stay_below(trace_paper: ModuleType) -> None:
    tables = importlib.import_module("_trace_page")
    points = [{"error": e, "passes": p, "m": p} for p, e in ((6, 1e-3), (12, 5e-2), (24, 9e-3), (48, 2e-3))]
    assert tables._first(points, 1e-2)["passes"] == 24  # the lucky first one does not count
    assert tables._first(points, 1e-4) is None


def test_an_interrupted_run_goes_on(trace_paper: ModuleType, tmp_path: Path) -> None:
    out = tmp_path / "trace_paper.json"
    assert trace_paper.main(["--quick", "--networks", "gru32", "--out", str(out)]) == 0
    first = json.loads(out.read_text(encoding="utf-8"))
    assert trace_paper.main(["--quick", "--networks", "gru32", "mlp", "--out", str(out), "--resume"]) == 0
    both = json.loads(out.read_text(encoding="utf-8"))
    assert [p["name"] for p in both["problems"]] == ["mlp", "gru32"]
    assert both["problems"][1] == first["problems"][0]
    assert trace_paper.main(["--quick", "--networks", "mlp", "--repetitions", "1", "--out", str(out)]) == 0
    again = json.loads(out.read_text(encoding="utf-8"))
    assert again["problems"][1] == first["problems"][0]  # what is not named is kept, what is named made again
    assert again["problems"][0]["curves"][0]["points"][0]["repetitions"] == 2
    assert again["problems"][0]["curves"][-1]["points"][0]["repetitions"] == 1
    with pytest.raises(ValueError, match="other options"):
        trace_paper.run(["mlp"], before=both)


def test_the_page_shows_the_stored_result(
    trace_paper: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    result = json.loads(STORED.read_text(encoding="utf-8"))
    assert result["options"]["quick"] is False
    assert [p["name"] for p in result["problems"]] == list(trace_paper.NAMES)
    assert trace_paper.main(["--markdown", str(STORED)]) == 0
    printed = capsys.readouterr().out.strip()
    page = (ROOT / "docs/trace_estimation.md").read_text(encoding="utf-8")
    assert printed in page
    for picture in set(re.findall(r"images/trace_\w+\.png", page)):
        assert (ROOT / "docs" / picture).stat().st_size > 10_000
