"""Small class kernels with features known, and the dense formulas that they are held against."""

from __future__ import annotations

import torch
from torch import Tensor

from ntkops.engines import report_passes
from ntkops.operators.capabilities import Capabilities
from tests.estimators.problems import OnlyProducts

CLASSES, POINTS, FEATURES = 4, 40, 60


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def features(dtype=torch.float64, seed: int = 0, points: int = POINTS) -> Tensor:
    """Return Φ^c, (C, m, P), with a decaying spectrum and a part that classes share."""
    drawn = torch.randn(CLASSES + 1, points, FEATURES, generator=generator(seed), dtype=torch.float64)
    decay = 0.85 ** torch.arange(FEATURES, dtype=torch.float64)
    return ((drawn[:1] + 0.7 * drawn[1:]) * decay).to(dtype)


def kernels(dtype=torch.float64, seed: int = 0, points: int = POINTS) -> Tensor:
    wide = features(torch.float64, seed, points)
    return (wide @ wide.mT).to(dtype)


def labels(dtype=torch.float64, seed: int = 5, points: int = POINTS) -> Tensor:
    return torch.randn(points, CLASSES, generator=generator(seed), dtype=torch.float64).to(dtype)


def coefficients(size: int = 6, dtype=torch.float64, seed: int = 9, points: int = POINTS) -> Tensor:
    return torch.randn(points, size, generator=generator(seed), dtype=torch.float64).to(dtype)


class Forbidden(OnlyProducts, Capabilities):
    """Class kernels that multiply, know their diagonal, and may never be dense."""

    max_dense_bytes = 0

    def _matmul(self, rhs: Tensor) -> Tensor:
        report_passes(products=rhs.shape[-1])
        return super()._matmul(rhs)

    symmetric = True

    def _diagonal(self) -> Tensor:
        return self.matrix.diagonal(dim1=-2, dim2=-1)

    def tiles(self, size=None):
        raise AssertionError("made dense")

    def exact_cost(self, quantity: str) -> float:
        return float("inf") if quantity == "tiles" else 0.0

    def _transpose_nonbatch(self) -> Forbidden:
        return self

    def __getitem__(self, index):
        return Forbidden(self.matrix[index], self.columns)

    def _getitem(self, *index):
        rows, columns, *batch = index
        return Forbidden(self.matrix[(*batch, rows, slice(None))][..., columns], self.columns)


def full_predictions(K: Tensor, Y: Tensor, ridge: float, K_cross: Tensor) -> Tensor:
    """Return K_* (K + r)⁻¹ Y for each class; r relative to the mean diagonal."""
    r = ridge * K.diagonal(dim1=-2, dim2=-1).mean()
    duals = torch.linalg.solve(K + r * torch.eye(K.shape[-1], dtype=K.dtype), Y.mT.unsqueeze(-1))
    return (K_cross @ duals).squeeze(-1).mT


def objective(K: Tensor, Y: Tensor, duals: Tensor, ridge: float) -> float:
    """Return Σ_c |y - K α|² + r αᵀ K α; r relative to the mean diagonal."""
    r = ridge * K.diagonal(dim1=-2, dim2=-1).mean()
    alpha = duals.mT.unsqueeze(-1)
    images = K @ alpha
    return float((Y.mT.unsqueeze(-1) - images).square().sum() + r * (alpha * images).sum())


def stacked_coverage(K: Tensor, U: Tensor) -> float:
    """Return |Φ V Vᵀ|² / |Φ|² of the stacked features, V the row span of Uᵀ Φ."""
    mean = K.mean(0)
    images = mean @ U
    return float(
        (torch.linalg.pinv(U.mT @ images, hermitian=True) @ (images.mT @ images)).trace() / mean.trace()
    )
