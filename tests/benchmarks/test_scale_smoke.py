"""The benchmark of scale: it measures what it says, its model adds up, and the page is right."""

from __future__ import annotations

import importlib
import json
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

import ntkops

ROOT = Path(__file__).parents[2]
STORED = ROOT / "benchmarks/results/scale.json"
PAGE = ROOT / "docs/scale.md"
GUIDE = ROOT / "docs/beyond_one_machine.md"


@pytest.fixture
def scale(load) -> ModuleType:
    return load("scale")


def test_data_without_memory_are_the_same_for_any_slices(scale: ModuleType) -> None:
    whole = scale.Images(600)[0:600]
    assert whole.shape == (600, 3, 32, 32)
    assert torch.equal(torch.cat([scale.Images(600)[a : a + 70] for a in range(0, 600, 70)]), whole)
    assert torch.equal(scale.Images(600, 270)[10:300], whole[280:570])
    assert whole.abs().max() <= 1 and whole.std() > 0.5


def test_operations_are_counted(scale: ModuleType) -> None:
    with torch.device("meta"):
        model = torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.Tanh(), torch.nn.Linear(7, 3))
    sample = torch.empty(1, 5, device="meta")
    counted = scale.counted(model, sample, title="", samples=1, outputs=3)
    forward = 2 * (5 * 7 + 7 * 3)
    assert counted.forward == forward and counted.parameters == 66
    assert counted.pull == 2 * forward - 2 * 5 * 7  # nothing is asked of the inputs
    assert counted.push == 2 * forward
    assert counted.kept_bytes == 4 * (5 + 7)


def test_resnet_50_has_its_parameters(scale: ModuleType) -> None:
    models = importlib.import_module("_models")
    assert sum(p.numel() for p in models.resnet50().parameters()) == 25_557_032


def test_the_cost_of_a_product_adds_up(scale: ModuleType) -> None:
    work = scale.Workload("w", 1000, 10, 500, forward=2.0, pull=3.0, push=4.0, kept_bytes=1, weight_bytes=1)
    machine = scale.Machine("m", 1e3, 1e9, 1e9, wire=lambda ranks: 1e4, latency=0.0, drawing=1e-3)
    one, four = (scale.product(work, machine, ranks, 16) for ranks in (1, 4))
    assert one.compute == 1000 * (2 * 2 * 2.0 + 16 * 7.0) / 1e3 and one.wire == 0
    assert four.compute == one.compute / 4
    assert four.wire == pytest.approx(2 * 3 / 4 * 500 * 16 * 4 / 1e4)
    assert four.memory["state blocks"] == 250 * 10 * 2 * 16 * 4
    # Every rank draws the probes of all rows.
    assert scale.sketch(work, machine, 4, 16).drawing == pytest.approx(1000 * 10 * 16 * 1e-3)


def test_adapters_are_counted_by_formula(scale: ModuleType) -> None:
    work = scale.lora_1b()
    assert work.parameters == 11_272_192 and work.outputs == 1
    assert 1.1e9 < work.weight_bytes / 2 < 1.3e9


@pytest.mark.dist
def test_the_command_measures_the_smallest_sizes(
    scale: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    few = {
        "streams": (("trace, exact", 250, 1), ("norm, sketch", 250, 1)),
        "compared": (250, 250),
        "ranks": (("mlp", 60),),
        "widths": (3,),
        "kill": (60, 4, 1),
    }
    monkeypatch.setattr(scale, "QUICK", {**scale.QUICK, **few})
    out = tmp_path / "made" / "scale.json"
    assert scale.main(["--quick", "--out", str(out)]) == 0
    text = out.read_text(encoding="utf-8")
    assert str(ROOT) not in text and str(Path.home()) not in text
    result = json.loads(text)
    trace, sketch = result["streams"]
    assert trace["exact"] and not sketch["exact"] and sketch["passes"] == 64
    assert trace["peak_mb"] >= trace["start_mb"] > 0
    kernel = ntkops.ntk(scale.network("cnn"), scale.Images(250)[0:250])
    assert trace["value"] == pytest.approx(float(ntkops.trace(kernel, method="exact")), rel=1e-5)
    held = {one["what"]: one["held"] for one in scale.judge(result)}
    for what in ("products: difference from one rank", "bytes given to sums, against P k numbers"):
        assert held[what]
    (killed,) = result["kill"]
    assert killed["victim_died"] and killed["raised"] == ["RankFailedError"] and killed["same_bits"]
    assert "### A rank that dies" in capsys.readouterr().out
    assert scale.main(["--quick", "--parts", "kill", "--out", str(out)]) == 0
    again = json.loads(out.read_text(encoding="utf-8"))
    for part in ("streams", "ranks", "machine", "validation", "sheets"):
        assert again[part] == result[part]


@pytest.mark.dist
def test_the_script_of_the_page_runs_under_torchrun(tmp_path: Path) -> None:
    (script,) = re.findall(
        r'^```py title="many.py"\n(.*?)^```$', GUIDE.read_text(encoding="utf-8"), re.M | re.S
    )
    (tmp_path / "many.py").write_text(script, encoding="utf-8")
    drawn = np.random.default_rng(0)
    images = drawn.normal(size=(37, 3, 8, 8))
    np.save(tmp_path / "images.npy", images)
    np.save(tmp_path / "labels.npy", drawn.normal(size=(37, 3)))
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "many.py"]
    done = subprocess.run(
        [sys.executable, *command], cwd=tmp_path, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr
    told = [float(text) for text in re.findall(r"(?:trace|estimated|rank) ([\d.]+)", done.stdout)]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layers = torch.nn.Linear(192, 32), torch.nn.Tanh(), torch.nn.Linear(32, 3)
    kernel = ntkops.ntk(torch.nn.Sequential(*layers), torch.from_numpy(images).float().flatten(1))
    trace = float(ntkops.trace(kernel, method="exact"))
    rank = ntkops.effective_rank(
        kernel, method="sketch", num_passes=64, generator=torch.Generator().manual_seed(0)
    )
    assert told[::2] == pytest.approx([trace, float(rank)], rel=1e-3)
    assert told[1] == pytest.approx(trace, rel=0.3)
    assert (tmp_path / "solve.safetensors.rank1of2.a").exists()


def test_the_stored_result_is_complete(scale: ModuleType) -> None:
    result = json.loads(STORED.read_text(encoding="utf-8"))
    sizes = {(run["what"], run["samples"]) for run in result["streams"]}
    assert sizes == {case[:2] for case in scale.PLAN["streams"]}
    assert all(run["same_value"] for run in result["streams"])
    made = scale.derive(result)
    assert made["validation"] == result["validation"] and made["growth"] == result["growth"]
    assert [sheet["rows"] for sheet in made["sheets"]] == [sheet["rows"] for sheet in result["sheets"]]
