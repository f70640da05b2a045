"""Subsampled randomised Hadamard transforms, block by block."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator

import torch
from torch import Tensor

from .base import Projection
from .counter import signs, stream_key, words

__all__ = ["SRHT"]

_LENGTH = 4096  # entries of a block, where there are as many
_ENTRIES = 2**20  # entries that are transformed at once


@functools.lru_cache(maxsize=16)
def _hadamard(size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return the orthonormal Hadamard matrix of a power of two."""
    matrix = torch.ones((1, 1), dtype=dtype, device=device)
    while len(matrix) < size:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return matrix / math.sqrt(size)


def _transform(block: Tensor) -> Tensor:
    """Return the orthonormal Walsh-Hadamard transform of ``(..., 2**m)`` as two small products."""
    power = block.shape[-1].bit_length() - 1
    left = _hadamard(2 ** (power // 2), block.dtype, block.device)
    right = _hadamard(2 ** (power - power // 2), block.dtype, block.device)
    # H_ab = H_a ⊗ H_b, and (H_a ⊗ H_b) vec X = vec (H_a X H_b) for symmetric H: two matrix products of 2 √L
    # multiplications an entry, where butterflies take log₂ L passes over memory.
    square = block.reshape(-1, len(left), len(right))
    return (left @ square @ right).reshape(block.shape)


class SRHT(Projection):
    r"""A subsampled randomised Hadamard transform of each block of 4096 parameters, summed over blocks.

    .. math:: P x = \sqrt{L / k} \sum_b S_b H D_b x_b

    with random signs D, the orthonormal Hadamard matrix H of size L, and k of L rows S drawn without
    replacement for each block. The transform spreads the entries of a block out, so that errors on
    sparse vectors are as small as on others.

    Args:
        dim: Number of parameters' entries.
        k: Number of entries of the image.
        seed: Integer that fixes the map; None draws one.
        generator: CPU generator from which the seed is drawn.

    Cost: :math:`4 \sqrt L` operations an entry, L = 4096 or the powers of two that hold ``dim`` or k; a
    chunk that ends within a block transforms all of it. Memory: some blocks of 2²⁰ entries.

    Source: Ailon and Chazelle (2009); Tropp, Improved analysis of the subsampled randomized Hadamard
    transform (2011).

    Example:
        >>> import torch
        >>> from ntkops.projections import SRHT
        >>> SRHT(dim=1000, k=64, seed=0).apply(torch.ones(3, 1000)).shape
        torch.Size([3, 64])
    """

    @property
    def length(self) -> int:
        """Number L of entries of a block."""
        fitting = 1 << (self.dim - 1).bit_length()
        return max(min(_LENGTH, fitting), 1 << (self.k - 1).bit_length())

    def _key(self, purpose: str) -> int:
        return stream_key(self.seed, type(self).__name__, self.dim, self.k, purpose)

    def _groups(self, rows: int, start: int, stop: int) -> Iterator[tuple[int, int, int, int]]:
        """Yield ranges of blocks, and the part of ``start`` to ``stop`` that lies in them."""
        length = self.length
        step = max(1, _ENTRIES // (max(rows, 1) * length))
        for first in range(start // length, -(-stop // length), step):
            last = min(first + step, -(-stop // length))
            yield first, last, max(start, first * length), min(stop, last * length)

    def _chosen(self, first: int, last: int, device: torch.device) -> Tensor:
        """Return ``(last - first, k)`` different rows of H for each block."""
        length = self.length
        # the order of L random words is a uniform permutation: its first k are k rows without replacement
        order = words(self._key("row"), first * length, last * length, device).view(-1, length)
        return order.argsort(dim=1)[:, : self.k]

    def _add(self, state: Tensor, block: Tensor, offset: int) -> None:
        length, rows = self.length, len(block)
        for first, last, low, high in self._groups(rows, offset, offset + block.shape[1]):
            wide = block.new_zeros((rows, (last - first) * length))
            flips = signs(self._key("sign"), low, high, block.dtype, block.device)
            inside = slice(low - first * length, high - first * length)
            torch.mul(block[:, low - offset : high - offset], flips, out=wide[:, inside])
            spread = _transform(wide.view(rows, -1, length))
            chosen = self._chosen(first, last, block.device).expand(rows, -1, -1)
            state += spread.gather(2, chosen).sum(1)

    def _read(self, state: Tensor) -> Tensor:
        return state * math.sqrt(self.length / self.k)

    def _pull(self, block: Tensor, start: int, stop: int) -> Tensor:
        length, rows = self.length, len(block)
        scaled = block * math.sqrt(length / self.k)
        result = block.new_empty((rows, stop - start))
        for first, last, low, high in self._groups(rows, start, stop):
            chosen = self._chosen(first, last, block.device).expand(rows, -1, -1)
            wide = block.new_zeros((rows, last - first, length))
            wide.scatter_(2, chosen, scaled.unsqueeze(1).expand(-1, last - first, -1))
            spread = _transform(wide).flatten(1)[:, low - first * length : high - first * length]
            flips = signs(self._key("sign"), low, high, block.dtype, block.device)
            torch.mul(spread, flips, out=result[:, low - start : high - start])
        return result
