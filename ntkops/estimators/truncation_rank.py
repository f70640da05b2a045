"""The truncation rank: how many eigenvalues hold almost all of the trace."""

from __future__ import annotations

import time
import warnings
from dataclasses import dataclass
from typing import Literal

import torch
from linear_operator.operators import LinearOperator
from torch import Tensor
from tqdm import tqdm

from ..arguments import checked
from ..engines import count_passes
from ..errors import NotConvergedWarning
from ..results import TruncationRank
from ._request import Operand, checked_generator
from .eigenvalues import (
    FIRST,
    Trace,
    check_options,
    clamped,
    default_tolerance,
    dense_pays,
    eigenvalues_by_tiles,
    krylov,
    members,
    require_nonzero,
    traces,
)

__all__ = ["truncation_rank"]


@checked
def truncation_rank(
    operator: LinearOperator | Tensor,
    epsilon: float = 0.05,
    *,
    tol: float | None = None,
    method: Literal["auto", "dense", "lanczos"] = "auto",
    max_products: int | None = None,
    generator: torch.Generator | None = None,
    progress: bool = False,
) -> TruncationRank:
    r"""Compute the truncation rank, the smallest r for which r eigenvalues hold a share 1 - ε of the trace.

    .. math:: \min\{r : \lambda_1 + \dots + \lambda_r \ge (1 - \varepsilon)\,\mathrm{tr}\,K\}

    The eigenvalues come from all tiles of a small operator, else from Lanczos, going on with twice as many
    until their sum reaches the share. The trace is exact, from the diagonal, unless that is much
    more expensive than the products; then the part of it outside the eigenvectors found is estimated, and the
    result has an interval. Negative eigenvalues of rounding size count as zero. Source: distilled NTK
    paper, Definition 3.1.

    Args:
        operator: Symmetric positive semidefinite ``(*batch, n, n)`` operator or tensor; a batch (such as
            ``outputs="each"``) gives a rank for each member.
        epsilon: Share of the trace that may be lost, in (0, 1).
        tol: Residual tolerance of Lanczos; see `eigsh`.
        method: "auto", "dense" or "lanczos".
        max_products: Columns that Lanczos may multiply for each member; default 4 n + 500.
        generator: CPU generator of the starting vectors; None draws a seed.
        progress: Show a bar of products.

    Returns:
        `TruncationRank` with ranks and captured shares of shape ``(*batch)``.

    Raises:
        InputError: If an option is out of range, or the operator is far from positive semidefinite.
        ShapeError: If the operator is not square.
        DtypeError: If the operator is not of a real floating dtype.
        UnsupportedOperationError: If the operator is not symmetric.
        ZeroKernelError: If a kernel is zero.
        NonFiniteError: If the operator has entries that are not finite.

    Warns:
        NotConvergedWarning: If the products ran out first; the rank is then a lower bound.

    Example:
        >>> import torch, ntkops
        >>> K = torch.diag(torch.tensor([6.0, 3.0, 1.0]))
        >>> int(ntkops.truncation_rank(K, 0.1)), int(ntkops.truncation_rank(K, 0.05))
        (2, 3)
    """
    start = time.perf_counter()
    check_options(epsilon, tol, method, max_products)
    operand = Operand(operator)
    operand.require_square("the truncation rank")
    generator, seed = checked_generator(generator, operand.rows)
    with torch.no_grad(), count_passes() as counter:
        dense = method == "dense" or (method == "auto" and dense_pays(operand))
        if dense:
            found = _from_all(eigenvalues_by_tiles(operand.capabilities).cpu(), epsilon)
        else:
            tolerance = default_tolerance(operand.dtype) if tol is None else tol
            limit = 4 * operand.size + 500 if max_products is None else max_products
            found = _by_lanczos(operand, epsilon, tolerance, limit, generator, progress)
    if not found.converged:
        warnings.warn(
            "the products ran out before the eigenvalues converged or held their share of the trace: the "
            "rank is a lower bound; raise max_products or tol",
            NotConvergedWarning,
            stacklevel=3,
        )
    return TruncationRank(
        rank=found.rank,
        captured=found.captured,
        epsilon=epsilon,
        values=found.values,
        exact=dense,
        converged=found.converged,
        passes=counter.total,
        seed=None if dense else seed,
        seconds=time.perf_counter() - start,
        interval=found.interval,
    )


@dataclass(frozen=True)
class _Found:
    """Ranks of one operator or of a batch."""

    rank: Tensor
    captured: Tensor
    values: Tensor
    interval: tuple[Tensor, Tensor]
    converged: bool = True


def _ranks(values: Tensor, total: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """Return ranks and captured shares from leading eigenvalues ``(*batch, k)`` and traces."""
    share = values.cumsum(-1) / total.unsqueeze(-1)
    reached = share >= (1 - epsilon) - 1e-12  # a tie that rounding decides counts as reached
    rank = torch.where(reached.any(-1), reached.long().argmax(-1) + 1, values.shape[-1])
    return rank, share.gather(-1, (rank - 1).unsqueeze(-1)).squeeze(-1)


def _from_all(values: Tensor, epsilon: float) -> _Found:
    """Return the ranks from all eigenvalues, largest first."""
    values = clamped(values)
    rank, captured = _ranks(values, values.sum(-1), epsilon)
    return _Found(rank, captured, values, (rank, rank))


def _by_lanczos(
    operand: Operand,
    epsilon: float,
    tolerance: float,
    limit: int,
    generator: torch.Generator,
    progress: bool,
) -> _Found:
    known = traces(operand)
    found = []
    with tqdm(desc="truncation rank", unit="product", disable=not progress) as bar:
        for number, member in enumerate(members(operand)):
            trace = Trace(member, None if known is None else known[number], generator)
            found.append(_member(member, trace, epsilon, tolerance, limit, generator, bar))
    longest = max(len(one.values) for one in found)
    values = [torch.nn.functional.pad(one.values, (0, longest - len(one.values))) for one in found]
    shape = tuple(operand.batch_shape)

    def stack(parts: list[Tensor]) -> Tensor:
        return torch.stack(parts).reshape((*shape, *parts[0].shape))

    return _Found(
        stack([one.rank for one in found]),
        stack([one.captured for one in found]),
        stack(values),
        (stack([one.interval[0] for one in found]), stack([one.interval[1] for one in found])),
        all(one.converged for one in found),
    )


def _member(
    operand: Operand,
    trace: Trace,
    epsilon: float,
    tolerance: float,
    limit: int,
    generator: torch.Generator,
    bar: tqdm,
) -> _Found:
    """Ask for twice as many eigenvalues until the share is reached, with certainty where there is none."""
    solver = krylov(operand, generator, 1, bar)
    k = min(FIRST, operand.size)
    while True:
        pairs = solver.solve(k, tolerance=tolerance, max_products=max(limit, k))
        values = pairs.values.clamp(min=0).cpu()
        low, total, high = trace.ends(pairs)
        reached = float(values.sum()) >= (1 - epsilon - 1e-12) * float(high)
        spent = not pairs.converged or solver.products >= limit
        if reached or k >= operand.size or spent:
            break
        k = min(2 * k, operand.size)
    require_nonzero(total)
    rank, captured = _ranks(values, total, epsilon)
    ends = _ranks(values, low, epsilon)[0], _ranks(values, high, epsilon)[0]
    return _Found(rank, captured, values, ends, pairs.converged and (reached or k >= operand.size))
