"""Points of several kinds as inducing points and as data, and the distilled chain."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch
from _distilled_curves import RIDGE, rounded, seeded
from _distilled_networks import Data, Problem, equal_classes, train
from torch import Tensor

import ntkops
from ntkops.distill import chain, search_local_global, select, synthesize
from ntkops.distill.inducing import kernel_inducing
from ntkops.distill.wasserstein import wasserstein
from ntkops.regression import KernelRidge, metrics

__all__ = ["chains", "distilled_only", "distilled_points", "inducing_points"]

Row = dict[str, Any]


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
    rows: list[Row] = []

    def measured(kind: str, make: Callable[[], Tensor], draw: int = 0) -> Tensor:
        started = time.process_time()
        inputs = make()
        seconds = time.process_time() - started
        rows.append(
            {
                "kind": kind,
                "points": count,
                "draw": draw,
                "seconds": rounded(seconds, 3),
                **_as_points(problem, inputs),
            }
        )
        return inputs

    def chosen(method: str, draw: int = 0) -> Tensor:
        return select(problem.K, count, method, generator=seeded(draw)).indices

    for draw in range(draws):
        measured("random real", lambda d=draw: problem.points[chosen("random", d)], draw)
    measured("real medoids", lambda: problem.points[chosen("kmedoids")])
    measured("real, rpcholesky", lambda: problem.points[chosen("rpcholesky")])
    synthesised = measured(
        "WMDD, from medoids", lambda: distilled_points(problem, per_class, synthesis).inputs
    )
    if variants:
        measured(
            "WMDD, from noise", lambda: distilled_points(problem, per_class, synthesis, start="noise").inputs
        )
        measured(
            "WMDD without batch-norm statistics",
            lambda: distilled_points(problem, per_class, synthesis, statistics_weight=0.0).inputs,
        )
    options: Row = {"iterations": descent, "learning_rate": 0.04, "generator": seeded()}
    measured(
        "energy, from medoids",
        lambda: kernel_inducing(K, start=chosen("kmedoids").tolist(), **options).inputs.double(),
    )
    if variants:
        measured(
            "energy, from WMDD",
            lambda: kernel_inducing(K, start=synthesised.float(), **options).inputs.double(),
        )
        measured(
            "regression, from medoids",
            lambda: kernel_inducing(
                K, start=chosen("kmedoids").tolist(), objective="regression", **options
            ).inputs.double(),
        )
    return rows


def chains(
    problem: Problem, points_per_class: int, k: int, s: int, iterations: int, *, clusters: tuple[int, ...]
) -> dict[str, Any]:
    """Section 4: all stages, each added to those before and each left out, in the paper's way and in ours."""
    model = copy.deepcopy(problem.model).float()
    data = problem.data
    found: dict[str, Any] = {"n": len(data.x), "k": k, "s": s}
    ways = {
        "algorithm 1, sketch": (
            lambda K, Y: search_local_global(K, Y, s, clusters=clusters, generator=seeded()), "sketch"),
        "krylov, nystrom": (
            lambda K, Y: synthesize(K, s, "krylov", Y=Y, generator=seeded()), "nystrom"),
    }  # fmt: skip
    points = {
        "WMDD": lambda: (
            wasserstein(
                model, (data.x, data.y), points_per_class, iterations=iterations, generator=seeded()
            ).inputs
        ),
        "random real": problem.data.x[equal_classes(data.y, points_per_class, seed=11)],
    }
    reports = []
    for kind, make in points.items():
        for way, (gradients, fit) in ways.items():
            if kind == "random real" and way != "krylov, nystrom":
                continue
            report = chain(
                model, data.x, data.x_test, data.y_test, data=make, projection=k, gradients=gradients,
                ridge=RIDGE, fit=fit, ablate=kind == "WMDD",
            )  # fmt: skip
            reports.append(
                {
                    "way": way,
                    "points": kind,
                    "stages": [_run(run) for run in report.stages],
                    "ablations": {name: _run(run) for name, run in report.ablations.items()},
                    "reduction": {
                        "+".join(run.stages): {
                            key: rounded(value, 3) for key, value in report.reduction(run).items()
                        }
                        for run in report.stages
                    },
                }
            )
    found["reports"] = reports
    return found


def _run(run: Any) -> Row:
    """Return a run for JSON."""
    found = asdict(run)
    found["steps"] = [
        {
            "name": step.name,
            "passes": step.passes.total - step.passes.products,
            "seconds": rounded(step.seconds, 3),
        }
        for step in run.steps
    ]
    found["passes"], found["seconds"] = run.passes, rounded(run.seconds, 3)
    for key in ("fidelity", "accuracy", "mean_squared_error", "solve_flops"):
        if found[key] is not None:
            found[key] = rounded(found[key])
    return found
