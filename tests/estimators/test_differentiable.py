"""Derivatives of quantities with respect to parameters: exact, unbiased, twice, or refused."""

from __future__ import annotations

import pytest
import torch
from linear_operator.operators import ConstantMulLinearOperator, RootLinearOperator
from torch import nn
from torch.autograd import gradcheck, gradgradcheck

import ntkops
from ntkops.errors import (
    InputError,
    NonFiniteError,
    NtkopsError,
    ShapeError,
    UnsupportedOperationError,
    ZeroKernelError,
)
from tests.cases import BY_NAME

QUANTITIES = {
    "trace": lambda K, other, **o: ntkops.trace(K, differentiable=True, **o),
    "frobenius_norm": lambda K, other, **o: ntkops.frobenius_norm(K, differentiable=True, **o),
    "inner": lambda K, other, **o: ntkops.inner(K, other, differentiable=True, **o),
    "alignment": lambda K, other, **o: ntkops.alignment(K, other, differentiable=True, **o),
    "effective_rank": lambda K, other, **o: ntkops.effective_rank(K, differentiable=True, **o),
}
DENSE = {
    "trace": lambda K, other: K.diagonal(dim1=-2, dim2=-1).sum(-1),
    "frobenius_norm": lambda K, other: norm(K),
    "inner": lambda K, other: (K * other).sum((-2, -1)),
    "alignment": lambda K, other: (K * other).sum((-2, -1)) / norm(K) / norm(other),
    "effective_rank": lambda K, other: K.diagonal(dim1=-2, dim2=-1).sum(-1) ** 2 / norm(K) ** 2,
}


def norm(K):
    return K.square().sum((-2, -1)).sqrt()


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def tiny() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 2)).double()


def dense_kernel(model, x, outputs="all"):
    names = [name for name, _ in model.named_parameters()]

    def states(*values):
        return torch.func.functional_call(model, dict(zip(names, values, strict=True)), (x,))

    jacobians = torch.func.jacrev(states, argnums=tuple(range(len(names))))(*model.parameters())
    J = torch.cat([j.flatten(2) for j in jacobians], dim=2)  # (N, O, P)
    if outputs == "each":
        return torch.einsum("iop,jop->oij", J, J)
    return J.flatten(0, 1) @ J.flatten(0, 1).T


def derivatives(value, params):
    """Return the value, its gradient, and the Hessian times a direction, as flat vectors."""

    def flat(gradients):
        pairs = zip(gradients, params, strict=True)
        return torch.cat([(torch.zeros_like(p) if g is None else g).flatten() for g, p in pairs])

    first = flat(torch.autograd.grad(value, params, create_graph=True, allow_unused=True))
    direction = torch.randn(len(first), generator=seeded(5), dtype=torch.float64)
    second = flat(torch.autograd.grad(first @ direction, params, allow_unused=True))
    return value.detach(), first.detach(), second


@pytest.fixture
def setting():
    model = tiny()
    x = torch.randn(3, 2, generator=seeded(1), dtype=torch.float64)
    other = ntkops.ntk(tiny(), x + 0.5).to_dense()
    return model, x, other


@pytest.mark.parametrize("engine", ["layerwise", "autograd"])
@pytest.mark.parametrize("name", QUANTITIES)
def test_exact_derivatives_match_the_dense_kernel(setting, name, engine):
    model, x, other = setting
    params = tuple(model.parameters())
    K = ntkops.ntk(model, x, differentiable=True, engine=engine, max_dense_bytes=0)
    estimate = QUANTITIES[name](K, other)
    assert estimate.exact and estimate.method == "exact" and estimate.value.requires_grad
    assert not any(t.requires_grad for t in (estimate.stderr, *estimate.interval))
    # The square makes the gradient that arrives depend on the parameters, too.
    ours = derivatives(estimate.value**2, params)
    reference = derivatives(DENSE[name](dense_kernel(model, x), other) ** 2, params)
    for one, expected in zip(ours, reference, strict=True):
        torch.testing.assert_close(one, expected, rtol=1e-9, atol=1e-9 * float(expected.abs().max()))
    assert all(p.grad is None for p in params)


@pytest.mark.parametrize("name", QUANTITIES)
def test_many_tiles_give_what_one_gives(setting, name, monkeypatch):
    model, x, other = setting
    params = tuple(model.parameters())
    K = ntkops.ntk(model, x, differentiable=True)
    whole = derivatives(QUANTITIES[name](K, other).value, params)
    monkeypatch.setattr("ntkops.operators.kernel.NTKOperator.tile_size", lambda self: 2)
    tiled = derivatives(QUANTITIES[name](K, other).value, params)
    for one, expected in zip(tiled, whole, strict=True):
        torch.testing.assert_close(one, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    "name, options",
    [
        # Finite differences would move the sketch of Hutch++, which the derivative holds fixed: with so many
        # passes it spans the whole space, and nothing depends on it.
        ("effective_rank", {"method": "hutch++", "num_passes": 40}),
        ("alignment", {"method": "hutchinson", "num_passes": 12}),
    ],
)
def test_estimates_of_fixed_probes_are_differentiated_twice(name, options):
    model = nn.Sequential(nn.Linear(1, 2), nn.Tanh(), nn.Linear(2, 1)).double()
    x = torch.randn(3, 1, dtype=torch.float64)
    other, names = ntkops.ntk(model, x + 0.5).to_dense(), [name for name, _ in model.named_parameters()]

    def call(params, batch):
        return torch.func.functional_call(model, params, (batch,))

    def quantity(*values):
        params = dict(zip(names, values, strict=True))
        K = ntkops.ntk(call, x, params=params, differentiable=True)
        return QUANTITIES[name](K, other, generator=seeded(), **options).value

    values = tuple(p.detach().clone().requires_grad_() for p in model.parameters())
    assert gradcheck(quantity, values)
    assert gradgradcheck(quantity, values)


@pytest.mark.parametrize("method", ["hutchinson", "hutch++"])
@pytest.mark.parametrize("name", ["trace", "inner"])
def test_gradients_of_estimates_are_unbiased(setting, name, method):
    """Of a tensor over many seeds; and what a lazy kernel gives is what its tensor gives."""
    model, x, other = setting
    dense = dense_kernel(model, x)
    count, columns = (1, 6) if name == "trace" else (2, 5)
    options = {"method": method, "num_passes": count * columns}

    def gradient(seed):
        estimate = QUANTITIES[name](dense, other, generator=seeded(seed), **options)
        return torch.autograd.grad(estimate.value, dense, retain_graph=True)[0]

    (expected,) = torch.autograd.grad(QUANTITIES[name](dense, other).value, dense, retain_graph=True)
    stacked = torch.stack([gradient(seed) for seed in range(100)])
    error = (stacked.mean(0) - expected).abs()
    assert bool((error <= 4.5 * stacked.std(0) / 100**0.5 + 1e-12 * expected.abs().max()).all())
    assert float(error.norm()) < 0.3 * float(expected.norm())

    K, params = ntkops.ntk(model, x, differentiable=True), list(model.parameters())[:3]
    passes = (count + 1) * columns  # a column of K takes two
    lazy = QUANTITIES[name](K, other, method=method, num_passes=passes, generator=seeded()).value
    torch.testing.assert_close(
        torch.autograd.grad(lazy, params), torch.autograd.grad(dense, params, stacked[0])
    )


@pytest.mark.parametrize("name", QUANTITIES)
def test_the_value_of_an_estimate_has_an_error_bar(setting, name):
    model, x, other = setting
    K = ntkops.ntk(model, x, differentiable=True)
    exact = float(QUANTITIES[name](K, other))
    estimate = QUANTITIES[name](K, other, method="hutchinson", num_passes=150, generator=seeded())
    assert not estimate.exact and estimate.seed == 0 and 100 < estimate.passes <= 150
    assert abs(float(estimate) - exact) < 4 * float(estimate.stderr)
    low, high = estimate.interval
    assert float(low) < float(estimate) < float(high)
    again = QUANTITIES[name](K, other, method="hutchinson", num_passes=150, generator=seeded())
    assert torch.equal(again.value, estimate.value)


def test_auto_is_exact_until_the_passes_do_not_pay():
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 30)).double()
    x = torch.randn(4, 3, dtype=torch.float64)
    K = ntkops.ntk(model, x, differentiable=True, engine="autograd")
    assert ntkops.trace(K, differentiable=True).method == "exact"
    assert ntkops.trace(K, differentiable=True, num_passes=12, generator=seeded()).method == "hutch++"


@pytest.mark.parametrize("name", ["trace", "frobenius_norm", "effective_rank"])
def test_a_batch_of_kernels(setting, name):
    model, x, _ = setting
    params = tuple(model.parameters())
    K = ntkops.ntk(model, x, outputs="each", differentiable=True)
    estimate = QUANTITIES[name](K, None)
    assert estimate.value.shape == (2,)
    weights = torch.tensor([1.0, -2.0], dtype=torch.float64)
    ours = derivatives(estimate.value @ weights, params)
    reference = derivatives(DENSE[name](dense_kernel(model, x, "each"), None) @ weights, params)
    for one, expected in zip(ours, reference, strict=True):
        torch.testing.assert_close(one, expected, rtol=1e-9, atol=1e-10)
    sampled = QUANTITIES[name](K, None, method="hutchinson", num_passes=400, generator=seeded())
    (gradient,) = torch.autograd.grad(sampled.value @ weights, params[:1])
    assert sampled.value.shape == (2,) and bool(torch.isfinite(gradient).all())


def test_sums_multiples_and_diagonals(setting):
    model, x, _ = setting
    scale = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    ridge = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    params = (*model.parameters(), scale, ridge)
    K = ntkops.ntk(model, x, differentiable=True)
    constant = torch.ones(6, 6, dtype=torch.float64)
    lazy = (ConstantMulLinearOperator(K, scale) + constant).add_diagonal(ridge)  # K * scale would detach it
    for name in ("trace", "frobenius_norm", "effective_rank"):
        ours = derivatives(QUANTITIES[name](lazy, None).value, params)
        plain = scale * dense_kernel(model, x) + constant + ridge * torch.eye(6, dtype=torch.float64)
        reference = derivatives(DENSE[name](plain, None), params)
        for one, expected in zip(ours, reference, strict=True):
            torch.testing.assert_close(one, expected, rtol=1e-9, atol=1e-9)


def test_both_kernels_may_be_live(setting):
    model, x, _ = setting
    params = tuple(model.parameters())
    K, other = ntkops.ntk(model, x, differentiable=True), ntkops.ntk(model, x + 0.5, differentiable=True)
    ours = derivatives(ntkops.alignment(K, other, differentiable=True).value, params)
    reference = derivatives(DENSE["alignment"](dense_kernel(model, x), dense_kernel(model, x + 0.5)), params)
    for one, expected in zip(ours, reference, strict=True):
        torch.testing.assert_close(one, expected, rtol=1e-8, atol=1e-10)


def test_dense_tensors(setting):
    matrix = torch.randn(4, 4, generator=seeded(2), dtype=torch.float64, requires_grad=True)
    for name in ("trace", "frobenius_norm", "effective_rank"):
        ours = torch.autograd.grad(QUANTITIES[name](matrix, None).value, matrix)[0]
        torch.testing.assert_close(ours, torch.autograd.grad(DENSE[name](matrix, None), matrix)[0])
    sampled = ntkops.trace(matrix, differentiable=True, method="hutchinson", num_passes=3, generator=seeded())
    (gradient,) = torch.autograd.grad(sampled.value, matrix)
    torch.testing.assert_close(gradient.diagonal(), torch.ones(4).double())


@pytest.mark.parametrize("name", ["conv", "gru-time", "attention", "weight-norm", "tied"])
def test_models_of_other_kinds(name):
    case = BY_NAME[name]
    model, x = case.make(), case.data(2)
    params = tuple(model.parameters())
    K = ntkops.ntk(model, x, differentiable=True, **case.options)
    ours = torch.autograd.grad(ntkops.frobenius_norm(K, differentiable=True).value, params, allow_unused=True)
    columns = K @ torch.eye(K.shape[-1], dtype=torch.float64)
    reference = torch.autograd.grad(columns.norm(), params, allow_unused=True)
    for one, expected in zip(ours, reference, strict=True):
        one, expected = (torch.zeros(()) if g is None else g for g in (one, expected))
        torch.testing.assert_close(one, expected.expand_as(one), rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("scale", [1e-10, 1e9])
def test_scales_in_float32(scale):
    case = BY_NAME["mlp"]
    model, x = case.make(torch.float32), case.data(3, torch.float32)
    with torch.no_grad():
        model[2].weight *= scale
        model[2].bias *= scale
    K = ntkops.ntk(model, x, differentiable=True, params="0.*")
    value = ntkops.effective_rank(K, differentiable=True).value
    gradient = torch.autograd.grad(value, model[0].weight)[0]
    reference = case.make()
    unscaled = ntkops.ntk(reference, case.data(3), differentiable=True, params="0.*")
    expected = torch.autograd.grad(
        ntkops.effective_rank(unscaled, differentiable=True).value, reference[0].weight
    )[0]
    torch.testing.assert_close(
        gradient.double(), expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max())
    )


@pytest.mark.parametrize("options", [{}, {"method": "hutch++", "num_passes": 18}], ids=["exact", "hutch++"])
def test_a_regulariser_trains_the_norm_down(options):
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 2))
    x, y = torch.randn(10, 3), torch.randn(10, 2)

    def train(strength: float) -> tuple[float, float]:
        with torch.random.fork_rng():
            torch.manual_seed(3)
            for layer in model[::2]:
                layer.reset_parameters()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
        for step in range(25):
            optimizer.zero_grad()
            loss = (model(x) - y).square().mean()
            if strength:
                K = ntkops.ntk(model, x, differentiable=True)
                extra = {**options, "generator": seeded(step)} if options else {}
                loss = loss + strength * ntkops.frobenius_norm(K, differentiable=True, **extra).value
            loss.backward()
            optimizer.step()
        return float(ntkops.frobenius_norm(ntkops.ntk(model, x))), float(
            (model(x) - y).square().mean().detach()
        )

    plain, regularised = train(0.0), train(0.2)
    assert regularised[0] < 0.7 * plain[0]


def test_memory_of_the_backward_pass_is_one_tile(setting, monkeypatch):
    model, x, _ = setting
    monkeypatch.setattr("ntkops.operators.kernel.NTKOperator.tile_size", lambda self: 1)
    K = ntkops.ntk(model, x, differentiable=True, engine="autograd")
    value = ntkops.frobenius_norm(K, differentiable=True).value
    saved, waiting = 0, [value.grad_fn]
    while waiting:
        node = waiting.pop()
        saved += sum(t.numel() for t in getattr(node, "saved_tensors", ()))
        waiting.extend(following for following, _ in node.next_functions if following is not None)
    # What the graph keeps is the parameters, and a few numbers.
    assert 0 < saved <= sum(p.numel() for p in model.parameters()) + 20
    assert value.requires_grad


def test_refusals(setting):
    model, x, other = setting
    snapshot = ntkops.ntk(model, x)
    live = ntkops.ntk(model, x, differentiable=True)
    for name, quantity in QUANTITIES.items():
        with pytest.raises(UnsupportedOperationError, match=r"snapshot.*differentiable=True"):
            quantity(snapshot, other)
        for method in ("reverse", "forward", "rhutch"):
            with pytest.raises(UnsupportedOperationError, match="no differentiable form"):
                quantity(live, other, method=method)
        with torch.no_grad(), pytest.raises(InputError, match="no_grad"):
            quantity(live, other)
        with pytest.raises(InputError, match="num_passes"):
            quantity(live, other, method="hutchinson", rtol=0.1)
        with pytest.raises(InputError, match="does not pay"):
            quantity(live, other, method="hutch++", num_passes=2)
        with pytest.raises(InputError, match="num_passes"):
            quantity(live, other, num_passes=0)
        assert QUANTITIES[name](live, other, rtol=0.1).exact
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    frozen = ntkops.ntk(model, x, params="*", differentiable=True)
    with pytest.raises(UnsupportedOperationError, match="requires grad"):
        ntkops.trace(frozen, differentiable=True)
    with pytest.raises(ShapeError):
        ntkops.trace(torch.ones(2, 3, requires_grad=True), differentiable=True)
    with pytest.raises(NonFiniteError):
        ntkops.trace(torch.full((2, 2), torch.nan, requires_grad=True), differentiable=True)


def test_transforms_are_refused():
    with pytest.raises(UnsupportedOperationError, match=r"torch\.func"):
        torch.func.grad(lambda matrix: ntkops.trace(matrix, differentiable=True).value)(torch.eye(2))


def test_zero_kernels_have_no_norm_to_differentiate():
    zero = torch.zeros(3, 3, requires_grad=True)
    with pytest.raises(ZeroKernelError, match="inner"):
        ntkops.frobenius_norm(zero, differentiable=True)
    with pytest.raises(NtkopsError):
        ntkops.effective_rank(zero, differentiable=True)
    squared = ntkops.inner(zero, zero, differentiable=True)
    assert torch.equal(torch.autograd.grad(squared.value, zero)[0], torch.zeros(3, 3))


def test_unknown_operators_are_refused():
    root = RootLinearOperator(torch.randn(3, 2, requires_grad=True))
    with pytest.raises(UnsupportedOperationError, match="RootLinearOperator"):
        ntkops.trace(root, differentiable=True)
