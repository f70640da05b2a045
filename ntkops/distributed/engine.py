"""An engine for rows that are spread over ranks: local passes, and one sum over the parameters.

Each rank holds samples of its own and all parameters. Jᵀv is a local product and one sum over ranks for a
whole block of columns, J p is local, and K v is the one after the other. Sums stand between two local
products, never inside a transform of torch.func. All ranks call the same methods in the same order; where
one of them fails, all of them raise.
"""

from __future__ import annotations

import math
import weakref
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor

from ..engines.base import Engine, Linearized
from ..engines.differentiation import Differentiation, Parameters
from ..engines.layerwise import LayerwiseEngine
from ..engines.memory import budget_bytes
from ..engines.passes import report_passes
from ..errors import NonFiniteError
from ..model import Inputs, Linearization
from ..results import PassCount
from .group import Ranks

__all__ = ["ShardedEngine"]

Result = TypeVar("Result")

_BLOCK_SHARE = 1 / 8  # of the memory budget of the rank with the least, for a block over the parameters
# Backward passes up to which factors are made before the first product: products then take one route from
# the first to the last, so that a computation that is gone on with has the same bits.
_SETTLED = 64


class ShardedEngine:
    """Products over rows that are spread over ranks.

    Args:
        ranks: The processes.
        local: The engine of this rank's samples; None where it holds none.
        linearization: The model, the same on all ranks.
        differentiation: What the model allows, as a rank with samples has found it.
        layered: Whether layer structure covers all parameters, on every rank that has samples.
    """

    name = "sharded"

    def __init__(
        self,
        ranks: Ranks,
        local: Engine | None,
        linearization: Linearization,
        differentiation: Differentiation,
        layered: bool = False,
    ) -> None:
        self.layered = layered
        self.ranks, self.local, self.linearization, self.differentiation = (
            ranks,
            local,
            linearization,
            differentiation,
        )
        self.num_parameters = linearization.num_parameters
        # The same number of columns on all ranks, or they would meet in sums of different shapes.
        column = max(1, self.num_parameters * linearization.dtype.itemsize)
        mine = int(budget_bytes(linearization.device) * _BLOCK_SHARE) // column
        self._columns = max(1, int(-ranks.largest(-mine)))
        self._settled: weakref.WeakKeyDictionary[Inputs, bool] = weakref.WeakKeyDictionary()

    @property
    def passes(self) -> PassCount:
        """Passes of this rank so far."""
        return PassCount() if self.local is None else self.local.passes

    def to(self, dtype: torch.dtype | None = None, device: torch.device | None = None) -> ShardedEngine:
        """Return the same engine for another dtype or device."""
        local = None if self.local is None else self.local.to(dtype=dtype, device=device)
        moved = self.linearization.to(dtype=dtype, device=device) if local is None else local.linearization
        return ShardedEngine(self.ranks, local, moved, self.differentiation, self.layered)

    def with_local(self, local: Engine | None) -> ShardedEngine:
        """Return the same engine with another one of this rank's samples; called by all ranks."""
        return ShardedEngine(self.ranks, local, self.linearization, self.differentiation, self.layered)

    def free(self) -> int:
        """Drop everything cached on this rank and return the bytes set free."""
        return 0 if self.local is None else self.local.free()

    def is_cached(self, inputs: Inputs) -> bool:
        """Return whether products with these samples come from factors, on all ranks alike.

        It is decided at their first product: where factors fit on every rank, and are cheap to make.
        """
        if inputs not in self._settled:
            refused = isinstance(self.local, LayerwiseEngine) and not self.local.may_cache(inputs, _SETTLED)
            none = self.local is not None and not isinstance(self.local, LayerwiseEngine)
            self._settled[inputs] = not self.ranks.any(inputs.num_samples > 0 and (refused or none))
        return self._settled[inputs]

    def cache_passes(self, inputs: Inputs) -> float:
        """Return 0: factors that are made take few passes, once, and are part of the first product."""
        return 0.0

    # products

    def vjp(self, params: Parameters, inputs: Inputs, vectors: Tensor) -> Tensor:
        """Return Jᵀv of all rows, ``(k, P)``, the same on all ranks, for this rank's ``(k, N, O)``."""
        cached = self.is_cached(inputs)
        parts = [self._pulled(params, inputs, inputs, c, cached)[0] for c in self._chunks(vectors)]
        return torch.cat(parts) if parts else vectors.new_zeros((0, self.num_parameters))

    def jvp(self, params: Parameters, inputs: Inputs, tangents: Tensor) -> Tensor:
        """Return this rank's rows ``(k, N, O)`` of J p, for ``(k, P)`` that are the same on all ranks."""
        cached = self.is_cached(inputs)

        def work() -> Tensor:
            return self._pushed(self._linearized(params, inputs, inputs, tangents, cached), inputs, tangents)

        return self.ranks.together(work, "J p")

    def product(self, params: Parameters, left: Inputs, right: Inputs, vectors: Tensor) -> Tensor:
        """Return this rank's rows of J(left) J(right)ᵀ v.

        Args:
            params: The selected parameters.
            left: N₁ samples of this rank.
            right: N₂ samples of this rank.
            vectors: ``(k, N₂, O)``: this rank's rows of v.

        Returns:
            ``(k, N₁, O)``. Cost: k vjp and k jvp passes over this rank's samples, and a sum over ranks of
            k·P numbers.
        """
        cached = self.is_cached(left) and (right is left or self.is_cached(right))
        parts = []
        for chunk in self._chunks(vectors):
            block, half = self._pulled(params, left, right, chunk, cached)
            push = partial(self._pushed, half, left, block)
            parts.append(self.ranks.together(push, "the second half of K v"))
        shape = (0, left.num_samples, left.num_outputs)
        return torch.cat(parts) if parts else vectors.new_zeros(shape)

    def _chunks(self, vectors: Tensor) -> list[Tensor]:
        """Cut a block by columns, on all ranks alike."""
        return list(vectors.split(self._columns)) if len(vectors) else []

    def _linearized(
        self, params: Parameters, left: Inputs, right: Inputs, vectors: Tensor, cached: bool
    ) -> Linearized | None:
        """Return what this rank multiplies by; None where it has no samples on either side."""
        if self.local is None or left.num_samples + right.num_samples == 0:
            return None
        local = self.local
        if isinstance(local, LayerwiseEngine):
            # Factors multiply on both sides of the sum, and a side without samples has none.
            both = left.num_samples > 0 and right.num_samples > 0
            local = local if cached and both else local.fallback
        return local.linearized(params, left, right, vectors, math.inf)

    def _pulled(
        self, params: Parameters, left: Inputs, right: Inputs, vectors: Tensor, cached: bool
    ) -> tuple[Tensor, Linearized | None]:
        """Return Jᵀv of all rows, this rank's part and the sum, and what the second half takes."""

        def work() -> tuple[Tensor, Linearized | None]:
            half = self._linearized(params, left, right, vectors, cached)
            if half is None or vectors.shape[1] == 0:
                report_passes(vjp=len(vectors))
                return vectors.new_zeros((len(vectors), self.num_parameters)), half
            return half.pull(vectors).contiguous(), half

        own, half = self.ranks.together(work, "Jᵀv")
        block = self.ranks.sum_(own)
        if not bool(torch.isfinite(block).all()):  # each part is: the sum has overflowed, on all ranks
            raise NonFiniteError(f"the sum of Jᵀv over {self.ranks.count} ranks overflows {block.dtype}")
        return block, half

    def _pushed(self, half: Linearized | None, inputs: Inputs, tangents: Tensor) -> Tensor:
        """Return this rank's rows ``(k, N, O)`` of J p."""
        if half is None or inputs.num_samples == 0:
            report_passes(jvp=len(tangents))
            return tangents.new_zeros((len(tangents), inputs.num_samples, inputs.num_outputs))
        return half.push(tangents)
