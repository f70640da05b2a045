"""What is installed from a wheel, built of a source distribution, is the whole package and runs."""

import json
import re
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


def run(*command: object, cwd: Path, given: str | None = None) -> str:
    words = [str(part) for part in command]
    done = subprocess.run(
        words, cwd=cwd, capture_output=True, text=True, timeout=240, check=False, input=given
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


@pytest.fixture(scope="module")
def python(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of a fresh environment with the wheel, beside the packages that are here already."""
    place = tmp_path_factory.mktemp("fresh")
    venv.create(place / "env", with_pip=False, symlinks=True)
    found = place / "env" / "bin" / "python"
    pip = (sys.executable, "-m", "pip", "--python", found)
    run(*pip, "install", "--no-deps", "--no-index", "--disable-pip-version-check", wheel, cwd=place)
    (purelib,) = (place / "env").glob("lib/python*/site-packages")
    (purelib / "beside.pth").write_text(sysconfig.get_path("purelib") + "\n", encoding="utf-8")
    where = run(found, "-c", "import ntkops; print(ntkops.__file__)", cwd=place)
    assert Path(where.strip()).is_relative_to(purelib)  # this tree is not among them
    return found


@pytest.mark.parametrize("page", ["README.md", "docs/index.md"])
def test_a_first_page_is_followed_to_the_letter(page: str, python: Path, tmp_path: Path) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    install, first = text.index("\npython -m pip install .\n"), text.index("```python\n")
    assert install < first, "the first block stands before what it needs is installed"
    block, printed = re.findall(r"```python\n(.*?)```\n\n```text\n(.*?)```", text, re.DOTALL)[0]
    assert block in text[first:][: len(block) + 20]
    # No more than a minute of the processor: the system ends what takes longer.
    done = run("bash", "-c", 'ulimit -t 60; "$0" -', python, cwd=tmp_path, given=block)
    assert re.findall(r"[A-Za-z]+", done) == re.findall(r"[A-Za-z]+", printed)
    prose = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    for number in set(re.findall(r"(?<![\w.])-?\d+(?:\.\d+)?(?:x\d+)?", printed)):
        assert number in prose, f"{page} does not say what {number} means"


def test_an_installed_wheel_reports_on_a_network(python: Path, tmp_path: Path) -> None:
    command = python.parent / "ntkops"
    assert run(command, "--version", cwd=tmp_path).strip() == f"ntkops {ntkops.__version__}"
    run(command, "report", "--samples", "20", "--epochs", "1", "--repeats", "0", "--out", "out", cwd=tmp_path)
    found = json.loads((tmp_path / "out" / "report.json").read_text(encoding="utf-8"))
    assert found["environment"]["versions"]["ntkops"] == ntkops.__version__
    assert found["environment"]["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert (tmp_path / "out" / "report.html").exists()
