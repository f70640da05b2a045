"""What can be estimated: each quantity as moments of products, and a function of these moments."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from ..errors import UnsupportedOperationError, ZeroKernelError
from ..operators.structure import paired_tiles
from ._request import Operand, require_same_shape

__all__ = ["Alignment", "EffectiveRank", "FrobeniusNorm", "Inner", "Quantity", "Trace"]


class Quantity(ABC):
    """A function of q moments of one or two operators.

    Attributes:
        name: How messages call it.
        operands: The operators, whose products share their probes.
    """

    name: str

    def __init__(self, operands: Sequence[Operand]) -> None:
        self.operands = list(operands)
        if len(self.operands) == 2:
            require_same_shape(*self.operands)

    @property
    def first(self) -> Operand:
        """The first operator."""
        return self.operands[0]

    @property
    def passes_per_column(self) -> int:
        """Passes of one probe column through every operator."""
        return sum(operand.passes_per_column for operand in self.operands)

    @abstractmethod
    def moments(self, probes: Tensor, products: Sequence[Tensor]) -> Tensor:
        """Return ``(*batch, k, q)`` from probes ``(*batch, n, k)`` and the products with each operator."""

    @abstractmethod
    def combine(self, moments: Tensor) -> Tensor:
        """Return the quantity ``(...)`` from moments ``(..., q)``."""

    @abstractmethod
    def exact(self) -> Tensor:
        """Return the exact moments ``(*batch, q)``."""

    @abstractmethod
    def exact_cost(self) -> float:
        """Return the passes that `exact` takes."""

    def pair_moments(self, forms: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Return moments of single probes and of pairs from the forms W_ij = u_iᵀ K u_j of each operator."""
        raise UnsupportedOperationError(f"{self.name} has no form for pairs of probes")

    def result(self, moments: Tensor) -> Tensor:
        """Return the quantity, after looking at whether it is defined."""
        return self.combine(moments)


class Trace(Quantity):
    """tr K."""

    name = "the trace"

    def __init__(self, operands: Sequence[Operand]) -> None:
        super().__init__(operands)
        self.first.require_square(self.name)

    def moments(self, probes: Tensor, products: Sequence[Tensor]) -> Tensor:
        return _dot(probes, products[0]).unsqueeze(-1)

    def combine(self, moments: Tensor) -> Tensor:
        return moments[..., 0]

    def exact(self) -> Tensor:
        return self.first.structure.diagonal().double().sum(-1, keepdim=True)

    def exact_cost(self) -> float:
        return self.first.structure.exact_cost("diagonal")


class Inner(Quantity):
    """tr(K₁ᵀ K₂)."""

    name = "the inner product"

    def moments(self, probes: Tensor, products: Sequence[Tensor]) -> Tensor:
        return _dot(products[0], products[-1]).unsqueeze(-1)

    def combine(self, moments: Tensor) -> Tensor:
        return moments[..., 0]

    def exact(self) -> Tensor:
        return _tile_sums(self.operands)[..., :1]

    def exact_cost(self) -> float:
        return sum(operand.structure.exact_cost("tiles") for operand in self.operands)

    def pair_moments(self, forms: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        product = forms[0] * forms[-1]
        return product[..., :0], product.unsqueeze(-1)


class FrobeniusNorm(Inner):
    """|K|_F, through the moment tr(KᵀK)."""

    name = "the Frobenius norm"

    def combine(self, moments: Tensor) -> Tensor:
        return moments[..., 0].clamp(min=0).sqrt()

    def exact(self) -> Tensor:
        return _tile_sums([self.first, self.first])[..., 1:2]


class Alignment(Quantity):
    """⟨K₁, K₂⟩ / (|K₁| |K₂|)."""

    name = "the alignment"

    def moments(self, probes: Tensor, products: Sequence[Tensor]) -> Tensor:
        first, second = products
        return torch.stack([_dot(first, second), _dot(first, first), _dot(second, second)], dim=-1)

    def combine(self, moments: Tensor) -> Tensor:
        return moments[..., 0] / (moments[..., 1] * moments[..., 2]).clamp(min=0).sqrt()

    def exact(self) -> Tensor:
        return _tile_sums(self.operands)

    def exact_cost(self) -> float:
        return sum(operand.structure.exact_cost("tiles") for operand in self.operands)

    def pair_moments(self, forms: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        first, second = forms
        pairs = torch.stack([first * second, first.square(), second.square()], dim=-1)
        return first[..., :0], pairs

    def result(self, moments: Tensor) -> Tensor:
        """Return the cosine.

        Raises:
            ZeroKernelError: If one of the kernels is zero.
        """
        for number, moment in enumerate((moments[..., 1], moments[..., 2])):
            if bool((moment <= 0).any()):
                raise ZeroKernelError(
                    f"the alignment is undefined: kernel {number + 1} is zero (does its output depend on the "
                    "selected parameters?)"
                )
        return self.combine(moments)


class EffectiveRank(Quantity):
    """(tr K)² / |K|_F², the participation ratio of the eigenvalues."""

    name = "the effective rank"

    def __init__(self, operands: Sequence[Operand]) -> None:
        super().__init__(operands)
        self.first.require_square(self.name)

    def moments(self, probes: Tensor, products: Sequence[Tensor]) -> Tensor:
        return torch.stack([_dot(probes, products[0]), _dot(products[0], products[0])], dim=-1)

    def combine(self, moments: Tensor) -> Tensor:
        return moments[..., 0].square() / moments[..., 1]

    def exact(self) -> Tensor:
        norm = _tile_sums([self.first, self.first])[..., 1]
        trace = self.first.structure.diagonal().double().sum(-1)
        return torch.stack([trace, norm], dim=-1)

    def exact_cost(self) -> float:
        found = self.first.structure
        return found.exact_cost("tiles") + found.exact_cost("diagonal")

    def pair_moments(self, forms: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        form = forms[0]
        return form.diagonal(dim1=-2, dim2=-1).unsqueeze(-1), form.square().unsqueeze(-1)

    def result(self, moments: Tensor) -> Tensor:
        """Return the participation ratio.

        Raises:
            ZeroKernelError: If the kernel is zero.
        """
        if bool((moments[..., 1] <= 0).any()):
            raise ZeroKernelError(
                "the effective rank is undefined: the kernel is zero (does the output depend on the selected "
                "parameters?)"
            )
        return self.combine(moments)


def _dot(first: Tensor, second: Tensor) -> Tensor:
    """Return the columns' dot products ``(*batch, k)`` in float64."""
    return (first.double() * second.double()).sum(-2)


def _tile_sums(operands: Sequence[Operand]) -> Tensor:
    """Return ⟨K₁, K₂⟩, |K₁|², |K₂|² as ``(*batch, 3)``, tile by tile in float64."""
    first, second = operands[0].structure, operands[-1].structure
    sums = torch.zeros((*operands[0].batch_shape, 3), dtype=torch.float64, device=operands[0].device)
    if first is second:
        for tile in first.tiles():
            weight = 2.0 if first.symmetric and tile.rows != tile.cols else 1.0
            sums += weight * tile.block.double().square().sum((-2, -1)).unsqueeze(-1)
        return sums
    for left, right, mirrored in paired_tiles(first, second):
        a, b = left.block.double(), right.block.double()
        parts = [(a * b).sum((-2, -1)), a.square().sum((-2, -1)), b.square().sum((-2, -1))]
        sums += (2.0 if mirrored else 1.0) * torch.stack(parts, dim=-1)
    return sums
