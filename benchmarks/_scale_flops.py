"""What one sample costs: operations that torch counts, and bytes that a backward pass keeps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

__all__ = ["count_operations", "resnet50"]


class _Bottleneck(nn.Module):
    def __init__(self, before: int, width: int, stride: int) -> None:
        super().__init__()
        after = 4 * width
        self.body = nn.Sequential(
            *_normalised(before, width, 1, 1),
            nn.ReLU(),
            *_normalised(width, width, 3, stride),
            nn.ReLU(),
            *_normalised(width, after, 1, 1),
        )
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or before != after:
            self.shortcut = nn.Sequential(*_normalised(before, after, 1, stride))

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.body(x) + self.shortcut(x))


def _normalised(before: int, after: int, size: int, stride: int) -> tuple[nn.Module, nn.Module]:
    convolution = nn.Conv2d(before, after, size, stride, padding=size // 2, bias=False)
    return convolution, nn.BatchNorm2d(after)


def resnet50() -> nn.Module:
    """Return ResNet-50 for images 3 x 224 x 224 and 1000 classes, in eval mode, without memory."""
    with torch.device("meta"):
        layers: list[nn.Module] = [*_normalised(3, 64, 7, 2), nn.ReLU(), nn.MaxPool2d(3, 2, 1)]
        before = 64
        for stage, depth in enumerate((3, 4, 6, 3)):
            for block in range(depth):
                width = 64 * 2**stage
                layers.append(_Bottleneck(before, width, 2 if stage and not block else 1))
                before = 4 * width
        layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(before, 1000)]
        return nn.Sequential(*layers).eval()


def _memory(tensor: Tensor) -> int:
    """Return what tells memory apart, also that of tensors that have none."""
    return int(tensor.untyped_storage()._cdata)


def _flops(work: Callable[[], Any]) -> int:
    counter = FlopCounterMode(display=False)
    with counter:
        work()
    return int(counter.get_total_flops())


def count_operations(model: nn.Module, sample: Tensor) -> dict[str, int]:
    """Count what one sample takes.

    Args:
        model: A model of tensors, on any device, meta too.
        sample: A batch of one.

    Returns:
        Operations (a multiplication and an addition are two) of the forward pass, of pulling one column back
        (Jᵀv) and of pushing one forward (J p) beyond it; bytes kept for the backward pass; parameters.
    """
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    ones = {name: torch.ones_like(p) for name, p in parameters.items()}

    def call(given: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(model, given, (sample,))

    def pull() -> Any:
        return torch.autograd.grad(model(sample).sum(), list(model.parameters()))

    forward = _flops(lambda: model(sample))
    weights = {_memory(p) for p in model.parameters()}
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        if _memory(tensor) not in weights:
            kept[_memory(tensor)] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(sample)
    return {
        "forward": forward,
        "pull": _flops(pull) - forward,
        "push": _flops(lambda: torch.func.jvp(call, (parameters,), (ones,))) - forward,
        "kept_bytes": sum(tensor.untyped_storage().nbytes() for tensor in kept.values()),
        "parameters": sum(p.numel() for p in model.parameters()),
    }
