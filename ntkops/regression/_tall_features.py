"""Features of many rows: read some rows at a time, in float64, and never copied whole."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ._factorizations import SpectralFactor
from ._operands import require_finite

__all__ = ["TallFactor", "TallFeatures"]

_BYTES = 2**26  # of rows that are in float64 at once


class TallFeatures:
    """F ``(*batch, n, k)`` in memory or in a file, used by blocks of rows.

    Args:
        values: F, in the dtype in which it was made.
    """

    def __init__(self, values: Tensor) -> None:
        self._values = values
        self.shape = values.shape

    def blocks(self) -> Iterator[tuple[slice, Tensor]]:
        """Yield rows in float64."""
        batch, size, width = self.shape[:-2], self.shape[-2], self.shape[-1]
        step = max(width, _BYTES // (8 * width * batch.numel()))
        for start in range(0, size, step):
            rows = slice(start, min(start + step, size))
            yield rows, require_finite(self._values[..., rows, :], "the features").double()

    def pull(self, block: Tensor) -> Tensor:
        """Return Fᵀ B, ``(*batch, k, c)``."""
        return torch.stack([part.mT @ block[..., rows, :] for rows, part in self.blocks()]).sum(0)

    def push(self, weights: Tensor) -> Tensor:
        """Return F W, ``(*batch, n, c)``."""
        return torch.cat([part @ weights for _, part in self.blocks()], dim=-2)

    def triangle(self) -> Tensor:
        """Return R of F = Q R, ``(*batch, k, k)``: no Gram matrix squares the condition of F.

        The R of all rows is that of the R so far on top of the next rows (Golub, Plemmons, Sameh 1988).
        """
        found: Tensor | None = None
        for _, part in self.blocks():
            stacked = part if found is None else torch.cat([found, part], dim=-2)
            found = torch.linalg.qr(stacked, mode="r").R
        assert found is not None
        return found


class TallFactor(SpectralFactor):
    r"""Thin factor of F Fᵀ whose left singular vectors are never written down: they are F V σ⁻¹.

    What they lose to small σ does not reach a fit: a component of the labels is off by
    :math:`\epsilon |F| |y| / \sigma`, and the weights multiply it by :math:`\sigma / (\sigma^2 + r)`.

    Args:
        features: F.
        singular: ``(*batch, k)`` σ.
        right: ``(*batch, k, k)`` V.
        ridge: Absolute ridge.
        kept: ``(*batch, k)`` singular values that are no rounding.
    """

    def __init__(
        self, features: TallFeatures, singular: Tensor, right: Tensor, ridge: float, kept: Tensor
    ) -> None:
        self._features = features
        scale = torch.where(kept, 1 / singular, torch.zeros_like(singular))
        self._half = right * scale.unsqueeze(-2)
        super().__init__(singular.square(), singular.new_zeros(()), ridge, "zero", kept)

    @property
    def size(self) -> int:
        return self._features.shape[-2]

    def components(self, rhs: Tensor) -> Tensor:
        return self._half.mT @ self._features.pull(rhs)

    def combined(self, components: Tensor) -> Tensor:
        return self._features.push(self._half @ components)

    def remainder_blocks(self, group: int) -> Tensor:
        half = self._half * (self.values * self.inverse).sqrt().unsqueeze(-2)
        found = []
        for _, part in self._grouped(group):
            rows = (part @ half).unflatten(-2, (-1, group))
            found.append(torch.eye(group, dtype=rows.dtype, device=rows.device) - rows @ rows.mT)
        return torch.cat(found, dim=-3)

    def _grouped(self, group: int) -> Iterator[tuple[slice, Tensor]]:
        """Yield blocks of whole samples."""
        rest: Tensor | None = None
        for rows, part in self._features.blocks():
            part = part if rest is None else torch.cat([rest, part], dim=-2)
            whole = part.shape[-2] // group * group
            rest = part[..., whole:, :]
            yield rows, part[..., :whole, :]

    def quadratic(self, rows: Tensor) -> Tensor:
        pulled = self.components(rows.mT)  # (*batch, r, m)
        return (pulled.square() * self.inverse.unsqueeze(-1)).sum(-2)
