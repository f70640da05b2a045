r"""Inner products and squared traces from a small matrix W = Ωᵀ B Ω, with the least variance there is.

For Gaussian Ω, W and UᵀWU have the same law for every rotation U of the m probes. Averaging over U can only
lower the variance of an estimate, and leaves of a quadratic one a combination of three invariants, whose
expectations for :math:`W_k = \Omega^\top B_k \Omega` are

.. math::
    E\,\mathrm{tr} W_1\,\mathrm{tr} W_2 &= m^2 \tau_1 \tau_2 + m (a + b), \\
    E\,\mathrm{tr} W_1^\top W_2 &= m \tau_1 \tau_2 + m^2 a + m b, \\
    E\,\mathrm{tr} W_1 W_2 &= m \tau_1 \tau_2 + m a + m^2 b,

with τ = tr B, a = tr B₁ᵀB₂ and b = tr B₁B₂. Solved for a (and τ₁τ₂) this is the only such estimate without
bias, hence the one of least variance. For one symmetric B it is

.. math:: a = \frac{\mathrm{tr} W^2 - (\mathrm{tr} W)^2 / m}{m^2 + m - 2}, \qquad
          \tau^2 = (\mathrm{tr} W / m)^2 - 2 a / m.

The probes here are uniform on the sphere of radius √n. A Gaussian probe is one of them times an independent
length, whose fourth moment is (n + 2) / n: the mean over the lengths, given the directions, multiplies
products of two diagonal entries of the same probe by it, and lowers the variance once more.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..operators.capabilities import tile_slices

__all__ = ["Invariants", "RootOfSquare"]

_ROWS = 512  # rows of W held at a time

Rows = Callable[[slice], tuple[Tensor, Tensor, Tensor]]  # rows of W₁, W₂ and W₂ᵀ, (*batch, r, m) each


@dataclass(frozen=True, eq=False)
class Invariants:
    """An inner product tr B₁ᵀB₂ from the sums that it takes of W₁ and W₂, probe by probe.

    Attributes:
        first: Diagonal of W₁, ``(*batch, m)``.
        second: Diagonal of W₂.
        straight: What each probe has in Σ_{i≠j} W₁ᵢⱼ W₂ᵢⱼ, as row and as column, ``(*batch, m)``.
        crossed: What each probe has in Σ_{i≠j} W₁ᵢⱼ W₂ⱼᵢ, in the same way.
        squares: Σ_{i≠j} (W₁ᵢⱼ W₂ᵢⱼ)², ``(*batch)``.
        size: n, the number of entries of a probe.
        group: Group of the probes.
    """

    first: Tensor
    second: Tensor
    straight: Tensor
    crossed: Tensor
    squares: Tensor
    size: int
    group: int = 0
    least = 3  # probes that its jackknife takes

    @classmethod
    def of(cls, rows: Rows, count: int, size: int, group: int = 0) -> Invariants:
        """Sum over W₁ and W₂, some rows at a time."""
        diagonals: tuple[list[Tensor], list[Tensor]] = ([], [])
        row_sums: tuple[list[Tensor], list[Tensor]] = ([], [])
        column_sums: list[Tensor | float] = [0.0, 0.0]
        squares: Tensor | float = 0.0
        for part in tile_slices(count, _ROWS):
            # (*batch, r, m) each
            one, two, turned = rows(part)
            for kept, block in zip(diagonals, (one, two), strict=True):
                kept.append(block[..., part].diagonal(dim1=-2, dim2=-1))
            for number, block in enumerate((one * two, one * turned)):
                block[..., part].diagonal(dim1=-2, dim2=-1).zero_()
                row_sums[number].append(block.sum(-1))
                column_sums[number] = column_sums[number] + block.sum(-2)
                if number == 0:
                    squares = squares + block.square().sum((-2, -1))
        straight, crossed = (
            (torch.cat(sums, dim=-1) + columns).cpu()
            for sums, columns in zip(row_sums, column_sums, strict=True)
        )
        first, second = (torch.cat(parts, dim=-1).cpu() for parts in diagonals)
        return cls(first, second, straight, crossed, torch.as_tensor(squares).cpu(), size, group)

    def groups(self) -> dict[int, int]:
        """Return the one group."""
        return {self.group: self.first.shape[-1]}

    def value(self) -> Tensor:
        """Return the estimate of tr B₁ᵀB₂."""
        return self._solve(*self._sums(), self.first.shape[-1])[0]

    def without(self, group: int) -> Tensor:
        """Return the estimates of tr B₁ᵀB₂ without each probe."""
        return self._solve(*self._sums_without(), self.first.shape[-1] - 1)[0]

    def pair_variance(self) -> Tensor:
        """Return the variance that pairs have beyond that of single probes, ``(*batch)``."""
        m = self.first.shape[-1]
        return 2 * self.squares / (m * (m - 1)) ** 2

    @property
    def root_factor(self) -> float:
        """Factor of the jackknife error of the root.

        For rank one, W = z zᵀ, the estimate is |z|⁴ / (m (m + 2)), and without a probe its root is
        (|z|² - zᵢ²) / √((m - 1) (m + 1)): √((m - 1) / (m + 1)) of a mean's change.
        """
        m = self.first.shape[-1]
        return ((m + 1) / (m - 1)) ** 0.5

    def squared_trace(self) -> Tensor:
        """Return the estimate of tr B₁ tr B₂."""
        return self._solve(*self._sums(), self.first.shape[-1])[1]

    def squared_trace_without(self) -> Tensor:
        """Return the estimates of tr B₁ tr B₂ without each probe."""
        return self._solve(*self._sums_without(), self.first.shape[-1] - 1)[1]

    def _sums(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        own = (self.first * self.second).sum(-1)
        others = self.first.sum(-1) * self.second.sum(-1) - own
        return own, others, self.straight.sum(-1) / 2, self.crossed.sum(-1) / 2

    def _sums_without(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        own, others, straight, crossed = (x.unsqueeze(-1) for x in self._sums())
        squares = self.first * self.second
        sums = self.first.sum(-1, keepdim=True), self.second.sum(-1, keepdim=True)
        meets = self.first * (sums[1] - self.second) + self.second * (sums[0] - self.first)
        return own - squares, others - meets, straight - self.straight, crossed - self.crossed

    def _solve(
        self, own: Tensor, others: Tensor, straight: Tensor, crossed: Tensor, count: int
    ) -> tuple[Tensor, Tensor]:
        """Return tr B₁ᵀB₂ and tr B₁ tr B₂ from m probes."""
        m, lengths = count, (self.size + 2) / self.size
        # With S = tr W₁ᵀW₂ = own + straight, C = tr W₁W₂ = own + crossed and T = tr W₁ tr W₂ = own + others,
        # the three expectations give
        #   S + C - 2 T / m = (m² + m - 2) (a + b), and m² + m - 2 = (m - 1) (m + 2);
        #   S - C = m (m - 1) (a - b), in which own cancels;   T = m² τ₁τ₂ + m (a + b).
        # Only own has products of two entries of one probe, hence the fourth moment of a length.
        both = 2 * lengths * (1 - 1 / m) * own + straight + crossed - 2 * others / m
        both = both / ((m - 1) * (m + 2))  # a + b
        apart = (straight - crossed) / (m * (m - 1))  # a - b
        return (both + apart) / 2, (lengths * own + others) / m**2 - both / m


@dataclass(frozen=True, eq=False)
class RootOfSquare:
    """The trace in a ratio where its square counts: the root of an estimate of the square without bias.

    Attributes:
        invariants: Of one B.
    """

    invariants: Invariants
    least = 3

    def groups(self) -> dict[int, int]:
        """Return the one group."""
        return self.invariants.groups()

    def value(self) -> Tensor:
        """Return the estimate, ``(*batch)``."""
        return self.invariants.squared_trace().clamp(min=0).sqrt()

    def without(self, group: int) -> Tensor:
        """Return the estimates without each probe, ``(*batch, m)``."""
        return self.invariants.squared_trace_without().clamp(min=0).sqrt()
