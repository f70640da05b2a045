"""Probes drawn sample by sample: trace, norm and what is made of them from a few per-sample passes.

Notation: V is O x m with orthonormal columns, uniformly distributed, P = V Vᵀ, B symmetric, W = Vᵀ B V. The
frame may have been drawn in several blocks of columns, orthogonal to each other, of which only the diagonal
blocks of W are known.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from ..errors import InputError
from ._quantities import Inner, Quantity, Trace
from ._request import Operand
from ._statistics import Summary
from ._stratified_grams import SampleGrams, Strata, gram_passes, sample_grams

__all__ = [
    "FrameMoments",
    "Stratified",
    "extend_frames",
    "pays",
    "projection_moments",
]


_FEWEST = 3.0  # samples that must carry an inner product for their spread to tell its error
_LEAST_REST = 0.5  # share of directions left out that the error counts with where blocks differ


class Stratified:
    r"""Moments of kernels from an independent frame of output combinations for each sample.

    Sample i draws m orthonormal combinations :math:`V_i` of its O outputs, uniformly and independently of
    all other samples. The gradients :math:`J_i^\top V_i` of one per-sample pass a column give
    :math:`W_{ij} = V_i^\top K_{ij} V_j` for all pairs. With c = O / m,

    .. math:: \mathrm{tr}\,K = E \sum_i c\,\mathrm{tr}\,W_{ii}, \qquad
              \langle K^1, K^2 \rangle = E \sum_{i \ne j} c^2 \langle W^1_{ij}, W^2_{ij} \rangle
              + E \sum_i s(W^1_{ii}, W^2_{ii}),

    where s undoes the second moments of a uniformly distributed projection. Samples do not meet in one
    probe, so the variance of the trace is that of the diagonal blocks alone, and at m = O nothing is random.

    The error: as a function of one frame, with all others held, the linearised quantity is
    :math:`c\,\mathrm{tr}(V_i^\top L_i V_i)` plus the part of s, and an unbiased estimate of the variance of
    the first is read off the frame itself. The sum over the samples is the Efron-Stein bound (Efron and Stein
    1981), never below the variance in expectation. The part of s, one pair in N, is judged by the
    difference of the two parts of each frame, or by the spread over the samples where the parts are too
    narrow; the two standard deviations are added.

    Columns that are drawn later are orthogonal to those before, and meet only each other: nothing is
    multiplied twice.
    """

    one_sided = False
    order = 1.0

    def __init__(self, quantity: Quantity, operands: Sequence[Operand], generator: torch.Generator) -> None:
        self._quantity, self._generator = quantity, generator
        self._strata = Strata.require(operands, quantity.name)
        self._pairs = [(m.first, m.second) for m in quantity.moments if isinstance(m, Inner)]
        self._frames = torch.empty((self._strata.samples, self._strata.outputs, 0), dtype=torch.float64)
        self._blocks: list[SampleGrams] = []

    @property
    def unit(self) -> int:
        """Per-sample passes of one column: one for each kernel."""
        return len(self._strata.operands)

    @property
    def size(self) -> int:
        """Columns with which nothing is left to chance."""
        return self._strata.outputs

    @property
    def least(self) -> int:
        """Fewest columns: squares of a sample's own block need two."""
        return min(2, self.size) if self._quantity.needs_pairs else 1

    @property
    def first(self) -> int:
        """Columns before the error is looked at for the first time."""
        return min(2, self.size)

    def price(self, columns: int) -> int:
        """Return the passes of going on to so many columns in all."""
        fresh = min(columns, self.size) - self._frames.shape[-1]
        return self.unit * gram_passes(self._strata.samples, max(fresh, 0), bool(self._pairs))

    def columns_for(self, rtol: float) -> float:
        """Return the columns that a tolerance takes at most, for samples that weigh the same.

        Var tr W_ii ≤ 2 m |K_ii|² / O² and |K_ii| ≤ tr K_ii make it 1.96² · 2 / (N rtol²) for the trace; the
        square root of a sum over pairs has the same relative error to first order.
        """
        return 2 * (1.96 / rtol) ** 2 / self._strata.samples

    def grow(self, columns: int) -> None:
        """Go on to so many columns in all, at most one for each output."""
        if columns < self.least:
            raise InputError(
                f"method='stratified' needs at least {self.least} columns for {self._quantity.name}, that is "
                f"num_passes={self.price(self.least)}; {columns} can be paid for"
            )
        fresh = min(columns, self.size) - self._frames.shape[-1]
        if fresh <= 0:
            return
        frames = extend_frames(self._frames, fresh, self._generator)
        self._frames = torch.cat([self._frames, frames], dim=-1)
        self._blocks.append(sample_grams(self._strata, frames, self._pairs))

    def summary(self) -> Summary:
        """Return the estimate as it stands."""
        found = _Sampled(self._quantity, self._strata.outputs, self._blocks)
        self._quantity.require_defined(found.moments)
        value = self._quantity.combine(found.moments)
        if len(self._blocks) == 1 and found.frame.columns == self.size:
            return Summary(value, torch.zeros_like(value), self._strata.samples, exact=True)
        stderr, freedom = found.error()
        return Summary(value, stderr, freedom)


@dataclass(frozen=True)
class _Sampled:
    """The moments in the frames that were drawn, and their error."""

    quantity: Quantity
    outputs: int
    blocks: Sequence[SampleGrams]

    @cached_property
    def frame(self) -> FrameMoments:
        return FrameMoments(self.outputs, tuple(block.own.shape[-1] for block in self.blocks))

    @cached_property
    def _traces(self) -> Tensor:
        """Traces of W_ii for each kernel, ``(p, N)``."""
        return sum((_trace(block.own) for block in self.blocks[1:]), start=_trace(self.blocks[0].own))

    @cached_property
    def _own_products(self) -> Tensor:
        """Estimates of <K¹_ii, K²_ii> for each pair of kernels, ``(q, N)``."""
        return self._own_products_of([block.own for block in self.blocks])

    def _own_products_of(self, owns: Sequence[Tensor]) -> Tensor:
        frame = FrameMoments(self.outputs, tuple(own.shape[-1] for own in owns))
        traces = sum((_trace(own) for own in owns[1:]), start=_trace(owns[0]))
        parts = []
        for moment in self.quantity.moments:
            if isinstance(moment, Inner):
                first, second = moment.first, moment.second
                products = torch.stack([(own[first] * own[second]).sum((-2, -1)) for own in owns]).sum(0)
                parts.append(frame.inner(products, traces[first] * traces[second]))
        return torch.stack(parts)

    @cached_property
    def moments(self) -> Tensor:
        """The estimated moments, ``(q,)``."""
        values, position = [], 0
        for moment in self.quantity.moments:
            if isinstance(moment, Trace):
                values.append(self.frame.scale * self._traces[moment.of].sum())
                continue
            between = sum(self._factor(block) * _trace(block.others[position]).sum() for block in self.blocks)
            values.append(self.frame.scale * between + self._own_products[position].sum())
            position += 1
        return torch.stack(values)

    def _factor(self, block: SampleGrams) -> float:
        return self.outputs / block.own.shape[-1]

    @cached_property
    def _weights(self) -> Tensor:
        """Derivatives of the quantity by its moments; 0 where it has none, at zero."""
        with torch.enable_grad():
            moments = self.moments.clone().requires_grad_()
            (weights,) = torch.autograd.grad(self.quantity.combine(moments), moments)
        return torch.nan_to_num(weights, nan=0.0, posinf=0.0, neginf=0.0)

    def error(self) -> tuple[Tensor, int]:
        """Return the standard error and its degrees of freedom."""
        linear = self._linear_variances()
        stderr = linear.sum().sqrt() + self._own_variance().sqrt()
        carrying = min(_effective_number(linear), self._carrying)
        share = 2 if carrying >= _FEWEST else 4
        return stderr, max(1, int(carrying * max(1.0, self.frame.columns / share)))

    @cached_property
    def _carrying(self) -> float:
        """Number of samples that carry the inner products, at least 1 and at most N."""
        return min(_effective_number(traces.square()) for traces in self._traces)

    def _linear_variances(self) -> Tensor:
        """Variance of the linearised quantity over the frame of each sample, the others held, ``(N,)``."""
        if self.frame.columns == 1 and self.outputs > 1:
            return self._spread(self.frame.scale * self._weights[0] * self._traces[0])
        parts = [self.frame.scale * self._linear(block) for block in self.blocks]
        means = sum((_trace(part) for part in parts[1:]), start=_trace(parts[0])) / self.frame.columns
        spread = torch.zeros_like(means)
        for part in parts:
            part.diagonal(dim1=-2, dim2=-1).sub_(means.unsqueeze(-1))
            spread += part.square().sum((-2, -1))
        several = len(self.blocks) > 1 and self.quantity.needs_pairs
        return self.frame.variance(spread, _LEAST_REST if several else 0.0)

    def _linear(self, block: SampleGrams) -> Tensor:
        """Return V_iᵀ L_i V_i in a block of columns, ``(N, m, m)``."""
        linear, position = torch.zeros_like(block.own[0]), 0
        for weight, moment in zip(self._weights, self.quantity.moments, strict=True):
            if isinstance(moment, Trace):
                linear = linear + weight * block.own[moment.of]
            else:
                # Σ_{i≠j} <W¹_ij, W²_ij> has V_i in its row and in its column of pairs, hence the 2.
                linear = linear + 2 * weight * self._factor(block) * block.others[position]
                position += 1
        return linear

    def _own_variance(self) -> Tensor:
        """Variance of the part that the samples' own blocks have in the inner products."""
        if not self.quantity.needs_pairs:
            return torch.zeros((), dtype=torch.float64)
        weights = torch.stack(
            [w for w, m in zip(self._weights, self.quantity.moments, strict=True) if isinstance(m, Inner)]
        )
        parts = self._two_parts()
        if parts is None:
            spread = self._spread(weights @ self._own_products).sum()
            return spread if self._carrying >= _FEWEST else torch.full_like(spread, torch.inf)
        sizes = [sum(own.shape[-1] for own in part) for part in parts]
        difference = weights @ (self._own_products_of(parts[0]) - self._own_products_of(parts[1]))
        # Parts of s₁ and s₂ columns have variances σ² / s₁ and σ² / s₂, their difference the sum of both, σ²
        # (s₁ + s₂) / (s₁ s₂); all columns together have σ² / (s₁ + s₂).
        return sizes[0] * sizes[1] / sum(sizes) ** 2 * difference.square().sum()

    def _two_parts(self) -> tuple[list[Tensor], list[Tensor]] | None:
        """Return the own blocks of two parts of the frames, None where a part is less than two columns."""
        left: list[Tensor] = []
        right: list[Tensor] = []
        for block in self.blocks:
            own, size = block.own, block.own.shape[-1]
            if size == 1:
                right.append(own)
                continue
            left.append(own[..., : size // 2, : size // 2])
            right.append(own[..., size // 2 :, size // 2 :])
        enough = all(sum(own.shape[-1] for own in part) >= 2 for part in (left, right))
        return (left, right) if enough else None

    @staticmethod
    def _spread(values: Tensor) -> Tensor:
        """Return squared deviations over the samples: at least the variances, if these are all there is."""
        count = len(values)
        if count < 2:
            return torch.full_like(values, torch.inf)
        return (values - values.mean()).square() * (count / (count - 1))


def pays(operands: Sequence[Operand]) -> bool:
    """Whether probes drawn sample by sample are what to estimate with: layer structure makes them cheap."""
    strata = Strata.of(operands)
    return strata is not None and strata.layered


def _effective_number(shares: Tensor) -> float:
    """Return (Σ x)² / Σ x² of numbers x ≥ 0; where all vanish, their number."""
    largest = shares.max()
    if not bool(largest > 0):
        return float(len(shares))
    shares = shares / largest
    return float(shares.sum().square() / shares.square().sum())


def _trace(blocks: Tensor) -> Tensor:
    return blocks.diagonal(dim1=-2, dim2=-1).sum(-1)


# -- random orthonormal frames of output combinations, one a sample, and the moments of their projections


def extend_frames(frames: Tensor, columns: int, generator: torch.Generator) -> Tensor:
    """Draw more columns for every frame, uniform on what is orthogonal to those that it has."""
    # frames (N, O, m), orthonormal columns, float64 on the CPU; the new ones are (N, O, k)
    count, outputs = frames.shape[:2]
    fresh = torch.randn((count, outputs, columns), generator=generator, dtype=torch.float64)
    if frames.shape[-1]:
        for _ in range(2):  # cancellation leaves a rest
            fresh = fresh - frames @ (frames.mT @ fresh)
            fresh = torch.linalg.qr(fresh)[0]
        return fresh
    if columns == 1:
        return fresh / torch.linalg.vector_norm(fresh, dim=1, keepdim=True)
    return torch.linalg.qr(fresh)[0]


def projection_moments(outputs: int, columns: int) -> tuple[float, float]:
    r"""Return the two coefficients of the second moments of P.

    .. math:: E[P_{ij} P_{kl}] = A\,\delta_{ij}\delta_{kl}
              + B\,(\delta_{ik}\delta_{jl} + \delta_{il}\delta_{jk}).

    They follow from :math:`\mathrm{tr}\,P = \mathrm{tr}\,P^2 = m`: the orthogonal Weingarten formula of order
    two (Collins and Śniady 2006).

    Args:
        outputs: Dimension O.
        columns: Rank m of the projection.

    Returns:
        A and B.
    """
    if outputs == 1:
        return 1.0, 0.0
    pairs = columns * (outputs - columns) / (outputs * (outputs + 2) * (outputs - 1))
    return (columns / outputs) ** 2 - 2 * pairs / outputs, pairs


@dataclass(frozen=True)
class FrameMoments:
    r"""Moments of a frame of m columns in blocks, for symmetric B.

    With :math:`a = \sum_b |W_{bb}|_F^2` over the blocks and :math:`t = \mathrm{tr}\,W`,

    .. math:: E\,t = \tfrac{m}{O} \mathrm{tr}\,B, \qquad
              E\,a = \alpha\,\mathrm{tr}\,B^2 + \beta\,(\mathrm{tr}\,B)^2, \qquad
              E\,t^2 = \gamma\,\mathrm{tr}\,B^2 + \delta\,(\mathrm{tr}\,B)^2,

    and likewise for the bilinear forms of two matrices.

    Attributes:
        outputs: Dimension O.
        blocks: Columns of each block.
    """

    outputs: int
    blocks: tuple[int, ...]

    @property
    def columns(self) -> int:
        """Number m of columns."""
        return sum(self.blocks)

    @property
    def scale(self) -> float:
        """Factor O / m from the trace in the frame to the trace."""
        return self.outputs / self.columns

    @property
    def rest(self) -> float:
        """Share of the directions that the frame leaves out."""
        return 1 - self.columns / self.outputs

    def _of_blocks(self) -> tuple[float, float]:
        pairs = [projection_moments(self.outputs, size) for size in self.blocks]
        return sum(a + b for a, b in pairs), sum(b for _, b in pairs)

    def inner(self, products: Tensor, traces: Tensor) -> Tensor:
        """Return the unbiased estimate of tr(B₁ B₂), an inner product of the blocks of W₁ and W₂."""
        alpha, beta = self._of_blocks()
        # E a = α x + β y and E t² = γ x + δ y with x = tr B₁B₂ and y = tr B₁ tr B₂: x = (δ a - β t²) / (α δ -
        # β γ).
        delta, half_gamma = projection_moments(self.outputs, self.columns)
        return (delta * products - beta * traces) / (alpha * delta - 2 * beta * half_gamma)

    def matrix(self) -> tuple[float, float]:
        """Return x and y with E[x Σ_b P_b B P_b - y tr(W) I] = B."""
        alpha, beta = self._of_blocks()
        return 1 / alpha, beta * self.scale / alpha

    def variance(self, spread: Tensor, least_rest: float = 0.0) -> Tensor:
        """Return the unbiased estimate of the variance of tr W."""
        # It hangs on the part of B without trace alone, and vanishes for the full frame.
        if self.outputs == 1:
            return torch.zeros_like(spread)
        alpha, _ = self._of_blocks()
        # Var t = γ (|B|² - (tr B)² / O), as δ = (m / O)² - γ / O: the part of B without trace, B₀. Of that
        # the spread sees E[a - t² / m] = (α - γ / m) |B₀|², for which β and δ do not count.
        gamma = 2 * projection_moments(self.outputs, self.columns)[1]
        counted = gamma
        if self.rest < least_rest:
            counted = 2 * self.columns * least_rest / ((self.outputs + 2) * (self.outputs - 1))
        # spread: Σ_b |W_bb - tr(W) / m I|² over the blocks
        return spread * (counted / (alpha - gamma / self.columns))
