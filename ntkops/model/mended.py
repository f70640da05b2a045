"""Functions of torch whose derivatives are wrong, or contradict each other, put right.

**Batch and instance norms.** Their backward pass on the CPU (2.13 at least) takes gradients for channels-last
ones where only an axis of size one makes them look so: for a batch of one sample, or images one pixel high,
in front of a transpose. What it returns is then wrong, in eval mode, too, and nothing says so. A flat view of
the result lets gradients come in plain order.

**PReLU.** Its slope at zero is the weight in reverse mode and one in forward mode and in a second backward
pass, so that J and Jᵀ disagree wherever an activation is exactly zero; and under vmap inside vmap its
gradients are those of other samples. Written as a choice it has one slope, that of reverse mode, everywhere.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

__all__ = ["MENDED", "Mended"]

MENDED = (nn.modules.batchnorm._BatchNorm, nn.modules.instancenorm._InstanceNorm, nn.PReLU)

_BATCH = {F.batch_norm, torch.batch_norm, torch.native_batch_norm}
_INSTANCE = {F.instance_norm, torch.instance_norm}
_PRELU = {F.prelu, torch.prelu, torch.Tensor.prelu}


class Mended(TorchFunctionMode):
    """Call these functions so that their derivatives are right.

    Attributes:
        needed: Whether one of them was met.
    """

    def __init__(self) -> None:
        super().__init__()
        self.needed = False

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call a function, or what stands for it."""
        if function in _PRELU:
            self.needed = True
            return _prelu(*args, **(kwargs or {}))
        result = function(*args, **(kwargs or {}))
        if function in _BATCH:
            self.needed = True
            if isinstance(result, tuple):
                return (_in_plain_order(result[0]), *result[1:])
            return _in_plain_order(result)
        if function in _INSTANCE:
            self.needed = True
            return result.flatten().view(result.shape)
        return result


def _in_plain_order(result: Tensor) -> Tensor:
    """Leave channels-last results, whose gradients are right, as they are."""
    return result.flatten().view(result.shape) if result.is_contiguous() else result


def _prelu(input: Tensor, weight: Tensor) -> Tensor:
    channels = weight.numel()
    if weight.dim() > 1 or channels not in (1, *input.shape[1:2]) or not input.dim():
        return F.prelu(input, weight)  # which says what is wrong, or takes numbers without axes
    slope = weight.view(channels, *(1 for _ in input.shape[2:])) if channels > 1 else weight.view(())
    return torch.where(input > 0, input, slope * input)
