"""Curves of the distilled-kernel benchmark: against points, rank, features, gradients, settings."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from _distilled_networks import Problem
from torch import Tensor

import ntkops
from ntkops.distill import (
    Distilled,
    local_global,
    local_global_grid,
    nystrom_error,
    posterior_variance_error,
    reconstruction_error,
    search_local_global,
    select,
    synthesize,
    transfer_accuracy,
    variance_coverage,
)
from ntkops.errors import InputError, InterpolationWarning
from ntkops.projections import SJLT, check_interpolation
from ntkops.regression import KernelRidge, metrics

__all__ = [
    "RIDGE",
    "SELECTIONS",
    "SYNTHESES",
    "feature_curve",
    "full_regression",
    "grid",
    "method_curves",
    "paired",
    "rank_curve",
    "sample_curve",
    "score",
    "transfer",
]

Row = dict[str, Any]
RIDGE = 1e-4
SELECTIONS = ("random", "leverage", "kmedoids", "fps", "rpcholesky", "greedy")
SYNTHESES = ("pca", "kmeans", "krylov", "galerkin", "als")
_DRAWS = {"random": 3, "leverage": 2, "fps": 2, "rpcholesky": 2, "kmedoids": 2}
_CLUSTERS = (2, 3, 4, 5, 6, 8, 10, 12, 15, 20)


def seeded(seed: int = 0) -> torch.Generator:
    """Return a generator with a seed."""
    return torch.Generator().manual_seed(seed)


def rounded(value: float, digits: int = 5) -> float:
    """Return a number to as many digits."""
    return float(f"{value:.{digits}g}")


def score(predictions: Tensor, problem: Problem) -> Row:
    """Return accuracy, fidelity and mean squared error on the test images."""
    return {
        "accuracy": rounded(metrics.accuracy(predictions, problem.data.y_test)),
        "fidelity": rounded(metrics.fidelity(predictions, problem.logits_test)),
        "mse": rounded(metrics.mean_squared_error(predictions, problem.logits_test)),
    }


def conditioning(kernels: Tensor) -> Row:
    """Return condition number and smallest eigenvalue, means over classes.

    The eigenvalue is relative to the mean diagonal; the mean of condition numbers is geometric.
    """
    scale = kernels.diagonal(dim1=-2, dim2=-1).mean()
    values = torch.linalg.eigvalsh(kernels)  # once, for what metrics would take twice
    low, high = values[..., 0], values[..., -1]
    positive = low > 0
    condition = float((high / low)[positive].log().mean().exp()) if bool(positive.any()) else None
    return {
        "condition": None if condition is None else rounded(condition),
        "smallest": rounded(float((low / scale).mean())),
    }


def full_regression(problem: Problem) -> Row:
    """Return the regression on all points: figures' dashed line."""
    predictions = KernelRidge(RIDGE).fit(problem.K, problem.targets).predict(problem.cross)
    return score(predictions, problem)


def sample_curve(problem: Problem, per_class: Sequence[int]) -> list[Row]:
    """Figure 1: regression on more and more points, evenly over classes."""
    numbers = torch.zeros(len(problem.classes), dtype=torch.int64)
    for label in problem.classes.unique():
        own = problem.classes == label
        numbers[own] = torch.arange(int(own.sum()))
    rows = []
    for count in per_class:
        chosen = (numbers < count).nonzero().squeeze(-1)
        K = problem.K[:, chosen][:, :, chosen]
        fitted = KernelRidge(RIDGE).fit(K, problem.targets[chosen])
        found = score(fitted.predict(problem.cross[:, :, chosen]), problem)
        rows.append({"m": len(chosen), **found, **conditioning(K)})
    return rows


def rank_curve(problem: Problem, ranks: Sequence[int]) -> list[Row]:
    """Figure 5: a spectral cut-off at rank r."""
    rows = []
    for rank in ranks:
        fitted = KernelRidge(RIDGE, cutoff=rank).fit(problem.K, problem.targets)
        rows.append({"rank": rank, **score(fitted.predict(problem.cross), problem)})
    return rows


def feature_curve(problem: Problem, counts: Sequence[int], ridges: Sequence[float]) -> list[Row]:
    """Return regression on k projected features, and whether the interpolation warning is given."""
    rows = []
    points = len(problem.points)
    for k in counts:
        projection = SJLT(dim=problem.num_parameters, k=k, seed=k)
        seen = ntkops.projected_ntk(problem.operator, projection)
        across = seen.cross(problem.x_test)
        with torch.no_grad():
            features, features_test = seen.features(), across.left.to_dense()
        K, cross = features @ features.mT, features_test @ features.mT
        for ridge in ridges:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                check_interpolation(k, points, ridge)
                fitted = KernelRidge(ridge).fit(K, problem.targets)
            warned = any(issubclass(found.category, InterpolationWarning) for found in caught)
            rows.append({"k": k, "ridge": ridge, "warned": warned, **score(fitted.predict(cross), problem)})
    return rows


# sets of distilled gradients


@dataclass(frozen=True, eq=False)
class _Made:
    """A distilled set, where it comes from, and the time that it took."""

    method: str
    wanted: int
    draw: int
    found: Distilled
    seconds: float


def _made(method: str, wanted: int, draw: int, make: Callable[[], Distilled]) -> _Made:
    started = time.process_time()
    found = make()
    return _Made(method, wanted, draw, found, time.process_time() - started)


def _selections(problem: Problem, sizes: Sequence[int]) -> Iterator[_Made]:
    for method in SELECTIONS:
        for wanted in sizes:
            for draw in range(_DRAWS.get(method, 1)):
                seed = seeded(1000 * draw + wanted)
                yield _made(method, wanted, draw, lambda m=method, s=wanted, g=seed: select(
                    problem.K, s, m, Y=problem.targets, generator=g))  # fmt: skip


def _syntheses(problem: Problem, sizes: Sequence[int]) -> Iterator[_Made]:
    for method in SYNTHESES:
        for wanted in sizes:
            yield _made(method, wanted, 0, lambda m=method, s=wanted: synthesize(
                problem.K, s, m, Y=problem.targets, ridge=RIDGE, generator=seeded()))  # fmt: skip


def _algorithm(problem: Problem, sizes: Sequence[int], printed: Sequence[int]) -> Iterator[_Made]:
    """Algorithm 1, repaired and as printed, its setting chosen on the fidelity to the training targets."""
    for name, wanted_sizes, options in (
        ("algorithm 1", sizes, {}),
        ("algorithm 1, printed", printed, {"coverage": "max", "orthogonalize": "filter"}),
    ):
        for wanted in wanted_sizes:
            try:
                yield _made(name, wanted, 0, lambda s=wanted, o=options: search_local_global(
                    problem.K, problem.targets, s, clusters=_CLUSTERS, generator=seeded(), **o))  # fmt: skip
            except InputError:  # no setting of the grid gives so many gradients
                continue


def _measured(problem: Problem, made: _Made) -> list[Row]:
    """Return both fits of a set, its conditioning and its coverage."""
    found, K = made.found, problem.K
    small = found.U.mT @ K @ found.U if found.indices is None else found.operator(K).to_dense()
    shared = {
        "method": made.method,
        "s": made.wanted,
        "size": found.size,
        "draw": made.draw,
        "seconds": rounded(made.seconds, 3),
        **conditioning((small + small.mT) / 2),
        "coverage": rounded(float(variance_coverage(K, found)), 8),
        "centred": rounded(float(variance_coverage(K, found, per="class", centred=True).mean())),
        "reconstruction": rounded(float(reconstruction_error(K, found, per="class").mean())),
    }
    details = found.info.details
    if "gaps" in details:
        shared["setting"] = [
            len(details["local_ranks"]), details["variance_threshold"], details["gap_threshold"],
            int((details["column_cluster"] < 0).sum()),
        ]  # fmt: skip
    rows = []
    for fit in ("sketch", "nystrom"):
        fitted = found.fit(K, problem.targets, ridge=RIDGE, fit=fit)
        rows.append({**shared, "fit": fit, **score(fitted.predict(problem.cross), problem)})
    return rows


def method_curves(problem: Problem, sizes: Sequence[int], printed: Sequence[int] = ()) -> list[Row]:
    """Figures 1, 3 and 6: every method at every size, with both fits."""
    rows: list[Row] = []
    for made in _selections(problem, sizes):
        rows += _measured(problem, made)
    for made in _syntheses(problem, sizes):
        rows += _measured(problem, made)
    for made in _algorithm(problem, sizes, printed):
        rows += _measured(problem, made)
    return rows


def paired(problem: Problem, clusters: Sequence[int], variances: Sequence[float]) -> Row:
    """Compare Algorithm 1 with as many principal components of the mean kernel, setting by setting."""
    K, targets = problem.K, problem.targets
    basis = torch.linalg.eigh(problem.mean).eigenvectors.flip(-1)
    counts = {"settings": 0, "coverage": 0, "centred": 0, "mse": 0, "mse_from_10": 0, "settings_from_10": 0}
    least = float("inf")
    for number in clusters:
        for variance in variances:
            seed = seeded(number)
            ours = local_global(K, targets, number, variance, 0.9, generator=seed)
            theirs = Distilled.of(K, basis[:, : ours.size].contiguous(), targets)
            margin = float(variance_coverage(K, theirs) - variance_coverage(K, ours))
            centred = [variance_coverage(K, d, per="class", centred=True).mean() for d in (theirs, ours)]
            errors = [
                metrics.mean_squared_error(
                    d.fit(K, targets, ridge=RIDGE, fit="sketch").predict(problem.cross), problem.logits_test
                )
                for d in (theirs, ours)
            ]
            least = min(least, margin)
            counts["settings"] += 1
            counts["coverage"] += margin >= -1e-10
            counts["centred"] += bool(centred[0] >= centred[1])
            counts["mse"] += errors[0] <= errors[1]
            if ours.size >= 10:
                counts["settings_from_10"] += 1
                counts["mse_from_10"] += errors[0] <= errors[1]
    return {**counts, "least_margin": rounded(least, 3)}


def grid(problem: Problem, clusters: Sequence[int], variances: Sequence[float], gaps: Sequence[float]) -> Row:
    """Figure 9: sizes and fit of Algorithm 1 over its settings, and test metrics on the frontier."""
    trials = local_global_grid(
        problem.K, problem.targets, clusters=clusters, variance_thresholds=variances, gap_thresholds=gaps,
        generator=seeded(),
    )  # fmt: skip
    rows = [
        {
            "clusters": t.clusters, "variance": t.variance_threshold, "gap": t.gap_threshold, "s": t.size,
            "local": t.num_local, "gaps": t.num_gaps, "fidelity": rounded(t.fidelity or 0.0),
            "mse": rounded(t.mean_squared_error),
        }
        for t in trials
    ]  # fmt: skip
    return {"trials": rows, "frontier": frontier(rows)}


def frontier(rows: Sequence[Row]) -> list[int]:
    """Return positions of settings that none beats in both size and training fidelity."""
    best, kept = -1.0, []
    for position in sorted(
        range(len(rows)), key=lambda i: (rows[i]["s"], -rows[i]["fidelity"], rows[i]["mse"])
    ):
        if rows[position]["fidelity"] > best:
            best = rows[position]["fidelity"]
            kept.append(position)
    return kept


def transfer(problem: Problem, sizes: Sequence[int]) -> list[Row]:
    """Return what distilled sets are worth beyond their targets: even or odd, variances, the kernel."""
    K, cross = problem.K, problem.cross
    prior = ntkops.ntk(problem.model, problem.x_test, outputs="each").diagonal().detach()
    classes = K.shape[0]
    half = torch.zeros(len(problem.classes), classes, dtype=K.dtype)
    half[:, 0] = torch.where(problem.classes % 2 == 0, 1.0, -1.0)
    half[:, 1] = -half[:, 0]
    rows = []
    for wanted in sizes:
        sets = {
            "random": select(K, wanted, "random", generator=seeded(wanted)),
            "rpcholesky": select(K, wanted, "rpcholesky", generator=seeded(wanted)),
            **{m: synthesize(K, wanted, m, Y=problem.targets, generator=seeded()) for m in ("pca", "krylov")},
        }
        if wanted >= classes:
            sets["galerkin"] = synthesize(K, classes, "galerkin", Y=problem.targets, generator=seeded())
        with suppress(InputError):  # no setting of the grid gives so many
            sets["algorithm 1"] = search_local_global(
                K, problem.targets, wanted, clusters=_CLUSTERS, generator=seeded()
            )
        for name, found in sets.items():
            variance = posterior_variance_error(K, found, cross, prior, ridge=RIDGE)
            rows.append(
                {
                    "method": name,
                    "s": wanted,
                    "size": found.size,
                    "even_odd": rounded(
                        transfer_accuracy(K, found, half, cross, problem.data.y_test % 2, ridge=RIDGE)
                    ),
                    "variance": rounded(float(variance.relative.mean()), 3),
                    "nystrom": rounded(float(nystrom_error(K, found).mean()), 3),
                }
            )
    return rows
