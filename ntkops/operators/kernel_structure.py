"""What a kernel can do beyond products: its diagonal, its tiles, its factors, their cost."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..engines import LayerwiseEngine
from ..vectors import Space
from .axes import StateAxis
from .jacobian import JacobianOperator, jacobian_rows
from .structure import Tile, tile_slices

if TYPE_CHECKING:
    from .kernel import NTKOperator

__all__ = ["KernelStructure"]


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
        return self._kernel.diagonal()

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
        whole = self.symmetric and rows.pick is None and rows._is_whole()
        return (rows.inputs.num_samples, rows.inputs.num_outputs) if whole else None

    def output_traced(self, outputs: Tensor) -> NTKOperator | None:
        """Return the lazy kernel summed over some of the outputs, or None for uneven rows or a cross kernel.

        Args:
            outputs: ``(R, r)`` positions among the outputs of a sample: row s of the kernel's outputs is
                paired with row s, and the R kernels over r outputs are added.
        """
        rows = self._rows
        if not self.symmetric or rows.pick is not None:
            return None
        numbers = rows.outputs[..., outputs]  # (*batch, R', R, r)
        axis = StateAxis(rows.inputs, numbers.flatten(-3, -2))
        return self._kernel._rebuild(self._kernel._core.with_axes(axis, axis))

    def exact_cost(self, quantity: str) -> float:
        """Return the passes that the exact "diagonal" or all "tiles" take, products of tiles included."""
        if self._kernel._stored_dense() is not None:
            return 0.0
        rows = self._rows
        outputs = len(rows.distinct_outputs)
        engine = self._kernel._core.engine
        if quantity == "diagonal":
            if isinstance(engine, LayerwiseEngine):
                return engine.diagonal_passes(rows.inputs, outputs)
            return float(outputs)
        if self._over_time:
            return self._kernel._block_cost()
        size = self.tile_size()
        count, others = (math.ceil(length / size) for length in self.shape[-2:])
        slabs = outputs * ((count + 1) / 2 if self.symmetric else 1 + others)
        return max(0.0, slabs - outputs) + self._kernel._block_cost()

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

    def tile_size(self) -> int:
        """Return the rows of a tile for which the workspace suffices."""
        workspace = self._kernel._core.engine.workspace_bytes()
        if self._by_layers:  # the tiles themselves are what takes the memory
            fit = max(1, math.isqrt(workspace // (4 * self.dtype.itemsize * self._rows.batch_shape.numel())))
        else:
            fit = max(1, workspace // self._row_bytes())
        width = self._rows.outputs.shape[-1]
        fit = fit // width * width if fit >= width else fit  # whole samples, where they fit
        if self._over_time and width**2 * self.dtype.itemsize <= workspace:
            fit = max(fit, width)  # parts of a sample cost as much as all of it
        return max(1, min(fit, max(self.shape[-2:])))

    def tiles(self, size: int | None = None) -> Iterator[Tile]:
        """Yield dense tiles in row-major order; for a symmetric kernel those on and above the diagonal.

        Args:
            size: Rows and columns of a tile; None for as many as the workspace holds.

        Yields:
            Tiles with blocks ``(*batch, r, c)``. Memory: two slabs of per-sample gradients.
        """
        kernel = self._kernel
        stored = kernel._stored_dense()
        size = size or self.tile_size()
        fits = not self._by_layers
        fits = fits and size * self._row_bytes() <= 2 * kernel._core.engine.workspace_bytes()
        for rows in tile_slices(self.shape[-2], size):
            left = None
            for columns in tile_slices(self.shape[-1], size):
                if self.symmetric and columns.start < rows.start:
                    continue
                if stored is not None:
                    yield Tile(rows, columns, stored[..., rows, columns])
                elif not fits:
                    yield Tile(rows, columns, self._block(rows, columns))
                else:
                    left = self._slab(kernel._rows, rows) if left is None else left
                    same = self.symmetric and rows == columns
                    right = left if same else self._slab(kernel._columns, columns)
                    yield Tile(rows, columns, left @ right.mT)

    def _slab(self, axis: StateAxis, rows: slice) -> Tensor:
        """Return the dense Jacobian rows ``(*batch, r, R·P)`` of a slice of an axis."""
        kernel = self._kernel
        kernel._check_fresh()
        with torch.set_grad_enabled(kernel._is_recorded()):
            return jacobian_rows(kernel._core.engine, kernel._args, axis.take(rows))

    def _block(self, rows: slice, columns: slice) -> Tensor:
        kernel = self._kernel
        part = kernel.submatrix(rows, columns)
        part._check_fresh()
        with torch.set_grad_enabled(kernel._is_recorded()):
            return part._dense_values(kernel._args)
