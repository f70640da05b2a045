"""Lanczos with full reorthogonalisation, deflation and thick restarts.

The basis V and its products W = K V are both kept. That makes the projected matrix Vᵀ W and every residual
|W s - θ V s| right whatever the basis is made of, so that a direction can be added at any time: after a
breakdown, or to look for copies of a multiple eigenvalue, of which one Krylov space sees only one. A full
basis is replaced by its best Ritz vectors (thick restart: Wu, Simon 2000).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import UnsupportedOperationError
from ..vectors import Space

__all__ = [
    "Lanczos",
    "RitzPairs",
    "choose_deflation",
]


_SIZES = (1, 2, 4, 8, 16, 32, 64, 128)
_PER_VECTOR, _AT_ALL = 2.5, 40.0  # products that Lanczos takes for k eigenvectors, about
_GAIN = 0.7  # of the products that are left, below which the change pays


def choose_deflation(
    values: Tensor, counts: Tensor, *, steps: int, drawn: int, error: float | None, left: float
) -> int:
    """Return the number k of eigenvectors that saves most products, or the most error; 0 for none.

    Args:
        values: ``(m,)`` values of f at the nodes of a quadrature rule.
        counts: ``(m,)`` numbers of eigenvalues that the nodes stand for; their sum is the dimension.
        steps: Products of one direction.
        drawn: Directions that are drawn already, and lost by a change.
        error: Half width of the interval that is wanted, or None where the products are to be spent.
        left: Products that are left.

    Returns:
        The number k, less than half of the dimension.
    """
    dimension = float(counts.sum())
    order = values.argsort(descending=True)
    values, counts = values[order], counts[order]
    costs = {}
    for size in (0, *_SIZES):
        if size and size > dimension / 2:
            break
        before = counts.cumsum(0) - counts
        kept = (counts - (size - before).clamp(min=0)).clamp(min=0)  # what is left of each node
        rest = float(kept.sum())
        mean = float((kept * values).sum()) / rest
        spread = float((kept * (values - mean).square()).sum()) / rest
        # a direction of length √d, d = rest: d² 2 / (d + 2) times the variance of f over the spectrum
        variance = 2 * rest**2 / (rest + 2) * spread  # of one direction
        price = _AT_ALL + _PER_VECTOR * size if size else 0.0
        if error is not None:
            # 1.96² = 3.84 variances in the square of a 95 % half width
            wanted = max(3.84 * variance / error**2, 8.0) if error else math.inf
            costs[size] = price + steps * max(wanted - (drawn if not size else 0), 0.0)
        else:
            remaining = left - price + (steps * drawn if not size else 0)
            costs[size] = variance / remaining if remaining > 8 * steps else math.inf
    best = min(costs, key=lambda size: costs[size])
    limit = _GAIN if error is not None else _GAIN**2
    pays = costs[best] < limit * costs[0] and (error is None or costs[0] - costs[best] > _AT_ALL)
    return best if pays and _PER_VECTOR * best + _AT_ALL < left / 2 else 0


# -- lanczos with full reorthogonalisation and restarts, knowing only products and a vector space


_STRIDE = 5  # blocks between two looks at the residuals
_LEAST_GUARD, _MOST_GUARD = 4, 24  # columns that follow a random direction before convergence is believed


@dataclass(frozen=True, eq=False)
class RitzPairs:
    """Approximate eigenpairs.

    Attributes:
        values: ``(k,)``, largest first, float64.
        vectors: ``(n, k)`` orthonormal columns.
        residuals: ``(k,)`` norms |K v - λ v| from products that were made, float64.
        converged: Whether all residuals met the tolerance, and a random direction found nothing more.
        products: Columns multiplied in all.
    """

    values: Tensor
    vectors: Tensor
    residuals: Tensor
    converged: bool
    products: int


class Lanczos:
    """The largest eigenpairs of a symmetric operator; more of them can be asked for later.

    Args:
        multiply: ``(n, b) -> (n, b)``, the product with the operator.
        space: The space of its vectors.
        generator: Draws the directions that no product gives.
        block_size: Columns multiplied at a time.
        report: Called with the number of columns multiplied after each block.

    Example:
        >>> import torch
        >>> from ntkops.spectra import Lanczos
        >>> from ntkops.vectors import Space
        >>> K = torch.diag(torch.tensor([5.0, 5.0, 2.0, 1.0, 0.5], dtype=torch.float64))
        >>> space, generator = Space(5, torch.float64), torch.Generator().manual_seed(0)
        >>> pairs = Lanczos(lambda V: K @ V, space, generator).solve(2, tolerance=1e-10)
        >>> [round(value, 9) for value in pairs.values.tolist()], pairs.converged
        ([5.0, 5.0], True)
    """

    def __init__(
        self,
        multiply: Callable[[Tensor], Tensor],
        space: Space,
        generator: torch.Generator,
        *,
        block_size: int = 1,
        report: Callable[[int], None] | None = None,
    ) -> None:
        self._multiply, self._space, self._generator = multiply, space, generator
        self._block = min(block_size, space.size)
        self._report = report
        self.products = 0
        empty = torch.empty((space.length, 0), dtype=space.dtype, device=space.device)
        self._vectors, self._images = empty, empty
        self._projected = torch.zeros((0, 0), dtype=torch.float64, device=space.device)
        self._next: Tensor | None = None
        self._scale = 0.0  # the largest |Ritz value|
        # Once a random direction was put in, the basis is no Krylov space any more: what the next
        # product adds need not be what the wanted pairs lack, and their residuals lead on instead.
        self._mixed = False
        self._rotation = torch.zeros((0, 0), dtype=space.dtype, device=space.device)

    @property
    def scale(self) -> float:
        """The largest |Ritz value| of the last look."""
        return self._scale

    @property
    def _size(self) -> int:
        return self._projected.shape[-1]

    def solve(self, count: int, *, tolerance: float, max_products: int | None = None) -> RitzPairs:
        """Find the largest eigenpairs, going on from what an earlier call has left.

        Args:
            count: Number of pairs, at most n.
            tolerance: Bound for each residual, relative to the largest |λ| found.
            max_products: Columns that may be multiplied in all; None for no limit.

        Returns:
            The pairs. Memory: two blocks of n × (3 count + 8 block_size + 60).

        Raises:
            UnsupportedOperationError: If the products show that the operator is not symmetric.
        """
        size = self._space.size
        length = min(size, 3 * count + 8 * self._block + 60)
        blocks, guard = 0, None
        while True:
            left = float("inf") if max_products is None else max_products - self.products
            if self._size >= size or left <= 0 and self._size >= count:
                return self._pairs(count, tolerance, believed=self._size >= size)
            if self._size + self._block > length < size:
                self._restart(count)
                guard = None
            self._extend(int(min(left, size - self._size)))
            blocks += 1
            if self._size <= count or blocks % _STRIDE and guard is None and self._next is not None:
                continue
            pairs = self._pairs(count, tolerance, believed=False)
            unmet = pairs.residuals > tolerance * self._scale
            if bool(unmet.any()):
                guard = None
                if self._mixed:
                    self._next = self._orthogonal(self._outside(pairs)[:, unmet][:, : self._block])
            elif guard is None:
                if self._size + max(_MOST_GUARD, _LEAST_GUARD * self._block) > length < size:
                    self._restart(count)
                guard, self._next = _Guard(self._size, float(pairs.values.sum())), None
            elif self._is_complete(guard, pairs, tolerance):
                return self._pairs(count, tolerance, believed=True)

    def _is_complete(self, guard: _Guard, pairs: RitzPairs, tolerance: float) -> bool:
        """Whether the directions since the guard began hold no eigenvalue that belongs to the wanted."""
        # They span a Krylov space of K in the complement of the basis as it was. Its largest Ritz value
        # plus that value's residual has to stay below the last wanted value, or enough columns have passed.
        steps = self._size - guard.start
        slack = tolerance * self._scale
        values, rotation = torch.linalg.eigh(self._projected[guard.start :, guard.start :])
        if float(pairs.values.sum()) - guard.total > len(pairs.values) * slack:
            guard.restart(self._size, float(pairs.values.sum()))  # it found one: look again
            self._next = None
            return False
        if self._next is None:
            return steps >= 1
        turn = rotation[:, -1:].to(self._space.dtype)
        outside = self._images[:, guard.start :] @ turn - self._vectors[:, guard.start :] @ (
            turn * values[-1].to(turn.dtype)
        )
        residual = float(self._space.sum_squares(outside).sqrt())
        least = _LEAST_GUARD * self._block
        enough = steps >= least and float(values[-1]) + residual <= float(pairs.values[-1]) + slack
        return enough or steps >= max(_MOST_GUARD, least)

    # the basis

    def _extend(self, most: int) -> None:
        """Multiply one more block and find the next directions."""
        self._mixed = self._mixed or (self._next is None and self._size > 0)
        fresh = self._next if self._next is not None else self._random(self._block)
        fresh = fresh[:, :most]
        images = self._multiply(fresh)
        self.products += fresh.shape[-1]
        self._vectors = torch.cat([self._vectors, fresh], dim=-1)
        self._images = torch.cat([self._images, images], dim=-1)
        self._project(images)
        self._next = self._orthogonal(images)
        if self._report is not None:
            self._report(fresh.shape[-1])

    def _project(self, images: Tensor) -> None:
        """Add rows and columns of Vᵀ K V; its two triangles tell whether K is symmetric."""
        block = images.shape[-1]
        columns = self._space.inner(self._vectors, images)  # (m, b)
        rows = self._space.inner(self._vectors[:, -block:], self._images)  # (b, m)
        gap = float((columns - rows.mT).abs().max())
        size = self._size + block
        grown = torch.zeros((size, size), dtype=torch.float64, device=columns.device)
        grown[: self._size, : self._size] = self._projected
        mean = (columns + rows.mT) / 2  # (m, b)
        mean[-block:] = (mean[-block:] + mean[-block:].mT) / 2
        grown[:, -block:], grown[-block:, :] = mean, mean.mT
        self._projected = grown
        largest = float(self._space.sum_squares(self._images).max().sqrt())
        if gap > torch.finfo(self._space.dtype).eps ** 0.5 * largest:
            raise UnsupportedOperationError(
                f"the operator is not symmetric: uᵀ(K v) and vᵀ(K u) differ by {gap:.2g} where |K v| is "
                f"up to {largest:.2g}; take the symmetric part, or the singular values of K"
            )

    def _orthogonal(self, block: Tensor) -> Tensor | None:
        """Return orthonormal directions that a block adds to the basis, or None."""
        before = self._space.sum_squares(block).sqrt()
        block = self._project_out(block)
        cutoff = 1e2 * torch.finfo(block.dtype).eps * before
        block = block[:, self._space.sum_squares(block).sqrt() > cutoff]
        if not block.shape[-1]:
            return None
        # The factorisation magnifies what the projection left; the second one removes that too.
        turned = self._project_out(self._space.orthonormalize(block))
        return self._space.orthonormalize(turned)

    def _project_out(self, block: Tensor) -> Tensor:
        for _ in range(2):
            block = block - self._vectors @ self._space.inner(self._vectors, block).to(block.dtype)
        return block

    def _random(self, count: int) -> Tensor:
        """Return random directions outside the basis."""
        count = min(count, self._space.size - self._size)
        while True:
            found = self._orthogonal(self._space.probes(count, self._generator, "gaussian"))
            if found is not None:
                return found

    def _ritz(self, count: int) -> tuple[Tensor, Tensor]:
        values, rotation = torch.linalg.eigh(self._projected)
        self._scale = float(values.abs().max())
        return values.flip(0)[:count], rotation.flip(1)[:, :count].to(self._space.dtype)

    def _pairs(self, count: int, tolerance: float, *, believed: bool) -> RitzPairs:
        values, rotation = self._ritz(count)
        self._rotation = rotation
        vectors = self._vectors @ rotation
        outside = self._images @ rotation - vectors * values.to(vectors.dtype)
        residuals = self._space.sum_squares(outside).sqrt()
        met = bool((residuals <= tolerance * self._scale).all()) or self._size >= self._space.size
        converged = self._space.any(believed and met)
        return RitzPairs(values, vectors, residuals, converged, self.products)

    def _outside(self, pairs: RitzPairs) -> Tensor:
        """Return K v - λ v of the pairs that were just found."""
        return self._images @ self._rotation - pairs.vectors * pairs.values.to(pairs.vectors.dtype)

    def _restart(self, count: int) -> None:
        """Keep the best Ritz vectors alone; their products follow, and the next direction still fits."""
        # Ritz vectors beyond the wanted ones keep what is known next to them, on which convergence of the
        # last of them hangs.
        kept = min(self._size, count + max(8, count // 2))
        values, rotation = self._ritz(kept)
        # K (V S) = (K V) S: products turn along with the basis, and none is repeated.
        self._vectors, self._images = self._vectors @ rotation, self._images @ rotation
        self._projected = torch.diag(values)


@dataclass
class _Guard:
    """Where the search for hidden eigenvalues began, and the sum of the values that were found then."""

    start: int
    total: float

    def restart(self, start: int, total: float) -> None:
        """Begin again."""
        self.start, self.total = start, total
