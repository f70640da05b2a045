"""What a projected kernel can do beyond products."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..model.context import full_precision
from ..vectors import Space
from .axes import StateAxis
from .structure import Tile, tile_slices

if TYPE_CHECKING:
    from .projected import FeatureOperator, ProjectedNTKOperator

__all__ = ["ProjectedStructure"]


class ProjectedStructure:
    """The structure protocol for a `ProjectedNTKOperator`.

    Args:
        kernel: The kernel.
    """

    def __init__(self, kernel: ProjectedNTKOperator) -> None:
        self._kernel = kernel
        self.shape: torch.Size = kernel.shape
        self.dtype: torch.dtype = kernel.dtype
        self.device: torch.device = kernel.device
        self.symmetric: bool = kernel._core.symmetric

    @property
    def space(self) -> Space:
        """The space of the kernel's rows."""
        return self._kernel.space

    def factors(self) -> tuple[FeatureOperator, FeatureOperator]:
        """Return the features of rows and columns: K = left @ right.mT."""
        return self._kernel.left, self._kernel.right

    def sample_gram(self, probes: Tensor) -> None:
        """Return None: the Gram matrix of per-sample gradients is that of the kernel itself."""
        return None

    def _sides(self) -> tuple[StateAxis, StateAxis]:
        return self._kernel._rows, self._kernel._columns

    def exact_cost(self, quantity: str) -> float:
        """Return the passes that the exact "diagonal" or all "tiles" take."""
        rows, columns = self._sides()
        kernel = self._kernel
        if quantity == "diagonal":
            return kernel._passes_of_features(rows)
        left, right = kernel._passes_of_features(rows), kernel._passes_of_features(columns)
        if all(kernel._may_hold(axis) for axis in (rows, columns)):
            return left if self.symmetric else left + right
        slabs = math.ceil(self.shape[-2] / self.tile_size())
        return left * (slabs + 1) / 2 if self.symmetric else left + slabs * right

    def tile_size(self) -> int:
        """Return the rows of a tile: as many features as the workspace holds."""
        rows, _ = self._sides()
        width = rows.batch_shape.numel() * max(rows.terms * self._kernel.projection.k, 1)
        fit = self._kernel._core.engine.workspace_bytes() // (width * self.dtype.itemsize)
        return max(1, min(fit, max(self.shape[-2:])))

    def diagonal(self) -> Tensor:
        """Return the exact diagonal ``(*batch, n)``: squared lengths of features, slab by slab."""
        kernel, (rows, columns) = self._kernel, self._sides()
        parts = []
        for part in tile_slices(self.shape[-2], self.tile_size()):
            left = self._slab(rows, part)
            right = left if self.symmetric else self._slab(columns, part)
            parts.append((left.double() * right.double()).sum(-1).to(kernel.dtype))
        return torch.cat(parts, dim=-1)

    def tiles(self, size: int | None = None) -> Iterator[Tile]:
        """Yield dense tiles in row-major order; for a symmetric kernel those on and above the diagonal.

        Args:
            size: Rows and columns of a tile; None for as many as the workspace holds.

        Yields:
            Tiles with blocks ``(*batch, r, c)``. Memory: two slabs of features.
        """
        rows, columns = self._sides()
        size = size or self.tile_size()
        for height in tile_slices(self.shape[-2], size):
            left = self._slab(rows, height)
            for width in tile_slices(self.shape[-1], size):
                if self.symmetric and width.start < height.start:
                    continue
                right = left if self.symmetric and width == height else self._slab(columns, width)
                with full_precision(self.device):  # autocast takes no digits
                    block = left @ right.mT
                yield Tile(height, width, block)

    def _slab(self, axis: StateAxis, part: slice) -> Tensor:
        """Return features of some rows of an axis, a slice of all where these may be kept."""
        kernel = self._kernel
        kernel._check_fresh()
        with full_precision(self.device), torch.set_grad_enabled(kernel._is_recorded()):
            if kernel._may_hold(axis):
                return kernel._make_features(axis)[..., part, :]
            return kernel._make_features(axis.take(part))
