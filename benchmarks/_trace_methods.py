"""The estimators of the trace-estimation paper as its code runs them.

Hutch++ spends a sixth of m on the range and half of the rest on the residual, so that it makes about
0.75 m products; the one-sided estimators spend a sixth on an orthonormal basis of random directions. All
probes are Rademacher. The norm and the alignment are Hutch++ on products of kernels, the effective rank two
separate runs.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["alignment", "effective_rank", "frobenius_norm", "hutch_pp", "one_sided"]

Product = Callable[[Tensor], Tensor]

_CHUNK = 60  # columns in one vmap; the paper takes all at once, which is slower and does not fit for its GRU


def _signs(count: int, length: int, generator: torch.Generator) -> Tensor:
    return torch.randint(0, 2, (count, length), generator=generator).float().mul_(2).sub_(1)


def _chunked(product: Product, block: Tensor) -> Tensor:
    return torch.cat([product(part) for part in block.split(_CHUNK)])


def hutch_pp(product: Product, size: int, m: int, generator: torch.Generator) -> tuple[float, int]:
    """Return the estimate of tr A and the products that were made."""
    q = m // 6
    s = (m - q) // 2
    basis = torch.linalg.qr(_chunked(product, _signs(q, size, generator)).T)[0].T  # (q, n)
    probes = _signs(s, size, generator)
    probes = probes - (probes @ basis.T) @ basis
    low = (_chunked(product, basis) * basis).sum()
    rest = (_chunked(product, probes) * probes).sum() / s
    return float(low + rest), 2 * q + s


def one_sided(half: Product, length: int, m: int, generator: torch.Generator) -> tuple[float, int]:
    """Return the estimate of tr K = |J|² from products with one side, and their number."""
    q = m // 6
    basis = torch.linalg.qr(_signs(q, length, generator).T)[0].T
    probes = _signs(m - q, length, generator)
    probes = probes - (probes @ basis.T) @ basis
    low = _chunked(half, basis).square().sum() if q else torch.zeros(())
    return float(low + _chunked(half, probes).square().sum() / (m - q)), m


def frobenius_norm(product: Product, size: int, m: int, generator: torch.Generator) -> tuple[float, int]:
    """Return the estimate of |K|_F by Hutch++ on K², and the products with K."""
    value, made = hutch_pp(lambda v: product(product(v)), size, m, generator)
    return max(value, 0.0) ** 0.5, 2 * made


def effective_rank(product: Product, size: int, m: int, generator: torch.Generator) -> tuple[float, int]:
    """Return the estimate of (tr K)² / |K|², and the products with K."""
    trace, first = hutch_pp(product, size, m, generator)
    norm, second = frobenius_norm(product, size, m, generator)
    return trace**2 / norm**2, first + second


def alignment(
    product: Product, other: Product, size: int, m: int, generator: torch.Generator
) -> tuple[float, int]:
    """Return the estimate of the cosine of two kernels, and the products with either."""
    mixed, first = hutch_pp(lambda v: product(other(v)), size, m, generator)
    left, second = frobenius_norm(product, size, m, generator)
    right, third = frobenius_norm(other, size, m, generator)
    return mixed / (left * right), 2 * first + second + third
