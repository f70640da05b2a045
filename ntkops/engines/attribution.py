"""Whether the rows of what calls return belong to the samples that they are held to belong to.

Layer rules read per-sample gradients off the results of calls, where row r is taken for a row of sample n.
That depends on the data: a model may sort its samples, pack the valid ones, or route them by what they
contain. So it is asked of every batch that is used, by one backward pass more.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from ..errors import NtkopsError
from ..model.record import Call
from .layer_rules import Layout

__all__ = ["CoverageChanged", "RowCheck", "limit_of", "unattributable"]

# A row differs if it does by so many rounding units of the coarsest dtype in which the model computes; in
# half precision that would be everything, hence the limit.
_ROUNDING_UNITS = 1e3
_LARGEST_ROUNDING = 0.1
_MULTIPLE = 1.2345  # no power of two, which would round in the same way
_NOISE_FACTOR = 100.0


class CoverageChanged(NtkopsError):
    """A batch uses parameters in a way that layer rules cannot attribute to samples.

    Attributes:
        lost: The numbers of these parameters, each with the reason; none where it is a matter of the output.
    """

    def __init__(self, lost: Mapping[int, str], reason: str = "") -> None:
        super().__init__(reason or "; ".join(dict.fromkeys(lost.values())))
        self.lost = dict(lost)


def limit_of(dtype: torch.dtype) -> float:
    """Return the relative difference up to which two gradients of one row agree."""
    return min(_ROUNDING_UNITS * torch.finfo(dtype).eps, _LARGEST_ROUNDING)


def unattributable(
    calls: Sequence[Call], layouts: Mapping[tuple[object, ...], Layout], count: int
) -> dict[int, str]:
    """Return the calls whose rows are not one block for each of ``count`` samples, with the reason."""
    found: dict[int, str] = {}
    for number, call in enumerate(calls):
        layout = layouts.get(call.signature)
        if layout is None:
            found[number] = f"{call.rule}: a batch uses it in another way than the first samples did"
        elif call.shape[layout.axis] % count:
            found[number] = f"{call.rule}: its rows are not as many for every sample"
    return found


class RowCheck:
    r"""Compare one backward pass with the sum of the others, row by row.

    Directions are cotangents :math:`y_{cn}`, one for each sample; the gradients at the result of a call are
    :math:`G_c`, and backward passes are linear. With random numbers s_n, one a sample, and w_c, one a
    direction, the cotangents :math:`u_n = s_n \sum_c w_c y_{cn}` give, at a row r of sample n alone,

    .. math:: G_u[r] = s_n \sum_c w_c G_c[r],

    and at a row of sample m, with probability one, something else: :math:`s_m \ne s_n`. A row of several
    samples gives a sum with several s. Each row is read through its product with one random vector, and
    compared with what rounding may do to it, a share of :math:`|s_n| \sum_c |w_c| |G_c[r]|`.
    """

    def __init__(
        self,
        numbers: Sequence[int],  # of the calls that are looked at
        layouts: Mapping[int, Layout],
        cotangents: Tensor,  # (C, B, O)
        limit: float,  # the share
        numbers_of: Callable[[int], Tensor],  # fresh normal numbers in float64, (k,) for k
        vector_of: Callable[[int], Tensor],  # a fixed random vector, (k,) for k
        factors: tuple[Tensor, Tensor] | None = None,  # s and w, None for fresh ones
    ) -> None:
        self._numbers, self._layouts = numbers, layouts
        self._count, self._limit, self._vector_of = cotangents.shape[1], limit, vector_of
        self.factors = factors or (numbers_of(self._count), numbers_of(len(cotangents)))
        self._samples, self._weights = self.factors  # s, w
        self._sums: dict[int, Tensor] = {}
        self._scales: dict[int, Tensor] = {}
        self._gaps: dict[int, Tensor] = {}

    def cotangents(self, directions: Tensor) -> Tensor:
        """Return u, ``(1, B, O)``, for the ``(C, B, O)`` directions."""
        weights = self._weights.to(directions)
        # Unit vectors come as one for all samples: (C, 1, O), expanded.
        shared = directions.stride(1) == 0
        sent = directions[:, :1] if shared else directions
        combined = torch.tensordot(weights, sent, dims=1)
        return (self._samples.to(directions)[:, None] * combined).unsqueeze(0)

    def add(self, start: int, gradients: Mapping[int, Tensor | None]) -> None:
        """Take the gradients ``(K, *shape)`` of some directions, from number ``start`` on."""
        for number, found in gradients.items():
            if found is None:
                continue
            rows = self._rows(number, found)  # (K, rows, entries)
            weights = self._weights[start : start + len(rows)]
            sums = weights @ self._read(rows).double()
            scales = weights.abs() @ torch.linalg.vector_norm(rows, dim=2).double()
            if number in self._sums:
                self._sums[number] += sums
                self._scales[number] += scales
            else:
                self._sums[number], self._scales[number] = sums, scales

    def differing(
        self,
        gradients: Mapping[int, Tensor | None],
        again: Callable[[float], Mapping[int, Tensor | None]],
    ) -> list[int]:
        """Return the calls at which ``(1, *shape)`` gradients of u are others than they must be.

        Behind a norm of one feature, say, a gradient is all rounding, and belongs to nobody. Rounding is not
        linear: a row is excused where a multiple of u, which ``again`` gives, moves it by a hundredth of the
        difference.
        """
        found = self.suspects(gradients)
        if not found:
            return []
        multiples = again(_MULTIPLE)
        return [
            number
            for number, mask in found.items()
            if not self._is_rounding(number, mask, gradients, multiples)
        ]

    def suspects(self, gradients: Mapping[int, Tensor | None]) -> dict[int, Tensor]:
        """Return the calls at which the gradients of u differ, by rounding or not, and their rows that do."""
        return {n: mask for n in self._numbers if (mask := self._differs(n, gradients[n])).any()}

    def _differs(self, number: int, found: Tensor | None) -> Tensor:
        """Return which rows are others than they must be."""
        sums = self._sums.get(number)
        if found is None or sums is None:
            return torch.tensor(found is not None and bool(found.any()))
        factors, scales = self._by_row(number, len(sums)), self._scales[number]
        # A row that is all but rounding of the others is compared with that rounding.
        largest = float(scales.max()) if len(scales) else 0.0
        scales = scales.clamp(min=torch.finfo(found.dtype).eps * largest)
        self._gaps[number] = (self._read(self._rows(number, found))[0].double() - factors * sums).abs()
        # What is not a number does not differ: it is reported where results are looked at.
        return self._gaps[number] > self._limit * factors.abs() * scales

    def _is_rounding(
        self,
        number: int,
        rows: Tensor,
        gradients: Mapping[int, Tensor | None],
        multiples: Mapping[int, Tensor | None],
    ) -> bool:
        """Whether rows differ by rounding alone."""
        one, other = gradients[number], multiples[number]
        if one is None or other is None or number not in self._gaps:
            return False
        # G(c u) - c G(u) is zero but for rounding, since backward passes are linear.
        read = [self._read(self._rows(number, g))[0].double() for g in (one, other)]
        noise = (read[1] - _MULTIPLE * read[0]).abs()
        return bool((self._gaps[number] <= _NOISE_FACTOR * noise)[rows].all())

    def _rows(self, number: int, gradients: Tensor) -> Tensor:
        """Return ``(K, rows, entries)``, the axis of the samples in the middle."""
        axis = self._layouts[number].axis + 1
        moved = gradients if axis == 1 else gradients.movedim(axis, 1)
        return moved.reshape(len(moved), moved.shape[1], math.prod(moved.shape[2:]))

    def _read(self, rows: Tensor) -> Tensor:
        """Return the products of rows with a random vector, ``(K, rows)``."""
        return rows @ self._vector_of(rows.shape[2]).to(rows)

    def _by_row(self, number: int, rows: int) -> Tensor:
        """Return s of the sample of each row."""
        others = rows // self._count  # rows of one sample, whose numbers run fastest or slowest
        if self._layouts[number].major:
            return self._samples.repeat_interleave(others)
        return self._samples.repeat(others)
