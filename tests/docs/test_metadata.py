"""Version, dependencies and pins agree wherever they are written down."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import ntkops

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def pins() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pinned = [line.split("==") for line in lines if line and not line.startswith("#")]
    return {canonicalize_name(name): version for name, version in pinned}


def test_one_version_everywhere() -> None:
    version = PROJECT["version"]
    assert ntkops.__version__ == version
    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert re.search(rf"^version: {re.escape(version)}$", citation, re.MULTILINE)
    assert f"version = {{{version}}}" in (ROOT / "README.md").read_text(encoding="utf-8")
    heading = "Unreleased" if ".dev" in version else version
    assert f"## [{heading}]" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_tested_versions_lie_in_the_declared_ranges() -> None:
    tested = pins()
    extras = PROJECT["optional-dependencies"]
    declared = [*PROJECT["dependencies"], *extras["gp"], *extras["demo"], *extras["test"], *extras["docs"]]
    for requirement in map(Requirement, declared):
        name = canonicalize_name(requirement.name)
        if name != "ntkops":
            assert requirement.specifier.contains(tested[name]), (
                f"{requirement}, but {tested[name]} is pinned"
            )


def test_pins_name_public_releases_only() -> None:
    assert all("+" not in version and "@" not in version for version in pins().values())
    assert pins()["torch"] == "2.13.0"


def test_core_dependencies_are_these() -> None:
    names = {canonicalize_name(Requirement(text).name) for text in PROJECT["dependencies"]}
    assert names == {"torch", "linear-operator", "numpy", "safetensors", "scipy", "tqdm"}
