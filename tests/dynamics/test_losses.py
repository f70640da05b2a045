"""Flow under other losses against an implicit method, and bounds of its error."""

import math

import pytest
import torch

import ntkops
from ntkops.errors import InputError, NotConvergedError, OutOfRangeError

from .reference import entropy_flow, flow, jacobian, network

TIMES = [0.0, 0.5, 6.0]


@pytest.fixture(scope="module")
def setting():
    generator = torch.Generator().manual_seed(3)
    model = network(outputs=3)
    x, x_new = (torch.randn(n, 3, generator=generator, dtype=torch.float64) for n in (7, 4))
    classes = torch.randint(0, 3, (7,), generator=generator)
    return model, x, x_new, classes, jacobian(model, x)


@pytest.mark.parametrize("decay", [0.0, 0.02])
def test_cross_entropy_is_bounded_and_right(setting, decay):
    model, x, x_new, classes, J = setting
    K = ntkops.ntk(model, x)
    path = ntkops.gradient_flow(
        K, classes, TIMES, loss="cross_entropy", weight_decay=decay, offset="network", tol=1e-6
    )
    assert path.info.method == "ode" and path.info.converged and path.info.reason == ""
    y = torch.nn.functional.one_hot(classes, 3).double()
    for place, t in enumerate(TIMES[1:], start=1):
        expected = entropy_flow(J @ J.T, model(x).detach(), y, t, decay=decay)
        error = (path.outputs[place] - expected).norm()
        assert error <= path.bounds[place] + 1e-9
        loss = torch.nn.functional.cross_entropy(expected, classes)
        torch.testing.assert_close(path.losses[place], loss, rtol=1e-6, atol=0)
    change = torch.cat([part.reshape(-1) for part in path.weights(6.0).values()])
    assert (J @ change - (path.outputs[-1] - model(x).detach()).reshape(-1)).norm() <= 1e-9
    predicted = path.predict(K.cross(x_new))
    J_new = jacobian(model, x_new)
    expected = model(x_new).detach() + (J_new @ change).reshape(4, 3)
    torch.testing.assert_close(predicted[-1], expected, rtol=0, atol=1e-9)


def test_a_coarse_integration_is_within_its_bound(setting):
    model, x, _, classes, _ = setting
    K = ntkops.ntk(model, x)
    fine = ntkops.gradient_flow(K, classes, [3.0, 30.0], loss="cross_entropy", tol=1e-9)
    coarse = ntkops.gradient_flow(K, classes, [3.0, 30.0], loss="cross_entropy", tol=0.3)
    errors = (fine.outputs - coarse.outputs).flatten(1).norm(dim=1)
    assert (errors > 1e-10).all()
    assert (errors <= coarse.bounds + fine.bounds).all()
    assert coarse.info.products < fine.info.products


def test_a_function_of_one_sample_is_the_loss_of_that_name(setting):
    model, x, _, classes, J = setting
    K, y = ntkops.ntk(model, x), torch.nn.functional.one_hot(classes, 3).double()

    def squared(outputs, targets):
        return (outputs - targets).square().mean()

    own = ntkops.gradient_flow(K, y, TIMES, loss=squared, tol=1e-8)
    expected = y.reshape(-1) - flow(J @ J.T, y.reshape(-1), 6.0)[0]
    assert (own.outputs[-1].reshape(-1) - expected).norm() <= own.bounds[-1]
    assert own.info.converged


def test_a_loss_that_is_not_convex_has_no_bound(setting):
    model, x, _, classes, _ = setting
    K, y = ntkops.ntk(model, x), torch.nn.functional.one_hot(classes, 3).double()

    def saturating(outputs, targets):
        return -torch.exp(-(outputs - 3 * targets).square().sum() / 2)

    path = ntkops.gradient_flow(K, y, TIMES, loss=saturating)
    assert not path.info.converged and "not convex" in path.info.reason
    assert path.bounds.isinf().all() and path.weight_bounds.isinf().all()


def test_what_a_loss_does_not_take_is_refused(setting):
    model, x, _, classes, _ = setting
    K, y = ntkops.ntk(model, x), torch.nn.functional.one_hot(classes, 3).double()
    with pytest.raises(InputError, match="t = ∞ with loss='cross_entropy'"):
        ntkops.gradient_flow(K, classes, [1.0, math.inf], loss="cross_entropy")
    with pytest.raises(InputError, match="t = ∞ with a loss of your own"):
        ntkops.gradient_flow(K, y, [math.inf], loss=lambda f, t: (f - t).abs().sum())
    with pytest.raises(InputError, match="loss='hinge'"):
        ntkops.gradient_flow(K, y, [1.0], loss="hinge")
    with pytest.raises(InputError, match="probabilities"):
        ntkops.gradient_flow(K, 2 * y, [1.0], loss="cross_entropy")
    with pytest.raises(OutOfRangeError, match="classes go from 0 to 2"):
        ntkops.gradient_flow(K, classes + 1, [1.0], loss="cross_entropy")
    with pytest.raises(InputError, match="how many classes"):
        ntkops.gradient_flow(ntkops.ntk(model, x, outputs=0), classes, [1.0], loss="cross_entropy")
    with pytest.raises(InputError, match="single number"):
        ntkops.gradient_flow(K, y, [1.0], loss=lambda f, t: (f - t).square())
    with pytest.raises(InputError, match="method='krylov'"):
        ntkops.gradient_flow(K, y, [1.0], loss="cross_entropy", method="krylov")
    with pytest.raises(NotConvergedError, match="max_products=40"):
        ntkops.gradient_flow(K, classes, [100.0], loss="cross_entropy", max_products=40)
    for name in ("each", "shared"):
        kernel = ntkops.ntk(model, x, outputs="each" if name == "each" else 0)
        path = ntkops.gradient_flow(kernel, y, [1.0], loss="cross_entropy")
        assert path.outputs.shape == (1, 7, 3) and path.info.converged
