"""Gradient flow under the squared error against matrix exponentials and against the weights themselves."""

import math

import pytest
import torch
from linear_operator.operators import DenseLinearOperator

import ntkops
from ntkops.dynamics import _linear

from .reference import flow, jacobian, network, spectrum

TIMES = [0.0, 0.3, 5.0, 200.0]
METHODS = pytest.mark.parametrize("method", ["eigh", "krylov"])


@pytest.fixture(scope="module")
def setting():
    generator = torch.Generator().manual_seed(1)
    model = network()
    x, x_new = (torch.randn(n, 3, generator=generator, dtype=torch.float64) for n in (9, 4))
    Y = torch.randn(9, 2, generator=generator, dtype=torch.float64)
    return model, x, x_new, Y, jacobian(model, x), jacobian(model, x_new)


@METHODS
@pytest.mark.parametrize("decay", [0.0, 0.03])
@pytest.mark.parametrize("lr", [1.0, 0.4])
def test_outputs_weights_and_predictions_are_those_of_the_linear_model(setting, method, decay, lr):
    model, x, x_new, Y, J, J_new = setting
    K = ntkops.ntk(model, x)
    path = ntkops.gradient_flow(
        K, Y, TIMES, lr=lr, weight_decay=decay, offset="network", method=method, tol=1e-9
    )
    assert path.info.method == method and path.info.converged
    start, start_new = model(x).detach(), model(x_new).detach()
    predicted = path.predict(K.cross(x_new))
    room = path.test_bound(J_new.square().sum(1))
    for place, t in enumerate(TIMES):
        rest, dual = flow(J @ J.T, (Y - start).reshape(-1), t, lr=lr, decay=decay)
        error = (path.outputs[place].reshape(-1) - (Y.reshape(-1) - rest)).norm()
        assert error <= path.bounds[place] and path.bounds[place] <= 1e-9 * (Y - start).norm()
        change = torch.cat([part.reshape(-1) for part in path.weights(t).values()])
        assert (change - J.T @ dual).norm() <= path.weight_bounds[place] + 1e-14
        torch.testing.assert_close(path.losses[place], rest.square().mean(), rtol=1e-7, atol=1e-14)
        expected = start_new + (J_new @ J.T @ dual).reshape(4, 2)
        assert ((predicted[place] - expected).abs() <= room[place] + 1e-13).all()
    names = dict(model.named_parameters())
    assert {n: p.shape for n, p in path.weights(5.0).items()} == {n: p.shape for n, p in names.items()}


@METHODS
@pytest.mark.parametrize("kind", ["each", "shared", "flat", "vector"])
def test_kernels_of_every_kind_train_each_target(setting, method, kind):
    model, x, x_new, Y, J, _ = setting
    outputs = {"each": "each", "shared": 0, "flat": "all", "vector": 1}[kind]
    K = ntkops.ntk(model, x, outputs=outputs)
    labels = Y[:, 1] if kind == "vector" else Y
    path = ntkops.gradient_flow(K, labels, [4.0], method=method, tol=1e-10)
    assert path.outputs.shape == (1, *labels.shape) and path.dual.shape == (1, *labels.shape)
    assert path.predict(K.cross(x_new)).shape == (1, 4, *labels.shape[1:])
    dense = K.to_dense()
    if kind == "flat":
        rest, _ = flow(dense, Y.reshape(-1), 4.0)
        expected = Y - rest.reshape(9, 2)
    else:  # torch's mean is over all labels
        columns = labels.reshape(9, -1)
        found = []
        for c in range(columns.shape[1]):
            one = dense[c] if kind == "each" else dense
            found.append(columns[:, c] - flow(one, columns[:, c], 4.0 / columns.shape[1])[0])
        expected = torch.stack(found, dim=1).reshape(labels.shape)
    torch.testing.assert_close(path.outputs[0], expected, rtol=0, atol=1e-9)
    assert (path.outputs[0] - expected).norm() <= path.bounds[0]


@METHODS
def test_the_limit_is_the_fit_of_least_norm(setting, method):
    model, x, x_new, Y, J, J_new = setting
    K = ntkops.ntk(model, x)
    path = ntkops.gradient_flow(K, Y, [1.0, math.inf], method=method, tol=1e-8)
    least = torch.linalg.pinv(J) @ Y.reshape(-1)
    change = torch.cat([part.reshape(-1) for part in path.weights(math.inf).values()])
    assert (change - least).norm() <= 1e-7 * least.norm()
    torch.testing.assert_close(path.outputs[1], (J @ least).reshape(9, 2), rtol=0, atol=1e-9)
    torch.testing.assert_close(
        path.predict(K.cross(x_new))[1], (J_new @ least).reshape(4, 2), rtol=0, atol=1e-7
    )


@METHODS
def test_the_limit_on_a_singular_kernel_stands_still_where_the_dual_grows(method):
    generator = torch.Generator().manual_seed(0)
    model = torch.nn.Linear(2, 1).double()  # 3 weights for 8 samples
    x = torch.randn(8, 2, generator=generator, dtype=torch.float64)
    Y = torch.randn(8, 1, generator=generator, dtype=torch.float64)
    K, J = ntkops.ntk(model, x), torch.cat([x, torch.ones(8, 1)], dim=1).double()
    path = ntkops.gradient_flow(K, Y, [1e6, 1e7, math.inf], method=method)
    least = torch.linalg.lstsq(J, Y).solution
    assert path.dual[1].norm() > 9 * path.dual[0].norm() > 100 * path.dual[2].norm()
    for place in range(3):
        change = torch.cat([part.reshape(-1) for part in path.weights(path.times[place].item()).values()])
        assert (change - least.reshape(-1)).norm() <= path.weight_bounds[place] + 1e-12
        assert (path.outputs[place] - J @ least).norm() <= path.bounds[place]
    assert path.info.converged
    torch.testing.assert_close(path.losses[2], (Y - J @ least).square().mean())


@METHODS
def test_the_limit_under_weight_decay_is_a_ridge_regression(setting, method):
    model, x, _, Y, J, _ = setting
    path = ntkops.gradient_flow(
        ntkops.ntk(model, x), Y, [math.inf], weight_decay=0.01, method=method, tol=1e-9
    )
    ridge = 0.01 * 18 / 2
    dual = torch.linalg.solve(J @ J.T + ridge * torch.eye(18).double(), Y.reshape(-1))
    assert (path.outputs[0].reshape(-1) - J @ J.T @ dual).norm() <= path.bounds[0] <= 1e-8
    change = torch.cat([part.reshape(-1) for part in path.weights(math.inf).values()])
    assert (change - J.T @ dual).norm() <= path.weight_bounds[0] + 1e-13


def test_a_limit_that_products_alone_do_not_settle_says_so():
    K = spectrum(torch.logspace(0, -7, 60, dtype=torch.float64))
    Y = torch.randn(60, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    path = ntkops.gradient_flow(K, Y, [math.inf], method="krylov", max_products=20)
    assert not path.info.converged and path.info.products <= 21
    assert (path.outputs[0] - Y).norm() <= path.bounds[0]
    assert path.weight_bounds[0] == math.inf


def test_times_share_one_basis_and_outputs_cost_no_products():
    K = spectrum(torch.logspace(0, -4, 300, dtype=torch.float64))
    Y = torch.randn(300, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    counts = []
    for times in ([1e4], torch.logspace(0, 4, 20)):
        with ntkops.count_passes() as tally:
            path = ntkops.gradient_flow(K, Y, times, method="krylov")
        assert tally.total == path.info.products
        counts.append(path.info.products)
    assert counts[0] == counts[1] < 150
    with ntkops.count_passes() as tally:
        path.predict(K[:7])
    assert tally.total == 0  # entries are stored


def test_a_cross_product_takes_a_column_for_each_time(setting):
    model, x, x_new, Y, _, _ = setting
    K = ntkops.ntk(model, x, max_dense_bytes=0)
    path = ntkops.gradient_flow(K, Y, torch.linspace(0, 3, 20))
    cross = K.cross(x_new)
    cross @ torch.ones(18).double()  # derivatives are tried with the first product
    with ntkops.count_passes() as tally:
        path.predict(cross)
    assert tally.total <= 2 * 20


def test_a_basis_that_memory_ends_goes_on_in_parts_of_the_time(monkeypatch):
    K = spectrum(torch.logspace(0, -3, 80, dtype=torch.float64))
    Y = torch.randn(80, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    times = [0.0, 10.0, 4000.0, 8000.0]
    whole = ntkops.gradient_flow(K, Y, times, method="eigh")
    monkeypatch.setattr(_linear, "free_bytes", lambda device: 4 * 8 * 80 * 16)
    parts = ntkops.gradient_flow(K, Y, times, method="krylov")
    assert parts.info.basis == 16 and parts.info.restarts > 1 and parts.info.converged
    errors = (parts.outputs - whole.outputs).norm(dim=1)
    assert (errors <= parts.bounds + whole.bounds).all() and (parts.bounds[1:] < 1e4 * errors[1:]).all()
    half = torch.linalg.cholesky(K)
    moved = (half.T @ (parts.dual - whole.dual).T).norm(dim=0)
    assert (moved <= parts.weight_bounds + whole.weight_bounds).all()


@pytest.mark.parametrize("method", ["eigh", "krylov"])
def test_float32_reports_what_rounding_may_do(method):
    exact = spectrum(torch.logspace(0, -6, 90, dtype=torch.float64))
    Y = torch.randn(90, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    t = 1e4 * 90 / 2
    path = ntkops.gradient_flow(DenseLinearOperator(exact.float()), Y.float(), [t], method=method)
    rest, _ = flow(exact, Y, t)
    assert path.outputs.dtype == torch.float32 and path.dual.dtype == torch.float64
    eps = torch.finfo(torch.float32).eps
    assert path.info.rounding[0] >= eps * 1e4 * Y.norm() and not path.info.converged
    assert "rounding" in path.info.reason
    assert (path.outputs[0].double() - (Y - rest)).norm() <= path.bounds[0] < Y.norm()


def test_offsets_that_are_given_are_asked_for_again(setting):
    model, x, x_new, Y, _, _ = setting
    K = ntkops.ntk(model, x)
    named = ntkops.gradient_flow(K, Y, [2.0], offset="network")
    given = ntkops.gradient_flow(K, Y, [2.0], offset=model(x).detach())
    torch.testing.assert_close(named.outputs, given.outputs)
    found = given.predict(K.cross(x_new), offset=model(x_new).detach())
    torch.testing.assert_close(found, named.predict(K.cross(x_new)))
    constant = ntkops.gradient_flow(K, Y, [2.0], offset=torch.tensor([1.0, -2.0]).double())
    shifted = ntkops.gradient_flow(K, Y - torch.tensor([1.0, -2.0]), [2.0])
    torch.testing.assert_close(
        constant.predict(K.cross(x_new)),
        shifted.predict(K.cross(x_new)) + torch.tensor([1.0, -2.0]).double(),
    )


@METHODS
def test_zero_kernels_and_zero_residuals(method):
    zero = torch.zeros(4, 4, dtype=torch.float64)
    Y = torch.ones(4, dtype=torch.float64)
    path = ntkops.gradient_flow(zero, Y, [1.0, math.inf], method=method)
    assert (path.outputs == 0).all() and path.info.converged
    path = ntkops.gradient_flow(torch.eye(4).double(), 0 * Y, [1.0, math.inf], method=method)
    assert (path.outputs == 0).all() and (path.dual == 0).all() and path.info.converged
