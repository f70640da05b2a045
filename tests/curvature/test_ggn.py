"""The Gauss-Newton matrix, the Fisher information, and both of their sides, against dense references."""

import functools
import math
import pickle

import pytest
import torch
from linear_operator.operators import BlockDiagLinearOperator, DiagLinearOperator
from torch import nn
from torch.nn import functional as F

import ntkops
from ntkops.curvature import hessian_factor
from ntkops.errors import DenseMemoryError, DtypeError, InputError, NonFiniteError, ShapeError
from ntkops.operators import RidgeOperator, Sandwich
from ntkops.operators.capabilities import capabilities, dense_from_tiles
from tests.cases import from_all_tiles
from tests.curvature import reference
from tests.curvature.reference import network
from tests.pairs import pairs

D = torch.float64
NAMES = ("mlp", "small", "convolution", "tokens")
LOSSES = ("cross_entropy", "mse", "huber", "type2", "empirical", "empirical mse")


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def real_targets(model, x):
    outputs = model(x).detach()
    return (outputs + 0.7 * torch.randn(outputs.shape, generator=seeded(), dtype=D).to(outputs)).detach()


@functools.cache
def point(name, dtype):
    """Return the network linearised, once for all tests: what is found out about it is kept there."""
    return ntkops.linearize(network(name, dtype)[0])


def problem(name, kind, dtype=D, reduction="sum", **options):
    """Return G and its dense reference in float64."""
    model, x, y = network(name, dtype)
    if kind == "huber":
        given = reference.huber, real_targets(model, x)
    elif kind.startswith("empirical"):
        given = ("mse", real_targets(model, x)) if kind.endswith("mse") else ("cross_entropy", y)
        given = *given, "empirical"
    else:
        given = "mse" if kind == "mse" else "cross_entropy", None, "type2" if kind == "type2" else None
    G = ntkops.ggn(point(name, dtype), x, *given, reduction=reduction, **options)
    return G, dense(name, kind, dtype, reduction)


@functools.cache
def dense(name, kind, dtype, reduction):
    """Return the matrix in float64 of the numbers in a dtype, once for all tests."""
    model, x, y = network(name, dtype)
    outputs, values = model(x).detach(), real_targets(model, x)
    if kind == "huber":
        expected = reference.dense_ggn(model, x, lambda f: sum(map(reference.huber, f, values.double())))
        return expected / (len(x) if reduction == "mean" else 1)
    if kind.startswith("empirical"):
        squared = kind.endswith("mse")
        terms = outputs.numel() if squared else y.numel()
        expected = reference.empirical(
            model,
            x,
            lambda f: [
                reference.squares(v)(g) if squared else reference.cross_entropy(c)(g.unsqueeze(0))
                for g, v, c in zip(f, values, y, strict=True)
            ],
        )
        return expected / (terms if reduction == "mean" else 1)
    whole = reference.squares(outputs, reduction) if kind == "mse" else reference.cross_entropy(y, reduction)
    return reference.dense_ggn(model, x, whole)


def close_to(expected, units=1.0):
    return {"rtol": 1e-10 * units, "atol": 1e-11 * units * max(float(expected.abs().max()), 1e-300)}


@pytest.mark.parametrize("kind", LOSSES)
@pytest.mark.parametrize("name", NAMES)
def test_both_sides_against_the_dense_matrix(name, kind):
    G, expected = problem(name, kind)
    close = close_to(expected)
    V = torch.randn(len(expected), 3, generator=seeded(), dtype=D)
    torch.testing.assert_close(G @ V, expected @ V, **close)
    torch.testing.assert_close(G @ V[:, 0], expected @ V[:, 0], **close)
    torch.testing.assert_close(G.to_dense(), expected, **close)
    torch.testing.assert_close(G.diagonal(), expected.diagonal(), **close)
    A = G.function_space
    dense = A.to_dense()
    torch.testing.assert_close(A.diagonal(), dense.diagonal(), **close)
    torch.testing.assert_close(A @ torch.eye(len(dense), dtype=D), dense, **close)
    torch.testing.assert_close(dense, dense.mT, **close)
    count = min(len(dense), len(expected))
    sides = [torch.linalg.eigvalsh(side).flip(0)[:count] for side in (dense, expected)]
    torch.testing.assert_close(*sides, **close)


@pytest.mark.parametrize("kind", ["cross_entropy", "mse", "huber", "empirical", "empirical mse"])
def test_means_are_those_of_torch(kind):
    G, expected = problem("mlp", kind, reduction="mean")
    torch.testing.assert_close(G.to_dense(), expected, **close_to(expected))


@pytest.mark.parametrize("kind", LOSSES)
@pytest.mark.parametrize("name", ["mlp", "tokens"])
def test_single_precision(name, kind):
    G, expected = problem(name, kind, torch.float32)
    assert G.dtype == torch.float32
    for found in (G.to_dense(), G @ torch.eye(len(expected))):
        torch.testing.assert_close(
            found.double(), expected, rtol=1e-5, atol=3e-6 * float(expected.abs().max())
        )
    exact = float(torch.linalg.eigvalsh(expected).clamp(min=0).add(0.3).log().sum())
    assert float(ntkops.logdet(G, 0.3)) == pytest.approx(exact, rel=1e-4, abs=1e-3)
    trace = G.function_space.diagonal().double().sum()
    torch.testing.assert_close(trace, expected.trace(), rtol=1e-5, atol=0.0)


@pytest.mark.parametrize("kind", LOSSES)
@pytest.mark.parametrize("name", ["mlp", "small"])
def test_nothing_is_densified(name, kind):
    G, expected = problem(name, kind, max_dense_bytes=0)
    for side in (G, G.function_space):
        with pytest.raises(DenseMemoryError):
            side.to_dense()
    v = torch.ones(len(expected), dtype=D)
    torch.testing.assert_close(G @ v, expected @ v, **close_to(expected))
    torch.testing.assert_close(G.function_space.trace(), expected.trace(), **close_to(expected))
    torch.testing.assert_close(G.trace(), expected.trace(), **close_to(expected))
    solved = G.add_jitter(0.5).solve(v)
    rest = expected @ solved + 0.5 * solved - v
    assert float(rest.norm()) <= 1e-6 * float(v.norm())


@pytest.mark.parametrize("kind", LOSSES)
@pytest.mark.parametrize("name", ["mlp", "small", "tokens"])
def test_estimators(name, kind):
    G, expected = problem(name, kind)
    values = torch.linalg.eigvalsh(expected)
    for side in (G, G.function_space):
        assert float(ntkops.trace(side)) == pytest.approx(float(values.sum()), rel=1e-10)
        assert float(ntkops.frobenius_norm(side)) == pytest.approx(float(values.norm()), rel=1e-10)
        rank = float(values.sum()) ** 2 / float(values.square().sum())
        assert float(ntkops.effective_rank(side)) == pytest.approx(rank, rel=1e-10)
        pairs = ntkops.eigsh(side, 2)
        torch.testing.assert_close(pairs.values, values.flip(0)[:2], rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(ntkops.diagonal(G).value, expected.diagonal(), **close_to(expected))


@pytest.mark.parametrize(
    "name, kind, ridge", pairs(["mlp", "small", "convolution"], LOSSES, [1e-8, 0.3, 1e5]), ids=str
)
def test_log_determinants_by_the_smaller_side(name, kind, ridge):
    G, expected = problem(name, kind)
    A = G.function_space
    p, r = G.shape[0], A.shape[0]
    exact = float(torch.linalg.eigvalsh(expected).clamp(min=0).add(ridge).log().sum())
    # In a determinant the zero eigenvalues are as uncertain as the largest times its rounding.
    slack = (p + r) * 1e-14 * float(expected.trace()) / ridge
    for found in (ntkops.logdet(G, ridge), ntkops.logdet(G.add_jitter(ridge / 2), ridge / 2)):
        assert found.exact and float(found) == pytest.approx(exact, rel=1e-9, abs=1e-9 + slack)
    other = float(ntkops.logdet(A, ridge)) + (p - r) * math.log(ridge)
    assert other == pytest.approx(exact, rel=1e-9, abs=1e-9 + slack)
    doubled = float(ntkops.logdet(2 * G, 2 * ridge)) - p * math.log(2)
    assert doubled == pytest.approx(exact, rel=1e-9, abs=1e-9 + slack)
    dimension = float((torch.linalg.eigvalsh(expected) / (torch.linalg.eigvalsh(expected) + ridge)).sum())
    found = ntkops.effective_dimension(G, ridge)
    assert float(found) == pytest.approx(dimension, rel=1e-8, abs=1e-9 + slack)


def test_the_smaller_side_is_the_one_that_is_made():
    """A limit of bytes that the larger side exceeds decides nothing."""
    for name, smaller in (("mlp", 15), ("small", 9)):
        model, x, _ = network(name)
        G = ntkops.ggn(model, x, max_dense_bytes=8 * smaller**2)
        assert min(G.shape[0], G.function_space.shape[0]) == smaller
        with pytest.raises(DenseMemoryError):
            (G if G.shape[0] > smaller else G.function_space).to_dense()
        expected = reference.dense_ggn(model, x, reference.cross_entropy(torch.zeros(len(x)).long()))
        exact = torch.linalg.eigvalsh(expected).clamp(min=0).add(0.1).log().sum()
        for side, more in ((G, 0), (G.function_space, len(expected) - G.function_space.shape[0])):
            found = ntkops.logdet(side, 0.1)
            assert found.exact and float(found) + more * math.log(0.1) == pytest.approx(
                float(exact), rel=1e-9
            )


def test_passes_are_those_of_per_sample_gradients():
    model, _, _ = network("mlp")
    x = torch.randn(150, 3, generator=seeded(), dtype=D)
    for samples in (x, ntkops.Batches(x, 40)):
        for kind in ("cross_entropy", "mse"):
            G = ntkops.ggn(model, samples, kind, max_dense_bytes=0)
            for side in (G, G.function_space):
                found = ntkops.trace(side)
                assert found.exact and found.passes == 3  # one an output
            dense = ntkops.ggn(model, samples, kind)
            assert ntkops.frobenius_norm(dense).passes <= 6
            assert ntkops.logdet(dense, 0.1).passes <= 6


def test_determinants_are_exact_where_quadrature_is_expensive():
    """At n = 120 and a tolerance of 1e-3 quadrature takes thousands of products."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 40), nn.Tanh(), nn.Linear(40, 3)).double()
    x = torch.randn(40, 3, generator=seeded(), dtype=D)
    expected = reference.dense_ggn(model, x, reference.cross_entropy(torch.zeros(40).long()))
    found = ntkops.logdet(ntkops.ggn(model, x), 0.01, rtol=1e-3)
    exact = torch.logdet(expected + 0.01 * torch.eye(len(expected), dtype=D))
    assert found.exact and found.passes <= 6 and float(found) == pytest.approx(float(exact), rel=1e-9)


def test_kernels_of_more_outputs_than_parameters_have_a_smaller_side_too():
    model, x, _ = network("small")
    K = ntkops.ntk(model, x, max_dense_bytes=8 * 9**2)
    dense = reference.dense_jacobian(model, x)[1].flatten(0, 1)
    exact = torch.logdet(dense @ dense.T + 0.2 * torch.eye(21, dtype=D))
    found = ntkops.logdet(K, 0.2)
    assert found.exact and float(found) == pytest.approx(float(exact), rel=1e-10)


@pytest.mark.parametrize("name", ["mlp", "small"])
def test_log_determinants_by_quadrature_cover(name):
    G, expected = problem(name, "cross_entropy", max_dense_bytes=0)
    exact = float(torch.linalg.eigvalsh(expected).clamp(min=0).add(0.3).log().sum())
    found = ntkops.logdet(G, 0.3, rtol=0.02, atol=0.3, generator=seeded())
    assert not found.exact and found.interval[0] <= exact <= found.interval[1]


@pytest.mark.parametrize("name", ["mlp", "small", "convolution"])
def test_priors_by_sandwich(name):
    """log|I + D^{1/2} G D^{1/2}| for a diagonal D, and for one of blocks."""
    G, expected = problem(name, "cross_entropy")
    p = len(expected)
    deviations = torch.rand(p, generator=seeded(), dtype=D) + 0.2
    G_diagonal = ntkops.sandwich(DiagLinearOperator(deviations), G)
    exact = torch.logdet(torch.eye(p, dtype=D) + deviations[:, None] * expected * deviations)
    assert float(ntkops.logdet(G_diagonal, 1.0)) == pytest.approx(float(exact), rel=1e-9)
    torch.testing.assert_close(G_diagonal.to_dense(), deviations[:, None] * expected * deviations)
    torch.testing.assert_close(G_diagonal.diagonal(), deviations**2 * expected.diagonal())

    size = next(size for size in (2, 3) if p % size == 0)
    blocks = torch.randn(p // size, size, size, generator=seeded(), dtype=D)
    G_blocks = ntkops.sandwich(BlockDiagLinearOperator(blocks), G)
    dense = torch.block_diag(*blocks)
    exact = torch.logdet(torch.eye(p, dtype=D) + dense @ expected @ dense.T)
    assert float(ntkops.logdet(G_blocks, 1.0)) == pytest.approx(float(exact), rel=1e-9)
    torch.testing.assert_close(G_blocks.to_dense(), dense @ expected @ dense.T)


def test_every_way_to_the_data_gives_the_same_matrix():
    model, x, y = network("mlp")
    expected = reference.dense_ggn(model, x, reference.cross_entropy(y))
    batches = [x[:2], x[2:4], x[4:]]
    for samples, options in (
        (x, {"engine": "autograd"}),
        (x, {"engine": "layerwise"}),
        (x, {"batch_size": 2, "chunk_size": 3}),
        (batches, {}),
        (ntkops.Batches(x, 2), {}),
    ):
        G = ntkops.ggn(model, samples, targets=y, **options)
        for found in (G.to_dense(), G @ torch.eye(len(expected), dtype=D)):
            torch.testing.assert_close(found, expected, **close_to(expected))
        assert float(ntkops.trace(G.function_space)) == pytest.approx(float(expected.trace()), rel=1e-11)
        assert float(ntkops.logdet(G, 1.0)) == pytest.approx(
            float(torch.logdet(expected + torch.eye(len(expected), dtype=D))), rel=1e-10
        )


def test_parameters_and_states_are_chosen_as_for_a_jacobian():
    model, x, y = network("mlp")
    expected = reference.dense_ggn(model, x, reference.cross_entropy(y))
    head = ntkops.ggn(model, x, params="2.*")
    torch.testing.assert_close(head.to_dense(), expected[20:, 20:], **close_to(expected))
    linearized = ntkops.linearize(model)
    torch.testing.assert_close(ntkops.ggn(linearized, x).to_dense(), expected, **close_to(expected))
    hidden = ntkops.ggn(model, x, "mse", output="1")
    _, J = reference.dense_jacobian(model[:2], x)
    torch.testing.assert_close(
        hidden.to_dense()[:20, :20], 2 * J.flatten(0, 1).T @ J.flatten(0, 1), **close_to(J)
    )
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    function = ntkops.ggn(lambda p, z: torch.func.functional_call(model, p, (z,)), x, params=parameters)
    torch.testing.assert_close(function.to_dense(), expected, **close_to(expected))


def test_classes_on_another_axis():
    model, x, y = network("pixels")
    expected = reference.dense_ggn(model, x, lambda f: F.cross_entropy(f, y, reduction="sum"))
    named = {"axes": ("class", "height", "width")}
    moved = {"output": lambda out: out.movedim(1, -1)}
    gradients = reference.empirical(
        model,
        x,
        lambda f: [F.cross_entropy(g[None], c[None], reduction="sum") for g, c in zip(f, y, strict=True)],
    )
    shares = F.one_hot(y, 3).movedim(-1, 1).double()
    for options in (named, moved):
        G = ntkops.ggn(model, x, **options)
        torch.testing.assert_close(G.to_dense(), expected, **close_to(expected))
        torch.testing.assert_close(G @ torch.eye(len(expected), dtype=D), expected, **close_to(expected))
        assert float(G.function_space.trace()) == pytest.approx(float(expected.trace()), rel=1e-11)
        for targets in (y, shares if options is named else shares.movedim(1, -1)):
            found = ntkops.ggn(model, x, "cross_entropy", targets, "empirical", **options)
            torch.testing.assert_close(found.to_dense(), gradients, **close_to(gradients))
    with pytest.raises(ShapeError, match="last"):
        ntkops.ggn(model, x, targets=y)


def test_positions_that_count_for_nothing():
    model, x, y = network("tokens")
    y[0, 1:], y[2] = -100, -100
    for reduction in ("sum", "mean"):
        expected = reference.dense_ggn(model, x, reference.cross_entropy(y, reduction))
        G = ntkops.ggn(model, x, targets=y, reduction=reduction)
        torch.testing.assert_close(G.to_dense(), expected, **close_to(expected))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("gap", [10.0, 50.0, 1e4])
def test_saturated_logits(dtype, gap):
    """All products and determinants are finite and right where probabilities are 0 and 1."""
    model = nn.Linear(2, 3, bias=False).to(dtype)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[gap, 0.0], [0.0, gap], [0.0, 0.0]]))
    x = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.5, -1.0], [1.0, 1.0]], dtype=dtype)
    p = (x.double() @ model.weight.detach().double().T).softmax(-1)
    H = torch.block_diag(*(torch.diag(q) - torch.outer(q, q) for q in p))
    J = torch.kron(torch.eye(3, dtype=D), x.double()).reshape(3, 4, 6).movedim(1, 0).reshape(12, 6)
    G = ntkops.ggn(model, x)
    tolerance = {"rtol": 1e-5, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 1e-10, "atol": 1e-14}
    torch.testing.assert_close(G.to_dense().double(), J.T @ H @ J, **tolerance)
    assert bool(G.function_space.to_dense().isfinite().all())
    exact = torch.logdet(J.T @ H @ J + 1e-3 * torch.eye(6, dtype=D))
    assert float(ntkops.logdet(G, 1e-3)) == pytest.approx(float(exact), rel=1e-4 if dtype != D else 1e-9)


@pytest.mark.parametrize("kind", ["cross_entropy", "mse", "huber", "empirical"])
def test_tiles_of_any_size_slices_and_pickles(kind):
    G, expected = problem("mlp", kind)
    J, S = G.jacobian, G.hessian_factor
    A, Jd, Sd, weights = G.function_space, J.to_dense(), S.to_dense(), torch.arange(-3.0, 35.0).double()
    dense, crossed = Sd.T @ Jd @ Jd.T @ Sd, J[:6] @ J.mT
    once, onced = crossed @ S, crossed.to_dense() @ Sd
    other = ntkops.ggn(point("mlp", D), network("mlp")[1][:2]).hessian_factor  # of other samples
    made = [
        (G, expected),
        (A, dense),
        (once, onced),
        (once.mT, onced.T),
        (ntkops.sandwich(other.mT, crossed, S.mT), other.to_dense().T @ onced),
        (ntkops.sandwich(S.mT, J @ DiagLinearOperator(weights) @ J.mT), Sd.T @ Jd * weights @ Jd.T @ Sd),
        (Sandwich(S.mT, S), Sd.T @ Sd),
    ]
    if kind == "mse":  # of J alone, whatever the loss
        rows = weights[:15]
        made += [(J.mT @ J, Jd.T @ Jd), (J.mT @ DiagLinearOperator(rows) @ J, Jd.T * rows @ Jd)]
    for number, (operator, matrix) in enumerate(made):
        close, known = close_to(matrix), capabilities(operator)
        triangle, square = [(None, 4), (6, None)][number % 2]
        torch.testing.assert_close(dense_from_tiles(known, triangle), matrix, **close)
        torch.testing.assert_close(from_all_tiles(operator, square), matrix, **close)
        if matrix.shape[0] == matrix.shape[1]:
            torch.testing.assert_close(known.diagonal(), matrix.diagonal(), **close)
    close = close_to(expected)
    torch.testing.assert_close(G[3:9, 1:4].to_dense(), expected[3:9, 1:4], **close)
    torch.testing.assert_close(G[[2, 5], [2, 7]], expected[[2, 5], [2, 7]], **close)
    torch.testing.assert_close(A[1:4, 0:3].to_dense(), dense[1:4, 0:3], **close)
    again = pickle.loads(pickle.dumps(G))
    assert repr(again) == repr(G) and type(again) is type(G) and type(G.mT) is type(G)
    torch.testing.assert_close(again.to_dense(), G.to_dense(), rtol=0, atol=0)
    assert type(G.float()) is type(G) and isinstance(G.add_jitter(0.1), RidgeOperator)
    torch.testing.assert_close(G.float().to_dense().double(), expected, rtol=1e-5, atol=1e-5)


def test_what_it_is_is_said():
    model, x, y = network("mlp")
    assert repr(ntkops.ggn(model, x)).startswith("GGNOperator(GGN, 38x38, function space 15x15")
    assert "type-2 Fisher" in repr(ntkops.ggn(model, x, fisher="type2"))
    found = ntkops.ggn(model, x, targets=y, fisher="empirical")
    assert found.kind == "empirical Fisher" and found.function_space.shape == (5, 5)


@pytest.mark.parametrize("kind", LOSSES)
def test_duality_is_checked(kind):
    G, _ = problem("mlp", kind)
    report = ntkops.check_operator(G, generator=seeded())
    report.raise_if_failed()
    assert report["duality"].passed and report["traces of both sides"].passed and report["symmetry"].passed
    # J of other samples on the right
    model, x, y = network("mlp")
    other = ntkops.ggn(model, x.flip(1), "cross_entropy")
    mixed = type(other)(ntkops.ggn(model, x).left_linear_op, other.right_linear_op)
    assert not ntkops.check_operator(mixed, generator=seeded()).passed


def test_copies_say_what_they_are_too():
    model, x, y = network("small", D)
    E = ntkops.ggn(model, x, targets=y, fisher="empirical")
    copies = E.clone(), E.detach(), E.to(torch.float32), E.mT
    assert {copy.kind for copy in copies} == {"empirical Fisher"}


def test_the_model_is_left_as_it_was():
    model, x, y = network("mlp")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    ntkops.logdet(ntkops.ggn(model, x, targets=y, fisher="empirical"), 0.1)
    assert torch.equal(state, torch.get_rng_state()) and all(p.grad is None for p in model.parameters())
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in before.items())


@pytest.mark.parametrize(
    "kind, fisher, reduction", pairs(["cross_entropy", "mse"], [None, "empirical"], ["sum", "mean"])
)
@pytest.mark.filterwarnings("ignore")
def test_curvlinops(kind, fisher, reduction):
    curvlinops = pytest.importorskip("curvlinops")
    model, x, y = network("mlp")
    loss, targets = (
        (nn.CrossEntropyLoss, y) if kind == "cross_entropy" else (nn.MSELoss, model(x).detach() + 1)
    )
    kinds = {None: curvlinops.GGNLinearOperator, "empirical": curvlinops.EFLinearOperator}
    theirs = kinds[fisher](
        model, loss(reduction=reduction), list(model.parameters()), [(x, targets)], check_deterministic=False
    )
    expected = (theirs @ torch.eye(38, dtype=D)).detach()
    found = ntkops.ggn(model, x, kind, targets, fisher, reduction=reduction)
    torch.testing.assert_close(found.to_dense(), expected, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("kind", LOSSES)
def test_autocast_takes_no_digits(kind):
    G, _ = problem("mlp", kind, torch.float32)
    A, v = G.function_space, torch.ones(G.shape[0], 2)
    quantities = G.to_dense, G.diagonal, A.to_dense, A.diagonal, lambda: G @ v
    expected = [quantity() for quantity in quantities]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = [quantity() for quantity in quantities]
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("kind", ["cross_entropy", "huber", "empirical"])
def test_slices_of_many_samples_take_what_they_need(kind, monkeypatch):
    monkeypatch.setattr("ntkops.operators.product_tiles.TILE", 7)
    G, _ = problem("mlp", kind)
    A, S = G.function_space, G.hessian_factor
    dense, factor = A.to_dense(), S.to_dense()
    for rows in (slice(1, 5), torch.tensor([4, 0, 3])):
        torch.testing.assert_close(A[rows].to_dense(), dense[rows])
        torch.testing.assert_close(A[:, rows].to_dense(), dense[:, rows])
        torch.testing.assert_close(S[rows].to_dense(), factor[rows])
        torch.testing.assert_close(S[rows][:, rows].to_dense(), factor[rows][:, rows])
    large = hessian_factor(torch.zeros(200_000, 3), "cross_entropy")  # 1.3 TiB if it were dense
    assert large[:2, :4].to_dense().shape == (2, 4)


@pytest.mark.parametrize("kind", ["cross_entropy", "mse", "huber"])
def test_lists_have_all_digits(kind):
    model, x, _ = network("mlp")
    targets = (model(x).detach() + 1 / 3).softmax(-1)
    loss = reference.huber if kind == "huber" else kind
    found, expected = (
        ntkops.ggn(model, x, loss, given, "empirical").to_dense() for given in (targets.tolist(), targets)
    )
    assert torch.equal(found, expected)


MODEL, X, Y = network("mlp")
F3 = torch.zeros(5, 3, dtype=D)


@pytest.mark.parametrize(
    ("arguments", "error", "says"),
    [
        ({"loss": "hinge"}, InputError, "'mse', 'cross_entropy'"),
        ({"loss": reference.huber}, InputError, "targets="),
        ({"fisher": "empirical"}, InputError, "targets="),
        ({"fisher": "monte carlo"}, InputError, "'type2' or 'empirical'"),
        ({"fisher": "type2", "loss": reference.huber, "targets": F3}, InputError, "exponential family"),
        ({"reduction": "none"}, InputError, "'sum' or 'mean'"),
        ({"targets": Y[:4]}, ShapeError, "5 samples"),
        ({"targets": Y.to(torch.complex64)}, DtypeError, "real numbers"),
        ({"loss": "mse", "targets": F3[:, :2]}, ShapeError, "targets"),
        ({"loss": lambda f, y: -(f**2).sum(), "targets": F3}, InputError, "sample 0.*eigenvalue -2"),
        ({"loss": lambda f, y: f.sqrt().sum(), "targets": F3}, NonFiniteError, "sample"),
        ({"axes": ("class", "pixel")}, ShapeError, "axes"),
        ({"model": nn.Linear(3, 1).double()}, InputError, "binary_cross_entropy_with_logits"),
    ],
)
def test_what_is_refused(arguments, error, says):
    with pytest.raises(error, match=says):
        ntkops.ggn(**{"model": MODEL, "x": X, **arguments})


def test_one_logit_by_a_loss_of_its_own():
    model, x, y = nn.Linear(3, 1).double(), X, (Y > 0).double()
    G = ntkops.ggn(model, x, lambda f, t: F.binary_cross_entropy_with_logits(f.squeeze(), t), y)
    expected = reference.dense_ggn(
        model, x, lambda f: F.binary_cross_entropy_with_logits(f.squeeze(-1), y, reduction="sum")
    )
    torch.testing.assert_close(G.to_dense(), expected, **close_to(expected))
