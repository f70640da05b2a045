"""The Frobenius inner product of two operators."""

from __future__ import annotations

import torch
from linear_operator.operators import LinearOperator
from torch import Tensor

from ..results import Estimate
from ._driver import PAIR_METHODS, estimate
from ._quantities import INNER
from ._request import operands

__all__ = ["inner"]


def inner(
    first: LinearOperator | Tensor,
    second: LinearOperator | Tensor,
    *,
    rtol: float | None = None,
    num_passes: int | None = None,
    method: str = "auto",
    generator: torch.Generator | None = None,
    progress: bool = False,
) -> Estimate:
    r"""Estimate or compute the inner product :math:`\langle K_1, K_2 \rangle_F = \mathrm{tr}(K_1^\top K_2)`.

    Exact: by the tiles of both, side by side. Hutchinson and Hutch++: :math:`E[(K_1 v)^\top (K_2 v)]`,
    unbiased, with the same probes for both. Source: paper, section 3.3 and Proposition 1.

    Args:
        first: ``(*batch, m, n)`` operator or tensor.
        second: One of the same shape.
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
        ShapeError: If the shapes differ.
        UnsupportedOperationError: If a one-sided method is asked of an operator without factors.
        DtypeError: If the operator is not of a real floating dtype, or two of them differ.
        NonFiniteError: If a product is not finite.

    Warns:
        NotConvergedWarning: If the passes were spent before the tolerance was met.

    Example:
        >>> import torch, ntkops
        >>> A = torch.diag(torch.tensor([3.0, 4.0]))
        >>> float(ntkops.inner(A, torch.eye(2)))
        7.0
    """
    return estimate(
        INNER,
        lambda: operands(first, second),
        PAIR_METHODS,
        rtol=rtol,
        num_passes=num_passes,
        method=method,
        generator=generator,
        progress=progress,
    )
