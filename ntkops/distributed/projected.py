"""A projected kernel of samples that are spread over ranks: k numbers a column go over the wire, not P."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NoReturn, Self

import torch
from linear_operator.utils.generic import _to_helper
from torch import Tensor

from ..errors import ShapeError, UnsupportedOperationError
from ..operators.capabilities import Capabilities, Tile
from .group import Ranks
from .rows import ShardedRows, refused
from .space import ShardedSpace

if TYPE_CHECKING:
    from ..model.accepted import InputsLike

__all__ = ["ShardedNystromOperator", "ShardedProjectedOperator"]


@refused
class ShardedProjectedOperator(ShardedRows, Capabilities):
    """K = Φ₁ Φ₂ᵀ with features Φ = J Pᵀ of samples that are spread over ranks.

    Every rank holds the features of its own rows. ``K @ V`` sums Φ₂ᵀ V over ranks: k numbers a column, where
    the kernel itself sums P.

    Args:
        rows: ``(*batch, n, k)`` features of this rank's rows.
        columns: ``(*batch, m, k)`` features of this rank's columns; the same tensor for a square kernel.
        spaces: The spaces of rows and columns.
        remake: Makes the features of new samples; None for a transpose.
        **kept: What else is known of where the features are from.
    """

    def __init__(
        self,
        rows: Tensor,
        columns: Tensor,
        *,
        spaces: tuple[ShardedSpace, ShardedSpace],
        remake: Any = None,
        **kept: Any,
    ) -> None:
        super().__init__(rows, columns, spaces=spaces, remake=remake, **kept)
        self._rows, self._columns, self._spaces, self._remake = rows, columns, spaces, remake
        self._kept = kept

    @property
    def space(self) -> ShardedSpace:
        """The space of the rows, spread over the ranks."""
        return self._spaces[0]

    @property
    def domain(self) -> ShardedSpace:
        """The space of the columns."""
        return self._spaces[1]

    @property
    def ranks(self) -> Ranks:
        """The processes."""
        return self.space.ranks

    @property
    def max_dense_bytes(self) -> int:
        """No dense result is made."""
        return 0

    def _size(self) -> torch.Size:
        return torch.Size((*self._rows.shape[:-1], self._columns.shape[-2]))

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the features."""
        return self._rows.dtype

    @property
    def device(self) -> torch.device:
        """Device of this rank's features."""
        return self._rows.device

    def features(self) -> Tensor:
        """Return this rank's rows of Φ₁, ``(*batch, n, k)``."""
        return self._rows

    def _matmul(self, rhs: Tensor) -> Tensor:
        if rhs.dim() == 1:
            return self._matmul(rhs.unsqueeze(-1)).squeeze(-1)
        if rhs.shape[-2] != self._columns.shape[-2]:
            raise ShapeError(f"expected {self._columns.shape[-2]} rows, got {tuple(rhs.shape)}")
        inside = self.domain.inner(self._columns, rhs)  # (*batch, k, columns), float64
        return self._rows @ inside.to(rhs.dtype)

    def _transpose_nonbatch(self) -> Self:
        if self._is_square:
            return self
        return type(self)(self._columns, self._rows, spaces=self._spaces[::-1], **self._kept)

    @property
    def _is_square(self) -> bool:
        """Whether rows and columns are the same samples."""
        return self._spaces[0] is self._spaces[1]

    def to(self, *args: Any, **kwargs: Any) -> Self:
        """Return the operator on another device or in another floating dtype; called by all ranks."""
        device, dtype = _to_helper(*args, **kwargs)
        rows = self._rows.to(device=device, dtype=dtype)
        columns = rows if self._is_square else self._columns.to(device=device, dtype=dtype)
        first = ShardedSpace(self.ranks, self.space.lengths, rows.dtype, rows.device)
        second = (
            first
            if self._is_square
            else ShardedSpace(self.ranks, self.domain.lengths, rows.dtype, rows.device)
        )
        return type(self)(rows, columns, spaces=(first, second), remake=self._remake, **self._kept)

    def cross(self, x: InputsLike) -> ShardedProjectedOperator:
        """Return the kernel between new samples, this rank's share of them, and this kernel's columns.

        Args:
            x: New samples; see `ShardedKernelOperator.cross`.

        Returns:
            The operator of this rank's new rows, called for by all ranks.

        Raises:
            ShapeError: If this is the transpose of a cross kernel.
        """
        if self._remake is None:
            raise ShapeError("take cross before the transpose: K.cross(x_new).mT")
        rows, space = self._remake(x)
        spaces = (space, self.domain)
        return type(self)(rows, self._columns, spaces=spaces, remake=self._remake, **self._kept)

    @property
    def symmetric(self) -> bool:  # type: ignore[override]
        """Whether rows and columns are the same samples."""
        return self._is_square

    # the features lie on several ranks: there are no factors

    def exact_cost(self, quantity: str) -> float:
        """Return nothing for the diagonal; tiles are not offered."""
        return 0.0 if quantity == "diagonal" else math.inf

    def tile_size(self) -> int:
        """Refuse, as `tiles`."""
        self._refuse()

    def tiles(self, size: int | None = None) -> Iterator[Tile]:
        """Refuse: features do not go from rank to rank.

        Raises:
            UnsupportedOperationError: Always.
        """
        self._refuse()

    def _refuse(self) -> NoReturn:
        """Raise: there are no tiles."""
        raise UnsupportedOperationError(
            "a projected kernel over a process group has no tiles: estimate by products (method='sketch', "
            "'hutch++'), or take the exact value of the kernel itself"
        )

    def take_columns(self, chosen: Tensor) -> Tensor:
        """Return this rank's rows of columns, ``(*batch, n, b)``; called by all ranks.

        Args:
            chosen: ``(b,)`` numbers of columns, counted over all ranks, the same on all of them.
        """
        return self._rows @ self.domain.take(self._columns, chosen).mT

    def product_cost(self) -> int:
        """Return a column for each batch entry."""
        return self.batch_shape.numel()

    def _diagonal(self) -> Tensor:
        return (self._rows * self._rows).sum(-1)

    def diagonal(self, offset: int = 0, dim1: int = -2, dim2: int = -1) -> Tensor:
        """Return this rank's rows of the diagonal."""
        if (offset, dim1, dim2) != (0, -2, -1) or not self._is_square:
            raise UnsupportedOperationError("only a square kernel has a diagonal, along its last two axes")
        return self._diagonal()

    def detach(self) -> Self:
        """Return itself: nothing is recorded through it."""
        return self


class ShardedNystromOperator(ShardedProjectedOperator):
    """K_XZ K_ZZ⁺ K_ZX of samples over ranks, by its features K_XZ W with W Wᵀ = K_ZZ⁺."""

    @property
    def rank(self) -> int | Tensor:
        """Numerical rank of K_ZZ, and so of this kernel; ``(*batch)`` with a batch."""
        ranks: Tensor = self._kept["ranks"]
        return ranks if self.batch_shape else int(ranks)

    @property
    def indices(self) -> Tensor:
        """Samples that the inducing points are, counted over all ranks."""
        indices: Tensor = self._kept["indices"]
        return indices

    @property
    def seed(self) -> int | None:
        """Seed of what was drawn for the inducing points; None if nothing was."""
        seed: int | None = self._kept["seed"]
        return seed
