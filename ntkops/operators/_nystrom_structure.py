"""What a Nyström kernel can do beyond products: its features are its factors."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from linear_operator.operators import DenseLinearOperator, LinearOperator, MatmulLinearOperator
from torch import Tensor

from ..model.context import full_precision
from ..vectors import Space
from .counting import multiply, product_cost
from .structure import Factors, Tile, dense_from_tiles, structure, tile_slices

if TYPE_CHECKING:
    from .nystrom import NystromOperator

__all__ = ["NystromStructure", "dense_by_tiles", "feature_blocks"]


class NystromStructure:
    """The structure protocol for a `NystromOperator`: its features are its factors."""

    def __init__(self, operator: NystromOperator) -> None:
        self._operator = operator
        self.shape, self.dtype, self.device = operator.shape, operator.dtype, torch.device(operator.device)
        self.symmetric = operator.symmetric

    @property
    def space(self) -> Space:
        return self._operator.space

    def diagonal(self) -> Tensor:
        return self._operator.diagonal()

    def tile_size(self) -> int:
        return max(1, min(512, max(self.shape[-2:])))

    def tiles(self, size: int | None = None) -> Iterator[Tile]:
        operator = self._operator
        size = size or self.tile_size()
        left = torch.cat([part for _, part in feature_blocks(operator._left, operator._root)], dim=-1)
        right = left
        if not self.symmetric:
            blocks = feature_blocks(operator._right, operator._root)
            right = torch.cat([part for _, part in blocks], dim=-1)
        for rows in tile_slices(self.shape[-2], size):
            for cols in tile_slices(self.shape[-1], size):
                if not self.symmetric or cols.start >= rows.start:
                    with full_precision(self.device):  # autocast takes no digits
                        block = left[..., rows, :] @ right[..., cols, :].mT
                    yield Tile(rows, cols, block)

    def exact_cost(self, quantity: str) -> float:
        sides = 1 if self.symmetric else 2
        return float(sides * self._operator._root.shape[-1] * product_cost(self._operator._left))

    def factors(self) -> Factors:
        operator = self._operator
        root = DenseLinearOperator(operator._root)
        left = MatmulLinearOperator(operator._left, root)
        return left, left if self.symmetric else MatmulLinearOperator(operator._right, root)

    def sample_gram(self, probes: Tensor) -> None:
        return None


def feature_blocks(cross: LinearOperator, root: Tensor, width: int = 64) -> Iterator[tuple[slice, Tensor]]:
    """Yield blocks of columns of F = K_XZ W."""
    for columns in tile_slices(root.shape[-1], width):
        with full_precision(root.device):
            block = multiply(cross, root[..., columns])
        yield columns, block


def dense_by_tiles(operator: LinearOperator) -> Tensor:
    """Return a block between samples and inducing points, which is small by what it is."""
    with torch.no_grad():
        return dense_from_tiles(structure(operator))
