"""A kernel plus a diagonal: solves are exact inside the dense limit, and refused beyond it."""

from __future__ import annotations

from linear_operator.operators import AddedDiagLinearOperator
from torch import Tensor

from .dense import DenseFallbacks

__all__ = ["KernelPlusDiagonal"]


class KernelPlusDiagonal(DenseFallbacks, AddedDiagLinearOperator):
    """K + D for a kernel K and a diagonal D, as `NTKOperator.add_jitter` returns it.

    Products, diagonals and slices are those of linear_operator. Its solves are not: above 800 rows
    those stop at a relative residual near 1 without a word. Here they are exact by a Cholesky
    factorisation of the dense matrix, or raise `DenseMemoryError` where that exceeds the limit.
    """

    def to_dense(self) -> Tensor:
        """Return the dense matrix, guarded by the kernel's ``max_dense_bytes``."""
        return self._linear_op.to_dense() + self._diag_tensor.to_dense()
