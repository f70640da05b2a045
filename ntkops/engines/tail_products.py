"""Products with cached factors of a model with a linear tail: as wide as the tail, not as the output."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..model import Inputs
from .cost import ProductRoute
from .differentiation import Parameters
from .products import ProductFactors, Span, prepare_products
from .source import LayerSource
from .summation import long_product
from .tail import Tail
from .tail_blocks import Reduction, TailSource, head_activations

__all__ = ["TailFactors", "prepare_tail"]


@dataclass(eq=False)
class TailFactors:
    """The interface of `ProductFactors` for a body in reduced directions and a head.

    Attributes:
        body: Factors of what is before the head, for the directions.
        tail: The head.
        basis: Q, ``(V, k)``.
        read: ``(N, S, d)`` what the head reads.
        weight: Where its weight lies in the flat parameter vector.
        bias: Where its bias lies, or None.
    """

    body: ProductFactors
    tail: Tail
    basis: Tensor
    read: Tensor
    weight: Span
    bias: Span | None

    @property
    def spans_key(self) -> object:
        """What two sides of a kernel must have in common."""
        return ("tail", self.body.spans_key)

    def tensors(self) -> list[Tensor]:
        """Return what takes memory."""
        return [*self.body.tensors(), self.basis, self.read]

    @property
    def column_entries(self) -> int:
        """Entries that one column of a product takes in between."""
        return max(self.body.column_entries, len(self.read) * len(self.tail.positions) * self.tail.classes)

    def _by_position(self, vectors: Tensor) -> Tensor:
        return vectors.unflatten(2, (len(self.tail.positions), self.tail.classes))  # (k, N, S, V)

    def _reduce(self, split: Tensor) -> Tensor:
        return long_product(split, self.basis).flatten(2)  # (k, N, S·k')

    def _expand(self, reduced: Tensor) -> Tensor:
        """Return ``(k, N, S, V)`` for ``(k, N, S·k')``."""
        return reduced.unflatten(2, (len(self.tail.positions), -1)) @ self.basis.mT

    def pull(self, vectors: Tensor, size: int) -> Tensor:
        """Return Jᵀv, ``(k, P)``, for ``(k, N, O)``; parameters that are not covered get zero."""
        split = self._by_position(vectors)
        result = self.body.pull(self._reduce(split), size)
        pulled = long_product(split.flatten(1, 2).mT, self.read.flatten(0, 1))  # (k, V, d)
        if self.tail.transposed:
            pulled = pulled.mT
        result[:, self.weight.start : self.weight.stop] += pulled.flatten(1)
        if self.bias is not None:
            result[:, self.bias.start : self.bias.stop] += split.sum((1, 2))
        return result

    def push(self, tangents: Tensor) -> Tensor:
        """Return J p, ``(k, N, O)``, for ``(k, P)``."""
        result = self._expand(self.body.push(tangents))
        weight = tangents[:, self.weight.start : self.weight.stop]
        shape = (self.tail.classes, self.tail.width)
        matrix = weight.unflatten(1, shape[::-1]).mT if self.tail.transposed else weight.unflatten(1, shape)
        result += (self.read.flatten(0, 1) @ matrix.mT).view_as(result)
        if self.bias is not None:
            result += tangents[:, None, None, self.bias.start : self.bias.stop]
        return result.flatten(2)

    def through(self, right: TailFactors, vectors: Tensor) -> Tensor:
        """Return J(self) J(right)ᵀ v, ``(k, N₁, O)``, for ``(k, N₂, O)``."""
        split = right._by_position(vectors)
        result = self._expand(self.body.through(right.body, right._reduce(split)))
        one, other, flat = self.read.flatten(0, 1), right.read.flatten(0, 1), split.flatten(1, 2)
        if len(one) * len(other) < (len(one) + len(other)) * self.tail.width:
            moved = (one @ other.mT) @ flat
        else:
            moved = one @ (other.mT @ flat)
        if self.bias is not None:
            moved = moved + flat.sum(1, keepdim=True)
        return (result + moved.view_as(result)).flatten(2)


def prepare_tail(
    source: LayerSource, params: Parameters, inputs: Inputs, route: ProductRoute | None
) -> TailFactors | None:
    """Return the factors of N samples for products, or None if no tail makes them fewer."""
    tail = source.coverage.tail
    if tail is None or not tail.ends(inputs):
        return None
    reduction = Reduction(tail, params, torch.arange(inputs.num_outputs), inputs.num_outputs)
    if not reduction.pays:
        return None
    body = TailSource(source, reduction.prepare())
    factors = body.of_outputs(params, inputs, torch.arange(reduction.size))
    ready = prepare_products(factors, source.rows, route)
    starts = source.starts
    weight = Span(starts[tail.weight], starts[tail.weight + 1])
    bias = None if tail.bias is None else Span(starts[tail.bias], starts[tail.bias + 1])
    return TailFactors(ready, tail, reduction.basis, head_activations(source, params, inputs), weight, bias)
