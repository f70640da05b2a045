"""Systems with prescribed spectra, and products that are counted and cannot be looked into."""

from __future__ import annotations

import torch
from torch import Tensor

from ntkops.vectors import Space


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def with_spectrum(values: Tensor, seed: int = 0) -> Tensor:
    n = len(values)
    turn = torch.linalg.qr(torch.randn(n, n, generator=generator(seed), dtype=torch.float64))[0]
    dense = (turn * values.double()) @ turn.mT
    return (dense + dense.mT) / 2


def decaying(n: int, low: float = -4.0, seed: int = 0) -> Tensor:
    return with_spectrum(torch.logspace(0, low, n, dtype=torch.float64), seed)


def block(n: int, k: int, seed: int = 1, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(n, k, generator=generator(seed), dtype=torch.float64).to(dtype)


def relative_residuals(matrix: Tensor, x: Tensor, b: Tensor) -> Tensor:
    matrix, x, b = matrix.double(), x.double(), b.double()
    return torch.linalg.vector_norm(b - matrix @ x, dim=-2) / torch.linalg.vector_norm(b, dim=-2)


class Counted:
    """The product with a matrix, counting its columns."""

    def __init__(self, matrix: Tensor) -> None:
        self.matrix, self.widths = matrix, []

    @property
    def columns(self) -> int:
        return sum(self.widths)

    def __call__(self, vectors: Tensor) -> Tensor:
        self.widths.append(vectors.shape[:-2].numel() * vectors.shape[-1])
        return self.matrix @ vectors


class OddSpace(Space):
    """A space whose inner products are not the plain ones: half of the entries live elsewhere.

    Vectors are the upper halves of symmetric ones (v, v), so that every sum counts twice.
    """

    def inner(self, left: Tensor, right: Tensor) -> Tensor:
        return 2 * super().inner(left, right)

    def sum_squares(self, vectors: Tensor) -> Tensor:
        return 2 * super().sum_squares(vectors)
