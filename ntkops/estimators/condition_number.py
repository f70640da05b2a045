"""The condition number of a kernel, between ends that hold."""

from __future__ import annotations

import time
import warnings

import torch
from linear_operator.operators import LinearOperator
from torch import Tensor

from ..arguments import checked
from ..engines import count_passes
from ..errors import NotConvergedWarning, UnsupportedOperationError, ZeroKernelError
from ..results import Estimate
from ..vectors import rank_cutoff
from ._request import Operand
from .eigenvalues import eigsh

__all__ = ["condition_number"]


@checked
def condition_number(
    operator: LinearOperator | Tensor,
    *,
    tol: float | None = None,
    max_products: int | None = None,
    generator: torch.Generator | None = None,
    progress: bool = False,
) -> Estimate:
    r"""Compute :math:`\kappa = \lambda_{\max} / \lambda_{\min}` of a positive semidefinite operator.

    A Ritz value is never above the largest eigenvalue and never below the smallest, and there is an
    eigenvalue within its residual. An entry of K carries rounding, too, which moves eigenvalues by up to
    :math:`n\,\epsilon\,\lambda_{\max}`: with :math:`\delta` the sum of both,

    .. math:: \frac{\lambda_{\max} - \delta}{\max(\lambda_{\min}, 0) + \delta} \le \kappa
              \le \frac{\lambda_{\max} + \delta}{\lambda_{\min} - \delta},

    and the upper end is infinite where :math:`\lambda_{\min} \le \delta`: in float32 that is soon the case,
    and the quotient of the computed eigenvalues, which may be negative, says nothing. The value is then
    :math:`\lambda_{\max} / \delta`, the largest that could be told, and ``converged`` is False.

    TE-NAS (Chen, Gong & Wang 2021) scores networks by the kernel of the summed logits, which is none of
    ``outputs=``: pass ``output=lambda y: y.sum(-1, keepdim=True)``.

    Args:
        operator: Symmetric positive semidefinite ``(*batch, n, n)`` operator or tensor; with
            ``K.add_jitter(ridge)`` that of the ridge system.
        tol: Bound of the residuals, as in `ntkops.eigsh`.
        max_products: Columns that may be multiplied for each of the two ends, as in `ntkops.eigsh`.
        generator: CPU generator of the starting vectors; None draws a seed.
        progress: Show bars of products.

    Returns:
        Estimate ``(*batch)``, float64, with an interval as above; ``method`` "dense" or "lanczos". Cost: two
        calls of `ntkops.eigsh`.

    Raises:
        ShapeError: If the operator is not square.
        ZeroKernelError: If it is zero.
        UnsupportedOperationError: If it is not symmetric, or has an eigenvalue that is negative beyond
            rounding.

    Warns:
        NotConvergedWarning: If the smallest eigenvalue is not told from zero.

    Example:
        >>> import torch, ntkops
        >>> found = ntkops.condition_number(torch.diag(torch.tensor([8.0, 4.0, 2.0]).double()))
        >>> float(found), bool(found.interval[0] <= 4 <= found.interval[1])
        (4.0, True)
    """
    operand = Operand(operator)
    operand.require_square("the condition number")
    options = {"tol": tol, "max_products": max_products, "generator": generator, "progress": progress}
    start = time.perf_counter()
    with count_passes() as counter:
        top = eigsh(operator, 1, **options)  # type: ignore[arg-type]
        bottom = eigsh(operator, 1, which="smallest", **options)  # type: ignore[arg-type]
    largest, smallest = top.values[..., 0].cpu(), bottom.values[..., 0].cpu()
    if bool((largest <= 0).any()):
        raise ZeroKernelError("the condition number of a kernel that is zero, or negative, is not defined")
    rounding = rank_cutoff(operand.size, operand.dtype) * largest
    above, below = (pairs.residuals[..., 0].cpu().double() + rounding for pairs in (top, bottom))
    if bool((smallest < -below).any()):
        raise UnsupportedOperationError(
            f"the operator has the eigenvalue {float(smallest.min()):.3g}, negative beyond rounding: a "
            "condition number is that of a positive semidefinite operator"
        )
    # Ends of κ from the ends of both eigenvalues; where λ_min may be zero there is no upper one.
    told = smallest > below
    value = largest / torch.where(told, smallest, below)
    low = (largest - above).clamp(min=0) / (smallest.clamp(min=0) + below)
    high = torch.where(told, (largest + above) / (smallest - below), torch.inf)
    met = top.converged and bottom.converged
    if not met:  # the smallest may not have been found
        high = torch.full_like(high, torch.inf)
    if met and not bool(told.all()):
        warnings.warn(
            f"the smallest eigenvalue is not told from zero in {operand.dtype}: the condition number is at "
            f"least {float(low[~told].min()):.3g}; use float64, or add a ridge",
            NotConvergedWarning,
            stacklevel=3,
        )
    return Estimate(
        value=value,
        stderr=(high - low) / 4,
        interval=(low, high),
        method=bottom.method,
        exact=False,
        passes=counter.total,
        converged=met and bool(told.all()),
        seed=bottom.seed,
        seconds=time.perf_counter() - start,
    )
