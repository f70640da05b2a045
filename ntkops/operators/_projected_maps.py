"""What may stand for a projection in an operator: one of ours, a dense matrix, or any lazy operator."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from linear_operator.operators import DenseLinearOperator, LinearOperator
from torch import Tensor

from ..errors import (
    DeviceError,
    DtypeError,
    InputError,
    ShapeError,
    StaleOperatorError,
    UnsupportedOperationError,
)
from ..model.context import full_precision
from ..projections import Projection
from ._projected_operator import ProjectionOperator

__all__ = ["MatrixProjection", "as_projection"]

_numbers = itertools.count()


class MatrixProjection(Projection):
    """A given (k, P) matrix, dense or lazy, as a projection.

    Args:
        matrix: ``(k, P)`` tensor or LinearOperator, a constant.
    """

    _may_be_tall = True  # a matrix that is given was not drawn in vain

    def __init__(self, matrix: Tensor | LinearOperator) -> None:
        super().__init__(matrix.shape[-1], matrix.shape[-2], seed=next(_numbers))
        self.matrix = matrix
        self._version = _version(matrix)

    def check_fresh(self) -> None:
        """Raise if a dense matrix was changed in place since it was taken.

        Raises:
            StaleOperatorError: If it was.
        """
        if _version(self.matrix) != self._version:
            raise StaleOperatorError(
                "the projection's matrix was changed in place after projected_ntk took it by reference: "
                "build the projected kernel again"
            )

    def _arguments(self) -> dict[str, Any]:
        return {"matrix": self.matrix}

    @property
    def key(self) -> tuple[object, ...]:
        """A number of its own: two matrices are two maps."""
        return type(self).__name__, self.seed

    def __repr__(self) -> str:
        """Show the kind and the shape of the matrix."""
        return f"{type(self).__name__}({type(self.matrix).__name__} {tuple(self.matrix.shape)})"

    def to(self, dtype: torch.dtype, device: torch.device) -> MatrixProjection:
        """Return the same matrix elsewhere."""
        return MatrixProjection(self.matrix.to(dtype=dtype, device=device))

    def _part(self, start: int, stop: int) -> Tensor | LinearOperator:
        return self.matrix if (start, stop) == (0, self.dim) else self.matrix[:, start:stop]

    def _add(self, state: Tensor, block: Tensor, offset: int) -> None:
        part = self._part(offset, offset + block.shape[1])
        with full_precision(block.device):
            state += (part @ block.to(part.dtype).mT).mT

    def _read(self, state: Tensor) -> Tensor:
        return state

    def _pull(self, block: Tensor, start: int, stop: int) -> Tensor:
        part = self._part(start, stop)
        with full_precision(block.device):
            return (part.mT @ block.to(part.dtype).mT).mT


def _version(matrix: Tensor | LinearOperator) -> int:
    """Return the version of a dense matrix; a tensor made in inference mode has none."""
    return matrix._version if isinstance(matrix, Tensor) and not matrix.is_inference() else 0


def as_projection(
    projection: Any, num_parameters: int, dtype: torch.dtype, device: torch.device
) -> Projection:
    """Return the projection that something stands for, checked against the kernel that it is to meet.

    Args:
        projection: A `Projection`, its operator, a ``(k, P)`` tensor, or any LinearOperator of that shape.
        num_parameters: Number P of selected parameters' entries.
        dtype: Dtype of the kernel.
        device: Device of the kernel.

    Raises:
        InputError: If it is nothing of these.
        ShapeError: If it is no ``(k, P)`` matrix.
        DtypeError: If a matrix has another dtype than the kernel.
        DeviceError: If a matrix lives on another device.
        UnsupportedOperationError: If a matrix requires grad: no derivative goes through it.
    """
    if isinstance(projection, DenseLinearOperator):
        projection = projection.tensor
    if isinstance(projection, ProjectionOperator):
        projection = projection.projection
    if not isinstance(projection, Projection | Tensor | LinearOperator):
        raise InputError(
            f"projection is a {type(projection).__name__}: pass one of ntkops.projections, a number k of "
            "features, or a (k, P) tensor or LinearOperator whose rows span the subspace"
        )
    shape = tuple(projection.shape)
    if len(shape) != 2 or shape[1] != num_parameters:
        raise ShapeError(
            f"the projection has shape {shape}, but the kernel has {num_parameters} selected parameters' "
            f"entries: it has to be (k, {num_parameters})"
        )
    if isinstance(projection, Projection):
        return projection
    if projection.dtype != dtype:
        raise DtypeError(f"the kernel has dtype {dtype}, the projection {projection.dtype}; cast one of them")
    if projection.device is not None and projection.device != device:
        raise DeviceError(f"the kernel lives on {device}, the projection on {projection.device}")
    if projection.requires_grad:
        raise UnsupportedOperationError(
            "the projection requires grad, but it is taken as a constant: pass projection.detach()"
        )
    return MatrixProjection(projection)
