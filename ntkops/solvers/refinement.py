"""Iterative refinement: coarse products do the work, a few precise ones decide the accuracy."""

from __future__ import annotations

import time

import torch
from torch import Tensor
from tqdm import tqdm

from ..arguments import checked
from ..errors import DtypeError, ShapeError
from ..results import Solution, SolveInfo
from ..vectors import Space
from ._outcome import (
    Product,
    as_block,
    check_options,
    column_norms,
    described,
    finished,
    power_of_two,
    require_finite,
)
from .conjugate_gradient import iterate
from .iteration import ConjugateGradient, Preconditioner

__all__ = ["refinement"]

_INNER = 1e-2  # what coarse products reach with certainty, unless the condition number is beyond them
_SAFETY = 0.9  # of the tolerance: coarse residuals that meet it exactly are precise ones that do not
_PROGRESS = 0.5  # a correction that gains less is rounding


@checked
def refinement(
    multiply: Product,
    coarse: Product,
    rhs: Tensor,
    space: Space,
    *,
    coarse_space: Space | None = None,
    preconditioner: Preconditioner | None = None,
    tolerance: float = 1e-6,
    inner_tolerance: float = _INNER,
    max_iterations: int | None = None,
    progress: bool = False,
    raise_on_failure: bool = True,
) -> Solution:
    r"""Solve A X = B with float32 products inside float64 corrections.

    The residual r = b - A x is formed by a precise product; conjugate gradients on the coarse products
    find d with A d ≈ r to a moderate tolerance; x ← x + d, and so on, with the directions kept. What
    accuracy is reached depends on the precise products alone, as long as the coarse ones gain something:
    for float32, a condition number well below 1e7.

    Args:
        multiply: ``(*batch, n, k) -> (*batch, n, k)``, the precise product with A, ridge included.
        coarse: The same in the lower precision.
        rhs: B, ``(n,)`` or ``(*batch, n, k)``, in the precise dtype.
        space: The space of the columns in the precise dtype.
        coarse_space: The same in the lower precision; a local float32 space if None.
        preconditioner: An approximate inverse of A for coarse columns.
        tolerance: Relative residual asked of every column, by precise products.
        inner_tolerance: Relative residual asked of each correction. Smaller ones take fewer precise
            products, and more coarse ones once rounding is what they correct.
        max_iterations: Most steps in all; default max(1000, n).
        progress: Show a bar of corrections.
        raise_on_failure: Raise where a column fails; False returns what there is.

    Returns:
        `Solution`: x in the dtype of ``rhs``, and its `SolveInfo`, where ``products`` counts both kinds
        and ``precise_products`` the precise ones alone: one for each correction and running column.

    Raises:
        InputError: If an option is out of range.
        DtypeError: If the right-hand side is not of the precise space's dtype.
        ShapeError: If the blocks do not fit.
        NonFiniteError: If B or a product holds NaN or infinity.
        NotConvergedError: If a column misses its tolerance; ``result`` is the partial `Solution`.

    References:
        Higham (2002), Accuracy and Stability of Numerical Algorithms, chapter 12.

    Example:
        >>> import torch
        >>> from ntkops.solvers import refinement
        >>> from ntkops.vectors import Space
        >>> A = torch.diag(torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64))
        >>> b, space = torch.ones(3, dtype=torch.float64), Space(3, torch.float64)
        >>> x, info = refinement(
        ...     lambda V: A @ V, lambda V: A.float() @ V, b, space, tolerance=1e-12
        ... )
        >>> (
        ...     float((A @ x - b).abs().max()) < 1e-12,
        ...     info.precise_products < info.products,
        ... )
        (True, True)
    """
    start = time.perf_counter()
    check_options(tolerance, max_iterations)
    check_options(inner_tolerance, None)
    block = as_block(rhs, space)
    if block.dtype != space.dtype:
        raise DtypeError(f"the right-hand side is {block.dtype}, the precise space {space.dtype}: cast one")
    narrow = coarse_space or space.cast(torch.float32)
    most = max(1000, space.size) if max_iterations is None else max_iterations
    with torch.no_grad(), tqdm(desc="refinement", unit="correction", disable=not progress) as bar:
        work = _Refinement(
            multiply, coarse, block.detach(), space, narrow, preconditioner, tolerance, inner_tolerance
        )
        while work.running and work.iteration.iterations < most:
            work.correct(most)
            bar.update()
    info = SolveInfo(
        converged=work.reason == "converged",
        residuals=work.residuals,
        tolerance=tolerance,
        iterations=work.iteration.iterations,
        products=work.iteration.products + work.precise,
        reason=work.reason,
        method="refinement",
        precise_products=work.precise,
        restarts=work.corrections,
        history=work.iteration.history,
        seconds=time.perf_counter() - start,
        **described(preconditioner),
    )
    return finished(Solution(work.solution.reshape(rhs.shape), info), raise_on_failure)


class _Refinement:
    """A coarse iteration whose residuals are replaced by precise ones, and the sum of what it finds.

    The directions are kept over a replacement, so that what the iteration knows of the spectrum is not
    lost; a column that gains nothing forgets them once, and is given up the second time.
    """

    def __init__(
        self,
        multiply: Product,
        coarse: Product,
        rhs: Tensor,
        space: Space,
        narrow: Space,
        preconditioner: Preconditioner | None,
        tolerance: float,
        inner: float,
    ) -> None:
        self._multiply, self._space, self._tolerance, self._inner = multiply, space, tolerance, inner
        norms = column_norms(space, rhs)
        self._scale = power_of_two(norms)  # (*batch, k)
        self._norms = torch.where(norms > 0, norms / self._scale, torch.ones_like(norms))
        self._rhs = rhs / self._scale.unsqueeze(-2)
        self._x, self._residual = torch.zeros_like(rhs), self._rhs.clone()
        self.residuals = torch.where(norms > 0, 1.0, 0.0).to(norms)
        self._running, self._fresh = norms > 0, torch.zeros_like(norms, dtype=torch.bool)
        self._reason = ["max_iterations"] * norms.numel()
        self._narrow = narrow.dtype
        self.iteration = ConjugateGradient(
            coarse, self._rhs.to(narrow.dtype), narrow, preconditioner=preconditioner, verified=False
        )
        self.precise, self.corrections = 0, 0

    @property
    def running(self) -> bool:
        """Whether a column is still corrected."""
        return bool(self._running.any())

    @property
    def solution(self) -> Tensor:
        """What has been found, ``(*batch, n, k)``."""
        return self._x * self._scale.unsqueeze(-2)

    @property
    def reason(self) -> str:
        """Why it ended."""
        missed = torch.where(self.residuals > self._tolerance, self.residuals, 0.0)
        if not bool((missed > 0).any()):
            return "converged"
        return self._reason[int(missed.argmax())]

    def correct(self, most: int) -> None:
        """Find corrections of the running columns, and keep those that help."""
        # No further below what is left than coarse products can go, and no further than the tolerance asks.
        target = torch.maximum(self.residuals * self._inner, torch.tensor(_SAFETY * self._tolerance))
        if self.corrections:
            residual = self._residual.to(self._narrow)
            self.iteration.resume(residual, target, self._running, self._fresh)
        else:
            self.iteration.loosen(target)
        iterate(self.iteration, most)
        k = self._running.shape[-1]
        columns = self._running.reshape(-1, k).any(0).nonzero().flatten()
        # Corrections are summed in float64: each may be coarse, as the next residual sees what it has left.
        trial = self._x[..., columns] + self.iteration.found()[..., columns].double()
        rest = self._rhs[..., columns] - self._product(trial)
        after = column_norms(self._space, rest) / self._norms[..., columns]
        self._take(columns, trial, rest, after)

    def _product(self, block: Tensor) -> Tensor:
        image = self._multiply(block)
        self.precise += block.shape[:-2].numel() * block.shape[-1]
        if image.shape != block.shape:
            raise ShapeError(f"the precise product of {tuple(block.shape)} has shape {tuple(image.shape)}")
        return require_finite(image, self._space, "a precise product of the operator")

    def _take(self, columns: Tensor, trial: Tensor, rest: Tensor, after: Tensor) -> None:
        """Keep what is better, and let go the columns that have ended."""
        before, live = self.residuals[..., columns], self._running[..., columns]
        better = live & (after < before)
        wide = better.unsqueeze(-2)
        self._x[..., columns] = torch.where(wide, trial, self._x[..., columns])
        self._residual[..., columns] = torch.where(wide, rest, self._residual[..., columns])
        self.residuals[..., columns] = torch.where(better, after, before)
        met = self.residuals[..., columns] <= self._tolerance
        # Directions from before a replacement may have lost conjugacy: once they are forgotten, then the
        # column ends.
        idle = live & ~met & (after > _PROGRESS * before)
        failed = idle & self._fresh[..., columns]
        self._fresh[..., columns] = idle
        self._running[..., columns] = live & ~met & ~failed
        self.corrections += int(live.sum())
        numbers = torch.arange(self.residuals.numel()).reshape(self.residuals.shape)[..., columns.cpu()]
        outcome = self.iteration.reason
        for number in numbers[failed.cpu()].tolist():
            self._reason[number] = outcome if outcome == "preconditioner" else "stagnated"
