"""The script on training dynamics runs, and network and linearisation start alike."""

import importlib
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]


def test_network_and_linearisation_start_alike(monkeypatch):
    pytest.importorskip("sklearn")
    pytest.importorskip("matplotlib")
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    script = importlib.import_module("training_dynamics")
    with torch.random.fork_rng(devices=[]):
        found = script.compare(12, 20, 3, 20)
    path, real = found["path"], found["real"]
    torch.testing.assert_close(path.outputs[0], real["outputs"][0])
    gaps = (path.outputs - real["outputs"]).flatten(1).norm(dim=1)
    moved = (real["outputs"] - real["outputs"][0]).flatten(1).norm(dim=1)
    assert gaps[1] < 0.2 * moved[1] and path.info.converged
    assert len(script.draw(found).axes) == 3
