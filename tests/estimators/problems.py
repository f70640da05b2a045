"""Matrices with prescribed spectra, factors with given kernels, and operators that only multiply."""

from __future__ import annotations

import torch
from linear_operator.operators import LinearOperator
from torch import Tensor

from ntkops.engines import report_passes
from ntkops.operators.capabilities import Capabilities, Tile, tile_slices

SPECTRA = {
    "power law": lambda n: 1.0 / torch.arange(1, n + 1, dtype=torch.float64) ** 1.5,
    "exponential": lambda n: 0.8 ** torch.arange(n, dtype=torch.float64),
    "step": lambda n: torch.where(torch.arange(n) < n // 8, 1.0, 1e-3).double(),
    "cluster": lambda n: torch.cat([torch.full((3,), 5.0), torch.linspace(0.5, 1.5, n - 3)]).double(),
}


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def repeated(matrix: Tensor, runs: int) -> Tensor:
    """Return a matrix many times as a batch: one estimate of it draws other probes for each member."""
    return matrix.expand(runs, *matrix.shape)


def covering(interval: tuple[Tensor, Tensor], truth: float, slack: float = 1e-12) -> int:
    """Return how many intervals of a batch hold the truth, but for rounding."""
    low, high = interval
    margin = slack * abs(truth)
    return int(((low <= truth + margin) & (truth - margin <= high)).sum())


def rotation(n: int, seed: int = 0) -> Tensor:
    return torch.linalg.qr(torch.randn(n, n, generator=generator(seed), dtype=torch.float64))[0]


def with_spectrum(values: Tensor, seed: int = 0) -> Tensor:
    turn = rotation(len(values), seed)
    dense = turn @ torch.diag(values.double()) @ turn.T
    return (dense + dense.T) / 2


class OnlyProducts(LinearOperator):
    """A matrix that can be multiplied, and counts the columns; it refuses to become dense."""

    def __init__(self, matrix: Tensor, columns: list[int] | None = None) -> None:
        super().__init__(matrix, columns=columns)
        self.matrix, self.columns = matrix, [] if columns is None else columns

    def _size(self) -> torch.Size:
        return self.matrix.shape

    def _matmul(self, rhs: Tensor) -> Tensor:
        self.columns.append(rhs.shape[-1] if rhs.dim() > 1 else 1)
        return self.matrix @ rhs

    def _transpose_nonbatch(self) -> OnlyProducts:
        return OnlyProducts(self.matrix.mT, self.columns)

    def to_dense(self) -> Tensor:
        raise AssertionError("made dense")

    def __getitem__(self, index):
        return OnlyProducts(self.matrix[index], self.columns)


class Factored(OnlyProducts, Capabilities):
    """K = L Rᵀ that offers its factors, and nothing dense."""

    def __init__(self, left: Tensor, right: Tensor | None = None) -> None:
        self.left_matrix, self.right_matrix = left, left if right is None else right
        super().__init__(self.left_matrix @ self.right_matrix.mT)
        self.symmetric = right is None

    def _matmul(self, rhs: Tensor) -> Tensor:
        # As an engine of ours does: it offers a structure, so it reports its own passes.
        report_passes(vjp=rhs.shape[-1], jvp=rhs.shape[-1])
        return super()._matmul(rhs)

    def factors(self):
        left = OnlyProducts(self.left_matrix)
        return left, left if self.symmetric else OnlyProducts(self.right_matrix)

    def _diagonal(self) -> Tensor:
        return self.matrix.diagonal(dim1=-2, dim2=-1)

    def tile_size(self) -> int:
        return 16

    def tiles(self, size=None):
        size = size or 16
        for rows in tile_slices(self.shape[-2], size):
            for cols in tile_slices(self.shape[-1], size):
                if not self.symmetric or cols.start >= rows.start:
                    yield Tile(rows, cols, self.matrix[..., rows, cols])

    def exact_cost(self, quantity: str) -> float:
        return 1e9  # never the cheap way
