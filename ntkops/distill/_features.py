"""Features of a kernel that stand in for its dense matrix: n k numbers, and O(n k²) operations."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from linear_operator.operators import DenseLinearOperator, LinearOperator
from torch import Tensor

from ..errors import NonFiniteError
from ..operators.capabilities import capabilities
from ..operators.projected import FeatureOperator
from ..projections import SJLT
from ._kernels import has_room
from .class_mean import class_shares

__all__ = ["COPIES", "KernelFeatures", "narrow_features"]

COPIES = 6  # float64 matrices that an eigendecomposition and what follows hold: input, work, vectors
_ROWS = 2**12  # that are in float64 beside the result at a time


@dataclass(frozen=True, eq=False)
class KernelFeatures:
    """Features F of a kernel, or of the mean of several.

    Attributes:
        rows: ``(n, k)`` F, float64, with K = F Fᵀ, or K ≈ F Fᵀ after a second projection.
        second: Whether there was one.
    """

    rows: Tensor
    second: bool

    def diagonal(self) -> Tensor:
        """Return the diagonal of F Fᵀ, ``(n,)``."""
        return torch.linalg.vector_norm(self.rows, dim=-1).square()


def narrow_features(
    kernels: LinearOperator, class_weight: str | None, generator: torch.Generator
) -> KernelFeatures | None:
    r"""Return the features of a kernel whose dense matrix has no room, None where it has or knows none.

    The features of the mean of C kernels stand side by side, C k numbers wide. A second random projection Q,
    isometric in expectation, brings them back to k: :math:`\sum_c \sqrt{w_c}\, F^c Q_c^\top`.

    Args:
        kernels: ``(n, n)`` or ``(C, n, n)``.
        class_weight: As for `class_mean`.
        generator: Source of Q.

    Raises:
        NonFiniteError: If a feature is not finite.
    """
    matrix = kernels if kernels.dim() == 2 else kernels[0]
    if has_room(matrix, COPIES):
        return None
    known = capabilities(kernels)
    factors = known.factors() if known.symmetric else None
    if factors is None or not isinstance(factors[0], FeatureOperator | DenseLinearOperator):
        return None
    size, width = factors[0].shape[-2:]
    if width >= size:
        return None
    with torch.no_grad():
        features = factors[0].to_dense()
    classes = features if features.dim() == 3 else features.unsqueeze(0)
    shares, second = torch.ones(1), None
    if kernels.dim() == 3:
        shares = class_shares(kernels, class_weight).double()
    if len(classes) > 1:
        seed = int(torch.randint(2**31 - 1, (), generator=generator))
        second = SJLT(dim=len(classes) * width, k=width, nonzeros=min(4, width), seed=seed)
    rows = torch.zeros((size, width), dtype=torch.float64, device=features.device)
    for number, one in enumerate(classes):
        for start in range(0, size, _ROWS):
            part = one[start : start + _ROWS].double()
            image = part if second is None else second.apply(part, number * width)
            rows[start : start + _ROWS] += shares[number].sqrt() * image
    if not bool(torch.isfinite(rows).all()):
        row = int((~torch.isfinite(rows)).nonzero()[0, 0])
        raise NonFiniteError(f"the features of sample {row} are NaN or infinite: drop that sample")
    return KernelFeatures(rows, second is not None)
