"""Which mode of differentiation a model allows, found by trying it once on a small slice.

The choice is made when an operator is built, reported with its reasons, and never changed silently
afterwards. The same trial compares J with Jᵀ, so that a model in which they disagree (a hidden
``torch.no_grad``, a wrong custom backward) is refused instead of giving a kernel that is not one.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..errors import DifferentiationError, NtkopsError, OutputError
from ..model import Batch, Inputs, Linearization
from ..model.batch import take
from ..shortage import is_out_of_memory
from .adjoint import check_adjoint, check_slope, first_line, length, vectors
from .differentiation import (
    MODES,
    RECORDED_MODES,
    Columns,
    Differentiation,
    LinearizedBatch,
    Mode,
    Parameters,
    SampleMode,
    linearize_batch,
    sample_gradients,
)
from .passes import report_passes

__all__ = ["find_differentiation"]

logger = logging.getLogger(__name__)

_PROBED_SAMPLES = 2
_MULTIPLES = (1.0, -2.0, 0.5)  # not as many as samples; powers of two, which round as the number itself


def find_differentiation(
    linearization: Linearization,
    inputs: Inputs,
    known: Differentiation | None = None,
    *,
    columns: bool = False,
    per_sample: bool = False,
) -> Differentiation:
    """Return what a model allows, tried on the first two samples; ``known`` is what was found before.

    Cost: two forward passes over two samples, and their derivatives, one more for columns and two for
    per-sample Jacobians; some more where a mode does not work, or J and Jᵀ agree suspiciously badly.

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
        cotangent = vectors((1, batch.num_samples, inputs.num_outputs), params[0], seed=1)
        if known is None:
            probe = _first_mode(linearization, params, batch, cotangent, reasons)
            known = Differentiation(probe.mode)
        else:
            linearized = linearize_batch(known.mode, linearization.function, params, batch)
            probe = _Probe(known.mode, linearized, cotangent, linearized.pull(cotangent))
        if per_sample and known.per_sample is None:
            known = replace(known, per_sample=_per_sample(probe, linearization, params, batch, reasons))
        if columns and known.columns is None:
            several = _columns(probe, params, reasons)
            # A vmapped weight gradient of a convolution is a grouped one, 1.2 to 1.4 times slower on the CPU.
            slow = several == "vmap" and linearization.convolves and params[0].device.type == "cpu"
            known = replace(known, columns=several, pull_columns="loop" if slow else several)
    for reason in reasons:
        logger.info("differentiation: %s", reason)
    return replace(known, reasons=(*known.reasons, *reasons))


def _two_samples(linearization: Linearization, params: Parameters, batch: Batch) -> Batch:
    """Return the batch, doubled if it is one sample, which shows nothing of samples taken for vectors."""
    if batch.num_samples > 1 or batch.layout.coupled:
        return batch
    double = take(batch, torch.tensor([0, 0]))
    try:
        linearization.function(params, double)
    except (OutputError, RuntimeError, TypeError, ValueError, IndexError):
        return batch  # a model for single samples only
    return double


@dataclass(eq=False)
class _Probe:
    """A vector and what a mode makes of it; multiples of it are what other forms are held to."""

    mode: Mode
    linearized: LinearizedBatch
    cotangent: Tensor  # (1, B, O)
    pulled: Parameters
    pushed: Tensor | None = None  # of `_tangents`, where they have gone through the model already


def _tangents(params: Parameters) -> Parameters:
    """Return a drawn direction of the parameters, ``(1, ...)`` each."""
    return tuple(vectors((1, *p.shape), p, seed=2 + i) for i, p in enumerate(params))


def _first_mode(
    linearization: Linearization, params: Parameters, batch: Batch, cotangent: Tensor, reasons: list[str]
) -> _Probe:
    """Return the probe of the first mode that works, with the reasons why earlier ones do not."""
    tangents = _tangents(params)
    live = linearization.differentiable
    left: _Probe | None = None  # works but for numbers that are not finite: the last resort
    for mode in RECORDED_MODES if live else MODES:
        report_passes(checks=2)  # of passes over the samples that a trial makes, one in each direction
        try:
            linearized = linearize_batch(mode, linearization.function, params, batch)
            pulled = linearized.pull(cotangent)
            if mode == "reverse":
                return left or _Probe(mode, linearized, cotangent, pulled)
            pushed = linearized.push(tangents)
            if live and mode == "forward":
                check_slope(linearization, params, batch, cotangent, tangents, reasons)
        except OutputError as error:
            # Run by itself the model has the outputs that are due: it is the mode that changes them.
            reasons.append(f"{mode}: {first_line(error)}")
            continue
        except NtkopsError:
            raise
        except (RuntimeError, NotImplementedError, TypeError, ValueError, AttributeError) as error:
            if is_out_of_memory(error):
                raise
            reasons.append(f"{mode}: {first_line(error)}")
            continue
        if not bool(pushed.isfinite().all()) and all(bool(g.isfinite().all()) for g in pulled):
            # Another mode may do better; if none does, products say so.
            left = left or _Probe(mode, linearized, cotangent, pulled)
            reasons.append(f"{mode}: J p is not finite")
            continue
        if check_adjoint(
            mode, linearization, params, batch, linearized, cotangent, tangents, pushed, pulled, reasons
        ):
            return _Probe(mode, linearized, cotangent, pulled, pushed)
    if left is not None:
        return left
    hooks = any("saved tensor hooks" in reason for reason in reasons)
    way_out = "switch activation checkpointing off (" if hooks else "("
    raise DifferentiationError(
        "the model cannot be differentiated with respect to the selected parameters: "
        f"{way_out}{'; '.join(reasons)})"
    )


def _columns(probe: _Probe, params: Parameters, reasons: list[str]) -> Columns:
    """Whether two columns may go through one vmapped pass: a multiple of what is known, and that itself."""
    # Both products are linear, so that those of a multiple are known without another pass; the multiple is no
    # equal column, which a rule that mixes columns up would get right.
    tangents = () if probe.mode == "reverse" else _tangents(params)
    pushed = probe.linearized.push(tangents) if tangents and probe.pushed is None else probe.pushed
    single = probe.pulled if pushed is None else (*probe.pulled, pushed)

    def twice(tensor: Tensor) -> Tensor:
        return torch.cat([_MULTIPLES[1] * tensor, tensor])

    def both() -> tuple[Tensor, ...]:
        pulled = probe.linearized.pull(twice(probe.cotangent))
        return (*pulled, probe.linearized.push(tuple(map(twice, tangents)))) if tangents else pulled

    agrees = _vmap_agrees("columns", both, lambda: tuple(map(twice, single)), reasons)
    return "vmap" if agrees else "loop"


def _per_sample(
    probe: _Probe,
    linearization: Linearization,
    params: Parameters,
    batch: Batch,
    reasons: list[str],
) -> SampleMode:
    """Return how per-sample gradients are made: by vmap where it gives what is known of these samples."""
    mode = probe.mode
    cotangents = probe.cotangent.movedim(0, 1)  # (B, 1, O)
    single: Parameters = ()

    def summed() -> Parameters:
        nonlocal single
        single = sample_gradients("vmap", mode, linearization.function, params, batch, cotangents)
        return tuple(g.sum(0) for g in single)

    # The samples are independent: Σ_i J_iᵀ u_i = Jᵀu, which is known.
    if not _vmap_agrees("per sample", summed, lambda: probe.pulled, reasons):
        return "loop"
    if mode not in ("forward", "double"):
        return "vmap"
    # vmap inside vmap takes other batching rules, and that of PReLU takes samples for cotangents.
    several = torch.cat([c * cotangents for c in _MULTIPLES], dim=1)  # (B, r, O)

    def rows() -> Parameters:
        return sample_gradients("vmap", mode, linearization.function, params, batch, several)

    def known() -> Parameters:
        return tuple(torch.cat([c * g for c in _MULTIPLES], dim=1) for g in single)

    return "vmap" if _vmap_agrees("several outputs", rows, known, reasons) else "rows"


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
        except Exception as error:
            # Run by itself the model has the outputs that are due. Under vmap some operations give others:
            # `linalg.solve` takes a batch of samples for one matrix of right-hand sides (torch 2.13).
            refused = isinstance(error, NtkopsError) and not isinstance(error, OutputError)
            if refused or is_out_of_memory(error):
                raise
            reasons.append(f"{what}: a loop instead of vmap: {first_line(error)}")
            return False
    if any("performance drop" in str(warning.message) for warning in caught):
        reasons.append(f"{what}: a loop instead of vmap: an operation has no batching rule")
        return False
    expected = reference()
    # 1e3 rounding units of float32, which a wrong rule exceeds in float64, too; half precision has 2¹³ times
    # as large ones.
    scale = max(length(expected), torch.finfo(torch.float64).tiny)
    difference = length([a.double() - b.double() for a, b in zip(actual, expected, strict=True)]) / scale
    lowest = min(p.dtype.itemsize for p in actual)
    limit = 1e3 * torch.finfo(torch.float32).eps * (1 if lowest >= 4 else 2**13)
    if difference > limit:
        reasons.append(f"{what}: a loop instead of vmap: the two differ by {difference:.0e}")
        return False
    return True
