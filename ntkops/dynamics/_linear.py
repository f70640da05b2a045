"""Training under the squared error: a linear recursion, solved in an eigenbasis or in one Krylov space."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..engines import free_bytes
from ..errors import InputError, NotConvergedError
from ..operators.rounding import eigenvalue_rounding, symmetric
from ..regression._operands import to_float64
from ..regression._routes import kernel_solver
from ..spectra import Jacobi
from ..vectors import rank_cutoff
from ._filters import Filter, Flow
from ._problem import Problem

__all__ = ["Solved", "by_eigh", "by_krylov", "rounding_of", "solve"]

_SMALL, _DIRECT = 512, 5000  # rows up to which an eigendecomposition is cheap, or a matter of a minute

_FIRST, _GROWTH = 4, 1.06  # steps before the bounds are looked at, and between two looks
_TO_LARGEST = 12  # products that find the largest eigenvalue to some per cent
_SHARE = 4  # the basis may take a quarter of the free memory
_OWN = 4  # rounding units of float64 that eigendecompositions and bases add
_INDEFINITE = 10  # times the rounding, below which a negative eigenvalue is one


@dataclass(frozen=True, eq=False)
class Solved:
    """Training at T times; k right-hand sides, each with its bounds.

    Attributes:
        dual: ``(T, *batch, n, k)`` q(A) r, float64.
        residual: ``(T, *batch, n, k)`` p(A) r, float64.
        residual_bounds: ``(T, *batch, k)`` of the method alone, without rounding.
        dual_bounds: ``(T, *batch, k)``; zero where there is no shift that they matter for.
        weight_bounds: ``(T, *batch, k)``.
        largest: ``(*batch, k)`` largest eigenvalue of K that the right-hand side meets.
        products: Columns multiplied.
        basis: Vectors of the basis; n for an eigendecomposition.
        restarts: Times that a full basis was given up.
    """

    dual: Tensor
    residual: Tensor
    residual_bounds: Tensor
    dual_bounds: Tensor
    weight_bounds: Tensor
    largest: Tensor
    products: int
    basis: int
    restarts: int = 0


def rounding_of(largest: Tensor, dtype: torch.dtype, size: int) -> Tensor:
    """Return by how much rounding moves eigenvalues of K: in its entries, in products, and in T."""
    own = torch.finfo(dtype).eps + _OWN * torch.finfo(torch.float64).eps
    return eigenvalue_rounding(largest, dtype, size) + own * largest


def _require_semidefinite(least: float, largest: Tensor, problem: Problem) -> None:
    limit = _INDEFINITE * float(rounding_of(largest.max(), problem.dtype, problem.space.size))
    if least < -limit:
        raise InputError(
            f"the kernel is not positive semidefinite: it has an eigenvalue {least:.3g}, beside a largest "
            f"one of {float(largest.max()):.3g}; training diverges along it. Look at how the kernel was made"
        )


# an eigendecomposition


def by_eigh(problem: Problem, filters: Filter) -> Solved:
    """Solve in the eigenbasis of the dense kernel; what is left is rounding."""
    if "eigh" not in problem.cache:
        problem.cache["eigh"] = torch.linalg.eigh(symmetric(to_float64(problem.K, "eigh")))
    values, vectors = problem.cache["eigh"]
    largest = values[..., -1].clamp(min=0)
    _require_semidefinite(float(values.min()), largest, problem)
    rhs = problem.rhs
    batch, (size, width) = values.shape[:-1], rhs.shape[-2:]
    coordinates = vectors.mT @ rhs  # (*batch, n, k)
    nodes = values.clamp(min=0).reshape(-1, size)  # (b, n)
    finite = filters.times.isfinite()
    p = torch.zeros((len(finite), len(nodes), size), dtype=torch.float64, device=nodes.device)
    q, bounds, weights = (
        p.clone(),
        p.new_zeros((len(finite), len(nodes))),
        p.new_zeros((len(finite), len(nodes))),
    )
    if bool(finite.any()):
        some = filters.at(filters.times[finite])
        p[finite], q[finite] = some.residual(nodes + problem.shift), some.dual(nodes + problem.shift)
    if not bool(finite.all()):
        limit = _limit(nodes, problem)
        p[~finite], q[~finite], bounds[~finite], weights[~finite] = limit

    def spread(table: Tensor) -> Tensor:  # (T, b, n) -> (T, *batch, n, 1)
        return table.reshape(len(table), *batch, size, 1)

    lengths = torch.linalg.vector_norm(rhs, dim=-2)  # (*batch, k)
    errors = (bounds.reshape(-1, *batch, 1) * lengths, weights.reshape(-1, *batch, 1) * lengths)
    return Solved(
        dual=vectors @ (spread(q) * coordinates),
        residual=vectors @ (spread(p) * coordinates),
        residual_bounds=errors[0],
        dual_bounds=torch.zeros_like(errors[0]),
        weight_bounds=errors[1],
        largest=largest.unsqueeze(-1).expand(*batch, width),
        products=0,
        basis=size,
    )


def _limit(nodes: Tensor, problem: Problem) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return p and q at t = ∞, ``(b, n)``, and errors of residual and weights relative to |r|, ``(b,)``."""
    if problem.shift > 0:
        full = 1 / (nodes + problem.shift)
        return torch.zeros_like(full), full, torch.zeros_like(nodes[:, 0]), torch.zeros_like(nodes[:, 0])
    # Eigenvalues that rounding decides count as zero: the least-norm limit leaves them alone.
    largest = nodes.amax(-1, keepdim=True)
    kept = nodes > rank_cutoff(problem.space.size, problem.dtype) * largest
    inverse = torch.where(kept, 1 / torch.where(kept, nodes, 1.0), 0.0)
    # The invariant subspaces turn by what moves the eigenvalues over the gap between them, here the least
    # kept.
    least = torch.where(kept, nodes, math.inf).amin(-1)
    moved = rounding_of(largest.squeeze(-1), problem.dtype, problem.space.size)
    turn = torch.where(kept.all(-1), 0.0, (2 * moved / least).clamp(max=1.0))
    return (~kept).double(), inverse, turn, (moved / least + turn) / least.sqrt()


# a Krylov space


def by_krylov(problem: Problem, filters: Filter, tol: float, max_products: int | None) -> Solved:
    """Solve in a Krylov space of each right-hand side; all times share it."""
    finite = filters.times.isfinite()
    parts = []
    if bool(finite.any()):
        parts.append(_finite(problem, filters.at(filters.times[finite]), tol, max_products))
    if not bool(finite.all()):
        spent = parts[0].products if parts else 0
        left = None if max_products is None else max(max_products - spent, 1)
        parts.append(
            _ridge_limit(problem, tol, left) if problem.shift > 0 else _least_norm(problem, tol, left)
        )
    first = parts[0]
    if len(parts) == 1:
        return first
    last = parts[1]
    return Solved(
        dual=torch.cat([first.dual, last.dual]),
        residual=torch.cat([first.residual, last.residual]),
        residual_bounds=torch.cat([first.residual_bounds, last.residual_bounds]),
        dual_bounds=torch.cat([first.dual_bounds, last.dual_bounds]),
        weight_bounds=torch.cat([first.weight_bounds, last.weight_bounds]),
        largest=torch.maximum(first.largest, last.largest),
        products=first.products + last.products,
        basis=max(first.basis, last.basis),
        restarts=first.restarts,
    )


class _Basis:
    """Krylov spaces of right-hand sides, grown until bounds are met, memory ends, or products do."""

    def __init__(self, problem: Problem, starts: Tensor, max_products: int | None) -> None:
        self._problem, self.width = problem, starts.shape[-1]
        self.lengths = problem.space.sum_squares(starts).sqrt()  # (p,)
        self._rules = Jacobi(self._multiply, problem.space.cast(torch.float64), starts)
        # vectors of float64 that fit: (p, capacity, n)
        room = free_bytes(starts.device) // _SHARE // (8 * max(starts.numel(), 1))
        room = -int(problem.space.largest(-float(room)))  # the least of all processes
        allowed = problem.space.size if max_products is None else max_products // max(self.width, 1)
        self.limit = max(min(problem.space.size, room, allowed), 1)
        self.out_of_products = allowed <= min(room, problem.space.size)

    def _multiply(self, block: Tensor) -> Tensor:
        """Multiply the columns whose spaces still grow; those of a batch have a kernel each."""
        return self._problem.multiply_columns(block, self._rules.alive)

    @property
    def steps(self) -> int:
        return self._rules.steps

    @property
    def products(self) -> int:
        return self._rules.products

    @property
    def exhausted(self) -> bool:
        return not bool(self._rules.alive.any())

    def grow(self) -> None:
        """Go on to where the bounds are looked at next."""
        self._rules.extend(min(self.limit, max(_FIRST, self.steps + 1, math.ceil(_GROWTH * self.steps))))

    def ritz(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return Ritz values ``(p, m)``, eigenvectors of T, and the couplings times |r|, ``(p,)``."""
        if not self.steps:  # nothing to train: all right-hand sides are zero
            none = torch.zeros_like(self.lengths)
            return none.unsqueeze(-1), torch.ones_like(none)[:, None, None], none, none
        values, vectors = self._rules.decompositions()
        largest = values[:, -1].clamp(min=0)
        _require_semidefinite(float(values.min()), largest, self._problem)
        return values.clamp(min=0), vectors, self._rules.betas[:, -1] * self.lengths, largest

    def tridiagonal(self) -> Tensor:
        """Return the ``(p, m + 1, m)`` matrix of K V = V₊ T."""
        alphas, betas = self._rules.alphas, self._rules.betas
        square = (
            torch.diag_embed(alphas)
            + torch.diag_embed(betas[:, :-1], 1)
            + torch.diag_embed(betas[:, :-1], -1)
        )
        below = torch.zeros_like(square[:, :1])
        below[:, 0, -1] = betas[:, -1]
        return torch.cat([square, below], dim=1)

    def combine(self, coefficients: Tensor) -> Tensor:
        """Return ``(T, n, p)`` from coefficients ``(T, p, m)``."""
        if not self.steps:
            return coefficients.new_zeros((len(coefficients), self._problem.space.length, self.width))
        return self._rules.combine(coefficients.permute(1, 2, 0)).permute(2, 1, 0)


def _finite(problem: Problem, filters: Filter, tol: float, max_products: int | None) -> Solved:
    starts = problem.flat(problem.rhs)  # (n, p)
    times = filters.times
    total = problem.norm(problem.rhs)
    duals, residuals, errors = [], [], []
    # What earlier segments of time have left: the state, and bounds of its errors.
    dual = torch.zeros_like(starts)
    none = torch.zeros(starts.shape[-1], dtype=torch.float64, device=starts.device)
    before = (none, none, none)
    done, place, products, basis_size, restarts = 0.0, 0, 0, 0, 0
    largest = none
    while True:
        left = None if max_products is None else max(max_products - products, 1)
        basis = _Basis(problem, starts, left)
        rest = filters.at((times[place:] - done).clamp(min=0))
        # Of the error that is allowed each segment of time has a share in proportion to its length.
        share, final = _grow(problem, basis, rest, tol * total, float(times[-1]))
        products, basis_size = products + basis.products, max(basis_size, basis.steps)
        values, vectors, coupling, top = basis.ritz()
        largest = torch.maximum(largest, top)
        within = rest.times[rest.times < share]
        here = rest if final else filters.at(torch.cat([within, within.new_tensor([share])]))
        p, q, bounds = _evaluate(basis, here, values + problem.shift, vectors, coupling)
        # Errors of the state decay, and enter the dual and the weights by what q makes of them.
        span = here.span()[:, None]
        bounds = (
            before[0] + bounds[0],
            before[1] + span * before[0] + bounds[1],
            before[2] + here.reach()[:, None] * before[0] + bounds[2],
        )
        keep = slice(None) if final else slice(0, -1)
        duals.append(dual + q[keep])
        residuals.append(p[keep])
        errors.append((bounds[0][keep], bounds[1][keep], bounds[2][keep]))
        if final:
            break
        starts, dual, before = p[-1], dual + q[-1], (bounds[0][-1], bounds[1][-1], bounds[2][-1])
        done, place, restarts = done + share, place + len(within), restarts + 1
    first, second, third = (problem.numbers(torch.cat(part)) for part in zip(*errors, strict=True))
    return Solved(
        dual=problem.blocks(torch.cat(duals)),
        residual=problem.blocks(torch.cat(residuals)),
        residual_bounds=first,
        dual_bounds=second,
        weight_bounds=third,
        largest=problem.numbers(largest),
        products=products,
        basis=basis_size,
        restarts=restarts,
    )


def _evaluate(
    basis: _Basis, filters: Filter, nodes: Tensor, vectors: Tensor, coupling: Tensor
) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor, Tensor]]:
    """Return residuals and duals ``(T, n, p)`` and the bounds of their errors, ``(T, p)`` each."""
    first, last = vectors[:, 0], vectors[:, -1]

    def turned(values: Tensor) -> Tensor:  # (T, p, m): |r| S f(Θ) Sᵀ e₁
        small = torch.einsum("pij,tpj->tpi", vectors, values * first)
        return basis.combine(small * basis.lengths[:, None])

    found = filters.defects(nodes, first, last)
    bounds = (found.residual * coupling, found.dual * coupling, found.weights * coupling)
    return turned(filters.residual(nodes)), turned(filters.dual(nodes)), bounds


def _grow(
    problem: Problem, basis: _Basis, rest: Filter, allowed: float, horizon: float
) -> tuple[float, bool]:
    """Grow a basis; return up to which time its bounds are met, and whether that is the last one."""
    last = rest.at(rest.times[-1:])
    while True:
        basis.grow()
        values, vectors, coupling, largest = basis.ritz()
        nodes = values + problem.shift
        errors = last.defects(nodes, vectors[:, 0], vectors[:, -1])
        bound = float(torch.linalg.vector_norm(problem.output_bound(errors.residual, errors.dual) * coupling))
        # Beyond rounding there is nothing to gain.
        moved = (
            rounding_of(largest, problem.dtype, problem.space.size) * problem.span(last)[0] * basis.lengths
        )
        noise = float(torch.linalg.vector_norm(moved))
        share = float(rest.times[-1]) / horizon if horizon else 1.0
        if bound <= max(allowed * share - noise, 0.1 * noise) or basis.exhausted:
            return float(rest.times[-1]), True
        if basis.steps < basis.limit:
            continue
        if basis.out_of_products or not rest.can_restart():
            return float(rest.times[-1]), True
        return _reach(problem, rest, nodes, vectors, coupling, allowed / horizon)


def _reach(
    problem: Problem, rest: Filter, nodes: Tensor, vectors: Tensor, coupling: Tensor, rate: float
) -> tuple[float, bool]:
    """Return the longest time whose bound is within its share, by bisection."""
    low, high = 0.0, float(rest.times[-1])
    for _ in range(60):
        # Bounds grow with a power of the time that is about the order of the space: the first guesses fall
        # fast.
        middle = (low + high) / 2 if low else high / 4
        some = rest.at(rest.times.new_tensor([middle]))
        errors = some.defects(nodes, vectors[:, 0], vectors[:, -1])
        bound = float(torch.linalg.vector_norm(problem.output_bound(errors.residual, errors.dual) * coupling))
        if bound <= rate * middle:
            low = middle
        else:
            high = middle
        if low and high - low <= 0.02 * high:
            break
    reached = float(rest.at(rest.times.new_tensor([low])).times[0])
    return (reached, False) if reached > 0 else (float(rest.times[-1]), True)


def _ridge_limit(problem: Problem, tol: float, max_products: int | None) -> Solved:
    """Return t = ∞ under weight decay: (K + shift) a = r."""
    solver = kernel_solver(
        problem.K, problem.shift, tol=min(tol, 0.5), max_products=max_products, generator=None
    )
    try:
        solution, info = solver(problem.rhs)
    except NotConvergedError as error:
        solution, info = error.result  # type: ignore[misc]
    residual = info.residuals * problem.lengths(problem.rhs)
    basis = _Basis(problem, problem.flat(problem.rhs), _TO_LARGEST * problem.flat(problem.rhs).shape[-1])
    while basis.steps < basis.limit and not basis.exhausted:
        basis.grow()
    *_, largest = basis.ritz()
    # A⁻¹ ≤ 1 / shift and |K^{1/2} A⁻¹| ≤ 1 / (2 √shift) carry the true residual on.
    return Solved(
        dual=solution.unsqueeze(0),
        residual=torch.zeros_like(solution).unsqueeze(0),
        residual_bounds=torch.zeros_like(residual).unsqueeze(0),
        dual_bounds=(residual / problem.shift).unsqueeze(0),
        weight_bounds=(residual / (2 * problem.shift**0.5)).unsqueeze(0),
        largest=problem.numbers(largest),
        products=info.products + info.preconditioner_products + basis.products,
        basis=0,
    )


def _least_norm(problem: Problem, tol: float, max_products: int | None) -> Solved:
    """Return t = ∞ without weight decay: the residual is made as small as it gets.

    Over the Krylov space of r the residual |r - K a| is minimised (MINRES). That of the limit is the part of
    r that no weights reach, at most what is found; without the whole spectrum nothing says how much of what
    is found is that part, so that the bound is the residual itself.
    """
    starts = problem.flat(problem.rhs)
    if not problem.norm(problem.rhs):
        return _finite(problem, Flow(problem.rhs.new_zeros(1)), tol, max_products)
    left = None if max_products is None else max(max_products - starts.shape[-1], 1)
    basis = _Basis(problem, starts, left)
    target = 0.5 * tol * basis.lengths
    while True:
        basis.grow()
        tridiagonal = basis.tridiagonal()
        start = torch.zeros_like(tridiagonal[:, :, :1])
        start[:, 0, 0] = basis.lengths
        # MINRES: min |(|r| e₁ - T₊ y)| over the Krylov space, T₊ (m + 1, m); the pseudo-inverse leaves
        # directions of no curvature at zero, as the least-norm limit does.
        solution = torch.linalg.pinv(tridiagonal, rtol=torch.finfo(torch.float64).eps * basis.steps) @ start
        norms = torch.linalg.vector_norm(start - tridiagonal @ solution, dim=(-2, -1))
        if bool((norms <= target).all()) or basis.exhausted or basis.steps >= basis.limit:
            break
    values, _, _, largest = basis.ritz()
    dual = basis.combine(solution.mT.movedim(1, 0))[0]
    every = torch.ones(starts.shape[-1], dtype=torch.bool, device=starts.device)
    residual = starts - problem.multiply_columns(dual, every)
    bound = problem.space.sum_squares(residual).sqrt()
    weights = torch.full_like(bound, math.inf)
    products = basis.products + starts.shape[-1]
    if basis.exhausted:  # then the whole spectrum that r meets is known: of s, |K s| / λ least is no limit
        kept, _, turn, lost = _limit(values, problem)
        least = torch.where(kept == 0, values, math.inf).amin(-1)
        slope = problem.space.sum_squares(problem.multiply_columns(residual, every)).sqrt()
        products += starts.shape[-1]
        bound = torch.minimum(bound, slope / least + turn * basis.lengths)
        weights = bound / least.sqrt() + lost * basis.lengths
    return Solved(
        dual=problem.blocks(dual.unsqueeze(0)),
        residual=problem.blocks(residual.unsqueeze(0)),
        residual_bounds=problem.numbers(bound.unsqueeze(0)),
        dual_bounds=problem.numbers(torch.zeros_like(bound).unsqueeze(0)),
        weight_bounds=problem.numbers(weights.unsqueeze(0)),
        largest=problem.numbers(largest),
        products=products,
        basis=basis.steps,
    )


def _automatic(problem: Problem, filters: Filter) -> str:
    if not problem.is_dense:
        return "krylov"
    # Whether an eigenvalue is zero is what decides the limit, and what a Krylov space does not know.
    limit = problem.shift == 0 and not bool(filters.times.isfinite().all())
    # n³ of a few hundred rows is less than the products and looks of a Krylov space.
    return "eigh" if problem.space.size <= (_DIRECT if limit else _SMALL) else "krylov"


def solve(
    problem: Problem, filters: Filter, method: str, tol: float, max_products: int | None
) -> tuple[str, Solved]:
    """Return the method that was used, and training by it."""
    method = _automatic(problem, filters) if method == "auto" else method
    with torch.no_grad():
        if method == "eigh":
            return method, by_eigh(problem, filters)
        return method, by_krylov(problem, filters, tol, max_products)
