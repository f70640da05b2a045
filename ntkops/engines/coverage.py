"""Which parameters the layer rules cover, found by recording two small forward passes.

A parameter is covered if the output depends on it through understood calls alone, and if in each of
them the samples can be told apart: the axis that grows with the number of samples, checked by a
gradient that must vanish at the other samples. Everything else is left to automatic differentiation.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..errors import NtkopsError
from ..model import Inputs, Linearization
from ..model.record import Call, Recording, record
from .collecting import backward, collect
from .contract import LEAST_INPUTS
from .cost import KernelShape, written_at_once
from .factors import Factors, Outer
from .layer_rules import CATALOGUE, EXPANSIONS, RULES, Layout, OneHot
from .summation import COLUMNS
from .tail import Tail, find_tail
from .units import plan_units

__all__ = ["Coverage", "CoverageChanged", "HiddenStates", "cover", "record_batch"]

logger = logging.getLogger(__name__)

Signature = tuple[object, ...]
Parameters = tuple[Tensor, ...]

_PROBED = 3
_SMALL_WORK = 2**22  # activations' entries for all directions below which dispatch is what costs


class CoverageChanged(NtkopsError):
    """A batch uses parameters in another way than the samples on which coverage was decided."""


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
        """Return how many directions go through one backward pass."""
        if not self.batched or directions * count * self.direction_entries > _SMALL_WORK:
            return 1
        return max(1, directions)


def record_batch(linearization: Linearization, params: Sequence[Tensor], batch: object) -> Recording:
    """Record one forward pass with the whole table of rules."""
    return record(linearization.function, params, batch, CATALOGUE, EXPANSIONS)  # type: ignore[arg-type]


def _sample(inputs: Inputs, count: int) -> Inputs:
    return inputs.select(torch.arange(count) % inputs.num_samples)


def _recorded(linearization: Linearization, inputs: Inputs) -> Recording:
    (_, _, batch), *_ = inputs.batches(inputs.num_samples)
    return record_batch(linearization, linearization.parameters, batch)


def cover(linearization: Linearization, inputs: Inputs) -> Coverage:
    """Record two small passes and decide which parameters are covered.

    Args:
        linearization: The pure function and its parameters.
        inputs: The samples; only the first three are used, repeated where there are fewer.

    Returns:
        The coverage. Cost: two forward and about six backward passes over three samples.

    Raises:
        NtkopsError: What the model floor refuses in a forward pass.
    """
    names = linearization.names
    with linearization.safe_context():
        try:
            first = _recorded(linearization, _sample(inputs, _PROBED))
            second = _recorded(linearization, _sample(inputs, _PROBED - 1))
            reasons = {**second.uncovered, **first.uncovered}
            # Backward passes may fail, too: a checkpointed block runs again without the recorder, and finds
            # other saved tensors where a fused function was replaced.
            layouts = _layouts(first, second, reasons)
        except NtkopsError:
            raise
        except (RuntimeError, TypeError, ValueError, NotImplementedError, AttributeError) as error:
            text = str(error).strip().splitlines() or [type(error).__name__]
            reason = f"the forward pass cannot be recorded: {text[0][:120]}"
            return Coverage(frozenset(), dict.fromkeys(range(len(names)), reason), {})
        covered = frozenset(range(len(names))) - reasons.keys()
        coverage = Coverage(covered, reasons, layouts)
        coverage = _measured(linearization, first, coverage)
        tail = find_tail(first, coverage.covered, layouts, linearization.shapes)
        if tail is not None:
            body = replace(coverage, covered=coverage.covered - tail.parameters)
            coverage = replace(coverage, tail=tail, body=_measured(linearization, first, body))
    for index, reason in coverage.reasons.items():
        logger.info("layer rules: parameter %r goes to automatic differentiation: %s", names[index], reason)
    return coverage


def _layouts(first: Recording, second: Recording, reasons: dict[int, str]) -> dict[Signature, Layout]:
    """Find the sample axis of every call; calls without one lose their parameters."""

    def lose(call: Call, reason: str) -> None:
        for place in call.places.values():
            reasons.setdefault(place.index, f"{call.rule}: {reason}")

    signatures = [call.signature for call in first.calls]
    if signatures != [call.signature for call in second.calls]:
        for call in (*first.calls, *second.calls):
            lose(call, "which calls are made depends on the batch")
        return {}
    gradients = _gradients_of_one_sample(first)
    layouts: dict[Signature, Layout] = {}
    for call, smaller, gradient in zip(first.calls, second.calls, gradients, strict=True):
        if not RULES[call.rule].supports(call):
            lose(call, "its arguments are not covered by the rule")
            continue
        layout = _layout(call, smaller, gradient)
        if layout is None:
            lose(call, f"no sample axis in its result of shape {tuple(call.shape)}")
        elif layouts.setdefault(call.signature, layout) != layout:
            lose(call, "its samples lie on different axes in different calls")
    return layouts


def _gradients_of_one_sample(recording: Recording) -> list[Tensor | None]:
    """Return the gradient of a random combination of the first sample's outputs at every call."""
    output = recording.output
    generator = torch.Generator().manual_seed(11)
    cotangent = torch.zeros(output.shape, dtype=output.dtype, device=output.device)
    values = torch.randn(output.shape[1], generator=generator, dtype=torch.float64)
    cotangent[0] = values.to(output)
    found = backward(recording, cotangent.unsqueeze(0), range(len(recording.calls)), False, False)
    return [None if gradient is None else gradient[0] for gradient in found]


def _layout(call: Call, smaller: Call, gradient: Tensor | None) -> Layout | None:
    sizes, others = call.shape, smaller.shape
    if len(sizes) != len(others):
        return None
    differing = [axis for axis, (a, b) in enumerate(zip(sizes, others, strict=True)) if a != b]
    if len(differing) != 1 or differing[0] not in RULES[call.rule].sample_axes(call):
        return None
    axis = differing[0]
    if sizes[axis] * (_PROBED - 1) != others[axis] * _PROBED or sizes[axis] % _PROBED:
        return None
    candidates = [Layout(axis, True)] + ([Layout(axis, False)] if sizes[axis] > _PROBED else [])
    fitting = [layout for layout in candidates if _vanishes_elsewhere(layout, gradient)]
    if len(fitting) == 2:  # no gradient at all: the values tell
        fitting = [layout for layout in fitting if _values_agree(layout, call, smaller)]
    return fitting[0] if len(fitting) == 1 else None


def _vanishes_elsewhere(layout: Layout, gradient: Tensor | None) -> bool:
    return gradient is None or not bool(layout.expose(gradient, _PROBED)[1:].any())


def _values_agree(layout: Layout, call: Call, smaller: Call) -> bool:
    """Whether the first two samples have the same activations in both passes."""
    for name, value in call.arguments.items():
        other = smaller.arguments.get(name)
        if name in call.places or not isinstance(value, Tensor) or not isinstance(other, Tensor):
            continue
        if value.dim() <= layout.axis or value.shape[layout.axis] != call.shape[layout.axis]:
            continue
        one = layout.expose(value, _PROBED)[: _PROBED - 1]
        two = layout.expose(other, _PROBED - 1)
        if not torch.allclose(one.double(), two.double(), rtol=1e-3, atol=1e-6):
            return False
    return True


def _measured(linearization: Linearization, recording: Recording, coverage: Coverage) -> Coverage:
    """Collect the factors once, to learn their sizes and whether backward passes can be batched."""
    units = plan_units(recording.calls, coverage.covered)
    if not units:
        return coverage
    generator = torch.Generator().manual_seed(12)
    shape = (2, *recording.output.shape)
    cotangents = torch.randn(shape, generator=generator, dtype=torch.float64).to(recording.output)

    def factors(chunk: int) -> Factors:
        return collect(recording, units, coverage.layouts, cotangents, linearization.dtype, chunk, keep=True)

    try:
        looped = factors(1)
    except (RuntimeError, TypeError, ValueError, IndexError) as error:
        reason = f"a layer rule failed: {str(error).strip().splitlines()[0][:120]}"
        return Coverage(frozenset(), {**dict.fromkeys(coverage.covered, reason), **coverage.reasons}, {})
    count = looped.count
    direct = sum(direct.gradients[:, :1].numel() for direct in looped.directs) // count
    direction = direct + sum(layer.gradients[:, :1].numel() for layer in looped.outers) // count
    kept = direct + sum(_kept_entries(layer) for layer in looped.outers) // count
    sample = sum(_entries(layer) for layer in looped.outers) // count
    largest = max((_gradient_entries(layer) for layer in looped.outers), default=0)
    return replace(
        coverage,
        batched=_can_batch(factors, looped),
        direction_entries=direction,
        kept_entries=kept,
        sample_entries=sample,
        layer_entries=largest,
    )


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


def _can_batch(factors: Callable[[int], Factors], looped: Factors) -> bool:
    """Whether a batched backward pass works without a hidden loop and gives the same factors."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            batched = factors(2)
        except (RuntimeError, NotImplementedError, TypeError, ValueError):
            return False
    if any("performance drop" in str(warning.message) for warning in caught):
        return False
    pairs = [(a.gradients, b.gradients) for a, b in zip(batched.outers, looped.outers, strict=True)]
    pairs += [(a.gradients, b.gradients) for a, b in zip(batched.directs, looped.directs, strict=True)]
    tolerance = 1e3 * torch.finfo(pairs[0][0].dtype).eps
    return all(bool((a - b).norm() <= tolerance * (a.norm() + 1e-300)) for a, b in pairs)
