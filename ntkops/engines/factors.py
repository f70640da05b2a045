"""The factors of per-sample gradients: activations and output gradients, parameter by parameter."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .cost import LayerShape
from .layer_rules import Activation, OneHot
from .units import Unit

__all__ = ["Direct", "Factors", "Outer", "in_parameter_order", "join_samples", "outer_gradients"]


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
