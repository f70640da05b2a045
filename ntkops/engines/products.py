"""Products with J, Jᵀ and J Jᵀ from cached factors, without automatic differentiation.

For each layer the cheapest of three ways: through activations and output gradients one after the
other, through the Gram matrix of activations, or through the layer's per-sample gradients. Blocks of k
vectors are row-major: ``(k, N, C)`` and ``(k, P)``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from .contraction import gram_of_activations
from .cost import ProductRoute, choose_product
from .factors import Direct, Outer, in_parameter_order, written_pieces
from .layer_factors import Factors
from .layer_rules import OneHot
from .summation import long_product, wide_dtype
from .units import Unit

__all__ = ["CachedFactors", "ProductFactors", "Span", "prepare_products", "unit_spans"]

_COLUMNS = 1024  # entries of gradients that two products after each other read: the second finds them cached


@dataclass(frozen=True)
class Span:
    """Where a piece of a gradient lies in the flat parameter vector."""

    start: int
    stop: int


class CachedFactors(Protocol):
    """Products with the covered parameters of one set of samples, without automatic differentiation."""

    @property
    def spans_key(self) -> object:
        """What two sides of a kernel must have in common."""
        ...

    def tensors(self) -> list[Tensor]:
        """Return what takes memory."""
        ...

    @property
    def column_entries(self) -> int:
        """Entries that one column of a product takes in between."""
        ...

    def pull(self, vectors: Tensor, size: int) -> Tensor:
        """Return Jᵀv, ``(k, P)``, for ``(k, N, O)``."""
        ...

    def push(self, tangents: Tensor) -> Tensor:
        """Return J p, ``(k, N, O)``, for ``(k, P)``."""
        ...

    def through(self, right: Any, vectors: Tensor) -> Tensor:
        """Return J(self) J(right)ᵀ v, with a right side of the same class."""
        ...


@dataclass(eq=False)
class ProductFactors:
    """Factors of N samples in all directions, made ready for products.

    Attributes:
        count: Number N of samples.
        directions: Number C of outputs.
        outers: Layers that stay in factors.
        spans: Parameters of each of them, and of its bias.
        dense: ``(N·C, p)`` gradients of all other layers side by side; None if there are none.
        dense_spans: Where the columns of ``dense`` go.
        route: A way through layers to take whatever it costs, where they have it.
        grams: Gram matrices of activations of these samples, by position of the layer.
    """

    count: int
    directions: int
    outers: list[Outer]
    spans: list[tuple[Span, Span | None]]
    dense: Tensor | None
    dense_spans: list[Span]
    route: ProductRoute | None = None
    grams: dict[int, Tensor] = field(default_factory=dict)

    @property
    def spans_key(self) -> object:
        """What two sides of a kernel must have in common."""
        return ("layers", tuple(self.spans), tuple(self.dense_spans))

    def tensors(self) -> list[Tensor]:
        """Return what takes memory."""
        held = [] if self.dense is None else [self.dense]
        for layer in self.outers:
            held += [layer.gradients, layer.held]
        return held

    @property
    def column_entries(self) -> int:
        """Entries that one column of a product takes in between."""
        signals = max((layer.gradients[:, :1].numel() for layer in self.outers), default=0)
        return max(signals, self.count * self.directions)

    @property
    def _dtype(self) -> torch.dtype:
        """Dtype of the factors: float64 also for float32 ones, where they are few."""
        return (self.outers[0].gradients if self.dense is None else self.dense).dtype

    def to(self, dtype: torch.dtype) -> ProductFactors:
        """Return the same in another dtype."""
        outers = Factors(self.count, self.outers, []).to(dtype).outers
        dense = None if self.dense is None else self.dense.to(dtype)
        return replace(self, outers=outers, dense=dense, grams={})

    def pull(self, vectors: Tensor, size: int) -> Tensor:
        """Return Jᵀv, ``(k, P)``, for ``(k, N, C)``; parameters that are not covered get zero."""
        given, vectors = vectors.dtype, vectors.to(self._dtype)
        result = vectors.new_zeros((len(vectors), size))
        if self.dense is not None:
            flat = long_product(vectors.flatten(1), self.dense)  # (k, p)
            offset = 0
            for span in self.dense_spans:
                width = span.stop - span.start
                result[:, span.start : span.stop] += flat[:, offset : offset + width]
                offset += width
        for layer, (weight, bias) in zip(self.outers, self.spans, strict=True):
            signals = _signals(layer, vectors)
            pulled = in_parameter_order(_weights(layer, signals).unsqueeze(0), layer.transposed)
            result[:, weight.start : weight.stop] += pulled.squeeze(0)
            if bias is not None:
                result[:, bias.start : bias.stop] += signals.sum((0, 4)).flatten(1)
        return result.to(given)

    def push(self, tangents: Tensor) -> Tensor:
        """Return J p, ``(k, N, C)``, for ``(k, P)``."""
        given, tangents = tangents.dtype, tangents.to(self._dtype)
        result = tangents.new_zeros((len(tangents), self.count, self.directions))
        if self.dense is not None:
            flat = torch.cat([tangents[:, span.start : span.stop] for span in self.dense_spans], dim=1)
            result += long_product(flat, self.dense.mT).view_as(result)
        for layer, (weight, bias) in zip(self.outers, self.spans, strict=True):
            pieces = _as_outer(layer, tangents[:, weight.start : weight.stop])
            shift = None
            if bias is not None:
                shift = tangents[:, bias.start : bias.stop].unflatten(1, (layer.shape.groups, -1))
            result += _read(layer, _apply(layer, pieces, shift))
        return result.to(given)

    def through(self, right: ProductFactors, vectors: Tensor) -> Tensor:
        """Return J(self) J(right)ᵀ v, ``(k, N₁, C)``, for ``(k, N₂, C)``."""
        cache = self.grams if self is right else None
        given, dtype = vectors.dtype, self._dtype
        if dtype != right._dtype:  # one side is so small that its factors are kept in float64
            return self.to(given).through(right.to(given), vectors)
        vectors = vectors.to(dtype)
        result = vectors.new_zeros((len(vectors), self.count, self.directions))
        if self.dense is not None:
            assert right.dense is not None
            # J₁ (J₂ᵀ v) some columns of both at a time; (k, p) is never held, and blocks are summed in
            # float64.
            flat, total = vectors.flatten(1), result.flatten(1).to(wide_dtype(result))
            for start in range(0, self.dense.shape[1], _COLUMNS):
                columns = slice(start, start + _COLUMNS)
                total += long_product(flat, right.dense[:, columns]) @ self.dense[:, columns].mT
            result = total.to(result.dtype).view_as(result)
        for position, (layer, other) in enumerate(zip(self.outers, right.outers, strict=True)):
            signals = _signals(other, vectors)  # (N₂, k, g, d_out, S)
            sizes = self.count, right.count, self.directions
            # J₁ J₂ᵀ v = Σ_c G₁c · (Σ A₁ A₂ᵀ (G₂ᵀ v)): with the Gram matrix A₁ A₂ᵀ, or one after the other.
            if choose_product(layer.shape, *sizes, self.route) == "dual":
                moved = _dual(layer, other, signals, position, cache)
            else:
                bias = signals.sum((0, 4)) if layer.unit.bias is not None else None
                moved = _apply(layer, _weights(other, signals), bias)
            result += _read(layer, moved)
        return result.to(given)


def prepare_products(
    factors: Factors, rows: Mapping[int, tuple[int, int]], route: ProductRoute | None = None
) -> ProductFactors:
    """Choose for each layer whether products use its factors or its gradients."""
    if factors.is_small:
        factors = factors.to(torch.float64)
    outers: list[Outer] = []
    outer_spans: list[tuple[Span, Span | None]] = []
    written: list[Outer | Direct] = []
    spans: list[Span] = []
    for layer in factors.layers:
        weight, bias = unit_spans(layer.unit, rows)
        sizes = factors.count, factors.count, factors.directions
        if isinstance(layer, Direct) or choose_product(layer.shape, *sizes, route) == "gradient":
            written.append(layer)
            spans += [weight] if bias is None or isinstance(layer, Direct) else [weight, bias]
        else:
            # Samples first in memory, too: every product reads them that way.
            outers.append(replace(layer, gradients=layer.gradients.contiguous()))
            outer_spans.append((weight, bias))
    dense = _side_by_side(factors, written, spans)
    return ProductFactors(factors.count, factors.directions, outers, outer_spans, dense, spans, route)


def _side_by_side(factors: Factors, written: list[Outer | Direct], spans: list[Span]) -> Tensor | None:
    """Return ``(N·C, p)`` gradients of layers, one after the other in memory that is made first."""
    if not written:
        return None
    width = sum(span.stop - span.start for span in spans)
    whole = written[0].gradients.new_empty((factors.count, factors.directions, width))
    offset = 0
    for layer in written:
        for _, _, _, gradients in written_pieces(layer):
            whole[:, :, offset : offset + gradients.shape[2]] = gradients
            offset += gradients.shape[2]
    return whole.flatten(0, 1)


def unit_spans(unit: Unit, rows: Mapping[int, tuple[int, int]]) -> tuple[Span, Span | None]:
    """Return where a unit's parameter and its bias lie in the flat vector."""
    bias = unit.bias
    return _span(rows[unit.index], unit.start, unit.stop), (
        None if bias is None else _span(rows[bias.index], bias.start, bias.stop)
    )


def _span(parameter: tuple[int, int], start: int, stop: int) -> Span:
    """Return where rows of a parameter lie, given its start and the entries of a row."""
    first, row = parameter
    return Span(first + start * row, first + stop * row)


def _signals(layer: Outer, vectors: Tensor) -> Tensor:
    """Return Σ_c v_c G_c, ``(N, k, groups, d_out, S)``."""
    flat = layer.gradients.flatten(2)  # (N, C, g·d_out·S)
    return long_product(vectors.transpose(0, 1), flat).unflatten(2, layer.gradients.shape[2:])


def _weights(layer: Outer, signals: Tensor) -> Tensor:
    """Return Σ_{n,s} signals ⊗ activations, ``(k, groups, d_out, d_in)``."""
    columns, groups, outputs = signals.shape[1:4]
    if isinstance(layer.activations, OneHot):
        flat = signals.permute(1, 2, 3, 0, 4).flatten(3)  # (k, 1, d_out, N·S)
        result = flat.new_zeros((*flat.shape[:3], layer.activations.size))
        return result.index_add_(3, layer.activations.index.flatten(), flat)
    left = signals.permute(2, 1, 3, 0, 4).flatten(3).flatten(1, 2)  # (g, k·d_out, N·S)
    right = layer.activations.permute(1, 0, 3, 2).flatten(1, 2)  # (g, N·S, d_in)
    return long_product(left, right).unflatten(1, (columns, outputs)).transpose(0, 1)


def _apply(layer: Outer, weights: Tensor, bias: Tensor | None) -> Tensor:
    """Return W a (+ b) at every position, ``(N, k, groups, d_out, S)``, for ``(k, groups, d_out, d_in)``."""
    columns, groups, outputs, inputs = weights.shape
    if isinstance(layer.activations, OneHot):
        index = layer.activations.index
        moved = weights[..., index.flatten()].unflatten(3, index.shape)  # (k, 1, d_out, N, S)
        moved = moved.permute(3, 0, 1, 2, 4)
    else:
        right = layer.activations.permute(1, 2, 0, 3)  # (g, d_in, N, S)
        left = weights.transpose(0, 1).reshape(groups, columns * outputs, inputs)
        moved = left @ right.flatten(2)
        moved = moved.view(groups, columns, outputs, *right.shape[2:]).permute(3, 1, 0, 2, 4)
    return moved if bias is None else moved + bias.unsqueeze(-1)


def _dual(
    layer: Outer, other: Outer, signals: Tensor, position: int, cache: dict[int, Tensor] | None
) -> Tensor:
    """Return the same as ``_apply`` of ``_weights``, through the Gram matrix of activations."""
    gram = None if cache is None else cache.get(position)
    if gram is None:
        gram = gram_of_activations(layer, other, signals.dtype)  # (N₁·S₁, N₂·S₂)
        # Else larger than the cache planned for.
        if cache is not None and gram.numel() <= 2 * layer.held.numel():
            cache[position] = gram
    columns, groups, outputs, positions = signals.shape[1:]
    flat = signals.permute(0, 4, 1, 2, 3).reshape(len(signals) * positions, -1)  # (N₂·S₂, k·d_out)
    moved = long_product(gram, flat)
    moved = moved.view(len(layer.gradients), layer.gradients.shape[-1], columns, groups, outputs)
    return moved.permute(0, 2, 3, 4, 1)


def _read(layer: Outer, moved: Tensor) -> Tensor:
    """Return the products with the output gradients, ``(k, N, C)``, for ``(N, k, groups, d_out, S)``."""
    return long_product(moved.flatten(2), layer.gradients.flatten(2).mT).transpose(0, 1)


def _as_outer(layer: Outer, flat: Tensor) -> Tensor:
    """Turn ``(k, p)`` in the parameter's order into ``(k, groups, d_out, d_in)``."""
    shape = layer.shape
    if layer.transposed:
        return flat.view(len(flat), shape.groups, shape.inputs, shape.outputs).mT
    return flat.view(len(flat), shape.groups, shape.outputs, shape.inputs)
