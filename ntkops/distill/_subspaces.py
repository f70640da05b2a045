"""Subspaces of coefficients that products with a kernel reach."""

from __future__ import annotations

import torch
from linear_operator.operators import LinearOperator
from torch import Tensor

from ..operators.capabilities import capabilities, multiply
from ..regression import KernelRidge
from ..regression._operands import Layout
from ..vectors import Space

__all__ = ["dual_coefficients", "krylov_basis", "leading_combinations"]


def krylov_basis(
    kernel: LinearOperator, start: Tensor, size: int, generator: torch.Generator
) -> tuple[Tensor, int]:
    """Return an orthonormal basis of span{B, K B, K² B, ...}, by block Lanczos with full orthogonalisation.

    Of a block that does not fit whole, and of B itself, the leading left singular directions are taken.
    Where the space ends before there are enough, random directions go on.

    Args:
        kernel: ``(m, m)``.
        start: ``(m, b)`` B, in the kernel's dtype.
        size: Number of columns.
        generator: Source of the random directions.

    Returns:
        ``(m, size)``, and the number of random directions among them.
    """
    space = capabilities(kernel).space
    basis = start[:, :0]
    block, drawn = _outside(space, basis, start), 0
    while True:
        wanted = size - basis.shape[-1]
        if block is None:
            fresh = space.probes(min(wanted, max(1, start.shape[-1])), generator, "gaussian")
            block = _outside(space, basis, fresh)
            if block is None:
                continue
            drawn += min(wanted, block.shape[-1])
        block = block[:, :wanted]
        basis = torch.cat([basis, block], dim=-1)
        if basis.shape[-1] == size:
            return basis, drawn
        block = _outside(space, basis, multiply(kernel, block))


def _outside(space: Space, basis: Tensor, block: Tensor) -> Tensor | None:
    """Return orthonormal directions that a block adds to a basis, the strongest first, or None."""
    before = space.sum_squares(block).sqrt()
    if basis.shape[-1]:
        for _ in range(2):
            block = block - basis @ space.inner(basis, block).to(block.dtype)
    # What is left of a column that the basis holds is rounding, however it is scaled afterwards.
    rounding = 1e2 * torch.finfo(block.dtype).eps * before
    block = block[:, space.sum_squares(block).sqrt() > rounding]
    if not block.shape[-1]:
        return None
    turned = space.orthonormalize(block)
    if not basis.shape[-1]:
        return turned
    turned = turned - basis @ space.inner(basis, turned).to(turned.dtype)
    # Symmetric orthonormalisation keeps the order of the directions.
    values, vectors = torch.linalg.eigh(space.inner(turned, turned))
    return turned @ ((vectors * values.rsqrt()) @ vectors.mT).to(turned.dtype)


def dual_coefficients(
    kernels: LinearOperator, labels: Tensor, layout: Layout, ridge: float, relative: bool
) -> tuple[Tensor, float]:
    """Return the dual coefficients of the full regressions as columns, and the absolute ridge.

    Args:
        kernels: ``(m, m)`` or ``(C, m, m)``.
        labels: Labels that were checked against them.
        layout: How labels meet kernels.
        ridge: r.
        relative: Whether r is a multiple of the mean diagonal.

    Returns:
        ``(m, k)``, in the kernel's dtype, and the ridge in use.
    """
    # Coefficients that are to give the same solution back are worth a tighter solve than a prediction.
    tolerance = 1e-9 if kernels.dtype == torch.float64 else 1e-6
    fitted = KernelRidge(ridge, relative, tol=tolerance).fit(kernels, labels)
    columns = layout.columns(fitted.dual_coef_)
    return (columns.squeeze(-1).mT if layout.kind == "each" else columns), fitted.ridge_


def leading_combinations(kernel: LinearOperator, duals: Tensor, ridge: float, count: int) -> Tensor:
    r"""Return the combinations of dual coefficients that a rank-s regression keeps.

    With A the coefficients of one kernel, :math:`|Y - K U B|^2 + r\, tr B^T U^T K U B` exceeds its least
    value by :math:`|K^{1/2} (K + r)^{1/2} (A - U B)|_F^2`, so that the best U spans A times the leading
    eigenvectors of :math:`A^T K (K + r) A` (Eckart, Young).

    Args:
        kernel: ``(m, m)``: the kernel, or the mean of several.
        duals: ``(m, k)`` A.
        ridge: Absolute r.
        count: s ≤ k.

    Returns:
        ``(m, s)`` orthonormal columns; fewer where A has a lower rank.
    """
    space = capabilities(kernel).space
    images = multiply(kernel, duals)
    gram = space.inner(images, images) + ridge * space.inner(duals, images)
    _, vectors = torch.linalg.eigh((gram + gram.mT) / 2)
    return space.orthonormalize(duals @ vectors.flip(-1)[:, :count].to(duals.dtype))
