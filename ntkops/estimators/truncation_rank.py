"""The truncation rank: how many eigenvalues hold almost all of the trace."""

from __future__ import annotations

import time
import warnings
from dataclasses import dataclass

import torch
from linear_operator.operators import LinearOperator
from torch import Tensor
from tqdm import tqdm

from ..engines import count_passes
from ..errors import InputError, NotConvergedWarning, ZeroKernelError
from ..results import TruncationRank
from ..spectra import RitzPairs
from ._moments import Mean, student_quantile, summarize
from ._request import Operand, checked_generator, require_finite
from ._two_sided import column_dots, project_out
from .eigsh import default_tolerance, eigenvalues_by_tiles, fits_dense, krylov, members

__all__ = ["truncation_rank"]

_FIRST = 16  # eigenvalues asked for before the captured share is looked at
_DENSE = 1024  # rows up to which all eigenvalues are computed where tiles are cheap
_PROBES = 32  # for the rest of the trace, where its exact value is too dear


def truncation_rank(
    operator: LinearOperator | Tensor,
    epsilon: float = 0.05,
    *,
    tol: float | None = None,
    method: str = "auto",
    max_products: int | None = None,
    generator: torch.Generator | None = None,
    progress: bool = False,
) -> TruncationRank:
    r"""Compute the truncation rank, the smallest r for which r eigenvalues hold a share 1 - ε of the trace.

    .. math:: \min\{r : \lambda_1 + \dots + \lambda_r \ge (1 - \varepsilon)\,\mathrm{tr}\,K\}

    The eigenvalues come from all tiles of a small operator, else from Lanczos, going on with twice as many
    until their sum reaches the share. The trace is exact, from the diagonal, unless that is much
    dearer than the products; then the part of it outside the eigenvectors found is estimated, and the
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
    _check(epsilon, tol, method, max_products)
    operand = Operand(operator)
    operand.require_square("the truncation rank")
    generator, seed = checked_generator(generator)
    with torch.no_grad(), count_passes() as tally:
        dense = method == "dense" or (method == "auto" and _dense_pays(operand))
        if dense:
            found = _from_all(eigenvalues_by_tiles(operand.structure).cpu(), epsilon)
        else:
            tolerance = default_tolerance(operand.dtype) if tol is None else tol
            limit = 4 * operand.size + 500 if max_products is None else max_products
            found = _by_lanczos(operand, epsilon, tolerance, limit, generator, progress)
    if not found.converged:
        warnings.warn(
            "the products ran out before the eigenvalues converged or held their share of the trace: the "
            "rank is a lower bound; raise max_products or tol",
            NotConvergedWarning,
            stacklevel=2,
        )
    return TruncationRank(
        rank=found.rank,
        captured=found.captured,
        epsilon=epsilon,
        values=found.values,
        exact=dense,
        converged=found.converged,
        passes=tally.total,
        seed=None if dense else seed,
        seconds=time.perf_counter() - start,
        interval=found.interval,
    )


def _check(epsilon: float, tol: float | None, method: str, max_products: int | None) -> None:
    if isinstance(epsilon, bool) or not isinstance(epsilon, int | float) or not 0 < epsilon < 1:
        raise InputError(f"epsilon={epsilon!r}: the share of the trace that may be lost lies between 0 and 1")
    if method not in ("auto", "dense", "lanczos"):
        raise InputError(f"method={method!r}: choose 'auto', 'dense' or 'lanczos'")
    if tol is not None and not tol > 0:
        raise InputError(f"tol={tol!r}: pass a positive tolerance")
    if max_products is not None and (not isinstance(max_products, int) or max_products < 1):
        raise InputError(f"max_products={max_products!r}: pass a positive integer")


def _dense_pays(operand: Operand) -> bool:
    tiles = operand.structure.exact_cost("tiles")
    return operand.size <= _DENSE and fits_dense(operand) and tiles <= 2 * operand.size * max(operand.cost, 1)


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
    """Return the ranks from all eigenvalues, largest first.

    Raises:
        InputError: If negative eigenvalues are more than rounding.
        ZeroKernelError: If a kernel is zero.
    """
    if bool((values[..., -1] < -1e-3 * values[..., 0].abs()).any()):
        raise InputError(
            f"the operator is not positive semidefinite: its eigenvalues reach down to "
            f"{float(values.min()):.2g}, the largest is {float(values.max()):.2g}; a share of the trace has "
            "no meaning then"
        )
    values = values.clamp(min=0)
    total = values.sum(-1)
    _require_nonzero(total)
    rank, captured = _ranks(values, total, epsilon)
    return _Found(rank, captured, values, (rank, rank))


def _require_nonzero(total: Tensor) -> None:
    if bool((total <= 0).any()):
        raise ZeroKernelError(
            "the truncation rank is undefined: a kernel has no positive trace; does the output depend on the "
            "selected parameters?"
        )


def _by_lanczos(
    operand: Operand,
    epsilon: float,
    tolerance: float,
    limit: int,
    generator: torch.Generator,
    progress: bool,
) -> _Found:
    exact = operand.structure.exact_cost("diagonal") <= _PROBES * operand.cost * 32
    traces = None
    if exact:
        traces = require_finite(operand.structure.diagonal().double().sum(-1), "the trace").cpu().reshape(-1)
        _require_nonzero(traces)
    found = []
    with tqdm(desc="truncation rank", unit="product", disable=not progress) as bar:
        for number, member in enumerate(members(operand)):
            trace = None if traces is None else traces[number]
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
    trace: Tensor | None,
    epsilon: float,
    tolerance: float,
    limit: int,
    generator: torch.Generator,
    bar: tqdm,
) -> _Found:
    """Ask for twice as many eigenvalues until the share is reached, with certainty where there is none."""
    rest = None if trace is not None else _Rest(operand, generator)
    solver = krylov(operand, generator, 1, bar)
    k = min(_FIRST, operand.size)
    while True:
        pairs = solver.solve(k, tolerance=tolerance, max_products=max(limit, k))
        values = pairs.values.clamp(min=0).cpu()
        low, total, high = (trace, trace, trace) if trace is not None else _total(rest, values, pairs)
        assert low is not None and total is not None and high is not None
        reached = float(values.sum()) >= (1 - epsilon - 1e-12) * float(high)
        spent = not pairs.converged or solver.products >= limit
        if reached or k >= operand.size or spent:
            break
        k = min(2 * k, operand.size)
    _require_nonzero(total)
    rank, captured = _ranks(values, total, epsilon)
    ends = _ranks(values, low, epsilon)[0], _ranks(values, high, epsilon)[0]
    return _Found(rank, captured, values, ends, pairs.converged and (reached or k >= operand.size))


class _Rest:
    """Probes for the part of the trace that lies outside the eigenvectors found so far."""

    def __init__(self, operand: Operand, generator: torch.Generator) -> None:
        self._space = operand.rows
        self._probes = self._space.probes(_PROBES, generator)
        self._products = operand.multiply(self._probes)

    def samples(self, pairs: RitzPairs) -> Tensor:
        """Return vᵀ (I - QQᵀ) K (I - QQᵀ) v, with K Q = Q Λ up to the residuals."""
        outside = project_out(self._space, pairs.vectors, self._probes)
        products = project_out(self._space, pairs.vectors, self._products)
        return column_dots(self._space, outside, products).cpu()


def _total(rest: _Rest | None, values: Tensor, pairs: RitzPairs) -> tuple[Tensor, Tensor, Tensor]:
    """Return the trace with both ends of its interval."""
    assert rest is not None
    summary = summarize(
        [Mean(rest.samples(pairs).clamp(min=0), values.sum())], lambda moments: moments[..., 0]
    )
    width = student_quantile(0.05, summary.freedom) * summary.stderr
    return (summary.value - width).clamp(min=values.sum()), summary.value, summary.value + width
