"""Derivatives of products with respect to the parameters, first and second, against dense kernels."""

import linear_operator
import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

import ntkops
from tests.cases import BY_NAME

CASE = BY_NAME["mlp"]
NAMES = ("0.weight", "0.bias", "2.weight", "2.bias")


def dense_kernel(model, params, x):
    def states(*values):
        return torch.func.functional_call(model, dict(zip(NAMES, values, strict=True)), (x,)).flatten()

    J = torch.cat([j.flatten(1) for j in torch.func.jacrev(states, argnums=(0, 1, 2, 3))(*params)], dim=1)
    return J @ J.T


@pytest.fixture
def setting():
    model, x = CASE.make(), CASE.data(3)
    params = tuple(model.parameters())
    v = torch.randn(6, 2, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    return model, params, x, v


# Nonlinear in K v: a derivative that also counts the way through grad_output is then wrong.
OBJECTIVES = {
    "product": lambda K, v: ((K @ v) ** 3).sum() + torch.sin(K @ v).sum(),
    "two products": lambda K, v: ((K @ (K @ v)) ** 2).sum(),
    "left product": lambda K, v: ((v.T @ K) ** 3).sum(),
    "sum": lambda K, v: ((2 * K + K) @ v).pow(3).sum(),
    "diagonal": lambda K, v: (K.diagonal() ** 3).sum(),
    "block": lambda K, v: ((K[1:5, 2:4] @ v[:2]) ** 3).sum(),
    "entries": lambda K, v: (K[[0, 3, 5], [1, 3, 0]] ** 3).sum(),
    "dense": lambda K, v: (linear_operator.to_dense(K) ** 3).sum(),
    "ridge solve": lambda K, v: (ridge_solve(K, v) ** 3).sum(),
    "ridge logdet": lambda K, v: ridge_logdet(K) ** 2,
}


def ridge_solve(K, v):
    if isinstance(K, torch.Tensor):
        return torch.linalg.solve(K + 0.5 * torch.eye(len(K), dtype=K.dtype), v)
    return K.add_jitter(0.5).solve(v)


def ridge_logdet(K):
    if isinstance(K, torch.Tensor):
        return torch.logdet(K + 0.5 * torch.eye(len(K), dtype=K.dtype))
    return K.add_jitter(0.5).logdet()


def filled(gradients, params):
    return torch.cat(
        [
            torch.zeros_like(p).flatten() if g is None else g.flatten()
            for g, p in zip(gradients, params, strict=True)
        ]
    )


@pytest.mark.parametrize("name", OBJECTIVES)
def test_first_and_second_derivatives_match_the_dense_kernel(setting, name):
    model, params, x, v = setting
    objective = OBJECTIVES[name]
    live = ntkops.ntk(model, x, differentiable=True)

    def derivatives(K):
        value = objective(K, v)
        first = torch.autograd.grad(value, params, create_graph=True, allow_unused=True)
        flat = filled(first, params)
        direction = torch.randn(len(flat), generator=torch.Generator().manual_seed(5), dtype=torch.float64)
        second = torch.autograd.grad(flat @ direction, params, allow_unused=True)
        return value.detach(), flat.detach(), filled(second, params)

    for ours, reference in zip(derivatives(live), derivatives(dense_kernel(model, params, x)), strict=True):
        torch.testing.assert_close(ours, reference, rtol=1e-9, atol=1e-9 * float(reference.abs().max()))


def test_gradcheck_twice(setting):
    model, params, x, v = setting

    def product(*values):
        K = ntkops.ntk(
            lambda p, batch: torch.func.functional_call(model, p, (batch,)),
            x,
            params=dict(zip(NAMES, values, strict=True)),
            differentiable=True,
        )
        return torch.tanh(K @ v)

    values = tuple(p.detach().clone().requires_grad_() for p in params)
    assert gradcheck(product, values)
    assert gradgradcheck(product, values)


def test_vectors_are_differentiated_too(setting):
    model, _, x, v = setting
    K = ntkops.ntk(model, x)
    vector = v.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(((K @ vector) ** 2).sum(), vector)
    dense = K.to_dense()
    torch.testing.assert_close(gradient, 2 * dense @ dense @ v)


def test_a_snapshot_gives_no_gradient_and_requires_grad_makes_it_live(setting):
    model, params, x, v = setting
    K = ntkops.ntk(model, x)
    assert not K.requires_grad and not (K @ v).requires_grad
    other = ntkops.ntk(ntkops.linearize(model), x)
    live = K.detach().requires_grad_(True)
    (live @ v).sum().backward()
    expected = torch.autograd.grad((dense_kernel(model, params, x) @ v).sum(), params[:3])
    for argument, gradient in zip(live.representation(), expected, strict=False):
        torch.testing.assert_close(argument.grad, gradient)
    assert not K.requires_grad and not other.requires_grad
    assert all(p.grad is None for p in params)


def test_the_live_kernel_follows_the_parameters(setting):
    model, params, x, v = setting
    live, snapshot = ntkops.ntk(model, x, differentiable=True), ntkops.ntk(model, x)
    before = snapshot @ v
    with torch.no_grad():
        params[0].mul_(1.5)
    torch.testing.assert_close(snapshot @ v, before)
    torch.testing.assert_close((live @ v).detach(), (dense_kernel(model, params, x) @ v).detach())


@pytest.mark.parametrize("frozen", [False, True])
def test_products_are_twice_differentiable_in_the_samples(frozen):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Tanh(), torch.nn.Linear(3, 2)).double()
    x = torch.randn(3, 2, dtype=torch.float64)
    z = torch.randn(2, 2, dtype=torch.float64, requires_grad=True)
    v = torch.randn(4, 2, dtype=torch.float64)
    params = dict(model.named_parameters())
    if frozen:
        params = {name: p.detach() for name, p in params.items()}

    def product(z):
        return ntkops.ntk(model, x, z, params=params, differentiable=True) @ v

    def square_product(z):
        K = ntkops.ntk(model, z, params=params, differentiable=True)
        return (K @ v).square() + K.diagonal().unsqueeze(-1)

    for function in (product, square_product):
        assert torch.autograd.gradcheck(function, (z,))
        assert torch.autograd.gradgradcheck(function, (z,))


def test_a_derivative_at_the_samples_is_never_lost_inside_a_sum():
    torch.manual_seed(0)
    model = torch.nn.Linear(2, 1).double()
    z = torch.randn(3, 2, dtype=torch.float64, requires_grad=True)
    K = ntkops.ntk(model, z, differentiable=True)
    total = ((K + K) @ torch.ones(3, dtype=torch.float64)).sum()
    with pytest.raises(ntkops.errors.UnsupportedOperationError, match="multiply each part"):
        total.backward()
