"""Tables of estimates: along training, one row a checkpoint, and of several networks side by side."""

from __future__ import annotations

import csv
import dataclasses
import io
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import InputError, ShapeError
from .estimate import Estimate, format_estimate, value_with_interval
from .html import table_html, table_text

__all__ = [
    "Comparison",
    "History",
]

Step = int | float


@dataclass(frozen=True, eq=False)
class History:
    """A table of quantities along training: a row for each checkpoint, a column for each quantity.

    ``history["trace"]`` are the values of a column, ``len(history)`` the number of rows, ``print(history)``
    shows all of it.

    Attributes:
        quantities: Names of the columns.
        steps: R steps, in the order in which they were recorded.
        values: Name to ``(R, *shape)`` float64; NaN where a quantity is not defined.
        stderrs: Name to the standard errors, same shapes; 0 where exact.
        intervals: Name to the low and high ends of the 95 % intervals, ``(R, 2, *shape)``.
        exact: Name to ``(R,)``: whether a value is exact up to rounding.
        converged: Name to ``(R,)``: False where passes ran out before the tolerance was met.
        passes: Name to ``(R,)`` int64: passes that were made.
        seed: Seed of the probes, the same ones for every row; None if nothing was drawn.

    Example:
        >>> import torch
        >>> from ntkops.results import Estimate, History
        >>> history = History.empty(["trace"], seed=0)
        >>> history = history.appended(
        ...     0, {"trace": Estimate.of_exact(torch.tensor(2.0), passes=1)}
        ... )
        >>> history = history.appended(
        ...     5, {"trace": Estimate.of_exact(torch.tensor(3.0), passes=1)}
        ... )
        >>> history["trace"].tolist(), history.steps
        ([2.0, 3.0], (0, 5))
        >>> print(history)
        step  trace
           0      2
           5      3
    """

    quantities: tuple[str, ...]
    steps: tuple[Step, ...]
    values: Mapping[str, Tensor]
    stderrs: Mapping[str, Tensor]
    intervals: Mapping[str, Tensor]
    exact: Mapping[str, Tensor]
    converged: Mapping[str, Tensor]
    passes: Mapping[str, Tensor]
    seed: int | None = None

    @classmethod
    def empty(cls, quantities: list[str] | tuple[str, ...], seed: int | None = None) -> History:
        """Return a table without rows."""
        return cls(tuple(quantities), (), {}, {}, {}, {}, {}, {}, seed)

    def appended(self, step: Step, row: Mapping[str, Estimate]) -> History:
        """Return the table with one more row.

        Args:
            step: Its step.
            row: Name of each quantity to its estimate.

        Returns:
            A new table.

        Raises:
            ShapeError: If a quantity has another shape than in the rows before.
        """
        columns: dict[str, dict[str, Tensor]] = {}
        for name in self.quantities:
            cell = row[name]
            value = cell.value.detach().cpu().double()
            known = self.values.get(name)
            if known is not None and known.shape[1:] != value.shape:
                raise ShapeError(
                    f"{name!r} has shape {tuple(value.shape)} at step {step} and {tuple(known.shape[1:])} "
                    "before; a quantity keeps its shape along training"
                )
            columns[name] = {
                "values": value,
                "stderrs": cell.stderr.detach().cpu().double().expand_as(value),
                "intervals": torch.stack(
                    [end.detach().cpu().double().expand_as(value) for end in cell.interval]
                ),
                "exact": torch.tensor(cell.exact),
                "converged": torch.tensor(cell.converged),
                "passes": torch.tensor(cell.passes),
            }
        grown: dict[str, Any] = {
            part: {
                name: _grow(getattr(self, part).get(name), columns[name][part]) for name in self.quantities
            }
            for part in _PARTS
        }
        return dataclasses.replace(self, steps=(*self.steps, step), **grown)

    def head(self, count: int) -> History:
        """Return the first rows alone."""
        cut: dict[str, Any] = {
            part: {name: t[:count] for name, t in getattr(self, part).items()} for part in _PARTS
        }
        return dataclasses.replace(self, steps=self.steps[:count], **cut)

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self.steps)

    def __getitem__(self, name: str) -> Tensor:
        """Return the values of a quantity, ``(R, *shape)``.

        Raises:
            InputError: If there is no such quantity, or no row yet.
        """
        if name not in self.quantities:
            raise InputError(f"there is no quantity {name!r}; there are {', '.join(self.quantities)}")
        if name not in self.values:
            raise InputError("no checkpoint has been recorded yet")
        return self.values[name]

    def to_dict(self) -> dict[str, Any]:
        """Return plain numbers and lists, ready for JSON (NaN and infinity as Python writes them)."""
        return {
            "steps": list(self.steps),
            "seed": self.seed,
            "quantities": {
                name: {part: getattr(self, part)[name].tolist() for part in _PARTS}
                for name in self.quantities
                if name in self.values
            },
        }

    def to_csv(self, path: str | os.PathLike[str] | None = None) -> str:
        """Return the table as comma-separated values, and write it where a path is given.

        Each quantity has columns of its values, its standard errors and the ends of its 95 % intervals; one
        with a shape has these for each entry, as in ``top_eigenvalues[0]``. Numbers are written in full.

        Args:
            path: File to write; None for none.

        Returns:
            The text.
        """
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        flat = self._flat()
        ends = ("", "_stderr", "_low", "_high")
        writer.writerow(["step", *(f"{name}{end}" for name in flat for end in ends)])
        for row, step in enumerate(self.steps):
            cells = (repr(float(column[row])) for columns in flat.values() for column in columns)
            writer.writerow([step, *cells])
        if path is not None:
            Path(path).write_text(text.getvalue(), encoding="utf-8")
        return text.getvalue()

    def _flat(self) -> dict[str, tuple[Tensor, ...]]:
        """Return values, errors and ends ``(R,)`` of every number of a row by its title."""
        found: dict[str, tuple[Tensor, ...]] = {}
        for name, values in self.values.items():
            columns = values, self.stderrs[name], *self.intervals[name].unbind(1)
            if values.dim() == 1:
                found[name] = columns
                continue
            # a quantity with a shape has a column for each of its numbers
            wide = [column.flatten(1) for column in columns]
            for position in range(wide[0].shape[1]):
                found[f"{name}[{position}]"] = tuple(column[:, position] for column in wide)
        return found

    def _rows(self) -> list[tuple[str, ...]]:
        columns = [["step", *(f"{step:g}" for step in self.steps)]]
        for name, (values, _, lows, highs) in self._flat().items():
            cells = zip(values.tolist(), lows.tolist(), highs.tolist(), strict=True)
            columns.append([name, *(value_with_interval(*cell) for cell in cells)])
        return list(zip(*columns, strict=True))

    def __str__(self) -> str:
        """Show a line for each row; a value that is not exact shows its 95 % interval."""
        return table_text(self._rows())

    def _repr_html_(self) -> str:
        """Show the same table in a notebook."""
        header, *rows = self._rows()
        return table_html(header, rows, repr(self))

    def __repr__(self) -> str:
        """Show the size of the table."""
        return f"History({len(self)} rows, quantities={list(self.quantities)})"


_PARTS = ("values", "stderrs", "intervals", "exact", "converged", "passes")


def _grow(known: Tensor | None, fresh: Tensor) -> Tensor:
    return fresh[None].clone() if known is None else torch.cat([known, fresh[None]])


# -- scores of several networks


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
            rows.append([name, *(format_estimate(column[number]) for column in self.estimates.values())])
        return rows

    def _repr_html_(self) -> str:
        """Show the same table in a notebook."""
        header, *rows = self._rows()
        return table_html(header, rows)

    def __str__(self) -> str:
        """Show a line for each network."""
        return table_text(self._rows())

    __repr__ = __str__
