"""What the layerwise engine does with each parameter, as a table that users can read."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from ..model import Inputs
from ..results import LayerInfo
from .cost import KernelShape, choose_diagonal, choose_kernel, choose_product, kernel_reason
from .coverage import LayerSizes
from .source import LayerSource
from .units import Unit

__all__ = ["describe_layers", "measure_layers"]


def measure_layers(source: LayerSource, inputs: Inputs) -> list[LayerSizes]:
    """Return the units' sizes, seen on one sample: a forward and a backward pass over it."""
    first = torch.zeros(1, dtype=torch.long)
    with torch.no_grad():
        factors = source.of_outputs(source.linearization.parameters, inputs.select(first), first)
    return [LayerSizes.of(layer) for layer in factors.layers]


def describe_layers(
    source: LayerSource,
    measured: Iterable[LayerSizes],
    tile: KernelShape,
    whole: KernelShape,
    directions: int,
) -> tuple[LayerInfo, ...]:
    """Return a line for every unit, in the order of parameters, and for every parameter without a rule."""
    lines = {
        (layer.unit.index, layer.unit.start): _line(source, layer, tile, whole, directions)
        for layer in measured
    }
    for index in source.uncovered:
        name = source.linearization.names[index]
        why = source.coverage.reasons.get(index, "")
        lines[index, 0] = LayerInfo(name, "none", "autograd", "autograd", "autograd", "autograd", 0, why=why)
    return tuple(lines[key] for key in sorted(lines))


def _line(
    source: LayerSource, layer: LayerSizes, tile: KernelShape, whole: KernelShape, directions: int
) -> LayerInfo:
    """Return the line of one unit: kernels are made tile by tile, products of all samples."""
    unit, shape, names = layer.unit, layer.shape, source.linearization.names
    name, height = names[unit.index], source.linearization.shapes[unit.index]
    if height and (unit.start, unit.stop) != (0, height[0]):
        name = f"{name}[{unit.start}:{unit.stop}]"
    bias = None if unit.bias is None else names[unit.bias.index]
    rule = _rule(source, unit)
    if shape is None:
        why = "gradients are small"
        return LayerInfo(name, rule, "direct", "gradient", "gradient", "gradient", 0, bias, why)
    options = source.options
    readout = source.coverage.readout
    return LayerInfo(
        name,
        rule,
        "readout" if readout is not None and readout.weight == unit.index else "outer",
        choose_kernel(shape, tile, options.kernel),
        choose_diagonal(shape, options.diagonal),
        choose_product(shape, whole.left, whole.right, directions, options.product),
        shape.positions,
        bias,
        kernel_reason(shape, tile, options.kernel),
    )


def _rule(source: LayerSource, unit: Unit) -> str:
    """Return the names of the rules of all calls in which the unit's parameter is used."""
    roles = {use.role for use in unit.uses}
    found = set()
    for rule, places, *_ in source.coverage.layouts:
        for role, place in places:  # type: ignore[attr-defined]
            if (
                place.index == unit.index
                and role in roles
                and place.start < unit.stop > unit.start < place.stop
            ):
                found.add(str(rule))
    return ", ".join(sorted(found))
