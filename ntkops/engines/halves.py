"""The two halves of products K v, between which something may be done with Jᵀ v: a sum over ranks."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..model import Inputs
from .checks import require_finite_product
from .differentiation import LinearizedBatch, Parameters

if TYPE_CHECKING:
    from .autograd import AutogradEngine
    from .layerwise import LayerwiseEngine

__all__ = ["AutogradHalves", "LayerwiseHalves", "layerwise_halves", "may_cache"]

_Kept = list[LinearizedBatch]  # the linearised samples, where one pass holds all of them; else empty


class AutogradHalves:
    """The two halves of products K v: Jᵀ v, and J of what is made of it.

    Args:
        engine: The engine.
        params: The selected parameters.
        left: N₁ samples.
        right: N₂ samples.
    """

    def __init__(self, engine: AutogradEngine, params: Parameters, left: Inputs, right: Inputs) -> None:
        self._engine, self._params, self._left, self._right = engine, params, left, right
        self._kept_right: _Kept = []
        self._kept_left: _Kept = self._kept_right if left is right else []

    def through(self, vectors: Tensor) -> Tensor:
        """Return J(left) J(right)ᵀ v of one chunk, without flattening in between."""
        pulled = self._engine._pull(self._params, self._right, self._kept_right, vectors)
        return self._engine._push(self._params, self._left, self._kept_left, pulled)

    def pull(self, vectors: Tensor) -> Tensor:
        """Return J(right)ᵀ v, ``(k, P)``, for ``(k, N₂, O)``. Cost: k vjp passes."""
        engine = self._engine
        with engine.linearization.safe_context():
            parts = engine._in_columns(
                vectors,
                lambda chunk: _flatten(engine._pull(self._params, self._right, self._kept_right, chunk)),
            )
        engine._report(vjp=len(vectors))
        result = torch.cat(parts) if parts else vectors.new_zeros((0, engine.num_parameters))
        require_finite_product(result, "Jᵀv", engine.linearization, vectors)
        return result

    def push(self, tangents: Tensor) -> Tensor:
        """Return J(left) p, ``(k, N₁, O)``, for ``(k, P)``. Cost: k jvp passes."""
        engine, left = self._engine, self._left
        with engine.linearization.safe_context():
            parts = engine._in_columns(
                tangents,
                lambda chunk: engine._push(self._params, left, self._kept_left, engine._split(chunk)),
            )
        engine._report(jvp=len(tangents))
        empty = tangents.new_zeros((0, left.num_samples, left.num_outputs))
        result = torch.cat(parts) if parts else empty
        require_finite_product(result, "J p", engine.linearization, tangents)
        return result


class LayerwiseHalves:
    """The two halves of products K v from cached factors.

    Args:
        engine: The engine, which has the factors.
        params: The selected parameters.
        left: N₁ samples.
        right: N₂ samples.
    """

    def __init__(self, engine: LayerwiseEngine, params: Parameters, left: Inputs, right: Inputs) -> None:
        self._engine, self._params, self._left, self._right = engine, params, left, right

    def pull(self, vectors: Tensor) -> Tensor:
        """Return J(right)ᵀ v, ``(k, P)``, for ``(k, N₂, O)``."""
        return self._engine.vjp(self._params, self._right, vectors)

    def push(self, tangents: Tensor) -> Tensor:
        """Return J(left) p, ``(k, N₁, O)``, for ``(k, P)``."""
        return self._engine.jvp(self._params, self._left, tangents)


def layerwise_halves(
    engine: LayerwiseEngine, params: Parameters, left: Inputs, right: Inputs, vectors: Tensor, *, cached: bool
) -> AutogradHalves | LayerwiseHalves:
    """Return the two halves of products J(left) J(right)ᵀ v of a layerwise engine.

    Args:
        engine: The engine.
        params: The selected parameters.
        left: N₁ samples.
        right: N₂ samples.
        vectors: What is about to be multiplied.
        cached: Make factors now and use them; False differentiates automatically, whatever there is.
    """
    if cached and engine._ready(params, left, right, math.inf, vectors) is not None:
        return LayerwiseHalves(engine, params, left, right)
    return engine._autograd.halves(params, left, right)


def may_cache(engine: LayerwiseEngine, inputs: Inputs, limit: int) -> bool:
    """Return whether factors of some samples fit, and take at most so many backward passes."""
    if not engine._coverage.covered or engine._cache.closed:
        return False
    backwards = engine._coverage.backwards(inputs.num_outputs)
    allowed = min(limit, engine.options.max_backwards)
    return backwards <= allowed and engine._cache.fits(engine._source, inputs)


def _flatten(blocks: Parameters) -> Tensor:
    return torch.cat([block.flatten(1) for block in blocks], dim=1)
