"""Kernels as distillation takes them: one, one a class, or several."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, TypeAlias

import torch
from linear_operator.operators import LinearOperator, to_linear_operator
from torch import Tensor

from ..engines import format_bytes, tensor_bytes
from ..engines.memory import budget_bytes
from ..errors import (
    DenseMemoryError,
    DeviceError,
    DtypeError,
    InputError,
    NonFiniteError,
    ShapeError,
    UnsupportedOperationError,
)
from ..operators.capabilities import (
    Capabilities,
    Factors,
    Tile,
    capabilities,
    dense_bytes_allowed,
    dense_from_tiles,
    multiply,
    taken_columns,
)
from ..operators.dense import DenseFallbacks
from ..regression._operands import read_kernel
from ..vectors import Space

__all__ = [
    "Kernels",
    "MeanOperator",
    "StackedOperator",
    "columns_of",
    "dense_of",
    "diagonal_of",
    "has_room",
    "read_count",
    "read_kernels",
    "read_square",
    "require_room",
]


def require_room(operator: LinearOperator, why: str = "", copies: int = 0) -> None:
    """Raise unless the dense result, and what is made of it, fit into ``max_dense_bytes``.

    Args:
        operator: The operator.
        why: What needs it, and what does not, for the message.
        copies: Float64 matrices of its shape that the work holds at once; 0 where the result is all there is.

    Raises:
        DenseMemoryError: If it does not.
    """
    needed, allowed = _room(operator, copies)
    if needed > allowed:
        beside = f", with what is made of it {format_bytes(needed)}" if copies else ""
        raise DenseMemoryError(
            f"{why or 'the dense matrix'}: the dense {' x '.join(map(str, operator.shape))} kernel takes "
            f"{format_bytes(tensor_bytes(operator.shape, operator.dtype))}{beside}, above max_dense_bytes="
            f"{format_bytes(allowed)}; raise it, or use products"
        )


def has_room(operator: LinearOperator, copies: int) -> bool:
    """Whether `require_room` passes."""
    needed, allowed = _room(operator, copies)
    return needed <= allowed


def _room(operator: LinearOperator, copies: int) -> tuple[int, int]:
    """Return the bytes that are needed and those that are allowed."""
    allowed = dense_bytes_allowed(operator)
    if not copies:
        return tensor_bytes(operator.shape, operator.dtype), allowed
    # A dense kernel that was given has no limit of its own: what is free bounds the work on it.
    free = budget_bytes(operator.device or "cpu")
    return copies * tensor_bytes(operator.shape, torch.float64), min(allowed, free)


# -- kernels side by side and their mean, lazily: the class kernels as one operator, and what they share


class StackedOperator(DenseFallbacks, LinearOperator, Capabilities):
    """Operators of one shape as a batch ``(C, n, m)``.

    Args:
        *parts: The C operators, ``(n, m)``.
    """

    def __init__(self, *parts: LinearOperator) -> None:
        super().__init__(*parts)
        self._parts = parts

    @property
    def parts(self) -> tuple[LinearOperator, ...]:
        """The operators, one for each entry of the batch."""
        return self._parts

    @property
    def max_dense_bytes(self) -> int:
        """Limit for one dense result in bytes, the smallest of the parts."""
        return min(dense_bytes_allowed(part) for part in self._parts)

    @property
    def space(self) -> Space:
        """The space of the rows."""
        space: Space = capabilities(self._parts[0]).space
        return space

    @property
    def domain(self) -> Space:
        """The space of the columns."""
        domain: Space = capabilities(self._parts[0]).domain
        return domain

    # what the operators can do, one beside the other

    @property
    def _each(self) -> list[Capabilities]:
        return [capabilities(part) for part in self._parts]

    @property
    def symmetric(self) -> bool:  # type: ignore[override]
        """Whether all of them are."""
        return all(part.symmetric for part in self._each)

    def tile_size(self) -> int:
        """Return the smallest of theirs."""
        return min(part.tile_size() for part in self._each)

    def tiles(self, size: int | None = None) -> Iterator[Tile]:
        """Yield their tiles; of one that is symmetric beside others that are not, those of both triangles."""
        size, symmetric = size or self.tile_size(), self.symmetric
        groups = (part.tiles(size) if symmetric else part.all_tiles(size) for part in self._each)
        for group in zip(*groups, strict=True):
            yield Tile(group[0].rows, group[0].cols, torch.stack([tile.block for tile in group]))

    def exact_cost(self, quantity: str) -> float:
        """Return the passes of all of them."""
        both = quantity == "tiles" and not self.symmetric
        return sum(part.exact_cost(quantity) * (2 if both and part.symmetric else 1) for part in self._each)

    def factors(self) -> Factors | None:
        """Return factors of all of them, where they are of one shape."""
        found = [part.factors() for part in self._each]
        pairs = [pair for pair in found if pair is not None]
        if len(pairs) < len(found) or len({(a.shape, b.shape) for a, b in pairs}) > 1:
            return None
        left = StackedOperator(*(a for a, _ in pairs))
        return left, left if self.symmetric else StackedOperator(*(b for _, b in pairs))

    def _size(self) -> torch.Size:
        return torch.Size((len(self._parts), *self._parts[0].shape))

    def _matmul(self, rhs: Tensor) -> Tensor:
        if rhs.dim() == 1:
            return self._matmul(rhs.unsqueeze(-1)).squeeze(-1)
        blocks = rhs.expand(*self.batch_shape, *rhs.shape[-2:])
        return torch.stack(
            [apply(part, block) for part, block in zip(self._parts, blocks.unbind(0), strict=True)]
        )

    def take_columns(self, chosen: Tensor) -> Tensor:
        """Return dense columns ``(C, n, b)``."""
        return torch.stack([taken_columns(part, chosen) for part in self._parts])

    def _transpose_nonbatch(self) -> StackedOperator:
        return StackedOperator(*(part.mT for part in self._parts))

    def _getitem(self, row_index: Any, col_index: Any, *batch_indices: Any) -> LinearOperator:
        chosen: Any = batch_indices[0] if batch_indices else slice(None)
        numbers = torch.arange(len(self._parts))[chosen]
        cut = [self._parts[int(i)]._getitem(row_index, col_index) for i in numbers.reshape(-1)]
        return cut[0] if numbers.dim() == 0 else StackedOperator(*cut)

    def _get_indices(self, row_index: Tensor, col_index: Tensor, *batch_indices: Tensor) -> Tensor:
        (numbers,) = batch_indices
        shape = torch.broadcast_shapes(row_index.shape, col_index.shape, numbers.shape)
        rows, columns, numbers = (i.expand(shape).reshape(-1) for i in (row_index, col_index, numbers))
        values = torch.zeros(len(rows), dtype=self.dtype, device=self.device)
        for number in numbers.unique().tolist():
            here = numbers == number
            values[here] = self._parts[number]._get_indices(rows[here], columns[here])
        return values.reshape(shape)

    def _diagonal(self) -> Tensor:
        return torch.stack([capabilities(part).diagonal() for part in self._parts])

    def _expand_batch(self, batch_shape: Any) -> LinearOperator:
        return self if tuple(batch_shape) == tuple(self.batch_shape) else super()._expand_batch(batch_shape)

    def to_dense(self) -> Tensor:
        """Return the dense kernels ``(C, n, m)``, each guarded by its own ``max_dense_bytes``."""
        return torch.stack([part.to_dense() for part in self._parts])


class MeanOperator(DenseFallbacks, LinearOperator, Capabilities):
    r"""The weighted mean :math:`\sum_c w_c K^c` of a batch of kernels.

    Args:
        base: ``(C, n, n)``.
        weights: ``(C,)``, positive, in the dtype of the kernels.
    """

    def __init__(self, base: LinearOperator, weights: Tensor) -> None:
        super().__init__(base, weights)
        self._base, self._weights = base, weights

    @property
    def max_dense_bytes(self) -> int:
        """Limit for one dense result in bytes, that of the class kernels."""
        return dense_bytes_allowed(self._base)

    @property
    def space(self) -> Space:
        """The space of the rows."""
        space: Space = capabilities(self._base).space
        return space

    @property
    def domain(self) -> Space:
        """The space of the columns."""
        domain: Space = capabilities(self._base).domain
        return domain

    # what the batch can do, averaged

    @property
    def symmetric(self) -> bool:  # type: ignore[override]
        """Whether the batch is."""
        return bool(capabilities(self._base).symmetric)

    def tile_size(self) -> int:
        """Return that of the batch."""
        size: int = capabilities(self._base).tile_size()
        return size

    def tiles(self, size: int | None = None) -> Iterator[Tile]:
        """Yield the mean of the batch's tiles."""
        for tile in capabilities(self._base).tiles(size):
            yield Tile(tile.rows, tile.cols, self.mean(tile.block))

    def exact_cost(self, quantity: str) -> float:
        """Return that of the batch."""
        cost: float = capabilities(self._base).exact_cost(quantity)
        return cost

    def mean(self, values: Tensor) -> Tensor:
        """Return the weighted mean over the first axis of ``(C, ...)``."""
        return torch.einsum("c,c...->...", self._weights, values)

    def _size(self) -> torch.Size:
        return self._base.shape[1:]

    def _matmul(self, rhs: Tensor) -> Tensor:
        if rhs.dim() == 1:
            return self._matmul(rhs.unsqueeze(-1)).squeeze(-1)
        return self.mean(apply(self._base, rhs.expand(self._base.shape[0], *rhs.shape)))

    def take_columns(self, chosen: Tensor) -> Tensor:
        """Return dense columns ``(n, b)``."""
        return self.mean(taken_columns(self._base, chosen))

    def _transpose_nonbatch(self) -> MeanOperator:
        return self if capabilities(self._base).symmetric else MeanOperator(self._base.mT, self._weights)

    def _getitem(self, row_index: Any, col_index: Any, *batch_indices: Any) -> LinearOperator:
        return MeanOperator(self._base._getitem(row_index, col_index, slice(None)), self._weights)

    def _get_indices(self, row_index: Tensor, col_index: Tensor, *batch_indices: Tensor) -> Tensor:
        shape = torch.broadcast_shapes(row_index.shape, col_index.shape)
        classes = torch.arange(len(self._weights)).reshape(-1, *(1 for _ in shape))
        full = (len(self._weights), *shape)
        entries = (i.expand(full) for i in (row_index, col_index, classes))
        return self.mean(self._base._get_indices(*entries))

    def _diagonal(self) -> Tensor:
        return self.mean(capabilities(self._base).diagonal())

    def to_dense(self) -> Tensor:
        """Return the dense mean, guarded by ``max_dense_bytes``."""
        require_room(self)
        return dense_from_tiles(self)


def apply(operator: LinearOperator, block: Tensor) -> Tensor:
    """Return a product: counted and checked, unless a graph is being recorded."""
    recorded = torch.is_grad_enabled() and (operator.requires_grad or block.requires_grad)
    return operator @ block if recorded else multiply(operator, block)


# -- kernels as distillation takes them: one, one a class, or several; and what common columns they have


Kernels: TypeAlias = LinearOperator | Tensor | Sequence[LinearOperator | Tensor]


def read_kernels(K: Any, what: str = "the kernel", *, over_ranks: bool = False) -> LinearOperator:
    """Return one operator ``(n, m)`` or ``(C, n, m)``: of a sequence, its members as a batch.

    Args:
        K: What was given.
        what: Its name in messages.
        over_ranks: Whether its rows may lie on several ranks.

    Raises:
        InputError: If it is empty, or no kernel, or some members lie on several ranks and others do not.
        UnsupportedOperationError: If it lies on several ranks, and may not.
        ShapeError: If members differ in shape, or there is more than one batch axis.
        DtypeError: If members differ in dtype.
        DeviceError: If members live on different devices.
    """
    if isinstance(K, list | tuple):
        if not K:
            raise InputError(f"{what}: the sequence is empty; give one kernel for each class")
        parts = [to_linear_operator(read_kernel(part, f"{what} {i}")) for i, part in enumerate(K)]
        spaces = [capabilities(part).space for part in parts]
        for i, part in enumerate(parts):
            _require_here(spaces[i], what, over_ranks)
            if spaces[i].is_spread != spaces[0].is_spread:
                raise InputError(f"{what} {i} and the first do not both lie on several ranks")
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
    _require_here(capabilities(found).space, what, over_ranks)
    if found.dim() > 3:
        raise ShapeError(f"{what} has shape {tuple(found.shape)}: one batch axis, the classes, is the most")
    return found


def _require_here(space: Space, what: str, over_ranks: bool) -> None:
    if space.is_spread and not over_ranks:
        raise UnsupportedOperationError(
            f"{what} lies on several ranks, and this is for one process. What there is over ranks: "
            "distill.select by 'random', 'fps', 'rpcholesky' or 'greedy', the fit of its points, and "
            "predictions"
        )


def read_square(K: Any, *, over_ranks: bool = False) -> LinearOperator:
    """Return one square operator ``(m, m)`` or ``(C, m, m)``; see `read_kernels`.

    Raises:
        ShapeError: If it is not square.
    """
    found = read_kernels(K, over_ranks=over_ranks)
    source = capabilities(found)
    if not source.space.matches(source.domain):
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
    """Return the exact diagonal ``(m,)`` in float64; over several ranks this rank's rows.

    Raises:
        NonFiniteError: If an entry is not finite.
    """
    with torch.no_grad():
        found = capabilities(kernel).diagonal().double()

    def check() -> None:
        if not bool(torch.isfinite(found).all()):
            row = int((~torch.isfinite(found)).nonzero()[0][-1])
            raise NonFiniteError(
                f"the diagonal of the kernel is NaN or infinite in row {row}: drop that sample"
            )

    capabilities(kernel).space.together(check, "the diagonal")
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
