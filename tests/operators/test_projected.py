"""Projected kernels against dense references: values, laziness, slices, gradients, estimators, refusals."""

from __future__ import annotations

import gc
import pickle

import pytest
import torch
from linear_operator.operators import DenseLinearOperator
from torch import Tensor, nn

import ntkops
from ntkops import projected_ntk
from ntkops.engines import count_passes
from ntkops.errors import (
    DenseMemoryError,
    DtypeError,
    InputError,
    ShapeError,
    StaleOperatorError,
    UnsupportedOperationError,
)
from ntkops.operators import ProjectedNTKOperator, ProjectionOperator
from ntkops.operators.capabilities import capabilities, dense_from_tiles
from ntkops.projections import (
    SJLT,
    SRHT,
    CountSketch,
    Gaussian,
    LayerKronecker,
    Projection,
    Rademacher,
    compose,
)
from tests.cases import BY_NAME, CASES, Case, from_all_tiles, reference_jacobian
from tests.pairs import pairs

K = 6
ENGINES = ("autograd", "layerwise")


def matrix(projection: Projection) -> Tensor:
    """Return P, ``(k, P)``."""
    return projection.apply(torch.eye(projection.dim, dtype=torch.float64)).mT


def shapes(case: Case, model: nn.Module) -> list[torch.Size]:
    return [p.shape for p in model.parameters() if p.requires_grad]


def close(found: Tensor, expected: Tensor, tolerance: float = 1e-10) -> None:
    torch.testing.assert_close(
        found, expected, rtol=tolerance, atol=tolerance * max(1.0, float(expected.abs().max()))
    )


class Problem:
    """A kernel, a projection of it, and both dense."""

    def __init__(self, name: str = "mlp", count: int = 4, kind: str = "SJLT", **options: object) -> None:
        self.case = BY_NAME[name]
        self.model, self.x = self.case.make(), self.case.data(count)
        self.J = reference_jacobian(self.case, self.model, self.x)
        self.kernel = ntkops.ntk(self.model, self.x, **self.case.options, **options)
        dim = self.J.shape[1]
        self.projection = {
            "SJLT": lambda: SJLT(dim, K, 0),
            "LayerKronecker": lambda: LayerKronecker(shapes(self.case, self.model), 3, 2, 0),
        }[kind]()
        self.P = matrix(self.projection)
        self.sketch = projected_ntk(self.kernel, self.projection)

    def by_outputs(self) -> Tensor:
        """Return features of single outputs, ``(O, N, k)``."""
        features = self.J @ self.P.mT
        return features.reshape(self.kernel.num_samples, -1, K).transpose(0, 1)


WAYS = [  # both maps for every model, each by another engine
    (case, kind, ENGINES[(number + turn) % len(ENGINES)])
    for number, case in enumerate(CASES)
    for turn, kind in enumerate(("SJLT", "LayerKronecker"))
]


@pytest.mark.parametrize(("case", "kind", "engine"), WAYS, ids=lambda value: getattr(value, "name", None))
def test_every_model_agrees_with_its_dense_reference(case: Case, kind: str, engine: str) -> None:
    problem = Problem(case.name, 3, kind, engine=engine)
    features = problem.J @ problem.P.mT
    expected = features @ features.mT
    close(problem.sketch.features(), features)
    close(problem.sketch.to_dense(), expected)
    block = torch.randn(len(expected), 2, dtype=torch.float64)
    close(problem.sketch @ block, expected @ block)


OUTPUTS = ("all", "each", "trace", 1, [1, 0])


def expected_features(problem: Problem, outputs: object) -> Tensor:
    single = problem.by_outputs()  # (O, N, k)
    if outputs == "each":
        return single
    if outputs == "trace":
        return single.transpose(0, 1).flatten(1)
    chosen = {"all": list(range(len(single)))}.get(str(outputs), [outputs] if outputs == 1 else outputs)
    return single[chosen].transpose(0, 1).flatten(0, 1)


@pytest.mark.parametrize(
    "outputs, kind, limit", pairs(OUTPUTS, ["SJLT", "LayerKronecker"], [0, "auto"]), ids=str
)
def test_every_choice_of_outputs(outputs: object, kind: str, limit: object) -> None:
    problem = Problem(kind=kind, outputs=outputs, max_dense_bytes=limit)
    features = expected_features(problem, outputs)
    dense = features @ features.mT
    sketch = problem.sketch
    assert sketch.shape == dense.shape and sketch.left.shape == features.shape
    block = torch.randn(*dense.shape[:-1], 3, dtype=torch.float64)
    for _ in range(4):  # the first products go through J and P, later ones through kept features
        close(sketch @ block, dense @ block)
    close(sketch.diagonal(), dense.diagonal(dim1=-2, dim2=-1))
    close(dense_from_tiles(capabilities(sketch), 2), dense)
    close(from_all_tiles(sketch, 3), dense)
    wide = torch.randn(*features.shape[:-2], features.shape[-1], 2, dtype=torch.float64)
    close(sketch.left @ wide, features @ wide)
    close(sketch.left.mT @ block, features.mT @ block)
    if limit:
        close(sketch.to_dense(), dense)
        close(sketch.left.mT.to_dense(), features.mT)


@pytest.mark.parametrize("outputs", ["all", "each", "trace"])
def test_cross_kernels_share_the_map(outputs: str) -> None:
    problem = Problem(outputs=outputs)
    features = expected_features(problem, outputs)
    fresh = problem.case.data(2, seed=9)
    other = Problem(outputs=outputs)
    other.J = reference_jacobian(problem.case, problem.model, fresh)
    other.kernel = ntkops.ntk(problem.model, fresh, outputs=outputs)
    expected = expected_features(other, outputs)
    cross = problem.sketch.cross(fresh)
    assert isinstance(cross, ProjectedNTKOperator)
    close(cross.to_dense(), expected @ features.mT)
    close(cross.features(), expected)
    close(cross.mT @ torch.ones(cross.shape[-2], 1).double(), (features @ expected.mT).sum(-1, keepdim=True))
    close(cross.right.to_dense(), features)
    half = torch.ones(features.shape[-2], 2, dtype=torch.float64)
    lazy = projected_ntk(problem.kernel, problem.projection, max_dense_bytes=0).cross(fresh)
    close(lazy @ half, expected @ (features.mT @ half))


def test_slices_stay_projected() -> None:
    problem = Problem()
    features = problem.J @ problem.P.mT
    dense, sketch = features @ features.mT, problem.sketch
    for index in (slice(1, 5), torch.tensor([5, 0, 5]), [2, 3]):
        part = sketch[index]
        assert isinstance(part, ProjectedNTKOperator)
        close(part.to_dense(), dense[index])
    close(sketch[2:6, 1:3].to_dense(), dense[2:6, 1:3])
    close(sketch.submatrix([1, 4], [1, 4]).to_dense(), dense[[1, 4]][:, [1, 4]])
    assert sketch.submatrix([1, 4], [1, 4]).symmetric
    close(sketch[[0, 3], [2, 7]], dense[[0, 3], [2, 7]])
    close(sketch[3, 4], dense[3, 4])
    close(sketch.left[2:5].to_dense(), features[2:5])
    close(sketch.left[:, 1:3].to_dense(), features[:, 1:3])
    each = Problem(outputs="each")
    close(each.sketch[1].to_dense(), expected_features(each, 1) @ expected_features(each, 1).mT)
    close(
        each.sketch.sum(-3).to_dense(), expected_features(each, "trace") @ expected_features(each, "trace").mT
    )


def test_algebra_stays_lazy() -> None:
    problem = Problem(max_dense_bytes=0)
    features = problem.J @ problem.P.mT
    dense, eye = features @ features.mT, torch.eye(8, dtype=torch.float64)
    block = torch.randn(8, 2, dtype=torch.float64)
    close(problem.sketch.add_jitter(0.3) @ block, (dense + 0.3 * eye) @ block)
    close((problem.kernel - problem.sketch) @ block, (problem.J @ problem.J.mT - dense) @ block)
    close((2.0 * problem.sketch + problem.kernel) @ block, (2 * dense + problem.J @ problem.J.mT) @ block)
    close(capabilities(problem.sketch.add_jitter(0.3)).diagonal(), dense.diagonal() + 0.3)
    solved = (
        projected_ntk(ntkops.ntk(problem.model, problem.x), problem.projection).add_jitter(0.3).solve(block)
    )
    close(solved, torch.linalg.solve(dense + 0.3 * eye, block))


GIVEN = {
    "Gaussian": lambda dim: Gaussian(dim, K, 1),
    "CountSketch": lambda dim: CountSketch(dim, K, 1),
    "Rademacher": lambda dim: Rademacher(dim, K, 1),
    "SRHT": lambda dim: SRHT(dim, K, 1),
    "compose": lambda dim: compose(Gaussian(20, K, 1), SJLT(dim, 20, 1)),
    "operator": lambda dim: ProjectionOperator(SJLT(dim, K, 1), torch.float64),
    "tensor": lambda dim: torch.randn(K, dim, dtype=torch.float64),
    "dense operator": lambda dim: DenseLinearOperator(torch.randn(K, dim, dtype=torch.float64)),
}


@pytest.mark.parametrize("limit", [0, "auto"])
@pytest.mark.parametrize("kind", GIVEN)
def test_whatever_projects(kind: str, limit: object) -> None:
    problem = Problem()
    given = GIVEN[kind](problem.J.shape[1])
    P = matrix(given) if isinstance(given, Projection) else given @ torch.eye(given.shape[1]).double()
    sketch = projected_ntk(problem.kernel, given, max_dense_bytes=limit)
    close(sketch @ torch.eye(8).double(), problem.J @ P.mT @ P @ problem.J.mT)
    assert ("operator" in kind or "tensor" in kind) == (sketch.projection is not given)


def test_principal_components_and_inducing_gradients_give_the_restricted_kernel() -> None:
    """Eq. 7: Φ Π Φᵀ for the orthogonal projector on a subspace."""
    problem = Problem(count=6)
    rank = 5
    basis = torch.linalg.svd(problem.J, full_matrices=False)[2][:rank]
    values, vectors = torch.linalg.eigh(problem.J @ problem.J.mT)
    best = (vectors[:, -rank:] * values[-rank:]) @ vectors[:, -rank:].mT
    close(projected_ntk(problem.kernel, basis).to_dense(), best)
    inducing = problem.J[[0, 3, 4]]
    span = torch.linalg.qr(inducing.mT)[0].mT
    K_nz, K_zz = problem.J @ inducing.mT, inducing @ inducing.mT
    close(projected_ntk(problem.kernel, span).to_dense(), K_nz @ torch.linalg.solve(K_zz, K_nz.mT), 1e-8)
    lazy = ntkops.jacobian(problem.model, problem.x)  # a lazy operator: gradients of the samples themselves
    close(
        projected_ntk(problem.kernel, lazy).to_dense(),
        (problem.J @ problem.J.mT) @ (problem.J @ problem.J.mT),
    )


def test_a_full_orthogonal_map_gives_the_kernel_itself() -> None:
    problem = Problem()
    dim = problem.J.shape[1]
    whole = projected_ntk(problem.kernel, torch.eye(dim, dtype=torch.float64))
    close(whole.to_dense(), problem.kernel.to_dense())


# laziness, caches, memory


@pytest.mark.parametrize("engine", ENGINES)
def test_nothing_is_kept_when_nothing_may_be(engine: str) -> None:
    problem = Problem(engine=engine, max_dense_bytes=0)
    sketch = problem.sketch
    for refused in (sketch.to_dense, sketch.features, sketch.left.to_dense):
        with pytest.raises(DenseMemoryError, match="max_dense_bytes=0 B"):
            refused()
    for _ in range(5):
        sketch @ torch.ones(8, 4, dtype=torch.float64)
    assert sketch._held(sketch._rows) is None


def test_the_diagonal_writes_to_no_feature_that_is_kept() -> None:
    sketch = Problem(engine="autograd").sketch  # float64, in which a copy would be none
    features = sketch.features()
    before = features.clone()
    torch.testing.assert_close(sketch.diagonal(), before.square().sum(-1))
    assert torch.equal(features, before)


def test_features_are_made_once_and_dropped_by_free() -> None:
    problem = Problem(engine="autograd")
    sketch = problem.sketch
    block = torch.ones(8, 1, dtype=torch.float64)
    with count_passes() as tally:
        sketch @ block  # 2 passes: not yet as many as the features cost
        assert (tally.count.vjp, tally.count.jvp, tally.count.per_sample) == (1, 1, 0)
        sketch @ block
        assert tally.count.per_sample == 2  # the 2 outputs
        for _ in range(5):
            sketch @ block
        sketch.features(), sketch.diagonal(), sketch.to_dense(), sketch.left.mT @ block
        assert tally.total == 4
    assert sketch.free() > 0
    with count_passes() as tally:
        sketch.features()
    assert tally.total == 2


def test_other_projections_of_one_kernel_are_kept_apart() -> None:
    problem = Problem()
    other = projected_ntk(problem.kernel, SJLT(problem.J.shape[1], K, 1))
    close(problem.sketch.features(), problem.J @ problem.P.mT)
    close(other.features(), problem.J @ matrix(other.projection).mT)
    given = torch.randn(K, problem.J.shape[1], dtype=torch.float64)
    first = projected_ntk(problem.kernel, given)
    close(first.features(), problem.J @ given.mT)
    given.mul_(2)  # held by reference
    with pytest.raises(StaleOperatorError, match="changed in place"):
        first @ torch.ones(8, 1, dtype=torch.float64)


def test_rows_of_the_jacobian_are_written_down_a_few_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = Problem(count=5, engine="autograd")
    engine = problem.kernel._core.engine
    row = problem.J.shape[1] * 8
    seen: list[int] = []
    original = type(engine).jacobian_tile

    def watched(self, *args):
        tile = original(self, *args)
        seen.append(tile.numel() * 8)
        return tile

    monkeypatch.setattr(type(engine), "jacobian_tile", watched)
    for rows in (1, 2, 5):
        seen.clear()
        monkeypatch.setattr(type(engine), "workspace_bytes", lambda self, rows=rows: rows * row)
        close(
            projected_ntk(problem.kernel, SJLT(problem.J.shape[1], K, rows)).features().sum(),
            (problem.J @ matrix(SJLT(problem.J.shape[1], K, rows)).mT).sum(),
        )
        assert max(seen) <= rows * row and sum(seen) == 10 * row


def test_kronecker_maps_never_write_gradients_of_layers_down() -> None:
    """Two layers of 1024 x 1024: a row of J has 16.8 MB in float64, all 32 of them 537 MB."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(1024, 1024), nn.Tanh(), nn.Linear(1024, 1024), nn.Tanh(), nn.Linear(1024, 2)
    )
    x = torch.randn(16, 1024)
    kernel = ntkops.ntk(model, x, engine="layerwise", max_dense_bytes=10**6)
    sketch = projected_ntk(kernel, LayerKronecker([p.shape for p in model.parameters()], 8, 8, 0))
    sizes: list[int] = []
    gc.collect()

    class Largest(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            if isinstance(result, Tensor):
                sizes.append(result.numel())
            return result

    with Largest():
        features = sketch.features()
    assert features.shape == (32, 64)
    assert max(sizes) < 1024 * 1024 * 2  # no larger than a weight: nothing with samples or outputs on top


def test_pickles_and_casts() -> None:
    problem = Problem()
    features = problem.J @ problem.P.mT
    again = pickle.loads(pickle.dumps(problem.sketch))
    close(again.features(), features)
    single = problem.sketch.to(torch.float32)
    assert single.dtype == single.features().dtype == torch.float32
    close(single.features().double(), features, 1e-5)
    given = projected_ntk(problem.kernel, problem.P).to(torch.float32)
    close(given.features().double(), features, 1e-5)
    assert "SJLT(dim=38, k=6, seed=0, nonzeros=4)" in repr(problem.sketch)
    assert "SJLT" in repr(problem.sketch.left)


# derivatives


@pytest.mark.parametrize("kind", ["SJLT", "LayerKronecker"])
def test_products_are_differentiable_in_parameters(kind: str) -> None:
    problem = Problem(kind=kind)
    model = problem.model
    live = ntkops.ntk(model, problem.x, differentiable=True)
    sketch = projected_ntk(live, problem.projection)
    block = torch.randn(8, 2, dtype=torch.float64)
    values = (sketch @ block).square().sum(), sketch.to_dense().matmul(block).square().sum()
    weights = [model[0].weight, model[2].weight]
    found, dense = (torch.autograd.grad(value, weights) for value in values)

    def value() -> Tensor:
        J = reference_jacobian(problem.case, model, problem.x)
        return (J @ problem.P.mT @ problem.P @ J.mT @ block).square().sum()

    weight, step = model[0].weight, 1e-5
    with torch.no_grad():
        weight[0, 1] += step
        above = value_with_grad(value)
        weight[0, 1] -= 2 * step
        below = value_with_grad(value)
        weight[0, 1] += step
    for gradients in (found, dense):
        assert float(gradients[0][0, 1]) == pytest.approx((above - below) / (2 * step), rel=1e-6)


def value_with_grad(value) -> float:
    with torch.enable_grad():
        return float(value())


# estimators


def test_estimators_take_it() -> None:
    problem = Problem(count=6)
    dense = (problem.J @ problem.P.mT) @ (problem.J @ problem.P.mT).mT
    sketch = problem.sketch
    assert float(ntkops.trace(sketch)) == pytest.approx(float(dense.trace()), rel=1e-8)
    assert float(ntkops.frobenius_norm(sketch)) == pytest.approx(float(dense.norm()), rel=1e-8)
    wanted = float(
        (problem.kernel.to_dense() * dense).sum() / dense.norm() / problem.kernel.to_dense().norm()
    )
    assert float(ntkops.alignment(problem.kernel, sketch)) == pytest.approx(wanted, rel=1e-8)
    pairs = ntkops.eigsh(sketch, k=3, generator=torch.Generator().manual_seed(0))
    close(pairs.values, torch.linalg.eigvalsh(dense).flip(0)[:3], 1e-8)
    lazy = projected_ntk(problem.kernel, problem.projection, max_dense_bytes=0)
    generator = torch.Generator().manual_seed(0)
    estimate = ntkops.trace(lazy, method="hutchinson", num_passes=4000, generator=generator)
    assert estimate.interval[0] <= float(dense.trace()) <= estimate.interval[1]


# the operator of a projection


def test_projection_operator_is_the_matrix() -> None:
    projection = SJLT(40, K, 0)
    P, dense = ProjectionOperator(projection, torch.float64), matrix(projection)
    assert P.shape == (K, 40) and P.mT.shape == (40, K) and P.mT.mT.shape == P.shape
    close(P.to_dense(), dense)
    close(P.mT.to_dense(), dense.mT)
    block = torch.randn(2, 40, 3, dtype=torch.float64)
    close(P @ block, dense @ block)
    close(P @ block[0, :, 0], dense @ block[0, :, 0])
    close(P.mT @ (P @ block), dense.mT @ dense @ block)
    close((P @ P.mT) @ torch.eye(K).double(), dense @ dense.mT)
    close(P[torch.tensor([1, 2]), torch.tensor([30, 4])], dense[[1, 2], [30, 4]])
    close(P[2, 7], dense[2, 7])
    vector = torch.randn(4, 2, dtype=torch.float64)
    for rows, columns in ((slice(1, 5), slice(7, 30)), ([0, 2, 2], slice(3, 7)), (slice(None), [5, 1, 5])):
        part, expected = P[rows][:, columns], dense[rows][:, columns]
        close(part.to_dense(), expected)
        close(part @ torch.eye(expected.shape[1]).double(), expected)
        close(part.mT @ torch.eye(expected.shape[0]).double(), expected.mT)
    close(P[1:5] @ (P[1:5].mT @ vector), dense[1:5] @ dense[1:5].mT @ vector)
    vector = torch.randn(40, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad((P @ vector).square().sum(), vector)
    close(gradient, 2 * dense.mT @ dense @ vector.detach())
    assert P.to(torch.float32).dtype == torch.float32
    assert repr(P.mT) == "ProjectionOperator(SJLT(dim=40, k=6, seed=0, nonzeros=4), torch.float64, cpu).mT"
    close(pickle.loads(pickle.dumps(P)) @ block, dense @ block)
    close(dense_from_tiles(capabilities(P), 7), dense)


def test_projection_operator_refuses_to_become_dense() -> None:
    P = ProjectionOperator(SJLT(40, K, 0), max_dense_bytes=0)
    with pytest.raises(DenseMemoryError, match="6 x 40 projection needs 960 B"):
        P.to_dense()
    with pytest.raises(ShapeError, match="expected 40 rows"):
        P @ torch.ones(39)
    with pytest.raises(DtypeError, match=r"torch\.float32, the vector torch\.float64"):
        P @ torch.ones(40, dtype=torch.float64)
    with pytest.raises(InputError, match="is a int"):
        ProjectionOperator(3)


BAD = {
    "not a kernel": (lambda p: projected_ntk(torch.eye(3), p.projection), InputError, "K is a Tensor"),
    "Jacobian": (lambda p: projected_ntk(p.kernel.left, p.projection), InputError, "JacobianOperator"),
    "twice": (lambda p: projected_ntk(p.sketch, p.projection), InputError, "already projected"),
    "not a projection": (lambda p: projected_ntk(p.kernel, 1.5), InputError, "projection is a float"),
    "size": (lambda p: projected_ntk(p.kernel, SJLT(37, K, 0)), ShapeError, r"\(6, 37\).*\(k, 38\)"),
    "transposed": (lambda p: projected_ntk(p.kernel, p.P.mT), ShapeError, r"\(38, 6\)"),
    "dtype": (lambda p: projected_ntk(p.kernel, p.P.float()), DtypeError, r"torch\.float32"),
    "grad": (
        lambda p: projected_ntk(p.kernel, p.P.clone().requires_grad_()),
        UnsupportedOperationError,
        "detach",
    ),
    "sample_gram": (
        lambda p: p.sketch.sample_gram(torch.ones(4, 1, 2)),
        UnsupportedOperationError,
        "no Gram matrix",
    ),
    "rows": (lambda p: p.sketch @ torch.ones(7).double(), ShapeError, "expected 8 rows"),
    "features": (lambda p: p.sketch.left @ torch.ones(7).double(), ShapeError, "the projected features"),
    "limit": (lambda p: projected_ntk(p.kernel, p.projection, max_dense_bytes=-1), ShapeError, "-1"),
}


@pytest.mark.parametrize("name", BAD)
def test_refusals_name_the_culprit(name: str) -> None:
    call, error, message = BAD[name]
    problem = Problem()
    with pytest.raises(error, match=message):
        call(problem)


@pytest.mark.parametrize("kind", ["projected", "nystrom"])
def test_autocast_takes_no_digits_from_tiles(kind):
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2)), torch.randn(20, 4)
    if kind == "projected":
        K = ntkops.projected_ntk(ntkops.ntk(model, x), 16)
    else:
        K = ntkops.nystrom_ntk(ntkops.ntk(model, x), "rpcholesky", num_inducing=8)
    plain = ntkops.frobenius_norm(K, method="exact").value
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = ntkops.frobenius_norm(K, method="exact").value
    torch.testing.assert_close(found, plain, rtol=1e-6, atol=0)
