"""Which uses of parameters are computed together: one unit for each parameter, or range of its rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from ..model.record import Call, Place
from .layer_rules import RULES

__all__ = ["Unit", "Use", "is_transposed", "plan_units"]


@dataclass(frozen=True)
class Use:
    """One role of a parameter in one call."""

    call: int
    role: str
    place: Place


@dataclass(frozen=True)
class Unit:
    """Parameters, or a range of rows of one, whose gradient is computed in one piece.

    Attributes:
        index: Number of the parameter.
        start: First row.
        stop: The row after the last.
        kind: "outer" for a sum of outer products of one orientation, else "direct".
        uses: Every use.
        bias: Number of a bias whose gradient is the sum of the same output gradients, with its rows.
    """

    index: int
    start: int
    stop: int
    kind: str
    uses: tuple[Use, ...]
    bias: Place | None = None


def plan_units(calls: Sequence[Call], covered: frozenset[int]) -> list[Unit]:
    """Group the uses of covered parameters into units."""
    uses: dict[int, list[Use]] = {}
    for number, call in enumerate(calls):
        for role, place in call.places.items():
            if place.index in covered:
                uses.setdefault(place.index, []).append(Use(number, role, place))
    units = [unit for index, found in uses.items() for unit in _units_of(calls, index, found)]
    return _join_biases(calls, units)


def _units_of(calls: Sequence[Call], index: int, uses: list[Use]) -> list[Unit]:
    """Return the units of one parameter: one for each range of its rows that is used."""
    ranges: dict[tuple[int, int], list[Use]] = {}
    for use in uses:
        ranges.setdefault((use.place.start, use.place.stop), []).append(use)
    ordered = sorted(ranges)
    disjoint = all(a[1] <= b[0] for a, b in zip(ordered, ordered[1:], strict=False))
    if not disjoint:
        # Rows that are in two ranges have products between their uses: one unit, written down.
        return [Unit(index, min(a for a, _ in ordered), max(b for _, b in ordered), "direct", tuple(uses))]
    return [
        Unit(index, start, stop, _kind(calls, found), tuple(found)) for (start, stop), found in ranges.items()
    ]


def is_transposed(calls: Sequence[Call], use: Use) -> bool:
    """Return whether the outer product of a use gives the transpose of the parameter."""
    return RULES[calls[use.call].rule].transposed(use.role) != use.place.transposed


def _kind(calls: Sequence[Call], uses: list[Use]) -> str:
    """Return "outer" where all uses are outer products of one orientation and kind, to be summed as one."""
    kinds = {
        (
            RULES[calls[use.call].rule].kind(use.role),
            is_transposed(calls, use),
            calls[use.call].rule == "embedding",
            calls[use.call].arguments.get("groups", 1),
        )
        for use in uses
    }
    return "outer" if len(kinds) == 1 and next(iter(kinds))[0] == "outer" else "direct"


def _join_biases(calls: Sequence[Call], units: list[Unit]) -> list[Unit]:
    """Let a bias ride with the weight beside which it is used every time."""
    # W a + b = [W b] [a; 1]: the kernel of both is that of W with 1 added to the Gram matrix of activations.
    weights = {
        tuple(use.call for use in unit.uses): position
        for position, unit in enumerate(units)
        if unit.kind == "outer" and all(RULES[calls[use.call].rule].shares_bias for use in unit.uses)
    }
    joined: dict[int, Place] = {}
    rest: list[int] = []
    for position, unit in enumerate(units):
        owner = weights.get(tuple(use.call for use in unit.uses))
        rides = all(use.role == "bias" for use in unit.uses) and owner is not None and owner not in joined
        if rides and owner is not None and len({use.place for use in unit.uses}) == 1:
            joined[owner] = unit.uses[0].place
        else:
            rest.append(position)
    result = []
    for position in rest:
        unit = units[position]
        bias = joined.get(position)
        result.append(unit if bias is None else replace(unit, bias=bias))
    return result
