"""`NTKKernel` on batches of different sets of samples, and BoTorch's acquisition functions on it."""

import gpytorch
import linear_operator
import pytest
import torch

from ntkops.errors import DenseMemoryError, ShapeError, UnsupportedOperationError
from ntkops.gp import NTKKernel
from tests.gp.test_kernel import Regression, data, dense_posterior, fitted, network

pytestmark = pytest.mark.filterwarnings("ignore::gpytorch.utils.warnings.GPInputWarning")


def jacobian(model, x):
    """J (n, C, P), differentiable in x."""
    params = {name: p.detach() for name, p in model.named_parameters()}

    def one(sample):
        return torch.func.jacrev(lambda p: torch.func.functional_call(model, p, (sample[None],))[0])(params)

    return torch.cat([block.flatten(2) for block in torch.vmap(one)(x).values()], dim=2)


def reference(model, x1, x2, outputs):
    """Covariance of two sets by plain differentiation."""
    one, two = jacobian(model, x1), jacobian(model, x2)
    if outputs == "each":
        return torch.einsum("ncp,mcp->cnm", one, two)
    if outputs == "all":
        return one.flatten(0, 1) @ two.flatten(0, 1).mT
    return torch.einsum("ncp,mcp->nm", one, two)


def sets(*batch, n=4, seed=3):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*batch, n, 3, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("outputs", ["trace", "all"])
@pytest.mark.parametrize("batch", [(2,), (2, 3)])
def test_each_set_has_its_own_covariance(outputs, batch):
    model = network(outputs=2)
    kernel = NTKKernel(model, outputs=outputs, num_outputs=2, outputscale=1.5).double()
    x1, x2 = sets(*batch), sets(*batch, n=5, seed=4)
    x1[-1] = x2[..., :4, :][0]  # samples that occur twice
    for second in (None, x2):
        found = kernel(x1, second)
        other = x1 if second is None else second
        pairs = zip(x1.flatten(0, -3), other.flatten(0, -3), strict=True)
        truth = torch.stack([1.5 * reference(model, one, two, outputs) for one, two in pairs])
        assert found.shape[: len(batch)] == batch
        torch.testing.assert_close(found.to_dense().flatten(0, -3), truth)
    whole = kernel(x1).to_dense().diagonal(dim1=-2, dim2=-1)
    torch.testing.assert_close(kernel(x1, diag=True), whole)
    crossed = kernel(x1, x2[..., :4, :]).to_dense().diagonal(dim1=-2, dim2=-1)
    torch.testing.assert_close(kernel(x1, x2[..., :4, :], diag=True), crossed)


def test_one_set_beside_a_batch():
    model, kernel, one, many = network(), NTKKernel(network()), sets(), sets(2)
    for x1, x2 in ((one, many), (many, one)):
        left, right = (x.expand(2, 4, 3) for x in (x1, x2))
        truth = torch.stack([reference(model, a, b, "trace") for a, b in zip(left, right, strict=True)])
        torch.testing.assert_close(kernel(x1, x2).to_dense(), truth)


def test_one_kernel_for_each_output():
    model = network(outputs=2)
    kernel = NTKKernel(model, outputs="each", num_outputs=2, outputscale=1.0).double()
    kernel.outputscale = torch.tensor([1.0, 3.0])
    x = sets(3)
    truth = torch.stack([reference(model, one, one, "each") for one in x])
    truth = truth * torch.tensor([1.0, 3.0]).double()[:, None, None]
    torch.testing.assert_close(kernel(x.unsqueeze(1)).to_dense(), truth)
    torch.testing.assert_close(kernel(x.unsqueeze(1), diag=True), truth.diagonal(dim1=-2, dim2=-1))
    torch.testing.assert_close(kernel(x[:2]).to_dense(), torch.stack([truth[0, 0], truth[1, 1]]))
    torch.testing.assert_close(kernel[1](x).to_dense(), truth[:, 1])
    with pytest.raises(ShapeError, match="does not broadcast"):
        kernel(x)


def test_derivatives_flow_to_each_sample():
    # Also where two samples are equal by chance: each has a derivative of its own.
    model = network()
    weights = sets(2, n=4)[..., :1] * sets(2, n=4, seed=8)[..., :1].mT
    gradients = []
    for evaluate in (
        lambda x: NTKKernel(model)(x).to_dense(),
        lambda x: torch.stack([reference(model, one, one, "trace") for one in x]),
    ):
        x = sets(2)
        x[1, 2] = x[0, 0]
        x = x.requires_grad_()
        (gradient,) = torch.autograd.grad((weights * evaluate(x)).sum(), x)
        gradients.append(gradient)
    torch.testing.assert_close(gradients[0], gradients[1])


def test_a_live_network_is_followed():
    model = network()
    kernel = NTKKernel(model, differentiable=True)
    kernel(sets(2)).to_dense().sum().backward()
    found = [p.grad.clone() for p in list(model.parameters())[:3]]  # the last bias has no part in K
    model.zero_grad()
    sum(kernel(one).to_dense().sum() for one in sets(2)).backward()
    torch.testing.assert_close(found, [p.grad for p in list(model.parameters())[:3]])


def test_images_come_flattened():
    model = torch.nn.Sequential(torch.nn.Conv2d(1, 2, 2), torch.nn.Flatten(), torch.nn.Linear(8, 1)).double()
    kernel = NTKKernel(model, input_shape=(1, 3, 3))
    x = torch.randn(2, 4, 9, dtype=torch.float64)
    truth = torch.stack([kernel(one).to_dense() for one in x])
    torch.testing.assert_close(kernel(x).to_dense(), truth)


def test_a_posterior_at_a_batch_of_candidates():
    model, (x, y), candidates = network(), data(), sets(5, n=2)
    gp, _ = fitted(NTKKernel(model), x, y)
    gp.eval()
    posterior = gp(candidates)
    K = NTKKernel(model)(x).to_dense()
    for place, some in enumerate(candidates):
        mean, covariance = dense_posterior(
            K, reference(model, some, x, "trace"), reference(model, some, some, "trace"), y, 0.1
        )
        torch.testing.assert_close(posterior.mean[place], mean)
        torch.testing.assert_close(posterior.covariance_matrix[place], covariance, rtol=1e-6, atol=1e-8)


def test_what_is_wrong_is_said():
    kernel = NTKKernel(network())
    with pytest.raises(ShapeError, match="do not broadcast"):
        kernel(sets(2), sets(3))
    with pytest.raises(DenseMemoryError, match="max_dense_bytes"):
        NTKKernel(network(), max_dense_bytes=100)(sets(2))
    with (
        linear_operator.settings.max_cholesky_size(3),
        pytest.raises(UnsupportedOperationError, match="exact"),
    ):
        kernel(sets(2))


class TestBoTorch:
    """Expected improvement and friends take candidates of shape (b, q, d)."""

    @pytest.fixture
    def model(self):
        pytest.importorskip("botorch")
        from botorch.models.gpytorch import GPyTorchModel

        class Surrogate(Regression, GPyTorchModel):
            num_outputs = _num_outputs = 1

        (x, y), likelihood = data(12), gpytorch.likelihoods.GaussianLikelihood().double()
        likelihood.noise = 0.05
        return Surrogate(x, y, NTKKernel(network()), likelihood).eval()

    @pytest.mark.filterwarnings("ignore")
    def test_acquisition_functions(self, model):
        from botorch.acquisition import LogExpectedImprovement, qLogExpectedImprovement
        from botorch.optim import optimize_acqf
        from botorch.sampling import SobolQMCNormalSampler

        best = float(model.train_targets.max())
        single = LogExpectedImprovement(model, best_f=best)
        candidates = sets(6, n=1).requires_grad_()
        values = single(candidates)
        with torch.no_grad():
            posteriors = [model(some) for some in candidates]
        alone = torch.stack([single(some[None])[0] for some in candidates])
        assert values.shape == (6,) and len(posteriors) == 6
        torch.testing.assert_close(values, alone)
        (gradient,) = torch.autograd.grad(values.sum(), candidates)
        step = torch.zeros_like(candidates).index_fill(0, torch.tensor([2]), 1e-5).detach()
        with torch.no_grad():
            slope = float((single(candidates + step) - single(candidates - step)).sum() / 2e-5)
        assert float(gradient[2].sum()) == pytest.approx(slope, rel=1e-3, abs=1e-6)
        bounds = torch.tensor([[-2.0] * 3, [2.0] * 3]).double()
        sampler = SobolQMCNormalSampler(torch.Size([32]), seed=0)
        found, value = optimize_acqf(
            qLogExpectedImprovement(model, best_f=best, sampler=sampler),
            bounds,
            q=2,
            num_restarts=3,
            raw_samples=8,
            options={"maxiter": 5, "seed": 0},
        )
        assert found.shape == (2, 3) and bool(torch.isfinite(value))
