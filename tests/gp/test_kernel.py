"""`NTKKernel` inside gpytorch, against dense Gaussian process formulas."""

import copy
import subprocess
import sys
import warnings

import gpytorch
import linear_operator
import pytest
import torch
from gpytorch.kernels import InducingPointKernel, RBFKernel, ScaleKernel

import ntkops
from ntkops.errors import InputError, ShapeError, UnsupportedOperationError
from ntkops.gp import NTKKernel

pytestmark = pytest.mark.filterwarnings("ignore::gpytorch.utils.warnings.GPInputWarning")


def network(outputs=1, inputs=3):
    torch.manual_seed(0)
    return torch.nn.Sequential(
        torch.nn.Linear(inputs, 12), torch.nn.Tanh(), torch.nn.Linear(12, outputs)
    ).double()


def data(n=20, inputs=3, seed=1):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, inputs, generator=generator, dtype=torch.float64)
    return x, torch.sin(x[:, 0]) + 0.1 * torch.randn(n, generator=generator, dtype=torch.float64)


class Regression(gpytorch.models.ExactGP):
    def __init__(self, x, y, kernel, likelihood, batch=()):
        super().__init__(x, y, likelihood)
        self.mean_module = gpytorch.means.ZeroMean(batch_shape=torch.Size(batch))
        self.covar_module = kernel

    def forward(self, x):
        return gpytorch.distributions.MultivariateNormal(self.mean_module(x), self.covar_module(x))


def fitted(kernel, x, y, noise=0.1, batch=()):
    likelihood = gpytorch.likelihoods.GaussianLikelihood(batch_shape=torch.Size(batch)).double()
    likelihood.noise = noise
    return Regression(x, y, kernel, likelihood, batch), likelihood


def dense_posterior(K, K_star, K_test, y, noise):
    A = K + noise * torch.eye(len(K), dtype=K.dtype)
    mean = K_star @ torch.linalg.solve(A, y)
    return mean, K_test - K_star @ torch.linalg.solve(A, K_star.T)


def test_posterior_mean_and_covariance_are_those_of_the_dense_formulas():
    model, (x, y), (x_test, _) = network(), data(), data(7, seed=2)
    gp, _ = fitted(NTKKernel(model), x, y)
    gp.eval()
    posterior = gp(x_test)
    K = ntkops.ntk(model, x)
    mean, covariance = dense_posterior(
        K.to_dense(), K.cross(x_test).to_dense(), ntkops.ntk(model, x_test).to_dense(), y, 0.1
    )
    torch.testing.assert_close(posterior.mean, mean, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(posterior.covariance_matrix, covariance, rtol=1e-8, atol=1e-9)
    torch.testing.assert_close(posterior.variance, covariance.diagonal(), rtol=1e-8, atol=1e-9)


def marginal_likelihood(gp, likelihood, x, y):
    gp.train()
    likelihood.train()
    return gpytorch.mlls.ExactMarginalLogLikelihood(likelihood, gp)(gp(x), y)


def test_the_marginal_likelihood_and_its_gradients_are_exact():
    model, (x, y) = network(), data()
    kernel = NTKKernel(model, differentiable=True)
    gp, likelihood = fitted(kernel, x, y)
    found = marginal_likelihood(gp, likelihood, x, y)
    parameters = [*kernel.network_parameters(), likelihood.raw_noise]
    assert [id(p) for p in parameters[:-1]] == [id(p) for p in model.parameters()]

    A = ntkops.ntk(model, x, differentiable=True).to_dense() + likelihood.noise * torch.eye(20)
    dense = torch.distributions.MultivariateNormal(torch.zeros(20, dtype=torch.float64), A)
    expected = dense.log_prob(y) / 20
    torch.testing.assert_close(found, expected)
    # the bias of the last layer has no influence on the kernel
    for left, right in zip(
        torch.autograd.grad(found, parameters, allow_unused=True),
        torch.autograd.grad(expected, parameters, allow_unused=True),
        strict=True,
    ):
        left = torch.zeros_like(right) if left is None and right is not None else left
        assert left is right or torch.allclose(left, right if right is not None else left * 0, rtol=1e-7)


def test_training_through_the_marginal_likelihood_follows_the_live_network():
    model, (x, y) = network(), data()
    kernel = NTKKernel(model, differentiable=True)
    gp, likelihood = fitted(kernel, x, y)
    optimiser = torch.optim.Adam([*kernel.network_parameters(), *likelihood.parameters()], lr=0.02)
    losses = []
    for _ in range(5):
        optimiser.zero_grad()
        loss = -marginal_likelihood(gp, likelihood, x, y)
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


def test_a_snapshot_has_no_parameters_and_stays_what_it_was():
    model, (x, _) = network(), data()
    kernel = NTKKernel(model)
    before = kernel(x).to_dense()
    with torch.no_grad():
        model[0].weight.add_(1.0)
    torch.testing.assert_close(kernel(x).to_dense(), before)
    assert not list(kernel.parameters())
    kernel.float()
    assert model[0].weight.dtype == torch.float64
    with pytest.raises(UnsupportedOperationError, match="differentiable=True"):
        list(kernel.network_parameters())


def test_one_process_for_each_output():
    model, (x, _), (x_test, _) = network(outputs=3), data(), data(6, seed=4)
    y = torch.randn(3, 20, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    kernel = NTKKernel(model, outputs="each", num_outputs=3)
    batch = torch.Size([3])
    for inputs in (x, x.expand(3, 20, 3), x.repeat(3, 1, 1)):
        gp, likelihood = fitted(kernel, inputs, y, batch=batch)
        gp.eval()
        test = x_test if inputs.dim() == 2 else x_test.expand(3, 6, 3)
        posterior = gp(test)
        K = ntkops.ntk(model, x, outputs="each")
        for c in range(3):
            mean, covariance = dense_posterior(
                K.to_dense()[c], K.cross(x_test).to_dense()[c],
                ntkops.ntk(model, x_test, outputs=c).to_dense(), y[c], likelihood.noise[c].item(),
            )  # fmt: skip
            torch.testing.assert_close(posterior.mean[c], mean, rtol=1e-8, atol=1e-9)
            torch.testing.assert_close(posterior.covariance_matrix[c], covariance, rtol=1e-8, atol=1e-9)


def test_all_outputs_jointly_as_a_multitask_process():
    model, (x, _), (x_test, _) = network(outputs=2), data(10), data(4, seed=4)
    y = torch.randn(10, 2, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    kernel = NTKKernel(model, outputs="all", num_outputs=2)

    class Joint(gpytorch.models.ExactGP):
        def __init__(self, likelihood):
            super().__init__(x, y, likelihood)
            self.kernel = kernel

        def forward(self, x):
            mean = torch.zeros(len(x), 2, dtype=torch.float64)
            return gpytorch.distributions.MultitaskMultivariateNormal(mean, self.kernel(x))

    likelihood = gpytorch.likelihoods.MultitaskGaussianLikelihood(num_tasks=2, rank=0).double()
    gp = Joint(likelihood)
    gp.eval()
    noise = likelihood.noise.item() + likelihood.task_noises.detach()
    K = ntkops.ntk(model, x)
    A = K.to_dense() + torch.diag(noise.repeat(10))
    mean = K.cross(x_test).to_dense() @ torch.linalg.solve(A, y.reshape(-1))
    torch.testing.assert_close(gp(x_test).mean, mean.reshape(4, 2), rtol=1e-8, atol=1e-9)


def test_indexing_a_batch_keeps_the_network_and_takes_the_outputs():
    model, (x, _) = network(outputs=4), data(8)
    kernel = NTKKernel(model, outputs="each", num_outputs=4)
    whole = kernel(x).to_dense()
    one, some = kernel[2], kernel[1:3]
    assert one.batch_shape == torch.Size() and some.batch_shape == torch.Size([2])
    torch.testing.assert_close(one(x).to_dense(), whole[2])
    torch.testing.assert_close(some(x).to_dense(), whole[1:3])
    torch.testing.assert_close(some[1](x, x[:3]).to_dense(), whole[2][:, :3])
    torch.testing.assert_close(some(x, diag=True), whole[1:3].diagonal(dim1=-2, dim2=-1))
    with pytest.raises(ShapeError, match="takes no index"):
        one[0]
    twin = copy.deepcopy(kernel)
    assert twin._network is kernel._network
    torch.testing.assert_close(twin(x).to_dense(), whole)


def test_images_go_in_flattened():
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Conv2d(1, 3, 3), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(12, 1)
    ).double()
    images = torch.randn(6, 1, 4, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    kernel = NTKKernel(model, input_shape=(1, 4, 4))
    torch.testing.assert_close(kernel(images.flatten(1)).to_dense(), ntkops.ntk(model, images).to_dense())
    with pytest.raises(ShapeError, match="input_shape"):
        kernel(images)
    with pytest.raises(ShapeError, match="16 columns, the data have 5"):
        kernel(torch.randn(6, 5, dtype=torch.float64))


def test_pairs_and_single_columns():
    model, (x, _), (z, _) = network(), data(5), data(5, seed=3)
    kernel = NTKKernel(model)
    dense = kernel(x, z).to_dense()
    torch.testing.assert_close(kernel(x, z, diag=True), dense.diagonal())
    torch.testing.assert_close(kernel(x, diag=True), kernel(x).to_dense().diagonal())
    narrow = NTKKernel(network(inputs=1))
    assert narrow(x[:, 0]).shape == (5, 5)
    part = NTKKernel(network(inputs=2), active_dims=(0, 2))
    torch.testing.assert_close(part(x).to_dense(), NTKKernel(network(inputs=2))(x[:, [0, 2]]).to_dense())


def test_scaled_and_added_kernels_are_exact_while_gpytorch_is():
    model, (x, y), (x_test, _) = network(), data(), data(7, seed=2)
    scaled = ScaleKernel(NTKKernel(model)).double()
    scaled.outputscale = 0.3
    rbf = RBFKernel().double()
    R, R_star = rbf(x).to_dense(), rbf(x_test, x).to_dense()
    K, K_star = ntkops.ntk(model, x), ntkops.ntk(model, x).cross(x_test)
    for kernel, train, cross in (
        (scaled, 0.3 * K.to_dense(), 0.3 * K_star.to_dense()),
        (NTKKernel(model) + rbf, K.to_dense() + R, K_star.to_dense() + R_star),
        (NTKKernel(model) * rbf, K.to_dense() * R, K_star.to_dense() * R_star),
    ):
        gp, _ = fitted(kernel, x, y)
        gp.eval()
        mean = cross @ torch.linalg.solve(train + 0.1 * torch.eye(20, dtype=torch.float64), y)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = gp(x_test).mean
        torch.testing.assert_close(found, mean, rtol=1e-7, atol=1e-8)


def test_inside_another_kernel_nothing_is_solved_loosely():
    x, y = data(30)
    gp, _ = fitted(ScaleKernel(NTKKernel(network())).double(), x, y)
    gp.eval()
    with (
        linear_operator.settings.max_cholesky_size(20),
        pytest.raises(UnsupportedOperationError, match="loosely converged"),
    ):
        gp(x[:4]).mean  # noqa: B018


def test_used_directly_the_size_of_gpytorchs_cholesky_does_not_matter():
    model, (x, y), (x_test, _) = network(), data(30), data(5, seed=2)
    gp, _ = fitted(NTKKernel(model), x, y)
    gp.eval()
    K = ntkops.ntk(model, x)
    mean, _ = dense_posterior(
        K.to_dense(), K.cross(x_test).to_dense(), ntkops.ntk(model, x_test).to_dense(), y, 0.1
    )
    with linear_operator.settings.max_cholesky_size(2), gpytorch.settings.max_eager_kernel_size(1):
        torch.testing.assert_close(gp(x_test).mean, mean, rtol=1e-8, atol=1e-9)


def test_inducing_points_learn_through_the_kernel():
    model, (x, y) = network(), data(25)
    likelihood = gpytorch.likelihoods.GaussianLikelihood().double()
    kernel = InducingPointKernel(NTKKernel(model), x[:6].clone(), likelihood).double()
    gp = Regression(x, y, kernel, likelihood)
    loss = -marginal_likelihood(gp, likelihood, x, y)
    (gradient,) = torch.autograd.grad(loss, [kernel.inducing_points])

    def objective(step):
        with torch.no_grad():
            kernel.inducing_points.add_(step)
            value = -marginal_likelihood(gp, likelihood, x, y)
            kernel.inducing_points.sub_(step)
        return float(value)

    direction = torch.randn(6, 3, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    slope = (objective(1e-5 * direction) - objective(-1e-5 * direction)) / 2e-5
    assert float((gradient * direction).sum()) == pytest.approx(slope, rel=1e-4)
    gp.eval()
    likelihood.eval()
    assert torch.isfinite(gp(x[:3]).mean).all()


def test_what_is_wrong_is_said():
    with pytest.raises(InputError, match="num_outputs="):
        NTKKernel(network(outputs=3), outputs="each")
    with pytest.raises(ShapeError, match="3 outputs a sample, num_outputs=2"):
        NTKKernel(network(outputs=3), outputs="each", num_outputs=2)(data()[0])


def test_without_gpytorch_the_message_names_the_extra():
    script = (
        "import sys; sys.modules['gpytorch'] = None\n"
        "import ntkops.errors\n"
        "try:\n    import ntkops.gp\n"
        "except ntkops.errors.MissingDependencyError as e:\n    print(e)\n"
    )
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", script], capture_output=True, text=True)
    assert "pip install 'gpytorch>=1.14'" in done.stdout, done.stderr
