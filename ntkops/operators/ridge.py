"""A kernel plus a ridge: solves that meet their tolerance or raise, exact where the dense matrix fits."""

from __future__ import annotations

import time
import warnings
from typing import Any

import torch
from linear_operator.operators import (
    AddedDiagLinearOperator,
    ConstantDiagLinearOperator,
    DiagLinearOperator,
    LinearOperator,
)
from torch import Tensor

from ..engines import count_passes
from ..errors import (
    DenseMemoryError,
    DeviceError,
    DtypeError,
    InputError,
    NotConvergedError,
    NtkopsWarning,
    ShapeError,
)
from ..results import Estimate, Solution
from ._diagonal_part import DiagonalPart
from ._ridge_system import (
    RidgeSystem,
    SolverOptions,
    batch_position,
    checked,
    log_determinant,
)
from .capabilities import dense_bytes_allowed, fits_dense
from .dense import DenseFallbacks
from .positions import same_index

__all__ = ["RidgeOperator"]


class RidgeOperator(DenseFallbacks, AddedDiagLinearOperator):
    r"""K + D for a kernel K and a diagonal D, as ``K.add_jitter(ridge)`` returns it.

    Products, diagonals and slices are those of linear_operator. Its solves are not: above 800 rows those
    stop at a relative residual near 1 without a word. Here `solve`, `inv_quad`, `logdet` and their like
    are exact, by a Cholesky factorisation, where the dense matrix is within ``max_dense_bytes`` of K.
    Beyond that solves are preconditioned conjugate gradients, in float32 inside float64 corrections, where
    every column meets the tolerance on its true residual or `NotConvergedError` is raised; gradients come
    from the implicit function theorem, by another solve. `with_solver` chooses.

    Args:
        *linear_ops: K, ``(*batch, n, n)``, symmetric positive semidefinite: any LinearOperator; and D, a
            DiagLinearOperator, or a number or tensor that is its diagonal.
        preconditioner_override: Accepted for linear_operator's sake; not used.
        options: `SolverOptions`; `with_solver` sets them.

    Raises:
        InputError: If a ridge given as a number is negative or not finite.
        ShapeError: If K is not square.

    Example:
        >>> import torch, ntkops
        >>> _ = torch.manual_seed(0)
        >>> model = torch.nn.Sequential(
        ...     torch.nn.Linear(3, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1)
        ... )
        >>> model = model.double()
        >>> K = ntkops.ntk(
        ...     model, torch.randn(20, 3, dtype=torch.float64), max_dense_bytes=0
        ... )
        >>> A, b = K.add_jitter(1e-2), torch.ones(20, dtype=torch.float64)
        >>> x, info = A.solve_with_info(b)
        >>> info.converged, bool((A @ x - b).norm() <= 1e-6 * b.norm())
        (True, True)
    """

    def __init__(
        self, *linear_ops: Any, preconditioner_override: Any = None, options: SolverOptions | None = None
    ) -> None:
        operators = list(linear_ops)
        if len(operators) == 2 and not isinstance(operators[1], LinearOperator):
            operators[1] = _diagonal(operators[0], operators[1])
        super().__init__(*operators, preconditioner_override=preconditioner_override)
        if self._linear_op.shape[-1] != self._linear_op.shape[-2]:
            raise ShapeError(
                f"only a square kernel takes a ridge, this one is {tuple(self._linear_op.shape)}"
            )
        self._options = SolverOptions() if options is None else options
        self._nondifferentiable_kwargs["options"] = self._options  # so that rebuilt operators have them

    def with_solver(self, **changes: Any) -> RidgeOperator:
        """Return the same operator with other solver options.

        Args:
            **changes: ``method``: "auto", "cholesky" (refused above ``max_dense_bytes``), "cg", or
                "refinement" (float32 products, and a few in float64). ``preconditioner``: "auto" (Nyström
                where the diagonal is positive), "nystrom", "pivoted cholesky", "rpcholesky" or None.
                ``rank``: its rank, by default min(200, n / 4). ``tolerance``: relative residual of every
                column, 1e-6. ``max_iterations``. ``seed``: of the preconditioner and of probes, 0.

        Returns:
            A new operator that shares K and D.

        Raises:
            InputError: If an option is not understood.
        """
        known = {"method", "preconditioner", "rank", "tolerance", "max_iterations", "seed"}
        unknown = sorted(set(changes) - known)
        if unknown:
            raise InputError(f"unknown solver option {unknown[0]!r}: choose from {', '.join(sorted(known))}")
        return self._like(self._linear_op, self._diag_tensor, self._options.again(**changes))

    def _like(
        self, kernel: LinearOperator, diagonal: LinearOperator, options: SolverOptions | None = None
    ) -> RidgeOperator:
        """Return another K + D, solved likewise; preconditioners of this one are not those of another."""
        return type(self)(kernel, diagonal, options=options or self._options.again())

    @property
    def kernel(self) -> LinearOperator:
        """K."""
        return self._linear_op

    @property
    def ridge(self) -> Tensor:
        """Diagonal of D, ``(*batch, n)``."""
        return self._diag_tensor._diagonal()

    @property
    def max_dense_bytes(self) -> int:
        """Limit for one dense result in bytes, that of K; 0 means never."""
        return dense_bytes_allowed(self._linear_op)

    @property
    def _factorises(self) -> bool:
        """Whether solves go through a dense Cholesky factor."""
        return self._options.method == "cholesky" or self._options.method == "auto" and fits_dense(self)

    def _system(self) -> RidgeSystem:
        """Return K + D as iterative solvers see it, without a graph."""
        return RidgeSystem(self._linear_op, self.ridge, self._options)

    def to_dense(self) -> Tensor:
        """Return the dense matrix, guarded by the kernel's ``max_dense_bytes``."""
        return self._linear_op.to_dense() + self._diag_tensor.to_dense()

    # solves

    def solve(self, right_tensor: Tensor, left_tensor: Tensor | None = None) -> Tensor:
        """Solve (K + D) x = b, or return L (K + D)⁻¹ b.

        Args:
            right_tensor: b, ``(n,)`` or ``(*batch, n, k)``.
            left_tensor: L, ``(*batch, m, n)``, or None.

        Returns:
            ``(n,)``, ``(*batch, n, k)`` or ``(*batch, m, k)``, in the operator's dtype, differentiable in b
            and in what K and D depend on. A float32 result is the rounded float64 solution; see
            `solve_with_info`.

        Raises:
            DenseMemoryError: If method="cholesky" and the dense matrix exceeds ``max_dense_bytes``.
            InputError: If a factorisation finds the matrix not symmetric.
            SingularKernelError: If it finds the smallest eigenvalue of K + D lost in the rounding of K.
            NotConvergedError: If a column misses its tolerance; ``result`` is the partial `Solution`.
        """
        self._check_right(right_tensor)
        if self._factorises:
            return super().solve(right_tensor, left_tensor)
        vector = right_tensor.dim() == 1
        right = right_tensor.unsqueeze(-1) if vector else right_tensor
        solution = self._solve(right)
        if left_tensor is not None:
            solution = left_tensor @ solution
        return solution.squeeze(-1) if vector else solution

    def _solve(self, rhs: Tensor, preconditioner: Any = None, num_tridiag: int = 0) -> Tensor:
        if self._factorises:
            return super()._solve(rhs, preconditioner, num_tridiag)
        return _ImplicitSolve.apply(self.representation_tree(), rhs, *self.representation())

    def _iterated(self, rhs: Tensor) -> Tensor:
        """Return A⁻¹ b by iteration, or raise."""
        return self._system().solve(rhs, raise_on_failure=True).solution.to(self.dtype)

    def solve_with_info(self, rhs: Tensor, *, raise_on_failure: bool = True) -> Solution:
        """Solve (K + D) x = b without a graph, and say what was reached and what it took.

        Args:
            rhs: b, ``(n,)`` or ``(*batch, n, k)``.
            raise_on_failure: Raise where a column fails; False returns what there is.

        Returns:
            `Solution`, which unpacks as ``x, info``. The residuals are those of this x, by products of
            their own. Except by float32 conjugate gradients, x is float64: rounded to float32 it would lose
            up to the condition number times 6e-8.

        Raises:
            DenseMemoryError: If method="cholesky" and the dense matrix exceeds ``max_dense_bytes``.
            InputError: If a factorisation finds the matrix not symmetric.
            SingularKernelError: If it finds the smallest eigenvalue of K + D lost in the rounding of K.
            NotConvergedError: If a column misses its tolerance; ``result`` is the partial `Solution`.
        """
        self._check_right(rhs)
        start = time.perf_counter()
        block = rhs.unsqueeze(-1) if rhs.dim() == 1 else rhs
        with torch.no_grad():
            if not self._factorises:
                found = self._system().solve(block, raise_on_failure)
                return Solution(found.solution.squeeze(-1) if rhs.dim() == 1 else found.solution, found.info)
            matrix = self._square()
            solution = torch.cholesky_solve(block.double(), self._factor(matrix))
            info = checked(block.double(), matrix @ solution, self._tolerance(), start)
        result = Solution(solution.squeeze(-1) if rhs.dim() == 1 else solution, info)
        if raise_on_failure and not info.converged:
            raise NotConvergedError(
                f"the Cholesky solution has a relative residual of {float(info.residuals.max()):.2g}, the "
                f"tolerance is {info.tolerance:.2g}: use a larger ridge or tolerance; the solution is in "
                ".result",
                result,
            )
        return result

    def _tolerance(self) -> float:
        return self._options.tolerance

    def _least_ridge(self) -> float:
        # A diagonal that is zero in places may be what makes K + D regular: it is a ridge all the same.
        entries = self.ridge.detach()
        positive = entries[entries > 0]
        return float(positive.min()) if positive.numel() else 0.0

    def _check_right(self, rhs: Any) -> None:
        """Raise unless a right-hand side fits the operator."""
        if not isinstance(rhs, Tensor) or rhs.dtype != self.dtype:
            kind = rhs.dtype if isinstance(rhs, Tensor) else type(rhs).__name__
            raise DtypeError(f"the operator has dtype {self.dtype}, the right-hand side is {kind}; cast one")
        rows = rhs.shape[0] if rhs.dim() == 1 else rhs.shape[-2] if rhs.dim() > 1 else None
        if rows != self.shape[-1]:
            raise ShapeError(f"the right-hand side needs {self.shape[-1]} rows, got {tuple(rhs.shape)}")
        if rhs.device != self.device:
            raise DeviceError(f"the operator lives on {self.device}, the right-hand side on {rhs.device}")

    # quadratic forms and determinants

    def inv_quad_logdet(
        self, inv_quad_rhs: Tensor | None = None, logdet: bool | None = False, reduce_inv_quad: bool = True
    ) -> tuple[Tensor, Tensor]:
        """Return bᵀ (K + D)⁻¹ b and log det (K + D).

        Args:
            inv_quad_rhs: b, ``(n,)`` or ``(*batch, n, k)``; None for no quadratic form.
            logdet: Whether the determinant is wanted; see `logdet`.
            reduce_inv_quad: Sum over the columns of b.

        Returns:
            Two tensors of the batch shape, the first ``(*batch, k)`` without the sum; zeros for what was
            not asked.

        Raises:
            NotConvergedError: If a solve misses its tolerance.
            DenseMemoryError: If a determinant is wanted whose dense matrix exceeds ``max_dense_bytes``.
        """
        if inv_quad_rhs is not None:
            self._check_right(inv_quad_rhs)
        if self._factorises:
            return super().inv_quad_logdet(inv_quad_rhs, logdet, reduce_inv_quad)
        quadratic = torch.zeros(self.batch_shape, dtype=self.dtype, device=self.device)
        if inv_quad_rhs is not None:
            right = inv_quad_rhs.unsqueeze(-1) if inv_quad_rhs.dim() == 1 else inv_quad_rhs
            quadratic = (right * self._solve(right)).sum(-2)  # b · A⁻¹ b, through the implicit derivative
            quadratic = quadratic.sum(-1) if reduce_inv_quad else quadratic
        return quadratic, self.logdet() if logdet else quadratic.new_zeros(self.batch_shape)

    def logdet(self) -> Tensor:
        """Return log det (K + D), exact; `ntkops.logdet` estimates it where the dense matrix has no room.

        Raises:
            DenseMemoryError: If the dense matrix exceeds ``max_dense_bytes``: a tensor has no error bar.
        """
        if not fits_dense(self):
            raise DenseMemoryError(
                f"logdet() is exact, and the {self.shape[-1]} x {self.shape[-1]} matrix exceeds "
                f"max_dense_bytes={self.max_dense_bytes}: ntkops.logdet(A) estimates it; or raise the limit"
            )
        return super().logdet()

    def logdet_estimate(self, *, rtol: float = 1e-2, generator: torch.Generator | None = None) -> Estimate:
        r"""Estimate log det (K + D): the former name of `ntkops.logdet` for an operator with a ridge.

        .. math:: \log\det(K + D) = \sum_i \log d_i + \mathrm{tr} \log(1 + D^{-1/2} K D^{-1/2})

        Args:
            rtol: Relative tolerance of the 95 % interval.
            generator: CPU generator of the probes; None takes the seed of the solver options.

        Returns:
            The estimate, of the batch shape. Nothing dense is built.

        Raises:
            InputError: If an entry of D is not positive.

        Warns:
            NtkopsWarning: Always; the method goes after two releases.
        """
        warnings.warn(
            "logdet_estimate(rtol) is ntkops.logdet(A, rtol=rtol) now; the method goes after two releases",
            NtkopsWarning,
            stacklevel=2,
        )
        start = time.perf_counter()
        entries = self.ridge.detach().expand(self.shape[:-1]).double()
        if not bool((entries > 0).all()):
            raise InputError("log det by quadrature needs positive entries of the diagonal")
        generator = torch.Generator().manual_seed(self._options.seed) if generator is None else generator
        batch, seed, found = self.batch_shape, generator.initial_seed(), []
        with torch.no_grad(), count_passes() as counter:
            for number in range(batch.numel()):
                place = batch_position(number, batch)
                member = (self._linear_op[place] if batch else self._linear_op).detach()
                found.append(log_determinant(member, entries[place], generator, rtol))
        value, error, low, high = (
            torch.tensor([pick(f) for f in found], dtype=torch.float64).reshape(batch)
            for pick in (
                lambda f: f.value,
                lambda f: f.stderr,
                lambda f: f.interval[0],
                lambda f: f.interval[1],
            )
        )
        return Estimate(
            value=value,
            stderr=error,
            interval=(low, high),
            method="lanczos quadrature",
            exact=False,
            passes=counter.total,
            converged=all(f.converged for f in found),
            seed=seed,
            seconds=time.perf_counter() - start,
        )

    # algebra: the solver options go along

    def add_jitter(self, jitter_val: float = 1e-3) -> RidgeOperator:
        """Return K + (D + a multiple of the identity)."""
        return self.add_diagonal(jitter_val)

    def add_diagonal(self, diag: float | Tensor) -> RidgeOperator:
        """Return K + (D + diag), for a number, ``()``, ``(1,)`` or ``(*batch, n)``."""
        return self._like(self._linear_op, _summed(self._diag_tensor, _diagonal(self, diag)))

    def __add__(self, other: Any) -> LinearOperator:
        """Add another diagonal, operator or dense tensor lazily."""
        if isinstance(other, DiagLinearOperator):
            return self._like(self._linear_op, _summed(self._diag_tensor, other))
        if isinstance(other, RidgeOperator):
            diagonal = _summed(self._diag_tensor, other._diag_tensor)
            return self._like(self._linear_op + other._linear_op, diagonal)
        return self._like(self._linear_op + other, self._diag_tensor)

    def _mul_constant(self, other: Any) -> LinearOperator:
        return self._like(self._linear_op._mul_constant(other), self._diag_tensor._mul_constant(other))

    def _transpose_nonbatch(self) -> LinearOperator:
        # K is symmetric: what was made for A serves Aᵀ.
        return self._like(self._linear_op.mT, self._diag_tensor, self._options)

    def _expand_batch(self, batch_shape: Any) -> LinearOperator:
        if tuple(batch_shape) == tuple(self.batch_shape):
            return self
        return self._like(*(part._expand_batch(batch_shape) for part in (self._linear_op, self._diag_tensor)))

    def _getitem(self, row_index: Any, col_index: Any, *batch_indices: Any) -> LinearOperator:
        kernel = self._linear_op._getitem(row_index, col_index, *batch_indices)
        entries = self.ridge[(*batch_indices, slice(None))]
        # (K + D)[i, i] is a kernel with a ridge, K[i, j] + D[i, j] a sum.
        if same_index(row_index, col_index):
            return self._like(kernel, DiagLinearOperator(entries[..., row_index]))
        numbers = torch.arange(self.shape[-1], device=entries.device)
        return kernel + DiagonalPart(entries, rows=numbers[row_index], cols=numbers[col_index])

    def repeat(self, *sizes: Any) -> RidgeOperator:
        """Repeat along batch dimensions; the last two sizes must be 1."""
        counts = tuple(sizes[0]) if len(sizes) == 1 and not isinstance(sizes[0], int) else sizes
        entries = self.ridge.repeat(*counts[:-2], 1)
        return self._like(self._linear_op.repeat(*counts), DiagLinearOperator(entries))


class _ImplicitSolve(torch.autograd.Function):
    """x = A⁻¹ b by iteration, and the derivative of the equation A x = b: dx = A⁻¹ (db - dA x)."""

    # For a cotangent g the gradient at b is y = A⁻¹ g, since A is symmetric, and with dx = A⁻¹ (db - dA x)
    # ⟨g, dx⟩ = ⟨y, db⟩ - ⟨y, dA x⟩: the bilinear derivative of -yᵀ A x at what A is made of.

    @staticmethod
    def forward(ctx: Any, tree: Any, rhs: Tensor, *representation: Tensor) -> Tensor:
        """Solve without a graph."""
        ctx.tree = tree
        solution = tree(*representation)._iterated(rhs)
        ctx.save_for_backward(solution, *representation)
        return solution

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """Solve with the gradient on the right; itself differentiable."""
        solution, *representation = ctx.saved_tensors
        adjoint = _ImplicitSolve.apply(ctx.tree, gradients[0].contiguous(), *representation)
        found: tuple[Tensor | None, ...] = (None,) * len(representation)
        if any(ctx.needs_input_grad[2:]):
            found = ctx.tree(*representation)._bilinear_derivative(-adjoint, solution)
        return None, adjoint, *found


def _diagonal(kernel: LinearOperator, entries: Any) -> DiagLinearOperator:
    """Return D from a number, ``(1,)`` or ``(*batch, n)``."""
    number = not isinstance(entries, list | tuple) and not hasattr(entries, "__array__")
    if number and not (isinstance(entries, int | float) and 0 <= entries < float("inf")):
        raise InputError(f"ridge={entries!r}: pass a number that is not negative")
    values = torch.as_tensor(entries, dtype=kernel.dtype, device=kernel.device)
    if values.dim() and values.shape[-1] not in (1, kernel.shape[-1]):
        raise ShapeError(f"the diagonal needs 1 or {kernel.shape[-1]} entries, got {tuple(values.shape)}")
    if values.dim() and values.shape[-1] == kernel.shape[-1] != 1:
        return DiagLinearOperator(values)
    constant = values.reshape(1) if values.dim() == 0 else values
    return ConstantDiagLinearOperator(constant.expand(*kernel.shape[:-2], 1), diag_shape=kernel.shape[-1])


def _summed(first: DiagLinearOperator, second: DiagLinearOperator) -> DiagLinearOperator:
    """Return the sum of two diagonals, constant where both are."""
    if isinstance(first, ConstantDiagLinearOperator) and isinstance(second, ConstantDiagLinearOperator):
        return ConstantDiagLinearOperator(first.diag_values + second.diag_values, diag_shape=first.shape[-1])
    return DiagLinearOperator(first._diagonal() + second._diagonal())
