"""A random subspace, uniformly distributed: Cholesky-QR of a Gaussian map that is never held."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .dense import Gaussian

__all__ = ["Haar"]


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
        solved = torch.linalg.solve_triangular(self.factor(state.device), state.double().mT, upper=False)
        return solved.mT.mul(math.sqrt(self.dim / self.k)).to(state.dtype)

    def _pull(self, block: Tensor, start: int, stop: int) -> Tensor:
        factor = self.factor(block.device)
        solved = torch.linalg.solve_triangular(factor.mT, block.double().mT, upper=True).mT
        # The Gaussian divides by √k; here the rows are to have length √(dim / k).
        return super()._pull(solved.mul(math.sqrt(self.dim)).to(block.dtype), start, stop)
