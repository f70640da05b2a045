"""What is measured of the distilled-kernel paper: curves, structure, points, chains, and the headline."""

from __future__ import annotations

import copy
import math
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import torch
from _distilled_networks import Data, Problem, convolutional, equal_classes, rounded, seeded, train
from _distilled_page import METHODS, STAGES
from linear_operator.operators import RootLinearOperator
from torch import Tensor, nn

import ntkops
from ntkops.distill import (
    Distilled,
    chain,
    containment,
    kernel_inducing,
    local_global,
    local_global_grid,
    local_global_properties,
    nystrom_error,
    posterior_variance_error,
    random_clusters,
    reconstruction_error,
    search_local_global,
    select,
    select_inputs,
    spectral_clusters,
    synthesize,
    transfer_accuracy,
    variance_coverage,
    wasserstein,
)  # fmt: skip
from ntkops.errors import InputError, InterpolationWarning
from ntkops.projections import SJLT, check_interpolation
from ntkops.regression import KernelRidge, metrics

__all__ = [
    "RIDGE", "Sizes", "chains", "clusters_and_spectra", "costs", "distilled_only", "distilled_points",
    "feature_curve", "frontier", "full_regression", "galerkin_distance", "grid", "inducing_points",
    "measure_seed", "method_curves", "paired", "rank_curve", "sample_curve", "spectra", "transfer",
]  # fmt: skip

Row = dict[str, Any]
RIDGE = 1e-4
SELECTIONS = ("random", "leverage", "kmedoids", "fps", "rpcholesky", "greedy")
SYNTHESES = ("pca", "kmeans", "krylov", "galerkin", "als")
_DRAWS = {"random": 3, "leverage": 2, "fps": 2, "rpcholesky": 2, "kmedoids": 2}
_CLUSTERS = (2, 3, 4, 5, 6, 8, 10, 12, 15, 20)


def score(predictions: Tensor, problem: Problem) -> Row:
    """Return accuracy, fidelity and mean squared error on the test images."""
    return {
        "accuracy": rounded(metrics.accuracy(predictions, problem.data.y_test)),
        "fidelity": rounded(metrics.fidelity(predictions, problem.logits_test)),
        "mse": rounded(metrics.mean_squared_error(predictions, problem.logits_test)),
    }


def conditioning(kernels: Tensor) -> Row:
    """Return condition number and smallest eigenvalue, means over classes."""
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
    return _Made(method, wanted, draw, *_timed(make))


def _timed(work: Callable[[], Any]) -> tuple[Any, float]:
    """Return what work has found, and its CPU seconds."""
    started = time.process_time()
    found = work()
    return found, time.process_time() - started


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


# structure of the kernels: spectra, what clusters contain of them, what choosing points costs

EPSILON = 0.05


def spectra(problem: Problem, *, shown: bool) -> Row:
    """Figure 2: eigenvalues of the class kernels as shares of the trace, and truncation ranks."""
    values = torch.linalg.eigvalsh(problem.K).flip(-1).clamp(min=0)
    mean = torch.linalg.eigvalsh(problem.mean).flip(-1).clamp(min=0)
    shares = values / values.sum(-1, keepdim=True)
    return {
        "m": problem.K.shape[-1],
        "values": [[rounded(float(v), 3) for v in row[:200]] for row in shares] if shown else [],
        "ranks": [_rank(row, EPSILON) for row in values],
        "ranks_99": [_rank(row, 0.01) for row in values],
        "mean_rank": _rank(mean, EPSILON),
        "negative_entries": rounded(float((problem.mean < 0).double().mean()), 3),
    }


def _rank(values: Tensor, epsilon: float) -> int:
    shares = values.cumsum(0) / values.sum()
    return int((shares < 1 - epsilon - 1e-12).sum()) + 1


_DIGITS = {"pooled_containment": 7, "untruncated_containment": 7}


def _properties(found: Any) -> Row:
    """Return properties (A) and (B) of one partition."""
    names = {
        "pooled": "pooled_containment", "untruncated": "untruncated_containment",
        "weighted_gap": "weighted_gap", "mean_gap": "mean_gap", "single_gap": "single_gap",
    }  # fmt: skip
    row = {key: rounded(getattr(found, name), _DIGITS.get(name, 5)) for key, name in names.items()}
    return row | {"least_cluster": rounded(float(found.local_containment.min()))}


def clusters_and_spectra(problem: Problem, clusters: int, num_random: int, *, maps: bool) -> list[Row]:
    """Figures 4 and 8: properties (A) and (B) for each class and for the mean, with random partitions."""
    rows = []
    for label, kernel in [*enumerate(problem.K), ("mean", problem.mean)]:
        labels = spectral_clusters(kernel, clusters, generator=seeded())
        found = local_global_properties(kernel, labels, EPSILON, num_random=num_random, generator=seeded(1))
        row: Row = {
            "class": label, "rank": found.global_rank, **_properties(found),
            "pooled_bound": rounded(found.pooled_bound, 7),
            "untruncated_bound": rounded(found.untruncated_bound, 7),
            "gap_bound": rounded(found.weighted_gap_bound), "random": [_properties(r) for r in found.random],
        }  # fmt: skip
        if maps and label != "mean":
            map_ = containment(kernel, labels, EPSILON)
            random = containment(kernel, random_clusters(labels, generator=seeded(2)), EPSILON)
            shown = {
                "cumulative": map_.cumulative, "random_cumulative": random.cumulative.mean(0),
                "variance": map_.variance, "alignment_max": map_.alignment.amax(0),
                "alignment_mean": map_.alignment.mean(0), "union": map_.union, "random_union": random.union,
            }  # fmt: skip
            row |= {name: _short(values) for name, values in shown.items()}
        rows.append(row)
    return rows


def _short(values: Tensor) -> Any:
    if values.dim() == 1:
        return [rounded(float(v), 3) for v in values]
    return [_short(row) for row in values]


def galerkin_distance(problem: Problem, full: Tensor, ridge: float) -> float:
    """Return how far the prediction from C Galerkin vectors is from the full one, relative to the largest."""
    classes = problem.K.shape[0]
    found = synthesize(problem.K, classes, "galerkin", Y=problem.targets, ridge=ridge, generator=seeded())
    predictions = found.fit(problem.K, problem.targets, ridge=ridge, fit="sketch").predict(problem.cross)
    return float((predictions - full).abs().max() / full.abs().max())


def costs(problem: Problem, sizes: Sequence[int], s: int) -> list[Row]:
    """Table 1: time of every method for n points, kernel given, and how it grows with n."""
    model, x = problem.model, problem.data.x[: max(sizes)].double()
    traced = ntkops.ntk(model, x, outputs="trace").to_dense().detach()
    with torch.no_grad():
        targets = model(x)
    work: dict[str, Callable[[Tensor, Tensor], object]] = {
        **{m: (lambda K, Y, m=m: select(K, s, m, generator=seeded()))
           for m in ("random", "leverage", "fps", "kmedoids", "rpcholesky")},
        **{m: (lambda K, Y, m=m: synthesize(K, s, m, Y=Y, generator=seeded()))
           for m in ("pca", "kmeans", "krylov")},
        "algorithm 1": lambda K, Y: local_global(K, Y, 10, 0.8, 0.8, generator=seeded()),
    }  # fmt: skip
    rows = []
    for name, make in work.items():
        times = []
        for n in sizes:
            K, Y = traced[:n, :n].contiguous(), targets[:n]
            times.append(min(_timed(partial(make, K, Y))[1] for _ in range(3)))
        growth = math.log(times[-1] / times[-2]) / math.log(sizes[-1] / sizes[-2])
        seconds = [rounded(t, 3) for t in times]
        rows.append({"method": name, "sizes": list(sizes), "seconds": seconds, "growth": rounded(growth, 3)})
    return rows


# points of several kinds as inducing points and as data, and the chain


def distilled_points(problem: Problem, per_class: int, iterations: int, **options: Any) -> Any:
    """Return points by Wasserstein distillation from all training data, as the paper makes them."""
    data = (problem.data.x.double(), problem.data.y)
    return wasserstein(problem.model, data, per_class, iterations=iterations, generator=seeded(), **options)


def distilled_only(name: str, data: Data, teacher: Problem, points: Any, epochs: int) -> Problem:
    """Return the problem of a network trained on distilled points alone, its kernel at these points."""
    images = points.inputs.float()
    model = train(
        images, points.labels, seed=7, epochs=epochs, batch=32, soft=points.targets.float() / 4, rate=4e-3
    )
    return Problem.of(name, model, data, points.inputs, points.labels)


def _as_points(problem: Problem, inputs: Tensor) -> Row:
    """Return what inducing points do for the kernel of the problem's points, and as data of their own."""
    found = problem.operator
    gap = ntkops.energy_gap(found, inputs, generator=seeded())
    share = gap.gap.sum() / found.diagonal().double().sum()
    own = ntkops.ntk(problem.model, inputs, outputs="each")
    with torch.no_grad():
        targets = problem.model(inputs)
        across = own.cross(problem.x_test).to_dense()
        # Coverage of the test images' gradients: 1 minus the share that the Nyström kernel leaves out.
        dense = own.to_dense().double()
        dense = dense + 1e-10 * dense.diagonal(dim1=-2, dim2=-1).mean() * torch.eye(len(inputs))
        half = torch.linalg.solve_triangular(torch.linalg.cholesky(dense), across.mT.double(), upper=False)
        prior = ntkops.ntk(problem.model, problem.x_test, outputs="each").diagonal()
    fitted = KernelRidge(RIDGE).fit(own, targets)
    predictions = fitted.predict(across)
    return {
        "gap": rounded(float(share)),
        "coverage": rounded(float(half.square().sum() / prior.sum())),
        "accuracy": rounded(metrics.accuracy(predictions, problem.data.y_test)),
        "fidelity": rounded(metrics.fidelity(predictions, problem.logits_test)),
        "mse": rounded(metrics.mean_squared_error(predictions, problem.logits_test)),
    }


def inducing_points(
    problem: Problem, per_class: int, *, synthesis: int, descent: int, draws: int, variants: bool
) -> list[Row]:
    """Compare real points, distilled ones, and points moved down the gradient of the energy gap itself."""
    count = per_class * len(problem.classes.unique())
    # The descent runs in float32; what it finds is measured in float64.
    K = ntkops.ntk(copy.deepcopy(problem.model).float(), problem.points.float(), outputs="each")
    options: Row = {"iterations": descent, "learning_rate": 0.04, "generator": seeded()}
    rows: list[Row] = []

    def measured(kind: str, make: Callable[[], Tensor], draw: int = 0) -> Tensor:
        inputs, spent = _timed(make)
        shared = {"kind": kind, "points": count, "draw": draw, "seconds": rounded(spent, 3)}
        rows.append({**shared, **_as_points(problem, inputs)})
        return inputs

    def chosen(method: Any, draw: int = 0) -> Tensor:
        found = select(problem.K, count, method, generator=seeded(draw)).indices
        assert found is not None
        return found

    def synthesised(**given: Any) -> Tensor:
        return distilled_points(problem, per_class, synthesis, **given).inputs

    def descended(start: Any, **given: Any) -> Tensor:
        return kernel_inducing(K, start=start, **given, **options).inputs.double()

    for draw in range(draws):
        measured("random real", lambda d=draw: problem.points[chosen("random", d)], draw)
    measured("real medoids", lambda: problem.points[chosen("kmedoids")])
    measured("real, rpcholesky", lambda: problem.points[chosen("rpcholesky")])
    made = measured("WMDD, from medoids", synthesised)
    if variants:
        measured("WMDD, from noise", lambda: synthesised(start="noise"))
        measured("WMDD without batch-norm statistics", lambda: synthesised(statistics_weight=0.0))
    medoids = chosen("kmedoids").tolist()
    measured("energy, from medoids", lambda: descended(medoids))
    if variants:
        measured("energy, from WMDD", lambda: descended(made.float()))
        measured("regression, from medoids", lambda: descended(medoids, objective="regression"))
    return rows


def chains(
    problem: Problem, points_per_class: int, k: int, s: int, iterations: int, *, clusters: tuple[int, ...]
) -> dict[str, Any]:
    """Section 4: all stages, each added to those before and each left out, in the paper's way and in ours."""
    model, data = copy.deepcopy(problem.model).float(), problem.data
    pair = (data.x, data.y)
    ways = {
        "algorithm 1, sketch": (
            lambda K, Y: search_local_global(K, Y, s, clusters=clusters, generator=seeded()), "sketch"),
        "krylov, nystrom": (
            lambda K, Y: synthesize(K, s, "krylov", Y=Y, generator=seeded()), "nystrom"),
    }  # fmt: skip
    points = {
        "WMDD": lambda: wasserstein(
            model, pair, points_per_class, iterations=iterations, generator=seeded()).inputs,
        "random real": data.x[equal_classes(data.y, points_per_class, seed=11)],
    }  # fmt: skip
    reports = []
    for kind, way in (("WMDD", "algorithm 1, sketch"), ("WMDD", "krylov, nystrom"),
                      ("random real", "krylov, nystrom")):  # fmt: skip
        gradients, fit = ways[way]
        report = chain(
            model, data.x, data.x_test, data.y_test, data=points[kind], projection=k, gradients=gradients,
            ridge=RIDGE, fit=fit, ablate=kind == "WMDD",
        )  # fmt: skip
        saved = {"+".join(run.stages): report.reduction(run) for run in report.stages}
        reports.append({
            "way": way, "points": kind, "stages": [_run(run) for run in report.stages],
            "ablations": {name: _run(run) for name, run in report.ablations.items()},
            "reduction": {
                name: {key: rounded(value, 3) for key, value in found.items()}
                for name, found in saved.items()
            },
        })  # fmt: skip
    return {"n": len(data.x), "k": k, "s": s, "reports": reports}


def _run(run: Any) -> Row:
    """Return a run for JSON."""
    found = asdict(run)
    found["steps"] = [
        {"name": step.name, "passes": step.passes.total - step.passes.products,
         "seconds": rounded(step.seconds, 3)}
        for step in run.steps
    ]  # fmt: skip
    found["passes"], found["seconds"] = run.passes, rounded(run.seconds, 3)
    for key in ("fidelity", "accuracy", "mean_squared_error", "solve_flops"):
        if found[key] is not None:
            found[key] = rounded(found[key])
    return found


# the headline: every choice of points, after each stage

_TESTS, _ALL = "gradients of the test images", "projected gradients of all training images"
_MADE = ("WMDD", "energy descent")


@dataclass(frozen=True)
class Sizes:
    """Sizes of everything."""

    n: int = 8000
    tests: int = 2000
    ratios: tuple[int, ...] = (20, 50, 100)
    k: int = 800
    k_all: int = 320
    s: int = 10
    epochs: int = 8
    synthesis: int = 60
    descent: tuple[int, int] = (5, 500)
    clusters: tuple[int, ...] = (5, 10)


@dataclass(eq=False)
class _Ground:
    """A trained network with what all its runs share: predictions are products with J at the test images."""

    model: nn.Module
    data: Data
    sizes: Sizes
    seed: int
    logits: Tensor = field(init=False)
    logits_test: Tensor = field(init=False)
    rows_test: Tensor = field(init=False)
    features_test: Tensor = field(init=False)
    seconds: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        with torch.no_grad():
            self.logits, self.logits_test = self.model(self.data.x), self.model(self.data.x_test)
        with self.clock(_TESTS):
            self.rows_test = self.gradients(self.data.x_test)
            self.features_test = self.projection(self.sizes.k).apply(self.rows_test)

    @property
    def num_parameters(self) -> int:
        return sum(p.numel() for p in self.model.parameters())

    @property
    def num_classes(self) -> int:
        return self.logits.shape[1]

    def clock(self, name: str) -> _Clock:
        """Note the CPU seconds of a block under a name."""
        return _Clock(self.seconds, name)

    def projection(self, k: int) -> SJLT:
        """Return the map from the parameters to k numbers."""
        return SJLT(dim=self.num_parameters, k=k, seed=0)

    def gradients(self, x: Tensor) -> Tensor:
        """Return ``(C, N, P)`` gradients of the logits."""
        rows = ntkops.jacobian(self.model, x).to_dense().detach()
        return rows.view(len(x), self.num_classes, -1).transpose(0, 1)

    def score(self, predictions: Tensor) -> Row:
        """Return what regression keeps of the network at the test images."""
        return {
            "fidelity": rounded(metrics.fidelity(predictions, self.logits_test)),
            "r2": rounded(metrics.r2_score(predictions, self.logits_test)),
            "accuracy": rounded(metrics.accuracy(predictions, self.data.y_test)),
        }


class _Clock:
    """CPU seconds of a block, added under a name."""

    def __init__(self, into: dict[str, float], name: str) -> None:
        self._into, self._name = into, name

    def __enter__(self) -> None:
        self._start = time.process_time()

    def __exit__(self, *error: object) -> None:
        spent = time.process_time() - self._start
        self._into[self._name] = self._into.get(self._name, 0.0) + spent


# the choice of points


def _points(ground: _Ground, method: str, balanced: bool, m: int, mean: RootLinearOperator) -> Tensor:
    """Return m points; `mean` is the class-mean kernel of all projected gradients."""
    data, drawn = ground.data, seeded(100 * ground.seed + m)
    labels = data.y if balanced else None
    by_inputs = {
        "random": ("random", None),
        "pixel k-medoids": ("kmedoids", None),
        "feature k-medoids": ("kmedoids", "8"),
    }
    if method in by_inputs:
        rule, layer = by_inputs[method]
        model = None if layer is None else ground.model
        found = select_inputs(data.x, m, rule, model=model, features=layer, labels=labels, generator=drawn)
        return data.x[found.indices]
    if method == "RPCholesky":
        return data.x[select(mean, m, "rpcholesky", labels=labels, generator=drawn).indices]
    if method == "leverage":
        return data.x[_by_leverage(mean.root.to_dense(), m, labels, drawn)]
    if method == "WMDD":
        per_class = m // ground.num_classes
        pair = (data.x, data.y)
        return wasserstein(
            ground.model, pair, per_class, iterations=ground.sizes.synthesis, generator=drawn
        ).inputs
    iterations, count = ground.sizes.descent
    start = data.x[select_inputs(data.x, m, "kmedoids", labels=labels, generator=drawn).indices]
    some = data.x[select_inputs(data.x, count, "random", labels=labels, generator=drawn).indices]
    kernel = ntkops.ntk(ground.model, some, outputs="trace")
    return kernel_inducing(kernel, start=start, iterations=iterations, generator=drawn).inputs


def _by_leverage(root: Tensor, m: int, labels: Tensor | None, generator: torch.Generator) -> Tensor:
    """Return draws by the ridge leverage scores of R Rᵀ, [R (RᵀR + r)⁻¹ Rᵀ]_ii, of all or class by class."""
    count = len(root)
    groups = (
        [torch.arange(count)] if labels is None else [(labels == c).nonzero()[:, 0] for c in labels.unique()]
    )
    chosen = []
    for own in groups:
        part = root[own].double()
        ridge = RIDGE * float(part.square().sum()) / len(own)
        gram = part.mT @ part
        gram.diagonal().add_(ridge)
        half = torch.linalg.solve_triangular(torch.linalg.cholesky(gram), part.mT, upper=False)
        scores = half.square().sum(0)
        chosen.append(own[torch.multinomial(scores, m // len(groups), generator=generator)])
    return torch.cat(chosen)


def _class_mean(features: Tensor) -> RootLinearOperator:
    """Return the mean of the class kernels, its gradients of C k numbers projected once more to k."""
    classes, n, k = features.shape
    stacked = features.transpose(0, 1).reshape(n, classes * k) / classes**0.5
    return RootLinearOperator(SJLT(dim=classes * k, k=k, seed=1).apply(stacked))


# what the points are worth


def _stages(ground: _Ground, points: Tensor, algorithm: bool) -> list[Row]:
    """Return regression on the points after each stage, with the CPU seconds of each."""
    sizes, rows = ground.sizes, []
    m, classes = len(points), ground.num_classes
    with torch.no_grad():
        targets = ground.model(points)

    def add(stage: str, way: str, predictions: Tensor, spent: float, features: int, kept: int) -> None:
        rows.append({
            "stage": stage, "way": way, **ground.score(predictions), "seconds": spent,
            "kernel_flops": float(m**2 * features * classes), "gradient_bytes": 4 * kept * features * classes,
            "kernel_bytes": 4 * classes * m**2, "solve_flops": classes * kept**3 / 3,
        })  # fmt: skip

    started = time.process_time()
    gradients = ground.gradients(points)
    shared = time.process_time() - started + ground.seconds[_TESTS]
    for stage, own, test in (
        (STAGES[0], lambda: gradients, ground.rows_test),
        (STAGES[1], lambda: ground.projection(sizes.k).apply(gradients), ground.features_test),
    ):
        started = time.process_time()
        features = own()
        kernel = features @ features.mT
        fitted = KernelRidge(RIDGE).fit(kernel, targets)
        # K* α = J* (Jᵀ α): predictions from the change of the parameters.
        change = features.mT.double() @ fitted.dual_coef_.double().mT.unsqueeze(-1)
        predictions = (test @ change.to(test)).squeeze(-1).mT
        spent = shared + time.process_time() - started
        add(stage, "", predictions, spent, features.shape[-1], m)
    across = ground.features_test @ features.mT
    made = spent

    s = min(sizes.s, m)
    ways: dict[str, tuple[Callable[[], Any], str]] = {
        "Galerkin": (lambda: synthesize(
            kernel, classes, "galerkin", Y=targets, ridge=RIDGE, generator=seeded()), "sketch"),
        "Krylov": (lambda: synthesize(kernel, s, "krylov", Y=targets, generator=seeded()), "nystrom"),
    }  # fmt: skip
    if algorithm:
        ways["Algorithm 1"] = (lambda: search_local_global(
            kernel, targets, s, clusters=sizes.clusters, generator=seeded()), "sketch")  # fmt: skip
    for way, (make, fit) in ways.items():
        started = time.process_time()
        found = make()
        predictions = found.fit(kernel, targets, ridge=RIDGE, fit=fit).predict(across)
        add(STAGES[2], way, predictions, made + time.process_time() - started, sizes.k, found.size)
    return rows


def _everything(ground: _Ground, kernel: Any) -> list[Row]:
    """Return the full projected route and the Galerkin route: all n samples, k numbers a gradient."""
    n, classes, k = len(ground.logits), ground.num_classes, ground.sizes.k_all

    def galerkin() -> Any:
        found = synthesize(kernel, classes, "galerkin", Y=ground.logits, ridge=RIDGE, generator=seeded())
        return found.fit(kernel, ground.logits, ridge=RIDGE, fit="sketch")

    rows = []
    for stage, way, fit, kept, size in (
        ("projection", "", lambda: KernelRidge(RIDGE).fit(kernel, ground.logits), n, k),
        ("projection + gradients", "Galerkin", galerkin, classes, classes),
    ):
        predictions, spent = _timed(lambda fit=fit: fit().predict(kernel.cross(ground.data.x_test)))
        rows.append({
            "stage": stage, "way": way, **ground.score(predictions), "seconds": ground.seconds[_ALL] + spent,
            "kernel_flops": float(n**2 * k * classes), "kernel_bytes": 4 * classes * n**2,
            "gradient_bytes": 4 * kept * k * classes, "solve_flops": classes * size**3 / 3,
        })  # fmt: skip
    return rows


def measure_seed(data: Data, seed: int, sizes: Sizes, say: Callable[[str], None] = lambda text: None) -> Row:
    """Measure all choices of points for one trained network."""
    n = sizes.n
    data = data.part(n, sizes.tests)
    model = train(data.x, data.y, seed=seed, epochs=sizes.epochs)
    ground = _Ground(model, data, sizes, seed)
    with ground.clock(_ALL):
        lazy = ntkops.ntk(model, data.x, outputs="each")
        kernel = ntkops.projected_ntk(lazy, ground.projection(sizes.k_all))
        features = kernel.features().detach()
    say("all images")
    found = _everything(ground, kernel)
    for row in found:
        shared = {"method": "all", "balanced": False, "ratio": 1, "m": n}
        row |= {**shared, "jacobian_rows": n * ground.num_classes}
    with ground.clock(_ALL):
        mean = _class_mean(features)
    for ratio in sizes.ratios:
        m = n // ratio
        for method, looks in METHODS.items():
            for balanced in (False, True):
                if method in _MADE and not balanced:  # made points are balanced by what they start from
                    continue
                say(f"{ratio}x {method}{', balanced' if balanced else ''}")
                started = time.process_time()
                points = _points(ground, method, balanced, m, mean)
                choice = time.process_time() - started
                looked = 0
                if looks == "gradients of all":
                    looked = n
                    choice += ground.seconds[_ALL]
                elif looks == "gradients of some":  # those of the points anew in each iteration
                    looked = sizes.descent[1] + m * sizes.descent[0]
                shown = balanced and method in ("random", "pixel k-medoids", "WMDD")
                rows = _stages(ground, points, algorithm=shown)
                for row in rows:
                    row |= {
                        "method": method, "balanced": balanced, "ratio": ratio, "m": m, "choice": choice,
                        "seconds": row["seconds"] + choice,
                        "jacobian_rows": (m + looked) * ground.num_classes,
                    }  # fmt: skip
                if method == "WMDD":
                    rows.append(_trained_on(ground, points, ratio, choice))
                found += rows
    for row in found:
        row["seconds"] = rounded(row["seconds"], 3)
    return {
        "seed": seed, "data": data.title, "network": "CNN", "n": n, "tests": len(data.x_test),
        "parameters": ground.num_parameters, "rows": found,
        "accuracy": rounded(metrics.accuracy(ground.logits_test, data.y_test)),
    }  # fmt: skip


def _trained_on(ground: _Ground, points: Tensor, ratio: int, choice: float) -> Row:
    """Return what a network trained on the distilled points alone, towards the teacher's logits, is worth."""
    m = len(points)
    with torch.no_grad():
        soft = ground.model(points)
    started = time.process_time()
    labels = soft.argmax(-1)
    epochs = 4 * ground.sizes.epochs
    model = train(points, labels, seed=ground.seed, epochs=epochs, batch=32, soft=soft / 4,
                  network=lambda: convolutional(classes=ground.num_classes))  # fmt: skip
    with torch.no_grad():
        predictions = model(ground.data.x_test)
    return {
        "stage": "trained on the points", "way": "", **ground.score(predictions), "r2": None,
        "method": "WMDD", "balanced": True, "ratio": ratio, "m": m, "choice": choice, "jacobian_rows": 0,
        "seconds": choice + time.process_time() - started,
    }  # fmt: skip
