"""The linear tail of a model: a head that is wider than what it reads.

Where the output is y = W h + b at every output position, with W of shape V × d and V > d, all directions
in which parameters before the head can move the output lie in the range of W. With a thin QR
factorisation W = Q R their kernel is Q K' Qᵀ with K' for the d columns of Q at each position: d backward
passes instead of V. The head's own gradients are known without any.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..model import Inputs
from ..model.record import Call, Recording
from .collect import backward
from .layer_rules import RULES, Layout
from .units import Unit, is_transposed, plan_units

__all__ = ["Tail", "find_tail", "read_positions"]

_HEADS = {"linear": "weight", "matmul": "other", "addmm": "mat2"}


@dataclass(frozen=True)
class Tail:
    """A linear head.

    Attributes:
        weight: Number of its weight.
        bias: Number of its bias, or None.
        transposed: Whether the weight is d × V.
        classes: Number V of rows.
        width: Number d of columns.
        positions: For each output position, the head's position that it shows.
    """

    weight: int
    bias: int | None
    transposed: bool
    classes: int
    width: int
    positions: tuple[int, ...]

    def ends(self, inputs: Inputs) -> bool:
        """Whether outputs of these samples are at the head's positions: all have them, and no others."""
        return inputs.lengths is None and inputs.num_outputs == len(self.positions) * self.classes

    @property
    def parameters(self) -> frozenset[int]:
        """Numbers of the head's parameters."""
        return frozenset({self.weight} if self.bias is None else {self.weight, self.bias})

    @property
    def rank(self) -> int:
        """Backward passes for all outputs."""
        return len(self.positions) * self.width

    def matrix(self, params: Sequence[Tensor]) -> Tensor:
        """Return W, ``(V, d)``."""
        weight = params[self.weight].detach()
        return weight.mT if self.transposed else weight


def find_tail(
    recording: Recording,
    covered: frozenset[int],
    layouts: dict[tuple[object, ...], Layout],
    shapes: Sequence[torch.Size],
) -> Tail | None:
    """Return the linear head of a recorded pass, or None if the last call is none that pays.

    Args:
        recording: A forward pass over B samples, with its graph.
        covered: Numbers of the covered parameters.
        layouts: Where the samples are, by signature of the call.
        shapes: Shapes of the parameters.
    """
    if not recording.calls or recording.calls[-1].signature not in layouts:
        return None
    call, number = recording.calls[-1], len(recording.calls) - 1
    role = _HEADS.get(call.rule)
    place = call.places.get(role) if role is not None else None
    if role is None or place is None or place.index not in covered:
        return None
    found = _own_units(recording.calls, number, covered)
    if found is None or (place.start, place.stop) != (0, shapes[place.index][0]):
        return None
    unit, bias = found
    transposed = is_transposed(recording.calls, unit.uses[0])
    classes, width = shapes[place.index][::-1] if transposed else shapes[place.index]
    if bias is not None and shapes[bias] != (classes,):
        return None
    own = {place.index} if bias is None else {place.index, bias}
    count, size = recording.output.shape
    if classes <= width or size % classes or len(covered) == len(own):
        return None
    generator = torch.Generator().manual_seed(17)
    values = torch.randn((count, size), generator=generator, dtype=torch.float64)
    positions = read_positions(recording, layouts[call.signature], values.to(recording.output), classes)
    if not positions:
        return None
    return Tail(place.index, bias, transposed, classes, width, positions)


def _own_units(calls: Sequence[Call], number: int, covered: frozenset[int]) -> tuple[Unit, int | None] | None:
    """Return the last call's weight and the number of its bias, if they are used nowhere else."""
    own = frozenset(place.index for place in calls[number].places.values()) & covered
    units = plan_units(calls, own)
    weights = [unit for unit in units if unit.kind == "outer"]
    others = [unit for unit in units if unit.kind != "outer"]
    if len(weights) != 1 or len(others) > 1 or any(len(unit.uses) != 1 for unit in units):
        return None
    joined = weights[0].bias
    if joined is not None and others:
        return None
    return weights[0], others[0].index if others else None if joined is None else joined.index


def read_positions(
    recording: Recording, layout: Layout, cotangents: Tensor, classes: int
) -> tuple[int, ...] | None:
    """Return which position of the last call each output position shows, or None if it is no selection.

    Args:
        recording: A forward pass over B samples.
        layout: Where the samples are in the last call's result.
        cotangents: ``(B, O)`` random numbers; their gradient at the last call must be the same numbers.
        classes: Number V of classes.
    """
    call, number = recording.calls[-1], len(recording.calls) - 1
    found = backward(recording, cotangents.unsqueeze(0), [number], False, False)[0]
    if found is None:
        return None
    count = len(cotangents)
    arrived = RULES[call.rule].gradient(call, layout, count, found)[:, 0, 0].mT  # (B, S', V)
    sent = cotangents.view(count, -1, classes)  # (B, S, V)
    same = torch.cdist(sent[0].double(), arrived[0].double()) <= 1e-5 * sent[0].double().norm(dim=1)[:, None]
    if not bool((same.sum(1) == 1).all()):
        return None
    positions = same.int().argmax(1)
    if len(positions.unique()) < len(positions):
        return None
    expected = torch.zeros_like(arrived)
    expected[:, positions] = sent
    return tuple(positions.tolist()) if torch.allclose(arrived, expected, rtol=1e-5, atol=0) else None
