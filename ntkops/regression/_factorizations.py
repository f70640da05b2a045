"""Factorisations of K + ridge: dual coefficients, residuals left out, and quadratic forms from each.

All of them are dense, in float64, and carry the batch of the kernels in front.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from ..errors import SingularKernelError

__all__ = ["CholeskyFactor", "Factorization", "SpectralFactor", "require_regular", "truncate"]


class Factorization(Protocol):
    """What a dense factorisation of A = K + ridge offers."""

    def dual(self, rhs: Tensor) -> Tensor:
        """Return A⁻¹ Y, ``(*batch, n, k)``."""

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

    Raises:
        SingularKernelError: If K + ridge is numerically singular or indefinite.
    """

    def __init__(self, matrix: Tensor, ridge: float, dtype: torch.dtype) -> None:
        shifted = matrix.clone()
        shifted.diagonal(dim1=-2, dim2=-1).add_(ridge)
        factor, info = torch.linalg.cholesky_ex(shifted)
        if bool((info > 0).any()):
            require_regular(torch.linalg.eigvalsh(matrix), ridge, dtype, failed=True)
        pivots = factor.diagonal(dim1=-2, dim2=-1).square()
        limit = _limit(ridge, matrix.shape[-1], dtype) * shifted.diagonal(dim1=-2, dim2=-1).amax(-1)
        if bool((pivots.amin(-1) <= limit).any()):
            require_regular(torch.linalg.eigvalsh(matrix), ridge, dtype, failed=True)
        self._factor = factor

    def dual(self, rhs: Tensor) -> Tensor:
        return torch.cholesky_solve(rhs, self._factor)

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
    """

    def __init__(
        self, values: Tensor, vectors: Tensor, ridge: float, rest: str = "none", kept: Tensor | None = None
    ) -> None:
        self.values, self.vectors, self.ridge, self.rest = values, vectors, ridge, rest
        self.kept = torch.ones_like(values, dtype=torch.bool) if kept is None else kept
        # (*batch, r): the inverse on the span
        self.inverse = torch.where(self.kept, 1 / (values + ridge), torch.zeros_like(values))

    def _apply(self, weights: Tensor, rhs: Tensor) -> Tensor:
        return self.vectors @ (weights.unsqueeze(-1) * (self.vectors.mT @ rhs))

    def within(self, rhs: Tensor) -> Tensor:
        """Return A⁻¹ on the span of the eigenvectors: the part of the dual that predicts."""
        return self._apply(self.inverse, rhs)

    def dual(self, rhs: Tensor) -> Tensor:
        return self.remainder(rhs) / self.ridge if self.rest == "zero" else self.within(rhs)

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


def _limit(ridge: float, size: int, dtype: torch.dtype) -> float:
    """Return the largest eigenvalue, relative to the largest of all, that counts as a rounding error."""
    # A rank is decided at n eps. With a ridge the matrix is regular by construction, and only a ridge that
    # is lost in the rounding of the largest eigenvalue is refused.
    eps = torch.finfo(dtype).eps
    return size * eps if ridge == 0 else eps


def require_regular(
    values: Tensor, ridge: float, dtype: torch.dtype, kept: Tensor | None = None, *, failed: bool = False
) -> None:
    """Raise unless K + ridge is numerically positive definite, on the span that is used.

    Args:
        values: ``(*batch, n)`` eigenvalues of K.
        ridge: Absolute ridge.
        dtype: Dtype in which K was computed.
        kept: ``(*batch, n)`` eigenvalues that a cut-off keeps; None for all.
        failed: Whether a factorisation has failed already.

    Raises:
        SingularKernelError: With the rank, and the ways out.
    """
    size, largest = values.shape[-1], values.amax(-1)
    used = values if kept is None else torch.where(kept, values, torch.inf)
    smallest = used.amin(-1)
    if not failed and bool((smallest + ridge > _limit(ridge, size, dtype) * largest).all()):
        return
    worst = int((smallest / largest.clamp(min=torch.finfo(torch.float64).tiny)).argmin())
    low, high = float(smallest.reshape(-1)[worst]), float(largest.reshape(-1)[worst])
    spectrum = values.reshape(-1, size)[worst]
    rank = int((spectrum > size * torch.finfo(dtype).eps * high).sum())
    if ridge == 0 and kept is not None:
        raise SingularKernelError(
            f"the cut-off keeps eigenvalues that are rounding errors; keep at most {rank}, or add a ridge"
        )
    if ridge == 0:
        raise SingularKernelError(
            f"the kernel is rank-deficient (rank {rank} of {size}, smallest eigenvalue {low:.2g}, largest "
            f"{high:.2g}), so without a ridge it has no inverse: pass ridge=1e-6 or more, or "
            f"cutoff={rank} for the pseudo-inverse"
        )
    raise SingularKernelError(
        f"the ridge {ridge:.2g} is below the rounding of this {dtype} kernel (smallest eigenvalue {low:.2g}, "
        f"largest {high:.2g}): pass a ridge well above {abs(low):.2g}, or compute the kernel in float64 "
        "(model.double(), inputs too)"
    )
