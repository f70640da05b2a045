"""The log-determinant of a kernel with a ridge."""

from __future__ import annotations

import math

import torch
from linear_operator.operators import LinearOperator
from torch import Tensor

from ..arguments import checked
from ..results import Estimate
from ._request import Operand, Request
from ._spectral_sums import (
    METHODS,
    Options,
    SpectralSum,
    SumMethod,
    absolute_ridge,
    added_diagonal,
    spectral_sum,
    without_jitter,
)

__all__ = ["logdet"]


@checked
def logdet(
    operator: LinearOperator | Tensor,
    ridge: float = 0.0,
    *,
    relative: bool = False,
    rtol: float | None = None,
    atol: float = 0.0,
    num_passes: int | None = None,
    deflation: int | None = None,
    method: SumMethod = "auto",
    generator: torch.Generator | None = None,
    progress: bool = False,
) -> Estimate:
    r"""Compute or estimate :math:`\log \det (K + r I)` for a positive semidefinite K.

    With c = r plus the diagonal that the operator carries already (``K.add_jitter(c)``), it is

    .. math:: n \log c + \sum_i \log(1 + \lambda_i / c),

    whose second part is estimated: exactly from all eigenvalues where the dense matrix fits and costs less,
    else by stochastic Lanczos quadrature. Of an operator L Lᵀ whose L is known, such as `ntkops.ggn`, or the
    kernel of more outputs than parameters, the eigenvalues are those of LᵀL where that is smaller: the others
    are zero. Gauss rules are upper and Gauss-Radau rules lower bounds of every quadratic form, so that the
    interval contains the quadrature's error and not an estimate of it. The interval of the probes is that of
    a χ² with matched variance.

    Args:
        operator: Symmetric positive semidefinite ``(*batch, n, n)`` operator or tensor, with or without an
            added diagonal. Negative eigenvalues of rounding size count as zero.
        ridge: r ≥ 0, absolute like the argument of ``K.add_jitter``.
        relative: Multiply r by the mean diagonal (over the batch: one scale), which is computed exactly.
        rtol: Tolerance relative to the absolute value of the result. Default 1e-2 where ``num_passes`` is
            None too. The result may be close to zero: then pass ``atol``.
        atol: Absolute tolerance that is enough as well. 0.1 is a factor of 1.1 in the determinant.
        num_passes: Passes to spend; with a tolerance a cap (default: what the exact value costs, or 20,000
            products where that is out of reach).
        deflation: Number of leading eigenvectors that are computed and split off, which leaves the probes
            less to see; None to choose it from what the first probes see of the spectrum, 0 for none.
        method: "auto", "exact" or "slq".
        generator: CPU generator of the probes; None draws a seed from the operating system.
        progress: Show a bar of products.

    Returns:
        `Estimate` of shape ``(*batch)``. Exact: all tiles of K and n³ operations. Else two passes a product
        for a kernel of ours, memory up to 256 MB of Krylov vectors, or those of one probe.

    Raises:
        InputError: If an option is out of range, or the operator is far from positive semidefinite.
        ShapeError: If the operator is not square.
        DtypeError: If the operator is not of a real floating dtype.
        UnsupportedOperationError: If a dense operator is not symmetric.
        SingularKernelError: If K + r is singular to working precision, or has no ridge while its dense
            matrix is out of reach.
        ZeroKernelError: If the ridge is relative to a diagonal that is zero.
        NonFiniteError: If the operator has entries that are not finite.

    Warns:
        NotConvergedWarning: If the passes were spent before the tolerance was met.

    References:
        Ubaru, Chen, Saad 2017 (stochastic Lanczos quadrature); Golub, Meurant 2010, chapter 6 (bounds).

    Example:
        >>> import math, torch, ntkops
        >>> from ntkops.estimators import logdet
        >>> K = torch.diag(torch.tensor([1.0, 3.0], dtype=torch.float64))
        >>> math.isclose(float(logdet(K, ridge=1.0)), math.log(8.0))
        True
    """
    request = Request.check(
        METHODS, method=method, rtol=rtol, num_passes=num_passes, generator=generator, progress=progress
    )
    options = Options.check(request, atol, deflation)
    operand = Operand(operator)
    operand.require_square("the log-determinant")
    with torch.no_grad():
        bare, jitter = without_jitter(operator)
        floor = added_diagonal(bare)
        scale = absolute_ridge(operand, ridge, relative) + jitter + floor
    operand = Operand(bare)
    if scale > 0:
        quantity = SpectralSum(
            "the log-determinant", lambda x: torch.log1p(x / scale), math.log(scale), floor, scale
        )
    else:
        quantity = SpectralSum("the log-determinant", torch.log, 0.0, 0.0, 0.0)
    return spectral_sum(operand, quantity, options)
