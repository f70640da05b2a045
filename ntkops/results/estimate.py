"""A number with its error and what it cost."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import EstimateError

__all__ = ["Estimate"]


def _scaled(value: Any, factor: float) -> Any:
    return None if value is None else value * factor


@dataclass(frozen=True, eq=False)
class Estimate:
    """A number with its error and what it cost.

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

    Example:
        >>> import torch
        >>> from ntkops.results import Estimate
        >>> e = Estimate.of_exact(torch.tensor(2.0), passes=3)
        >>> float(e), float((10 * e).value), e.exact
        (2.0, 20.0, True)
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

    @classmethod
    def of_exact(cls, value: Tensor, *, passes: int, seconds: float = 0.0, method: str = "exact") -> Estimate:
        """Wrap an exact value: no error, an interval of zero width."""
        return cls(
            value=value,
            stderr=torch.zeros_like(value),
            interval=(value, value),
            method=method,
            exact=True,
            passes=passes,
            seconds=seconds,
        )

    def __float__(self) -> float:
        """Return the value where it is a scalar."""
        if self.value.numel() != 1:
            raise EstimateError(
                f"this estimate has shape {tuple(self.value.shape)}; float() needs a scalar: index .value"
            )
        return float(self.value.detach())

    def __mul__(self, factor: float) -> Estimate:
        """Scale value, error and interval by an exact number."""
        if isinstance(factor, Estimate):
            raise self._combination("*")
        if not isinstance(factor, (int, float)):
            return NotImplemented
        low, high = (_scaled(end, factor) for end in self.interval)
        return dataclasses.replace(
            self,
            value=self.value * factor,
            stderr=self.stderr * abs(factor),
            interval=(low, high) if factor >= 0 else (high, low),
        )

    __rmul__ = __mul__

    def __truediv__(self, divisor: float) -> Estimate:
        """Divide by an exact number."""
        if isinstance(divisor, Estimate):
            raise self._combination("/")
        if not isinstance(divisor, (int, float)):
            return NotImplemented
        return self * (1.0 / divisor)

    def __neg__(self) -> Estimate:
        """Flip the sign."""
        return self * -1.0

    def _refuse(self, other: object) -> Estimate:
        raise self._combination("+, -, **, <, > or /")

    __add__ = __radd__ = __sub__ = __rsub__ = __rtruediv__ = __pow__ = _refuse

    def _combination(self, symbol: str) -> EstimateError:
        return EstimateError(
            f"an Estimate does not go into {symbol} with another number or estimate, since the errors "
            "may be correlated: use ntkops.alignment or ntkops.effective_rank for those ratios, or "
            "take .value and .stderr and combine them yourself"
        )

    def to_dict(self) -> dict[str, Any]:
        """Return plain numbers and lists, ready for JSON."""
        return {
            "value": self.value.tolist(),
            "stderr": self.stderr.tolist(),
            "interval": [end.tolist() for end in self.interval],
            "method": self.method,
            "exact": self.exact,
            "passes": self.passes,
            "converged": self.converged,
            "seed": self.seed,
            "seconds": self.seconds,
        }

    def __str__(self) -> str:
        """Show the value with its error, method and passes."""
        if self.value.numel() != 1:
            return f"Estimate(shape={tuple(self.value.shape)}, method={self.method!r}, passes={self.passes})"
        error = "exact" if self.exact else f"± {float(self.stderr):.2g}"
        return f"{float(self.value.detach()):.6g} ({error}, {self.method}, {self.passes} passes)"
