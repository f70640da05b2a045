r"""How many standard errors an interval needs when its samples are quadratic forms.

An estimate is a mean of samples :math:`v^\top A v` over independent isotropic v that are Gaussian, or
uniform on a sphere; a smooth function of such means is one to first order. Samples of a flat spectrum are
nearly normal, and then Student's t is right. Those of a spectrum with one large eigenvalue are squares of
one normal variable: skewed, so that a sample which misses the tail has too small a mean and too small a
variance at once, and Student's interval covers .88 where it says .95.

Rank one is the extreme. Among quadratic forms :math:`\sum a_i (z_i^2 - 1)` it has the largest skewness and
kurtosis, and the largest tails (Székely & Bakirov 2003; Roosta-Khorasani, Székely & Ascher 2015). The
interval therefore takes, at each number of samples and each level, the quantile of the studentised mean
:math:`|\bar x - \mu| / (s / \sqrt m)` for squares of normal variables. It exceeds Student's everywhere and
tends to it. No theorem is known for the studentised mean; that it covers whatever the spectrum is
measured by benchmarks/coverage.py.

Where A v itself is known, and not only :math:`v^\top A v`, the variance need not come from the samples. For v
uniform on the sphere of radius √d and symmetric A,

.. math:: \mathrm{Var}\,v^\top A v = \frac{2 d}{d + 2} \Big(\|A\|_F^2 - \frac{(\mathrm{tr} A)^2}{d}\Big)
          = 2\,E\big[|A v|^2 - (v^\top A v)^2 / d\big],

so that each probe has an estimate of the variance without bias. For rank one, :math:`A = a u u^\top`, with S
the mean of m squared normal variables, the mean of the samples is a S and its standard error
:math:`a \sqrt{2 S / m}`: where probes miss u, the error looks too small by √S, and not by S. `norm_quantile`
is the quantile of :math:`|1 - S| / \sqrt{2 S / m}`, 2.8 for four probes where the other is 9.8.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from functools import lru_cache

__all__ = ["extremal_quantile", "norm_quantile", "student_quantile"]

_LEVELS = (0.05, 0.025, 0.05 / 6, 0.05 / 12, 0.05 / 30, 0.05 / 90)
# Quantiles of |mean - 1| / (s / √m) over m squares of normal variables, by number of samples and level:
# simulated 200,000 to 2,000,000 times.
_QUANTILES = {
    2: (57.04, 135.8, 507.2, 1146, 3283, 11130),
    3: (15.86, 28.31, 65.64, 109.8, 212.9, 453.1),
    4: (9.766, 15.63, 30.79, 46.01, 77.61, 141.5),
    5: (7.451, 11.33, 20.22, 28.27, 42.79, 69.92),
    6: (6.201, 9.091, 15.37, 20.85, 30.28, 46.31),
    8: (4.878, 6.883, 10.94, 14.1, 19.17, 27.25),
    12: (3.793, 5.118, 7.546, 9.366, 12.05, 15.92),
    16: (3.301, 4.36, 6.233, 7.522, 9.397, 11.96),
    24: (2.821, 3.643, 5.024, 5.939, 7.233, 8.926),
    32: (2.596, 3.294, 4.444, 5.203, 6.209, 7.523),
    64: (2.258, 2.767, 3.597, 4.124, 4.805, 5.671),
    128: (2.102, 2.498, 3.143, 3.541, 4.093, 4.683),
    256: (2.032, 2.375, 2.898, 3.256, 3.682, 4.195),
}
_COUNTS = tuple(_QUANTILES)


def extremal_quantile(level: float, count: int) -> float:
    """Return the half width, in standard errors, of an interval over samples of quadratic forms.

    Args:
        level: Probability with which the interval may miss.
        count: Number of samples.

    Returns:
        The quantile at the extreme of rank one, interpolated in its logarithm; infinite for one sample.
        Never less than Student's.
    """
    if count < 2:
        return math.inf
    student = student_quantile(level, count - 1)
    if count >= _COUNTS[-1]:  # the excess over Student's falls with √m
        last = _COUNTS[-1]
        excess = _at_level(level, last) - student_quantile(level, last - 1)
        return student + max(excess, 0.0) * math.sqrt(last / count)
    upper = bisect_left(_COUNTS, count)
    if _COUNTS[upper] == count:
        return max(_at_level(level, count), student)
    low, high = _COUNTS[upper - 1], _COUNTS[upper]
    share = (low**-0.5 - count**-0.5) / (low**-0.5 - high**-0.5)
    logs = math.log(_at_level(level, low)), math.log(_at_level(level, high))
    return max(math.exp(logs[0] + share * (logs[1] - logs[0])), student)


def _at_level(level: float, count: int) -> float:
    """Interpolate in log level and log quantile; beyond the ends, go on as the last two do."""
    values = _QUANTILES[count]
    position = sum(level < known for known in _LEVELS[1:-1])
    low, high = _LEVELS[position], _LEVELS[position + 1]
    share = math.log(level / low) / math.log(high / low)
    return math.exp(math.log(values[position]) * (1 - share) + math.log(values[position + 1]) * share)


def student_quantile(level: float, freedom: int) -> float:
    """Return the half width, in standard errors, of the interval that errs with probability ``level``."""
    import scipy.stats  # here: it takes long to load

    return float(scipy.stats.t.ppf(1 - level / 2, freedom)) if freedom > 0 else float("inf")


@lru_cache(maxsize=256)
def norm_quantile(level: float, count: int) -> float:
    """Return the half width, in standard errors from the lengths of A v, at the extreme of rank one."""
    import scipy.optimize  # here: they take long to load
    import scipy.stats

    if count < 1:
        return math.inf

    def excess(quantile: float) -> float:
        # |1 - S| = p √S at √S = r and 1 / r
        p = quantile * math.sqrt(2 / count)
        square = (math.sqrt(p * p + 4) - p) ** 2 / 4
        below, above = scipy.stats.chi2.cdf(count * square, count), scipy.stats.chi2.sf(count / square, count)
        return float(below + above - level)

    highest = 1.0
    while excess(highest) > 0:
        highest *= 4
    found = float(scipy.optimize.brentq(excess, 0.0, highest))
    return max(found, float(scipy.stats.norm.isf(level / 2)))
