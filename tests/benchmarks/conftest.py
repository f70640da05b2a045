"""The scripts of benchmarks/, imported as they import one another."""

from __future__ import annotations

import gc
import importlib
import importlib.util
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], ModuleType]:
    monkeypatch.syspath_prepend(str(BENCHMARKS))

    def module(name: str) -> ModuleType:
        if name != "coverage":  # of which a package may be loaded
            imported = importlib.import_module(name)
            gc.freeze()  # benchmarks collect before every timing: not what earlier tests have left
            return imported
        spec = importlib.util.spec_from_file_location("interval_coverage", BENCHMARKS / "coverage.py")
        assert spec is not None and spec.loader is not None
        found = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(found)
        return found

    return module
