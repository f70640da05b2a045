"""What operators over a process group can do beyond products: diagonals, tiles, factors."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from ...engines import Engine
from ...model import Batch, Inputs
from ...model.inputs import joined
from ...ranks import Ranks, ShardedSpace
from ...vectors import Space
from ..axes import StateAxis
from ..core import Core
from ..kernel import NTKOperator
from ..kernel_structure import KernelStructure
from ..structure import Factors, Tile, structure
from .kernel import ShardedAxis, ShardedJacobianOperator, ShardedKernelOperator
from .rows import ShardedRidge

__all__ = ["ShardedJacobianStructure", "ShardedRidgeStructure", "ShardedStructure"]


class ShardedJacobianStructure:
    """The structure of a Jacobian over ranks, of which nothing but products is known.

    Args:
        operator: J or its transpose.
    """

    symmetric = False

    def __init__(self, operator: ShardedJacobianOperator) -> None:
        self.shape, self.dtype, self.device = operator.shape, operator.dtype, operator.device
        self.space: Space = operator.space

    def factors(self) -> None:
        """Return nothing: it is a factor itself."""

    def exact_cost(self, quantity: str) -> float:
        """Return infinity: nothing exact is offered."""
        return math.inf

    def sample_gram(self, probes: Tensor) -> None:
        """Return nothing."""


class ShardedStructure:
    """The structure of a kernel over ranks. Every method is called by all ranks.

    Tiles are those of this rank's rows: together the ranks yield each once, or, of a symmetric kernel, each
    of those above the diagonal or its mirror image, in equal shares. All ranks yield the same number of
    tiles, some of them empty, so that several kernels can be gone through side by side.

    Args:
        kernel: The kernel.
    """

    def __init__(self, kernel: ShardedKernelOperator) -> None:
        self._kernel = kernel
        self.shape, self.dtype, self.device = kernel.shape, kernel.dtype, kernel.device
        self.symmetric: bool = kernel._core.symmetric

    @property
    def space(self) -> ShardedSpace:
        """The space of the rows."""
        return self._kernel.space

    @property
    def _ranks(self) -> Ranks:
        return self._kernel.ranks

    @property
    def _rows(self) -> ShardedAxis:
        assert isinstance(self._kernel._core.rows, ShardedAxis)
        return self._kernel._core.rows

    @property
    def _columns(self) -> ShardedAxis:
        assert isinstance(self._kernel._core.columns, ShardedAxis)
        return self._kernel._core.columns

    def factors(self) -> Factors:
        """Return J(x₁) and J(x₂) with K = left @ right.mT."""
        return self._kernel.left, self._kernel.right

    def sample_gram(self, probes: Tensor) -> None:
        """Return nothing: gradients of other ranks' samples are not here; see `sample_pairs`."""

    def _alone(self, engine: Engine, rows: StateAxis, columns: StateAxis) -> NTKOperator:
        """Return a local kernel between samples that this rank has."""
        return NTKOperator(*self._kernel._args, core=Core(engine, rows, columns, limit=0))

    def _own(self, engine: Engine) -> KernelStructure:
        return KernelStructure(self._alone(engine, self._rows, self._rows))

    def diagonal(self) -> Tensor:
        """Return this rank's rows of the diagonal, ``(*batch, length)``."""
        shape = (*self._rows.batch_shape, self._rows.length)
        engine = self._kernel._engine.local

        def work() -> Tensor:
            if engine is None or self._rows.length == 0:
                return torch.zeros(shape, dtype=self.dtype, device=self.device)
            return self._own(engine).diagonal()

        return self._ranks.together(work, "the diagonal")

    def diagonal_step(self) -> int:
        """Return the samples of a part of the diagonal: all that this rank has."""
        return max(1, self._rows.inputs.num_samples)

    def diagonal_parts(self, size: int, first: int = 0) -> Iterator[tuple[slice, Tensor]]:
        """Yield this rank's rows of the diagonal in one part."""
        yield slice(0, self._rows.length), self.diagonal()

    @property
    def sample_shape(self) -> tuple[int, int] | None:
        """Samples on all ranks and outputs, where the rows are all outputs of all samples."""
        whole = self.symmetric and self._rows._is_whole()
        return (sum(self._rows.counts), self._rows.inputs.num_outputs) if whole else None

    @property
    def layered(self) -> bool:
        """Whether layer structure covers all parameters, on every rank."""
        return self._kernel._engine.layered

    def sample_parts(self, size: int) -> Iterator[tuple[slice, NTKOperator | None]]:
        """Yield the kernels within parts of the samples, the same number of them on all ranks.

        Args:
            size: Samples of a part, at most.

        Yields:
            The samples, counted over all ranks, and their kernel; None for a part without samples.
        """
        for rows in self._sample_slices(size):
            yield (
                self._counted(self._ranks.rank, rows),
                self._ranks.together(partial(self._kernel_of, rows), "reading samples"),
            )

    def sample_pairs(self, size: int) -> Iterator[tuple[slice, slice, NTKOperator | None]]:
        """Yield kernels over pairs of parts of the samples, the same number of them on all ranks.

        Args:
            size: Samples of a part, at most.

        Yields:
            Two parts, counted over all ranks, and the kernel over both of them; over one, where they are the
            same; None where it is made on another rank.
        """
        for source, count in enumerate(self._columns.counts):
            for start in range(0, count, size):
                part = slice(start, min(start + size, count))
                received = self._received(source, part)
                for rows in self._sample_slices(size):
                    make = partial(self._kernel_over, source, part, rows, received)
                    kernel = self._ranks.together(make, "reading samples")
                    yield self._counted(self._ranks.rank, rows), self._counted(source, part), kernel

    def _sample_slices(self, size: int) -> list[slice]:
        """Cut this rank's samples into as many parts as the rank with the most of them has."""
        mine, most = self._rows.inputs.num_samples, max(self._rows.counts)
        return [slice(min(a, mine), min(a + size, mine)) for a in range(0, most, size)]

    def _counted(self, rank: int, part: slice) -> slice:
        """Return samples of a rank as they are counted over all ranks."""
        before = sum(self._rows.counts[:rank])
        return slice(part.start + before, part.stop + before)

    def _kernel_of(self, rows: slice) -> NTKOperator | None:
        engine = self._kernel._engine.local
        if engine is None or rows.stop <= rows.start:
            return None
        part = self._rows.inputs.select(torch.arange(rows.start, rows.stop))
        axis = StateAxis(part, self._rows.outputs)
        return self._alone(engine, axis, axis)

    def _kernel_over(
        self, source: int, part: slice, rows: slice, received: Inputs | None
    ) -> NTKOperator | None:
        engine, own = self._kernel._engine.local, source == self._ranks.rank
        if received is None or engine is None or rows.stop <= rows.start:
            return None
        if own and part == rows:
            return self._kernel_of(rows)
        if own and part.start < rows.start:
            return None
        mine = self._rows.inputs.select(torch.arange(rows.start, rows.stop))
        axis = StateAxis(joined([mine, received]), self._rows.outputs)
        return self._alone(engine, axis, axis)

    def exact_cost(self, quantity: str) -> float:
        """Return the passes of the rank that makes the most of them."""
        engine = self._kernel._engine.local

        def work() -> float:
            if engine is None or self._rows.length == 0:
                return 0.0
            own = self._own(engine).exact_cost(quantity)
            pairs = (1 + self._ranks.count) / 2 if self.symmetric else self._ranks.count
            return own if quantity == "diagonal" else own * pairs

        return self._ranks.largest(self._ranks.together(work, "the cost of an exact value"))

    def tile_size(self) -> int:
        """Return the length of tiles for which every rank's memory suffices."""
        engine, rows = self._kernel._engine.local, self._rows

        def work() -> int:
            if engine is None or rows.length == 0:
                return 2**31
            return max(self._own(engine).tile_size() // self._width, 1) * self._width

        return int(-self._ranks.largest(-self._ranks.together(work, "the size of tiles")))

    @property
    def _width(self) -> int:
        return self._rows.outputs.shape[-1]

    def tiles(self, size: int | None = None) -> Iterator[Tile]:
        """Yield this rank's tiles; see the class. Samples go from rank to rank, gradients do not.

        Args:
            size: Rows and columns of a tile.

        Yields:
            Tiles, whose rows and columns are counted over all ranks.
        """
        yield from self.tiles_after(size or self.tile_size(), 0)

    def tiles_after(self, size: int, skip: int) -> Iterator[Tile]:
        """Yield what `tiles` yields after the first ``skip`` tiles, for which nothing is sent or made."""
        samples = max(1, size // self._width)
        most = max(self._rows.counts)
        slices = [slice(a, min(a + samples, most)) for a in range(0, most, samples)]
        for source, count in enumerate(self._columns.counts):
            for start in range(0, count, samples):
                part = slice(start, min(start + samples, count))
                wanted, skip = slices[skip:], max(0, skip - len(slices))
                if not wanted:
                    continue
                received = self._received(source, part)
                for rows in wanted:
                    make = partial(self._tile, source, part, rows, received)
                    yield self._ranks.together(make, "a tile")

    def _received(self, source: int, part: slice) -> Inputs | None:
        """Return samples of another rank, or of this one; None where this rank makes no tile of them."""
        mine, engine = self._columns.inputs, self._kernel._engine
        own = source == self._ranks.rank

        def cut() -> tuple[Inputs | None, Batch | None]:
            if not own:
                return None, None
            chosen = mine.select(torch.arange(part.start, part.stop))
            (_, _, batch), *_ = chosen.batches(chosen.num_samples)
            return chosen, batch.map(lambda tensor: tensor.detach().cpu())

        chosen, batch = self._ranks.together(cut, "reading samples")
        batch = self._ranks.broadcast(batch, source)
        if own:
            return chosen
        if not self._makes(source):
            return None
        moved = batch.map(lambda tensor: tensor.to(engine.linearization.device))
        return Inputs(moved, mine.output_shape)

    def _makes(self, source: int) -> bool:
        """Return whether this rank makes the tiles between its rows and another rank's columns."""
        if not self.symmetric or source == self._ranks.rank:
            return True
        count = self._ranks.count
        ahead = (source - self._ranks.rank) % count
        return 2 * ahead < count or (2 * ahead == count and self._ranks.rank < source)

    def _tile(self, source: int, part: slice, rows: slice, received: Inputs | None) -> Tile:
        width, axis = self._width, self._rows
        engine = self._kernel._engine.local
        rows = slice(rows.start, min(rows.stop, axis.inputs.num_samples))
        row_start, column_start = self.space.start, sum(self._columns.counts[:source]) * width
        place = _Place(row_start + rows.start * width, column_start + part.start * width)
        same = self.symmetric and source == self._ranks.rank
        none = received is None or engine is None or rows.stop <= rows.start
        if none or (same and part.start < rows.start):
            return place.tile(torch.zeros((*axis.batch_shape, 0, 0), dtype=self.dtype, device=self.device))
        assert received is not None and engine is not None
        own = axis.take(slice(rows.start * width, rows.stop * width))
        if same and part == rows:
            return place.tile(_dense(self._alone(engine, own, own)))
        other = StateAxis(received, self._columns.outputs)
        return place.tile(_dense(self._alone(engine, own, other)))


class ShardedRidgeStructure:
    """The structure of K + D over ranks.

    Args:
        operator: K + D.
    """

    def __init__(self, operator: ShardedRidge) -> None:
        self._base, self._entries = structure(operator.kernel), operator.ridge.detach()
        self.shape, self.dtype, self.device = operator.shape, operator.dtype, self._base.device
        self.symmetric, self.space = self._base.symmetric, operator.space
        self.tile_size, self.exact_cost = self._base.tile_size, self._base.exact_cost

    def factors(self) -> None:
        """Return nothing: D has no factor of the parameters."""

    def sample_gram(self, probes: Tensor) -> None:
        """Return nothing."""

    def diagonal(self) -> Tensor:
        """Return this rank's rows of the diagonal."""
        return self._base.diagonal() + self._entries

    def tiles(self, size: int | None = None) -> Iterator[Tile]:
        """Yield the tiles of K, with D on the diagonal."""
        start = self.space.start
        for tile in self._base.tiles(size):
            if tile.rows == tile.cols and tile.block.numel():
                own = self._entries[..., tile.rows.start - start : tile.rows.stop - start]
                yield Tile(tile.rows, tile.cols, tile.block + torch.diag_embed(own))
            else:
                yield tile


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
    with torch.no_grad():
        kernel._check_fresh()
        return kernel._dense_values(kernel._args)
