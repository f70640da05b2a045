"""Whether J and Jᵀ, and the derivatives of J, are what they are taken for: tried on a slice of samples."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from ..errors import DifferentiationError
from ..model import Batch, Linearization
from ..model.rounding import neighbours
from .differentiation import LinearizedBatch, Mode, Parameters, linearize_batch

__all__ = ["check_adjoint", "check_slope", "first_line", "further", "gaps", "length", "vectors"]

# An adjoint mismatch above so many rounding units of the coarsest dtype in which the model computes is
# not rounding, nor is one above the limit, which holds for half precision.
_ROUNDING_UNITS = 1e3
_LARGEST_ROUNDING = 0.1
_SUSPICIOUS_UNITS, _FURTHER_PAIRS = 1e2, 8  # from where on further pairs are tried
# A mismatch is rounding if it is no more than so many times what a step of some rounding units moves it.
_NOISE_FACTOR = 10.0
_SLOPE_TOLERANCE = 1e-2  # of finite differences, whose error is that of float32 and of kinks nearby


def vectors(shape: Sequence[int], like: Tensor, seed: int) -> Tensor:
    """Return seeded normal numbers in the dtype, and on the device, of a tensor."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(tuple(shape), generator=generator, dtype=torch.float64).to(like)


def length(blocks: Sequence[Tensor]) -> float:
    """Return the Euclidean length of all blocks together."""
    return sum(float(block.double().square().sum()) for block in blocks) ** 0.5


def first_line(error: BaseException) -> str:
    """Return the kind of an exception and the first line of what it says."""
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0][:160]}" if text else type(error).__name__


def _both_sides(
    cotangent: Tensor, pushed: Tensor, tangents: Parameters, pulled: Parameters
) -> tuple[float, float]:
    left = float((cotangent.double() * pushed.double()).sum())
    return left, sum(float((t.double() * g.double()).sum()) for t, g in zip(tangents, pulled, strict=True))


def check_adjoint(
    mode: Mode,
    cotangent: Tensor,
    pushed: Tensor,
    tangents: Parameters,
    pulled: Parameters,
    lowest: Callable[[], torch.dtype],
    again: Callable[[], Iterator[float]],
    further_mismatch: Callable[[], float],
    reasons: list[str],
) -> None:
    """Compare <u, J p> with <Jᵀu, p>, and decide whether a difference is rounding.

    Args:
        mode: Mode of differentiation.
        cotangent: u.
        pushed: J p.
        tangents: p.
        pulled: Jᵀu.
        lowest: Finds the coarsest dtype in which the model computes.
        again: Yields <u, J p> - <Jᵀu, p> some rounding units away.
        further_mismatch: Returns the largest relative mismatch of further pairs.
        reasons: Gets a line where the two agree less well than rounding of this dtype explains.

    Raises:
        DifferentiationError: If J and Jᵀ disagree.
    """
    left, right = _both_sides(cotangent, pushed, tangents, pulled)
    # For normal u and p both lengths are |J|_F up to chance: where a part of J is missing, left and right
    # differ by its length. Against |u||J p| that would vanish in the number of outputs and parameters.
    scale = length([pushed]) + length(pulled)
    if scale == 0 or not torch.isfinite(torch.tensor([left, right])).all():
        return  # a zero or non-finite derivative is reported where its values are looked at
    mismatch = abs(left - right) / scale
    eps = torch.finfo(pushed.dtype).eps
    if mismatch <= min(_SUSPICIOUS_UNITS * eps, _LARGEST_ROUNDING / 10):
        return
    tolerance = min(_ROUNDING_UNITS * torch.finfo(lowest()).eps, _LARGEST_ROUNDING)
    # One pair may agree by chance where J is all but rounding.
    if further_mismatch() > tolerance:
        is_rounding = max(abs(gap - (left - right)) for gap in again()) * _NOISE_FACTOR >= abs(left - right)
        raise DifferentiationError(_disagreement(mode, left, right, is_rounding, pushed.dtype))
    if mismatch <= _ROUNDING_UNITS * eps:
        return
    cause = "part of the model computes in lower precision"
    if mismatch > tolerance:
        cause = "rounding, which the model enlarges"
        noise = max(abs(gap - (left - right)) for gap in again())
        is_rounding = abs(left - right) <= _NOISE_FACTOR * noise
        size = length([cotangent]) * length([pushed]) + length(tangents) * length(pulled)
        if not is_rounding or abs(left - right) > tolerance * size:
            raise DifferentiationError(_disagreement(mode, left, right, is_rounding, pushed.dtype))
    reasons.append(f"{mode}: J and Jᵀ agree to {mismatch:.0e} only: {cause}")


def gaps(
    mode: Mode,
    linearization: Linearization,
    params: Parameters,
    batch: Batch,
    cotangent: Tensor,
    tangents: Parameters,
) -> Iterator[float]:
    """Yield <u, J p> - <Jᵀu, p> with parameters, inputs, u and p some rounding units away."""
    for near, inputs, (u,), p in neighbours(params, batch.tensors, (cotangent,), tangents):
        linearized = linearize_batch(mode, linearization.function, near, batch.replace(inputs))
        left, right = _both_sides(u, linearized.push(p), p, linearized.pull(u))
        yield left - right


def further(linearized: LinearizedBatch, shape: Sequence[int], params: Parameters) -> float:
    """Return the largest |<u, J p> - <Jᵀu, p>| of further pairs, over |u||J p| + |Jᵀu||p|."""
    largest = 0.0
    for seed in range(_FURTHER_PAIRS):
        u = vectors((1, *shape), params[0], seed=1000 * (seed + 1))
        p = tuple(vectors((1, *q.shape), q, seed=1000 * (seed + 1) + 1 + i) for i, q in enumerate(params))
        pushed, pulled = linearized.push(p), linearized.pull(u)
        left, right = _both_sides(u, pushed, p, pulled)
        size = length([u]) * length([pushed]) + length(p) * length(pulled)
        largest = max(largest, abs(left - right) / max(size, 1e-300))
    return largest


def _disagreement(mode: Mode, left: float, right: float, is_rounding: bool, dtype: torch.dtype) -> str:
    found = f"J and Jᵀ disagree in mode {mode!r} (<u, J p> = {left:.6g}, <Jᵀu, p> = {right:.6g}): "
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


def check_slope(
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
        reasons.append(f"forward: derivatives of J p do not exist: {first_line(error)}")
        return
    there, back = (tuple(p + s * d for p, d in zip(params, along, strict=True)) for s in (step, -step))
    expected = float(value(*there) - value(*back)) / (2 * step)
    found = sum(float((slope * d).sum()) for slope, d in zip(slopes, along, strict=True))
    size = sum(float((slope * d).abs().sum()) for slope, d in zip(slopes, along, strict=True))
    if abs(found - expected) > _SLOPE_TOLERANCE * max(size, abs(expected)):
        raise DifferentiationError(
            f"derivatives of J p are wrong on the only mode that this model has (found {found:.6g}, finite "
            f"differences {expected:.6g}): torch differentiates some of its forward-mode formulas wrongly, "
            "and another operation has no double backward. Leave out differentiable=True, or write the layer "
            "norms and solves of the model in plain operations"
        )
