"""Operators side by side, as `torch.cat` joins them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Self

import torch
from linear_operator.operators import (
    CatLinearOperator,
    LinearOperator,
    to_linear_operator,
)
from torch import Tensor

from ..errors import DeviceError, DtypeError, InputError, ShapeError, UnsupportedOperationError
from .algebra import KernelAlgebra, unscaled
from .axes import ParameterAxis
from .dense import DenseFallbacks
from .expression import Expression
from .jacobian import JacobianOperator
from .positions import resolve_index

__all__ = ["JoinedOperator", "is_stack", "join"]


class JoinedOperator(KernelAlgebra, DenseFallbacks, CatLinearOperator):
    """Operators and dense tensors one below the other, or side by side, lazily; made by `torch.cat`.

    Args:
        *linear_ops: At least two, ``(*batch, n, m)``, of one size but along ``dim``.
        dim: -2, one below the other, or -1, side by side.
        output_device: Accepted for linear_operator's sake; all parts live on one device.
        names: Of the parts, where they have some.

    Example:
        >>> import torch, ntkops
        >>> _ = torch.manual_seed(0)
        >>> model, x = torch.nn.Linear(3, 2), torch.randn(5, 3)
        >>> J = torch.cat(
        ...     (ntkops.jacobian(model, x), ntkops.jacobian(model, 2 * x)), dim=-2
        ... )
        >>> J.shape, (J @ torch.ones(8)).shape, (J.mT @ torch.ones(20)).shape
        (torch.Size([20, 8]), torch.Size([20]), torch.Size([8]))
    """

    kernel_class: ClassVar[Any]  # `BlockKernelOperator`, which is made of these itself and sets it

    def __init__(
        self,
        *linear_ops: LinearOperator,
        dim: int = 0,
        output_device: Any = None,
        names: tuple[str, ...] | None = None,
    ) -> None:
        super().__init__(*linear_ops, dim=dim, output_device=output_device)
        self.names = names
        self._nondifferentiable_kwargs["names"] = names  # what linear_operator makes it anew from

    def _check_args(self, *linear_ops: LinearOperator, **kwargs: Any) -> str | None:
        # A stack of one function is a stack: linear_operator takes two parts or more.
        return None if len(linear_ops) == 1 else super()._check_args(*linear_ops, **kwargs)

    def matmul(self, other: Any) -> Any:
        """Multiply; stacks of Jacobians that meet over the parameters give the kernel with blocks.

        Args:
            other: ``(n,)``, ``(n, k)``, or an operator.

        Returns:
            A tensor for a tensor; a `BlockKernelOperator` for ``J1 @ J2.mT``; else a lazy product.
        """
        if isinstance(other, LinearOperator) and is_stack(self) and is_stack(other.mT):
            return self.kernel_class(self, other)
        return super().matmul(other)

    def _transpose_nonbatch(self) -> Self:
        dim = -1 if self.cat_dim == -2 else -2
        parts = [part._transpose_nonbatch() for part in self.linear_ops]
        return type(self)(*parts, dim=dim, output_device=self.output_device, names=self.names)

    def _matmul(self, rhs: Tensor) -> Tensor:
        if self.cat_dim == -2:
            return torch.cat([part._matmul(rhs) for part in self.linear_ops], dim=-2)
        pieces = rhs.split([part.shape[-1] for part in self.linear_ops], dim=-2)
        products = [part._matmul(piece) for part, piece in zip(self.linear_ops, pieces, strict=True)]
        return torch.stack(products).sum(0)

    def _getitem(self, row_index: Any, col_index: Any, *batch_indices: Any) -> LinearOperator:
        # linear_operator's own takes no steps, and no part of a slice that ends where a part does.
        indices = [*batch_indices, row_index, col_index]  # `cat_dim` is -2 or -1 of these
        if indices[self.cat_dim] == slice(None):
            kept = [part._getitem(*indices[-2:], *batch_indices) for part in self.linear_ops]
            return type(self)(*kept, dim=self.cat_dim, output_device=kept[0].device, names=self.names)
        chosen = resolve_index(indices[self.cat_dim], self.shape[self.cat_dim])
        owners, counts = torch.unique_consecutive(
            self.idx_to_tensor_idx.cpu()[chosen], return_counts=True
        )  # runs of rows that one part has
        parts = []
        every = slice(None)
        for owner, run in zip(owners.tolist(), chosen.split(counts.tolist()), strict=True):
            own: list[Any] = [every, every]  # rows and columns; -3 - dim is the other of the two
            own[self.cat_dim] = run - int(self.cat_dim_cum_sizes[owner])
            part = self.linear_ops[owner]._getitem(*own, *batch_indices)
            # One after the other: two tensors of positions would be taken for pairs.
            own[self.cat_dim], own[-3 - self.cat_dim] = every, indices[-3 - self.cat_dim]
            if own != [every, every]:
                part = part._getitem(*own, *[every] * len(part.batch_shape))
            parts.append(part)
        return parts[0] if len(parts) == 1 else self._like(parts)

    def _like(self, parts: Sequence[LinearOperator]) -> Self:
        """Return other parts along the same axis; names would no longer be those of whole parts."""
        return type(self)(*parts, dim=self.cat_dim, output_device=parts[0].device)

    def _moved(self, dtype: torch.dtype, device: torch.device) -> Self:
        parts = [part.to(dtype=dtype, device=device) for part in self.linear_ops]
        return type(self)(*parts, dim=self.cat_dim, output_device=device, names=self.names)


def is_stack(operator: LinearOperator) -> bool:
    """Whether it is Jacobians over all parameters, scaled or not, one below the other."""
    part, _ = unscaled(operator)
    if isinstance(part, JoinedOperator):
        return part.cat_dim == -2 and all(map(is_stack, part.linear_ops))
    return (
        isinstance(part, JacobianOperator)
        and isinstance(part._core.columns, ParameterAxis)
        and part._core.columns.pick is None
        and not part.batch_shape
    )


def join(parts: Sequence[LinearOperator | Tensor], dim: int) -> LinearOperator:
    """Return operators one below the other (-2) or side by side (-1), lazily.

    Args:
        parts: Operators and dense tensors, ``(*batch, n, m)``, of one size but along ``dim``.
        dim: Axis from the end.

    Returns:
        A `JoinedOperator`; the operator itself where there is one alone.

    Raises:
        UnsupportedOperationError: If ``dim`` is an axis of the batch.
        InputError: If a part is neither a tensor nor an operator.
        ShapeError: If the parts do not fit together.
        DtypeError: If they differ in dtype.
        DeviceError: If they live on different devices.
        ParameterSelectionError: If Jacobians have other parameters, or other values of them.
    """
    if dim < -2:
        raise UnsupportedOperationError(
            "operators are joined along rows (dim=-2) or columns (dim=-1), not along their batch"
        )
    first = parts[0]
    for part in parts:
        if not isinstance(part, Tensor | LinearOperator):
            raise InputError(f"torch.cat joins operators and tensors, not a {type(part).__name__}")
        if part.dim() != first.dim() or any(
            part.shape[axis] != first.shape[axis] for axis in range(-first.dim(), 0) if axis != dim
        ):
            raise ShapeError(
                f"cannot join shapes {tuple(first.shape)} and {tuple(part.shape)} along dim={dim}"
            )
        if part.dtype != first.dtype:
            raise DtypeError(f"cannot join dtypes {first.dtype} and {part.dtype}; cast one of them")
        if part.device != first.device:
            raise DeviceError(f"cannot join operators on {first.device} and {part.device}")
    if len(parts) == 1:
        return to_linear_operator(first)
    if isinstance(first, JacobianOperator) and dim == -2:
        for part in parts[1:]:
            if isinstance(part, JacobianOperator):
                first.require_same_parameters(part, "the Jacobians that are joined")
    return JoinedOperator(*map(to_linear_operator, parts), dim=dim, output_device=first.device)


Expression.join = staticmethod(join)  # what `torch.cat` of an operator of ours is
