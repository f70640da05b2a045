"""One map after another."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..errors import InputError
from .base import Projection

__all__ = ["Composition", "compose"]


class Composition(Projection):
    """The map x -> outer(inner(x)); made by `compose`.

    Args:
        outer: The map that comes last.
        inner: The map that comes first.
    """

    def __init__(self, outer: Projection, inner: Projection) -> None:
        super().__init__(inner.dim, outer.k, inner.seed)
        self.outer, self.inner = outer, inner

    def _arguments(self) -> dict[str, Any]:
        return {"outer": self.outer, "inner": self.inner}

    def _state_shape(self) -> tuple[int, ...]:
        return self.inner._state_shape()

    def _add(self, state: Tensor, block: Tensor, offset: int) -> None:
        self.inner._add(state, block, offset)

    def _read(self, state: Tensor) -> Tensor:
        return self.outer._image(self.inner._read(state), 0)

    def _pull(self, block: Tensor, start: int, stop: int) -> Tensor:
        return self.inner._pull(self.outer._pull(block, 0, self.outer.dim), start, stop)


def compose(*projections: Projection) -> Projection:
    """Return the map that applies the last projection first, as a product of matrices does.

    A cheap sparse map down to some thousands of entries, and a dense one from there to k, costs little
    more than the sparse one and has the tails of both. Independent maps that are each isometric on
    average are so together.

    Args:
        *projections: At least one; the dim of each is the k of the next.

    Returns:
        The projection. Cost: the sum of the costs.

    Raises:
        InputError: If there is none, one is no projection, or two neighbours do not fit.

    Example:
        >>> import torch
        >>> from ntkops.projections import CountSketch, Gaussian, compose
        >>> P = compose(Gaussian(256, 16, seed=1), CountSketch(10_000, 256, seed=0))
        >>> P.shape, P.apply(torch.ones(10_000)).shape
        (torch.Size([16, 10000]), torch.Size([16]))
    """
    if not projections or not all(isinstance(p, Projection) for p in projections):
        raise InputError("compose takes projections, the one that is applied last first")
    result = projections[-1]
    for outer in reversed(projections[:-1]):
        if outer.dim != result.k:
            raise InputError(
                f"a map from {outer.dim} entries cannot follow one to {result.k}: {outer!r} after {result!r}"
            )
        result = Composition(outer, result)
    return result
