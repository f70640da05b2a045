"""K V as it is written without ntkops: three ways, each with no more than torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

__all__ = ["PEERS", "attention_with_derivatives"]

Product = Callable[[Tensor], Tensor]


@contextmanager
def attention_with_derivatives() -> Iterator[None]:
    """Hold the settings without which the peers fail on a transformer.

    The fused attention kernel has no forward-mode and no double-backward formula, and the encoder
    layer's fast path has no derivative at all.
    """
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


def _pure(model: nn.Module, x: Tensor) -> tuple[Callable[[dict[str, Tensor]], Tensor], dict[str, Tensor]]:
    params = {name: parameter.detach() for name, parameter in model.named_parameters()}
    return lambda values: torch.func.functional_call(model, values, (x,)), params


def _rows(vectors: Tensor, samples: int) -> Tensor:
    """Turn the columns ``(n, k)`` into a block ``(k, N, O)``."""
    return vectors.mT.reshape(vectors.shape[1], samples, -1)


def loop(model: nn.Module, x: Tensor) -> Product:
    """One vjp and one jvp a column, each with its own forward pass."""
    forward, params = _pure(model, x)

    def product(vectors: Tensor) -> Tensor:
        columns = []
        for vector in _rows(vectors, len(x)):
            _, pull = torch.func.vjp(forward, params)
            columns.append(torch.func.jvp(forward, (params,), pull(vector))[1].flatten())
        return torch.stack(columns, dim=1)

    return product


def vmapped(model: nn.Module, x: Tensor) -> Product:
    """All columns at once: vmap over the vjp, then vmap over the jvp."""
    forward, params = _pure(model, x)

    def push(tangent: dict[str, Tensor]) -> Tensor:
        return torch.func.jvp(forward, (params,), (tangent,))[1]

    def product(vectors: Tensor) -> Tensor:
        _, pull = torch.func.vjp(forward, params)
        (tangents,) = torch.func.vmap(pull)(_rows(vectors, len(x)))
        return torch.func.vmap(push)(tangents).flatten(1).mT

    return product


def double_backward(model: nn.Module, x: Tensor) -> Product:
    """One backward pass that is differentiated for J, then two passes a column over the kept graph."""
    forward, params = _pure(model, x)

    def product(vectors: Tensor) -> Tensor:
        leaves = {name: value.detach().requires_grad_() for name, value in params.items()}
        inputs = list(leaves.values())
        output = forward(leaves)
        point = torch.zeros_like(output, requires_grad=True)
        transposed = torch.autograd.grad(output, inputs, point, create_graph=True)
        columns = []
        for vector in _rows(vectors, len(x)):
            tangent = torch.autograd.grad(output, inputs, vector, retain_graph=True)
            (column,) = torch.autograd.grad(transposed, point, tangent, retain_graph=True)
            columns.append(column.flatten())
        return torch.stack(columns, dim=1)

    return product


PEERS: dict[str, Callable[[nn.Module, Tensor], Product]] = {
    "loop": loop,
    "vmap": vmapped,
    "double": double_backward,
}
