"""Kernels as the regression sees them: checked, multiplied, and dense only where that is allowed."""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np
import torch
from linear_operator.operators import LinearOperator
from torch import Tensor

from ..errors import (
    DenseMemoryError,
    DtypeError,
    InputError,
    NonFiniteError,
    ShapeError,
    ZeroKernelError,
)
from ..estimators import diagonal
from ..operators.counting import column_space, multiply, row_space
from ..operators.structure import dense_bytes_allowed, fits_dense

__all__ = [
    "Kernel",
    "dense_of",
    "dense_rows",
    "is_spread",
    "may_be_dense",
    "mean_diagonal",
    "read_array",
    "read_kernel",
    "to_float64",
]

Kernel: TypeAlias = LinearOperator | Tensor


def read_kernel(K: Any, what: str = "the kernel", dtype: torch.dtype | None = None) -> Kernel:
    """Return an operator or a tensor, its entries checked where they are stored.

    Args:
        K: An operator, a tensor, or an array or list of numbers.
        what: Its name in messages.
        dtype: Dtype that arrays and lists are cast to; None for their own.

    Raises:
        InputError: If it is neither an operator, a tensor nor a dense array of real numbers.
        ShapeError: If it is not a matrix with entries.
        DtypeError: If it is neither float32 nor float64 (or bfloat16 of an operator).
        NonFiniteError: If a stored entry is NaN or infinite.
    """
    if not isinstance(K, LinearOperator | Tensor):
        K = read_array(K, what, dtype)
        K = K if K.dtype.is_floating_point else K.double()
    if K.dim() < 2:
        raise ShapeError(
            f"{what} needs shape (*batch, n, m), got {tuple(K.shape)}. Reshape your data: one row for each "
            "sample, one column for each that the fit has seen"
        )
    if 0 in (*K.shape[:-2], row_space(K).size, column_space(K).size):
        raise ShapeError(
            f"{what} needs entries: {K.shape[-1]} feature(s) (shape={tuple(K.shape)}) while a minimum of 1 "
            "is required."
        )
    if not K.dtype.is_floating_point:
        raise DtypeError(f"{what} has dtype {K.dtype}; cast it to a floating dtype")
    if isinstance(K, Tensor):
        require_finite(K, what)
        return K.detach()
    return K


def read_array(given: Any, what: str, dtype: torch.dtype | None = None) -> Tensor:
    """Return what is no tensor as one: arrays, lists and what turns into arrays, integers as float64.

    Args:
        given: What a user passed.
        what: Its name in messages.
        dtype: Dtype to cast floating numbers to, as scikit-learn does; None for that of the array.

    Raises:
        InputError: If it is sparse, complex, or nothing that turns into an array.
        DtypeError: If it holds strings or objects that are no numbers.
        ShapeError: If its rows are of unlike length.
    """
    if hasattr(given, "tocsr"):
        raise InputError(f"{what}: sparse input is not supported; pass its dense array, .toarray()")
    if not hasattr(given, "__array__") and not isinstance(given, list | tuple):
        raise InputError(
            f"{what}: expected a LinearOperator, a torch.Tensor or an array, got {type(given).__name__}"
        )
    try:
        array = np.asarray(given)
    except ValueError as error:  # rows of unlike length
        raise ShapeError(f"{what} is no array: {error}") from error
    if array.dtype.kind == "c":
        raise InputError(f"{what}: Complex data not supported, got {array.dtype}")
    if array.dtype.kind not in "fiub":
        try:
            array = array.astype(np.float64)
        except (TypeError, ValueError) as error:
            raise DtypeError(
                f"{what} has dtype {array.dtype} and holds what is no number: {error}"
            ) from error
    tensor = torch.from_numpy(np.array(array))  # a copy: an array may be read-only, a tensor may not
    return tensor if dtype is None or not tensor.dtype.is_floating_point else tensor.to(dtype)


def require_finite(values: Tensor, what: str) -> Tensor:
    """Return the values.

    Raises:
        NonFiniteError: If one of them is NaN or infinite, naming the first.
    """
    if not bool(torch.isfinite(values).all()):
        where = tuple((~torch.isfinite(values)).nonzero()[0].tolist())
        raise NonFiniteError(
            f"{what} is NaN or infinite at {where}: the network's gradients overflow {values.dtype} "
            "there, or "
            "the input is not finite; compute it in float64 or drop that sample"
        )
    return values


def mean_diagonal(K: Kernel) -> float:
    """Return the mean of the diagonal over rows and classes, exact.

    Raises:
        InputError: If an entry is negative, so that no kernel is positive semidefinite with it.
        ZeroKernelError: If it is not positive, so that nothing is relative to it.
    """
    entries = K.diagonal(dim1=-2, dim2=-1) if isinstance(K, Tensor) else diagonal(K, method="exact").value
    space = row_space(K)
    entries = require_finite(entries.double(), "the diagonal of the kernel")
    if space.any(bool((entries < 0).any())):
        raise InputError(
            f"the kernel is not positive semidefinite: its diagonal has an entry {float(entries.min()):.3g}"
        )
    mean = float(space.sum(entries).mean()) / space.size
    if not mean > 0:
        raise ZeroKernelError(
            f"the mean diagonal of the kernel is {mean:.3g}, so that no ridge is relative to it: "
            "check that the "
            "selected parameters reach the output, or pass relative=False"
        )
    return mean


def is_spread(K: Kernel) -> bool:
    """Whether the rows of a kernel lie on several processes."""
    return row_space(K).is_spread


def may_be_dense(K: Kernel) -> bool:
    """Whether the dense matrix may be made: no part's limit of bytes or of backward passes forbids it."""
    return fits_dense(K)


def to_float64(K: Kernel, method: str) -> Tensor:
    """Return the dense matrix in float64, as factorisations want it.

    Raises:
        DenseMemoryError: If the operator's limit forbids it; the message names the lazy ways.
        BackwardLimitError: If that of its engine does.
    """
    if isinstance(K, Tensor):
        return K.double()
    if K.shape.numel() * K.dtype.itemsize > dense_bytes_allowed(K):
        raise DenseMemoryError(
            f"method={method!r} needs the dense {'x'.join(map(str, K.shape))} kernel, which its "
            "max_dense_bytes forbids; raise it, or take method='cg', 'lsmr' or 'nystrom'"
        )
    return require_finite(dense_of(K), "the kernel").double()


def dense_of(K: LinearOperator) -> Tensor:
    """Return the dense matrix of an operator, without a graph."""
    with torch.no_grad():
        return K.to_dense()


def dense_rows(K: Kernel, start: int, stop: int) -> Tensor:
    """Return rows of a cross kernel, ``(*batch, stop - start, n)``, in float64.

    Where a dense block is forbidden they come from products with columns of the identity.
    """
    if isinstance(K, Tensor):
        return K[..., start:stop, :].double()
    with torch.no_grad():
        if may_be_dense(K):
            block = K[..., start:stop, :].to_dense()
        else:
            unit = torch.zeros(K.shape[-2], stop - start, dtype=K.dtype, device=K.device)
            unit[torch.arange(start, stop), torch.arange(stop - start)] = 1
            block = multiply(K.mT, unit.expand(*K.shape[:-2], *unit.shape)).mT
    return require_finite(block, "the cross kernel").double()
