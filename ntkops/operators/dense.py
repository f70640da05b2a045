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

from ..errors import DenseMemoryError, NotConvergedError, ShapeError, SingularKernelError
from .expression import Expression
from .rounding import ends, require_resolved, symmetric

__all__ = ["DenseFallbacks"]


class DenseFallbacks(Expression):
    """Factorisations, solves and functions of a matrix through the guarded dense matrix."""

    # One checked way for whatever inverts: factors are made in float64, of a matrix whose eigenvalues are
    # above its rounding, and solutions meet their tolerance on the residual of this matrix.

    def _tolerance(self) -> float:
        """Relative residual asked of a solve."""
        return 1e-6

    def _least_ridge(self) -> float:
        """Smallest entry of a diagonal that was added; 0 where none was."""
        return 0.0

    def _square(self) -> Tensor:
        """Return the dense matrix in float64, square and symmetric."""
        if self.shape[-1] != self.shape[-2]:
            raise ShapeError(
                f"a {self.shape[-2]} x {self.shape[-1]} operator has no inverse or Cholesky factor"
            )
        return symmetric(self.to_dense().double())

    def _factor(self, matrix: Tensor | None = None) -> Tensor:
        """Return the lower Cholesky factor in float64, without any hidden jitter."""
        matrix = self._square() if matrix is None else matrix
        factor, info = torch.linalg.cholesky_ex(matrix)
        ridge, size = self._least_ridge(), self.shape[-1]
        with torch.no_grad():
            if bool((info > 0).any()):
                values = torch.linalg.eigvalsh(matrix)
                self._require_resolved(values[..., 0], values[..., -1])
                raise SingularKernelError(
                    f"the {size} x {size} kernel is numerically singular (Cholesky stops at row "
                    f"{int(info.max())}); add a ridge with K.add_jitter(ridge), larger than {ridge:.2g}"
                )
            self._require_resolved(*ends(matrix, factor))
        return factor

    def _require_resolved(self, least: Tensor, largest: Tensor) -> None:
        ridge = self._least_ridge()
        way_out = "add a ridge with K.add_jitter(ridge)"
        require_resolved(least - ridge, largest, ridge, self.dtype, self.shape[-1], way_out=way_out)

    def _solved(self, right: Tensor) -> Tensor:
        """Return K⁻¹ B in float64, ``(*batch, n, k)``, its residual checked."""
        matrix = self._square()
        solution = torch.cholesky_solve(right.double(), self._factor(matrix))
        self._require_solved(matrix, solution.detach(), right)
        return solution

    def _require_solved(self, matrix: Tensor, solution: Tensor, right: Tensor) -> None:
        rest = torch.linalg.vector_norm(right.detach().double() - matrix.detach() @ solution, dim=-2)
        norms = torch.linalg.vector_norm(right.detach().double(), dim=-2)
        worst = float(torch.where(norms > 0, rest / norms, 0.0).max())
        if not worst <= self._tolerance():
            raise NotConvergedError(
                f"the Cholesky solution has a relative residual of {worst:.2g}, the tolerance is "
                f"{self._tolerance():.2g}: the matrix is too badly conditioned for float64; use a larger "
                "ridge, or a larger tolerance (K.add_jitter(ridge).with_solver(tolerance=...)); the solution "
                "is in .result",
                solution,
            )

    def _cholesky(self, upper: bool = False) -> TriangularLinearOperator:
        factor = self._factor().to(self.dtype)
        return TriangularLinearOperator(factor.mT if upper else factor, upper=upper)

    def _solve(self, rhs: Tensor, preconditioner: Any = None, num_tridiag: int = 0) -> Tensor:
        return self._solved(rhs).to(self.dtype)

    def solve(self, right_tensor: Tensor, left_tensor: Tensor | None = None) -> Tensor:
        """Solve K x = b, or return L K⁻¹ b, by a dense Cholesky factorisation in float64.

        Args:
            right_tensor: ``(n,)`` or ``(*batch, n, k)``.
            left_tensor: ``(*batch, m, n)``, or None.

        Returns:
            ``(n,)``, ``(*batch, n, k)`` or ``(*batch, m, k)``, rounded to the operator's dtype.

        Raises:
            DenseMemoryError: If the dense matrix exceeds ``max_dense_bytes``.
            InputError: If the matrix is not symmetric.
            SingularKernelError: If it is singular, or its smallest eigenvalue is lost in its rounding.
            NotConvergedError: If a column misses its tolerance.
        """
        vector = right_tensor.dim() == 1
        solution = self._solved(right_tensor.unsqueeze(-1) if vector else right_tensor)
        if left_tensor is not None:
            solution = left_tensor.double() @ solution
        return (solution.squeeze(-1) if vector else solution).to(self.dtype)

    def inv_quad(self, inv_quad_rhs: Tensor, reduce_inv_quad: bool = True) -> Tensor:
        """Return bᵀ K⁻¹ b for each column, summed over columns by default."""
        return self.inv_quad_logdet(inv_quad_rhs, logdet=False, reduce_inv_quad=reduce_inv_quad)[0]

    def inv_quad_logdet(
        self, inv_quad_rhs: Tensor | None = None, logdet: bool | None = False, reduce_inv_quad: bool = True
    ) -> tuple[Tensor, Tensor]:
        """Return bᵀ K⁻¹ b and log det K, both exact, from one Cholesky factor."""
        matrix = self._square()
        factor = self._factor(matrix)
        quadratic = factor.new_zeros(self.batch_shape)
        if inv_quad_rhs is not None:
            right = (inv_quad_rhs.unsqueeze(-1) if inv_quad_rhs.dim() == 1 else inv_quad_rhs).double()
            half = torch.linalg.solve_triangular(factor, right, upper=False)
            self._require_solved(matrix, torch.cholesky_solve(right, factor).detach(), right)
            quadratic = half.square().sum(-2)
            quadratic = quadratic.sum(-1) if reduce_inv_quad else quadratic
        determinant = factor.new_zeros(self.batch_shape)
        if logdet:
            determinant = 2 * factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        return quadratic.to(self.dtype), determinant.to(self.dtype)

    def logdet(self) -> Tensor:
        """Return log det K, exact."""
        return self.inv_quad_logdet(logdet=True)[1]

    def sqrt_inv_matmul(self, rhs: Tensor, lhs: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        """Return K^{-1/2} R, or L K^{-1/2} R with the diagonal of L K⁻¹ Lᵀ, by an eigendecomposition."""
        values, vectors = torch.linalg.eigh(self._square())
        with torch.no_grad():
            self._require_resolved(values[..., 0], values[..., -1])
        right = (rhs.unsqueeze(-1) if rhs.dim() == 1 else rhs).double()
        result = vectors @ (values.rsqrt().unsqueeze(-1) * (vectors.mT @ right))
        if lhs is None:
            return (result.squeeze(-1) if rhs.dim() == 1 else result).to(self.dtype)
        rotated = lhs.double() @ vectors
        product = lhs.double() @ result
        return (
            (product.squeeze(-1) if rhs.dim() == 1 else product).to(self.dtype),
            (rotated.square() / values.unsqueeze(-2)).sum(-1).to(self.dtype),
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
