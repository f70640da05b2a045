"""In which precision a model really computes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

if TYPE_CHECKING:
    from .batch import Batch
    from .linearization import Linearization

__all__ = ["lowest_dtype"]


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


def lowest_dtype(linearization: Linearization, batch: Batch) -> torch.dtype:
    """Return the coarsest floating dtype in which a model computes, whatever its parameters are.

    Some models cast inside (softmax or recurrences in float32): no result of theirs can be better than that.

    Args:
        linearization: The model.
        batch: A few samples.

    Returns:
        The dtype. Cost: one forward pass.
    """
    with torch.no_grad(), linearization.safe_context(), _Lowest(linearization.dtype) as noted:
        linearization.function(tuple(p.detach() for p in linearization.parameters), batch)
    return noted.dtype
