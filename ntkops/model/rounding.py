"""How much rounding alone moves a result: the same work with everything some rounding units away."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

__all__ = ["moved", "neighbours"]

# A step of one unit may leave all roundings as they were, behind a layer that damps it.
_UNITS = (1, 4, 16, 64)


def moved(tensor: Tensor, units: int, generator: torch.Generator) -> Tensor:
    """Return a tensor whose entries are moved by about so many rounding units; integers stay."""
    if not tensor.is_floating_point():
        return tensor
    draw = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
    return tensor * (1 + units * torch.finfo(tensor.dtype).eps * draw).to(tensor)


def neighbours(*groups: tuple[Tensor, ...]) -> Iterator[tuple[tuple[Tensor, ...], ...]]:
    """Yield groups of tensors 1, 4, 16 and 64 rounding units away, the same ones every time."""
    generator = torch.Generator().manual_seed(17)
    for units in _UNITS:
        yield tuple(tuple(moved(tensor, units, generator) for tensor in group) for group in groups)
