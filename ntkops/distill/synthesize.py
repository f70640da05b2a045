"""Synthesis: combinations of gradients."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from linear_operator.operators import LinearOperator
from torch import Tensor

from ..arguments import checked
from ..errors import InputError
from ..estimators import eigsh
from ..estimators._request import checked_generator
from ..operators.capabilities import capabilities, dense_bytes_allowed, multiply
from ..regression import KernelRidge
from ..regression._operands import Layout, read_labels, read_ridges
from ..solvers import rpcholesky
from ..vectors import Space, rank_cutoff
from ._kernels import Kernels, columns_of, dense_of, diagonal_of, read_count, read_square
from ._medoids import seed_points
from .class_mean import class_mean
from .distilled import Distilled, recording

__all__ = [
    "Alternation",
    "alternate",
    "dual_coefficients",
    "kernel_kmeans",
    "krylov_basis",
    "leading_combinations",
    "synthesize",
]


def krylov_basis(
    kernel: LinearOperator, start: Tensor, size: int, generator: torch.Generator
) -> tuple[Tensor, int]:
    """Return an orthonormal basis of span{B, K B, K² B, ...}, by block Lanczos with full orthogonalisation.

    Of a block that does not fit whole, and of B itself, the leading left singular directions are taken.
    Where the space ends before there are enough, random directions go on.

    Args:
        kernel: ``(m, m)``.
        start: ``(m, b)`` B, in the kernel's dtype.
        size: Number of columns.
        generator: Source of the random directions.

    Returns:
        ``(m, size)``, and the number of random directions among them.
    """
    space = capabilities(kernel).space
    basis = start[:, :0]
    block, drawn = _outside(space, basis, start), 0
    while True:
        wanted = size - basis.shape[-1]
        if block is None:
            fresh = space.probes(min(wanted, max(1, start.shape[-1])), generator, "gaussian")
            block = _outside(space, basis, fresh)
            if block is None:
                continue
            drawn += min(wanted, block.shape[-1])
        block = block[:, :wanted]
        basis = torch.cat([basis, block], dim=-1)
        if basis.shape[-1] == size:
            return basis, drawn
        block = _outside(space, basis, multiply(kernel, block))


def _outside(space: Space, basis: Tensor, block: Tensor) -> Tensor | None:
    """Return orthonormal directions that a block adds to a basis, the strongest first, or None."""
    before = space.sum_squares(block).sqrt()
    if basis.shape[-1]:
        for _ in range(2):
            block = block - basis @ space.inner(basis, block).to(block.dtype)
    # What is left of a column that the basis holds is rounding, however it is scaled afterwards.
    rounding = 1e2 * torch.finfo(block.dtype).eps * before
    block = block[:, space.sum_squares(block).sqrt() > rounding]
    if not block.shape[-1]:
        return None
    turned = space.orthonormalize(block)
    if not basis.shape[-1]:
        return turned
    turned = turned - basis @ space.inner(basis, turned).to(turned.dtype)
    # Symmetric orthonormalisation keeps the order of the directions.
    values, vectors = torch.linalg.eigh(space.inner(turned, turned))
    return turned @ ((vectors * values.rsqrt()) @ vectors.mT).to(turned.dtype)


def dual_coefficients(
    kernels: LinearOperator, labels: Tensor, layout: Layout, ridge: float, relative: bool
) -> tuple[Tensor, float]:
    """Return the dual coefficients of the full regressions as columns, and the absolute ridge.

    Args:
        kernels: ``(m, m)`` or ``(C, m, m)``.
        labels: Labels that were checked against them.
        layout: How labels meet kernels.
        ridge: r.
        relative: Whether r is a multiple of the mean diagonal.

    Returns:
        ``(m, k)``, in the kernel's dtype, and the ridge in use.
    """
    # Coefficients that are to give the same solution back are worth a tighter solve than a prediction.
    tolerance = 1e-9 if kernels.dtype == torch.float64 else 1e-6
    fitted = KernelRidge(ridge, relative, tol=tolerance).fit(kernels, labels)
    columns = layout.columns(fitted.dual_coef_)
    return (columns.squeeze(-1).mT if layout.kind == "each" else columns), fitted.ridge_


def leading_combinations(kernel: LinearOperator, duals: Tensor, ridge: float, count: int) -> Tensor:
    r"""Return the combinations of dual coefficients that a rank-s regression keeps.

    With A the coefficients of one kernel, :math:`|Y - K U B|^2 + r\, tr B^T U^T K U B` exceeds its least
    value by :math:`|K^{1/2} (K + r)^{1/2} (A - U B)|_F^2`, so that the best U spans A times the leading
    eigenvectors of :math:`A^T K (K + r) A` (Eckart, Young).

    Args:
        kernel: ``(m, m)``: the kernel, or the mean of several.
        duals: ``(m, k)`` A.
        ridge: Absolute r.
        count: s ≤ k.

    Returns:
        ``(m, s)`` orthonormal columns; fewer where A has a lower rank.
    """
    space = capabilities(kernel).space
    images = multiply(kernel, duals)
    gram = space.inner(images, images) + ridge * space.inner(duals, images)
    _, vectors = torch.linalg.eigh((gram + gram.mT) / 2)
    return space.orthonormalize(duals @ vectors.flip(-1)[:, :count].to(duals.dtype))


# -- one set of combinations for all classes, fitted to all their labels by turns


_STEPS = 20  # conjugate gradient steps on U in a round, at most
_ROUNDS = 60
_REDUCTION = 1e-2  # of the gradient in a round: b moves on anyway
_RANK = 200  # of the factor that preconditions

Inverse = Callable[[Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class Alternation:
    """What the turns came to.

    Attributes:
        U: ``(m, s)`` orthonormal columns.
        objectives: The objective at the start and after each round, relative to |Y|², as it was computed.
            Where the last one is a rise, U is that of the one before.
        converged: Whether the last round lowered it by less than the tolerance.
    """

    U: Tensor
    objectives: list[float]
    converged: bool


def alternate(
    kernels: LinearOperator,
    labels: Tensor,
    start: Tensor,
    ridge: float,
    generator: torch.Generator,
    *,
    tolerance: float = 1e-3,
) -> Alternation:
    r"""Minimise :math:`\sum_c |y^c - K^c U b^c|^2 + r\, b^{cT} U^T K^c U b^c` over U and all b.

    By turns: all b, exactly, from s × s systems; then U, by conjugate gradients on its normal equations,
    from where it is. Both lower the objective. Products with the class kernels, their diagonals and some
    columns of their mean are all that is needed. The minimum that is found is a local one.

    Args:
        kernels: ``(C, m, m)``.
        labels: ``(m, C)``, float64.
        start: ``(m, s)`` U to begin with, s < C.
        ridge: Absolute r.
        generator: Source of the preconditioner's pivots.
        tolerance: Relative fall of the objective in a round at which it ends.

    Returns:
        `Alternation`. Cost: up to 40 + s products with all class kernels a round.
    """
    turns = _Turns(kernels, labels, ridge, generator)
    U = turns.space.orthonormalize(start)
    weights, value = turns.weights(U)
    objectives = [value]
    for _ in range(_ROUNDS):
        moved = turns.space.orthonormalize(turns.descend(U, weights))
        new, value = turns.weights(moved)
        before = objectives[-1]
        objectives.append(value)
        if value > before:  # rounding: what was there is kept, and a larger rise is no convergence
            return Alternation(U, objectives, value - before <= tolerance * before)
        U, weights = moved, new
        if before - value <= tolerance * before:
            return Alternation(U, objectives, True)
    return Alternation(U, objectives, False)


class _Turns:
    """The two turns, on kernels divided by their mean diagonal and labels of length 1."""

    def __init__(
        self, kernels: LinearOperator, labels: Tensor, ridge: float, generator: torch.Generator
    ) -> None:
        mean = class_mean(kernels)
        diagonal = diagonal_of(mean)
        self._kernels, self._scale = kernels, float(diagonal.mean())
        self.space: Space = capabilities(kernels).space
        self._ridge = ridge / self._scale
        length = float(labels.square().sum()) ** 0.5
        self._rhs = (labels / (length or 1.0)).mT.unsqueeze(-1)  # (C, m, 1)
        self._inverse = _preconditioner(mean, diagonal, self._scale, self._ridge, generator)

    def _multiply(self, columns: Tensor) -> Tensor:
        # Dividing first keeps products of kernels of any scale within the range of their dtype.
        return multiply(self._kernels, (columns / self._scale).contiguous())

    def weights(self, U: Tensor) -> tuple[Tensor, float]:
        """Return the best b as ``(s, C)``, and the objective, both float64."""
        wide = U.expand(self._kernels.shape[0], *U.shape)
        images = self._multiply(wide)  # (C, m, s)
        small = self.space.inner(wide, images)  # (C, s, s)
        small = (small + small.mT) / 2
        normal = self.space.inner(images, images) + self._ridge * small
        values, vectors = torch.linalg.eigh(normal)
        noise = normal.shape[-1] * torch.finfo(torch.float64).eps * values.amax(-1, keepdim=True)
        inverse = torch.where(values > noise, 1 / values.clamp(min=noise), torch.zeros_like(values))
        right = self.space.inner(images, self._rhs)
        b = vectors @ (inverse.unsqueeze(-1) * (vectors.mT @ right))  # (C, s, 1)
        rest = self._rhs - images.double() @ b
        value = self.space.sum_squares(rest).sum() + self._ridge * (b * (small @ b)).sum()
        return b.squeeze(-1).mT, float(value)

    def descend(self, U: Tensor, weights: Tensor) -> Tensor:
        """Return a better U for given b, ``(s, C)``, by preconditioned conjugate gradients."""
        # In the basis of U where Σ_c b bᵀ = 1 the normal equations are as well conditioned as can be.
        left, singular, right = torch.linalg.svd(weights, full_matrices=False)
        kept = singular > 1e-12 * singular[0]
        U, b = U @ (left * singular)[:, kept].to(U.dtype), right[kept].to(U.dtype)

        def combined(block: Tensor) -> Tensor:
            return (block @ b).mT.unsqueeze(-1)  # (C, m, 1): V b^c

        def pull(columns: Tensor) -> Tensor:
            return self._multiply(columns.to(U.dtype)).squeeze(-1).mT @ b.mT  # (m, s): Σ_c K^c x^c b^cᵀ

        spread, images = combined(U), self._multiply(combined(U))
        residual = pull(self._rhs - images.double() - self._ridge * spread.double())
        turned = self._inverse(residual)
        direction, size = turned, self._dot(residual, turned)
        goal = _REDUCTION**2 * size
        for _ in range(_STEPS):
            if not size > goal:
                break
            spread = combined(direction)
            images = self._multiply(spread)
            # V -> K (K + r) V b bᵀ has the quadratic form |K V b|² + r <V b, K V b>.
            curvature = self._dot(images, images) + self._ridge * self._dot(spread, images)
            if not curvature > 0:
                break
            step = size / curvature
            U = U + step * direction
            residual = residual - step * pull(images + self._ridge * spread)
            turned = self._inverse(residual)
            new = self._dot(residual, turned)
            direction, size = turned + (new / size) * direction, new
        return U

    def _dot(self, first: Tensor, second: Tensor) -> float:
        return float(self.space.inner(first, second).diagonal(dim1=-2, dim2=-1).sum())


def _preconditioner(
    mean: LinearOperator, diagonal: Tensor, scale: float, ridge: float, generator: torch.Generator
) -> Inverse:
    """Return an approximate inverse of K (K + r) for the mean kernel K, divided by its scale."""
    space, dtype = capabilities(mean).space, mean.dtype
    found = rpcholesky(
        lambda chosen: columns_of(mean, chosen) / scale,
        (diagonal / scale).to(dtype),
        min(_RANK, len(diagonal)),
        block_size=25,
        generator=generator,
    )
    values, vectors = torch.linalg.eigh(space.inner(found.factor, found.factor))
    used = values > 10 * rank_cutoff(len(diagonal), dtype) * values[-1]
    values, vectors = values[used], vectors[:, used]
    basis = (found.factor.double() @ (vectors * values.rsqrt())).to(dtype)  # (m, r)
    rest = float(values[0] * (values[0] + ridge))
    inside = rest / (values * (values + ridge)) - 1

    def inverse(block: Tensor) -> Tensor:
        return block + basis @ (inside.unsqueeze(-1) * space.inner(basis, block)).to(dtype)

    return inverse


# -- kernel k-means: means of gradients, from products with indicator columns alone


_REASSIGNMENTS = 300  # reassignments after which a start is left as it is; each of them lowers the inertia


def kernel_kmeans(
    multiply: Callable[[Tensor], Tensor],
    columns: Callable[[Tensor], Tensor],
    diagonal: Tensor,
    count: int,
    generator: torch.Generator,
    num_starts: int,
) -> tuple[Tensor, float, bool]:
    r"""Return clusters of gradients with least :math:`\sum_h \sum_{i \in I_h} |\phi_i - \mu_h|^2`.

    Lloyd's iteration from the seeding of k-means++ in the feature space of the kernel. Clusters stay
    inhabited: one that empties takes the point that is farthest from its mean.

    Args:
        multiply: ``(m, b) -> (m, b)``, the product with the kernel.
        columns: ``(b,) -> (m, b)``, its columns.
        diagonal: ``(m,)``, float64.
        count: Number of clusters.
        generator: Source of the starts.
        num_starts: Number of starts; the best is returned.

    Returns:
        ``(m,)`` cluster numbers, the inertia, and whether the best start came to rest. Cost: a product with
        ``count`` columns a round, and a column for each seed.
    """
    best, least, settled = torch.zeros(len(diagonal), dtype=torch.int64), float("inf"), False
    for _ in range(num_starts):
        seeds = seed_points(columns, diagonal, count, generator)
        labels, inertia, rest = _lloyd(multiply, columns, diagonal, seeds)
        if inertia < least:
            best, least, settled = labels, inertia, rest
    return best, least, settled


def means(labels: Tensor, count: int, dtype: torch.dtype) -> Tensor:
    """Return the coefficients of cluster means, ``(m, count)``: 1 / |I_h| for its members."""
    members = torch.nn.functional.one_hot(labels, count).double()
    return (members / members.sum(0)).to(dtype)


def _lloyd(
    multiply: Callable[[Tensor], Tensor],
    columns: Callable[[Tensor], Tensor],
    diagonal: Tensor,
    seeds: list[int],
) -> tuple[Tensor, float, bool]:
    count = len(seeds)
    chosen = torch.tensor(seeds)
    kernel = columns(chosen).double()  # (m, s)
    distances = diagonal.unsqueeze(1) + diagonal[seeds] - 2 * kernel
    labels = _inhabited(distances, distances.argmin(-1), count)
    previous = float("inf")
    for _ in range(_REASSIGNMENTS):
        weights = means(labels, count, kernel.dtype)
        images = multiply(weights).double()  # (m, s): <φ_i, μ_h>
        lengths = (weights * images).sum(0)  # (s,): |μ_h|²
        distances = (diagonal.unsqueeze(1) + lengths - 2 * images).clamp(min=0)
        inertia = float(distances.gather(1, labels.unsqueeze(1)).sum())
        if inertia >= previous:  # rounding alone moves points now
            return labels, previous, True
        moved = _inhabited(distances, distances.argmin(-1), count)
        if torch.equal(moved, labels):
            return labels, inertia, True
        labels, previous = moved, inertia
    return labels, previous, False


def _inhabited(distances: Tensor, labels: Tensor, count: int) -> Tensor:
    """Give each empty cluster the point that is farthest from the mean of a cluster of several."""
    labels = labels.clone()
    for empty in (torch.bincount(labels, minlength=count) == 0).nonzero().flatten().tolist():
        sizes = torch.bincount(labels, minlength=count)
        own = distances.gather(1, labels.unsqueeze(1)).squeeze(1)
        own = torch.where(sizes[labels] > 1, own, torch.full_like(own, -1.0))
        labels[int(own.argmax())] = empty
    return labels


# -- distillation by synthesis: combinations of the gradients of all points


_STARTS = 8  # starts of k-means where the dense kernel makes them cheap


@checked
def synthesize(
    K: Kernels,
    s: int,
    method: Literal["pca", "kmeans", "krylov", "galerkin", "als"] = "krylov",
    *,
    Y: Tensor | None = None,
    ridge: float = 1e-4,
    relative: bool = True,
    generator: torch.Generator | None = None,
) -> Distilled:
    r"""Make s combinations of the gradients of a kernel's points.

    Of kernels one a class, "pca", "kmeans" and "krylov" work on their mean (`class_mean`), and the result's
    info says so.

    * "pca": the s leading eigenvectors. No other U captures more of the (uncentred) variance of the stacked
      gradients.
    * "kmeans": means of the gradients of s clusters.
    * "krylov": an orthonormal basis of span{Y, K Y, K² Y, ...}, by block Lanczos; with fewer columns than
      labels the leading left singular vectors of Y. The best all-round choice: near "pca" on the spectrum,
      better on the labels.
    * "galerkin": a basis of the dual coefficients :math:`\alpha^c = (K^c + r)^{-1} y^c`. With as many columns
      as labels the distilled regression is the full one, for these labels and this ridge; it may be of
      little use for others. Fewer columns keep the combinations that cost least; more go on as "krylov".
    * "als": U and β by turns on the objective of the full regression, all labels and one U for all classes:
      :math:`\sum_c |y^c - K^c U \beta^c|^2 + r\, \beta^{cT} U^\top K^c U \beta^c`. For a single kernel the
      minimum has a closed form; from as many columns as labels on it is that of "galerkin". For several it is
      a local one. Meant for the "nystrom" fit, which is what it minimises.

    Args:
        K: Square kernel ``(m, m)``, kernels ``(C, m, m)``, or a sequence of C of them.
        s: Number of combinations, 1 ≤ s ≤ m.
        method: One of the names above.
        Y: Labels as `ntkops.KernelRidge.fit` takes them; "krylov", "galerkin" and "als" need them.
        ridge: r ≥ 0 of the regression, for "galerkin" and "als".
        relative: Whether r is a multiple of the mean diagonal of K.
        generator: CPU generator of the draws; None draws a seed from the operating system.

    Returns:
        `Distilled`, U ``(m, s)`` with orthonormal columns (for "kmeans" columns that sum to 1). Cost: "pca"
        some 3 s products and more; "krylov" s at most; "galerkin" the full regression; "als" that, and up to
        60 rounds of 40 + s products with all class kernels, after which its info may say that the objective
        was still falling by more than 1e-3 a round; "kmeans" s products a round. Nothing forms the m × m
        kernel where ``max_dense_bytes`` forbids it.

    Raises:
        InputError: If an option is not understood or out of range, or Y is missing.
        ShapeError: If K is not square, or Y does not fit.
        DtypeError: If dtypes differ.
        ZeroKernelError: If ridges are relative to a kernel of zeros.
        NonFiniteError: If kernel or labels have entries that are not finite.
        NotConvergedError: If the full regression of "galerkin" or "als" misses its tolerance.

    Warns:
        NotConvergedWarning: If "pca" ran out of products.

    References:
        Distilled NTK paper, section 4.3; Dhillon, Guan, Kulis (2004), Kernel k-means, spectral clustering and
        normalized cuts; Golub, Underwood (1977), The block Lanczos method.

    Example:
        >>> import torch
        >>> from ntkops import distill
        >>> F = torch.randn(
        ...     3,
        ...     30,
        ...     8,
        ...     generator=torch.Generator().manual_seed(0),
        ...     dtype=torch.float64,
        ... )
        >>> K, Y = F @ F.mT, F[..., 0].T  # three classes
        >>> lossless = distill.synthesize(K, 3, "galerkin", Y=Y)
        >>> full = torch.linalg.solve(
        ...     K + lossless.info.details["ridge"] * torch.eye(30), Y.T.unsqueeze(-1)
        ... )
        >>> difference = (
        ...     lossless.fit(K, Y, fit="sketch").predict(K) - (K @ full).squeeze(-1).T
        ... )
        >>> bool(difference.abs().max() < 1e-8)
        True
    """
    if method not in _METHODS:
        raise InputError(f"method={method!r}: choose one of {', '.join(map(repr, _METHODS))}")
    kernels = read_square(K)
    count = read_count(s, kernels.shape[-1])
    if not isinstance(ridge, int | float):
        raise InputError(f"ridge={ridge!r}: synthesis takes one number; KernelRidge can choose it")
    (ridge,) = read_ridges(ridge)
    generator, seed = checked_generator(generator)
    layout, labels = None, None
    if Y is not None:
        layout, labels = read_labels(Y, kernels.shape, kernels.dtype, kernels.device)
    elif method in ("krylov", "galerkin", "als"):
        raise InputError(f"method={method!r} distils for labels: pass Y, or take 'pca' or 'kmeans'")
    with recording() as record:
        made = _METHODS[method](_Task(kernels, count, layout, labels, ridge, relative, generator))
        info = record.info(
            method,
            class_mean=kernels.dim() == 3 and made.of_mean,
            seed=seed,
            converged=made.converged,
            details=made.details,
        )
    return Distilled.of(kernels, made.U, labels, info=info)


@dataclass(frozen=True, eq=False)
class _Task:
    """What a method is asked.

    Attributes:
        kernels: ``(m, m)`` or ``(C, m, m)``.
        count: Number of combinations.
        layout: How labels meet kernels, or None.
        labels: Labels, or None.
        ridge: r.
        relative: Whether r is a multiple of the mean diagonal.
        generator: Source of draws.
    """

    kernels: LinearOperator
    count: int
    layout: Layout | None
    labels: Tensor | None
    ridge: float
    relative: bool
    generator: torch.Generator

    def columns(self) -> Tensor:
        """Return all labels as columns ``(m, k)``."""
        assert self.layout is not None and self.labels is not None
        columns = self.layout.columns(self.labels)
        return columns.squeeze(-1).mT if self.layout.kind == "each" else columns


@dataclass(frozen=True, eq=False)
class _Made:
    """What a method made.

    Attributes:
        U: ``(m, s)``.
        details: What it has to say.
        converged: Whether it met its tolerance.
        of_mean: Whether it worked on the mean of the class kernels.
    """

    U: Tensor
    details: dict[str, Any]
    converged: bool = True
    of_mean: bool = True


def _pca(task: _Task) -> _Made:
    pairs = eigsh(class_mean(task.kernels), task.count, generator=task.generator)
    return _Made(pairs.vectors, {"eigenvalues": pairs.values}, pairs.converged)


def _kmeans(task: _Task) -> _Made:
    kernel, dtype = class_mean(task.kernels), task.kernels.dtype
    diagonal = diagonal_of(kernel)
    starts, product, columns = 1, lambda V: multiply(kernel, V.to(dtype)), lambda i: columns_of(kernel, i)
    if kernel.shape.numel() * dtype.itemsize <= dense_bytes_allowed(kernel):
        dense = dense_of(kernel, "k-means")
        starts, product, columns = _STARTS, lambda V: dense @ V, lambda i: dense[:, i]
        diagonal = dense.diagonal()
    labels, inertia, rest = kernel_kmeans(product, columns, diagonal, task.count, task.generator, starts)
    details = {"labels": labels, "inertia": inertia, "num_starts": starts}
    return _Made(means(labels, task.count, dtype), details, rest)


def _krylov(task: _Task) -> _Made:
    U, drawn = krylov_basis(class_mean(task.kernels), task.columns(), task.count, task.generator)
    return _Made(U, {"random_directions": drawn})


def _galerkin(task: _Task) -> _Made:
    assert task.layout is not None and task.labels is not None
    duals, ridge = dual_coefficients(task.kernels, task.labels, task.layout, task.ridge, task.relative)
    details: dict[str, Any] = {"ridge": ridge, "lossless": task.count >= duals.shape[-1]}
    mean = class_mean(task.kernels)
    duals = duals.to(mean.dtype)  # they come in float64, whatever the kernel
    if task.count < duals.shape[-1]:
        return _Made(leading_combinations(mean, duals, ridge, task.count), details, of_mean=True)
    # All of them are kept: a class with small coefficients is not to pass for rounding.
    lengths = capabilities(mean).space.sum_squares(duals).sqrt()
    scaled = duals / torch.where(lengths > 0, lengths, torch.ones_like(lengths)).to(duals.dtype)
    U, drawn = krylov_basis(mean, scaled, task.count, task.generator)
    return _Made(U, {**details, "random_directions": drawn}, of_mean=task.count > duals.shape[-1])


def _als(task: _Task) -> _Made:
    start = _galerkin(task)
    details = start.details
    if task.kernels.dim() == 2 or details["lossless"]:
        return start
    labels = task.columns().double()
    found = alternate(task.kernels, labels, start.U, details["ridge"], task.generator)
    return _Made(found.U, {**details, "objectives": found.objectives}, found.converged, of_mean=False)


_METHODS: dict[str, Callable[[_Task], _Made]] = {
    "pca": _pca,
    "kmeans": _kmeans,
    "krylov": _krylov,
    "galerkin": _galerkin,
    "als": _als,
}
