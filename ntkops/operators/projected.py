"""The kernel through a projection."""

from __future__ import annotations

import dataclasses
import math
import shutil
import tempfile
import weakref
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn, Self

import torch
from torch import Tensor

from ..engines import shared_store, tensor_bytes
from ..errors import UnsupportedOperationError
from ..model.context import full_precision
from ..projections import Projection
from ._projected_features import feature_rows
from .axes import ParameterAxis, StateAxis
from .base import EngineOperator
from .capabilities import Capabilities, Tile, dense_from_tiles, tile_slices
from .kernel import NTKOperator
from .products import Core
from .projection import MatrixProjection, ProjectionOperator

__all__ = [
    "FeatureOperator",
    "ProjectedNTKOperator",
    "ProjectionOperator",
]

_ENTRIES = 2**21  # of features that are in float64 at a time: 16 MiB


@dataclasses.dataclass(frozen=True, eq=False)
class ProjectedCore(Core):
    """The core of an operator that is seen through a projection.

    Attributes:
        projection: P.
        files: Where features lie that are in files, or None where they are in memory.
    """

    projection: Projection | None = None
    files: FeatureFiles | None = None


class FeatureFiles:
    """Features in files of a directory, by what they are features of; removed with the last operator."""

    def __init__(self, directory: Path) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="ntkops-features-", dir=directory))
        weakref.finalize(self, shutil.rmtree, self._folder, ignore_errors=True)
        self._held: dict[object, Tensor] = {}

    def get(self, key: object) -> Tensor | None:
        """Return features that were made."""
        return self._held.get(key)

    def make(self, shape: torch.Size, like: Tensor) -> Tensor:
        """Return a tensor in a new file."""
        path = self._folder / str(len(self._held))
        mapped = torch.from_file(str(path), shared=True, size=shape.numel(), dtype=like.dtype)
        return mapped.reshape(shape)

    def put(self, key: object, features: Tensor) -> None:
        """Keep features."""
        self._held[key] = features

    def __reduce__(self) -> tuple[Any, ...]:
        """Leave the files out of a pickle: what reads it makes features anew, in a place of its own."""
        return FeatureFiles, (Path(tempfile.gettempdir()),)


class _ProjectedOperator(EngineOperator):
    """What features and their kernels share: the projection, and features that are kept where they fit."""

    _core: ProjectedCore

    @property
    def projection(self) -> Projection:
        """The map P."""
        assert self._core.projection is not None
        return self._core.projection

    def __repr__(self) -> str:
        """Show shape, projection, engine and where it lives."""
        size = "x".join(str(s) for s in self.shape)
        return (
            f"{type(self).__name__}({size}, {self.projection!r}, engine={self._core.engine.name!r}, "
            f"{self.dtype}, {self.device})"
        )

    def _moved(self, dtype: torch.dtype, device: torch.device) -> Self:
        moved = super()._moved(dtype, device)
        if isinstance(self.projection, MatrixProjection):
            projection = self.projection.to(dtype, device)
            moved = moved._rebuild(dataclasses.replace(moved._core, projection=projection))
        return moved

    def _check_fresh(self) -> None:
        super()._check_fresh()
        if isinstance(self.projection, MatrixProjection):
            self.projection.check_fresh()

    def _features_key(self, axis: StateAxis) -> tuple[object, ...] | None:
        """Return the key of an axis' features, or None where the parameters are not the snapshot."""
        plain = EngineOperator._dense_key(self)
        return None if plain is None else ("features", self.projection.key, axis.key, plain[-1])

    def _features_bytes(self, axis: StateAxis) -> int:
        """Return the bytes of an axis' features, ``(*batch, n, R·k)``."""
        width = axis.terms * self.projection.k
        return tensor_bytes((*axis.batch_shape, axis.length, width), self.dtype)

    def _held(self, axis: StateAxis) -> Tensor | None:
        """Return features that are kept."""
        key = self._features_key(axis)
        if key is None:
            return None
        files, owner = self._core.files, self._core.engine.identity
        return shared_store.get(owner, key) if files is None else files.get((owner, key))

    def _may_hold(self, axis: StateAxis) -> bool:
        """Whether features may be kept for the next product: in a file always."""
        if self._held(axis) is not None:
            return True
        fits = self._core.files is not None or self._features_bytes(axis) <= self._core.max_dense_bytes
        return fits and self._features_key(axis) is not None

    def _make_features(self, axis: StateAxis, params: Sequence[Tensor] | None = None) -> Tensor:
        """Return the features of an axis, kept ones or new ones, ``(*batch, n, R·k)``."""
        chosen = tuple(self._args if params is None else params)
        if self._is_recorded(*chosen):
            return feature_rows(self._core.engine, chosen, axis, self.projection)
        held = self._held(axis)
        if held is not None:
            return held
        key, files = self._features_key(axis), self._core.files
        make = None if key is None or files is None else files.make
        with torch.no_grad():
            features = feature_rows(self._core.engine, chosen, axis, self.projection, make)
        if key is not None and files is not None:
            files.put((self._core.engine.identity, key), features)
        elif key is not None and self._features_bytes(axis) <= self._core.max_dense_bytes:
            shared_store.put(self._core.engine.identity, key, features)
        return features

    def _passes_of_features(self, *axes: StateAxis) -> float:
        """Return the per-sample passes that features of these axes still take."""
        # Rows and columns of a square kernel are one axis.
        missing = {id(axis): axis for axis in axes if self._held(axis) is None}
        return float(sum(axis.num_distinct for axis in missing.values()))

    def _through(self, block: Tensor) -> Tensor:
        """Return Pᵀ P x for each row of ``(c, P)``."""
        return self.projection.adjoint(self.projection.apply(block))

    def _affordable(self, columns: int, *axes: StateAxis) -> bool:
        """Whether features are there, or have been paid for by the products so far (rent or buy)."""
        if not all(self._may_hold(axis) for axis in axes):
            return False
        cost = self._passes_of_features(*axes)
        self._core.spending.passes += self.passes_per_column * columns
        return cost == 0 or self._core.spending.passes > cost


class FeatureOperator(_ProjectedOperator):
    """Features J Pᵀ, ``(*batch, n, R·k)``, or their transpose; made by `ProjectedNTKOperator.left`.

    Products go through the features where these are kept, and through J and P else. For a kernel that is
    traced over R outputs the features of the outputs stand side by side.
    """

    @property
    def _axis(self) -> StateAxis:
        """The rows of the features: the columns of their transpose."""
        return self._state_axes()[0]

    @property
    def _is_transposed(self) -> bool:
        """Whether this is Pᵀ Jᵀ."""
        return isinstance(self._core.columns, StateAxis)

    def _described_rows(self) -> str:
        return super()._described_rows() if self._is_transposed else " (the projected features)"

    def _dense_key(self) -> tuple[object, ...] | None:
        return None  # features are kept once, whichever way they are looked at

    def _dense_cost(self) -> float:
        return self._passes_of_features(self._axis)

    def _dense_if_cheaper(self, columns: int) -> Tensor | None:
        return self._dense_values(self._args) if self._affordable(columns, self._axis) else None

    def _dense_values(self, params: Sequence[Tensor]) -> Tensor:
        dense = self._make_features(self._axis, params)
        entries = self._core.rows if self._is_transposed else self._core.columns
        assert isinstance(entries, ParameterAxis)
        if entries.pick is not None:
            dense = dense[..., entries.pick.to(dense.device)]
        return dense.mT if self._is_transposed else dense

    def _lazy_product(self, params: Sequence[Tensor], rhs: Tensor) -> Tensor:
        engine, rows, columns = self._core.engine, self._core.rows, self._core.columns
        chosen, results = tuple(params), []
        # A block over the parameters has P numbers a column: as many columns at a time as the engine takes.
        for block in columns.embed(rhs).split(engine.chunk_size()):
            if isinstance(columns, StateAxis):
                results.append(self.projection.apply(engine.vjp(chosen, columns.inputs, block)))
            else:
                assert isinstance(rows, StateAxis)
                results.append(engine.jvp(chosen, rows.inputs, self.projection.adjoint(block)))
        return rows.extract(torch.cat(results))


class ProjectedNTKOperator(_ProjectedOperator, NTKOperator):
    """K = J(x₁) Pᵀ P J(x₂)ᵀ, lazily; made by `projected_ntk`.

    It can do what the kernel itself can: slices, batches, cross kernels, sums, ``add_jitter``. Products
    use the features J Pᵀ where these fit into ``max_dense_bytes``, else vjp and jvp with P in between.
    """

    @property
    def left(self) -> FeatureOperator:
        """Features of the rows, ``(*batch, n, R·k)``: K = left @ right.mT."""
        return self._features_of(self._rows)

    @property
    def right(self) -> FeatureOperator:
        """Features of the columns, ``(*batch, m, R·k)``: K = left @ right.mT."""
        return self._features_of(self._columns)

    def _features_of(self, axis: StateAxis) -> FeatureOperator:
        """Return the features whose rows are an axis."""
        beside = ParameterAxis.beside(axis, self.projection.k)
        core = self._core.with_axes(axis, beside)
        if self._core.files is not None:  # they are no matter of memory
            core = dataclasses.replace(core, limit=2**63 - 1)
        return FeatureOperator(*self._args, core=core)

    def features(self) -> Tensor:
        """Return the features of the rows, J(x₁) Pᵀ.

        Returns:
            ``(*batch, n, R·k)``; R is 1 unless the kernel is traced over outputs, whose features then
            stand side by side. Cost: one per-sample pass for each output; memory: the result and one
            tile of gradients. They are kept for the products that follow.

        Raises:
            DenseMemoryError: If they exceed ``max_dense_bytes``.
        """
        return self.left.to_dense()

    def take_columns(self, chosen: Tensor) -> Tensor:
        """Return dense columns ``(*batch, n, b)``, from features that are kept or made block by block.

        Args:
            chosen: ``(b,)`` numbers of columns.

        Returns:
            The columns. Cost: the features, where they are not there yet.
        """
        self._check_fresh()
        rows, columns = self._rows, self._columns
        with torch.no_grad(), self._core.engine.linearization.full_precision():
            if self._may_hold(columns):
                right = self._make_features(columns)[..., chosen.to(self.device), :]
            else:
                right = self._make_features(columns.take(chosen))
            if self._may_hold(rows):
                return self._make_features(rows) @ right.mT
            found = torch.empty((*self.shape[:-1], len(chosen)), dtype=self.dtype, device=self.device)
            for part in tile_slices(self.shape[-2], self.tile_size()):
                found[..., part, :] = self._make_features(rows.take(part)) @ right.mT
            return found

    def sample_gram(self, cotangents: Tensor) -> NoReturn:
        """Refuse: Gram matrices of per-sample gradients are those of the kernel itself.

        Args:
            cotangents: Ignored.

        Raises:
            UnsupportedOperationError: Always.
        """
        raise UnsupportedOperationError(
            "a projected kernel has no Gram matrix of per-sample gradients; take that of the kernel itself, "
            "or features()"
        )

    # tiles; Gram matrices of per-sample gradients and parts of the samples are those of the kernel itself

    of_samples = False
    sample_shape = None
    is_coupled = False
    tiles_after = Capabilities.tiles_after
    diagonal_step = Capabilities.diagonal_step
    diagonal_parts = Capabilities.diagonal_parts
    output_traced = Capabilities.output_traced

    def factors(self) -> tuple[FeatureOperator, FeatureOperator]:
        """Return the features of rows and columns: K = left @ right.mT."""
        return self.left, self.right

    def exact_cost(self, quantity: str) -> float:
        """Return the passes that the exact "diagonal" or all "tiles" take."""
        rows, columns = self._rows, self._columns
        if quantity == "diagonal":
            return self._passes_of_features(rows)
        left, right = self._passes_of_features(rows), self._passes_of_features(columns)
        if all(self._may_hold(axis) for axis in (rows, columns)):
            return left if self.symmetric else left + right
        steps = math.ceil(self.shape[-2] / self.tile_size())
        return left * (steps + 1) / 2 if self.symmetric else left + steps * right

    def tile_size(self, parts: int = 1) -> int:
        """Return the rows of a tile: as many features as the workspace holds."""
        rows = self._rows
        width = rows.batch_shape.numel() * max(rows.terms * self.projection.k, 1)
        fit = self._core.engine.workspace_bytes() // (width * self.dtype.itemsize)
        return max(1, min(fit, max(self.shape[-2:])))

    def tiles(self, size: int | None = None) -> Iterator[Tile]:
        """Yield dense tiles in row-major order; for a symmetric kernel those on and above the diagonal.

        Args:
            size: Rows and columns of a tile; None for as many as the workspace holds.

        Yields:
            Tiles with blocks ``(*batch, r, c)``. Memory: two blocks of features.
        """
        rows, columns = self._rows, self._columns
        size = size or self.tile_size()
        for height in tile_slices(self.shape[-2], size):
            left = self._feature_rows(rows, height)
            for width in tile_slices(self.shape[-1], size):
                if self.symmetric and width.start < height.start:
                    continue
                right = left if self.symmetric and width == height else self._feature_rows(columns, width)
                with full_precision(self.device):  # autocast takes no digits
                    block = left @ right.mT
                yield Tile(height, width, block)

    def _feature_rows(self, axis: StateAxis, part: slice) -> Tensor:
        """Return features of some rows of an axis, a slice of all where these may be kept."""
        self._check_fresh()
        with full_precision(self.device), torch.set_grad_enabled(self._is_recorded()):
            if self._may_hold(axis):
                return self._make_features(axis)[..., part, :]
            return self._make_features(axis.take(part))

    # products and dense results

    def _multiply(self, rhs: Tensor) -> Tensor:
        self._check_fresh()
        if self._is_recorded(rhs):
            return self._lazy_product(self._args, rhs)
        with torch.no_grad():
            if not self._affordable(rhs.shape[-1], self._rows, self._columns):
                return self._lazy_product(self._args, rhs)
            right = self._make_features(self._columns)
            left = right if self._core.symmetric else self._make_features(self._rows)
            with self._core.engine.linearization.full_precision():
                return self._checked(left @ (right.mT @ rhs), rhs)

    def _lazy_product(self, params: Sequence[Tensor], rhs: Tensor) -> Tensor:
        engine, rows, columns = self._core.engine, self._rows, self._columns
        chosen, results = tuple(params), []
        for block in columns.embed(rhs).split(engine.chunk_size()):
            pulled = self._through(engine.vjp(chosen, columns.inputs, block))  # Pᵀ P J₂ᵀ v, (c, P)
            results.append(engine.jvp(chosen, rows.inputs, pulled))
        return rows.extract(torch.cat(results))

    def _dense_key(self) -> tuple[object, ...] | None:
        key = super()._dense_key()
        return None if key is None else ("projected", self.projection.key, *key)

    def _dense_cost(self) -> float:
        return self._passes_of_features(self._rows, self._columns)

    def _dense_values(self, params: Sequence[Tensor]) -> Tensor:
        if not self._is_recorded(*params) and not (
            self._may_hold(self._rows) and self._may_hold(self._columns)
        ):
            return dense_from_tiles(self)
        right = self._make_features(self._columns, params)
        left = right if self._core.symmetric else self._make_features(self._rows, params)
        with self._core.engine.linearization.full_precision():
            return left @ right.mT

    def _diagonal(self) -> Tensor:
        if not self._core.symmetric or self._is_recorded():
            return self._get_diagonal()
        rows, columns = self._rows, self._columns
        # Written in place: small results kept between large blocks would split the heap, a block a step.
        found = torch.empty(self.shape[:-1], dtype=self.dtype, device=self.device)
        for part in tile_slices(self.shape[-2], self.tile_size()):
            left = self._feature_rows(rows, part)
            right = left if self.symmetric else self._feature_rows(columns, part)
            step = max(1, _ENTRIES * left.shape[-2] // max(1, left.numel()))  # rows in float64 at a time
            for some in tile_slices(left.shape[-2], step):
                products = left[..., some, :].double() * right[..., some, :].double()
                found[..., part.start + some.start : part.start + some.stop] = products.sum(-1)
        return found

    def _get_diagonal(self) -> Tensor:
        """Return Σ_k Φ₁ Φ₂ row by row, with its graph."""
        self._check_fresh()
        left = self._make_features(self._rows)
        right = left if self._core.symmetric else self._make_features(self._columns)
        return (left * right).sum(-1)
