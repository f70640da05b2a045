"""Redundancy of data and of parameters, as the spectrum of a kernel shows them."""

from __future__ import annotations

import time
import warnings
from dataclasses import dataclass
from typing import Literal

import torch
from linear_operator.operators import LinearOperator, RootLinearOperator, to_linear_operator
from torch import Tensor
from tqdm import tqdm

from ..arguments import checked
from ..engines import count_passes
from ..errors import InputError, NotConvergedWarning
from ..operators import JacobianOperator
from ..operators.capabilities import capabilities
from ..results import Redundancy
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
from .truncation_rank import truncation_rank

__all__ = ["data_redundancy", "parameter_redundancy"]


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
            rank = _ranks(values, torch.zeros(()), epsilon)
            found = _Found(rank, rank, rank, values, True)
        else:
            limit = 4 * operand.size + 500 if max_products is None else max_products
            tolerance = default_tolerance(operand.dtype) if tol is None else tol
            found = _by_lanczos(operand, epsilon, tolerance, limit, generator, progress)
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
    """Return the kernel and the number of parameters.

    Raises:
        InputError: If the number is not known.
    """
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


@dataclass(frozen=True)
class _Found:
    """Dimensions of one operator or of a batch, with both ends."""

    rank: Tensor
    low: Tensor
    high: Tensor
    values: Tensor
    converged: bool


def _ranks(values: Tensor, rest: Tensor, epsilon: float) -> Tensor:
    """Return the least k for leading eigenvalues ``(*batch, m)`` and the sum of the other squares.

    It is m + 1 where the eigenvalues do not reach.
    """
    scaled = values / values[..., :1]  # squares of 1e-20 are far off, those of their ratios are not
    rest = (rest / values[..., 0].square()).unsqueeze(-1)
    tails = scaled.square().flip(-1).cumsum(-1).flip(-1)  # Σ_{i ≥ k}, the k-th alone included
    total = tails[..., :1] + rest
    after = torch.cat([tails[..., 1:], torch.zeros_like(tails[..., :1])], dim=-1) + rest
    reached = after <= (epsilon**2 + 1e-14) * total
    return torch.where(reached.any(-1), reached.long().argmax(-1) + 1, values.shape[-1] + 1)


def _by_lanczos(
    operand: Operand, epsilon: float, tolerance: float, limit: int, generator: torch.Generator, progress: bool
) -> _Found:
    known = traces(operand)
    found = []
    with tqdm(desc="parameter redundancy", unit="product", disable=not progress) as bar:
        for number, member in enumerate(members(operand)):
            trace = Trace(member, None if known is None else known[number], generator)
            found.append(_member(member, trace, epsilon, tolerance, limit, generator, bar))
    longest = max(len(one.values) for one in found)
    shape = tuple(operand.batch_shape)

    def stack(parts: list[Tensor]) -> Tensor:
        return torch.stack(parts).reshape((*shape, *parts[0].shape))

    return _Found(
        stack([one.rank for one in found]),
        stack([one.low for one in found]),
        stack([one.high for one in found]),
        stack([torch.nn.functional.pad(one.values, (0, longest - len(one.values))) for one in found]),
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
    """Ask for twice as many eigenvalues until both ends of what is left give the same dimension."""
    solver = krylov(operand, generator, 1, bar)
    size, k = operand.rows.size, min(FIRST, operand.rows.size)
    while True:
        pairs = solver.solve(k, tolerance=tolerance, max_products=max(limit, k))
        values = pairs.values.clamp(min=0).cpu()
        require_nonzero(values[:1])
        low, _, high = ((end - values.sum()).clamp(min=0) for end in trace.ends(pairs))
        # Sums of squares of what is left, least and greatest; the largest of those is the last one found.
        least = low.square() / max(size - k, 1)
        greatest = torch.minimum(values[-1] * high, (size - k) * values[-1].square())
        ends = _ranks(values, least, epsilon), _ranks(values, greatest, epsilon)
        if int(ends[0]) == int(ends[1]) <= k or k >= size:
            return _Found(ends[1], *ends, values, pairs.converged)
        if not pairs.converged or solver.products >= limit:
            high_end = torch.where(ends[1] > k, torch.tensor(size), ends[1])
            return _Found(high_end, ends[0], high_end, values, False)
        k = min(2 * k, size)
