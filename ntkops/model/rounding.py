"""How much rounding alone moves a result: the same work with everything some rounding units away."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

__all__ = ["UNITS", "moved", "neighbours"]

# A step of one unit may leave all roundings as they were, behind a layer that damps it.
UNITS = (1, 4, 16, 64)


def moved(tensor: Tensor, units: int, generator: torch.Generator) -> Tensor:
    """Return a tensor whose entries are moved by about so many rounding units; integers stay."""
    if not tensor.is_floating_point():
        return tensor
    draw = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
    return tensor * (1 + units * torch.finfo(tensor.dtype).eps * draw).to(tensor)


def neighbours(
    *groups: tuple[Tensor, ...], units: Sequence[int] = UNITS
) -> Iterator[tuple[tuple[Tensor, ...], ...]]:
    """Yield groups of tensors so many rounding units away, the same ones every time."""
    generator = torch.Generator().manual_seed(17)
    for step in units:
        yield tuple(tuple(moved(tensor, step, generator) for tensor in group) for group in groups)
