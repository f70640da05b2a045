"""Traces of products of kernels from one direction of differentiation (Proposition 1)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from linear_operator.operators import LinearOperator
from torch import Tensor

from ..arguments import checked
from ..errors import InputError, ShapeError
from ..results import Estimate
from ..vectors import Space
from ._driver import run
from ._exact import ExactWork
from ._request import DEFAULT_RTOL, Operand, Request
from ._statistics import Pairs, Summary, summarize_product

__all__ = ["one_sided_product_trace"]


@checked
def one_sided_product_trace(
    first: LinearOperator | Tensor,
    second: LinearOperator | Tensor,
    third: LinearOperator | Tensor,
    fourth: LinearOperator | Tensor,
    *,
    direction: str = "reverse",
    rtol: float | None = None,
    num_passes: int | None = None,
    generator: torch.Generator | None = None,
    progress: bool = False,
) -> Estimate:
    r"""Estimate :math:`\mathrm{tr}(J_1 J_2^\top J_3 J_4^\top)` from vjps alone, or from jvps alone.

    With independent isotropic probes u, v of states, or p, q of parameters, it is

    .. math:: E[(J_1^\top u \cdot J_2^\top v)(J_4^\top u \cdot J_3^\top v)]
              = E[(J_4 p \cdot J_1 q)(J_3 p \cdot J_2 q)],

    where u meets J₁ and J₄, v meets J₂ and J₃, p meets J₃ and J₄, and q meets J₁ and J₂. (Proposition 1 of
    the paper prints the reverse form beside tr(J₁J₂ᵀJ₄J₃ᵀ), which it is not.) All m² pairs of m probes of
    each kind are used; the error is the jackknife's over both kinds.

    Args:
        first: J₁, ``(n, P)``.
        second: J₂, ``(m, P)``.
        third: J₃, ``(m, Q)``; its states are those of J₂.
        fourth: J₄, ``(n, Q)``; its states are those of J₁.
        direction: "reverse" (vjps) or "forward" (jvps).
        rtol: Relative tolerance, as for `ntkops.trace`.
        num_passes: Passes to spend; with ``rtol`` a cap, by default 20,000. A probe of each kind takes
            four, fewer where one object is given twice and meets the same probes.
        generator: CPU generator of the probes; None draws a seed.
        progress: Show a bar of passes.

    Returns:
        Unbiased `Estimate`. Memory: the images of all probes.

    Raises:
        InputError: If an option is not understood, or the passes do not pay for a probe of each kind.
        ShapeError: If the four do not fit together.
        NonFiniteError: If a product is not finite.

    Warns:
        NotConvergedWarning: If the passes were spent before the tolerance was met.

    Example:
        >>> import torch, ntkops
        >>> J = torch.eye(3)
        >>> g = torch.Generator().manual_seed(0)
        >>> e = ntkops.one_sided_product_trace(J, J, J, J, num_passes=400, generator=g)
        >>> abs(float(e) - 3.0) < 4 * float(e.stderr), e.passes
        (True, 400)
    """
    if direction not in ("reverse", "forward"):
        raise InputError(f"direction={direction!r}: choose 'reverse' or 'forward'")
    request = Request.check(
        (direction,),
        method=direction,
        rtol=DEFAULT_RTOL if rtol is None and num_passes is None else rtol,
        num_passes=num_passes,
        generator=generator,
        progress=progress,
    )
    known: dict[int, Operand] = {}
    factors = [known.setdefault(id(J), Operand(J)) for J in (first, second, third, fourth)]
    _require_fit(factors)
    return run(_Plan(factors, forward=direction == "forward"), request)


def _require_fit(factors: Sequence[Operand]) -> None:
    shapes = [tuple(factor.shape) for factor in factors]
    one, two, three, four = shapes
    if any(len(shape) != 2 for shape in shapes):
        raise ShapeError(f"four matrices are needed, got shapes {shapes}")
    if one[1] != two[1] or three[1] != four[1]:
        raise ShapeError(f"J1 and J2, and J3 and J4, need the same parameters (columns), got shapes {shapes}")
    if one[0] != four[0] or two[0] != three[0]:
        raise ShapeError(f"J1 and J4, and J2 and J3, need the same states (rows), got shapes {shapes}")


class _Plan:
    """The trace of the product as the driver sees it; there is no exact way in one direction."""

    name = "the trace of the product"
    bounds = (-torch.inf, torch.inf)
    vector = False

    def __init__(self, factors: Sequence[Operand], *, forward: bool) -> None:
        self._factors, self._forward = factors, forward
        self.operands = list(dict.fromkeys(factors))
        self.space = factors[0].rows
        self.size = 2**62  # no number of probes makes it exact
        # four factors may have four dtypes: the coarsest decides the digits
        self.eps = max(torch.finfo(factor.dtype).eps for factor in factors)

    def _space(self, kind: int) -> Space:
        """Return the space of u or q (0), or of v or p (1)."""
        one, two, three, _ = self._factors
        if self._forward:
            return (one.columns, three.columns)[kind]
        return (one.rows, two.rows)[kind]

    def exact_cost(self) -> float:
        return float("inf")

    def exact(self, work: ExactWork) -> Tensor:
        raise AssertionError("never chosen: its cost is infinite")

    def choices(self) -> tuple[str, ...]:
        return ("forward" if self._forward else "reverse",)

    def sampler(self, method: str, generator: torch.Generator) -> _FourFactors:
        spaces = self._space(0), self._space(1)
        return _FourFactors(self._factors, spaces, generator, forward=self._forward)

    def summary(self, sampler: object) -> Summary:
        assert isinstance(sampler, _FourFactors)
        return summarize_product(sampler.pairs())


class _FourFactors:
    """Probes of two kinds, each through two of the four factors."""

    one_sided = True
    least = 2
    order = 1.0

    def __init__(
        self,
        factors: Sequence[Operand],
        spaces: tuple[Space, Space],
        generator: torch.Generator,
        *,
        forward: bool,
    ) -> None:
        one, two, three, four = factors
        # (factor, kind of its probe); what is multiplied with what follows in `pairs`
        # tr J₁J₂ᵀJ₃J₄ᵀ = E tr J₁ (q qᵀ) J₂ᵀ J₃ (p pᵀ) J₄ᵀ = E (J₄p · J₁q)(J₃p · J₂q): q between J₁ and J₂, p
        # between J₃ and J₄; and with u uᵀ before J₁, v vᵀ between J₂ and J₃ for the other direction.
        kinds = ((one, 0), (two, 0), (three, 1), (four, 1))
        if not forward:
            kinds = ((one, 0), (two, 1), (three, 1), (four, 0))
        self._kinds, self._spaces, self._generator, self._forward = kinds, spaces, generator, forward
        self._jobs = list(dict.fromkeys(kinds))
        self._images: dict[tuple[Operand, int], Tensor] = {}
        inside = [factor.rows if forward else factor.columns for factor in factors]
        self._inside = (inside[0], inside[2] if not forward else inside[1])

    @property
    def unit(self) -> int:
        """Passes of one probe of each kind."""
        return sum(factor.cost for factor, _ in self._jobs)

    def grow(self, columns: int) -> None:
        """Go on to so many probes of each kind."""
        if columns < self.least:
            raise InputError(
                f"an error takes two probes of each kind, that is num_passes={self.least * self.unit}; "
                f"{columns} can be paid for"
            )
        old = next(iter(self._images.values())).shape[-1] if self._images else 0
        if columns <= old:
            return
        probes = [space.probes(columns - old, self._generator) for space in self._spaces]
        for job in self._jobs:
            factor, kind = job
            fresh = factor.multiply(probes[kind]) if self._forward else factor.pull(probes[kind])
            self._images[job] = torch.cat([self._images[job], fresh], dim=-1) if old else fresh

    def pairs(self) -> Pairs:
        """Return the product of both inner products for every pair of probes."""
        one, two, three, four = (self._images[job] for job in self._kinds)
        # reverse: u in rows, v in columns; forward: q in rows, p in columns
        sides = ((one, four), (two, three)) if self._forward else ((one, two), (four, three))

        def terms(part: slice) -> Tensor:
            first, second = (
                space.inner(left[..., part], right)
                for space, (left, right) in zip(self._inside, sides, strict=True)
            )
            return first * second

        return Pairs.of(terms, one.shape[-1], rows=0, cols=1)
