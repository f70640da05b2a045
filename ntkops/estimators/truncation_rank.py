"""The truncation rank: how many eigenvalues hold almost all of the trace."""

from __future__ import annotations

import time

import torch
from linear_operator.operators import LinearOperator
from torch import Tensor

from ..engines import count_passes
from ..errors import InputError, ZeroKernelError
from ..results import TruncationRank
from ..vectors import resolve_generator
from ._request import Operand
from .eigsh import all_eigenpairs, leading_pairs, members

__all__ = ["truncation_rank"]

_FIRST = 16  # eigenvalues asked for before the captured share is looked at
_DENSE = 1024  # rows up to which all eigenvalues are computed where tiles are cheap


def truncation_rank(
    operator: LinearOperator | Tensor,
    epsilon: float = 0.05,
    *,
    tol: float | None = None,
    method: str = "auto",
    generator: torch.Generator | None = None,
    progress: bool = False,
) -> TruncationRank:
    r"""Compute the truncation rank of a positive semidefinite operator.

    .. math:: r = \min\{k : \sum_{i \le k} \lambda_i \ge (1 - \varepsilon)\,\mathrm{tr}\,K\}

    The trace is exact, from the diagonal. The eigenvalues come from all tiles of a small operator, else
    from Lanczos with k doubled until their sum reaches the share. Negative eigenvalues of rounding size
    count as zero. Source: distilled NTK paper, Definition 3.1.

    Args:
        operator: Symmetric positive semidefinite ``(*batch, n, n)`` operator or tensor; a batch (such as
            ``outputs="each"``) gives a rank for each member.
        epsilon: Share of the trace that may be lost, in (0, 1).
        tol: Residual tolerance of Lanczos; see `eigsh`.
        method: "auto", "dense" or "lanczos".
        generator: CPU generator of the starting vectors; None draws a seed.
        progress: Show a bar of products.

    Returns:
        `TruncationRank` with ranks and captured shares of shape ``(*batch)``.

    Raises:
        InputError: If an option is out of range.
        ShapeError: If the operator is not square.
        ZeroKernelError: If a kernel is zero.

    Example:
        >>> import torch, ntkops
        >>> K = torch.diag(torch.tensor([6.0, 3.0, 1.0]))
        >>> int(ntkops.truncation_rank(K, 0.1)), int(ntkops.truncation_rank(K, 0.05))
        (2, 3)
    """
    start = time.perf_counter()
    if not 0 < epsilon < 1:
        raise InputError(f"epsilon={epsilon!r}: the share of the trace that may be lost lies between 0 and 1")
    if method not in ("auto", "dense", "lanczos"):
        raise InputError(f"method={method!r}: choose 'auto', 'dense' or 'lanczos'")
    generator, seed = resolve_generator(generator)
    with torch.no_grad(), count_passes() as tally:
        operand = Operand(operator)
        operand.require_square("the truncation rank")
        cheap = operand.size <= _DENSE and operand.structure.exact_cost("tiles") <= 2 * operand.size
        dense = method == "dense" or (method == "auto" and cheap)
        if dense:
            values, converged = all_eigenpairs(operand.structure)[0].clamp(min=0), True
            traces = values.sum(-1)
        else:
            traces = operand.structure.diagonal().double().sum(-1)
            values, converged = _leading_values(operand, traces, epsilon, tol, generator, progress)
    if bool((traces <= 0).any()):
        raise ZeroKernelError("the truncation rank is undefined: a kernel is zero")
    share = values.cumsum(-1) / traces.unsqueeze(-1)
    # A tie that rounding decides counts as reached.
    reached = share >= (1 - epsilon) - 1e-12
    rank = torch.where(reached.any(-1), reached.long().argmax(-1) + 1, values.shape[-1])
    captured = share.gather(-1, (rank - 1).unsqueeze(-1)).squeeze(-1)
    return TruncationRank(
        rank=rank,
        captured=captured,
        epsilon=epsilon,
        values=values,
        exact=dense,
        converged=converged,
        passes=tally.total,
        seed=None if dense else seed,
        seconds=time.perf_counter() - start,
    )


def _leading_values(
    operand: Operand,
    traces: Tensor,
    epsilon: float,
    tol: float | None,
    generator: torch.Generator,
    progress: bool,
) -> tuple[Tensor, bool]:
    """Return leading eigenvalues of each member, enough of them to hold the share, zeros after that."""
    tolerance = torch.finfo(operand.dtype).eps ** 0.5 if tol is None else tol
    rows, converged = [], True
    for member, trace in zip(members(operand), traces.reshape(-1), strict=True):
        k, size = min(_FIRST, operand.size), operand.size
        while True:
            values, _, _, good = leading_pairs(member, k, tolerance, size, 1, generator, progress)
            values = values.clamp(min=0)
            if float(values.sum()) >= (1 - epsilon) * float(trace) or k >= size:
                break
            k = min(2 * k, size)
        rows.append(values)
        converged = converged and good
    longest = max(len(row) for row in rows)
    padded = [torch.nn.functional.pad(row, (0, longest - len(row))) for row in rows]
    return torch.stack(padded).reshape(*traces.shape, longest), converged
