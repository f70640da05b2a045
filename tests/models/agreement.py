"""What every row of the table is held to."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

import ntkops
from ntkops.errors import DifferentiationError
from ntkops.model.rounding import lowest_dtype
from tests.model.zoo import untouched

from .rows import Row

_LARGEST = 0.05  # 1e3 rounding units of bfloat16 would allow anything


def tolerance(dtype: torch.dtype) -> float:
    """Return a thousand rounding units of a dtype, and no more than a twentieth."""
    return min(1e3 * torch.finfo(dtype).eps, _LARGEST)


def vectors(*shape: int, seed: int, like: Tensor) -> Tensor:
    """Draw seeded normal numbers."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(like)


def close(actual: Tensor, expected: Tensor, limit: float, what: str) -> None:
    """Assert that two matrices agree in the Frobenius norm."""
    error = float((actual.double() - expected).norm())
    assert error <= limit * float(expected.norm()), f"{what}: {error / float(expected.norm()):.1e}"


def check_row(row: Row) -> None:
    """Hold one row to its reference on both engines, with model, inputs and global state untouched."""
    model, x = row.make(), row.draw()
    with untouched(model, x):
        linearization = ntkops.linearize(model, **row.options)
        K = ntkops.ntk(linearization, x)
        info = K.engine_info
        assert (info.engine, info.mode, info.per_sample) == (row.engine, row.mode, row.samples), info.reasons
        _, _, batch = next(iter(linearization.inputs(x).batches(None)))
        lowest = lowest_dtype(linearization, batch)
        assert lowest == row.precision, lowest
    J = row.reference(model, x, linearization.names)
    sizes = [p.numel() for p in linearization.parameters]
    with untouched(model, x):
        for operator in (K, K.with_engine("autograd")):
            agrees(operator, J, sizes, tolerance(row.precision))
        lazy = ntkops.ntk(linearization, x, max_dense_bytes=0)
        V = vectors(len(J), 3, seed=5, like=K.left._args[0])
        if row.mode == "reverse":
            with pytest.raises(DifferentiationError, match="method='rhutch'"):
                lazy @ V
        else:
            close(lazy @ V, J @ (J.mT @ V.double()), tolerance(row.precision), "K v, nothing dense")


def check_row_on_a_device(row: Row) -> None:
    """Hold a row in float32 on a CUDA device to the same on the CPU."""
    single = dataclasses.replace(row, dtype=torch.float32)
    model, x = single.make(), single.draw()
    expected = ntkops.ntk(model, x, **row.options).to_dense()
    model.to("cuda")
    x = tree_map(lambda leaf: leaf.cuda() if isinstance(leaf, Tensor) else leaf, x)
    actual = ntkops.ntk(model, x, **row.options).to_dense().cpu()
    close(actual, expected.double(), 1e-4, "K on a device")


def agrees(K: Any, J: Tensor, sizes: list[int], limit: float) -> None:
    """Assert J, Jᵀ, K and its exact trace."""
    left, like = K.left, K.left._args[0]
    rows = left.mT @ torch.eye(len(J), dtype=like.dtype)  # (P, n)
    scale = 0.01 * float(J.norm())
    for found, wanted in zip(rows.mT.double().split(sizes, 1), J.split(sizes, 1), strict=True):
        assert float((found - wanted).norm()) <= limit * (float(wanted.norm()) + scale)
    if K.engine_info.mode != "reverse":
        # E|E w|² = |E|²: of the error of J as much is seen along normal vectors as column by column, of which
        # there are thousands.
        W = vectors(J.shape[1], 6, seed=6, like=like)
        close(left @ W, J @ W.double(), limit, "J p")
    close(K.to_dense(), J @ J.mT, limit, "K")
    exact = float(ntkops.trace(K, method="exact"))
    assert math.isclose(exact, float(J.square().sum()), rel_tol=limit)


def agrees_after_repair(model: nn.Module, x: Any, options: dict[str, Any], state: Any) -> None:
    """Assert the same for a model that took a way out."""
    dtype = next(p.dtype for p in model.parameters() if p.requires_grad)
    row = Row("repaired", lambda: model, lambda _: x, options=options, state=state, dtype=dtype)
    with untouched(model, x):
        linearization = ntkops.linearize(model, **options)
        K = ntkops.ntk(linearization, x)
        J = row.reference(model, x, linearization.names)
        agrees(K, J, [p.numel() for p in linearization.parameters], tolerance(dtype))
