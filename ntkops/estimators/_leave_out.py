r"""What a sketch says of traces and inner products, from small matrices alone.

For K = J Jᵀ and probes Ω, with G = Jᵀ Ω = Q R and F = J Q, the Nyström approximation of K on Ω is
:math:`\hat K = F F^\top`. Leaving probes S out gives that of the others, :math:`\hat K_S = F V V^\top F^\top`
with V an orthonormal basis of the columns of R outside S. A probe that was left out is independent of it,
and so is its part v orthogonal to the others, brought to the sphere of radius √(n - rank): then
:math:`E[v v^\top]` is the projection P off the others, and as :math:`(K - \hat K_S)` vanishes on them,

.. math:: E[v^\top (K - \hat K_S) v] = \mathrm{tr}(K - \hat K_S), \qquad
          E[v^\top (K_1 K_2 - \hat K_1 \hat K_2) v] = \mathrm{tr}(K_1 K_2 - \hat K_1 \hat K_2).

With :math:`\tilde R` the coordinates of Jᵀ v in Q and :math:`r = (I - V V^\top) \tilde R` all of it is small:

.. math:: v^\top (K - \hat K_S) v = |r|^2, \qquad
          v^\top (K_1 K_2 - \hat K_1 \hat K_2) v = r_1^\top C a_2 + a_1^\top C r_2 + r_1^\top C r_2,

where a = V Vᵀ R̃ and C = F₁ᵀ F₂ (M = Fᵀ F for one kernel). The second is the first carried over to inner
products; the projection of v, which is that of XNysTrace, takes noise out of it that is not in the first.
Source: Epperly, Tropp & Webber 2024 for the trace; the inner products were derived here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ._quantities import Inner, Trace
from ._statistics import Mean

__all__ = [
    # sketches of kernels
    "SketchNumbers",
    "form_variances",
    "held_out",
    "leave_one_out",
    "plain",
    "ritz_values",
    # what it takes to leave probes out
    "column_basis",
    "quadratic_forms",
    "removed_directions",
    "sphere_weights",
]

_REMOVABLE = 1e-8  # share of a probe in the null space of R from which it can be left out for nothing


@dataclass(frozen=True, eq=False)
class SketchNumbers:
    """The small matrices of a sketch of one or two kernels.

    Attributes:
        size: n, the number of entries of a probe.
        gram: ΩᵀΩ, ``(*batch, m, m)``, float64.
        coordinates: R of each kernel, ``(*batch, r, m)``, float64.
        products: C = FₐᵀF_b by the positions (a, b) of kernels, ``(*batch, r, r)``, float64.
        eps: Rounding unit of the products.
    """

    size: int
    gram: Tensor
    coordinates: Sequence[Tensor]
    products: dict[tuple[int, int], Tensor]
    eps: float

    @property
    def columns(self) -> int:
        """Number m of probes."""
        return self.gram.shape[-1]


def plain(numbers: SketchNumbers, moments: Sequence[Trace | Inner]) -> Tensor:
    """Return the moments of the approximation itself, ``(q, *batch)``: exact once the sketch is full."""
    return torch.stack(
        [
            numbers.products[m.of, m.of].diagonal(dim1=-2, dim2=-1).sum(-1)
            if isinstance(m, Trace)
            else numbers.products[m.first, m.second].square().sum((-2, -1))
            for m in moments
        ]
    )


def held_out(numbers: SketchNumbers, moments: Sequence[Trace | Inner], fold: Sequence[int]) -> list[Mean]:
    """Return moments whose samples are some of the probes, against the sketch of the others."""
    # Given the others, the samples are independent and alike, so that the error of their mean is the usual
    # one whatever the spectrum. That is why intervals rest on them and not on `leave_one_out`, whose terms
    # share all but one of their probes.
    kept = numbers.columns - len(fold)
    outside = set(fold)
    # the kept probes first: blocks of the small matrices are then slices
    order = [number for number in range(numbers.columns) if number not in outside] + list(fold)
    gram = numbers.gram[..., order, :][..., order]
    cross = gram[..., :kept, kept:]
    shares = torch.linalg.solve(gram[..., :kept, :kept], cross)  # of the others in each probe
    squares = gram[..., kept:, kept:].diagonal(dim1=-2, dim2=-1) - (cross * shares).sum(-2)
    # v = ω - Ω_kept (Ω_keptᵀ Ω_kept)⁻¹ Ω_keptᵀ ω, whose |v|² is the Schur complement of the Gram matrix; a
    # direction of that length is brought to √(n - kept).
    weights = sphere_weights(squares, numbers.size - kept, numbers.size)
    bases, insides, rests = [], [], []
    for coordinates in numbers.coordinates:
        R = coordinates[..., order]
        basis = column_basis(R[..., :kept], numbers.eps)
        turned = R[..., kept:] - R[..., :kept] @ shares
        inside = basis @ (basis.mT @ turned)
        bases.append(basis)
        insides.append(inside)
        rests.append(turned - inside)
    means = []
    for moment in moments:
        variances = None
        if isinstance(moment, Trace):
            basis, rest, M = bases[moment.of], rests[moment.of], numbers.products[moment.of, moment.of]
            # tr F V Vᵀ Fᵀ, and vᵀ (K - K̂_S) v = |r|²
            fixed = quadratic_forms(M, basis).sum(-1)
            samples = rest.square().sum(-2)
            # (K - K̂) v = F r, brought to the sphere like v
            variances = form_variances(
                weights * quadratic_forms(M, rest), weights * samples, numbers.size - kept
            )
        else:
            a, b = moment.first, moment.second
            C = numbers.products[a, b]
            fixed = (bases[a].mT @ C @ bases[b]).square().sum((-2, -1))
            samples = _cross_terms(C, insides[a], rests[a], insides[b], rests[b])
        means.append(Mean(weights * samples, fixed, variances=variances))
    return means


def form_variances(squares: Tensor, forms: Tensor, dimension: int | Tensor) -> Tensor:
    """Return 2 (|A v|² - (vᵀ A v)² / d) from both, the variance of a form without bias (`_intervals`)."""
    positive = torch.as_tensor(dimension).clamp(min=1)
    return 2 * (squares - forms.square() / positive).clamp(min=0)


def leave_one_out(numbers: SketchNumbers, moments: Sequence[Trace | Inner]) -> Tensor:
    """Return each moment with each probe left out in turn, ``(q, *batch, m)``; each is unbiased."""
    inverse = torch.linalg.inv(numbers.gram)
    diagonal = inverse.diagonal(dim1=-2, dim2=-1)
    # For S = {i} the complement is known for all i at once: v_i = Ω G⁻¹ e_i / (G⁻¹)_ii, |v_i|² = 1 /
    # (G⁻¹)_ii.
    turns = inverse / diagonal.unsqueeze(-2)  # columns: v in terms of the probes
    weights = sphere_weights(1 / diagonal, numbers.size - numbers.columns + 1, numbers.size)
    removed = [removed_directions(R, numbers.eps) for R in numbers.coordinates]
    lengths = [(t * R).sum(-2, keepdim=True) for t, R in zip(removed, numbers.coordinates, strict=True)]
    rests = [t * length for t, length in zip(removed, lengths, strict=True)]
    insides = []
    for R, t in zip(numbers.coordinates, removed, strict=True):
        turned = R @ turns
        insides.append(turned - t * (t * turned).sum(-2, keepdim=True))
    values = []
    for moment in moments:
        if isinstance(moment, Trace):
            t, M = removed[moment.of], numbers.products[moment.of, moment.of]
            # The span of R loses one direction t: V Vᵀ = I - t tᵀ, and tr F (I - t tᵀ) Fᵀ = tr M - tᵀ M t.
            fixed = M.diagonal(dim1=-2, dim2=-1).sum(-1, keepdim=True) - quadratic_forms(M, t)
            samples = rests[moment.of].square().sum(-2)
        else:
            a, b = moment.first, moment.second
            C = numbers.products[a, b]
            left, right = removed[a], removed[b]
            # |(I - t_a t_aᵀ) C (I - t_b t_bᵀ)|², multiplied out: m x m once, and three vectors a probe.
            image = C @ right
            fixed = C.square().sum((-2, -1)).unsqueeze(-1) - image.square().sum(-2)
            fixed = fixed - (C.mT @ left).square().sum(-2) + (left * image).sum(-2).square()
            samples = _cross_terms(C, insides[a], rests[a], insides[b], rests[b])
        values.append(fixed + weights * samples)
    return torch.stack(values)


def _cross_terms(C: Tensor, inside_a: Tensor, rest_a: Tensor, inside_b: Tensor, rest_b: Tensor) -> Tensor:
    """Return r₁ᵀ C a₂ + a₁ᵀ C r₂ + r₁ᵀ C r₂ column by column: no difference of large numbers."""
    image = C @ rest_b
    return (rest_a * (C @ inside_b)).sum(-2) + ((inside_a + rest_a) * image).sum(-2)


def quadratic_forms(A: Tensor, columns: Tensor) -> Tensor:
    """Return aᵀ A a for each column, ``(*batch, k)``."""
    return (columns * (A @ columns)).sum(-2)


def sphere_weights(squares: Tensor, dimension: int | Tensor, size: int) -> Tensor:
    """Return dimension / |v|²; where nothing but rounding is left of a probe, nothing."""
    floor = size * torch.finfo(squares.dtype).eps
    return torch.where(squares > floor, dimension / squares.clamp(min=floor), 0.0)


def column_basis(R: Tensor, eps: float) -> Tensor:
    """Return an orthonormal basis of the columns' span; directions that are rounding are zero columns."""
    if not R.numel():
        return R
    left, singular, _ = torch.linalg.svd(R, full_matrices=False)
    return left * (singular > _cutoff(singular, R, eps)).unsqueeze(-2)


def removed_directions(R: Tensor, eps: float) -> Tensor:
    """Return the unit vectors tᵢ that the span of the columns loses without column i, or zero.

    They are the columns of R⁻ᵀ, from an SVD. Where R is singular, a column that takes part in its null
    space depends on the others, and the span loses nothing.
    """
    if not R.shape[-2]:
        return R
    left, singular, right = torch.linalg.svd(R, full_matrices=False)
    kept = singular > _cutoff(singular, R, eps)
    inverse = torch.where(kept, 1 / torch.where(kept, singular, 1.0), 0.0)
    # Scaled by the smallest kept value, so that nothing overflows.
    scale = torch.where(kept, singular, torch.inf).amin(-1, keepdim=True)
    inverse = torch.where(kept, inverse * torch.where(scale.isfinite(), scale, 1.0), 0.0)
    directions = left @ (inverse.unsqueeze(-1) * right)
    lengths = directions.square().sum(-2, keepdim=True).sqrt()
    # Column i of R depends on the others iff e_i has a part in the null space of R: then the i-th column of
    # the kept rows of Vᵀ is shorter than 1.
    null_share = 1 - (right * kept.unsqueeze(-1)).square().sum(-2, keepdim=True)
    there = (lengths > 0) & (null_share <= _REMOVABLE)
    return torch.where(there, directions / torch.where(lengths > 0, lengths, 1.0), 0.0)


def _cutoff(singular: Tensor, R: Tensor, eps: float) -> Tensor:
    return singular[..., :1] * (max(R.shape[-2:]) * eps)


def ritz_values(numbers: SketchNumbers, kernel: int = 0) -> Tensor:
    """Return the eigenvalues of the approximation, ``(*batch, r)``, descending."""
    M = numbers.products[kernel, kernel]
    return torch.linalg.eigvalsh((M + M.mT) / 2).flip(-1).clamp(min=0)
