"""Settings of Algorithm 1 compared on the training samples, since its size is an outcome and no option."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from linear_operator.operators import LinearOperator
from torch import Tensor
from tqdm import tqdm

from ..arguments import checked
from ..engines import count_passes
from ..errors import InputError
from ..regression._operands import read_labels
from ..regression.metrics import fidelity, mean_squared_error
from ..results import DistillationInfo, LocalGlobalTrial
from ..vectors import resolve_generator
from ._features import narrow_features
from ._kernels import Kernels, dense_of, read_count, read_square
from ._local_spectra import LocalSpectra, check_weight
from .clusters import check_affinity
from .distilled import Distilled
from .local_global import ClassMean, Columns, Stages, check_thresholds, reduce_columns, run_stages

__all__ = ["local_global_grid", "search_local_global"]

CLUSTERS = (2, 3, 4, 5, 6, 8, 10, 12, 15, 20, 30, 50)
VARIANCE = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95, 0.98)
GAP = (0.0, 0.3, 0.5, 0.7, 0.8, 0.9, 0.95, 0.98)
_WINDOW = 0.8  # of the wanted size: a smaller set is another trade


@checked
def search_local_global(
    K: Kernels,
    Y: Tensor,
    s: int,
    *,
    clusters: Sequence[int] = CLUSTERS,
    variance_thresholds: Sequence[float] = VARIANCE,
    gap_thresholds: Sequence[float] = GAP,
    coverage: str = "sum",
    orthogonalize: str = "basis",
    class_weight: str | None = None,
    affinity: str = "cosine",
    ridge: float = 1e-4,
    generator: torch.Generator | None = None,
    progress: bool = False,
) -> Distilled:
    """Distil about s gradients by Algorithm 1, with the setting that fits the training samples best.

    Among all settings that give from 0.8 s to s gradients the one with the largest fidelity of the sketched
    fit to the targets of the m points wins, then that with the smallest mean squared error. No test sample
    takes part, so that the choice is one that a user could make.

    Args:
        K: Kernel ``(m, m)``, kernels ``(C, m, m)``, or a sequence of them; made dense, or seen
            by features, as `local_global` does.
        Y: Targets ``(m, C)``, the network's logits, or ``(m,)``.
        s: Wanted number of gradients, from 1 to m.
        clusters: Values of H; those above m or s, which give too many gradients, are skipped.
        variance_thresholds: Values of τ_v.
        gap_thresholds: Values of τ_g.
        coverage: As for `local_global`.
        orthogonalize: As for `local_global`.
        class_weight: As for `local_global`.
        affinity: As for `local_global`.
        ridge: Of the compared fits, relative to the mean diagonal of K.
        generator: CPU generator that seeds the clusterings; None draws a seed.
        progress: Show a bar of clusterings.

    Returns:
        `Distilled`, as `local_global` returns it with the winning setting; ``info.details`` holds ``trials``,
        too: a `LocalGlobalTrial` for every setting that was compared. Cost: a clustering and the local
        eigendecompositions for each H, and a small fit for each different set of gradients.

    Raises:
        InputError: If no setting gives from 0.8 s to s gradients, or an option is out of range.
        ShapeError: If kernels and targets do not fit.
        ZeroKernelError: If the kernel is zero, or a sample has no gradient.
        DenseMemoryError: If a kernel refuses to be dense.
        MissingDependencyError: If scikit-learn is missing.

    Example:
        >>> import torch
        >>> from ntkops.distill import search_local_global
        >>> F = torch.randn(30, 5, generator=torch.Generator().manual_seed(0)).double()
        >>> seed = torch.Generator().manual_seed(0)
        >>> search_local_global(F @ F.mT, F, 4, generator=seed).size
        4
    """
    start = time.perf_counter()
    kernel = read_square(K)
    size = read_count(s, kernel.shape[-1])
    generator, seed = resolve_generator(generator)
    allowed = _Allowed(math.ceil(_WINDOW * size - 1e-9), size)
    numbers = [h for h in _checked(clusters) if h <= size]
    with count_passes() as counter:
        grid = _Grid.of(kernel, Y, coverage, orthogonalize, class_weight, affinity, ridge, generator)
    found = list(grid.run(numbers, variance_thresholds, gap_thresholds, allowed, generator, progress))
    if not found:
        raise InputError(
            f"no setting gives from {allowed.low} to {allowed.high} gradients; those next to them are "
            f"{allowed.nearest()}: give more values of clusters, variance_thresholds or gap_thresholds"
        )
    best = max(found, key=lambda one: one.trial.key)
    details = {
        **best.stages.describe(best.labels, best.columns),
        "variance_threshold": best.trial.variance_threshold,
        "gap_threshold": best.trial.gap_threshold,
        "coverage_rule": coverage,
        "orthogonalize": orthogonalize,
        "order": "paper",
        "budget": None,
        "class_weight": class_weight,
        **grid.mean.describe(),
        "trials": tuple(one.trial for one in found),
    }
    info = DistillationInfo(
        method="search_local_global",
        class_mean=kernel.dim() == 3,
        passes=counter.total,
        seed=seed,
        seconds=time.perf_counter() - start,
        details=details,
    )
    return Distilled.of(kernel, best.columns.matrix.to(kernel.dtype), Y, info=info)


@checked
def local_global_grid(
    K: Kernels,
    Y: Tensor,
    *,
    clusters: Sequence[int] = (5, 10, 15, 20),
    variance_thresholds: Sequence[float] = VARIANCE,
    gap_thresholds: Sequence[float] = GAP,
    coverage: str = "sum",
    orthogonalize: str = "basis",
    class_weight: str | None = None,
    affinity: str = "cosine",
    ridge: float = 1e-4,
    generator: torch.Generator | None = None,
    progress: bool = False,
) -> tuple[LocalGlobalTrial, ...]:
    """Return size and fit of Algorithm 1 for every setting of a grid, as the paper's figure 9 shows them.

    Args:
        K: Kernel ``(m, m)``, kernels ``(C, m, m)``, or a sequence of them; made dense, or seen
            by features, as `local_global` does.
        Y: Targets ``(m, C)``, the network's logits, or ``(m,)``.
        clusters: Values of H, at most m.
        variance_thresholds: Values of τ_v.
        gap_thresholds: Values of τ_g.
        coverage: As for `local_global`.
        orthogonalize: As for `local_global`.
        class_weight: As for `local_global`.
        affinity: As for `local_global`.
        ridge: Of the fits, relative to the mean diagonal of K.
        generator: CPU generator that seeds the clusterings; None draws a seed.
        progress: Show a bar of clusterings.

    Returns:
        One `LocalGlobalTrial` a setting, H slowest, then τ_v, then τ_g.

    Raises:
        InputError: If an option is out of range.
        ShapeError: If kernels and targets do not fit.
        DenseMemoryError: If a kernel refuses to be dense.
        MissingDependencyError: If scikit-learn is missing.

    Example:
        >>> import torch
        >>> from ntkops.distill import local_global_grid
        >>> F = torch.randn(20, 5, generator=torch.Generator().manual_seed(0)).double()
        >>> options = dict(variance_thresholds=[0.3, 0.9], gap_thresholds=[0.5])
        >>> seed = torch.Generator().manual_seed(0)
        >>> trials = local_global_grid(
        ...     F @ F.mT, F, clusters=[2], **options, generator=seed
        ... )
        >>> [trial.num_local for trial in trials]
        [2, 6]
    """
    kernel = read_square(K)
    generator, _ = resolve_generator(generator)
    grid = _Grid.of(kernel, Y, coverage, orthogonalize, class_weight, affinity, ridge, generator)
    allowed = _Allowed(1, kernel.shape[-1])
    found = grid.run(_checked(clusters), variance_thresholds, gap_thresholds, allowed, generator, progress)
    return tuple(one.trial for one in found)


def _checked(clusters: Sequence[int]) -> list[int]:
    for number in clusters:
        if isinstance(number, bool) or not isinstance(number, int) or number < 1:
            raise InputError(f"clusters={list(clusters)!r}: positive integers")
    return list(clusters)


class _Allowed:
    """Sizes that are looked for, and those that were seen and are none of them."""

    def __init__(self, low: int, high: int) -> None:
        self.low, self.high, self._missed = low, high, set[int]()

    def __contains__(self, size: int) -> bool:
        if self.low <= size <= self.high:
            return True
        self._missed.add(size)
        return False

    def within_reach(self, num_local: int) -> bool:
        """Whether so many local columns can be part of it: step 6 drops none, they are orthonormal."""
        return num_local <= self.high or num_local in self

    def nearest(self) -> str:
        """Return the sizes next to the allowed ones."""
        below = [n for n in self._missed if n < self.low]
        above = [n for n in self._missed if n > self.high]
        return " and ".join(map(str, sorted(below)[-1:] + sorted(above)[:1])) or "none"


@dataclass(frozen=True, eq=False)
class _Found:
    """A setting, what it gave, and how it fits."""

    trial: LocalGlobalTrial
    labels: Tensor
    stages: Stages
    columns: Columns


@dataclass(frozen=True, eq=False)
class _Grid:
    """What all settings share.

    Attributes:
        kernels: Class kernels, dense in float64; or as they are where features are seen.
        mean: What is seen of their mean.
        targets: Y in the dtype of the kernels.
        ridge: Relative ridge.
        rule: Coverage rule.
        orthogonalize: Step 6.
    """

    kernels: Tensor | LinearOperator
    mean: ClassMean
    targets: Tensor
    ridge: float
    rule: str
    orthogonalize: str

    @classmethod
    def of(
        cls,
        kernel: LinearOperator,
        Y: Tensor,
        rule: str,
        orthogonalize: str,
        class_weight: str | None,
        affinity: str,
        ridge: float,
        generator: torch.Generator,
    ) -> _Grid:
        check_affinity(affinity)
        check_weight(class_weight)
        _, labels = read_labels(Y, kernel.shape, kernel.dtype, kernel.device)
        known = narrow_features(kernel, class_weight, generator)
        kernels = dense_of(kernel, "local_global") if known is None else kernel
        mean = ClassMean.of(kernels, known, class_weight, affinity)
        return cls(kernels, mean, labels.to(kernels.dtype), ridge, rule, orthogonalize)

    def run(
        self,
        clusters: Sequence[int],
        variance_thresholds: Sequence[float],
        gap_thresholds: Sequence[float],
        allowed: _Allowed,
        generator: torch.Generator,
        progress: bool,
    ) -> Iterator[_Found]:
        """Yield the settings of allowed size; equal sets of gradients are fitted once."""
        for variance in variance_thresholds:
            for gap in gap_thresholds:
                check_thresholds(variance, gap)
        for number in tqdm(clusters, desc="local-global", unit="clustering", disable=not progress):
            if number > len(self.mean.matrix):
                continue
            labels = self.mean.clustered(number, generator)
            spectra = self.mean.spectra(labels)
            known: dict[tuple[tuple[int, ...], tuple[int, ...]], _Found] = {}
            for variance in variance_thresholds:
                for gap in gap_thresholds:
                    stages = self._stages(spectra, variance, gap, allowed)
                    if stages is None:
                        continue
                    key = stages.local_ranks, tuple(stages.gaps.tolist())
                    if key not in known:
                        known[key] = self._fit(labels, stages)
                    seen = known[key]
                    setting = {"clusters": number, "variance_threshold": variance, "gap_threshold": gap}
                    if seen.trial.size in allowed:
                        yield dataclasses.replace(seen, trial=dataclasses.replace(seen.trial, **setting))

    def _stages(self, spectra: LocalSpectra, variance: float, gap: float, allowed: _Allowed) -> Stages | None:
        """Return the stages where enough columns come together, and not too many local ones."""
        if not allowed.within_reach(sum(spectra.ranks(variance)[1])):
            return None
        stages = run_stages(spectra, variance, gap, self.rule)
        return stages if len(stages.columns) in allowed or len(stages.columns) > allowed.high else None

    def _fit(self, labels: Tensor, stages: Stages) -> _Found:
        columns = reduce_columns(stages.columns, self.orthogonalize, "paper")
        matrix = columns.matrix.to(self.targets.dtype)
        fitted = Distilled(matrix).fit(self.kernels, self.targets, ridge=self.ridge, fit="sketch")
        predictions = fitted.predict(self.kernels)
        several = self.targets.dim() > 1 and self.targets.shape[-1] > 1
        gaps = int((columns.cluster < 0).sum())
        trial = LocalGlobalTrial(
            clusters=0,
            variance_threshold=0.0,
            gap_threshold=0.0,
            size=len(columns),
            num_local=len(columns) - gaps,
            num_gaps=gaps,
            fidelity=fidelity(predictions, self.targets) if several else None,
            mean_squared_error=mean_squared_error(predictions, self.targets),
        )
        return _Found(trial, labels, stages, columns)
