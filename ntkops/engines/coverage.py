"""Which parameters the layer rules cover, and what their factors take."""

from __future__ import annotations

from dataclasses import dataclass, replace

from .contraction import LEAST_INPUTS
from .cost import KernelShape, written_at_once
from .factors import Outer
from .layer_factors import Factors
from .layer_rules import Layout, OneHot
from .summation import COLUMNS
from .tail import Tail

__all__ = ["Coverage", "HiddenStates"]

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
class Coverage:
    """What the layer rules cover.

    Attributes:
        covered: Numbers of the covered parameters.
        reasons: Why each of the others is left to automatic differentiation.
        layouts: Where the samples are in the result of each kind of call.
        batched: Whether several directions may go through one batched backward pass.
        direction_entries: Entries of output gradients, for each sample and direction.
        kept_entries: The same with gradients in the place of larger factors, as kernels keep them.
        sample_entries: Entries of activations, for each sample.
        layer_entries: Entries of the largest layer's gradient.
        states: What the output is if it is all hidden states of a recurrent layer, else None.
        tail: The linear layer with which the model ends, if it is wider than what it reads.
        body: The coverage of what is before the tail.
    """

    covered: frozenset[int]
    reasons: dict[int, str]
    layouts: dict[Signature, Layout]
    batched: bool = False
    direction_entries: int = 0
    kept_entries: int = 0
    sample_entries: int = 0
    layer_entries: int = 0
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

    def measured(self, factors: Factors) -> Coverage:
        """Return the coverage with the sizes of its factors, seen on those of one direction."""
        outers = [layer for layer in factors.outers if layer.unit.index in self.covered]
        directs = [layer for layer in factors.directs if layer.unit.index in self.covered]
        count = max(1, factors.count)
        direct = sum(layer.gradients[:, :1].numel() for layer in directs) // count
        return replace(
            self,
            direction_entries=direct + sum(layer.gradients[:, :1].numel() for layer in outers) // count,
            kept_entries=direct + sum(_kept_entries(layer) for layer in outers) // count,
            sample_entries=sum(_entries(layer) for layer in outers) // count,
            layer_entries=max((_gradient_entries(layer) for layer in outers), default=0),
        )

    def is_small(self, directions: int, count: int) -> bool:
        """Whether so many directions of so many samples are few enough for one batched backward pass."""
        return directions * count * self.direction_entries <= _SMALL_WORK

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
        """Return how many directions go through one backward pass: as many as stay small."""
        if not self.batched:
            return 1
        return max(1, min(directions, _SMALL_WORK // max(1, count * self.direction_entries)))


def _entries(layer: Outer) -> int:
    held = layer.activations
    return held.index.numel() if isinstance(held, OneHot) else held.numel()


def _kept_entries(layer: Outer) -> int:
    """Entries for one direction of all samples, of gradients where these are no larger than factors."""
    entries = layer.gradients[:, :1].numel()
    if len(layer.unit.uses) == 1 and written_at_once(layer.shape):
        return len(layer.gradients) * layer.shape.entries
    return entries


def _gradient_entries(layer: Outer) -> int:
    """Entries of one gradient that are written down at a time."""
    shape = layer.shape
    if shape.positions == shape.groups == 1:  # Gram matrices, whatever is wanted
        return 0
    if shape.one_hot:
        return shape.positions * shape.outputs
    return min(shape.entries, max(COLUMNS, LEAST_INPUTS * shape.groups * shape.outputs))
