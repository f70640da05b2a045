"""Sources of batches that count how often they are read, and the models that read them."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Counted:
    """A re-iterable of batches that counts passes begun and samples given; the batches may be uneven."""

    def __init__(self, x: Tensor, sizes: list[int]) -> None:
        assert sum(sizes) == len(x)
        self.x, self.sizes = x, sizes
        self.clear()

    def clear(self) -> None:
        self.passes, self.samples = 0, 0

    def __iter__(self):
        self.passes += 1
        for part in self.x.split(self.sizes):
            self.samples += len(part)
            yield part


class Reused:
    """A source that writes every batch over the one before."""

    def __init__(self, x: Tensor, size: int) -> None:
        self.x, self.size = x, size

    def __iter__(self):
        buffer = torch.empty_like(self.x[: self.size])
        for part in self.x.split(self.size):
            buffer[: len(part)] = part
            yield buffer[: len(part)]


class Sliced:
    """An array that is read by slices alone, and remembers which."""

    def __init__(self, array) -> None:
        self.array, self.read = array, []
        self.shape, self.dtype = array.shape, array.dtype

    def __len__(self) -> int:
        return len(self.array)

    def __getitem__(self, rows):
        assert isinstance(rows, slice)
        self.read.append((rows.start, rows.stop))
        return self.array[rows]


def samples(count: int, *shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    return torch.randn(count, *shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def uneven(count: int, largest: int = 7) -> list[int]:
    """Return sizes of batches that no tile divides."""
    sizes: list[int] = []
    while sum(sizes) < count:
        sizes.append(min(1 + (3 * len(sizes)) % largest, count - sum(sizes)))
    return sizes


class Mixed(nn.Module):
    """One parameter that no rule covers among layers that are covered."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(3, 4), nn.Linear(4, 2)
        self.scale = nn.Parameter(torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.first(x)) * self.scale.cumsum(0))


def _mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3))


def _narrow() -> nn.Module:
    """A head that is wider than what it reads."""
    return nn.Sequential(nn.Linear(3, 2), nn.Tanh(), nn.Linear(2, 5))


def _convolution() -> nn.Module:
    return nn.Sequential(nn.Conv1d(2, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(12, 2))


MODELS = {
    "mlp": (_mlp, (3,)),
    "narrow": (_narrow, (3,)),
    "conv": (_convolution, (2, 6)),
    "mixed": (Mixed, (3,)),
}


def made(name: str, dtype: torch.dtype = torch.float64) -> tuple[nn.Module, tuple[int, ...]]:
    """Return a small model and the shape of one sample."""
    build, shape = MODELS[name]
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return build().to(dtype), shape
