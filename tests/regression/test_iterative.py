"""Kernel ridge regression from products alone."""

import pytest
import torch
from linear_operator.operators import RootLinearOperator

import ntkops
from ntkops import errors
from ntkops.regression import KernelRidge
from tests.regression.problems import gram, labels, network, samples


@pytest.mark.parametrize("method", ["cg", "lsmr"])
@pytest.mark.parametrize("outputs", ["all", "each", 0])
def test_products_alone_give_what_cholesky_gives(outputs, method):
    model, x, x_new = network(), samples(12), samples(4, seed=5)
    Y = labels(12) if outputs == 0 else labels(12, 3)
    K = ntkops.ntk(model, x, outputs=outputs)
    lazy = ntkops.ntk(model, x, outputs=outputs, max_dense_bytes=0)
    new = ntkops.ntk(model, x_new, outputs=outputs)
    exact = KernelRidge(1e-2, method="cholesky").fit(K, Y)
    fitted = KernelRidge(1e-2, method=method, tol=1e-10).fit(lazy, Y)
    assert fitted.solve_info_.converged and fitted.solve_info_.residuals.max() <= 1e-10
    torch.testing.assert_close(fitted.dual_coef_, exact.dual_coef_)
    torch.testing.assert_close(fitted.predict(lazy.cross(x_new)), exact.predict(K.cross(x_new)))
    prior = new.diagonal()
    torch.testing.assert_close(
        fitted.variance(lazy.cross(x_new), prior), exact.variance(K.cross(x_new), prior)
    )
    torch.testing.assert_close(fitted.leave_one_out().residuals, exact.leave_one_out().residuals)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_larger_kernel_with_its_preconditioner(dtype):
    K, Y = gram(400, 300, dtype=dtype), labels(300, 2, dtype=dtype)
    fitted = KernelRidge(1e-3, method="cg", generator=torch.Generator().manual_seed(0)).fit(K, Y)
    exact = KernelRidge(1e-3, method="cholesky").fit(K, Y)
    assert fitted.solve_info_.preconditioner is not None
    torch.testing.assert_close(fitted.dual_coef_, exact.dual_coef_, rtol=1e-3, atol=1e-5)


def test_float32_networks_meet_the_tolerance_by_float64_corrections():
    model, x, Y = (
        network(dtype=torch.float32),
        samples(30, dtype=torch.float32),
        labels(30, 3, dtype=torch.float32),
    )
    lazy = ntkops.ntk(model, x, max_dense_bytes=0)
    fitted = KernelRidge(1e-4, method="cg", tol=1e-8).fit(lazy, Y)
    assert fitted.solve_info_.residuals.max() <= 1e-8 and fitted.solve_info_.precise_products > 0
    assert fitted.dual_coef_.dtype == torch.float64
    precise = KernelRidge(1e-4, method="cholesky").fit(ntkops.ntk(model.double(), x.double()), Y.double())
    torch.testing.assert_close(fitted.dual_coef_, precise.dual_coef_, rtol=1e-4, atol=1e-5)


def test_a_capped_iteration_says_so_and_keeps_its_work():
    K, Y = gram(400, 300), labels(300)
    with pytest.raises(errors.NotConvergedError) as caught:
        KernelRidge(1e-8, method="cg", max_products=3).fit(K, Y)
    assert caught.value.result.solution.shape == (300, 1)


def test_a_list_of_ridges_needs_a_factorisation():
    with pytest.raises(errors.InputError, match="leave-one-out"):
        KernelRidge("loo", method="cg").fit(gram(20), labels(12))


def test_lazy_kernels_with_few_features_stay_lazy():
    model, x, Y = network(), samples(60), labels(60, 3)  # 180 rows, 99 parameters
    lazy = ntkops.ntk(model, x, max_dense_bytes=0)
    assert KernelRidge(1e-2).fit(lazy, Y).method_ == "cg"
    assert KernelRidge(1e-2).fit(ntkops.ntk(model, x), Y).method_ == "features"


def test_without_a_ridge_a_singular_kernel_does_not_converge():
    with pytest.raises(errors.NotConvergedError):
        KernelRidge(0, method="cg").fit(gram(5), labels(12))


def test_a_generator_makes_it_repeatable():
    K, Y = gram(60, 50), labels(50)
    fits = [
        KernelRidge(1e-3, method="cg", generator=torch.Generator().manual_seed(3)).fit(K, Y) for _ in range(2)
    ]
    assert torch.equal(fits[0].dual_coef_, fits[1].dual_coef_)


def test_least_squares_of_float32_networks_and_of_features():
    model, x, Y = (
        network(dtype=torch.float32),
        samples(12, dtype=torch.float32),
        labels(12, 3, dtype=torch.float32),
    )
    fitted = KernelRidge(1e-4, method="lsmr").fit(ntkops.ntk(model, x, max_dense_bytes=0), Y)
    assert fitted.solve_info_.residuals.max() <= 1e-6 and fitted.solve_info_.method == "lsmr"
    F, Y = labels(12, 30), labels(12, 2)
    ours = KernelRidge(1e-3, method="lsmr").fit(RootLinearOperator(F), Y)
    torch.testing.assert_close(
        ours.dual_coef_, KernelRidge(1e-3).fit(F @ F.mT, Y).dual_coef_, rtol=1e-4, atol=1e-5
    )
    zero = KernelRidge(1e-3, method="lsmr").fit(RootLinearOperator(F), 0 * Y)
    assert (zero.dual_coef_ == 0).all() and zero.solve_info_.converged


def test_messages_of_least_squares():
    K, F, Y = gram(20), RootLinearOperator(labels(12, 30)), labels(12)
    with pytest.raises(errors.InputError, match="knows its Jacobian"):
        KernelRidge(1e-3, method="lsmr").fit(K, Y)
    with pytest.raises(errors.InputError, match="positive ridge"):
        KernelRidge(0, method="lsmr").fit(F, Y)
    with pytest.raises(errors.NotConvergedError) as caught:
        KernelRidge(1e-6, method="lsmr", max_products=4).fit(F, Y)
    assert caught.value.result.solution.shape == (12, 1)
