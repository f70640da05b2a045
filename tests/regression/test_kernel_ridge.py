"""Kernel ridge regression: shapes, methods against dense references, leave-one-out, variance, offset."""

import numpy as np
import pytest
import torch
from linear_operator.operators import DenseLinearOperator, RootLinearOperator

import ntkops
from ntkops import errors, projected_ntk
from ntkops.operators import nystrom_ntk
from ntkops.projections import SJLT
from ntkops.regression import KernelRidge
from tests.cases import REVERSE_ONLY
from tests.regression.problems import gram, labels, network, reference_jacobian, samples

DIRECT = ["cholesky", "eigh"]


def reference(K, Y, ridge):
    return torch.linalg.solve(K + ridge * torch.eye(K.shape[-1], dtype=K.dtype), Y)


# shapes


@pytest.mark.parametrize("method", DIRECT)
@pytest.mark.parametrize("tail", [(), (1,), (3,), (2, 2)])
def test_one_kernel_shared_by_all_targets(method, tail):
    K, Y, across = gram(20), labels(12, *tail), labels(5, 12)
    fitted = KernelRidge(0.1, relative=False, method=method).fit(K, Y)
    alpha = reference(K, Y.reshape(12, -1), 0.1).reshape(Y.shape)
    torch.testing.assert_close(fitted.dual_coef_, alpha)
    predictions = fitted.predict(across)
    assert predictions.shape == (5, *tail)
    torch.testing.assert_close(predictions, torch.tensordot(across, alpha, 1))
    assert fitted.solve_info_.residuals.max() < 1e-12


@pytest.mark.parametrize("method", DIRECT)
def test_one_kernel_for_each_class(method):
    K = torch.stack([gram(20, seed=c) for c in range(3)])
    Y, across = labels(12, 3), labels(3, 5, 12)
    fitted = KernelRidge(1e-2, method=method).fit(K, Y)
    scale = K.diagonal(dim1=-2, dim2=-1).mean()  # one scale over the classes
    assert fitted.scale_ == pytest.approx(float(scale)) and fitted.ridge_ == pytest.approx(
        1e-2 * float(scale)
    )
    alpha = torch.stack([reference(K[c], Y[:, c], fitted.ridge_) for c in range(3)], dim=1)
    torch.testing.assert_close(fitted.dual_coef_, alpha)
    torch.testing.assert_close(fitted.predict(across), torch.einsum("cmn,nc->mc", across, alpha))


@pytest.mark.parametrize(
    "method, dense_limit", [("cholesky", "auto"), ("eigh", "auto"), ("auto", "auto"), ("auto", 0)]
)
def test_samples_and_outputs_flattened(method, dense_limit):
    model, x, x_new = network(), samples(6), samples(4, seed=5)
    K = ntkops.ntk(model, x, max_dense_bytes=dense_limit)
    Y = labels(6, 3)
    fitted = KernelRidge(1e-2, method=method).fit(K, Y)
    J, J_new = reference_jacobian(model, x).flatten(0, 1), reference_jacobian(model, x_new).flatten(0, 1)
    alpha = reference(J @ J.mT, Y.reshape(-1), fitted.ridge_)
    predictions = fitted.predict(K.cross(x_new))
    tight = {"rtol": 1e-5, "atol": 1e-5} if fitted.method_ == "cg" else {}
    torch.testing.assert_close(fitted.dual_coef_, alpha.reshape(6, 3), **tight)
    torch.testing.assert_close(predictions, (J_new @ J.mT @ alpha).reshape(4, 3), **tight)


def test_kinds_of_kernels_agree():
    model, x, x_new, Y = network(), samples(8), samples(3, seed=5), labels(8, 3)
    K = ntkops.ntk(model, x, outputs="each")
    ours = KernelRidge(1e-3).fit(K, Y).predict(K.cross(x_new))
    dense, across = K.to_dense(), K.cross(x_new).to_dense()
    torch.testing.assert_close(KernelRidge(1e-3).fit(dense, Y).predict(across), ours)
    wrapped = KernelRidge(1e-3).fit(DenseLinearOperator(dense), Y).predict(DenseLinearOperator(across))
    torch.testing.assert_close(wrapped, ours)
    arrays = KernelRidge(1e-3).fit(dense.numpy(), Y.numpy()).predict(across.numpy())
    torch.testing.assert_close(torch.as_tensor(arrays), ours)
    doubled = KernelRidge(1e-3).fit(2 * K, Y).predict(2 * K.cross(x_new))  # the ridge is relative
    torch.testing.assert_close(doubled, ours)


def test_a_linear_network_is_ridge_regression():
    # f(x) = W x has the kernel x xᵀ for each output, and its regression is ridge regression on x.
    x, x_new, Y = samples(30), samples(7, seed=5), labels(30, 3)
    model = torch.nn.Linear(4, 3, bias=False).double()
    for outputs in ("all", "each", 0):
        K = ntkops.ntk(model, x, outputs=outputs)
        for ridge in (1e-6, 1e-2, 1.0):
            target = Y[:, 0] if outputs == 0 else Y
            weights = torch.linalg.solve(x.mT @ x + ridge * torch.eye(4).double(), x.mT @ target)
            # With 4 features the dual has a part of size |Y| / ridge that cancels in products: ridge 1e-6
            # costs the dual methods six digits, and "features", which "auto" takes, none.
            for method in ("auto", "features") if ridge < 1e-3 else ("auto", "features", "cholesky", "eigh"):
                fitted = KernelRidge(ridge, relative=False, method=method).fit(K, target)
                predictions = fitted.predict(K.cross(x_new))
                torch.testing.assert_close(predictions, x_new @ weights, rtol=1e-10, atol=1e-10)


# features, Nyström


@pytest.mark.parametrize("count", [4, 12, 30])
def test_features_are_the_same_regression(count):
    F, F_new, Y = labels(12, count, seed=1), labels(5, count, seed=2), labels(12, 2)
    fitted = KernelRidge(1e-3, method="features").fit(RootLinearOperator(F), Y)
    plain = KernelRidge(1e-3, method="cholesky").fit(F @ F.mT, Y)
    torch.testing.assert_close(
        fitted.predict(F_new @ F.mT), plain.predict(F_new @ F.mT), rtol=1e-9, atol=1e-9
    )
    torch.testing.assert_close(fitted.dual_coef_, plain.dual_coef_, rtol=1e-7, atol=1e-7)
    torch.testing.assert_close(fitted.leave_one_out().residuals, plain.leave_one_out().residuals)
    prior = F_new.square().sum(1)
    torch.testing.assert_close(fitted.variance(F_new @ F.mT, prior), plain.variance(F_new @ F.mT, prior))
    assert KernelRidge(1e-3).fit(RootLinearOperator(F), Y).method_ == (
        "features" if count < 12 else "cholesky"
    )


@pytest.mark.parametrize("outputs", ["all", "each", 0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_projected_kernels_are_regressed_on_in_feature_space(outputs, dtype):
    model, x, x_new = network(dtype=dtype), samples(40, dtype=dtype), samples(4, seed=5, dtype=dtype)
    Y = labels(40, dtype=dtype) if outputs == 0 else labels(40, 3, dtype=dtype)
    K = projected_ntk(ntkops.ntk(model, x, outputs=outputs), SJLT(dim=99, k=16, seed=0))
    fitted = KernelRidge(1e-3).fit(K, Y)
    assert fitted.method_ == "features"
    plain = KernelRidge(1e-3, method="cholesky").fit(K.to_dense(), Y)
    ours, truth = fitted.predict(K.cross(x_new)), plain.predict(K.cross(x_new).to_dense())
    tight = {"rtol": 1e-3, "atol": 1e-3} if dtype == torch.float32 else {"rtol": 1e-8, "atol": 1e-8}
    torch.testing.assert_close(ours, truth, **tight)
    other = projected_ntk(ntkops.ntk(model, x_new, x, outputs=outputs), SJLT(dim=99, k=16, seed=1))
    with pytest.raises(errors.StaleOperatorError, match="another projection"):
        fitted.predict(other)


def test_nystrom_is_the_regression_with_the_nystrom_kernel():
    K, across, Y = gram(20, 25), labels(5, 25), labels(25, 2)
    chosen = torch.tensor([3, 1, 8, 20, 11])
    fitted = KernelRidge(0.05, relative=False, inducing=chosen).fit(K, Y)
    assert fitted.method_ == "nystrom"
    half = K[:, chosen] @ torch.linalg.inv(K[chosen][:, chosen])
    approximate, approximate_new = (
        half @ K[chosen],
        across[:, chosen] @ torch.linalg.inv(K[chosen][:, chosen]) @ K[chosen],
    )
    plain = KernelRidge(0.05, relative=False).fit((approximate + approximate.mT) / 2, Y)
    torch.testing.assert_close(fitted.predict(across), plain.predict(approximate_new), rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(fitted.leave_one_out().residuals, plain.leave_one_out().residuals)
    outside = torch.ones(25, dtype=torch.bool)
    outside[chosen] = False
    assert (fitted.dual_coef_[outside] == 0).all()
    # the variance: that of the features, and the prior variance that they miss
    prior = across.square().sum(1) + 50
    K_zz = K[chosen][:, chosen]
    prior_q = torch.einsum("mi,ij,mj->m", across[:, chosen], torch.linalg.inv(K_zz), across[:, chosen])
    features_only = plain.variance(approximate_new, prior_q)
    torch.testing.assert_close(fitted.variance(across, prior), prior - prior_q + features_only)


@pytest.mark.parametrize("outputs", ["all", "each"])
def test_nystrom_operators_are_regressed_on_in_feature_space(outputs):
    model, x, x_new, Y = network(), samples(10), samples(3, seed=5), labels(10, 3)
    K = ntkops.ntk(model, x, outputs=outputs)
    chosen = torch.tensor([0, 4, 7])
    operator = nystrom_ntk(K, chosen)
    by_operator = KernelRidge(1e-2, relative=False).fit(operator, Y)
    by_option = KernelRidge(1e-2, relative=False, inducing=chosen).fit(K, Y)
    assert by_operator.method_ == "features"
    ours, truth = by_operator.predict(operator.cross(x_new)), by_option.predict(K.cross(x_new))
    torch.testing.assert_close(ours, truth, rtol=1e-7, atol=1e-7)
    with pytest.raises(errors.InputError, match="NystromOperator"):
        by_operator.predict(K.cross(x_new))


def test_all_rows_inducing_is_exact():
    K, across, Y = gram(20), labels(5, 12), labels(12, 2)
    exact = KernelRidge(1e-3).fit(K, Y)
    nystrom = KernelRidge(1e-3, inducing=12).fit(K, Y)
    torch.testing.assert_close(nystrom.predict(across), exact.predict(across), rtol=1e-7, atol=1e-7)
    torch.testing.assert_close(nystrom.leave_one_out().residuals, exact.leave_one_out().residuals)


def test_nystrom_of_lazy_kernels_of_each_class():
    model, x, x_new, Y = network(), samples(10), samples(3, seed=5), labels(10, 3)
    K = ntkops.ntk(model, x, outputs="each")
    lazy = ntkops.ntk(model, x, outputs="each", max_dense_bytes=0)
    chosen = torch.tensor([0, 4, 7, 2])
    dense = KernelRidge(1e-3, inducing=chosen).fit(K.to_dense(), Y)
    for kernel in (K, lazy):
        fitted = KernelRidge(1e-3, inducing=chosen).fit(kernel, Y)
        torch.testing.assert_close(fitted.dual_coef_, dense.dual_coef_, rtol=1e-8, atol=1e-8)
        torch.testing.assert_close(
            fitted.predict(kernel.cross(x_new)), dense.predict(K.cross(x_new).to_dense())
        )


def test_all_outputs_of_an_inducing_sample():
    model, x, Y = network(), samples(8), labels(8, 3)
    fitted = KernelRidge(1e-2, inducing=torch.tensor([1, 6])).fit(ntkops.ntk(model, x), Y)
    assert (fitted.dual_coef_ != 0).any(1).nonzero().flatten().tolist() == [1, 6]


def test_inducing_rows_are_drawn_from_the_generator():
    K, Y = gram(20, 25), labels(25)
    fits = [
        KernelRidge(1e-3, inducing=6, generator=torch.Generator().manual_seed(seed)).fit(K, Y)
        for seed in (3, 3, 4)
    ]
    assert torch.equal(fits[0].dual_coef_, fits[1].dual_coef_)
    assert not torch.equal(fits[0].dual_coef_, fits[2].dual_coef_)
    assert fits[0].solve_info_.seed == 3


# spectral cut-off


def test_cutoff_is_equation_17():
    K, Y, across = gram(20), labels(12, 2), labels(5, 12)
    values, vectors = torch.linalg.eigh(K)
    U, S = vectors[:, -4:], values[-4:]
    for ridge in (0.0, 0.3):
        fitted = KernelRidge(ridge, relative=False, cutoff=4).fit(K, Y)
        alpha = U @ ((U.mT @ Y) / (S + ridge).unsqueeze(1))
        torch.testing.assert_close(fitted.dual_coef_, alpha)
        torch.testing.assert_close(fitted.predict(across), across @ alpha)


def test_cutoff_is_not_the_ridge_regression_of_the_truncated_kernel():
    # Truncated factors in equation (17) are a cut-off; a ridge on K_r keeps (1/r)(I - U Uᵀ) Y besides.
    K, Y = gram(20), labels(12)
    values, vectors = torch.linalg.eigh(K)
    U, S, ridge = vectors[:, -4:], values[-4:], 1e-3
    truncated = U @ torch.diag(S) @ U.mT
    on_truncated = reference(truncated, Y, ridge)
    cut = KernelRidge(ridge, relative=False, cutoff=4).fit(K, Y).dual_coef_
    torch.testing.assert_close(on_truncated - cut, (Y - U @ (U.mT @ Y)) / ridge)
    assert on_truncated.norm() > 100 * cut.norm()


def test_cutoff_by_the_share_of_the_trace():
    K, Y = gram(20), labels(12)
    rank = int(ntkops.truncation_rank(K, 0.1))
    by_share, by_rank = (KernelRidge(1e-3, cutoff=cutoff).fit(K, Y) for cutoff in (0.1, rank))
    torch.testing.assert_close(by_share.dual_coef_, by_rank.dual_coef_)
    full = KernelRidge(1e-3, cutoff=12).fit(K, Y)
    torch.testing.assert_close(full.dual_coef_, KernelRidge(1e-3).fit(K, Y).dual_coef_)


def test_cutoff_without_a_ridge_is_the_pseudo_inverse():
    K, Y = gram(5), labels(12)
    fitted = KernelRidge(0, cutoff=5).fit(K, Y)
    torch.testing.assert_close(fitted.dual_coef_, torch.linalg.pinv(K, hermitian=True, rtol=1e-10) @ Y)
    with pytest.raises(errors.SingularKernelError, match="at most 5"):
        KernelRidge(0, cutoff=6).fit(K, Y)


# leave-one-out


def refit(K, Y, ridge, sample, group=1):
    rows = torch.arange(len(K))
    out = (rows // group) == sample
    kept = ~out
    alpha = reference(K[kept][:, kept], Y.reshape(len(K), -1)[kept], ridge)
    return K[out][:, kept] @ alpha


@pytest.mark.parametrize("method", DIRECT)
def test_leave_one_out_is_what_refitting_gives(method):
    K, Y = gram(20), labels(12, 2)
    fitted = KernelRidge(0.2, relative=False, method=method).fit(K, Y)
    direct = torch.cat([refit(K, Y, 0.2, i) for i in range(12)])
    found = fitted.leave_one_out()
    torch.testing.assert_close(found.predictions, direct)
    torch.testing.assert_close(found.residuals, Y - direct)
    assert found.mean_squared_error == pytest.approx(float((Y - direct).square().mean()))


@pytest.mark.parametrize("method", DIRECT)
def test_all_outputs_of_a_sample_leave_together(method):
    model, x, Y = network(), samples(6), labels(6, 3)
    K = ntkops.ntk(model, x)
    fitted = KernelRidge(0.2, relative=False, method=method).fit(K, Y)
    dense = K.to_dense()
    direct = torch.cat([refit(dense, Y, 0.2, i, group=3).T for i in range(6)])
    torch.testing.assert_close(fitted.leave_one_out().predictions, direct)


def test_leave_one_out_of_each_class_with_a_network_offset():
    model, x, Y = network(), samples(8), labels(8, 3)
    K = ntkops.ntk(model, x, outputs="each")
    fitted = KernelRidge(0.2, relative=False, offset="network").fit(K, Y)
    dense, f = K.to_dense(), model(x).detach()
    direct = torch.cat(
        [
            torch.stack([refit(dense[c], (Y - f)[:, c], 0.2, i)[0, 0] for c in range(3)]).unsqueeze(0)
            for i in range(8)
        ]
    )
    torch.testing.assert_close(fitted.leave_one_out().predictions, f + direct)


def test_the_ridge_is_the_best_by_leave_one_out():
    K, Y = gram(20), labels(12, 2)
    candidates = [1e-4, 1e-2, 1.0, 10.0]
    for method in ("auto", "cholesky", "eigh"):
        fitted = KernelRidge(candidates, method=method).fit(K, Y)
        each = [KernelRidge(r).fit(K, Y).leave_one_out().mean_squared_error for r in candidates]
        torch.testing.assert_close(fitted.ridge_path_.errors, torch.tensor(each, dtype=torch.float64))
        best = candidates[int(np.argmin(each))]
        assert fitted.ridge_ == pytest.approx(best * fitted.scale_)
        assert fitted.ridge_path_.ridges.tolist() == pytest.approx([r * fitted.scale_ for r in candidates])
        assert fitted.ridge_path_.best == int(np.argmin(each))
        torch.testing.assert_close(fitted.dual_coef_, KernelRidge(best).fit(K, Y).dual_coef_)


@pytest.mark.parametrize("options", [{}, {"method": "features"}, {"inducing": 8}, {"cutoff": 5}])
def test_loo_on_its_own_grid(options):
    F = labels(20, 6, seed=3)
    truth = F @ labels(6, 2, seed=4)
    noisy = truth + 0.1 * labels(20, 2, seed=5)
    fitted = KernelRidge("loo", **options).fit(RootLinearOperator(F), noisy)
    assert len(fitted.ridge_path_.ridges) == len(fitted.ridge_path_.errors) == 25
    assert fitted.leave_one_out().mean_squared_error == pytest.approx(float(fitted.ridge_path_.errors.min()))


def test_ridges_that_leave_a_singular_kernel_are_passed_over():
    fitted = KernelRidge([0.0, 1e-2]).fit(gram(5), labels(12))
    assert fitted.ridge_path_.errors[0] == float("inf") and fitted.ridge_ == pytest.approx(
        1e-2 * fitted.scale_
    )


# variance


@pytest.mark.parametrize("method", DIRECT)
def test_variance_of_the_gaussian_process(method):
    K = gram(20, 17)
    train, test = slice(0, 12), slice(12, 17)
    fitted = KernelRidge(0.3, relative=False, method=method).fit(K[train, train], labels(12))
    explained = K[test, train] @ reference(K[train, train], K[train, test], 0.3)
    truth = (K[test, test] - explained).diagonal()
    torch.testing.assert_close(fitted.variance(K[test, train], K[test, test].diagonal()), truth)


def test_variance_in_all_shapes():
    model, x, x_new = network(), samples(6), samples(4, seed=5)
    for outputs, Y in (("all", labels(6, 3)), ("each", labels(6, 3)), (1, labels(6))):
        K, new = ntkops.ntk(model, x, outputs=outputs), ntkops.ntk(model, x_new, outputs=outputs)
        lazy = ntkops.ntk(model, x, outputs=outputs, max_dense_bytes=0)
        fitted = KernelRidge(1e-2).fit(K, Y)
        across, dense = K.cross(x_new).to_dense(), K.to_dense()
        ridged = dense + fitted.ridge_ * torch.eye(dense.shape[-1]).double()
        explained = (across @ torch.linalg.solve(ridged, across.mT)).diagonal(dim1=-2, dim2=-1)
        truth = new.diagonal() - explained
        truth = truth.mT if outputs == "each" else truth.reshape(4, 3) if outputs == "all" else truth
        torch.testing.assert_close(fitted.variance(K.cross(x_new), new.diagonal()), truth)
        torch.testing.assert_close(fitted.variance(lazy.cross(x_new), new.diagonal()), truth)


def test_a_diagonal_of_other_samples_is_found():
    K = gram(20, 17)
    fitted = KernelRidge(1e-3).fit(K[:12, :12], labels(12))
    with pytest.raises(errors.InputError, match="does not belong"):
        fitted.variance(K[12:, :12], 0.01 * K[12:, 12:].diagonal())


# the linearised network


@pytest.mark.parametrize("outputs", ["all", "each"])
def test_offset_gives_the_linearised_network(outputs):
    # f(x) + J (θ - θ0) with θ - θ0 the ridge solution for labels Y.
    model, x, x_new, Y = network(), samples(6), samples(4, seed=5), labels(6, 3)
    K = ntkops.ntk(model, x, outputs=outputs)
    fitted = KernelRidge(1e-3, relative=False, offset="network").fit(K, Y)
    J, J_new = reference_jacobian(model, x), reference_jacobian(model, x_new)
    f, f_new = model(x).detach(), model(x_new).detach()
    identity = torch.eye(J.shape[-1]).double() * 1e-3
    if outputs == "all":
        flat = J.flatten(0, 1)
        step = torch.linalg.solve(flat.mT @ flat + identity, flat.mT @ (Y - f).flatten())
        truth = f_new + J_new @ step
    else:
        steps = [
            torch.linalg.solve(J[:, c].mT @ J[:, c] + identity, J[:, c].mT @ (Y - f)[:, c]) for c in range(3)
        ]
        truth = f_new + torch.stack([J_new[:, c] @ steps[c] for c in range(3)], dim=1)
    torch.testing.assert_close(fitted.predict(K.cross(x_new)), truth, rtol=1e-7, atol=1e-7)
    given = KernelRidge(1e-3, relative=False).fit(K, Y, offset=f)
    torch.testing.assert_close(given.predict(K.cross(x_new), offset=f_new), truth, rtol=1e-7, atol=1e-7)


def test_offset_of_one_output_and_of_slices():
    model, x, Y = network(), samples(6), labels(6)
    f = model(x).detach()
    K = ntkops.ntk(model, x, outputs=1)
    torch.testing.assert_close(
        KernelRidge(1e-3, offset="network").fit(K, f[:, 1]).dual_coef_, torch.zeros_like(Y)
    )
    part = ntkops.ntk(model, x)[4:11, 4:11]
    coefficients = KernelRidge(1e-3, offset="network").fit(part, f.flatten()[4:11]).dual_coef_
    torch.testing.assert_close(coefficients, torch.zeros(7).double())


def test_a_constant_offset():
    K, Y, across = gram(20), labels(12, 2), labels(5, 12)
    shift = torch.tensor([1.0, -2.0], dtype=torch.float64)
    fitted = KernelRidge(0.1, offset=shift).fit(K, Y)
    plain = KernelRidge(0.1).fit(K, Y - shift)
    torch.testing.assert_close(fitted.predict(across), plain.predict(across) + shift)
    torch.testing.assert_close(
        KernelRidge(0.1, offset=1.5).fit(K, Y).predict(across).mean(),
        fitted.predict(across).mean(),
        rtol=10,
        atol=10,
    )


def test_offsets_come_in_pairs():
    K, Y, across = gram(20), labels(12), labels(5, 12)
    with pytest.raises(errors.InputError, match="offset=f_new"):
        KernelRidge().fit(K, Y, offset=Y).predict(across)
    with pytest.raises(errors.InputError, match="subtracted none"):
        KernelRidge().fit(K, Y).predict(across, offset=labels(5))
    with pytest.raises(errors.InputError, match="does not name"):
        KernelRidge(offset="network").fit(K, Y)
    with pytest.raises(errors.ShapeError, match="offset"):
        KernelRidge().fit(K, Y, offset=labels(11))
    with pytest.raises(errors.ShapeError, match="broadcast"):
        KernelRidge(offset=labels(3)).fit(K, labels(12, 2))
    with pytest.raises(errors.InputError, match="'network'"):
        KernelRidge(offset="mean").fit(K, Y)
    traced = ntkops.ntk(network(), samples(6), outputs="trace")
    with pytest.raises(errors.UnsupportedOperationError, match="traced"):
        KernelRidge(offset="network").fit(traced, labels(6))


# dtypes and scales


@pytest.mark.parametrize("method", DIRECT)
@pytest.mark.parametrize("scale", [1e-20, 1.0, 1e18])
def test_scale_of_kernel_and_labels_is_no_matter(method, scale):
    K, Y, across = (
        gram(20, dtype=torch.float32),
        labels(12, dtype=torch.float32),
        labels(5, 12, dtype=torch.float32),
    )
    plain = KernelRidge(1e-2, method=method).fit(K, Y)
    scaled = KernelRidge(1e-2, method=method).fit(K * scale, Y)
    assert plain.dual_coef_.dtype == torch.float64 and plain.predict(across).dtype == torch.float32
    torch.testing.assert_close(scaled.predict(across * scale), plain.predict(across))
    relabelled = KernelRidge(1e-2, method=method).fit(K, Y * scale)
    torch.testing.assert_close(relabelled.predict(across), plain.predict(across) * scale)
    residuals = scaled.leave_one_out().residuals
    torch.testing.assert_close(residuals, plain.leave_one_out().residuals)


def test_nothing_of_the_callers_changes():
    K, Y = gram(20), labels(12, 2)
    before = K.clone(), Y.clone()
    state = torch.get_rng_state()
    KernelRidge("loo").fit(K, Y).leave_one_out()
    KernelRidge(inducing=4).fit(K, Y)
    assert torch.equal(K, before[0]) and torch.equal(Y, before[1])
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("outputs", ["each", "trace"])
def test_a_nystrom_regression_is_fitted_without_j(outputs):
    """Above the limit of dense blocks its columns come from tiles: a bag of embeddings has Jᵀv alone."""
    torch.manual_seed(0)
    model, x, new = REVERSE_ONLY.make(), REVERSE_ONLY.data(20), REVERSE_ONLY.data(7)
    wanted, found = (ntkops.ntk(model, x, outputs=outputs, max_dense_bytes=limit) for limit in ("auto", 0))
    Y = torch.randn(20, wanted.shape[0] if outputs == "each" else 1, dtype=wanted.dtype)
    ridge = KernelRidge(1e-2, inducing=torch.tensor([1, 4, 6, 11]))
    duals = [ridge.fit(K, Y).dual_coef_ for K in (wanted, found)]
    torch.testing.assert_close(duals[1], duals[0], rtol=1e-9, atol=1e-9)
    across = wanted.cross(new).to_dense()
    torch.testing.assert_close(ridge.fit(found, Y).predict(across), ridge.fit(wanted, Y).predict(across))
