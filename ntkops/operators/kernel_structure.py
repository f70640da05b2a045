"""What a kernel can do beyond products: its diagonal, its tiles, its factors, their cost."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..engines import LayerwiseEngine
from ..engines.passes import SharedPasses
from ..engines.tiles import sample_slices
from ..model import Inputs
from ..model.inputs import joined
from ..vectors import Space
from .axes import StateAxis, at_places
from .jacobian import JacobianOperator, jacobian_rows
from .sample_kernel import SampleKernelOperator
from .structure import Tile, tile_slices

if TYPE_CHECKING:
    from .kernel import NTKOperator

__all__ = ["KernelStructure"]

_LEAST_STEP = 16  # samples of a part of the diagonal
_TILES_OF_STEP = 8


class KernelStructure:
    """The structure protocol for an `NTKOperator`.

    Args:
        kernel: The kernel.
    """

    def __init__(self, kernel: NTKOperator) -> None:
        self._kernel = kernel
        self.shape: torch.Size = kernel.shape
        self.dtype: torch.dtype = kernel.dtype
        self.device: torch.device = kernel.device
        self.symmetric: bool = kernel._core.symmetric

    @property
    def space(self) -> Space:
        """The space of the kernel's rows."""
        return self._kernel.space

    def diagonal(self) -> Tensor:
        """Return the exact diagonal ``(*batch, n)``: one per-sample pass for each output."""
        if not self._rows.inputs.is_streamed:
            return self._kernel.diagonal()
        whole = torch.empty(self.shape[:-1], dtype=self.dtype, device=self.device)
        for rows, part in self.diagonal_parts(self.diagonal_step()):
            whole[..., rows] = part
        return whole

    def factors(self) -> tuple[JacobianOperator, JacobianOperator]:
        """Return J(x₁) and J(x₂) with K = left @ right.mT."""
        return self._kernel.left, self._kernel.right

    def sample_gram(self, probes: Tensor) -> Tensor:
        """Return the Gram matrix of per-sample gradients; see `NTKOperator.sample_gram`."""
        return self._kernel.sample_gram(probes)

    @property
    def sample_shape(self) -> tuple[int, int] | None:
        """Samples and outputs, where the rows are all outputs of all samples, as `sample_gram` has them."""
        rows = self._rows
        whole = self.symmetric and rows.pick is None and rows._is_whole() and not rows.inputs.is_coupled
        return (rows.inputs.num_samples, rows.inputs.num_outputs) if whole else None

    def output_traced(self, outputs: Tensor) -> NTKOperator | None:
        """Return the lazy kernel summed over some of the outputs, or None for uneven rows or a cross kernel.

        Args:
            outputs: ``(R, r)`` positions among the outputs of a sample: row s of the kernel's outputs is
                paired with row s, and the R kernels over r outputs are added.
        """
        rows = self._rows
        if not self.symmetric or rows.index is not None:
            return None
        if rows.inputs.is_coupled:  # the same rows of every node
            outputs = at_places(outputs, rows.num_samples, rows.num_outputs)
        numbers = rows.outputs[..., outputs]  # (*batch, R', R, r)
        axis = StateAxis(rows.inputs, numbers.flatten(-3, -2))
        return self._kernel._rebuild(self._kernel._core.with_axes(axis, axis))

    @property
    def is_coupled(self) -> bool:
        """Whether samples are coupled, so that a pass is one over all of them."""
        return self._rows.inputs.is_coupled

    def node_blocks(self, rows: Tensor) -> SampleKernelOperator:
        """Return the sum of R blocks of coupled samples, given ``(R, r)`` rows; no other is made."""
        axis = StateAxis(self._rows.inputs, self._rows.outputs[..., rows].flatten(-3, -2))
        return SampleKernelOperator(*self._kernel._args, core=self._kernel._core.with_axes(axis, axis))

    def exact_cost(self, quantity: str) -> float:
        """Return the passes that the exact "diagonal" or all "tiles" take, products of tiles included.

        Infinite where they are more backward passes than the engine allows.
        """
        if self._kernel._stored_dense() is not None:
            return 0.0
        rows = self._rows
        outputs = len(rows.distinct_outputs)
        engine = self._kernel._core.engine
        if not engine.allows(outputs):
            return math.inf
        if quantity == "diagonal":
            return engine.diagonal_passes(rows.inputs, outputs)
        if self._over_time:
            return self._kernel._tile_cost()
        size = self.tile_size()
        count, others = (math.ceil(length / size) for length in self.shape[-2:])
        slabs = outputs * ((count + 1) / 2 if self.symmetric else 1 + others)
        return max(0.0, slabs - outputs) + self._kernel._tile_cost()

    @property
    def _rows(self) -> StateAxis:
        return self._kernel._rows

    def _row_bytes(self) -> int:
        rows = self._rows
        entries = rows.batch_shape.numel() * rows.terms * self._kernel.num_parameters
        return max(1, entries * self.dtype.itemsize)

    @property
    def _by_layers(self) -> bool:
        """Whether blocks come from layer structure, which never writes gradients down."""
        return self._kernel._core.engine.name == "layerwise"

    @property
    def _over_time(self) -> bool:
        """Whether blocks of hidden states over time come from recursions, one for each pair of samples."""
        engine = self._kernel._core.engine
        return isinstance(engine, LayerwiseEngine) and engine.over_time

    def tile_size(self, parts: int = 1) -> int:
        """Return the rows of a tile for which the workspace suffices, one of each of so many kernels."""
        workspace = self._kernel._core.engine.workspace_bytes()
        if self._by_layers:  # the tiles themselves are what takes the memory
            entry = 4 * self.dtype.itemsize * self._rows.batch_shape.numel() * parts
            fit = max(1, math.isqrt(workspace // entry))
        else:
            fit = max(1, workspace // self._row_bytes())
        width, inputs = self._rows.outputs.shape[-1], self._rows.inputs
        if inputs.is_streamed:  # samples may be larger than what is made of them
            fit = min(fit, max(1, workspace // inputs.sample_bytes) * width)
        fit = fit // width * width if fit >= width else fit  # whole samples, where they fit
        if self._over_time and width**2 * self.dtype.itemsize <= workspace:
            fit = max(fit, width)  # parts of a sample cost as much as all of it
        return max(1, min(fit, max(self.shape[-2:])))

    def tiles(self, size: int | None = None) -> Iterator[Tile]:
        """Yield dense tiles in row-major order; for a symmetric kernel those on and above the diagonal.

        Args:
            size: Rows and columns of a tile; None for as many as the workspace holds.

        Yields:
            Tiles with blocks ``(*batch, r, c)``. Memory: two slabs of per-sample gradients. A re-iterable is
            read once for each row of tiles, of a symmetric kernel from the row's first sample on.
        """
        yield from self.tiles_after(size or self.tile_size(), 0)

    def tiles_after(self, size: int, skip: int) -> Iterator[Tile]:
        """Yield what `tiles` yields after the first ``skip`` tiles, which are not made."""
        kernel = self._kernel
        right = AxisReader(kernel._columns)
        left = right if self.symmetric else AxisReader(kernel._rows)
        with SharedPasses(self._rows.inputs.num_samples) as passes:
            for rows in tile_slices(self.shape[-2], size):
                columns = list(tile_slices(self.shape[-1], size))
                if self.symmetric:
                    columns = [part for part in columns if part.start >= rows.start]
                yield from self._row_of_tiles(left, right, rows, columns[skip:], passes)
                skip = max(0, skip - len(columns))

    def _row_of_tiles(
        self, left: AxisReader, right: AxisReader, rows: slice, columns: list[slice], passes: SharedPasses
    ) -> Iterator[Tile]:
        stored = self._kernel._stored_dense()
        if stored is not None:
            yield from (Tile(rows, part, stored[..., rows, part]) for part in columns)
            return
        if not columns:
            return
        longest = max(part.stop - part.start for part in (rows, *columns))
        fits = not self._by_layers
        fits = fits and longest * self._row_bytes() <= 2 * self._kernel._core.engine.workspace_bytes()
        one = left.take(rows)
        slab: Tensor | None = None
        for part in columns:
            same = self.symmetric and part == rows
            other = one if same else right.take(part)
            if not fits:
                with passes.over(one.inputs.num_samples):
                    block = self._block(one, other)
            else:
                if slab is None:
                    with passes.over(one.inputs.num_samples):
                        slab = self._slab(one)
                with passes.over(other.inputs.num_samples):
                    block = slab @ (slab if same else self._slab(other)).mT
            yield Tile(rows, part, block)

    def _slab(self, axis: StateAxis) -> Tensor:
        """Return the dense Jacobian rows ``(*batch, r, R·P)`` of a part of an axis."""
        kernel = self._kernel
        kernel._check_fresh()
        with torch.set_grad_enabled(kernel._is_recorded()):
            return jacobian_rows(kernel._core.engine, kernel._args, axis)

    def _block(self, rows: StateAxis, columns: StateAxis) -> Tensor:
        kernel = self._kernel
        kernel._check_fresh()
        part = kernel._rebuild(kernel._core.with_axes(rows, columns))
        with torch.set_grad_enabled(kernel._is_recorded()):
            return part._dense_values(kernel._args)

    # parts of the samples

    def sample_parts(self, size: int, first: int = 0) -> Iterator[tuple[slice, NTKOperator]]:
        """Yield the kernels within consecutive samples, in memory; a re-iterable is read once.

        Args:
            size: Samples of a part, at most.
            first: Number of samples, a whole number of parts, that are left out.

        Yields:
            The samples of a part, and their symmetric kernel over all rows of these samples.
        """
        kernel, rows = self._kernel, self._rows
        for start, stop, part in sample_slices(rows.inputs, size, first):
            if part is rows.inputs:
                yield slice(start, stop), kernel
            else:
                yield slice(start, stop), self._within(part)

    def sample_reader(self) -> Callable[..., NTKOperator]:
        """Return what gives the symmetric kernel over the samples of some slices, to be asked for in order.

        Each place among the slices has its own pass over a re-iterable, which lasts as long as what is asked
        for there follows what was asked for last.
        """
        inputs = self._rows.inputs
        readers = [inputs.in_order(), inputs.in_order()]
        held: dict[int, tuple[slice, Inputs]] = {}

        def kernel_of(*chosen: slice) -> NTKOperator:
            parts = []
            for place, part in enumerate(chosen):
                if held.get(place, (None,))[0] != part:
                    held[place] = part, readers[place](part.start, part.stop)
                parts.append(held[place][1])
            return self._within(joined(parts))

        return kernel_of

    def part_tiles(self, owners: Mapping[str, int], count: int) -> Iterator[Tile]:
        """Yield tiles of the kernels of parts of the parameters, ``(L, *batch, r, c)``, as `tiles` does.

        Args:
            owners: Number of the part of each parameter, by name.
            count: Number L of parts.
        """
        size = self.tile_size(count)
        right = AxisReader(self._kernel._columns)
        left = right if self.symmetric else AxisReader(self._kernel._rows)
        with SharedPasses(self._rows.inputs.num_samples) as passes:
            for rows in tile_slices(self.shape[-2], size):
                one = left.take(rows)
                for columns in tile_slices(self.shape[-1], size):
                    if self.symmetric and columns.start < rows.start:
                        continue
                    other = one if self.symmetric and columns == rows else right.take(columns)
                    with passes.over(one.inputs.num_samples):
                        block = self._kernel.part_blocks(one, other, owners, count)
                    yield Tile(rows, columns, block)

    def _within(self, part: Inputs) -> NTKOperator:
        axis = StateAxis(part, self._rows.outputs)
        return self._kernel._rebuild(self._kernel._core.with_axes(axis, axis))

    def diagonal_step(self) -> int:
        """Return the samples of the parts in which a diagonal is made: several tiles of gradients."""
        tile = self._kernel._core.engine.tile_samples(len(self._rows.distinct_outputs))
        return max(_LEAST_STEP, _TILES_OF_STEP * tile)

    def diagonal_parts(self, size: int, first: int = 0) -> Iterator[tuple[slice, Tensor]]:
        """Yield the exact diagonal in parts ``(*batch, k)``, each with its rows; a re-iterable is read once.

        Args:
            size: Samples of a part.
            first: Number of rows, a whole number of parts, that are left out.

        Yields:
            The rows, and their part of the diagonal.
        """
        rows = self._rows
        if not self.symmetric or rows.pick is not None or self._kernel._stored_dense() is not None:
            if first < self.shape[-1]:
                yield slice(0, self.shape[-1]), self._kernel.diagonal()
            return
        count = rows.inputs.num_samples
        even = rows.inputs.lengths is None
        offsets = torch.arange(count + 1) * rows.outputs.shape[-1] if even else rows.offsets
        with SharedPasses(count) as passes:
            for part, kernel in self.sample_parts(size, int(torch.searchsorted(offsets, first))):
                with passes.over(part.stop - part.start):
                    found = kernel.diagonal()
                yield slice(int(offsets[part.start]), int(offsets[part.stop])), found


class AxisReader:
    """Slices of an axis, to be asked for in order: what is streamed is read in one pass.

    Args:
        axis: Rows or columns.
    """

    def __init__(self, axis: StateAxis) -> None:
        self._axis = axis
        in_order = axis.inputs.is_streamed and axis.pick is None
        self._between = axis.inputs.in_order() if in_order else None

    def take(self, rows: slice) -> StateAxis:
        """Return the axis of some consecutive rows, its samples in memory."""
        if self._between is None:
            return self._axis.take(rows)
        offsets = self._axis.offsets
        first = int(torch.searchsorted(offsets, rows.start, right=True)) - 1
        last = int(torch.searchsorted(offsets, rows.stop))
        part = StateAxis(self._between(first, last), self._axis.outputs)
        start = int(offsets[first])
        return part.take(slice(rows.start - start, rows.stop - start))
