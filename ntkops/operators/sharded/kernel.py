"""The kernel and the Jacobian of samples that are spread over the ranks of a process group."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Self

import torch
from torch import Tensor

from ...engines import Engine, EngineChoice, LayerwiseEngine, build_engine
from ...engines.sharded import ShardedEngine
from ...errors import ShapeError, UnsupportedOperationError
from ...model import Inputs
from ...ranks import Ranks, ShardedSpace
from ...results import EngineInfo
from ...vectors import Space
from ..axes import Axis, ParameterAxis, StateAxis
from ..core import Core
from ..products import ProductOperator
from .rows import ShardedRows, refuse_derivatives, refused
from .shares import no_samples, take_shard

__all__ = ["ShardedAxis", "ShardedJacobianOperator", "ShardedKernelOperator"]


@dataclass(frozen=True, eq=False)
class ShardedAxis(StateAxis):
    """Rows (sample, output) of this rank's samples, beside those of the other ranks.

    Attributes:
        counts: Samples on each rank.
    """

    counts: tuple[int, ...] = ()

    def map_inputs(self, inputs: Inputs) -> ShardedAxis:
        """Return the axis over the same samples in another dtype or on another device."""
        return ShardedAxis(inputs, self.outputs, self.pick, counts=self.counts)

    def space(self, ranks: Ranks, like: ProductOperator) -> ShardedSpace:
        """Return the space of vectors along this axis."""
        width = self.outputs.shape[-1]
        return ShardedSpace(ranks, [count * width for count in self.counts], like.dtype, like.device)


class _ShardedOperator(ProductOperator):
    """Products over two axes of which at least one is spread over ranks.

    Args:
        *params: The selected parameters, the same on all ranks.
        core: Engine and axes.
    """

    @property
    def _engine(self) -> ShardedEngine:
        engine = self._core.engine
        assert isinstance(engine, ShardedEngine)
        return engine

    @property
    def ranks(self) -> Ranks:
        """The processes."""
        return self._engine.ranks

    @property
    def space(self) -> Space:
        """The space of the rows: spread over ranks, or over the parameters, the same on all of them."""
        return self._space_of(self._core.rows)

    @property
    def domain(self) -> Space:
        """The space of the columns."""
        return self._space_of(self._core.columns)

    def _space_of(self, axis: Axis) -> Space:
        if isinstance(axis, ShardedAxis):
            return axis.space(self.ranks, self)
        return Space(axis.length, self.dtype, self.device)

    @property
    def engine_info(self) -> EngineInfo:
        """How this rank computes its products."""
        engine = self._engine
        local = engine.local
        axis = self._core.rows if isinstance(self._core.rows, StateAxis) else self._core.columns
        assert isinstance(axis, StateAxis)
        sized = local is not None and axis.inputs.num_samples > 0
        how = engine.differentiation
        assert how.per_sample is not None
        return EngineInfo(
            engine="sharded" if local is None else f"sharded {local.name}",
            mode=how.mode,
            per_sample=how.per_sample,
            reasons=how.reasons,
            batch_size=local.batch_size(axis.inputs) if sized and local is not None else None,
            chunk_size=None if local is None else local.chunk_size(),
            max_dense_bytes=0,
            passes=engine.passes,
        )

    def __repr__(self) -> str:
        """Show the shape here and in all, and which rank this is."""
        here = "x".join(str(s) for s in self.shape)
        rank, count = self.ranks.rank, self.ranks.count
        whole = f"{self.space.size}x{self.domain.size}"
        name = type(self).__name__
        return f"{name}({here} of {whole}, rank {rank} of {count}, {self.dtype}, {self.device})"

    def _lazy_product(self, params: Sequence[Tensor], rhs: Tensor) -> Tensor:
        """Leave blocks of columns to the engine, which cuts them on all ranks alike."""
        engine, rows, columns = self._engine, self._core.rows, self._core.columns
        block, params = columns.embed(rhs), tuple(params)
        if isinstance(rows, StateAxis) and isinstance(columns, StateAxis):
            return rows.extract(engine.product(params, rows.inputs, columns.inputs, block))
        if isinstance(rows, StateAxis):
            return rows.extract(engine.jvp(params, rows.inputs, block))
        assert isinstance(columns, StateAxis)
        return rows.extract(engine.vjp(params, columns.inputs, block))

    def with_engine(
        self,
        *,
        batch_size: int | Literal["auto"] = "auto",
        chunk_size: int | Literal["auto"] = "auto",
    ) -> Self:
        """Return the same operator with an engine of its own; called by all ranks.

        Args:
            batch_size: Samples per pass, or "auto".
            chunk_size: Columns per pass, or "auto".

        Returns:
            An operator over the same snapshot and samples.
        """
        engine = self._engine
        axis = self._core.rows if isinstance(self._core.rows, ShardedAxis) else self._core.columns
        assert isinstance(axis, ShardedAxis)

        def build() -> Engine | None:
            known = engine.local
            if known is None or not axis.inputs.num_samples:
                return known
            choice: EngineChoice = known.options if isinstance(known, LayerwiseEngine) else "autograd"
            return build_engine(
                engine.linearization, axis.inputs, choice, batch_size=batch_size, chunk_size=chunk_size
            )

        built = engine.with_local(self.ranks.together(build, "making an engine"))
        opaque: Any = built
        return self._rebuild(dataclasses.replace(self._core, engine=opaque))

    def free(self) -> int:
        """Drop what is cached on this rank and return the bytes set free."""
        return self._engine.free()

    def _moved(self, dtype: torch.dtype, device: torch.device) -> Self:
        moved: dict[int, Inputs] = {}
        built = self._engine.to(dtype=dtype, device=device)
        engine: Any = built

        def move(axis: Axis) -> Axis:
            if not isinstance(axis, ShardedAxis):
                return axis
            inputs = axis.inputs
            if id(inputs) not in moved and not inputs.num_samples:
                moved[id(inputs)] = no_samples(built.linearization, inputs.output_shape)
            elif id(inputs) not in moved:
                moved[id(inputs)] = inputs.to(dtype=dtype, device=device)
            return axis.map_inputs(moved[id(inputs)])

        core = dataclasses.replace(self._core.map_axes(move), engine=engine)
        return self._rebuild(core, [arg.to(dtype=dtype, device=device) for arg in self._args])

    def _transpose_nonbatch(self) -> Self:
        core = self._core
        return self if core.symmetric else self._rebuild(core.with_axes(core.columns, core.rows))

    def _dense_if_cheaper(self, columns: int) -> Tensor | None:
        return None

    def _is_recorded(self, *tensors: Tensor) -> bool:
        if super()._is_recorded(*tensors):
            refuse_derivatives()
        return False

    def matmul(self, other: Any) -> Any:
        """Multiply this rank's rows of a vector or block; called by all ranks.

        Args:
            other: ``(n,)`` or ``(*batch, n, k)``, this rank's rows.

        Returns:
            This rank's rows of the product.

        Raises:
            ShapeError: If the number of rows does not fit.
            RankFailedError: If another rank has failed.
            UnsupportedOperationError: If a derivative is to be taken through the product.
        """
        if torch.is_grad_enabled() and isinstance(other, Tensor) and other.requires_grad:
            refuse_derivatives()
        return super().matmul(other)

    def _bilinear_derivative(self, left_vecs: Tensor, right_vecs: Tensor) -> tuple[Tensor | None, ...]:
        if any(arg.requires_grad for arg in self._args):
            refuse_derivatives()
        return (None,) * len(self._args)

    def _expand_batch(self, batch_shape: Any) -> Self:
        if tuple(batch_shape) == tuple(self.batch_shape):
            return self
        raise ShapeError(
            f"a batch of operators {tuple(self.shape)} multiplies blocks of the same batch, not "
            f"{tuple(batch_shape)}"
        )


@refused
class ShardedJacobianOperator(_ShardedOperator):
    """J of samples that are spread over ranks, or its transpose.

    ``J @ p`` gives this rank's rows; ``J.mT @ v`` takes this rank's rows of v and gives the same product on
    all ranks.
    """

    @property
    def structure(self) -> Any:
        """What it can do beyond products: nothing."""
        from .structure import ShardedJacobianStructure

        return ShardedJacobianStructure(self)


@refused
class ShardedKernelOperator(ShardedRows, _ShardedOperator):
    """K = J(x₁) J(x₂)ᵀ of samples that are spread over the ranks of a process group.

    Make one with ``ntkops.ntk(model, shard, group=group)`` on every rank. Its shape is that of the rows and
    columns of this rank; `space` knows the whole. ``K @ V`` takes this rank's rows of V and gives this
    rank's rows of the product, by one sum over ranks for the block. Estimators and solvers of ntkops take it
    as it is; what linear_operator would compute of this rank's rows alone raises.
    """

    @property
    def space(self) -> ShardedSpace:
        """The space of the rows, spread over the ranks."""
        assert isinstance(self._core.rows, ShardedAxis)
        return self._core.rows.space(self.ranks, self)

    @property
    def num_samples(self) -> int:
        """Number of samples of the rows on this rank."""
        return self._axis.inputs.num_samples

    @property
    def num_outputs(self) -> int:
        """Number of rows that each sample has."""
        return self._axis.outputs.shape[-1]

    @property
    def output_shape(self) -> torch.Size:
        """Shape of the model's output for one sample, before flattening."""
        return self._axis.inputs.output_shape

    @property
    def _axis(self) -> ShardedAxis:
        assert isinstance(self._core.rows, ShardedAxis)
        return self._core.rows

    @property
    def left(self) -> ShardedJacobianOperator:
        """J(x₁)."""
        return self._factor_of(self._core.rows)

    @property
    def right(self) -> ShardedJacobianOperator:
        """J(x₂)."""
        return self._factor_of(self._core.columns)

    def _factor_of(self, axis: Axis) -> ShardedJacobianOperator:
        assert isinstance(axis, StateAxis)
        beside = ParameterAxis.beside(axis, self.num_parameters)
        return ShardedJacobianOperator(*self._args, core=self._core.with_axes(axis, beside))

    @property
    def structure(self) -> Any:
        """What the kernel can do beyond products; see `ntkops.operators.structure`."""
        from .structure import ShardedStructure

        return ShardedStructure(self)

    def _diagonal(self) -> Tensor:
        return self.structure.diagonal()

    def diagonal(self, offset: int = 0, dim1: int = -2, dim2: int = -1) -> Tensor:
        """Return this rank's rows of the diagonal; called by all ranks."""
        if (offset, dim1, dim2) != (0, -2, -1) or not self._core.symmetric:
            raise UnsupportedOperationError("only a square kernel has a diagonal, along its last two axes")
        return self._diagonal()

    def cross(self, x: Any) -> ShardedKernelOperator:
        """Return the kernel between new samples, spread over the ranks as well, and this kernel's columns.

        Args:
            x: This rank's share of the new samples; it may be empty. Pass the same samples on all ranks for
                rows that every rank is to have, which then occur once for each.

        Returns:
            The operator of this rank's new rows, called for by all ranks.
        """
        core, columns, engine = self._core, self._core.columns, self._engine
        assert isinstance(columns, ShardedAxis)
        shape = columns.inputs.output_shape

        def work() -> tuple[Inputs, Any]:
            inputs = take_shard(engine.linearization, x)
            if inputs is None:
                return no_samples(engine.linearization, shape), engine.local
            if inputs.output_shape != shape:
                raise ShapeError(
                    f"the new samples have outputs of shape {tuple(inputs.output_shape)}, those of the "
                    f"kernel {tuple(shape)}"
                )
            local = engine.local
            return inputs, build_engine(engine.linearization, inputs) if local is None else local

        inputs, local = self.ranks.together(work, "K.cross(x)")
        counts = tuple(self.ranks.share(inputs.num_samples))
        built: Any = engine
        if self.ranks.any(local is not engine.local):
            built = engine.with_local(local)
        rows = ShardedAxis(inputs, columns.outputs, counts=counts)
        return self._rebuild(dataclasses.replace(core.with_axes(rows, columns), engine=built))

    # what linear_operator does with an operator without asking for its entries

    def detach(self) -> Self:
        """Return itself: nothing is recorded through it."""
        return self


def core_of(engine: ShardedEngine, rows: Axis, columns: Axis) -> Core:
    """Return the core of an operator over ranks, which never builds anything dense."""
    opaque: Any = engine
    return Core(engine=opaque, rows=rows, columns=columns, limit=0)
