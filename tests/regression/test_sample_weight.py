"""Samples that count differently, against dense weighted systems and samples that are there twice."""

import numpy as np
import pytest
import torch
from linear_operator.operators import DenseLinearOperator, RootLinearOperator

import ntkops
from ntkops import errors, projected_ntk
from ntkops.regression import KernelRidge
from tests.regression.problems import gram, labels, network, reference_jacobian, samples

WEIGHTS = torch.tensor([0.2, 1.0, 3.0, 0.5, 1.0, 2.0, 0.1, 1.0, 1.5, 4.0, 1.0, 0.7]).double()
RIDGE = 1e-2


def reference(K, Y, weights, ridge=RIDGE):
    return torch.linalg.solve(K + torch.diag(ridge / weights), Y)


@pytest.mark.parametrize("method", ["cholesky", "eigh", "cg"])
@pytest.mark.parametrize("tail", [(), (2,)])
def test_one_kernel_for_all_targets(method, tail):
    K, Y, across = gram(20), labels(12, *tail), labels(5, 12)
    options = {"tol": 1e-13} if method == "cg" else {}
    fitted = KernelRidge(RIDGE, relative=False, method=method, **options).fit(K, Y, sample_weight=WEIGHTS)
    alpha = reference(K, Y.reshape(12, -1), WEIGHTS).reshape(Y.shape)
    torch.testing.assert_close(fitted.dual_coef_, alpha, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(
        fitted.predict(across), torch.tensordot(across, alpha, 1), rtol=1e-9, atol=1e-9
    )
    assert fitted.solve_info_.converged


def test_a_weight_of_two_is_the_sample_twice():
    K, Y = gram(20), labels(12)
    twice = torch.cat([torch.arange(12), torch.tensor([3, 5, 5])])
    weights = torch.ones(12)
    weights[3], weights[5] = 2, 3
    one = KernelRidge(RIDGE, relative=False).fit(K, Y, sample_weight=weights)
    many = KernelRidge(RIDGE, relative=False).fit(K[twice][:, twice], Y[twice])
    torch.testing.assert_close(one.predict(K), many.predict(K[:, twice]))
    same = KernelRidge(RIDGE).fit(K, Y, sample_weight=np.ones(12))
    torch.testing.assert_close(same.dual_coef_, KernelRidge(RIDGE).fit(K, Y).dual_coef_)


def test_a_kernel_for_each_class():
    K = torch.stack([gram(20, seed=c) for c in range(3)])
    Y, across = labels(12, 3), labels(3, 5, 12)
    fitted = KernelRidge(RIDGE).fit(K, Y, sample_weight=WEIGHTS)
    scale = float(K.diagonal(dim1=-2, dim2=-1).mean())
    assert fitted.scale_ == pytest.approx(scale)  # of K, whatever the weights
    alpha = torch.stack([reference(K[c], Y[:, c], WEIGHTS, RIDGE * scale) for c in range(3)], dim=1)
    torch.testing.assert_close(fitted.dual_coef_, alpha)
    torch.testing.assert_close(fitted.predict(across), torch.einsum("cmn,nc->mc", across, alpha))


@pytest.mark.parametrize("outputs", ["all", "each"])
@pytest.mark.parametrize("limit", [0, "auto"])
def test_a_network(outputs, limit):
    net, x, new = network(), samples(12), samples(4, seed=2)
    J, J_new, Y = reference_jacobian(net, x), reference_jacobian(net, new), labels(12, 3)
    start, start_new = net(x).detach(), net(new).detach()
    K = ntkops.ntk(net, x, outputs=outputs, max_dense_bytes=limit)
    fitted = KernelRidge(RIDGE, relative=False, offset="network", tol=1e-12).fit(K, Y, sample_weight=WEIGHTS)
    rest = Y - start
    if outputs == "all":
        rows = J.flatten(0, 1)
        alpha = reference(rows @ rows.mT, rest.flatten(), WEIGHTS.repeat_interleave(3))
        change = rows.mT @ alpha
        expected = start_new + J_new @ change
    else:
        alpha = [reference(J[:, c] @ J[:, c].mT, rest[:, c], WEIGHTS) for c in range(3)]
        change = torch.stack([J[:, c].mT @ a for c, a in enumerate(alpha)])
        expected = start_new + torch.einsum("mcp,cp->mc", J_new, change)
    torch.testing.assert_close(fitted.predict(K.cross(new)), expected, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(fitted.predictor()(new), expected, rtol=1e-8, atol=1e-8)
    lead = 0 if outputs == "all" else 1
    found = torch.cat([w.flatten(lead) for w in fitted.weights().values()], dim=-1)
    torch.testing.assert_close(found, change, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("projected", [False, True])
def test_features(projected):
    net, x, new, Y = network(outputs=1), samples(12), samples(4, seed=2), labels(12)
    rows, fresh = reference_jacobian(net, x)[:, 0], reference_jacobian(net, new)[:, 0]
    if projected:
        projection = ntkops.projections.SJLT(rows.shape[1], 5, seed=0)
        rows, fresh = projection.apply(rows), projection.apply(fresh)
        K = projected_ntk(ntkops.ntk(net, x, outputs=0), projection)
        cross = K.cross(new)
    else:
        rows, fresh = rows[:, :5], fresh[:, :5]
        K, cross = RootLinearOperator(DenseLinearOperator(rows)), fresh @ rows.mT
    fitted = KernelRidge(RIDGE, relative=False, method="features").fit(K, Y, sample_weight=WEIGHTS)
    weights = torch.linalg.solve(
        rows.mT @ (WEIGHTS[:, None] * rows) + RIDGE * torch.eye(5).double(), rows.mT @ (WEIGHTS * Y)
    )
    torch.testing.assert_close(fitted.predict(cross), fresh @ weights)
    if projected:
        torch.testing.assert_close(fitted.predictor()(new), fresh @ weights)


def test_coefficients_on_some_samples():
    K, Y, across, chosen = gram(20), labels(12), labels(5, 12), torch.tensor([0, 4, 9])
    fitted = KernelRidge(RIDGE, relative=False, inducing=chosen).fit(K, Y, sample_weight=WEIGHTS)
    some, square = K[:, chosen], K[chosen][:, chosen]
    beta = torch.linalg.solve(some.mT @ (WEIGHTS[:, None] * some) + RIDGE * square, some.mT @ (WEIGHTS * Y))
    torch.testing.assert_close(fitted.predict(across), across[:, chosen] @ beta)


def test_leaving_out_and_variance():
    K, Y, across = gram(20), labels(12, 2), labels(5, 12) @ gram(20)
    fitted = KernelRidge(RIDGE, relative=False).fit(K, Y, sample_weight=WEIGHTS)
    one, groups = fitted.leave_one_out(), [[0, 3], [5, 6, 9]]
    for i in range(12):
        rest = [j for j in range(12) if j != i]
        alpha = reference(K[rest][:, rest], Y[rest], WEIGHTS[rest])
        torch.testing.assert_close(one.residuals[i], Y[i] - K[i, rest] @ alpha)
    left = fitted.leave_out(groups)
    for number, group in enumerate(groups):
        rest = [j for j in range(12) if j not in group]
        alpha = reference(K[rest][:, rest], Y[rest], WEIGHTS[rest])
        torch.testing.assert_close(left.dual_coef[number, rest], alpha)
        torch.testing.assert_close(left.residuals[number], Y[group] - K[group][:, rest] @ alpha)
        torch.testing.assert_close(left.predict(across)[number], across[:, rest] @ alpha)
    prior = (across @ torch.linalg.solve(K, across.mT)).diagonal() + 1
    explained = (across @ reference(K, across.mT, WEIGHTS)).diagonal()
    torch.testing.assert_close(fitted.variance(across, prior), prior - explained)


def test_a_ridge_is_chosen_by_the_weighted_error():
    K, Y, ridges = gram(20), labels(12), [1e-3, 1e-2, 1e-1, 1.0, 10.0]
    fitted = KernelRidge(ridges, relative=False).fit(K, Y, sample_weight=WEIGHTS)
    errors_of = []
    for ridge in ridges:
        off = KernelRidge(ridge, relative=False).fit(K, Y, sample_weight=WEIGHTS).leave_one_out().residuals
        errors_of.append(float((WEIGHTS * off.square()).mean()))
    torch.testing.assert_close(fitted.ridge_path_.errors, torch.tensor(errors_of).double())
    assert fitted.ridge_ == ridges[int(np.argmin(errors_of))]


def test_float32():
    K, Y, across = gram(20), labels(12), labels(5, 12)
    fitted = KernelRidge(1e-1, relative=False).fit(K.float(), Y.float(), sample_weight=WEIGHTS)
    expected = across @ reference(K, Y, WEIGHTS, 1e-1)
    found = fitted.predict(across.float())
    assert found.dtype == torch.float32 and (found - expected).norm() < 1e-5 * expected.norm()


@pytest.mark.parametrize(
    "weights, error, match",
    [
        (torch.ones(11), errors.ShapeError, r"\(12,\)"),
        (torch.ones(12, 1), errors.ShapeError, r"\(12,\)"),
        (torch.zeros(12), errors.InputError, "sample 0"),
        (-WEIGHTS, errors.InputError, "leave"),
        (torch.full((12,), torch.nan), errors.NonFiniteError, "NaN"),
        (WEIGHTS.to(torch.complex128), errors.DtypeError, "real"),
        ("balanced", errors.InputError, "sample_weight"),
        ([1.0] * 11 + ["a"], errors.DtypeError, "sample_weight"),
    ],
)
def test_bad_weights(weights, error, match):
    with pytest.raises(error, match=match):
        KernelRidge(RIDGE).fit(gram(20), labels(12), sample_weight=weights)


@pytest.mark.parametrize("weight", [1e-60, 1e60])
def test_weights_beyond_the_dtype_of_the_kernel(weight):
    weights = torch.ones(12, dtype=torch.float64)
    weights[3] = weight
    if weight < 1:
        fitted = KernelRidge(RIDGE).fit(gram(20), labels(12), sample_weight=weights)
        assert fitted.leave_one_out().residuals.isfinite().all()
    with pytest.raises(errors.InputError, match="at sample 3"):
        KernelRidge(RIDGE).fit(gram(20).float(), labels(12).float(), sample_weight=weights)
