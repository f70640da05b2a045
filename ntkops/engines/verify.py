"""The trial of rules, once for a model: where the samples are in each call, and whether its rule holds.

Two backward passes on a graph that the trial of values has left: for random cotangents w, and for s_n w_n
with one random factor s_n for each sample. Backward passes are linear: a row of sample n has s_n times its
gradient in the second, which shows where the samples lie. The gradients of the parameters themselves come
with the first, and must be what the rules make of the gradients at the calls.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..errors import NtkopsError
from ..model import Inputs, Linearization
from ..model.batch import take
from ..model.record import Call, Place, Recording, Recordings, record
from .adjoint import first_line
from .attribution import CoverageChanged, RowCheck, limit_of
from .collect import Collector, backward
from .coverage import Coverage, LayerSizes, LinearReadout, Signature, find_readout, moves_within
from .factors import Direct, Outer, in_parameter_order
from .layer_rules import RULES, Layout, OneHot
from .passes import report_passes
from .units import Unit, plan_units

__all__ = ["try_rules"]

logger = logging.getLogger(__name__)

_TRIED = 4  # samples, as many as the trial of values takes
_FAILURES = (RuntimeError, TypeError, ValueError, NotImplementedError, AttributeError, IndexError)


def try_rules(linearization: Linearization, inputs: Inputs) -> Coverage:
    """Return which parameters the layer rules cover, tried on the passes that the trial of values has left.

    Cost: two backward passes over at most four samples, for a small model two more; where no passes are left,
    two forward passes.

    Raises:
        NtkopsError: What the model floor refuses in a forward pass.
    """
    names = linearization.names
    report_passes(checks=2)
    with linearization.safe_context(), linearization.full_precision():
        try:
            first, second = inputs.hand_over_recordings() or _recorded(linearization, inputs)
            trial = _Trial(linearization, first, second)
            coverage = trial.coverage()
            linearization.verdict.layers[coverage.covered, inputs.sample_shapes] = trial.sizes
        except NtkopsError:
            raise
        except _FAILURES as error:
            # Backward passes may fail, too: a checkpointed block runs again without the recorder, and finds
            # other saved tensors where a fused function was replaced.
            reason = f"the forward pass cannot be recorded: {first_line(error)[:120]}"
            coverage = Coverage(frozenset(), dict.fromkeys(range(len(names)), reason), {})
    for index, reason in coverage.reasons.items():
        logger.info("layer rules: parameter %r goes to automatic differentiation: %s", names[index], reason)
    return coverage


def _recorded(linearization: Linearization, inputs: Inputs) -> Recordings:
    """Record a pass over a few samples, and one over fewer of them."""
    _, _, head = next(iter(inputs.batches(_TRIED)))
    count = head.num_samples
    # One sample is doubled, and the second pass has another number of them: sizes that follow it are sample
    # axes.
    whole = torch.arange(count) if count > 1 or inputs.is_coupled else torch.tensor([0, 0])
    fewer = whole[: len(whole) // 2] if len(whole) > 2 else torch.cat([whole, whole[:1]])
    if inputs.is_coupled:
        fewer = whole
    recordings = []
    for index in (whole, fewer):
        recordings.append(record(linearization.function, linearization.parameters, take(head, index)))
    return recordings[0], recordings[1].without_graph()


class _Trial:
    """Two backward passes on one small graph."""

    def __init__(self, linearization: Linearization, first: Recording, second: Recording) -> None:
        self._lin, self._first, self._second = linearization, first, second
        self._count = len(first.output)
        self._limit = limit_of(linearization.lowest_dtype)
        generator = torch.Generator().manual_seed(11)
        device = linearization.device

        def normal(count: int) -> Tensor:
            return torch.randn(count, generator=generator, dtype=torch.float64).to(device)

        self._normal = normal
        output = first.output
        self._cotangents = normal(output.numel()).view(1, *output.shape).to(output)
        self._vectors: dict[int, Tensor] = {}
        self.sizes: list[LayerSizes] = []
        # What stands for each parameter in calls, and what that shows of it.
        self._places: dict[int, dict[int, Place]] = {}
        for call in first.calls:
            for role, place in call.places.items():
                self._places.setdefault(place.index, {})[id(call.leaves[role])] = place

    def coverage(self) -> Coverage:
        """Return what is covered."""
        first, names = self._first, self._lin.names
        self._reasons = {**self._second.uncovered, **first.uncovered}  # uses without a rule, in either pass
        numbers = list(range(len(first.calls)))
        gradients, own = self._differentiated(numbers)
        scaled = self._check(numbers, {})  # for its s and w alone: where samples lie is not known yet
        sent = scaled.cotangents(self._cotangents)
        others = dict(zip(numbers, backward(first, sent, numbers, False, False), strict=True))
        layouts = self._layouts(gradients, others, sent, scaled.factors)
        covered = frozenset(range(len(names))).difference(self._reasons)
        coverage = Coverage(covered, self._reasons, layouts)
        # Without a parameter those that are left may be joined in other units: until all of them hold.
        while True:
            units = plan_units(first.calls, coverage.covered)
            self.sizes = []
            lost: dict[int, str] = {}
            for unit in units:
                try:
                    self.sizes += self._verified(unit, layouts, own, gradients)
                except CoverageChanged as change:
                    lost.update(change.lost)
            if not lost:
                break
            for index in lost.keys() & coverage.covered:
                coverage = coverage.without(index, lost[index])
        used = {place.index for unit in units for place in (unit, unit.bias) if place is not None}
        if not coverage.covered & used:  # the output uses none of them
            for index in coverage.covered:
                coverage = coverage.without(index, "the output does not use it")
            return coverage
        return self._with_readout(coverage.measured(self.sizes))

    # -- where the samples are

    def _differentiated(self, numbers: Sequence[int]) -> tuple[dict[int, Tensor | None], dict[int, Tensor]]:
        """Return gradients at the calls, ``(1, *shape)``, and of what stands for parameters in them."""
        first = self._first
        leaves = {id(leaf): leaf for call in first.calls for leaf in call.leaves.values()}
        if not numbers or not first.output.requires_grad:
            return dict.fromkeys(numbers), {}
        edges = [first.calls[number].edge for number in numbers]
        wanted: list[Any] = [*edges, *leaves.values()]
        found = torch.autograd.grad(
            [first.output],
            wanted,
            [self._cotangents[0]],
            retain_graph=True,
            allow_unused=True,
        )
        at_calls = [None if g is None else g.unsqueeze(0) for g in found[: len(edges)]]
        of_leaves = dict(zip(leaves, found[len(edges) :], strict=True))
        return dict(zip(numbers, at_calls, strict=True)), {
            k: g for k, g in of_leaves.items() if g is not None
        }

    def _vector(self, count: int) -> Tensor:
        """Return a random vector, the same for all rows of one length."""
        if count not in self._vectors:
            self._vectors[count] = self._normal(count).to(self._lin.dtype)
        return self._vectors[count]

    def _check(
        self,
        numbers: Sequence[int],
        layouts: dict[int, Layout],
        factors: tuple[Tensor, Tensor] | None = None,
    ) -> RowCheck:
        """Return the check of some units at the cotangents of this trial."""
        sizes = self._cotangents, self._limit, self._normal, self._vector
        return RowCheck(numbers, layouts, *sizes, factors)

    def _layouts(
        self,
        gradients: dict[int, Tensor | None],
        others: dict[int, Tensor | None],
        sent: Tensor,
        factors: tuple[Tensor, Tensor],
    ) -> dict[Signature, Layout]:
        """Find the sample axis of every call; calls without one lose their parameters."""
        first, second = self._first, self._second
        twins: dict[Signature, list[Call]] = {}
        for call in second.calls:
            twins.setdefault(call.signature, []).append(call)
        met = dict.fromkeys(twins, 0)
        kept: dict[int, Tensor | None] = {}

        def multiples(multiple: float) -> dict[int, Tensor | None]:
            if not kept:
                numbers = range(len(first.calls))
                found = backward(first, multiple * sent, numbers, False, False)
                kept.update(zip(numbers, found, strict=True))
            return kept

        layouts: dict[Signature, Layout] = {}
        for number, call in enumerate(first.calls):
            if call.signature not in twins:
                self._lose(call, "which calls are made depends on the batch")
                continue
            if not RULES[call.rule].supports(call):
                self._lose(call, "its arguments are not covered by the rule")
                continue
            some = twins[call.signature]
            other = some[min(met[call.signature], len(some) - 1)]
            met[call.signature] += 1
            # The layout for which rows of sample n have s_n times their gradient: others fail with
            # probability one.
            fitting = []
            for layout in self._candidates(call, other):
                check = self._check([number], {number: layout}, factors)
                check.add(0, {number: gradients[number]})
                if not check.differing({number: others[number]}, multiples):
                    fitting.append(layout)
            if len(fitting) > 1:  # no gradient at all: the values tell
                fitting = [layout for layout in fitting if self._values_agree(layout, call, other)]
            if len(fitting) != 1:
                self._lose(call, f"no sample axis in its result of shape {tuple(call.shape)}")
            elif layouts.setdefault(call.signature, fitting[0]) != fitting[0]:
                self._lose(call, "its samples lie on different axes in different calls")
        for call in second.calls:
            if call.signature not in layouts:
                self._lose(call, "which calls are made depends on the batch")
        return layouts

    def _lose(self, call: Call, reason: str) -> None:
        """Leave the parameters of a call to automatic differentiation."""
        for place in call.places.values():
            self._reasons.setdefault(place.index, f"{call.rule}: {reason}")

    def _candidates(self, call: Call, other: Call) -> list[Layout]:
        """Return the layouts that the sizes of a call allow, in batches of two lengths."""
        fewer = len(self._second.output)
        if self._lin.state_dim is None:  # one sample, to which every row belongs
            return [Layout(axis) for axis in RULES[call.rule].sample_axes(call)[:1]]
        found = []
        for axis in RULES[call.rule].sample_axes(call):
            size, small = call.shape[axis], other.shape[axis]
            if size == small or size % self._count or small % fewer:  # does not follow the number of samples
                continue
            found.append(Layout(axis, True))
            if size > self._count:  # several rows a sample, whose numbers may run slowest or fastest
                found.append(Layout(axis, False))
        return found

    def _values_agree(self, layout: Layout, call: Call, other: Call) -> bool:
        """Whether the first sample of the second pass has the activations that it had in the first one."""
        for name, value in call.arguments.items():
            twin = other.arguments.get(name)
            if name in call.places or not isinstance(value, Tensor) or not isinstance(twin, Tensor):
                continue
            if value.dim() <= layout.axis or value.shape[layout.axis] != call.shape[layout.axis]:
                continue
            one = layout.expose(twin, len(self._second.output))[0]
            rows = layout.expose(value, self._count)
            if not any(one.shape == row.shape and _close(one, row) for row in rows):
                return False
        return True

    # -- whether the rules hold

    def _verified(
        self,
        unit: Unit,
        layouts: dict[Signature, Layout],
        own: dict[int, Tensor],
        gradients: dict[int, Tensor | None],
    ) -> list[LayerSizes]:
        """Compare what the rules give for one unit with the gradient of its parameter; return its sizes."""
        collector = Collector(self._first, [unit], layouts, self._count, 1, self._lin.dtype)
        collector.add(0, 1, gradients)
        layers = collector.finish().layers
        lost: dict[int, str] = {}
        # Σ_n of what the rule gives for single samples is the gradient of the parameter, by the first pass.
        for index, start, total, scale in (found for layer in layers for found in _sums(layer, gradients)):
            row = self._lin.sizes[index] // max(1, (self._lin.shapes[index] or (1,))[0])
            gap = total.clone()
            for leaf, place in self._places[index].items():
                if leaf in own and start <= place.start and (place.stop - start) * row <= len(gap):
                    found = own[leaf].mT if place.transposed else own[leaf]
                    gap[(place.start - start) * row : (place.stop - start) * row] -= found.flatten()
            difference = _length(gap)
            # Written so that what is not a number passes: it is reported where results are looked at.
            if difference > self._limit * scale:
                share = difference / max(_length(total - gap), 1e-300)
                lost[index] = f"its layer rule and automatic differentiation differ by {share:.1e}"
                name = self._lin.names[index]
                logger.warning("parameter %r goes to automatic differentiation: %s", name, lost[index])
        if lost:
            raise CoverageChanged(lost)
        return [LayerSizes.of(layer) for layer in layers]

    # -- a wide linear layer at the end

    def _with_readout(self, coverage: Coverage) -> Coverage:
        """Return the coverage with the linear layer that ends the model, if there is a wide one."""
        readout = find_readout(self._first, coverage.covered, coverage.layouts, self._lin.shapes)
        if readout is None:
            return coverage
        body = replace(coverage, covered=coverage.covered - readout.parameters).measured(self.sizes)
        units = plan_units(self._first.calls, body.covered)
        if not units or not self._reads_through(readout, units):
            logger.info("the last linear layer is not the end of the model: one backward pass an output")
            return coverage
        return replace(coverage, readout=readout, body=body)

    def _reads_through(self, readout: LinearReadout, units: Sequence[Unit]) -> bool:
        """Whether parameters before the last layer move the output within the range of its weight only."""
        basis, _ = torch.linalg.qr(readout.matrix(self._lin.parameters).double())  # (V, d)
        split = self._cotangents.double().unflatten(2, (-1, readout.classes))  # (1, B, S, V)
        projected = (split @ basis @ basis.mT).flatten(2).to(self._cotangents)
        return moves_within(self._first, units, self._cotangents, projected, self._lin.dtype)


def _sums(layer: Outer | Direct, gradients: dict[int, Tensor | None]) -> list[tuple[int, int, Tensor, float]]:
    """Return the gradients summed over samples: parameter, first row, flat sum, and what rounding goes by."""
    unit = layer.unit
    if isinstance(layer, Direct):  # (B, 1, p)
        # Over positions a gradient may cancel; its rounding is that of the terms.
        terms = [gradients[use.call] for use in unit.uses]
        scale = float(layer.gradients.norm(dim=2).sum()) + sum(_length(g) for g in terms if g is not None)
        return [(unit.index, unit.start, layer.gradients.sum((0, 1)), scale)]
    held, signals = layer.activations, layer.gradients[:, 0]  # (B, groups, d_out, S)
    flat = signals.permute(1, 2, 0, 3).flatten(2)  # (groups, d_out, B·S)
    lengths = signals.norm(dim=(1, 2))  # Σ |g_s| |a_s| is what Σ g_s a_sᵀ is rounded by, (B, S)
    if isinstance(held, OneHot):
        total = flat.new_zeros((*flat.shape[:2], held.size)).index_add_(2, held.index.flatten(), flat)
        scale = float(lengths.sum())
    else:
        total = flat @ held.permute(1, 2, 0, 3).flatten(2).mT
        scale = float((lengths * held.norm(dim=(1, 2))).sum())
    ordered = in_parameter_order(total[None, None], layer.transposed).flatten()
    found = [(unit.index, unit.start, ordered, scale)]
    if unit.bias is not None:
        found.append((unit.bias.index, unit.bias.start, flat.sum(2).flatten(), float(lengths.sum())))
    return found


def _length(tensor: Tensor) -> float:
    return float(torch.linalg.vector_norm(tensor))


def _close(one: Tensor, other: Tensor) -> bool:
    return torch.allclose(one.double(), other.double(), rtol=1e-3, atol=1e-6)
