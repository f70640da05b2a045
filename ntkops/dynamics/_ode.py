"""Training under any loss: an ordinary differential equation of the dual, with a bound of its error.

The state is (a, f = f₀ + K a), all of whose stages and interpolants belong together because training is
linear in them: one product K g a stage carries both on, and none is needed to know f between steps. On
several processes the equation is solved by all of them alike, and products alone are spread.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..curvature.losses import Loss, is_convex
from ..errors import NotConvergedError
from ..spectra import Jacobi
from ._linear import rounding_of
from ._problem import Problem
from ._result import assemble
from .trajectory import Trajectory

__all__ = ["by_ode"]

_TRIES = 3
_FINEST = 1e-13  # local tolerance below which float64 has no more to give
_DEGREE = 7  # of the interpolant between two steps
_NODES = 5  # of the quadrature of the defect
_POWER = 20  # steps to the largest eigenvalue


class _System:
    """a' = -lr (∇L(f) + μ a) beside f' = K a', as vectors of NumPy."""

    def __init__(self, problem: Problem, loss: Loss, lr: float, decay: float, limit: int | None) -> None:
        self._problem, self.loss, self._lr, self._decay, self._limit = problem, loss, lr, decay, limit
        self.shape = (sum(problem.space.share(len(problem.targets))), *problem.targets.shape[1:])
        counts = problem.space.share(len(problem.targets))
        first = sum(counts[: problem.space.part[0]])
        self._own = slice(first, first + len(problem.targets))
        self.products, self.evaluations = 0, 0

    def gathered(self, values: Tensor) -> Tensor:
        """Return what all processes hold, ``(N, ...)``."""
        return torch.cat([part.to(values.device) for part in self._problem.space.share(values)])

    def own(self, values: Tensor) -> Tensor:
        """Return the samples of this process."""
        return values.narrow(
            values.dim() - len(self.shape), self._own.start, self._own.stop - self._own.start
        )

    def images(self, block: Tensor) -> Tensor:
        """Return K g for ``(q, N, ...)``."""
        problem, layout = self._problem, self._problem.layout
        columns = torch.stack([layout.columns(part) for part in self.own(block)], dim=-1)  # (*b, n, k, q)
        self.products += columns.shape[-1] * columns.shape[-2] * columns.shape[:-3].numel()
        found = problem.multiply(columns.flatten(-2)).unflatten(-1, columns.shape[-2:])
        return torch.stack([self.gathered(layout.restore(found[..., q])) for q in range(len(block))])

    def slope(self, dual: Tensor, outputs: Tensor) -> Tensor:
        """Return a'."""
        slope = -self._lr * self.loss.gradient(outputs)
        return slope - self._lr * self._decay * dual if self._decay else slope

    def split(self, state: np.ndarray) -> tuple[Tensor, Tensor]:
        dual, outputs = torch.from_numpy(state).reshape(2, *self.shape)
        device = self._problem.rhs.device
        return dual.to(device), outputs.to(device)

    def __call__(self, t: float, state: np.ndarray) -> np.ndarray:
        if self._limit is not None and self.products >= self._limit:
            raise _OutOfProducts(t)
        self.evaluations += 1
        slope = self.slope(*self.split(state))
        return torch.stack([slope, self.images(slope.unsqueeze(0))[0]]).cpu().numpy().reshape(-1)


class _OutOfProducts(Exception):
    """No product is left."""


def by_ode(
    problem: Problem,
    loss: Callable[[Tensor], Loss],
    times: Tensor,
    *,
    lr: float,
    weight_decay: float,
    tol: float,
    max_products: int | None,
) -> Trajectory:
    r"""Return gradient flow under any loss by an explicit Runge-Kutta pair of order 8.

    Gradient flow of a convex loss is a contraction in Δθ. With the defect d = ã' - a'(ã) of the interpolant,
    :math:`|\text{error of } \Delta\theta|(t) \le \int_0^t (d^\top K d)^{1/2} ds`, whatever the steps were.
    """
    started = time.perf_counter()
    system = _System(problem, _on_all(problem, loss), lr, weight_decay, max_products)
    with torch.no_grad():
        largest = _largest(problem, system)
        start = torch.zeros(problem.targets.shape, dtype=torch.float64, device=problem.rhs.device)
        outputs = start if problem.start is None else problem.start
        state = torch.stack([system.gathered(start), system.gathered(outputs)]).cpu().numpy().reshape(-1)
        scale = problem.norm(problem.rhs)
        local = 0.1 * tol
        for attempt in range(_TRIES):
            states, errors = _integrate(system, state, times, local, scale, max_products)
            bound = largest**0.5 * errors[-1]
            if bound <= 0.5 * tol * scale or local <= _FINEST or attempt == _TRIES - 1:
                break
            local = max(_FINEST, local * min(0.1, 0.1 * tol * scale / bound))
        return _finished(problem, system, states, errors, times, lr, tol, largest, started)


def _on_all(problem: Problem, loss: Callable[[Tensor], Loss]) -> Loss:
    return loss(torch.cat([part.to(problem.targets.device) for part in problem.space.share(problem.targets)]))


def _largest(problem: Problem, system: _System) -> float:
    """Return the largest eigenvalue of K plus the residual of its eigenvector."""
    space = problem.space.cast(torch.float64)
    width = problem.rhs.shape[:-2].numel()
    starts = space.probes(width, torch.Generator().manual_seed(0), "gaussian").to(problem.rhs.device)

    def multiply(block: Tensor) -> Tensor:
        if not problem.rhs.shape[:-2]:
            return problem.multiply(block)
        return problem.multiply_columns(block, rules.alive)

    rules = Jacobi(multiply, space, starts)
    rules.extend(_POWER)
    # An eigenvalue lies within β_m |s_m| of a Ritz value; from a random start twenty steps find the largest
    # to some per cent, and a bound may be too large.
    values, vectors = rules.decompositions()
    system.products += rules.products
    return float((values[:, -1] + rules.betas[:, -1] * vectors[:, -1, -1].abs()).max().clamp(min=0))


def _integrate(
    system: _System, state: np.ndarray, times: Tensor, local: float, scale: float, limit: int | None
) -> tuple[np.ndarray, list[float]]:
    """Return states at the times, and bounds of the errors of Δθ there."""
    from scipy.integrate import DOP853

    half = len(state) // 2
    rms = scale / half**0.5 or 1.0
    slope = system(0.0, state)
    units = float(np.linalg.norm(slope[half:])) / max(
        float(np.linalg.norm(slope[:half])), 1e-300
    )  # of f in those of a
    absolute = np.concatenate([np.full(half, local * rms / max(units, 1e-300)), np.full(half, local * rms)])
    wanted = times.tolist()
    found, errors = [], []
    total, place = 0.0, 0
    while place < len(wanted) and wanted[place] == 0:
        found.append(state)
        errors.append(0.0)
        place += 1
    if place == len(wanted):
        return np.stack(found), errors
    solver = DOP853(system, 0.0, state, wanted[-1], rtol=max(local, 3e-14), atol=absolute)
    while place < len(wanted):
        try:
            message = solver.step()
        except _OutOfProducts:
            raise NotConvergedError(
                f"max_products={limit} ended the integration at t = {solver.t:.4g} of {wanted[-1]:g}: raise "
                "it, or tol"
            ) from None
        if solver.status == "failed":
            raise NotConvergedError(
                f"the integration failed at t = {solver.t:.4g} of {wanted[-1]:g}: {message}"
            )
        dense = solver.dense_output()
        low, high = solver.t_old, solver.t
        while place < len(wanted) and wanted[place] <= high:
            # The bound at a time inside a step is that of its end, which is not less.
            part = total + _defect(system, dense, low, wanted[place]) if wanted[place] < high else None
            whole = _defect(system, dense, low, high) if part is None else None
            found.append(dense(wanted[place]))
            errors.append(part if part is not None else total + float(whole or 0.0))
            place += 1
        total += _defect(system, dense, low, high)
    return np.stack(found), errors


def _defect(system: _System, dense: Any, low: float, high: float) -> float:
    """Return ∫ (dᵀ K d)^{1/2} over a part of a step, by Gauss-Legendre quadrature."""
    inner, weights = np.polynomial.legendre.leggauss(_NODES)
    # The interpolant is a polynomial, known by its values at as many points: its derivative is exact.
    points = np.cos(np.pi * np.arange(_DEGREE + 1) / _DEGREE)
    table = np.polynomial.chebyshev.chebvander(points, _DEGREE)
    derivative = np.polynomial.chebyshev.chebder(np.eye(_DEGREE + 1))
    slopes = np.polynomial.chebyshev.chebvander(inner, _DEGREE - 1) @ derivative @ np.linalg.inv(table)
    values = np.polynomial.chebyshev.chebvander(inner, _DEGREE) @ np.linalg.inv(table)
    width = high - low
    samples = dense(low + width * (points + 1) / 2).T  # (8, 2 n)
    states, rates = values @ samples, slopes @ samples * (2 / width)
    split = [system.split(part) for part in states]
    due = torch.stack([system.slope(dual, outputs) for dual, outputs in split])
    moved = [system.split(part) for part in rates]
    defect = torch.stack([part for part, _ in moved]) - due
    image = torch.stack([part for _, part in moved]) - system.images(due)
    # d = ã' - a'(ã): K d is the difference of the images, which are known without another product of d
    squares = (defect * image).flatten(1).sum(-1).clamp(min=0).sqrt().cpu().numpy()
    return float(width / 2 * (weights * squares).sum())


def _finished(
    problem: Problem,
    system: _System,
    states: np.ndarray,
    errors: list[float],
    times: Tensor,
    lr: float,
    tol: float,
    largest: float,
    started: float,
) -> Trajectory:
    split = [system.split(np.ascontiguousarray(part)) for part in states]
    checked = [system.loss.curvature(outputs) for _, outputs in (split[0], split[-1])]
    least, steepest = min(low for low, _ in checked), max(high for _, high in checked)
    bound = torch.tensor(errors, dtype=torch.float64)
    convex = is_convex(least, steepest)
    if not convex:
        bound = torch.full_like(bound, float("inf"))
    dual = torch.stack([a for a, _ in split])
    # An error E of K changes f by E a, the gradient by its curvature, and the outputs by K^{1/2} of that.
    sizes = dual.flatten(1).norm(dim=-1).cpu().cummax(0).values
    moved = float(rounding_of(torch.tensor(largest), problem.dtype, problem.space.size))
    noise = moved * sizes * (1 + lr * max(steepest, 0.0) * largest * times.cpu())
    shape = (-1, *(1 for _ in problem.rhs.shape[:-2]), 1)
    return assemble(
        problem,
        times,
        torch.stack([system.own(f) for _, f in split]),
        torch.stack([system.own(a) for a, _ in split]),
        torch.stack([system.loss.value(f) for _, f in split]),
        (largest**0.5 * bound + noise).reshape(shape),
        (bound + noise / max(largest, 1e-300) ** 0.5).reshape(shape),
        noise.reshape(shape),
        filters=None,
        method="ode",
        tol=tol,
        largest=largest,
        products=system.products,
        started=started,
        reason=""
        if convex
        else f"the loss is not convex: it has a curvature of {least:.2g}, so that no bound holds",
    )
