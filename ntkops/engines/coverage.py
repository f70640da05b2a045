"""Which parameters the layer rules cover, and what their factors take."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from .contraction import SLAB_ENTRIES
from .cost import KernelShape, LayerShape, ProductRoute, choose_product, written_at_once
from .factors import Direct, Outer
from .layer_rules import Layout, OneHot
from .tail import Tail
from .units import Unit

__all__ = ["Coverage", "HiddenStates", "LayerSizes"]

Signature = tuple[object, ...]

_SMALL_WORK = 2**22  # activations' entries for all directions below which dispatch is what costs


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
        held, shape = layer.activations, layer.shape
        sample = (held.index if isinstance(held, OneHot) else held)[:1].numel()
        written = len(layer.unit.uses) == 1 and written_at_once(shape)
        kept = shape.entries if written else direction
        if shape.positions == shape.groups == 1:  # Gram matrices, whatever is wanted
            gradient = 0
        elif shape.one_hot:
            gradient = shape.positions * shape.outputs
        else:
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
        tail: The linear layer with which the model ends, if it is wider than what it reads.
        body: The coverage of what is before the tail.
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
    tail: Tail | None = None
    body: Coverage | None = None

    def without(self, index: int, reason: str) -> Coverage:
        """Return the coverage with one parameter less."""
        left = replace(self, covered=self.covered - {index}, reasons={**self.reasons, index: reason})
        if self.tail is None or self.body is None:
            return left
        if index in self.tail.parameters or self.body.covered == {index}:
            return left.without_tail()
        return replace(left, body=self.body.without(index, reason))

    def without_tail(self) -> Coverage:
        """Return the coverage with one backward pass for each output."""
        return replace(self, tail=None, body=None)

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
        return outputs if self.tail is None else min(outputs, self.tail.rank)

    def reduced(self, wanted: KernelShape) -> KernelShape:
        """Return the kernel that is made of what is before the tail, in order to make another one."""
        tail = self.tail
        if tail is None or wanted.rows * wanted.terms * wanted.kernels <= tail.rank:
            return wanted
        if wanted.rows == wanted.columns == wanted.kernels == 1:
            return replace(wanted, terms=tail.rank)
        return replace(wanted, rows=tail.rank, columns=tail.rank, terms=1, kernels=1)

    def chunk(self, directions: int, count: int) -> int:
        """Return how many directions may go through one backward pass: as many as stay small."""
        return max(1, min(directions, _SMALL_WORK // max(1, count * self.direction_entries)))
