"""Kernels that are centred over their samples, H K H."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Self

import torch
from linear_operator.operators import BatchRepeatLinearOperator, LinearOperator, to_linear_operator
from torch import Tensor

from ..errors import ShapeError, UnsupportedOperationError
from ..vectors import Space
from .capabilities import Capabilities, Tile, capabilities, multiply
from .sandwich import Sandwich

__all__ = ["CentredKernel", "centred"]


class _Centring(LinearOperator):
    """H = (I - 11ᵀ/N) ⊗ I_O on sample-major rows: each output minus its mean over the samples."""

    def __init__(self, like: Tensor, samples: int, outputs: int) -> None:
        super().__init__(like, samples=samples, outputs=outputs)  # an empty tensor: dtype and device
        self._like, self._samples, self._outputs = like, samples, outputs

    def _matmul(self, rhs: Tensor) -> Tensor:
        block = rhs.unsqueeze(-1) if rhs.dim() == 1 else rhs
        split = block.unflatten(-2, (self._samples, self._outputs))  # (*batch, N, O, k)
        # In float64: the sum of N numbers in float32 would have the rounding of N additions.
        result = (split - split.double().mean(-3, keepdim=True).to(split)).flatten(-3, -2)
        return result.squeeze(-1) if rhs.dim() == 1 else result

    def _size(self) -> torch.Size:
        length = self._samples * self._outputs
        return torch.Size((length, length))

    def _transpose_nonbatch(self) -> Self:
        return self


class CentredKernel(Sandwich, Capabilities):
    """H K H, lazily, for a symmetric kernel K; its tiles are those of K with O products more."""

    @classmethod
    def of(cls, kernel: LinearOperator, samples: int, outputs: int) -> CentredKernel:
        """Return the centred kernel."""
        like = torch.empty(0, dtype=kernel.dtype, device=kernel.device)
        centring = _Centring(like, samples, outputs)
        return cls(Sandwich(centring, kernel), centring)

    symmetric = True

    @property
    def _centring(self) -> _Centring:
        """H."""
        found = self.right_linear_op  # which a product with a batch repeats
        return found.base_linear_op if isinstance(found, BatchRepeatLinearOperator) else found

    @property
    def _kernel(self) -> LinearOperator:
        """K."""
        return self.left_linear_op.right_linear_op

    @property
    def space(self) -> Space:
        """The space of the rows."""
        space: Space = capabilities(self._kernel).space
        return space

    def _means(self) -> tuple[Tensor, Tensor]:
        """Return A ``(*batch, n, O)`` with HKH = K - A Eᵀ - E Aᵀ, and the output of each row."""
        # E = 1 ⊗ I_O (n x O) repeats O numbers for each sample, and H = I - E Eᵀ / N.
        # Let B = K E / N and C = Eᵀ K E / N² (O x O), symmetric, which is the mean of B over samples.
        # Then H K H = K - B Eᵀ - E Bᵀ + E C Eᵀ = K - A Eᵀ - E Aᵀ with A = B - E C / 2.
        samples, outputs = self._centring._samples, self._centring._outputs
        eye = torch.eye(outputs, dtype=self.dtype, device=self.device).repeat(samples, 1)  # E
        block = eye.expand(*self.shape[:-2], -1, -1)
        product = multiply(self._kernel, block).double() / samples  # (*batch, n, O)
        mean = product.unflatten(-2, (samples, outputs)).mean(-3)  # (*batch, O, O)
        half = mean.repeat(*[1] * len(self.shape[:-2]), samples, 1) / 2
        return product - half, torch.arange(self.shape[-1], device=self.device) % outputs

    def _diagonal(self) -> Tensor:
        less, output = self._means()
        own = less.gather(-1, output[:, None].expand(*less.shape[:-1], 1)).squeeze(-1)  # (A Eᵀ)_ii
        return (capabilities(self._kernel).diagonal().double() - 2 * own).to(self.dtype)

    def tile_size(self) -> int:
        """Return the tile size of K."""
        return capabilities(self._kernel).tile_size()

    def tiles(self, size: int | None = None) -> Iterator[Tile]:
        """Yield the tiles on and above the diagonal."""
        less, output = self._means()
        for tile in capabilities(self._kernel).tiles(size):
            rows = less[..., tile.rows, :][..., output[tile.cols]]  # (A Eᵀ)_ij = A[i, output of j]
            columns = less[..., tile.cols, :][..., output[tile.rows]].mT
            yield Tile(tile.rows, tile.cols, (tile.block.double() - rows - columns).to(self.dtype))

    def exact_cost(self, quantity: str) -> float:
        """Return the passes of K's, and of the products for its means."""
        own = capabilities(self._kernel)
        return own.exact_cost(quantity) + self._centring._outputs * own.product_cost()

    def factors(self) -> tuple[LinearOperator, LinearOperator] | None:
        """Return H L twice, where K = L Lᵀ."""
        found = capabilities(self._kernel).factors()
        if found is None:
            return None
        root = Sandwich(self._centring, found[0])
        return root, root


def centred(operator: LinearOperator | Tensor, what: str) -> LinearOperator:
    """Return H K H of a symmetric kernel over samples, or samples and outputs; ``what`` messages call it.

    A matrix has one row a sample.

    Raises:
        ShapeError: If the rows are no whole samples.
        UnsupportedOperationError: If it is not symmetric, or its samples lie on several ranks.
    """
    kernel: Any = to_linear_operator(operator)
    if capabilities(kernel).space.is_spread:
        raise UnsupportedOperationError(
            f"{what} of a kernel whose samples lie on several ranks is not offered"
        )
    if not capabilities(kernel).symmetric:
        raise UnsupportedOperationError(f"{what} is centred over samples: it needs a symmetric kernel")
    samples, length = getattr(kernel, "num_samples", kernel.shape[-1]), kernel.shape[-1]
    outputs = getattr(kernel, "num_outputs", 1)
    if samples * outputs != length:
        raise ShapeError(
            f"{what} is centred over samples, and the {length} rows are no {samples} samples of {outputs} "
            "outputs: center before slicing, or slice whole samples"
        )
    return CentredKernel.of(kernel, samples, outputs)
