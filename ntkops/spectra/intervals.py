"""Intervals for means of positive quadratic forms of random directions.

zᵀ A z with A positive semidefinite is a weighted sum of squares. The multiple of χ² that has its mean and
variance is close to it in the tails as well (Satterthwaite 1946): exact where A has rank one, normal where
many eigenvalues share the trace. An interval by Student's t from a few probes misses far more often,
because a probe that does not meet a large eigenvalue underrates value and error together.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from ..arguments import checked

__all__ = ["guarded_freedom", "scaled_chi_square", "scaled_chi_squares"]

_NORMAL = 1e6  # degrees of freedom from which χ² is normal


@checked
def guarded_freedom(mean: float, variance: float, probes: int) -> float:
    """Return the degrees of freedom of the χ² that matches an estimated mean and its variance.

    Both are estimated by the same probes, so the number is lowered by 1 + 2 / √probes, though not below
    the number of probes: a positive semidefinite form has at least one square for each.

    Args:
        mean: Mean of the forms, ≥ 0.
        variance: Variance of that mean.
        probes: Number of probes.

    Returns:
        The degrees of freedom, at least 1; infinite where the variance vanishes.
    """
    if variance <= 0:
        return math.inf
    # s χ²_ν has mean s ν and variance 2 s² ν: ν = 2 mean² / variance
    freedom = 2 * (mean / math.sqrt(variance)) ** 2
    return max(freedom / (1 + 2 / math.sqrt(probes)), min(freedom, float(probes)), 1.0)


@checked
def scaled_chi_square(freedom: float, level: float) -> tuple[float, float]:
    """Return the factors from an estimate to both ends of its interval.

    Args:
        freedom: Degrees of freedom.
        level: Probability with which the interval may miss.

    Returns:
        (below, above), with below ≤ 1 ≤ above.
    """
    if freedom == math.inf:
        return 1.0, 1.0
    import scipy.stats  # here: it takes long to load

    if freedom > _NORMAL:
        width = float(scipy.stats.norm.ppf(1 - level / 2)) * math.sqrt(2 / freedom)
        return 1 / (1 + width), 1 / (1 - width)
    # mean / true ~ χ²_ν / ν, so that the ends are ν / quantile: inverted, the upper quantile gives the low
    # end.
    low, high = scipy.stats.chi2.ppf([level / 2, 1 - level / 2], freedom)
    return freedom / float(high), freedom / float(low)


@checked
def scaled_chi_squares(means: Tensor, variances: Tensor, probes: int, level: float) -> tuple[Tensor, Tensor]:
    """Return both ends of the intervals of many means.

    Args:
        means: ``(g,)`` means of positive semidefinite forms.
        variances: ``(g,)`` variances of these means.
        probes: Number of probes.
        level: Probability with which each interval may miss.

    Returns:
        Low and high ends, ``(g,)``.
    """
    import scipy.stats

    moments = zip(means.tolist(), variances.tolist(), strict=True)
    freedoms = np.array([guarded_freedom(mean, variance, probes) for mean, variance in moments])
    bounded = np.minimum(freedoms, _NORMAL)
    low, high = (scipy.stats.chi2.ppf(share, bounded) for share in (level / 2, 1 - level / 2))
    width = float(scipy.stats.norm.ppf(1 - level / 2)) * np.sqrt(2 / freedoms)
    normal = freedoms > _NORMAL
    below = np.where(normal, 1 / (1 + width), bounded / high)
    above = np.where(normal, 1 / (1 - np.where(normal, width, 0.0)), bounded / low)
    return means * torch.from_numpy(below), means * torch.from_numpy(above)
