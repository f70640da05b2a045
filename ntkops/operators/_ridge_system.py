"""The system (K + D) x = b as solvers see it: products, a preconditioner, and a float64 twin."""

from __future__ import annotations

import dataclasses
import functools
import math
import time
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from linear_operator.operators import LinearOperator
from torch import Tensor

from ..arguments import check_arguments
from ..errors import InputError, UnsupportedOperationError
from ..results import Solution, SolveInfo
from ..solvers import (
    FactorPreconditioner,
    Preconditioner,
    conjugate_gradient,
    factor_preconditioner,
    nystrom_preconditioner,
    pivoted_cholesky,
    refinement,
    rpcholesky,
)
from ..solvers._outcome import check_options
from ..spectra import function_trace
from .capabilities import capabilities, dense_from_tiles, multiply, taken_columns
from .indexing import IndexedOperator

__all__ = [
    "PreconditionerChoice",
    "RidgeSystem",
    "SolveMethod",
    "SolverOptions",
    "batch_position",
    "checked",
    "kernel_columns",
    "kernel_entries",
]

SolveMethod = Literal["auto", "cholesky", "cg", "refinement"]
PreconditionerChoice = Literal["auto", "nystrom", "pivoted cholesky", "rpcholesky"] | None
_METHODS = ("auto", "cholesky", "cg", "refinement")
_PRECONDITIONERS = ("auto", "nystrom", "pivoted cholesky", "rpcholesky", None)
_RANK = 200  # of a preconditioner, n / 4 at most: as many products with K as it has columns
_BLOCK = 25  # pivots that RPCholesky proposes at a time
_DEFLATION = 32  # leading eigenvectors that log det splits off before it draws probes


@dataclass(frozen=True, eq=False)
class SolverOptions:
    """How a `RidgeOperator` solves.

    It has no attribute that linear_operator looks for on tensors, so that it passes through every rebuild.

    Attributes:
        method: "auto", "cholesky", "cg" or "refinement".
        preconditioner: "auto", "nystrom", "pivoted cholesky", "rpcholesky" or None.
        rank: Rank of the preconditioner, or "auto".
        tolerance: Relative residual asked of every column.
        max_iterations: Most iterations, or None.
        seed: Seed of the preconditioner and of random probes.
        made: Preconditioners that were made, by dtype and device: they are kept with the operator.
    """

    method: SolveMethod = "auto"
    preconditioner: PreconditionerChoice = "auto"
    rank: int | Literal["auto"] = "auto"
    tolerance: float = 1e-6
    max_iterations: int | None = None
    seed: int = 0
    made: dict[Any, FactorPreconditioner | None] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Check the choices before any work: a dense solve reads few of them, and later ones read all."""
        if self.method not in _METHODS:
            raise InputError(f"method={self.method!r}: choose one of {', '.join(map(repr, _METHODS))}")
        if self.preconditioner not in _PRECONDITIONERS:
            names = ", ".join(map(repr, _PRECONDITIONERS))
            raise InputError(f"preconditioner={self.preconditioner!r}: choose one of {names}")
        check_options(self.tolerance, self.max_iterations)
        if self.rank != "auto":
            check_arguments(nystrom_preconditioner, {"rank": self.rank})
            if self.rank < 1:
                raise InputError(f"rank={self.rank}: pass a positive integer, or 'auto'")
        if not isinstance(self.seed, int) or isinstance(self.seed, bool):
            raise InputError(f"seed={self.seed!r}: pass an integer")

    def again(self, **changes: Any) -> SolverOptions:
        """Return the options for another operator, without what was made for this one."""
        return dataclasses.replace(self, made={}, **changes)

    def __getstate__(self) -> dict[str, Any]:
        """Leave preconditioners out of a pickle."""
        return {**self.__dict__, "made": {}}


class RidgeSystem:
    """K + D for K ``(*batch, n, n)`` and the diagonal of D ``(*batch, n)``, and its solver options."""

    def __init__(self, kernel: LinearOperator, entries: Tensor, options: SolverOptions) -> None:
        self.kernel, self.entries, self.options = kernel.detach(), entries.detach(), options
        self.space = capabilities(self.kernel).space

    def product(self, block: Tensor) -> Tensor:
        """Return (K + D) V."""
        return multiply(self.kernel, block) + self.entries.unsqueeze(-1) * block

    def twin(self, dtype: torch.dtype) -> RidgeSystem:
        """Return the same system in another dtype."""
        if dtype == self.kernel.dtype:
            return self
        return RidgeSystem(self.kernel.to(dtype=dtype), self.entries.to(dtype), self.options)

    def solve(self, rhs: Tensor, raise_on_failure: bool) -> Solution:
        """Solve by iteration; the solution is float64 for "refinement", else of the dtype of ``rhs``."""
        options = self.options
        method = options.method
        # Residuals of float32 iterates do not fall below the rounding of K x in float32: refinement takes
        # float64 products for residuals, and float32 ones for the corrections that are solved for.
        if method == "auto":
            method = "cg" if self.kernel.dtype == torch.float64 else "refinement"
        batch = torch.broadcast_shapes(self.kernel.shape[:-2], rhs.shape[:-2])
        rhs = rhs.detach().expand(*batch, *rhs.shape[-2:])
        common: dict[str, Any] = {
            "tolerance": options.tolerance,
            "max_iterations": options.max_iterations,
            "raise_on_failure": raise_on_failure,
        }
        if method == "cg":
            made = self.preconditioner()
            return conjugate_gradient(self.product, rhs, self.space, preconditioner=made, **common)
        precise, coarse = self.twin(torch.float64), self.twin(torch.float32)
        return refinement(
            precise.product,
            coarse.product,
            rhs.double(),
            precise.space,
            coarse_space=coarse.space,
            preconditioner=coarse.preconditioner(),
            **common,
        )

    # the preconditioner

    def preconditioner(self) -> Preconditioner | None:
        """Return the preconditioner that the options ask for, made once."""
        key = (self.kernel.dtype, str(self.kernel.device))
        if key not in self.options.made:
            self.options.made[key] = self._make()
        return self.options.made[key]

    def _make(self) -> FactorPreconditioner | None:
        """Make the preconditioner; None where there is nothing to gain, or D cannot be inverted."""
        kind, size = self.options.preconditioner, self.space.size
        if kind is None or kind == "auto" and (size < 4 or self._has_zeros()):
            return None
        rank = min(_RANK, max(size // 4, 1)) if self.options.rank == "auto" else self.options.rank
        generator = torch.Generator().manual_seed(self.options.seed)
        diagonal = self._constant_or_entries()
        if kind == "auto" and hasattr(self.kernel, "features"):  # a kernel of low rank brings its own factor
            factor = self.kernel.features()
            made = factor.shape[-1] * self.kernel.shape[:-2].numel()
            return factor_preconditioner(factor, diagonal, self.space, name="features", products=made)
        if kind in ("auto", "nystrom"):
            return nystrom_preconditioner(
                lambda block: multiply(self.kernel, block),
                diagonal,
                self.space,
                rank,
                batch_shape=self.kernel.shape[:-2],
                generator=generator,
            )
        return self._pivoted(str(kind), rank, diagonal, generator)

    def _has_zeros(self) -> bool:
        """Whether an entry of D is not positive, on any of the processes that share the rows."""
        return self.space.any(not bool((self.entries > 0).all()))

    def _constant_or_entries(self) -> Tensor:
        """Return the diagonal of D, ``(*batch, 1)`` where all its entries are one number."""
        # U (Uᵀ U + d I)⁻¹ Uᵀ of a constant d needs no scaling of the factor by rows.
        entries = self.entries.expand(*self.kernel.shape[:-1])
        if self.space.is_spread:
            # The largest of -d is minus the smallest; a rank without rows has neither.
            ends = [float(entries.min()), float(entries.max())] if entries.numel() else [math.inf, -math.inf]
            low, high = -self.space.largest(-ends[0]), self.space.largest(ends[1])
            return entries.new_full((*entries.shape[:-1], 1), low) if low == high else entries
        first = entries[..., :1]
        return first if bool((entries == first).all()) else entries

    def _pivoted(
        self, kind: str, rank: int, diagonal: Tensor, generator: torch.Generator
    ) -> FactorPreconditioner:
        """Make one by pivots, which each member of a batch has of its own."""
        if self.space.is_spread:
            raise UnsupportedOperationError(
                f"preconditioner={kind!r} takes pivots among all rows, which lie on several ranks here: use "
                "preconditioner='nystrom'"
            )
        batch, found = self.kernel.shape[:-2], []
        diagonals = capabilities(self.kernel).diagonal().clamp(min=0).reshape(-1, self.space.size)
        for number in range(batch.numel()):
            member = self.kernel[batch_position(number, batch)] if batch else self.kernel
            columns = kernel_columns(member)
            if kind == "rpcholesky":
                made = rpcholesky(
                    columns,
                    diagonals[number],
                    rank,
                    block_size=_BLOCK,
                    entries=kernel_entries(member),
                    generator=generator,
                )
            else:
                made = pivoted_cholesky(columns, diagonals[number], rank)
            found.append(made)
        if not batch:
            return factor_preconditioner(found[0], diagonal, self.space)
        width = max(made.rank for made in found)  # a factor of lower rank is filled up with zero columns
        padded = [torch.nn.functional.pad(made.factor, (0, width - made.rank)) for made in found]
        return factor_preconditioner(
            torch.stack(padded).reshape(*batch, self.space.size, width),
            diagonal,
            self.space,
            name=kind,
            products=sum(made.products for made in found),
            seed=found[0].seed,
        )


def checked(rhs: Tensor, image: Tensor, tolerance: float, start: float) -> SolveInfo:
    """Return what a factorisation has reached: ``image`` is the product with its solution."""
    norms = torch.linalg.vector_norm(rhs, dim=-2)
    rest = torch.linalg.vector_norm(rhs - image, dim=-2)
    # Of b = 0 the solution is 0, and its residual none.
    residuals = torch.where(norms > 0, rest / torch.where(norms > 0, norms, 1.0), 0.0)
    met = bool((residuals <= tolerance).all())
    return SolveInfo(
        converged=met,
        residuals=residuals,
        tolerance=tolerance,
        iterations=0,
        products=residuals.numel(),
        reason="converged" if met else "stagnated",
        method="cholesky",
        seconds=time.perf_counter() - start,
    )


def batch_position(number: int, batch: torch.Size) -> tuple[int, ...]:
    """Return the index of a member of a batch, () where there is none."""
    if not batch:
        return ()
    return tuple(int(p) for p in torch.unravel_index(torch.tensor(number), tuple(batch)))


def kernel_columns(kernel: LinearOperator) -> Any:
    """Return the function that evaluates columns of a kernel."""
    return functools.partial(taken_columns, kernel)


def kernel_entries(kernel: LinearOperator) -> Any:
    """Return the function that evaluates the block of a kernel in some rows, where that costs no product.

    It is None where blocks are products with unit vectors: then a block costs what its columns do.
    """
    if not isinstance(kernel, IndexedOperator):
        return None

    def entries(chosen: Tensor) -> Tensor:
        # A block of a kernel has each row once; pivots that were proposed may repeat.
        rows, inverse = torch.unique(chosen, return_inverse=True)
        block = dense_from_tiles(kernel.submatrix(rows, rows))
        return block[inverse][:, inverse]

    return entries


def log_determinant(kernel: LinearOperator, entries: Tensor, generator: torch.Generator, rtol: float) -> Any:
    """Return log det (K + D) by quadrature of log(1 + x) on the scaled kernel."""
    # K + D = D^{1/2} (I + S) D^{1/2} with S = D^{-1/2} K D^{-1/2}: log det is Σ log d_i + tr log(I + S).
    # The spectrum of S starts at 0, one away from where log(1 + x) is singular.
    scaling = entries.rsqrt().unsqueeze(-1).to(kernel.dtype)
    found = function_trace(
        lambda block: scaling * multiply(kernel, scaling * block),
        capabilities(kernel).space,
        torch.log1p,
        generator=generator,
        rtol=rtol,
        offset=float(entries.log().sum()),
        deflation=min(_DEFLATION, len(entries)),
    )
    # Ten times the n eps of rounding below zero: S is not positive semidefinite.
    if found.least < -10 * torch.finfo(kernel.dtype).eps * len(entries) * found.scale:
        raise InputError(
            "log det by quadrature needs a positive semidefinite kernel, and this one has a negative "
            f"eigenvalue: one of D^-1/2 K D^-1/2 is {found.least:.3g} or less, the largest {found.scale:.3g}"
        )
    return found
