"""The experiments of the distilled-kernel paper on data at hand: figures 1 to 9, Table 1, its claims.

Run it with ``python benchmarks/distilled_ntk.py``; docs/distilled_ntk.md explains and shows the result.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import _distilled_experiments as experiments
import torch
from _distilled_networks import (
    Data,
    Folder,
    Problem,
    ResNet18,
    convolutional,
    digits,
    equal_classes,
    from_file,
    perceptron,
    rounded,
    seeded,
    train,
)
from _distilled_page import claims, judge, markdown
from _measure import environment, one_thread
from _tables import fill

from ntkops.distill import chain, search_local_global, synthesize, wasserstein
from ntkops.errors import InterpolationWarning
from ntkops.regression import KernelRidge

__all__ = ["run"]

Say = Callable[[str], None]


@dataclass(frozen=True)
class Plan:
    """experiments.Sizes of everything."""

    networks: int = 3
    epochs: int = 8
    tests: int = 600
    per_class: int = 50
    samples: tuple[int, ...] = (1, 2, 5, 10, 20, 35, 50)
    ranks: tuple[int, ...] = (5, 10, 20, 50, 100, 500)
    sizes: tuple[int, ...] = (5, 10, 20, 50, 100, 200)
    fewer: tuple[int, ...] = (5, 10, 20, 50)
    printed: tuple[int, ...] = (5, 10, 20)
    features: tuple[int, ...] = (250, 500, 1000, 2000)
    ridges: tuple[float, ...] = (1e-6, 1e-4, 1e-2)
    pairs: tuple[tuple[int, ...], tuple[float, ...]] = ((3, 6, 10, 20), (0.2, 0.5, 0.8, 0.95))
    grid: tuple[tuple[int, ...], tuple[float, ...], tuple[float, ...]] = (
        (5, 10, 20), (0.2, 0.5, 0.7, 0.8, 0.9, 0.95), (0.0, 0.5, 0.8, 0.9, 0.95),
    )  # fmt: skip
    clusters: int = 10
    random_partitions: int = 3
    synthesis: int = 100
    inducing: int = 2
    descent: int = 20
    chain: tuple[int, int, int] = (20, 500, 10)
    costs: tuple[int, ...] = (150, 300, 600, 1200)
    headline: experiments.Sizes = experiments.Sizes()


QUICK = Plan(
    networks=1, epochs=1, tests=60, per_class=3, samples=(1, 3), ranks=(2, 10), sizes=(5, 10), fewer=(5,),
    printed=(5,),
    features=(30, 70), ridges=(1e-6, 1e-2), pairs=((3,), (0.5, 0.9)), grid=((2, 3), (0.3, 0.9), (0.0, 0.9)),
    clusters=3, random_partitions=1, synthesis=2, inducing=1, descent=2, chain=(3, 70, 4), costs=(20, 100),
    headline=experiments.Sizes(
        n=200, tests=60, ratios=(10,), k=40, k_all=40, s=4, epochs=1, synthesis=2,
        descent=(1, 20), clusters=(2, 3),
    ),
)  # fmt: skip


def measure(problem: Problem, plan: Plan, *, first: bool, whole: bool) -> dict[str, Any]:
    """Measure one network."""
    full = KernelRidge(experiments.RIDGE).fit(problem.K, problem.targets).predict(problem.cross)
    found: dict[str, Any] = {
        "name": problem.name,
        "data": problem.data.title,
        "m": len(problem.points),
        "tests": len(problem.x_test),
        "parameters": problem.num_parameters,
        "accuracy": rounded(problem.accuracy),
        "full": experiments.full_regression(problem),
        "samples": experiments.sample_curve(problem, plan.samples),
        "ranks": experiments.rank_curve(
            problem, [rank for rank in plan.ranks if rank <= len(problem.points)]
        ),
        "spectra": experiments.spectra(problem, shown=first),
    }
    sizes = [s for s in (plan.sizes if whole else plan.fewer) if s <= len(problem.points)]
    found["methods"] = experiments.method_curves(problem, sizes, plan.printed if whole else ())
    if whole:
        found["galerkin"] = experiments.galerkin_distance(problem, full, experiments.RIDGE)
        counts = plan.features if first else plan.features[1:]
        found["features"] = experiments.feature_curve(problem, counts, plan.ridges)
        found["paired"] = experiments.paired(problem, *plan.pairs)
        found["clusters"] = experiments.clusters_and_spectra(
            problem, plan.clusters, plan.random_partitions, maps=first
        )
        found["transfer"] = experiments.transfer(problem, [s for s in (10, 50) if s <= len(problem.points)])
        found["inducing"] = experiments.inducing_points(
            problem, plan.inducing, synthesis=plan.synthesis, descent=plan.descent, draws=3, variants=first
        )
    if first:
        found["grid"] = experiments.grid(problem, *plan.grid)
    found["seconds"] = {key: rounded(value, 3) for key, value in problem.seconds.items()}
    return found


def problem_of(name: str, data: Data, plan: Plan) -> Problem:
    """Return a trained network, such as "mlp 0", with the points of its kernel."""
    kind, _, seed = name.partition(" ")
    channels, classes = data.x.shape[1], data.num_classes
    make = {
        "cnn": lambda: convolutional(channels, classes),
        "mlp": lambda: perceptron(classes),
        "resnet": lambda: ResNet18(classes, width=8, channels=channels),
    }[kind]
    model = train(data.x, data.y, seed=int(seed), epochs=plan.epochs, network=make)
    subset = equal_classes(data.y, plan.per_class, seed=int(seed))
    return Problem.of(name, model, data.part(len(data.x), plan.tests), data.x[subset], data.y[subset], subset)


def run(
    *,
    quick: bool = False,
    path: Path | None = None,
    parts: Sequence[str] | None = None,
    before: dict[str, Any] | None = None,
    say: Say = lambda text: None,
) -> dict[str, Any]:
    """Measure everything, or some parts and keep the others of `before`, and return the result for JSON."""
    plan = QUICK if quick else Plan()
    data = digits(quick) if path is None else from_file(path)
    names = parts_of(plan)
    found = {} if before is None else dict(before["parts"])
    with one_thread(), warnings.catch_warnings():
        warnings.simplefilter("ignore", InterpolationWarning)
        for name in parts or names:
            say(name)
            started = time.process_time()
            part = _measured(name, data, plan, say)
            spent = round(time.process_time() - started, 1)
            today = datetime.now(UTC).date().isoformat()
            found[name] = {"date": today, "cpu_seconds": spent, "data": data.title, "found": part}
    order = [name for name in names if name in found] + [name for name in found if name not in names]
    result: dict[str, Any] = {
        "benchmark": "distilled_ntk",
        "environment": {**environment(), "threads": 1},
        "options": {"quick": quick, "ridge": experiments.RIDGE, "data": data.title},
        "parts": {name: found[name] for name in order},
    }
    result["targets"] = [] if quick else judge(result)
    result["claims"] = [] if quick else claims(result)
    return result


def parts_of(plan: Plan) -> list[str]:
    """Return the names of all parts."""
    return [
        *(f"cnn {seed}" for seed in range(plan.networks)), "distilled points", "distilled data alone",
        "mlp 0", "resnet 0", "chain", "costs", *(f"headline {seed}" for seed in range(plan.networks)),
    ]  # fmt: skip


def _measured(name: str, data: Data, plan: Plan, say: Say) -> Any:
    if name.startswith("headline"):
        return experiments.measure_seed(data, int(name.split()[1]), plan.headline, say)
    if name.startswith(("cnn", "mlp", "resnet")):
        problem = problem_of(name, data, plan)
        return measure(problem, plan, first=name == "cnn 0", whole=name.startswith("cnn"))
    first = problem_of("cnn 0", data, plan)
    if name.startswith("distilled"):
        points = experiments.distilled_points(first, plan.per_class, plan.synthesis)
        if name == "distilled points":
            problem = Problem.of(name, first.model, first.data, points.inputs, points.labels)
        else:
            problem = experiments.distilled_only(name, first.data, first, points, 8 * plan.epochs)
        return measure(problem, plan, first=False, whole=False)
    few = dataclasses.replace(first, data=first.data.part(max(plan.costs), plan.tests))
    if name == "costs":
        return experiments.costs(few, plan.costs, max(plan.fewer))
    per_class, k, s = plan.chain
    return experiments.chains(few, per_class, k, s, plan.synthesis, clusters=(2, 3, 5, 8))


def run_imagenette(path: Path) -> dict[str, Any]:
    """Run the paper's chain, ResNet-18 on ``path/train`` and ``path/val`` as ImageNette is distributed."""
    size, epochs, per_class, k, s, iterations = 224, 50, 50, 2048, 5, 2000
    device = "cuda" if torch.cuda.is_available() else "cpu"
    images, tests = Folder(path / "train", size, device), Folder(path / "val", size, device, labelled=False)
    make = lambda: ResNet18(len(images.names)).to(device)  # noqa: E731
    model = train(images, images.y.to(device), seed=0, epochs=epochs, batch=32, network=make, rate=1e-3)
    points = wasserstein(model, images, per_class, iterations=iterations, generator=seeded()).inputs
    chosen = images[equal_classes(images.y, per_class, seed=0)]
    found: dict[str, Any] = {"classes": images.names, "device": device}
    ways = {
        "algorithm 1, sketch": (lambda K, Y: search_local_global(K, Y, s, generator=seeded()), "sketch"),
        "krylov, nystrom": (lambda K, Y: synthesize(K, s, "krylov", Y=Y, generator=seeded()), "nystrom"),
    }
    for name, (gradients, fit) in ways.items():
        # All training images would be too many for one kernel: real images of the same number stand for them.
        report = chain(
            model, chosen, tests, tests.y.to(device), data=points, projection=k, gradients=gradients,
            ridge=experiments.RIDGE, fit=fit, ablate=False,
        )  # fmt: skip
        found[name] = [str(run) for run in report.stages]
    found["parameters"] = sum(p.numel() for p in model.parameters())
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--quick", action="store_true", help="small sizes: a smoke test, not a measurement")
    parser.add_argument("--data", type=Path, metavar="NPZ", help="a file of images instead of digits")
    parser.add_argument("--parts", nargs="+", help="measure these again, and keep the rest of --out")
    parser.add_argument("--imagenette", type=Path, metavar="DIR", help="the paper's setting on these images")
    parser.add_argument("--model", choices=["resnet18"], default="resnet18", help="network for --imagenette")
    parser.add_argument("--out", type=Path, help="JSON file to write (none by default)")
    parser.add_argument("--figures", type=Path, metavar="DIR", help="draw figures 1 to 9 into this folder")
    parser.add_argument("--markdown", type=Path, metavar="JSON", help="print a stored result, run nothing")
    parser.add_argument("--page", type=Path, help="with --markdown: put the tables into this page")
    options = parser.parse_args(arguments)
    if options.imagenette is not None:
        print(json.dumps(result := run_imagenette(options.imagenette), indent=1))
    elif options.markdown is not None:
        result = json.loads(options.markdown.read_text(encoding="utf-8"))
        print(text := markdown(result))
        if options.page is not None:
            page = options.page.read_text(encoding="utf-8")
            options.page.write_text(fill(page, "distilled_ntk", text + "\n"), encoding="utf-8")
    else:
        known = options.parts is not None and options.out is not None and options.out.exists()
        result = run(
            quick=options.quick, path=options.data, parts=options.parts,
            before=json.loads(options.out.read_text(encoding="utf-8")) if known else None,
            say=lambda text: print(text, file=sys.stderr, flush=True),
        )  # fmt: skip
    if options.out is not None:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    if options.imagenette is None and options.markdown is None:
        print(markdown(result))  # last: what was measured is stored by now
    if options.figures is not None:
        from _distilled_figures import draw

        draw(result, options.figures)
    return 0


if __name__ == "__main__":
    sys.exit(main())
