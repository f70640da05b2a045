"""Factors that are kept for products, as long as the process's budget allows."""

from __future__ import annotations

import itertools
import weakref

import torch

from ..model import Inputs
from .cost import ProductRoute
from .differentiation import Parameters
from .memory import budget_bytes, shared_store
from .passes import take_spare
from .products import CachedFactors, prepare_products
from .readout import prepare_readout
from .source import LayerSource

__all__ = ["FactorCache"]

_CACHE_SHARE = 0.2  # of free memory, for the factors of one set of samples
_PRODUCT_PASSES = 4.0  # backward passes that one column of K v costs by automatic differentiation


class FactorCache:
    """Factors of whole sets of samples, made once products have cost as much as making them."""

    def __init__(self, identity: int) -> None:
        self._identity = identity
        self._held: dict[int, tuple[object, CachedFactors]] = {}
        self._spent: weakref.WeakKeyDictionary[Inputs, float] = weakref.WeakKeyDictionary()
        self._numbers: weakref.WeakKeyDictionary[Inputs, int] = weakref.WeakKeyDictionary()
        self._serials = itertools.count()
        self.closed = False

    def close(self) -> int:
        """Keep nothing any more, since memory ran out, and return the bytes set free."""
        self.closed = True
        return self.clear()

    def clear(self) -> int:
        """Drop everything and return the bytes set free."""
        self._held.clear()
        return shared_store.release(self._identity)

    def get(
        self, source: LayerSource, params: Parameters, inputs: Inputs, columns: float
    ) -> CachedFactors | None:
        """Return the factors of these samples for ``columns`` of K v, or None if they do not pay or fit."""
        if inputs not in self._numbers:
            self._numbers[inputs] = next(self._serials)
        number = self._numbers[inputs]
        # What factors are valid for: an optimiser's step changes the version, a cast dtype and address.
        state = tuple((p.data_ptr(), p._version, p.dtype, p.device) for p in params)
        held = self._held.get(number)
        if held is not None and held[0] == state and self._is_stored(number, held[1]):
            return held[1]
        # Made once products have cost as much: never more than twice the cost of the better choice in
        # hindsight.
        spent = self._spent.get(inputs, 0.0) + columns * _PRODUCT_PASSES
        self._spent[inputs] = spent
        backwards = source.coverage.backwards(inputs.num_outputs)
        if (
            backwards > min(spent, source.options.max_backwards)
            or (route := self._route(source, inputs)) is None
        ):
            return None
        if not take_spare(backwards):
            return None
        return self._make(source, params, inputs, number, state, *route)

    def fits(self, source: LayerSource, inputs: Inputs) -> bool:
        """Return whether the factors of some samples fit into their share of free memory."""
        return self._route(source, inputs) is not None

    def _route(self, source: LayerSource, inputs: Inputs) -> tuple[ProductRoute | None] | None:
        """Return the way of products whose factors fit, (None,) for the cheapest in each layer."""
        if inputs.is_streamed:  # what is read batch by batch is never held whole
            return None
        cover, directions = source.coverage, inputs.num_outputs
        # Behind a readout: factors of the body for its directions, and the d features of each position.
        read, readout, body = 0, cover.readout, cover.body
        if readout is not None and body is not None and readout.rank < directions:
            cover, directions, read = body, readout.rank, readout.rank
        fitting = _CACHE_SHARE * budget_bytes(source.device)
        # Gradients that are kept are fastest and largest; activations and output gradients may fit where they
        # do not.
        routes: tuple[ProductRoute | None, ...] = (source.options.product, "factors")
        for route in routes:
            entries = inputs.num_samples * (cover.product_entries(directions, route) + read)
            if entries * source.dtype.itemsize <= fitting:
                return (route,)
        return None

    def _make(
        self,
        source: LayerSource,
        params: Parameters,
        inputs: Inputs,
        number: int,
        state: object,
        route: ProductRoute | None,
    ) -> CachedFactors | None:
        """Return new factors, kept where the store takes all of their tensors."""
        ready: CachedFactors | None = prepare_readout(source, params, inputs, route)
        if ready is None:
            factors = source.of_outputs(params, inputs, torch.arange(inputs.num_outputs))
            ready = prepare_products(factors, source.rows, route)
        rows = source.coverage.backwards(inputs.num_outputs)
        source.count_rows(inputs.num_samples * rows, inputs)
        for position, tensor in enumerate(ready.tensors()):
            if not shared_store.put(self._identity, ("factors", number, position), tensor):
                return ready  # good for this product, too large to keep
        self._held[number] = state, ready
        return ready

    def _is_stored(self, number: int, ready: CachedFactors) -> bool:
        """Whether the shared store still holds every tensor: what it drops must be set free here, too."""
        kept = all(
            shared_store.get(self._identity, ("factors", number, position)) is tensor
            for position, tensor in enumerate(ready.tensors())
        )
        if not kept:
            self._held.pop(number, None)
        return kept
