"""The estimators themselves: how moments come from products, one-sided passes and sketches."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..errors import InputError, UnsupportedOperationError
from ..operators.counting import multiply
from ._moments import MeanMoments, PairMoments
from ._quantities import Quantity
from ._request import Operand

__all__ = ["forward_forms", "hutch_plus_plus", "hutchinson", "one_sided_trace", "pairs", "reverse_forms"]

_WIDTH = 64  # probe columns that are held at a time


def _expanded(probes: Tensor, operand: Operand) -> Tensor:
    return probes.expand(*operand.batch_shape, *probes.shape[-2:])


def _probe_moments(quantity: Quantity, probes: Tensor) -> Tensor:
    """Return ``(*batch, k, q)`` moments of given columns, a few of them at a time."""
    parts = []
    for block in probes.split(_WIDTH, dim=-1):
        products = [operand.multiply(block) for operand in quantity.operands]
        parts.append(quantity.moments(_expanded(block, quantity.first), products))
    return torch.cat(parts, dim=-2)


def hutchinson(quantity: Quantity, count: int, generator: torch.Generator) -> MeanMoments:
    r"""Hutchinson's estimator: :math:`\mathrm{tr}\,A = E[v^\top A v]` with Rademacher probes.

    Args:
        quantity: What is estimated; all its operators see the same probes.
        count: Number of probes.
        generator: Draws them.

    Returns:
        Moments without a deterministic part. Cost: one product column a probe and operator.
    """
    probes = quantity.first.space.probes(count, generator)
    samples = _probe_moments(quantity, probes)
    return MeanMoments(samples.new_zeros((*samples.shape[:-2], samples.shape[-1])), samples)


def hutch_plus_plus(quantity: Quantity, columns: int, generator: torch.Generator) -> MeanMoments:
    r"""Hutch++ (paper, Algorithm 1; Meyer, Musco, Musco, Woodruff 2021).

    .. math:: \mathrm{tr}\,A = \mathrm{tr}(Q^\top A Q) + \mathrm{tr}((I - QQ^\top) A (I - QQ^\top))

    with Q an orthonormal basis of the products with a random sketch, the first term exactly and the
    second by Hutchinson. It holds for any Q that does not see the residual probes, so every moment that
    is the trace of some A (K itself, KᵀK, K₁ᵀK₂) is unbiased with one and the same Q. With one operator
    a third of the columns goes into the sketch, at most a third into Q, and the rest into the residual,
    whose mean divides by the probes really used.

    Args:
        quantity: What is estimated; two operators share Q and the residual probes.
        columns: Product columns for each operator in all, at least 3 (4 for two operators).
        generator: Draws sketch and probes.

    Returns:
        Moments; the deterministic part has no error of its own.

    Raises:
        InputError: If there are too few columns for the three stages.
    """
    stages = 2 + len(quantity.operands)
    if columns < stages:
        raise InputError(
            f"hutch++ needs at least {stages} product columns, {columns} were left; raise num_passes to "
            f"{stages * quantity.passes_per_column} or more"
        )
    space = quantity.first.space
    width = min(columns // stages, space.size)
    sketch = space.probes(width, generator)
    spans = [operand.multiply(sketch) for operand in quantity.operands]
    basis = space.orthonormalize(torch.cat(spans, dim=-1))  # (*batch, n, r)
    constant = _zero_moments(quantity)
    if basis.shape[-1]:
        constant = _probe_moments(quantity, basis).sum(-2)
    if basis.shape[-1] >= space.size:  # nothing is left: exact
        return MeanMoments(constant, constant.new_zeros((*constant.shape[:-1], 1, constant.shape[-1])))
    probes = space.probes(max(1, columns - width - basis.shape[-1]), generator)
    for _ in range(2):
        probes = probes - basis @ space.inner(basis, probes).to(basis.dtype)
    return MeanMoments(constant, _probe_moments(quantity, probes))


def _zero_moments(quantity: Quantity) -> Tensor:
    first = quantity.first
    empty = torch.zeros((*first.batch_shape, first.size, 1), dtype=first.dtype, device=first.device)
    rows = torch.zeros((*first.batch_shape, first.shape[-2], 1), dtype=first.dtype, device=first.device)
    return quantity.moments(empty, [rows] * len(quantity.operands)).sum(-2)


def _factors(operand: Operand) -> tuple[Operand, Operand]:
    found = operand.structure.factors()
    if found is None:
        raise UnsupportedOperationError(
            "one-sided estimators need the factors of K = L Rᵀ, which this operator does not have; use "
            "method='hutch++' or 'hutchinson'"
        )
    left, right = found
    return Operand(left), Operand(left) if right is left else Operand(right)


def _pull(factor: Operand, probes: Tensor) -> Tensor:
    """Return Lᵀ U, ``(*batch, P, m)``."""
    return multiply(factor.operator.mT, probes.expand(*factor.batch_shape, *probes.shape[-2:]))


def one_sided_trace(
    operand: Operand, count: int, generator: torch.Generator, *, forward: bool, orthogonalize: bool
) -> MeanMoments:
    r"""One-sided trace (paper, Algorithm 2): :math:`\mathrm{tr}(L R^\top) = E[(L^\top v)^\top (R^\top v)]`.

    Args:
        operand: A square operator with factors.
        count: Number of passes for each distinct factor.
        generator: Draws the probes.
        forward: Probe the parameters (jvp, FHutch) instead of the states (vjp, RHutch).
        orthogonalize: Spend half the probes on an orthonormal basis of random directions, whose part of
            the trace is then exact: worth it only where the probes are not few against the dimension.

    Returns:
        Moments of the trace.
    """
    left, right = _factors(operand)
    same = operand.structure.symmetric
    space = left.space if forward else operand.structure.space

    def value(block: Tensor) -> Tensor:
        if forward:
            first = left.multiply(block)
            second = first if same else right.multiply(block)
        else:
            first = _pull(left, block)
            second = first if same else _pull(right, block)
        return (first.double() * second.double()).sum(-2).unsqueeze(-1)  # (*batch, k, 1)

    def values(block: Tensor) -> Tensor:
        return torch.cat([value(part) for part in block.split(_WIDTH, dim=-1)], dim=-2)

    if not orthogonalize or count < 4:
        samples = values(space.probes(count, generator))
        return MeanMoments(samples.new_zeros((*samples.shape[:-2], 1)), samples)
    basis = space.orthonormalize(space.probes(min(count // 2, space.size), generator))
    constant = values(basis).sum(-2)
    if basis.shape[-1] >= space.size:
        return MeanMoments(constant, constant.new_zeros((*constant.shape[:-1], 1, 1)))
    probes = space.probes(count - basis.shape[-1], generator)
    for _ in range(2):
        probes = probes - basis @ space.inner(basis, probes).to(basis.dtype)
    return MeanMoments(constant, values(probes))


def reverse_forms(operand: Operand, probes: Tensor) -> Tensor:
    """Return W = (Lᵀ U)ᵀ (Rᵀ U), ``(*batch, m, m)``, from vjps alone."""
    left, right = _factors(operand)
    first = _pull(left, probes)
    second = first if operand.structure.symmetric else _pull(right, probes)
    return first.double().mT @ second.double()


def forward_forms(operand: Operand, probes: Tensor) -> Tensor:
    """Return W = (R P)ᵀ (L P), ``(*batch, m, m)``, from jvps alone."""
    left, right = _factors(operand)
    first = left.multiply(probes)
    second = first if operand.structure.symmetric else right.multiply(probes)
    return second.double().mT @ first.double()


def pairs(quantity: Quantity, count: int, generator: torch.Generator, *, forward: bool) -> PairMoments:
    r"""Proposition 1 over all pairs of probes: products of kernels from one direction of differentiation.

    For independent isotropic u, v: :math:`\mathrm{tr}(K_1 K_2) = E[(u^\top K_1 v)(u^\top K_2 v)]` for
    symmetric kernels. With W_ij = u_iᵀ K u_j from m passes, the mean over the m (m - 1) ordered pairs
    is unbiased and uses each pass m - 1 times. In forward mode the two kernels need one Jacobian: with
    probes p of the parameters, tr(K²) = tr((JᵀJ)²) has the same form, and for two kernels
    tr(J₁J₁ᵀJ₂J₂ᵀ) = E[(J₁p · J₂q)²] needs both orders.

    Args:
        quantity: What is estimated; all its operators see the same probes.
        count: Number m of probes.
        generator: Draws them.
        forward: Probe the parameters instead of the states.

    Returns:
        Moments over pairs. Cost: m one-sided passes for each Jacobian.

    Raises:
        UnsupportedOperationError: If the kernels are not symmetric.
    """
    if not all(operand.structure.symmetric for operand in quantity.operands):
        raise UnsupportedOperationError(
            f"one-sided estimates of {quantity.name} are for symmetric kernels; for cross kernels use "
            "ntkops.one_sided_product_trace with their four Jacobians"
        )
    if forward:
        return _forward_pairs(quantity, count, generator)
    probes = quantity.first.structure.space.probes(count, generator, "gaussian")
    forms = [reverse_forms(operand, probes) for operand in quantity.operands]
    return PairMoments(*quantity.pair_moments(forms))


def _forward_pairs(quantity: Quantity, count: int, generator: torch.Generator) -> PairMoments:
    factors = [_factors(operand)[0] for operand in quantity.operands]
    if len({factor.size for factor in factors}) > 1:
        raise UnsupportedOperationError(
            f"forward estimates of {quantity.name} need kernels over the same parameters; "
            "use method='reverse'"
        )
    probes = factors[0].space.probes(count, generator, "gaussian")
    states = [factor.multiply(probes) for factor in factors]
    single, moments = quantity.pair_moments([_gram(states[0], states[0])] * len(states))
    if len(states) == 2:
        # In the space of parameters <K1, K2> = |J1ᵀ J2|² and |K|² = |JᵀJ|².
        first, second = states
        forms: Sequence[Tensor] = [_gram(first, second), _gram(first, first), _gram(second, second)]
        moments = torch.stack([form.square() for form in forms], dim=-1)[..., : moments.shape[-1]]
    return PairMoments(single, moments)


def _gram(first: Tensor, second: Tensor) -> Tensor:
    return first.double().mT @ second.double()
