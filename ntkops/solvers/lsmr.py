"""LSMR: ridge regression on J itself, whose condition number is the square root of that of J Jᵀ."""

from __future__ import annotations

import time

import torch
from torch import Tensor

from ..arguments import checked
from ..errors import InputError
from ..results import Solution, SolveInfo
from ..vectors import Space
from ._outcome import Product, as_block, check_options, column_norms, finished, require_finite

__all__ = ["lsmr"]

_PROGRESS = 0.9  # from one look to the next the true residual has to fall below this share


@checked
def lsmr(
    push: Product,
    pull: Product,
    rhs: Tensor,
    rows: Space,
    columns: Space,
    *,
    ridge: float,
    tolerance: float = 1e-6,
    max_iterations: int | None = None,
    raise_on_failure: bool = True,
) -> Solution:
    r"""Solve (J Jᵀ + ridge I) X = B by LSMR on :math:`\min_w |J w - b|^2 + \mathrm{ridge}\,|w|^2`.

    The products J Jᵀ are never formed, so that rounding enters by the condition number of J, the square
    root of that of the kernel. The solution is x = (b - J w) / ridge. Its true residual is looked at once
    the iteration's own bound allows it, and the iteration goes on until that meets the tolerance.

    Args:
        push: ``(p, k) -> (n, k)``, the product with J.
        pull: ``(n, k) -> (p, k)``, the product with Jᵀ.
        rhs: B, ``(n,)`` or ``(n, k)``.
        rows: The space of B.
        columns: The space of w.
        ridge: Positive number.
        tolerance: Relative residual asked of every column.
        max_iterations: Most steps; default max(1000, n).
        raise_on_failure: Raise where a column fails; False returns what there is.

    Returns:
        `Solution`: x of the shape of ``rhs`` and its `SolveInfo`, where ``products`` counts pairs of a
        product with J and one with Jᵀ, each the price of one with J Jᵀ. Memory: four blocks (p, k).

    Raises:
        InputError: If an option is out of range.
        ShapeError: If the blocks do not fit.
        DtypeError: If the right-hand side has another dtype than its space.
        NonFiniteError: If B or a product holds NaN or infinity.
        NotConvergedError: If a column misses its tolerance; ``result`` is the partial `Solution`.

    References:
        Fong, Saunders (2011), LSMR: an iterative algorithm for sparse least-squares problems, section 2.

    Example:
        >>> import torch
        >>> from ntkops.solvers import lsmr
        >>> from ntkops.vectors import Space
        >>> J, b = (
        ...     torch.tensor([[3.0, 0.0], [0.0, 1.0]]).double(),
        ...     torch.ones(2).double(),
        ... )
        >>> space = Space(2, torch.float64)
        >>> x, info = lsmr(
        ...     lambda V: J @ V, lambda V: J.mT @ V, b, space, space, ridge=1.0
        ... )
        >>> [round(v, 6) for v in x.tolist()], info.converged
        ([0.1, 0.5], True)
    """
    start = time.perf_counter()
    check_options(tolerance, max_iterations)
    if isinstance(ridge, bool) or not isinstance(ridge, int | float) or not 0 < ridge < float("inf"):
        raise InputError(f"ridge={ridge!r}: LSMR needs a positive number")
    block = as_block(rhs, rows)
    most = max(1000, rows.size) if max_iterations is None else max_iterations
    norms = column_norms(rows, block)
    safe = torch.where(norms > 0, norms, torch.ones_like(norms))
    work = _Bidiagonal(push, pull, block.detach() / safe.to(block.dtype), rows, columns, float(ridge))
    with torch.no_grad():
        best, residuals, reason = _iterate(work, norms > 0, tolerance, most)
    info = SolveInfo(
        converged=reason == "converged",
        residuals=residuals,
        tolerance=tolerance,
        iterations=work.iterations,
        products=work.products,
        reason=reason,
        method="lsmr",
        seconds=time.perf_counter() - start,
    )
    found = (best * safe.to(block.dtype)).reshape(rhs.shape)
    return finished(Solution(found, info), raise_on_failure)


def _iterate(work: _Bidiagonal, wanted: Tensor, tolerance: float, most: int) -> tuple[Tensor, Tensor, str]:
    """Step until the true residuals meet the tolerance, fall no further, or the steps run out."""
    best = torch.zeros_like(work.rhs)
    residuals = wanted.to(torch.float64)
    target, last = tolerance, 1.0
    while bool((residuals > tolerance).any()):
        ended = work.iterations >= most
        if not ended:
            work.step()
            if float(torch.where(wanted, work.bound(), 0.0).max()) > target and work.iterations < most:
                continue
        trial, true = work.look()
        true = torch.where(wanted, true, 0.0)
        better = true < residuals
        best, residuals = torch.where(better, trial, best), torch.minimum(true, residuals)
        worst = float(residuals.max())
        if worst <= tolerance:
            break
        if work.iterations >= most:
            return best, residuals, "max_iterations"
        if worst > _PROGRESS * last:
            return best, residuals, "stagnated"
        # The bound is one of the normal equations and the residual one of the system: their ratio is that of
        # this look, and half of it is asked for next.
        last, target = worst, target * min(0.5, 0.5 * tolerance / worst)
    return best, residuals, "converged"


class _Bidiagonal:
    """Golub-Kahan bidiagonalisation of J, with the rotations of LSMR, for all columns at once."""

    def __init__(
        self, push: Product, pull: Product, rhs: Tensor, rows: Space, columns: Space, ridge: float
    ) -> None:
        self.rhs, self._rows, self._columns, self._ridge = rhs, rows, columns, ridge
        self._push, self._pull = push, pull
        self.iterations, self.products = 0, 0
        self._u, beta = _unit(rhs, rows)
        self._v, self._alpha = _unit(self._pulled(self._u), columns)
        self._w, self._h, self._hbar = torch.zeros_like(self._v), self._v.clone(), torch.zeros_like(self._v)
        one = torch.ones_like(beta)
        self._alphabar, self._zetabar = self._alpha.clone(), self._alpha * beta
        self._first = torch.where(self._zetabar > 0, self._zetabar, one)
        self._rho, self._rhobar, self._cbar, self._sbar = one, one, one, torch.zeros_like(one)

    def _pushed(self, block: Tensor) -> Tensor:
        return require_finite(self._push(block), self._rows, "a product with J")

    def _pulled(self, block: Tensor) -> Tensor:
        return require_finite(self._pull(block), self._columns, "a product with Jᵀ")

    def bound(self) -> Tensor:
        """Return |Jᵀ (b - J w) - ridge w| relative to |Jᵀ b| for each column."""
        return self._zetabar.abs() / self._first

    def step(self) -> None:
        """Make one step: a product with J and one with Jᵀ."""
        dtype = self._u.dtype
        # β u = J v - α u and α v = Jᵀ u - β v: the next column of the lower bidiagonal B_k, and the next
        # basis vectors.
        self._u, beta = _unit(self._pushed(self._v) - self._u * self._alpha.to(dtype), self._rows)
        self._v, self._alpha = _unit(self._pulled(self._u) - self._v * beta.to(dtype), self._columns)
        # rotation 1: the row √ridge of the damped problem goes into the diagonal
        alphahat = (self._alphabar.square() + self._ridge).sqrt()
        # rotation 2: β below the diagonal goes, which leaves R_k with ρ on its diagonal and θ above it
        rho_old, rhobar_old = self._rho, self._rhobar
        self._rho = (alphahat.square() + beta.square()).sqrt()
        theta = beta / self._rho * self._alpha
        self._alphabar = alphahat / self._rho * self._alpha
        # rotation 3: R_kᵀ, whose least-squares problem LSMR minimises, becomes upper bidiagonal with ρ̄ and
        # θ̄
        thetabar, rhotemp = self._sbar * self._rho, self._cbar * self._rho
        self._rhobar = (rhotemp.square() + theta.square()).sqrt()
        self._cbar, self._sbar = rhotemp / self._rhobar, theta / self._rhobar
        zeta, self._zetabar = self._cbar * self._zetabar, -self._sbar * self._zetabar
        # h, h̄ and w along: w minimises |Jᵀ (b - J w) - ridge w| over the Krylov space, which is |ζ̄|
        self._hbar = self._h - self._hbar * (thetabar * self._rho / (rho_old * rhobar_old)).to(dtype)
        self._w = self._w + self._hbar * (zeta / (self._rho * self._rhobar)).to(dtype)
        self._h = self._v - self._h * (theta / self._rho).to(dtype)
        self.iterations += 1
        self.products += self.rhs.shape[-1]

    def look(self) -> tuple[Tensor, Tensor]:
        """Return x = (b - J w) / ridge and the true relative residual of each of its columns."""
        # (J Jᵀ + ridge) x = b with w = Jᵀ x: ridge x = b - J w
        x = (self.rhs - self._pushed(self._w)) / self._ridge
        rest = self.rhs - self._pushed(self._pulled(x)) - self._ridge * x
        self.products += 2 * self.rhs.shape[-1]
        return x, column_norms(self._rows, rest)


def _unit(block: Tensor, space: Space) -> tuple[Tensor, Tensor]:
    """Return columns of length one, and their lengths before."""
    lengths = column_norms(space, block)
    return block / torch.where(lengths > 0, lengths, torch.ones_like(lengths)).to(block.dtype), lengths
