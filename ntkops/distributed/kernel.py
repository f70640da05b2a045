"""The kernel and the Jacobian of samples that are spread over the ranks of a process group."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, Self

import torch
from torch import Tensor

from ..engines import Engine, EngineChoice, LayerwiseEngine, build_engine
from ..errors import ShapeError, UnsupportedOperationError
from ..model import Batch, Inputs
from ..model.inputs import joined
from ..operators.axes import Axis, ParameterAxis, StateAxis
from ..operators.capabilities import Capabilities, Factors, Tile, dense_from_tiles
from ..operators.kernel import NTKOperator
from ..operators.products import Core, ProductOperator
from ..results import EngineInfo
from ..vectors import Space
from .engine import ShardedEngine
from .group import Ranks
from .local_samples import no_samples, take_shard
from .projected import ShardedNystromOperator
from .rows import ShardedRows, refuse_derivatives, refused
from .space import ShardedSpace

if TYPE_CHECKING:
    from ..model.accepted import InputsLike

__all__ = ["ShardedAxis", "ShardedJacobianOperator", "ShardedKernelOperator"]


@dataclass(frozen=True, eq=False)
class ShardedAxis(StateAxis):
    """Rows (sample, output) of this rank's samples, beside those of the other ranks.

    Attributes:
        counts: Samples on each rank.
    """

    counts: tuple[int, ...] = ()

    def of(self, inputs: Inputs) -> ShardedAxis:
        """Return the same rows of these samples held elsewhere."""
        return ShardedAxis(inputs, self.outputs, self.pick, counts=self.counts)

    def space(self, ranks: Ranks, like: ProductOperator) -> ShardedSpace:
        """Return the space of vectors along this axis."""
        width = self.outputs.shape[-1]
        return ShardedSpace(ranks, [count * width for count in self.counts], like.dtype, like.device)


class _ShardedOperator(ProductOperator):
    """Products over two axes of which at least one is spread over ranks; parameters are the same on all."""

    @property
    def _engine(self) -> ShardedEngine:
        """The engine, which `Core` knows as one of a single process."""
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
        """Return the space of vectors along an axis."""
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
            return axis.of(moved[id(inputs)])

        core = dataclasses.replace(self._core.map_axes(move), engine=engine)
        return self._rebuild(core, [arg.to(dtype=dtype, device=device) for arg in self._args])

    def _transpose_nonbatch(self) -> Self:
        core = self._core
        return self if core.symmetric else self._rebuild(core.with_axes(core.columns, core.rows))

    def _dense_if_cheaper(self, columns: int) -> Tensor | None:
        return None  # a dense block would be that of all ranks' columns

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
class ShardedJacobianOperator(_ShardedOperator, Capabilities):
    """J of samples that are spread over ranks, or its transpose.

    ``J @ p`` gives this rank's rows; ``J.mT @ v`` takes this rank's rows of v and gives the same product on
    all ranks.
    """

    holds_ours = True

    def exact_cost(self, quantity: str) -> float:
        """Return infinity: nothing exact is offered."""
        return math.inf


@refused
class ShardedKernelOperator(ShardedRows, _ShardedOperator, Capabilities):
    """K = J(x₁) J(x₂)ᵀ of samples that are spread over the ranks of a process group.

    Make one with ``ntkops.ntk(model, shard, group=group)`` on every rank. Its shape is that of the rows and
    columns of this rank; `space` knows the whole. ``K @ V`` takes this rank's rows of V and gives this
    rank's rows of the product, by one sum over ranks for the block. Estimators and solvers of ntkops take it
    as it is; what linear_operator would compute of this rank's rows alone raises.

    Tiles are those of this rank's rows: together the ranks yield each once, or, of a symmetric kernel, each
    of those above the diagonal or its mirror image, in equal shares. All ranks yield the same number of
    tiles, some of them empty, so that several kernels can be gone through side by side.
    """

    of_samples = True

    @property
    def symmetric(self) -> bool:  # type: ignore[override]
        """Whether rows and columns are the same samples."""
        return self._core.symmetric

    @property
    def space(self) -> ShardedSpace:
        """The space of the rows, spread over the ranks."""
        assert isinstance(self._core.rows, ShardedAxis)
        return self._core.rows.space(self.ranks, self)

    @property
    def domain(self) -> ShardedSpace:
        """The space of the columns, spread over the ranks."""
        return self._columns.space(self.ranks, self)

    @property
    def num_samples(self) -> int:
        """Number of samples of the rows on this rank."""
        return self._rows.inputs.num_samples

    @property
    def sample_counts(self) -> tuple[int, int]:
        """Number of samples on all ranks, and of rows that each has."""
        return sum(self._rows.counts), self.num_outputs

    @property
    def num_outputs(self) -> int:
        """Number of rows that each sample has."""
        return self._rows.outputs.shape[-1]

    @property
    def output_shape(self) -> torch.Size:
        """Shape of the model's output for one sample, before flattening."""
        return self._rows.inputs.output_shape

    @property
    def _rows(self) -> ShardedAxis:
        """The axis of the rows, of states."""
        assert isinstance(self._core.rows, ShardedAxis)
        return self._core.rows

    @property
    def _columns(self) -> ShardedAxis:
        """The axis of the columns, of states."""
        assert isinstance(self._core.columns, ShardedAxis)
        return self._core.columns

    @property
    def left(self) -> ShardedJacobianOperator:
        """J(x₁)."""
        return self._factor_of(self._core.rows)

    @property
    def right(self) -> ShardedJacobianOperator:
        """J(x₂)."""
        return self._factor_of(self._core.columns)

    def _factor_of(self, axis: Axis) -> ShardedJacobianOperator:
        """Return the Jacobian whose rows are an axis."""
        assert isinstance(axis, StateAxis)
        beside = ParameterAxis.beside(axis, self.num_parameters)
        return ShardedJacobianOperator(*self._args, core=self._core.with_axes(axis, beside))

    def _diagonal(self) -> Tensor:
        """Return this rank's rows of the diagonal, ``(*batch, length)``."""
        shape = (*self._rows.batch_shape, self._rows.length)
        engine = self._engine.local

        def work() -> Tensor:
            if engine is None or self._rows.length == 0:
                return torch.zeros(shape, dtype=self.dtype, device=self.device)
            return self._own(engine).diagonal()

        return self.ranks.together(work, "the diagonal")

    def diagonal(self, offset: int = 0, dim1: int = -2, dim2: int = -1) -> Tensor:
        """Return this rank's rows of the diagonal; called by all ranks."""
        if (offset, dim1, dim2) != (0, -2, -1) or not self._core.symmetric:
            raise UnsupportedOperationError("only a square kernel has a diagonal, along its last two axes")
        return self._diagonal()

    def cross(self, x: InputsLike) -> ShardedKernelOperator:
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
        # A rank without samples of its own has no engine until it is given some: then all take a new one.
        built: Any = engine
        if self.ranks.any(local is not engine.local):
            built = engine.with_local(local)
        rows = ShardedAxis(inputs, columns.outputs, counts=counts)
        return self._rebuild(dataclasses.replace(core.with_axes(rows, columns), engine=built))

    # tiles

    def factors(self) -> Factors:
        """Return J(x₁) and J(x₂) with K = left @ right.mT."""
        return self.left, self.right

    def _alone(self, engine: Engine, rows: StateAxis, columns: StateAxis) -> NTKOperator:
        """Return a local kernel between samples that this rank has."""
        return NTKOperator(*self._args, core=Core(engine, rows, columns, limit=0))

    def _own(self, engine: Engine) -> NTKOperator:
        """Return the kernel within this rank's samples."""
        return self._alone(engine, self._rows, self._rows)

    def diagonal_step(self) -> int:
        """Return the samples of a part of the diagonal: all that this rank has."""
        return max(1, self._rows.inputs.num_samples)

    def diagonal_parts(self, size: int, first: int = 0) -> Iterator[tuple[slice, Tensor]]:
        """Yield this rank's rows of the diagonal in one part."""
        yield slice(0, self._rows.length), self._diagonal()

    @property
    def sample_shape(self) -> tuple[int, int] | None:  # type: ignore[override]
        """Samples on all ranks and outputs, where the rows are all outputs of all samples."""
        whole = self.symmetric and self._rows.is_whole
        return (sum(self._rows.counts), self._rows.inputs.num_outputs) if whole else None

    @property
    def layered(self) -> bool:  # type: ignore[override]
        """Whether layer structure covers all parameters, on every rank."""
        return self._engine.layered

    def sample_parts(self, size: int) -> Iterator[tuple[slice, NTKOperator | None]]:
        """Yield the kernels within parts of the samples, the same number of them on all ranks.

        Args:
            size: Samples of a part, at most.

        Yields:
            The samples, counted over all ranks, and their kernel; None for a part without samples.
        """
        for rows in self._sample_slices(size):
            yield (
                self._counted(self.ranks.rank, rows),
                self.ranks.together(partial(self._kernel_of, rows), "reading samples"),
            )

    def sample_pairs(self, size: int) -> Iterator[tuple[slice, slice, NTKOperator | None]]:
        """Yield kernels over pairs of parts of the samples, the same number of them on all ranks.

        Args:
            size: Samples of a part, at most.

        Yields:
            Two parts, counted over all ranks, and the kernel over both of them; over one, where they are the
            same; None where it is made on another rank.
        """
        # Samples of each part go to all ranks in turn: every rank makes the same calls, needed here or not.
        for source, count in enumerate(self._columns.counts):
            for start in range(0, count, size):
                part = slice(start, min(start + size, count))
                received = self._received(source, _numbers(part), needed=self._makes(source))
                for rows in self._sample_slices(size):
                    make = partial(self._kernel_over, source, part, rows, received)
                    kernel = self.ranks.together(make, "reading samples")
                    yield self._counted(self.ranks.rank, rows), self._counted(source, part), kernel

    def _sample_slices(self, size: int) -> list[slice]:
        """Cut this rank's samples into as many parts as the rank with the most of them has."""
        mine, most = self._rows.inputs.num_samples, max(self._rows.counts)
        return [slice(min(a, mine), min(a + size, mine)) for a in range(0, most, size)]

    def _counted(self, rank: int, part: slice) -> slice:
        """Return samples of a rank as they are counted over all ranks."""
        before = sum(self._rows.counts[:rank])
        return slice(part.start + before, part.stop + before)

    def _kernel_of(self, rows: slice) -> NTKOperator | None:
        """Return the kernel within some of this rank's samples, None where it has none of them."""
        engine = self._engine.local
        if engine is None or rows.stop <= rows.start:
            return None
        part = self._rows.inputs.select(torch.arange(rows.start, rows.stop))
        axis = StateAxis(part, self._rows.outputs)
        return self._alone(engine, axis, axis)

    def _kernel_over(
        self, source: int, part: slice, rows: slice, received: Inputs | None
    ) -> NTKOperator | None:
        """Return the kernel over some own and some received samples, None where another pair has it."""
        engine, own = self._engine.local, source == self.ranks.rank
        if received is None or engine is None or rows.stop <= rows.start:
            return None
        if own and part == rows:
            return self._kernel_of(rows)
        if own and part.start < rows.start:  # the pair (part, rows) has come, or comes, as (rows, part)
            return None
        mine = self._rows.inputs.select(torch.arange(rows.start, rows.stop))
        axis = StateAxis(joined([mine, received]), self._rows.outputs)
        return self._alone(engine, axis, axis)

    def exact_cost(self, quantity: str) -> float:
        """Return the passes of the rank that makes the most of them."""
        engine = self._engine.local

        def work() -> float:
            if engine is None or self._rows.length == 0:
                return 0.0
            # Blocks with all ranks' columns, of a size with that of its own; see `_makes` for the half.
            own = self._own(engine).exact_cost(quantity)
            pairs = (1 + self.ranks.count) / 2 if self.symmetric else self.ranks.count
            return own if quantity == "diagonal" else own * pairs

        return self.ranks.largest(self.ranks.together(work, "the cost of an exact value"))

    def tile_size(self) -> int:
        """Return the length of tiles for which every rank's memory suffices."""
        engine, rows = self._engine.local, self._rows

        def work() -> int:
            if engine is None or rows.length == 0:  # no limit from here
                return 2**31
            return max(self._own(engine).tile_size() // self._width, 1) * self._width

        return int(-self.ranks.largest(-self.ranks.together(work, "the size of tiles")))

    @property
    def _width(self) -> int:
        """Rows that a sample has."""
        return self._rows.outputs.shape[-1]

    def tiles(self, size: int | None = None) -> Iterator[Tile]:
        """Yield this rank's tiles; see there. Samples go from rank to rank, gradients do not.

        Args:
            size: Rows and columns of a tile.

        Yields:
            Tiles, whose rows and columns are counted over all ranks.
        """
        yield from self.tiles_after(size or self.tile_size(), 0)

    def tiles_after(self, size: int, skip: int) -> Iterator[Tile]:
        """Yield what `tiles` yields after the first ``skip`` tiles, for which nothing is sent or made."""
        # Tiles are of whole samples, and as many on each rank as that with the most samples has: a rank that
        # has fewer yields empty ones.
        samples = max(1, size // self._width)
        most = max(self._rows.counts)
        slices = [slice(a, min(a + samples, most)) for a in range(0, most, samples)]
        for source, count in enumerate(self._columns.counts):
            for start in range(0, count, samples):
                part = slice(start, min(start + samples, count))
                wanted, skip = slices[skip:], max(0, skip - len(slices))
                if not wanted:
                    continue
                received = self._received(source, _numbers(part), needed=self._makes(source))
                for rows in wanted:
                    make = partial(self._tile, source, part, rows, received)
                    yield self.ranks.together(make, "a tile")

    def _received(self, source: int, samples: Tensor, *, needed: bool) -> Inputs | None:
        """Return samples of the columns on another rank, or on this one; None where they are not needed."""
        mine, engine = self._columns.inputs, self._engine
        own = source == self.ranks.rank

        def cut() -> tuple[Inputs | None, Batch | None]:
            if not own:
                return None, None
            chosen = mine.select(samples)
            (_, _, batch), *_ = chosen.batches(chosen.num_samples)
            return chosen, batch.map(lambda tensor: tensor.detach().cpu())

        chosen, batch = self.ranks.together(cut, "reading samples")
        batch = self.ranks.broadcast(batch, source)
        if own:
            return chosen
        if not needed:
            return None
        moved = batch.map(lambda tensor: tensor.to(engine.linearization.device))
        return Inputs(moved, mine.output_shape)

    def _makes(self, source: int) -> bool:
        """Return whether this rank makes the tiles between its rows and another rank's columns."""
        if not self.symmetric or source == self.ranks.rank:
            return True
        # Counted modulo n, one of two ranks is ahead of the other by less than n / 2: the other makes the
        # block of both. Where they are n / 2 apart, the first of them does.
        count = self.ranks.count
        ahead = (source - self.ranks.rank) % count
        return 2 * ahead < count or (2 * ahead == count and self.ranks.rank < source)

    def _tile(self, source: int, part: slice, rows: slice, received: Inputs | None) -> Tile:
        """Return the tile between some own and some received samples, empty where there is none here."""
        width, axis = self._width, self._rows
        engine = self._engine.local
        rows = slice(rows.start, min(rows.stop, axis.inputs.num_samples))
        row_start, column_start = self.space.start, sum(self._columns.counts[:source]) * width
        place = _Place(row_start + rows.start * width, column_start + part.start * width)
        same = self.symmetric and source == self.ranks.rank
        none = received is None or engine is None or rows.stop <= rows.start
        if none or (same and part.start < rows.start):
            return place.tile(torch.zeros((*axis.batch_shape, 0, 0), dtype=self.dtype, device=self.device))
        assert received is not None and engine is not None
        own = axis.take(slice(rows.start * width, rows.stop * width))
        if same and part == rows:
            return place.tile(_dense(self._alone(engine, own, own)))
        other = StateAxis(received, self._columns.outputs)
        return place.tile(_dense(self._alone(engine, own, other)))

    # columns

    def take_columns(self, chosen: Tensor) -> Tensor:
        """Return this rank's rows of columns, ``(*batch, n, b)``; called by all ranks.

        The samples of the columns go to all ranks, and each makes the block between its rows and them.

        Args:
            chosen: ``(b,)`` numbers of columns, counted over all ranks, the same on all of them.
        """
        numbers, place = torch.unique(chosen.cpu(), return_inverse=True)
        width = self._columns.outputs.shape[-1]
        blocks, first = [], 0
        for source, count in enumerate(self._columns.counts):
            rows = numbers[(numbers >= first) & (numbers < first + count * width)] - first
            first += count * width
            if len(rows):
                samples, sample = torch.unique(rows // width, return_inverse=True)
                received = self._received(source, samples, needed=self._rows.length > 0)
                make = partial(self._columns_of, received, sample * width + rows % width)
                blocks.append(self.ranks.together(make, "columns of the kernel"))
        return torch.cat(blocks, dim=-1)[..., place.to(self.device)]

    def _columns_of(self, received: Inputs | None, picked: Tensor) -> Tensor:
        """Return the block between this rank's rows and some rows of samples that it has received."""
        engine, rows = self._engine.local, self._rows
        if received is None or engine is None or rows.length == 0:
            shape = (*rows.batch_shape, rows.length, len(picked))
            return torch.zeros(shape, dtype=self.dtype, device=self.device)
        columns = StateAxis(received, self._columns.outputs).take(picked)
        with torch.no_grad():
            return dense_from_tiles(self._alone(engine, rows, columns))

    def induced(self, columns: Tensor, make: Callable[[Any], Tensor], **kept: Any) -> Any:
        """Return the Nyström kernel F Fᵀ of features that are made of columns.

        Args:
            columns: F of this rank's rows.
            make: Makes F of a cross kernel.
            **kept: Ranks, samples and seed of the inducing points.
        """

        def remake(x: InputsLike) -> tuple[Tensor, ShardedSpace]:
            cross = self.cross(x)
            return make(cross), cross.space

        space = self.space
        return ShardedNystromOperator(columns, columns, spaces=(space, space), remake=remake, **kept)

    # what linear_operator does with an operator without asking for its entries

    def detach(self) -> Self:
        """Return itself: nothing is recorded through it."""
        return self


def core_of(engine: ShardedEngine, rows: Axis, columns: Axis) -> Core:
    """Return the core of an operator over ranks, which never builds anything dense."""
    opaque: Any = engine
    return Core(engine=opaque, rows=rows, columns=columns, limit=0)


def _numbers(part: slice) -> Tensor:
    """Return the positions of a slice."""
    return torch.arange(part.start, part.stop)


@dataclass(frozen=True)
class _Place:
    """The first row and column of a tile."""

    row: int
    column: int

    def tile(self, block: Tensor) -> Tile:
        height, width = block.shape[-2:]
        rows = slice(self.row, self.row + height)
        return Tile(rows, slice(self.column, self.column + width), block)


def _dense(kernel: NTKOperator) -> Tensor:
    """Return a dense block that is not kept: its limit of bytes is 0."""
    with torch.no_grad():
        kernel._check_fresh()
        return kernel._dense_values(kernel._args)
