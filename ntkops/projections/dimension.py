"""How many rows a projection needs, and where regression on its features goes wrong."""

from __future__ import annotations

import math
import warnings

from ..arguments import checked
from ..errors import InputError, InterpolationWarning

__all__ = ["check_interpolation", "jl_distortion", "suggest_dim"]

_PEAK = (0.7, 1.5)
_SAFE_RIDGE = 1e-2


def _rate(epsilon: float) -> float:
    """Return r with P(| |Px|² - 1 | > ε) ≤ 2 exp(-k r) for a unit vector x."""
    if epsilon < 1:
        # (ε - log(1 + ε)) / 2 ≥ ε² / 4 - ε³ / 6, Chernoff's bound for the upper tail of χ²_k / k; the lower
        # one is thinner.
        return epsilon**2 / 4 - epsilon**3 / 6
    return (epsilon - math.log1p(epsilon)) / 2  # only the upper tail is left


def _needed_rate(n: int, failure: float) -> float:
    """Return k r for which all inner products of n vectors hold at once."""
    # |u + v| and |u - v| for each pair of unit vectors, and |u| for each: n² lengths in all.
    # <u, v> = (|u + v|² - |u - v|²) / 4 is off by ε (|u + v|² + |u - v|²) / 4 = ε at most.
    return math.log(2) + 2 * math.log(n) - math.log(failure)


def _check(n: int, failure: float) -> None:
    if not isinstance(n, int) or isinstance(n, bool) or n < 1:
        raise InputError(f"n={n!r}: pass the number of vectors, a positive integer")
    if not 0 < failure < 1:
        raise InputError(f"failure={failure!r}: pass a probability between 0 and 1")


@checked
def jl_distortion(k: int, n: int, failure: float = 0.05) -> float:
    r"""Return ε such that all inner products of n vectors survive a projection to k entries.

    With probability at least 1 - ``failure``, for all i and j at once,

    .. math:: |\langle P\phi_i, P\phi_j\rangle - \langle\phi_i, \phi_j\rangle|
              \le \varepsilon\, |\phi_i|\, |\phi_j| .

    What this does not say: the error is relative to the lengths, not to the kernel's entry, which may be
    far smaller; and the eigenvalues of the kernel are not preserved to a factor 1 ± ε. A kernel of rank n
    seen through k entries has eigenvalues spread by :math:`(1 \pm \sqrt{n/k})^2`, and none beyond the k-th:
    only those far above tr(K)/k are kept.

    Args:
        k: Number of entries of the image.
        n: Number of vectors.
        failure: Probability with which the bound may fail.

    Returns:
        ε; above 1 it says little. It is a theorem for `Gaussian`, `Rademacher` and `Haar`. For the sparse
        maps only the root mean square error, at most :math:`\sqrt{2/k}` for a pair, is guaranteed.

    Source: Dasgupta and Gupta (2003) and Achlioptas (2003) for lengths; inner products by the
    parallelogram law.

    Raises:
        InputError: If an argument is out of range.

    Example:
        >>> from ntkops.projections import jl_distortion
        >>> round(jl_distortion(k=2048, n=500), 2)
        0.19
    """
    if not isinstance(k, int) or isinstance(k, bool) or k < 1:
        raise InputError(f"k={k!r}: pass a positive integer")
    _check(n, failure)
    needed = _needed_rate(n, failure) / k
    # the rate grows with ε: bisection
    low, high = 0.0, 1.0
    while _rate(high) < needed:
        high *= 2
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (low, middle) if _rate(middle) >= needed else (middle, high)
    return high


@checked
def suggest_dim(n: int, epsilon: float, failure: float = 0.05, *, regression: bool = False) -> int:
    r"""Return the smallest k for which `jl_distortion` is at most ε.

    Args:
        n: Number of vectors: rows of the kernel.
        epsilon: Error of an inner product relative to the two lengths, between 0 and 1.
        failure: Probability with which the bound may fail.
        regression: Whether a regression with n training rows is to follow: then at least 2n, beyond the
            interpolation peak (see `check_interpolation`).

    Returns:
        k. About :math:`4 \ln(2n^2/\mathrm{failure}) / \varepsilon^2`: sufficient, and pessimistic where the
        vectors span few directions. The number of parameters does not enter.

    Raises:
        InputError: If an argument is out of range.

    Example:
        >>> from ntkops.projections import suggest_dim
        >>> suggest_dim(500, 0.2), suggest_dim(5000, 0.3, regression=True)
        (1860, 10000)
    """
    _check(n, failure)
    if not 0 < epsilon < 1:
        raise InputError(f"epsilon={epsilon!r}: pass a relative error between 0 and 1")
    k = math.ceil(_needed_rate(n, failure) / _rate(epsilon))
    return max(k, 2 * n) if regression else k


@checked
def check_interpolation(k: int, m: int, ridge: float) -> bool:
    """Warn where regression on k projected features of m samples is near the interpolation peak.

    Near k = m the projected kernel is just about invertible: its smallest eigenvalues are close to zero, the
    fit follows noise, and the error is several times that of a smaller or a larger k.

    Args:
        k: Number of features.
        m: Number of training rows.
        ridge: Ridge relative to the mean diagonal of the kernel.

    Returns:
        Whether a warning was given: 0.7 < k / m < 1.5 and ridge < 1e-2.

    Raises:
        InputError: If an argument is out of range.

    Example:
        >>> from ntkops.projections import check_interpolation
        >>> check_interpolation(k=2048, m=500, ridge=1e-6)
        False
    """
    for name, size in (("k", k), ("m", m)):
        if size < 1:
            raise InputError(f"{name}={size!r}: pass a positive integer")
    if not 0 <= ridge < math.inf:
        raise InputError(f"ridge={ridge!r}: pass a finite number ≥ 0")
    if not (_PEAK[0] < k / m < _PEAK[1] and ridge < _SAFE_RIDGE):
        return False
    warnings.warn(
        f"k={k} projected features for m={m} training rows is near the interpolation peak, and the relative "
        f"ridge {ridge:.3g} does not tame it: take k of at least {2 * m}, a relative ridge of at least "
        f"{_SAFE_RIDGE:g}, or choose the ridge by leave-one-out",
        InterpolationWarning,
        stacklevel=3,
    )
    return True
