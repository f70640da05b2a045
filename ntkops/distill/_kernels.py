"""Kernels as distillation takes them: one, one a class, or several; and what common columns they have."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import torch
from linear_operator.operators import LinearOperator, to_linear_operator
from torch import Tensor

from ..errors import DeviceError, DtypeError, InputError, NonFiniteError, ShapeError
from ..operators.capabilities import capabilities, dense_from_tiles, taken_columns
from ..regression._operands import read_kernel
from ._limits import require_room
from ._stack import StackedOperator

__all__ = ["Kernels", "columns_of", "dense_of", "diagonal_of", "read_count", "read_kernels", "read_square"]

Kernels: TypeAlias = LinearOperator | Tensor | Sequence[LinearOperator | Tensor]


def read_kernels(K: Any, what: str = "the kernel") -> LinearOperator:
    """Return one operator ``(n, m)`` or ``(C, n, m)``: of a sequence, its members as a batch.

    Raises:
        InputError: If it is empty, or no kernel.
        ShapeError: If members differ in shape, or there is more than one batch axis.
        DtypeError: If members differ in dtype.
        DeviceError: If members live on different devices.
    """
    if isinstance(K, list | tuple):
        if not K:
            raise InputError(f"{what}: the sequence is empty; give one kernel for each class")
        parts = [to_linear_operator(read_kernel(part, f"{what} {i}")) for i, part in enumerate(K)]
        for i, part in enumerate(parts):
            if part.dim() != 2 or part.shape != parts[0].shape:
                raise ShapeError(
                    f"{what} {i} has shape {tuple(part.shape)}, the first {tuple(parts[0].shape)}: those "
                    "of a sequence are matrices of one shape"
                )
            if part.dtype != parts[0].dtype:
                raise DtypeError(f"{what} {i} has dtype {part.dtype}, the first {parts[0].dtype}; cast one")
            if part.device != parts[0].device:
                raise DeviceError(
                    f"{what} {i} lives on {part.device}, the first on {parts[0].device}; move one of them"
                )
        return StackedOperator(*parts)
    found = to_linear_operator(read_kernel(K, what))
    if found.dim() > 3:
        raise ShapeError(f"{what} has shape {tuple(found.shape)}: one batch axis, the classes, is the most")
    return found


def read_square(K: Any) -> LinearOperator:
    """Return one square operator ``(m, m)`` or ``(C, m, m)``.

    Raises:
        ShapeError: If it is not square.
    """
    found = read_kernels(K)
    if found.shape[-1] != found.shape[-2]:
        raise ShapeError(
            f"distillation starts from the square kernel of the samples, this one is {tuple(found.shape)}"
        )
    return found


def read_count(s: Any, size: int) -> int:
    """Return the number of distilled gradients.

    Raises:
        InputError: If it is no integer from 1 to the number of points.
    """
    if not isinstance(s, int) or isinstance(s, bool) or not 1 <= s <= size:
        raise InputError(f"s={s!r}: the number of distilled gradients is an integer from 1 to {size}")
    return s


def diagonal_of(kernel: LinearOperator) -> Tensor:
    """Return the exact diagonal ``(m,)`` in float64.

    Raises:
        NonFiniteError: If an entry is not finite.
    """
    with torch.no_grad():
        found = capabilities(kernel).diagonal().double()
    if not bool(torch.isfinite(found).all()):
        row = int((~torch.isfinite(found)).nonzero()[0][-1])
        raise NonFiniteError(f"the diagonal of the kernel is NaN or infinite in row {row}: drop that sample")
    return found


def columns_of(kernel: LinearOperator, chosen: Tensor) -> Tensor:
    """Return dense columns ``(m, b)``."""
    return taken_columns(kernel, chosen)


def dense_of(kernel: LinearOperator, why: str, copies: int = 4) -> Tensor:
    """Return the dense symmetric kernel ``(m, m)`` in float64, where that is allowed.

    Args:
        kernel: ``(m, m)``.
        why: What needs it, for the message.
        copies: Float64 matrices of its shape that the work holds at once, this one included.

    Raises:
        DenseMemoryError: If ``max_dense_bytes`` forbids it.
        NonFiniteError: If it has entries that are not finite.
    """
    require_room(kernel, why, copies)
    with torch.no_grad():
        dense = dense_from_tiles(kernel).double()
    if not bool(torch.isfinite(dense).all()):
        row, column = (~torch.isfinite(dense)).nonzero()[0].tolist()
        raise NonFiniteError(f"the kernel is NaN or infinite at ({row}, {column}): drop that sample")
    return (dense + dense.mT).mul_(0.5)
