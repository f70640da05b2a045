"""Random orthonormal frames of output combinations, one a sample, and the moments of their projections.

Notation: V is O x m with orthonormal columns, uniformly distributed, P = V Vᵀ, B symmetric, W = Vᵀ B V. The
frame may have been drawn in several blocks of columns, orthogonal to each other, of which only the diagonal
blocks of W are known.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["FrameMoments", "extend_frames", "projection_moments"]


def extend_frames(frames: Tensor, columns: int, generator: torch.Generator) -> Tensor:
    """Draw more columns for every frame, uniform on what is orthogonal to those that it has.

    Args:
        frames: ``(N, O, m)`` orthonormal columns, float64, on the CPU.
        columns: Number k of columns to draw, at most O - m.
        generator: CPU generator, advanced by the draw.

    Returns:
        ``(N, O, k)``, orthonormal, float64.
    """
    count, outputs = frames.shape[:2]
    fresh = torch.randn((count, outputs, columns), generator=generator, dtype=torch.float64)
    if frames.shape[-1]:
        for _ in range(2):  # cancellation leaves a rest
            fresh = fresh - frames @ (frames.mT @ fresh)
            fresh = torch.linalg.qr(fresh)[0]
        return fresh
    if columns == 1:
        return fresh / torch.linalg.vector_norm(fresh, dim=1, keepdim=True)
    return torch.linalg.qr(fresh)[0]


def projection_moments(outputs: int, columns: int) -> tuple[float, float]:
    r"""Return the two coefficients of the second moments of P.

    .. math:: E[P_{ij} P_{kl}] = A\,\delta_{ij}\delta_{kl}
              + B\,(\delta_{ik}\delta_{jl} + \delta_{il}\delta_{jk}).

    They follow from :math:`\mathrm{tr}\,P = \mathrm{tr}\,P^2 = m`: the orthogonal Weingarten formula of order
    two (Collins and Śniady 2006).

    Args:
        outputs: Dimension O.
        columns: Rank m of the projection.

    Returns:
        A and B.
    """
    if outputs == 1:
        return 1.0, 0.0
    pairs = columns * (outputs - columns) / (outputs * (outputs + 2) * (outputs - 1))
    return (columns / outputs) ** 2 - 2 * pairs / outputs, pairs


@dataclass(frozen=True)
class FrameMoments:
    r"""Moments of a frame of m columns in blocks, for symmetric B.

    With :math:`a = \sum_b |W_{bb}|_F^2` over the blocks and :math:`t = \mathrm{tr}\,W`,

    .. math:: E\,t = \tfrac{m}{O} \mathrm{tr}\,B, \qquad
              E\,a = \alpha\,\mathrm{tr}\,B^2 + \beta\,(\mathrm{tr}\,B)^2, \qquad
              E\,t^2 = \gamma\,\mathrm{tr}\,B^2 + \delta\,(\mathrm{tr}\,B)^2,

    and likewise for the bilinear forms of two matrices.

    Attributes:
        outputs: Dimension O.
        blocks: Columns of each block.
    """

    outputs: int
    blocks: tuple[int, ...]

    @property
    def columns(self) -> int:
        """Number m of columns."""
        return sum(self.blocks)

    @property
    def scale(self) -> float:
        """Factor O / m from the trace in the frame to the trace."""
        return self.outputs / self.columns

    @property
    def rest(self) -> float:
        """Share of the directions that the frame leaves out."""
        return 1 - self.columns / self.outputs

    @property
    def can_square(self) -> bool:
        """Whether tr B² can be told from (tr B)²."""
        return self.columns > 1 or self.outputs == 1

    def _of_blocks(self) -> tuple[float, float]:
        pairs = [projection_moments(self.outputs, size) for size in self.blocks]
        return sum(a + b for a, b in pairs), sum(b for _, b in pairs)

    def inner(self, products: Tensor, traces: Tensor) -> Tensor:
        """Return the unbiased estimate of tr(B₁ B₂), an inner product of the blocks of W₁ and W₂.

        Args:
            products: Sum over the blocks of the Frobenius inner products of W₁ and W₂.
            traces: tr W₁ · tr W₂.

        Returns:
            The estimate, in the shape of the arguments.
        """
        alpha, beta = self._of_blocks()
        delta, half_gamma = projection_moments(self.outputs, self.columns)
        return (delta * products - beta * traces) / (alpha * delta - 2 * beta * half_gamma)

    def matrix(self) -> tuple[float, float]:
        """Return x and y with E[x Σ_b P_b B P_b - y tr(W) I] = B."""
        alpha, beta = self._of_blocks()
        return 1 / alpha, beta * self.scale / alpha

    def variance(self, spread: Tensor, least_rest: float = 0.0) -> Tensor:
        """Return the unbiased estimate of the variance of tr W.

        It hangs on the part of B without trace alone, and vanishes for the full frame.

        Args:
            spread: Sum over the blocks of |W_bb - tr(W) / m I|².
            least_rest: What the share of directions left out is counted as at least.

        Returns:
            The estimate, never negative.
        """
        if self.outputs == 1:
            return torch.zeros_like(spread)
        alpha, _ = self._of_blocks()
        gamma = 2 * projection_moments(self.outputs, self.columns)[1]
        counted = gamma
        if self.rest < least_rest:
            counted = 2 * self.columns * least_rest / ((self.outputs + 2) * (self.outputs - 1))
        return spread * (counted / (alpha - gamma / self.columns))
