"""The density of a spectrum, with its errors."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["SpectralDensity"]

_BLOCK = 2**22  # entries of points times nodes that are held at a time


@dataclass(frozen=True, eq=False)
class SpectralDensity:
    r"""The smoothed density of the eigenvalues of an operator, and their cumulative distribution.

    Each of p random directions gives a quadrature rule of m nodes; all eigenvalues together have mass 1. The
    density at x is the mean of the rules smoothed with a Gaussian of standard deviation ``bandwidth``: what
    is estimated, and what the band is for, is the density of the eigenvalues smoothed in the same way.
    On the logarithmic scale x stands for log10 λ, and eigenvalues up to ``cutoff`` have no place in the
    density, while the cumulative distribution counts them.

    Attributes:
        nodes: ``(p, m)`` nodes, float64; ``(1, n)`` eigenvalues where the result is exact.
        weights: ``(p, m)`` weights; each row sums to 1.
        size: Number n of eigenvalues.
        grid: ``(g,)`` values of λ at which the following are given, ascending.
        values: ``(g,)`` the density: per unit of λ, or per decade on the logarithmic scale.
        band: 95 % interval (low, high) of the probes' error, ``(g,)`` each, for every point by itself: at a
            point chosen in advance it contains the smoothed density of the rules' exact mean with
            probability 0.95 or more. The whole curve lies in it less often.
        quadrature_error: ``(g,)`` bound for what m steps leave open, at the directions drawn, by the
            Chebyshev-Markov-Stieltjes inequalities; usually far above the true error.
        cumulative: ``(g,)`` share of the eigenvalues at or below each point.
        cumulative_band: 95 % interval (low, high) of the probes' error of that share.
        cumulative_error: ``(g,)`` bound for the quadrature's error of that share.
        bandwidth: Standard deviation of the smoothing, in λ or in decades.
        scale: "linear" or "log".
        cutoff: Eigenvalues up to this count as zero, being of the size of rounding.
        method: "exact" or "slq".
        exact: Whether the nodes are all eigenvalues.
        passes: Passes made.
        converged: False if the passes were spent before the tolerance was met.
        seed: Seed of the directions; None if nothing was drawn.
        seconds: Wall-clock time.
    """

    nodes: Tensor
    weights: Tensor
    size: int
    grid: Tensor
    values: Tensor
    band: tuple[Tensor, Tensor]
    quadrature_error: Tensor
    cumulative: Tensor
    cumulative_band: tuple[Tensor, Tensor]
    cumulative_error: Tensor
    bandwidth: float
    scale: str
    cutoff: float
    method: str
    exact: bool
    passes: int
    converged: bool = True
    seed: int | None = None
    seconds: float = 0.0

    def __repr__(self) -> str:
        """Return one line, without the curves."""
        rules, steps = self.nodes.shape
        made = f"{steps} eigenvalues" if self.exact else f"{rules} directions of {steps} nodes"
        state = "" if self.converged else ", not converged"
        return (
            f"SpectralDensity(n={self.size}, {self.scale}, {self.method!r}, {made}, "
            f"bandwidth={self.bandwidth:.3g}, {self.passes} passes{state})"
        )

    def density(self, grid: Tensor) -> Tensor:
        """Return the smoothed density at any values of λ.

        Args:
            grid: ``(g,)``; positive on the logarithmic scale.

        Returns:
            ``(g,)`` in float64.
        """
        return smoothed(self.nodes, self.weights, grid, self.bandwidth, self.scale, self.cutoff)[0].mean(0)

    def cdf(self, grid: Tensor) -> Tensor:
        """Return the share of the eigenvalues at or below any values of λ, without smoothing.

        Args:
            grid: ``(g,)``.

        Returns:
            ``(g,)`` in float64.
        """
        return shares(self.nodes, self.weights, grid).mean(0)


def smoothed(
    nodes: Tensor, weights: Tensor, grid: Tensor, bandwidth: float, scale: str, cutoff: float
) -> tuple[Tensor, Tensor]:
    """Return the mean of the smoothing Gaussian and of its square under each rule, both ``(p, g)``."""
    grid = grid.to(nodes)
    if scale == "log":
        weights = torch.where(nodes > cutoff, weights, 0.0)
        nodes = nodes.clamp(min=cutoff if cutoff > 0 else torch.finfo(torch.float64).tiny).log10()
        grid = grid.log10()
    height = 1 / (bandwidth * math.sqrt(2 * math.pi))
    first, second = [], []
    for points in grid.split(max(1, _BLOCK // nodes.numel())):
        distance = (points.unsqueeze(-1) - nodes.unsqueeze(-2)) / bandwidth  # (p, g, m)
        kernel = height * torch.exp(-distance.square() / 2)
        first.append((kernel * weights.unsqueeze(-2)).sum(-1))
        second.append((kernel.square() * weights.unsqueeze(-2)).sum(-1))
    return torch.cat(first, dim=-1), torch.cat(second, dim=-1)


def shares(nodes: Tensor, weights: Tensor, grid: Tensor) -> Tensor:
    """Return the weight of the nodes at or below each point, ``(p, g)``."""
    order = nodes.argsort(dim=-1)
    sums = torch.nn.functional.pad(weights.gather(-1, order).cumsum(-1), (1, 0))
    points = grid.to(nodes).expand(len(nodes), -1).contiguous()
    places = torch.searchsorted(nodes.gather(-1, order).contiguous(), points, right=True)
    return (sums / sums[:, -1:]).gather(-1, places)
