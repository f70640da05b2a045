"""The check at construction: layer rules against automatic differentiation on a slice of the samples."""

from __future__ import annotations

import logging

import torch

from ..model import Inputs
from .autograd import AutogradEngine
from .coverage import Coverage, CoverageChanged
from .gathering import FactorSource
from .tail_blocks import Reduction, confirmed

__all__ = ["trusted"]

logger = logging.getLogger(__name__)

_CHECKED_SAMPLES = 3


def trusted(source: FactorSource, autograd: AutogradEngine, inputs: Inputs) -> Coverage:
    """Compare the per-sample gradients of one random combination of outputs, parameter by parameter.

    Args:
        source: The layer rules.
        autograd: What they must agree with.
        inputs: The samples; the first three are used.

    Returns:
        The coverage without those parameters for which the two differ, each with the difference. Cost:
        one per-sample pass, one forward and one backward pass over three samples.
    """
    coverage = source.coverage
    if not coverage.covered:
        return coverage
    linearization = source.linearization
    part = inputs.select(torch.arange(min(_CHECKED_SAMPLES, inputs.num_samples)))
    generator = torch.Generator().manual_seed(13)
    shape = (1, part.num_samples, part.num_outputs)
    values = torch.randn(shape, generator=generator, dtype=torch.float64)
    cotangents = values.to(dtype=source.dtype, device=source.device)
    params = tuple(p.detach() for p in linearization.parameters)
    with torch.no_grad():
        expected = autograd._sample_tile(params, part, cotangents.transpose(0, 1)).double()
        try:
            actual = source.written_down(source.of(params, part, cotangents)).double()
        except CoverageChanged as change:
            for index in coverage.covered:
                coverage = coverage.without(index, str(change))
            return coverage
    tolerance = 1e3 * torch.finfo(source.dtype).eps
    for index in sorted(coverage.covered):
        span = slice(source.starts[index], source.starts[index + 1])
        wanted, found = expected[..., span], actual[..., span]
        difference = float((wanted - found).norm())
        # Rounding is relative to the whole gradient: one parameter's part may cancel to nearly nothing, or be
        # zero behind a norm of one feature, which enlarges what rounding leaves of it.
        if not difference <= tolerance * float(expected.norm()):
            relative = difference / max(float(wanted.norm()), 1e-300)
            reason = f"the layer rules and automatic differentiation differ by {relative:.1e} at construction"
            name = linearization.names[index]
            logger.warning("parameter %r goes to automatic differentiation: %s", name, reason)
            coverage = coverage.without(index, reason)
    tail = coverage.tail
    if tail is not None:
        every = torch.arange(part.num_outputs)
        reduction = Reduction(tail, params, every, part.num_outputs).prepare()
        if not confirmed(source, tail, reduction, params, part):
            logger.info("the last linear layer is not the end of the model: one backward pass an output")
            coverage = coverage.without_tail()
    return coverage
