"""Groups left out in closed form against regressions that were fitted without them."""

import warnings

import pytest
import torch
from linear_operator.operators import DenseLinearOperator, RootLinearOperator

import ntkops
from ntkops import errors, projected_ntk
from ntkops.regression import KernelRidge
from tests.regression.problems import gram, labels, network, reference_jacobian, samples

GROUPS = [[0, 7, 3], [11], [1, 2, 4, 5, 6]]
RIDGE = 1e-2


def refit(K, Y, group, ridge=RIDGE):
    """Return α of the samples that stay, with zeros at the others: (n, k)."""
    rest = [i for i in range(len(K)) if i not in group]
    alpha = torch.zeros(len(K), Y.shape[-1], dtype=K.dtype)
    eye = torch.eye(len(rest), dtype=K.dtype)
    alpha[rest] = torch.linalg.solve(K[rest][:, rest] + ridge * eye, Y[rest])
    return alpha


@pytest.mark.parametrize("method", ["cholesky", "eigh", "cg"])
@pytest.mark.parametrize("tail", [(), (2,)])
def test_one_kernel_for_all_targets(method, tail):
    K, Y, across = gram(20), labels(12, *tail), labels(5, 12)
    options = {"tol": 1e-13} if method == "cg" else {}
    fitted = KernelRidge(RIDGE, relative=False, method=method, **options).fit(K, Y)
    left = fitted.leave_out(GROUPS)
    expected = torch.stack([refit(K, Y.reshape(12, -1), group) for group in GROUPS])
    assert left.dual_coef.shape == (3, 12, *tail)
    torch.testing.assert_close(left.dual_coef, expected.reshape(3, 12, *tail), rtol=1e-9, atol=1e-9)
    predictions = left.predict(across)
    assert predictions.shape == (3, 5, *tail)
    torch.testing.assert_close(predictions, (across @ expected).reshape(3, 5, *tail), rtol=1e-9, atol=1e-9)
    for number, group in enumerate(GROUPS):
        off = Y[group] - (K[group] @ expected[number]).reshape(len(group), *tail)
        torch.testing.assert_close(left.residuals[number], off, rtol=1e-9, atol=1e-9)
        assert float(left.mean_squared_error[number]) == pytest.approx(float(off.square().mean()))
        assert bool((left.dual_coef[number, group] == 0).all())
    assert "3 groups of 1 to 5" in repr(left)


def test_groups_of_one_are_leave_one_out():
    K, Y = gram(20), labels(12, 2)
    fitted = KernelRidge(RIDGE).fit(K, Y)
    left, one = fitted.leave_out([[i] for i in range(12)]), fitted.leave_one_out()
    torch.testing.assert_close(torch.cat(left.residuals), one.residuals)
    assert float(left.mean_squared_error.mean()) == pytest.approx(one.mean_squared_error)


def test_a_kernel_for_each_class():
    K = torch.stack([gram(20, seed=c) for c in range(3)])
    Y, across = labels(12, 3), labels(3, 5, 12)
    left = KernelRidge(RIDGE, relative=False).fit(K, Y).leave_out(GROUPS)
    for c in range(3):
        for number, group in enumerate(GROUPS):
            expected = refit(K[c], Y[:, c : c + 1], group)
            torch.testing.assert_close(left.dual_coef[number, :, c], expected[:, 0])
            torch.testing.assert_close(left.predict(across)[number, :, c], across[c] @ expected[:, 0])


@pytest.mark.parametrize("limit", [0, "auto"])
def test_all_outputs_of_a_sample_leave_together(limit):
    net, x, new = network(), samples(8), samples(4, seed=2)
    J, J_new, Y = reference_jacobian(net, x), reference_jacobian(net, new), labels(8, 3)
    rows, fresh = J.flatten(0, 1), J_new.flatten(0, 1)
    K = ntkops.ntk(net, x, max_dense_bytes=limit)
    fitted = KernelRidge(1e-1, relative=False, offset="network", tol=1e-12).fit(K, Y)
    assert fitted.method_ == ("cg" if limit == 0 else "cholesky")
    left = fitted.leave_out([[2, 5], torch.arange(8) < 3])
    start, start_new = net(x).detach(), net(new).detach()
    for number, group in enumerate(([2, 5], [0, 1, 2])):
        gone = [3 * i + o for i in group for o in range(3)]
        alpha = refit(rows @ rows.mT, (Y - start).reshape(-1, 1), gone, 1e-1)
        expected = start_new + (fresh @ rows.mT @ alpha).reshape(4, 3)
        torch.testing.assert_close(left.predict(K.cross(new))[number], expected, rtol=1e-8, atol=1e-8)
        torch.testing.assert_close(left.dual_coef[number], alpha.reshape(8, 3), rtol=1e-8, atol=1e-8)
        own = start[group] + (rows[gone] @ rows.mT @ alpha).reshape(-1, 3)
        torch.testing.assert_close(left.residuals[number], Y[group] - own, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("ridge", [1e-2, 1e-9])
def test_features(ridge):
    F, Y, fresh = labels(12, 5, seed=3), labels(12, 2), labels(4, 5, seed=4)
    fitted = KernelRidge(ridge, relative=False).fit(RootLinearOperator(DenseLinearOperator(F)), Y)
    assert fitted.method_ == "features"
    left = fitted.leave_out(GROUPS)
    for number, group in enumerate(GROUPS):
        rest = [i for i in range(12) if i not in group]
        part = F[rest]
        weights = torch.linalg.solve(part.mT @ part + ridge * torch.eye(5, dtype=F.dtype), part.mT @ Y[rest])
        torch.testing.assert_close(left.predict(fresh @ F.mT)[number], fresh @ weights, rtol=1e-7, atol=1e-7)
        torch.testing.assert_close(left.residuals[number], Y[group] - F[group] @ weights)
        alpha = (Y[rest] - part @ weights) / ridge
        torch.testing.assert_close(
            left.dual_coef[number, rest], alpha, rtol=1e-7, atol=1e-7 * float(alpha.abs().max())
        )
        assert bool((left.dual_coef[number, group] == 0).all())


def test_inducing_samples_stay():
    net, x, new = network(outputs=1), samples(12), samples(4, seed=2)
    J, J_new, Y = reference_jacobian(net, x)[:, 0], reference_jacobian(net, new)[:, 0], labels(12)
    inducing, group, ridge = [0, 4, 9], [4, 6, 7], 1e-2
    K = ntkops.ntk(net, x, outputs=0)
    fitted = KernelRidge(ridge, relative=False, inducing=torch.tensor(inducing)).fit(K, Y)
    left = fitted.leave_out([group])
    rest = [i for i in range(12) if i not in group]
    some, square = J[rest] @ J[inducing].mT, J[inducing] @ J[inducing].mT
    beta = torch.linalg.solve(some.mT @ some + ridge * square, some.mT @ Y[rest])
    torch.testing.assert_close(
        left.predict(K.cross(new))[0], J_new @ J[inducing].mT @ beta, rtol=1e-7, atol=1e-9
    )


def test_a_cut_off_keeps_its_directions():
    K, Y, group = gram(20), labels(12), [2, 3]
    fitted = KernelRidge(RIDGE, relative=False, cutoff=6).fit(K, Y)
    left = fitted.leave_out([group])
    values, vectors = torch.linalg.eigh(K)
    values, vectors = values[-6:], vectors[:, -6:]
    features = vectors * values.sqrt()
    rest = [i for i in range(12) if i not in group]
    part = features[rest]
    weights = torch.linalg.solve(part.mT @ part + RIDGE * torch.eye(6, dtype=K.dtype), part.mT @ Y[rest])
    torch.testing.assert_close(left.residuals[0], Y[group] - features[group] @ weights)
    torch.testing.assert_close(left.predict(K)[0], features @ weights)


def test_class_kernels_through_a_projection():
    net, x, new = network(), samples(10), samples(4, seed=2)
    projection = ntkops.projections.SJLT(sum(p.numel() for p in net.parameters()), 6, seed=0)
    Y, group = labels(10, 3), [1, 8]
    seen = projection.apply(reference_jacobian(net, x))
    fresh = projection.apply(reference_jacobian(net, new))
    K = projected_ntk(ntkops.ntk(net, x, outputs="each"), projection)
    left = KernelRidge(RIDGE, relative=False).fit(K, Y).leave_out([group])
    for c in range(3):
        alpha = refit(seen[:, c] @ seen[:, c].mT, Y[:, c : c + 1], group)
        expected = fresh[:, c] @ (seen[:, c].mT @ alpha[:, 0])
        torch.testing.assert_close(left.predict(K.cross(new))[0, :, c], expected, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("method", ["cholesky", "eigh", "features"])
@pytest.mark.parametrize("ridge", [1e-3, 1e-7, 1e-11])
def test_what_a_group_alone_determines_is_as_good_as_it_says(method, ridge):
    # Of five directions three samples see three: what rounding leaves of the others is bounded, or said.
    F, Y, group, rest = labels(12, 5, seed=3), labels(12), list(range(9)), [9, 10, 11]
    K = RootLinearOperator(DenseLinearOperator(F)) if method == "features" else F @ F.mT
    fitted = KernelRidge(ridge, relative=False, method=method)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        left = fitted.fit(K, Y).leave_out([group])
    part = F[rest]
    alpha = torch.linalg.solve(part @ part.mT + ridge * torch.eye(3, dtype=F.dtype), Y[rest])
    expected = Y[group] - F[group] @ (part.mT @ alpha)
    error = (left.residuals[0] - expected).norm() / expected.norm()
    assert error <= 3 * left.rounding[0]
    assert any(issubclass(w.category, errors.RoundingWarning) for w in said) == bool(left.rounding[0] > 1e-2)
    assert left.rounding[0] < 1e-8 / ridge


def test_float32():
    K, Y, across = gram(20).float(), labels(12, 2).float(), labels(5, 12).float()
    left = KernelRidge(1e-1, relative=False).fit(K, Y).leave_out(GROUPS)
    for number, group in enumerate(GROUPS):
        expected = across.double() @ refit(K.double(), Y.double(), group, 1e-1)
        found = left.predict(across)[number]
        assert found.dtype == torch.float32 and left.residuals[number].dtype == torch.float32
        assert (found.double() - expected).norm() < 1e-6 * expected.norm()


def test_it_stays_as_it_is_when_the_regression_is_fitted_again():
    K, Y = gram(20), labels(12)
    fitted = KernelRidge(RIDGE).fit(K, Y)
    left = fitted.leave_out(GROUPS)
    before = left.predict(K)
    fitted.fit(2 * K[:5, :5], Y[:5])
    assert torch.equal(left.predict(K), before)


@pytest.mark.parametrize(
    "groups, error, match",
    [
        ([], errors.InputError, "groups is empty"),
        ([[0], []], errors.InputError, "group 1 has no sample"),
        ([[0, 0]], errors.InputError, "twice"),
        ([[1, -11]], errors.InputError, "twice"),
        ([list(range(12))], errors.InputError, "all 12 samples"),
        ([[0.5]], errors.InputError, "positions"),
        (torch.tensor([0, 1]), errors.InputError, "a list of one"),
        ("ab", errors.InputError, "a list of groups"),
        (3, errors.InputError, "a list of groups"),
        ([[0], [12]], errors.OutOfRangeError, "group 1: index 12"),
        ([[3], [1], [-13]], errors.OutOfRangeError, "group 2: index -13"),
        ([torch.ones(5, dtype=torch.bool)], errors.OutOfRangeError, "group 0: .*12 entries"),
    ],
)
def test_bad_groups(groups, error, match):
    fitted = KernelRidge(RIDGE).fit(gram(20), labels(12))
    with pytest.raises(error, match=match):
        fitted.leave_out(groups)


def test_a_group_that_determines_its_own_fit_is_refused():
    F = torch.eye(4, dtype=torch.float64)
    with pytest.raises(errors.NotFittedError):
        KernelRidge().leave_out([[0]])
    fitted = KernelRidge(1e-30, relative=False, method="features").fit(
        RootLinearOperator(DenseLinearOperator(F[:, :2])), labels(4)
    )
    with pytest.raises(errors.SingularKernelError, match="alone"):
        fitted.leave_out([[0, 1]])
