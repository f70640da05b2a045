"""What the Jacobian and the kernel share: one thin `LinearOperator` over two axes and an engine.

The selected parameters are the operator's positional tensors, so that linear_operator can
differentiate, cast and rebuild it. Everything else travels in one opaque `Core`: the engine and the
two axes. Slices, transposes and batch methods replace an axis and share the rest.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NoReturn, Self

import numpy as np
import torch
from linear_operator.operators import LinearOperator
from linear_operator.utils.generic import _to_helper
from torch import Tensor

from ..engines import AutogradEngine, format_bytes, free_bytes, shared_store, tensor_bytes
from ..errors import (
    DenseMemoryError,
    DeviceError,
    DtypeError,
    OutOfRangeError,
    ShapeError,
    UnsupportedOperationError,
)
from ..results import EngineInfo
from ..vectors import Space
from .axes import Axis, ParameterAxis, StateAxis
from .dense import DenseFallbacks
from .export import to_scipy

__all__ = ["Core", "EngineOperator", "dense_limit"]

logger = logging.getLogger(__name__)


def dense_limit(max_dense_bytes: int | Literal["auto"], device: torch.device) -> int:
    """Return the byte limit for dense results: a quarter of what is free now for "auto".

    Raises:
        ShapeError: If the limit is neither "auto" nor a non-negative integer.
    """
    if max_dense_bytes == "auto":
        return free_bytes(device) // 4
    if not isinstance(max_dense_bytes, int) or isinstance(max_dense_bytes, bool) or max_dense_bytes < 0:
        raise ShapeError(f"max_dense_bytes={max_dense_bytes!r}: pass 'auto', 0 (never) or a number of bytes")
    return max_dense_bytes


@dataclass
class Spending:
    """Passes spent on products so far: what decides when a dense block is the cheaper way."""

    passes: float = 0.0


@dataclass(frozen=True, eq=False)
class Core:
    """What an operator is, apart from its parameters.

    It has no attribute that linear_operator looks for on tensors (``to``, ``clone``, ``dtype``,
    ``requires_grad``), so that it passes through every rebuild untouched.
    """

    engine: AutogradEngine
    rows: Axis
    columns: Axis
    max_dense_bytes: int
    spending: Spending = field(default_factory=Spending)

    @property
    def symmetric(self) -> bool:
        """Whether rows and columns are the same axis, so that the operator is J Jᵀ."""
        return self.rows is self.columns

    def with_axes(self, rows: Axis, columns: Axis) -> Core:
        """Return the same core over other axes."""
        return dataclasses.replace(self, rows=rows, columns=columns, spending=Spending())

    def map_axes(self, change: Callable[[Axis], Axis]) -> Core:
        """Apply a change to both axes, keeping a shared axis shared."""
        rows = change(self.rows)
        return self.with_axes(rows, rows if self.symmetric else change(self.columns))


class EngineOperator(DenseFallbacks, LinearOperator):
    """An operator whose products an engine computes; see `JacobianOperator` and `NTKOperator`.

    Args:
        *params: The selected parameters.
        core: Engine and axes.
    """

    def __init__(self, *params: Tensor, core: Core) -> None:
        super().__init__(*params, core=core)
        self._core = core

    def _rebuild(self, core: Core, params: Sequence[Tensor] | None = None) -> Self:
        return type(self)(*(self._args if params is None else params), core=core)

    def __getstate__(self) -> dict[str, Any]:
        """Leave dense results that linear_operator memoized out of a pickle or a deep copy."""
        state = dict(self.__dict__)
        state.pop("_memoize_cache", None)
        return state

    # shape and place

    def _size(self) -> torch.Size:
        core = self._core
        return torch.Size((*core.rows.batch_shape, core.rows.length, core.columns.length))

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the parameters, and so of every vector."""
        return self._args[0].dtype

    @property
    def device(self) -> torch.device:
        """Device of the parameters, and so of every vector."""
        return self._args[0].device

    @property
    def space(self) -> Space:
        """The space of the rows, in which estimators and solvers work."""
        return Space(self._core.rows.length, self.dtype, self.device)

    @property
    def num_parameters(self) -> int:
        """Number P of selected parameters' entries."""
        return self._core.engine.num_parameters

    @property
    def max_dense_bytes(self) -> int:
        """Limit for one dense result in bytes; 0 means never."""
        return self._core.max_dense_bytes

    @property
    def engine_info(self) -> EngineInfo:
        """How products are computed: engine, rung of the ladder, chunk sizes, passes so far."""
        engine = self._core.engine
        axis = self._core.rows if isinstance(self._core.rows, StateAxis) else self._core.columns
        assert isinstance(axis, StateAxis)
        return EngineInfo(
            engine=engine.name,
            rung=engine.ladder.rung,
            per_sample=engine.ladder.per_sample,
            reasons=engine.ladder.reasons,
            dense=self._stored_dense() is not None,
            batch_size=min(engine.batch_size(axis.inputs), axis.inputs.num_samples),
            chunk_size=engine.chunk_size(),
            max_dense_bytes=self._core.max_dense_bytes,
            passes=engine.passes,
        )

    def free(self) -> int:
        """Drop every tensor cached for this operator's engine.

        Returns:
            Bytes set free. Later products recompute what they need.
        """
        self.__dict__.pop("_memoize_cache", None)
        return self._core.engine.free()

    def __repr__(self) -> str:
        """Show shape, parameters, engine and where it lives."""
        engine = self._core.engine
        size = "x".join(str(s) for s in self.shape)
        return (
            f"{type(self).__name__}({size}, {self.num_parameters} parameters, "
            f"engine={engine.name!r}, rung={engine.ladder.rung!r}, {self.dtype}, {self.device})"
        )

    # products

    def matmul(self, other: Tensor | LinearOperator) -> Tensor | LinearOperator:
        """Multiply with a vector, a block of columns, or another operator (lazily).

        Args:
            other: ``(n,)``, ``(*batch, n, k)``, or a LinearOperator.

        Returns:
            ``(m,)`` or ``(*batch, m, k)``; a lazy product for an operator. Cost: one pass a column
            for a Jacobian, two for a kernel.

        Raises:
            ShapeError: If the number of rows does not fit.
            DtypeError: If the dtype differs from the operator's.
            DeviceError: If the device differs from the operator's.
            NonFiniteError: If the product is not finite.
            StaleOperatorError: If something held by reference has changed.
        """
        if not isinstance(other, Tensor):
            return super().matmul(other)
        self._check_operand(other)
        if torch.is_grad_enabled() and (other.requires_grad or self.requires_grad):
            return super().matmul(other)
        return self._matmul(other)  # 20 to 200 us cheaper than a rebuild through linear_operator

    def _check_operand(self, other: Tensor) -> None:
        core, length = self._core, self._core.columns.length
        rows = other.shape[0] if other.dim() == 1 else other.shape[-2] if other.dim() > 1 else None
        if rows != length:
            raise ShapeError(
                f"expected {length} rows ({_describe(core.columns)}), got {tuple(other.shape)}"
                f"{_axis_hint(core.columns, other)}"
            )
        if other.dim() == 1 and core.rows.batch_shape:
            raise ShapeError(f"a batch of operators {tuple(self.shape)} takes (..., {length}, k), not a vector")
        if other.dtype != self.dtype:
            raise DtypeError(f"the operator has dtype {self.dtype}, the vector {other.dtype}; cast one of them")
        if other.device != self.device:
            raise DeviceError(f"the operator lives on {self.device}, the vector on {other.device}")

    def _matmul(self, rhs: Tensor) -> Tensor:
        if rhs.dim() == 1:
            return self._matmul(rhs.unsqueeze(-1)).squeeze(-1)
        batch = self._core.rows.batch_shape
        if rhs.shape[:-2] == batch:
            return self._multiply(rhs)
        if not batch:  # one operator, many blocks: their columns go side by side
            lead, columns = rhs.shape[:-2], rhs.shape[-1]
            wide = rhs.reshape(-1, *rhs.shape[-2:]).movedim(0, 1).flatten(1)  # (n, B·k)
            result = self._multiply(wide)
            return result.reshape(len(result), -1, columns).movedim(1, 0).reshape(*lead, -1, columns)
        full = torch.broadcast_shapes(batch, rhs.shape[:-2])
        wide = rhs.expand(*full, *rhs.shape[-2:])
        return self._expand_batch(full)._multiply(wide)

    def _multiply(self, rhs: Tensor) -> Tensor:
        """Multiply ``(*batch, n, k)``: from the dense block where there is one, else by passes."""
        self._check_fresh()
        if self._is_recorded(rhs):
            return self._lazy_product(self._args, rhs)
        with torch.no_grad():
            dense = self._dense_if_cheaper(rhs.shape[-1])
            return self._lazy_product(self._args, rhs) if dense is None else dense @ rhs

    def _is_recorded(self, *tensors: Tensor) -> bool:
        """Whether a derivative may be taken through the result, so that no cache may stand in."""
        if any(torch._C._functorch.is_functorch_wrapped_tensor(t) for t in (*self._args, *tensors)):
            return True
        return torch.is_grad_enabled() and any(t.requires_grad for t in (*self._args, *tensors))

    def _lazy_product(self, params: Sequence[Tensor], rhs: Tensor) -> Tensor:
        engine, rows, columns = self._core.engine, self._core.rows, self._core.columns
        block, params = columns.embed(rhs), tuple(params)
        if isinstance(rows, StateAxis) and isinstance(columns, StateAxis):
            result = engine.product(params, rows.inputs, columns.inputs, block)
        elif isinstance(rows, StateAxis):
            result = engine.jvp(params, rows.inputs, block)
        else:
            assert isinstance(columns, StateAxis)
            result = engine.vjp(params, columns.inputs, block)
        return rows.extract(result)

    def _check_fresh(self) -> None:
        self._core.engine.linearization.check_fresh()
        for axis in {self._core.rows, self._core.columns}:
            if isinstance(axis, StateAxis):
                axis.inputs.check_fresh()

    def _bilinear_derivative(self, left_vecs: Tensor, right_vecs: Tensor) -> tuple[Tensor | None, ...]:
        """Return the derivative of Σ left ∘ (K right) at the parameters, itself differentiable.

        The core is differentiated at views of the parameters: ``left`` and ``right`` may depend on
        the same parameters, and a derivative at the parameters themselves would count those ways too.
        """
        needed = [arg.requires_grad for arg in self._args]
        if not any(needed):
            return (None,) * len(needed)
        create_graph = torch.is_grad_enabled()
        with torch.enable_grad():
            live = tuple(
                (arg.view_as(arg) if create_graph else arg.detach().requires_grad_()) if need else arg
                for arg, need in zip(self._args, needed, strict=True)
            )
            shape = torch.broadcast_shapes(self.batch_shape, right_vecs.shape[:-2])
            operator = self._rebuild(self._core, live)
            product = operator._matmul(right_vecs.expand(*shape, *right_vecs.shape[-2:]))
            gradients = torch.autograd.grad(
                product,
                [arg for arg, need in zip(live, needed, strict=True) if need],
                grad_outputs=left_vecs.expand_as(product),
                create_graph=create_graph,
                allow_unused=True,
            )
        found = iter(gradients)
        return tuple(next(found) if need else None for need in needed)

    # dense results

    def to_dense(self) -> Tensor:
        """Build the dense matrix block by block.

        Returns:
            ``(*batch, m, n)``. Cost: one per-sample pass for each output, or one product a column
            where that is cheaper; memory: the result and two tiles, never N·O × P for a kernel.

        Raises:
            DenseMemoryError: If the result exceeds ``max_dense_bytes``, before anything is allocated.
        """
        stored = self._stored_dense()
        if stored is not None and not self._is_recorded():
            return stored
        needed = tensor_bytes(self.shape, self.dtype)
        if min(self.shape[-2:]) > 1 and needed > self._core.max_dense_bytes:
            self._refuse_dense(needed)
        self._check_fresh()
        if self._is_recorded():
            return self._dense_values(self._args)
        with torch.no_grad():
            dense = self._dense_values(self._args)
        self._store_dense(dense)
        return dense

    def materialize(self) -> Tensor:
        """Build the dense matrix; the same as `to_dense`."""
        return self.to_dense()

    def _refuse_dense(self, needed: int) -> NoReturn:
        limit = self._core.max_dense_bytes
        raise DenseMemoryError(
            f"the dense {' x '.join(str(s) for s in self.shape)} matrix needs {format_bytes(needed)}, above "
            f"max_dense_bytes={format_bytes(limit)}{' (0 means never)' if limit == 0 else ''}; use products "
            "K @ V, estimators, or slices K[a:b, c:d], or raise max_dense_bytes"
        )

    def _dense_values(self, params: Sequence[Tensor]) -> Tensor:
        raise NotImplementedError

    def _dense_cost(self) -> float:
        """Cost of a dense block in passes over the samples of one side."""
        raise NotImplementedError

    def _dense_by_columns(self, params: Sequence[Tensor]) -> Tensor:
        operator = self._rebuild(self._core, params)
        rows, columns = self.shape[-2:]
        transposed = rows < columns
        side = operator._transpose_nonbatch() if transposed else operator
        identity = torch.eye(min(rows, columns), dtype=self.dtype, device=self.device)
        product = side._lazy_product(params, identity.expand(*self.batch_shape, -1, -1))
        return product.mT.contiguous() if transposed else product

    def _dense_key(self) -> tuple[object, ...] | None:
        """Return the key of the dense block, or None where the parameters are not the snapshot."""
        snapshot = self._core.engine.linearization.parameters
        if self._core.engine.linearization.differentiable:
            return None
        if any(a.data_ptr() != s.data_ptr() or a.dtype != s.dtype for a, s in zip(self._args, snapshot, strict=True)):
            return None
        versions = tuple(arg._version for arg in self._args)
        return ("dense", self._core.rows.key, self._core.columns.key, versions)

    def _stored_dense(self) -> Tensor | None:
        key = self._dense_key()
        return None if key is None else shared_store.get(self._core.engine.identity, key)

    def _store_dense(self, dense: Tensor) -> None:
        key = self._dense_key()
        if key is not None and tensor_bytes(self.shape, self.dtype) <= self._core.max_dense_bytes:
            shared_store.put(self._core.engine.identity, key, dense)

    def _dense_if_cheaper(self, columns: int) -> Tensor | None:
        """Return a dense block that exists, or build it once the products have cost as much.

        Building when the passes spent equal the cost of building is the classical rent-or-buy rule:
        never more than twice the cost of the best decision in hindsight.
        """
        stored = self._stored_dense()
        if stored is not None:
            return stored
        if tensor_bytes(self.shape, self.dtype) > self._core.max_dense_bytes:
            return None
        core = self._core
        core.spending.passes += 2 * columns * core.rows.batch_shape.numel() * core.rows.terms
        cost = self._dense_cost()
        if core.spending.passes <= cost or self._dense_key() is None:
            return None
        logger.info(
            "building the dense %s block (%s): products have cost %.0f passes, the block costs about %.0f",
            "x".join(map(str, self.shape)),
            format_bytes(tensor_bytes(self.shape, self.dtype)),
            core.spending.passes,
            cost,
        )
        dense = self._dense_values(self._args)
        self._store_dense(dense)
        return dense

    # indexing

    def __getitem__(self, index: Any) -> Any:
        """Index like a tensor: slices and one index tensor stay lazy, pairs of index tensors are entries.

        Raises:
            OutOfRangeError: If an integer index lies outside the operator.
        """
        items = index if isinstance(index, tuple) else (index,)
        items = tuple(torch.as_tensor(i) if isinstance(i, (np.ndarray, list, range)) else i for i in items)
        items = tuple(i.nonzero().flatten() if isinstance(i, Tensor) and i.dtype == torch.bool else i for i in items)
        if sum(i is not Ellipsis for i in items) > self.dim():
            raise OutOfRangeError(f"{len(items)} indices for an operator of shape {tuple(self.shape)}")
        return super().__getitem__(self._positive(items))

    def _positive(self, items: tuple[Any, ...]) -> tuple[Any, ...]:
        """Check integers against their axis and make them non-negative."""
        position = next((i for i, item in enumerate(items) if item is Ellipsis), len(items))
        shift = self.dim() - len(items)
        result = []
        for i, item in enumerate(items):
            if isinstance(item, int) and not isinstance(item, bool):
                size = self.shape[i if i < position else i + shift]
                if not -size <= item < size:
                    raise OutOfRangeError(f"index {item} is out of range for an axis of {size}")
                item %= size
            result.append(item)
        return tuple(result)

    def _getitem(self, row_index: Any, col_index: Any, *batch_indices: Any) -> LinearOperator:
        core = self._core
        if batch_indices and not all(isinstance(b, slice) and b == slice(None) for b in batch_indices):
            core = core.map_axes(lambda axis: axis.map_batch(lambda numbers: numbers[tuple(batch_indices)]))
        rows = core.rows.take(row_index)
        shared = core.symmetric and _same_index(row_index, col_index)
        columns = rows if shared else core.columns.take(col_index)
        if rows is core.rows and columns is core.columns and core is self._core:
            return self
        return self._rebuild(core.with_axes(rows, columns))

    def submatrix(self, rows: Any, cols: Any) -> Self:
        """Return the lazy operator on the grid of some rows and some columns.

        ``K[rows, cols]`` with two index tensors gives single entries, as in torch; this gives
        ``K[rows][:, cols]``, and keeps the symmetry where both are the same.

        Args:
            rows: Slice, list or ``(m,)`` integer tensor.
            cols: Likewise for columns.

        Returns:
            Lazy operator of shape ``(*batch, len(rows), len(cols))``.

        Raises:
            OutOfRangeError: If an index lies outside the operator.
        """
        first, second = (i if isinstance(i, slice) else torch.as_tensor(i).flatten() for i in (rows, cols))
        return self._getitem(first, second, *(slice(None),) * len(self.batch_shape))  # type: ignore[return-value]

    def _get_indices(self, row_index: Tensor, col_index: Tensor, *batch_indices: Tensor) -> Tensor:
        shape = torch.broadcast_shapes(row_index.shape, col_index.shape, *(b.shape for b in batch_indices))
        rows, columns = (i.expand(shape).reshape(-1).cpu() for i in (row_index, col_index))
        if not batch_indices:
            return self._entries(rows, columns).reshape(shape)
        sizes = self.batch_shape
        flat = torch.zeros_like(rows)
        for size, index in zip(sizes, batch_indices, strict=True):
            index = index.expand(shape).reshape(-1).cpu()
            flat = flat * size + torch.where(index < 0, index + size, index)
        values = rows.new_zeros(len(rows), dtype=self.dtype).to(self.device)
        for entry in torch.unique(flat):
            chosen = (flat == entry).nonzero().flatten()
            position = torch.unravel_index(entry, sizes)
            member = self._getitem(slice(None), slice(None), *(int(p) for p in position))
            assert isinstance(member, EngineOperator)
            values = values.index_put((chosen.to(self.device),), member._entries(rows[chosen], columns[chosen]))
        return values.reshape(shape)

    def _entries(self, rows: Tensor, columns: Tensor, group: int = 64) -> Tensor:
        """Return the entries (rows[i], columns[i]), by small dense grids of what they touch."""
        if torch.unique(rows).numel() == 1 or torch.unique(columns).numel() == 1:
            group = max(len(rows), 1)
        parts = []
        for row, column in zip(rows.split(group), columns.split(group), strict=True):
            unique_rows, i = torch.unique(row, return_inverse=True)
            unique_columns, j = torch.unique(column, return_inverse=True)
            grid = self._getitem(unique_rows, unique_columns)
            assert isinstance(grid, EngineOperator)
            grid._check_fresh()
            parts.append(grid._dense_values(self._args)[i.to(self.device), j.to(self.device)])
        return torch.cat(parts)

    def _diagonal(self) -> Tensor:
        positions = torch.arange(self.shape[-1])
        batch = tuple(torch.arange(s) for s in self.batch_shape)
        grids = torch.meshgrid(*batch, positions, indexing="ij")
        return self._get_indices(grids[-1], grids[-1], *grids[:-1])

    # transposing and batches: only the axes change

    def _transpose_nonbatch(self) -> Self:
        core = self._core
        return self if core.symmetric else self._rebuild(core.with_axes(core.columns, core.rows))

    def _map_batch(self, change: Callable[[Tensor], Tensor]) -> Self:
        return self._rebuild(self._core.map_axes(lambda axis: axis.map_batch(change)))

    def _permute_batch(self, *dims: int) -> Self:
        return self._map_batch(lambda numbers: numbers.permute(*dims, len(dims), len(dims) + 1))

    def _unsqueeze_batch(self, dim: int) -> Self:
        return self._map_batch(lambda numbers: numbers.unsqueeze(dim))

    def _expand_batch(self, batch_shape: torch.Size | Sequence[int]) -> Self:
        if tuple(batch_shape) == tuple(self.batch_shape):
            return self
        return self._map_batch(lambda numbers: numbers.expand(*batch_shape, *numbers.shape[-2:]))

    def repeat(self, *sizes: Any) -> Self:
        """Repeat along batch dimensions; the last two sizes must be 1.

        Raises:
            ShapeError: If a matrix dimension is to be repeated.
        """
        counts = tuple(sizes[0]) if len(sizes) == 1 and not isinstance(sizes[0], int) else sizes
        if len(counts) < self.dim() or tuple(counts[-2:]) != (1, 1):
            raise ShapeError(f"repeat{tuple(counts)}: only batch dimensions repeat; end with 1, 1")
        return self._map_batch(lambda numbers: numbers.repeat(*counts[:-2], 1, 1))

    # casting and gradients

    def to(self, *args: Any, **kwargs: Any) -> Self:
        """Return the operator on another device or in another floating dtype.

        Integer inputs stay integers, the user's model and inputs stay where they are, and nothing is
        checked again.

        Args:
            *args: As in `torch.Tensor.to`.
            **kwargs: As in `torch.Tensor.to`.

        Returns:
            A new operator, or this one if nothing changes.
        """
        device, dtype = _to_helper(*args, **kwargs)
        if dtype in (None, self.dtype) and (device is None or torch.device(device) == self.device):
            return self
        device = None if device is None else torch.device(device)
        moved: dict[int, Any] = {}

        def move(axis: Axis) -> Axis:
            if isinstance(axis, ParameterAxis):
                return axis
            if id(axis.inputs) not in moved:  # shared inputs stay shared
                moved[id(axis.inputs)] = axis.inputs.to(dtype=dtype, device=device)
            return StateAxis(moved[id(axis.inputs)], axis.outputs, axis.pick)

        core = dataclasses.replace(
            self._core.map_axes(move), engine=self._core.engine.to(dtype=dtype, device=device)
        )
        return self._rebuild(core, [arg.to(dtype=dtype, device=device) for arg in self._args])

    def type(self, dtype: torch.dtype) -> Self:
        """Return the operator in another floating dtype."""
        return self.to(dtype=dtype)

    def cpu(self) -> Self:
        """Return the operator on the CPU."""
        return self.to(device="cpu")

    def cuda(self, device_id: Any = None) -> Self:
        """Return the operator on a CUDA device."""
        return self.to(device="cuda" if device_id is None else f"cuda:{device_id}")

    def _set_requires_grad(self, val: bool) -> None:
        # New leaves over the same storage: the snapshot that other operators share stays as it is.
        self._args = tuple(arg.detach().requires_grad_(val) for arg in self._args)

    def detach_(self) -> Self:
        """Detach this operator from the graph in place; the tensors that it shares are left alone."""
        self._set_requires_grad(False)
        return self

    # numpy and scipy

    def to_scipy(self) -> Any:
        """Return a `scipy.sparse.linalg.LinearOperator` with the same products.

        Returns:
            A SciPy operator in the matching NumPy dtype; vectors are copied to the operator's
            device and back.

        Raises:
            ShapeError: If the operator has a batch.
            DtypeError: If NumPy has no such dtype (bfloat16).
        """
        return to_scipy(self)

    def __array__(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Refuse a silent conversion: NumPy would otherwise make a 0-d object array."""
        raise UnsupportedOperationError(
            "an operator does not turn into an array by itself: use .to_scipy() for SciPy's solvers, or "
            ".materialize().numpy() for the dense matrix"
        )


def _same_index(first: Any, second: Any) -> bool:
    if isinstance(first, Tensor) and isinstance(second, Tensor):
        return first.shape == second.shape and bool((first == second).all())
    return isinstance(first, slice) and isinstance(second, slice) and first == second


def _describe(axis: Axis) -> str:
    if isinstance(axis, ParameterAxis):
        return "the entries of the selected parameters"
    samples, outputs = axis.inputs.num_samples, axis.outputs.shape[-1]
    if axis.pick is not None:
        return f"selected from {samples} samples x {outputs} outputs"
    return f"{samples} samples x {outputs} outputs"


def _axis_hint(axis: Axis, other: Tensor) -> str:
    if isinstance(axis, StateAxis) and axis.pick is None and other.dim() >= 1:
        samples, outputs = axis.inputs.num_samples, axis.outputs.shape[-1]
        if other.shape[-2:] == (samples, outputs) or other.shape == (samples, outputs):
            return "; state vectors are flattened sample-major: pass v.reshape(-1)"
        if other.dim() == 1 and other.shape[-1] == samples and outputs > 1:
            return "; there is one entry for each sample and output: use outputs='trace' for one per sample"
    if other.dim() == 2 and other.shape[-1] == axis.length:
        return "; it looks transposed: vectors are columns"
    return ""
