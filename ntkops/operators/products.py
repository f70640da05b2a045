"""Products with an operator over two axes, their checks and their derivatives."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal, Self

import torch
from linear_operator.operators import LinearOperator
from torch import Tensor

from ..engines import Engine, free_bytes
from ..engines.base import require_finite_product
from ..engines.factors import is_transformed
from ..errors import DifferentiationError, ShapeError, UnsupportedOperationError
from ..model.watch import tracked
from ..vectors import Space
from .axes import Axis, ParameterAxis, StateAxis
from .expression import Expression

__all__ = [
    "Core",
    "ProductOperator",
    "Spending",
    "dense_limit",
]

_BLOCK_ENTRIES = 2**23  # entries of a block of columns as an engine has it: 64 MiB in float64


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
    """Passes spent on products so far: what decides when a dense block is the cheaper way.

    Attributes:
        passes: Their number.
        settled: Whether factors that pay for many products have been made.
    """

    passes: float = 0.0
    settled: bool = False


@dataclass(frozen=True, eq=False)
class Core:
    """What an operator is, apart from its parameters.

    It has no attribute that linear_operator looks for on tensors (``to``, ``clone``, ``dtype``,
    ``requires_grad``), so that it passes through every rebuild untouched.
    """

    engine: Engine
    rows: Axis
    columns: Axis
    limit: int | Literal["auto"]  # of dense results, in bytes
    spending: Spending = field(default_factory=Spending)

    def __post_init__(self) -> None:
        """Refuse a limit that is none; memory is looked at when a dense result is in question."""
        if self.limit != "auto":
            dense_limit(self.limit, self.engine.linearization.device)

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what is computed from the rest."""
        return {name: value for name, value in vars(self).items() if name != "symmetric"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Refuse what another version has pickled."""
        missing = [part.name for part in dataclasses.fields(self) if part.name not in state]
        if missing:
            raise UnsupportedOperationError(
                "this operator was pickled by another version of ntkops (it has no "
                f"{', '.join(map(repr, missing))}): build it again from the model"
            )
        vars(self).update(state)

    @property
    def max_dense_bytes(self) -> int:
        """Largest dense result allowed."""
        return self.engine.free_bytes // 4 if self.limit == "auto" else self.limit

    @cached_property
    def symmetric(self) -> bool:
        """Whether rows and columns are the same axis, so that the operator is J Jᵀ."""
        return self.rows is self.columns

    def with_axes(self, rows: Axis, columns: Axis) -> Self:
        """Return the same core over other axes."""
        # Products of a slice pay for the dense block of the slice, so that each counts its own.
        return dataclasses.replace(self, rows=rows, columns=columns, spending=Spending())

    def map_axes(self, change: Callable[[Axis], Axis]) -> Self:
        """Apply a change to both axes, keeping a shared axis shared."""
        rows = change(self.rows)
        return self.with_axes(rows, rows if self.symmetric else change(self.columns))


class ProductOperator(Expression):
    """An operator over two axes whose products an engine computes.

    Args:
        *params: The selected parameters.
        core: Engine and axes.
    """

    _args: tuple[Tensor, ...]

    def __init__(self, *params: Tensor, core: Core) -> None:
        super().__init__(*params, core=core)
        self._core = core

    def _rebuild(self, core: Core, params: Sequence[Tensor] | None = None) -> Self:
        """Return an operator of this kind with another core, or other parameters."""
        return type(self)(*(self._args if params is None else params), core=core)

    def __getstate__(self) -> dict[str, Any]:
        """Leave dense results that linear_operator memoized out of a pickle or a deep copy."""
        state = dict(self.__dict__)
        for name in ("_memoize_cache", "space"):
            state.pop(name, None)
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take tensors that were read in inference mode out of it."""
        self.__dict__.update(state)
        self._args = tuple(map(tracked, self._args))

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

    @cached_property
    def space(self) -> Space:
        """The space of the rows, in which estimators and solvers work."""
        return Space(self._core.rows.length, self.dtype, self.device)

    @property
    def domain(self) -> Space:
        """The space of the columns: of the vectors that the operator multiplies."""
        core = self._core
        return self.space if core.symmetric else Space(core.columns.length, self.dtype, self.device)

    @property
    def num_parameters(self) -> int:
        """Number P of selected parameters' entries."""
        return self._core.engine.num_parameters

    @property
    def passes_per_column(self) -> int:
        """Passes of a product with one column: one for a Jacobian, two for a kernel, times its terms."""
        # K v = J₁ (J₂ᵀ v): a pass over the samples of each axis of states, for every J_r of every kernel.
        core = self._core
        sides = isinstance(core.rows, StateAxis) + isinstance(core.columns, StateAxis)
        return sides * core.rows.batch_shape.numel() * core.rows.terms

    def product_cost(self) -> int:
        """Return `passes_per_column`."""
        return self.passes_per_column

    def cache_cost(self) -> float:
        """Return the most passes that factors of layers may take once, which make products faster."""
        core = self._core
        inputs = {
            id(axis.inputs): axis.inputs for axis in (core.rows, core.columns) if isinstance(axis, StateAxis)
        }  # samples of rows and columns have one set of factors, where they are the same
        return sum(core.engine.cache_passes(known) for known in inputs.values())

    @property
    def max_dense_bytes(self) -> int:
        """Limit for one dense result in bytes; 0 means never."""
        return self._core.max_dense_bytes

    def __repr__(self) -> str:
        """Show shape, parameters, engine and where it lives."""
        engine = self._core.engine
        size = "x".join(str(s) for s in self.shape)
        return (
            f"{type(self).__name__}({size}, {self.num_parameters} parameters, "
            f"engine={engine.name!r}, {self.dtype}, {self.device})"
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
        if not torch.is_inference_mode_enabled():
            other = tracked(other)
        recorded = torch.is_grad_enabled() and (other.requires_grad or self.requires_grad)
        if recorded and not self._inputs_are_live():
            return super().matmul(other)
        # linear_operator would lose the derivative at the samples, of which it knows nothing.
        return self._matmul(other)  # it is 20 to 200 us cheaper, too

    def _check_operand(self, other: Tensor) -> None:
        super()._check_operand(other)
        if other.dim() == 1 and self._core.rows.batch_shape:
            raise ShapeError(
                f"a batch of operators {tuple(self.shape)} takes (..., {len(other)}, k), not a vector"
            )

    def _described_rows(self) -> str:
        """Say what the rows of a vector stand for."""
        return f" ({_describe(self._core.columns)})"

    def _operand_hint(self, other: Tensor) -> str:
        """Say what a vector of the wrong shape may have been meant for."""
        return _axis_hint(self._core.columns, other)

    def _matmul(self, rhs: Tensor) -> Tensor:
        """Multiply with one block for each member of the batch, or as many as broadcast to it."""
        if rhs.dim() == 1:
            return self._matmul(rhs.unsqueeze(-1)).squeeze(-1)
        batch = self._core.rows.batch_shape
        if rhs.shape[:-2] == batch:
            return self._multiply(rhs)
        if not batch:  # one operator, many blocks: their columns go side by side
            lead, columns = rhs.shape[:-2], rhs.shape[-1]
            wide = rhs.flatten(0, -3).movedim(0, 1).flatten(1)  # (n, B·k)
            result = self._multiply(wide)
            return result.unflatten(1, (*lead, columns)).movedim(0, -2)
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
            if dense is None:
                try:
                    return self._lazy_product(self._args, rhs)
                except DifferentiationError:  # no jvp, not even by double backward: rows of J may exist
                    dense = self._dense_instead()
                    if dense is None:
                        raise
            with self._core.engine.linearization.full_precision():
                return self._checked(dense @ rhs, rhs)

    def _checked(self, product: Tensor, rhs: Tensor) -> Tensor:
        """Return a product with a dense block, checked as the engines check theirs."""
        columns = rhs.mT.flatten(0, -2)  # a column a row, as engines have them
        what, linearization = "the product with a dense block", self._core.engine.linearization
        require_finite_product(product.unsqueeze(0).unsqueeze(0), what, linearization, columns)
        return product

    def _is_recorded(self, *tensors: Tensor) -> bool:
        """Whether a derivative may be taken through the result, so that no cache may stand in."""
        # Inside torch.func `requires_grad` is False of what is differentiated.
        if any(is_transformed(t) for t in (*self._args, *tensors)):
            return True
        if not torch.is_grad_enabled():
            return False
        return any(t.requires_grad for t in (*self._args, *tensors)) or self._inputs_are_live()

    def _inputs_are_live(self) -> bool:
        """Whether derivatives flow to the samples of rows or columns."""
        core = self._core
        axes = (core.rows,) if core.symmetric else (core.rows, core.columns)
        return any(isinstance(axis, StateAxis) and axis.inputs.requires_grad for axis in axes)

    def _dense_if_cheaper(self, columns: int) -> Tensor | None:
        """Return a dense block that stands in for the products, if there is one."""
        raise NotImplementedError

    def _dense_instead(self) -> Tensor | None:
        """Return a dense block where products do not exist, None where it would be too large."""
        return None

    def _lazy_product(self, params: Sequence[Tensor], rhs: Tensor) -> Tensor:
        """Multiply ``(*batch, n, k)`` by passes, some columns at a time where nothing is recorded."""
        engine, rows, columns = self._core.engine, self._core.rows, self._core.columns
        sides = [axis.inputs for axis in (rows, columns) if isinstance(axis, StateAxis)]
        # A column of the operator is M·R of the engine's; what these cost, counted in products with K of two
        # passes each, decides whether factors of layers pay: J p and Jᵀ v are half of one.
        count, width = rhs.shape[-1], rows.batch_shape.numel() * rows.terms
        made = engine.linearized(tuple(params), sides[0], sides[-1], rhs, width * count * len(sides) / 2)
        multiply: Callable[[Tensor], Tensor] = made.through
        if len(sides) == 1:
            multiply = made.push if isinstance(rows, StateAxis) else made.pull
        # The engine's block has all outputs of all samples for each column, and each kernel of a batch.
        entries = width * max(
            self.num_parameters if len(sides) == 1 else 1, *(s.num_samples * s.num_outputs for s in sides)
        )
        # A graph would hold the blocks of all steps at once: cutting them would save nothing.
        step = count if self._is_recorded(rhs) else max(1, _BLOCK_ENTRIES // max(1, entries))
        if count <= step:
            return rows.extract(multiply(columns.embed(rhs)))
        result = rhs.new_empty((*rhs.shape[:-2], rows.length, count))
        for start in range(0, count, step):
            some = slice(start, start + step)
            result[..., some] = rows.extract(multiply(columns.embed(rhs[..., some])))
        return result

    def _check_fresh(self) -> None:
        """Raise if the model, its parameters or samples that are held by reference have changed."""
        self._core.engine.linearization.check_fresh()
        for axis in {self._core.rows, self._core.columns}:
            if isinstance(axis, StateAxis):
                axis.inputs.check_fresh()

    def _bilinear_derivative(self, left_vecs: Tensor, right_vecs: Tensor) -> tuple[Tensor | None, ...]:
        """Return the derivative of Σ left ∘ (K right) at the parameters, itself differentiable.

        The core is differentiated at views of the parameters: ``left`` and ``right`` may depend on
        the same parameters, and a derivative at the parameters themselves would count those ways too.

        Raises:
            UnsupportedOperationError: If derivatives should flow to the samples as well.
        """
        if self._inputs_are_live():
            raise UnsupportedOperationError(
                "derivatives with respect to the samples flow through K @ v, K.to_dense() and the operations "
                "built on them, but not through products with sums or multiples of K: multiply each part, "
                "or detach the samples"
            )
        needed = [arg.requires_grad for arg in self._args]
        if not any(needed):
            return (None,) * len(needed)
        # d/dθ Σ L ∘ (K(θ) R) for fixed L and R is the gradient of the product with L as its cotangent.
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


def _describe(axis: Axis) -> str:
    """Say what the entries of a vector along an axis stand for."""
    if isinstance(axis, ParameterAxis):
        return "the entries of the selected parameters"
    samples, outputs = axis.num_samples, axis.num_outputs
    if axis.pick is not None:
        return f"selected from {samples} samples x {outputs} outputs"
    return f"{samples} samples x {outputs} outputs"


def _axis_hint(axis: Axis, other: Tensor) -> str:
    """Say what a vector of the wrong shape looks like."""
    if isinstance(axis, StateAxis) and axis.pick is None and other.dim() >= 1:
        samples, outputs = axis.num_samples, axis.num_outputs
        if other.shape[-2:] == (samples, outputs) or other.shape == (samples, outputs):
            return "; state vectors are flattened sample-major: pass v.reshape(-1)"
        if other.dim() == 1 and other.shape[-1] == samples and outputs > 1:
            return "; there is one entry for each sample and output: use outputs='trace' for one per sample"
    if other.dim() == 2 and other.shape[-1] == axis.length:
        return "; it looks transposed: vectors are columns"
    return ""
