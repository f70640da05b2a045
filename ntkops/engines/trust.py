"""The check at construction: layer rules against automatic differentiation on a slice of the samples."""

from __future__ import annotations

import logging

import torch
from torch import Tensor

from ..model import Inputs
from ..model.rounding import neighbours
from .autograd import AutogradEngine
from .coverage import Coverage, CoverageChanged
from .differentiation import Parameters
from .factors import Factors
from .gathering import FactorSource
from .tail_blocks import Reduction, confirmed

__all__ = ["trusted"]

logger = logging.getLogger(__name__)

_CHECKED_SAMPLES = 3
_ROUNDING_UNITS = 1e3
_SMALLEST_SHARE = 1e-3  # of the whole gradient: below it a parameter's error is compared with that share
# The doubtful case: rounding explains so many times what it is seen to move, less where that is much.
_NOISE_FACTOR, _LARGE_NOISE_FACTOR = 100.0, 10.0


def trusted(source: FactorSource, autograd: AutogradEngine, inputs: Inputs) -> Coverage:
    """Compare the per-sample gradients of one random combination of outputs, parameter by parameter.

    Each parameter is held to a thousand rounding units of its own gradient, or of a thousandth of the whole
    one if that is more. Behind a norm of one feature a gradient is all rounding, and breaks that. So where
    parameters differ by more, both sides are computed again some rounding units away. A difference within
    rounding of the whole gradient is accepted if it is no more than a hundred times what that moves, a larger
    one if it is no more than ten times that: automatic differentiation itself knows no better there.

    Args:
        source: The layer rules.
        autograd: What they must agree with.
        inputs: The samples; the first three are used.

    Returns:
        The coverage without those parameters for which the two differ, each with the difference. Cost:
        one per-sample pass, one forward and one backward pass over three samples; four times as much again
        in the doubtful case.
    """
    coverage = source.coverage
    if not coverage.covered:
        return coverage
    part = inputs.select(torch.arange(min(_CHECKED_SAMPLES, inputs.num_samples)))
    generator = torch.Generator().manual_seed(13)
    shape = (1, part.num_samples, part.num_outputs)
    values = torch.randn(shape, generator=generator, dtype=torch.float64)
    cotangents = values.to(dtype=source.dtype, device=source.device)
    params = tuple(p.detach() for p in source.linearization.parameters)
    with torch.no_grad():
        expected = _differentiated(autograd, params, part, cotangents)
        try:
            factors = source.of(params, part, cotangents)
        except CoverageChanged as change:
            for index in coverage.covered:
                coverage = coverage.without(index, str(change))
            return coverage
        actual = source.written_down(factors).double()
        for index in _differing(source, autograd, params, part, cotangents, expected, actual):
            wanted, found = (_part(source, index, side) for side in (expected, actual))
            relative = float((wanted - found).norm()) / max(float(wanted.norm()), 1e-300)
            reason = f"the layer rules and automatic differentiation differ by {relative:.1e} at construction"
            name = source.linearization.names[index]
            logger.warning("parameter %r goes to automatic differentiation: %s", name, reason)
            coverage = coverage.without(index, reason)
    used = _used(factors)
    if coverage.body is not None and not coverage.body.covered & used:
        coverage = coverage.without_tail()
    if not coverage.covered & used:  # the output uses none of those that are left
        for index in coverage.covered:
            coverage = coverage.without(index, "the output does not use it")
    tail = coverage.tail
    if tail is not None:
        every = torch.arange(part.num_outputs)
        reduction = Reduction(tail, params, every, part.num_outputs).prepare()
        if not confirmed(source, tail, reduction, params, part):
            logger.info("the last linear layer is not the end of the model: one backward pass an output")
            coverage = coverage.without_tail()
    return coverage


def _differentiated(autograd: AutogradEngine, params: Parameters, part: Inputs, cotangents: Tensor) -> Tensor:
    """Return ``(B, 1, P)`` gradients by automatic differentiation."""
    return autograd._sample_tile(params, part, cotangents.transpose(0, 1)).double()


def _used(factors: Factors) -> set[int]:
    """Return the parameters that have a gradient in the factors."""
    units = [layer.unit for layer in factors.outers] + [layer.unit for layer in factors.directs]
    return {place.index for unit in units for place in (unit, unit.bias) if place is not None}


def _part(source: FactorSource, index: int, gradients: Tensor) -> Tensor:
    return gradients[..., source.starts[index] : source.starts[index + 1]]


def _differing(
    source: FactorSource,
    autograd: AutogradEngine,
    params: Parameters,
    part: Inputs,
    cotangents: Tensor,
    expected: Tensor,
    actual: Tensor,
) -> list[int]:
    """Return the covered parameters whose two gradients differ by more than rounding explains."""
    tolerance = _ROUNDING_UNITS * torch.finfo(source.dtype).eps
    whole = float(expected.norm())
    doubtful: dict[int, float] = {}
    for index in sorted(source.coverage.covered):
        wanted = _part(source, index, expected)
        difference = float((wanted - _part(source, index, actual)).norm())
        if not difference <= tolerance * (float(wanted.norm()) + _SMALLEST_SHARE * whole):
            doubtful[index] = difference
    if not doubtful:
        return []
    noise = _noise(source, autograd, params, part, cotangents, (expected, actual))
    return [
        index
        for index, found in doubtful.items()
        if not found <= noise[index] * (_NOISE_FACTOR if found <= tolerance * whole else _LARGE_NOISE_FACTOR)
    ]


def _noise(
    source: FactorSource,
    autograd: AutogradEngine,
    params: Parameters,
    part: Inputs,
    cotangents: Tensor,
    here: tuple[Tensor, Tensor],
) -> dict[int, float]:
    """Return how far each parameter's gradients move, either way, in a step of some rounding units.

    A wrong rule moves no more than a right one: what it gets wrong is no part of this.
    """
    noise = dict.fromkeys(source.coverage.covered, 0.0)
    _, _, batch = next(iter(part.batches(part.num_samples)))
    for near, samples, (direction,) in neighbours(params, batch.tensors, (cotangents,)):
        # Samples of several shapes come in several batches, and stay.
        whole = batch.num_samples == part.num_samples
        moved = Inputs(batch.replace(samples), part.output_shape) if whole else part
        try:
            there = (
                _differentiated(autograd, near, moved, direction),
                source.written_down(source.of(near, moved, direction)).double(),
            )
        except CoverageChanged:
            continue  # it depends on values, and is asserted on every batch
        for index in noise:
            for one, other in zip(here, there, strict=True):
                step = _part(source, index, one) - _part(source, index, other)
                noise[index] = max(noise[index], float(step.norm()))
    return noise
