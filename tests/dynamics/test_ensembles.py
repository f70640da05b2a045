"""Ensembles against dense formulas and against networks that are drawn and trained one by one."""

import math

import pytest
import torch
from torch import nn

import ntkops
from ntkops.errors import InputError, ShapeError, UnsupportedOperationError

from .reference import flow, jacobian, network


@pytest.fixture(scope="module")
def setting():
    generator = torch.Generator().manual_seed(5)
    model = network()
    x, x_new = (torch.randn(n, 3, generator=generator, dtype=torch.float64) for n in (6, 3))
    Y = torch.randn(6, 2, generator=generator, dtype=torch.float64)
    return model, x, x_new, Y


def dense_ensemble(K, cross, prior, Y, t):
    """Mean and covariance from B = K_* q(K), column by column."""
    trained = torch.stack([flow(K, column, t)[1] for column in torch.eye(len(K)).double()], dim=1)
    response = cross @ trained
    whole = torch.cat([torch.eye(len(cross)).double(), -response], dim=1)
    return response @ Y, whole @ prior @ whole.T


@pytest.mark.parametrize("lazy", [True, False])
def test_ntk_gp(setting, lazy):
    model, x, x_new, Y = setting
    options = {"max_dense_bytes": 0} if lazy else {}
    K = ntkops.ntk(model, x, **options)
    variances = torch.rand(K.num_parameters, generator=torch.Generator().manual_seed(0)).double()
    prior = ntkops.sandwich(ntkops.jacobian(model, torch.cat([x_new, x]), **options), variances)
    path = ntkops.gradient_flow(K, Y, [2.0, 20.0], tol=1e-11)
    assert path.info.method == ("krylov" if lazy else "eigh")
    found = path.ensemble(prior, K.cross(x_new))
    J, J_new = jacobian(model, x), jacobian(model, x_new)
    both = torch.cat([J_new, J])
    for place, t in enumerate((2.0, 20.0)):
        mean, covariance = dense_ensemble(J @ J.T, J_new @ J.T, (both * variances) @ both.T, Y.reshape(-1), t)
        torch.testing.assert_close(found.mean[place].reshape(-1), mean, rtol=0, atol=1e-9)
        torch.testing.assert_close(
            found.variance()[place].reshape(-1), covariance.diagonal(), rtol=0, atol=1e-9
        )
        operator = found.covariance(t)
        vector = torch.arange(6).double()
        torch.testing.assert_close(operator @ vector, covariance @ vector, rtol=0, atol=1e-8)
    drawn = found.sample(400, generator=torch.Generator().manual_seed(0))
    assert drawn.shape == (400, 2, 3, 2)
    spread = drawn[:, 1].reshape(400, 6)
    scores = (spread.mean(0) - mean) / (covariance.diagonal() / 400).sqrt()
    assert scores.abs().max() < 4
    assert (torch.cov(spread.T) - covariance).norm() < 0.25 * covariance.norm()


def test_a_sample_is_a_member_that_is_trained(setting):
    model, x, x_new, Y = setting
    K = ntkops.ntk(model, x)
    J, J_new = jacobian(model, x), jacobian(model, x_new)
    prior = ntkops.sandwich(
        ntkops.jacobian(model, torch.cat([x_new, x])), torch.ones(K.num_parameters).double()
    )
    found = ntkops.gradient_flow(K, Y, [0.0, 3.0]).ensemble(prior, K.cross(x_new))
    path = found.sample(1, generator=torch.Generator().manual_seed(1))[0]
    z = torch.randn(K.num_parameters, 1, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    start, start_new = (J @ z).squeeze(), (J_new @ z).squeeze()
    _, dual = flow(J @ J.T, Y.reshape(-1) - start, 3.0)
    torch.testing.assert_close(path[0].reshape(-1), start_new, rtol=0, atol=1e-10)
    torch.testing.assert_close(path[1].reshape(-1), start_new + J_new @ J.T @ dual, rtol=0, atol=1e-9)


@pytest.mark.parametrize("outputs", ["each", 0])
def test_kernels_a_class_and_shared_ones(setting, outputs):
    model, x, x_new, Y = setting
    K = ntkops.ntk(model, x, outputs=outputs)
    prior = ntkops.ntk(model, torch.cat([x_new, x]), outputs=outputs)
    found = ntkops.gradient_flow(K, Y, [1.0, math.inf], weight_decay=0.1).ensemble(prior, K.cross(x_new))
    shape = (2, 3, 2) if outputs == "each" else (2, 3)
    assert found.variance().shape == shape and found.mean.shape == (2, 3, 2)
    assert found.sample(2, generator=torch.Generator().manual_seed(0)).shape == (2, 2, 3, 2)
    covariance = found.covariance(1.0).to_dense()
    diagonal = covariance.diagonal(dim1=-2, dim2=-1)
    torch.testing.assert_close(diagonal.mT if outputs == "each" else diagonal, found.variance()[0])


def test_what_is_no_ensemble_is_refused(setting):
    model, x, x_new, Y = setting
    K = ntkops.ntk(model, x)
    prior = ntkops.ntk(model, torch.cat([x_new, x]))
    with pytest.raises(InputError, match="offset=None"):
        ntkops.gradient_flow(K, Y, [1.0], offset="network").ensemble(prior, K.cross(x_new))
    path = ntkops.gradient_flow(K, Y, [1.0])
    with pytest.raises(ShapeError, match="new samples, then those of training"):
        path.ensemble(K, K.cross(x_new))
    with pytest.raises(InputError, match="none of the times"):
        path.ensemble(prior, K.cross(x_new)).covariance(2.0)
    with pytest.raises(InputError, match="count=0"):
        path.ensemble(prior, K.cross(x_new)).sample(0)
    entropy = ntkops.gradient_flow(K, torch.zeros(6).long(), [0.1], loss="cross_entropy", tol=1e-2)
    with pytest.raises(InputError, match="loss='mse'"):
        entropy.ensemble(prior, K.cross(x_new))


# the covariance over readouts


def test_nngp_is_the_covariance_over_readouts(setting):
    _, x, _, _ = setting
    for head in (nn.Linear(12, 2), nn.Linear(12, 2, bias=False)):
        model = nn.Sequential(nn.Linear(3, 12), nn.ReLU(), head).double()
        kernel = ntkops.nngp(model, x, model[2], weight_variance=1.5, bias_variance=0.2)
        features = model[:2](x).detach()
        expected = 1.5 / 12 * features @ features.T + (0.2 if head.bias is not None else 0.0)
        expected = torch.kron(expected, torch.eye(2).double())
        torch.testing.assert_close(kernel.to_dense(), expected, rtol=0, atol=1e-12)
        vector = torch.arange(12).double()
        torch.testing.assert_close(kernel @ vector, expected @ vector, rtol=0, atol=1e-10)


def test_a_head_that_is_no_readout_is_refused(setting):
    _, x, _, _ = setting
    model = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 4), nn.Tanh()).double()
    options = {"weight_variance": 1.0, "bias_variance": 1.0}
    with pytest.raises(InputError, match="not linear in the head"):
        ntkops.nngp(model, x, "2", **options)
    with pytest.raises(InputError, match="no layer of the model"):
        ntkops.nngp(model, x, "readout", **options)
    with pytest.raises(InputError, match="no weight matrix"):
        ntkops.nngp(model, x, "1", **options)
    with pytest.raises(InputError, match="weight_variance"):
        ntkops.nngp(model, x, "0", weight_variance=-1.0, bias_variance=0.0)


def test_outputs_that_share_no_kernel_are_several_networks(setting):
    model, x, _, Y = setting
    path = ntkops.gradient_flow(ntkops.ntk(model, x, outputs="each"), Y, [1.0], tol=1e-10)
    change = torch.cat([part.flatten(1) for part in path.weights(1.0).values()], dim=1)  # (O, P)
    J = ntkops.jacobian(model, x).to_dense().unflatten(0, Y.shape)
    torch.testing.assert_close(torch.einsum("nop,op->no", J, change), path.outputs[0])
    dense = ntkops.gradient_flow(ntkops.ntk(model, x).to_dense(), Y, [1.0])
    with pytest.raises(UnsupportedOperationError, match="does not know its Jacobian"):
        dense.weights(1.0)
