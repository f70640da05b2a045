"""Batch and instance norms whose backward pass on the CPU is right for every layout of gradients.

The backward pass of torch (2.13 at least) takes gradients for channels-last ones where only an axis of size
one makes them look so: for a batch of one sample, or images one pixel high, in front of a transpose. What it
returns is then wrong, in eval mode, too, and nothing says so. A flat view of the result lets gradients come
in plain order.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

__all__ = ["PlainGradients"]

_BATCH = {F.batch_norm, torch.batch_norm, torch.native_batch_norm}
_INSTANCE = {F.instance_norm, torch.instance_norm}


class PlainGradients(TorchFunctionMode):
    """Let gradients reach these norms in plain order.

    Attributes:
        needed: Whether a norm was met.
    """

    def __init__(self) -> None:
        super().__init__()
        self.needed = False

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call a function, and look at its result through a flat view if it is such a norm."""
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
