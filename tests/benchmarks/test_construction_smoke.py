"""The benchmark of making operators: it counts and times what it says, and its page shows its own numbers."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from types import ModuleType

import pytest
import torch

ROOT = Path(__file__).parents[2]
STORED = ROOT / "benchmarks/results/construction.json"
WAYS = {"make", "same_module", "same_linearization", "cross", "differentiate"}


@pytest.fixture
def construction(load) -> ModuleType:
    return load("construction")


def require_shape(result: dict) -> None:
    """Assert that a result is complete."""
    assert result["benchmark"] == "construction"
    assert result["environment"]["threads"] == 1 and result["load"]["cpus"] >= 1
    for entry in result["networks"]:
        assert set(entry["passes"]) == WAYS and entry["passes"]["make"] >= 1
        assert 0 < entry["selected"] <= entry["parameters"]
        assert set(entry["steps"]) == {"make", "differentiate"}
        assert set(entry["memory_mb"]) == {"step", "make", "differentiate"}
    timed = [*result["networks"], result["score"], *result["rows"]]
    for found in (times["cpu_ms"] for entry in timed for times in entry["time"].values()):
        assert 0 < found["min"] <= found["median"] <= found["max"]


@pytest.mark.long
def test_the_command_measures_the_smallest_case(construction: ModuleType, tmp_path: Path) -> None:
    out = tmp_path / "made" / "construction.json"
    arguments = ["--quick", "--parts", "mlp", "search", "rows", "--no-memory", "--out", str(out)]
    assert construction.main(arguments) == 0
    text = out.read_text(encoding="utf-8")
    assert str(ROOT) not in text and str(Path.home()) not in text
    result = json.loads(text)
    require_shape(result)
    (entry,) = result["networks"]
    assert entry["parameters"] == entry["selected"] == 64 * 8 + 8 + 8 * 10 + 10
    times = {key: found["cpu_ms"]["median"] for key, found in entry["time"].items()}
    expected = times["make"] / times["step"]
    assert entry["steps"]["make"]["cpu"]["median"] == pytest.approx(expected, rel=2e-3)
    assert [(row["model"], row["outputs"]) for row in result["rows"]] == [("mlp", 2)]
    assert result["options"]["quick"] is True and result["targets"] == []


def test_forward_passes_are_those_of_the_model_and_its_copies(construction: ModuleType) -> None:
    model, x = construction.CONSTRUCTION_CASES["mlp"].make(quick=True)
    counted = construction.Counted(model)
    before = construction.Counted.passes
    counted(x), copy.deepcopy(counted)(x), construction.fresh(counted)(x)
    assert construction.Counted.passes - before == 3
    assert construction.fresh(model)[0].weight is model[0].weight and construction.fresh(model) is not model


def test_passes_by_hand_are_as_many_as_outputs(
    construction: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = []
    right = torch.autograd.grad
    monkeypatch.setattr(torch.autograd, "grad", lambda _, w, **k: wanted.append(len(w)) or right(_, w, **k))
    model, x = construction.ROW_CASES["transformer"].make(quick=True, outputs=3)
    construction.backward_passes(model, x, 3)
    # Attention (its output map is no call of a module), two linear layers, two norms, the read-out.
    assert wanted == [6] * 3
    assert not any(module._forward_hooks for module in model.modules())


def test_random_networks_differ_and_are_always_the_same(construction: ModuleType) -> None:
    one, other, again = (construction.random_network(seed) for seed in (3, 4, 3))
    assert str(one) != str(other) and str(one) == str(again)
    assert all(map(torch.equal, one.parameters(), again.parameters()))
    with torch.no_grad():
        assert one(torch.ones(2, 3, 16, 16)).shape == (2, 10)


def test_targets_are_judged_by_medians(construction: ModuleType) -> None:
    result = json.loads(STORED.read_text(encoding="utf-8"))
    require_shape(result)
    assert [entry["model"] for entry in result["networks"]] == list(construction.CONSTRUCTION_CASES)
    found = {(one["what"], one["of"]): one for one in construction.judge(result)}
    mlp = found["milliseconds, made", "mlp"]
    assert mlp["most"] == 3.0 and mlp["held"] == (mlp["found"] <= 3.0)
    result["score"]["ratio"]["cpu"]["median"] = 2.51
    (search,) = [one for one in construction.judge(result) if "search" in one["what"]]
    assert search["most"] == 2.5 and search["found"] == 2.51 and not search["held"]
