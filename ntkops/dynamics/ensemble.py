"""What infinite ensembles of linearised networks predict: Gaussians whose covariance stays lazy."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from linear_operator.operators import LinearOperator, to_linear_operator
from torch import Tensor

from ..arguments import checked
from ..errors import DenseMemoryError, DtypeError, InputError, ShapeError, UnsupportedOperationError
from ..operators import Sandwich, sandwich
from ..operators.capabilities import capabilities, multiply
from ..regression._operands import Kernel, dense_of, is_spread, may_be_dense
from ..vectors import resolve_generator
from ._filters import Filter
from ._linear import solve
from ._problem import Problem

__all__ = ["Gaussian", "gaussian"]

_ROWS = 64  # new samples whose Krylov spaces are grown at a time
_INDEFINITE = 1e3  # rounding units below which a negative eigenvalue of a prior is one

Train = Callable[[Tensor], Tensor]  # right-hand sides (*batch, n, k) -> duals (T, *batch, n, k)


class Response(LinearOperator):
    """[I, -K_* q(K)]: from starts at new and training samples to what training makes of the new ones.

    Args:
        cross: K_*, ``(*batch, m, n)``.
        train: q(K) at one time.
        transposed: Whether it is the transpose.
    """

    def __init__(self, cross: LinearOperator, *, train: Any, transposed: bool = False) -> None:
        super().__init__(cross, train=train, transposed=transposed)
        self._cross, self._train, self._transposed = cross, train, transposed

    def _size(self) -> torch.Size:
        *batch, new, old = self._cross.shape
        shape = (new + old, new) if self._transposed else (new, new + old)
        return torch.Size((*batch, *shape))

    def _transpose_nonbatch(self) -> Response:
        return Response(self._cross, train=self._train, transposed=not self._transposed)

    def _matmul(self, rhs: Tensor) -> Tensor:
        if rhs.dim() == 1:
            return self._matmul(rhs.unsqueeze(-1)).squeeze(-1)
        new = self._cross.shape[-2]
        if self._transposed:
            pulled = self._train(multiply(self._cross.mT, rhs).double())[0]
            return torch.cat([rhs, -pulled.to(rhs.dtype)], dim=-2)
        pushed = self._train(rhs[..., new:, :].double())[0]
        return rhs[..., :new, :] - multiply(self._cross, pushed.to(rhs.dtype))


@dataclass(frozen=True, eq=False)
class Gaussian:
    """Predictions of an infinite ensemble along training; see `Trajectory.ensemble`.

    Attributes:
        times: ``(T,)``.
        mean: ``(T, M, ...)`` in the shape of the predictions.
    """

    times: Tensor
    mean: Tensor
    _problem: Problem = field(repr=False)
    _filters: Filter = field(repr=False)
    _prior: Kernel = field(repr=False)
    _cross: Kernel = field(repr=False)
    _train: Callable[[Filter, Tensor], Tensor] = field(repr=False)

    def covariance(self, t: float) -> Sandwich:
        r"""Return the covariance between new samples at a time, lazily.

        It is :math:`[I, -B_t] \Sigma [I, -B_t]^\top`; see `Trajectory.ensemble`.

        Args:
            t: One of the times.

        Returns:
            ``(*batch, M, M)``, one for all targets that share a kernel. Cost of a column: one with the prior,
            and training of two right-hand sides.

        Raises:
            InputError: If it is none of the times.
        """
        place = [k for k, known in enumerate(self.times.tolist()) if known == t]
        if not place:
            raise InputError(f"t={t!r} is none of the times: {self.times.tolist()}")
        filters = self._filters.at(self._filters.times[place])
        response = Response(to_linear_operator(self._cross), train=lambda block: self._train(filters, block))
        return sandwich(response, self._prior)

    def variance(self) -> Tensor:
        """Return variances at new samples, at all times.

        Returns:
            ``(T, M)`` for a kernel that targets share, ``(T, M, C)`` for one a class, ``(T, M, ...)`` for
            one over all outputs. Cost: training of one right-hand side a row for all times, and T products
            with the prior.
        """
        cross, layout = self._cross, self._problem.layout
        rows = cross.shape[-2]
        parts = []
        for first in range(0, rows, _ROWS):
            width = min(_ROWS, rows - first)
            unit = torch.zeros(rows, width, dtype=cross.dtype, device=cross.device)
            unit[torch.arange(first, first + width), torch.arange(width)] = 1
            unit = unit.expand(*cross.shape[:-2], rows, width)
            # rows of [I, -B_t] by columns: q(K) is symmetric, so that B_tᵀ e = q(K) K_*ᵀ e trains one right-
            # hand side
            trained = self._train(self._filters, multiply(cross.mT, unit).double())  # (T, *batch, n, w)
            starts = torch.cat([unit.expand(len(trained), *unit.shape), -trained.to(unit.dtype)], dim=-2)
            wide = starts.movedim(0, -1).flatten(-2)  # (*batch, M + n, w T)
            images = multiply(self._prior, wide).unflatten(-1, (width, len(trained))).movedim(-1, 0)
            parts.append((starts.double() * images.double()).sum(-2))  # (T, *batch, w)
        found = torch.cat(parts, dim=-1).clamp(min=0).to(cross.dtype)
        return torch.stack([layout.restore_rows(part) for part in found])

    @checked
    def sample(self, count: int = 1, *, generator: torch.Generator | None = None) -> Tensor:
        """Draw members: starts from the prior, trained to all times.

        Args:
            count: Number of members.
            generator: CPU generator; None draws a seed.

        Returns:
            ``(count, T, M, ...)`` in the shape of the predictions: each member is one path. Cost: training of
            one right-hand side a member and target.

        Raises:
            InputError: If the number is not positive.
            DenseMemoryError: If the prior has no factors, and may not be dense.
        """
        if count < 1:
            raise InputError(f"count={count}: pass a positive number of members")
        problem, layout, cross = self._problem, self._problem.layout, self._cross
        root = _root(self._prior)
        targets = problem.rhs.shape[-1]
        found, _ = resolve_generator(generator)
        shape = (*root.shape[:-2], root.shape[-1], targets * count)
        drawn = torch.randn(shape, generator=found, dtype=torch.float64).to(root.device, root.dtype)
        starts = multiply(root, drawn).double()  # (*batch, M + n, k count)
        new = cross.shape[-2]
        rest = problem.rhs.repeat_interleave(count, dim=-1) - starts[..., new:, :]
        trained = self._train(self._filters, rest)  # (T, *batch, n, k count)
        wide = trained.movedim(0, -1).flatten(-2).to(cross.dtype)
        moved = multiply(cross, wide).double().unflatten(-1, (targets, count, len(trained)))
        paths = (starts[..., :new, :].unflatten(-1, (targets, count)).unsqueeze(-1) + moved).to(cross.dtype)
        return torch.stack(
            [
                torch.stack([layout.restore(paths[..., c, t]) for t in range(len(trained))])
                for c in range(count)
            ]
        )


def gaussian(
    problem: Problem, filters: Filter, times: Tensor, mean: Tensor, prior: Kernel, cross: Kernel, tol: float
) -> Gaussian:
    """Return the ensemble of a linear training, its operators checked.

    Raises:
        UnsupportedOperationError: If rows lie on several processes.
        ShapeError: If the prior is not over new and training samples.
        DtypeError: If its dtype is not the kernel's.
    """
    if any(map(is_spread, (problem.K, prior, cross))):
        raise UnsupportedOperationError("ensembles take kernels of one process; these rows lie on several")
    size = cross.shape[-2] + cross.shape[-1]
    due = (*cross.shape[:-2], size, size)
    if tuple(prior.shape) != due:
        raise ShapeError(
            f"the prior has shape {tuple(prior.shape)}, due is {due}: over the new samples, then those of "
            "training, torch.cat([x_new, x])"
        )
    if prior.dtype != problem.dtype:
        raise DtypeError(f"the kernel has dtype {problem.dtype}, the prior {prior.dtype}; cast one of them")

    def train(some: Filter, block: Tensor) -> Tensor:
        return solve(dataclasses.replace(problem, rhs=block), some, "auto", tol, None)[1].dual

    return Gaussian(times, mean, problem, filters, prior, cross, train)


def _root(prior: Kernel) -> Kernel:
    """Return F with F Fᵀ the prior: its factors, or those of the dense matrix."""
    known = capabilities(prior)
    factors = known.factors() if known.symmetric else None
    if factors is not None:
        return factors[0]
    if not may_be_dense(prior):
        raise DenseMemoryError("the prior knows no factors, and may not be dense: nothing to draw with")
    dense = prior if isinstance(prior, Tensor) else dense_of(prior)
    # F = V √λ: a Cholesky factor would need a positive definite prior
    values, vectors = torch.linalg.eigh(dense.double())
    least = values[..., 0] / values[..., -1].clamp(min=torch.finfo(torch.float64).tiny)
    if bool((least < -_INDEFINITE * torch.finfo(prior.dtype).eps).any()):
        raise InputError(f"the prior is no covariance: it has an eigenvalue {float(values.min()):.3g}")
    return (vectors * values.clamp(min=0).sqrt().unsqueeze(-2)).to(prior.dtype)
