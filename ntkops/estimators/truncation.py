"""Truncation ranks and redundancies: how many eigenvalues hold almost all of the trace, or of the norm."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from linear_operator.operators import LinearOperator, RootLinearOperator, to_linear_operator
from torch import Tensor
from tqdm import tqdm

from ..arguments import checked
from ..engines import count_passes
from ..errors import (
    InputError,
    NotConvergedWarning,
    ZeroKernelError,
)
from ..operators import JacobianOperator
from ..operators.capabilities import capabilities, fits_dense
from ..results import Redundancy, TruncationRank
from ..spectra import Lanczos, RitzPairs
from ._request import Operand, checked_generator, require_finite
from ._statistics import Mean, extremal_quantile, summarize
from ._two_sided import column_dots, project_out
from .eigenvalues import default_tolerance, eigenvalues_by_tiles, krylov, members

__all__ = ["data_redundancy", "parameter_redundancy", "truncation_rank"]


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
            values = clamped(eigenvalues_by_tiles(operand.capabilities).cpu())
            rank, captured = _share_ranks(values, values.sum(-1), epsilon)
            found = _Found(rank, rank, rank, captured, values)
        else:
            found = _by_lanczos(operand, _until_share, epsilon, tol, max_products, generator, progress)
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
        interval=(found.low, found.high),
    )


# -- redundancy of data and of parameters, as the spectrum of a kernel shows them


@checked
def data_redundancy(
    operator: LinearOperator | Tensor,
    epsilon: float = 0.05,
    *,
    tol: float | None = None,
    method: Literal["auto", "dense", "lanczos"] = "auto",
    max_products: int | None = None,
    generator: torch.Generator | None = None,
    progress: bool = False,
) -> Redundancy:
    r"""Compute the largest r for which the inputs of a kernel are (r, ε)-data-redundant.

    They are if the truncation rank of K at ε is at most n / r, so that the largest r is n over that rank (see
    `truncation_rank`, whose options these are). Source: distilled NTK paper, Definition 3.1; there K is the
    kernel of one class, ``outputs="each"`` here.

    Args:
        operator: Symmetric positive semidefinite ``(*batch, n, n)`` operator or tensor.
        epsilon: Share of the trace that may be lost, in (0, 1).
        tol: Residual tolerance of Lanczos; see `eigsh`.
        method: "auto", "dense" or "lanczos".
        max_products: Columns that Lanczos may multiply for each member; default 4 n + 500.
        generator: CPU generator of the starting vectors; None draws a seed.
        progress: Show a bar of products.

    Returns:
        `Redundancy` of shape ``(*batch)``; costs as for `truncation_rank`.

    Raises:
        InputError: If an option is out of range, or the operator is far from positive semidefinite.
        ShapeError: If the operator is not square.
        DtypeError: If the operator is not of a real floating dtype.
        UnsupportedOperationError: If the operator is not symmetric.
        ZeroKernelError: If a kernel is zero.
        NonFiniteError: If the operator has entries that are not finite.

    Warns:
        NotConvergedWarning: If the products ran out first; r is then an upper bound.

    Example:
        >>> import torch
        >>> from ntkops.estimators import data_redundancy
        >>> float(
        ...     data_redundancy(torch.diag(torch.tensor([96.0, 2.0, 1.0, 1.0])), 0.05)
        ... )
        4.0
    """
    found = truncation_rank(
        operator,
        epsilon,
        tol=tol,
        method=method,
        max_products=max_products,
        generator=generator,
        progress=progress,
    )
    assert found.interval is not None
    size = capabilities(operator).domain.size
    low, high = found.interval
    return Redundancy(
        factor=_times(size, found.rank),
        interval=(_times(size, high), _times(size, low)),
        rank=found.rank,
        size=size,
        epsilon=epsilon,
        kind="data",
        values=found.values,
        exact=found.exact,
        converged=found.converged,
        passes=found.passes,
        seed=found.seed,
        seconds=found.seconds,
    )


@checked
def parameter_redundancy(
    operator: LinearOperator | Tensor,
    epsilon: float = 0.05,
    *,
    num_parameters: int | None = None,
    tol: float | None = None,
    method: Literal["auto", "dense", "lanczos"] = "auto",
    max_products: int | None = None,
    generator: torch.Generator | None = None,
    progress: bool = False,
) -> Redundancy:
    r"""Compute the largest r for which the parameters are (r, ε)-parameter-redundant.

    They are if the gradients, projected onto some subspace of dimension P / r, still have a kernel within ε
    of K in relative Frobenius norm. A projection to dimension k leaves a kernel of rank k, so that by Eckart
    and Young the leading right singular vectors of J are best, and the dimension that is needed is

    .. math::
        k = \min\Big\{k : \sum_{i>k} \lambda_i^2 \le \varepsilon^2 \sum_i \lambda_i^2\Big\}, \qquad r = P / k.

    The eigenvalues come from all tiles of a small kernel, else from Lanczos. Of those that it has not found
    the trace says enough: their squares sum to between :math:`t^2 / (n - m)` and :math:`\lambda_m t`, where t
    is what the m found leave of it. Lanczos goes on until both ends give the same k. Source: distilled
    NTK paper, Definition 3.2.

    Args:
        operator: The Jacobian J ``(*batch, n, P)``, or a kernel K ``(*batch, n, n)``; a square
            tensor is a kernel.
        epsilon: Relative error in Frobenius norm that is allowed, in (0, 1).
        num_parameters: P; needed where K does not know its factors.
        tol: Residual tolerance of Lanczos; see `eigsh`.
        method: "auto", "dense" or "lanczos".
        max_products: Columns that Lanczos may multiply for each member; default 4 n + 500.
        generator: CPU generator of the starting vectors; None draws a seed.
        progress: Show a bar of products.

    Returns:
        `Redundancy` of shape ``(*batch)``. Where the products ran out, its interval is what is known by then.

    Raises:
        InputError: If an option is out of range, P is not known, or K is far from positive semidefinite.
        DtypeError: If the operator is not of a real floating dtype.
        UnsupportedOperationError: If the operator is not symmetric.
        ZeroKernelError: If a kernel is zero.
        NonFiniteError: If the operator has entries that are not finite.

    Warns:
        NotConvergedWarning: If the products ran out before both ends gave the same k.

    Example:
        >>> import torch
        >>> from ntkops.estimators import parameter_redundancy
        >>> J = torch.diag(torch.tensor([10.0, 3.0, 1.0, 0.1])).repeat(1, 2)
        >>> float(parameter_redundancy(J, 0.1)), float(parameter_redundancy(J, 0.01))
        (8.0, 4.0)
    """
    start = time.perf_counter()
    check_options(epsilon, tol, method, max_products)
    operand, size = _kernel(operator, num_parameters)
    generator, seed = checked_generator(generator, operand.rows)
    with torch.no_grad(), count_passes() as counter:
        dense = method == "dense" or (method == "auto" and dense_pays(operand))
        if dense:
            values = clamped(eigenvalues_by_tiles(operand.capabilities).cpu())
            rank = _square_ranks(values, torch.zeros(()), epsilon)
            found = _Found(rank, rank, rank, torch.ones_like(rank), values)
        else:
            found = _by_lanczos(operand, _until_same, epsilon, tol, max_products, generator, progress)
    if not found.converged:
        warnings.warn(
            "the products ran out before the dimension of the parameter space was certain: the interval "
            "holds what is known; raise max_products or tol",
            NotConvergedWarning,
            stacklevel=3,
        )
    return Redundancy(
        factor=_times(size, found.rank),
        interval=(_times(size, found.high), _times(size, found.low)),
        rank=found.rank,
        size=size,
        epsilon=epsilon,
        kind="parameters",
        values=found.values,
        exact=dense,
        converged=found.converged,
        passes=counter.total,
        seed=None if dense else seed,
        seconds=time.perf_counter() - start,
    )


def _times(size: int, rank: Tensor) -> Tensor:
    # Not a number divided by a tensor: that is its product with a rounded reciprocal.
    return torch.full_like(rank, size, dtype=torch.float64) / rank


def _kernel(operator: LinearOperator | Tensor, num_parameters: int | None) -> tuple[Operand, int]:
    """Return the kernel and the number of parameters."""
    if num_parameters is not None and (type(num_parameters) is not int or num_parameters < 1):
        raise InputError(f"num_parameters={num_parameters!r}: pass a positive integer")
    operand = Operand(operator)
    if not operand.is_square or isinstance(operator, JacobianOperator):
        root = RootLinearOperator(to_linear_operator(operator))
        return Operand(root), num_parameters or operand.columns.size
    factors = operand.capabilities.factors()
    if num_parameters is None and factors is None:
        raise InputError(
            "a kernel that does not know its Jacobian: pass num_parameters, or the Jacobian itself"
        )
    if num_parameters is not None:
        return operand, num_parameters
    assert factors is not None
    return operand, capabilities(factors[0]).domain.size


# -- what both are decided by: the trace, and options


FIRST = 16  # eigenvalues asked for before the captured share is looked at
_DENSE_BY_TILES = 1024  # rows up to which all eigenvalues are computed where tiles are cheap
_PROBES = 32  # for the rest of the trace, where its exact value is too expensive


def check_options(epsilon: float, tol: float | None, method: str, max_products: int | None) -> None:
    """Raise where an option is out of range.

    Raises:
        InputError: Naming it.
    """
    if isinstance(epsilon, bool) or not isinstance(epsilon, int | float) or not 0 < epsilon < 1:
        raise InputError(f"epsilon={epsilon!r}: the share of the trace that may be lost lies between 0 and 1")
    if method not in ("auto", "dense", "lanczos"):
        raise InputError(f"method={method!r}: choose 'auto', 'dense' or 'lanczos'")
    if tol is not None and not 0 < tol < math.inf:
        raise InputError(f"tol={tol!r}: pass a positive tolerance")
    if max_products is not None and (not isinstance(max_products, int) or max_products < 1):
        raise InputError(f"max_products={max_products!r}: pass a positive integer")


def dense_pays(operand: Operand) -> bool:
    """Whether all eigenvalues of the dense matrix cost less than leading ones by products."""
    if operand.size > _DENSE_BY_TILES or not fits_dense(operand.operator):
        return False
    return operand.capabilities.exact_cost("tiles") <= 2 * operand.size * max(operand.cost, 1)


def clamped(values: Tensor) -> Tensor:
    """Return all eigenvalues ``(*batch, n)``, largest first, with negative ones of rounding size as zero.

    Raises:
        InputError: If negative eigenvalues are more than rounding.
        ZeroKernelError: If a kernel is zero.
    """
    # Rounding moves eigenvalues by n ε λ_max at worst: a thousandth is that of 10⁴ rows in float32.
    if bool((values[..., -1] < -1e-3 * values[..., 0].abs()).any()):
        raise InputError(
            f"the operator is not positive semidefinite: its eigenvalues reach down to "
            f"{float(values.min()):.2g}, the largest is {float(values.max()):.2g}; a share of the trace has "
            "no meaning then"
        )
    values = values.clamp(min=0)
    require_nonzero(values.sum(-1))
    return values


def require_nonzero(total: Tensor) -> None:
    """Raise where a trace is zero.

    Raises:
        ZeroKernelError: If one is.
    """
    if bool((total <= 0).any()):
        raise ZeroKernelError(
            "a share of the trace is undefined: a kernel has no positive trace; does the output depend on "
            "the selected parameters?"
        )


def traces(operand: Operand) -> Tensor | None:
    """Return the exact trace of each member of a batch, ``(b,)``, or None where that is too expensive."""
    # Up to 32 times the price of the probes the exact trace is taken: it has no interval that a rank would
    # inherit.
    if operand.capabilities.exact_cost("diagonal") > _PROBES * operand.cost * 32:
        return None
    found = require_finite(operand.rows.sum(operand.capabilities.diagonal()), "the trace").cpu().reshape(-1)
    require_nonzero(found)
    return found


class Trace:
    """The trace of one operator, exact, or by probes for what lies outside the eigenvectors found so far.

    Args:
        operand: One square operator.
        exact: Its exact trace, or None.
        generator: Draws the probes.
    """

    def __init__(self, operand: Operand, exact: Tensor | None, generator: torch.Generator) -> None:
        self._exact = exact
        self._space = operand.rows
        if exact is None:
            self._probes = self._space.probes(_PROBES, generator)
            self._products = operand.multiply(self._probes)

    def ends(self, pairs: RitzPairs) -> tuple[Tensor, Tensor, Tensor]:
        """Return low end, value and high end of the 95 % interval."""
        if self._exact is not None:
            return self._exact, self._exact, self._exact
        # tr K = Σ λ_i + tr (I - QQᵀ) K (I - QQᵀ), whose second part is positive: nothing lies below the
        # first.
        known = pairs.values.clamp(min=0).cpu().sum()
        moments = [Mean(self._samples(pairs).clamp(min=0), known)]
        summary = summarize(moments, lambda values: values[..., 0])
        width = extremal_quantile(0.05, summary.freedom + 1) * summary.stderr
        return (summary.value - width).clamp(min=known), summary.value, summary.value + width

    def _samples(self, pairs: RitzPairs) -> Tensor:
        """Return vᵀ (I - QQᵀ) K (I - QQᵀ) v, with K Q = Q Λ up to the residuals."""
        # (I - QQᵀ) K (I - QQᵀ) v = (I - QQᵀ) K v, since (I - QQᵀ) K Q = (I - QQᵀ) Q Λ = 0: the products that
        # were made before Q was known still serve.
        outside = project_out(self._space, pairs.vectors, self._probes)
        products = project_out(self._space, pairs.vectors, self._products)
        return column_dots(self._space, outside, products).cpu()


# -- both: eigenvalues from all tiles, or from Lanczos until they decide


@dataclass(frozen=True)
class _Found:
    """Dimensions of one operator or of a batch, with both ends; of truncation ranks the shares they hold."""

    rank: Tensor
    low: Tensor
    high: Tensor
    captured: Tensor
    values: Tensor
    converged: bool = True


_Member = Callable[[Operand, Trace, float, Lanczos, float, int], _Found]


def _by_lanczos(
    operand: Operand,
    decide: _Member,
    epsilon: float,
    tol: float | None,
    max_products: int | None,
    generator: torch.Generator,
    progress: bool,
) -> _Found:
    """Return what one function finds for each member of a batch, whose values are padded by zeros."""
    limit = 4 * operand.size + 500 if max_products is None else max_products
    tolerance = default_tolerance(operand.dtype) if tol is None else tol
    known = traces(operand)
    found = []
    with tqdm(desc="eigenvalues", unit="product", disable=not progress) as bar:
        for number, member in enumerate(members(operand)):
            trace = Trace(member, None if known is None else known[number], generator)
            solver = krylov(member, generator, 1, bar)
            found.append(decide(member, trace, epsilon, solver, tolerance, limit))
    longest = max(len(one.values) for one in found)
    shape = tuple(operand.batch_shape)

    def stack(parts: list[Tensor]) -> Tensor:
        return torch.stack(parts).reshape((*shape, *parts[0].shape))

    return _Found(
        stack([one.rank for one in found]),
        stack([one.low for one in found]),
        stack([one.high for one in found]),
        stack([one.captured for one in found]),
        stack([torch.nn.functional.pad(one.values, (0, longest - len(one.values))) for one in found]),
        all(one.converged for one in found),
    )


def _share_ranks(values: Tensor, total: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """Return ranks and captured shares from leading eigenvalues ``(*batch, k)`` and traces."""
    share = values.cumsum(-1) / total.unsqueeze(-1)
    reached = share >= (1 - epsilon) - 1e-12  # a tie that rounding decides counts as reached
    rank = torch.where(reached.any(-1), reached.long().argmax(-1) + 1, values.shape[-1])
    return rank, share.gather(-1, (rank - 1).unsqueeze(-1)).squeeze(-1)


def _until_share(
    operand: Operand, trace: Trace, epsilon: float, solver: Lanczos, tolerance: float, limit: int
) -> _Found:
    """Ask for twice as many eigenvalues until the share is reached, with certainty where there is none."""
    k = min(FIRST, operand.size)
    while True:
        pairs = solver.solve(k, tolerance=tolerance, max_products=max(limit, k))
        values = pairs.values.clamp(min=0).cpu()
        low, total, high = trace.ends(pairs)
        # Against the high end of the trace: a share that holds of more holds of less.
        reached = float(values.sum()) >= (1 - epsilon - 1e-12) * float(high)
        spent = not pairs.converged or solver.products >= limit
        if reached or k >= operand.size or spent:
            break
        k = min(2 * k, operand.size)
    require_nonzero(total)
    rank, captured = _share_ranks(values, total, epsilon)
    ends = _share_ranks(values, low, epsilon)[0], _share_ranks(values, high, epsilon)[0]
    return _Found(rank, *ends, captured, values, pairs.converged and (reached or k >= operand.size))


def _square_ranks(values: Tensor, rest: Tensor, epsilon: float) -> Tensor:
    """Return the least k for leading eigenvalues ``(*batch, m)`` and the sum of the other squares.

    It is m + 1 where the eigenvalues do not reach.
    """
    scaled = values / values[..., :1]  # squares of 1e-20 are far off, those of their ratios are not
    rest = (rest / values[..., 0].square()).unsqueeze(-1)
    tails = scaled.square().flip(-1).cumsum(-1).flip(-1)  # Σ_{i ≥ k}, the k-th alone included
    total = tails[..., :1] + rest
    after = torch.cat([tails[..., 1:], torch.zeros_like(tails[..., :1])], dim=-1) + rest
    # a tie that rounding decides counts as reached
    reached = after <= (epsilon**2 + 1e-14) * total
    return torch.where(reached.any(-1), reached.long().argmax(-1) + 1, values.shape[-1] + 1)


def _until_same(
    operand: Operand, trace: Trace, epsilon: float, solver: Lanczos, tolerance: float, limit: int
) -> _Found:
    """Ask for twice as many eigenvalues until both ends of what is left give the same dimension."""
    size, k = operand.rows.size, min(FIRST, operand.rows.size)
    while True:
        pairs = solver.solve(k, tolerance=tolerance, max_products=max(limit, k))
        values = pairs.values.clamp(min=0).cpu()
        require_nonzero(values[:1])
        low, _, high = ((end - values.sum()).clamp(min=0) for end in trace.ends(pairs))
        # n - k numbers in [0, λ_k] that sum to t: equal ones have the least squares, t² / (n - k) (Cauchy-
        # Schwarz); the greatest are λ_k t at most, as x² ≤ λ_k x, and (n - k) λ_k².
        least = low.square() / max(size - k, 1)
        greatest = torch.minimum(values[-1] * high, (size - k) * values[-1].square())
        ends = _square_ranks(values, least, epsilon), _square_ranks(values, greatest, epsilon)
        if int(ends[0]) == int(ends[1]) <= k or k >= size:
            return _Found(ends[1], *ends, torch.ones_like(ends[1]), values, pairs.converged)
        if not pairs.converged or solver.products >= limit:
            high_end = torch.where(ends[1] > k, torch.tensor(size), ends[1])
            return _Found(high_end, ends[0], high_end, torch.ones_like(high_end), values, False)
        k = min(2 * k, size)
