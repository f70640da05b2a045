"""An estimate, and the passes that it took."""

from __future__ import annotations

import dataclasses
import math
import operator
from collections.abc import Callable
from dataclasses import dataclass, field
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from ..errors import EstimateError, ShapeError
from .html import facts_html

__all__ = [
    "Estimate",
    "PassCount",
    "format_estimate",
    "format_with_interval",
    "value_with_interval",
]


@dataclass(frozen=True)
class PassCount:
    """Passes really made, one per vector: Jᵀv (vjp), Jp (jvp) and per-sample gradient passes.

    Attributes:
        vjp: Products with Jᵀ.
        jvp: Products with J.
        per_sample: Per-sample gradient passes (one for each output row of every sample).
        products: Columns multiplied by operators that are not ours.
        checks: Passes of trials and row checks, beside the others: no cap and no comparison counts them, as
            how many there are depends on what was verified before. A row check is one backward pass over a
            batch, the trial of layer rules two over four samples, that of a mode of differentiation a vjp and
            a jvp over two.
    """

    vjp: int = 0
    jvp: int = 0
    per_sample: int = 0
    products: int = 0
    checks: int = field(default=0, compare=False)

    @property
    def total(self) -> int:
        """Sum of all passes but those of checks."""
        return self.vjp + self.jvp + self.per_sample + self.products


# -- a number with its error and what it cost


_Arithmetic = Callable[[Any, Any], Tensor]


@dataclass(frozen=True, eq=False, repr=False)
class Estimate:
    """A number with its error and what it cost.

    Exact estimates are numbers: they are added, multiplied, divided, raised to powers and compared with
    each other, with their passes added. One that is not exact takes exact numbers as terms and factors,
    compares where its interval decides, and is refused everything else, since errors may be correlated.
    What is printed is the 95 % interval, not ± one standard error: with few probes an interval is many of
    them wide. ``==`` is identity, as for tensors that carry an error.

    Attributes:
        value: The estimate: float64, shape () or the operator's batch shape.
        stderr: Standard error of ``value``, same shape; 0 for exact results.
        interval: The 95 % interval ``(low, high)``, two tensors of the same shape.
        method: Name of the method that was used.
        exact: Whether the value is exact up to rounding.
        passes: vjp, jvp and per-sample passes that were really made, one per vector.
        converged: False if a pass limit came before the requested tolerance.
        seed: Seed of the generator that drew the probes; None if nothing was drawn.
        seconds: Wall-clock time.
        checks: Passes of trials and row checks that were made on the way, beside ``passes``: see `PassCount`.

    Example:
        >>> import torch
        >>> from ntkops.results import Estimate
        >>> part = Estimate.of_exact(torch.tensor(2.0), passes=3)
        >>> whole = Estimate.of_exact(torch.tensor(8.0), passes=3)
        >>> part / whole, part < whole, f"{10 * part:.1f}"
        (0.25 (exact, 6 passes), True, '20.0')
        >>> value = torch.tensor(100.0)
        >>> Estimate(value, value / 50, (value - 7, value + 7), "hutch++", False, passes=9)
        100.0 (95 %: 93.0 to 107.0, hutch++, 9 passes)
    """

    value: Tensor
    stderr: Tensor
    interval: tuple[Tensor, Tensor]
    method: str
    exact: bool
    passes: int
    converged: bool = True
    seed: int | None = None
    seconds: float = 0.0
    checks: int = 0

    @classmethod
    def of_exact(
        cls, value: Tensor, *, passes: int, seconds: float = 0.0, method: str = "exact", checks: int = 0
    ) -> Estimate:
        """Wrap an exact value: no error, an interval of zero width."""
        return cls(
            value=value,
            stderr=torch.zeros_like(value),
            interval=(value, value),
            method=method,
            exact=True,
            passes=passes,
            seconds=seconds,
            checks=checks,
        )

    # as a number

    def __float__(self) -> float:
        """Return the value where it is a scalar."""
        if self.value.numel() != 1:
            raise EstimateError(
                f"this estimate has shape {tuple(self.value.shape)}; float() needs a scalar: index .value"
            )
        return float(self.value.detach())

    def item(self) -> float:
        """Return the value where it is a scalar, as a tensor does."""
        return float(self)

    def __round__(self, digits: int | None = None) -> float:
        """Round the value where it is a scalar."""
        return round(float(self), digits)

    # arithmetic

    def __add__(self, other: Any) -> Estimate:
        """Add an exact number; two estimates only where one of them is exact."""
        return self._combined(other, operator.add, "+", affine=True)

    def __radd__(self, other: Any) -> Estimate:
        """Add an exact number."""
        return self + other

    def __sub__(self, other: Any) -> Estimate:
        """Subtract an exact number."""
        return self._combined(other, operator.sub, "-", affine=True)

    def __rsub__(self, other: Any) -> Estimate:
        """Subtract from an exact number."""
        return -self + other

    def __mul__(self, factor: Any) -> Estimate:
        """Scale value, error and interval by an exact number."""
        return self._combined(factor, operator.mul, "*", affine=True)

    def __rmul__(self, factor: Any) -> Estimate:
        """Scale by an exact number."""
        return self * factor

    def __truediv__(self, divisor: Any) -> Estimate:
        """Divide by an exact number."""
        return self._combined(divisor, operator.truediv, "/", affine=True)

    def __rtruediv__(self, number: Any) -> Estimate:
        """Divide a number by an exact estimate."""
        return self._combined(number, lambda own, other: other / own, "/", affine=False)

    def __pow__(self, power: Any) -> Estimate:
        """Raise an exact estimate to a power."""
        return self._combined(power, operator.pow, "**", affine=False)

    def __neg__(self) -> Estimate:
        """Flip the sign."""
        return self * -1.0

    def _combined(self, other: Any, function: _Arithmetic, symbol: str, *, affine: bool) -> Estimate:
        """Return a function of this estimate and another number."""
        if isinstance(other, Estimate):
            if not other.exact and self.exact and symbol in ("+", "*"):
                return other._combined(self, function, symbol, affine=affine)
            if not other.exact and self.exact and symbol == "-":
                return -other + self
            if not other.exact:
                raise self._refusal(symbol)
            number: Any = other.value
            passes, seconds, checks = other.passes, other.seconds, other.checks
        elif isinstance(other, Real) or isinstance(other, Tensor) and other.dim() == 0:
            number, passes, seconds, checks = other, 0, 0.0, 0
        else:
            return NotImplemented
        if not (self.exact or affine):
            raise self._refusal(symbol)
        try:
            value = function(self.value, number)
        except RuntimeError as error:
            raise ShapeError(
                f"estimates of shapes {tuple(self.value.shape)} and {tuple(number.shape)} do not fit together"
            ) from error
        made: dict[str, Any] = {
            "passes": self.passes + passes,
            "seconds": self.seconds + seconds,
            "checks": self.checks + checks,
        }
        if self.exact:
            return Estimate.of_exact(value, method=self.method, **made)
        # affine in the estimate: ends become ends, in the other order where it falls
        one, two = (function(end, number) for end in self.interval)
        # the standard error scales by |df / dx|, 1 for + and -, the number or its inverse for * and /
        slope = torch.ones_like(value) if symbol in ("+", "-") else function(torch.ones_like(value), number)
        interval = torch.minimum(one, two), torch.maximum(one, two)
        return dataclasses.replace(
            self,
            value=value,
            stderr=self.stderr * slope.abs(),
            interval=interval,
            **made,
        )

    def _refusal(self, symbol: str) -> EstimateError:
        return EstimateError(
            f"an Estimate that is not exact does not go into {symbol} with another estimate, a power or "
            "a divisor, since errors may be correlated: use ntkops.alignment or ntkops.effective_rank for "
            "those ratios, take method='exact', or combine .value and .interval yourself"
        )

    # comparison

    def __lt__(self, other: Any) -> bool:
        """Whether the value is below another number, where the intervals decide."""
        return self._decided(other, operator.lt)

    def __le__(self, other: Any) -> bool:
        """Whether the value is at most another number, where the intervals decide."""
        return self._decided(other, operator.le)

    def __gt__(self, other: Any) -> bool:
        """Whether the value is above another number, where the intervals decide."""
        return self._decided(other, operator.gt)

    def __ge__(self, other: Any) -> bool:
        """Whether the value is at least another number, where the intervals decide."""
        return self._decided(other, operator.ge)

    def _decided(self, other: Any, holds: Callable[[float, float], bool]) -> bool:
        if isinstance(other, Estimate):
            there = other._ends()
        elif isinstance(other, Real) or isinstance(other, Tensor) and other.dim() == 0:
            there = (float(other),) * 2
        else:
            return NotImplemented
        here = self._ends()
        # monotone in both: decided iff all four pairs of ends agree
        found = {holds(one, two) for one in here for two in there}
        if len(found) == 2:
            raise EstimateError(
                f"the 95 % interval from {here[0]:.6g} to {here[1]:.6g} does not decide a comparison with "
                + (f"{there[0]:.6g}" if there[0] == there[1] else f"{there[0]:.6g} to {there[1]:.6g}")
                + ": ask for a smaller rtol, or compare float(estimate)"
            )
        return found.pop()

    def _ends(self) -> tuple[float, float]:
        float(self)  # refuses what is no scalar
        low, high = (float(end.detach()) for end in self.interval)
        return low, high

    # as text

    def to_dict(self) -> dict[str, Any]:
        """Return plain numbers and lists, ready for JSON."""
        return {
            "value": self.value.tolist(),
            "stderr": self.stderr.tolist(),
            "interval": [end.tolist() for end in self.interval],
            "method": self.method,
            "exact": self.exact,
            "passes": self.passes,
            "checks": self.checks,
            "converged": self.converged,
            "seed": self.seed,
            "seconds": self.seconds,
        }

    def __format__(self, spec: str) -> str:
        """Format the value, and beside it the ends of the interval if it is not exact."""
        if not spec:
            return str(self)
        value = format(float(self), spec)
        if self.exact:
            return value
        low, high = (format(end, spec).strip() for end in self._ends())
        return f"{value} (95 %: {low} to {high})"

    def __str__(self) -> str:
        """Show the value with its 95 % interval, method and passes."""
        notes = [] if self.method == "exact" else [self.method]
        notes.append("1 pass" if self.passes == 1 else f"{self.passes} passes")
        if not self.converged:
            notes.append("not converged")
        if self.value.numel() != 1:
            return f"{self._range()} ({', '.join(notes)})"
        if self.exact:
            return f"{float(self):.6g} ({', '.join(['exact', *notes])})"
        value, low, high = format_with_interval(float(self), *self._ends())
        return f"{value} ({', '.join([f'95 %: {low} to {high}', *notes])})"

    __repr__ = __str__

    def _repr_html_(self) -> str:
        """Show the same in a notebook, a row for each of value, interval, method and passes."""
        single = self.value.numel() == 1
        ends = None
        if single and not self.exact:
            value, *pair = format_with_interval(float(self), *self._ends())
            ends = " to ".join(pair)
        else:
            value = f"{float(self):.6g}" if single else self._range()
        facts = {
            "value": value,
            "95 % interval": ends,
            "method": self.method,
            "passes": self.passes,
            "converged": None if self.converged else "no",
        }
        return facts_html("Estimate", facts)

    def _range(self) -> str:
        """Describe many values by the least and the greatest, and by the widest interval."""
        values, (low, high) = self.value.detach(), self.interval
        text = f"Estimate of shape {tuple(values.shape)}"
        if not values.numel():
            return text
        text += f", {float(values.min()):.4g} to {float(values.max()):.4g}"
        if self.exact:
            return f"{text}, exact"
        return f"{text}, 95 % within ± {float((high - low).detach().max()) / 2:.2g}"


def format_with_interval(value: float, low: float, high: float) -> tuple[str, str, str]:
    """Return a value and the ends of its interval, to the second digit of the interval's half width.

    Args:
        value: The value.
        low: Low end.
        high: High end.

    Returns:
        Three numbers as text, none with more than seven digits.

    Example:
        >>> from ntkops.results.estimate import format_with_interval
        >>> format_with_interval(202661.3, 201822.7, 203499.9)
        ('202660', '201820', '203500')
        >>> format_with_interval(0.974534, 0.974113, 1.0)
        ('0.975', '0.974', '1.000')
    """
    half = (high - low) / 2
    size = max((abs(number) for number in (value, low, high) if math.isfinite(number)), default=0.0)
    if not 0 < half < math.inf or not size:
        return f"{value:.6g}", f"{low:.6g}", f"{high:.6g}"
    leading = math.floor(math.log10(size))
    # two digits of the half width, seven in all at most
    places = min(1 - math.floor(math.log10(half)), 6 - leading)
    if 1e-4 < size < 1e7:
        shown = [f"{round(number, places):.{max(places, 0)}f}" for number in (value, low, high)]
    else:
        shown = [f"{number:.{max(0, places + leading)}e}" for number in (value, low, high)]
    return shown[0], shown[1], shown[2]


def value_with_interval(value: float, low: float, high: float) -> str:
    """Return ``value (low to high)``, the value alone where the interval has no width."""
    if not low < high:
        return f"{value:.6g}"
    shown = format_with_interval(value, low, high)
    return f"{shown[0]} ({shown[1]} to {shown[2]})"


def format_estimate(estimate: Estimate) -> str:
    """Return value and 95 % interval to the digits that the interval leaves meaningful.

    Args:
        estimate: A scalar estimate.

    Returns:
        One line, six digits if exact; half of the interval's width has two.

    Example:
        >>> import torch
        >>> from ntkops.results.estimate import format_estimate
        >>> from ntkops.results import Estimate
        >>> value, error = torch.tensor(1234.5678), torch.tensor(0.25)
        >>> noisy = Estimate(
        ...     value, error, (value - 2 * error, value + 2 * error), "hutchinson", False, 20
        ... )
        >>> format_estimate(noisy), format_estimate(Estimate.of_exact(value, passes=3))
        ('1234.57 (1234.07 to 1235.07)', '1234.57')
    """
    if estimate.exact:
        return f"{float(estimate):.6g}"
    return value_with_interval(float(estimate), *(float(end) for end in estimate.interval))
