"""Factorisations of K + ridge: dual coefficients, residuals left out, and quadratic forms from each.

All of them are dense, in float64, and carry the batch of the kernels in front.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from ..errors import SingularKernelError
from ..operators.rounding import ends, require_resolved, resolved
from ..vectors import rank_cutoff

__all__ = ["CholeskyFactor", "Factorization", "SpectralFactor", "require_regular", "truncate"]


class Factorization(Protocol):
    """What a dense factorisation of A = K + ridge offers.

    Attributes:
        remainder_norm: Largest eigenvalue of the M of `remainder`, of the batch shape.
    """

    remainder_norm: Tensor

    def dual(self, rhs: Tensor) -> Tensor:
        """Return A⁻¹ Y, ``(*batch, n, k)``."""

    def within(self, rhs: Tensor) -> Tensor:
        """Return the part of A⁻¹ Y that predicts: that in the range of K, as far as it is used."""

    def energy(self, rhs: Tensor) -> float:
        """Return yᵀ A⁻¹ y, summed over batch and targets."""

    def remainder(self, rhs: Tensor) -> Tensor:
        """Return M Y, ``(*batch, n, k)``, for a multiple M of I - H, where H Y are the fitted values."""

    def remainder_blocks(self, group: int) -> Tensor:
        """Return the diagonal blocks of M, ``(*batch, n / group, group, group)``."""

    def quadratic(self, rows: Tensor) -> Tensor:
        """Return k A⁻¹ kᵀ for each row k of ``(*batch, m, n)``: ``(*batch, m)``."""


class CholeskyFactor:
    """A = L Lᵀ.

    Args:
        matrix: ``(*batch, n, n)`` kernel, float64; it is not changed.
        ridge: Absolute ridge.
        dtype: Dtype in which the kernel was computed, which says how far its entries are rounded.
        scale: What a relative ridge is relative to, or None.

    Attributes:
        largest: Largest eigenvalue of K, up to some per cent, of the batch shape.
        remainder_norm: As `Factorization.remainder_norm`, up to some per cent.

    Raises:
        SingularKernelError: If K + ridge is numerically singular or indefinite.
    """

    def __init__(self, matrix: Tensor, ridge: float, dtype: torch.dtype, scale: float | None) -> None:
        shifted = matrix.clone()
        shifted.diagonal(dim1=-2, dim2=-1).add_(ridge)
        factor, info = torch.linalg.cholesky_ex(shifted)
        failed = bool((info > 0).any())
        if not failed:
            least, largest = (end - ridge for end in ends(shifted, factor))
            failed = not resolved(least, largest, ridge, dtype, matrix.shape[-1])
        if failed:
            values = torch.linalg.eigvalsh(matrix)
            require_regular(values, ridge, dtype, scale)
            if bool((info > 0).any()):
                raise SingularKernelError(
                    f"K + {ridge:.2g} has no Cholesky factor: its smallest eigenvalue is rounding; raise the "
                    "ridge"
                )
            least, largest = values.amin(-1), values.amax(-1)
        self._factor, self.largest, self.remainder_norm = factor, largest, 1 / (least + ridge)

    def dual(self, rhs: Tensor) -> Tensor:
        return torch.cholesky_solve(rhs, self._factor)

    def within(self, rhs: Tensor) -> Tensor:
        return self.dual(rhs)

    def energy(self, rhs: Tensor) -> float:
        return float(torch.linalg.solve_triangular(self._factor, rhs, upper=False).square().sum())

    def remainder(self, rhs: Tensor) -> Tensor:
        return self.dual(rhs)  # M = A⁻¹ = (I - H) / ridge, which has a meaning at ridge 0 too

    def remainder_blocks(self, group: int) -> Tensor:
        size = self._factor.shape[-1]
        identity = torch.eye(size, dtype=self._factor.dtype, device=self._factor.device)
        half = torch.linalg.solve_triangular(self._factor, identity, upper=False)  # A⁻¹ = halfᵀ half
        columns = half.unflatten(-1, (size // group, group))
        return torch.einsum("...jag,...jah->...agh", columns, columns)

    def quadratic(self, rows: Tensor) -> Tensor:
        return torch.linalg.solve_triangular(self._factor, rows.mT, upper=False).square().sum(-2)


class SpectralFactor:
    """Eigenpairs of K, all of them or some, with what is known of the rest.

    Args:
        values: ``(*batch, r)`` eigenvalues.
        vectors: ``(*batch, n, r)`` orthonormal eigenvectors.
        ridge: Absolute ridge.
        rest: What K does outside their span: "none" (they are a basis), "cut" (the span is all that may
            be used: spectral cut-off), or "zero" (K is zero there: thin factors of features).
        kept: ``(*batch, r)`` pairs in use; None for all.

    Attributes:
        largest: Largest eigenvalue, of the batch shape.
        remainder_norm: As `Factorization.remainder_norm`.
    """

    def __init__(
        self, values: Tensor, vectors: Tensor, ridge: float, rest: str = "none", kept: Tensor | None = None
    ) -> None:
        self.values, self.vectors, self.ridge, self.rest = values, vectors, ridge, rest
        self.largest = values.amax(-1)
        self.kept = torch.ones_like(values, dtype=torch.bool) if kept is None else kept
        # (*batch, r): the inverse on the span
        self.inverse = torch.where(self.kept, 1 / (values + ridge), torch.zeros_like(values))
        self.remainder_norm = self.inverse.amax(-1) if rest == "none" else torch.ones_like(self.largest)

    @property
    def size(self) -> int:
        """Number n of rows."""
        return self.vectors.shape[-2]

    def components(self, rhs: Tensor) -> Tensor:
        """Return Y along the eigenvectors, ``(*batch, r, k)``."""
        return self.vectors.mT @ rhs

    def combined(self, components: Tensor) -> Tensor:
        """Return the combinations of eigenvectors with these components, ``(*batch, n, k)``."""
        return self.vectors @ components

    def _apply(self, weights: Tensor, rhs: Tensor) -> Tensor:
        return self.combined(weights.unsqueeze(-1) * self.components(rhs))

    def within(self, rhs: Tensor) -> Tensor:
        """Return A⁻¹ on the span of the eigenvectors: the part of the dual that predicts."""
        return self._apply(self.inverse, rhs)

    def dual(self, rhs: Tensor) -> Tensor:
        return self.remainder(rhs) / self.ridge if self.rest == "zero" else self.within(rhs)

    def energy(self, rhs: Tensor) -> float:
        components = torch.where(self.kept.unsqueeze(-1), self.components(rhs), 0.0)
        found = (components.square() * self.inverse.unsqueeze(-1)).sum()
        if self.rest == "zero":  # squares: yᵀ (A⁻¹ y) would lose what lies in the span to cancellation
            found = found + (rhs - self.combined(components)).square().sum() / self.ridge
        return float(found)

    def remainder(self, rhs: Tensor) -> Tensor:
        if self.rest == "none":
            return self.within(rhs)
        return rhs - self._apply(self.values * self.inverse, rhs)

    def remainder_blocks(self, group: int) -> Tensor:
        weights = self.inverse if self.rest == "none" else self.values * self.inverse
        rows = self.vectors.unflatten(-2, (self.vectors.shape[-2] // group, group))  # (*batch, N, g, r)
        blocks = (rows * weights[..., None, None, :]) @ rows.mT
        if self.rest == "none":
            return blocks
        return torch.eye(group, dtype=blocks.dtype, device=blocks.device) - blocks

    def quadratic(self, rows: Tensor) -> Tensor:
        return ((rows @ self.vectors).square() @ self.inverse.unsqueeze(-1)).squeeze(-1)


def truncate(values: Tensor, cutoff: int | float | None) -> Tensor | None:
    """Return which eigenvalues, ascending ``(*batch, n)``, a spectral cut-off keeps.

    Args:
        values: Eigenvalues in ascending order.
        cutoff: Their number, or the share ε of the trace that may be lost; None for all.
    """
    if cutoff is None:
        return None
    size = values.shape[-1]
    if isinstance(cutoff, int):
        rank = torch.full(values.shape[:-1], cutoff, device=values.device)
    else:
        descending = values.flip(-1).clamp(min=0)
        captured = descending.cumsum(-1) / descending.sum(-1, keepdim=True)
        rank = ((captured < 1 - cutoff).sum(-1) + 1).clamp(max=size)
    return torch.arange(size, device=values.device) >= size - rank.unsqueeze(-1)


def require_regular(
    values: Tensor, ridge: float, dtype: torch.dtype, scale: float | None, kept: Tensor | None = None
) -> None:
    """Raise unless K + ridge is regular beside the rounding of K, on the span that is used.

    Args:
        values: ``(*batch, n)`` eigenvalues of K.
        ridge: Absolute ridge.
        dtype: Dtype in which K was computed.
        scale: What a relative ridge is relative to, or None.
        kept: ``(*batch, n)`` eigenvalues that a cut-off keeps; None for all.

    Raises:
        SingularKernelError: With the rank, and the ways out; see `ntkops.operators.rounding`.
    """
    size, largest = values.shape[-1], values.amax(-1)
    used = values if kept is None else torch.where(kept, values, torch.inf)
    rank = (values > rank_cutoff(size, dtype) * largest.unsqueeze(-1)).sum(-1)
    require_resolved(
        used.amin(-1),
        largest,
        ridge,
        dtype,
        size,
        scale=scale,
        kept=None if kept is None else int(kept.sum(-1).max()),
        rank=rank,
    )
