"""What is installed from a wheel, built of a source distribution, is the whole package and runs."""

import json
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest
import torch

import ntkops

ROOT = Path(__file__).parents[2]
LEFT = ("docs", "tests", "examples", "benchmarks", "notebooks", "Makefile", "constraints.txt", "CITATION.cff")
MADE = {".git", ".venv", "site", "report", "build", "dist", ".cache"}  # beside the sources


def made(folder: str, names: list[str]) -> set[str]:
    """Return what is in a folder of the tree and is no source."""
    caches = {name for name in names if name.endswith(("_cache", "__pycache__", ".egg-info"))}
    return caches | (MADE & set(names) if Path(folder) == ROOT else set())


def run(*command: object, cwd: Path) -> str:
    done = subprocess.run(
        [str(part) for part in command], cwd=cwd, capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


def built(what: str, source: Path, target: Path) -> Path:
    """Return what setuptools makes of a source tree, without a network."""
    target.mkdir()
    code = f"from setuptools import build_meta; print(build_meta.build_{what}({str(target)!r}))"
    return target / run(sys.executable, "-c", code, cwd=source).strip().splitlines()[-1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel that is built of the source distribution alone."""
    place = tmp_path_factory.mktemp("package")
    shutil.copytree(ROOT, place / "tree", ignore=made, symlinks=True)
    archive = built("sdist", place / "tree", place / "sdist")
    with tarfile.open(archive) as packed:
        packed.extractall(place / "unpacked", filter="data")
    (source,) = (place / "unpacked").iterdir()
    missing = [name for name in LEFT if not (source / name).exists()]
    assert not missing, f"the source distribution lacks {missing}"
    for folder in ("docs", "tests"):
        here = {p.relative_to(place / "tree") for p in (place / "tree" / folder).rglob("*.[pm][yd]")}
        there = {p.relative_to(source) for p in (source / folder).rglob("*.[pm][yd]")}
        assert here <= there
    return built("wheel", source, place / "wheel")


def test_a_wheel_holds_the_package_alone(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names} == {"ntkops", f"ntkops-{ntkops.__version__}.dist-info"}
    modules = {str(p.relative_to(ROOT)) for p in (ROOT / "ntkops").rglob("*.py")}
    assert modules <= set(names) and "ntkops/py.typed" in names


def test_an_installed_wheel_reports_on_a_network(wheel: Path, tmp_path: Path) -> None:
    venv.create(tmp_path / "env", with_pip=False, symlinks=True)
    python = tmp_path / "env" / "bin" / "python"
    pip = (sys.executable, "-m", "pip", "--python", python)
    run(*pip, "install", "--no-deps", "--no-index", "--disable-pip-version-check", wheel, cwd=tmp_path)
    # The packages that are here already, this tree not among them.
    (purelib,) = (tmp_path / "env").glob("lib/python*/site-packages")
    (purelib / "beside.pth").write_text(sysconfig.get_path("purelib") + "\n", encoding="utf-8")
    where = run(python, "-c", "import ntkops; print(ntkops.__file__)", cwd=tmp_path)
    assert Path(where.strip()).is_relative_to(purelib)
    command = tmp_path / "env" / "bin" / "ntkops"
    assert run(command, "--version", cwd=tmp_path).strip() == f"ntkops {ntkops.__version__}"
    run(command, "report", "--samples", "20", "--epochs", "1", "--repeats", "0", "--out", "out", cwd=tmp_path)
    found = json.loads((tmp_path / "out" / "report.json").read_text(encoding="utf-8"))
    assert found["environment"]["versions"]["ntkops"] == ntkops.__version__
    assert found["environment"]["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert (tmp_path / "out" / "report.html").exists()
