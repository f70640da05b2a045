"""The pure core against written-out Jacobians, and under torch.func transforms."""

import pytest
import torch
from torch import nn
from torch.autograd import gradcheck, gradgradcheck

from ntkops import functional
from ntkops.errors import InputError, ShapeError


def make(seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = {"0.weight": (5, 3), "0.bias": (5,), "2.weight": (2, 5), "2.bias": (2,)}
    return {n: torch.randn(s, generator=generator, dtype=torch.float64) for n, s in shapes.items()}


SKELETON = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2)).double()


def network(params, x):
    return torch.func.functional_call(SKELETON, params, (x,))


def samples(count=4, seed=1):
    return torch.randn(count, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def dense(params, x):
    blocks = torch.func.jacrev(network)(params, x)
    return torch.cat([b.flatten(2) for b in blocks.values()], dim=2).flatten(0, 1)


def flat(params):
    return torch.cat([p.flatten() for p in params.values()])


@pytest.mark.parametrize("mode", ["forward", "double"])
def test_products_match_the_dense_jacobian(mode):
    params, x = make(), samples()
    J, tangent, cotangent = dense(params, x), make(7), torch.randn(4, 2, dtype=torch.float64)
    torch.testing.assert_close(
        functional.jvp(network, params, x, tangent, mode=mode).flatten(), J @ flat(tangent)
    )
    torch.testing.assert_close(flat(functional.vjp(network, params, x, cotangent)), J.T @ cotangent.flatten())
    other = samples(3, seed=2)
    product = functional.ntk_matvec(network, params, other, x, cotangent, mode=mode)
    torch.testing.assert_close(product.flatten(), dense(params, other) @ J.T @ cotangent.flatten())


def test_blocks_and_diagonal_match_the_dense_jacobian():
    params, x, other = make(), samples(), samples(3, seed=2)
    J1, J2 = dense(params, x), dense(params, other)
    torch.testing.assert_close(functional.ntk_block(network, params, x, other).reshape(8, 6), J1 @ J2.T)
    torch.testing.assert_close(functional.ntk_diagonal(network, params, x).flatten(), (J1 @ J1.T).diagonal())


def test_the_linearized_network_is_the_first_order_expansion():
    params, x = make(), samples()
    moved = {n: p + 0.01 * q for (n, p), q in zip(params.items(), make(3).values(), strict=True)}
    expected = network(params, x).flatten() + dense(params, x) @ (flat(moved) - flat(params))
    torch.testing.assert_close(functional.linearized(network, params, x, moved).flatten(), expected)


def test_products_compose_with_torch_func_transforms():
    params, x, v = make(), samples(), torch.randn(4, 2, dtype=torch.float64)

    def energy(p):
        return (v * functional.ntk_matvec(network, p, x, x, v)).sum()

    def reference(p):
        J = dense(p, x)
        return (J.T @ v.flatten()).square().sum()

    for transform in (torch.func.grad, torch.func.jacrev, torch.func.jacfwd):
        ours, wanted = transform(energy)(params), transform(reference)(params)
        for name in params:
            torch.testing.assert_close(ours[name], wanted[name])
    tangent = make(5)
    torch.testing.assert_close(
        torch.func.jvp(energy, (params,), (tangent,))[1], torch.func.jvp(reference, (params,), (tangent,))[1]
    )
    columns = torch.randn(3, 4, 2, dtype=torch.float64)
    batched = torch.func.vmap(lambda c: functional.ntk_matvec(network, params, x, x, c))(columns)
    J = dense(params, x)
    torch.testing.assert_close(batched.reshape(3, 8).T, J @ J.T @ columns.reshape(3, 8).T)


def test_ensembles_by_stack_module_state():
    models = [nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2)).double() for _ in range(3)]
    stacked, buffers = torch.func.stack_module_state(models)
    x, v = samples(), torch.randn(4, 2, dtype=torch.float64)

    def product(p, b):
        return functional.ntk_matvec(
            lambda values, batch: torch.func.functional_call(SKELETON, (values, b), (batch,)), p, x, x, v
        )

    together = torch.func.vmap(product)(stacked, buffers)
    for model, result in zip(models, together, strict=True):
        J = dense(dict(model.named_parameters()), x)
        torch.testing.assert_close(result.flatten(), J @ (J.T @ v.flatten()))


@pytest.mark.parametrize("mode", ["forward", "double"])
def test_twice_differentiable_in_parameters_inputs_and_vectors(mode):
    params, x = make(), samples(2)
    v = torch.randn(2, 2, dtype=torch.float64)

    def product(weight, inputs, vector):
        values = {**params, "0.weight": weight}
        return functional.ntk_matvec(network, values, inputs, inputs, vector, mode=mode)

    arguments = tuple(t.clone().requires_grad_() for t in (params["0.weight"], x, v))
    assert gradcheck(product, arguments)
    assert gradgradcheck(product, arguments)


def test_bad_arguments_are_named():
    params, x = make(), samples()
    with pytest.raises(InputError, match="mode='sideways'"):
        functional.jvp(network, params, x, params, mode="sideways")
    with pytest.raises(ShapeError, match=r"\(4, 2\), the cotangent \(8,\)"):
        functional.vjp(network, params, x, torch.ones(8, dtype=torch.float64))


NORMS = {
    "layer norm": lambda h: torch.nn.functional.layer_norm(h, (4,)),
    "instance norm": lambda h: torch.nn.functional.instance_norm(h.unsqueeze(1)).squeeze(1),
    "solve": lambda h: torch.linalg.solve(h.unsqueeze(2) * h.unsqueeze(1) + torch.eye(4).to(h), h.tanh()),
    "prelu": lambda h: torch.nn.functional.prelu(h, torch.full((1,), 0.3).to(h)),
}


@pytest.mark.parametrize("kind", NORMS)
def test_derivatives_of_products_where_torch_alone_is_wrong(kind):
    """Against finite differences of the products themselves, which torch has right."""
    generator = torch.Generator().manual_seed(0)
    w, x, t, v = (
        torch.randn(*shape, generator=generator, dtype=torch.float64)
        for shape in ((4, 3), (5, 3), (4, 3), (5, 4))
    )

    def network(w, x):
        return NORMS[kind](torch.tanh(x @ w.T)).square()

    for product in (
        lambda x: functional.jvp(network, w, x, t),
        lambda x: functional.ntk_matvec(network, w, x, x, v),
        lambda x: functional.linearized(network, w, x, w + t),
        lambda x: functional.ntk_block(network, w, x, x),
        lambda x: functional.vjp(network, w, x, v),
    ):
        weights = torch.randn(product(x).shape, generator=torch.Generator().manual_seed(1)).to(x)

        def value(x, product=product, weights=weights):
            return (product(x) * weights).sum()

        direction, step = torch.ones_like(x), 1e-5
        wanted = float(value(x + step * direction) - value(x - step * direction)) / (2 * step)
        by_transform = float((torch.func.grad(value)(x) * direction).sum())
        live = x.clone().requires_grad_()
        by_autograd = float((torch.autograd.grad(value(live), live)[0] * direction).sum())
        assert abs(by_transform - wanted) <= 1e-6 * max(abs(wanted), 1), (by_transform, wanted)
        assert abs(by_autograd - wanted) <= 1e-6 * max(abs(wanted), 1), (by_autograd, wanted)


def test_a_product_without_forward_mode():
    def network(w, x):
        return torch.nn.functional.grid_sample(x, w.expand(len(x), *w.shape), align_corners=False).flatten(1)

    generator = torch.Generator().manual_seed(0)
    w, t = (0.5 * torch.randn(2, 2, 2, generator=generator, dtype=torch.float64) for _ in range(2))
    x = torch.randn(3, 1, 4, 4, generator=generator, dtype=torch.float64)
    step = 1e-6
    wanted = (network(w + step * t, x) - network(w - step * t, x)) / (2 * step)
    torch.testing.assert_close(functional.jvp(network, w, x, t), wanted, rtol=1e-6, atol=1e-6)
    with pytest.raises(NotImplementedError):
        functional.jvp(network, w, x, t, mode="forward")
