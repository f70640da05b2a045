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

**Embeddings.** Their backward pass leaves out the padding row, and forward mode does not: what was looked up
there is made a constant for both. Gradients of a table are dense, and are not divided by the counts of
tokens, which would let a row of J depend on the other samples.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

__all__ = ["CORRECTED", "Corrected", "embedding", "prelu"]

CORRECTED = (nn.modules.batchnorm._BatchNorm, nn.modules.instancenorm._InstanceNorm, nn.PReLU)

_ATEN = torch.ops.aten  # whose operators exported graphs call themselves
_BATCH = {F.batch_norm, torch.batch_norm, torch.native_batch_norm, _ATEN.batch_norm.default}
_INSTANCE = {F.instance_norm, torch.instance_norm, _ATEN.instance_norm.default}
_LAYER = {F.layer_norm, torch.layer_norm, _ATEN.layer_norm.default}
_PRELU = {F.prelu, torch.prelu, torch.Tensor.prelu, _ATEN.prelu.default}
_EMBEDDING = {torch.embedding, _ATEN.embedding.default}
_BAG = {torch.embedding_bag, _ATEN.embedding_bag.default, _ATEN.embedding_bag.padding_idx}


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
            return (function if _runs_again() else prelu)(*args, **(kwargs or {}))
        lookup = _LOOKUPS.get(function)
        if lookup is not None:
            self.needed = True
            return lookup(*args, **(kwargs or {}))
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
    return torch.where(input > 0, input, slope * input)  # at 0 the weight, as in reverse mode


def _runs_again() -> bool:
    """Whether a checkpointed block computes, which runs again without a mode."""
    # It must save the same tensors then. No forward mode exists there, so that nothing need be put right.
    return torch._C._autograd._top_saved_tensors_default_hooks(True) is not None


def embedding(
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Tensor:
    """Look up, with constants at the padding row and a dense gradient that no count divides."""
    rows = weight.shape[0]
    if padding_idx is None or _runs_again() or not -rows <= padding_idx < rows:  # torch says what is wrong
        return F.embedding(input, weight, padding_idx, max_norm, norm_type)
    found = F.embedding(input, weight, None, max_norm, norm_type)
    return torch.where((input == padding_idx % rows).unsqueeze(-1), found.detach(), found)


# Below, arguments are those of torch's functions, of which some are taken and left without effect.


def _aten_embedding(
    weight: Tensor,
    indices: Tensor,
    padding_idx: int = -1,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Tensor:
    return embedding(indices, weight, padding_idx if padding_idx >= 0 else None)  # -1 is "none" there


def _bag(
    input: Tensor,
    weight: Tensor,
    offsets: Tensor | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    mode: str = "mean",
    sparse: bool = False,
    *more: Any,
    **named: Any,
) -> Tensor:
    return F.embedding_bag(input, weight, offsets, max_norm, norm_type, False, mode, False, *more, **named)


def _aten_bag(
    weight: Tensor,
    indices: Tensor,
    offsets: Tensor,
    scale_grad_by_freq: bool = False,
    mode: int = 0,
    sparse: bool = False,
    *more: Any,
    **named: Any,
) -> Any:
    return torch.embedding_bag(weight, indices, offsets, False, mode, False, *more, **named)


_LOOKUPS: dict[Any, Callable[..., Any]] = {
    F.embedding: embedding,
    **dict.fromkeys(_EMBEDDING, _aten_embedding),
    F.embedding_bag: _bag,
    **dict.fromkeys(_BAG, _aten_bag),
}


def _standardised(input: Tensor, axes: int, eps: float) -> Tensor:
    """Return the input less its mean over the last axes, over its standard deviation, in float32 at least."""
    # In plain operations, of which each has right derivatives of every order.
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
    # Stored statistics are constants, whose derivatives torch has right; so are refusals torch's own.
    if not use_input_stats or running_mean is not None or input.dim() < 3:
        given = (running_mean, running_var, weight, bias, use_input_stats, momentum, eps)
        result: Tensor = function(input, *given, *more, **named)
        return result.flatten().view(result.shape)
    shape = (-1, *(1 for _ in input.shape[2:]))
    result = _standardised(input, input.dim() - 2, eps)
    result = result if weight is None else result * weight.view(shape)
    return result if bias is None else result + bias.view(shape)
