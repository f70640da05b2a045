"""The factors of per-sample gradients: activations and output gradients, parameter by parameter."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ..model import Inputs
from .cost import LayerShape
from .layer_rules import Activation, OneHot
from .units import Unit

__all__ = [
    "Direct",
    "Outer",
    "in_parameter_order",
    "is_transformed",
    "is_watched",
    "join_samples",
    "outer_gradients",
    "unit_cotangents",
    "with_positions",
    "without_zeros",
    "written_pieces",
]

_SMALL_GRADIENTS = 2**16  # entries that are not worth a look
# Whether a tensor is seen from inside a torch.func transform, where its values cannot be read.
is_transformed = torch._C._functorch.is_functorch_wrapped_tensor
Piece = tuple[int, int, int, Tensor]  # parameter, first row, the row after the last, (B, C, p)


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
    def held(self) -> Tensor:
        """The activations as they take memory: unit vectors by their numbers."""
        return self.activations.index if isinstance(self.activations, OneHot) else self.activations

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


def is_watched(tensor: Tensor) -> bool:
    """Whether autograd, a torch.func transform or forward-mode differentiation follows what is made of it."""
    if tensor.requires_grad or is_transformed(tensor):
        return True
    # Outside of forward mode there is no level, and unpack_dual would refuse.
    return forward_ad._current_level >= 0 and forward_ad.unpack_dual(tensor).tangent is not None


def unit_cotangents(
    outputs: Tensor, inputs: Inputs, dtype: torch.dtype, device: torch.device | str
) -> Tensor:
    """Return ``(C, N, O)`` unit vectors of some outputs, ``(C,)`` numbers: the same for all samples."""
    unit = torch.zeros((len(outputs), 1, inputs.num_outputs), dtype=dtype, device=device)
    unit[torch.arange(len(outputs)), 0, outputs] = 1
    return unit.expand(-1, inputs.num_samples, -1)  # stride 0 along N: C·O numbers, not C·N·O


def outer_gradients(gradients: Tensor, activations: Activation, out: Tensor | None = None) -> Tensor:
    """Return ``(B, C, groups, d_out, d_in)`` gradients from ``(B, C, groups, d_out, S)`` and activations.

    Cost: 2 B C S d_in d_out operations. ``out`` is flat memory to use, large enough.
    """
    count, directions, groups, outputs, positions = gradients.shape
    if isinstance(activations, OneHot):
        # Σ_s g_s e_{i_s}ᵀ: g_s is added to column i_s.
        index = activations.index[:, None, None, None, :].expand_as(gradients)
        result = gradients.new_zeros((*gradients.shape[:4], activations.size))
        return result.scatter_add_(4, index, gradients)
    inputs = activations.shape[2]
    if groups == 1:
        # One product a sample for all directions, (C·d_out, S) (S, d_in): 82 to 92 billion operations a
        # second on one core, against 44 to 82 for one product a sample and direction.
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


def written_pieces(layer: Outer | Direct) -> list[Piece]:
    """Write the gradients of one layer down, and those of the bias that rides with it."""
    unit = layer.unit
    if isinstance(layer, Direct):
        return [(unit.index, unit.start, unit.stop, layer.gradients)]
    whole = in_parameter_order(outer_gradients(layer.gradients, layer.activations), layer.transposed)
    pieces = [(unit.index, unit.start, unit.stop, whole)]
    if unit.bias is not None:
        bias = unit.bias
        pieces.append((bias.index, bias.start, bias.stop, layer.gradients.sum(-1).flatten(2)))
    return pieces


def without_zeros(layer: Outer) -> Outer | None:
    """Return a layer without positions at which no output gradient is; None where there are none at all.

    Behind a class token, a last position that is read, or a branch that is scaled by zero, most of them are.
    """
    gradients = layer.gradients  # (B, C, groups, d_out, S)
    # Where one sample and direction has a gradient at every position, which is the rule, none is left out.
    if gradients.numel() <= _SMALL_GRADIENTS or bool(gradients[0, 0].ne(0).any(1).all()):
        return layer
    # The largest entry and not a sum: it cannot cancel, and is not zero where one is not a number.
    live = torch.linalg.vector_norm(gradients, ord=torch.inf, dim=(0, 1, 2, 3)).ne(0)
    if bool(live.all()):
        return layer
    if not bool(live.any()):
        return None
    held = layer.activations
    kept: Activation = OneHot(held.index[:, live], held.size) if isinstance(held, OneHot) else held[..., live]
    return replace(layer, activations=kept, gradients=gradients[..., live])


def with_positions(layer: Outer, positions: int) -> Outer:
    """Return a layer with zeros at further positions, which change no sum over positions."""
    missing = positions - layer.shape.positions
    if missing == 0:
        return layer
    held = layer.activations
    if isinstance(held, OneHot):  # row 0 of the table, whose gradient is zero there
        wider: Activation = OneHot(torch.nn.functional.pad(held.index, (0, missing)), held.size)
    else:
        wider = torch.nn.functional.pad(held, (0, missing))
    return replace(layer, activations=wider, gradients=torch.nn.functional.pad(layer.gradients, (0, missing)))
