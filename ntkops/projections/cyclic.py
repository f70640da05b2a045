"""Sparse maps by cyclic shifts: signs flipped, segments of k entries rotated and added up.

The parameters are cut into segments of k. Each segment is turned by a random shift and added to the
image, each entry with a random sign. Two entries of one segment never meet; two entries of different
segments meet with probability 1/k, since their shifts are independent. That is all that the mean and the
variance of a count sketch need, and it reads memory in order.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ..arguments import checked
from ..errors import InputError
from .base import Projection
from .counter import integers, signs, stream_key

__all__ = ["SJLT", "CountSketch"]

_GROUP = 2**16  # entries whose signs are looked up at once: small enough for the cache


class _Cyclic(Projection):
    """A sum of ``copies`` cyclic count sketches whose shifts within a segment differ."""

    copies: int

    def _keys(self, purpose: str) -> list[int]:
        name = type(self).__name__
        return [stream_key(self.seed, name, self.dim, self.k, purpose, i) for i in range(self.copies)]

    def _shifts(self, first: int, last: int, device: torch.device) -> list[list[int]]:
        """Return the shifts of segments first, ..., last - 1, one list for each copy, all different."""
        taken: list[Tensor] = []
        for number, key in enumerate(self._keys("shift")):
            shift = integers(key, first, last, self.k - number, device)
            if taken:  # count only the positions that are left: skip those taken, the lowest first
                for earlier in torch.stack(taken).sort(dim=0).values:
                    shift += shift >= earlier
            taken.append(shift)
        return [shift.tolist() for shift in taken]

    def _pieces(self, block: Tensor, offset: int) -> Iterator[tuple[Tensor, list[Tensor], list[int]]]:
        """Yield parts of segments with their signs and the places where they go, copy by copy.

        A place is the shift plus the position in the segment: the state has 2k entries, so that a rotated
        segment is contiguous in it; the second k are folded onto the first in the end.
        """
        k, device, stop = self.k, block.device, offset + block.shape[-1]
        sign_keys = self._keys("sign")
        step = max(k, _GROUP // k * k)
        low = offset
        while low < stop:
            high = min((low // k) * k + step, stop)
            first, inside = low // k, low % k
            sizes = [min(k - inside, high - low)]
            sizes += [k] * ((high - low - sizes[0]) // k)
            sizes += [rest] if (rest := high - low - sum(sizes)) else []
            shifts = self._shifts(first, first + len(sizes), device)
            flips = [signs(key, low, high, block.dtype, device).split(sizes) for key in sign_keys]
            shifts = [[shift[0] + inside, *shift[1:]] for shift in shifts]
            group = block[:, low - offset : high - offset]
            if group.stride(1) != 1:  # vectors that come as columns
                group = group.contiguous()
            parts = group.split(sizes, dim=1)
            for part, flip, place in zip(
                parts, zip(*flips, strict=True), zip(*shifts, strict=True), strict=True
            ):
                yield part, list(flip), list(place)
            low = high

    def _state_shape(self) -> tuple[int, ...]:
        return (self.copies, 2 * self.k)

    def _add(self, state: Tensor, block: Tensor, offset: int) -> None:
        sums = state.unbind(1)
        for part, flips, places in self._pieces(block, offset):
            width = part.shape[1]
            for total, flip, place in zip(sums, flips, places, strict=True):
                total.narrow(1, place, width).addcmul_(part, flip)

    def _read(self, state: Tensor) -> Tensor:
        # places k to 2 k - 1 are 0 to k - 1 once around
        folded = state[..., : self.k] + state[..., self.k :]
        result = folded[:, 0].clone()
        for copy in folded.unbind(1)[1:]:  # in order: the same bits on every device
            result += copy
        return result if self.copies == 1 else result.div_(math.sqrt(self.copies))

    def _pull(self, block: Tensor, start: int, stop: int) -> Tensor:
        if self.copies > 1:
            block = block / math.sqrt(self.copies)
        twice = torch.cat([block, block], dim=1)  # (rows, 2k): a rotated image is contiguous in it
        result = block.new_zeros((len(block), stop - start))
        for part, flips, places in self._pieces(result, start):
            width = part.shape[1]
            for flip, place in zip(flips, places, strict=True):
                part.addcmul_(twice.narrow(1, place, width), flip)
        return result


class CountSketch(_Cyclic):
    r"""One nonzero a column: each parameter goes, with a random sign, to one of the k sums.

    .. math:: (P x)_b = \sum_{p:\, (p + r_{\lfloor p / k \rfloor}) \bmod k = b} \sigma_p x_p

    with independent signs σ and shifts r. Inner products are unbiased, and
    :math:`\operatorname{Var}\langle Px, Py\rangle \le (|x|^2 |y|^2 + \langle x, y\rangle^2) / k`. The
    bound is one of second moments: a vector with few large entries is projected exactly or badly.

    Args:
        dim: Number of parameters' entries.
        k: Number of entries of the image.
        seed: Integer that fixes the map; None draws one.
        generator: CPU generator from which the seed is drawn.

    Cost: one pass over the vectors' memory, and dim / k short torch operations, so that a k below some
    hundreds is better reached with `compose`; memory: 2k entries a vector, and the signs of a few
    segments. Results have the same bits for any chunks and batches.

    Source: the count sketch of Charikar, Chen and Farach-Colton (2004), with cyclic shifts in the place of
    a hash of each index.

    Example:
        >>> import torch
        >>> from ntkops.projections import CountSketch
        >>> P = CountSketch(dim=1000, k=64, seed=0)
        >>> x = torch.ones(3, 1000)
        >>> P.apply(x).shape, P.adjoint(P.apply(x), 10, 30).shape
        (torch.Size([3, 64]), torch.Size([3, 20]))
    """

    copies = 1


class SJLT(_Cyclic):
    r"""A sparse Johnson-Lindenstrauss map: s nonzeros :math:`\pm 1/\sqrt s` in each column.

    s cyclic count sketches are added whose shifts differ within a segment, so that a column has s nonzeros
    in different rows and length exactly 1. The variance of inner products is that of `CountSketch`; s
    nonzeros make large errors rarer where a vector has few large entries.

    Args:
        dim: Number of parameters' entries.
        k: Number of entries of the image.
        seed: Integer that fixes the map; None draws one.
        nonzeros: Number s of nonzeros in a column, at most k.
        generator: CPU generator from which the seed is drawn.

    Cost: one pass over the vectors' memory, and s dim / k short torch operations. Results have the same
    bits for any chunks and batches.

    Source: Kane and Nelson, Sparser Johnson-Lindenstrauss transforms (2014), with cyclic shifts in the
    place of a hash of each index.

    Raises:
        InputError: If ``nonzeros`` is not between 1 and k.

    Example:
        >>> import torch
        >>> from ntkops.projections import SJLT
        >>> P = SJLT(dim=1000, k=64, seed=0)
        >>> column = P.apply(torch.eye(1000)[17])
        >>> int(column.count_nonzero()), round(float(column.norm()), 6)
        (4, 1.0)
    """

    @checked
    def __init__(
        self,
        dim: int,
        k: int,
        seed: int | None = None,
        *,
        nonzeros: int = 4,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__(dim, k, seed, generator=generator)
        if not isinstance(nonzeros, int) or isinstance(nonzeros, bool) or not 1 <= nonzeros <= k:
            raise InputError(f"nonzeros={nonzeros!r}: pass an integer from 1 to k = {k}")
        self.nonzeros = self.copies = nonzeros

    def _arguments(self) -> dict[str, Any]:
        return {**super()._arguments(), "nonzeros": self.nonzeros}
