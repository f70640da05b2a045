"""Clustered gradients of several classes, with their kernels and targets, as tests need them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tests.estimators.problems import generator


@dataclass(frozen=True)
class Problem:
    """Gradients, kernels ``(C, m, m)``, targets ``(m, C)`` and planted clusters."""

    features: Tensor  # (C, m, P)
    kernels: Tensor
    targets: Tensor
    clusters: Tensor


def clustered(
    size: int = 40, classes: int = 3, clusters: int = 4, spread: float = 1.0, seed: int = 0, dim: int = 25
) -> Problem:
    draw = generator(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw, dtype=torch.float64)

    labels = torch.arange(size) % clusters
    base = 2 * normal(clusters, dim)[labels] + spread * normal(size, dim)
    scales = torch.rand(classes, 1, dim, generator=draw, dtype=torch.float64)
    features = base * scales
    weights = normal(classes, dim, 1) / dim**0.5
    return Problem(features, features @ features.mT, (features @ weights).squeeze(-1).mT, labels)
