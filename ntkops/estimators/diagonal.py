"""The diagonal of an operator."""

from __future__ import annotations

import time

import torch
from linear_operator.operators import LinearOperator
from torch import Tensor

from ..engines import count_passes
from ..results import Estimate
from ._request import Operand

__all__ = ["diagonal"]


def diagonal(operator: LinearOperator | Tensor) -> Estimate:
    r"""Compute the diagonal exactly, :math:`K_{ii} = |\nabla f_i|^2`.

    Args:
        operator: Square ``(*batch, n, n)`` operator or tensor.

    Returns:
        Exact `Estimate` with a value of shape ``(*batch, n)``. Cost: one per-sample pass for each output of
        a kernel of ours, one column of the identity for each entry of any other operator.

    Raises:
        ShapeError: If the operator is not square.

    Example:
        >>> import torch, ntkops
        >>> ntkops.diagonal(torch.diag(torch.tensor([3.0, 4.0]))).value.tolist()
        [3.0, 4.0]
    """
    start = time.perf_counter()
    with torch.no_grad(), count_passes() as tally:
        operand = Operand(operator)
        operand.require_square("the diagonal")
        value = operand.structure.diagonal().double()
    return Estimate.of_exact(value, passes=tally.total, seconds=time.perf_counter() - start)
