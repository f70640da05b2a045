"""Distillation by synthesis: combinations of the gradients of all points."""

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
from ..regression._operands import Layout, read_labels, read_ridges
from ._als import alternate
from ._kernel_kmeans import kernel_kmeans, means
from ._kernels import Kernels, columns_of, dense_of, diagonal_of, read_count, read_square
from ._record import recording
from ._subspaces import dual_coefficients, krylov_basis, leading_combinations
from .class_mean import class_mean
from .distilled import Distilled

__all__ = ["synthesize"]

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
