"""A dense kernel that answers as an engine of ours does: by Gram matrices of per-sample gradients."""

from __future__ import annotations

import torch
from torch import Tensor

from ntkops.engines.passes import report_passes
from ntkops.operators.structure import Tile, tile_slices
from ntkops.vectors import Space
from tests.estimators.problems import OnlyProducts


class SampledDense(OnlyProducts):
    """K over N samples with O outputs each, sample-major, and every pass over all of its samples counted."""

    def __init__(self, matrix: Tensor, samples: int) -> None:
        super().__init__(matrix)
        self.samples, self.outputs = samples, matrix.shape[-1] // samples
        self.exact_cost = float(self.outputs)

    @property
    def structure(self) -> SampledStructure:
        return SampledStructure(self)

    def _matmul(self, rhs: Tensor) -> Tensor:
        report_passes(vjp=rhs.shape[-1], jvp=rhs.shape[-1])
        return self.matrix @ rhs

    def within(self, *parts: slice) -> SampledDense:
        width = self.outputs
        rows = torch.cat([torch.arange(part.start * width, part.stop * width) for part in parts])
        return SampledDense(self.matrix[rows][:, rows], len(rows) // width)


class SampledStructure:
    symmetric = True

    def __init__(self, operator: SampledDense) -> None:
        self.operator = operator
        self.shape, self.dtype, self.device = operator.shape, operator.dtype, operator.device
        self.sample_shape = operator.samples, operator.outputs

    @property
    def space(self) -> Space:
        return Space(self.shape[-1], self.dtype, self.device)

    def factors(self):
        return None

    def sample_gram(self, probes: Tensor) -> Tensor:
        operator = self.operator
        count, outputs = self.sample_shape
        assert probes.shape[::2] == (count, outputs)
        report_passes(per_sample=probes.shape[1])
        blocks = operator.matrix.view(count, outputs, count, outputs)
        half = torch.einsum("nro,nomp->nrmp", probes, blocks)
        return torch.einsum("nrmp,msp->nrms", half, probes)

    def sample_parts(self, size: int):
        for part in tile_slices(self.sample_shape[0], size):
            yield part, self.operator.within(part)

    def sample_reader(self):
        return self.operator.within

    def diagonal(self) -> Tensor:
        report_passes(per_sample=self.operator.outputs)
        return self.operator.matrix.diagonal()

    def tile_size(self) -> int:
        return 16

    def tiles(self, size=None):
        size = size or 16
        report_passes(per_sample=self.operator.outputs)
        for rows in tile_slices(self.shape[-2], size):
            for cols in tile_slices(self.shape[-1], size):
                if cols.start >= rows.start:
                    yield Tile(rows, cols, self.operator.matrix[rows, cols])

    def exact_cost(self, quantity: str) -> float:
        return self.operator.exact_cost
