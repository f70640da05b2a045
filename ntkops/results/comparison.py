"""Scores of several networks side by side."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import InputError
from .estimate import Estimate, format_with_interval
from .html import table_html

__all__ = ["Comparison"]


@dataclass(frozen=True, eq=False, repr=False)
class Comparison:
    """A table of scores: a row for each network, a column for each score; see `ntkops.compare`.

    ``table["trace"]`` are the values of a column, ``print(table)`` shows all of it with the 95 % intervals.

    Attributes:
        names: Names of the R networks.
        estimates: Score to the R scalar estimates.
    """

    names: tuple[str, ...]
    estimates: dict[str, tuple[Estimate, ...]]

    def __getitem__(self, score: str) -> Tensor:
        """Return the values ``(R,)`` of a score, float64.

        Raises:
            InputError: If there is no such column.
        """
        if score not in self.estimates:
            known = ", ".join(map(repr, self.estimates))
            raise InputError(f"there is no score {score!r} in this table: choose among {known}")
        return torch.stack([estimate.value for estimate in self.estimates[score]])

    def order(self, score: str) -> list[str]:
        """Return the names from the largest value of a score to the smallest.

        Neighbours whose intervals overlap may stand in either order.
        """
        return [self.names[i] for i in self[score].argsort(descending=True).tolist()]

    def __len__(self) -> int:
        """Number of networks."""
        return len(self.names)

    def to_dict(self) -> dict[str, Any]:
        """Return plain numbers and lists, ready for JSON."""
        columns = {score: [e.to_dict() for e in column] for score, column in self.estimates.items()}
        return {"names": list(self.names), "estimates": columns}

    def _rows(self) -> list[list[str]]:
        rows = [["", *self.estimates]]
        for number, name in enumerate(self.names):
            rows.append([name, *(_cell(column[number]) for column in self.estimates.values())])
        return rows

    def _repr_html_(self) -> str:
        """Show the same table in a notebook."""
        header, *rows = self._rows()
        return table_html(header, rows)

    def __str__(self) -> str:
        """Show a line for each network."""
        rows = self._rows()
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        return "\n".join(
            "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows
        )

    __repr__ = __str__


def _cell(estimate: Estimate) -> str:
    value, (low, high) = float(estimate), (float(end) for end in estimate.interval)
    if estimate.exact:
        return f"{value:.6g}"
    value_, low_, high_ = format_with_interval(value, low, high)
    return f"{value_} ({low_} to {high_})"
