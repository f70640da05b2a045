"""The empirical neural tangent kernel K = J Jᵀ, square and cross, as a lazy operator."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from linear_operator.operators import LinearOperator
from torch import Tensor

from ..engines import EngineChoice, build_engine, tensor_bytes
from ..engines.passes import SharedPasses
from ..engines.tiles import sample_slices
from ..errors import (
    ShapeError,
    UnknownParameterError,
    UnsupportedOperationError,
)
from ..model import Inputs
from ..model.inputs import joined
from .algebra import KernelAlgebra
from .axes import AxisReader, ParameterAxis, StateAxis, at_places
from .base import EngineOperator
from .capabilities import Capabilities, Tile, tile_slices
from .jacobian import JacobianOperator, jacobian_rows
from .products import Spending
from .sample_kernel import SampleKernelOperator

if TYPE_CHECKING:
    from ..model.accepted import InputsLike

__all__ = ["NTKOperator"]

_TILES_OF_STEP = 8  # tiles of gradients of a part of the diagonal
_LEAST_STEP = 16  # samples of such a part


class NTKOperator(KernelAlgebra, EngineOperator, Capabilities):
    """K = J(x₁) J(x₂)ᵀ, per class, traced over outputs, or a slice of these; never stored unasked.

    Make one with `ntkops.ntk`. Sums, multiples, products, slices and ``K.add_jitter(ridge)`` stay lazy.
    """

    @property
    def _rows(self) -> StateAxis:
        """The axis of the rows, of states."""
        assert isinstance(self._core.rows, StateAxis)
        return self._core.rows

    @property
    def _columns(self) -> StateAxis:
        """The axis of the columns, of states."""
        assert isinstance(self._core.columns, StateAxis)
        return self._core.columns

    @property
    def num_samples(self) -> int:
        """Number N of samples of the rows, of nodes where they are coupled."""
        return self._rows.num_samples

    @property
    def num_outputs(self) -> int:
        """Number of rows that each sample has in this operator."""
        return self._rows.num_outputs

    @property
    def output_shape(self) -> torch.Size:
        """Shape of the model's output for one sample, or one node, before flattening."""
        return self._rows.output_shape

    @property
    def offsets(self) -> Tensor:
        """``(N + 1,)`` first row of each sample, and the number of rows: samples may differ in length.

        Of a kernel over whole samples; a slice has what its samples have before it is cut.
        """
        return self._rows.offsets

    @property
    def axes(self) -> dict[str, int]:
        """Names and sizes of the axes into which the rows of a sample unfold; empty where they have none."""
        return dict(self._rows.labels)

    @property
    def left(self) -> JacobianOperator:
        """J(x₁), ``(n, R·P)``: K = left @ right.mT."""
        return self._factor_of(self._rows)

    @property
    def right(self) -> JacobianOperator:
        """J(x₂), ``(m, R·P)``: K = left @ right.mT."""
        return self._factor_of(self._columns)

    def _factor_of(self, axis: StateAxis) -> JacobianOperator:
        """Return the Jacobian whose rows are an axis."""
        beside = ParameterAxis.beside(axis, self.num_parameters)
        return JacobianOperator(*self._args, core=self._core.with_axes(axis, beside))

    of_samples = True

    @property
    def symmetric(self) -> bool:  # type: ignore[override]
        """Whether rows and columns are the same, so that K equals its transpose."""
        return self._core.symmetric

    def cross(self, x: InputsLike) -> NTKOperator:
        """Return the kernel between new samples and this kernel's columns.

        It shares the snapshot, the engine and the outputs; nothing but ``x`` is checked. The first axis of
        the output, such as time or the nodes of a graph, may have another length.

        Args:
            x: Samples of the same kind as those of the kernel, or another graph.

        Returns:
            Lazy ``(N_new·O, n)``, with the batch of this kernel.

        Raises:
            ShapeError: If this kernel's rows are an uneven selection of samples and outputs, or further axes
                of the outputs differ.
            NtkopsError: If the samples do not fit; see `ntkops.errors`.
        """
        core, columns = self._core, self._columns
        return self._rebuild(core.with_axes(columns.over(core.engine.linearization.inputs(x)), columns))

    # dense results

    def _dense_cost(self) -> float:
        # Above the limit of backward passes the dense block is refused, by whatever way: products go on.
        distinct = self._num_distinct()
        if not self._core.engine.allows(distinct):
            return math.inf
        columns, block = self._column_cost(), self._block_cost(distinct)
        return columns if columns < block and self.pushes else block

    def _block_cost(self, distinct: int) -> float:
        """Return the passes of a dense kernel by rows of J or factors, some samples at a time."""
        engine, inputs, shape = self._core.engine, self._rows.inputs, self._kernel_shape()
        # One tile takes a backward pass for each output; a sample in `repeats` tiles is passed that often.
        repeats = engine.kernel_repeats(inputs, shape, distinct)
        return engine.kernel_passes(inputs, shape, distinct) + distinct * (repeats - 1)

    def _tile_cost(self) -> float:
        """Return what a dense kernel costs that fits into one tile of samples."""
        return self._core.engine.kernel_passes(self._rows.inputs, self._kernel_shape(), self._num_distinct())

    def _factor_passes(self) -> float:
        core = self._core
        return core.engine.large_factor_passes(self._rows.inputs) if core.symmetric else 0.0

    def _column_cost(self) -> float:
        """Return the passes of a dense kernel by products: a vjp and a jvp for each of the fewer columns."""
        return 2.0 * min(self.shape[-2:]) * self._rows.batch_shape.numel() * self._rows.terms

    def _by_columns(self) -> bool:
        """Whether products are the cheaper way to a dense kernel; where J p does not exist they are none."""
        # In this order: which mode a model allows is found with the first product that needs one.
        return self._column_cost() < self._block_cost(self._num_distinct()) and self.pushes

    @property
    def layered(self) -> bool:  # type: ignore[override]
        """Whether layer structure covers all parameters, as far as the trial and the batches so far say."""
        engine = self._core.engine
        return len(engine.covered) == len(engine.linearization.names)

    def _dense_instead(self) -> Tensor | None:
        fits = tensor_bytes(self.shape, self.dtype) <= self._core.max_dense_bytes
        return self._dense_built() if fits and self._core.engine.differentiation.mode == "reverse" else None

    def _dense_values(self, params: Sequence[Tensor]) -> Tensor:
        rows, columns = self._rows, self._columns
        if self._by_columns():
            return self._dense_by_columns(params)
        dense = self._core.engine.kernel(
            tuple(params), rows.inputs, columns.inputs, rows.flat_outputs, columns.flat_outputs
        )  # (M, N₁·r₁, N₂·r₂)
        dense = _picked(dense, rows, columns)
        return dense.reshape(*self.batch_shape, *dense.shape[1:])

    def _diagonal(self) -> Tensor:
        if not self._core.symmetric:
            return super()._diagonal()
        self._check_fresh()
        stored = self._stored_dense()
        if stored is not None and not self._is_recorded():
            return stored.diagonal(dim1=-2, dim2=-1).clone()
        rows = self._rows
        if rows.inputs.is_streamed and rows.pick is None and not self._is_recorded():  # read once
            parts = [part for _, part in self.diagonal_parts(self.diagonal_step())]
            return torch.cat(parts, dim=-1)
        with torch.set_grad_enabled(self._is_recorded()):
            diagonal = self._core.engine.diagonal(self._args, rows.inputs, rows.flat_outputs)  # (M, N·r)
        if rows.index is not None:
            diagonal = diagonal[:, rows.index.to(diagonal.device)]
        return diagonal.reshape(*self.batch_shape, -1)

    def of_parameters(self, names: Sequence[str]) -> NTKOperator:
        """Return the kernel of some of the selected parameters, over the same rows and columns.

        Args:
            names: Canonical names, as `ntkops.linearize(model).names` has them.

        Returns:
            Lazy operator of this shape. The kernels of parts that make up all parameters sum to this one.

        Raises:
            UnknownParameterError: If a name is not among the selected parameters.
        """
        core, known = self._core, self._core.engine.linearization.names
        for name in names:
            if name not in known:
                raise UnknownParameterError(f"{name!r} is not among the parameters of this kernel")
        chosen = [number for number, name in enumerate(known) if name in names]
        part = core.engine.linearization.restricted(chosen, self._args)
        choice: EngineChoice = "autograd" if core.engine.name == "autograd" else "auto"
        engine = build_engine(part, self._rows.inputs, choice)
        return NTKOperator(
            *part.parameters, core=dataclasses.replace(core, engine=engine, spending=Spending())
        )

    def part_blocks(
        self, rows: StateAxis, columns: StateAxis, owners: Mapping[str, int], count: int
    ) -> Tensor:
        """Return dense blocks of the kernels of parts of the parameters, ``(L, *batch, r, c)``."""
        self._check_fresh()
        with torch.no_grad():
            blocks = self._core.engine.part_kernels(
                self._args,
                rows.inputs,
                columns.inputs,
                (rows.flat_outputs, columns.flat_outputs),
                owners,
                count,
            )
        blocks = _picked(blocks, rows, columns)  # (L, M, r, c)
        return blocks.reshape(count, *self.batch_shape, *blocks.shape[-2:])

    def sample_gram(self, cotangents: Tensor) -> Tensor:
        r"""Return the Gram matrix of per-sample gradients :math:`g_{ir} = J_i^\top v_{ir}`.

        Args:
            cotangents: ``(N, r, O)``: r combinations of the model's O outputs for each sample.

        Returns:
            ``(N, r, N, r)`` with entries :math:`g_{ir}^\top g_{js}`. Cost: r per-sample passes.

        Raises:
            ShapeError: If the cotangents do not have that shape.
            UnsupportedOperationError: For a cross kernel.
        """
        inputs = self._rows.inputs
        if not self._core.symmetric:
            raise UnsupportedOperationError(
                "sample_gram is for kernels of one set of samples, this one is a cross kernel"
            )
        if cotangents.dim() != 3 or cotangents.shape[::2] != (inputs.num_samples, inputs.num_outputs):
            raise ShapeError(
                f"cotangents need shape ({inputs.num_samples}, r, {inputs.num_outputs}), "
                f"got {tuple(cotangents.shape)}"
            )
        self._check_fresh()
        with torch.set_grad_enabled(self._is_recorded(cotangents)):
            return self._core.engine.sample_gram(self._args, inputs, cotangents)

    # tiles

    def factors(self) -> tuple[JacobianOperator, JacobianOperator]:
        """Return J(x₁) and J(x₂) with K = left @ right.mT: one and the same where K is symmetric."""
        left = self.left
        return left, left if self.symmetric else self.right

    @property
    def sample_shape(self) -> tuple[int, int] | None:  # type: ignore[override]
        """Samples and outputs, where the rows are all outputs of all samples, as `sample_gram` has them."""
        rows = self._rows
        whole = self.symmetric and rows.pick is None and rows.is_whole and not rows.inputs.is_coupled
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
        return self._rebuild(self._core.with_axes(axis, axis))

    @property
    def is_coupled(self) -> bool:  # type: ignore[override]
        """Whether samples are coupled, so that a pass is one over all of them."""
        return self._rows.inputs.is_coupled

    def node_blocks(self, rows: Tensor) -> SampleKernelOperator:
        """Return the sum of R blocks of coupled samples, given ``(R, r)`` rows; no other is made."""
        axis = StateAxis(self._rows.inputs, self._rows.outputs[..., rows].flatten(-3, -2))
        return SampleKernelOperator(*self._args, core=self._core.with_axes(axis, axis))

    def exact_cost(self, quantity: str) -> float:
        """Return the passes that the exact "diagonal" or all "tiles" take, products of tiles included.

        Infinite where they are more backward passes than the engine allows.
        """
        if self._stored_dense() is not None:
            return 0.0
        rows = self._rows
        outputs = rows.num_distinct
        engine = self._core.engine
        if not engine.allows(outputs):
            return math.inf
        if quantity == "diagonal":
            return engine.diagonal_passes(rows.inputs, outputs)
        if self._over_time:  # a recursion makes what one pair of samples has, whatever the tiles
            return self._tile_cost()
        # In passes over the N₁ samples of the rows. Symmetric, with b tiles a side: b (b + 1) / 2 tiles, each
        # with gradients of N₁ / b samples. Cross: one pass over the rows, and for each of their b tiles one
        # over the N₂ columns, b · N₂ / N₁ = `others`. `_tile_cost` has the first pass already.
        size = self.tile_size()
        count, others = (math.ceil(length / size) for length in self.shape[-2:])
        steps = outputs * ((count + 1) / 2 if self.symmetric else 1 + others)
        return max(0.0, steps - outputs) + self._tile_cost()

    def _row_bytes(self) -> int:
        """Return the bytes of a row of J, of each term and member of the batch."""
        rows = self._rows
        entries = rows.batch_shape.numel() * rows.terms * self.num_parameters
        return max(1, entries * self.dtype.itemsize)

    @property
    def _by_layers(self) -> bool:
        """Whether blocks come from layer structure, which never writes gradients down."""
        return self._core.engine.name == "layerwise"

    @property
    def _over_time(self) -> bool:
        """Whether blocks of hidden states over time come from recursions, one for each pair of samples."""
        return self._core.engine.over_time

    def tile_size(self, parts: int = 1) -> int:
        """Return the rows of a tile for which the workspace suffices, one of each of so many kernels."""
        workspace = self._core.engine.workspace_bytes()
        if self._by_layers:  # the tiles themselves are what takes the memory
            # The tile, and beside it what a layer adds: two Gram matrices and their product.
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
            Tiles with blocks ``(*batch, r, c)``. Memory: gradients of two blocks of rows. A re-iterable
            is read once for each row of tiles, of a symmetric kernel from the row's first sample on.
        """
        yield from self.tiles_after(size or self.tile_size(), 0)

    def tiles_after(self, size: int, skip: int) -> Iterator[Tile]:
        """Yield what `tiles` yields after the first ``skip`` tiles, which are not made."""
        right = AxisReader(self._columns)
        left = right if self.symmetric else AxisReader(self._rows)
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
        """Yield the tiles of some rows and each of some runs of columns."""
        stored = self._stored_dense()
        if stored is not None:
            yield from (Tile(rows, part, stored[..., rows, part]) for part in columns)
            return
        if not columns:
            return
        # Rows of J that are written down serve a whole row of tiles; where two blocks of them do not fit, or
        # layer structure needs none, each tile is made by the engine.
        longest = max(part.stop - part.start for part in (rows, *columns))
        fits = not self._by_layers
        fits = fits and longest * self._row_bytes() <= 2 * self._core.engine.workspace_bytes()
        one = left.take(rows)
        block_row: Tensor | None = None
        for part in columns:
            same = self.symmetric and part == rows
            other = one if same else right.take(part)
            if not fits:
                with passes.over(one.inputs.num_samples):
                    block = self._block(one, other)
            else:
                if block_row is None:
                    with passes.over(one.inputs.num_samples):
                        block_row = self._block_row(one)
                with passes.over(other.inputs.num_samples):
                    block = block_row @ (block_row if same else self._block_row(other)).mT
            yield Tile(rows, part, block)

    def _block_row(self, axis: StateAxis) -> Tensor:
        """Return the dense Jacobian rows ``(*batch, r, R·P)`` of a part of an axis."""
        self._check_fresh()
        with torch.set_grad_enabled(self._is_recorded()):
            return jacobian_rows(self._core.engine, self._args, axis)

    def _block(self, rows: StateAxis, columns: StateAxis) -> Tensor:
        """Return the dense block ``(*batch, r, c)`` between parts of two axes, by the engine."""
        self._check_fresh()
        part = self._rebuild(self._core.with_axes(rows, columns))
        with torch.set_grad_enabled(self._is_recorded()):
            return part._dense_values(self._args)

    # parts of the samples

    def sample_parts(self, size: int, first: int = 0) -> Iterator[tuple[slice, NTKOperator]]:
        """Yield the kernels within consecutive samples, in memory; a re-iterable is read once.

        Args:
            size: Samples of a part, at most.
            first: Number of samples, a whole number of parts, that are left out.

        Yields:
            The samples of a part, and their symmetric kernel over all rows of these samples.
        """
        rows = self._rows
        for start, stop, part in sample_slices(rows.inputs, size, first):
            if part is rows.inputs:
                yield slice(start, stop), self
            else:
                yield slice(start, stop), self._within(part)

    def sample_reader(self) -> Callable[..., NTKOperator]:
        """Return what gives the symmetric kernel over the samples of some slices, to be asked for in order.

        Each place among the slices has its own pass over a re-iterable, which lasts as long as what is asked
        for there follows what was asked for last.
        """
        inputs = self._rows.inputs
        readers = [inputs.in_order(), inputs.in_order()]  # a pair of parts is the most that is asked for
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
        right = AxisReader(self._columns)
        left = right if self.symmetric else AxisReader(self._rows)
        with SharedPasses(self._rows.inputs.num_samples) as passes:
            for rows in tile_slices(self.shape[-2], size):
                one = left.take(rows)
                for columns in tile_slices(self.shape[-1], size):
                    if self.symmetric and columns.start < rows.start:
                        continue
                    other = one if self.symmetric and columns == rows else right.take(columns)
                    with passes.over(one.inputs.num_samples):
                        block = self.part_blocks(one, other, owners, count)
                    yield Tile(rows, columns, block)

    def _within(self, part: Inputs) -> NTKOperator:
        """Return the symmetric kernel of these outputs of some samples."""
        axis = StateAxis(part, self._rows.outputs)
        return self._rebuild(self._core.with_axes(axis, axis))

    def diagonal_step(self) -> int:
        """Return the samples of the parts in which a diagonal is made: several tiles of gradients."""
        tile = self._core.engine.tile_samples(self._rows.num_distinct)
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
        # Rows that are picked are not parts of samples in order, and of a stored block nothing is made.
        if not self.symmetric or rows.pick is not None or self._stored_dense() is not None:
            if first < self.shape[-1]:
                yield slice(0, self.shape[-1]), self._diagonal()
            return
        count = rows.inputs.num_samples
        even = rows.inputs.lengths is None
        # Coupled samples are one part, of all rows: `StateAxis.offsets` counts their nodes.
        offsets = torch.arange(count + 1) * rows.outputs.shape[-1] if even else rows.offsets
        with SharedPasses(count) as passes:
            for part, kernel in self.sample_parts(size, int(torch.searchsorted(offsets, first))):
                with passes.over(part.stop - part.start):
                    found = kernel.diagonal()
                yield slice(int(offsets[part.start]), int(offsets[part.stop])), found

    # algebra

    def _sum_batch(self, dim: int) -> LinearOperator:
        # Σ_b Σ_r J_br J_brᵀ is one sum of B·R terms: nothing is added up before a product needs it.
        def merge(numbers: Tensor) -> Tensor:  # (*batch, R, r): the batch axis joins the terms
            return numbers.movedim(dim, -3).flatten(-3, -2)

        return self._map_batch(merge)


def _picked(dense: Tensor, rows: StateAxis, columns: StateAxis) -> Tensor:
    """Return the rows and columns of ``(..., N₁·r₁, N₂·r₂)`` that two axes have of their samples'."""
    if rows.index is not None:
        dense = dense[..., rows.index.to(dense.device), :]
    if columns.index is not None:
        dense = dense[..., columns.index.to(dense.device)]
    return dense


JacobianOperator.kernel_class = NTKOperator  # what J @ J'.mT is
