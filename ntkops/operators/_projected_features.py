"""Features J Pᵀ of samples, made tile by tile: N x P never exists."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from ..engines import Engine, LayerwiseEngine
from ..engines.factors import Direct, Outer, outer_gradients
from ..engines.layer_factors import Factors
from ..engines.layer_rules import OneHot
from ..engines.tiles import sample_slices
from ..model import Inputs
from ..projections import LayerKronecker, Projection
from .axes import StateAxis

__all__ = ["feature_rows"]


def feature_rows(
    engine: Engine,
    params: tuple[Tensor, ...],
    axis: StateAxis,
    projection: Projection,
    make: Callable[[torch.Size, Tensor], Tensor] | None = None,
) -> Tensor:
    """Return the rows ``(*batch, n, R·k)`` of J Pᵀ of an axis.

    ``make`` makes what they are written to, from a shape and a tensor like it; None for memory. Cost: one
    per-sample pass for each distinct output; memory: the result, and as many rows of J as the engine's
    workspace holds, at least one. Where a graph is recorded nothing is written to.
    """
    distinct, index = torch.unique(axis.flat_outputs, return_inverse=True)  # index (M, R, r)
    if _has_factors(engine, projection):
        tiles = iter((_from_factors(engine, params, axis.inputs, distinct, projection),))
    else:
        tiles = _from_rows(engine, params, axis.inputs, distinct, projection)
    arranged = (
        tile[:, index.to(tile.device)].permute(1, 0, 3, 2, 4).flatten(3).flatten(1, 2)  # (M, B·r, R·k)
        for tile in tiles
    )
    # A graph may be recorded, or a transform at work, which writing in place would break.
    if torch.is_grad_enabled():
        rows = torch.cat(list(arranged), dim=1)
    else:
        rows = _put_together(arranged, index, axis.inputs.num_samples, projection, make)
    engine.count_rows(axis.inputs.num_samples * len(distinct), axis.inputs)
    if axis.index is not None:
        rows = rows[:, axis.index.to(rows.device)]
    return rows.reshape(*axis.batch_shape, *rows.shape[1:])


def _put_together(
    tiles: Iterator[Tensor],
    index: Tensor,
    num_samples: int,
    projection: Projection,
    make: Callable[[torch.Size, Tensor], Tensor] | None,
) -> Tensor:
    """Return ``(M, N·r, R·k)``: every tile goes to its place at once, and no two copies exist of any."""
    members, terms, width = index.shape
    rows, start = None, 0
    for tile in tiles:
        if rows is None:
            shape = torch.Size((members, num_samples * width, terms * projection.k))
            rows = tile.new_empty(shape) if make is None else make(shape, tile)
        rows[:, start : start + tile.shape[1]] = tile
        start += tile.shape[1]
    assert rows is not None
    return rows


def _from_rows(
    engine: Engine, params: tuple[Tensor, ...], inputs: Inputs, outputs: Tensor, projection: Projection
) -> Iterator[Tensor]:
    """Yield ``(B, u, k)`` from rows of J that are written down, some samples and outputs at a time."""
    # A quarter of the rows that fit: making and projecting them takes as much again, each.
    fitting = max(1, engine.tile_samples(1) // 4)
    for _, _, part in sample_slices(inputs, max(1, fitting // len(outputs))):
        pieces = []
        for chosen in outputs.split(max(1, min(fitting, len(outputs)))):
            rows = engine.jacobian_tile(params, part, chosen)  # (B, u', P)
            pieces.append(projection.apply(rows))
        yield pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=1)


def _has_factors(engine: Engine, projection: Projection) -> bool:
    """Whether a Kronecker map meets an engine that has activations and output gradients."""
    if not isinstance(projection, LayerKronecker) or not isinstance(engine, LayerwiseEngine):
        return False
    return projection.shapes == tuple(tuple(shape) for shape in engine.linearization.shapes)


def _from_factors(
    engine: Engine, params: tuple[Tensor, ...], inputs: Inputs, outputs: Tensor, projection: Projection
) -> Tensor:
    """Return ``(N, u, k)`` from the layers' factors; gradients of layers are not written down."""
    # A layer's matrix W has the image G W Aᵀ, and its gradient is Σ_s g_s a_sᵀ: of this the image is
    # Σ_s (G g_s)(A a_s)ᵀ, two thin products instead of one with all entries of W.
    assert isinstance(engine, LayerwiseEngine) and isinstance(projection, LayerKronecker)

    def of_rows(rows: Tensor, numbers: Sequence[int]) -> Tensor:  # (B, u, entries of some parameters)
        sizes = [engine.linearization.sizes[number] for number in numbers]
        parts = zip(rows.split(sizes, dim=-1), numbers, strict=True)
        images = [projection.apply(part, projection.starts[number]) for part, number in parts]
        return torch.stack(images).sum(0)

    return engine.linear_image(
        params, inputs, outputs, lambda factors: factor_image(factors, projection), of_rows
    )


def factor_image(factors: Factors, projection: LayerKronecker) -> Tensor:
    """Return ``(B, C, k)``: the images of all layers' gradients, added up."""
    images = [_outer_image(layer, projection) for layer in factors.outers]
    images += [_direct_image(layer, projection) for layer in factors.directs]
    return torch.stack(images).sum(0)


def _row_start(projection: LayerKronecker, index: int, row: int) -> int:
    """Return where a row of a parameter starts in the flat vector."""
    return projection.starts[index] + row * projection.matrix_shape(index)[1]


def _direct_image(layer: Direct, projection: LayerKronecker) -> Tensor:
    """Return the image of gradients that are written down, as those of a bias are."""
    return projection.apply(layer.gradients, _row_start(projection, layer.unit.index, layer.unit.start))


def _outer_image(layer: Outer, projection: LayerKronecker) -> Tensor:
    """Return Σ_s (G g_s)(A a_s)ᵀ, with the sides exchanged where the parameter is the transpose."""
    unit, gradients, activations = layer.unit, layer.gradients, layer.activations
    _, _, groups, outputs, _ = gradients.shape  # (B, C, groups, outputs, S)
    inputs = activations.size if isinstance(activations, OneHot) else activations.shape[2]
    height, width = (inputs, outputs) if layer.transposed else (outputs, inputs)
    if (unit.stop - unit.start, projection.matrix_shape(unit.index)[1]) == (groups * height, width):
        left, right = projection.factors(unit.index, gradients.dtype, gradients.device)
        tall = left[:, unit.start : unit.stop].unflatten(1, (groups, height)).transpose(0, 1)  # (g, rows, h)
        wide = right.expand(groups, -1, -1)  # (g, cols, w)
        # A parameter that is used transposed has gradient Σ_s a_s g_sᵀ: G meets activations, and A signals.
        signals, inner = (wide, tall) if layer.transposed else (tall, wide)
        one = signals @ gradients  # (B, C, g, rows or cols, S)
        other = _activation_image(activations, inner).unsqueeze(1)  # (B, 1, g, cols or rows, S)
        image = ((other @ one.mT) if layer.transposed else (one @ other.mT)).sum(2).flatten(2)
    else:  # a use that sees the parameter in another shape
        written = outer_gradients(gradients, activations)
        written = (written.mT if layer.transposed else written).flatten(2)
        image = projection.apply(written, _row_start(projection, unit.index, unit.start))
    if unit.bias is None:
        return image
    start = _row_start(projection, unit.bias.index, unit.bias.start)
    return image + projection.apply(gradients.sum(-1).flatten(2), start)


def _activation_image(activations: Tensor | OneHot, factor: Tensor) -> Tensor:
    """Return ``(B, groups, rows, S)`` for a factor ``(groups, rows, d_in)``."""
    if isinstance(activations, OneHot):  # A e_i is column i of A
        return factor[:, :, activations.index].permute(2, 0, 1, 3)
    return factor @ activations
