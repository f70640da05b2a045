"""The diagonal of an operator."""

from __future__ import annotations

from typing import Literal

import torch
from linear_operator.operators import LinearOperator
from torch import Tensor

from ..arguments import checked
from ..results import Estimate
from ..vectors import Space
from ._driver import run
from ._exact import ExactWork, length_of
from ._plans import Sampler
from ._request import Operand, Request, factors_of, require_finite
from ._statistics import Summary
from ._two_sided import draw_probes

__all__ = ["diagonal"]

_METHODS = ("exact", "hutchinson", "fhutch")
_WIDTH = 64  # columns multiplied at a time


@checked
def diagonal(
    operator: LinearOperator | Tensor,
    *,
    rtol: float | None = None,
    num_passes: int | None = None,
    method: Literal["auto", "exact", "hutchinson", "fhutch"] = "auto",
    generator: torch.Generator | None = None,
    progress: bool = False,
) -> Estimate:
    r"""Compute or estimate the diagonal, :math:`K_{ii} = |\nabla f_i|^2`.

    Exact: one per-sample pass for each output of a kernel of ours. Hutchinson: :math:`E[v \circ K v]`
    (Bekas, Kokiopoulou, Saad 2007); from jvps alone :math:`E[(J p)^2]`. Both are unbiased entry by entry, and
    slow: the error of an entry falls with the square root of the passes.

    Args:
        operator: Square ``(*batch, n, n)`` operator or tensor.
        rtol: Relative tolerance in the Euclidean norm of the diagonal. Default 1e-2 where ``num_passes`` is
            None too.
        num_passes: Passes to spend; with ``rtol`` a cap
            (by default 20,000 in one direction, and none where exactness is the end).
        method: "auto" (exact unless that is too expensive), "exact", "hutchinson" or "fhutch" (jvps alone).
        generator: CPU generator of the probes; None draws a seed from the operating system.
        progress: Show a bar of passes.

    Returns:
        `Estimate` with a value of shape ``(*batch, n)`` and an error for each entry.

    Raises:
        InputError: If an option is not understood, or the passes do not pay for the method.
        ShapeError: If the operator is not square.
        DtypeError: If the operator is not of a real floating dtype.
        UnsupportedOperationError: If "fhutch" is asked of an operator without factors.
        NonFiniteError: If an entry is not finite.

    Warns:
        NotConvergedWarning: If the passes were spent before the tolerance was met.

    Example:
        >>> import torch, ntkops
        >>> ntkops.diagonal(torch.diag(torch.tensor([3.0, 4.0]))).value.tolist()
        [3.0, 4.0]
    """
    request = Request.check(
        _METHODS, method=method, rtol=rtol, num_passes=num_passes, generator=generator, progress=progress
    )
    return run(_Plan(Operand(operator)), request)


class _Plan:
    """The diagonal as the driver sees it."""

    name = "the diagonal"
    bounds = (-torch.inf, torch.inf)
    vector = True

    def __init__(self, operand: Operand) -> None:
        operand.require_square(self.name)
        self._operand, self.operands = operand, [operand]
        self.space, self.size = operand.rows, operand.rows.size
        self.eps = operand.rounding

    def exact_cost(self) -> float:
        return float(self._operand.capabilities.exact_cost("diagonal"))

    def exact(self, work: ExactWork) -> Tensor:
        source = self._operand.capabilities
        whole = torch.empty(self._operand.shape[:-1], dtype=torch.float64, device=self._operand.device)
        parts = source.diagonal_parts(source.diagonal_step())
        for rows, part in work.shown(parts, source.shape[-2], "row", length_of):
            whole[..., rows] = part
        return require_finite(whole, self.name)

    def choices(self) -> tuple[str, ...]:
        return ("hutchinson",)

    def sampler(self, method: str, generator: torch.Generator) -> _Entries:
        return _Entries(self._operand, generator, forward=method == "fhutch")

    def summary(self, sampler: Sampler) -> Summary:
        assert isinstance(sampler, _Entries)
        return sampler.summary()


class _Entries:
    """Running sums of the entries of v ∘ K v, or of L p ∘ R p."""

    least = 1
    order = 1.0

    def __init__(self, operand: Operand, generator: torch.Generator, *, forward: bool) -> None:
        self._generator, self._operand, self.one_sided = generator, operand, forward
        factors = factors_of(operand) if forward else None
        self._left: Operand | None = factors[0] if factors else None
        self._right: Operand | None = factors[1] if factors else None
        self._space: Space = factors[0].columns if factors else operand.columns
        self._count = 0
        self._mean = torch.zeros(operand.shape[:-1], dtype=torch.float64, device=operand.device)
        self._spread = torch.zeros_like(self._mean)

    @property
    def unit(self) -> int:
        """Passes of one probe."""
        if self._left is None or self._right is None:
            return self._operand.cost
        return self._left.cost + (0 if self._right is self._left else self._right.cost)

    def grow(self, columns: int) -> None:
        """Go on to so many probes in all."""
        batch = self._operand.batch_shape
        for start in range(self._count, columns, _WIDTH):
            count = min(_WIDTH, columns - start)
            probes = draw_probes(self._space, batch, count, self._generator, "rademacher")
            self._add(self._entries(probes), count)

    def _entries(self, probes: Tensor) -> Tensor:
        if self._left is None or self._right is None:
            # E v_i v_j = δ_ij, so that the mean of v_i (K v)_i = Σ_j v_i K_ij v_j is K_ii. Signs: v_i² = 1,
            # and K_ii itself has no noise.
            return probes.double() * self._operand.multiply(probes).double()
        left = self._left.multiply(probes).double()
        return left * (left if self._right is self._left else self._right.multiply(probes).double())

    def _add(self, entries: Tensor, count: int) -> None:
        """Merge the mean and the sum of squared deviations of a block (Chan, Golub, LeVeque 1979)."""
        mean = entries.mean(-1)
        shift, total = mean - self._mean, self._count + count
        self._spread += (entries - mean.unsqueeze(-1)).square().sum(-1)
        self._spread += shift.square() * (self._count * count / total)
        self._mean += shift * (count / total)
        self._count = total

    def summary(self) -> Summary:
        """Return the entries as they stand."""
        # The standard error of a mean, entry by entry: entries share probes, but no entry mixes two.
        m = self._count
        if m < 2:
            return Summary(self._mean.cpu(), torch.full_like(self._mean, torch.inf).cpu(), 0)
        return Summary(self._mean.cpu(), (self._spread / (m * (m - 1))).sqrt().cpu(), m - 1)
