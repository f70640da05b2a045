"""Traces of products of kernels from one direction of differentiation (Proposition 1)."""

from __future__ import annotations

import time

import torch
from linear_operator.operators import LinearOperator
from torch import Tensor

from ..engines import count_passes
from ..errors import InputError, ShapeError
from ..results import Estimate
from ..vectors import Space, resolve_generator
from ._moments import MeanMoments, half_width, jackknife_error
from ._request import Operand

__all__ = ["one_sided_product_trace"]


def one_sided_product_trace(
    first: LinearOperator | Tensor,
    second: LinearOperator | Tensor,
    third: LinearOperator | Tensor,
    fourth: LinearOperator | Tensor,
    *,
    num_passes: int,
    direction: str = "reverse",
    generator: torch.Generator | None = None,
) -> Estimate:
    r"""Estimate :math:`\mathrm{tr}(J_1 J_2^\top J_3 J_4^\top)` from vjps alone or jvps alone.

    With independent isotropic probes u, v of states, or p, q of parameters, it is, in
    reverse: :math:`E[(J_1^\top u \cdot J_2^\top v) (J_3^\top v \cdot J_4^\top u)]`, where u meets
    J₁ and J₄ and v meets J₂ and J₃; forward: :math:`E[(J_4 p \cdot J_1 q) (J_2 q \cdot J_3 p)]`, where p
    meets J₃ and J₄ and q meets J₁ and J₂. (Proposition 1 of the paper states the reverse form with J₃
    and J₄ exchanged.)

    Args:
        first: J₁, ``(n, P)``.
        second: J₂, ``(m, P)``.
        third: J₃, ``(m, P)``; the states of J₂ and J₃ are the same.
        fourth: J₄, ``(n, P)``; the states of J₁ and J₄ are the same.
        num_passes: Passes to spend; each probe pair takes four.
        direction: "reverse" (vjps) or "forward" (jvps).
        generator: CPU generator of the probes.

    Returns:
        Unbiased `Estimate`.

    Raises:
        InputError: If an option is not understood.
        ShapeError: If the four do not fit together.

    Example:
        >>> import torch, ntkops
        >>> J = torch.eye(3)
        >>> g = torch.Generator().manual_seed(0)
        >>> e = ntkops.one_sided_product_trace(J, J, J, J, num_passes=4000, generator=g)
        >>> abs(float(e) - 3.0) < 4 * float(e.stderr)
        True
    """
    start = time.perf_counter()
    if direction not in ("reverse", "forward"):
        raise InputError(f"direction={direction!r}: choose 'reverse' or 'forward'")
    if num_passes < 8:
        raise InputError(f"num_passes={num_passes}: an error bar takes two probe pairs, 8 passes")
    generator, seed = resolve_generator(generator)
    count = num_passes // 4
    with torch.no_grad(), count_passes() as tally:
        factors = [Operand(factor) for factor in (first, second, third, fourth)]
        _require_fit(factors)
        form = _reverse if direction == "reverse" else _forward
        samples = form(factors, count, generator).unsqueeze(-1)
        moments = MeanMoments(samples.new_zeros(1), samples)
        value = moments.point()[..., 0]
        stderr = jackknife_error(moments, lambda m: m[..., 0])
        width = half_width(stderr, count)
    return Estimate(
        value=value,
        stderr=stderr,
        interval=(value - width, value + width),
        method=direction,
        exact=False,
        passes=tally.total,
        seed=seed,
        seconds=time.perf_counter() - start,
    )


def _require_fit(factors: list[Operand]) -> None:
    shapes = [tuple(factor.shape) for factor in factors]
    one, two, three, four = shapes
    if any(len(shape) != 2 for shape in shapes) or len({shape[1] for shape in shapes}) != 1:
        raise ShapeError(f"four matrices over the same parameters are needed, got {shapes}")
    if one[0] != four[0] or two[0] != three[0]:
        raise ShapeError(f"J1 and J4, and J2 and J3, need the same states, got {shapes}")


def _transposed(factor: Operand) -> Operand:
    return Operand(factor.operator.mT)


def _reverse(factors: list[Operand], count: int, generator: torch.Generator) -> Tensor:
    pulls = [_transposed(factor) for factor in factors]
    u = Space(factors[0].shape[0], factors[0].dtype, factors[0].device).probes(count, generator)
    v = Space(factors[1].shape[0], factors[1].dtype, factors[1].device).probes(count, generator)
    left = _dot(pulls[0].multiply(u), pulls[1].multiply(v))
    return left * _dot(pulls[2].multiply(v), pulls[3].multiply(u))


def _forward(factors: list[Operand], count: int, generator: torch.Generator) -> Tensor:
    space = factors[0].space
    p, q = space.probes(count, generator), space.probes(count, generator)
    left = _dot(factors[3].multiply(p), factors[0].multiply(q))
    return left * _dot(factors[1].multiply(q), factors[2].multiply(p))


def _dot(first: Tensor, second: Tensor) -> Tensor:
    return (first.double() * second.double()).sum(-2)
