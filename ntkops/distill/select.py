"""Distillation by selection: a few points whose gradients stand for those of all."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from linear_operator.operators import LinearOperator
from torch import Tensor

from ..arguments import checked
from ..errors import InputError, UnsupportedOperationError, ZeroKernelError
from ..estimators._request import checked_generator
from ..operators.capabilities import capabilities
from ..solvers import pivoted_cholesky, rpcholesky
from ..vectors import Space
from ._features import COPIES, KernelFeatures, narrow_features
from ._kernels import Kernels, columns_of, dense_of, diagonal_of, read_count, read_square
from ._medoids import farthest_points, medoids, vector_medoids
from .class_mean import mean_of
from .distilled import Distilled, recording
from .select_inputs import class_members, class_quotas

__all__ = ["select"]

logger = logging.getLogger(__name__)

_DENSE = ("leverage", "kmedoids")  # methods that need the dense kernel, or features in its place
_STARTS = 8  # starts of k-medoids


@checked
def select(
    K: Kernels,
    s: int,
    method: Literal["random", "leverage", "kmedoids", "fps", "rpcholesky", "greedy"] = "rpcholesky",
    *,
    Y: Tensor | None = None,
    labels: Tensor | None = None,
    ridge: float = 1e-4,
    generator: torch.Generator | None = None,
) -> Distilled:
    r"""Choose s of the points of a kernel.

    Of kernels one a class the points are chosen for their mean (`class_mean`), and the result's info says so.
    Distances are those of gradients, :math:`|\phi_i - \phi_j|^2 = K_{ii} + K_{jj} - 2 K_{ij}`. With labels
    each class has as many of the s points as the others, up to one and up to what it has, by its own block.

    * "random": uniformly, without replacement.
    * "leverage": without replacement, in proportion to the ridge leverage scores
      :math:`[K (K + r)^{-1}]_{ii}`.
    * "kmedoids": least sum of squared distances to the nearest chosen point; the best of 8 starts by
      alternation, then swaps.
    * "fps": farthest point sampling, from a random point on.
    * "rpcholesky": randomly pivoted Cholesky, each point in proportion to the variance that those before
      it leave.
    * "greedy": pivoted Cholesky, each point where that variance is largest. Nothing is drawn.

    Args:
        K: Square kernel ``(m, m)``, kernels ``(C, m, m)``, or a sequence of C of them. Of a kernel over a
            process group all ranks choose the same points, those that one process chooses, by "random",
            "fps", "rpcholesky" or "greedy"; m counts the rows of all ranks, as ``indices`` do, and U, Y are
            this rank's rows.
        s: Number of points, 1 ≤ s ≤ m. "rpcholesky" and "greedy" take fewer where these span all gradients.
        method: One of the names above.
        Y: Labels as `ntkops.KernelRidge.fit` takes them, of which the chosen ones become `targets`; or None.
        labels: ``(m,)`` class numbers, for as many points of each class; s is then at least their number.
        ridge: For "leverage": r > 0 as a multiple of the mean diagonal.
        generator: CPU generator of the draws; None draws a seed from the operating system.

    Returns:
        `Distilled` with ``indices`` in the order in which they were chosen, class by class with labels, whose
        details are then those of each class. Cost: "random" no products,
        "fps", "rpcholesky" and "greedy" the diagonal and a column a point (some more for rejected
        proposals); "leverage" and "kmedoids" the dense m × m kernel, and O(m³) or O(m² s) operations a
        round. Of projected kernels whose dense matrix has no room the features stand in, for the mean of
        several after a second random projection to k (``info.details["second_projection"]``): O(m k²) and
        O(m s k) a round, "kmedoids" from one start and without swaps.

    Raises:
        InputError: If an option is not understood or out of range, or labels are no class numbers.
        ShapeError: If K is not square, or Y or the labels do not fit.
        DtypeError: If dtypes differ.
        ZeroKernelError: If the kernel is zero.
        DenseMemoryError: If a method needs the dense kernel and ``max_dense_bytes`` forbids it.
        NonFiniteError: If the kernel has entries that are not finite.
        UnsupportedOperationError: If the kernel lies on several ranks, and labels are given, or the method
            needs the dense kernel.

    References:
        Distilled NTK paper, section 5; Alaoui, Mahoney (2015), Fast randomized kernel ridge regression with
        statistical guarantees; Gonzalez (1985), Clustering to minimize the maximum intercluster distance;
        Chen, Epperly, Tropp, Webber (2025), Randomly pivoted Cholesky.

    Example:
        >>> import torch
        >>> from ntkops import distill
        >>> K = torch.diag(torch.tensor([4.0, 1.0, 2.0]))
        >>> distill.select(K, 2, "greedy").indices.tolist()
        [0, 2]
    """
    if method not in _METHODS:
        raise InputError(f"method={method!r}: choose one of {', '.join(map(repr, _METHODS))}")
    kernels = read_square(K, over_ranks=True)
    space: Space = capabilities(kernels).space
    count = read_count(s, space.size)
    if space.is_spread and (labels is not None or method in _DENSE):
        raise UnsupportedOperationError(
            f"method={method!r}{'' if labels is None else ' with labels'} takes blocks of the kernel, whose "
            "rows lie on several ranks: choose 'random', 'fps', 'rpcholesky' or 'greedy' without labels"
        )
    if not isinstance(ridge, int | float) or isinstance(ridge, bool) or not 0 < ridge < float("inf"):
        raise InputError(f"ridge={ridge!r}: leverage scores need a positive multiple of the mean diagonal")
    members = None if labels is None else class_members(labels, kernels.shape[-1])
    generator, seed = checked_generator(generator, space)
    with recording() as record:
        mean = mean_of(kernels)
        if members is None:
            chosen, details = _METHODS[method](_Choice(mean, count, ridge, generator, kernels))
        else:
            parts = [
                _METHODS[method](
                    _Choice(mean[own, :][:, own], size, ridge, generator, kernels[..., own, :][..., own])
                )
                for own, size in zip(members, class_quotas([len(own) for own in members], count), strict=True)
            ]
            chosen = torch.cat([own[found] for own, (found, _) in zip(members, parts, strict=True)])
            details = {"classes": tuple(found for _, found in parts)}
        info = record.info(
            method,
            class_mean=kernels.dim() == 3 and method != "random",
            seed=None if method == "greedy" else seed,
            details=details,
        )
    if len(chosen) < count:
        logger.info("%s: %d points span all gradients; no more are chosen", method, len(chosen))
    return Distilled.of(kernels, chosen, Y, info=info)


@dataclass(frozen=True, eq=False)
class _Choice:
    """What a method is asked: the kernel, how many points, and what it may use.

    Attributes:
        kernel: ``(m, m)``.
        count: Number of points.
        ridge: Relative ridge.
        generator: Source of draws.
        kernels: What the kernel is, or is the mean of.
    """

    kernel: LinearOperator
    count: int
    ridge: float
    generator: torch.Generator
    kernels: LinearOperator

    def features(self) -> KernelFeatures | None:
        """Return features of the kernel where its dense matrix has no room."""
        return narrow_features(self.kernels, None, self.generator)

    @property
    def space(self) -> Space:
        """The space of the rows."""
        space: Space = capabilities(self.kernel).space
        return space

    def columns(self, chosen: Tensor) -> Tensor:
        return columns_of(self.kernel, chosen)

    def whole_columns(self, chosen: Tensor) -> Tensor:
        """Return columns of all ranks."""
        return self.space.whole(self.columns(chosen))

    def diagonal(self) -> Tensor:
        """Return the diagonal, float64.

        Raises:
            ZeroKernelError: If it is zero altogether.
        """
        return _require_energy(diagonal_of(self.kernel), self.space)


def _require_energy(diagonal: Tensor, space: Space | None = None) -> Tensor:
    found = bool((diagonal > 0).any())
    if not (found if space is None else space.any(found)):
        raise ZeroKernelError("the kernel is zero, so that no point is better than another: use 'random'")
    return diagonal


_Found = tuple[Tensor, dict[str, Any]]


def _random(choice: _Choice) -> _Found:
    return torch.randperm(choice.space.size, generator=choice.generator)[: choice.count], {}


def _leverage(choice: _Choice) -> _Found:
    known = choice.features()
    if known is not None:  # [K (K + r)⁻¹]_ii = φ_iᵀ (FᵀF + r)⁻¹ φ_i
        mean = float(_require_energy(known.diagonal()).mean())
        values, vectors = torch.linalg.eigh(known.rows.mT @ known.rows / mean)
        scores = (known.rows @ vectors).square_() @ (1 / (mean * (values.clamp(min=0) + choice.ridge)))
    else:
        why = "method='leverage' inverts the kernel ('rpcholesky' needs columns alone)"
        dense = dense_of(choice.kernel, why, COPIES)
        mean = float(_require_energy(dense.diagonal()).mean())
        values, vectors = torch.linalg.eigh(dense / mean)
        values = values.clamp(min=0)
        scores = vectors.square_() @ (values / (values + choice.ridge))
    # Points without energy come last, and only where nothing else is left.
    chances = scores.cpu().clamp(min=1e-12 * float(scores.max()))
    chosen = torch.multinomial(chances, choice.count, generator=choice.generator)
    details = {"leverage": scores, "effective_dimension": float(scores.sum())}
    return chosen, details | _described(known)


def _described(known: KernelFeatures | None) -> dict[str, Any]:
    """Return what there is to say of features that stood in for the dense kernel."""
    return {} if known is None else {"features": known.rows.shape[1], "second_projection": known.second}


def _kmedoids(choice: _Choice) -> _Found:
    known = choice.features()
    if known is not None:
        _require_energy(known.diagonal())
        found, cost = vector_medoids(known.rows, choice.count, choice.generator)
        return torch.tensor(found), {"inertia": cost, **_described(known)}
    why = "method='kmedoids' compares all points ('fps' needs columns alone)"
    dense = dense_of(choice.kernel, why)
    _require_energy(dense.diagonal())
    chosen, inertia = medoids(dense, choice.count, choice.generator, _STARTS)
    return torch.tensor(chosen), {"inertia": inertia}


def _fps(choice: _Choice) -> _Found:
    diagonal = choice.space.whole(choice.diagonal().unsqueeze(-1)).squeeze(-1)
    start = int(torch.randint(len(diagonal), (), generator=choice.generator))
    chosen, nearest = farthest_points(choice.whole_columns, diagonal, choice.count, start)
    return torch.tensor(chosen), {"radius": float(nearest.max()) ** 0.5}


def _rpcholesky(choice: _Choice) -> _Found:
    diagonal = choice.diagonal().to(choice.kernel.dtype)
    found = rpcholesky(
        choice.columns,
        diagonal,
        choice.count,
        block_size=min(100, max(1, choice.count // 4)),  # each is one pass through all gradients
        generator=choice.generator,
        space=choice.space,
    )
    return found.pivots, {"missing": float(found.residual.sum()) / found.trace}


def _greedy(choice: _Choice) -> _Found:
    diagonal = choice.diagonal().to(choice.kernel.dtype)
    found = pivoted_cholesky(choice.columns, diagonal, choice.count, space=choice.space)
    return found.pivots, {"missing": float(found.residual.sum()) / found.trace}


_METHODS: dict[str, Callable[[_Choice], _Found]] = {
    "random": _random,
    "leverage": _leverage,
    "kmedoids": _kmedoids,
    "fps": _fps,
    "rpcholesky": _rpcholesky,
    "greedy": _greedy,
}
