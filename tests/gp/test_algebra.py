"""Multiples and sums of `NTKKernel`: learned like gpytorch's, solved like ours."""

import copy

import gpytorch
import linear_operator
import pytest
import torch
from gpytorch.kernels import RBFKernel, ScaleKernel

import ntkops
from ntkops.errors import InputError, UnsupportedOperationError
from ntkops.gp import NTKKernel, NTKSumKernel
from ntkops.operators import RidgeOperator
from tests.gp.test_kernel import data, dense_posterior, fitted, network

pytestmark = pytest.mark.filterwarnings("ignore::gpytorch.utils.warnings.GPInputWarning")


def test_a_scale_is_learned_as_in_a_scale_kernel():
    x, y = data()
    mine = NTKKernel(network(), outputscale=0.7).double()
    theirs = ScaleKernel(NTKKernel(network())).double()
    theirs.outputscale = 0.7
    assert mine.outputscale.item() == pytest.approx(0.7)
    assert [name for name, _ in mine.named_parameters()] == ["raw_outputscale"]
    gradients = []
    for kernel in (mine, theirs):
        gp, likelihood = fitted(kernel, x, y)
        gp.train()
        value = gpytorch.mlls.ExactMarginalLogLikelihood(likelihood, gp)(gp(x), y)
        value.backward()
        gradients.append((value.detach(), kernel.raw_outputscale.grad.clone()))
    torch.testing.assert_close(gradients[0][0], gradients[1][0])
    torch.testing.assert_close(gradients[0][1].flatten(), gradients[1][1].flatten())
    mine.outputscale = 2.0
    torch.testing.assert_close(mine(x).to_dense(), 2.0 * ntkops.ntk(network(), x, outputs="trace").to_dense())
    torch.testing.assert_close(mine(x, x[:4], diag=False).to_dense(), mine(x).to_dense()[:, :4])
    torch.testing.assert_close(mine(x, x, diag=True), mine(x).to_dense().diagonal())


def test_each_kernel_of_a_batch_has_a_scale():
    x, _ = data()
    kernel = NTKKernel(network(3), outputs="each", num_outputs=3, outputscale=0.5).double()
    assert kernel.raw_outputscale.shape == (3,)
    kernel.outputscale = torch.tensor([1.0, 2.0, 3.0])
    dense = ntkops.ntk(network(3), x, outputs="each").to_dense()
    torch.testing.assert_close(kernel(x).to_dense(), torch.arange(1.0, 4)[:, None, None].double() * dense)
    torch.testing.assert_close(kernel[1](x).to_dense(), 2 * dense[1])
    part = kernel[[0, 2]]
    part.outputscale = torch.tensor([5.0, 7.0])
    torch.testing.assert_close(kernel.outputscale, torch.tensor([5.0, 2.0, 7.0]).double())
    twin = copy.deepcopy(kernel)
    twin.outputscale = 1.0
    torch.testing.assert_close(kernel.outputscale, torch.tensor([5.0, 2.0, 7.0]).double())


def test_above_the_size_of_gpytorchs_cholesky_the_solver_is_ours():
    (x, y), (x_test, _) = data(), data(7, seed=2)
    radial = RBFKernel().double()
    with torch.no_grad():
        dense = 0.7 * ntkops.ntk(network(), torch.cat([x, x_test]), outputs="trace").to_dense()
        added = radial(torch.cat([x, x_test])).to_dense()
    cases = {
        "scaled": (lambda: NTKKernel(network(), outputscale=0.7, max_dense_bytes=0).double(), dense),
        "added": (
            lambda: NTKKernel(network(), outputscale=0.7, max_dense_bytes=0).double() + radial,
            dense + added,
        ),
    }
    for make, whole in cases.values():
        gp, _ = fitted(make(), x, y)
        gp.eval()
        with (
            linear_operator.settings.max_cholesky_size(5),
            gpytorch.settings.max_eager_kernel_size(0),
            gpytorch.settings.skip_posterior_variances(),
            torch.no_grad(),
        ):
            found = gp(x_test).mean
        mean, _ = dense_posterior(whole[:20, :20], whole[20:, :20], whole[20:, 20:], y, 0.1)
        torch.testing.assert_close(found, mean, rtol=1e-4, atol=1e-5)


def test_a_sum_is_evaluated_to_ours_and_learns():
    x, y = data()
    kernel = NTKKernel(network(), outputscale=0.7).double() + RBFKernel().double() + RBFKernel().double()
    assert isinstance(kernel, NTKSumKernel) and len(kernel.kernels) == 3
    assert isinstance(kernel(x).add_jitter(0.1), RidgeOperator)
    torch.testing.assert_close(kernel(x, x, diag=True), kernel(x).to_dense().diagonal())
    gp, likelihood = fitted(kernel, x, y)
    gp.train()
    gpytorch.mlls.ExactMarginalLogLikelihood(likelihood, gp)(gp(x), y).backward()
    assert all(float(p.grad.abs().max()) > 0 for p in kernel.parameters())


def test_a_sum_that_begins_elsewhere_refuses_to_be_solved_loosely():
    x, y = data()
    gp, _ = fitted(RBFKernel().double() + NTKKernel(network()), x, y)
    gp.eval()
    with linear_operator.settings.max_cholesky_size(5), pytest.raises(UnsupportedOperationError):
        _ = gp(x[:3]).mean


def test_bad_input_is_told():
    for value in (0.0, -1.0, float("nan"), "one"):
        with pytest.raises(InputError, match="outputscale="):
            NTKKernel(network(), outputscale=value)
    kernel = NTKKernel(network())
    assert kernel.outputscale is None
    with pytest.raises(InputError, match="no scale"):
        kernel.outputscale = 1.0
