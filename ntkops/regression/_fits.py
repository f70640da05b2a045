"""What each way of solving leaves behind: coefficients, an info, and how to predict from them."""

from __future__ import annotations

import time
import warnings
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ..errors import NotConvergedWarning, SingularKernelError
from ..operators.capabilities import capabilities, multiply
from ..operators.rounding import symmetric
from ..results import SolveInfo
from ._evidence import Evidence
from ._factorizations import CholeskyFactor, Factorization, SpectralFactor
from ._operands import Kernel, dense_rows, to_float64
from ._rounding import precise_product
from ._tall_features import TallFeatures

__all__ = [
    "DenseFit",
    "FeatureFit",
    "Fit",
    "LeftOut",
    "NystromFit",
    "Prediction",
    "left_out",
    "relative_residuals",
    "solve_block",
    "solve_info",
    "unit_columns",
]

Prediction = tuple[Tensor, Tensor]


@dataclass(frozen=True, eq=False)
class LeftOut:
    """A fit without some of its rows S.

    Attributes:
        residuals: ``(*batch, s, k)`` labels minus predictions at S.
        dual: ``(*batch, n, k)`` coefficients, as `Fit.dual`.
        active: As `Fit.active`.
        rounding: What rounding may have added, relative to the residuals.
    """

    residuals: Tensor
    dual: Tensor
    active: Tensor
    rounding: float


class Fit(Protocol):
    """A solved regression.

    Attributes:
        dual: ``(*batch, n, k)`` coefficients α of f(x) = Σ α_i K(x, x_i), float64.
        active: The part of α that predicts, float64; features do not see the rest.
        info: How they were found.
    """

    dual: Tensor
    active: Tensor
    info: SolveInfo

    def predict(self, K_cross: Kernel) -> Prediction:
        """Return K_* α, ``(*batch, m, k)``, and lengths ``(*batch, k)`` of what rounding added."""

    def explained(self, K_cross: Kernel, start: int, stop: int) -> Tensor:
        """Return the prior variance that the samples explain, for some rows: ``(*batch, stop - start)``."""

    def explain(self, pulled: Tensor) -> Tensor:
        """Return A⁻¹ V for V = Cᵀ W: what C is multiplied by for the covariance that is explained."""

    def left_out(self, group: int) -> Tensor:
        """Return the residual of each sample when it is left out, ``(*batch, n, k)``."""

    def energy(self) -> float:
        """Return yᵀ (K + r)⁻¹ y, summed over batch and targets."""

    def evidence(self, K: Kernel) -> Evidence | None:
        """Return what the evidence of any ridge needs; None where eigenvalues are out of reach."""

    def without(self, rows: Tensor) -> LeftOut:
        """Return the fit without some rows, ``(s,)`` positions."""


def left_out(factor: Factorization, rhs: Tensor, group: int) -> Tensor:
    """Return leave-one-out residuals in closed form: [M_SS]⁻¹ [M y]_S for the rows S of each sample.

    Raises:
        SingularKernelError: If the fit interpolates a sample whatever its label.
    """
    remainder = factor.remainder(rhs)
    blocks = factor.remainder_blocks(group)  # (*batch, N, g, g)
    if group == 1:
        weights = blocks[..., 0, 0].unsqueeze(-1)
        if not bool((weights > 0).all()):
            raise SingularKernelError(
                "a sample determines its own fit alone, so that nothing predicts it when it is left "
                "out: pass a "
                "larger ridge"
            )
        return remainder / weights
    samples = remainder.unflatten(-2, (blocks.shape[-3], group))
    return solve_block(blocks, samples).flatten(-3, -2)


def solve_block(block: Tensor, residuals: Tensor) -> Tensor:
    """Return [M_SS]⁻¹ [M y]_S: what rows S are off by when they are left out together.

    Raises:
        SingularKernelError: If the fit interpolates them whatever their labels.
    """
    solved, info = torch.linalg.solve_ex(block, residuals)
    if bool((info > 0).any()):
        raise SingularKernelError(
            "a sample determines its own fit alone, so that nothing predicts it when it is left out: pass a "
            "larger ridge"
        )
    return solved


def unit_columns(rows: Tensor, like: Tensor) -> Tensor:
    """Return columns of the identity, ``(*batch, n, s)``, beside ``like``, ``(*batch, n, k)``."""
    unit = torch.zeros(like.shape[-2], len(rows), dtype=like.dtype, device=like.device)
    unit[rows, torch.arange(len(rows), device=like.device)] = 1
    return unit.expand(*like.shape[:-2], *unit.shape)


def _without(factor: Factorization, rhs: Tensor, rows: Tensor) -> tuple[Tensor, Tensor, float]:
    """Return the residuals of rows that are left out, the labels under which all rows say the same, rounding.

    A linear smoother that sees its own prediction f₋S instead of the labels y_S does not change: the fit to
    y - E_S (y_S - f₋S) is the one without S. Where S alone sees a direction, M_SS is as small there as the
    ridge, and M is rounded by eps |M|: a relative error of eps |M| / λmin(M_SS).
    """
    block = factor.remainder(unit_columns(rows, rhs))[..., rows, :]
    errors = solve_block(block, factor.remainder(rhs)[..., rows, :])
    least = torch.linalg.eigvalsh((block + block.mT) / 2).amin(-1)
    share = torch.finfo(torch.float64).eps * factor.remainder_norm / least
    rounding = float(torch.where(least > 0, share, torch.inf).max())
    return errors, rhs.index_add(-2, rows, errors, alpha=-1), rounding


def relative_residuals(rest: Tensor, rhs: Tensor) -> Tensor:
    """Return |rest| / |rhs| for each column, ``(*batch, k)``; 0 for a column of zeros."""
    norms = torch.linalg.vector_norm(rhs, dim=-2)
    ratio = torch.linalg.vector_norm(rest, dim=-2) / torch.where(norms > 0, norms, torch.ones_like(norms))
    return torch.where(norms > 0, ratio, torch.zeros_like(ratio))


def solve_info(
    method: str,
    residuals: Tensor,
    tol: float,
    started: float,
    *,
    products: int = 0,
    seed: int | None = None,
    aloud: bool = True,
) -> SolveInfo:
    """Return the info of a direct method.

    Warns:
        NotConvergedWarning: If rounding left a residual above the tolerance.
    """
    met = bool((residuals <= tol).all())
    if not met and aloud:
        warnings.warn(
            f"method={method!r} left a relative residual of {float(residuals.max()):.2g}, above {tol:.2g}: "
            "the labels ask for coefficients that float64 does not resolve with so small a ridge; raise it",
            NotConvergedWarning,
            stacklevel=5,
        )
    return SolveInfo(
        converged=met,
        residuals=residuals,
        tolerance=tol,
        iterations=0,
        products=products,
        reason="converged" if met else "stagnated",
        method=method,
        seed=seed,
        seconds=time.perf_counter() - started,
    )


class DenseFit:
    """A fit by a dense factorisation of K + ridge, or of the features of K.

    Args:
        factor: The factorisation.
        rhs: ``(*batch, n, k)`` right-hand sides, float64.
        info: How it was found, or None where `matrix` follows.
    """

    def __init__(self, factor: CholeskyFactor | SpectralFactor, rhs: Tensor, info: SolveInfo) -> None:
        self._factor, self._rhs, self.info = factor, rhs, info
        self.dual = factor.dual(rhs)
        self.active = self._active(rhs, self.dual)

    def _active(self, rhs: Tensor, dual: Tensor) -> Tensor:
        # For features α has a part that no sample sees; what predicts is the other, which does not cancel.
        return self._factor.within(rhs) if isinstance(self._factor, SpectralFactor) else dual

    def predict(self, K_cross: Kernel) -> Prediction:
        return precise_product(K_cross, self.active)

    def explained(self, K_cross: Kernel, start: int, stop: int) -> Tensor:
        return self._factor.quadratic(dense_rows(K_cross, start, stop))

    def explain(self, pulled: Tensor) -> Tensor:
        return self._factor.within(pulled)

    def left_out(self, group: int) -> Tensor:
        return left_out(self._factor, self._rhs, group)

    def energy(self) -> float:
        return self._factor.energy(self._rhs)

    def evidence(self, K: Kernel) -> Evidence | None:
        factor = self._factor
        if isinstance(factor, CholeskyFactor):  # for one ridge; others ask for all eigenvalues
            values, vectors = torch.linalg.eigh(symmetric(to_float64(K, "eigh")))
            factor = SpectralFactor(values, vectors, 1.0)
        return Evidence.of(factor, self._rhs, K.dtype)

    def without(self, rows: Tensor) -> LeftOut:
        factor = self._factor
        errors, labels, rounding = _without(factor, self._rhs, rows)
        dual = factor.dual(labels)
        if isinstance(factor, SpectralFactor) and factor.rest == "cut":  # its eigenvectors see all rows
            return LeftOut(errors, dual, dual, rounding)
        dual = dual.index_fill(-2, rows, 0.0)  # in exact arithmetic it is zero there
        return LeftOut(errors, dual, self._active(labels, dual), rounding)


class FeatureFit(DenseFit):
    """A fit in the space of the features: K = F Fᵀ, f(x) = φ(x)ᵀ w.

    Args:
        factor: Thin factor of F Fᵀ.
        features: ``(*batch, n, p)`` F.
        rhs: ``(*batch, n, k)`` right-hand sides, float64.
        info: How it was found.
    """

    def __init__(self, factor: SpectralFactor, features: TallFeatures, rhs: Tensor, info: SolveInfo) -> None:
        super().__init__(factor, rhs, info)
        self._features = features
        self._spectrum = factor
        self.weights = features.pull(self.active)  # (*batch, p, k)

    def predict(self, K_cross: Kernel) -> Prediction:
        """Return φ(x*)ᵀ w where the cross kernel has these features, else K_* α.

        The weights are at most |y| / (2 √ridge), the dual coefficients |y| / ridge: products with the weights
        lose half as many digits.
        """
        factors = None if isinstance(K_cross, Tensor) else capabilities(K_cross).factors()
        if factors is None or factors[1].shape[-1] != self.weights.shape[-2]:
            return super().predict(K_cross)
        left, right = factors
        # Whether they are the same features is tried on a random vector. The weights are no such trial:
        # those of nearly the same features are nearly the same, and predict what another kernel does.
        trial = torch.randn(self._features.shape[-2], 1, generator=torch.Generator().manual_seed(0))
        trial = trial.to(right.device, right.dtype).expand(*right.shape[:-2], -1, 1)
        pulled, expected = multiply(right.mT, trial).double(), self._features.pull(trial.double())
        if not bool((pulled - expected).norm() <= torch.finfo(right.dtype).eps ** 0.5 * expected.norm()):
            return super().predict(K_cross)
        return precise_product(left, self.weights)

    def evidence(self, K: Kernel) -> Evidence | None:
        return Evidence.of(self._spectrum, self._rhs, torch.float64)


class NystromFit:
    """A fit whose predictor is a combination of the kernel at some of the samples.

    Args:
        factor: Thin factor of the features F = K_XZ W.
        whitening: ``(*batch, m, r)`` W with W Wᵀ = K_ZZ⁺.
        features: ``(*batch, n, r)`` F.
        chosen: ``(m,)`` positions of Z among the n rows.
        rhs: ``(*batch, n, k)`` right-hand sides, float64.
        info: How it was found.
    """

    def __init__(
        self,
        factor: SpectralFactor,
        whitening: Tensor,
        features: Tensor,
        chosen: Tensor,
        rhs: Tensor,
        info: SolveInfo,
    ) -> None:
        self._factor, self._whitening, self._chosen, self._rhs = factor, whitening, chosen, rhs
        self.info = info
        seen = torch.where(factor.kept, factor.values, torch.ones_like(factor.values))
        singular = seen.sqrt().unsqueeze(-1)  # (*batch, r, 1)
        self._right = features.mT @ factor.vectors / singular.mT  # (*batch, r, r) right singular vectors
        self._shrunk = singular * factor.inverse.unsqueeze(-1)
        self._coefficients = self._solve(rhs)
        self.dual = self.active = self._scattered(self._coefficients)

    def _solve(self, rhs: Tensor) -> Tensor:
        """Return the coefficients of the inducing rows, ``(*batch, m, k)``."""
        return self._whitening @ (self._right @ (self._shrunk * (self._factor.vectors.mT @ rhs)))

    def _scattered(self, coefficients: Tensor) -> Tensor:
        return torch.zeros_like(self._rhs).index_copy(-2, self._chosen, coefficients)

    def predict(self, K_cross: Kernel) -> Prediction:
        return precise_product(_columns(K_cross, self._chosen), self._coefficients)

    def explained(self, K_cross: Kernel, start: int, stop: int) -> Tensor:
        rows = dense_rows(_columns(K_cross, self._chosen), start, stop) @ self._whitening  # (*batch, b, r)
        shrunk = self._factor.values * self._factor.inverse
        return ((rows @ self._right).square() @ shrunk.unsqueeze(-1)).squeeze(-1)

    def explain(self, pulled: Tensor) -> Tensor:
        half = self._whitening @ self._right  # (*batch, m, r)
        shrunk = (self._factor.values * self._factor.inverse).unsqueeze(-1)
        found = half @ (shrunk * (half.mT @ pulled[..., self._chosen, :]))
        return torch.zeros_like(pulled).index_copy(-2, self._chosen, found)

    def left_out(self, group: int) -> Tensor:
        return left_out(self._factor, self._rhs, group)

    def energy(self) -> float:
        return self._factor.energy(self._rhs)

    def evidence(self, K: Kernel) -> Evidence | None:
        return Evidence.of(self._factor, self._rhs, torch.float64)

    def without(self, rows: Tensor) -> LeftOut:
        errors, labels, rounding = _without(self._factor, self._rhs, rows)
        dual = self._scattered(self._solve(labels))
        return LeftOut(errors, dual, dual, rounding)


def _columns(K_cross: Kernel, chosen: Tensor) -> Kernel:
    return K_cross[..., chosen] if isinstance(K_cross, Tensor) else K_cross[..., :, chosen]
