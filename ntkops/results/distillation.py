"""Distilled sets: how they were found, what they keep, and what each stage of the chain costs."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .estimate import PassCount
from .html import table_html, table_text

__all__ = [
    "Barycenter",
    "ChainReport",
    "ChainRun",
    "ChainStep",
    "Containment",
    "DistillationInfo",
    "InducingPoints",
    "LocalGlobalProperties",
    "LocalGlobalTrial",
    "SelectedInputs",
    "SyntheticData",
    "VarianceTransfer",
]


@dataclass(frozen=True, eq=False)
class DistillationInfo:
    """What a method of distillation did.

    Attributes:
        method: Its name; "given" for coefficients that were passed in.
        class_mean: Whether it worked on the mean of the class kernels instead of on each.
        converged: Whether an iteration met its tolerance; True where there is none.
        passes: Passes made.
        seed: Seed of what was drawn; None if nothing was.
        seconds: Wall-clock time.
        details: What only this method has to say, by name.
    """

    method: str
    class_mean: bool = False
    converged: bool = True
    passes: int = 0
    seed: int | None = None
    seconds: float = 0.0
    details: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class SelectedInputs:
    """Samples that stand for all, chosen without a gradient.

    Attributes:
        indices: ``(m,)`` their positions, class by class where there were labels, each class in the order in
            which they were chosen.
        weights: ``(m,)`` float64: the number of samples that each stands for, those that are nearest to it
            among the chosen ones of its class, over their mean N/m. Their mean is 1, as
            `ntkops.KernelRidge.fit` takes them for ``sample_weight``.
        labels: ``(m,)`` their classes; None without.
        cost: Mean squared distance of the samples to those that stand for them: W₂² between the empirical
            measure and the weighted one on the chosen samples, within the classes.
        method: How they were chosen.
        seed: Seed of the draws.
        seconds: Wall-clock time.
    """

    indices: Tensor
    weights: Tensor
    labels: Tensor | None
    cost: float
    method: str
    seed: int
    seconds: float


# -- local-global distillation: how clusters and the whole kernel cover each other, and settings tried


@dataclass(frozen=True, eq=False)
class LocalGlobalProperties:
    """Properties (A) and (B) of a partition, with what they are on any partition.

    Attributes:
        epsilon: ε, the share of each trace that truncation may lose.
        global_rank: r_g, the truncation rank of the kernel.
        local_ranks: r_h, those of its blocks.
        local_containment: ``(H,)`` (A) for each cluster: the share of its truncated variance inside the
            restricted global eigenvectors, float64, as all. No bound holds for one cluster.
        pooled_containment: The same share over all clusters together.
        pooled_bound: 1 - ε / (1 - ε), which it reaches on every partition.
        untruncated_containment: The share with all local eigenvectors.
        untruncated_bound: 1 - ε, which it reaches on every partition.
        coverage: ``(r_g,)`` (B): |Π_loc u_j|², what the local eigenvectors of all cover of each global one.
        weighted_gap: Share of the variance of the r_g eigenvectors outside that span.
        weighted_gap_bound: ε / (1 - ε), which it does not exceed on any partition.
        mean_gap: Mean of 1 - |Π_loc u_j|², each eigenvector counting alike; nothing bounds it.
        single_gap: Mean of 1 - max_h of the share that one cluster covers of what it holds of u_j.
        random: The same for random partitions into clusters of the same sizes.
    """

    epsilon: float
    global_rank: int
    local_ranks: tuple[int, ...]
    local_containment: Tensor
    pooled_containment: float
    pooled_bound: float
    untruncated_containment: float
    untruncated_bound: float
    coverage: Tensor
    weighted_gap: float
    weighted_gap_bound: float
    mean_gap: float
    single_gap: float
    random: tuple[LocalGlobalProperties, ...] = ()


@dataclass(frozen=True, eq=False)
class Containment:
    """Which global eigenvectors the clusters use, and which of them their own eigenvectors cover.

    Attributes:
        epsilon: ε of all truncation ranks.
        cumulative: ``(H, r_g)`` share of a cluster's truncated variance inside the first r global
            eigenvectors, restricted to it, float64, as all.
        variance: ``(H, r_g)`` u_jᵀ K_h u_j / tr K_h with u_j restricted to the cluster.
        energy: ``(H, r_g)`` |u_j|² on the cluster; columns sum to 1.
        covered: ``(H, r_g)`` what its truncated eigenvectors cover of that.
        values: ``(r_g,)`` global eigenvalues.
        sizes: ``(H,)`` numbers of samples, int64.
        local_ranks: r_h.
    """

    epsilon: float
    cumulative: Tensor
    variance: Tensor
    energy: Tensor
    covered: Tensor
    values: Tensor
    sizes: Tensor
    local_ranks: tuple[int, ...]

    @property
    def alignment(self) -> Tensor:
        """``(H, r_g)`` covered share of what a cluster holds of an eigenvector; 0 where it holds nothing."""
        # what a cluster holds of u_j by rounding alone has no share that could be covered
        held = self.energy > 100 * torch.finfo(self.energy.dtype).eps
        return torch.where(held, self.covered / torch.where(held, self.energy, 1.0), 0.0).clamp(max=1)

    @property
    def union(self) -> Tensor:
        """``(r_g,)`` |Π_loc u_j|², what all clusters together cover of each eigenvector."""
        return self.covered.sum(0).clamp(max=1)


@dataclass(frozen=True)
class LocalGlobalTrial:
    """One setting of Algorithm 1, and how well its distilled set fits the samples that it was made of.

    Attributes:
        clusters: H.
        variance_threshold: τ_v.
        gap_threshold: τ_g.
        size: s, the number of distilled gradients.
        num_local: How many of them belong to clusters.
        num_gaps: How many belong to gaps.
        fidelity: Share of the training samples on which the fit and the targets name the same class;
            None for a single target.
        mean_squared_error: Of the fit on the training samples' targets.
    """

    clusters: int
    variance_threshold: float
    gap_threshold: float
    size: int
    num_local: int
    num_gaps: int
    fidelity: float | None
    mean_squared_error: float

    @property
    def key(self) -> tuple[float, float]:
        """What settings are compared by, larger is better: fidelity, then the smaller error."""
        return (0.0 if self.fidelity is None else self.fidelity, -self.mean_squared_error)


@dataclass(frozen=True, eq=False)
class VarianceTransfer:
    """How far posterior variances from a distilled set are from those of all samples.

    Attributes:
        relative: ``(C,)`` or ``()`` mean of |v_s - v| over the mean of v, float64, as all.
        variance: ``(M,)`` or ``(M, C)`` posterior variances from all points.
        distilled: Those from the distilled set, in the same shape.
        ridge: Absolute ridge of both.
    """

    relative: Tensor
    variance: Tensor
    distilled: Tensor
    ridge: float


# -- samples that were synthesised: from a model's features, or from its kernel


@dataclass(frozen=True, eq=False)
class Barycenter:
    """A measure on few points near a measure on many, in the 2-Wasserstein metric.

    Attributes:
        points: ``(k, d)`` float64.
        weights: ``(k,)`` float64, not negative; they sum to 1.
        cost: W₂² between the two measures: exact for these points and weights.
        seed: Seed of the draws.
    """

    points: Tensor
    weights: Tensor
    cost: float
    seed: int


@dataclass(frozen=True, eq=False)
class SyntheticData:
    """Labelled samples that stand for a data set; class by class, ``points_per_class`` each.

    Attributes:
        inputs: ``(s, *shape)``, as the model takes them.
        targets: ``(s, C)`` logits of the model at them.
        labels: ``(s,)`` int64 class of each.
        weights: ``(s,)`` float64 weight in the barycentre of its class; they sum to 1 over a class.
        transport: ``(C,)`` float64 W₂² between the features of a class and its barycentre.
        losses: ``(iterations + 1,)`` float64, from the start to the last iterate.
        terms: The parts that the losses are weighted sums of, of the same shape, by name.
        iteration: Which iterate this is.
        indices: ``(s,)`` samples at which the synthesis started; None where it started at noise.
        seed: Seed of the draws.
        seconds: Time of this call; that of a run that it continues is not counted.
    """

    inputs: Tensor
    targets: Tensor
    labels: Tensor
    weights: Tensor
    transport: Tensor
    losses: Tensor
    terms: Mapping[str, Tensor] = field(default_factory=dict)
    iteration: int = 0
    indices: Tensor | None = None
    seed: int | None = None
    seconds: float = 0.0

    @property
    def loss(self) -> float:
        """Loss of these samples."""
        return float(self.losses[self.iteration])


@dataclass(frozen=True, eq=False)
class InducingPoints:
    """Inputs that were moved until their gradients span what a kernel needs.

    Attributes:
        inputs: ``(m, *shape)``, as the model takes them.
        targets: ``(m, ...)`` targets of a regression on them; None for the objective "energy".
        objective: "energy" or "regression".
        loss: Their loss on all real samples: for "energy" the share of tr K that they leave out, for
            "regression" the squared error as a share of the squared targets.
        start_loss: That of the points that the descent started from; ``loss`` is never above it.
        losses: ``(iterations + 1,)`` float64 along the way; on batches, those of the batches.
        iteration: Which iterate this is.
        jitter: Largest multiple of the mean diagonal of K_ZZ that was added to it. With it the loss of
            "energy" is an upper bound: what `ntkops.operators.energy_gap` finds is not above.
        ridge: Absolute ridge of the regression; None for "energy".
        indices: Samples at which the descent started; None where these were inputs of their own.
        seed: Seed of the draws.
        seconds: Time of this call; that of a run that it continues is not counted.
    """

    inputs: Tensor
    targets: Tensor | None
    objective: str
    loss: float
    start_loss: float
    losses: Tensor
    iteration: int
    jitter: float
    ridge: float | None = None
    indices: Tensor | None = None
    seed: int | None = None
    seconds: float = 0.0


# -- the distilled chain: what each stage costs, and what it leaves of the accuracy


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
        return table_text(self._rows())

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
