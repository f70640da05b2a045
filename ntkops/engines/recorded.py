"""Whether a derivative may be taken through a result, so that no cache and no detached copy may stand in."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..model import Inputs

__all__ = ["is_recorded"]


def is_recorded(params: Sequence[Tensor], others: Sequence[Tensor | Inputs], live: bool) -> bool:
    """Return whether autograd records, or a torch.func transform looks at, what goes into a product.

    Args:
        params: The selected parameters.
        others: Vectors, and inputs.
        live: Whether inputs may carry a graph although autograd does not record now.
    """
    tensors = list(params)
    for other in others:
        if isinstance(other, Tensor):
            tensors.append(other)
        elif live or torch.is_grad_enabled():
            _, _, batch = next(iter(other.batches(1)))
            tensors.extend(batch.tensors)
    if any(torch._C._functorch.is_functorch_wrapped_tensor(tensor) for tensor in tensors):
        return True
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
