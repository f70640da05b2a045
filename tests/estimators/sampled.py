"""A dense kernel that answers as an engine of ours does: by Gram matrices of per-sample gradients."""

from __future__ import annotations

import torch
from torch import Tensor

from ntkops.engines.passes import report_passes
from ntkops.operators.capabilities import Capabilities, Tile, tile_slices
from tests.estimators.problems import OnlyProducts


class SampledDense(OnlyProducts, Capabilities):
    """K over N samples with O outputs each, sample-major, and every pass over all of its samples counted."""

    symmetric = of_samples = True

    def __init__(self, matrix: Tensor, samples: int) -> None:
        super().__init__(matrix)
        self.samples, self.outputs = samples, matrix.shape[-1] // samples
        self.cost_of_all = float(self.outputs)
        self.sample_shape = samples, self.outputs

    def _matmul(self, rhs: Tensor) -> Tensor:
        report_passes(vjp=rhs.shape[-1], jvp=rhs.shape[-1])
        return self.matrix @ rhs

    def within(self, *parts: slice) -> SampledDense:
        width = self.outputs
        rows = torch.cat([torch.arange(part.start * width, part.stop * width) for part in parts])
        return SampledDense(self.matrix[rows][:, rows], len(rows) // width)

    def sample_gram(self, probes: Tensor) -> Tensor:
        count, outputs = self.sample_shape
        assert probes.shape[::2] == (count, outputs)
        report_passes(per_sample=probes.shape[1])
        blocks = self.matrix.view(count, outputs, count, outputs)
        half = torch.einsum("nro,nomp->nrmp", probes, blocks)
        return torch.einsum("nrmp,msp->nrms", half, probes)

    def sample_parts(self, size: int):
        for part in tile_slices(self.sample_shape[0], size):
            yield part, self.within(part)

    def sample_reader(self):
        return self.within

    def _diagonal(self) -> Tensor:
        report_passes(per_sample=self.outputs)
        return self.matrix.diagonal()

    def tile_size(self) -> int:
        return 16

    def tiles(self, size=None):
        size = size or 16
        report_passes(per_sample=self.outputs)
        for rows in tile_slices(self.shape[-2], size):
            for cols in tile_slices(self.shape[-1], size):
                if cols.start >= rows.start:
                    yield Tile(rows, cols, self.matrix[rows, cols])

    def exact_cost(self, quantity: str) -> float:
        return self.cost_of_all
