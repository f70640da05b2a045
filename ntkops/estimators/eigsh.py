"""Leading eigenpairs of a symmetric operator."""

from __future__ import annotations

import time
import warnings

import torch
from linear_operator.operators import LinearOperator
from torch import Tensor
from tqdm import tqdm

from ..engines import count_passes
from ..errors import InputError, NonFiniteError, NotConvergedWarning
from ..operators.structure import Structure
from ..results import Eigenpairs
from ..spectra import lanczos
from ..vectors import resolve_generator
from ._request import Operand

__all__ = ["all_eigenpairs", "eigsh", "leading_pairs", "members"]

_DENSE = 128  # up to this size all eigenvalues cost less than a Krylov space


def eigsh(
    operator: LinearOperator | Tensor,
    k: int = 6,
    *,
    tol: float | None = None,
    max_products: int | None = None,
    block_size: int = 1,
    generator: torch.Generator | None = None,
    progress: bool = False,
) -> Eigenpairs:
    r"""Compute the k largest eigenvalues and eigenvectors of a symmetric operator.

    Lanczos with full reorthogonalisation; the residuals :math:`|K v - \lambda v|` are true ones,
    from products that were made. After convergence a fresh random direction is followed for a few
    products, so that copies of a multiple eigenvalue do not stay hidden. Small operators, or k near n, are
    solved densely by tiles. Nothing is clamped: a small negative eigenvalue is shown as it is.

    Args:
        operator: Symmetric ``(*batch, n, n)`` operator or tensor.
        k: Number of eigenpairs, 1 ≤ k ≤ n.
        tol: Bound for each residual relative to the largest eigenvalue; default the square root of the
            rounding unit (1.5e-8 in float64, 3.5e-4 in float32), which gives eigenvalues to its square.
        max_products: Columns that may be multiplied; default n.
        block_size: Columns multiplied at a time; one at least as large as a multiplicity finds all copies
            at once, and blocks suit engines that multiply several columns for the price of a few.
        generator: CPU generator of the starting block; None draws a seed.
        progress: Show a bar of products.

    Returns:
        Eigenpairs, values ``(*batch, k)`` and vectors ``(*batch, n, k)``. Memory: two n × products blocks.

    Raises:
        InputError: If k, the tolerance or a size is out of range.
        ShapeError: If the operator is not square.
        NonFiniteError: If a product is not finite.

    Warns:
        NotConvergedWarning: If the products ran out first; the result says ``converged=False``.

    Example:
        >>> import torch, ntkops
        >>> pairs = ntkops.eigsh(torch.diag(torch.arange(5.0)), k=2)
        >>> [round(v, 6) for v in pairs.values.tolist()], pairs.converged
        ([4.0, 3.0], True)
    """
    start = time.perf_counter()
    with torch.no_grad(), count_passes() as tally:
        operand = Operand(operator)
        _check(operand, k, tol, max_products, block_size)
        tolerance = torch.finfo(operand.dtype).eps ** 0.5 if tol is None else tol
        generator, seed = resolve_generator(generator)
        limit = operand.size if max_products is None else max_products
        if max_products is None and (operand.size <= _DENSE or 3 * k >= operand.size):
            values, vectors, residuals = _dense_pairs(operand.structure, k)
            method, converged, drawn = "dense", True, None
        else:
            found = [
                leading_pairs(member, k, tolerance, limit, block_size, generator, progress)
                for member in members(operand)
            ]
            values, vectors, residuals = (
                _restack(operand, part) for part in zip(*(f[:3] for f in found), strict=True)
            )
            converged, method, drawn = all(f[3] for f in found), "lanczos", seed
    if not converged:
        warnings.warn(
            f"eigsh made {limit} products, and the largest residual is {float(residuals.max()):.2g} against "
            f"{tolerance:.2g} times the largest eigenvalue; raise max_products or tol",
            NotConvergedWarning,
            stacklevel=2,
        )
    seconds = time.perf_counter() - start
    return Eigenpairs(values, vectors, residuals, converged, tally.total, method, drawn, seconds)


def _check(operand: Operand, k: int, tol: float | None, max_products: int | None, block_size: int) -> None:
    operand.require_square("eigsh")
    if not isinstance(k, int) or isinstance(k, bool) or not 1 <= k <= operand.size:
        raise InputError(f"k={k!r}: an operator of {operand.size} rows has 1 to {operand.size} eigenpairs")
    if tol is not None and not tol > 0:
        raise InputError(f"tol={tol!r}: pass a positive tolerance")
    if max_products is not None and max_products < k:
        raise InputError(f"max_products={max_products} is less than the k={k} products that k pairs need")
    if not 1 <= block_size <= operand.size:
        raise InputError(f"block_size={block_size!r}: pass 1 to {operand.size}")


def members(operand: Operand) -> list[Operand]:
    """Return the operands of a batch one by one, or the operand itself."""
    if not operand.batch_shape:
        return [operand]
    indices = [
        torch.unravel_index(torch.tensor(i), operand.batch_shape) for i in range(operand.batch_shape.numel())
    ]
    return [Operand(operand.operator[tuple(int(p) for p in index)]) for index in indices]


def leading_pairs(
    operand: Operand,
    k: int,
    tolerance: float,
    max_products: int,
    block_size: int,
    generator: torch.Generator,
    progress: bool,
) -> tuple[Tensor, Tensor, Tensor, bool]:
    """Return values, vectors, residuals and whether they converged, for one operator."""
    with tqdm(desc="eigsh", disable=not progress) as bar:
        pairs = lanczos(
            operand.multiply,
            operand.space,
            k,
            tolerance=tolerance,
            max_products=max_products,
            generator=generator,
            block_size=block_size,
            report=lambda done: bar.update(done - bar.n),
        )
    return pairs.values, pairs.vectors, pairs.residuals, pairs.converged


def _restack(operand: Operand, parts: tuple[Tensor, ...]) -> Tensor:
    return (
        torch.stack(parts).reshape(*operand.batch_shape, *parts[0].shape) if operand.batch_shape else parts[0]
    )


def all_eigenpairs(structure: Structure) -> tuple[Tensor, Tensor, Tensor]:
    """Return all eigenvalues, largest first, vectors, and the dense float64 matrix, built by tiles."""
    n = structure.shape[-1]
    dense = torch.zeros(structure.shape, dtype=torch.float64, device=structure.device)
    for tile in structure.tiles():
        dense[..., tile.rows, tile.cols] = tile.block.double()
        if structure.symmetric and tile.rows != tile.cols:
            dense[..., tile.cols, tile.rows] = tile.block.mT.double()
    if not bool(torch.isfinite(dense).all()):
        raise NonFiniteError(f"the {n} x {n} operator has entries that are not finite")
    values, vectors = torch.linalg.eigh((dense + dense.mT) / 2)
    return values.flip(-1), vectors.flip(-1), dense


def _dense_pairs(structure: Structure, k: int) -> tuple[Tensor, Tensor, Tensor]:
    values, vectors, dense = all_eigenpairs(structure)
    values, vectors = values[..., :k], vectors[..., :k]
    residuals = (dense @ vectors - vectors * values.unsqueeze(-2)).norm(dim=-2)
    return values, vectors.to(structure.dtype), residuals
