"""Kernels and their products as they are written without ntkops, and by another library."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Literal

import torch
from _peers import attention_with_derivatives
from torch import Tensor, nn

__all__ = ["Kind", "contraction", "layer_hooks", "linearized", "reference", "tutorial", "vmapped_route"]

Kind = Literal["all", "trace", "each", "scalar", "diagonal"]
Values = dict[str, Tensor]


def _split(model: nn.Module) -> tuple[Values, Values]:
    params = {name: value.detach() for name, value in model.named_parameters()}
    return params, {name: value.detach() for name, value in model.named_buffers()}


def _single(model: nn.Module) -> tuple[Callable[[Values, Tensor], Tensor], Values]:
    """Return the model as a function of its parameters and one sample."""
    params, buffers = _split(model)

    def forward(values: Values, sample: Tensor) -> Tensor:
        return torch.func.functional_call(model, (values, buffers), (sample.unsqueeze(0),)).squeeze(0)

    return forward, params


def contraction(model: nn.Module, x: Tensor, kind: Kind, chunk_size: int | None) -> Callable[[], Tensor]:
    """Per-sample Jacobians by vmap over jacrev, contracted parameter by parameter.

    Args:
        model: The network.
        x: N samples.
        kind: What is made of the Jacobians, as `ntkops.ntk` lays it out.
        chunk_size: Samples that vmap takes at a time; None for all.

    Returns:
        The work.
    """
    forward, params = _single(model)
    jacobian = torch.func.vmap(torch.func.jacrev(forward), (None, 0), chunk_size=chunk_size)

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
    if kind == "all":
        flat = rows.flatten(0, 1)
        return flat @ flat.mT
    if kind == "trace":
        flat = rows.flatten(1)
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
    forward, params = _single(model)

    def pair(one: Tensor, other: Tensor) -> Tensor:
        output, pull = torch.func.vjp(lambda values: forward(values, one), params)[:2]

        def product(vector: Tensor) -> Tensor:
            return torch.func.jvp(lambda values: forward(values, other), (params,), pull(vector))[1]

        unit = torch.eye(len(output), dtype=output.dtype)
        return torch.func.vmap(product)(unit)

    def work() -> Tensor:
        with attention_with_derivatives():
            blocks = torch.func.vmap(torch.func.vmap(pair, (None, 0)), (0, None))(x, x)  # (N, N, C, C)
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


def linearized(model: nn.Module, x: Tensor, chunk_size: int = 8) -> Callable[[Tensor], Tensor]:
    """K V through torch.func.linearize and vjp, both made once and mapped over columns in chunks."""
    params, buffers = _split(model)

    def forward(values: Values) -> Tensor:
        return torch.func.functional_call(model, (values, buffers), (x,))

    with attention_with_derivatives(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the tracer warns of what it does itself
        output, push = torch.func.linearize(forward, params)
        _, pull = torch.func.vjp(forward, params)[:2]

    def product(vectors: Tensor) -> Tensor:
        rows = vectors.mT.reshape(-1, *output.shape)
        if len(rows) == 1:
            return push(pull(rows[0])[0]).reshape(-1, 1)
        return torch.func.vmap(lambda row: push(pull(row)[0]), chunk_size=chunk_size)(rows).flatten(1).mT

    return product


def vmapped_route(model: nn.Module, x: Tensor, state: int | None = None) -> Callable[[Tensor], Tensor]:
    """K V with one vmap over columns of vjp and jvp, the forward pass in both: for the exact trace.

    Args:
        model: The network.
        x: Its input.
        state: Which output is the state, where there are several.

    Returns:
        Function of a block ``(k, *output)``.
    """
    params, buffers = _split(model)

    def forward(values: Values) -> Tensor:
        found = torch.func.functional_call(model, (values, buffers), (x,))
        return found if state is None else found[state]

    def product(row: Tensor) -> Tensor:
        _, pull = torch.func.vjp(forward, params)[:2]
        return torch.func.jvp(forward, (params,), pull(row))[1]

    return torch.func.vmap(product)
