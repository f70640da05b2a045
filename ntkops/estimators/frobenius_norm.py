"""The Frobenius norm of an operator."""

from __future__ import annotations

import torch
from linear_operator.operators import LinearOperator
from torch import Tensor

from ..results import Estimate
from ._driver import PAIR_METHODS, estimate
from ._quantities import FROBENIUS_NORM
from ._request import operands

__all__ = ["frobenius_norm"]


def frobenius_norm(
    operator: LinearOperator | Tensor,
    *,
    rtol: float | None = None,
    num_passes: int | None = None,
    method: str = "auto",
    generator: torch.Generator | None = None,
    progress: bool = False,
) -> Estimate:
    r"""Estimate or compute the Frobenius norm, :math:`|K|_F = (\mathrm{tr}\,K^\top K)^{1/2}`.

    Exact: tile by tile, nothing n x n is held. Hutchinson and Hutch++ estimate :math:`\mathrm{tr}\,K^\top K =
    E|K v|^2` without bias, with one product a column where the paper's form K (Kᵀ v) takes two. The
    square root has a bias of relative order 1/m. Source: paper, section 3.3 and Proposition 1.

    Args:
        operator: ``(*batch, m, n)`` operator or tensor.
        rtol: Relative tolerance: P(|error| ≤ rtol · |value|) ≥ 0.95. Default 1e-2 where
            ``num_passes`` is None too.
        num_passes: Passes to spend (one vjp, jvp or foreign product column each); with ``rtol`` a cap
            (by default 20,000 in one direction, and none where exactness is the end).
        method: "auto" (exact where that costs no more, else Hutch++, else one-sided), "exact" (by tiles),
            "hutchinson", "hutch++" (paper, Algorithm 1), "reverse" (vjps
            alone) or "forward" (jvps alone) (Proposition 1 over all pairs of probes).
        generator: CPU generator of the probes; None draws a seed from the operating system. The result
            records the seed.
        progress: Show a bar of passes.

    Returns:
        Estimate with value, standard error, 95 % interval, method, passes really made, and whether the
        tolerance was met. The interval is Student's t over the random probes, wider where `rtol` made
        it stop early; the deterministic part of Hutch++ has no error. With a single residual probe the
        error is infinite.

    Raises:
        InputError: If an option is not understood, or the passes do not pay for the method.
        UnsupportedOperationError: If a one-sided method is asked of an operator without factors.
        DtypeError: If the operator is not of a real floating dtype, or two of them differ.
        NonFiniteError: If a product is not finite.

    Warns:
        NotConvergedWarning: If the passes were spent before the tolerance was met.

    Example:
        >>> import torch, ntkops
        >>> A = torch.diag(torch.tensor([3.0, 4.0]))
        >>> float(ntkops.frobenius_norm(A))
        5.0
    """
    return estimate(
        FROBENIUS_NORM,
        lambda: operands(operator),
        PAIR_METHODS,
        rtol=rtol,
        num_passes=num_passes,
        method=method,
        generator=generator,
        progress=progress,
    )
