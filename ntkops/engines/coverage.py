"""What layer structure a model has, its linear readout included.

Where the output is y = W h + b at every output position, with W of shape V × d and V > d, all directions
in which parameters before the head can move the output lie in the range of W. With a thin QR
factorisation W = Q R their kernel is Q K' Qᵀ with K' for the d columns of Q at each position: d backward
passes instead of V. The head's own gradients are known without any.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..model import Inputs
from ..model.record import Call, Recording
from .collect import backward
from .contraction import SLAB_ENTRIES
from .cost import KernelShape, LayerShape, ProductRoute, choose_product, written_at_once
from .factors import Direct, Outer
from .layer_rules import RULES, Layout
from .units import Unit, is_transposed, plan_units

__all__ = [
    "Coverage",
    "HiddenStates",
    "LayerSizes",
    "LinearReadout",
    "find_readout",
    "moves_within",
    "read_positions",
]

Signature = tuple[object, ...]

_HEADS = {"linear": "weight", "matmul": "other", "addmm": "mat2"}  # rules of a head, and its weight's role
_SMALL_WORK = 2**22  # activations' entries for all directions below which dispatch is what costs


@dataclass(frozen=True)
class LinearReadout:
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


def find_readout(
    recording: Recording,
    covered: frozenset[int],
    layouts: dict[tuple[object, ...], Layout],
    shapes: Sequence[torch.Size],
) -> LinearReadout | None:
    """Return the linear head of a recorded pass, or None if the last call is none that pays."""
    if not recording.calls or recording.calls[-1].signature not in layouts:
        return None
    call, number = recording.calls[-1], len(recording.calls) - 1
    role = _HEADS.get(call.rule)
    place = call.places.get(role) if role is not None else None
    if role is None or place is None or place.index not in covered:
        return None
    found = _own_units(recording.calls, number, covered)
    if found is None or (place.start, place.stop) != (0, shapes[place.index][0]):
        return None  # the weight is used elsewhere, too, or some of its rows alone are
    unit, bias = found
    transposed = is_transposed(recording.calls, unit.uses[0])
    classes, width = shapes[place.index][::-1] if transposed else shapes[place.index]
    if bias is not None and shapes[bias] != (classes,):
        return None
    own = {place.index} if bias is None else {place.index, bias}
    count, size = recording.output.shape  # (B, O)
    # It pays where W maps up; outputs are whole rows of classes, and something lies before the head.
    if classes <= width or size % classes or len(covered) == len(own):
        return None
    generator = torch.Generator().manual_seed(17)
    values = torch.randn((count, size), generator=generator, dtype=torch.float64)
    positions = read_positions(recording, layouts[call.signature], values.to(recording.output), classes)
    if not positions:
        return None
    return LinearReadout(place.index, bias, transposed, classes, width, positions)


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

    The gradient at the last call of random cotangents ``(B, O)`` must be the same numbers, V classes at a
    time.
    """
    call, number = recording.calls[-1], len(recording.calls) - 1
    found = backward(recording, cotangents.unsqueeze(0), [number], False, False)[0]
    if found is None:
        return None
    count = len(cotangents)
    arrived = RULES[call.rule].gradient(call, layout, count, found)[:, 0, 0].mT  # (B, S', V)
    sent = cotangents.view(count, -1, classes)  # (B, S, V)
    # Rows of V random numbers are told apart by one sample; whether all samples agree is looked at below.
    same = torch.cdist(sent[0].double(), arrived[0].double()) <= 1e-5 * sent[0].double().norm(dim=1)[:, None]
    if not bool((same.sum(1) == 1).all()):  # (S,): each output position arrives at one place, unchanged
        return None
    positions = same.int().argmax(1)
    if len(positions.unique()) < len(positions):
        return None
    expected = torch.zeros_like(arrived)
    expected[:, positions] = sent
    return tuple(positions.tolist()) if torch.allclose(arrived, expected, rtol=1e-5, atol=0) else None


def moves_within(
    recording: Recording, units: Sequence[Unit], sent: Tensor, projected: Tensor, dtype: torch.dtype
) -> bool:
    """Return whether cotangents ``(1, B, O)`` and their projection on the head's range act alike before it.

    The output moves with parameters before the head within that range if and only if uᵀ ∂y = (Π u)ᵀ ∂y for
    all u, for which one random u stands. Cost: two backward passes.
    """
    numbers = sorted({use.call for unit in units for use in unit.uses})
    one, other = (backward(recording, c, numbers, False, False) for c in (sent, projected))
    difference = scale = 0.0
    for a, b in zip(one, other, strict=True):
        if (a is None) != (b is None):
            return False
        if a is not None and b is not None:
            difference += float((a.double() - b.double()).square().sum())
            scale += float(a.double().square().sum())
    return difference <= (1e3 * torch.finfo(dtype).eps) ** 2 * scale


# -- which parameters the layer rules cover, and what their factors take


@dataclass(frozen=True)
class HiddenStates:
    """The output is all hidden states of one recurrent layer over time, which has all the parameters.

    Attributes:
        hidden: Number H of hidden units.
        parts: Number of tensors in a state, 2 for an LSTM.
    """

    hidden: int
    parts: int


@dataclass(frozen=True)
class LayerSizes:
    """What the factors of one unit take.

    Attributes:
        unit: The unit.
        shape: Its sizes as the cost model takes them; None where its gradient is written down.
        direction: Entries of output gradients, for each sample and direction.
        kept: The same with gradients in the place of larger factors, as kernels keep them.
        sample: Entries of activations, for each sample.
        gradient: Entries of its gradient that are written down at a time.
    """

    unit: Unit
    shape: LayerShape | None
    direction: int
    kept: int
    sample: int
    gradient: int

    @classmethod
    def of(cls, layer: Outer | Direct) -> LayerSizes:
        """Return the sizes of some samples' factors."""
        direction = layer.gradients[:1, :1].numel()
        if isinstance(layer, Direct):
            return cls(layer.unit, None, direction, direction, 0, 0)
        shape, sample = layer.shape, layer.held[:1].numel()
        written = len(layer.unit.uses) == 1 and written_at_once(shape)
        kept = shape.entries if written else direction
        if shape.positions == shape.groups == 1:  # Gram matrices, whatever is wanted
            gradient = 0
        elif shape.one_hot:
            gradient = shape.positions * shape.outputs
        else:
            # A block of SLAB_ENTRIES for all samples and directions: a share of it, or one output with all
            # inputs.
            gradient = min(shape.entries, max(SLAB_ENTRIES // 2**9, shape.groups * shape.inputs))
        return cls(layer.unit, shape, direction, kept, sample, gradient)


@dataclass(frozen=True)
class Coverage:
    """What the layer rules cover.

    Attributes:
        covered: Numbers of the covered parameters.
        reasons: Why each of the others is left to automatic differentiation.
        layouts: Where the samples are in the result of each kind of call.
        direction_entries: Entries of output gradients, for each sample and direction.
        kept_entries: The same with gradients in the place of larger factors, as kernels keep them.
        sample_entries: Entries of activations, for each sample.
        layer_entries: Entries of the largest layer's gradient.
        shapes: Sizes of every layer whose gradients are outer products.
        states: What the output is if it is all hidden states of a recurrent layer, else None.
        readout: The linear layer with which the model ends, if it is wider than what it reads.
        body: The coverage of what is before the readout.
    """

    covered: frozenset[int]
    reasons: dict[int, str]
    layouts: dict[Signature, Layout]
    direction_entries: int = 0
    kept_entries: int = 0
    sample_entries: int = 0
    layer_entries: int = 0
    shapes: tuple[LayerShape, ...] = ()
    states: HiddenStates | None = None
    readout: LinearReadout | None = None
    body: Coverage | None = None

    def without(self, index: int, reason: str) -> Coverage:
        """Return the coverage with one parameter less."""
        left = replace(self, covered=self.covered - {index}, reasons={**self.reasons, index: reason})
        if self.readout is None or self.body is None:
            return left
        # Without the head, or with nothing before it, there is no readout.
        if index in self.readout.parameters or self.body.covered == {index}:
            return left.without_readout()
        return replace(left, body=self.body.without(index, reason))

    def without_readout(self) -> Coverage:
        """Return the coverage with one backward pass for each output."""
        return replace(self, readout=None, body=None)

    def measured(self, layers: Iterable[LayerSizes]) -> Coverage:
        """Return the coverage with the sizes of its factors, seen on those of one direction."""
        own = [layer for layer in layers if layer.unit.index in self.covered]
        return replace(
            self,
            direction_entries=sum(layer.direction for layer in own),
            kept_entries=sum(layer.kept for layer in own),
            sample_entries=sum(layer.sample for layer in own),
            layer_entries=max((layer.gradient for layer in own), default=0),
            shapes=tuple(layer.shape for layer in own if layer.shape is not None),
        )

    def product_entries(self, directions: int, route: ProductRoute | None) -> int:
        """Return the entries of one sample while factors for products are made and kept."""
        written = sum(
            directions * shape.entries
            for shape in self.shapes
            if choose_product(shape, 1, 1, directions, route) == "gradient"
        )
        # Gram matrices of activations are used only where they are smaller than twice the activations.
        return written + directions * self.direction_entries + 3 * self.sample_entries

    def backwards(self, outputs: int) -> int:
        """Return how many backward passes a number of outputs takes."""
        return outputs if self.readout is None else min(outputs, self.readout.rank)

    def reduced(self, wanted: KernelShape) -> KernelShape:
        """Return the kernel that is made of what is before the readout, in order to make another one."""
        readout = self.readout
        if readout is None or wanted.rows * wanted.terms * wanted.kernels <= readout.rank:
            return wanted
        if wanted.rows == wanted.columns == wanted.kernels == 1:
            return replace(wanted, terms=readout.rank)
        return replace(wanted, rows=readout.rank, columns=readout.rank, terms=1, kernels=1)

    def chunk(self, directions: int, count: int) -> int:
        """Return how many directions may go through one backward pass: as many as stay small."""
        return max(1, min(directions, _SMALL_WORK // max(1, count * self.direction_entries)))
