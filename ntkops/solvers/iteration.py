"""The conjugate gradient iteration on a block of columns, one step at a time."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from ..errors import ShapeError
from ..vectors import Space
from ._outcome import Product, column_norms, column_products, power_of_two, require_finite

__all__ = ["ConjugateGradient", "Preconditioner"]

_REASONS = ("running", "converged", "stagnated", "indefinite", "preconditioner", "max_iterations")
_RUNNING, _CONVERGED, _STAGNATED, _INDEFINITE, _PRECONDITIONER, _LIMIT = range(len(_REASONS))
# From one look at the true residual to the next it has to fall below this share of what it was:
# products that round too coarsely gain less, and would be restarted for ever.
_PROGRESS = 0.3
_SHORTEST, _LONGEST = 500, 2000  # steps of patience


class Preconditioner(Protocol):
    """An approximate inverse: symmetric, positive definite, and the same at every call.

    Attributes:
        name: What it is called in `SolveInfo`.
        rank: Its rank.
        products: Columns multiplied to make it.
        seed: Seed of what it drew; None if nothing.
    """

    name: str
    rank: int
    products: int
    seed: int | None

    def __call__(self, block: Tensor) -> Tensor:
        """Return M⁻¹ V, ``(*batch, n, k)`` like V."""


class ConjugateGradient:
    """The iteration behind `conjugate_gradient`, one step at a time.

    Columns are iterated side by side with coefficients of their own. One that says it has converged is
    checked with a fresh product: it leaves the block if its true residual meets the tolerance, goes on
    from its true residual if that still falls, and is given up as stagnated if it does not.

    Args:
        multiply: ``(*batch, n, k) -> (*batch, n, k)``, the product with A.
        rhs: ``(*batch, n, k)`` right-hand sides.
        space: The space of the columns.
        preconditioner: An approximate inverse of A, or None.
        tolerance: Relative residual asked of each column.
        initial: ``(*batch, n, k)`` first guess; zero if None.
        patience: Steps without a smaller residual after which the true one is looked at; default n, at
            least 500 and at most 2000. The residual of a badly conditioned system may grow for a long
            time before it falls, but for n steps only where rounding is what it has come to; smaller n
            are given longer, since rounding delays what would have ended after n steps.
        verified: Whether a column that says it has converged is checked with a product. Only what checks
            by itself, as iterative refinement does, should turn that off.

    Example:
        >>> import torch
        >>> from ntkops.solvers import ConjugateGradient
        >>> from ntkops.vectors import Space
        >>> A = torch.diag(torch.tensor([1.0, 2.0, 4.0], dtype=torch.float64))
        >>> space = Space(3, torch.float64)
        >>> iteration = ConjugateGradient(
        ...     lambda V: A @ V, torch.ones(3, 1, dtype=torch.float64), space
        ... )
        >>> while iteration.running:
        ...     iteration.step()
        >>> (
        ...     [round(v, 9) for v in iteration.solution().flatten().tolist()],
        ...     iteration.products,
        ... )
        ([1.0, 0.5, 0.25], 4)
    """

    def __init__(
        self,
        multiply: Product,
        rhs: Tensor,
        space: Space,
        *,
        preconditioner: Preconditioner | None = None,
        tolerance: float = 1e-6,
        initial: Tensor | None = None,
        patience: int | None = None,
        verified: bool = True,
    ) -> None:
        self._multiply, self._space = multiply, space
        self._precondition = preconditioner
        self._patience = min(max(_SHORTEST, space.size), _LONGEST) if patience is None else patience
        self._verified = verified
        norms = column_norms(space, rhs)
        self._tolerance = torch.full_like(norms, tolerance)
        # Columns of length 1 to 2: squares of 1e-30 or 1e30 would leave the range of float32, and a power of
        # two changes no digit.
        self._scale = power_of_two(norms)  # (*batch, k)
        self._norms = torch.where(norms > 0, norms / self._scale, torch.ones_like(norms))
        self._rhs = (rhs.double() / self._scale.unsqueeze(-2)).to(rhs.dtype)
        self.products, self.iterations, self.restarts = 0, 0, 0
        self._history: list[float] = []
        self._status = torch.where(norms > 0, _RUNNING, _CONVERGED)  # (*batch, k)
        self._x = torch.zeros_like(self._rhs)
        self._r = self._rhs.clone()
        self._true = torch.where(norms > 0, 1.0, 0.0).to(norms)  # relative residual at the last look
        if initial is not None:
            self._start_from((initial.double() / self._scale.unsqueeze(-2)).to(rhs.dtype))
        self._best_x, self._best = self._x.clone(), self._true.clone()
        self._least, self._waited = self._true.clone(), torch.zeros_like(self._status)
        self._p = self._r.clone()
        self._rz = torch.zeros_like(norms)
        self._begin(torch.arange(rhs.shape[-1], device=rhs.device), self._status == _RUNNING)

    def _start_from(self, initial: Tensor) -> None:
        running = (self._status == _RUNNING).unsqueeze(-2)
        self._x = torch.where(running, initial, torch.zeros_like(initial))
        self._r = self._rhs - self._product(self._x)
        self._true = self._relative(self._r, slice(None))
        met = self._true <= self._tolerance
        self._status = torch.where(met, _CONVERGED, self._status)

    # what it is at

    @property
    def running(self) -> bool:
        """Whether a column is still iterated."""
        return bool((self._status == _RUNNING).any())

    @property
    def residuals(self) -> Tensor:
        """True relative residuals at the last look at each column, ``(*batch, k)`` float64."""
        return self._best.clone()

    @property
    def reason(self) -> str:
        """Why it ended: "converged", or the reason of the column with the largest residual."""
        failed = self._status != _CONVERGED
        if not bool(failed.any()):
            return "converged"
        worst = torch.where(failed, self._best, torch.full_like(self._best, -1.0)).argmax()
        return _REASONS[int(self._status.flatten()[worst])]

    @property
    def history(self) -> Tensor:
        """Largest relative residual after each step, as the iteration keeps it, float64."""
        return torch.tensor(self._history, dtype=torch.float64)

    def solution(self) -> Tensor:
        """Return the solution, ``(*batch, n, k)``: of each column the best that was looked at."""
        return (self._best_x.double() * self._scale.unsqueeze(-2)).to(self._x.dtype)

    # steps

    def step(self) -> None:
        """Make one step of every running column: one product with those columns."""
        columns = self._running_columns()
        live = self._status[..., columns] == _RUNNING
        directions = self._p[..., columns]
        images = self._product(directions)
        # x ← x + α p and r ← r - α A p with α = r·z / p·A p, z = M⁻¹ r; each column has its own α.
        curvature = column_products(self._space, directions, images)
        # p·A p ≤ 0 shows that A is not positive definite in its rounding: the column is looked at, and does
        # not move.
        sound = live & (curvature > 0)
        ratio = torch.where(sound, self._rz[..., columns] / torch.where(sound, curvature, 1.0), 0.0)
        length = ratio.unsqueeze(-2).to(directions.dtype)
        self._x[..., columns] += directions * length
        self._r[..., columns] -= images * length
        relative = self._relative(self._r[..., columns], columns)
        self.iterations += 1
        self._history.append(float(torch.where(live, relative, 0.0).max()))
        waited = self._wait(columns, relative)
        done = live & (relative <= self._tolerance[..., columns])
        if not self._verified:
            self._settle(columns, relative, done)
            live, done = live & ~done, torch.zeros_like(done)
        self._turn(columns, live)
        refused = self._status[..., columns] == _PRECONDITIONER
        due = done | (live & (~sound | refused | (waited >= self._patience)))
        if bool(due.any()):
            self._look(columns, due, live & ~sound)

    def limit(self) -> None:
        """End: look at every running column; those that do not meet the tolerance ran out of steps."""
        columns = self._running_columns()
        if not len(columns):
            return
        live = self._status[..., columns] == _RUNNING
        if self._verified:
            true = self._relative(self._rhs[..., columns] - self._product(self._x[..., columns]), columns)
        else:
            true = self._relative(self._r[..., columns], columns)
        self._settle(columns, true, live)
        self._status = torch.where(self._status == _RUNNING, _LIMIT, self._status)

    def _running_columns(self) -> Tensor:
        return _anywhere(self._status == _RUNNING).nonzero().flatten()

    def _product(self, block: Tensor) -> Tensor:
        image = self._multiply(block)
        self.products += block.shape[:-2].numel() * block.shape[-1]
        if image.shape != block.shape:
            raise ShapeError(
                f"the product of a {tuple(block.shape)} block has shape {tuple(image.shape)}: the operator "
                "is not square, or its batch is another"
            )
        return require_finite(image, self._space, "a product of the operator")

    def _relative(self, residual: Tensor, columns: Tensor | slice) -> Tensor:
        return column_norms(self._space, residual) / self._norms[..., columns]

    def _wait(self, columns: Tensor, relative: Tensor) -> Tensor:
        """Count the steps since the residual of a column was last at its smallest."""
        least = self._least[..., columns]
        waited = torch.where(relative < least, 0, self._waited[..., columns] + 1)
        self._least[..., columns] = torch.minimum(relative, least)
        self._waited[..., columns] = waited
        return waited

    def _turn(self, columns: Tensor, chosen: Tensor) -> None:
        """Make the next directions of the chosen columns, conjugate to the last ones."""
        residual, last = self._r[..., columns], self._p[..., columns]
        image = self._preconditioned(residual)
        rz, before = column_products(self._space, residual, image), self._rz[..., columns]
        # β = r·z / (r·z before), p ← z + β p: conjugate to all directions before, in exact arithmetic
        ratio = torch.where(before > 0, rz / torch.where(before > 0, before, 1.0), 0.0)
        turned = image + last * ratio.unsqueeze(-2).to(image.dtype)
        self._p[..., columns] = torch.where(chosen.unsqueeze(-2), turned, last)
        self._rz[..., columns] = torch.where(chosen, rz, before)
        self._require_positive(columns, self._rz[..., columns])

    def _preconditioned(self, block: Tensor) -> Tensor:
        return block if self._precondition is None else self._precondition(block)

    def _require_positive(self, columns: Tensor, rz: Tensor) -> None:
        status, moving = self._status[..., columns], self._relative(self._r[..., columns], columns) > 0
        # r·M⁻¹ r ≤ 0 for r ≠ 0
        bad = (status == _RUNNING) & moving & ~(rz > 0)
        self._status[..., columns] = torch.where(bad, _PRECONDITIONER, status)

    def _begin(self, columns: Tensor, chosen: Tensor) -> None:
        """Let the chosen columns start from their residuals, forgetting the directions so far."""
        if not len(columns) or not bool(chosen.any()):
            return
        image = self._preconditioned(self._r[..., columns])
        rz = column_products(self._space, self._r[..., columns], image)
        self._p[..., columns] = torch.where(chosen.unsqueeze(-2), image, self._p[..., columns])
        self._rz[..., columns] = torch.where(chosen, rz, self._rz[..., columns])
        self._require_positive(columns, self._rz[..., columns])

    # looking at the true residual

    def _look(self, columns: Tensor, due: Tensor, broken: Tensor) -> None:
        """Compute true residuals of the columns that are due, and let go, restart or give up each."""
        some = _anywhere(due)
        columns, due, broken = columns[some], due[..., some], broken[..., some]
        residual = self._rhs[..., columns] - self._product(self._x[..., columns])
        true = self._relative(residual, columns)
        # What the recursion calls r drifts away from b - A x by the rounding of each step. A restart puts the
        # true one in its place; where that no longer falls, rounding is all that is left in it.
        last = self._true[..., columns]
        self._keep_best(columns, true, due)
        met = due & (true <= self._tolerance[..., columns])
        onwards = due & ~met & (true <= _PROGRESS * last)
        status = self._status[..., columns]
        failed = torch.where(status == _PRECONDITIONER, _PRECONDITIONER, _STAGNATED)
        failed = torch.where(broken, _INDEFINITE, failed)
        ended = torch.where(met, _CONVERGED, torch.where(onwards, _RUNNING, failed))
        self._status[..., columns] = torch.where(due, ended, status)
        self._true[..., columns] = torch.where(due, true, last)
        self._least[..., columns] = torch.where(onwards, true, self._least[..., columns])
        self._waited[..., columns] = torch.where(onwards, 0, self._waited[..., columns])
        self._r[..., columns] = torch.where(onwards.unsqueeze(-2), residual, self._r[..., columns])
        self.restarts += int(onwards.sum())
        self._begin(columns, onwards)

    def _keep_best(self, columns: Tensor, relative: Tensor, chosen: Tensor) -> None:
        better = chosen & (relative < self._best[..., columns])
        self._best[..., columns] = torch.where(better, relative, self._best[..., columns])
        self._best_x[..., columns] = torch.where(
            better.unsqueeze(-2), self._x[..., columns], self._best_x[..., columns]
        )

    def _settle(self, columns: Tensor, relative: Tensor, chosen: Tensor) -> None:
        """Let go the columns whose residual is small enough."""
        self._keep_best(columns, relative, chosen)
        status = self._status[..., columns]
        met = chosen & (relative <= self._tolerance[..., columns])
        self._status[..., columns] = torch.where(met, _CONVERGED, status)

    def resume(self, residual: Tensor, tolerance: Tensor, chosen: Tensor, fresh: Tensor) -> None:
        """Go on with other right-hand sides: residuals of the same system that somebody has computed.

        Args:
            residual: ``(*batch, n, k)`` in the scale of the first right-hand sides; the solution starts
                at zero again.
            tolerance: ``(*batch, k)`` for each column, relative to the first right-hand sides.
            chosen: ``(*batch, k)`` mask of the columns that go on; the others end.
            fresh: Mask of those that forget their directions, where what they have is worth nothing.
        """
        self._r, self._rhs = residual.clone(), residual
        self._x, self._best_x = torch.zeros_like(residual), torch.zeros_like(residual)
        self._tolerance = tolerance
        self._true = self._relative(residual, slice(None))
        self._best, self._least = self._true.clone(), self._true.clone()
        self._waited = torch.zeros_like(self._status)
        self._status = torch.where(chosen, _RUNNING, _CONVERGED)
        columns = self._running_columns()
        if len(columns):
            self._turn(columns, (chosen & ~fresh)[..., columns])
            self._begin(columns, (chosen & fresh)[..., columns])

    def loosen(self, tolerance: Tensor) -> None:
        """Set the tolerance of each column, ``(*batch, k)``."""
        self._tolerance = tolerance

    def found(self) -> Tensor:
        """Return the solution in the scale of the right-hand sides inside, ``(*batch, n, k)``."""
        return self._best_x

    # stopping and going on

    def state(self) -> dict[str, Tensor]:
        """Return copies of all that changes, as tensors: loaded again, the iteration goes on bit for bit."""
        found = {name: getattr(self, f"_{name}").clone() for name in _STATE}
        counters = torch.tensor([self.products, self.iterations, self.restarts])
        return {**found, "counters": counters, "history": self.history}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Go on from a state of an iteration with the same system, preconditioner and tolerance.

        Args:
            state: What `state` has returned.

        Raises:
            ShapeError: If it belongs to a system of another shape.
        """
        for name in _STATE:
            mine = getattr(self, f"_{name}")
            if name not in state or state[name].shape != mine.shape:
                raise ShapeError(
                    f"the state's {name!r} is missing or not of shape {tuple(mine.shape)}: it belongs to "
                    "another system"
                )
        for name in _STATE:
            setattr(self, f"_{name}", state[name].clone())
        self.products, self.iterations, self.restarts = (int(c) for c in state["counters"])
        self._history = state["history"].tolist()


def _anywhere(mask: Tensor) -> Tensor:
    """Return, of a mask ``(*batch, k)``, the columns that are set in some member of the batch."""
    return mask.reshape(-1, mask.shape[-1]).any(0)


_STATE = ("x", "r", "p", "rz", "status", "true", "best", "best_x", "least", "waited")
