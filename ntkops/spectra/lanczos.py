"""Lanczos with full reorthogonalisation, knowing only products and a vector space.

The basis V and the products W = K V are both kept. That makes the projected matrix Vᵀ W and every
residual |K y - θ y| = |W s - θ V s| exact up to rounding, with no further product, and it lets a
direction be added at any time: after a breakdown, or to look for copies of a multiple eigenvalue that a
single Krylov space cannot see.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..vectors import Space

__all__ = ["RitzPairs", "lanczos"]

_GUARD = 8  # products after a new random direction before convergence is believed


@dataclass(frozen=True, eq=False)
class RitzPairs:
    """Approximate eigenpairs with true residuals.

    Attributes:
        values: ``(k,)`` largest first, float64.
        vectors: ``(n, k)`` orthonormal columns.
        residuals: ``(k,)`` norms |K v - λ v|, float64.
        converged: Whether all residuals met the tolerance and a fresh direction changed nothing.
        products: Columns multiplied.
    """

    values: Tensor
    vectors: Tensor
    residuals: Tensor
    converged: bool
    products: int


class _Basis:
    """An orthonormal basis and its products, growing by blocks."""

    def __init__(
        self, multiply: Callable[[Tensor], Tensor], space: Space, generator: torch.Generator
    ) -> None:
        self._multiply, self._space, self._generator = multiply, space, generator
        self._vectors: list[Tensor] = []
        self._products: list[Tensor] = []
        self.size = 0

    @property
    def vectors(self) -> Tensor:
        return torch.cat(self._vectors, dim=1)

    @property
    def products(self) -> Tensor:
        return torch.cat(self._products, dim=1)

    def _orthogonal(self, block: Tensor) -> Tensor:
        """Return an orthonormal basis of what a block adds to the basis, possibly empty."""
        before = self._space.sum_squares(block).sqrt()
        if self._vectors:
            held = self.vectors
            for _ in range(2):  # once is not enough: cancellation leaves components behind
                block = block - held @ self._space.inner(held, block).to(block.dtype)
        after = self._space.sum_squares(block).sqrt()
        cutoff = 1e2 * torch.finfo(block.dtype).eps
        block = block[:, after > cutoff * before]
        return self._space.orthonormalize(block) if block.shape[1] else block

    def extend(self, block: Tensor) -> bool:
        """Add the directions of a block; return whether there were any."""
        new = self._orthogonal(block)
        if not new.shape[1]:
            return False
        if self._vectors:  # the block's own factorisation may have turned it back towards the basis
            held = self.vectors
            new = new - held @ self._space.inner(held, new).to(new.dtype)
            new = new / self._space.sum_squares(new).sqrt().to(new.dtype)
        self._vectors.append(new)
        self._products.append(self._multiply(new))
        self.size += new.shape[1]
        return True

    def extend_krylov(self) -> bool:
        """Add the last products as new directions."""
        return self.extend(self._products[-1])

    def extend_random(self, count: int) -> bool:
        """Add random directions, so that nothing stays hidden in the complement."""
        return self.extend(self._space.probes(count, self._generator, "gaussian"))

    def ritz(self, count: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return the leading Ritz values, vectors and true residual norms."""
        vectors, products = self.vectors, self.products
        projected = self._space.inner(vectors, products)
        values, rotation = torch.linalg.eigh((projected + projected.mT) / 2)
        values, rotation = values.flip(0)[:count], rotation.flip(1)[:, :count]
        turn = rotation.to(vectors.dtype)
        pairs = vectors @ turn
        residual = products @ turn - pairs * values.to(vectors.dtype)
        return values, pairs, self._space.sum_squares(residual).sqrt()


def lanczos(
    multiply: Callable[[Tensor], Tensor],
    space: Space,
    count: int,
    *,
    tolerance: float,
    max_products: int,
    generator: torch.Generator,
    block_size: int = 1,
    report: Callable[[int], None] | None = None,
) -> RitzPairs:
    """Find the largest eigenpairs of a symmetric operator.

    Args:
        multiply: ``(n, k) -> (n, k)``, the product with the operator.
        space: The space of its vectors.
        count: Number of pairs wanted, at most n.
        tolerance: Bound for each residual, relative to the largest |λ| found.
        max_products: Columns that may be multiplied.
        generator: Draws the starting block.
        block_size: Columns of a block; at least the multiplicity of an eigenvalue finds its copies at once.
        report: Called with the number of products after each block.

    Returns:
        The pairs. Memory: two n × products blocks.
    """
    basis = _Basis(multiply, space, generator)
    basis.extend_random(min(block_size, space.size))
    believed_at: int | None = None  # size of the basis when a guard direction was added
    reference: Tensor | None = None
    while True:
        values, vectors, residuals = basis.ritz(count)
        scale = float(values.abs().max())
        small = len(values) == count and bool((residuals <= tolerance * scale).all())
        complete = basis.size >= space.size
        if complete or basis.size >= max_products:
            converged = complete or (small and believed_at is not None and reference is not None)
            return RitzPairs(values, vectors, residuals, bool(space.any(converged)), basis.size)
        grown = False
        if small and believed_at is None:
            believed_at, reference = basis.size, values
            grown = basis.extend_random(block_size)
        elif small and believed_at is not None and basis.size >= believed_at + _GUARD * block_size:
            assert reference is not None
            if bool(((values - reference).abs() <= 2 * tolerance * scale).all()):
                return RitzPairs(values, vectors, residuals, True, basis.size)
            believed_at, reference = basis.size, values
            grown = basis.extend_random(block_size)
        grown = grown or basis.extend_krylov() or basis.extend_random(block_size)
        if not grown:
            return RitzPairs(values, vectors, residuals, len(values) == count and small, basis.size)
        if report is not None:
            report(basis.size)
