"""The ways of solving a regression."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from linear_operator.operators import LinearOperator, to_linear_operator
from torch import Tensor

from ..errors import InputError, NotConvergedError, OutOfRangeError, SingularKernelError
from ..operators._ridge_system import RidgeSystem, SolverOptions
from ..operators.capabilities import capabilities, multiply, taken_columns
from ..operators.rounding import require_resolved, require_semidefinite, symmetric
from ..results import Solution, SolveInfo
from ..solvers import lsmr
from ..vectors import resolve_generator
from ._evidence import Evidence
from ._factorizations import CholeskyFactor, SpectralFactor, require_regular, truncate
from ._fits import (
    DenseFit,
    FeatureFit,
    Fit,
    LeftOut,
    NystromFit,
    Prediction,
    left_out,
    relative_residuals,
    solve_block,
    solve_info,
    unit_columns,
)
from ._operands import Kernel, dense_of, dense_rows, is_spread, may_be_dense, require_finite, to_float64
from ._rounding import is_stored, largest_eigenvalue, precise_product, raise_by_name, warn_of_rounding
from ._tall_features import TallFactor, TallFeatures

__all__ = [
    "IterativeFit",
    "Problem",
    "choose",
    "kernel_solver",
    "solve",
]

Solver = Callable[[Tensor], Solution]

_CHUNK = 64  # right-hand sides of the identity solved at a time


class IterativeFit:
    """A fit by a solver that is given right-hand sides.

    Args:
        solver: ``(*batch, n, k)`` in float64 to the solution of (K + ridge) X = B, in float64.
        rhs: ``(*batch, n, k)`` right-hand sides, float64.
    """

    def __init__(self, solver: Solver, rhs: Tensor) -> None:
        self._solver, self._rhs = solver, rhs
        solution = solver(rhs)
        self.dual: Tensor = solution.solution
        self.active = self.dual
        self.info: SolveInfo = solution.info

    def predict(self, K_cross: Kernel) -> Prediction:
        return precise_product(K_cross, self.dual)

    def explained(self, K_cross: Kernel, start: int, stop: int) -> Tensor:
        rows = dense_rows(K_cross, start, stop)
        return (rows * self._solver(rows.mT.contiguous()).solution.mT).sum(-1)

    def explain(self, pulled: Tensor) -> Tensor:
        return self._solver(pulled).solution

    def energy(self) -> float:
        return float((self._rhs * self.dual).sum())

    def energy_error(self, ridge: float) -> float:
        """Return a bound of the error of `energy`."""
        # (K + r) α = y - ρ: yᵀ (K + r)⁻¹ y = yᵀ α + αᵀ ρ + ρᵀ (K + r)⁻¹ ρ.
        rest = self.info.residuals * torch.linalg.vector_norm(self._rhs, dim=-2)
        return float((rest * torch.linalg.vector_norm(self.dual, dim=-2) + rest.square() / ridge).sum())

    def evidence(self, K: Kernel) -> None:
        return None

    def left_out(self, group: int) -> Tensor:
        size = self._rhs.shape[-2]
        width = max(_CHUNK // group, 1) * group
        parts = []
        for start in range(0, size, width):
            rows = torch.arange(start, min(start + width, size), device=self._rhs.device)
            inverse = self._inverse_columns(rows)[..., rows, :]  # (*batch, w, w): a block of A⁻¹
            blocks = inverse.unflatten(-1, (-1, group)).unflatten(-3, (-1, group))  # (*batch, s, g, s, g)
            blocks = blocks.diagonal(dim1=-4, dim2=-2).movedim(-1, -3)  # (*batch, s, g, g)
            samples = self.dual[..., rows, :].unflatten(-2, (-1, group))
            parts.append(torch.linalg.solve(blocks, samples).flatten(-3, -2))
        return torch.cat(parts, dim=-2)

    def without(self, rows: Tensor) -> LeftOut:
        columns = torch.cat([self._inverse_columns(part) for part in rows.split(_CHUNK)], dim=-1)
        errors = solve_block(columns[..., rows, :], self.dual[..., rows, :])
        # It is zero at these rows by what `errors` solves, so that the other rows' equations hold as well as
        # those of the solves, whatever is rounded.
        dual = (self.dual - columns @ errors).index_fill(-2, rows, 0.0)
        return LeftOut(errors, dual, dual, 0.0)

    def _inverse_columns(self, rows: Tensor) -> Tensor:
        """Return columns of A⁻¹, ``(*batch, n, s)``."""
        return self._solver(unit_columns(rows, self._rhs).contiguous()).solution


def kernel_solver(
    K: Kernel, ridge: float, *, tol: float, max_products: int | None, generator: torch.Generator | None
) -> Solver:
    """Return a solver of (K + ridge) X = B by conjugate gradients, its preconditioner made once.

    Products of a float32 operator carry corrections whose residuals are float64 products of the same
    network, so that the tolerance is met where float32 alone would stagnate. Stored entries are multiplied in
    float64.
    """
    kernel = to_linear_operator(K)
    if is_stored(K):  # then float32 products save little, and round
        kernel = kernel.to(dtype=torch.float64)
    entries = torch.full(kernel.shape[:-1], ridge, dtype=kernel.dtype, device=kernel.device)
    drawn = capabilities(K).space.common(resolve_generator(generator)[0])
    seed = int(torch.randint(2**31, (), generator=drawn))
    made = SolverOptions(tolerance=tol, seed=seed)

    def solver(rhs: Tensor) -> Solution:
        steps = None if max_products is None else max(max_products // rhs.shape[-1], 1)
        # `made` holds the preconditioner, which is one for all right-hand sides.
        options = dataclasses.replace(made, max_iterations=steps)
        return RidgeSystem(kernel, entries, options).solve(rhs, raise_on_failure=True)

    return solver


# -- fits in parameter space: min |J w - y|² + ridge |w|² from products with J and Jᵀ alone


def least_squares_solver(
    K: Kernel, ridge: float, *, tol: float, max_products: int | None
) -> Callable[[Tensor], Solution]:
    """Return a solver of (K + ridge) X = B by LSMR on J, one member of the batch after the other.

    Products run in float64, those of a float32 network too.

    Raises:
        InputError: If the ridge is zero, or the operator does not know its Jacobian.
    """
    if ridge == 0:
        raise InputError("method='lsmr' finds α = (y - J w) / ridge and needs a positive ridge")
    known = capabilities(K)
    factors = known.factors() if known.symmetric else None
    if factors is None:
        raise InputError(
            "method='lsmr' needs an operator that knows its Jacobian, K = J Jᵀ; "
            f"{type(K).__name__} does not: take 'cg'"
        )
    jacobian = factors[0].to(dtype=torch.float64)

    def solver(rhs: Tensor) -> Solution:
        started = time.perf_counter()
        steps = None if max_products is None else max(max_products // rhs.shape[-1], 1)
        if jacobian.dim() == 2:
            found = [_solve(jacobian, rhs, ridge, tol, steps)]
            return _finished(found[0].solution, found[0].info)
        count = jacobian.shape[0]
        found = [_solve(jacobian[c], rhs[c], ridge, tol, steps) for c in range(count)]
        info = _merged([part.info for part in found], time.perf_counter() - started)
        return _finished(torch.stack([part.solution for part in found]), info)

    return solver


def _solve(jacobian: LinearOperator, rhs: Tensor, ridge: float, tol: float, steps: int | None) -> Solution:
    transposed = jacobian.mT
    return lsmr(
        lambda block: multiply(jacobian, block),
        lambda block: multiply(transposed, block),
        rhs,
        capabilities(jacobian).space,
        capabilities(jacobian).domain,
        ridge=ridge,
        tolerance=tol,
        max_iterations=steps,
        raise_on_failure=False,
    )


def _merged(infos: list[SolveInfo], seconds: float) -> SolveInfo:
    """Return the info of a batch from those of its members."""
    worst = max(infos, key=lambda info: float(info.residuals.max()))
    return SolveInfo(
        converged=all(info.converged for info in infos),
        residuals=torch.stack([info.residuals for info in infos]),
        tolerance=worst.tolerance,
        iterations=max(info.iterations for info in infos),
        products=sum(info.products for info in infos),
        reason=worst.reason,
        method=worst.method,
        seconds=seconds,
    )


def _finished(solution: Tensor, info: SolveInfo) -> Solution:
    found = Solution(solution, info)
    if not info.converged:
        raise NotConvergedError(
            f"LSMR ended ({info.reason}) with a relative residual of {float(info.residuals.max()):.2g} where "
            f"{info.tolerance:.2g} was asked: raise max_products, the ridge or the tolerance; the partial "
            "solution is in .result",
            found,
        )
    return found


# -- the ways of solving a kernel ridge regression, and which one "auto" takes


METHODS = ("cg", "eigh", "cholesky", "lsmr", "nystrom", "features")
_DIRECT = 5000  # rows or features up to which a factorisation is a matter of seconds
_INDEFINITE = 10  # times the rounding, below which a negative eigenvalue is one
_TALL = 2**24  # entries of features above which they are read by blocks: 0.13 GB in float64
_ENTRIES = 10**8  # of a dense matrix, all classes together: 0.8 GB in float64

Path = tuple[Tensor, Tensor]


@dataclass(frozen=True, eq=False)
class Problem:
    """One regression, checked.

    Attributes:
        K: ``(*batch, n, n)``.
        rhs: ``(*batch, n, k)`` right-hand sides, float64.
        scale: What relative ridges are relative to; None for absolute ones.
        group: Rows that leave together when a sample is left out.
        ridges: Absolute ridges to choose from; a single one is taken as it is. For "evidence" the largest
            that is looked at.
        cutoff: Number of eigenpairs, share ε of the trace to lose, or None.
        inducing: Number or positions of inducing samples, or None.
        tol: Relative residual asked of iterations.
        max_products: Cap of their product columns, or None.
        generator: Source of randomness.
        criterion: What ridges are compared by.
    """

    K: Kernel
    rhs: Tensor
    scale: float | None
    group: int
    ridges: tuple[float, ...]
    cutoff: int | float | None
    inducing: int | Tensor | None
    tol: float
    max_products: int | None
    generator: torch.Generator | None
    criterion: Literal["loo", "evidence"] = "loo"

    @property
    def size(self) -> int:
        """Rows n of a kernel."""
        return self.K.shape[-1]

    @property
    def chooses(self) -> bool:
        """Whether the ridge is to be chosen."""
        return len(self.ridges) > 1 or self.criterion == "evidence"


@dataclass(frozen=True, eq=False)
class Solved:
    """A fit with the ridge that was chosen.

    Attributes:
        fit: The fit.
        ridge: The absolute ridge.
        path: The ridges that were compared, and the criterion's value of each; None where one was given.
    """

    fit: Fit
    ridge: float
    path: Path | None = None


def choose(method: str, problem: Problem) -> str:
    """Return the method that "auto" stands for, or the one asked for.

    Raises:
        InputError: If the method does not exist or cannot do what is asked.
    """
    if method not in ("auto", *METHODS):
        raise InputError(f"method={method!r}: choose 'auto' or one of {', '.join(map(repr, METHODS))}")
    if is_spread(problem.K):
        if (
            method not in ("auto", "cg")
            or problem.chooses
            or problem.cutoff is not None
            or problem.inducing is not None
        ):
            raise InputError(
                "the rows of the kernel lie on several ranks, where method='cg' is what there is, with one "
                "ridge and neither a cut-off nor inducing samples"
            )
        return "cg"
    if method == "auto":
        return _automatic(problem)
    if problem.cutoff is not None and method != "eigh":
        raise InputError(
            f"a spectral cut-off needs the eigenvectors: method='eigh' or 'auto', not {method!r}"
        )
    if problem.chooses and method in ("cg", "lsmr"):
        raise InputError(
            f"method={method!r} has no closed form for leave-one-out or the evidence: choose the ridge with "
            "method='eigh', 'features' or 'nystrom' (on part of the samples if need be), then fit with it"
        )
    if problem.inducing is not None and method != "nystrom":
        raise InputError(f"inducing samples are for method='nystrom', not {method!r}")
    return method


def _automatic(problem: Problem) -> str:
    if problem.inducing is not None:
        return "nystrom"
    if problem.cutoff is not None:
        return "eigh"
    if _few_features(problem.K):
        return "features"
    if problem.size <= _DIRECT and problem.K.shape.numel() <= _ENTRIES and may_be_dense(problem.K):
        return "eigh" if problem.chooses else "cholesky"
    return "eigh" if problem.chooses else "cg"


def _few_features(K: Kernel) -> bool:
    """Whether K knows features that are fewer than its rows and may be dense."""
    known = capabilities(K)
    factors = known.factors() if known.symmetric else None
    if factors is None or factors[0].shape[-1] >= min(K.shape[-1], _DIRECT):
        return False
    return may_be_dense(factors[0])


def solve(method: str, problem: Problem) -> Solved:
    """Solve by a method that `choose` returned."""
    return _ROUTES[method](problem)


def _cholesky(problem: Problem) -> Solved:
    if problem.chooses:
        return _eigh(problem)
    started, (ridge,) = time.perf_counter(), problem.ridges
    matrix = symmetric(to_float64(problem.K, "cholesky"))
    factor = CholeskyFactor(matrix, ridge, problem.K.dtype, problem.scale)
    dual = factor.dual(problem.rhs)
    residuals = relative_residuals(problem.rhs - matrix @ dual - ridge * dual, problem.rhs)
    info = solve_info("cholesky", residuals, problem.tol, started)
    warn_of_rounding(factor.largest, dual, problem.rhs, ridge, problem.K.dtype)
    return Solved(DenseFit(factor, problem.rhs, info), ridge)


def _eigh(problem: Problem) -> Solved:
    started = time.perf_counter()
    matrix = symmetric(to_float64(problem.K, "eigh"))
    values, vectors = torch.linalg.eigh(matrix)
    kept = truncate(values, problem.cutoff)
    rest = "none" if kept is None else "cut"

    def factor(ridge: float) -> SpectralFactor:
        require_regular(values, ridge, problem.K.dtype, problem.scale, kept)
        return SpectralFactor(values, vectors, ridge, rest, kept)

    chosen, ridge, path = _select(problem, factor, problem.K.dtype)
    dual = chosen.dual(problem.rhs)
    missed = problem.rhs - matrix @ dual - ridge * dual
    if kept is not None:  # what the cut-off leaves out is no error of the solution
        missed = vectors @ (kept.unsqueeze(-1) * (vectors.mT @ missed))
    info = solve_info("eigh", relative_residuals(missed, problem.rhs), problem.tol, started)
    warn_of_rounding(chosen.largest, dual, problem.rhs, ridge, problem.K.dtype)
    return Solved(DenseFit(chosen, problem.rhs, info), ridge, path)


def _features(problem: Problem) -> Solved:
    started = time.perf_counter()
    known = capabilities(problem.K)
    found = known.factors() if known.symmetric else None
    if found is None:
        raise InputError(
            "method='features' needs an operator that knows its features, K = F Fᵀ; "
            f"{type(problem.K).__name__} "
            "does not: take a projected kernel, a RootLinearOperator(F), or another method"
        )
    with torch.no_grad():
        features = dense_of(found[0])
    tall = features.numel() > _TALL and features.shape[-1] < problem.size
    features = features if tall else require_finite(features, "the features").double()
    rows = TallFeatures(features)
    factor, ridge, path = _tall(problem, rows) if tall else _thin(problem, features, exact=True)
    dual = factor.dual(problem.rhs)
    rest = problem.rhs - rows.push(rows.pull(dual)) - ridge * dual
    # Small ridges make coefficients that float64 does not resolve, beside weights that it does.
    resolved = bool((_primal_residuals(rows, factor, problem.rhs) <= problem.tol).all())
    residuals = relative_residuals(rest, problem.rhs)
    info = solve_info("features", residuals, problem.tol, started, aloud=not resolved)
    return Solved(FeatureFit(factor, rows, problem.rhs, info), ridge, path)


def _thin(problem: Problem, features: Tensor, *, exact: bool) -> tuple[SpectralFactor, float, Path | None]:
    """Return the factor of F Fᵀ + ridge from the singular values of F, ``(*batch, n, k)``.

    Raises:
        SingularKernelError: If F Fᵀ + ridge is singular. One that only approximates the kernel
            (``exact=False``) counts as such without a ridge.
    """
    left, singular, _ = torch.linalg.svd(features, full_matrices=False)
    values = singular.square()
    full = exact and values.shape[-1] == problem.size
    # Features that repeat or vanish leave singular values of zero, whose vectors mean nothing.
    seen = singular > max(features.shape[-2:]) * torch.finfo(torch.float64).eps * singular.amax(
        -1, keepdim=True
    )

    def factor(ridge: float) -> SpectralFactor:
        if full:
            # Of F Fᵀ no entry is computed: singular values of F are rounded, by eps σmax.
            require_regular(values, ridge, torch.float64, problem.scale)
        elif ridge == 0:
            raise SingularKernelError(_no_inverse(features.shape[-1], problem.size))
        return (
            SpectralFactor(values, left, ridge, "none")
            if full
            else SpectralFactor(values, left, ridge, "zero", seen)
        )

    return _select(problem, factor, torch.float64)


def _tall(problem: Problem, features: TallFeatures) -> tuple[SpectralFactor, float, Path | None]:
    """Return what `_thin` does for features of so many rows that a second array of them has no room.

    Raises:
        SingularKernelError: If there is no ridge: features fewer than rows leave K singular.
    """
    _, singular, right = torch.linalg.svd(features.triangle())
    size = features.shape[-2]
    seen = singular > size * torch.finfo(torch.float64).eps * singular.amax(-1, keepdim=True)

    def factor(ridge: float) -> SpectralFactor:
        if ridge == 0:
            raise SingularKernelError(_no_inverse(features.shape[-1], size))
        return TallFactor(features, singular, right.mT, ridge, seen)

    return _select(problem, factor, torch.float64)


def _no_inverse(width: int, size: int) -> str:
    return (
        f"a kernel of {width} features has rank {width} at most, and {size} rows: without a ridge it has no "
        "inverse; pass ridge=1e-6 or more"
    )


def _nystrom(problem: Problem) -> Solved:
    started = time.perf_counter()
    chosen, seed = _inducing(problem)
    columns = taken_columns(problem.K, chosen).double()  # (*batch, n, m)
    block = columns[..., chosen, :]
    values, vectors = torch.linalg.eigh((block + block.mT) / 2)
    noise = len(chosen) * torch.finfo(problem.K.dtype).eps * values.amax(-1, keepdim=True)
    if bool((values < -_INDEFINITE * noise).any()):
        raise SingularKernelError(
            f"the kernel is not positive semidefinite: that of the inducing rows has an eigenvalue "
            f"{float(values.min()):.2g}, beside a largest one of {float(values.max()):.2g}"
        )
    used = values > noise
    if not bool(used.any(-1).all()):
        raise SingularKernelError("the kernel of the inducing rows is zero; choose other rows")
    scale = torch.where(used, values.clamp(min=0).rsqrt(), torch.zeros_like(values))
    # A batch stays one tensor: directions without energy get columns of zeros, which the ridge ignores.
    rank = int(used.sum(-1).max())
    whitening = (vectors * scale.unsqueeze(-2))[..., -rank:]
    features = columns @ whitening
    factor, ridge, path = _thin(problem, features, exact=False)
    residuals = _primal_residuals(TallFeatures(features), factor, problem.rhs)
    info = solve_info("nystrom", residuals, problem.tol, started, products=len(chosen), seed=seed)
    return Solved(NystromFit(factor, whitening, features, chosen, problem.rhs, info), ridge, path)


def _primal_residuals(features: TallFeatures, factor: SpectralFactor, rhs: Tensor) -> Tensor:
    """Return the residual of (Fᵀ F + ridge) w = Fᵀ y, relative to |F| |y|: no 1 / ridge enters it."""
    weights = features.pull(factor.within(rhs))
    rest = features.pull(rhs - features.push(weights)) - factor.ridge * weights
    size = factor.values.amax(-1).sqrt()[..., None, None]
    return relative_residuals(rest / size, rhs)


def _inducing(problem: Problem) -> tuple[Tensor, int | None]:
    """Return the rows of the inducing samples, and the seed that drew them."""
    count, wanted = problem.size // problem.group, problem.inducing
    if wanted is None:
        raise InputError(
            "method='nystrom' needs inducing samples: inducing=200 draws so many, inducing=indices names them"
        )
    seed: int | None = None
    if isinstance(wanted, int) and not isinstance(wanted, bool):
        if not 1 <= wanted <= count:
            raise InputError(f"inducing={wanted}: a number of samples from 1 to {count}")
        generator, seed = resolve_generator(problem.generator)
        samples = torch.randperm(count, generator=generator)[:wanted].sort().values
    else:
        samples = _named(wanted, count)
    rows = samples.unsqueeze(1) * problem.group + torch.arange(problem.group)
    return rows.flatten().to(problem.K.device), seed


def _named(wanted: Any, count: int) -> Tensor:
    """Return positions of samples as a user named them, on the CPU."""
    samples = torch.as_tensor(wanted).cpu()
    if samples.dim() != 1 or not len(samples) or samples.dtype not in (torch.int64, torch.int32):
        raise InputError("inducing: pass a number of samples, or a vector of their positions (integers)")
    outside = (samples < 0) | (samples >= count)
    if bool(outside.any()):
        raise OutOfRangeError(f"inducing sample {int(samples[outside][0])} does not exist: there are {count}")
    if len(samples.unique()) < len(samples):
        raise InputError("an inducing sample is named twice: pass each position once")
    return samples.long()


def _select(
    problem: Problem, factor: Callable[[float], SpectralFactor], dtype: torch.dtype
) -> tuple[SpectralFactor, float, Path | None]:
    """Return the factor at the best ridge by the criterion, over all targets and classes.

    Raises:
        SingularKernelError: If none of the ridges leaves K + ridge regular.
    """
    if problem.criterion == "evidence":
        top = problem.ridges[-1]
        first = factor(top)
        require_semidefinite(first.values.amin(-1), first.values.amax(-1), dtype, problem.size)
        ridges, values = Evidence.of(first, problem.rhs, dtype).path(top)
        ridge = float(ridges[values.argmax()])
        return factor(ridge), ridge, (ridges, values)
    if len(problem.ridges) == 1:
        return factor(problem.ridges[0]), problem.ridges[0], None
    errors: list[float] = []
    refused: SingularKernelError | None = None
    for ridge in problem.ridges:
        try:
            residuals = left_out(factor(ridge), problem.rhs, problem.group)
        except SingularKernelError as error:
            refused = error
            errors.append(float("inf"))
            continue
        errors.append(float(residuals.square().mean()))
    table = torch.tensor(errors, dtype=torch.float64)
    best = int(table.argmin())
    if not torch.isfinite(table[best]):
        assert refused is not None
        raise refused
    ridges = torch.tensor(problem.ridges, dtype=torch.float64)
    return factor(problem.ridges[best]), problem.ridges[best], (ridges, table)


def _cg(problem: Problem) -> Solved:
    (ridge,) = problem.ridges
    solver = kernel_solver(
        problem.K,
        ridge,
        tol=problem.tol,
        max_products=problem.max_products,
        generator=problem.generator,
    )
    try:
        fit = IterativeFit(solver, problem.rhs)
    except NotConvergedError as error:
        raise_by_name(problem.K, error)
    if is_stored(problem.K):  # products of others are made anew in float64
        largest, dtype = largest_eigenvalue(problem.K), problem.K.dtype
        # The least eigenvalue of K + r is |Y| / |α| at most: long solutions prove that rounding decides.
        lengths = (torch.linalg.vector_norm(part, dim=-2) for part in (problem.rhs, fit.dual))
        least = torch.where(problem.rhs.abs().amax(-2) > 0, torch.div(*lengths), torch.inf).amin(-1)
        if ridge > 0:
            require_resolved(least - ridge, largest, ridge, dtype, problem.size, scale=problem.scale)
        warn_of_rounding(largest, fit.dual, problem.rhs, ridge, dtype)
    return Solved(fit, ridge)


def _lsmr(problem: Problem) -> Solved:
    (ridge,) = problem.ridges
    solver = least_squares_solver(problem.K, ridge, tol=problem.tol, max_products=problem.max_products)
    return Solved(IterativeFit(solver, problem.rhs), ridge)


_ROUTES: dict[str, Callable[[Problem], Solved]] = {
    "cholesky": _cholesky,
    "eigh": _eigh,
    "features": _features,
    "nystrom": _nystrom,
    "cg": _cg,
    "lsmr": _lsmr,
}
