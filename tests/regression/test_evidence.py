"""Evidence of ridges, with the scale profiled out, against a dense Gaussian written out."""

import math
import pickle

import pytest
import torch
from linear_operator.operators import RootLinearOperator

import ntkops
from ntkops import errors
from ntkops.regression import KernelRidge
from ntkops.results import RidgePath
from tests.regression.problems import gram, labels, network, samples


def reference(K, y, ridge):
    """log N(y; 0, s² (K + r)) at the best s²: of kernels (*batch, n, n) and columns (*batch, n, k)."""
    n = y.numel()
    A = K + ridge * torch.eye(K.shape[-1], dtype=K.dtype)
    scale = (y * torch.linalg.solve(A, y)).sum() / n
    # One Gaussian over all labels: every kernel counts once for each target that shares it.
    logdet = torch.linalg.slogdet(A)[1].sum() * y.shape[-1]
    return -0.5 * (n * math.log(scale) + logdet + n + n * math.log(2 * math.pi))


def noisy(size=40, targets=None, noise=0.2, seed=0):
    """A smooth kernel, and draws from its process with noise of variance noise² s²."""
    x = torch.linspace(0, 1, size, dtype=torch.float64)
    K = torch.exp(-20 * (x[:, None] - x).square())
    root = torch.linalg.cholesky(K + noise**2 * torch.eye(size))
    shape = (size,) if targets is None else (size, targets)
    return K, (root @ labels(size, targets or 1, seed=seed)).reshape(shape)


def columns(outputs, Y):
    if outputs == "each":
        return Y.mT.unsqueeze(-1)
    return Y.reshape(-1, 1) if outputs == "all" else Y.reshape(len(Y), -1)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("outputs", ["all", "each", "trace", 1])
def test_the_evidence_is_that_of_one_gaussian_over_all_labels(outputs, dtype):
    model, x, Y = network(dtype=dtype), samples(8, dtype=dtype), labels(8, 3, dtype=dtype)
    K = ntkops.ntk(model, x, outputs=outputs)
    fit = KernelRidge("evidence").fit(K, Y)
    dense, y = K.to_dense().double(), columns(outputs, Y).double()
    for ridge in (fit.ridge_, 0.3, 20.0):
        found = fit.log_marginal_likelihood(ridge)
        assert found.exact and float(found) == pytest.approx(float(reference(dense, y, ridge)), abs=1e-8)
    assert float(fit.log_marginal_likelihood()) == float(fit.log_marginal_likelihood(fit.ridge_))


@pytest.mark.parametrize("method", ["cholesky", "eigh", "features", "auto"])
def test_every_method_has_the_same_evidence(method):
    F, Y = labels(12, 5, seed=2), labels(12, 2)
    fit = KernelRidge(0.1, relative=False, method=method).fit(RootLinearOperator(F), Y)
    for ridge in (None, 1e-3, 4.0):
        truth = reference(F @ F.mT, Y, ridge or 0.1)
        assert float(fit.log_marginal_likelihood(ridge)) == pytest.approx(float(truth), abs=1e-7)


def test_nystrom_has_the_evidence_of_its_kernel():
    K, Y = noisy(20)
    fit = KernelRidge("evidence", inducing=torch.arange(0, 20, 4)).fit(K, Y)
    across = K[:, ::4]
    low = across @ torch.linalg.solve(K[::4, ::4], across.mT)
    truth = reference(low, Y.unsqueeze(-1), fit.ridge_)
    assert float(fit.log_marginal_likelihood()) == pytest.approx(float(truth), abs=1e-6)
    assert fit.method_ == "nystrom"


@pytest.mark.parametrize("targets", [None, 3])
def test_the_ridge_is_the_best_of_all(targets):
    K, Y = noisy(targets=targets)
    fit = KernelRidge("evidence").fit(K, Y)
    best = float(fit.log_marginal_likelihood())
    r = torch.tensor(fit.ridge_, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(fit.log_marginal_likelihood(r).value, r, create_graph=True)
    (bend,) = torch.autograd.grad(slope, r)
    assert abs(float(slope.detach() * fit.ridge_)) < 1e-4 and float(bend) < 0
    path = fit.ridge_path_
    assert path.criterion == "evidence" and path.best == int(path.values.argmax())
    assert float(path.values[path.best]) == pytest.approx(best, abs=1e-12)
    assert float(path.ridges[path.best]) == fit.ridge_ and bool((path.ridges.diff() > 0).all())
    for ridge, value in zip(path.ridges.tolist(), path.values.tolist(), strict=True):
        if ridge > 1e-6:  # below, the solve of the reference loses digits itself
            assert value == pytest.approx(float(reference(K, Y.reshape(40, -1), ridge)), abs=1e-6)
    with pytest.raises(errors.UnsupportedOperationError, match=r"\.values"):
        _ = path.errors


@pytest.mark.parametrize("unit", [1e-12, 1e9])
def test_the_unit_of_the_labels_does_not_matter(unit):
    K, Y = noisy(targets=2)
    one, other = KernelRidge("evidence").fit(K, Y), KernelRidge("evidence").fit(K, unit * Y)
    assert other.ridge_ == pytest.approx(one.ridge_, rel=1e-5)
    assert other.noise_scale_ == pytest.approx(unit * one.noise_scale_, rel=1e-5)
    shift = float(other.log_marginal_likelihood()) - float(one.log_marginal_likelihood())
    assert shift == pytest.approx(-Y.numel() * math.log(unit), abs=1e-6)
    cross, new = K[::8], K[::8, ::8]
    deviations = [f.predict(cross, prior=new, return_std=True)[1] for f in (one, other)]
    torch.testing.assert_close(deviations[1], unit * deviations[0], rtol=1e-4, atol=0)


@pytest.mark.parametrize("unit", [1e-170, 1e160])
def test_labels_without_squares_are_refused(unit):
    K, y = noisy()
    with pytest.raises(errors.InputError, match="scale the labels"):
        KernelRidge("evidence").fit(K, unit * y)


def test_the_unit_of_the_kernel_does_not_matter():
    K, Y = noisy()
    one, other = KernelRidge("evidence").fit(K, Y), KernelRidge("evidence").fit(1e4 * K, Y)
    assert other.ridge_ == pytest.approx(1e4 * one.ridge_, rel=1e-5)
    assert other.noise_scale_ == pytest.approx(one.noise_scale_, rel=1e-5)
    assert float(other.log_marginal_likelihood()) == pytest.approx(
        float(one.log_marginal_likelihood()), abs=1e-8
    )
    absolute = KernelRidge("evidence", relative=False).fit(K, Y)
    assert absolute.ridge_ == one.ridge_ and absolute.scale_ == 1.0 == absolute.ridge_path_.scale


@pytest.mark.parametrize("method", ["cholesky", "eigh", "cg"])
def test_labels_may_change_afterwards(method):
    K, y = noisy()
    fit = KernelRidge(0.1, method=method).fit(K, y)
    before = fit.noise_scale_, float(fit.log_marginal_likelihood(0.2)), fit.leave_one_out().predictions
    y *= 3
    after = fit.noise_scale_, float(fit.log_marginal_likelihood(0.2)), fit.leave_one_out().predictions
    torch.testing.assert_close(after, before)


def test_the_noise_is_found():
    # With many draws that share one kernel the maximum lies at the truth: s = 1, noise .2.
    K, Y = noisy(targets=400)
    fit = KernelRidge("evidence").fit(K, Y)
    assert fit.noise_scale_ == pytest.approx(0.2, rel=0.05)
    assert fit.ridge_ == pytest.approx(0.04, rel=0.1)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_grid_ends_where_rounding_begins(dtype):
    # Labels without noise: the best ridge is the least that means something, and the fit stands.
    model, x = network(dtype=dtype), samples(30, dtype=dtype)
    K = ntkops.ntk(model, x, outputs=0)
    fit = KernelRidge("evidence").fit(K, K.to_dense() @ labels(30, dtype=dtype))
    values = torch.linalg.eigvalsh(K.to_dense().double())
    least = float(fit.ridge_path_.ridges[0])
    eps = torch.finfo(dtype).eps
    assert 0.1 * eps * values[-1] < least - max(-float(values[0]), 0) < 2 * eps * values[-1]
    assert least / fit.scale_ < (1e-13 if dtype == torch.float64 else 1e-4)
    assert fit.solve_info_.method == "eigh" and math.isfinite(fit.ridge_)
    with pytest.raises(errors.SingularKernelError, match="means something"):
        fit.log_marginal_likelihood(0.5 * least)


@pytest.mark.parametrize("ridge", [1e-13, 1e-8])
def test_labels_that_the_features_explain_cancel_nothing(ridge):
    # Beside a tiny ridge yᵀ ((K + r)⁻¹ y) is rounding, of either sign, where the labels lie in the span.
    F = labels(30, 4)
    left, singular, _ = torch.linalg.svd(F, full_matrices=False)
    Y = F @ labels(4, seed=3)
    fit = KernelRidge(ridge, relative=False, method="features").fit(RootLinearOperator(F), Y)
    truth = ((left.mT @ Y).square() / (singular.square() + ridge)).sum() / 30 * ridge
    # What is left of Y outside the span, 1e-15 of it, counts beside the smallest ridge.
    assert fit.noise_scale_**2 == pytest.approx(float(truth), rel=1e-3)


def test_the_offset_is_taken_away():
    model, x, Y = network(), samples(8), labels(8, 3)
    K = ntkops.ntk(model, x)
    fit = KernelRidge("evidence", offset="network").fit(K, Y)
    truth = reference(K.to_dense(), (Y - model(x).detach()).reshape(-1, 1), fit.ridge_)
    assert float(fit.log_marginal_likelihood()) == pytest.approx(float(truth), abs=1e-7)
    with pytest.raises(errors.InputError, match="equals the offset"):
        KernelRidge("evidence", offset="network").fit(K, model(x).detach())
    exact = KernelRidge(0.1).fit(K, torch.zeros_like(Y))
    assert exact.noise_scale_ == 0.0
    with pytest.raises(errors.InputError, match="equals the offset"):
        exact.log_marginal_likelihood()


@pytest.mark.parametrize(("method", "outputs"), [("cg", "all"), ("cg", "each"), ("lsmr", "all")])
def test_iterations_give_an_interval(outputs, method):
    model, x, Y = network(), samples(6), labels(6, 3)
    K = ntkops.ntk(model, x, outputs=outputs, max_dense_bytes=0)
    generator = torch.Generator().manual_seed(0)
    fit = KernelRidge(0.05, method=method, generator=generator).fit(K, Y)
    dense = ntkops.ntk(model, x, outputs=outputs).to_dense()
    for ridge in (None, 3.0):
        found = fit.log_marginal_likelihood(ridge)
        truth = float(reference(dense, columns(outputs, Y), ridge or fit.ridge_))
        low, high = (float(end) for end in found.interval)
        assert not found.exact and low - 1e-9 <= truth <= high + 1e-9
    with pytest.raises(errors.UnsupportedOperationError, match="gradient"):
        fit.log_marginal_likelihood(torch.tensor(1.0, requires_grad=True))


def test_what_has_no_evidence():
    K, Y = noisy(12)
    with pytest.raises(errors.InputError, match="cut-off"):
        KernelRidge("evidence", cutoff=3).fit(K, Y)
    with pytest.raises(errors.InputError, match="evidence"):
        KernelRidge("evidence", method="cg").fit(K, Y)
    with pytest.raises(errors.InputError, match="'loo' or 'evidence'"):
        KernelRidge("evidnce").fit(K, Y)
    with pytest.raises(errors.ZeroKernelError):
        KernelRidge("evidence").fit(torch.zeros_like(K), Y)
    with pytest.raises(errors.SingularKernelError, match="semidefinite"):
        KernelRidge("evidence").fit(K - 0.5 * torch.eye(12), Y)
    with pytest.raises(errors.NotFittedError):
        _ = KernelRidge("evidence").noise_scale_
    with pytest.raises(errors.NotFittedError):
        KernelRidge("evidence").log_marginal_likelihood()
    cut = KernelRidge(0.1, cutoff=3).fit(K, Y)
    for ask in (lambda: cut.noise_scale_, cut.log_marginal_likelihood):
        with pytest.raises(errors.UnsupportedOperationError, match="cut-off"):
            ask()
    fit = KernelRidge(0.1).fit(K, Y)
    for ridge in (0.0, -1.0, float("nan"), float("inf"), True, "evidence", torch.ones(2), torch.tensor(1)):
        with pytest.raises(errors.InputError, match="above 0"):
            fit.log_marginal_likelihood(ridge)


def test_distilled_fits_do_not_take_it():
    with pytest.raises(errors.InputError, match="'loo'"):
        ntkops.distill.select(gram(20), 4, "random", generator=torch.Generator().manual_seed(0)).fit(
            gram(20), labels(12), ridge="evidence"
        )


def test_a_path_of_evidence_is_drawn():
    figure = pytest.importorskip("matplotlib.figure")
    K, Y = noisy()
    fit = KernelRidge("evidence").fit(K, Y)
    ax = ntkops.plotting.plot_ridge_path(fit.ridge_path_, figure.Figure().subplots())
    line, best = ax.get_lines()
    assert len(line.get_xdata()) == len(fit.ridge_path_.ridges)
    assert list(best.get_ydata()) == pytest.approx([float(fit.log_marginal_likelihood())])
    assert ax.get_yscale() == "linear" and "likelihood" in ax.get_ylabel()
    empty = RidgePath(torch.ones(2), torch.full((2,), -float("inf")), 1.0, 0, "evidence")
    with pytest.raises(errors.InputError, match="nothing to draw"):
        ntkops.plotting.plot_ridge_path(empty, figure.Figure().subplots())


@pytest.mark.parametrize("method", ["cholesky", "eigh", "cg"])
def test_a_kernel_that_was_written_to_is_not_read_again(method):
    torch.manual_seed(0)
    points = torch.randn(12, 3).double()
    K, Y = torch.exp(-torch.cdist(points, points)), torch.randn(12, 2).double()
    fit = KernelRidge(0.1, method=method).fit(K, Y)
    cross, own = K[:4].clone(), K.diagonal()[:4].clone()
    whole = fit.predict(cross)
    copy = KernelRidge(0.1, method=method).fit(K.clone(), Y)
    if method != "cg":
        copy = pickle.loads(pickle.dumps(fit))  # has a kernel of its own
    exact = copy.log_marginal_likelihood()
    K.mul_(5)
    torch.testing.assert_close(fit.predict(cross), whole)  # needs the kernel no more
    with pytest.raises(errors.StaleOperatorError, match="changed in place"):
        fit.log_marginal_likelihood()
    torch.testing.assert_close(copy.log_marginal_likelihood().value, exact.value)
    if method == "cg":
        for again in (lambda: fit.variance(cross, own), fit.leave_one_out, lambda: fit.leave_out([[0]])):
            with pytest.raises(errors.StaleOperatorError, match="fit again"):
                again()
    else:
        torch.testing.assert_close(fit.variance(cross, own), copy.variance(cross, own))
