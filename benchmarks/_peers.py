"""Kernels and their products as they are written without ntkops, and by other libraries."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call, jacrev, jvp, vjp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

Kind = Literal["all", "trace", "each", "scalar", "diagonal"]
Product = Callable[[Tensor], Tensor]
Values = dict[str, Tensor]


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


def _function(model: nn.Module, *x: Tensor) -> tuple[Callable[..., Any], Values]:
    """Return the model as a function of its parameters (and of one sample where x is left out), and these."""
    params = {name: value.detach() for name, value in model.named_parameters() if value.requires_grad}
    held = {name: value.detach() for name, value in model.named_parameters() if not value.requires_grad}
    held |= {name: value.detach() for name, value in model.named_buffers()}

    def whole(values: Values) -> Any:
        return functional_call(model, (values, held), x)

    def single(values: Values, sample: Tensor) -> Tensor:
        return functional_call(model, (values, held), (sample.unsqueeze(0),)).squeeze(0)

    return (whole if x else single), params


# kernels


def contraction(
    model: nn.Module, x: Tensor, kind: Kind = "all", chunk_size: int | None = None
) -> Callable[[], Tensor]:
    """Per-sample Jacobians by vmap over jacrev, some samples at a time, contracted parameter by parameter."""
    forward, params = _function(model)
    jacobian = vmap(jacrev(forward), (None, 0), chunk_size=chunk_size)

    def work() -> Tensor:
        with attention_with_derivatives():
            found = jacobian(params, x)
        total = None
        for name in list(found):
            part = _contracted(found.pop(name).flatten(2), kind)  # (N, C, p)
            total = part if total is None else total.add_(part)
        assert total is not None
        return total

    return work


def _contracted(rows: Tensor, kind: Kind) -> Tensor:
    if kind in ("all", "trace"):
        flat = rows.flatten(0, 1) if kind == "all" else rows.flatten(1)
        return flat @ flat.mT
    if kind == "each":
        return rows.transpose(0, 1) @ rows.permute(1, 2, 0)
    squares = rows.square().sum(2).flatten()
    return squares.sum() if kind == "scalar" else squares


def reference(model: nn.Module, x: Tensor) -> Tensor:
    """Return the kernel of all outputs in float64, from its Jacobians."""
    exact = copy.deepcopy(model).double()
    return contraction(exact, x.double() if x.is_floating_point() else x, "all", 8)()


def tutorial(model: nn.Module, x: Tensor) -> Callable[[], Tensor]:
    """The functorch tutorial's NTK-vector products: for each pair of samples, K times each unit vector."""
    forward, params = _function(model)

    def pair(one: Tensor, other: Tensor) -> Tensor:
        output, pull = vjp(lambda values: forward(values, one), params)[:2]

        def product(vector: Tensor) -> Tensor:
            return jvp(lambda values: forward(values, other), (params,), pull(vector))[1]

        return vmap(product)(torch.eye(len(output), dtype=output.dtype))

    def work() -> Tensor:
        with attention_with_derivatives():
            blocks = vmap(vmap(pair, (None, 0)), (0, None))(x, x)  # (N, N, C, C)
        return blocks.transpose(1, 2).flatten(2).flatten(0, 1)

    return work


def layer_hooks(model: nn.Module, x: Tensor) -> Callable[[], Tensor]:
    """NNGeometry: its Gram matrix, from hooks on layers."""
    from nngeometry.gram import GramMatrix
    from torch.utils.data import DataLoader, TensorDataset

    loader = DataLoader(TensorDataset(x.clone()), batch_size=len(x))

    def work() -> Tensor:
        found = GramMatrix(model, loader).data  # (C, N, C, N)
        return found.permute(1, 0, 3, 2).flatten(2).flatten(0, 1)

    return work


# products


def _rows(vectors: Tensor, samples: int) -> Tensor:
    """Turn the columns ``(n, k)`` into a block ``(k, N, O)``."""
    return vectors.mT.reshape(vectors.shape[1], samples, -1)


def loop(model: nn.Module, x: Tensor, kept: bool = False) -> Product:
    """One vjp and one jvp a column, each with its own forward pass; that of the vjp may be kept."""
    forward, params = _function(model, x)

    def product(vectors: Tensor) -> Tensor:
        columns, pull = [], vjp(forward, params)[1] if kept else None
        for vector in _rows(vectors, len(x)):
            own = pull or vjp(forward, params)[1]
            columns.append(jvp(forward, (params,), own(vector))[1].flatten())
        return torch.stack(columns, dim=1)

    return product


def vmapped(model: nn.Module, x: Tensor) -> Product:
    """All columns at once: vmap over the vjp, then vmap over the jvp."""
    forward, params = _function(model, x)

    def product(vectors: Tensor) -> Tensor:
        (tangents,) = vmap(vjp(forward, params)[1])(_rows(vectors, len(x)))
        return vmap(lambda tangent: jvp(forward, (params,), (tangent,))[1])(tangents).flatten(1).mT

    return product


def double_backward(model: nn.Module, x: Tensor) -> Product:
    """One backward pass that is differentiated for J, then two passes a column over the kept graph."""
    forward, params = _function(model, x)

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


def linearized(model: nn.Module, x: Tensor, chunk_size: int = 8) -> Product:
    """K V through torch.func.linearize and vjp, both made once and mapped over columns in chunks."""
    forward, params = _function(model, x)
    with attention_with_derivatives(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the tracer warns of what it does itself
        output, push = torch.func.linearize(forward, params)
        pull = vjp(forward, params)[1]

    def product(vectors: Tensor) -> Tensor:
        rows = vectors.mT.reshape(-1, *output.shape)
        if len(rows) == 1:
            return push(pull(rows[0])[0]).reshape(-1, 1)
        return vmap(lambda row: push(pull(row)[0]), chunk_size=chunk_size)(rows).flatten(1).mT

    return product


def vmapped_route(model: nn.Module, x: Tensor, state: int | None = None) -> Product:
    """K V on blocks ``(k, *output)`` with one vmap over vjp and jvp: for the exact trace, of one output."""
    whole, params = _function(model, x)

    def forward(values: Values) -> Tensor:
        return whole(values) if state is None else whole(values)[state]

    def product(row: Tensor) -> Tensor:
        return jvp(forward, (params,), vjp(forward, params)[1](row))[1]

    return vmap(product)


def curvature(model: nn.Module, x: Tensor) -> Product:
    """K V by the Jacobian operators of curvlinops."""
    from curvlinops import JacobianLinearOperator, TransposedJacobianLinearOperator

    params = [p for p in model.parameters() if p.requires_grad]
    made = (model, params, [(x, x)])

    def product(vectors: Tensor) -> Tensor:
        with attention_with_derivatives():
            pull = TransposedJacobianLinearOperator(*made, check_deterministic=False)
            push = JacobianLinearOperator(*made, check_deterministic=False)
            return push @ (pull @ vectors)

    return product
