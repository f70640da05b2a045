"""The headline of the distilled-kernel paper: 20, 50, 100 times fewer Jacobian rows, their cost and worth."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from _distilled_curves import RIDGE, rounded, seeded
from _distilled_networks import Data, convolutional, train
from linear_operator.operators import RootLinearOperator
from torch import Tensor, nn

import ntkops
from ntkops.distill import search_local_global, select, select_inputs, synthesize
from ntkops.distill.inducing import kernel_inducing
from ntkops.distill.wasserstein import wasserstein
from ntkops.projections import SJLT
from ntkops.regression import KernelRidge, metrics

__all__ = ["METHODS", "STAGES", "Sizes", "measure_seed"]

Row = dict[str, Any]
# What a choice looks at, and so which gradients it takes on top of those of the points.
METHODS = {
    "random": "nothing", "pixel k-medoids": "inputs", "feature k-medoids": "activations",
    "WMDD": "activations", "energy descent": "gradients of some", "RPCholesky": "gradients of all",
    "leverage": "gradients of all",
}  # fmt: skip
_TESTS, _ALL = "gradients of the test images", "projected gradients of all training images"
STAGES = ("data", "data + projection", "data + projection + gradients")
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
    rows = []
    started = time.process_time()
    fitted = KernelRidge(RIDGE).fit(kernel, ground.logits)
    predictions = fitted.predict(kernel.cross(ground.data.x_test))
    made = ground.seconds[_ALL]
    shared = {"kernel_flops": float(n**2 * k * classes), "kernel_bytes": 4 * classes * n**2}
    rows.append({
        "stage": "projection", "way": "", **ground.score(predictions), **shared,
        "seconds": made + time.process_time() - started,
        "gradient_bytes": 4 * n * k * classes, "solve_flops": classes * k**3 / 3,
    })  # fmt: skip
    started = time.process_time()
    found = synthesize(kernel, classes, "galerkin", Y=ground.logits, ridge=RIDGE, generator=seeded())
    fitted = found.fit(kernel, ground.logits, ridge=RIDGE, fit="sketch")
    predictions = fitted.predict(kernel.cross(ground.data.x_test))
    rows.append({
        "stage": "projection + gradients", "way": "Galerkin", **ground.score(predictions),
        "seconds": made + time.process_time() - started, **shared,
        "gradient_bytes": 4 * classes * k * classes, "solve_flops": classes * classes**3 / 3,
    })  # fmt: skip
    return rows


def measure_seed(data: Data, seed: int, sizes: Sizes, say: Callable[[str], None] = lambda text: None) -> Row:
    """Measure all choices of points for one trained network.

    Args:
        data: Images; the first n train.
        seed: Of network, draws and descents.
        sizes: Sizes of everything.
        say: Told what is being done.

    Returns:
        One entry of the result: the network and its rows.
    """
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
