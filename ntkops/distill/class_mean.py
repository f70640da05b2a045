"""The mean of the class kernels, which methods for a single kernel work on."""

from __future__ import annotations

from typing import Any

import torch
from linear_operator.operators import DenseLinearOperator, LinearOperator
from torch import Tensor

from ..arguments import checked
from ..errors import InputError, ShapeError, ZeroKernelError
from ..operators.axes import StateAxis
from ..operators.base import EngineOperator
from ..operators.capabilities import capabilities
from ..operators.projected import ProjectedNTKOperator
from ._kernels import Kernels, MeanOperator, read_kernels

__all__ = ["class_mean", "class_shares", "mean_of"]


@checked
def class_mean(K: Kernels, *, weights: Tensor | str | None = None) -> LinearOperator:
    r"""Return :math:`\bar K = \sum_c w_c K^c`, by default the mean of the class kernels, lazily.

    Selection, principal components and Algorithm 1 need one kernel for all classes. The mean is, up to a
    factor, the kernel traced over outputs; it is not the kernel of the summed outputs.

    Args:
        K: Kernels ``(C, n, m)``, as ``outputs="each"`` has them, or a sequence of C; a single one is
            returned as it is.
        weights: None for 1/C each, so that classes with a larger trace count for more; "trace" for
            weights in proportion to 1 / tr K^c that keep the mean trace; or ``(C,)`` numbers ≥ 0.

    Returns:
        Lazy ``(n, m)``. Cost of a product: one for each class; with equal weights over a network's
        kernels what the traced kernel costs. "trace" evaluates the diagonals.

    Raises:
        InputError: If weights are negative, zero altogether, or not understood.
        ShapeError: If there is not one weight for each class.
        ZeroKernelError: If "trace" meets a class kernel of trace zero.

    References:
        Distilled NTK paper, Algorithm 1, line 3.

    Example:
        >>> import torch
        >>> from ntkops.distill import class_mean
        >>> K = torch.stack([torch.eye(3), 3 * torch.eye(3)])
        >>> class_mean(K).to_dense().diagonal().tolist()
        [2.0, 2.0, 2.0]
    """
    return mean_of(read_kernels(K), weights)


def mean_of(kernels: LinearOperator, weights: Any = None) -> LinearOperator:
    """Return the mean of kernels that were read, which may lie on several ranks; see `class_mean`."""
    if kernels.dim() == 2:
        return kernels
    if weights is None:
        traced = _traced(kernels)
        if traced is not None:
            return traced
    shares = class_shares(kernels, weights)
    if isinstance(kernels, DenseLinearOperator):
        mean = torch.zeros(kernels.shape[1:], dtype=torch.float64, device=kernels.device)
        for share, kernel in zip(shares, kernels.tensor, strict=True):
            mean.add_(kernel.double(), alpha=float(share))
        return DenseLinearOperator(mean.to(kernels.dtype))
    return MeanOperator(kernels, shares)


def class_shares(kernels: LinearOperator, weights: Any) -> Tensor:
    """Return the weights ``(C,)`` of a mean; see `class_mean`."""
    count = kernels.shape[0]
    if weights is None:
        return torch.full((count,), 1 / count, dtype=kernels.dtype, device=kernels.device)
    if isinstance(weights, str):
        if weights != "trace":
            raise InputError(f"weights={weights!r}: None, 'trace', or a number for each class")
        with torch.no_grad():
            traces = capabilities(kernels).space.sum(capabilities(kernels).diagonal())
        if not bool((traces > 0).all()):
            number = int((traces <= 0).nonzero()[0])
            raise ZeroKernelError(f"the kernel of class {number} has trace {float(traces[number]):.3g}")
        return (traces.mean() / (count * traces)).to(kernels.dtype)
    shares = torch.as_tensor(weights, dtype=kernels.dtype, device=kernels.device).detach()
    if shares.shape != (count,):
        raise ShapeError(f"weights of shape {tuple(shares.shape)} for {count} classes: pass one for each")
    if not bool((shares >= 0).all() and shares.sum() > 0 and torch.isfinite(shares).all()):
        raise InputError("weights of classes are finite, 0 or more, and not all 0")
    return shares


def _traced(kernels: LinearOperator) -> LinearOperator | None:
    """Return the mean of a network's class kernels as one operator of its engine."""
    # The classes' features are there, or will be; side by side they would be made and kept once more.
    if not isinstance(kernels, EngineOperator) or isinstance(kernels, ProjectedNTKOperator):
        return None
    core = kernels._core
    rows, columns = core.rows, core.columns
    if not (isinstance(rows, StateAxis) and isinstance(columns, StateAxis)):
        return None
    first = StateAxis(rows.inputs, rows.outputs.flatten(0, 1), rows.pick)
    second = first
    if columns is not rows:
        second = StateAxis(columns.inputs, columns.outputs.flatten(0, 1), columns.pick)
    return kernels._rebuild(core.with_axes(first, second)) * (1 / kernels.shape[0])
