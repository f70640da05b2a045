"""What every operator over a process group has in common: its space, its algebra, and what it refuses.

Its shape is that of this rank's rows, since linear_operator checks vectors against it. A reduction of
linear_operator would therefore be that of this rank alone, and none of them is left in place: each raises
and names what there is for all ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NoReturn, Self

import torch
from linear_operator.operators import DiagLinearOperator, LinearOperator
from torch import Tensor

from ..errors import InputError, UnsupportedOperationError
from ..operators.algebra import KernelMultiple, KernelSum
from ..operators.capabilities import Capabilities, Tile, capabilities
from ..operators.ridge import RidgeOperator
from ..vectors import Space
from .space import ShardedSpace

__all__ = [
    "ShardedMultiple",
    "ShardedRidge",
    "ShardedRows",
    "ShardedSum",
    "refuse_derivatives",
    "refused",
]

_RIDGE = "use ntkops.KernelRidge, or K.add_jitter(ridge).solve(b)"
_LOGDET = "use ntkops.logdet"
_DENSE = "the rows lie on several ranks: multiply (K @ V), or use ntkops.diagonal, ntkops.trace, ntkops.eigsh"
_SUMS = "use ntkops.trace, or K.space.sum over a product"
_SPECTRUM = "use ntkops.eigsh or ntkops.spectral_density"
_PARTS = "make another operator of the samples that are wanted: ntkops.ntk(model, part_of_shard, group=group)"

_WAYS_OUT = {
    **dict.fromkeys(("to_dense", "evaluate", "numpy", "__array__", "materialize", "to_scipy"), _DENSE),
    **dict.fromkeys(("sum", "_sum_batch", "prod", "_prod_batch", "trace", "mean", "norm"), _SUMS),
    **dict.fromkeys(("solve", "_solve", "inverse", "sqrt_inv_matmul", "inv_matmul"), _RIDGE),
    **dict.fromkeys(("inv_quad", "inv_quad_logdet", "logdet", "_logdet", "logdet_estimate", "det"), _LOGDET),
    **dict.fromkeys(("eigh", "eigvalsh", "_symeig", "svd", "_svd", "diagonalization"), _SPECTRUM),
    **dict.fromkeys(("cholesky", "_cholesky", "root_decomposition", "root_inv_decomposition"), _RIDGE),
    **dict.fromkeys(("pivoted_cholesky", "zero_mean_mvn_samples", "sqrt", "exp", "log", "abs"), _DENSE),
    **dict.fromkeys(("__getitem__", "_getitem", "_get_indices", "submatrix", "repeat"), _PARTS),
    **dict.fromkeys(("cat_rows", "_joined_with"), _PARTS),
    **dict.fromkeys(("_mul_matrix", "add_low_rank", "requires_grad_", "unsqueeze", "squeeze"), _DENSE),
}


def refused(kind: type) -> type:
    """Let a class raise for everything that would answer for one rank alone, unless it defines it itself."""
    for name, way_out in _WAYS_OUT.items():
        if name not in vars(kind):
            setattr(kind, name, _refusal(name, way_out))
    return kind


def _refusal(name: str, way_out: str) -> Callable[..., Any]:
    """Return a method that raises with a way out."""

    def refuse(self: Any, *args: Any, **kwargs: Any) -> Any:
        raise UnsupportedOperationError(
            f"{name} of a {type(self).__name__} would be that of this rank's rows alone: {way_out}"
        )

    refuse.__name__, refuse.__doc__ = name, "Raise: it would answer for this rank alone."
    return refuse


class ShardedRows(LinearOperator):
    """The algebra of operators whose rows lie on several ranks."""

    @property
    def space(self) -> ShardedSpace:
        """The space of the rows, spread over the ranks: that of the first part."""
        found = capabilities(self._args[0]).space
        assert isinstance(found, ShardedSpace)
        return found

    @property
    def domain(self) -> Space:
        """The space of the columns, that of the first part."""
        found: Space = capabilities(self._args[0]).domain
        return found

    def _require_like(self, other: Any) -> None:
        """Raise unless another operator is spread over the ranks as this one is."""
        if not isinstance(other, ShardedRows) or not self.space.matches(other.space):
            raise InputError(
                f"a {type(self).__name__} is added to a {type(other).__name__}, whose rows do not lie on the "
                "same ranks; make both with ntkops.ntk(model, shard, group=group)"
            )

    def matmul(self, other: Any) -> Any:
        """Multiply this rank's rows of a vector or block; called by all ranks."""
        if torch.is_grad_enabled() and isinstance(other, Tensor) and other.requires_grad:
            refuse_derivatives()
        return super().matmul(other)

    def __add__(self, other: Any) -> LinearOperator:
        """Add an operator over the same ranks, or a diagonal of this rank's rows."""
        if isinstance(other, DiagLinearOperator):
            return ShardedRidge(self, other)
        if isinstance(other, int | float) and other == 0:
            return self
        self._require_like(other)
        if isinstance(other, ShardedRidge):
            return ShardedRidge(self + other.kernel, other._diag_tensor)
        if isinstance(self, ShardedRidge):
            return ShardedRidge(self.kernel + other, self._diag_tensor)
        return ShardedSum(*_parts(self), *_parts(other))

    __radd__ = __add__

    def __sub__(self, other: Any) -> LinearOperator:
        """Subtract an operator over the same ranks."""
        return self + other.mul(-1)

    def _mul_constant(self, other: float | Tensor) -> LinearOperator:
        return ShardedMultiple(self, other)

    def add_jitter(self, jitter_val: float = 1e-3) -> LinearOperator:
        """Return K plus a multiple of the identity."""
        return self.add_diagonal(jitter_val)

    def add_diagonal(self, diag: float | Tensor) -> LinearOperator:
        """Return K + diag, for a number, or a tensor of this rank's entries."""
        return ShardedRidge(self, diag)


@refused
class ShardedSum(ShardedRows, KernelSum):
    """K₁ + K₂ + ... over the same ranks."""

    _mul_constant = KernelSum._mul_constant


@refused
class ShardedMultiple(ShardedRows, KernelMultiple):
    """c K over ranks; c is the same on all of them."""

    _mul_constant = KernelMultiple._mul_constant


@refused
class ShardedRidge(ShardedRows, RidgeOperator, Capabilities):
    """K + D over ranks: solves by conjugate gradients whose inner products are those of all rows."""

    solve = RidgeOperator.solve
    _solve = RidgeOperator._solve

    # D has no factor of the parameters: `factors` stays None.

    @property
    def symmetric(self) -> bool:  # type: ignore[override]
        """Whether K is."""
        return bool(capabilities(self.kernel).symmetric)

    def tile_size(self) -> int:
        """Return that of K."""
        size: int = capabilities(self.kernel).tile_size()
        return size

    def exact_cost(self, quantity: str) -> float:
        """Return that of K."""
        cost: float = capabilities(self.kernel).exact_cost(quantity)
        return cost

    def _diagonal(self) -> Tensor:
        return capabilities(self.kernel).diagonal() + self.ridge.detach()

    def tiles(self, size: int | None = None) -> Iterator[Tile]:
        """Yield the tiles of K, with D on the diagonal."""
        start = self.space.start
        for tile in capabilities(self.kernel).tiles(size):
            if tile.rows == tile.cols and tile.block.numel():
                # Tiles are counted over all ranks, the entries of D from this rank's first row.
                own = self.ridge.detach()[..., tile.rows.start - start : tile.rows.stop - start]
                yield Tile(tile.rows, tile.cols, tile.block + torch.diag_embed(own))
            else:
                yield tile

    @property
    def _factorises(self) -> bool:
        return False  # no rank has the dense matrix

    def add_jitter(self, jitter_val: float = 1e-3) -> RidgeOperator:
        """Return K + (D + a multiple of the identity)."""
        return RidgeOperator.add_jitter(self, jitter_val)

    def add_diagonal(self, diag: float | Tensor) -> RidgeOperator:
        """Return K + (D + diag), for a number, or a tensor of this rank's entries."""
        return RidgeOperator.add_diagonal(self, diag)

    def _mul_constant(self, other: float | Tensor) -> Self:
        return RidgeOperator._mul_constant(self, other)


def refuse_derivatives() -> NoReturn:
    """Raise: products over a process group are not recorded."""
    raise UnsupportedOperationError(
        "products over a process group have no derivative: detach the vector, or differentiate products of "
        "ntkops.ntk(model, shard, differentiable=True) on each rank and sum them yourself"
    )


def _parts(operator: LinearOperator) -> tuple[LinearOperator, ...]:
    """Return what a sum is made of."""
    return tuple(operator.linear_ops) if isinstance(operator, ShardedSum) else (operator,)
