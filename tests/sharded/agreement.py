"""What a rank computes over the process group, beside what one process computes of all samples."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import ntkops
from ntkops.solvers import conjugate_gradient, nystrom_preconditioner

from .problems import block, generator, network, rows, samples, share

Pair = tuple[Any, Any]
Check = Callable[["Scene"], Pair]


class Scene:
    """The kernel over the group and that of one process.

    Attributes:
        here: Rows of this rank.
    """

    def __init__(self, rank: int, count: int, **options: Any) -> None:
        dtype = options.pop("dtype", torch.float64)
        x = samples(dtype)
        self.rank, self.count = rank, count
        self.K = ntkops.ntk(network(dtype), x[share(rank, count)], group="world", **options)
        self.whole = ntkops.ntk(network(dtype), x, **options)
        self.after = ntkops.ntk(network(dtype, 5), x[share(rank, count)], group="world", **options)
        self.whole_after = ntkops.ntk(network(dtype, 5), x, **options)
        self.dtype = dtype
        self.here = rows(rank, count)

    def both(self, make: Callable[..., Any]) -> Pair:
        """Return the same of both kernels."""
        return make(self.K), make(self.whole)

    def numbers(self, estimate: Callable[..., Any]) -> Pair:
        """Return value and standard error of an estimate of both."""
        found = []
        for kernel in (self.K, self.whole):
            result = estimate(kernel)
            found.append(torch.stack([result.value.double(), result.stderr.double()]))
        return found[0], found[1]


def estimate(name: str, **options: Any) -> Check:
    """Return a check of one of the estimators."""

    def check(scene: Scene) -> Pair:
        return scene.numbers(lambda K: getattr(ntkops, name)(K, generator=generator(), **options))

    return check


def aligned(**options: Any) -> Check:
    """Return a check of the alignment of two kernels."""

    def check(scene: Scene) -> Pair:
        found = []
        for one, other in ((scene.K, scene.after), (scene.whole, scene.whole_after)):
            result = ntkops.alignment(one, other, generator=generator(), **options)
            found.append(torch.stack([result.value, result.stderr]))
        return found[0], found[1]

    return check


def products(scene: Scene) -> Pair:
    """A block of columns."""
    v = block(dtype=scene.dtype)
    return scene.K @ v[scene.here], (scene.whole @ v)[scene.here]


def vector(scene: Scene) -> Pair:
    """One vector, twice, so that caches are used."""
    v = block(1, dtype=scene.dtype)[:, 0]
    scene.K @ v[scene.here]
    return scene.K @ v[scene.here], (scene.whole @ v)[scene.here]


def factors(scene: Scene) -> Pair:
    """Jᵀ v, which is the same everywhere, and J p."""
    v = block(dtype=scene.dtype)
    pulled = scene.K.left.mT @ v[scene.here]
    reference = scene.whole.left.mT @ v
    pushed = scene.K.left @ reference
    joined = torch.cat([pulled, pushed])
    return joined, torch.cat([reference, (scene.whole.left @ reference)[scene.here]])


def algebra(scene: Scene) -> Pair:
    """Sums, multiples and ridges."""
    v = block(dtype=scene.dtype)
    mine = (2 * scene.K + scene.after).add_jitter(0.5) @ v[scene.here]
    return mine, ((2 * scene.whole + scene.whole_after).add_jitter(0.5) @ v)[scene.here]


def crossed(scene: Scene) -> Pair:
    """New samples, all of them on every rank."""
    v, new = block(dtype=scene.dtype), samples(scene.dtype, 6, seed=9)
    return scene.K.cross(new) @ v[scene.here], scene.whole.cross(new) @ v


def crossed_shares(scene: Scene) -> Pair:
    """New samples, spread over the ranks, and the transpose."""
    v, new = block(dtype=scene.dtype), samples(scene.dtype, seed=9)
    cross = scene.K.cross(new[share(scene.rank, scene.count)])
    whole = scene.whole.cross(new)
    joined = torch.cat([cross @ v[scene.here], cross.mT @ v[scene.here]])
    return joined, torch.cat([(whole @ v)[scene.here], (whole.mT @ v)[scene.here]])


def diagonal(scene: Scene) -> Pair:
    """This rank's entries of the diagonal."""
    return ntkops.diagonal(scene.K).value, ntkops.diagonal(scene.whole).value[scene.here]


def eigenvalues(scene: Scene) -> Pair:
    """Leading eigenvalues."""
    return scene.both(lambda K: ntkops.eigsh(K, 5, generator=generator()).values)


def eigenvectors(scene: Scene) -> Pair:
    """The residual of eigenvectors whose rows lie on the ranks."""
    pairs = ntkops.eigsh(scene.K, 3, generator=generator())
    rest = scene.K @ pairs.vectors - pairs.vectors * pairs.values
    return pairs.values + scene.K.space.sum_squares(rest).sqrt(), pairs.values


def density(scene: Scene) -> Pair:
    """The spectral density by quadrature."""
    grid = torch.linspace(0, 1, 20, dtype=torch.float64)
    return scene.both(
        lambda K: ntkops.spectral_density(
            K, method="slq", num_probes=4, num_steps=20, generator=generator(), bandwidth=1.0
        ).cdf(grid)
    )


def truncation(scene: Scene) -> Pair:
    """Truncation rank and redundancies."""
    return scene.both(
        lambda K: torch.tensor(
            [
                float(ntkops.truncation_rank(K, 0.05, method="lanczos", generator=generator()).rank),
                float(ntkops.truncation_rank(K, 0.05, method="lanczos", generator=generator()).captured),
            ]
        )
    )


def sketch(scene: Scene) -> Pair:
    """One sketch, several quantities."""

    def numbers(K: Any) -> Tensor:
        held = ntkops.Sketch(K, 12, generator=generator()).extend(3)
        return torch.stack([held.trace().value, held.frobenius_norm().value, held.effective_rank().value])

    return scene.both(numbers)


def gradients(scene: Scene) -> Pair:
    """Conjugate gradients on the operator, preconditioned."""
    b = block(2, dtype=scene.dtype)
    added, tolerance = (0.1, 1e-12) if scene.dtype == torch.float64 else (2.0, 1e-5)

    def solve(K: Any, right: Tensor) -> Tensor:
        made = nystrom_preconditioner(lambda V: K @ V, added, K.space, 8, generator=generator())
        return conjugate_gradient(
            lambda V: K @ V + added * V, right, K.space, preconditioner=made, tolerance=tolerance
        ).solution

    return solve(scene.K, b[scene.here]), solve(scene.whole, b)[scene.here]


def ridge(scene: Scene) -> Pair:
    """The solver of an operator with a ridge, constant and not."""
    b = block(2, dtype=scene.dtype)
    entries = torch.linspace(0.1, 1.0, len(b), dtype=scene.dtype)
    options = {"tolerance": 1e-11, "rank": 8}
    found = []
    for mine, whole in (
        (scene.K.add_jitter(0.1), scene.whole.add_jitter(0.1)),
        (scene.K.add_diagonal(entries[scene.here]), scene.whole.add_diagonal(entries)),
    ):
        solution = mine.with_solver(**options).solve(b[scene.here])
        dense = torch.linalg.solve(whole.to_dense().double(), b.double())[scene.here]
        found.append((solution.double(), dense))
    return torch.cat([pair[0] for pair in found]), torch.cat([pair[1] for pair in found])


def regression(scene: Scene) -> Pair:
    """Kernel ridge regression and its predictions, for labels of both shapes."""
    x, new = samples(scene.dtype), samples(scene.dtype, 6, seed=9)
    part, found = share(scene.rank, scene.count), []
    y = torch.sin(x @ torch.ones(5, 3, dtype=scene.dtype))
    for outputs, options in (
        ("all", {}),
        ("each", {}),
        ("trace", {"offset": 0.5}),
        ("all", {"offset": "network"}),
    ):
        mine = ntkops.ntk(network(scene.dtype), x[part], outputs=outputs, group="world")
        whole = ntkops.ntk(network(scene.dtype), x, outputs=outputs)
        fits = [
            ntkops.KernelRidge(1e-2, tol=1e-11, method=method, generator=generator(), **options).fit(
                K, labels
            )
            for K, labels, method in ((mine, y[part], "auto"), (whole, y, "cholesky"))
        ]
        found.append((fits[0].dual_coef_.flatten(), fits[1].dual_coef_[part].flatten()))
        found.append(
            tuple(fit.predict(K.cross(new)).flatten() for fit, K in zip(fits, (mine, whole), strict=True))
        )
    return torch.cat([pair[0] for pair in found]), torch.cat([pair[1] for pair in found])


def projected(scene: Scene) -> Pair:
    """Products, traces and solves of a projected kernel."""
    found, v, new = [], block(2, dtype=scene.dtype), samples(scene.dtype, 6, seed=9)
    made = ntkops.projections.SJLT(scene.K.num_parameters, 20, seed=3)
    mine, whole = (ntkops.projected_ntk(K, made) for K in (scene.K, scene.whole))
    found.append((mine @ v[scene.here], (whole @ v)[scene.here]))
    found.append((mine.cross(new) @ v[scene.here], whole.cross(new) @ v))
    traces = [ntkops.trace(K, method="exact").value.reshape(1, 1).expand(1, 2) for K in (mine, whole)]
    found.append((traces[0], traces[1]))
    added, tolerance = (0.1, 1e-11) if scene.dtype == torch.float64 else (5.0, 1e-5)
    solved = [
        K.add_jitter(added).with_solver(tolerance=tolerance, method="cg").solve(b)
        for K, b in ((mine, v[scene.here]), (whole, v))
    ]
    found.append((solved[0], solved[1][scene.here]))
    return torch.cat([pair[0] for pair in found]), torch.cat([pair[1] for pair in found])


def streamed(scene: Scene) -> Pair:
    """Shares that are read batch by batch; a rank without samples has no batch."""
    x, part, v = samples(scene.dtype), share(scene.rank, scene.count), block(2, dtype=scene.dtype)
    batches = [x[a : min(a + 4, part.stop)] for a in range(part.start, part.stop, 4)]
    mine, found = ntkops.ntk(network(scene.dtype), batches, group="world"), []
    found.append((mine @ v[scene.here], (scene.whole @ v)[scene.here]))
    for name in ("trace", "frobenius_norm"):
        exact = [getattr(ntkops, name)(K, method="exact").value for K in (mine, scene.whole)]
        found.append(tuple(value.to(scene.dtype).reshape(1, 1).expand(1, 2) for value in exact))
    return torch.cat([pair[0] for pair in found]), torch.cat([pair[1] for pair in found])


def batch(scene: Scene) -> Pair:
    """One kernel for each output, and their sum."""
    x = samples(scene.dtype)
    part = share(scene.rank, scene.count)
    v = block(2, len(x), scene.dtype)
    found = []
    for outputs in ("each", "trace", 1, [0, 2]):
        mine = ntkops.ntk(network(scene.dtype), x[part], outputs=outputs, group="world")
        whole = ntkops.ntk(network(scene.dtype), x, outputs=outputs)
        width = 2 if outputs == [0, 2] else 1
        rhs = v.repeat_interleave(width, 0) if width > 1 else v
        rhs = rhs.expand(*whole.shape[:-2], *rhs.shape)
        here = slice(part.start * width, part.stop * width)
        a, b = mine @ rhs[..., here, :], (whole @ rhs)[..., here, :]
        found.append((a.flatten(), b.flatten()))
        exact = [float(ntkops.frobenius_norm(K, method="exact").value.sum()) for K in (mine, whole)]
        found.append((torch.tensor(exact[:1], dtype=scene.dtype), torch.tensor(exact[1:], dtype=scene.dtype)))
    return torch.cat([pair[0] for pair in found]), torch.cat([pair[1] for pair in found])


class Packed(nn.Module):
    """Runs its hidden layer on those rows alone whose first entry is below a limit."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.hidden, self.head = nn.Linear(5, 8).to(dtype), nn.Linear(8, 3).to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        kept = x[:, 0] < 5
        hidden = x.new_zeros(len(x), 8)
        hidden[kept] = torch.tanh(self.hidden(x[kept]))
        return self.head(hidden + x.sum(1, keepdim=True))


def packed_on_one_rank(scene: Scene) -> Pair:
    """A layer that rules cover on the samples of all ranks but the last."""
    x, v, found = samples(scene.dtype), block(2, dtype=scene.dtype), []
    x[-2, 0] = 6.0
    part, new = share(scene.rank, scene.count), samples(scene.dtype, 6, seed=9)
    model = Packed(scene.dtype)
    mine = ntkops.ntk(model, x[part], group="world")
    whole = ntkops.ntk(Packed(scene.dtype), x, engine="autograd")
    for _ in range(2):
        found.append((mine @ v[scene.here], (whole @ v)[scene.here]))
        found.append((ntkops.diagonal(mine).value, ntkops.diagonal(whole).value[scene.here]))
        for name in ("trace", "frobenius_norm"):
            exact = [getattr(ntkops, name)(K, method="exact").value for K in (mine, whole)]
            found.append(tuple(value.to(scene.dtype).reshape(1, 1) for value in exact))
    found.append((mine.cross(new) @ v[scene.here], whole.cross(new) @ v))
    return torch.cat([a.flatten() for a, _ in found]), torch.cat([b.flatten() for _, b in found])


CHECKS: dict[str, Check] = {
    "products": products,
    "packed on one rank": packed_on_one_rank,
    "vector": vector,
    "factors": factors,
    "algebra": algebra,
    "cross": crossed,
    "cross in shares": crossed_shares,
    "diagonal": diagonal,
    "trace, exact": estimate("trace", method="exact"),
    "norm, exact": estimate("frobenius_norm", method="exact"),
    "effective rank, exact": estimate("effective_rank", method="exact"),
    "alignment, exact": aligned(method="exact"),
    "trace, hutch++": estimate("trace", method="hutch++", num_passes=60),
    "trace, hutchinson": estimate("trace", method="hutchinson", num_passes=20),
    "trace, ntk-hutch++": estimate("trace", method="ntk-hutch++", num_passes=40),
    "trace, xtrace": estimate("trace", method="xtrace", num_passes=40),
    "trace, stratified": estimate("trace", method="stratified", num_passes=1),
    "norm, stratified": estimate("frobenius_norm", method="stratified", num_passes=2),
    "effective rank, stratified": estimate("effective_rank", method="stratified", num_passes=2),
    "alignment, stratified": aligned(method="stratified", num_passes=4),
    "trace, rhutch": estimate("trace", method="rhutch", num_passes=12),
    "trace, fhutch": estimate("trace", method="fhutch", num_passes=12),
    "trace, sketch": estimate("trace", method="sketch", num_passes=30),
    "trace, to a tolerance": estimate("trace", method="sketch", rtol=0.02),
    "norm, sketch": estimate("frobenius_norm", method="sketch", num_passes=30),
    "norm, hutch++": estimate("frobenius_norm", method="hutch++", num_passes=60),
    "norm, reverse": estimate("frobenius_norm", method="reverse", num_passes=20),
    "norm, forward": estimate("frobenius_norm", method="forward", num_passes=20),
    "effective rank, sketch": estimate("effective_rank", method="sketch", num_passes=30),
    "alignment, sketch": aligned(method="sketch", num_passes=80),
    "alignment, hutch++": aligned(method="hutch++", num_passes=120),
    "alignment, auto": aligned(rtol=0.1),
    "logdet": estimate("logdet", ridge=0.5, method="slq", rtol=0.05),
    "effective dimension": estimate("effective_dimension", ridge=0.5, method="slq", rtol=0.05),
    "eigenvalues": eigenvalues,
    "eigenvectors": eigenvectors,
    "density": density,
    "truncation rank": truncation,
    "sketch": sketch,
    "conjugate gradients": gradients,
    "ridge": ridge,
    "regression": regression,
    "projected": projected,
    "streamed": streamed,
    "batch": batch,
}


def compare(rank: int, count: int, options: dict[str, Any] | None = None) -> dict[str, Any]:
    """Return the error of every check, relative to the largest entry, or the exception."""
    scene = Scene(rank, count, **(options or {}))
    found: dict[str, Any] = {}
    for name, check in CHECKS.items():
        try:
            mine, whole = check(scene)
            found[name] = _error(mine, whole)
        except Exception as error:
            found[name] = f"{type(error).__name__}: {error}"
            break  # the ranks are out of step
    return found


def _error(mine: Tensor, whole: Tensor) -> float:
    if mine.shape != whole.shape:
        return float("inf")
    if not mine.numel():
        return 0.0
    return float((mine.double() - whole.double()).abs().max() / whole.double().abs().max().clamp(min=1e-300))


def _redundancy(scene: Scene, name: str) -> Any:
    """Return the data or the parameter redundancy of both kernels."""
    mine, whole = scene.both(
        lambda K: getattr(ntkops, name)(K, 0.05, method="lanczos", generator=generator())
    )
    return torch.tensor([float(mine)]), torch.tensor([float(whole)])


# What is right, or raises: nothing answers for one rank alone.
OTHERS: dict[str, Check] = {
    "partial_trace over samples": lambda s: s.both(lambda K: ntkops.partial_trace(K, "samples").value),
    "partial_trace over outputs": lambda s: s.both(lambda K: ntkops.partial_trace(K, "outputs").value),
    "data redundancy": lambda s: _redundancy(s, "data_redundancy"),
    "parameter redundancy": lambda s: _redundancy(s, "parameter_redundancy"),
    "one-sided product trace": lambda s: s.both(
        lambda K: (
            ntkops.one_sided_product_trace(
                K.left, K.left, K.left, K.left, num_passes=8, generator=generator()
            ).value
        )
    ),
    "logdet, exact": estimate("logdet", ridge=0.5, method="exact"),
    "truncation rank, dense": lambda s: s.both(
        lambda K: ntkops.truncation_rank(K, 0.05, method="dense").rank.double()
    ),
    "norm of a ridge": lambda s: s.numbers(
        lambda K: ntkops.frobenius_norm(K.add_jitter(0.3), method="exact")
    ),
    "trace of a sum": lambda s: (
        ntkops.trace(s.K + 2 * s.after, method="exact").value.reshape(1),
        ntkops.trace(s.whole + 2 * s.whole_after, method="exact").value.reshape(1),
    ),
    "norm of a sum": lambda s: (
        ntkops.frobenius_norm(s.K + 2 * s.after, method="exact").value.reshape(1),
        ntkops.frobenius_norm(s.whole + 2 * s.whole_after, method="exact").value.reshape(1),
    ),
    "alignment with a dense matrix": lambda s: (
        ntkops.alignment(s.K, torch.eye(s.K.shape[0], dtype=s.dtype)).value,
        ntkops.alignment(s.whole, torch.eye(s.whole.shape[0], dtype=s.dtype)).value,
    ),
    "nystrom_ntk": lambda s: (
        ntkops.nystrom_ntk(s.K, samples()[:4]) @ block()[s.here],
        (ntkops.nystrom_ntk(s.whole, samples()[:4]) @ block())[s.here],
    ),
    "energy_gap": lambda s: s.both(lambda K: torch.tensor(float(ntkops.energy_gap(K, K)))),
    "check_operator": lambda s: s.both(lambda K: torch.tensor(float(len(ntkops.check_operator(K).checks)))),
    "distill.select": lambda s: s.both(
        lambda K: ntkops.distill.select(K, 3, "random", generator=generator()).indices.double()
    ),
    "leave-one-out": lambda s: s.both(
        lambda K: torch.tensor(
            ntkops.KernelRidge(1e-2)
            .fit(K, torch.ones(K.shape[0], dtype=s.dtype))
            .leave_one_out()
            .mean_squared_error
        )
    ),
    "weights": lambda s: s.both(
        lambda K: (
            ntkops.KernelRidge(1e-2, tol=1e-12)
            .fit(K, torch.ones(K.shape[0], dtype=s.dtype))
            .weights()["0.bias"]
        )
    ),
    "predictor": lambda s: s.both(
        lambda K: (
            ntkops.KernelRidge(1e-2).fit(K, torch.ones(K.shape[0], dtype=s.dtype)).predictor()(samples())
        )
    ),
    "leave_out": lambda s: s.both(
        lambda K: (
            ntkops.KernelRidge(1e-2)
            .fit(K, torch.ones(K.shape[0], dtype=s.dtype))
            .leave_out([[0]])
            .mean_squared_error
        )
    ),
    "sample weights": lambda s: s.both(
        lambda K: (
            ntkops.KernelRidge(1e-2)
            .fit(K, torch.ones(K.shape[0], dtype=s.dtype), sample_weight=torch.ones(K.shape[0]))
            .dual_coef_
        )
    ),
    "a dense method": lambda s: s.both(
        lambda K: (
            ntkops.KernelRidge(1e-2, method="eigh").fit(K, torch.ones(K.shape[0], dtype=s.dtype)).dual_coef_
        )
    ),
    "the norm of a projected kernel": lambda s: s.numbers(
        lambda K: ntkops.frobenius_norm(
            ntkops.projected_ntk(K, ntkops.projections.SJLT(K.num_parameters, 20, seed=3)), method="exact"
        )
    ),
}


def compare_others(rank: int, count: int) -> dict[str, Any]:
    """Return the error of every further function, or the exception that it raises on this rank."""
    scene = Scene(rank, count)
    found: dict[str, Any] = {}
    for name, check in OTHERS.items():
        try:
            found[name] = _error(*check(scene))
        except ntkops.NtkopsError as error:
            found[name] = f"{type(error).__name__}: {error}"
        except Exception as error:
            found[name] = f"not ours: {type(error).__name__}: {error}"
            break
    return found
