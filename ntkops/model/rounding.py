"""Rounding of a model: how much it moves a result, and in which precision it computes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

if TYPE_CHECKING:
    from .batch import Batch
    from .pure import PureFunction


__all__ = [
    "UNITS",
    "lowest_dtype",
    "moved",
    "neighbours",
]


# A step of one unit may leave all roundings as they were, behind a layer that damps it.
UNITS = (1, 4, 16, 64)


def moved(tensor: Tensor, units: int, generator: torch.Generator) -> Tensor:
    """Return a tensor whose entries are moved by about so many rounding units; integers stay."""
    if not tensor.is_floating_point():
        return tensor
    # A relative step: what is zero stays zero, as rounding leaves it.
    draw = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
    return tensor * (1 + units * torch.finfo(tensor.dtype).eps * draw).to(tensor)


def neighbours(
    *groups: tuple[Tensor, ...], units: Sequence[int] = UNITS
) -> Iterator[tuple[tuple[Tensor, ...], ...]]:
    """Yield groups of tensors so many rounding units away, the same ones every time."""
    generator = torch.Generator().manual_seed(17)
    for step in units:
        yield tuple(tuple(moved(tensor, step, generator) for tensor in group) for group in groups)


# -- in which precision a model really computes


class _Lowest(TorchDispatchMode):
    """Note the coarsest floating dtype among all results."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_iter(result):
            if isinstance(leaf, Tensor) and leaf.is_floating_point():
                coarser = torch.finfo(leaf.dtype).eps > torch.finfo(self.dtype).eps
                self.dtype = leaf.dtype if coarser else self.dtype
        return result


def lowest_dtype(linearization: PureFunction, batch: Batch) -> torch.dtype:
    """Return the coarsest floating dtype in which a model computes, whatever its parameters are.

    Some models cast inside (softmax or recurrences in float32): no result of theirs can be better than that.
    Cost: one forward pass over a few samples.
    """
    with torch.no_grad(), linearization.safe_context(), _Lowest(linearization.dtype) as noted:
        linearization.function(tuple(p.detach() for p in linearization.parameters), batch)
    return noted.dtype
