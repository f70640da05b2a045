"""The evidence of a ridge: how likely labels are under the Gaussian process s² (K + r), s² profiled out."""

from __future__ import annotations

import math
import numbers
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import InputError, SingularKernelError
from ..operators.rounding import eigenvalue_rounding
from ._factorizations import SpectralFactor

__all__ = ["Evidence", "log_evidence", "read_positive", "require_energy"]


@dataclass(frozen=True, eq=False)
class Evidence:
    """What the evidence of any ridge needs: eigenvalues, and the labels' squares along eigenvectors.

    Attributes:
        values: ``(*batch, r)`` eigenvalues of K, float64.
        energy: ``(*batch, r)`` squares of the labels along their eigenvectors, summed over targets.
        rest: Squares of the labels where K is zero, over batch and targets.
        missing: Directions in which K is zero, for one kernel.
        targets: Targets that share a kernel.
        rounding: Least ridge that means something beside the rounding of K.
    """

    values: Tensor
    energy: Tensor
    rest: Tensor
    missing: int
    targets: int
    rounding: float

    @classmethod
    def of(cls, factor: SpectralFactor, rhs: Tensor, dtype: torch.dtype) -> Evidence:
        """Return it from all eigenpairs that K has; ``dtype`` is that in which K was computed."""
        components = factor.components(rhs)
        size, rank = factor.size, factor.values.shape[-1]
        complete = factor.rest == "none"
        # Where features vanish their singular vectors mean nothing: K is zero there, as outside the span.
        kept = factor.kept
        components = torch.where(kept.unsqueeze(-1), components, 0.0)
        outside = torch.zeros_like(rhs) if complete else rhs - factor.combined(components)
        least, largest = factor.values.amin(-1), factor.values.amax(-1)
        rounding = eigenvalue_rounding(largest, dtype, size)
        return cls(
            values=torch.where(kept, factor.values, 0.0),
            energy=components.square().sum(-1),
            rest=outside.square().sum(),
            missing=0 if complete else size - rank,
            targets=rhs.shape[-1],
            # What rounding has pushed below zero is made good first; as in `require_resolved`.
            rounding=float((rounding - least.clamp(max=0)).max()),
        )

    @property
    def count(self) -> int:
        """Labels in all."""
        return (self.values.shape[-1] + self.missing) * self.values.shape[:-1].numel() * self.targets

    def __call__(self, ridge: Tensor) -> Tensor:
        """Return the log evidence of a ridge, ``()``, differentiable in it."""
        quadratic = (self.energy / (self.values + ridge)).sum() + self.rest / ridge
        logs = (self.values + ridge).log().sum() + self.missing * self.values.shape[:-1].numel() * ridge.log()
        return log_evidence(quadratic, self.targets * logs, self.count)

    def require_resolved(self, ridge: Tensor) -> None:
        """Raise where a ridge is lost in the rounding of K.

        Raises:
            SingularKernelError: With the least one that means something.
        """
        given = float(ridge.detach())
        if not given > self.rounding:
            raise SingularKernelError(
                f"the ridge {given:.2g} is below the rounding of this kernel: the smallest ridge that means "
                f"something here is {self.rounding:.2g}; pass one well above it"
            )

    def path(self, top: float) -> tuple[Tensor, Tensor]:
        """Return ridges from the least that means something to a top, and the log evidence of each.

        The grid has half a decade; a search between the neighbours of its best adds one ridge more.
        """
        from scipy.optimize import minimize_scalar

        low = 1.01 * self.rounding  # "above", as the rule of all methods asks
        count = max(math.ceil(2 * math.log10(top / low)), 1) + 1
        exponents = torch.linspace(math.log(low), math.log(top), count, dtype=torch.float64)
        ridges = exponents.exp()
        values = torch.stack([self(ridge) for ridge in ridges])
        best = int(values.argmax())
        if 0 < best < count - 1:
            found = minimize_scalar(
                lambda x: -float(self(torch.tensor(x, dtype=torch.float64).exp())),
                bounds=(float(exponents[best - 1]), float(exponents[best + 1])),
                method="bounded",
                options={"xatol": 1e-6},
            )
            ridges = torch.cat([ridges, torch.tensor([math.exp(found.x)], dtype=torch.float64)])
            values = torch.cat([values, torch.tensor([-found.fun], dtype=torch.float64)])
            ridges, order = ridges.sort()
            values = values[order]
        return ridges, values


def log_evidence(quadratic: Tensor, logdet: Tensor, count: int) -> Tensor:
    """Return log N(y; 0, s² (K + r)) at the best s² = yᵀ (K + r)⁻¹ y / n, for n labels in all."""
    return -(count * (quadratic / count).log() + logdet + count * (1 + math.log(2 * math.pi))) / 2


def read_positive(given: Any, name: str) -> Tensor:
    """Return a positive number as a tensor ``()``, float64, in its graph.

    Raises:
        InputError: If it is none.
    """
    good = isinstance(given, numbers.Real) and not isinstance(given, bool)
    good = good or isinstance(given, Tensor) and given.numel() == 1 and given.dtype.is_floating_point
    value = torch.as_tensor(given, dtype=torch.float64).reshape(()) if good else None
    if value is None or not (value > 0 and torch.isfinite(value)):
        raise InputError(f"{name}={given!r}: pass a finite number above 0")
    return value


def require_energy(rhs: Tensor) -> None:
    """Raise where there is nothing to explain, or no scale that does.

    Raises:
        InputError: If all labels equal the offset, so that the scale that explains them is zero, or their
            squares leave the range of float64.
    """
    energy, limits = float(rhs.square().sum()), torch.finfo(torch.float64)
    if bool(rhs.any()) and not limits.tiny / limits.eps < energy < limits.max * limits.eps:
        raise InputError(
            f"the sum of the labels' squares, {energy:.3g}, leaves the range of float64: scale the labels, "
            "which changes no ridge"
        )
    if not bool(rhs.any()):
        raise InputError(
            "every label equals the offset: the scale that explains them is zero, and their likelihood is "
            "infinite at any ridge; pass labels that differ from what the regression is added to"
        )
