"""Convolutions, forward and transposed, of any stride, padding, dilation and number of groups."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...model.record import Call, Entry
from .base import Activation, Kind, Layout, Rule

__all__ = ["Convolution", "TransposedConvolution"]


def _each(value: Any, axes: int) -> list[int]:
    """Return a size for each spatial axis."""
    if isinstance(value, int):
        return [value] * axes
    values = [int(v) for v in value]
    return values * axes if len(values) == 1 else values


def _windows(
    x: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    dilation: Sequence[int],
    before: Sequence[int],
    positions: Sequence[int],
) -> Tensor:
    """Return the windows that a kernel sees, ``(M, C, *kernel, *positions)``, as a view of padded ``x``."""
    padding: list[int] = []
    for size, k, s, d, left, count in zip(
        x.shape[2:], kernel, stride, dilation, before, positions, strict=True
    ):
        # The last window begins at (count - 1) s and reaches over d (k - 1) + 1; what lies behind it is cut
        # off.
        needed = (count - 1) * s + d * (k - 1) + 1
        padding = [left, needed - size - left, *padding]  # F.pad starts with the last axis
    padded = F.pad(x, padding) if any(padding) else x
    steps = padded.stride()[2:]
    return padded.as_strided(
        (*x.shape[:2], *kernel, *positions),
        (
            *padded.stride()[:2],
            *(step * d for step, d in zip(steps, dilation, strict=True)),
            *(step * s for step, s in zip(steps, stride, strict=True)),
        ),
        padded.storage_offset(),
    )


def _by_sample(x: Tensor, layout: Layout, count: int, groups: int, lead: int) -> Tensor:
    """Turn ``(*lead, B·k, channels, L)`` into ``(B, *lead, groups, channels / groups, k·L)``."""
    exposed = layout.expose(x, count, lead).unflatten(-2, (groups, -1))  # (B, *lead, k, groups, c, L)
    return exposed.movedim(1 + lead, -2).flatten(-2)


class _OfWindows(Rule):
    """A matrix product with windows: batches of images on the first axis, an outer product for the weight."""

    def supports(self, call: Call) -> bool:
        """A batch of inputs."""
        return len(call.shape) == call.arguments["weight"].dim()

    def sample_axes(self, call: Call) -> range:
        """The first axis."""
        return range(1)

    def kind(self, role: str) -> Kind:
        """Outer products for the weight."""
        return "outer" if role == "weight" else "direct"

    def direct(
        self, call: Call, role: str, activation: object, layout: Layout, count: int, gradients: Tensor
    ) -> Tensor:
        """The bias: output gradients summed over positions."""
        return layout.expose(gradients.flatten(3).sum(3), count, 1).sum(2)


class Convolution(_OfWindows):
    """A convolution is a matrix product with the windows of its input."""

    entry = Entry(
        "convolution",
        ("input", "weight", "bias", "stride", "padding", "dilation", "groups"),
        ("weight", "bias"),
    )
    functions = (torch.conv1d, torch.conv2d, torch.conv3d)
    shares_bias = True

    def activation(self, call: Call, layout: Layout, count: int) -> Activation:
        """The windows, ``(B, groups, d_in, S)``."""
        given = call.arguments
        kernel = list(given["weight"].shape[2:])
        axes = len(kernel)
        dilation = _each(given.get("dilation", 1), axes)
        padding = given.get("padding", 0)
        if isinstance(padding, str):  # "same" or "valid"; of an odd sum "same" has more behind
            same = padding == "same"
            before = [d * (k - 1) // 2 if same else 0 for d, k in zip(dilation, kernel, strict=True)]
        else:
            before = _each(padding, axes)
        positions = call.shape[2:]
        windows = _windows(
            given["input"], kernel, _each(given.get("stride", 1), axes), dilation, before, positions
        )
        flat = windows.reshape(len(windows), -1, positions.numel())  # (B·k, C·kernel, L)
        return _by_sample(flat, layout, count, given.get("groups", 1), 0)

    def gradient(self, call: Call, layout: Layout, count: int, gradients: Tensor) -> Tensor:
        """The output gradients, ``(B, K, groups, d_out, S)``."""
        return _by_sample(gradients.flatten(3), layout, count, call.arguments.get("groups", 1), 1)


class TransposedConvolution(_OfWindows):
    """The roles of input and output gradient are exchanged: the windows are those of the gradient."""

    entry = Entry(
        "transposed_convolution",
        ("input", "weight", "bias", "stride", "padding", "output_padding", "groups", "dilation"),
        ("weight", "bias"),
    )
    functions = (torch.conv_transpose1d, torch.conv_transpose2d, torch.conv_transpose3d)

    def transposed(self, role: str) -> bool:
        """The weight has its input channels first."""
        return True

    def activation(self, call: Call, layout: Layout, count: int) -> Activation:
        """The input, ``(B, groups, channels, S)``."""
        given = call.arguments
        return _by_sample(given["input"].flatten(2), layout, count, given.get("groups", 1), 0)

    def gradient(self, call: Call, layout: Layout, count: int, gradients: Tensor) -> Tensor:
        """The windows of the output gradients, ``(B, K, groups, d_out, S)``."""
        given = call.arguments
        kernel = list(given["weight"].shape[2:])
        axes = len(kernel)
        positions = given["input"].shape[2:]
        windows = _windows(
            gradients.flatten(0, 1),
            kernel,
            _each(given.get("stride", 1), axes),
            _each(given.get("dilation", 1), axes),
            _each(given.get("padding", 0), axes),
            positions,
        )
        flat = windows.reshape(len(gradients), gradients.shape[1], -1, positions.numel())
        return _by_sample(flat, layout, count, given.get("groups", 1), 1)
