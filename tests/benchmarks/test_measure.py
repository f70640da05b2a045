"""How benchmarks measure, judge and show: in turn, in processes of their own, by numbers."""

from __future__ import annotations

import functools
import operator
import os
import sys
from types import ModuleType

import pytest
import torch


@pytest.fixture
def measure(load) -> ModuleType:
    return load("_measure")


@pytest.fixture
def tables(load) -> ModuleType:
    return load("_tables")


def test_repetitions_are_interleaved_there_and_back(measure: ModuleType) -> None:
    calls: list[str] = []
    work = {name: functools.partial(calls.append, name) for name in "abc"}
    series = measure.interleaved(work, 3, shortest=0.0)
    assert "".join(calls) == "abc" + "abc" + "cba" + "abc"  # a warm-up call each, first
    assert [len(found.cpu) for found in series.values()] == [3, 3, 3]


def test_ratios_are_taken_repetition_by_repetition(measure: ModuleType) -> None:
    above = measure.Series(cpu=[2.0, 30.0, 8.0], wall=[1.0, 1.0, 1.0])
    below = measure.Series(cpu=[1.0, 10.0, 2.0], wall=[1.0, 2.0, 4.0])
    assert measure.ratio(above, below) == {
        "cpu": {"median": 3.0, "min": 2.0, "max": 4.0},
        "wall": {"median": 0.5, "min": 0.25, "max": 1.0},
    }


def test_one_thread_is_put_back_after_an_error(measure: ModuleType) -> None:
    def state() -> tuple[object, ...]:
        allowed = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else None
        return torch.get_num_threads(), allowed

    before = state()
    with pytest.raises(KeyError), measure.one_thread():
        assert torch.get_num_threads() == 1
        raise KeyError
    assert state() == before


@pytest.mark.long
def test_peak_memory_is_that_of_the_work(measure: ModuleType) -> None:
    for size in (0, 64):
        peak = measure.peak_memory(functools.partial, operator.mul, b"x", size * 1_000_000)
        assert peak == (pytest.approx(size, abs=3) if sys.platform == "linux" else None)


def test_a_job_that_raises_tells_so_and_one_that_dies_has_found_nothing(measure: ModuleType) -> None:
    with pytest.raises(RuntimeError, match="ZeroDivisionError"):
        measure.alone(divmod, 1, 0)
    assert measure.launch(os._exit, [0], 3, group=False) == [None]


def test_verdicts_are_computed_from_numbers(tables: ModuleType) -> None:
    claims = [
        tables.verdict("time", "a", 1.0, most=2.0),
        tables.verdict("time", "b", 2.5, most=2.0),
        tables.verdict("speed", "a", 7.0, least=7.0),
        tables.verdict("error", "a", float("nan"), most=1.0),
        tables.verdict("memory", "a", None, most=1.0),
    ]
    assert [one["held"] for one in claims] == [True, False, True, False, None]
    assert tables.verdict_table(claims)[5:] == [
        "| time | 2 cases | at most 2 | 1 to 2.5 | **no**: b (2.5) |",
        "| speed | a | at least 7 | 7 | yes |",
        "| error | a | at most 1 | nan | **no** |",
        "| memory | a | at most 1 | - | - |",
    ]


def test_cells_show_spreads_and_what_is_missing(tables: ModuleType) -> None:
    entry = {"name": "a", "n": 12345, "time": {"cpu": {"median": 1.0, "min": 0.5, "max": 2.0}}, "error": 3e-7}
    columns = {"name": "name", "n": "n", "time": "time.cpu", "wall": "time.wall", "error": "error:.0e"}
    assert tables.table([entry], columns)[-1] == "| a | 12,345 | 1.00 (0.50 - 2.00) | - | 3e-07 |"
    assert tables.table([], columns, title="nothing") == []
    with pytest.raises(ValueError, match="needs the comments"):
        tables.fill("no place", "products", "text")
