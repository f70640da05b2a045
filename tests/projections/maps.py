"""One map of every kind, over the same parameters."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ntkops.projections import (
    SJLT,
    SRHT,
    CountSketch,
    Gaussian,
    Haar,
    LayerKronecker,
    Projection,
    Rademacher,
    RowSample,
    compose,
)

SHAPES = ((7, 5, 2), (7,), (4, 7), (), (31,))
DIM = 70 + 7 + 28 + 1 + 31
K = 12

MAPS: dict[str, Callable[[int], Projection]] = {
    "CountSketch": lambda seed: CountSketch(DIM, K, seed),
    "SJLT": lambda seed: SJLT(DIM, K, seed, nonzeros=3),
    "RowSample": lambda seed: RowSample(DIM, K, seed),
    "Rademacher": lambda seed: Rademacher(DIM, K, seed),
    "Gaussian": lambda seed: Gaussian(DIM, K, seed),
    "Haar": lambda seed: Haar(DIM, K, seed),
    "SRHT": lambda seed: SRHT(DIM, K, seed),
    "LayerKronecker": lambda seed: LayerKronecker(SHAPES, 4, 3, seed),
    "compose": lambda seed: compose(Gaussian(40, K, seed + 1), SJLT(DIM, 40, seed)),
}
SPARSE = ("CountSketch", "SJLT", "RowSample")


def vectors(rows: int, dim: int = DIM, dtype: torch.dtype = torch.float64, seed: int = 5) -> Tensor:
    """Return seeded rows."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, dim, generator=generator, dtype=torch.float64).to(dtype)


def dense(projection: Projection, dtype: torch.dtype = torch.float64) -> Tensor:
    """Return the ``(k, dim)`` matrix, column by column."""
    return projection.apply(torch.eye(projection.dim, dtype=dtype)).mT
