"""The benchmark of the distilled-kernel paper: it runs, and its page shows its own numbers."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from types import ModuleType

import pytest
import torch

ROOT = Path(__file__).parents[2]
STORED = ROOT / "benchmarks/results/distilled_ntk.json"


@pytest.fixture
def distilled_ntk(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    pytest.importorskip("sklearn")
    pytest.importorskip("matplotlib")
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("distilled_ntk")


@pytest.fixture
def stored() -> dict:
    return json.loads(STORED.read_text(encoding="utf-8"))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::ntkops.errors.NotConvergedWarning")
def test_the_command_measures_the_smallest_case(
    distilled_ntk: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "made" / "distilled_ntk.json"
    assert distilled_ntk.main(["--quick", "--out", str(out), "--figures", str(tmp_path)]) == 0
    text = out.read_text(encoding="utf-8")
    assert str(ROOT) not in text and str(Path.home()) not in text
    result = json.loads(text)
    assert list(result["parts"]) == [
        "cnn 0", "distilled points", "distilled data alone", "mlp 0", "resnet 0", "chain", "costs",
        "headline 0",
    ]  # fmt: skip
    first = result["parts"]["cnn 0"]["found"]
    assert first["galerkin"] < 1e-8 and first["paired"]["least_margin"] >= -1e-10
    rows = result["parts"]["headline 0"]["found"]["rows"]
    looks = {(row["method"], row["jacobian_rows"] >= 200 * 10) for row in rows if row["stage"] == "data"}
    assert looks == {
        ("random", False), ("pixel k-medoids", False), ("feature k-medoids", False), ("WMDD", False),
        ("energy descent", False), ("RPCholesky", True), ("leverage", True),
    }  # fmt: skip
    assert len(list(tmp_path.glob("distilled_figure*.png"))) == 11
    assert (tmp_path / "distilled_headline.png").exists()
    assert "### The chain" in capsys.readouterr().out


def test_the_page_shows_the_stored_result(distilled_ntk: ModuleType, stored: dict) -> None:
    assert not stored["options"]["quick"]
    page = (ROOT / "docs/distilled_ntk.md").read_text(encoding="utf-8")
    claims = importlib.import_module("_distilled_page")
    assert claims.markdown(stored) in page
    for number in ("headline", *(f"figure{i}" for i in (1, 2, 3, 4, 5, 6, "7a", "7b", "7c", 8, 9))):
        name = f"images/distilled_{number}.png"
        assert name in page and (ROOT / "docs" / name).exists()


def test_verdicts_are_those_of_the_numbers(distilled_ntk: ModuleType, stored: dict) -> None:
    claims = importlib.import_module("_distilled_page")
    assert claims.judge(stored) == stored["targets"]
    assert claims.claims(stored) == stored["claims"]


def test_the_networks_are_the_papers(distilled_ntk: ModuleType) -> None:
    networks = importlib.import_module("_distilled_networks")
    assert sum(p.numel() for p in networks.convolutional().parameters()) == 6_018
    assert sum(p.numel() for p in networks.perceptron().parameters()) == 50_890
    resnet = importlib.import_module("_distilled_networks").ResNet18()
    assert sum(p.numel() for p in resnet.parameters()) == 11_181_642
    with torch.no_grad():
        assert resnet.eval()(torch.zeros(2, 3, 64, 64)).shape == (2, 10)


def test_the_frontier_has_what_nothing_beats(distilled_ntk: ModuleType) -> None:
    curves = importlib.import_module("_distilled_experiments")
    rows = [
        {"s": s, "fidelity": f, "mse": 0.0} for s, f in ((5, 0.6), (5, 0.7), (10, 0.65), (20, 0.9), (30, 0.9))
    ]
    assert curves.frontier(rows) == [1, 3]


def test_data_are_read_from_a_file(distilled_ntk: ModuleType, tmp_path: Path) -> None:
    import numpy as np

    path = tmp_path / "colours.npz"
    image = np.full((4, 6, 6, 3), 255, dtype=np.uint8)
    np.savez(path, x_train=image, y_train=[0, 1, 0, 1], x_test=image, y_test=[[0], [1], [0], [1]])
    data = importlib.import_module("_distilled_networks").from_file(path)
    assert data.x.shape == (4, 3, 6, 6) and float(data.x.max()) == 1 and data.y_test.tolist() == [0, 1, 0, 1]
    path = tmp_path / "mnist.npz"
    np.savez(path, images=image[..., 0].repeat(5, 0), labels=np.arange(20))
    data = importlib.import_module("_distilled_networks").from_file(path)
    assert (
        data.title == "MNIST" and data.x.shape == (16, 1, 6, 6) and data.y_test.tolist() == [16, 17, 18, 19]
    )


def test_nothing_is_said_to_save_that_saw_every_gradient(distilled_ntk: ModuleType, stored: dict) -> None:
    tables = importlib.import_module("_distilled_page")
    rows = [line.split(" | ") for line in tables.markdown(stored).splitlines()]
    seen = [cells for cells in rows if len(cells) > 2 and cells[1] == "gradients of all"]
    assert len(seen) == 3 * 4 and all(cells[2].startswith("none") for cells in seen)


def test_images_are_read_when_they_are_asked_for(distilled_ntk: ModuleType, tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        image.new("RGB", (20, 30), (255, 0, 0)).save(tmp_path / name / "one.png")
    (tmp_path / "b" / "two.png").write_bytes(b"no image")
    images = importlib.import_module("_distilled_networks").Folder(tmp_path, 16)
    assert images.names == ["a", "b"] and images.y.tolist() == [0, 1, 1] and len(images) == 3
    assert images[torch.tensor([1, 0])].shape == (2, 3, 16, 16)
    with pytest.raises(OSError, match="cannot identify"):
        images[torch.tensor([2])]
    (tmp_path / "b" / "two.png").unlink()
    x, y = next(iter(importlib.import_module("_distilled_networks").Folder(tmp_path, 16)))
    assert x.shape == (2, 3, 16, 16) and y.tolist() == [0, 1]
