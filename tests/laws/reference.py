"""What a law is held against: J in float64, one plain backward pass for each row of the user's own module."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["call", "close", "jacobian", "kernel", "normal"]


def call(model: nn.Module, x: Any) -> Any:
    """Return what the module makes of its inputs, as a user calls it."""
    return model(**x) if isinstance(x, dict) else model(*x) if isinstance(x, tuple) else model(x)


def jacobian(
    model: nn.Module, x: Any, state: Callable[[Any], Tensor] = lambda raw: raw, *, graph: bool = False
) -> Tensor:
    """Return J, (N·O, P), of the parameters that require grad; with ``graph``, to be differentiated again."""
    leaves = [p for p in model.parameters() if p.requires_grad]
    rows = []
    for entry in state(call(model, x)).flatten():
        parts = [torch.zeros_like(p) for p in leaves]
        if entry.requires_grad:
            found = torch.autograd.grad(
                entry, leaves, retain_graph=True, create_graph=graph, allow_unused=True
            )
            parts = [part if g is None else g for part, g in zip(parts, found, strict=True)]
        rows.append(torch.cat([part.flatten() for part in parts]))
    J = torch.stack(rows)
    return J if graph else J.detach()


def kernel(left: Tensor, right: Tensor, width: int, outputs: str | int | Sequence[int] = "all") -> Tensor:
    """Return the kernel of a choice of outputs from dense Jacobians of ``width`` outputs a sample."""
    every = torch.arange(width)
    # (M, R, r): M kernels of r outputs a sample, each a sum of R terms
    if outputs == "all":
        numbers = every[None, None]
    elif outputs == "each":
        numbers = every[:, None, None]
    elif outputs == "trace":
        numbers = every[None, :, None]
    else:
        numbers = torch.as_tensor(outputs).reshape(1, 1, -1)

    def rows(J: Tensor) -> Tensor:
        picked = J.reshape(-1, width, J.shape[1])[:, numbers]  # (N, M, R, r, P)
        return picked.permute(1, 0, 3, 2, 4).flatten(3).flatten(1, 2)  # (M, N r, R P)

    found = rows(left) @ rows(right).mT
    return found if outputs == "each" else found[0]


def normal(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Return normal numbers, the same in every dtype but for rounding."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def close(
    found: Tensor, expected: Tensor, tolerance: float, what: str = "", scale: float | None = None
) -> None:
    """Compare two blocks in the Frobenius norm, relative to the expected one or to ``scale``."""
    assert found.shape == expected.shape, (what, tuple(found.shape), tuple(expected.shape))
    scale = float(expected.norm()) if scale is None else scale
    error = float((found.double() - expected).norm())
    assert error <= tolerance * scale, (what, f"error {error:.3g} of {scale:.3g}, allowed {tolerance:.1g}")
