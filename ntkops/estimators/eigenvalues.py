"""Eigenvalues: all, or the leading ones."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from linear_operator.operators import LinearOperator
from torch import Tensor
from tqdm import tqdm

from ..arguments import checked
from ..engines import count_passes
from ..errors import (
    InputError,
    NotConvergedError,
    NotConvergedWarning,
    UnsupportedOperationError,
)
from ..operators.capabilities import dense_from_tiles, fits_dense
from ..results import Eigenpairs
from ..spectra import Lanczos, RitzPairs
from ._request import Operand, checked_generator, require_finite

__all__ = [
    "default_tolerance",
    "eigenvalues_by_tiles",
    "eigsh",
    "krylov",
    "members",
]


_DENSE = 512  # rows up to which all eigenvalues may cost less than a Krylov space


@checked
def eigsh(
    operator: LinearOperator | Tensor,
    k: int = 6,
    *,
    which: str = "largest",
    tol: float | None = None,
    max_products: int | None = None,
    block_size: int = 1,
    generator: torch.Generator | None = None,
    progress: bool = False,
    raise_on_failure: bool = False,
) -> Eigenpairs:
    r"""Compute the k largest, or smallest, eigenvalues and eigenvectors of a symmetric operator.

    Lanczos with full reorthogonalisation and thick restarts; the residuals :math:`|K v - \lambda v|` are
    computed again from k fresh products, where at least 2 k are allowed. After convergence a random
    direction is followed for some products, so that copies of a multiple eigenvalue do not stay hidden:
    what one Krylov space cannot see is looked for, though it cannot be ruled out with certainty. Small
    operators whose tiles cost less than that are solved densely. Nothing is clamped: a small negative
    eigenvalue is shown as it is.

    Args:
        operator: Symmetric ``(*batch, n, n)`` operator or tensor. Products that contradict symmetry are
            refused.
        k: Number of eigenpairs, 1 ≤ k ≤ n.
        which: "largest" or "smallest", with their signs. Small eigenvalues of a kernel whose spectrum
            decays lie close together, so that they take many products.
        tol: Bound for each residual relative to the largest |eigenvalue|; default 1e-9 in float64, 2e-5
            in float32. The error of an eigenvalue is of the order of its residual squared.
        max_products: Columns that may be multiplied for each member of a batch; default 20 k + 500.
        block_size: Columns multiplied at a time: for engines that multiply several for the price of
            one, and for eigenvalues of high multiplicity.
        generator: CPU generator of the starting block; None draws a seed.
        progress: Show a bar of products.
        raise_on_failure: Raise where the tolerance is not met, and do not only warn.

    Returns:
        Eigenpairs, values ``(*batch, k)`` from the wanted end inwards, vectors ``(*batch, n, k)``.
        Memory: two blocks of n × (3 k + 60).

    Raises:
        InputError: If an option is out of range.
        ShapeError: If the operator is not square.
        DtypeError: If the operator is not of a real floating dtype.
        UnsupportedOperationError: If the operator is not symmetric.
        NonFiniteError: If a product is not finite.
        NotConvergedError: If that was asked for; the exception has the pairs as ``result``.

    Warns:
        NotConvergedWarning: If the products ran out first; the result says ``converged=False``.

    Example:
        >>> import torch, ntkops
        >>> pairs = ntkops.eigsh(torch.diag(torch.arange(5.0)), k=2)
        >>> [round(v, 6) for v in pairs.values.tolist()], pairs.converged
        ([4.0, 3.0], True)
    """
    start = time.perf_counter()
    operand = Operand(operator)
    _check(operand, k, which, tol, max_products, block_size)
    generator, seed = checked_generator(generator, operand.rows)
    tolerance = default_tolerance(operand.dtype) if tol is None else tol
    limit = 20 * k + 500 if max_products is None else max_products
    sign = 1.0 if which == "largest" else -1.0
    with torch.no_grad(), count_passes() as counter:
        if max_products is None and _dense_pays(operand, k):
            parts = _dense_pairs(operand.capabilities, k, sign)
            method, converged, drawn = "dense", True, None
        else:
            with tqdm(desc="eigsh", unit="product", disable=not progress) as bar:
                solved = []
                for member in members(operand):
                    solver = krylov(member, generator, block_size, bar, sign)
                    checked = k if limit >= 2 * k else 0  # products kept for the residuals
                    pairs = solver.solve(k, tolerance=tolerance, max_products=limit - checked)
                    solved.append(
                        _verified(member, pairs, sign, tolerance * solver.scale if checked else None)
                    )
            parts = _restack(operand, [pairs for pairs, _ in solved])
            method, converged, drawn = "lanczos", all(good for _, good in solved), seed
    result = Eigenpairs(*parts, converged, counter.total, method, drawn, time.perf_counter() - start)
    if not converged:
        message = (
            f"eigsh ended within {limit} products with residuals of up to {float(parts[2].max()):.2g}, or "
            f"with multiple eigenvalues not ruled out; the tolerance is {tolerance:.2g} times the largest "
            "eigenvalue: raise max_products or tol"
        )
        if raise_on_failure:
            raise NotConvergedError(message, result)
        warnings.warn(message, NotConvergedWarning, stacklevel=3)
    return result


def default_tolerance(dtype: torch.dtype) -> float:
    """Return the residual, relative to the largest eigenvalue, that products of a dtype can reach."""
    # Products leave some units of rounding times |λ| in a residual: 2e-16, 1e-7 and, in bfloat16, 8e-3.
    return {torch.float64: 1e-9, torch.float32: 2e-5}.get(dtype, 2e-2)


def _check(
    operand: Operand, k: int, which: str, tol: float | None, max_products: int | None, block_size: int
) -> None:
    operand.require_square("eigsh")
    size = operand.size
    if not isinstance(k, int) or isinstance(k, bool) or not 1 <= k <= size:
        raise InputError(f"k={k!r}: an operator of {size} rows has 1 to {size} eigenpairs")
    if which not in ("largest", "smallest"):
        raise InputError(f"which={which!r}: choose 'largest' or 'smallest'")
    if tol is not None and not 0 < tol < math.inf:
        raise InputError(f"tol={tol!r}: pass a positive tolerance")
    if max_products is not None and max_products < k:
        raise InputError(f"max_products={max_products} is less than the k={k} products that k pairs need")
    if not isinstance(block_size, int) or not 1 <= block_size <= size:
        raise InputError(f"block_size={block_size!r}: pass 1 to {size}")


def _dense_pays(operand: Operand, k: int) -> bool:
    # About 2 k + 30 products find k leading pairs; more than four times their price is never paid for all.
    krylov_passes = operand.cost * (2 * k + 30)
    small = operand.size <= _DENSE or 4 * k >= operand.size
    if not small or not fits_dense(operand.operator):
        return False
    return operand.capabilities.exact_cost("tiles") <= 4 * krylov_passes


def members(operand: Operand) -> Iterator[Operand]:
    """Yield the operands of a batch one by one, or the operand itself."""
    if not operand.batch_shape:
        yield operand
        return
    for number in range(operand.batch_shape.numel()):
        index = torch.unravel_index(torch.tensor(number), operand.batch_shape)
        yield Operand(operand.operator[tuple(int(position) for position in index)])


def krylov(
    operand: Operand, generator: torch.Generator, block_size: int, bar: tqdm, sign: float = 1.0
) -> Lanczos:
    """Return a Lanczos solver for an operator, or for its negative.

    Raises:
        UnsupportedOperationError: If a dense operator is not symmetric.
    """
    dense = operand.operator
    if isinstance(dense, Tensor):
        _require_symmetric(dense)
    return Lanczos(
        (lambda block: operand.multiply(block)) if sign > 0 else (lambda block: -operand.multiply(block)),
        operand.rows,
        generator,
        block_size=block_size,
        report=bar.update,
    )


def _verified(operand: Operand, pairs: RitzPairs, sign: float, limit: float | None) -> tuple[RitzPairs, bool]:
    """Return the pairs with residuals from fresh products, and whether they are as good as they were."""
    values = sign * pairs.values
    if limit is None:  # too few products were allowed for that
        found = RitzPairs(values, pairs.vectors, pairs.residuals, pairs.converged, pairs.products)
        return found, pairs.converged
    outside = operand.multiply(pairs.vectors) - pairs.vectors * values.to(pairs.vectors.dtype)
    residuals = operand.rows.sum_squares(outside).sqrt()
    # Products of another width round differently, so that a residual at the limit may cross it.
    good = bool((residuals <= 2 * limit).all())
    found = RitzPairs(values, pairs.vectors, residuals, pairs.converged, pairs.products)
    return found, pairs.converged and operand.rows.any(good)


def _restack(operand: Operand, solved: Sequence[RitzPairs]) -> tuple[Tensor, Tensor, Tensor]:
    if not operand.batch_shape:
        return solved[0].values, solved[0].vectors, solved[0].residuals
    parts = zip(*((pairs.values, pairs.vectors, pairs.residuals) for pairs in solved), strict=True)
    values, vectors, residuals = (
        torch.stack(part).unflatten(0, tuple(operand.batch_shape)) for part in parts
    )
    return values, vectors, residuals


def _require_symmetric(dense: Tensor) -> None:
    gap, largest = float((dense - dense.mT).abs().max()), float(dense.abs().max())
    if gap > torch.finfo(dense.dtype).eps ** 0.5 * largest:
        raise UnsupportedOperationError(
            f"the operator is not symmetric: entries differ from their mirror images by up to {gap:.2g}, the "
            f"largest is {largest:.2g}; take the symmetric part, or the singular values"
        )


def symmetric_by_tiles(source: Any) -> Tensor:
    """Return the dense float64 matrix, put together from tiles.

    Raises:
        UnsupportedOperationError: If it is not symmetric.
        NonFiniteError: If it has entries that are not finite.
    """
    if source.space.is_spread:
        raise UnsupportedOperationError(
            "the dense matrix of an operator over a process group is not put together on any rank: use the "
            "iterative method, or one process"
        )
    dense = require_finite(dense_from_tiles(source), "the operator")
    _require_symmetric(dense)
    wide = dense.double()
    return (wide + wide.mT) / 2


def eigenvalues_by_tiles(source: Any) -> Tensor:
    """Return all eigenvalues ``(*batch, n)``, largest first, in float64."""
    return torch.linalg.eigvalsh(symmetric_by_tiles(source)).flip(-1)


def _dense_pairs(source: Any, k: int, sign: float) -> tuple[Tensor, Tensor, Tensor]:
    dense = symmetric_by_tiles(source)
    values, vectors = torch.linalg.eigh(dense)
    if sign > 0:
        values, vectors = values.flip(-1), vectors.flip(-1)
    values, vectors = values[..., :k], vectors[..., :k]
    residuals = (dense @ vectors - vectors * values.unsqueeze(-2)).norm(dim=-2)
    return values, vectors.to(source.dtype), residuals
