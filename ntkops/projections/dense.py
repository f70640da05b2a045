"""Dense projections: Rademacher, Gaussian, Haar."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from .base import Projection
from .counter import normal_rows, sign_rows, stream_key

__all__ = [
    "Dense",
    "Gaussian",
    "Haar",
    "Rademacher",
]


_BLOCK = 2**20  # entries of the map that exist at once


class Dense(Projection):
    """A map whose blocks of columns are regenerated, multiplied with, and forgotten."""

    def columns(self, start: int, stop: int, dtype: torch.dtype, device: torch.device | str) -> Tensor:
        """Return ``(stop - start, k)``: columns of the unscaled map, one a row."""
        raise NotImplementedError

    def _slices(self, start: int, stop: int) -> Iterator[tuple[int, int]]:
        step = max(1, _BLOCK // self.k)
        for low in range(start, stop, step):
            yield low, min(low + step, stop)

    def _add(self, state: Tensor, block: Tensor, offset: int) -> None:
        for low, high in self._slices(offset, offset + block.shape[1]):
            part = block[:, low - offset : high - offset]
            state.addmm_(part, self.columns(low, high, block.dtype, block.device))

    def _read(self, state: Tensor) -> Tensor:
        return state / math.sqrt(self.k)

    def _pull(self, block: Tensor, start: int, stop: int) -> Tensor:
        scaled = block / math.sqrt(self.k)
        result = block.new_empty((len(block), stop - start))
        for low, high in self._slices(start, stop):
            columns = self.columns(low, high, block.dtype, block.device)
            torch.mm(scaled, columns.mT, out=result[:, low - start : high - start])
        return result


class Rademacher(Dense):
    r"""Independent entries :math:`\pm 1 / \sqrt k`.

    Inner products are unbiased with
    :math:`\operatorname{Var}\langle Px, Py\rangle
    = (|x|^2|y|^2 + \langle x, y\rangle^2 - 2\sum_p x_p^2 y_p^2)/k`, and errors have
    sub-Gaussian tails: `ntkops.projections.jl_distortion` holds.

    Args:
        dim: Number of parameters' entries.
        k: Number of entries of the image.
        seed: Integer that fixes the map; None draws one.
        generator: CPU generator from which the seed is drawn.

    Cost: 2 k dim operations a vector and k dim random bits a call, so project many vectors at once;
    memory: a block of 2²⁰ entries of the map.

    Source: Achlioptas, Database-friendly random projections (2003).

    Example:
        >>> import torch
        >>> from ntkops.projections import Rademacher
        >>> Rademacher(dim=1000, k=64, seed=0).apply(torch.ones(3, 1000)).shape
        torch.Size([3, 64])
    """

    def columns(self, start: int, stop: int, dtype: torch.dtype, device: torch.device | str) -> Tensor:
        """Return ``(stop - start, k)`` signs."""
        key = stream_key(self.seed, type(self).__name__, self.dim, self.k)
        return sign_rows(key, start, stop, self.k, dtype, device)


class Gaussian(Dense):
    r"""Independent normal entries of variance 1/k.

    Inner products are unbiased with
    :math:`\operatorname{Var}\langle Px, Py\rangle = (|x|^2|y|^2 + \langle x, y\rangle^2)/k`, whatever the
    vectors look like.

    Args:
        dim: Number of parameters' entries.
        k: Number of entries of the image.
        seed: Integer that fixes the map; None draws one.
        generator: CPU generator from which the seed is drawn.

    Cost: 2 k dim operations a vector and k dim normal variates a call, several times more than
    `Rademacher`; memory: a block of 2²⁰ entries of the map. The entries are float32 numbers.

    Example:
        >>> import torch
        >>> from ntkops.projections import Gaussian
        >>> Gaussian(dim=1000, k=64, seed=0).apply(torch.ones(3, 1000)).shape
        torch.Size([3, 64])
    """

    def columns(self, start: int, stop: int, dtype: torch.dtype, device: torch.device | str) -> Tensor:
        """Return ``(stop - start, k)`` standard normal variates."""
        key = stream_key(self.seed, type(self).__name__, self.dim, self.k)
        return normal_rows(key, start, stop, self.k, dtype, device)


# -- a random subspace, uniformly distributed: Cholesky-QR of a Gaussian map that is never held


class Haar(Gaussian):
    r"""Orthogonal rows, uniformly distributed: :math:`P = \sqrt{\mathrm{dim}/k}\, Q^\top`.

    Q, with orthonormal columns, is distributed by the Haar measure on the Stiefel manifold. It is
    :math:`Q = G R^{-1}` for a Gaussian G and :math:`G^\top G = R^\top R`: only the k x k factor R is held,
    and G is regenerated block by block. This is the projection g(u) of the paper on distilled kernels
    (section 4.2), in bounded memory. For dim much larger than k it cannot be told from `Gaussian`: the
    singular values of G deviate from their mean by about :math:`\sqrt{k / \mathrm{dim}}`.

    Args:
        dim: Number of parameters' entries.
        k: Number of entries of the image, at most ``dim``.
        seed: Integer that fixes the map; None draws one.
        generator: CPU generator from which the seed is drawn.

    Cost: 2 k² dim operations in float64 once, at the first product; then that of `Gaussian` and a
    triangular solve in float64. Memory: that of `Gaussian` and k² float64.

    Raises:
        InputError: If k exceeds ``dim``.

    Example:
        >>> import torch
        >>> from ntkops.projections import Haar
        >>> P = Haar(dim=1000, k=8, seed=0)
        >>> rows = P.adjoint(torch.eye(8, dtype=torch.float64))  # Pᵀ, row by row
        >>> torch.allclose(rows @ rows.mT, 1000 / 8 * torch.eye(8, dtype=torch.float64))
        True
    """

    def __init__(
        self, dim: int, k: int, seed: int | None = None, *, generator: torch.Generator | None = None
    ) -> None:
        super().__init__(dim, k, seed, generator=generator)
        self._factor: Tensor | None = None

    def factor(self, device: torch.device | str = "cpu") -> Tensor:
        """Return L with GᵀG = L Lᵀ, ``(k, k)`` float64, computed once."""
        if self._factor is None:
            gram = torch.zeros((self.k, self.k), dtype=torch.float64, device=device)
            for low, high in self._slices(0, self.dim):
                columns = self.columns(low, high, torch.float64, device)
                gram.addmm_(columns.mT, columns)
            self._factor = torch.linalg.cholesky(gram)
        return self._factor.to(device)

    def _read(self, state: Tensor) -> Tensor:
        # y = Gᵀ x is what was summed; Qᵀ x = R⁻ᵀ Gᵀ x = L⁻¹ y with L = Rᵀ
        solved = torch.linalg.solve_triangular(self.factor(state.device), state.double().mT, upper=False)
        return solved.mT.mul(math.sqrt(self.dim / self.k)).to(state.dtype)

    def _pull(self, block: Tensor, start: int, stop: int) -> Tensor:
        factor = self.factor(block.device)
        solved = torch.linalg.solve_triangular(factor.mT, block.double().mT, upper=True).mT
        # The Gaussian divides by √k; here the rows are to have length √(dim / k).
        return super()._pull(solved.mul(math.sqrt(self.dim)).to(block.dtype), start, stop)
