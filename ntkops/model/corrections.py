"""Functions of torch whose derivatives are wrong, or contradict each other, put right.

**Batch and instance norms.** Their backward pass on the CPU (2.13 at least) takes gradients for channels-last
ones where only an axis of size one makes them look so: for a batch of one sample, or images one pixel high,
in front of a transpose. What it returns is then wrong, in eval mode, too, and nothing says so. A flat view of
the result lets gradients come in plain order.

**PReLU.** Its slope at zero is the weight in reverse mode and one in forward mode and in a second backward
pass, so that J and Jᵀ disagree wherever an activation is exactly zero; and under vmap inside vmap its
gradients are those of other samples. Written as a choice it has one slope, that of reverse mode, everywhere.

**Layer and instance norms that are differentiated further.** Derivatives of their forward mode, and third
derivatives by any mode, take mean and variance for constants, and are wrong. Written in plain operations they
are right; that is slower, and done where results are differentiable alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

__all__ = ["CORRECTED", "Corrected", "prelu"]

CORRECTED = (nn.modules.batchnorm._BatchNorm, nn.modules.instancenorm._InstanceNorm, nn.PReLU)

_BATCH = {F.batch_norm, torch.batch_norm, torch.native_batch_norm}
_INSTANCE = {F.instance_norm, torch.instance_norm}
_LAYER = {F.layer_norm, torch.layer_norm}
_PRELU = {F.prelu, torch.prelu, torch.Tensor.prelu}


class Corrected(TorchFunctionMode):
    """Call these functions so that their derivatives are right; ``needed`` says whether one was met."""

    def __init__(self, recorded: bool = False) -> None:
        super().__init__()
        self._recorded = recorded  # whether results are differentiated further
        self.needed = False

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call a function, or what stands for it."""
        if function in _PRELU:
            self.needed = True
            return prelu(*args, **(kwargs or {}))
        if self._recorded and function in _LAYER:
            return _layer_norm(*args, **(kwargs or {}))
        if self._recorded and function in _INSTANCE:
            return _instance_norm(function, *args, **(kwargs or {}))
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


def prelu(input: Tensor, weight: Tensor) -> Tensor:
    """Return the input where it is positive, and elsewhere the input times the weight of its channel."""
    channels = weight.numel()
    if weight.dim() > 1 or channels not in (1, *input.shape[1:2]) or not input.dim():
        return F.prelu(input, weight)  # which says what is wrong, or takes numbers without axes
    slope = weight.view(channels, *(1 for _ in input.shape[2:])) if channels > 1 else weight.view(())
    return torch.where(input > 0, input, slope * input)


def _standardised(input: Tensor, axes: int, eps: float) -> Tensor:
    """Return the input less its mean over the last axes, over its standard deviation, in float32 at least."""
    dims = tuple(range(-axes, 0))
    wide = input if input.dtype.itemsize >= 4 else input.float()
    centred = wide - wide.mean(dims, keepdim=True)
    return (centred * (centred.square().mean(dims, keepdim=True) + eps).rsqrt()).to(input.dtype)


def _layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    cudnn_enable: bool = True,
) -> Tensor:
    if tuple(input.shape[-len(normalized_shape) :]) != tuple(normalized_shape):
        return F.layer_norm(input, list(normalized_shape), weight, bias, eps)  # which says what is wrong
    result = _standardised(input, len(normalized_shape), eps)
    result = result if weight is None else result * weight
    return result if bias is None else result + bias


def _instance_norm(
    function: Any,
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *more: Any,
    **named: Any,
) -> Tensor:
    if not use_input_stats or running_mean is not None or input.dim() < 3:
        given = (running_mean, running_var, weight, bias, use_input_stats, momentum, eps)
        result: Tensor = function(input, *given, *more, **named)
        return result.flatten().view(result.shape)
    shape = (-1, *(1 for _ in input.shape[2:]))
    result = _standardised(input, input.dim() - 2, eps)
    result = result if weight is None else result * weight.view(shape)
    return result if bias is None else result + bias.view(shape)
