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
    """An orthonormal basis, its products and the projected operator, growing by blocks."""

    def __init__(
        self, multiply: Callable[[Tensor], Tensor], space: Space, generator: torch.Generator
    ) -> None:
        self._multiply, self._space, self._generator = multiply, space, generator
        # (n, capacity) in float64, doubled when full: converting them at every step would dominate.
        self._vectors = self._products = torch.empty(0, dtype=torch.float64)
        self._projected = torch.zeros(0, 0, dtype=torch.float64)  # (size, size) = Vᵀ W
        self._last = 0  # columns of the last block
        self.size = 0

    @property
    def vectors(self) -> Tensor:
        """V, ``(n, size)``."""
        return self._vectors[:, : self.size]

    @property
    def products(self) -> Tensor:
        """W = K V, ``(n, size)``."""
        return self._products[:, : self.size]

    def _orthogonal(self, block: Tensor) -> Tensor:
        """Return an orthonormal float64 basis of what a block adds to the basis, possibly empty."""
        rounding = torch.finfo(self._space.dtype).eps
        block = block.double()
        before = self._space.sum_squares(block).sqrt()
        block = self._without_basis(self._without_basis(block))
        after = self._space.sum_squares(block).sqrt()
        block = block[:, after > 1e2 * rounding * before]
        if block.shape[1] > 1:  # the block's own factorisation may turn it back towards the basis
            block = self._without_basis(self._space.orthonormalize(block))
        return block / self._space.sum_squares(block).sqrt() if block.shape[1] else block

    def _without_basis(self, block: Tensor) -> Tensor:
        if not self.size:
            return block
        return block - self.vectors @ self._space.inner(self.vectors, block)

    def _reserve(self, like: Tensor, columns: int) -> None:
        if self.size + columns <= self._vectors.shape[-1] and self.size:
            return
        capacity = max(32, 2 * (self.size + columns))
        for name in ("_vectors", "_products"):
            larger = like.new_empty(like.shape[0], capacity)
            if self.size:
                larger[:, : self.size] = getattr(self, name)[:, : self.size]
            setattr(self, name, larger)

    def extend(self, block: Tensor) -> bool:
        """Add the directions of a block; return whether there were any."""
        new = self._orthogonal(block)
        columns = new.shape[1]
        if not columns:
            return False
        new = new.to(self._space.dtype).double()  # what is really multiplied
        product = self._multiply(new.to(self._space.dtype)).double()
        self._reserve(new, columns)
        old, self.size, self._last = self.size, self.size + columns, columns
        self._vectors[:, old : self.size], self._products[:, old : self.size] = new, product
        grown = torch.zeros(self.size, self.size, dtype=torch.float64, device=new.device)
        grown[:old, :old] = self._projected
        grown[:, old:] = self._space.inner(self.vectors, product)
        grown[old:, :old] = grown[:old, old:].mT
        self._projected = grown
        return True

    def extend_krylov(self) -> bool:
        """Add the last products as new directions."""
        return self.extend(self.products[:, self.size - self._last :])

    def extend_random(self, count: int) -> bool:
        """Add random directions, so that nothing stays hidden in the complement."""
        return self.extend(self._space.probes(count, self._generator, "gaussian"))

    def ritz(self, count: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return the leading Ritz values, vectors and true residual norms."""
        values, rotation = torch.linalg.eigh((self._projected + self._projected.mT) / 2)
        values, rotation = values.flip(0)[:count], rotation.flip(1)[:, :count]
        pairs = self.vectors @ rotation
        residual = self.products @ rotation - pairs * values
        return values, pairs.to(self._space.dtype), self._space.sum_squares(residual).sqrt()


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
        The pairs. Memory: two n × products blocks in float64.
    """
    basis = _Basis(multiply, space, generator)
    basis.extend_random(min(block_size, space.size))
    reference: Tensor | None = None  # values when a guard direction was added
    next_look = count
    while True:
        full = basis.size >= min(space.size, max_products)
        if basis.size >= next_look or full:
            values, vectors, residuals = basis.ritz(count)
            scale = float(values.abs().max())
            small = len(values) == count and bool((residuals <= tolerance * scale).all())
            stable = reference is not None and bool(
                ((values - reference).abs() <= 2 * tolerance * scale).all()
            )
            if full or (small and stable):
                believed = basis.size >= space.size or (small and stable)
                return RitzPairs(values, vectors, residuals, not space.any(not believed), basis.size)
            if small:  # follow a fresh direction for a while before this is believed
                reference = values
                next_look = basis.size + _GUARD * block_size
                basis.extend_random(block_size)
            else:
                next_look = basis.size + max(block_size, basis.size // 8)
        if not basis.extend_krylov() and not basis.extend_random(block_size):
            values, vectors, residuals = basis.ritz(count)
            return RitzPairs(values, vectors, residuals, len(values) == count, basis.size)
        if report is not None:
            report(basis.size)
