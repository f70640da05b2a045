"""Estimated moments with their jackknife: the error of any smooth function of them.

A quantity is a function g of a few moments (a trace, a squared norm, an inner product). A method gives
each moment as a deterministic part plus a mean over random probes. Leaving out one probe at a time gives
the standard error of g, with the covariance of the moments counted: they share their probes. For one
linear moment it equals the usual s / √m.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import scipy.stats
import torch
from torch import Tensor

__all__ = ["Combination", "MeanMoments", "Moments", "PairMoments", "half_width", "jackknife_error"]

Combination = Callable[[Tensor], Tensor]


class Moments(Protocol):
    """Estimated moments of q quantities from m probes."""

    @property
    def count(self) -> int:
        """Number m of probes."""
        ...

    def point(self) -> Tensor:
        """The estimates, ``(*batch, q)``."""
        ...

    def leave_one_out(self) -> Tensor:
        """The estimates without each probe in turn, ``(*batch, m, q)``."""
        ...


@dataclass(frozen=True, eq=False)
class MeanMoments:
    """A deterministic part plus a mean over independent probes.

    Attributes:
        constant: ``(*batch, q)``.
        samples: ``(*batch, m, q)``.
    """

    constant: Tensor
    samples: Tensor

    @property
    def count(self) -> int:
        """Number of probes."""
        return self.samples.shape[-2]

    def point(self) -> Tensor:
        """Return the estimates."""
        return self.constant + self.samples.mean(-2)

    def leave_one_out(self) -> Tensor:
        """Return the estimates without each probe in turn."""
        total = self.samples.sum(-2, keepdim=True)
        return self.constant.unsqueeze(-2) + (total - self.samples) / (self.count - 1)

    def extended(self, samples: Tensor) -> MeanMoments:
        """Return the moments with more probes."""
        return MeanMoments(self.constant, torch.cat([self.samples, samples], dim=-2))


@dataclass(frozen=True, eq=False)
class PairMoments:
    """Means over pairs of different probes (a U-statistic), beside plain means over single probes.

    Attributes:
        single: ``(*batch, m, q₁)`` values of single probes.
        pairs: ``(*batch, m, m, q₂)`` values of pairs; the diagonal is not used.
    """

    single: Tensor
    pairs: Tensor

    @property
    def count(self) -> int:
        """Number of probes."""
        return self.pairs.shape[-2]

    def _off_diagonal(self) -> Tensor:
        mask = ~torch.eye(self.count, dtype=torch.bool, device=self.pairs.device)
        return self.pairs * mask.unsqueeze(-1)

    def point(self) -> Tensor:
        """Return the estimates, the single ones first."""
        m = self.count
        pairs = self._off_diagonal().sum((-3, -2)) / (m * (m - 1))
        return torch.cat([self.single.mean(-2), pairs], dim=-1)

    def leave_one_out(self) -> Tensor:
        """Return the estimates without each probe in turn."""
        m, off = self.count, self._off_diagonal()
        without = off.sum((-3, -2)).unsqueeze(-2) - off.sum(-2) - off.sum(-3)
        pairs = without / ((m - 1) * (m - 2))
        single = (self.single.sum(-2, keepdim=True) - self.single) / (m - 1)
        return torch.cat([single, pairs], dim=-1)


def jackknife_error(moments: Moments, combine: Combination) -> Tensor:
    """Return the standard error of a function of moments.

    Args:
        moments: At least two probes for a mean, three for pairs; with fewer the error is infinite.
        combine: ``(..., q) -> (...)``.

    Returns:
        ``(*batch)``, float64.
    """
    m = moments.count
    least = 3 if isinstance(moments, PairMoments) else 2
    if m < least:
        return torch.full_like(combine(moments.point()), torch.inf)
    values = combine(moments.leave_one_out())
    centred = values - values.mean(-1, keepdim=True)
    return ((m - 1) / m * centred.square().sum(-1)).sqrt()


def half_width(stderr: Tensor, count: int) -> Tensor:
    """Return the half width of the 95 % interval: Student's t with m - 1 degrees of freedom."""
    if count < 2:
        return torch.where(stderr > 0, torch.inf, stderr)
    return stderr * float(scipy.stats.t.ppf(0.975, count - 1))
