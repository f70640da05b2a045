"""The pages show what the stored results hold, with verdicts that are computed from their entries."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]
PAGES = {
    "auto_methods": "coverage",
    "construction": "performance",
    "coverage": "coverage",
    "dynamics": "rooms/dynamics",
    "exact_kernels": "exact_kernels",
    "jobs": "jobs",
    "products": "performance",
    "projections": "rooms/projections",
    "real_networks": "real_networks",
    "regression": "solvers",
    "scale": "scale",
    "solvers": "solvers",
}


@pytest.mark.parametrize("name", PAGES)
def test_the_page_shows_the_stored_result(
    load: Callable[[str], ModuleType], tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    benchmark, stored = load(name).BENCHMARK, ROOT / f"benchmarks/results/{name}.json"
    result = json.loads(stored.read_text(encoding="utf-8"))
    assert benchmark.name == name and not result.get("options", result).get("quick")
    page = tmp_path / "page.md"
    page.write_text(f"before\n<!-- {name} -->\nold\n<!-- /{name} -->\nafter\n", encoding="utf-8")
    assert benchmark.main(["--markdown", str(stored), "--page", str(page)]) == 0
    shown = f"<!-- {name} -->\n{capsys.readouterr().out}<!-- /{name} -->"
    assert page.read_text(encoding="utf-8") == f"before\n{shown}\nafter\n"
    assert shown in (ROOT / f"docs/{PAGES[name]}.md").read_text(encoding="utf-8")
    # Files of older versions hold their verdicts in another form, or none: as many of them fail.
    verdicts = list(benchmark.judge(result))
    assert verdicts and all(
        set(one) - {"least", "most"} == {"what", "of", "found", "held"} for one in verdicts
    )
    before = result.get("targets")
    if isinstance(before, list) and len(before) == len(verdicts):
        assert [one["held"] for one in before].count(False) == [one["held"] for one in verdicts].count(False)


def test_results_say_what_they_were_measured_with() -> None:
    for path in (ROOT / "benchmarks/results").glob("*.json"):
        text = path.read_text(encoding="utf-8")
        assert str(ROOT) not in text and str(Path.home()) not in text
        place = json.loads(text)["environment"]
        assert {"python", "cpu", "threads", "torch", "linear_operator", "ntkops"} <= set(place)
