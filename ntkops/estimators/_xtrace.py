r"""XTrace: Hutch++ whose probes are also its sketch, each judged against the range of the others.

Source: Epperly, Tropp & Webber, SIAM J. Matrix Anal. Appl. 45 (2024) 1-23. Y = K Ω, Q an orthonormal basis of
Y, Z = K Q. Without probe i the range is that of :math:`Q V`, with :math:`V V^\top = I - t_i t_i^\top`, and

.. math:: \mathrm{tr}\,A = \mathrm{tr}(V^\top Q^\top A Q V) + E[v^\top A v],

with v the part of probe i orthogonal to Q V, brought to the sphere. For A = K that is XTrace; the same two
products also give A = KᵀK, hence the Frobenius norm and the effective rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import InputError
from ._leave_out import (
    column_basis,
    form_variances,
    quadratic_forms,
    removed_directions,
    sphere_weights,
)
from ._quantities import Inner, Trace
from ._request import Operand
from ._sketch import new_directions
from ._statistics import Combination, Mean, Summary, summarize_folds
from ._two_sided import by_parts, draw_probes

__all__ = ["XTrace"]


@dataclass(frozen=True, eq=False)
class _Numbers:
    """Small matrices: QᵀY, QᵀΩ, QᵀKQ, ΩᵀKQ, (KQ)ᵀKQ and the squared lengths of the probes, in float64."""

    R: Tensor
    X: Tensor
    H: Tensor
    B: Tensor
    M: Tensor
    squares: Tensor
    size: int
    eps: float

    def samples(self, moment: Trace | Inner, R: Tensor, X: Tensor, B: Tensor, inside: Tensor) -> Tensor:
        """Return vᵀ A v for v = ω - Q a and K v = Q R - Z a, by columns."""
        if isinstance(moment, Trace):
            # (ω - Q a)ᵀ (Q R - Z a) = (X - a)ᵀ R - (Ωᵀ Z) a + aᵀ (Qᵀ Z) a; Qᵀ Z = H
            return ((X - inside) * R).sum(-2) - (B.mT * inside).sum(-2) + quadratic_forms(self.H, inside)
        # |Q R - Z a|² = |R|² - 2 Rᵀ H a + aᵀ M a: the same a, no further product
        return R.square().sum(-2) - 2 * (R * (self.H @ inside)).sum(-2) + quadratic_forms(self.M, inside)

    def whole(self, moment: Trace | Inner) -> Tensor:
        return self.H if isinstance(moment, Trace) else self.M


class XTrace:
    """Trace and norm of a square operator, symmetric or not, from two products a column."""

    one_sided = False
    order = 2.0
    least = 3

    def __init__(self, operand: Operand, generator: torch.Generator) -> None:
        operand.require_square("xtrace")
        self._operand, self._generator, self._space = operand, generator, operand.columns
        self.limit = self._space.size
        shape = (*operand.batch_shape, self._space.length, 0)
        self._probes = torch.empty(shape, dtype=operand.dtype, device=operand.device)
        self._products = self._basis = self._images = self._probes

    @property
    def unit(self) -> int:
        """Passes of one column: its product, and that of a direction of the range."""
        return 2 * self._operand.cost

    @property
    def columns(self) -> int:
        """Probes so far."""
        return self._probes.shape[-1]

    @property
    def full(self) -> bool:
        """Whether the range is the whole space."""
        return self.columns >= self.limit

    def grow(self, columns: int) -> None:
        """Go on to so many probes in all."""
        if columns < min(self.least, self.limit):
            raise InputError(
                f"xtrace takes at least {self.least} columns, that is num_passes={self.least * self.unit}; "
                f"{columns} can be paid for"
            )
        count = min(columns, self.limit) - self.columns
        if count <= 0:
            return
        probes = draw_probes(self._space, self._operand.batch_shape, count, self._generator)
        products = by_parts(self._operand.multiply, probes)
        fresh = new_directions(self._space, self._basis, products)
        self._probes = torch.cat([self._probes, probes], dim=-1)
        self._products = torch.cat([self._products, products], dim=-1)
        if fresh.shape[-1]:
            self._basis = torch.cat([self._basis, fresh], dim=-1)
            self._images = torch.cat([self._images, by_parts(self._operand.multiply, fresh)], dim=-1)

    def _numbers(self) -> _Numbers:
        inner, Q, Z = self._space.inner, self._basis, self._images
        return _Numbers(
            R=inner(Q, self._products).cpu(),
            X=inner(Q, self._probes).cpu(),
            H=inner(Q, Z).cpu(),
            B=inner(self._probes, Z).cpu(),
            M=inner(Z, Z).cpu(),
            squares=self._space.sum_squares(self._probes).cpu(),
            size=self._space.size,
            eps=torch.finfo(Q.dtype).eps,
        )

    def summary(self, moments: Sequence[Trace | Inner], combine: Combination) -> Summary:
        """Return a function of moments: the value from leaving out each probe, the error from folds."""
        numbers = self._numbers()
        if self.full:
            values = [numbers.whole(m).diagonal(dim1=-2, dim2=-1).sum(-1) for m in moments]
            value = combine(torch.stack(values, dim=-1))
            return Summary(value, torch.zeros_like(value), freedom=2**30, exact=True)
        value = combine(_leave_one_out(numbers, moments).mean(-1).movedim(0, -1))

        def means(fold: Sequence[int]) -> list[Mean]:
            return _held_out(numbers, moments, fold)

        alone = len(moments) == 1 and isinstance(moments[0], Trace)
        return summarize_folds(value, self.columns, means, None if alone else combine)

    def approximate(self, moments: Sequence[Trace | Inner]) -> Tensor:
        """Return the moments within the range, ``(*batch, q)``."""
        numbers = self._numbers()
        return torch.stack([numbers.whole(m).diagonal(dim1=-2, dim2=-1).sum(-1) for m in moments], dim=-1)


def _leave_one_out(numbers: _Numbers, moments: Sequence[Trace | Inner]) -> Tensor:
    R, X, B = numbers.R, numbers.X, numbers.B
    t = removed_directions(R, numbers.eps)
    removed = (t * X).sum(-2)
    inside = X - t * removed.unsqueeze(-2)
    # 1 where the range loses a direction without the probe, 0 where the probe was superfluous
    rank = (t.square().sum(-2) > 0.5).double()
    squares = numbers.squares - inside.square().sum(-2)
    weights = sphere_weights(squares, numbers.size - R.shape[-2] + rank, numbers.size)
    values = []
    for moment in moments:
        A = numbers.whole(moment)
        fixed = A.diagonal(dim1=-2, dim2=-1).sum(-1, keepdim=True) - quadratic_forms(A, t)
        values.append(fixed + weights * numbers.samples(moment, R, X, B, inside))
    return torch.stack(values)


def _held_out(numbers: _Numbers, moments: Sequence[Trace | Inner], fold: Sequence[int]) -> list[Mean]:
    chosen, outside = list(fold), set(fold)
    others = [number for number in range(numbers.R.shape[-1]) if number not in outside]
    basis = column_basis(numbers.R[..., others], numbers.eps)
    R, X, B = numbers.R[..., chosen], numbers.X[..., chosen], numbers.B[..., chosen, :]
    inside = basis @ (basis.mT @ X)
    squares = numbers.squares[..., chosen] - inside.square().sum(-2)
    rank = basis.square().sum((-2, -1)).round().unsqueeze(-1)
    weights = sphere_weights(squares, numbers.size - rank, numbers.size)
    means = []
    for moment in moments:
        fixed = quadratic_forms(numbers.whole(moment), basis).sum(-1)
        samples, variances = numbers.samples(moment, R, X, B, inside), None
        if isinstance(moment, Trace):
            # |(I - BBᵀ) K v|², with K v = Q R - Z a, whose part in Q is R - H a
            image = R - numbers.H @ inside
            lengths = R.square().sum(-2) - 2 * (R * (numbers.H @ inside)).sum(-2)
            lengths = lengths + quadratic_forms(numbers.M, inside) - (basis.mT @ image).square().sum(-2)
            variances = form_variances(weights * lengths, weights * samples, numbers.size - rank)
        means.append(Mean(weights * samples, fixed, variances=variances))
    return means
