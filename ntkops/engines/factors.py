"""The factors of per-sample gradients: activations and output gradients, parameter by parameter."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .cost import LayerShape
from .layer_rules import Activation, OneHot
from .units import Unit

__all__ = ["Direct", "Factors", "Outer", "in_parameter_order", "join_samples", "outer_gradients"]


_SMALL_ENTRIES = 2**16


@dataclass(eq=False)
class Outer:
    r"""Gradients :math:`\sum_s g_{s} a_{s}^\top` of one unit.

    Attributes:
        unit: The unit.
        transposed: Whether that sum is the transpose of the parameter.
        activations: ``(B, groups, d_in, S)``, or unit vectors.
        gradients: ``(B, C, groups, d_out, S)``.
    """

    unit: Unit
    transposed: bool
    activations: Activation
    gradients: Tensor

    @property
    def shape(self) -> LayerShape:
        """Sizes for the cost model."""
        _, _, groups, outputs, positions = self.gradients.shape
        if isinstance(self.activations, OneHot):
            return LayerShape(positions, self.activations.size, outputs, 1, True)
        return LayerShape(positions, self.activations.shape[2], outputs, groups)


@dataclass(eq=False)
class Direct:
    """Gradients that are written down, ``(B, C, p)``."""

    unit: Unit
    gradients: Tensor


@dataclass(eq=False)
class Factors:
    """All that is known of the gradients of B samples in C directions."""

    count: int
    outers: list[Outer]
    directs: list[Direct]
    output: Tensor | None = None

    @property
    def entries(self) -> int:
        """Entries of all factors."""
        layers: list[Outer | Direct] = [*self.outers, *self.directs]
        held = [layer.gradients.numel() for layer in layers]
        held += [layer.activations.numel() for layer in self.outers if isinstance(layer.activations, Tensor)]
        return sum(held)

    @property
    def is_small(self) -> bool:
        """Whether float32 factors are so few that float64 costs no time: calls cost more than arithmetic."""
        layers: list[Outer | Direct] = [*self.outers, *self.directs]
        narrow = bool(layers) and layers[0].gradients.dtype == torch.float32
        return narrow and layers[0].gradients.device.type != "mps" and self.entries <= _SMALL_ENTRIES

    def to(self, dtype: torch.dtype) -> Factors:
        """Return the same in another dtype."""
        outers = [
            replace(
                layer,
                gradients=layer.gradients.to(dtype),
                activations=layer.activations
                if isinstance(layer.activations, OneHot)
                else layer.activations.to(dtype),
            )
            for layer in self.outers
        ]
        directs = [replace(direct, gradients=direct.gradients.to(dtype)) for direct in self.directs]
        return replace(self, outers=outers, directs=directs)


def outer_gradients(gradients: Tensor, activations: Activation, out: Tensor | None = None) -> Tensor:
    """Return ``(B, C, groups, d_out, d_in)`` gradients from ``(B, C, groups, d_out, S)`` and activations.

    Args:
        gradients: Output gradients.
        activations: ``(B, groups, d_in, S)``, or unit vectors.
        out: Flat memory to use, large enough.

    Returns:
        The gradients of single samples. Cost: 2 B C S d_in d_out operations.
    """
    count, directions, groups, outputs, positions = gradients.shape
    if isinstance(activations, OneHot):
        index = activations.index[:, None, None, None, :].expand_as(gradients)
        result = gradients.new_zeros((*gradients.shape[:4], activations.size))
        return result.scatter_add_(4, index, gradients)
    inputs = activations.shape[2]
    if groups == 1:
        left = gradients.reshape(count, directions * outputs, positions)
        right = activations.reshape(count, inputs, positions).mT
        if out is not None:
            view = out[: count * directions * outputs * inputs].view(count, directions * outputs, inputs)
            torch.bmm(left, right, out=view)
        else:
            view = torch.bmm(left, right)
        return view.view(count, directions, 1, outputs, inputs)
    return gradients @ activations.mT.unsqueeze(1)


def in_parameter_order(gradients: Tensor, transposed: bool) -> Tensor:
    """Lay ``(B, C, groups, d_out, d_in)`` out as the parameter is, ``(B, C, p)``."""
    return (gradients.mT if transposed else gradients).flatten(2)


def join_samples(parts: Sequence[Activation]) -> Activation:
    """Join activations of several batches of samples."""
    first = parts[0]
    if isinstance(first, OneHot):
        return OneHot(torch.cat([part.index for part in parts if isinstance(part, OneHot)]), first.size)
    return torch.cat([part for part in parts if isinstance(part, Tensor)])
