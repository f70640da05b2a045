"""What each way of solving leaves behind: coefficients, an info, and how to predict from them."""

from __future__ import annotations

import time
import warnings
from typing import Protocol

import torch
from torch import Tensor

from ..errors import NotConvergedWarning, SingularKernelError
from ..operators.counting import multiply
from ..operators.rounding import symmetric
from ..operators.structure import structure
from ..results import SolveInfo
from ._evidence import Evidence
from ._factorizations import CholeskyFactor, Factorization, SpectralFactor
from ._operands import Kernel, dense_rows, to_float64
from ._rounding import precise_product

__all__ = [
    "DenseFit",
    "FeatureFit",
    "Fit",
    "NystromFit",
    "Prediction",
    "left_out",
    "relative_residuals",
    "solve_info",
]

Prediction = tuple[Tensor, Tensor]


class Fit(Protocol):
    """A solved regression.

    Attributes:
        dual: ``(*batch, n, k)`` coefficients α of f(x) = Σ α_i K(x, x_i), float64.
        info: How they were found.
    """

    dual: Tensor
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
    solved, info = torch.linalg.solve_ex(blocks, samples)
    if bool((info > 0).any()):
        raise SingularKernelError(
            "a sample determines its own fit alone, so that nothing predicts it when it is left out: "
            "pass a larger "
            "ridge"
        )
    return solved.flatten(-3, -2)


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
        # For features α has a part that no sample sees; what predicts is the other, which does not cancel.
        self._active = factor.within(rhs)

    def predict(self, K_cross: Kernel) -> Prediction:
        return precise_product(K_cross, self._active)

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


class FeatureFit(DenseFit):
    """A fit in the space of the features: K = F Fᵀ, f(x) = φ(x)ᵀ w.

    Args:
        factor: Thin factor of F Fᵀ.
        features: ``(*batch, n, p)`` F, float64.
        rhs: ``(*batch, n, k)`` right-hand sides, float64.
        info: How it was found.
    """

    def __init__(self, factor: SpectralFactor, features: Tensor, rhs: Tensor, info: SolveInfo) -> None:
        super().__init__(factor, rhs, info)
        self._features = features
        self._spectrum = factor
        self.weights = features.mT @ self._active  # (*batch, p, k)

    def predict(self, K_cross: Kernel) -> Prediction:
        """Return φ(x*)ᵀ w where the cross kernel has these features, else K_* α.

        The weights are at most |y| / (2 √ridge), the dual coefficients |y| / ridge: products with the weights
        lose half as many digits.
        """
        factors = None if isinstance(K_cross, Tensor) else structure(K_cross).factors()
        if factors is None or factors[1].shape[-1] != self.weights.shape[-2]:
            return super().predict(K_cross)
        left, right = factors
        # Whether they are the same features is tried on a random vector. The weights are no such trial:
        # those of nearly the same features are nearly the same, and predict what another kernel does.
        trial = torch.randn(self._features.shape[-2], 1, generator=torch.Generator().manual_seed(0))
        trial = trial.to(right.device, right.dtype).expand(*right.shape[:-2], -1, 1)
        pulled, expected = multiply(right.mT, trial).double(), self._features.mT @ trial.double()
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
        weights = self._right @ (singular * factor.inverse.unsqueeze(-1) * (factor.vectors.mT @ rhs))
        self._coefficients = whitening @ weights  # (*batch, m, k)
        self.dual = torch.zeros_like(rhs).index_copy(-2, chosen, self._coefficients)

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


def _columns(K_cross: Kernel, chosen: Tensor) -> Kernel:
    return K_cross[..., chosen] if isinstance(K_cross, Tensor) else K_cross[..., :, chosen]
