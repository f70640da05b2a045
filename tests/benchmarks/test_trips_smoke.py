"""The count of files and hand-overs of everyday calls: none grows."""

from __future__ import annotations

import pytest


@pytest.fixture
def trips(load):
    return load("trips")


def test_no_trip_takes_more_than_it_may(trips, capsys):
    status = trips.main(["--limits", "--list", "product"])
    printed = capsys.readouterr().out
    assert status == 0, printed
    assert all(name in printed for name in trips.LIMITS) and "engines/autograd.py" in printed


def test_a_trip_above_its_limit_is_told(trips, monkeypatch, capsys):
    monkeypatch.setitem(trips.LIMITS, "product", (1, 0))
    assert trips.main(["--limits"]) == 1
    assert trips.main([]) == 0
    assert "at most 1 files, 0 hand-overs" in capsys.readouterr().out
