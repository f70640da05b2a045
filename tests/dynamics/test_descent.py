"""Descent against torch's optimizer on the linear model, and learning rates at which it diverges."""

import pytest
import torch

import ntkops
from ntkops.errors import InputError, ZeroKernelError
from tests.pairs import pairs

from .reference import descent, spectrum

STEPS = [0, 1, 7, 150]


# Shares of the largest rate below and above the one where factors change their sign.
@pytest.mark.parametrize(
    "method, momentum, decay, share", pairs(["eigh", "krylov"], [0.0, 0.5, 0.9], [0.0, 0.01], [0.3, 0.98])
)
def test_steps_are_those_of_the_optimizer(method, momentum, decay, share):
    generator = torch.Generator().manual_seed(2)
    J = torch.randn(30, 40, generator=generator, dtype=torch.float64) * torch.logspace(0, -2, 40)
    Y = torch.randn(30, generator=generator, dtype=torch.float64)
    K = J @ J.T
    largest = torch.linalg.eigvalsh(K)[-1]
    lr = share * 2 * (1 + momentum) / (2 / 30 * float(largest) + decay)
    path = ntkops.gradient_descent(
        K, Y, STEPS, lr=lr, momentum=momentum, weight_decay=decay, method=method, tol=1e-7
    )
    assert path.info.converged
    for place, steps in enumerate(STEPS):
        rest, weights = descent(J, Y, steps, lr=lr, momentum=momentum, decay=decay)
        assert (path.outputs[place] - (Y - rest)).norm() <= path.bounds[place]
        assert (J.T @ path.dual[place] - weights).norm() <= path.weight_bounds[place]
        torch.testing.assert_close(path.losses[place], rest.square().mean(), rtol=1e-5, atol=1e-12)


def test_descent_is_no_flow():
    K = torch.eye(3).double()
    Y = torch.ones(3).double()
    steps = ntkops.gradient_descent(K, Y, [10], lr=0.3)
    flow = ntkops.gradient_flow(K, Y, [10.0], lr=0.3)
    torch.testing.assert_close(steps.outputs, (1 - (1 - 0.2) ** 10) * Y.unsqueeze(0))
    assert (steps.outputs - flow.outputs).abs().max() > 1e-3


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_rates_that_diverge_are_refused_with_the_limit(momentum):
    K = spectrum(torch.tensor([4.0, 1.0, 0.1, 0.01], dtype=torch.float64))
    Y = torch.ones(4, 2, dtype=torch.float64)
    limit = (1 + momentum) * 8 / 4.0  # n counts both targets
    assert float(ntkops.max_learning_rate(K, momentum=momentum, num_targets=2)) == pytest.approx(limit)
    path = ntkops.gradient_descent(K, Y, [100], lr=0.999 * limit, momentum=momentum)
    assert path.losses[-1] < 1
    with pytest.raises(InputError, match=f"{limit:.6g}"):
        ntkops.gradient_descent(K, Y, [100], lr=1.001 * limit, momentum=momentum)


def test_the_rate_for_cross_entropy_is_enough():
    K = spectrum(torch.tensor([5.0, 1.0, 0.5, 0.2, 0.1, 0.01], dtype=torch.float64))
    rate = float(ntkops.max_learning_rate(K, "cross_entropy", num_targets=2))
    assert rate == pytest.approx(4 * 3 / 5.0)
    classes = torch.tensor([0, 1, 0])
    dual = torch.zeros(6, dtype=torch.float64)
    before = float("inf")
    for _ in range(200):
        outputs = (K @ dual).reshape(3, 2).requires_grad_()
        loss = torch.nn.functional.cross_entropy(outputs, classes)
        assert loss.item() <= before + 1e-12
        before = loss.item()
        dual = dual - rate * torch.autograd.grad(loss, outputs)[0].reshape(-1)


def test_the_rate_is_an_estimate_with_an_interval():
    K = spectrum(torch.logspace(0, -3, 40, dtype=torch.float64))
    found = ntkops.max_learning_rate(K)
    assert float(found.interval[0]) <= 40.0 <= float(found.interval[1]) * (1 + 1e-12)
    each = torch.stack([K, 3 * K])
    assert float(ntkops.max_learning_rate(each)) == pytest.approx(80 / 3)
    with pytest.raises(ZeroKernelError):
        ntkops.max_learning_rate(torch.zeros(3, 3))
