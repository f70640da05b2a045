"""Eigenpairs, densities, redundancies and energies."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import EstimateError

__all__ = [
    "Eigenpairs",
    "EnergyGap",
    "Redundancy",
    "SpectralDensity",
    "TruncationRank",
]


@dataclass(frozen=True, eq=False)
class Eigenpairs:
    """Leading eigenpairs of a symmetric operator.

    Attributes:
        values: ``(*batch, k)`` eigenvalues from the wanted end inwards (largest first unless the smallest
            were asked for), float64. Small negative ones are reported, not clamped.
        vectors: ``(*batch, n, k)`` orthonormal eigenvectors in the operator's dtype.
        residuals: ``(*batch, k)`` true residual norms |K v - λ v|, recomputed at the end.
        converged: Whether every residual met the tolerance, and no hidden copy was found.
        passes: Passes made.
        method: "lanczos" or "dense".
        seed: Seed of the starting vector; None if none was drawn.
        seconds: Wall-clock time.
    """

    values: Tensor
    vectors: Tensor
    residuals: Tensor
    converged: bool
    passes: int
    method: str
    seed: int | None = None
    seconds: float = 0.0

    def __repr__(self) -> str:
        """Return one line: how many pairs, from which value to which, and how good."""
        count, size = self.values.shape[-1], self.vectors.shape[-2]
        batch = f" for {tuple(self.values.shape[:-1])} kernels" if self.values.dim() > 1 else ""
        shown = ""
        if count and self.values.numel():
            first, last = float(self.values[..., 0].max()), float(self.values[..., -1].min())
            worst = float(self.residuals.max())
            shown = f", values {first:.4g} to {last:.4g}, residuals up to {worst:.1g}"
        state = "" if self.converged else ", not converged"
        return f"Eigenpairs({count} of {size}{batch}{shown}, {self.method!r}, {self.passes} passes{state})"


@dataclass(frozen=True, eq=False)
class TruncationRank:
    """How many leading eigenvalues hold a given share of the trace.

    Attributes:
        rank: ``(*batch)`` smallest r with Σ_{i≤r} λ_i ≥ (1 - ε) tr K, int64.
        captured: ``(*batch)`` the share that they hold, float64.
        epsilon: ε.
        values: ``(*batch, r_max)`` leading eigenvalues that were used, largest first, float64.
        exact: Whether all eigenvalues were computed (else Lanczos, converged as said).
        converged: Whether every eigenvalue that decides the rank met its tolerance.
        passes: Passes made.
        seed: Seed of the starting vectors; None if none was drawn.
        seconds: Wall-clock time.
        interval: The 95 % interval ``(low, high)`` of the rank, two int64 tensors ``(*batch)``; both ends
            are the rank where the trace is exact.
    """

    rank: Tensor
    captured: Tensor
    epsilon: float
    values: Tensor
    exact: bool
    converged: bool
    passes: int
    seed: int | None = None
    seconds: float = 0.0
    interval: tuple[Tensor, Tensor] | None = None

    def __repr__(self) -> str:
        """Return one line, without the eigenvalues."""
        if self.rank.numel() != 1:
            shown = f"for {tuple(self.rank.shape)} kernels"
        else:
            low, high = (None, None) if self.interval is None else (int(end) for end in self.interval)
            span = "" if low == high else f", 95% in [{low}, {high}]"
            shown = f"{int(self.rank)}{span}, holds {float(self.captured):.6g} of the trace"
        state = "" if self.converged else ", not converged"
        return f"TruncationRank({shown}, epsilon={self.epsilon:g}, {self.passes} passes{state})"

    def __int__(self) -> int:
        """Return the rank of a single kernel."""
        if self.rank.numel() != 1:
            raise EstimateError(
                f"there is one rank for each of {tuple(self.rank.shape)} kernels: index .rank"
            )
        return int(self.rank)


# -- the density of a spectrum, with its errors


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
        nodes: ``(p, m)`` nodes, float64; ``(1, m)`` eigenvalues where the result is exact, of which the n - p
            zeros that L Lᵀ has more than LᵀL are one.
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
        made = f"{self.size} eigenvalues" if self.exact else f"{rules} directions of {steps} nodes"
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
    # (p, g, m) Gaussians at a time; the square is what the variance of the probes needs
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
    # right=True counts nodes at the point: F(x) is the mass up to and with x
    places = torch.searchsorted(nodes.gather(-1, order).contiguous(), points, right=True)
    return (sums / sums[:, -1:]).gather(-1, places)


# -- how many times smaller a data set or a parameter space could be


@dataclass(frozen=True, eq=False)
class Redundancy:
    """The largest r for which data or parameters are (r, ε)-redundant.

    Attributes:
        factor: ``(*batch)`` the largest such r, ``size / rank``, float64.
        interval: 95 % interval (low, high) of r; both ends are r where the rank is certain.
        rank: ``(*batch)`` the dimension that is enough, int64.
        size: What r is relative to: n for data, P for parameters.
        epsilon: ε.
        kind: "data" or "parameters".
        values: ``(*batch, k)`` leading eigenvalues that were used, largest first, float64.
        exact: Whether all eigenvalues were computed.
        converged: Whether every eigenvalue that decides the rank met its tolerance.
        passes: Passes made.
        seed: Seed of the starting vectors; None if none was drawn.
        seconds: Wall-clock time.
    """

    factor: Tensor
    interval: tuple[Tensor, Tensor]
    rank: Tensor
    size: int
    epsilon: float
    kind: str
    values: Tensor
    exact: bool
    converged: bool
    passes: int
    seed: int | None = None
    seconds: float = 0.0

    def __repr__(self) -> str:
        """Return one line, without the eigenvalues."""
        if self.factor.numel() != 1:
            shown = f"for {tuple(self.factor.shape)} kernels"
        else:
            low, high = (float(end) for end in self.interval)
            span = "" if low == high else f", 95% in [{low:.4g}, {high:.4g}]"
            shown = f"{float(self.factor):.4g}{span}: rank {int(self.rank)} of {self.size}"
        state = "" if self.converged else ", not converged"
        return f"Redundancy(of {self.kind}, {shown}, epsilon={self.epsilon:g}, {self.passes} passes{state})"

    def __float__(self) -> float:
        """Return the factor of a single kernel."""
        if self.factor.numel() != 1:
            raise EstimateError(
                f"there is one factor for each of {tuple(self.factor.shape)} kernels: index .factor"
            )
        return float(self.factor)


# -- what a low-rank kernel leaves out of the kernel that it approximates


@dataclass(frozen=True, eq=False)
class EnergyGap:
    """The energy of gradients outside the span of a few, and what it bounds.

    All tensors are float64, of the operator's batch shape.

    Attributes:
        gap: |Φ (I - Π)|_F² = tail + misalignment: the trace of K minus that of its approximation. It
            bounds |K - Φ Π Φᵀ| in the nuclear norm (as an equality), and so in every Schatten norm.
        tail: What the best projector of the same rank leaves out, the sum of eigenvalues past the rank.
        misalignment: What this one leaves out beyond that; not negative.
        total: tr K = |Φ|_F².
        rank: Rank r of the projector, int64.
        bound: |Φ|_F |Φ (I - Π)|_F, the bound on |K - Φ Π Φᵀ|_F of eq. 10; never below ``gap``.
        converged: Whether the eigenvalues that the tail needs have converged.
    """

    gap: Tensor
    tail: Tensor
    misalignment: Tensor
    total: Tensor
    rank: Tensor
    bound: Tensor
    converged: bool = True

    @property
    def share(self) -> Tensor:
        """Share of the energy that is left out, gap / total."""
        return self.gap / self.total
