"""Networks, and data that take no memory: made slice by slice from a seed whenever they are read."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["CLASSES", "Images", "Vectors", "network", "samples"]

CLASSES = 10
_BLOCK = 250  # rows that are drawn together, whoever asks for one of them


class _Synthetic:
    """Rows of a data set that is never stored.

    Args:
        stop: Number of the row after the last.
        start: Number of the first row: a rank's share begins where the one before ends.
    """

    shape: tuple[int, ...] = ()

    def __init__(self, stop: int, start: int = 0) -> None:
        self._start, self._stop = start, stop

    def __len__(self) -> int:
        return self._stop - self._start

    def __getitem__(self, rows: slice) -> Tensor:
        first, last, _ = rows.indices(len(self))
        first, last = first + self._start, last + self._start
        parts = []
        for number in range(first // _BLOCK, -(-last // _BLOCK)):
            block = self._block(torch.Generator().manual_seed(1 + number))
            parts.append(block[max(first - number * _BLOCK, 0) : last - number * _BLOCK])
        return torch.cat(parts)

    def _block(self, generator: torch.Generator) -> Tensor:
        return torch.randn(_BLOCK, *self.shape, generator=generator)


class Images(_Synthetic):
    """Images 3 x 32 x 32 of random pixels in [-1, 1)."""

    shape = (3, 32, 32)

    def _block(self, generator: torch.Generator) -> Tensor:
        pixels = torch.randint(0, 256, (_BLOCK, *self.shape), generator=generator, dtype=torch.uint8)
        return pixels.float().div_(128).sub_(1)


class Vectors(_Synthetic):
    """Vectors of 64 normal numbers."""

    shape = (64,)


def network(name: str) -> nn.Sequential:
    """Return the CNN or the MLP, with ten outputs, always the same one."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        if name == "mlp":
            widths = (64, 256, 256, 256)
            pairs = zip(widths, widths[1:], strict=False)
            hidden = [part for a, b in pairs for part in (nn.Linear(a, b), nn.Tanh())]
            return nn.Sequential(*hidden, nn.Linear(256, CLASSES)).eval()
        layers: list[nn.Module] = []
        for before, after in ((3, 8), (8, 16), (16, 16)):
            layers += [nn.Conv2d(before, after, 3, stride=2, padding=1), nn.ReLU()]
        return nn.Sequential(*layers, nn.Flatten(), nn.Linear(256, CLASSES)).eval()


def samples(name: str, stop: int, start: int = 0) -> Any:
    """Return the data set of a network."""
    return Vectors(stop, start) if name == "mlp" else Images(stop, start)
