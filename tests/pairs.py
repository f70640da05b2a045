"""Choices that are tested together: every two values of two choices meet, not every combination of all."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import Any

__all__ = ["pairs"]


def pairs(*choices: Iterable[Any]) -> list[tuple[Any, ...]]:
    """Return combinations, one value of each choice, so that every two values of two choices are in one.

    Faults of a value, and of two values together, are found as by the whole product, in about as many
    combinations as the two longest choices have pairs. Always the same ones: each time the first of those
    that bring together most values that have not met.
    """
    values = [list(choice) for choice in choices]
    every = {
        numbers: set(itertools.combinations(enumerate(numbers), 2))
        for numbers in itertools.product(*(range(len(value)) for value in values))
    }
    left = set().union(*every.values())
    found = []
    while left:
        best = max(every, key=lambda numbers: len(every[numbers] & left))
        left -= every.pop(best)
        found.append(tuple(value[number] for value, number in zip(values, best, strict=True)))
    return found
