"""Random numbers that are looked up, not drawn: number i of a stream is a function of a key and of i.

Word i of a stream is the i-th output of SplitMix64 started at the key (Steele, Lea and Flood, Fast
splittable pseudorandom number generators, OOPSLA 2014). Every operation is an exact one on 64-bit integers
that wrap around, or a correctly rounded one on float64, so that a word, a sign or an integer is the same
on every device, for every chunk and thread. Normal variates go through a logarithm and a cosine in
float32, and are the same up to the rounding of these.
"""

from __future__ import annotations

import functools
import math
import zlib

import torch
from torch import Tensor

__all__ = ["integers", "normal_rows", "sign_rows", "signs", "stream_key", "words"]

_MASK = 2**64 - 1
_GAMMA = 0x9E3779B97F4A7C15
_FIRST, _SECOND = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


def _signed(value: int) -> int:
    """Return the 64-bit two's complement reading of a non-negative integer: torch has no unsigned one."""
    value &= _MASK
    return value - 2**64 if value >= 2**63 else value


def _mix(value: int) -> int:
    value &= _MASK
    value = ((value ^ (value >> 30)) * _FIRST) & _MASK
    value = ((value ^ (value >> 27)) * _SECOND) & _MASK
    return value ^ (value >> 31)


def stream_key(seed: int, *labels: str | int) -> int:
    """Return the key of a stream: other labels give a stream that has nothing to do with this one.

    Args:
        seed: Any integer.
        *labels: What the stream is for, such as the name of a class and its sizes.

    Returns:
        A key in [0, 2**64).
    """
    # Seeds and labels that differ by one bit have keys that differ in half of theirs: the mix of SplitMix64.
    key = _mix(seed + _GAMMA)
    for label in labels:
        number = zlib.crc32(label.encode()) if isinstance(label, str) else label
        key = _mix(key ^ _mix(number + _GAMMA))
    return key


def _shifted_xor(value: Tensor, shift: int) -> Tensor:
    """Return value ^ (value >>> shift); torch shifts the sign in, so it is masked away."""
    return value.bitwise_xor_((value >> shift).bitwise_and_((1 << (64 - shift)) - 1))


def words(key: int, start: int, stop: int, device: torch.device | str = "cpu") -> Tensor:
    """Return the words start, ..., stop - 1 of a stream.

    Args:
        key: Key of the stream.
        start: First position, at least 0.
        stop: The position after the last.
        device: Where the words are wanted.

    Returns:
        ``(stop - start,)`` int64 whose 64 bits are random.

    Example:
        >>> from ntkops.projections.counter import words
        >>> words(7, 0, 4)[2:].equal(words(7, 2, 4))
        True
    """
    value = torch.arange(start + 1, stop + 1, dtype=torch.int64, device=device)
    value.mul_(_signed(_GAMMA)).add_(_signed(key))
    _shifted_xor(value, 30).mul_(_signed(_FIRST))
    _shifted_xor(value, 27).mul_(_signed(_SECOND))
    return _shifted_xor(value, 31)


@functools.lru_cache(maxsize=16)
def _sign_table(dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return ``(256, 8)``: the signs that the bits of a byte stand for."""
    bits = (torch.arange(256).unsqueeze(1) >> torch.arange(8)) & 1
    return (1 - 2 * bits).to(dtype=dtype, device=device)


def _expand(bits: Tensor, dtype: torch.dtype) -> Tensor:
    """Turn ``(m,)`` words into ``(64 m,)`` signs."""
    table = _sign_table(dtype, bits.device)
    return table.index_select(0, bits.view(torch.uint8).int()).flatten()


def signs(key: int, start: int, stop: int, dtype: torch.dtype, device: torch.device | str = "cpu") -> Tensor:
    """Return the signs start, ..., stop - 1 of a stream, one random bit each.

    Args:
        key: Key of the stream.
        start: First position.
        stop: The position after the last.
        dtype: Floating dtype of the result.
        device: Where it is wanted.

    Returns:
        ``(stop - start,)`` of +1 and -1.
    """
    # 64 signs a word: a range that begins within a word looks at all of it
    first = start // 64
    found = _expand(words(key, first, -(-stop // 64), device), dtype)
    return found[start - 64 * first : stop - 64 * first]


def sign_rows(
    key: int, start: int, stop: int, width: int, dtype: torch.dtype, device: torch.device | str = "cpu"
) -> Tensor:
    """Return rows of a random sign matrix, row i from its own words alone.

    Args:
        key: Key of the stream.
        start: First row.
        stop: The row after the last.
        width: Entries of a row.
        dtype: Floating dtype of the result.
        device: Where it is wanted.

    Returns:
        ``(stop - start, width)`` of +1 and -1.
    """
    each = -(-width // 64)
    found = _expand(words(key, start * each, stop * each, device), dtype)
    return found.view(stop - start, 64 * each)[:, :width]


def integers(
    key: int, start: int, stop: int, below: Tensor | int, device: torch.device | str = "cpu"
) -> Tensor:
    """Return uniform integers from 0 to below - 1.

    Args:
        key: Key of the stream.
        start: First position.
        stop: The position after the last.
        below: One bound, or ``(stop - start,)`` bounds, at most 2**53.
        device: Where they are wanted.

    Returns:
        ``(stop - start,)`` int64. No value is likelier than another by more than below / 2**53.
    """
    # 53 random bits are exact in float64, and their product with below / 2**53 rounds below `below`.
    fraction = (words(key, start, stop, device) >> 11).bitwise_and_(2**53 - 1).double()
    scale = below.double() * 2.0**-53 if isinstance(below, Tensor) else below * 2.0**-53
    return (fraction * scale).long()


def normal_rows(
    key: int, start: int, stop: int, width: int, dtype: torch.dtype, device: torch.device | str = "cpu"
) -> Tensor:
    """Return rows of a random normal matrix, row i from its own words alone (Box and Muller).

    Args:
        key: Key of the stream.
        start: First row.
        stop: The row after the last.
        width: Entries of a row.
        dtype: Dtype of the result; the entries themselves are float32 numbers in any.
        device: Where it is wanted.

    Returns:
        ``(stop - start, width)``, mean 0 and variance 1, none beyond 5.8.
    """
    # Two variates a word: 24 bits for the radius √(-2 log u), of which the least u is 2⁻²⁴, hence 5.8 at
    # most; 24 for the angle.
    each = -(-width // 2)
    bits = words(key, start * each, stop * each, device)
    radius = (bits >> 40).bitwise_and_(2**24 - 1).add_(1).float().mul_(2.0**-24)  # in (0, 1]
    radius = radius.log_().mul_(-2).sqrt_()
    angle = bits.bitwise_and_(2**24 - 1).float().mul_(2 * math.pi * 2.0**-24)
    pair = torch.stack([radius * angle.cos(), radius * angle.sin()], dim=-1)
    return pair.view(stop - start, 2 * each)[:, :width].to(dtype)
