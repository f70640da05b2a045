"""Networks and data that are cut into shares."""

from __future__ import annotations

import torch
from torch import Tensor, nn

SAMPLES = 23
# Uneven shares, and empty ones.
CUTS = {1: (0, 23), 2: (0, 9, 23), 3: (0, 9, 9, 23), 4: (0, 4, 4, 17, 23)}


def network(dtype: torch.dtype = torch.float64, seed: int = 0) -> nn.Module:
    """Return a small network with three outputs."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(5, 16), nn.Tanh(), nn.Linear(16, 3)).to(dtype)


def samples(dtype: torch.dtype = torch.float64, count: int = SAMPLES, seed: int = 1) -> Tensor:
    """Return the samples of all ranks."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 5, generator=generator, dtype=torch.float64).to(dtype)


def share(rank: int, count: int) -> slice:
    """Return the samples of a rank."""
    cuts = CUTS[count]
    return slice(cuts[rank], cuts[rank + 1])


def rows(rank: int, count: int, width: int = 3) -> slice:
    """Return the rows of a rank."""
    part = share(rank, count)
    return slice(part.start * width, part.stop * width)


def generator(seed: int = 3) -> torch.Generator:
    """Return a seeded generator."""
    return torch.Generator().manual_seed(seed)


def block(columns: int = 4, size: int = 3 * SAMPLES, dtype: torch.dtype = torch.float64) -> Tensor:
    """Return columns of all ranks."""
    return torch.randn(size, columns, generator=generator(2), dtype=torch.float64).to(dtype)
