"""Nyström kernels: K seen through the gradients of a few inducing points."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, Self

import torch
from linear_operator.operators import (
    DenseLinearOperator,
    LinearOperator,
    MatmulLinearOperator,
)
from torch import Tensor

from ..arguments import checked
from ..engines import format_bytes, tensor_bytes
from ..errors import (
    DenseMemoryError,
    SingularKernelError,
    UnsupportedOperationError,
)
from ..model.context import full_precision
from ..vectors import Space, rank_cutoff
from ._inducing import induce, induce_over_ranks
from .algebra import KernelAlgebra
from .axes import StateAxis
from .base import EngineOperator
from .capabilities import (
    TILE,
    Capabilities,
    Factors,
    Tile,
    capabilities,
    dense_bytes_allowed,
    dense_from_tiles,
    taken_columns,
    tile_corners,
)
from .dense import DenseFallbacks
from .positions import same_index

if TYPE_CHECKING:
    from ..model.accepted import InputsLike

__all__ = ["NystromOperator", "nystrom_ntk"]

logger = logging.getLogger(__name__)


class NystromOperator(KernelAlgebra, DenseFallbacks, LinearOperator, Capabilities):
    """K_XZ K_ZZ⁺ K_ZX, lazily; made by `nystrom_ntk`.

    Args:
        left: K_XZ, ``(*batch, n, m)``.
        *rest: K_X'Z, ``(*batch, n', m)``, unless it is ``left``, as in a square kernel; and W with
            W Wᵀ = K_ZZ⁺, ``(*batch, m, r)``.
        indices: Samples that the inducing points are, or None.
        ranks: Rank of K_ZZ, ``(*batch)``.
        seed: Seed of what was drawn for the inducing points.
    """

    def __init__(
        self,
        left: LinearOperator,
        *rest: Any,
        indices: Any = None,
        ranks: Any = None,
        seed: int | None = None,
    ) -> None:
        kept = {"indices": indices, "ranks": ranks, "seed": seed}
        *given, root = rest
        right = given[0] if given else left
        # A square kernel has one factor, in what linear_operator rebuilds it from as well.
        super().__init__(*((left, root) if right is left else (left, right, root)), **kept)
        self._left, self._right, self._root, self._kept = left, right, root, kept

    @property
    def rank(self) -> int | Tensor:
        """Numerical rank of K_ZZ, and so of this kernel; ``(*batch)`` with a batch."""
        ranks = torch.tensor(self._kept["ranks"])
        return ranks if self.batch_shape else int(ranks)

    @property
    def num_inducing(self) -> int:
        """Number m of rows of K_ZZ: inducing points times outputs."""
        return self._root.shape[-2]

    @property
    def indices(self) -> Tensor | None:
        """Samples that the inducing points are; None where they are inputs of their own."""
        kept = self._kept["indices"]
        return None if kept is None else torch.tensor(kept)

    @property
    def seed(self) -> int | None:
        """Seed of what was drawn for the inducing points; None if nothing was."""
        return self._kept["seed"]

    @property
    def max_dense_bytes(self) -> int:
        """Limit for one dense result in bytes, that of the kernel that this approximates."""
        return dense_bytes_allowed(self._left)

    @property
    def space(self) -> Space:
        """The space of the rows."""
        space: Space = capabilities(self._left).space
        return space

    @property
    def symmetric(self) -> bool:  # type: ignore[override]
        """Whether rows and columns are the same samples."""
        return self._left is self._right

    def _like(self, left: LinearOperator, right: LinearOperator) -> Self:
        """Return the kernel between other rows and columns, of the same inducing points."""
        return type(self)(left, right, self._root, **self._kept)

    # products

    def _size(self) -> torch.Size:
        return torch.Size((*self._left.shape[:-1], self._right.shape[-2]))

    def _matmul(self, rhs: Tensor) -> Tensor:
        if rhs.dim() == 1:
            return self._matmul(rhs.unsqueeze(-1)).squeeze(-1)
        with full_precision(rhs.device):
            # K_XZ W (Wᵀ (K_ZX V)): from the right no factor is larger than n x k or m x k.
            inside = self._root @ (self._root.mT @ (self._right.mT @ rhs))
            return self._left @ inside

    def _transpose_nonbatch(self) -> Self:
        return self if self.symmetric else self._like(self._right, self._left)

    def cross(self, x: InputsLike) -> NystromOperator:
        """Return K_*Z K_ZZ⁺ K_ZX between new samples and this kernel's columns.

        Args:
            x: Samples of the same kind as those of the kernel.

        Returns:
            Lazy ``(N_new·O, n)``, with the batch of this kernel.

        Raises:
            UnsupportedOperationError: If the kernel is not one of a model.
            NtkopsError: If the samples do not fit; see `ntkops.errors`.
        """
        right = self._right
        if not isinstance(right, EngineOperator) or not isinstance(right._core.columns, StateAxis):
            raise UnsupportedOperationError("cross needs the kernel of a model")
        core, points = right._core, right._core.columns
        inputs = core.engine.linearization.inputs(x)
        rows = StateAxis(inputs, points.outputs)
        return self._like(right._rebuild(core.with_axes(rows, points)), right)

    # tiles

    def tile_size(self) -> int:
        """Return the rows of a tile."""
        return max(1, min(TILE, max(self.shape[-2:])))

    def tiles(self, size: int | None = None) -> Iterator[Tile]:
        """Yield products of features; of a symmetric kernel those on and above the diagonal."""
        left = features_of(self._left, self._root)
        right = left if self.symmetric else features_of(self._right, self._root)
        for rows, cols in tile_corners(self.shape, size or self.tile_size(), upper=self.symmetric):
            with full_precision(self.device):  # autocast takes no digits
                block = left[..., rows, :] @ right[..., cols, :].mT
            yield Tile(rows, cols, block)

    def exact_cost(self, quantity: str) -> float:
        """Return the passes of all features."""
        sides = 1 if self.symmetric else 2
        return float(sides * self._root.shape[-1] * capabilities(self._left).product_cost())

    def factors(self) -> Factors:
        """Return K_XZ W on both sides: K = F Fᵀ."""
        root = DenseLinearOperator(self._root)
        left = MatmulLinearOperator(self._left, root)
        return left, left if self.symmetric else MatmulLinearOperator(self._right, root)

    # dense results

    def features(self) -> Tensor:
        """Return F = K_XZ K_ZZ^{-1/2} with K_nys = F Fᵀ, some rows at a time.

        Returns:
            ``(*batch, n, r)``. Cost: the blocks of K_XZ, one per-sample pass for each output.

        Raises:
            DenseMemoryError: If it exceeds ``max_dense_bytes`` and has more than r = 512 columns.
        """
        needed = tensor_bytes(torch.Size((*self.shape[:-1], self._root.shape[-1])), self.dtype)
        # n x 512 features are no more than one row of tiles of the kernel.
        if self._root.shape[-1] > TILE and needed > self.max_dense_bytes:
            raise DenseMemoryError(
                f"the features need {format_bytes(needed)}, above max_dense_bytes="
                f"{format_bytes(self.max_dense_bytes)}: take fewer inducing points, or raise it"
            )
        return features_of(self._left, self._root)

    def to_dense(self) -> Tensor:
        """Return the dense kernel, guarded by ``max_dense_bytes``.

        Raises:
            DenseMemoryError: If the result exceeds ``max_dense_bytes``.
        """
        needed = tensor_bytes(self.shape, self.dtype)
        if min(self.shape[-2:]) > 1 and needed > self.max_dense_bytes:
            raise DenseMemoryError(
                f"the dense {' x '.join(map(str, self.shape))} matrix needs {format_bytes(needed)}, above "
                f"max_dense_bytes={format_bytes(self.max_dense_bytes)}; use products K @ V, or .features()"
            )
        with full_precision(self.device):
            left = self._dense(self._left) @ self._root
            right = left if self.symmetric else self._dense(self._right) @ self._root
            return left @ right.mT

    def _dense(self, part: LinearOperator) -> Tensor:
        """Return K_XZ: by tiles, which have no graph, unless a graph is wanted."""
        recorded = torch.is_grad_enabled() and part.requires_grad
        return part.to_dense() if recorded else dense_by_tiles(part)

    def materialize(self) -> Tensor:
        """Return the dense kernel; the same as `to_dense`."""
        return self.to_dense()

    def _diagonal(self) -> Tensor:
        if self.symmetric:
            found = self._root.new_empty(self.shape[:-1])
            for rows, part in feature_rows(self._left, self._root):  # K_ii = |F_i|²
                found[..., rows] = part.double().square().sum(-1).to(self.dtype)
            return found
        left, right = (features_of(side, self._root) for side in (self._left, self._right))
        return (left.double() * right.double()).sum(-1).to(self.dtype)

    def _get_indices(self, row_index: Tensor, col_index: Tensor, *batch_indices: Tensor) -> Tensor:
        index = torch.broadcast_tensors(row_index, col_index, *batch_indices)
        rows, columns, *members = (i.reshape(-1) for i in index)
        left = self._dense(self._left) @ self._root
        right = left if self.symmetric else self._dense(self._right) @ self._root
        place = tuple(members)
        return (left[(*place, rows)] * right[(*place, columns)]).sum(-1).reshape(index[0].shape)

    # slices, batches, algebra

    def _getitem(self, row_index: Any, col_index: Any, *batch_indices: Any) -> LinearOperator:
        whole = slice(None)
        left = self._left._getitem(row_index, whole, *batch_indices)
        same = self.symmetric and same_index(row_index, col_index)
        right = left if same else self._right._getitem(col_index, whole, *batch_indices)
        if not batch_indices:
            return self._like(left, right)
        members = tuple(batch_indices)
        return self._of_members(left, right, self._root[members], lambda ranks: ranks[members])

    def _of_members(
        self,
        left: LinearOperator,
        right: LinearOperator,
        root: Tensor,
        change: Callable[[Tensor], Tensor],
    ) -> Self:
        """Return the kernel over another batch, given the change of one number a member."""
        # Ranks are a list: linear_operator would cast a tensor to the operator's dtype.
        ranks = change(torch.tensor(self._kept["ranks"])).tolist()
        return type(self)(left, right, root, **{**self._kept, "ranks": ranks})

    def _map_batch(
        self,
        move: Callable[[LinearOperator], LinearOperator],
        root: Tensor,
        change: Callable[[Tensor], Tensor],
    ) -> Self:
        """Apply one change of the batch to both sides, keeping a shared one shared."""
        left = move(self._left)
        return self._of_members(left, left if self.symmetric else move(self._right), root, change)

    def _unsqueeze_batch(self, dim: int) -> Self:
        return self._map_batch(
            lambda side: side._unsqueeze_batch(dim),
            self._root.unsqueeze(dim),
            lambda ranks: ranks.unsqueeze(dim),
        )

    def _permute_batch(self, *dims: int) -> Self:
        return self._map_batch(
            lambda side: side._permute_batch(*dims),
            self._root.permute(*dims, len(dims), len(dims) + 1),
            lambda ranks: ranks.permute(*dims),
        )

    def _expand_batch(self, batch_shape: Any) -> LinearOperator:
        if tuple(batch_shape) == tuple(self.batch_shape):
            return self
        return self._map_batch(
            lambda side: side._expand_batch(batch_shape),
            self._root.expand(*batch_shape, *self._root.shape[-2:]),
            lambda ranks: ranks.expand(tuple(batch_shape)),
        )


@checked
def nystrom_ntk(
    kernel: LinearOperator,
    inducing: InputsLike,
    *,
    num_inducing: int | None = None,
    generator: torch.Generator | None = None,
) -> NystromOperator:
    r"""Return the Nyström kernel :math:`K_{XZ} K_{ZZ}^+ K_{ZX}` of inducing points Z, lazily.

    It is Φ Π Φᵀ with the orthogonal projector Π onto the span of the gradients at Z: at most K, and equal
    to it where these span all gradients. The pseudo-inverse comes from an eigendecomposition in float64;
    eigenvalues below m ε times the largest, ε the rounding of the kernel's dtype, are taken as zero, and
    what is left is ``.rank``. Nothing is added to the diagonal.

    Args:
        kernel: Square kernel over whole samples, with any outputs, `ntkops.ntk` or `ntkops.projected_ntk`;
            for another LinearOperator the inducing points are given as indices.
        inducing: Z: samples of their own, as the model takes them; indices of samples of x, a list, range
            or vector of integers (duplicates are left out); "random"; "rpcholesky", randomly pivoted
            Cholesky on the kernel summed over outputs, which has the better guarantee; or "kmeans", the
            centres of clusters of x, by scikit-learn.
        num_inducing: Number of points, for the rules.
        generator: CPU generator for the rules; None draws a seed.

    Returns:
        `NystromOperator`, ``(*batch, n, n)``. Of a kernel over a process group, with indices counted over all
        ranks or "random", one over these ranks, whose products sum r numbers a column. Cost of making it: the
        block K_ZZ (over ranks K_XZ) and O(m³) flops; of a product: one with K_XZ and one with its
        transpose.

    Raises:
        InputError: If there are no inducing points, more than samples, or the rule is not understood.
        ShapeError: If the kernel is not square over whole samples, or the points' outputs do not fit.
        SingularKernelError: If K_ZZ is zero.
        ShardingError: If ranks give different inducing points.
        UnsupportedOperationError: If the kernel is to be differentiated, or is not symmetric, or lies on
            several ranks and the points are neither indices nor "random".
        MissingDependencyError: If "kmeans" is asked for without scikit-learn.

    References:
        Williams, Seeger (2001); eq. 9 of the distilled-kernel paper.

    Example:
        >>> import torch, ntkops
        >>> from ntkops.operators import nystrom_ntk
        >>> _ = torch.manual_seed(0)
        >>> model = torch.nn.Sequential(
        ...     torch.nn.Linear(3, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1)
        ... )
        >>> model = model.double()
        >>> K = ntkops.ntk(model, torch.randn(20, 3, dtype=torch.float64))
        >>> Q = nystrom_ntk(K, [0, 3, 5, 3])
        >>> Q.shape, Q.rank, bool(torch.allclose(Q.to_dense()[3], K.to_dense()[3]))
        (torch.Size([20, 20]), 3, True)
    """
    if not isinstance(kernel, LinearOperator):
        kernel = DenseLinearOperator(torch.as_tensor(kernel))
    if torch.is_grad_enabled() and kernel.requires_grad:
        raise UnsupportedOperationError(
            "a Nyström kernel is not differentiable: its pseudo-inverse depends on the parameters too; pass "
            "K.detach()"
        )
    if capabilities(kernel).space.is_spread:
        return _over_ranks(kernel, inducing, num_inducing, generator)
    found = induce(kernel, inducing, num_inducing, generator)
    root, ranks = _pseudo_root(dense_by_tiles(found.square), kernel.dtype)
    indices = None if found.indices is None else found.indices.tolist()
    return NystromOperator(
        found.cross, found.cross, root, indices=indices, ranks=ranks.tolist(), seed=found.seed
    )


def _over_ranks(
    kernel: Any, inducing: Any, num_inducing: int | None, generator: torch.Generator | None
) -> Any:
    """Return the Nyström kernel of samples on several ranks, each of which has the features of its rows."""
    indices, rows, seed = induce_over_ranks(kernel, inducing, num_inducing, generator)
    columns = taken_columns(kernel, rows)
    root, ranks = _pseudo_root(kernel.space.take(columns, rows), kernel.dtype)

    def features(block: Tensor) -> Tensor:
        with full_precision(block.device):
            return block @ root

    def remake(cross: LinearOperator) -> Tensor:
        return features(taken_columns(cross, rows))

    return kernel.induced(features(columns), remake, indices=indices, ranks=ranks, seed=seed)


def _pseudo_root(square: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return W with W Wᵀ = K_ZZ⁺, and the rank of K_ZZ."""
    # K_ZZ = s S with entries of S of 1 at most. S ≈ V Λ Vᵀ with the eigenvalues above the cut-off, so that
    # K_ZZ⁺ = s⁻¹ V Λ⁻¹ Vᵀ = W Wᵀ with W = s^{-1/2} V Λ^{-1/2}.
    largest = square.abs().amax(dim=(-2, -1), keepdim=True).double()
    if not bool((largest > 0).all()):
        raise SingularKernelError("the kernel of the inducing points is zero: choose others")
    scaled = square.double() / largest
    values, vectors = torch.linalg.eigh((scaled + scaled.mT) / 2)
    # With the ε of the dtype in which K was computed.
    cutoff = values[..., -1:] * rank_cutoff(square.shape[-1], dtype)
    kept = values > cutoff
    ranks = kept.sum(-1)
    if bool((ranks < square.shape[-1]).any()):
        logger.info("the kernel of %d inducing points has rank %s", square.shape[-1], ranks.tolist())
    inverse = torch.where(kept, values.clamp(min=torch.finfo(torch.float64).tiny).rsqrt(), 0.0)
    # Eigenvalues ascend: the last `width` are kept somewhere in the batch, and columns of members of a lower
    # rank are zero there.
    width = int(ranks.max())
    root = (vectors * inverse.unsqueeze(-2))[..., -width:] * largest.rsqrt()
    return root.to(dtype), ranks


def feature_rows(cross: LinearOperator, root: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Yield rows of F = K_XZ W, ``(*batch, r, width)``, in order: no more of K_XZ is there at once."""
    # F[rows] = Σ_cols K[rows, cols] W[cols]: tiles come row after row, and a new one ends the last sum.
    rows, found = slice(0, 0), root.new_zeros(())
    with torch.no_grad():
        for tile in capabilities(cross).all_tiles():
            with full_precision(root.device):
                part = tile.block @ root[..., tile.cols, :]
            if tile.rows == rows:
                found = found + part
                continue
            if rows.stop:
                yield rows, found
            rows, found = tile.rows, part
    yield rows, found


def features_of(cross: LinearOperator, root: Tensor) -> Tensor:
    """Return F = K_XZ W, ``(*batch, n, width)``."""
    made = root.new_empty((*cross.shape[:-1], root.shape[-1]))
    for rows, found in feature_rows(cross, root):
        made[..., rows, :] = found
    return made


def dense_by_tiles(operator: LinearOperator) -> Tensor:
    """Return a block between samples and inducing points, which is small by what it is."""
    with torch.no_grad():
        return dense_from_tiles(operator)
