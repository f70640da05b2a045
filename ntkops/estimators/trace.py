"""The trace of an operator."""

from __future__ import annotations

import torch
from linear_operator.operators import LinearOperator
from torch import Tensor

from ..results import Estimate
from ._driver import TRACE_METHODS, estimate
from ._quantities import TRACE
from ._request import operands

__all__ = ["trace"]


def trace(
    operator: LinearOperator | Tensor,
    *,
    rtol: float | None = None,
    num_passes: int | None = None,
    method: str = "auto",
    orthogonalize: bool = False,
    generator: torch.Generator | None = None,
    progress: bool = False,
) -> Estimate:
    r"""Estimate or compute the trace, :math:`\mathrm{tr}\,K = \sum_i K_{ii} = |J|_F^2`.

    Exact: one per-sample pass for each output, memory of one tile. Hutchinson and Hutch++: two passes a
    product column. One-sided: :math:`\mathrm{tr}\,K = E|J^\top v|^2 = E|J p|^2`, one pass a probe. All are
    unbiased. Source: paper, sections 3.1 and 3.2.

    Args:
        operator: Square ``(*batch, n, n)`` operator or tensor.
        rtol: Relative tolerance: P(|error| ≤ rtol · |value|) ≥ 0.95. Default 1e-2 where
            ``num_passes`` is None too.
        num_passes: Passes to spend (one vjp, jvp or foreign product column each); with ``rtol`` a cap
            (by default 20,000 in one direction, and none where exactness is the end).
        method: "auto" (exact where that costs no more, else Hutch++, else one-sided), "exact" (the sum
            of the diagonal), "hutchinson", "hutch++" (paper, Algorithm 1), "rhutch" (vjps alone) or
            "fhutch" (jvps alone) (Algorithm 2).
        orthogonalize: For "rhutch" and "fhutch": spend half the probes on an orthonormal basis of random
            directions (the optional step of Algorithm 2). It pays only where they are not few against
            the dimension: otherwise the other half alone decides the error.
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
        ShapeError: If the operator is not square.
        UnsupportedOperationError: If a one-sided method is asked of an operator without factors.
        DtypeError: If the operator is not of a real floating dtype, or two of them differ.
        NonFiniteError: If a product is not finite.

    Warns:
        NotConvergedWarning: If the passes were spent before the tolerance was met.

    Example:
        >>> import torch, ntkops
        >>> _ = torch.manual_seed(0)
        >>> K = ntkops.ntk(torch.nn.Linear(3, 2), torch.randn(5, 3))
        >>> exact = ntkops.trace(K)
        >>> estimate = ntkops.trace(
        ...     K, method="rhutch", num_passes=50, generator=torch.Generator().manual_seed(1)
        ... )
        >>> exact.method, abs(float(estimate) - float(exact)) < 4 * float(estimate.stderr)
        ('exact', True)
    """
    return estimate(
        TRACE,
        lambda: operands(operator),
        TRACE_METHODS,
        rtol=rtol,
        num_passes=num_passes,
        method=method,
        generator=generator,
        progress=progress,
        orthogonalize=orthogonalize,
    )
