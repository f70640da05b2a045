"""Whether the rows of an output belong to single samples, wherever these stand, and to them alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..errors import CoupledSamplesError, NtkopsError, OutputError, UnsupportedModelError
from ..shortage import is_out_of_memory
from .batch import Batch, take
from .rounding import UNITS, lowest_dtype, neighbours

if TYPE_CHECKING:
    from .pure import PureFunction

__all__ = ["SampleAxis", "first_line", "is_fault_of_model"]

_PROBED = 4  # samples that are looked at along another axis
# A difference is rounding if it is no more than so many times what a step of some rounding units makes.
_NOISE_FACTOR = 10.0
_COARSE = 1e-4  # rounding units above it are those of half precisions, .001 and .008
# Rows that must agree do so up to rounding; anything that couples samples is far larger.
_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 2e-3, torch.bfloat16: 1e-2}


class SampleAxis:
    """The samples of one small batch; ``evaluate`` runs one pass, at other parameters if it is given some."""

    def __init__(
        self,
        linearization: PureFunction,
        sample: Batch,
        params: Sequence[Tensor],
        evaluate: Callable[..., Tensor],
    ) -> None:
        self._lin, self._sample, self._params = linearization, sample, tuple(params)
        self._evaluate, self._state_dim = evaluate, linearization.state_dim
        self._axis = linearization.state_dim or 0  # of coupled samples no axis is ever asked for

    def require_independent(self, state: Tensor) -> None:
        """Raise if changing one sample changes the output of another."""
        count = self._sample.num_samples
        if count == 1:
            self._require_single(state)
            return
        rows = torch.arange(count)
        for changed in range(count):
            # A neighbour's content: samples that must be sorted stay sorted.
            index = rows.clone()
            index[changed] = changed - 1 if changed else 1
            kept = rows[rows != changed].to(state.device)
            other = self._evaluate(take(self._sample, index))
            if self._moved(state.index_select(self._axis, kept), other.index_select(self._axis, kept)):
                raise self._coupled(changed)
        self._require_any_place(state, rows[1:])

    def _require_any_place(self, state: Tensor, kept: Tensor) -> None:
        """Raise if the outputs of samples depend on their place, or on how many samples there are."""
        try:
            moved_up = self._evaluate(take(self._sample, kept))
        except Exception as error:
            if is_out_of_memory(error):
                raise
            if len(kept) == 1:
                return  # it squeezes a batch of one, and fails aloud where it is given one
            raise UnsupportedModelError(
                f"the model works on a batch of {len(kept) + 1} samples and not on {len(kept)} of them "
                f"({type(error).__name__}: {first_line(error)}), so that samples cannot be taken apart; let "
                f"its shapes follow the batch (x.shape[{self._axis}], -1), not a number that is written down"
            ) from error
        before = state.index_select(self._axis, kept.to(state.device))
        if moved_up.shape != before.shape:  # said where a batch has other outputs than the first
            return
        if self.close(before, moved_up) or self._is_rounding(state, before, moved_up):
            return
        raise CoupledSamplesError(
            "samples are coupled: without the first sample the others have other outputs, so that a kernel "
            "would depend on how they are put into batches; look for a position in the batch, or a number of "
            f"samples (len(x), x.shape[{self._axis}]), that enters the output"
        )

    def require_any_order(self, state: Tensor) -> None:
        """Raise if samples that are turned round have other outputs; to refuse an order aloud is fine."""
        order = torch.arange(self._sample.num_samples).flip(0)
        try:
            turned = self._evaluate(take(self._sample, order))
        except Exception as error:
            if is_out_of_memory(error):
                raise
            return  # packed sequences that must come sorted, say: any other use of that order is refused, too
        before = state.index_select(self._axis, order.to(state.device))
        if self.close(before, turned) or self._is_rounding(state, before, turned):
            return
        raise CoupledSamplesError(
            "samples are coupled: in another order they have other outputs; look for sorting whose result is "
            "not put back in order, or for a position in the batch that enters the output"
        )

    def _is_rounding(self, state: Tensor, before: Tensor, after: Tensor) -> bool:
        """Whether coarser arithmetic inside, or enlarged rounding, explains that two states differ."""
        if self.close(before, after, lowest_dtype(self._lin, self._sample)):
            return True
        # Neighbours differ from the state by what some units of rounding make of it; a coupling makes more.
        # In half precision 64 units are half of everything: one unit alone.
        is_low = torch.finfo(self._lin.dtype).eps > _COARSE
        noise = 0.0
        for params, samples in neighbours(
            self._params, self._sample.tensors, units=UNITS[:1] if is_low else UNITS
        ):
            there = self._evaluate(self._sample.replace(samples), params).detach()
            noise = max(noise, float((there - state).double().norm()))
        return float((after - before).double().norm()) <= _NOISE_FACTOR * noise

    def _require_single(self, state: Tensor) -> None:
        """With one sample (or equal ones), its double must give the same output twice."""
        twice = take(self._sample, torch.tensor([0, 0]))
        try:
            double = self._evaluate(twice)
        except OutputError:
            raise
        except Exception:
            return  # a model for single samples only
        for row in (0, 1):
            again = double.narrow(self._axis, row, 1)
            if self._moved(state, again) and not self._is_rounding(state, state, again):
                raise self._coupled(0)

    def _coupled(self, changed: int) -> CoupledSamplesError:
        """Return the error for samples that are coupled, or that lie on another axis."""
        for axis in range(2):
            if axis != self._axis and self._independent_along(axis):
                return CoupledSamplesError(
                    f"samples are not on dimension {self._axis}: changing entry {changed} there changes the "
                    f"output of others, while entries of dimension {axis} are independent; pass "
                    f"batch_dim={axis} (a recurrent layer without batch_first=True has time first)"
                )
        return CoupledSamplesError(
            f"samples are coupled: changing sample {changed} changes the output of others, so that the "
            "kernel has no sample structure; look for normalisation, attention, sorting or pooling over the "
            f"batch axis (dimension {self._axis}), or consent with batch_dim=None: rows are then nodes of "
            "one whole"
        )

    def _independent_along(self, axis: int) -> bool:
        """Whether entries along another axis are independent, as samples would be."""
        placed = [tensor for tensor, own in self._sample.placed if own is not None]
        sizes = {tensor.shape[axis] if tensor.dim() > axis else 0 for tensor in placed}
        if len(sizes) != 1 or (size := sizes.pop()) < 2:
            return False
        rows = torch.arange(min(size, _PROBED), device=placed[0].device)
        swapped = rows.clone()
        swapped[0] = 1

        def state_of(at: Tensor) -> Tensor:
            chosen = self._sample.map_samples(lambda tensor, _: tensor.index_select(axis, at))
            return self._lin.raw_state(self._params, chosen)

        try:
            states = [state_of(at) for at in (rows, swapped)]
            kept = [state.narrow(axis, 1, len(rows) - 1) for state in states]
        except Exception:
            return False
        return states[0].shape[axis] == len(rows) and not self._moved(*kept)

    def _moved(self, before: Tensor, after: Tensor) -> bool:
        """Whether two states differ."""
        return not self.close(before, after)

    def close(self, before: Tensor, after: Tensor, lowest: torch.dtype | None = None) -> bool:
        """Whether two states agree up to rounding, of the lowest dtype if one is given, output by output."""
        if before.shape != after.shape:
            return False
        dtypes = {t.dtype for t in (*self._params, *self._lin.constants, before)}
        dtypes |= set() if lowest is None else {lowest}
        tolerance = max(_TOLERANCE.get(dtype, 0.0) for dtype in dtypes)
        if self._state_dim is None:
            before, after = before.unsqueeze(0), after.unsqueeze(0)
        left, right = before.movedim(self._axis, 0).double(), after.movedim(self._axis, 0).double()
        # Against the largest value of each output among the samples: outputs may differ in scale, and one
        # that is tiny everywhere is held to a thousandth of the largest.
        size = torch.maximum(left.abs(), right.abs())
        finite = torch.where(size.isinf(), 0.0, size)
        scale = finite.amax(0, keepdim=True).clamp(min=1e-3 * float(finite.max()))
        return bool(((left - right).abs() <= tolerance * scale).logical_or(left == right).all())


def require_own_rows(
    linearization: PureFunction,
    start: int,
    params: Sequence[Tensor],
    batch: Batch,
    rows: Tensor | None,
    chosen: Tensor,
) -> None:
    """Raise if chosen samples of a batch have other outputs alone; ``rows`` are the batch's, if known."""
    params = tuple(p.detach() for p in params)

    def outputs(samples: Batch, params: Sequence[Tensor] = params) -> Tensor:
        with torch.no_grad(), linearization.safe_context():
            return linearization.function(params, samples).detach()

    rows = outputs(batch) if rows is None else rows.detach()
    some = take(batch, chosen)
    try:
        again = outputs(some)
    except Exception as error:
        if is_out_of_memory(error):
            raise
        return  # some models squeeze a batch of one: said where such a batch is used
    if again.shape[1] != rows.shape[1]:  # another number of outputs is refused where the function is called
        return
    scale = torch.where(rows.isinf(), 0.0, rows.abs()).amax(0, keepdim=True)
    limit = _TOLERANCE.get(linearization.lowest_dtype, 0.0) * scale.clamp(min=1e-3 * float(scale.max()))
    own = rows.index_select(0, chosen.to(rows.device))
    gap = (again.double() - own.double()).abs()
    if bool(((gap <= limit) | (again == own)).all()):
        return
    noise = 0.0
    for moved, samples in neighbours(params, some.tensors):
        noise = max(noise, float((outputs(some.replace(samples), moved) - again).double().norm()))
    if float(gap.norm()) <= _NOISE_FACTOR * noise:
        return
    first = start + int(chosen[int(gap.amax(1).argmax())])
    raise CoupledSamplesError(
        f"samples are coupled: sample {first} has another output among {len(chosen)} of a batch than among "
        f"all {batch.num_samples}, so that a kernel would depend on how it is cut into batches; look for "
        "sorting, normalisation, attention or pooling over samples, or a number of samples that enters"
    )


def first_line(error: Exception) -> str:
    """Return the first line of what an exception says."""
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else "no message"


def is_fault_of_model(error: Exception) -> bool:
    """Whether a batch's shapes or values may be why a model raised, rather than one of us or the memory."""
    if isinstance(error, (NtkopsError, NotImplementedError, torch.OutOfMemoryError)):
        return False
    kinds = (RuntimeError, ValueError, IndexError, AssertionError)
    return isinstance(error, kinds) and not any(word in str(error) for word in ("alloc", "memory"))
