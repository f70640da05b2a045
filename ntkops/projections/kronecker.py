"""A Kronecker map for each parameter matrix, which layers' factors meet without their gradient."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ..arguments import checked
from ..errors import InputError, OutOfRangeError
from .base import Projection
from .counter import sign_rows, stream_key

__all__ = ["LayerKronecker"]


class LayerKronecker(Projection):
    r"""Each parameter matrix M goes to :math:`G M A^\top`, and the images of all parameters are added.

    G (rows x d_out) and A (cols x d_in) have independent entries :math:`\pm 1/\sqrt{\mathrm{rows}}` and
    :math:`\pm 1/\sqrt{\mathrm{cols}}`, others for each parameter. Where the gradient of a sample is
    :math:`\sum_s g_s a_s^\top`, its image is :math:`\sum_s (G g_s)(A a_s)^\top`, so that the gradient
    itself is never written down. A parameter of shape (d, ...) is the matrix d x (the rest); a vector is
    a matrix of one column.

    Inner products are unbiased, but the variance is that of a product of two small maps: up to
    :math:`(1 + 2/\mathrm{rows})(1 + 2/\mathrm{cols}) - 1` relative to the squared length instead of 2/k.
    It is for gradients that cannot be written down.

    Args:
        shapes: Shapes of the selected parameters, in order: ``[p.shape for p in model.parameters()]``.
        rows: Rows of G.
        cols: Rows of A; k = rows · cols.
        seed: Integer that fixes the map; None draws one.
        generator: CPU generator from which the seed is drawn.

    Cost on plain gradients: 2 min(rows, cols) operations an entry or fewer. Memory: G and A of one
    parameter, and an intermediate result.

    Source: the factored projections of Choe et al., What is your data worth to GPT? (2024), with random
    signs and a sum over layers.

    Raises:
        InputError: If there are no shapes, or a number of rows is not positive.

    Example:
        >>> import torch
        >>> from ntkops.projections import LayerKronecker
        >>> P = LayerKronecker([(5, 3), (5,)], rows=4, cols=2, seed=0)
        >>> P.k, P.dim
        (8, 20)
        >>> G, A = P.factors(0)
        >>> M = torch.randn(5, 3)
        >>> torch.allclose(P.apply(M.flatten()), (G @ M @ A.mT).flatten(), atol=1e-6)
        True
    """

    _may_be_tall = True  # rows and columns are chosen for each matrix, not for all parameters

    @checked
    def __init__(
        self,
        shapes: Sequence[Sequence[int]],
        rows: int = 16,
        cols: int = 32,
        seed: int | None = None,
        *,
        generator: torch.Generator | None = None,
    ) -> None:
        for name, size in (("rows", rows), ("cols", cols)):
            if not isinstance(size, int) or isinstance(size, bool) or size < 1:
                raise InputError(f"{name}={size!r}: pass a positive integer")
        self.shapes = tuple(tuple(int(size) for size in shape) for shape in shapes)
        self.rows, self.cols = rows, cols
        sizes = [math.prod(shape) for shape in self.shapes]
        if sum(sizes) < 1:
            raise InputError("shapes is empty: pass the shapes of the selected parameters, in order")
        super().__init__(sum(sizes), rows * cols, seed, generator=generator)
        self.starts = (0, *itertools.accumulate(sizes))

    def _arguments(self) -> dict[str, Any]:
        return {"shapes": self.shapes, "rows": self.rows, "cols": self.cols, "seed": self.seed}

    def matrix_shape(self, index: int) -> tuple[int, int]:
        """Return d_out and d_in of a parameter."""
        shape = self.shapes[index]
        return (shape[0], math.prod(shape[1:])) if shape else (1, 1)

    def factors(
        self, index: int, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
    ) -> tuple[Tensor, Tensor]:
        """Return G and A of a parameter.

        Args:
            index: Number of the parameter.
            dtype: Floating dtype of the result.
            device: Where it is wanted.

        Returns:
            ``(rows, d_out)`` and ``(cols, d_in)``.

        Raises:
            OutOfRangeError: If there is no such parameter.
        """
        if not 0 <= index < len(self.shapes):
            raise OutOfRangeError(f"parameter {index} does not exist: there are {len(self.shapes)} shapes")
        sides = zip(("left", "right"), self.matrix_shape(index), (self.rows, self.cols), strict=True)
        left, right = (
            sign_rows(self._key(index, side), 0, length, height, dtype, device).mT / math.sqrt(height)
            for side, length, height in sides
        )
        return left, right

    def _key(self, index: int, side: str) -> int:
        # By the place of the parameter in the flat vector, as in the other maps.
        return stream_key(self.seed, type(self).__name__, self.rows, self.cols, self.starts[index], side)

    def _overlaps(self, start: int, stop: int) -> Iterator[tuple[int, int, int]]:
        """Yield each parameter that a range touches, with the part of it that it covers."""
        for index, (low, high) in enumerate(itertools.pairwise(self.starts)):
            first, last = max(start, low), min(stop, high)
            if first < last:
                yield index, first - low, last - low

    def _add(self, state: Tensor, block: Tensor, offset: int) -> None:
        for index, low, high in self._overlaps(offset, offset + block.shape[1]):
            left, right = self.factors(index, block.dtype, block.device)
            width = right.shape[1]
            first, last = low // width, -(-high // width)
            shift = self.starts[index] - offset
            part = block[:, low + shift : high + shift]
            if (low, high) != (first * width, last * width):  # whole rows of the matrix, zeros added
                part = torch.nn.functional.pad(part, (low - first * width, last * width - high))
            matrix = part.unflatten(1, (last - first, width))  # (B, d, d_in)
            state += _sandwich(left[:, first:last], matrix, right).flatten(1)

    def _read(self, state: Tensor) -> Tensor:
        return state

    def _pull(self, block: Tensor, start: int, stop: int) -> Tensor:
        result = block.new_empty((len(block), stop - start))
        image = block.unflatten(1, (self.rows, self.cols))
        for index, low, high in self._overlaps(start, stop):
            left, right = self.factors(index, block.dtype, block.device)
            width = right.shape[1]
            first, last = low // width, -(-high // width)
            found = _sandwich(left[:, first:last].mT, image, right.mT).flatten(1)
            place = self.starts[index] + low - start
            result[:, place : place + high - low] = found[:, low - first * width : high - first * width]
        return result


def _sandwich(left: Tensor, matrix: Tensor, right: Tensor) -> Tensor:
    """Return left M rightᵀ for each M of ``(B, d_out, d_in)``, the more expensive axis first."""
    # the longer side is contracted first: the second product is then over the shorter one
    if matrix.shape[1] > matrix.shape[2]:
        return (left @ matrix) @ right.mT
    return left @ (matrix @ right.mT)
