"""Factors: all that is known of the gradients of some samples, and what is made of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .contraction import (
    Picker,
    add_directs,
    add_outers,
    outer_grams,
    outer_lengths,
    own_products,
    recorded_kernel,
    squared,
)
from .cost import DiagonalRoute, KernelRoute, KernelShape, choose_kernel
from .factors import Direct, Outer, is_watched, join_samples, with_positions, without_zeros, written_pieces
from .layer_rules import OneHot
from .summation import Workspace
from .units import Unit

__all__ = ["Factors", "joined", "matched"]

_SMALL_ENTRIES = 2**16  # of factors below which float64 costs no time
_SMALL_RESULT = 2**13  # entries of a kernel beside them: a float64 copy of 640 x 640 took half of the time


@dataclass(eq=False)
class Factors:
    """All that is known of the gradients of B samples in C directions."""

    count: int
    outers: list[Outer]
    directs: list[Direct]

    @property
    def layers(self) -> list[Outer | Direct]:
        """All pieces."""
        return [*self.outers, *self.directs]

    @property
    def entries(self) -> int:
        """Entries of all factors."""
        held = [layer.gradients.numel() for layer in self.layers]
        held += [layer.activations.numel() for layer in self.outers if isinstance(layer.activations, Tensor)]
        return sum(held)

    @property
    def directions(self) -> int:
        """Number C of directions."""
        layers = self.layers
        return layers[0].gradients.shape[1] if layers else 0

    @property
    def is_small(self) -> bool:
        """Whether float32 factors are so few that float64 costs no time: calls cost more than arithmetic."""
        layers = self.layers
        narrow = bool(layers) and layers[0].gradients.dtype == torch.float32
        return narrow and layers[0].gradients.device.type != "mps" and self.entries <= _SMALL_ENTRIES

    @property
    def is_recorded(self) -> bool:
        """Whether a derivative may be taken through gradients that are written down."""
        return any(is_watched(direct.gradients) for direct in self.directs)

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

    def kernel(
        self,
        other: Factors,
        into: Tensor,
        left_index: Tensor,
        right_index: Tensor,
        *,
        same: bool,
        workspace: Workspace,
        force: KernelRoute | None = None,
    ) -> None:
        """Add kernels to ``(M, N₁·r₁, N₂·r₂)``, which may be a strided part of a larger result.

        The indices are directions ``(M, R, r)``. If ``same``, both sides are the same object, and only rows
        on and below the diagonal are promised. ``force`` is a way to take whatever it costs, where a layer
        has it.
        """
        left, right = (self, self) if other is self else matched((self, other))
        if into.numel() <= _SMALL_RESULT and left.is_small and right.is_small:
            wide = into.new_zeros(into.shape, dtype=torch.float64)
            rows = left.to(torch.float64)
            columns = rows if left is right else right.to(torch.float64)
            rows.kernel(columns, wide, left_index, right_index, same=same, workspace=Workspace(), force=force)
            into += wide
            return
        kernels, terms, width = left_index.shape  # (M, R, r₁)
        wanted = KernelShape(left.count, right.count, width, right_index.shape[2], terms, kernels, same)
        picks = Picker(left_index), Picker(right_index)
        for layer, other_layer in zip(left.outers, right.outers, strict=True):
            one = without_zeros(layer)
            two = one if layer is other_layer else without_zeros(other_layer)
            # Else one side has no gradient there, nor has the product.
            if one is not None and two is not None:
                route = choose_kernel(one.shape, wanted, force)
                add_outers(into, one, two, *picks, same, workspace, route)
        if left.directs:
            add_directs(into, left.directs, right.directs, *picks, same, workspace)

    def recorded_kernel(self, other: Factors, left_index: Tensor, right_index: Tensor) -> Tensor:
        """Return the same kernels out of place, of gradients that are written down in one piece."""
        (one,), (two,) = self.directs, other.directs
        return recorded_kernel(one, two, left_index, right_index)

    def lengths(self, workspace: Workspace, force: DiagonalRoute | None = None) -> Tensor:
        """Return ``(B, C)`` squared lengths of the gradients."""
        found = [outer_lengths(layer, workspace, force) for layer in self.outers]
        found += [squared(direct.gradients) for direct in self.directs]
        return torch.stack(found).sum(0).to(self.layers[0].gradients.dtype)  # summed in float64

    def grams(self) -> Tensor:
        """Return ``(B, C, C)`` inner products of the gradients of each sample, in float64."""
        found = [outer_grams(layer) for layer in self.outers]
        found += [own_products(direct.gradients) for direct in self.directs]
        return torch.stack(found).sum(0)

    def divided(self, owners: Sequence[int], count: int) -> list[Factors]:
        """Return the factors of each of ``count`` parts, given the part of each parameter's number."""
        parts = [replace(self, outers=[], directs=[]) for _ in range(count)]
        for layer in self.outers:
            own, bias = owners[layer.unit.index], layer.unit.bias
            if bias is not None and owners[bias.index] != own:  # it no longer rides with the weight
                gradients = layer.gradients.sum(-1).flatten(2)
                unit = Unit(bias.index, bias.start, bias.stop, "direct", ())
                parts[owners[bias.index]].directs.append(Direct(unit, gradients))
                layer = replace(layer, unit=replace(layer.unit, bias=None))
            parts[own].outers.append(layer)
        for direct in self.directs:
            parts[owners[direct.unit.index]].directs.append(direct)
        return parts

    def write(self, out: Tensor, rows: Mapping[int, tuple[int, int]]) -> None:
        """Add gradients to ``(B, C, P)``, given the start and the entries of a row of each parameter."""
        for layer in self.layers:
            for index, start, stop, gradients in written_pieces(layer):
                first, row = rows[index]
                out[..., first + start * row : first + stop * row] += gradients


def matched(parts: Sequence[Factors]) -> list[Factors]:
    """Return the factors of several batches with the same pieces in the same order.

    A model that calls its layers as the batch wants it (loops as long as the longest sample, a branch) gives
    other pieces in another batch. Those that all batches have stay; what is left of each parameter is written
    down over one range of rows, with zeros where a batch does not use it.
    """
    found = [[_key(layer) for layer in part.outers] for part in parts]
    ranges = [[_rows(direct.unit) for direct in part.directs] for part in parts]
    if all(keys == found[0] for keys in found) and all(rows == ranges[0] for rows in ranges):
        return list(parts)
    # A piece that occurs twice in a batch has products with itself that a match one by one would lose.
    common = [key for key in found[0] if all(keys.count(key) == 1 for keys in found)]
    pieces = [
        [
            piece
            for layer in part.layers
            if isinstance(layer, Direct) or _key(layer) not in common
            for piece in written_pieces(layer)
        ]
        for part in parts
    ]
    # By parameter: first row, the row after the last, entries of a row.
    spans: dict[int, tuple[int, int, int]] = {}
    for index, start, stop, gradients in (piece for some in pieces for piece in some):
        first, last, _ = spans.get(index, (start, stop, 0))
        row = gradients.shape[2] // max(1, stop - start)
        spans[index] = min(first, start), max(last, stop), row
    results = []
    for part, keys, some in zip(parts, found, pieces, strict=True):
        lead, like = (part.count, part.directions), (part.outers or part.directs)[0].gradients
        directs = []
        for index, (first, last, row) in spans.items():
            whole = like.new_zeros((*lead, (last - first) * row))
            for _, start, stop, gradients in (piece for piece in some if piece[0] == index):
                whole[..., (start - first) * row : (stop - first) * row] += gradients
            directs.append(Direct(Unit(index, first, last, "direct", ()), whole))
        kept = [part.outers[keys.index(key)] for key in common]
        results.append(replace(part, outers=kept, directs=directs))
    return results


def _rows(unit: Unit) -> tuple[int, int, int]:
    """Return a parameter's number and the range of its rows."""
    return unit.index, unit.start, unit.stop


def _key(layer: Outer) -> tuple[object, ...]:
    """What two pieces must have in common to be contracted with each other."""
    shape = layer.shape
    sizes = shape.inputs, shape.outputs, shape.groups, shape.one_hot
    return (*_rows(layer.unit), layer.unit.bias, layer.transposed, sizes)


def joined(parts: Sequence[Factors]) -> Factors:
    """Join the factors of several batches of samples."""
    parts = matched(parts)
    outers = []
    for layers in zip(*(part.outers for part in parts), strict=True):
        longest = max(layer.shape.positions for layer in layers)
        layers = tuple(with_positions(layer, longest) for layer in layers)
        gradients = torch.cat([layer.gradients for layer in layers])
        activations = join_samples([layer.activations for layer in layers])
        outers.append(replace(layers[0], activations=activations, gradients=gradients))
    directs = [
        replace(pieces[0], gradients=torch.cat([piece.gradients for piece in pieces]))
        for pieces in zip(*(part.directs for part in parts), strict=True)
    ]
    return Factors(sum(part.count for part in parts), outers, directs)
