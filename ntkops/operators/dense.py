"""Operations that need the dense matrix: exact inside ``max_dense_bytes``, refused above it.

linear_operator answers these above 800 rows by loosely converged iterations (a solve with a residual
of 0.8, a root decomposition cut at rank 100) without a word. Here each of them goes through the
guarded dense matrix, differentiably, and raises where that does not fit.
"""

from __future__ import annotations

from typing import Any

import torch
from linear_operator.operators import (
    DenseLinearOperator,
    LinearOperator,
    TriangularLinearOperator,
    to_dense,
)
from torch import Tensor

from ..errors import DenseMemoryError, ShapeError, SingularKernelError
from .expression import Expression

__all__ = ["DenseFallbacks"]


class DenseFallbacks(Expression):
    """Factorisations, solves and functions of a matrix through the guarded dense matrix."""

    def _factor(self) -> Tensor:
        """Return the lower Cholesky factor, without any hidden jitter."""
        if self.shape[-1] != self.shape[-2]:
            raise ShapeError(
                f"a {self.shape[-2]} x {self.shape[-1]} operator has no inverse or Cholesky factor"
            )
        factor, info = torch.linalg.cholesky_ex(self.to_dense())
        if bool((info > 0).any()):
            raise SingularKernelError(
                f"the {self.shape[-2]} x {self.shape[-1]} kernel is numerically singular (Cholesky stops at "
                f"row {int(info.max())}); add a ridge with K.add_jitter(ridge)"
            )
        return factor

    def _cholesky(self, upper: bool = False) -> TriangularLinearOperator:
        factor = self._factor()
        return TriangularLinearOperator(factor.mT if upper else factor, upper=upper)

    def _solve(self, rhs: Tensor, preconditioner: Any = None, num_tridiag: int = 0) -> Tensor:
        return torch.cholesky_solve(rhs, self._factor())

    def solve(self, right_tensor: Tensor, left_tensor: Tensor | None = None) -> Tensor:
        """Solve K x = b, or return L K⁻¹ b, by a dense Cholesky factorisation.

        Args:
            right_tensor: ``(n,)`` or ``(*batch, n, k)``.
            left_tensor: ``(*batch, m, n)``, or None.

        Returns:
            ``(n,)``, ``(*batch, n, k)`` or ``(*batch, m, k)``.

        Raises:
            DenseMemoryError: If the dense matrix exceeds ``max_dense_bytes``.
            SingularKernelError: If the matrix is numerically singular.
        """
        factor = self._factor()
        vector = right_tensor.dim() == 1
        right = right_tensor.unsqueeze(-1) if vector else right_tensor
        solution = torch.cholesky_solve(right, factor)
        if left_tensor is not None:
            solution = left_tensor @ solution
        return solution.squeeze(-1) if vector else solution

    def inv_quad(self, inv_quad_rhs: Tensor, reduce_inv_quad: bool = True) -> Tensor:
        """Return bᵀ K⁻¹ b for each column, summed over columns by default."""
        return self.inv_quad_logdet(inv_quad_rhs, logdet=False, reduce_inv_quad=reduce_inv_quad)[0]

    def inv_quad_logdet(
        self, inv_quad_rhs: Tensor | None = None, logdet: bool | None = False, reduce_inv_quad: bool = True
    ) -> tuple[Tensor, Tensor]:
        """Return bᵀ K⁻¹ b and log det K, both exact, from one Cholesky factor."""
        factor = self._factor()
        quadratic = factor.new_zeros(self.batch_shape)
        if inv_quad_rhs is not None:
            right = inv_quad_rhs.unsqueeze(-1) if inv_quad_rhs.dim() == 1 else inv_quad_rhs
            half = torch.linalg.solve_triangular(factor, right, upper=False)
            quadratic = half.square().sum(-2)
            quadratic = quadratic.sum(-1) if reduce_inv_quad else quadratic
        determinant = factor.new_zeros(self.batch_shape)
        if logdet:
            determinant = 2 * factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        return quadratic, determinant

    def logdet(self) -> Tensor:
        """Return log det K, exact."""
        return self.inv_quad_logdet(logdet=True)[1]

    def sqrt_inv_matmul(self, rhs: Tensor, lhs: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        """Return K^{-1/2} R, or L K^{-1/2} R with the diagonal of L K⁻¹ Lᵀ, by an eigendecomposition."""
        values, vectors = torch.linalg.eigh(self.to_dense())
        if bool((values <= 0).any()):
            raise SingularKernelError(
                f"the smallest eigenvalue is {float(values.min()):.3g}: K has no inverse square root; add a "
                "ridge with K.add_jitter(ridge)"
            )
        right = rhs.unsqueeze(-1) if rhs.dim() == 1 else rhs
        result = vectors @ (values.rsqrt().unsqueeze(-1) * (vectors.mT @ right))
        if lhs is None:
            return result.squeeze(-1) if rhs.dim() == 1 else result
        rotated = lhs @ vectors
        product = lhs @ result
        return (
            product.squeeze(-1) if rhs.dim() == 1 else product,
            (rotated.square() / values.unsqueeze(-2)).sum(-1),
        )

    def _symeig(
        self, eigenvectors: bool = False, return_evals_as_lazy: bool | None = False
    ) -> tuple[Tensor, LinearOperator | None]:
        # In float64, and without clamping: a negative eigenvalue is a finding, not noise to hide.
        values, vectors = torch.linalg.eigh(self.to_dense().double())
        return values.to(self.dtype), DenseLinearOperator(vectors.to(self.dtype)) if eigenvectors else None

    def _svd(self) -> tuple[LinearOperator, Tensor, LinearOperator]:
        left, singular, right = torch.linalg.svd(self.to_dense(), full_matrices=False)
        return DenseLinearOperator(left), singular, DenseLinearOperator(right.mT)

    def _choose_root_method(self) -> str:
        return "cholesky"  # Lanczos roots lose all accuracy beyond their rank without a warning

    def diagonalization(self, method: str | None = None) -> tuple[Tensor, LinearOperator | None]:
        """Return eigenvalues and eigenvectors; dense by default, "lanczos" on request."""
        return super().diagonalization(method or "symeig")

    def _mul_matrix(self, other: Tensor | LinearOperator) -> LinearOperator:
        try:
            return DenseLinearOperator(self.to_dense() * to_dense(other))
        except DenseMemoryError as error:
            raise DenseMemoryError(
                f"the product of two operators, entry by entry, has no lazy form (K @ K2 has): {error}"
            ) from error

    def numpy(self) -> Any:
        """Return the dense matrix as a NumPy array."""
        return self.to_dense().detach().cpu().numpy()
