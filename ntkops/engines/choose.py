"""Which rung of the ladder a model allows, found by trying it once on a small slice.

The choice is made when an operator is built, reported with its reasons, and never changed silently
afterwards. The same trial compares J with Jᵀ, so that a model in which they disagree (a hidden
``torch.no_grad``, a wrong custom backward) is refused instead of giving a kernel that is not one.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..errors import DifferentiationError, NtkopsError, OutputError
from ..model import Batch, Inputs, Linearization
from ..model.batches import take
from ..model.precision import lowest_dtype
from .adjoint import check_adjoint, check_slope, first_line, further, gaps, length, vectors
from .rungs import RECORDED_RUNGS, RUNGS, Columns, LinearizedBatch, Parameters, Rung, linearize_batch
from .samples import SampleMode, sample_gradients

__all__ = ["Ladder", "climb"]

logger = logging.getLogger(__name__)

_PROBED_SAMPLES = 2
_PROBED_ROWS = 3  # not as many as samples


@dataclass(frozen=True)
class Ladder:
    """What a model allows.

    Attributes:
        rung: The highest rung that works.
        columns: Whether several vectors go through one vmapped pass or through a loop.
        pull_columns: The same for Jᵀ alone, where a loop may be faster.
        per_sample: Whether per-sample Jacobians come from vmap over samples and outputs, from vmap over
            samples for one output after the other ("rows"), or from a loop over samples.
        reasons: Why a higher choice was left, one line each.
        activation_bytes: Bytes that one sample's forward pass saves for its backward pass.
    """

    rung: Rung
    columns: Columns
    pull_columns: Columns
    per_sample: SampleMode
    reasons: tuple[str, ...]
    activation_bytes: int


def climb(linearization: Linearization, inputs: Inputs) -> Ladder:
    """Try the ladder on the first samples of ``inputs``.

    Args:
        linearization: The pure function and its parameters.
        inputs: The samples; only the first two are used.

    Returns:
        What the model allows. Cost: about sixteen passes over two samples; sixteen more where J and Jᵀ agree
        suspiciously badly.

    Raises:
        DifferentiationError: If not even Jᵀv exists, or if J and Jᵀ disagree.
    """
    _, _, batch = next(
        iter(inputs.select(torch.arange(min(_PROBED_SAMPLES, inputs.num_samples))).batches(None))
    )
    params = linearization.parameters
    reasons: list[str] = []
    with linearization.safe_context(), torch.no_grad():
        params = tuple(p.detach() for p in params)
        batch = _two_samples(linearization, params, batch)
        activation_bytes = _activation_bytes(linearization, params, batch)
        rung, pulled = _highest_rung(linearization, params, batch, reasons)
        columns = _columns(rung, linearization, params, batch, reasons)
        pull_columns = _pull_columns(columns, linearization, params, batch)
        per_sample = _per_sample(rung, linearization, params, batch, pulled, reasons)
    for reason in reasons:
        logger.info("differentiation ladder: %s", reason)
    return Ladder(rung, columns, pull_columns, per_sample, tuple(reasons), activation_bytes)


def _two_samples(linearization: Linearization, params: Parameters, batch: Batch) -> Batch:
    """Return the batch, doubled if it is one sample, which shows nothing of samples taken for vectors."""
    if batch.num_samples > 1:
        return batch
    double = take(batch, torch.tensor([0, 0]))
    try:
        linearization.function(params, double)
    except (OutputError, RuntimeError, TypeError, ValueError, IndexError):
        return batch  # a model for single samples only
    return double


def _output_shape(linearization: Linearization, params: Parameters, batch: Batch) -> torch.Size:
    return linearization.function(params, batch).shape


def _highest_rung(
    linearization: Linearization, params: Parameters, batch: Batch, reasons: list[str]
) -> tuple[Rung, Parameters]:
    shape = _output_shape(linearization, params, batch)
    cotangent = vectors((1, *shape), params[0], seed=1)
    tangents = tuple(vectors((1, *p.shape), p, seed=2 + i) for i, p in enumerate(params))
    pulled: Parameters | None = None
    live = linearization.differentiable
    left: tuple[Rung, Parameters] | None = None
    for rung in RECORDED_RUNGS if live else RUNGS:
        try:
            linearized = linearize_batch(rung, linearization.function, params, batch)
            pulled = linearized.pull(cotangent)
            if rung == "reverse":
                return left or (rung, pulled)
            pushed = linearized.push(tangents)
            if live and rung == "forward":
                check_slope(linearization, params, batch, cotangent, tangents, reasons)
        except NtkopsError:
            raise
        except (RuntimeError, NotImplementedError, TypeError, ValueError, AttributeError) as error:
            reasons.append(f"{rung}: {first_line(error)}")
            continue
        if not bool(pushed.isfinite().all()) and all(bool(g.isfinite().all()) for g in pulled):
            left = left or (rung, pulled)  # another rung may do better; if none does, products say so
            reasons.append(f"{rung}: J p is not finite")
            continue
        lowest = partial(lowest_dtype, linearization, batch)
        again = partial(gaps, rung, linearization, params, batch, cotangent, tangents)
        mismatch = partial(further, linearized, shape, params)
        check_adjoint(rung, cotangent, pushed, tangents, pulled, lowest, again, mismatch, reasons)
        return rung, pulled
    if left is not None:
        return left
    hooks = any("saved tensor hooks" in reason for reason in reasons)
    way_out = "switch activation checkpointing off (" if hooks else "("
    raise DifferentiationError(
        "the model cannot be differentiated with respect to the selected parameters: "
        f"{way_out}{'; '.join(reasons)})"
    )


def _columns(
    rung: Rung, linearization: Linearization, params: Parameters, batch: Batch, reasons: list[str]
) -> Columns:
    shape = _output_shape(linearization, params, batch)
    cotangents = vectors((2, *shape), params[0], seed=3)

    def both(linearized: LinearizedBatch) -> tuple[Tensor, ...]:
        pulled = linearized.pull(cotangents)
        return pulled if rung == "reverse" else (*pulled, linearized.push(pulled))

    def attempt(columns: Columns) -> tuple[Tensor, ...]:
        return both(linearize_batch(rung, linearization.function, params, batch, columns))

    return (
        "vmap"
        if _vmap_agrees("columns", lambda: attempt("vmap"), lambda: attempt("loop"), reasons)
        else "loop"
    )


def _pull_columns(
    columns: Columns, linearization: Linearization, params: Parameters, batch: Batch
) -> Columns:
    """Choose a loop for Jᵀ where a convolution runs on the CPU."""
    # Its vmapped weight gradient becomes a grouped convolution, measured 1.2 to 1.4 times slower there.
    if columns == "loop" or params[0].device.type != "cpu":
        return columns
    with torch.enable_grad():
        output = linearization.function(tuple(p.detach().requires_grad_() for p in params), batch)
    return "loop" if _has_node(output.grad_fn, "ConvolutionBackward") else "vmap"


def _has_node(root: Any, name: str) -> bool:
    """Whether the autograd graph below ``root`` has an operation whose name starts so."""
    seen, waiting = set(), [root]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        if node.name().startswith(name):
            return True
        seen.add(node)
        waiting.extend(next_node for next_node, _ in node.next_functions)
    return False


def _per_sample(
    rung: Rung,
    linearization: Linearization,
    params: Parameters,
    batch: Batch,
    pulled: Parameters,
    reasons: list[str],
) -> SampleMode:
    shape = _output_shape(linearization, params, batch)
    cotangents = vectors((1, *shape), params[0], seed=1).movedim(0, 1)  # (B, 1, O): the first probe

    def summed() -> Parameters:
        gradients = sample_gradients("vmap", rung, linearization.function, params, batch, cotangents)
        return tuple(g.sum(0) for g in gradients)

    if not _vmap_agrees("per sample", summed, lambda: pulled, reasons):
        return "loop"
    if rung not in ("forward", "double"):
        return "vmap"
    # vmap inside vmap takes other batching rules, and that of PReLU takes samples for cotangents.
    several = vectors((shape[0], _PROBED_ROWS, *shape[1:]), params[0], seed=5)

    def rows_of(mode: SampleMode) -> Parameters:
        return sample_gradients(mode, rung, linearization.function, params, batch, several)

    nested = _vmap_agrees("several outputs", lambda: rows_of("vmap"), lambda: rows_of("rows"), reasons)
    return "vmap" if nested else "rows"


def _vmap_agrees(
    what: str,
    vmapped: Callable[[], tuple[Tensor, ...]],
    reference: Callable[[], tuple[Tensor, ...]],
    reasons: list[str],
) -> bool:
    """Return whether the vmapped form works, is not emulated by a slow loop, and gives the same numbers."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            actual = vmapped()
        except NtkopsError:
            raise
        except Exception as error:
            reasons.append(f"{what}: a loop instead of vmap: {first_line(error)}")
            return False
    if any("performance drop" in str(warning.message) for warning in caught):
        reasons.append(f"{what}: a loop instead of vmap: an operation has no batching rule")
        return False
    expected = reference()
    scale = max(length(expected), torch.finfo(torch.float64).tiny)
    difference = length([a.double() - b.double() for a, b in zip(actual, expected, strict=True)]) / scale
    lowest = min(p.dtype.itemsize for p in actual)
    limit = 1e3 * torch.finfo(torch.float32).eps * (1 if lowest >= 4 else 2**13)
    if difference > limit:
        reasons.append(f"{what}: a loop instead of vmap: the two differ by {difference:.0e}")
        return False
    return True


def _activation_bytes(linearization: Linearization, params: Parameters, batch: Batch) -> int:
    """Return the bytes that a forward pass saves for its backward pass, for each sample."""
    saved: dict[int, int] = {}
    own = {p.untyped_storage().data_ptr() for p in params}
    held: list[list[Tensor]] = []

    def note(tensor: Tensor) -> list[Tensor]:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            saved[storage.data_ptr()] = storage.nbytes()
        held.append([tensor])
        return held[-1]

    samples = 1
    try:
        with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(note, lambda holder: holder[0]):
            output = linearization.function(tuple(p.detach().requires_grad_() for p in params), batch)
            samples = max(len(output), 1)
    except (RuntimeError, NotImplementedError, TypeError):
        return max(1, sum(t.nbytes for t in batch.tensors) // samples)
    finally:
        # A node that saves its own result and the result that holds the node live for ever: no garbage
        # collector sees through both. Emptied, the holders let go of them.
        for holder in held:
            holder.clear()
    return max(1, sum(saved.values()) // samples)
