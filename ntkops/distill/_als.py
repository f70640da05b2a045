"""One set of combinations for all classes, fitted to all their labels by turns."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from linear_operator.operators import LinearOperator
from torch import Tensor

from ..operators.capabilities import capabilities, multiply
from ..solvers import rpcholesky
from ..vectors import Space
from ._kernels import columns_of, diagonal_of
from .class_mean import class_mean

__all__ = ["Alternation", "alternate"]

_STEPS = 20  # conjugate gradient steps on U in a round, at most
_ROUNDS = 60
_REDUCTION = 1e-2  # of the gradient in a round: b moves on anyway
_RANK = 200  # of the factor that preconditions

Inverse = Callable[[Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class Alternation:
    """What the turns came to.

    Attributes:
        U: ``(m, s)`` orthonormal columns.
        objectives: The objective at the start and after each round, relative to |Y|², as it was computed.
            Where the last one is a rise, U is that of the one before.
        converged: Whether the last round lowered it by less than the tolerance.
    """

    U: Tensor
    objectives: list[float]
    converged: bool


def alternate(
    kernels: LinearOperator,
    labels: Tensor,
    start: Tensor,
    ridge: float,
    generator: torch.Generator,
    *,
    tolerance: float = 1e-3,
) -> Alternation:
    r"""Minimise :math:`\sum_c |y^c - K^c U b^c|^2 + r\, b^{cT} U^T K^c U b^c` over U and all b.

    By turns: all b, exactly, from s × s systems; then U, by conjugate gradients on its normal equations,
    from where it is. Both lower the objective. Products with the class kernels, their diagonals and some
    columns of their mean are all that is needed. The minimum that is found is a local one.

    Args:
        kernels: ``(C, m, m)``.
        labels: ``(m, C)``, float64.
        start: ``(m, s)`` U to begin with, s < C.
        ridge: Absolute r.
        generator: Source of the preconditioner's pivots.
        tolerance: Relative fall of the objective in a round at which it ends.

    Returns:
        `Alternation`. Cost: up to 40 + s products with all class kernels a round.
    """
    turns = _Turns(kernels, labels, ridge, generator)
    U = turns.space.orthonormalize(start)
    weights, value = turns.weights(U)
    objectives = [value]
    for _ in range(_ROUNDS):
        moved = turns.space.orthonormalize(turns.descend(U, weights))
        new, value = turns.weights(moved)
        before = objectives[-1]
        objectives.append(value)
        if value > before:  # rounding: what was there is kept, and a larger rise is no convergence
            return Alternation(U, objectives, value - before <= tolerance * before)
        U, weights = moved, new
        if before - value <= tolerance * before:
            return Alternation(U, objectives, True)
    return Alternation(U, objectives, False)


class _Turns:
    """The two turns, on kernels divided by their mean diagonal and labels of length 1."""

    def __init__(
        self, kernels: LinearOperator, labels: Tensor, ridge: float, generator: torch.Generator
    ) -> None:
        mean = class_mean(kernels)
        diagonal = diagonal_of(mean)
        self._kernels, self._scale = kernels, float(diagonal.mean())
        self.space: Space = capabilities(kernels).space
        self._ridge = ridge / self._scale
        length = float(labels.square().sum()) ** 0.5
        self._rhs = (labels / (length or 1.0)).mT.unsqueeze(-1)  # (C, m, 1)
        self._inverse = _preconditioner(mean, diagonal, self._scale, self._ridge, generator)

    def _multiply(self, columns: Tensor) -> Tensor:
        # Dividing first keeps products of kernels of any scale within the range of their dtype.
        return multiply(self._kernels, (columns / self._scale).contiguous())

    def weights(self, U: Tensor) -> tuple[Tensor, float]:
        """Return the best b as ``(s, C)``, and the objective, both float64."""
        wide = U.expand(self._kernels.shape[0], *U.shape)
        images = self._multiply(wide)  # (C, m, s)
        small = self.space.inner(wide, images)  # (C, s, s)
        small = (small + small.mT) / 2
        normal = self.space.inner(images, images) + self._ridge * small
        values, vectors = torch.linalg.eigh(normal)
        noise = normal.shape[-1] * torch.finfo(torch.float64).eps * values.amax(-1, keepdim=True)
        inverse = torch.where(values > noise, 1 / values.clamp(min=noise), torch.zeros_like(values))
        right = self.space.inner(images, self._rhs)
        b = vectors @ (inverse.unsqueeze(-1) * (vectors.mT @ right))  # (C, s, 1)
        rest = self._rhs - images.double() @ b
        value = self.space.sum_squares(rest).sum() + self._ridge * (b * (small @ b)).sum()
        return b.squeeze(-1).mT, float(value)

    def descend(self, U: Tensor, weights: Tensor) -> Tensor:
        """Return a better U for given b, ``(s, C)``, by preconditioned conjugate gradients."""
        # In the basis of U where Σ_c b bᵀ = 1 the normal equations are as well conditioned as can be.
        left, singular, right = torch.linalg.svd(weights, full_matrices=False)
        kept = singular > 1e-12 * singular[0]
        U, b = U @ (left * singular)[:, kept].to(U.dtype), right[kept].to(U.dtype)

        def combined(block: Tensor) -> Tensor:
            return (block @ b).mT.unsqueeze(-1)  # (C, m, 1): V b^c

        def pull(columns: Tensor) -> Tensor:
            return self._multiply(columns.to(U.dtype)).squeeze(-1).mT @ b.mT  # (m, s): Σ_c K^c x^c b^cᵀ

        spread, images = combined(U), self._multiply(combined(U))
        residual = pull(self._rhs - images.double() - self._ridge * spread.double())
        turned = self._inverse(residual)
        direction, size = turned, self._dot(residual, turned)
        goal = _REDUCTION**2 * size
        for _ in range(_STEPS):
            if not size > goal:
                break
            spread = combined(direction)
            images = self._multiply(spread)
            # V -> K (K + r) V b bᵀ has the quadratic form |K V b|² + r <V b, K V b>.
            curvature = self._dot(images, images) + self._ridge * self._dot(spread, images)
            if not curvature > 0:
                break
            step = size / curvature
            U = U + step * direction
            residual = residual - step * pull(images + self._ridge * spread)
            turned = self._inverse(residual)
            new = self._dot(residual, turned)
            direction, size = turned + (new / size) * direction, new
        return U

    def _dot(self, first: Tensor, second: Tensor) -> float:
        return float(self.space.inner(first, second).diagonal(dim1=-2, dim2=-1).sum())


def _preconditioner(
    mean: LinearOperator, diagonal: Tensor, scale: float, ridge: float, generator: torch.Generator
) -> Inverse:
    """Return an approximate inverse of K (K + r) for the mean kernel K, divided by its scale."""
    space, dtype = capabilities(mean).space, mean.dtype
    found = rpcholesky(
        lambda chosen: columns_of(mean, chosen) / scale,
        (diagonal / scale).to(dtype),
        min(_RANK, len(diagonal)),
        block_size=25,
        generator=generator,
    )
    values, vectors = torch.linalg.eigh(space.inner(found.factor, found.factor))
    used = values > 10 * torch.finfo(dtype).eps * len(diagonal) * values[-1]
    values, vectors = values[used], vectors[:, used]
    basis = (found.factor.double() @ (vectors * values.rsqrt())).to(dtype)  # (m, r)
    rest = float(values[0] * (values[0] + ridge))
    inside = rest / (values * (values + ridge)) - 1

    def inverse(block: Tensor) -> Tensor:
        return block + basis @ (inside.unsqueeze(-1) * space.inner(basis, block)).to(dtype)

    return inverse
