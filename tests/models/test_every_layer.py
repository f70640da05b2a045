"""Every layer of torch.nn and the operations of models: all engines against backward passes row by row.

Under vmap, and under vmap inside vmap, torch has other formulas for every operation, and some of them are
wrong: hence as many samples as outputs, which may hide it, and not as many.
"""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import ntkops
from ntkops import functional

from .layers import HOW, LAYERS, NOT_LAYERS, OPERATIONS, Call, Inside, Part

NAMES = [*LAYERS, *(f"operation: {name}" for name in OPERATIONS)]
LIMIT = 1e-11
THIS_TORCH = pytest.mark.skipif(
    not torch.__version__.startswith("2.13."), reason="other versions have other layers, and other faults"
)


def short(name: str) -> str:
    return name.removeprefix("operation: ")


def network(name: str, outputs: int = 2) -> Inside:
    """Return the network around a layer or an operation; the global random state is put back."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        part = LAYERS.get(name)
        if part is None:
            function, shape = OPERATIONS[short(name)]
            part = Part(lambda: Call(function), shape)
        before = torch.get_default_dtype()
        torch.set_default_dtype(torch.float64)
        try:
            return Inside(part, outputs).eval()
        finally:
            torch.set_default_dtype(before)


def samples(count: int) -> Tensor:
    generator = torch.Generator().manual_seed(5)
    return torch.randn(count, 3, generator=generator, dtype=torch.float64)


def dense_jacobian(model: nn.Module, x: Tensor) -> Tensor:
    """Return J, one classic backward pass for each row, with one sample at a time."""
    model = copy.deepcopy(model)
    parameters = list(model.parameters())
    rows = []
    for sample in x.split(1):
        for entry in model(sample).flatten():
            gradients = torch.autograd.grad(entry, parameters, retain_graph=True, allow_unused=True)
            parts = [
                torch.zeros_like(p) if g is None else g for p, g in zip(parameters, gradients, strict=True)
            ]
            rows.append(torch.cat([part.flatten() for part in parts]))
    return torch.stack(rows)


@functools.cache
def _dense(name: str) -> Tensor:
    return dense_jacobian(network(name), samples(3))


def jacobian(name: str, count: int) -> Tensor:
    """Return J of the first samples, made once for all tests of a layer."""
    return _dense(name).unflatten(0, (3, -1))[:count].flatten(0, 1)


def close(actual: Tensor, expected: Tensor) -> None:
    error = float((actual - expected).norm() / expected.norm())
    assert error <= LIMIT, error


@pytest.mark.parametrize("name", NAMES)
def test_kernels_and_products(name: str) -> None:
    """What one sample shows of a layer is used for two by automatic differentiation; rules see three."""
    linearization = ntkops.linearize(network(name))
    one = ntkops.ntk(linearization, samples(1), engine="autograd")
    close(one.cross(samples(2)).to_dense(), jacobian(name, 2) @ jacobian(name, 1).T)
    holds(name, 2, ntkops.ntk(linearization, samples(2), engine="autograd"))
    holds(name, 3, ntkops.ntk(network(name), samples(3), engine="layerwise"))


def holds(name: str, count: int, K: ntkops.NTKOperator) -> None:
    """Compare J and Jᵀ, which make the products of automatic differentiation, K, its diagonal and K V."""
    J = jacobian(name, count)
    V = torch.randn(len(J), 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    close(K.left.mT @ V, J.T @ V)
    if not THIS_TORCH.args[0]:
        assert (K.engine_info.mode, K.engine_info.per_sample) == HOW.get(short(name), ("forward", "vmap"))
    if K.engine_info.mode != "reverse":
        close(K.left @ (J.T @ V), J @ (J.T @ V))
        if K.engine_info.engine == "layerwise":  # by its own formulas
            close(K @ V, J @ (J.T @ V))
    close(K.diagonal(), J.square().sum(1))
    close(K.to_dense(), J @ J.T)
    close(K @ V, J @ (J.T @ V))


def recorded_jacobian(model: nn.Module, x: Tensor) -> Tensor:
    """Return J with its graph."""
    parameters, rows = list(model.parameters()), []
    for sample in x.split(1):
        for entry in model(sample).flatten():
            gradients = torch.autograd.grad(entry, parameters, create_graph=True, allow_unused=True)
            pairs = zip(parameters, gradients, strict=True)
            rows.append(torch.cat([(p * 0 if g is None else g).flatten() for p, g in pairs]))
    return torch.stack(rows)


def gradients_of(value: Tensor, leaves: list[Tensor]) -> Tensor:
    found = torch.autograd.grad(value, leaves, allow_unused=True)
    pairs = zip(leaves, found, strict=True)
    return torch.cat([(leaf.detach() * 0 if g is None else g).flatten() for leaf, g in pairs])


NO_SECOND_DERIVATIVE = {
    "Hardsigmoid", "MultiLabelMarginLoss", "MultiMarginLoss", "CTCLoss", "CrossMapLRN2d", "EmbeddingBag",
    "cdist", "pdist", "renorm",
}  # fmt: skip


@pytest.mark.parametrize("name", [name for name in NAMES if short(name) not in NO_SECOND_DERIVATIVE])
def test_derivatives_of_kernels(name: str) -> None:
    """Products are third derivatives, of which torch gets some wrong; the reference has second ones alone."""
    model, x = network(name), samples(2).requires_grad_()
    leaves = [x, *model.parameters()]
    C = torch.randn(4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    with sdpa_kernel(SDPBackend.MATH):
        J = recorded_jacobian(model, x)
        wanted = gradients_of(((J @ J.T) * C).sum(), leaves)
    K = ntkops.ntk(model, x, differentiable=True)
    twice = gradients_of((K.to_dense() * C).sum() + (K @ C.mT).diagonal().sum(), leaves)
    error = float((twice - 2 * wanted).norm())
    assert error <= 1e-9 * (float(wanted.norm()) + 1e-3), error


@THIS_TORCH
def test_no_layer_is_missing() -> None:
    layers = {
        name
        for name, item in vars(nn).items()
        if inspect.isclass(item)
        and issubclass(item, nn.Module)
        and item.__module__.startswith("torch.nn.modules")
    }
    assert layers - set(LAYERS) == NOT_LAYERS
    assert set(HOW) <= {short(name) for name in NAMES}


@THIS_TORCH
@pytest.mark.parametrize("name", ["PReLU", "operation: solve", "operation: det", "operation: slogdet"])
def test_torch_is_wrong_under_vmap_inside_vmap(name: str) -> None:
    """When this fails torch has corrected it, and several outputs of these may go through vmap again."""
    model, x = network(name), samples(2)
    parameters = {key: p.detach() for key, p in model.named_parameters()}
    vectors = torch.randn(2, 2, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    def gradients(sample: Tensor, vectors: Tensor, pulled: Callable) -> Tensor:
        def call(values: dict[str, Tensor]) -> Tensor:
            return torch.func.functional_call(model, values, (sample[None],))[0]

        return pulled(lambda v: torch.func.vjp(call, parameters)[1](v)[0]["front.weight"], vectors)

    def one_by_one(pull: Callable[[Tensor], Tensor], vectors: Tensor) -> Tensor:
        return torch.stack([pull(v) for v in vectors])

    def vmapped(pull: Callable[[Tensor], Tensor], vectors: Tensor) -> Tensor:
        return torch.func.vmap(pull)(vectors)

    with torch.no_grad():  # the faults of determinants and solves are there without it alone
        nested = torch.func.vmap(lambda sample, v: gradients(sample, v, vmapped))(x, vectors)
    plain = torch.stack([gradients(*pair, one_by_one) for pair in zip(x, vectors, strict=True)])
    assert float((nested - plain).norm() / plain.norm()) > 1e-3


@pytest.mark.parametrize("name", ["PReLU", "operation: solve", "operation: det", "operation: slogdet"])
def test_functional_kernels(name: str) -> None:
    model, x = network(name), samples(2)
    parameters = {key: p.detach() for key, p in model.named_parameters()}

    def function(values: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.func.functional_call(model, values, (x,))

    J = dense_jacobian(model, x)
    close(functional.ntk_block(function, parameters, x, x).reshape(4, 4), J @ J.T)
    close(functional.ntk_diagonal(function, parameters, x).flatten(), J.square().sum(1))

    def size(x: Tensor) -> Tensor:
        return functional.ntk_block(function, parameters, x, x).square().sum()

    direction = torch.ones_like(x)
    slope = (size(x + 1e-5 * direction) - size(x - 1e-5 * direction)) / 2e-5
    found = (torch.func.grad(size)(x) * direction).sum()
    assert abs(float(found - slope)) <= 1e-6 * abs(float(slope))
