"""Products of operators, A M Bᵀ, which keep our solver and know their factors.

linear_operator makes a `MatmulLinearOperator` of them. That multiplies rightly; but once a ridge is added,
its solves above 800 rows stop at a relative residual near 1, and its determinants are far off, without a
word. A product in which an operator of ours takes part is a `Sandwich`, whatever it begins with.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any, Self

import torch
from linear_operator.operators import (
    ConstantMulLinearOperator,
    DiagLinearOperator,
    LinearOperator,
    MatmulLinearOperator,
    to_linear_operator,
)
from linear_operator.utils.getitem import _noop_index
from torch import Tensor

from ..engines import format_bytes, tensor_bytes
from ..errors import DenseMemoryError, DeviceError, DtypeError, InputError, NonFiniteError, ShapeError
from ..model.context import full_precision
from ._diagonal_part import DiagonalPart
from .algebra import KernelAlgebra
from .capabilities import capabilities, dense_bytes_allowed, dense_from_tiles, fits_dense
from .dense import DenseFallbacks
from .ridge import RidgeOperator

__all__ = ["Sandwich", "sandwich", "smaller_side"]

_GROUP = 64  # entries that are read off one small block
# Times the passes of the tiles of L Lᵀ that those of the smaller LᵀL may take: passes are few against the n³
# operations of an eigendecomposition of n rows.
_MORE_PASSES = 4


class Sandwich(KernelAlgebra, DenseFallbacks, MatmulLinearOperator):
    """A product of two operators, of which either may be a product itself; lazy.

    ``J @ D @ J.mT``, ``S.mT @ K @ S`` and ``D @ K @ D`` are made of them, and `sandwich` makes one. Where a
    product reads the same from both ends it is known to be symmetric, and where its middle has a square root
    it knows features: K = F Fᵀ. See `ntkops.operators.capabilities`.

    Args:
        left_linear_op: ``(*batch, n, p)``.
        right_linear_op: ``(*batch, p, m)``, of the same dtype on the same device.

    Raises:
        ShapeError: If the two do not meet.
        DtypeError: If their dtypes differ.
        DeviceError: If they live apart.

    Example:
        >>> import torch, ntkops
        >>> K = ntkops.ntk(torch.nn.Linear(3, 1), torch.randn(5, 3))
        >>> type(K @ K).__name__, type((K @ K).add_jitter(0.1)).__name__
        ('Sandwich', 'RidgeOperator')
    """

    def __init__(self, left_linear_op: Any, right_linear_op: Any) -> None:
        left, right = to_linear_operator(left_linear_op), to_linear_operator(right_linear_op)
        if left.shape[-1] != right.shape[-2]:
            raise ShapeError(f"operators of shapes {tuple(left.shape)} and {tuple(right.shape)} do not meet")
        if left.dtype != right.dtype:
            raise DtypeError(f"the product of a {left.dtype} and a {right.dtype} operator: cast one of them")
        if None not in (left.device, right.device) and left.device != right.device:
            raise DeviceError(f"one operator lives on {left.device}, the other on {right.device}: move one")
        super().__init__(left, right)

    def _is_recorded(self) -> bool:
        """Whether a derivative may be taken through the result."""
        return torch.is_grad_enabled() and self.requires_grad

    def _matmul(self, rhs: Tensor) -> Tensor:
        with full_precision(rhs.device):  # factors of linear_operator's would follow autocast
            product: Tensor = super()._matmul(rhs)
        return product

    def to_dense(self) -> Tensor:
        """Return the dense product, inside the ``max_dense_bytes`` of its parts.

        Returns:
            ``(*batch, n, m)``. Cost: a product for each column, or dense rows of its two ends if there are.

        Raises:
            DenseMemoryError: If the result is larger than a part allows, before anything is allocated.
        """
        needed, limit = tensor_bytes(self.shape, self.dtype), dense_bytes_allowed(self)
        if min(self.shape[-2:]) > 1 and needed > limit:
            raise DenseMemoryError(
                f"the dense {' x '.join(map(str, self.shape))} product needs {format_bytes(needed)}, above "
                f"max_dense_bytes={format_bytes(limit)} of one of its factors; use products and estimators, "
                "or raise max_dense_bytes"
            )
        if self._is_recorded():  # tiles have no graph
            return self.matmul(torch.eye(self.shape[-1], dtype=self.dtype, device=self.device))
        with torch.no_grad(), full_precision(self.device):
            return dense_from_tiles(self)

    def _diagonal(self) -> Tensor:
        if self._is_recorded():
            return self.to_dense().diagonal(dim1=-2, dim2=-1)
        with torch.no_grad(), full_precision(self.device):
            return capabilities(self).diagonal()

    def _getitem(self, row_index: Any, col_index: Any, *batch_indices: Any) -> LinearOperator:
        # (A B)[rows, cols] = A[rows] B[:, cols]
        return type(self)(
            _part(self.left_linear_op, row_index, _noop_index, batch_indices),
            _part(self.right_linear_op, _noop_index, col_index, batch_indices),
        )

    def _get_indices(self, row_index: Tensor, col_index: Tensor, *batch_indices: Tensor) -> Tensor:
        index = torch.broadcast_tensors(row_index, col_index, *batch_indices)
        parts = []
        for rows, cols, *batch in zip(*(i.reshape(-1).split(_GROUP) for i in index), strict=True):
            (some_rows, i), (some_cols, j) = (torch.unique(k, return_inverse=True) for k in (rows, cols))
            block = self._getitem(some_rows, some_cols, *(_noop_index for _ in self.batch_shape))
            dense = block.to_dense() if self._is_recorded() else dense_from_tiles(block)
            parts.append(dense[(*batch, i, j)])
        return torch.cat(parts).reshape(index[0].shape)

    def repeat(self, *sizes: Any) -> Self:
        """Repeat along batch dimensions; the last two sizes must be 1."""
        return type(self)(self.left_linear_op.repeat(*sizes), self.right_linear_op.repeat(*sizes))


def _part(operator: LinearOperator, row_index: Any, col_index: Any, batch_indices: Any) -> LinearOperator:
    """Return some rows and columns of a factor; of a diagonal one without two interpolation matrices."""
    if not isinstance(operator, DiagLinearOperator):
        return operator._getitem(row_index, col_index, *batch_indices)
    entries = operator._diagonal()[(*batch_indices, slice(None))]
    numbers = torch.arange(entries.shape[-1], device=entries.device)
    return DiagonalPart(entries, rows=numbers[row_index], cols=numbers[col_index])


def sandwich(
    A: LinearOperator | Tensor, M: LinearOperator | Tensor, B: LinearOperator | Tensor | None = None
) -> Sandwich:
    r"""Return :math:`A M B^\top` as a lazy operator; :math:`A M A^\top` without B.

    With J for A it is a kernel under another metric of the parameters: a mask (entries 0 and 1), prior
    variances, the metric of an optimiser. With K for M it is a kernel under weights of the loss or a change
    of labels. It has our solver once a ridge is added, and `KernelRidge` takes it: for a diagonal M ≥ 0 it
    knows its features A M^{1/2}.

    Args:
        A: ``(*batch, n, p)``, an operator or a dense tensor.
        M: ``(*batch, p, q)``, an operator or a dense tensor; a vector ``(p,)`` stands for a diagonal one.
        B: ``(*batch, m, q)``; None for A.

    Returns:
        Lazy ``(*batch, n, m)``. Cost of a product: one with each of the three. Dense results are refused
        above the smallest ``max_dense_bytes`` of the three.

    Raises:
        InputError: If one of them is neither an operator nor a tensor.
        ShapeError: If they do not meet.
        DtypeError: If their dtypes differ, or are not floating.
        DeviceError: If they live on different devices.
        NonFiniteError: If a tensor holds NaN or infinity.

    Example:
        >>> import torch, ntkops
        >>> _ = torch.manual_seed(0)
        >>> J = ntkops.jacobian(torch.nn.Linear(3, 1).double(), torch.randn(5, 3).double())
        >>> K = ntkops.sandwich(J, torch.tensor([1.0, 1.0, 0.0, 0.0]).double())  # the first two weights alone
        >>> expected = J.to_dense()[:, :2] @ J.to_dense()[:, :2].mT
        >>> bool(torch.allclose(K.to_dense(), expected)), type(K.add_jitter(0.1)).__name__
        (True, 'RidgeOperator')
    """
    left = _operand(A, "A")
    middle = _operand(M, "M")
    right = left if B is None else _operand(B, "B")
    return Sandwich(Sandwich(left, middle), right.mT)


def _operand(given: Any, name: str) -> LinearOperator:
    """Return an operator, or a dense tensor or a diagonal as one, checked."""
    if isinstance(given, LinearOperator):
        return given
    if not isinstance(given, Tensor):
        raise InputError(f"{name}: expected an operator or a tensor, got {type(given).__name__}")
    if not given.dtype.is_floating_point:
        raise DtypeError(f"{name} has dtype {given.dtype}; cast it to a floating dtype")
    if not bool(torch.isfinite(given).all()):
        raise NonFiniteError(f"{name} holds NaN or infinity")
    if given.dim() == 1 and name == "M":
        return DiagLinearOperator(given)
    if given.dim() < 2:
        raise ShapeError(f"{name} needs shape (*batch, n, m), got {tuple(given.shape)}")
    return to_linear_operator(given)


def smaller_side(operator: LinearOperator | Tensor) -> LinearOperator | None:
    """Return LᵀL, ``(*batch, p, p)``, for an operator L Lᵀ that is larger, n > p.

    With the singular values σ of L both have the eigenvalues σ², and the larger one n - p zeros more. None
    where no L is known, p ≥ n, or the dense L Lᵀ fits and is made sooner.
    """
    if isinstance(operator, ConstantMulLinearOperator):
        single = operator._constant.numel() == 1 and float(operator._constant) > 0
        inner = smaller_side(operator.base_linear_op) if single else None
        return None if inner is None else inner.mul(operator._constant.detach().reshape(()))
    if not isinstance(operator, LinearOperator) or capabilities(operator).space.is_spread:
        return None
    known = capabilities(operator)
    found = known.factors()
    if found is None or found[0].shape[-1] >= operator.shape[-1] or not known.symmetric:
        return None
    other = Sandwich(found[0].mT, found[0])
    # Products cost the same on both sides. Dense, the smaller one needs gradients of single samples written
    # down, which layer structure may do without; against n³ operations some passes more are nothing.
    sooner = capabilities(other).exact_cost("tiles") > _MORE_PASSES * known.exact_cost("tiles")
    return None if sooner and fits_dense(operator) else other


# Who decides what a composition is. In linear_operator it is the first operand: ``D @ K`` and ``D + K`` are
# its own kinds, with its own solver, whatever K is. Python lets the second of two operands decide where its
# class derives from that of the first; ours cannot derive from all of theirs, so that the same rule is put
# into the methods of linear_operator that compose. Without an operator of ours they do what they did.


def _ours(operator: Any) -> bool:
    """Whether an operator has our solver; over ranks compositions have rules of their own."""
    return isinstance(operator, DenseFallbacks) and not capabilities(operator).space.is_spread


def _product_decides(matmul: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    """Let a product in which one of ours takes part be a `Sandwich`."""

    @functools.wraps(matmul)
    def multiply(self: LinearOperator, other: Any) -> Any:
        if isinstance(other, LinearOperator) and (_ours(self) or _ours(other)):
            return Sandwich(self, other)
        return matmul(self, other)

    return multiply


def _ridge_decides(add: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    """Let linear_operator's operators that hold one of ours have our ridge."""

    @functools.wraps(add)
    def combine(self: LinearOperator, diag: Any) -> Any:
        if not isinstance(self, DenseFallbacks) and self.is_square and _holds_ours(self):
            return RidgeOperator(self, diag)
        return add(self, diag)

    return combine


def _holds_ours(operator: LinearOperator) -> bool:
    """Whether an operator of ours is inside, at any depth."""
    parts = [arg for arg in operator._args if isinstance(arg, LinearOperator)]
    return any(_ours(part) or _holds_ours(part) for part in parts)


def _second_decides(add: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    """Let a sum be that of ours, K + D, where K is the second summand."""

    @functools.wraps(add)
    def combine(self: LinearOperator, other: Any) -> Any:
        if not isinstance(self, DenseFallbacks):
            if _ours(other):
                return other + self
            if isinstance(other, DiagLinearOperator) and self.is_square and _holds_ours(self):
                return RidgeOperator(self, other)
        return add(self, other)

    return combine


def _kinds(base: type) -> Iterator[type]:
    """Yield a class of linear_operator and those that derive from it there; one may come twice."""
    yield base
    kind: type
    for kind in base.__subclasses__():
        if kind.__module__.startswith("linear_operator."):
            yield from _kinds(kind)


def _let(kind: type, name: str, decides: Callable[[Any], Any]) -> None:
    """Put a rule around a method, in place of one that an earlier import has put there."""
    plain = getattr(vars(kind)[name], "_plain", vars(kind)[name])
    ruled = decides(plain)
    ruled._plain = plain
    setattr(kind, name, ruled)


_let(LinearOperator, "matmul", _product_decides)
for _kind in set(_kinds(LinearOperator)):
    for _name, _decides in (("__add__", _second_decides), ("add_diagonal", _ridge_decides)):
        if _name in vars(_kind):
            _let(_kind, _name, _decides)
