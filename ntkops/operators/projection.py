"""A projection of the parameters as an operator."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, Literal, Self, TypeAlias

import torch
from linear_operator.operators import DenseLinearOperator, LinearOperator
from torch import Tensor

from ..arguments import checked
from ..engines import format_bytes, tensor_bytes
from ..errors import (
    DenseMemoryError,
    DeviceError,
    DtypeError,
    InputError,
    ShapeError,
    StaleOperatorError,
    UnsupportedOperationError,
)
from ..model.context import full_precision
from ..projections import Projection
from .expression import Expression
from .positions import resolve_index
from .products import dense_limit

__all__ = [
    "MatrixProjection",
    "ProjectionLike",
    "ProjectionOperator",
    "as_projection",
]

Picked = range | tuple[int, ...]
_numbers = itertools.count()  # of matrices that are given, which have no seed


ProjectionLike: TypeAlias = int | Projection | Tensor | LinearOperator
"""A projection: one of `ntkops.projections`; a number k, for a random one to k features; or a constant
``(k, P)`` tensor or operator."""


class ProjectionOperator(Expression):
    """A projection P as a lazy ``(k, P)`` operator: products, adjoint, columns, a guarded dense matrix.

    Args:
        projection: The map.
        dtype: Dtype of the vectors.
        device: Device of the vectors.
        max_dense_bytes: Largest dense matrix allowed; "auto" is a quarter of what is free, 0 never.
        transposed: Whether the operator is Pᵀ.
        images: Rows of P, None for all.
        entries: Columns of P, None for all.

    Example:
        >>> import torch
        >>> from ntkops.operators import ProjectionOperator
        >>> from ntkops.projections import SJLT
        >>> P = ProjectionOperator(SJLT(dim=1000, k=64, seed=0))
        >>> P.shape, (P @ torch.ones(1000)).shape, (P.mT @ torch.ones(64, 2)).shape
        (torch.Size([64, 1000]), torch.Size([64]), torch.Size([1000, 2]))
    """

    @checked
    def __init__(
        self,
        projection: Projection,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        max_dense_bytes: int | Literal["auto"] = "auto",
        transposed: bool = False,
        images: Picked | None = None,
        entries: Picked | None = None,
    ) -> None:
        if not isinstance(projection, Projection):
            raise InputError(f"projection is a {type(projection).__name__}: pass one of ntkops.projections")
        place = torch.device(device)
        limit = dense_limit(max_dense_bytes, place)
        images = range(projection.k) if images is None else images
        entries = range(projection.dim) if entries is None else entries
        # Numbers, not tensors: linear_operator casts and differentiates every tensor that it finds.
        super().__init__(
            projection=projection,
            dtype=dtype,
            device=place,
            max_dense_bytes=limit,
            transposed=transposed,
            images=images,
            entries=entries,
        )
        self.projection = projection
        self._images, self._entries = images, entries
        self._dtype, self._device, self._limit, self._flipped = dtype, place, limit, transposed

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the vectors."""
        return self._dtype

    @property
    def device(self) -> torch.device:
        """Device of the vectors."""
        return self._device

    @property
    def max_dense_bytes(self) -> int:
        """Limit for the dense matrix in bytes; 0 means never."""
        return self._limit

    def __repr__(self) -> str:
        """Show the projection and where it lives."""
        suffix = ".mT" if self._flipped else ""
        return f"{type(self).__name__}({self.projection!r}, {self.dtype}, {self.device}){suffix}"

    def _size(self) -> torch.Size:
        shape = len(self._images), len(self._entries)
        return torch.Size(shape[::-1] if self._flipped else shape)

    def _like(self, **changes: Any) -> Self:
        """Return the operator with some of its arguments changed."""
        return type(self)(**{**self._kwargs, **changes})

    def _transpose_nonbatch(self) -> Self:
        return self._like(transposed=not self._flipped)

    def _expand_batch(self, batch_shape: torch.Size | Sequence[int]) -> LinearOperator:
        if not tuple(batch_shape):
            return self
        raise UnsupportedOperationError("a projection is one matrix and has no batch; it multiplies batches")

    def _moved(self, dtype: torch.dtype, device: torch.device) -> Self:
        return self._like(dtype=dtype, device=device)

    def matmul(self, other: Any) -> Any:
        """Multiply with a vector, a block of columns, or another operator (lazily).

        Args:
            other: ``(n,)``, ``(*batch, n, c)``, or a LinearOperator.

        Returns:
            ``(m,)`` or ``(*batch, m, c)``, differentiable; a lazy product for an operator.
        """
        if not isinstance(other, Tensor):
            return super().matmul(other)
        self._check_operand(other)
        return self._matmul(other)  # which is differentiable by itself, and twice

    def _matmul(self, rhs: Tensor) -> Tensor:
        rows = rhs if rhs.dim() == 1 else rhs.mT
        result = self._pull(rows) if self._flipped else self._push(rows)
        return result if rhs.dim() == 1 else result.mT

    def _push(self, rows: Tensor) -> Tensor:
        """Return P x for each row of ``(..., entries)``."""
        if _is_run(self._entries):
            found = self.projection.apply(rows, self._entries[0])
        else:
            found = self.projection.apply(_spread(rows, self._entries, self.projection.dim))
        return (
            found
            if len(self._images) == self.projection.k and _is_run(self._images)
            else (found[..., _positions(self._images, found)])
        )

    def _pull(self, rows: Tensor) -> Tensor:
        """Return Pᵀ y for each row of ``(..., images)``."""
        rows = _spread(rows, self._images, self.projection.k)
        if _is_run(self._entries):
            return self.projection.adjoint(rows, self._entries[0], self._entries[-1] + 1)
        return self.projection.adjoint(rows)[..., _positions(self._entries, rows)]

    def _getitem(self, row_index: Any, col_index: Any, *batch_indices: Any) -> Self:
        images, entries = (col_index, row_index) if self._flipped else (row_index, col_index)
        return self._like(images=_pick(self._images, images), entries=_pick(self._entries, entries))

    def _get_indices(self, row_index: Tensor, col_index: Tensor, *batch_indices: Tensor) -> Tensor:
        rows, cols = torch.broadcast_tensors(row_index, col_index)
        images, entries = (cols, rows) if self._flipped else (rows, cols)
        one = torch.ones(1, dtype=self.dtype, device=self.device)
        found, position = torch.unique(entries, return_inverse=True)
        columns = torch.stack([self.projection.apply(one, self._entries[int(entry)]) for entry in found])
        return columns[:, _positions(self._images, one)][position, images]

    def to_dense(self) -> Tensor:
        """Write the matrix down.

        Returns:
            ``(k, P)``, or ``(P, k)`` for the transpose.

        Raises:
            DenseMemoryError: If it exceeds ``max_dense_bytes``, before anything is allocated.
        """
        needed = tensor_bytes(self.shape, self.dtype)
        if needed > self._limit:
            raise DenseMemoryError(
                f"the dense {self.shape[0]} x {self.shape[1]} projection needs {format_bytes(needed)}, above "
                f"max_dense_bytes={format_bytes(self._limit)}; use products P @ V and P.mT @ V, or raise "
                "max_dense_bytes"
            )
        dense = self._pull(torch.eye(len(self._images), dtype=self.dtype, device=self.device))
        return dense.mT if self._flipped else dense


def _is_run(picked: Picked) -> bool:
    """Whether positions follow each other, at least one."""
    return isinstance(picked, range) and picked.step == 1 and len(picked) > 0


def _pick(picked: Picked, index: Any) -> Picked:
    """Return the positions that an index selects among positions."""
    if isinstance(index, slice):
        return picked[index]
    return tuple(picked[position] for position in resolve_index(index, len(picked)).tolist())


def _positions(picked: Picked, like: Tensor) -> Tensor:
    """Return positions as an index tensor beside another tensor."""
    return torch.tensor(list(picked), dtype=torch.int64, device=like.device)


def _spread(rows: Tensor, picked: Picked, length: int) -> Tensor:
    """Lay entries out where they belong in rows of a length; what is picked twice adds up."""
    if _is_run(picked) and len(picked) == length:
        return rows
    wide = rows.new_zeros((*rows.shape[:-1], length))
    return wide.index_add(-1, _positions(picked, rows), rows)


# -- what may stand for a projection in an operator: one of ours, a dense matrix, or any lazy operator


class MatrixProjection(Projection):
    """A given (k, P) matrix, dense or lazy, as a projection; a constant."""

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
        """Return some columns of the matrix, itself for all."""
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
    projection: object, num_parameters: int, dtype: torch.dtype, device: torch.device
) -> Projection:
    """Return the projection that something stands for, checked against the kernel that it is to meet.

    It is a `Projection`, its operator, a ``(k, P)`` tensor, or any LinearOperator of that shape.

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
