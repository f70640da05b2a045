"""A model whose output is all hidden states.

A model whose output is every hidden state of one recurrent layer has T·H outputs a sample, each of which
would need a backward pass through time. Here the layer's call is caught in the forward pass, and kernels
and diagonals come from the Jacobians of its single steps (`ntkops.engines.recurrence`).
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from ..errors import NtkopsError
from ..model import Batch, Inputs
from ..shortage import is_out_of_memory
from .attribution import CoverageChanged
from .cost import KernelShape
from .coverage import HiddenStates
from .differentiation import Parameters
from .layer_rules.recurrent import SEQUENCES, Step
from .recurrence import Steps, linearize_steps, pulled_signals, same_time_diagonal, state_kernel
from .source import LayerSource
from .summation import wide_dtype
from .tiles import sample_slices

__all__ = [
    "states_diagonal",
    "states_diagonal_passes",
    "states_kernel",
    "states_kernel_passes",
    "verified_states",
]

logger = logging.getLogger(__name__)

_ENTRIES = 2**22  # of one batch of step Jacobians: what stays near the processor
_BLOCK_ENTRIES = 2**24  # of the kernel between a batch of sequences and one
_PASS = 6.0  # operations of one pass over one sample: this times T P
_SPEED = 4.0  # of matrix products against passes
_CHECKED_SAMPLES = 3
_CHECKED_STEPS = 6


@dataclass(frozen=True, eq=False)
class RecurrentLayer:
    """The call of a recurrent layer, with the samples first.

    Attributes:
        step: One step.
        inputs: ``(B, T, d)``.
        state: The first state.
        weights: Its two weights, and its two biases or nothing more.
        places: The number of the selected parameter that each of them is, or None.
    """

    step: Step
    inputs: Tensor
    state: tuple[Tensor, ...]
    weights: tuple[Tensor, ...]
    places: tuple[int | None, ...]

    def linearize(self) -> Steps:
        """Linearise every step."""
        selected = [place is not None for place in self.places]
        return linearize_steps(self.step, self.inputs, self.state, self.weights, selected)


class _Catcher(TorchFunctionMode):
    """Cuts the graph behind recurrent layers with selected parameters: their results become leaves."""

    def __init__(self, leaves: tuple[Tensor, ...]) -> None:
        super().__init__()
        self._numbers = {id(leaf): number for number, leaf in enumerate(leaves)}
        self.calls: list[tuple[Any, tuple[Any, ...], tuple[Tensor, ...]]] = []

    def number(self, weight: Tensor) -> int | None:
        """Return the number of the selected parameter that a weight is."""
        return self._numbers.get(id(weight))

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        # The call with padded sequences; that with packed ones has other arguments, and samples that differ.
        whole = function in SEQUENCES and len(args) == 9 and not kwargs and isinstance(args[2], (list, tuple))
        if not whole or all(self.number(weight) is None for weight in args[2]):
            return function(*args, **(kwargs or {}))
        with torch.no_grad():
            cut = tuple(part.detach().requires_grad_() for part in function(*args))
        self.calls.append((function, args, cut))
        return cut


def _require(condition: bool, reason: str) -> None:
    """Give this way up where a condition does not hold."""
    if not condition:
        raise CoverageChanged({}, f"not all hidden states of one recurrent layer: {reason}")


def _caught(source: LayerSource, params: Parameters, batch: Batch) -> RecurrentLayer:
    """Run a forward pass and look for the layer whose hidden states are its output."""
    leaves = tuple(p.detach().requires_grad_() for p in params)
    catcher = _Catcher(leaves)
    with torch.enable_grad():
        with catcher:
            output = source.linearization.function(leaves, batch)
        # Its result is a leaf now: whatever else of the output depends on parameters has a gradient there.
        _require(len(catcher.calls) == 1 and output.requires_grad, f"{len(catcher.calls)} such calls")
        function, args, cut = catcher.calls[0]
        flat = _identical_output(output, args, cut)
        gradients = torch.autograd.grad(output, (*cut, *leaves), flat, allow_unused=True)
    own = gradients[0]  # random numbers arrive unchanged where the output is the states themselves
    _require(own is not None and torch.equal(_sample_rows(own, args[8]), flat), "they are changed on the way")
    _require(all(g is None for g in gradients[1:]), "other ways lead from the parameters to the output")
    return _layer_of(source, catcher, function, args, batch)


def _sample_rows(sequence: Tensor, batch_first: bool) -> Tensor:
    """Flatten a sequence of states to one row per sample."""
    return (sequence if batch_first else sequence.transpose(0, 1)).flatten(1)


def _identical_output(output: Tensor, args: tuple[Any, ...], cut: tuple[Tensor, ...]) -> Tensor:
    """Return random cotangents of an output that is the hidden states, sample by sample."""
    _require(cut[0].dim() == 3 and output.dtype == cut[0].dtype, "they are not a batch of sequences")
    states = _sample_rows(cut[0].detach(), args[8])
    _require(states.shape == output.shape and torch.equal(states, output.detach()), "the output differs")
    generator = torch.Generator().manual_seed(17)
    return torch.randn(output.shape, generator=generator, dtype=torch.float64).to(output)


def _layer_of(
    source: LayerSource, catcher: _Catcher, function: Any, args: tuple[Any, ...], batch: Batch
) -> RecurrentLayer:
    """Return the layer of a call, if it is one that the recursions describe."""
    step, parts = SEQUENCES[function]
    inputs, first, weights, biases, layers, dropout, train, bidirectional, batch_first = args
    state = tuple(first) if parts == 2 else (first,)
    _require(layers == 1 and not bidirectional, "it has several layers, or runs in both directions")
    _require(not (train and dropout) and len(weights) == (4 if biases else 2), "dropout, or a projection")
    places = tuple(catcher.number(weight) for weight in weights)
    used = [place for place in places if place is not None]
    _require(len(set(used)) == len(used), "weights are shared")
    others = [weight for weight, place in zip(weights, places, strict=True) if place is None]
    _require(
        not any(tensor.requires_grad for tensor in (inputs, *state, *others)),
        "its inputs, its first state or another weight depend on the parameters",
    )
    dtypes = {tensor.dtype for tensor in (inputs, *state, *weights)}
    _require(dtypes == {source.dtype}, "it computes in another dtype")
    inputs = inputs if batch_first else inputs.transpose(0, 1)
    _require(inputs.shape[0] == batch.num_samples, "its sequences are not the samples")
    return RecurrentLayer(
        step,
        inputs.detach(),
        tuple(part[0].detach() for part in state),
        tuple(weight.detach() for weight in weights),
        places,
    )


def steps_of(source: LayerSource, params: Parameters, inputs: Inputs) -> Steps:
    """Return the linearised steps of all samples."""
    made = [layer.linearize() for layer in recurrent_layers(source, params, inputs)]
    if len(made) == 1:
        return made[0]
    return Steps(
        torch.cat([steps.transitions for steps in made]),
        tuple(torch.cat(gates) for gates in zip(*(steps.gates for steps in made), strict=True)),
        tuple(torch.cat(parts) for parts in zip(*(steps.activations for steps in made), strict=True)),
    )


def recurrent_layers(
    source: LayerSource, params: Parameters, inputs: Inputs, batch_size: int | None = None
) -> Iterator[RecurrentLayer]:
    """Yield the layer as it is called for each batch of samples. Cost: one forward pass."""
    with source.linearization.safe_context():
        for _, _, batch in inputs.batches(batch_size or source.sizes.batch_size(inputs)):
            yield _caught(source, params, batch)


# what it costs


def _sizes(states: HiddenStates, inputs: Inputs) -> tuple[int, int]:
    """Return the numbers T of steps and D of entries of a state."""
    return inputs.num_outputs // states.hidden, states.parts * states.hidden


def _tile(states: HiddenStates, inputs: Inputs) -> int:
    """Return how many samples' step Jacobians, T D² each, are made at a time."""
    length, size = _sizes(states, inputs)
    return max(1, _ENTRIES // max(1, length * size * size))


def _fits(source: LayerSource, states: HiddenStates, inputs: Inputs) -> bool:
    """Whether outputs are whole sequences whose step Jacobians, three times, fit well into the workspace."""
    if inputs.lengths is not None:
        return False
    length, size = _sizes(states, inputs)
    return 3 * length * size * size * source.dtype.itemsize <= 2 * source.sizes.workspace_bytes()


def states_diagonal_passes(source: LayerSource, inputs: Inputs, distinct: int) -> float | None:
    """Return what the diagonal costs by this way, in passes over all samples; None for another way."""
    states = source.coverage.states
    if states is None or source.options.diagonal is not None or not _fits(source, states, inputs):
        return None
    length, size = _sizes(states, inputs)
    # D backward passes of single steps, or B T² D³ operations in units of 6 T P a pass and sample.
    recursion = length * size**3 / (_PASS * _SPEED * max(1, source.linearization.num_parameters))
    passes = float(math.ceil(max(size, recursion)))
    return passes if passes < distinct else None


def states_kernel_passes(source: LayerSource, inputs: Inputs, wanted: KernelShape) -> float | None:
    """Return what a kernel costs by this way, in passes over the rows' samples; None for another way."""
    states = source.coverage.states
    if states is None or source.options.kernel is not None or not _fits(source, states, inputs):
        return None
    length, size = _sizes(states, inputs)
    weights = max(1, source.linearization.num_parameters)
    share = 0.5 if wanted.symmetric else 1.0
    pairs = wanted.left * wanted.right * share
    # C_tt' Mᵀ and M Γ_tt', two operations each for D³ numbers of every pair of times and of samples; against
    # products of gradients that the other way would write down, and the passes that it would make for them.
    recursion = 4.0 * length**2 * size**3 * pairs
    gradients = wanted.kernels * wanted.terms * wanted.rows
    entries = 2.0 * gradients * wanted.columns * weights * pairs
    one_pass = _PASS * length * weights * wanted.left
    if recursion >= entries + _SPEED * min(gradients, inputs.num_outputs) * one_pass:
        return None
    return size + recursion / (_SPEED * one_pass)


# kernels and diagonals


def states_diagonal(
    source: LayerSource, params: Parameters, inputs: Inputs, outputs: Tensor
) -> Tensor | None:
    """Return ``(M, N·r)`` kernel diagonals for ``(M, R, r)`` output numbers; None for another way."""
    passes = states_diagonal_passes(source, inputs, torch.unique(outputs).numel())
    states = source.coverage.states
    if passes is None or states is None:
        return None
    parts = []
    try:
        for _, _, part in sample_slices(inputs, _tile(states, inputs)):
            parts.append(same_time_diagonal(steps_of(source, params, part)).flatten(1))
    except (CoverageChanged, RuntimeError, MemoryError) as change:
        if not isinstance(change, CoverageChanged) and not is_out_of_memory(change):
            raise
        _leave(source, change)
        return None
    source.count_rows(int(passes) * inputs.num_samples, inputs)
    lengths = torch.cat(parts)  # (N, O)
    # Sums over terms; all of a trace over time are positive, and many.
    found = lengths[:, outputs.to(lengths.device)].sum(2, dtype=wide_dtype(lengths)).to(lengths.dtype)
    return found.movedim(1, 0).flatten(1)


def states_kernel(
    source: LayerSource,
    params: Parameters,
    left: Inputs,
    right: Inputs,
    left_outputs: Tensor,
    right_outputs: Tensor,
) -> Tensor | None:
    """Return ``(M, N₁·r₁, N₂·r₂)`` kernels for output numbers ``(M, R, r)``; None for another way."""
    kernels, terms, r1 = left_outputs.shape
    r2 = right_outputs.shape[2]
    symmetric = left is right and torch.equal(left_outputs, right_outputs)
    n1, n2 = left.num_samples, right.num_samples
    wanted = KernelShape(n1, n2, r1, r2, terms, kernels, symmetric)
    passes = states_kernel_passes(source, left, wanted)
    if passes is None:
        return None
    result = torch.empty((kernels, n1, r1, n2, r2), dtype=source.dtype, device=source.device)
    whole = _is_everything(left_outputs, left.num_outputs) and _is_everything(
        right_outputs, right.num_outputs
    )
    try:
        for rows, columns, make in _pairs(source, params, left, right, symmetric):
            target = result[:, rows, :, columns]  # (M, B, r₁, r₂)
            if whole:
                make(target[0])
            else:
                target.copy_(_selected(make(None), left_outputs, right_outputs))
            if symmetric:
                _mirror(result, rows, columns)
    except (CoverageChanged, RuntimeError, MemoryError) as change:
        if not isinstance(change, CoverageChanged) and not is_out_of_memory(change):
            raise
        _leave(source, change)
        return None
    source.count_rows(math.ceil(passes) * n1, left)
    return result.view(kernels, n1 * r1, n2 * r2)


def _mirror(result: Tensor, rows: slice, columns: int) -> None:
    """Copy the kernels of some samples with one to those of one with some."""
    own = result[:, columns, :, columns]
    if rows.start == columns:  # of a sample with itself both triangles are made, and differ by rounding
        own.copy_((own + own.mT) / 2)
    others = slice(max(rows.start, columns + 1), rows.stop)
    result[:, columns, :, others] = result[:, others, :, columns].permute(0, 3, 1, 2)


Maker = Callable[[Tensor | None], Tensor]


def _pairs(
    source: LayerSource, params: Parameters, left: Inputs, right: Inputs, symmetric: bool
) -> Iterator[tuple[slice, int, Maker]]:
    """Yield what makes ``(B, O, O')`` kernels of some samples with one, in place where that is asked.

    Of a symmetric kernel only those of later samples with earlier ones are made.
    """
    states = source.coverage.states
    assert states is not None
    room = _BLOCK_ENTRIES // max(1, left.num_outputs * right.num_outputs)
    size = max(1, min(room, _tile(states, left)))
    for a, b, part in sample_slices(left, size):
        steps = steps_of(source, params, part)
        for c, d, other in sample_slices(right, size):
            if symmetric and c > a:  # above the diagonal
                continue
            columns = steps if left is right and c == a else steps_of(source, params, other)
            for number in range(c, d):
                first = max(a, number) if symmetric else a
                one = columns.take(number - c, number - c + 1)
                yield slice(first, b), number, partial(_made, steps.take(first - a, b - a), one)


def _made(left: Steps, right: Steps, target: Tensor | None) -> Tensor:
    """Make ``(B, O, O')`` kernels, in a strided target if there is one."""
    if target is not None:
        target = target.unflatten(1, (left.length, -1)).unflatten(3, (right.length, -1))
    return state_kernel(left, right, _ENTRIES, target).flatten(3).flatten(1, 2)


def _selected(block: Tensor, left_outputs: Tensor, right_outputs: Tensor) -> Tensor:
    """Pick the outputs out of ``(B, O, O')`` and sum the terms, ``(M, B, r₁, r₂)``."""
    ones, others = left_outputs.to(block.device), right_outputs.to(block.device)
    if ones.shape[:2] == (1, 1):
        return block[:, ones[0, 0]][:, :, others[0, 0]].unsqueeze(0)
    kernels = []
    # With one output a kernel all kernels are picked at once, with more one after the other: memory.
    for one, other in zip(ones, others, strict=True) if ones.shape[2] > 1 else [(ones, others)]:
        kernels.append(block[:, one.unsqueeze(-1), other.unsqueeze(-2)])  # (B, ..., R, r₁, r₂)
    found = torch.stack(kernels, dim=1) if ones.shape[2] > 1 else kernels[0]
    return found.sum(2, dtype=wide_dtype(found)).to(found.dtype).movedim(1, 0)


def _is_everything(outputs: Tensor, count: int) -> bool:
    """Whether one kernel of all outputs in order is wanted."""
    return outputs.shape == (1, 1, count) and torch.equal(outputs.flatten().cpu(), torch.arange(count))


def _leave(source: LayerSource, change: Exception) -> None:
    """Take the ordinary way from now on, loudly."""
    logger.warning("hidden states go the way of any output from now on: %s", change)
    source.coverage = replace(source.coverage, states=None)


# the check at construction


def verified_states(source: LayerSource, inputs: Inputs) -> HiddenStates | None:
    """Return which layer's hidden states are all of the output, compared with automatic differentiation.

    None where the output is something else, where other layers have parameters too, or where the results
    differ. Cost: a forward pass; where the output is hidden states, three per-sample passes over three
    samples.

    Raises:
        NtkopsError: What the model floor refuses in a forward pass.
    """
    linearization = source.linearization
    if not source.coverage.covered or source.uncovered or not linearization.is_recurrent:
        return None
    if inputs.lengths is not None:
        return None
    params = tuple(p.detach() for p in linearization.parameters)
    part = inputs.select(torch.arange(min(_CHECKED_SAMPLES, inputs.num_samples)))
    with torch.no_grad():
        try:
            (layer,) = recurrent_layers(source, params, part, part.num_samples)
        except CoverageChanged as change:
            logger.debug("%s", change)
            return None
        except NtkopsError:
            raise
        except (RuntimeError, TypeError, ValueError) as error:
            logger.debug("hidden states over time are not looked for: %s", error)
            return None
        states = HiddenStates(layer.state[0].shape[-1], len(layer.state))
        if not _fits(source, states, inputs):
            return None
        steps = layer.linearize()
        if _agree(source, part, layer, steps):
            return states
    logger.warning("hidden states over time: step Jacobians and automatic differentiation differ")
    return None


def _agree(source: LayerSource, part: Inputs, layer: RecurrentLayer, steps: Steps) -> bool:
    """Compare gradients of all states, and the kernel of some early ones."""
    params = tuple(p.detach() for p in source.linearization.parameters)
    generator = torch.Generator().manual_seed(19)
    early = steps.between(0, min(_CHECKED_STEPS, steps.length))
    # A late output and one in the middle of the first steps, beside a random combination of all of them.
    picked = torch.tensor([(early.length - 1) * steps.hidden, early.length * steps.hidden // 2])
    cotangents = torch.zeros((part.num_samples, 3, part.num_outputs), dtype=torch.float64)
    cotangents[:, 0] = torch.randn(cotangents[:, 0].shape, generator=generator, dtype=torch.float64)
    cotangents[:, torch.arange(1, 3), picked] = 1
    cotangents = cotangents.to(dtype=source.dtype, device=source.device)
    expected = _differentiated(source, params, part, cotangents).double()  # (B, 3, P)
    found = _gradients(source, layer, steps, cotangents).double()
    rows = expected[:, 1:]
    diagonal = same_time_diagonal(early).flatten(1)[:, picked]
    kernel = state_kernel(early, early.take(0, 1), _ENTRIES).flatten(3).flatten(1, 2)
    block = kernel[:, picked][:, :, picked]  # (B, 2, 2)
    tolerance = 1e3 * torch.finfo(source.dtype).eps
    # J_iᵀ v; |∇f_io|²; ⟨∇f_io, ∇f_0p⟩: what gradients, the diagonal and the kernel are made of.
    compared = (
        (found, expected),
        (diagonal.double(), rows.square().sum(2)),
        (block.double(), torch.einsum("bip,jp->bij", rows, rows[0])),
    )
    return all(bool((a - b).norm() <= tolerance * b.norm()) for a, b in compared)


def _differentiated(source: LayerSource, params: Parameters, part: Inputs, cotangents: Tensor) -> Tensor:
    """Return ``(B, C, P)`` gradients, one backward pass for each sample and direction."""
    (_, _, batch), *_ = part.batches(part.num_samples)
    leaves = tuple(p.detach().requires_grad_() for p in params)
    with torch.enable_grad(), source.linearization.safe_context():
        output = source.linearization.function(leaves, batch)
        rows = []
        for number in range(part.num_samples):
            for sent in cotangents[number]:
                whole = torch.zeros_like(output)
                whole[number] = sent.to(whole)
                rows.append(
                    torch.autograd.grad(output, leaves, whole, retain_graph=True, materialize_grads=True)
                )
    flat = torch.stack([torch.cat([g.flatten() for g in row]) for row in rows])
    return flat.view(part.num_samples, -1, flat.shape[1])


def _gradients(source: LayerSource, layer: RecurrentLayer, steps: Steps, cotangents: Tensor) -> Tensor:
    """Return ``(B, C, P)`` gradients for ``(B, C, O)`` cotangents."""
    result = cotangents.new_zeros((*cotangents.shape[:2], source.linearization.num_parameters))
    signals = pulled_signals(steps, cotangents.unflatten(2, (steps.length, steps.hidden)))
    for number, (signal, activations) in enumerate(zip(signals, steps.activations, strict=True)):
        # Σ_t (∂/∂u_t) a_tᵀ, the last column of a being the one that the bias is multiplied with.
        written = signal.mT @ activations.unsqueeze(1)  # (B, C, Q·H, d)
        weight, bias = (layer.places[number], (*layer.places, None, None)[number + 2])
        if bias is not None:
            result[..., source.starts[bias] : source.starts[bias + 1]] = written[..., -1]
        if weight is not None:
            columns = written[..., : written.shape[-1] - (bias is not None)]
            result[..., source.starts[weight] : source.starts[weight + 1]] = columns.flatten(2)
    return result
