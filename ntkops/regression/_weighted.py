r"""Regressions whose samples count differently: a ridge r / wᵢ for each.

(K + r W⁻¹) α = Y is, with S = √W and α = S β, the symmetric (S K S + r) β = S Y: a regression on the kernel
S K S with the labels S Y. Everything that is known of one is known of the other.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from linear_operator.operators import DiagLinearOperator
from torch import Tensor

from ..errors import DtypeError, InputError, NonFiniteError, ShapeError, UnsupportedOperationError
from ..operators import Sandwich, sandwich
from ..results import SolveInfo
from ._evidence import Evidence
from ._fits import FeatureFit, Fit, LeftOut, Prediction
from ._operands import Kernel, Layout, is_spread, read_array
from ._rounding import precise_product
from ._routes import Problem

__all__ = ["WeightedFit", "read_weights", "weighted"]


def read_weights(given: Any, layout: Layout, K: Kernel, samples: int) -> Tensor:
    """Return the square roots of the weights for each row of a kernel, ``(n,)`` in float64.

    They are rounded to the kernel's dtype, so that S K S and α = S β have the same S.

    Raises:
        InputError: If they are no numbers, or one is not positive or out of the range of the kernel's dtype.
        DtypeError: If an array holds what is no number, or they are complex.
        ShapeError: If they are not one a sample.
        NonFiniteError: If one is NaN or infinite.
        UnsupportedOperationError: If the rows of the kernel lie on several processes.
    """
    if is_spread(K):
        raise UnsupportedOperationError("sample_weight takes a kernel whose rows lie on one process")
    found = given.detach() if isinstance(given, Tensor) else read_array(given, "sample_weight")
    if found.is_complex():
        raise DtypeError(f"sample_weight has dtype {found.dtype}; pass real numbers, such as .real")
    weights = found.double()
    if tuple(weights.shape) != (samples,):
        raise ShapeError(f"sample_weight has shape {tuple(weights.shape)}, due is ({samples},): one a sample")
    if not bool(torch.isfinite(weights).all()):
        raise NonFiniteError("sample_weight holds NaN or infinity")
    if not bool((weights > 0).all()):
        where = int((weights <= 0).nonzero()[0])
        raise InputError(
            f"sample_weight is zero or less at sample {where}, and its ridge is r / weight: leave a "
            "sample that does not count out of kernel and labels"
        )
    low, high = torch.finfo(K.dtype).tiny, torch.finfo(K.dtype).max
    if not bool(((weights >= low) & (weights <= high)).all()):
        where = int(((weights < low) | (weights > high)).nonzero()[0])
        raise InputError(
            f"sample_weight is {float(weights[where]):.3g} at sample {where}, beyond what a {K.dtype} kernel "
            "can be multiplied with: leave such a sample out, or scale the weights"
        )
    roots = weights.sqrt().to(K.dtype).double().to(K.device)
    return roots.repeat_interleave(layout.group)


def weighted(problem: Problem, roots: Tensor) -> Problem:
    """Return the regression on S K S and S Y."""
    K, small = problem.K, roots.to(problem.K.dtype)
    if isinstance(K, Tensor):
        kernel: Kernel = small.unsqueeze(-1) * K * small
    else:
        kernel = sandwich(DiagLinearOperator(small.expand(*K.shape[:-2], -1)), K)
    return dataclasses.replace(problem, K=kernel, rhs=roots.unsqueeze(-1) * problem.rhs)


class WeightedFit:
    """A fit on S K S, as one on K.

    Args:
        inner: The fit.
        roots: ``(n,)`` S, float64.
    """

    def __init__(self, inner: Fit, roots: Tensor) -> None:
        self._inner, self._roots = inner, roots.unsqueeze(-1)
        self.dual, self.active = self._roots * inner.dual, self._roots * inner.active
        self.info: SolveInfo = inner.info

    def predict(self, K_cross: Kernel) -> Prediction:
        if isinstance(self._inner, FeatureFit):
            return self._inner.predict(self._scaled(K_cross))
        return precise_product(K_cross, self.active)

    def explained(self, K_cross: Kernel, start: int, stop: int) -> Tensor:
        return self._inner.explained(self._scaled(K_cross), start, stop)

    def explain(self, pulled: Tensor) -> Tensor:
        return self._roots * self._inner.explain(self._roots * pulled)

    def left_out(self, group: int) -> Tensor:
        return self._inner.left_out(group) / self._roots

    def without(self, rows: Tensor) -> LeftOut:
        found = self._inner.without(rows)
        dual, active = self._roots * found.dual, self._roots * found.active
        return LeftOut(found.residuals / self._roots[rows], dual, active, found.rounding)

    def energy(self) -> float:
        return self._inner.energy()

    def evidence(self, K: Kernel) -> Evidence | None:
        return self._inner.evidence(K)

    def _scaled(self, K_cross: Kernel) -> Kernel:
        """Return K_* S."""
        roots = self._roots.squeeze(-1).to(K_cross.dtype)
        if isinstance(K_cross, Tensor):
            return K_cross * roots
        return Sandwich(K_cross, DiagLinearOperator(roots.expand(*K_cross.shape[:-2], -1)))
