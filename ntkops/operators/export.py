"""Operators for SciPy's iterative solvers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from linear_operator.operators import LinearOperator

from ..errors import DtypeError, ShapeError

if TYPE_CHECKING:
    from scipy.sparse.linalg import LinearOperator as ScipyOperator

__all__ = ["to_scipy"]

_NUMPY_DTYPES = {torch.float16: np.float16, torch.float32: np.float32, torch.float64: np.float64}


def to_scipy(operator: LinearOperator) -> ScipyOperator:
    """Return the SciPy view of a two-dimensional operator; see `EngineOperator.to_scipy`."""
    from scipy.sparse.linalg import LinearOperator as ScipyOperator

    if operator.dim() != 2:
        raise ShapeError(
            f"SciPy operators are matrices, this one has shape {tuple(operator.shape)}: index its batch"
        )
    if operator.dtype not in _NUMPY_DTYPES:
        raise DtypeError(f"NumPy has no dtype for {operator.dtype}; use .to(torch.float32) first")
    dtype = _NUMPY_DTYPES[operator.dtype]

    def multiply(side: LinearOperator, array: Any) -> Any:
        if np.iscomplexobj(array):
            return multiply(side, array.real) + 1j * multiply(side, array.imag)
        if not np.issubdtype(array.dtype, np.number) and array.dtype != bool:
            raise DtypeError(f"the operator multiplies numbers, not an array of {array.dtype}")
        block = torch.as_tensor(np.ascontiguousarray(array), dtype=operator.dtype, device=operator.device)
        with torch.no_grad():
            return (side @ block).cpu().numpy()

    transposed = operator.mT
    return ScipyOperator(
        shape=tuple(operator.shape),
        dtype=dtype,
        matvec=lambda v: multiply(operator, v.reshape(-1)),
        rmatvec=lambda v: multiply(transposed, v.reshape(-1)),
        matmat=lambda v: multiply(operator, v),
        rmatmat=lambda v: multiply(transposed, v),
    )
