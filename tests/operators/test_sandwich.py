"""Products of operators: right, symmetric where they are, with our solver and their factors."""

import functools
import pickle

import pytest
import torch
from linear_operator import settings
from linear_operator.operators import (
    BlockDiagLinearOperator,
    DenseLinearOperator,
    DiagLinearOperator,
    MatmulLinearOperator,
    RootLinearOperator,
)
from torch import nn

import ntkops
from ntkops import errors
from ntkops.operators import RidgeOperator, Sandwich
from ntkops.operators.capabilities import capabilities, dense_from_tiles
from ntkops.regression import KernelRidge
from tests.cases import from_all_tiles

D = torch.float64


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=D)


@functools.cache
def point(count, width):
    """Return a network, its linearisation, samples, and the dense Jacobian, once for all tests."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, width), nn.Tanh(), nn.Linear(width, 3)).double()
    x = draw(count, 4, seed=1)
    params = {name: p.detach() for name, p in model.named_parameters()}
    blocks = torch.func.jacrev(lambda p: torch.func.functional_call(model, p, (x,)))(params)
    dense = torch.cat([b.flatten(2) for b in blocks.values()], dim=2).flatten(0, 1)
    return model, ntkops.linearize(model), x, dense


def build(count, *, width=6, limit="auto", differentiable=False):
    """Return J over three outputs of a network, its dense reference, and the network."""
    model, shared, x, dense = point(count, width)
    J = ntkops.jacobian(
        model if differentiable else shared, x, max_dense_bytes=limit, differentiable=differentiable
    )
    return J, dense, model


def compositions(J, Jd):
    """Every way to compose, with its dense matrix, and whether it is A M Aᵀ with a known root."""
    n, p = Jd.shape
    K, Kd = J @ J.mT, Jd @ Jd.mT
    w, v, S, m = draw(p).abs() + 0.1, draw(n, seed=2), draw(n, 7, seed=3), draw(p, p, seed=4)
    M, some = m @ m.mT / p, torch.arange(0, p, 2)
    diag, dense = DiagLinearOperator, DenseLinearOperator
    spread = torch.linspace(-1, 1, p, dtype=D)
    return {
        "columns": (J[:, some] @ J[:, some].mT, Jd[:, some] @ Jd[:, some].mT, True),
        "metric": (J @ diag(w) @ J.mT, Jd * w @ Jd.mT, True),
        "metric right": (J @ (diag(w) @ J.mT), Jd * w @ Jd.mT, True),
        "two metrics": ((J @ diag(w)) @ (diag(w) @ J.mT), Jd * w**2 @ Jd.mT, True),
        "dense metric": (J @ dense(M) @ J.mT, Jd @ M @ Jd.mT, False),
        "indefinite": (J @ diag(spread) @ J.mT, Jd * spread @ Jd.mT, False),
        "weights": (diag(v) @ K @ diag(v), v[:, None] * Kd * v, True),
        "labels": (dense(S).mT @ K @ dense(S), S.mT @ Kd @ S, True),
        "nested": (dense(S).mT @ diag(v) @ K @ diag(v) @ dense(S), S.mT @ (v[:, None] * Kd * v) @ S, True),
        "power": (K @ K, Kd @ Kd, True),
        "one sided": (diag(v) @ K, v[:, None] * Kd, None),
        "three kernels": (K @ diag(v) @ K @ K, Kd * v @ Kd @ Kd, None),
        "projected columns": (J @ dense(draw(p, 5)), Jd @ draw(p, 5), None),
        "sandwich": (ntkops.sandwich(J, w), Jd * w @ Jd.mT, True),
        "sandwich of a kernel": (ntkops.sandwich(S.mT, K), S.mT @ Kd @ S, True),
        "sandwich with B": (ntkops.sandwich(S.mT, K, draw(9, n)), S.mT @ Kd @ draw(9, n).mT, None),
        "stock product": (MatmulLinearOperator(MatmulLinearOperator(J, diag(w)), J.mT), Jd * w @ Jd.mT, True),
    }


@functools.cache
def five(limit):
    """Return every composition over five samples, once for all tests."""
    return compositions(*build(5, limit=limit)[:2])


@pytest.mark.parametrize("limit", ["auto", 0])
@pytest.mark.parametrize("name", five("auto"))
def test_against_the_dense_matrix(name, limit):
    A, dense, rooted = five(limit)[name]
    close = {"rtol": 1e-10, "atol": 1e-10 * float(dense.abs().max())}
    assert isinstance(A, Sandwich) == (name != "stock product")
    V = draw(dense.shape[1], 3, seed=8)
    torch.testing.assert_close(A @ V, dense @ V, **close)
    torch.testing.assert_close(A.mT @ draw(len(dense), 2), dense.mT @ draw(len(dense), 2), **close)
    known = capabilities(A)
    torch.testing.assert_close(dense_from_tiles(known, 4), dense, **close)
    torch.testing.assert_close(from_all_tiles(A), dense, **close)
    assert known.symmetric == (rooted is not None)
    if rooted is not None:
        torch.testing.assert_close(dense, dense.mT, **close)
        torch.testing.assert_close(known.diagonal(), dense.diagonal(), **close)
    if rooted is False:
        assert known.factors() is None
    else:
        left, right = (dense_from_tiles(factor) for factor in known.factors())
        torch.testing.assert_close(left @ right.mT, dense, **close)
        assert not rooted or torch.equal(left, right)
    if name != "stock product":
        rows, cols = torch.tensor([0, 3, 1]), torch.tensor([2, 0, 1])
        torch.testing.assert_close(A[rows, cols], dense[rows, cols], **close)
        torch.testing.assert_close(A[1:4, [0, 2]] @ torch.eye(2, dtype=D), dense[1:4, [0, 2]], **close)
        assert isinstance(A[1:4, [0, 2]], Sandwich) and isinstance(pickle.loads(pickle.dumps(A)), Sandwich)
        if limit == 0:
            with pytest.raises(errors.DenseMemoryError, match="one of its factors"):
                A.to_dense()
        else:
            torch.testing.assert_close(A.to_dense(), dense, **close)


@pytest.fixture(scope="module")
def large():
    J, Jd, _ = build(20)
    n = len(Jd)
    S = DenseLinearOperator(draw(n, n, seed=3) / n**0.5)
    v, w = draw(n, seed=2).abs() + 0.5, draw(Jd.shape[1]).abs()
    K, Kd, diag = J @ J.mT, Jd @ Jd.mT, DiagLinearOperator
    return {
        "weights": (diag(v) @ K @ diag(v), v[:, None] * Kd * v),
        "labels": (S.mT @ K @ S, S.tensor.mT @ Kd @ S.tensor),
        "metric": (J @ diag(w) @ J.mT, Jd * w @ Jd.mT),
        "columns": (J[:, ::2] @ J[:, ::2].mT, Jd[:, ::2] @ Jd[:, ::2].mT),
        "root": (RootLinearOperator(J), Kd),
        "diagonal first": (diag(v) + K, Kd + v.diag()),
        "dense first": (DenseLinearOperator(torch.eye(n, dtype=D)) + K, Kd + torch.eye(n, dtype=D)),
    }


@pytest.mark.parametrize(
    "name", ["weights", "labels", "metric", "columns", "root", "diagonal first", "dense first"]
)
def test_solves_above_the_rows_where_linear_operator_has_its_own_solver(large, name):
    A, dense = large[name]
    R, b = A.add_jitter(1e-2), draw(len(dense), 2, seed=9)
    full = dense + 1e-2 * torch.eye(len(dense), dtype=D)
    assert isinstance(R, RidgeOperator)
    with settings.max_cholesky_size(50):  # 800 by default
        assert float((full @ R.solve(b) - b).norm() / b.norm()) < 1e-8
        assert float(R.logdet()) == pytest.approx(float(torch.logdet(full)), rel=1e-8)
        x, info = R.with_solver(method="cg").solve_with_info(b)
    true = float((full @ x - b).norm(dim=0).max() / b.norm(dim=0).min())
    assert info.converged and true <= 2e-6


@pytest.mark.parametrize("name", ["metric", "weights"])
def test_no_kernel_is_made_dense_above_its_limit(name):
    A, dense, _ = compositions(*build(60, limit=0)[:2])[name]
    b = draw(len(dense), 1)
    x, info = A.add_jitter(0.1).solve_with_info(b)
    assert info.method == "conjugate gradient" and info.converged
    assert float((dense @ x + 0.1 * x - b).norm() / b.norm()) <= 2e-6


def test_a_solve_above_800_rows():
    J, Jd, _ = build(280)
    v, b = draw(len(Jd), seed=2).abs() + 0.5, draw(len(Jd), 2, seed=9)
    D1 = DiagLinearOperator(v)
    R = (D1 @ (J @ J.mT) @ D1).add_jitter(1e-2)
    full = v[:, None] * (Jd @ Jd.T) * v + 1e-2 * torch.eye(len(Jd), dtype=D)
    assert len(Jd) == 840 and isinstance(R, RidgeOperator)
    assert float((full @ R.solve(b) - b).norm() / b.norm()) < 1e-8
    assert float(R.logdet()) == pytest.approx(float(torch.logdet(full)), rel=1e-8)


@pytest.fixture(scope="module")
def thirty():
    return compositions(*build(30, width=4)[:2])


@pytest.mark.parametrize("method", ["auto", "cholesky", "eigh", "cg", "lsmr", "features"])
@pytest.mark.parametrize(
    "name", ["metric", "columns", "dense metric", "indefinite", "one sided", "three kernels"]
)
def test_regression_is_that_of_the_whole_product(thirty, name, method):
    A, dense, rooted = thirty[name]
    y = draw(len(dense), seed=5)
    if rooted is None:
        with pytest.raises(errors.InputError, match="not symmetric|knows its"):
            KernelRidge(1e-3, relative=False, method=method).fit(A, y)
        return
    if rooted is False and method in ("features", "lsmr"):
        with pytest.raises(errors.InputError, match="knows its"):
            KernelRidge(1e-3, relative=False, method=method).fit(A, y)
        return
    if name == "indefinite":
        with pytest.raises(errors.NtkopsError, match="not positive semidefinite"):
            KernelRidge(1e-3, relative=False, method=method).fit(A, y)
        return
    fitted = KernelRidge(1e-3, relative=False, method=method).fit(A, y)
    rest = dense @ fitted.dual_coef_ + 1e-3 * fitted.dual_coef_ - y
    assert float(rest.norm() / y.norm()) <= 2e-6 and fitted.solve_info_.converged
    expected = dense @ torch.linalg.solve(dense + 1e-3 * torch.eye(len(y), dtype=D), y)
    torch.testing.assert_close(fitted.predict(A), expected, rtol=1e-4, atol=1e-4)


def test_nearly_the_same_features_do_not_predict():
    """A cross kernel under the metric D has J D for its right factor, the fit under it J D^(1/2)."""
    J, Jd, _ = build(30, width=4)
    w = torch.full((Jd.shape[1],), 1.01, dtype=D)
    y = draw(len(Jd), seed=5)
    fitted = KernelRidge(1e-3, relative=False, method="features").fit(ntkops.sandwich(J, w), y)
    expected = (1.01 * Jd[:6] @ Jd.mT) @ fitted.dual_coef_
    torch.testing.assert_close(fitted.predict(ntkops.sandwich(J[:6], w, J)), expected, rtol=1e-6, atol=1e-8)


def test_derivatives_are_those_of_the_dense_product():
    J, _, model = build(4, differentiable=True)
    w = draw(J.shape[1]).abs().requires_grad_()
    v = draw(12, 2)

    def value(A):
        return (A @ v).pow(3).sum()

    found = torch.autograd.grad(value(ntkops.sandwich(J, w)), [w, *model.parameters()], allow_unused=True)
    x = draw(4, 4, seed=1)
    names = [name for name, _ in model.named_parameters()]

    def dense(*params):
        blocks = torch.func.jacrev(lambda p: torch.func.functional_call(model, p, (x,)).flatten())(
            dict(zip(names, params[1:], strict=True))
        )
        rows = torch.cat([b.flatten(1) for b in blocks.values()], dim=1)
        return value(rows * params[0] @ rows.mT)

    args = (w.detach(), *(p.detach() for p in model.parameters()))
    expected = torch.func.grad(dense, argnums=tuple(range(len(args))))(*args)
    for one, other in zip(found, expected, strict=True):
        one = torch.zeros_like(other) if one is None else one  # the kernel does not know the last bias
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-8)


def test_traces_of_known_factors_are_exact():
    J, Jd, _ = build(40)
    F, G = draw(120, 5), draw(120, 5, seed=1)
    for operator, dense, passes in (
        (RootLinearOperator(F), F @ F.mT, 0),
        (MatmulLinearOperator(F, G.mT), F @ G.mT, 0),
        (
            ntkops.sandwich(F, torch.linspace(-1, 1, 5, dtype=D), G),
            F * torch.linspace(-1, 1, 5, dtype=D) @ G.mT,
            0,
        ),
        (RootLinearOperator(J), Jd @ Jd.mT, 3),
        (MatmulLinearOperator(J, J.mT), Jd @ Jd.mT, 3),
        (J @ DiagLinearOperator(torch.linspace(-1, 1, Jd.shape[1], dtype=D)) @ J.mT, None, 3),
    ):
        found = ntkops.trace(operator)
        dense = Jd * torch.linspace(-1, 1, Jd.shape[1], dtype=D) @ Jd.mT if dense is None else dense
        assert found.method == "exact" and found.passes == passes, operator
        assert float(found) == pytest.approx(float(dense.trace()), rel=1e-12, abs=1e-10)


def test_products_count_what_they_cost():
    J = build(5)[0]
    assert capabilities(J @ DiagLinearOperator(torch.ones(J.shape[1], dtype=D)) @ J.mT).product_cost() == 2


def test_linear_operator_alone_is_left_alone():
    F = DenseLinearOperator(draw(4, 3))
    assert type(F @ F.mT) is MatmulLinearOperator
    assert not isinstance((F @ F.mT).add_jitter(1.0), RidgeOperator)
    assert type(
        BlockDiagLinearOperator(DenseLinearOperator(draw(2, 3, 3))) @ DenseLinearOperator(draw(6, 2))
    ) is (MatmulLinearOperator)


@pytest.mark.parametrize(
    ("args", "error", "text"),
    [
        ((draw(4, 3), draw(4)), errors.ShapeError, "do not meet"),
        ((draw(4, 3), draw(3).float()), errors.DtypeError, "cast one"),
        ((draw(4, 3), "M"), errors.InputError, "M: expected"),
        ((draw(4), draw(4)), errors.ShapeError, "A needs shape"),
        ((draw(4, 3), torch.arange(3)), errors.DtypeError, "M has dtype"),
        ((draw(4, 3), draw(3) * torch.nan), errors.NonFiniteError, "M holds"),
        ((draw(4, 3), draw(3, 3), draw(4, 2)), errors.ShapeError, "do not meet"),
    ],
)
def test_what_does_not_fit_is_named(args, error, text):
    with pytest.raises(error, match=text):
        ntkops.sandwich(*args)


def test_autocast_takes_no_digits():
    torch.manual_seed(0)
    K = ntkops.ntk(torch.nn.Linear(5, 3), torch.randn(6, 5))
    M, v = torch.randn(18, 18), torch.randn(18, 2)
    made = ntkops.sandwich(K.left, M), ntkops.sandwich(M, K), ntkops.projected_ntk(K, M[:4])
    quantities = [quantity for S in made for quantity in (S.to_dense, lambda S=S: S @ v)]
    expected = [quantity() for quantity in quantities]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = [quantity() for quantity in quantities]
    torch.testing.assert_close(found, expected)
