"""Sums and multiples of kernels, which keep our solver once a ridge is added to them.

linear_operator would turn ``2 * K + ridge`` into an operator of its own, whose solves above 800 rows stop
at a relative residual near 1 without a word. Every sum and multiple that begins with an operator of ours is
one of the two thin classes below: products, slices and gradients are linear_operator's, and a diagonal that
is added gives a `RidgeOperator`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Self

from linear_operator.operators import (
    ConstantMulLinearOperator,
    DiagLinearOperator,
    LinearOperator,
    RootLinearOperator,
    SumLinearOperator,
    to_linear_operator,
)
from torch import Tensor

from ..errors import DtypeError, ShapeError
from .dense import DenseFallbacks
from .expression import Expression
from .ridge import RidgeOperator

__all__ = ["KernelAlgebra", "KernelMultiple", "KernelSum", "unscaled"]


class KernelAlgebra(Expression):
    """Addition and multiples that stay lazy and keep our solver."""

    def __add__(self, other: Any) -> LinearOperator:
        """Add an operator or a dense tensor lazily; a diagonal gives a `RidgeOperator`.

        The first of the two decides: ``K + D`` has our solver, ``D + K`` is linear_operator's own.

        Args:
            other: An operator, or a tensor of the kernel's shape; 0 is allowed, so that sum() works.

        Returns:
            The lazy sum.

        Raises:
            UnsupportedOperationError: For a number: K + 0.1 has two readings.
            ShapeError: If the matrices differ in shape.
        """
        added = self._summand(other)
        if added is None:
            return self
        if isinstance(added, DiagLinearOperator):
            return RidgeOperator(self, added)
        if isinstance(added, RidgeOperator):  # one ridge, over the sum of the kernels
            return RidgeOperator(self + added.kernel, added._diag_tensor)
        return KernelSum(*_parts(self), *_parts(to_linear_operator(added)))

    __radd__ = __add__

    def _mul_constant(self, other: float | Tensor) -> LinearOperator:
        return KernelMultiple(self, other)

    def add_jitter(self, jitter_val: float = 1e-3) -> LinearOperator:
        """Return K plus a multiple of the identity; see `add_diagonal`."""
        return self.add_diagonal(jitter_val)

    def add_diagonal(self, diag: float | Tensor) -> LinearOperator:
        """Return K + diag lazily.

        Args:
            diag: A number that is not negative; or ``()``, ``(1,)`` or ``(*batch, n)`` in the operator's
                dtype.

        Returns:
            Lazy operator whose solves meet their tolerance or raise; see `RidgeOperator`.

        Raises:
            InputError: If a number is negative or not finite.
            ShapeError: If K is not square or the diagonal does not fit.
            DtypeError: If a tensor has another dtype than K.
        """
        if not self.is_square:
            raise ShapeError(f"only a square kernel takes a diagonal, this one is {tuple(self.shape)}")
        if isinstance(diag, Tensor) and diag.dtype != self.dtype:
            raise DtypeError(
                f"the kernel has dtype {self.dtype}, the diagonal {diag.dtype}; cast one of them"
            )
        return RidgeOperator(self, diag)

    def add_low_rank(self, low_rank_mat: Any, *args: Any, **kwargs: Any) -> LinearOperator:
        """Return K + U Uᵀ lazily, without factoring K.

        Args:
            low_rank_mat: U, ``(*batch, n, r)``.
            *args: Ignored: choices of factorisations that are not made.
            **kwargs: Ignored likewise.

        Returns:
            The lazy sum.
        """
        return self + RootLinearOperator(low_rank_mat)


class KernelSum(KernelAlgebra, DenseFallbacks, SumLinearOperator):
    """K₁ + K₂ + ..., lazily.

    Args:
        *linear_ops: Operators or dense tensors, ``(*batch, n, m)``, whose batches broadcast.

    Example:
        >>> import torch, ntkops
        >>> K = ntkops.ntk(torch.nn.Linear(3, 1), torch.randn(5, 3))
        >>> type(K + torch.eye(5)).__name__, type((2 * K + K).add_jitter(0.1)).__name__
        ('KernelSum', 'RidgeOperator')
    """

    def to_dense(self) -> Tensor:
        """Return the dense sum; every part guards its own size."""
        return sum((part.to_dense() for part in self.linear_ops[1:]), start=self.linear_ops[0].to_dense())

    def _mul_constant(self, other: float | Tensor) -> LinearOperator:
        return type(self)(*(part._mul_constant(other) for part in self.linear_ops))

    def _getitem(self, row_index: Any, col_index: Any, *batch_indices: Any) -> LinearOperator:
        return type(self)(*(part._getitem(row_index, col_index, *batch_indices) for part in self.linear_ops))

    def repeat(self, *sizes: Any) -> Self:
        """Repeat along batch dimensions; the last two sizes must be 1."""
        return type(self)(*(part.repeat(*sizes) for part in self.linear_ops))


class KernelMultiple(KernelAlgebra, DenseFallbacks, ConstantMulLinearOperator):
    """c K, lazily; c may be learned, and may differ along the batch.

    Args:
        base_linear_op: K, ``(*batch, n, m)``.
        constant: c, a number, ``()`` or ``(*batch)``.

    Example:
        >>> import torch, ntkops
        >>> K = ntkops.ntk(torch.nn.Linear(3, 1), torch.randn(5, 3))
        >>> type(2 * K).__name__, type((2 * K).add_jitter(0.1)).__name__
        ('KernelMultiple', 'RidgeOperator')
    """

    def to_dense(self) -> Tensor:
        """Return the dense multiple, guarded by the kernel."""
        return self.base_linear_op.to_dense() * self.expanded_constant

    def _mul_constant(self, other: float | Tensor) -> LinearOperator:
        return type(self)(self.base_linear_op, self._constant * other)

    def _transpose_nonbatch(self) -> Self:
        return type(self)(self.base_linear_op._transpose_nonbatch(), self._constant)

    def _unsqueeze_batch(self, dim: int) -> Self:
        constant = self._constant.expand(self.batch_shape).unsqueeze(dim)
        return type(self)(self.base_linear_op._unsqueeze_batch(dim), constant)

    def _sum_batch(self, dim: int) -> LinearOperator:
        if self._constant.numel() == 1:  # c Σ K; with one c for each member there is no such form
            return type(self)(self.base_linear_op._sum_batch(dim), self._constant.reshape(()))
        return super()._sum_batch(dim)

    def repeat(self, *sizes: Any) -> Self:
        """Repeat along batch dimensions; the last two sizes must be 1."""
        # One number goes along with any batch; one for each member is repeated with the members.
        counts: Sequence[int] = sizes[0] if len(sizes) == 1 and not isinstance(sizes[0], int) else sizes
        constant = self._constant.reshape(()) if self._constant.numel() == 1 else self._constant
        if constant.dim():
            constant = constant.expand(self.batch_shape).repeat(*counts[:-2])
        return type(self)(self.base_linear_op.repeat(*counts), constant)


def unscaled(operator: LinearOperator) -> tuple[LinearOperator, float]:
    """Return K and c of c K for one number c, K no such multiple itself; of others the operator and 1."""
    if not isinstance(operator, ConstantMulLinearOperator) or operator._constant.numel() != 1:
        return operator, 1.0
    inner, factor = unscaled(operator.base_linear_op)
    return inner, factor * float(operator._constant.detach())


def _parts(operator: LinearOperator) -> tuple[LinearOperator, ...]:
    """Return what a sum is made of, so that no sum stands inside another; K + D stays one operator."""
    plain = isinstance(operator, SumLinearOperator) and not isinstance(operator, RidgeOperator)
    return tuple(operator.linear_ops) if plain else (operator,)
