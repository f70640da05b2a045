"""Dense results: built block by block, kept where they pay, refused above the limit."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import NoReturn

import torch
from torch import Tensor

from ..engines import LayerwiseEngine, format_bytes, shared_store, tensor_bytes
from ..errors import DenseMemoryError
from ..solvers import products_are_steady
from .axes import StateAxis
from .dense import DenseFallbacks
from .products import ProductOperator

__all__ = ["DenseOperator"]

logger = logging.getLogger(__name__)

_MANY = 50  # columns that an iteration takes as a rule


class DenseOperator(DenseFallbacks, ProductOperator):
    """An operator that can be made dense, inside ``max_dense_bytes``."""

    # dense results

    def to_dense(self) -> Tensor:
        """Build the dense matrix block by block.

        Returns:
            ``(*batch, m, n)``. Cost: one per-sample pass for each output, or one product a column
            where that is cheaper; memory: the result and two tiles, never N·O × P for a kernel.

        Raises:
            DenseMemoryError: If the result exceeds ``max_dense_bytes``, before anything is allocated.
        """
        stored = self._stored_dense()
        if stored is not None and not self._is_recorded():
            return stored
        needed = tensor_bytes(self.shape, self.dtype)
        if min(self.shape[-2:]) > 1 and needed > self._core.max_dense_bytes:
            self._refuse_dense(needed)
        self._check_fresh()
        if self._is_recorded():
            return self._dense_values(self._args)
        with torch.no_grad():
            dense = self._dense_values(self._args)
        self._store_dense(dense)
        return dense

    def materialize(self) -> Tensor:
        """Build the dense matrix; the same as `to_dense`."""
        return self.to_dense()

    def _refuse_dense(self, needed: int) -> NoReturn:
        limit = self._core.max_dense_bytes
        raise DenseMemoryError(
            f"the dense {' x '.join(str(s) for s in self.shape)} matrix needs {format_bytes(needed)}, above "
            f"max_dense_bytes={format_bytes(limit)}{' (0 means never)' if limit == 0 else ''}; use products "
            "K @ V, estimators, or slices K[a:b, c:d], or raise max_dense_bytes"
        )

    def _dense_values(self, params: Sequence[Tensor]) -> Tensor:
        raise NotImplementedError

    def _dense_cost(self) -> float:
        """Cost of a dense block in passes over the samples of one side."""
        raise NotImplementedError

    def _factor_passes(self) -> float:
        """Passes in which large factors for products would be made; 0 where none are."""
        return 0.0

    def _dense_by_columns(self, params: Sequence[Tensor]) -> Tensor:
        operator = self._rebuild(self._core, params)
        rows, columns = self.shape[-2:]
        transposed = rows < columns
        side = operator._transpose_nonbatch() if transposed else operator
        identity = torch.eye(min(rows, columns), dtype=self.dtype, device=self.device)
        product = side._lazy_product(params, identity.expand(*self.batch_shape, -1, -1))
        return product.mT.contiguous() if transposed else product

    def _dense_key(self) -> tuple[object, ...] | None:
        """Return the key of the dense block, or None where the parameters are not the snapshot."""
        snapshot = self._core.engine.linearization.parameters
        if self._core.engine.linearization.differentiable:
            return None
        if any(
            a.data_ptr() != s.data_ptr() or a.dtype != s.dtype
            for a, s in zip(self._args, snapshot, strict=True)
        ):
            return None
        versions = tuple(arg._version for arg in self._args)
        return ("dense", self._core.rows.key, self._core.columns.key, versions)

    def _stored_dense(self) -> Tensor | None:
        key = self._dense_key()
        return None if key is None else shared_store.get(self._core.engine.identity, key)

    def _store_dense(self, dense: Tensor) -> None:
        key = self._dense_key()
        if key is not None and tensor_bytes(self.shape, self.dtype) <= self._core.max_dense_bytes:
            shared_store.put(self._core.engine.identity, key, dense)

    def _dense_if_cheaper(self, columns: int) -> Tensor | None:
        """Return a dense block that exists, or build it once the products have cost as much.

        Building when the passes spent equal the cost of building is the classical rent-or-buy rule:
        never more than twice the cost of the best decision in hindsight.
        """
        if products_are_steady():
            return self._steady_dense()
        stored = self._stored_dense()
        if stored is not None:
            return stored
        if tensor_bytes(self.shape, self.dtype) > self._core.max_dense_bytes:
            return None
        core = self._core
        core.spending.passes += self.passes_per_column * columns
        cost = self._dense_cost()
        # Large factors take the memory of all layers: a block that takes hardly more passes is made in their
        # place, as soon as they would be.
        instead = self._factor_passes() * 1.5 >= cost
        if core.spending.passes <= (cost / 2 if instead else cost) or self._dense_key() is None:
            return None
        logger.info(
            "building the dense %s block (%s): products have cost %.0f passes, the block costs about %.0f",
            "x".join(map(str, self.shape)),
            format_bytes(tensor_bytes(self.shape, self.dtype)),
            core.spending.passes,
            cost,
        )
        return self._dense_built()

    def _steady_dense(self) -> Tensor | None:
        """Return the dense block if it pays for an iteration, whatever was multiplied so far."""
        fits = tensor_bytes(self.shape, self.dtype) <= self._core.max_dense_bytes
        if fits and self._dense_key() is not None and self._dense_cost() <= _MANY * self.passes_per_column:
            stored = self._stored_dense()
            return self._dense_built() if stored is None else stored
        self._settle()
        return None

    def _settle(self) -> None:
        """Let a layerwise engine make its factors now, where they fit."""
        core = self._core
        if core.spending.settled:
            return
        core.spending.settled = True
        if isinstance(core.engine, LayerwiseEngine):
            for axis in {core.rows, core.columns}:
                if isinstance(axis, StateAxis) and axis.inputs.num_samples:
                    core.engine.settle(tuple(self._args), axis.inputs)

    def _dense_built(self) -> Tensor:
        dense = self._dense_values(self._args)
        self._store_dense(dense)
        return dense
