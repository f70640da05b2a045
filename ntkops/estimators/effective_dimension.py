"""The effective dimension of kernel ridge regression."""

from __future__ import annotations

import torch
from linear_operator.operators import LinearOperator
from torch import Tensor

from ..arguments import checked
from ..errors import InputError
from ..results import Estimate
from ._request import Operand, Request
from ._spectral_sums import METHODS, Options, SpectralSum, SumMethod, absolute_ridge, spectral_sum

__all__ = ["effective_dimension"]


@checked
def effective_dimension(
    operator: LinearOperator | Tensor,
    ridge: float,
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
    r"""Compute or estimate the effective dimension (degrees of freedom) of ridge regression with kernel K.

    .. math:: \mathrm{tr}\, K (K + r I)^{-1} = \sum_i \frac{\lambda_i}{\lambda_i + r}

    It is the number of eigenvalues above the ridge, each counted by how far it stands above it. The numerics
    are those of `logdet`, with the same bounds: exactly from all eigenvalues where that fits and costs
    less, else stochastic Lanczos quadrature with Gauss and Gauss-Radau rules.

    Args:
        operator: Symmetric positive semidefinite ``(*batch, n, n)`` operator or tensor. A diagonal that it
            carries already counts as part of K. Negative eigenvalues of rounding size count as zero.
        ridge: r > 0, absolute like the argument of ``K.add_jitter``.
        relative: Multiply r by the mean diagonal (over the batch: one scale), which is computed exactly.
        rtol: Tolerance relative to the result. Default 1e-2 where ``num_passes`` is None too.
        atol: Absolute tolerance that is enough as well.
        num_passes: Passes to spend; with a tolerance a cap (default: what the exact value costs, or 20,000
            products where that is out of reach).
        deflation: Number of leading eigenvectors that are computed and split off; None to choose it.
        method: "auto", "exact" or "slq".
        generator: CPU generator of the probes; None draws a seed from the operating system.
        progress: Show a bar of products.

    Returns:
        `Estimate` of shape ``(*batch)``, between 0 and n; costs as for `logdet`.

    Raises:
        InputError: If an option is out of range, or the operator is far from positive semidefinite.
        ShapeError: If the operator is not square.
        DtypeError: If the operator is not of a real floating dtype.
        UnsupportedOperationError: If a dense operator is not symmetric.
        SingularKernelError: If the ridge is below the rounding of K, where the sum is a numerical rank.
        ZeroKernelError: If the ridge is relative to a diagonal that is zero.
        NonFiniteError: If the operator has entries that are not finite.

    Warns:
        NotConvergedWarning: If the passes were spent before the tolerance was met.

    References:
        Caponnetto, De Vito 2007 (definition); Ubaru, Chen, Saad 2017 (stochastic Lanczos quadrature).

    Example:
        >>> import torch
        >>> from ntkops.estimators import effective_dimension
        >>> float(effective_dimension(torch.diag(torch.tensor([1.0, 3.0])), ridge=1.0))
        1.25
    """
    request = Request.check(
        METHODS, method=method, rtol=rtol, num_passes=num_passes, generator=generator, progress=progress
    )
    options = Options.check(request, atol, deflation)
    operand = Operand(operator)
    operand.require_square("the effective dimension")
    with torch.no_grad():
        scale = absolute_ridge(operand, ridge, relative)
    if not scale > 0:
        raise InputError(
            "ridge=0: the effective dimension is then the rank, which rounding decides; pass r > 0"
        )
    quantity = SpectralSum("the effective dimension", lambda x: x / (x + scale), 0.0, 0.0, scale)
    return spectral_sum(operand, quantity, options)
