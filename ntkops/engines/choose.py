"""Which rung of the ladder a model allows, found by trying it once on a small slice.

The choice is made when an operator is built, reported with its reasons, and never changed silently
afterwards. The same trial compares J with Jᵀ, so that a model in which they disagree (a hidden
``torch.no_grad``, a wrong custom backward) is refused instead of giving a kernel that is not one.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..errors import DifferentiationError, NtkopsError, OutputError
from ..model import Batch, Inputs, Linearization
from ..model.batches import take
from ..model.precision import lowest_dtype
from ..model.rounding import neighbours
from .rungs import RECORDED_RUNGS, RUNGS, Columns, LinearizedBatch, Parameters, Rung, linearize_batch
from .samples import SampleMode, sample_gradients

__all__ = ["Ladder", "climb"]

logger = logging.getLogger(__name__)

_PROBED_SAMPLES = 2
_PROBED_ROWS = 3  # not as many as samples
# An adjoint mismatch above so many rounding units of the coarsest dtype in which the model computes is
# not rounding, nor is one above the limit, which holds for half precision.
_ROUNDING_UNITS = 1e3
_LARGEST_ROUNDING = 0.1
_SUSPICIOUS_UNITS, _FURTHER_PAIRS = 1e2, 8  # from where on further pairs are tried
# A mismatch is rounding if it is no more than so many times what a step of some rounding units moves it.
_NOISE_FACTOR = 10.0
_SLOPE_TOLERANCE = 1e-2  # of finite differences, whose error is that of float32 and of kinks nearby


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
        What the model allows. Cost: about sixteen passes over two samples.

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


def _vectors(shape: Sequence[int], like: Tensor, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(tuple(shape), generator=generator, dtype=torch.float64).to(like)


def _output_shape(linearization: Linearization, params: Parameters, batch: Batch) -> torch.Size:
    return linearization.function(params, batch).shape


def _highest_rung(
    linearization: Linearization, params: Parameters, batch: Batch, reasons: list[str]
) -> tuple[Rung, Parameters]:
    shape = _output_shape(linearization, params, batch)
    cotangent = _vectors((1, *shape), params[0], seed=1)
    tangents = tuple(_vectors((1, *p.shape), p, seed=2 + i) for i, p in enumerate(params))
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
                _check_slope(linearization, params, batch, cotangent, tangents, reasons)
        except NtkopsError:
            raise
        except (RuntimeError, NotImplementedError, TypeError, ValueError, AttributeError) as error:
            reasons.append(f"{rung}: {_first_line(error)}")
            continue
        if not bool(pushed.isfinite().all()) and all(bool(g.isfinite().all()) for g in pulled):
            left = left or (rung, pulled)  # another rung may do better; if none does, products say so
            reasons.append(f"{rung}: J p is not finite")
            continue
        lowest = partial(lowest_dtype, linearization, batch)
        again = partial(_gaps, rung, linearization, params, batch, cotangent, tangents)
        further = partial(_further, linearized, shape, params)
        _check_adjoint(rung, cotangent, pushed, tangents, pulled, lowest, again, further, reasons)
        return rung, pulled
    if left is not None:
        return left
    hooks = any("saved tensor hooks" in reason for reason in reasons)
    way_out = "switch activation checkpointing off (" if hooks else "("
    raise DifferentiationError(
        "the model cannot be differentiated with respect to the selected parameters: "
        f"{way_out}{'; '.join(reasons)})"
    )


def _check_slope(
    linearization: Linearization,
    params: Parameters,
    batch: Batch,
    cotangent: Tensor,
    tangents: Parameters,
    reasons: list[str],
) -> None:
    """Compare how <u, J p> moves along the parameters with what torch makes of its forward mode.

    Where there is no derivative torch will say so.

    Raises:
        DifferentiationError: If there is one, and it is wrong.
    """
    step = torch.finfo(params[0].dtype).eps ** (1 / 3)
    along = tuple(p.abs().clamp(min=0.1) * t[0].sign() for p, t in zip(params, tangents, strict=True))

    def value(*params: Tensor) -> Tensor:
        pushed = linearize_batch("forward", linearization.function, params, batch).push(tangents)
        return (pushed * cotangent).sum()

    try:
        with torch.enable_grad():
            slopes = torch.func.vjp(value, *params)[1](torch.ones_like(cotangent.sum()))
    except (RuntimeError, NotImplementedError) as error:
        reasons.append(f"forward: derivatives of J p do not exist: {_first_line(error)}")
        return
    there, back = (tuple(p + s * d for p, d in zip(params, along, strict=True)) for s in (step, -step))
    expected = float(value(*there) - value(*back)) / (2 * step)
    found = sum(float((slope * d).sum()) for slope, d in zip(slopes, along, strict=True))
    size = sum(float((slope * d).abs().sum()) for slope, d in zip(slopes, along, strict=True))
    if abs(found - expected) > _SLOPE_TOLERANCE * max(size, abs(expected)):
        raise DifferentiationError(
            f"derivatives of J p are wrong on the only rung that this model has (found {found:.6g}, finite "
            f"differences {expected:.6g}): torch differentiates some of its forward-mode formulas wrongly, "
            "and another operation has no double backward. Leave out differentiable=True, or write the layer "
            "norms and solves of the model in plain operations"
        )


def _gaps(
    rung: Rung,
    linearization: Linearization,
    params: Parameters,
    batch: Batch,
    cotangent: Tensor,
    tangents: Parameters,
) -> Iterator[float]:
    """Yield <u, J p> - <Jᵀu, p> with parameters, inputs, u and p some rounding units away."""
    for near, inputs, (u,), p in neighbours(params, batch.tensors, (cotangent,), tangents):
        linearized = linearize_batch(rung, linearization.function, near, batch.replace(inputs))
        left, right = _both_sides(u, linearized.push(p), p, linearized.pull(u))
        yield left - right


def _further(linearized: LinearizedBatch, shape: Sequence[int], params: Parameters) -> float:
    """Return the largest |<u, J p> - <Jᵀu, p>| of further pairs, over |u||J p| + |Jᵀu||p|."""
    largest = 0.0
    for seed in range(_FURTHER_PAIRS):
        u = _vectors((1, *shape), params[0], seed=1000 * (seed + 1))
        p = tuple(_vectors((1, *q.shape), q, seed=1000 * (seed + 1) + 1 + i) for i, q in enumerate(params))
        pushed, pulled = linearized.push(p), linearized.pull(u)
        left, right = _both_sides(u, pushed, p, pulled)
        size = _length([u]) * _length([pushed]) + _length(p) * _length(pulled)
        largest = max(largest, abs(left - right) / max(size, 1e-300))
    return largest


def _check_adjoint(
    rung: Rung,
    cotangent: Tensor,
    pushed: Tensor,
    tangents: Parameters,
    pulled: Parameters,
    lowest: Callable[[], torch.dtype],
    again: Callable[[], Iterator[float]],
    further: Callable[[], float],
    reasons: list[str],
) -> None:
    left, right = _both_sides(cotangent, pushed, tangents, pulled)
    # For normal u and p both lengths are |J|_F up to chance: where a part of J is missing, left and right
    # differ by its length. Against |u||J p| that would vanish in the number of outputs and parameters.
    scale = _length([pushed]) + _length(pulled)
    if scale == 0 or not torch.isfinite(torch.tensor([left, right])).all():
        return  # a zero or non-finite derivative is reported where its values are looked at
    mismatch = abs(left - right) / scale
    eps = torch.finfo(pushed.dtype).eps
    if mismatch <= min(_SUSPICIOUS_UNITS * eps, _LARGEST_ROUNDING / 10):
        return
    tolerance = min(_ROUNDING_UNITS * torch.finfo(lowest()).eps, _LARGEST_ROUNDING)
    # One pair may agree by chance where J is all but rounding.
    if further() > tolerance:
        is_rounding = max(abs(gap - (left - right)) for gap in again()) * _NOISE_FACTOR >= abs(left - right)
        raise DifferentiationError(_disagreement(rung, left, right, is_rounding, pushed.dtype))
    if mismatch <= _ROUNDING_UNITS * eps:
        return
    cause = "part of the model computes in lower precision"
    if mismatch > tolerance:
        cause = "rounding, which the model enlarges"
        noise = max(abs(gap - (left - right)) for gap in again())
        is_rounding = abs(left - right) <= _NOISE_FACTOR * noise
        size = _length([cotangent]) * _length([pushed]) + _length(tangents) * _length(pulled)
        if not is_rounding or abs(left - right) > tolerance * size:
            raise DifferentiationError(_disagreement(rung, left, right, is_rounding, pushed.dtype))
    reasons.append(f"{rung}: J and Jᵀ agree to {mismatch:.0e} only: {cause}")


def _disagreement(rung: Rung, left: float, right: float, is_rounding: bool, dtype: torch.dtype) -> str:
    found = f"J and Jᵀ disagree on rung {rung!r} (<u, J p> = {left:.6g}, <Jᵀu, p> = {right:.6g}): "
    if not is_rounding:
        return (
            f"{found}forward and reverse mode differentiate different functions. Look for torch.no_grad() "
            "inside the model (use .detach() for a constant) or for a custom autograd.Function with a wrong "
            "backward or jvp"
        )
    way_out = "" if dtype == torch.float64 else "use model.double(), or "
    return (
        f"{found}rounding alone parts them, since the model enlarges it (a norm of one feature, or of "
        f"features that nearly agree, divides by almost nothing); {way_out}raise the eps of that norm"
    )


def _both_sides(
    cotangent: Tensor, pushed: Tensor, tangents: Parameters, pulled: Parameters
) -> tuple[float, float]:
    left = float((cotangent.double() * pushed.double()).sum())
    return left, sum(float((t.double() * g.double()).sum()) for t, g in zip(tangents, pulled, strict=True))


def _length(blocks: Sequence[Tensor]) -> float:
    return sum(float(block.double().square().sum()) for block in blocks) ** 0.5


def _columns(
    rung: Rung, linearization: Linearization, params: Parameters, batch: Batch, reasons: list[str]
) -> Columns:
    shape = _output_shape(linearization, params, batch)
    cotangents = _vectors((2, *shape), params[0], seed=3)

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
    cotangents = _vectors((1, *shape), params[0], seed=1).movedim(0, 1)  # (B, 1, O): the first probe

    def summed() -> Parameters:
        gradients = sample_gradients("vmap", rung, linearization.function, params, batch, cotangents)
        return tuple(g.sum(0) for g in gradients)

    if not _vmap_agrees("per sample", summed, lambda: pulled, reasons):
        return "loop"
    if rung not in ("forward", "double"):
        return "vmap"
    # vmap inside vmap takes other batching rules, and that of PReLU takes samples for cotangents.
    several = _vectors((shape[0], _PROBED_ROWS, *shape[1:]), params[0], seed=5)

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
            reasons.append(f"{what}: a loop instead of vmap: {_first_line(error)}")
            return False
    if any("performance drop" in str(warning.message) for warning in caught):
        reasons.append(f"{what}: a loop instead of vmap: an operation has no batching rule")
        return False
    expected = reference()
    scale = max(_length(expected), torch.finfo(torch.float64).tiny)
    difference = _length([a.double() - b.double() for a, b in zip(actual, expected, strict=True)]) / scale
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

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    samples = 1
    try:
        with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            output = linearization.function(tuple(p.detach().requires_grad_() for p in params), batch)
            samples = max(len(output), 1)
    except (RuntimeError, NotImplementedError, TypeError):
        return max(1, sum(t.nbytes for t in batch.tensors) // samples)
    return max(1, sum(saved.values()) // samples)


def _first_line(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0][:160]}" if text else type(error).__name__
