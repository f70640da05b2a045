"""Kernels of single samples, Jₙ Jₙᵀ, one by one or summed over the samples."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from .algebra import KernelAlgebra
from .axes import StateAxis
from .base import EngineOperator
from .capabilities import Capabilities, Tile, tile_corners, tile_slices

__all__ = ["SampleKernelOperator"]


class SampleKernelOperator(KernelAlgebra, EngineOperator, Capabilities):
    r"""The kernels :math:`J_n J_n^\top` of single samples, ``(N, r, r)``, or their sum, ``(r, r)``.

    `ntkops.ntk` makes one for ``outputs={"samples": "each"}`` or ``{"samples": "trace"}``. No pair of two
    samples is ever made: a block costs one per-sample pass for each of its outputs. Sums, multiples, slices
    and ``K.add_jitter(ridge)`` stay lazy.

    Example:
        >>> import torch, ntkops
        >>> K = ntkops.ntk(torch.nn.Linear(3, 2), torch.randn(5, 3), outputs={"samples": "trace"})
        >>> type(K).__name__, K.shape
        ('SampleKernelOperator', torch.Size([2, 2]))
    """

    @property
    def num_samples(self) -> int:
        """Number N of samples."""
        return self._state_axes()[0].num_samples

    @property
    def symmetric(self) -> bool:  # type: ignore[override]
        """Whether rows and columns are the same, so that every block equals its transpose."""
        return self._core.symmetric

    def _dense_cost(self) -> float:
        return float(self._num_distinct())

    def _dense_values(self, params: Sequence[Tensor]) -> Tensor:
        rows, columns = (_terms(axis) for axis in self._state_axes())
        return self._sums(params, rows, columns).reshape(self.shape)

    def _diagonal(self) -> Tensor:
        stored = self._stored_dense()
        if not self._core.symmetric or stored is not None and not self._is_recorded():
            return self.to_dense().diagonal(dim1=-2, dim2=-1)
        self._check_fresh()
        with torch.set_grad_enabled(self._is_recorded()):
            rows = _terms(self._state_axes()[0])
            each = rows.mT.flatten(0, 1).unsqueeze(-1)  # (M r, R, 1): a kernel of its own for every row
            return self._sums(self._args, each, each).reshape(self.shape[:-1])

    # tiles; a factor would hold a row of J for each sample: there is none

    def tile_size(self) -> int:
        """Return the rows of a tile for which the workspace suffices."""
        # A square tile of all members, and as much again three times for what an engine makes it of.
        entry = self.shape[:-2].numel() * self.dtype.itemsize
        fit = math.isqrt(self._core.engine.workspace_bytes() // max(1, 4 * entry))
        return max(1, min(fit, max(self.shape[-2:])))

    def tiles(self, size: int | None = None) -> Iterator[Tile]:
        """Yield dense tiles in row-major order; for a symmetric kernel those on and above the diagonal."""
        stored = self._stored_dense()
        for rows, columns in tile_corners(self.shape, size or self.tile_size(), upper=self.symmetric):
            block = self.recorded_tile(rows, columns) if stored is None else stored[..., rows, columns]
            yield Tile(rows, columns, block)

    def exact_cost(self, quantity: str) -> float:
        """Return the passes that the exact "diagonal" or all "tiles" take."""
        if self._stored_dense() is not None:
            return 0.0
        count = math.ceil(max(self.shape[-2:]) / self.tile_size())
        return self._dense_cost() * (1 if quantity == "diagonal" else count)

    def _sums(self, params: Sequence[Tensor], rows: Tensor, columns: Tensor) -> Tensor:
        """Return ``(M, r₁, r₂)`` kernels of terms ``(M, R, r₁)`` and ``(M, R, r₂)``."""
        inputs = self._state_axes()[0].inputs
        width = inputs.num_outputs
        # Samples are folded into the numbers, sample · O + output, and a term has rows of one sample alone:
        # its first row says of which.
        needed, samples = torch.unique(rows[..., 0] // width, return_inverse=True)  # (M, R)
        if len(needed) < inputs.num_samples:
            inputs = inputs.select(needed)
        kernels = torch.arange(len(rows)).repeat_interleave(rows.shape[1])  # (M·R,): where a term is added
        left, right = (numbers.flatten(0, 1) % width for numbers in (rows, columns))
        engine = self._core.engine
        return engine.own_kernels(tuple(params), inputs, (kernels, samples.flatten()), left, right).to(
            self.dtype
        )

    def _lazy_product(self, params: Sequence[Tensor], rhs: Tensor) -> Tensor:
        # By tiles: a product by differentiation would take two passes over all samples for each of them.
        whole, found = self._rebuild(self._core, params), []
        size = self.tile_size()
        for rows in tile_slices(self.shape[-2], size):
            parts = []
            for columns in tile_slices(self.shape[-1], size):
                tile = whole.submatrix(rows, columns)
                parts.append(tile._dense_values(tile._args) @ rhs[..., columns, :])
            found.append(torch.stack(parts).sum(0))
        return torch.cat(found, dim=-2)


def _terms(axis: StateAxis) -> Tensor:
    """Return the numbers ``(M, R, n)`` of the rows, in their order."""
    return axis.flat_outputs if axis.pick is None else axis.flat_outputs[..., axis.pick]
