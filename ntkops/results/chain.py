"""The distilled chain: what each stage costs, and what it leaves of the accuracy."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from .estimate import PassCount
from .html import table_html

__all__ = ["ChainReport", "ChainRun", "ChainStep"]


@dataclass(frozen=True)
class ChainStep:
    """One step of a run.

    Attributes:
        name: "data", "kernel", "gradients", "regression" or "prediction".
        passes: Passes that it made; a per-sample pass goes through all samples of the run, and ``products``
            are columns multiplied by numbers that are there already.
        seconds: Time on the clock.
    """

    name: str
    passes: PassCount
    seconds: float


@dataclass(frozen=True)
class ChainRun:
    """One run from the data to predictions, with some of the three stages.

    Attributes:
        stages: Which of "data", "projection" and "gradients" took part.
        num_points: m, points whose gradients were taken.
        num_features: Numbers in a gradient: k, or the number of parameters without projection.
        num_gradients: s, gradients that the regression is in; m without distillation.
        num_outputs: C, outputs of the network.
        fidelity: Share of the test samples on which regression and network name the same class; None for one
            output.
        accuracy: Share that the regression gets right; None without labels.
        mean_squared_error: Of the logits.
        jacobian_rows: m C, gradients of logits on the training side.
        gradient_bytes: s k C numbers: the gradients that a predictor keeps.
        kernel_bytes: C m² numbers: the kernels from which gradients are distilled or coefficients solved.
        solve_flops: C s³ / 3, the solve alone.
        steps: What was done, in order.
    """

    stages: tuple[str, ...]
    num_points: int
    num_features: int
    num_gradients: int
    num_outputs: int
    fidelity: float | None
    accuracy: float | None
    mean_squared_error: float
    jacobian_rows: int
    gradient_bytes: int
    kernel_bytes: int
    solve_flops: float
    steps: tuple[ChainStep, ...]

    @property
    def seconds(self) -> float:
        """Time of all steps."""
        return sum(step.seconds for step in self.steps)

    @property
    def passes(self) -> int:
        """Passes through the network of all steps, through few samples or many."""
        return sum(map(_through_network, self.steps))

    @property
    def kernel_flops(self) -> float:
        """Operations of the kernels between all points, m² k C: one for each number of each pair."""
        return float(self.num_points) ** 2 * self.num_features * self.num_outputs

    @property
    def prediction_passes(self) -> int:
        """Passes on the test side, which no stage saves: those of the step "prediction"."""
        return sum(_through_network(step) for step in self.steps if step.name == "prediction")

    @property
    def prediction_seconds(self) -> float:
        """Time on the test side."""
        return sum(step.seconds for step in self.steps if step.name == "prediction")

    def to_dict(self) -> dict[str, Any]:
        """Return plain numbers, strings and lists, ready for JSON."""
        plain = {key: value for key, value in vars(self).items() if key not in ("stages", "steps")}
        found = ("seconds", "passes", "kernel_flops", "prediction_passes", "prediction_seconds")
        steps = [
            {"name": step.name, "passes": _through_network(step), "seconds": step.seconds}
            for step in self.steps
        ]
        return {
            "stages": list(self.stages),
            **plain,
            **{name: getattr(self, name) for name in found},
            "steps": steps,
        }

    def __str__(self) -> str:
        """Show the stages and what they leave."""
        accuracy = "" if self.accuracy is None else f", accuracy {self.accuracy:.3f}"
        fidelity = "" if self.fidelity is None else f", fidelity {self.fidelity:.3f}"
        return (
            f"{' + '.join(self.stages) or 'nothing distilled'}: {self.num_points} points, "
            f"{self.num_features} features, {self.num_gradients} gradients{accuracy}{fidelity}"
        )


def _through_network(step: ChainStep) -> int:
    return step.passes.total - step.passes.products


_COLUMNS = (  # header, attribute of a run, format
    ("points", "num_points", ".4g"),
    ("features", "num_features", ".6g"),
    ("gradients", "num_gradients", ".4g"),
    ("accuracy", "accuracy", ".3f"),
    ("fidelity", "fidelity", ".3f"),
    ("seconds", "seconds", ".3g"),
)
_MEASURED = ("accuracy", "fidelity", "mean_squared_error", "num_gradients", "seconds")


def _cell(values: Sequence[float | None], form: str) -> str:
    """Return a value, or the mean of several with the least and the largest."""
    known = [value for value in values if value is not None]
    if not known:
        return ""
    low, high = (f"{end:{form}}" for end in (min(known), max(known)))
    return low if low == high else f"{statistics.fmean(known):{form}} ({low} to {high})"


@dataclass(frozen=True, repr=False)
class ChainReport:
    """Runs of the distilled chain, stage upon stage, and with one stage left out.

    Attributes:
        stages: The runs with no stage, with the first, with the first two, ...
        ablations: By the name of the stage that was left out of the whole chain.
        repeats: The same with other draws, a report for each further seed. A run that draws nothing is the
            same in all of them.
    """

    stages: tuple[ChainRun, ...]
    ablations: dict[str, ChainRun]
    repeats: tuple[ChainReport, ...] = ()

    @property
    def full(self) -> ChainRun:
        """The run in which nothing is distilled."""
        return self.stages[0]

    @property
    def distilled(self) -> ChainRun:
        """The run with all stages."""
        return self.stages[-1]

    def runs(self) -> dict[str, tuple[ChainRun, ...]]:
        """Return every run by its name, such as "data + projection" or "without data": one for each seed."""
        names = [" + ".join(run.stages) or "nothing distilled" for run in self.stages]
        names += [f"without {name}" for name in self.ablations]
        seeds = [(*one.stages, *one.ablations.values()) for one in (self, *self.repeats)]
        return dict(zip(names, zip(*seeds, strict=True), strict=True))

    def _rows(self) -> list[tuple[str, ...]]:
        count = 1 + len(self.repeats)
        corner = f"mean of {count} seeds (range)" if count > 1 else ""
        rows = [(corner, *(header for header, _, _ in _COLUMNS))]
        for name, runs in self.runs().items():
            cells = (_cell([getattr(run, key) for run in runs], form) for _, key, form in _COLUMNS)
            rows.append((name, *cells))
        return rows

    def __str__(self) -> str:
        """Show a line for each run."""
        rows = self._rows()
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        return "\n".join(
            "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows
        )

    __repr__ = __str__

    def _repr_html_(self) -> str:
        """Show the same table in a notebook."""
        header, *rows = self._rows()
        return table_html(header, rows)

    def reduction(self, run: ChainRun | None = None) -> dict[str, float]:
        """Return how many times less a run takes than the full one: each figure by itself, never multiplied.

        Args:
            run: One of the runs; None for the one with all stages, of the first seed.

        Returns:
            "jacobian_rows", "gradient_bytes", "kernel_bytes", "kernel_flops" and "solve_flops" as ratios of
            the counts, "seconds" as the ratio of what was really spent, distillation and prediction included.
        """
        run = run or self.distilled
        counts = (
            "jacobian_rows",
            "gradient_bytes",
            "kernel_bytes",
            "kernel_flops",
            "solve_flops",
            "seconds",
        )
        return {name: getattr(self.full, name) / max(getattr(run, name), 1e-12) for name in counts}

    def to_dict(self) -> dict[str, Any]:
        """Return plain numbers, strings and lists, ready for JSON.

        Returns:
            "stages": the runs as `ChainRun.to_dict` has them, "ablations": those by the stage left out. A
            table of them is ``pandas.DataFrame(report.to_dict()["stages"])``. Of several seeds "repeats" are
            the others' reports, and "summary" has by the name of a run and of what was measured the "mean"
            and the standard deviation "std" over seeds.
        """
        found: dict[str, Any] = {
            "stages": [run.to_dict() for run in self.stages],
            "ablations": {name: run.to_dict() for name, run in self.ablations.items()},
        }
        if self.repeats:
            found["repeats"] = [one.to_dict() for one in self.repeats]
            found["summary"] = {name: _summary(runs) for name, runs in self.runs().items()}
        return found


def _summary(runs: Sequence[ChainRun]) -> dict[str, dict[str, float]]:
    """Return mean and standard deviation over seeds of what was measured."""
    columns = {name: [getattr(run, name) for run in runs] for name in _MEASURED}
    return {
        name: {"mean": statistics.fmean(values), "std": statistics.stdev(values)}
        for name, values in columns.items()
        if None not in values
    }
