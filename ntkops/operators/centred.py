"""Kernels that are centred over their samples, H K H."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Self

import torch
from linear_operator.operators import LinearOperator
from torch import Tensor

from ..errors import ShapeError, UnsupportedOperationError
from ..vectors import Space
from .counting import multiply, product_cost, row_space
from .sandwich import Sandwich
from .structure import Structure, Tile, structure

__all__ = ["CentredKernel", "centred"]


class _Centring(LinearOperator):
    """H = (I - 11ᵀ/N) ⊗ I_O on sample-major rows: each output minus its mean over the samples."""

    def __init__(self, like: Tensor, samples: int, outputs: int) -> None:
        super().__init__(like, samples=samples, outputs=outputs)  # an empty tensor: dtype and device
        self._like, self._samples, self._outputs = like, samples, outputs

    def _matmul(self, rhs: Tensor) -> Tensor:
        block = rhs.unsqueeze(-1) if rhs.dim() == 1 else rhs
        split = block.unflatten(-2, (self._samples, self._outputs))
        result = (split - split.double().mean(-3, keepdim=True).to(split)).flatten(-3, -2)
        return result.squeeze(-1) if rhs.dim() == 1 else result

    def _size(self) -> torch.Size:
        length = self._samples * self._outputs
        return torch.Size((length, length))

    def _transpose_nonbatch(self) -> Self:
        return self


class CentredKernel(Sandwich):
    """H K H, lazily, for a symmetric kernel K; its tiles are those of K with O products more."""

    @classmethod
    def of(cls, kernel: LinearOperator, samples: int, outputs: int) -> CentredKernel:
        """Return the centred kernel."""
        like = torch.empty(0, dtype=kernel.dtype, device=kernel.device)
        centring = _Centring(like, samples, outputs)
        return cls(Sandwich(centring, kernel), centring)

    @property
    def structure(self) -> Structure:
        """What it can do beyond products: the diagonal and tiles of K, less its means."""
        centring = self.right_linear_op
        return _CentredStructure(
            self, self.left_linear_op.right_linear_op, centring._samples, centring._outputs
        )


class _CentredStructure:
    """HKH = K - U(KU)ᵀ - (KU)Uᵀ + U(UᵀKU)Uᵀ with U = 1/√N ⊗ I_O."""

    symmetric = True

    def __init__(self, operator: CentredKernel, kernel: LinearOperator, samples: int, outputs: int) -> None:
        self._operator, self._kernel = operator, kernel
        self._samples, self._outputs = samples, outputs
        self._own = structure(kernel)
        self.shape, self.dtype, self.device = self._own.shape, self._own.dtype, self._own.device

    @property
    def space(self) -> Space:
        """The space of the rows."""
        return self._own.space

    def _means(self) -> tuple[Tensor, Tensor]:
        """Return A = KU/√N less half of its mean, ``(*batch, n, O)``: HKH = K - A 1ᵀ... - (A 1ᵀ...)ᵀ."""
        eye = torch.eye(self._outputs, dtype=self.dtype, device=self.device).repeat(self._samples, 1)
        block = eye.expand(*self.shape[:-2], -1, -1)
        product = multiply(self._kernel, block).double() / self._samples  # (*batch, n, O)
        mean = product.unflatten(-2, (self._samples, self._outputs)).mean(-3)  # (*batch, O, O)
        half = mean.repeat(*[1] * len(self.shape[:-2]), self._samples, 1) / 2
        return product - half, torch.arange(self.shape[-1], device=self.device) % self._outputs

    def diagonal(self) -> Tensor:
        """Return the diagonal, ``(*batch, n)``."""
        less, output = self._means()
        own = less.gather(-1, output[:, None].expand(*less.shape[:-1], 1)).squeeze(-1)
        return (self._own.diagonal().double() - 2 * own).to(self.dtype)

    def tile_size(self) -> int:
        """Return the tile size of K."""
        return self._own.tile_size()

    def tiles(self, size: int | None = None) -> Iterator[Tile]:
        """Yield the tiles on and above the diagonal."""
        less, output = self._means()
        for tile in self._own.tiles(size):
            rows = less[..., tile.rows, :][..., output[tile.cols]]
            columns = less[..., tile.cols, :][..., output[tile.rows]].mT
            yield Tile(tile.rows, tile.cols, (tile.block.double() - rows - columns).to(self.dtype))

    def exact_cost(self, quantity: str) -> float:
        """Return the passes of K's, and of the products for its means."""
        return self._own.exact_cost(quantity) + self._outputs * product_cost(self._kernel)

    def factors(self) -> tuple[LinearOperator, LinearOperator] | None:
        """Return H L twice, where K = L Lᵀ."""
        found = self._own.factors()
        if found is None:
            return None
        root = Sandwich(self._operator.right_linear_op, found[0])
        return root, root

    def sample_gram(self, probes: Tensor) -> None:
        """Return None: rows are coupled by their means."""


def centred(operator: LinearOperator | Tensor, what: str) -> LinearOperator:
    """Return H K H of a kernel over samples, or over samples and outputs; a matrix has one row a sample.

    Args:
        operator: Symmetric ``(*batch, n, n)``.
        what: How messages call it.

    Raises:
        ShapeError: If the rows are no whole samples.
        UnsupportedOperationError: If it is not symmetric, or its samples lie on several ranks.
    """
    from linear_operator.operators import to_linear_operator

    kernel: Any = to_linear_operator(operator)
    if row_space(kernel).is_spread:
        raise UnsupportedOperationError(
            f"{what} of a kernel whose samples lie on several ranks is not offered"
        )
    if not structure(kernel).symmetric:
        raise UnsupportedOperationError(f"{what} is centred over samples: it needs a symmetric kernel")
    samples, length = getattr(kernel, "num_samples", kernel.shape[-1]), kernel.shape[-1]
    outputs = getattr(kernel, "num_outputs", 1)
    if samples * outputs != length:
        raise ShapeError(
            f"{what} is centred over samples, and the {length} rows are no {samples} samples of {outputs} "
            "outputs: center before slicing, or slice whole samples"
        )
    return CentredKernel.of(kernel, samples, outputs)
