"""Sums of long products: blocks in the working dtype, their sum in float64.

A matrix product in float32 adds up its terms one after the other: over a million of them, such as the
entries of a trace of per-sample gradients, it lost four digits with some shapes. In blocks of a few
thousand columns the same product costs the same time and loses nothing that can be measured.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

__all__ = ["COLUMNS", "Total", "Workspace", "long_product", "row_blocks", "wide_dtype"]

# Roundings of terms of random signs walk at random: n terms added one after the other lose √n units of the
# result, 4096 of them 64, 256 of them 16. What blocks give is added up in float64, and loses nothing.
COLUMNS = 4096  # terms of a sum that are left to one matrix product
_MANY_ROWS, _FEW_COLUMNS = 64, 256  # fewer rows than this are added up term by term: shorter blocks
_BATCHED_ROWS = 16  # of products whose blocks go through one batched product
_FEW_BLOCKS = 16  # that may be added up in the working dtype: each addition loses half a unit of the sum
_WIDE_ENTRIES = 2**23  # of a float64 total beside the result: 64 MiB
# T blocks of rows of a symmetric product, each up to its own diagonal, are (1 + 1/T) / 2 of all entries: .56
# for 8 blocks, and not much less for more. A block of fewer rows than 80 costs more than it saves.
_SYMMETRIC_ROWS, _SYMMETRIC_BLOCKS = 80, 8
_BATCHED_ENTRIES = 2**18  # of the products of several pairs of matrices in one call: what a cache holds


def wide_dtype(like: Tensor) -> torch.dtype:
    """Return the dtype in which many products are added up: float64 where the device has it."""
    return like.dtype if like.device.type == "mps" else torch.float64


class Workspace:
    """Flat memory that is used again: fresh pages cost more than the arithmetic on small layers."""

    def __init__(self) -> None:
        self._held: dict[object, Tensor] = {}

    def take(self, key: object, entries: int, like: Tensor) -> Tensor:
        """Return at least ``entries`` uninitialised entries, valid until the key is taken again."""
        held = self._held.get(key)
        if held is None or held.numel() < entries or held.dtype != like.dtype or held.device != like.device:
            self._held.pop(key, None)  # the old memory goes before the new comes
            held = torch.empty(entries, dtype=like.dtype, device=like.device)
            self._held[key] = held
        return held

    def clear(self) -> None:
        """Set everything free."""
        self._held.clear()

    def matrix(self, key: object, rows: int, columns: int, like: Tensor) -> Tensor:
        """Return an uninitialised matrix."""
        return self.take(key, rows * columns, like)[: rows * columns].view(rows, columns)


def row_blocks(count: int, rows: int, symmetric: bool) -> list[tuple[int, int]]:
    """Return ranges of samples whose rows meet all columns, or those up to their own where ``symmetric``."""
    if not symmetric:
        return [(0, count)]
    blocks = max(1, min(_SYMMETRIC_BLOCKS, count * rows // _SYMMETRIC_ROWS, count))
    step = -(-count // blocks)
    return [(start, min(start + step, count)) for start in range(0, count, step)]


def _blocks(columns: int, width: int = COLUMNS) -> Iterator[slice]:
    """Yield even ranges of at most ``width`` columns."""
    step = -(-columns // max(1, -(-columns // width)))
    for start in range(0, columns, max(step, 1)):
        yield slice(start, min(start + step, columns))


class Total:
    """The sum of one layer's products with N₁ samples, added to ``(M, N₁·r₁, N₂·r₂)`` when it is complete."""

    def __init__(self, target: Tensor, count: int, symmetric: bool, terms: int, workspace: Workspace) -> None:
        self._target, self._count, self._symmetric, self._workspace = target, count, symmetric, workspace
        # ``terms`` is the length of all products together: what one matrix product may add up goes to the
        # target at once. Longer sums have a total of their own, in float64 where its memory is bearable.
        self._short = terms <= COLUMNS or target.dtype == torch.float64
        entries = target.numel()
        self._wide = target
        dtype, long = wide_dtype(target), terms > _FEW_BLOCKS * COLUMNS
        if long and not self._short and entries <= _WIDE_ENTRIES and dtype != target.dtype:
            like = torch.empty(0, dtype=dtype, device=target.device)
            self._wide = workspace.take("wide", entries, like)[:entries].view(target.shape).zero_()

    def add(self, number: int, left: Tensor, right: Tensor) -> None:
        """Add left rightᵀ, ``(N₁·r₁, N₂·r₂)``, to one of the kernels."""
        rows = len(left) // max(self._count, 1)
        wide = self._wide[number]
        for start, stop in row_blocks(self._count, rows, self._symmetric):
            end = stop * rows if self._symmetric else len(right)
            part = slice(start * rows, stop * rows)
            if self._short:
                wide[part, :end].addmm_(left[part], right[:end].mT)
                continue
            product = self._workspace.matrix("product", part.stop - part.start, end, left)
            for columns in _blocks(left.shape[1]):
                torch.mm(left[part, columns], right[:end, columns].mT, out=product)
                wide[part, :end] += product

    def add_each(self, left: Tensor, right: Tensor) -> None:
        """Add Σ_R left rightᵀ for ``(M, R, N, K)`` rows of single outputs to all kernels."""
        kernels, terms, n1, length = left.shape
        n2 = right.shape[2]
        step = max(1, _BATCHED_ENTRIES // max(1, n1 * n2))  # pairs of matrices in one call
        if self._short or step == 1 or length > COLUMNS:  # no batch, or sums that want blocks of columns
            for number, (one, other) in enumerate(zip(left, right, strict=True)):
                for a, b in zip(one, other, strict=True):
                    self.add(number, a, b)
            return
        wide = self._wide
        for number in range(0, kernels, step):
            some = slice(number, number + step)
            for term in range(0, terms, max(1, step // kernels)):
                few = slice(term, term + max(1, step // kernels))
                one, other = left[some, few], right[some, few]
                shape = one.shape[:2]
                product = torch.bmm(one.flatten(0, 1), other.flatten(0, 1).mT).unflatten(0, shape)
                wide[some] += product.squeeze(1) if shape[1] == 1 else product.sum(1, dtype=torch.float64)

    def finish(self) -> None:
        """Add the sum to the kernels."""
        if self._wide is self._target:
            return
        for kernel, wide in zip(self._target, self._wide, strict=True):
            step = max(1, _BATCHED_ENTRIES // max(1, kernel.shape[1]))
            for part, sums in zip(kernel.split(step), wide.split(step), strict=True):
                part += sums  # a few rows at a time: the sum of two dtypes is made in fresh memory


def long_product(left: Tensor, right: Tensor, out: Tensor | None = None) -> Tensor:
    """Return left right with long sums in blocks; where K is long, three times the result in float64."""
    length, rows = left.shape[-1], min(left.shape[-2], right.shape[-1])
    # A result of few rows costs little beside its terms: all of its blocks are made in one call.
    narrow = left.dtype == torch.float32 and left.device.type != "mps"
    if narrow and left.dim() == right.dim() == 2 and out is None and rows <= _BATCHED_ROWS:
        return _folded(left, right, 32 if rows == 1 else 64)
    # Products with few rows add up their terms one by one, those with many in parts of their own.
    width = COLUMNS if rows >= _MANY_ROWS else _FEW_COLUMNS
    if length <= width or left.dtype == torch.float64 or left.device.type == "mps":
        return torch.matmul(left, right, out=out)
    total: Tensor | None = None
    for some in _blocks(length, width):
        part = left[..., some] @ right[..., some, :]
        total = part.double() if total is None else total.add_(part)
    assert total is not None
    return total.to(left.dtype) if out is None else out.copy_(total)


def _folded(left: Tensor, right: Tensor, width: int) -> Tensor:
    """Return left right for matrices of which one has few rows: all blocks in one call.

    Such products add up their terms one after the other, which for signs at random loses as many units as
    the square root of their number: blocks are short, the shorter the fewer rows.
    """
    blocks = left.shape[1] // width
    if blocks < 2:
        return left @ right
    end = blocks * width
    one = left[:, :end].unflatten(1, (blocks, width)).transpose(0, 1)  # (blocks, m, width)
    other = right[:end].unflatten(0, (blocks, width))  # (blocks, width, n)
    total = torch.bmm(one, other).sum(0, dtype=torch.float64)
    if end < left.shape[1]:
        total += left[:, end:] @ right[end:]
    return total.to(left.dtype)
