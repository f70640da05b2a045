"""Dense results: made by tiles, kept while they pay, refused above the limit.

linear_operator answers these above 800 rows by loosely converged iterations (a solve with a residual
of 0.8, a root decomposition cut at rank 100) without a word. Here each of them goes through the
guarded dense matrix, differentiably, and raises where that does not fit.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any, NoReturn

import torch
from linear_operator.operators import (
    DenseLinearOperator,
    LinearOperator,
    TriangularLinearOperator,
    to_dense,
)
from torch import Tensor

from ..engines import format_bytes, shared_store, tensor_bytes
from ..errors import DenseMemoryError, NotConvergedError, ShapeError, SingularKernelError
from ..solvers import products_are_steady
from .axes import StateAxis
from .expression import Expression
from .products import ProductOperator
from .rounding import ends, require_resolved, symmetric

__all__ = [
    "DenseFallbacks",
    "DenseOperator",
]

logger = logging.getLogger(__name__)

_MANY = 50  # columns that an iteration takes as a rule
# Passes that a dense block may take beside large factors for products, whose place it then takes.
_BESIDE_FACTORS = 1.5


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
        """Return the lower Cholesky factor in float64, without any jitter that was not asked for."""
        matrix = self._square() if matrix is None else matrix
        factor, info = torch.linalg.cholesky_ex(matrix)
        ridge, size = self._least_ridge(), self.shape[-1]
        with torch.no_grad():
            if bool((info > 0).any()):
                # It stops at rounding, or at a kernel that is indefinite: eigenvalues tell which.
                values = torch.linalg.eigvalsh(matrix)
                self._require_resolved(values[..., 0], values[..., -1])
                raise SingularKernelError(
                    f"the {size} x {size} kernel is numerically singular (Cholesky stops at row "
                    f"{int(info.max())}); add a ridge with K.add_jitter(ridge), larger than {ridge:.2g}"
                )
            self._require_resolved(*ends(matrix, factor))
        return factor

    def _require_resolved(self, least: Tensor, largest: Tensor) -> None:
        """Raise unless the least eigenvalue, ridge included, is above the rounding of K."""
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
        """Raise unless each column has a relative residual within the tolerance."""
        rest = torch.linalg.vector_norm(right.detach().double() - matrix.detach() @ solution, dim=-2)
        norms = torch.linalg.vector_norm(right.detach().double(), dim=-2)
        worst = float(torch.where(norms > 0, rest / norms, 0.0).max())  # of b = 0 the solution is 0, exactly
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
            half = torch.linalg.solve_triangular(factor, right, upper=False)  # bᵀ K⁻¹ b = |L⁻¹ b|²
            self._require_solved(matrix, torch.cholesky_solve(right, factor).detach(), right)
            quadratic = half.square().sum(-2)
            quadratic = quadratic.sum(-1) if reduce_inv_quad else quadratic
        determinant = factor.new_zeros(self.batch_shape)
        if logdet:
            # det K = det L · det Lᵀ = Π L_ii²
            determinant = 2 * factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        return quadratic.to(self.dtype), determinant.to(self.dtype)

    def logdet(self) -> Tensor:
        """Return log det K, exact; `ntkops.logdet` estimates it where the dense matrix has no room.

        Raises:
            DenseMemoryError: If the dense matrix exceeds ``max_dense_bytes``.
        """
        try:  # by this class's factor, whatever a subclass solves with
            return DenseFallbacks.inv_quad_logdet(self, logdet=True)[1]
        except DenseMemoryError as error:
            raise DenseMemoryError(
                f"logdet() is exact and needs every entry: {error}; ntkops.logdet estimates it with its error"
            ) from error

    def sqrt_inv_matmul(self, rhs: Tensor, lhs: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        """Return K^{-1/2} R, or L K^{-1/2} R with the diagonal of L K⁻¹ Lᵀ, by an eigendecomposition."""
        values, vectors = torch.linalg.eigh(self._square())
        with torch.no_grad():
            self._require_resolved(values[..., 0], values[..., -1])
        right = (rhs.unsqueeze(-1) if rhs.dim() == 1 else rhs).double()
        result = vectors @ (values.rsqrt().unsqueeze(-1) * (vectors.mT @ right))  # V Λ^{-1/2} Vᵀ R
        if lhs is None:
            return (result.squeeze(-1) if rhs.dim() == 1 else result).to(self.dtype)
        rotated = lhs.double() @ vectors
        product = lhs.double() @ result
        return (
            (product.squeeze(-1) if rhs.dim() == 1 else product).to(self.dtype),
            # diag(L V Λ⁻¹ Vᵀ Lᵀ), as linear_operator's own method returns it
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


# -- dense results: built block by block, kept where they pay, refused above the limit


class DenseOperator(DenseFallbacks, ProductOperator):
    """An operator that can be made dense, inside ``max_dense_bytes``."""

    # dense results

    def to_dense(self) -> Tensor:
        """Build the dense matrix block by block.

        Returns:
            ``(*batch, m, n)``. Cost: one per-sample pass for each output, or one product a column
            where that is cheaper; memory: the result and two tiles, never N·O × P for a kernel.

        Raises:
            DenseMemoryError: If the result exceeds ``max_dense_bytes``, before anything is allocated.
        """
        stored = self._stored_dense()
        if stored is not None and not self._is_recorded():
            return stored
        needed = tensor_bytes(self.shape, self.dtype)
        # A single row or column is no more than the result of a product, whatever the limit.
        if min(self.shape[-2:]) > 1 and needed > self._core.max_dense_bytes:
            self._refuse_dense(needed)
        self._check_fresh()
        if self._is_recorded():
            return self._dense_values(self._args)
        with torch.no_grad():
            dense = self._dense_values(self._args)
        self._store_dense(dense)
        return dense

    def materialize(self) -> Tensor:
        """Build the dense matrix; the same as `to_dense`."""
        return self.to_dense()

    def _refuse_dense(self, needed: int) -> NoReturn:
        """Raise: the dense matrix is larger than allowed."""
        limit = self._core.max_dense_bytes
        raise DenseMemoryError(
            f"the dense {' x '.join(str(s) for s in self.shape)} matrix needs {format_bytes(needed)}, above "
            f"max_dense_bytes={format_bytes(limit)}{' (0 means never)' if limit == 0 else ''}; use products "
            "K @ V, estimators, or slices K[a:b, c:d], or raise max_dense_bytes"
        )

    def _dense_values(self, params: Sequence[Tensor]) -> Tensor:
        """Return the dense matrix at some values of the parameters, with its graph where one is recorded."""
        raise NotImplementedError

    def _dense_cost(self) -> float:
        """Cost of a dense block in passes over the samples of one side."""
        raise NotImplementedError

    def _factor_passes(self) -> float:
        """Passes in which large factors for products would be made; 0 where none are."""
        return 0.0

    def _dense_by_columns(self, params: Sequence[Tensor]) -> Tensor:
        """Return the dense matrix as a product with the identity, on the side that has fewer columns."""
        operator = self._rebuild(self._core, params)
        rows, columns = self.shape[-2:]
        transposed = rows < columns
        side = operator._transpose_nonbatch() if transposed else operator
        identity = torch.eye(min(rows, columns), dtype=self.dtype, device=self.device)
        product = side._lazy_product(params, identity.expand(*self.batch_shape, -1, -1))
        return product.mT.contiguous() if transposed else product

    def _dense_key(self) -> tuple[object, ...] | None:
        """Return the key of the dense block, or None where the parameters are not the snapshot."""
        snapshot = self._core.engine.linearization.parameters
        if self._core.engine.linearization.differentiable:  # live tensors: an optimiser may change them
            return None
        if any(
            a.data_ptr() != s.data_ptr() or a.dtype != s.dtype
            for a, s in zip(self._args, snapshot, strict=True)
        ):
            return None
        versions = tuple(arg._version for arg in self._args)
        return ("dense", self._core.rows.key, self._core.columns.key, versions)

    def _stored_dense(self) -> Tensor | None:
        """Return the dense block if it was made and is still kept."""
        key = self._dense_key()
        return None if key is None else shared_store.get(self._core.engine.identity, key)

    def _store_dense(self, dense: Tensor) -> None:
        """Keep a dense block for the products that follow, where it may be kept."""
        key = self._dense_key()
        if key is not None and tensor_bytes(self.shape, self.dtype) <= self._core.max_dense_bytes:
            shared_store.put(self._core.engine.identity, key, dense)

    def _dense_if_cheaper(self, columns: int) -> Tensor | None:
        """Return a dense block that exists, or build it once the products have cost as much.

        Building when the passes spent equal the cost of building is the classical rent-or-buy rule:
        never more than twice the cost of the best decision in hindsight. Let products cost x in all and the
        block c: the best is min(x, c); what is paid here is x up to x = c, and 2 c at most beyond.
        """
        if products_are_steady():
            return self._steady_dense()
        stored = self._stored_dense()
        if stored is not None:
            return stored
        if tensor_bytes(self.shape, self.dtype) > self._core.max_dense_bytes:
            return None
        core = self._core
        core.spending.passes += self.passes_per_column * columns
        spent, cost = core.spending.passes, self._dense_cost()
        # Large factors take the memory of all layers: a block that takes hardly more passes is made in their
        # place, as soon as they would be.
        pays = spent > cost or (spent > cost / 2 and self._factor_passes() * _BESIDE_FACTORS >= cost)
        if not pays or self._dense_key() is None:
            return None
        logger.info(
            "building the dense %s block (%s): products have cost %.0f passes, the block costs about %.0f",
            "x".join(map(str, self.shape)),
            format_bytes(tensor_bytes(self.shape, self.dtype)),
            core.spending.passes,
            cost,
        )
        return self._dense_built()

    def _steady_dense(self) -> Tensor | None:
        """Return the dense block if it pays for an iteration, whatever was multiplied so far."""
        fits = tensor_bytes(self.shape, self.dtype) <= self._core.max_dense_bytes
        if fits and self._dense_key() is not None and self._dense_cost() <= _MANY * self.passes_per_column:
            stored = self._stored_dense()
            return self._dense_built() if stored is None else stored
        self._settle()
        return None

    def _settle(self) -> None:
        """Let the engine make factors for many products now, where it has some and they fit."""
        core = self._core
        if core.spending.settled:
            return
        core.spending.settled = True
        for axis in {core.rows, core.columns}:
            if isinstance(axis, StateAxis) and axis.inputs.num_samples:
                core.engine.settle(tuple(self._args), axis.inputs)

    def _dense_built(self) -> Tensor:
        """Return the dense block, made now and kept."""
        dense = self._dense_values(self._args)
        self._store_dense(dense)
        return dense
