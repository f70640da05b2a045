"""How far a network is from being linear in its parameters: the norm of its second derivatives."""

from __future__ import annotations

import math
import time
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from tqdm import tqdm

from ..arguments import checked
from ..engines import count_passes
from ..engines.passes import report_passes
from ..errors import DifferentiationError, InputError, NonFiniteError
from ..model import BatchDim, Linearization, linearize
from ..results import Estimate
from ._request import checked_generator
from ._statistics import student_quantile

if TYPE_CHECKING:
    from ..model.accepted import InputsLike, ModelLike, OutputLike, ParamsLike

__all__ = ["hessian_norm"]

# Quantiles .95 of |mean - 1| / (s / √m) over m products of the squares of two normal variables: simulated
# 30,000 to 400,000 times. See `_intervals` for the extreme of one square.
_QUANTILES = {
    4: 39.8,
    6: 20.0,
    8: 13.8,
    12: 9.09,
    16: 7.31,
    24: 5.49,
    32: 4.72,
    64: 3.49,
    128: 2.83,
    256: 2.40,
}


@checked
def hessian_norm(
    model: ModelLike,
    x: InputsLike,
    params: ParamsLike = None,
    output: OutputLike = None,
    *,
    num_probes: int = 32,
    batch_dim: BatchDim = 0,
    generator: torch.Generator | None = None,
    progress: bool = False,
) -> Estimate:
    r"""Estimate the norm of the second derivatives of a model's outputs, the distance from the lazy regime.

    .. math:: h = \Big( \frac{1}{n} \sum_{i=1}^n |\nabla_\theta^2 f_i|_F^2 \Big)^{1/2}

    over the n = N·O outputs at all samples; the mean of their norms is at most h. Where h is zero the model
    is linear in its parameters, and its kernel never moves: along a step d row i of J changes by
    :math:`\nabla^2 f_i\, d`.

    With independent signs u and normal z, :math:`E |\sum_i u_i \nabla^2 f_i z|^2 = n h^2`: one Hessian-vector
    product over all samples a probe.

    Args:
        model: As for `ntkops.ntk`.
        x: As for `ntkops.ntk`.
        params: As for `ntkops.ntk`.
        output: As for `ntkops.ntk`.
        num_probes: Number of probes, at least 4.
        batch_dim: As for `ntkops.ntk`.
        generator: CPU generator of the probes; None draws a seed from the operating system.
        progress: Show a bar of probes.

    Returns:
        Estimate, scalar, float64. The interval uses the quantile of the hardest case, all outputs with one
        and the same second derivative of rank one. Passes: two backward passes a probe. Memory: the graph of
        a batch's backward pass.

    Raises:
        InputError: If ``num_probes`` is too small.
        DifferentiationError: If the model cannot be differentiated twice.
        NonFiniteError: If a product is not finite.
        NtkopsError: What `ntkops.linearize` raises.

    Example:
        >>> import torch, ntkops
        >>> _ = torch.manual_seed(0)
        >>> x = torch.randn(8, 3)
        >>> float(ntkops.hessian_norm(torch.nn.Linear(3, 2), x))
        0.0
        >>> wide, narrow = (
        ...     torch.nn.Sequential(torch.nn.Linear(3, w), torch.nn.Tanh(), torch.nn.Linear(w, 1))
        ...     for w in (400, 4)
        ... )
        >>> found = [ntkops.hessian_norm(m, x) for m in (wide, narrow)]
        >>> all(f.interval[0] <= f.value <= f.interval[1] for f in found)
        True
    """
    if num_probes < 4:
        raise InputError(f"num_probes={num_probes}: an interval needs four probes at least")
    linearization = linearize(model, params, output, batch_dim=batch_dim)
    inputs = linearization.inputs(x)
    drawn, seed = checked_generator(generator)
    start, entries = time.perf_counter(), inputs.num_rows
    squares = []
    with count_passes() as counter:
        for _ in tqdm(range(num_probes), desc="the norm of the Hessian", disable=not progress):
            # E u uᵀ = I and E z zᵀ = I: E |Σ u_i H_i z|² = Σ_i E |H_i z|² = Σ_i |H_i|².
            signs = torch.randint(2, (inputs.num_samples, inputs.num_outputs), generator=drawn) * 2 - 1
            direction = tuple(
                torch.randn(shape, generator=drawn, dtype=torch.float64).to(linearization.parameters[0])
                for shape in linearization.shapes
            )
            squares.append(_square(linearization, inputs, signs, direction) / entries)
            report_passes(vjp=2)
    found = torch.tensor(squares, dtype=torch.float64)
    mean, error = found.mean(), found.std() / math.sqrt(num_probes)
    reach = _quantile(num_probes) * error
    value = mean.sqrt()
    return Estimate(
        value=value,
        stderr=error / (2 * value) if float(value) > 0 else torch.zeros_like(value),  # of the root
        interval=((mean - reach).clamp(min=0).sqrt(), (mean + reach).sqrt()),
        method="hutchinson",
        exact=False,
        passes=counter.total,
        seed=seed,
        seconds=time.perf_counter() - start,
    )


def _square(linearization: Linearization, inputs: Any, signs: Tensor, direction: tuple[Tensor, ...]) -> float:
    """Return |Σ u ∇²f z|², one batch after the other."""
    total: list[Tensor] | None = None
    params = tuple(p.detach().requires_grad_() for p in linearization.parameters)
    size = None if inputs.is_streamed else inputs.num_samples
    with linearization.safe_context(), torch.enable_grad():
        for first, last, batch in inputs.batches(size):
            linearization.require_independent(inputs, first, linearization.parameters, batch)
            rows = linearization.function(params, batch)
            value = (rows * signs[first:last].to(rows)).sum()
            products = _second(value, params, direction)
            total = products if total is None else [a + b for a, b in zip(total, products, strict=True)]
    assert total is not None  # inputs are never empty
    square = sum(float(part.double().square().sum()) for part in total)
    if not math.isfinite(square):
        raise NonFiniteError(
            "a second derivative is not finite although the output is: it is infinite or undefined there "
            "(square root or norm at 0); move the input off that point, or use float64 if it is an overflow"
        )
    return square


def _second(value: Tensor, params: tuple[Tensor, ...], direction: tuple[Tensor, ...]) -> list[Tensor]:
    """Return ∇² value z; zero for parameters in which it is linear, or does not depend."""
    if not value.requires_grad:
        return [torch.zeros_like(p) for p in params]
    try:
        gradients = torch.autograd.grad(value, params, create_graph=True, allow_unused=True)
        along = [
            (g * z).sum()
            for g, z in zip(gradients, direction, strict=True)
            if g is not None and g.requires_grad
        ]
        if not along:
            return [torch.zeros_like(p) for p in params]
        found = torch.autograd.grad(torch.stack(along).sum(), params, allow_unused=True)
    except (RuntimeError, NotImplementedError) as error:
        raise DifferentiationError(
            f"the model cannot be differentiated twice: {str(error).splitlines()[0]}"
        ) from error
    return [torch.zeros_like(p) if g is None else g.detach() for p, g in zip(params, found, strict=True)]


def _quantile(count: int) -> float:
    """Return the half width of the interval in standard errors, for a number of probes."""
    known = sorted(_QUANTILES)
    below = max(n for n in known if n <= count)
    if below == known[-1]:  # the excess over Student's falls with √m
        student = student_quantile(0.05, below - 1)
        excess = max(_QUANTILES[below] - student, 0.0)
        return student_quantile(0.05, count - 1) + excess * math.sqrt(below / count)
    return _QUANTILES[below]  # falls with the number of probes
