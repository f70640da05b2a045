"""Whether J and Jᵀ, and the derivatives of J, are what they are taken for: tried on a slice of samples."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from ..errors import DifferentiationError
from ..model import Batch, Linearization
from ..model.rounding import neighbours
from .differentiation import LinearizedBatch, Mode, Parameters, linearize_batch

__all__ = ["check_adjoint", "check_slope", "first_line", "length", "vectors"]

# An adjoint mismatch above so many rounding units of the coarsest dtype in which the model computes is
# not rounding, nor is one above the limit, which holds for half precision.
_ROUNDING_UNITS = 1e3
_LARGEST_ROUNDING = 0.1
_SUSPICIOUS_UNITS, _FURTHER_PAIRS = 1e2, 8  # from where on further pairs are tried
# A mismatch is rounding if it is no more than so many times what a step of some rounding units moves it.
_NOISE_FACTOR = 10.0
_LEAST_SHARE = 0.05  # of what parts J from its transpose, by which finite differences contradict J
_SLOPE_TOLERANCE = 1e-2  # of finite differences, whose error is that of float32 and of kinks nearby


def vectors(shape: Sequence[int], like: Tensor, seed: int) -> Tensor:
    """Return seeded normal numbers in the dtype, and on the device, of a tensor."""
    generator = torch.Generator().manual_seed(seed)
    dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
    return torch.randn(tuple(shape), generator=generator, dtype=dtype).to(like)


def length(blocks: Sequence[Tensor]) -> float:
    """Return the Euclidean length of all blocks together."""
    return sum(float(torch.linalg.vector_norm(block, dtype=torch.float64)) ** 2 for block in blocks) ** 0.5


def first_line(error: BaseException) -> str:
    """Return the kind of an exception and the first line of what it says."""
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0][:160]}" if text else type(error).__name__


def _both_sides(
    cotangent: Tensor, pushed: Tensor, tangents: Parameters, pulled: Parameters
) -> tuple[float, float]:
    """Return ⟨u, J p⟩ and ⟨p, Jᵀu⟩, which are one number."""
    return _inner(cotangent, pushed), sum(_inner(t, g) for t, g in zip(tangents, pulled, strict=True))


def _inner(left: Tensor, right: Tensor) -> float:
    """Return the inner product: rounded products of float32 are added in float64."""
    dtype = torch.promote_types(left.dtype, torch.float32)
    return float((left.to(dtype) * right.to(dtype)).sum(dtype=torch.float64))


def check_adjoint(
    mode: Mode,
    linearization: Linearization,
    params: Parameters,
    batch: Batch,
    linearized: LinearizedBatch,
    cotangent: Tensor,
    tangents: Parameters,
    pushed: Tensor,
    pulled: Parameters,
    reasons: list[str],
) -> bool:
    """Return whether <u, J p> and <Jᵀu, p> agree; False where forward mode is wrong by finite differences.

    ``cotangent`` is u, ``(1, B, O)``, and ``tangents`` p; ``pushed`` is J p and ``pulled`` Jᵀu. A difference
    is judged against J itself. Where J is below the rounding of the derivative along all parameters, selected
    or not, and of the output, these parameters do not move the output: a key bias under softmax, a shift of
    what is normalised. ``reasons`` gets a line where the two agree less well than rounding of this dtype
    explains.

    Raises:
        DifferentiationError: If J and Jᵀ disagree for any other reason.
    """
    left, right = _both_sides(cotangent, pushed, tangents, pulled)
    gap = abs(left - right)
    # For normal u and p both lengths are |J|_F up to chance: where a part of J is missing, left and right
    # differ by its length. Against |u||J p| that would vanish in the number of outputs and parameters.
    scale = length([pushed]) + length(pulled)
    if scale == 0 or not torch.isfinite(torch.tensor([left, right])).all():
        return True  # a zero or non-finite derivative is reported where its values are looked at
    mismatch = gap / scale
    eps = torch.finfo(pushed.dtype).eps
    if mismatch <= min(_SUSPICIOUS_UNITS * eps, _LARGEST_ROUNDING / 10):
        return True
    tolerance = min(_ROUNDING_UNITS * torch.finfo(linearization.lowest_dtype).eps, _LARGEST_ROUNDING)
    # One pair may agree by chance where J is all but rounding.
    agree = _further(linearized, cotangent.shape[1:], params) <= tolerance
    if agree and mismatch <= _ROUNDING_UNITS * eps:
        return True
    cause = "part of the model computes in lower precision"
    if not agree or mismatch > tolerance:
        there = _gaps(mode, linearization, params, batch, cotangent, tangents)
        is_rounding = gap <= _NOISE_FACTOR * max(abs(other - (left - right)) for other in there)
        size = length([cotangent]) * length([pushed]) + length(tangents) * length(pulled)
        if is_rounding and agree and gap <= tolerance * size:
            cause = "rounding, which the model enlarges"
        elif is_rounding and scale <= tolerance * _reach(linearization, params, batch, cotangent):
            cause = "rounding is all that it is, since these parameters do not move the output"
        elif mode == "forward" and not is_rounding and _has_hooks(linearization, params, batch):
            reasons.append(
                "forward: it does not see the hook on a gradient (Tensor.register_hook) inside the model; J "
                "is what backward() gives"
            )
            return False
        elif (
            mode == "forward"
            and not is_rounding
            and _is_wrong(linearization, params, batch, cotangent, tangents, left, gap)
        ):
            reasons.append(
                f"forward: J p is wrong by {mismatch:.0e} (torch's forward-mode formula of an operation, or "
                "the jvp of a custom autograd.Function); J is what backward() gives"
            )
            return False
        else:
            raise DifferentiationError(_disagreement(mode, left, right, is_rounding, pushed.dtype))
    reasons.append(f"{mode}: J and Jᵀ agree to {mismatch:.0e} only: {cause}")
    return True


def _reach(linearization: Linearization, params: Parameters, batch: Batch, cotangent: Tensor) -> float:
    """Return the length of the derivative of <u, f> along all parameters, selected or not, and that of f."""
    selected = linearization.whole(params)
    last = len(selected) + len(linearization.frozen_names)
    leaves = [
        t.detach().requires_grad_() if i < last and t.is_floating_point() and not t.is_inference() else t
        for i, t in enumerate((*selected, *linearization.constants))
    ]
    with torch.enable_grad():
        state = linearization.raw_state(leaves[: len(selected)], batch, constants=leaves[len(selected) :])
        rows = linearization.rows_of(state, batch, params[0].dtype)
    along = [leaf for leaf in leaves if leaf.requires_grad]
    found = torch.autograd.grad(rows, along, cotangent[0], allow_unused=True) if rows.requires_grad else ()
    return length([rows.detach()]) + length([g for g in found if g is not None])


class _HookSeen(TorchFunctionMode):
    """Note whether a hook is put on a gradient."""

    seen = False

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen |= function is torch.Tensor.register_hook
        return function(*args, **(kwargs or {}))


def _has_hooks(linearization: Linearization, params: Parameters, batch: Batch) -> bool:
    """Whether the model puts hooks on gradients in its forward pass."""
    with torch.enable_grad(), _HookSeen() as mode:
        linearization.function(tuple(p.detach().requires_grad_() for p in params), batch)
    return mode.seen


def _is_wrong(
    linearization: Linearization,
    params: Parameters,
    batch: Batch,
    cotangent: Tensor,
    tangents: Parameters,
    pushed: float,
    gap: float,
) -> bool:
    """Whether finite differences contradict <u, J p> by more than they are off themselves."""
    # A central difference over h is off by h² of truncation and by eps / h of rounding: least at eps^(1/3),
    # relative to the parameters. A second, shorter one shows how far off it is.
    step = torch.finfo(params[0].dtype).eps ** (1 / 3) * max(length(params), 1e-2) / length(tangents)

    def value(distance: float) -> float:
        moved = tuple(p + distance * t[0] for p, t in zip(params, tangents, strict=True))
        return float((linearization.function(moved, batch).double() * cotangent[0].double()).sum())

    one, other = ((value(size) - value(-size)) / (2 * size) for size in (step, step / 4))
    return abs(other - pushed) >= max(_LEAST_SHARE * gap, _NOISE_FACTOR * abs(one - other))


def _gaps(
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


def _further(linearized: LinearizedBatch, shape: Sequence[int], params: Parameters) -> float:
    """Return the largest |<u, J p> - <Jᵀu, p>| of further pairs, over |u||J p| + |Jᵀu||p|."""
    largest = 0.0
    for seed in range(_FURTHER_PAIRS):
        u = vectors((1, *shape), params[0], seed=1000 * (seed + 1))
        p = tuple(vectors((1, *q.shape), q, seed=1000 * (seed + 1) + 1 + i) for i, q in enumerate(params))
        pushed, pulled = linearized.push(p), linearized.pull(u)
        left, right = _both_sides(u, pushed, p, pulled)
        size = length([u]) * length([pushed]) + length(p) * length(pulled)  # the bound of Cauchy and Schwarz
        largest = max(largest, abs(left - right) / max(size, 1e-300))
    return largest


def _disagreement(mode: Mode, left: float, right: float, is_rounding: bool, dtype: torch.dtype) -> str:
    """Say in what two modes disagree, and what may be the cause."""
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
    step = torch.finfo(params[0].dtype).eps ** (1 / 3)  # as in `_is_wrong`
    # Every parameter moves by its own size; those near zero by a tenth, so that none stands still.
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
