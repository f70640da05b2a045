"""Kernel ridge regression on distilled gradients."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Self

import torch
from linear_operator.operators import (
    DenseLinearOperator,
    LinearOperator,
    MatmulLinearOperator,
    RootLinearOperator,
)
from torch import Tensor

from ..distributed.space import ShardedSpace
from ..errors import DtypeError, InputError, ShapeError, SingularKernelError, UnsupportedOperationError
from ..operators.capabilities import capabilities, taken_columns
from ..regression import KernelRidge
from ..regression._operands import Layout, mean_diagonal, read_labels, read_ridges, require_finite
from ..regression._parameter_space import ParameterChange
from ..regression._posterior import rounding_share
from ..regression._rounding import added_share, precise_product
from ..regression._snapshots import is_stored, require_same_snapshot
from ..regression._tall_features import TallFeatures
from ..regression.metrics import accuracy, r2_score
from ..regression.predictor import Predictor
from ..results import RidgePath, SolveInfo
from ..vectors import Space
from ._coefficients import Coefficients
from ._kernels import Kernels, read_kernels

__all__ = ["DistilledRidge"]

_ROWS = 2**13  # rows that are in float64 at a time
_TALL = 2**24  # entries of K U above which there is one array of them: 0.13 GB in float64


class DistilledRidge:
    r"""The predictor :math:`f(x_*) = K_{*X} U \beta`; made by `Distilled.fit`.

    It is a `KernelRidge`: on the features :math:`K U (U^\top K U)^{-1/2}` for "nystrom", on the kernel
    :math:`U^\top K U` for "sketch". None of the features is kept. A pickle holds U, or the chosen positions,
    :math:`U \beta` and s × s numbers a class. Of a stored kernel it holds nothing; of a network's kernel the
    network and the m points, for `weights`. What `predictor` returns holds no points either.

    Args:
        U: Coefficients of the distilled gradients.
        ridge: One, several, or "loo".
        relative: Whether they are multiples of the mean diagonal of K.
        fit: "nystrom" or "sketch".

    Attributes:
        coef_: β, ``(s, ...)`` with the targets of Y behind, float64.
        dual_coef_: U β in the shape of Y, float64.
        rounding_: As `ntkops.KernelRidge.rounding_`, of the last `predict`.
        ridge_: The absolute ridge in use.
        scale_: The mean diagonal that ridges are multiples of; 1 for absolute ones.
        ridge_path_: `RidgePath` of the ridges that were compared, or None.
        solve_info_: `SolveInfo` of the small regression.
        rank_: Most directions that a class kernel has in the span, s at most.
    """

    coef_: Tensor
    rounding_: float
    ridge_: float
    scale_: float
    ridge_path_: RidgePath | None
    solve_info_: SolveInfo
    rank_: int

    def __init__(
        self,
        U: Coefficients,
        ridge: float | Sequence[float] | Literal["loo"],
        relative: bool,
        fit: Literal["nystrom", "sketch"],
    ) -> None:
        self._U = U
        self.ridge, self.relative, self.fit_method = ridge, relative, fit

    @property
    def U(self) -> Tensor:  # noqa: N802
        """U, ``(m, s)`` or ``(C, m, s)``; of chosen points it is written down when it is asked for."""
        return self._U.dense()

    @property
    def indices(self) -> Tensor | None:
        """Points that U selects, ``(s,)``, or None."""
        return self._U.indices

    def fit(self, K: LinearOperator, Y: Tensor) -> Self:
        """Solve for β; see `Distilled.fit`.

        Args:
            K: Square kernel ``(m, m)`` or ``(C, m, m)`` that was checked against U.
            Y: Labels, as `ntkops.KernelRidge.fit` takes them.

        Returns:
            The regression itself.

        Raises:
            UnsupportedOperationError: If "nystrom" is to choose among ridges over several ranks.
        """
        self._space: Space = capabilities(K).space
        spread = self._space if self._space.is_spread else None
        layout, labels = read_labels(Y, K.shape, K.dtype, K.device, spread)
        ridges = read_ridges(self.ridge)
        if spread is not None and self.fit_method == "nystrom" and len(ridges) > 1:
            raise UnsupportedOperationError(
                "leave-one-out errors of a Nyström fit take rows of the features one by one, which lie on "
                "several ranks: give one ridge, or take fit='sketch'"
            )
        self.scale_ = mean_diagonal(K) if self.relative else 1.0
        columns = layout.columns(labels.double())  # (*batch, m, k)
        products = self._U.products(K)  # K U, (*batch, m, s)
        small = self._U.inside(products)
        small = (small + small.mT) / 2  # Uᵀ K U, (*batch, s, s)
        scaled = [ridge * self.scale_ for ridge in ridges]
        if self.fit_method == "nystrom":
            inner, self._span, beta = _nystrom(products, small, columns, layout, scaled, K.dtype, self._space)
        else:
            inner, self._span, beta = _sketch(small, self._U.inside(columns), layout, scaled)
        self._K, self._layout = K, layout
        self._beta = beta
        self._dual = self._U.combined(beta)  # (*batch, m, k)
        self.rank_ = self._span.root.shape[-1]
        self.ridge_, self.solve_info_ = inner.ridge_, inner.solve_info_
        path = inner.ridge_path_
        self.ridge_path_ = path and RidgePath(path.ridges, path.errors, self.scale_, path.best)
        self.coef_ = _labels_of(layout, beta)
        return self

    @property
    def dual_coef_(self) -> Tensor:
        """U β in the shape of Y, float64."""
        return self._layout.restore(self._dual)

    def __getstate__(self) -> dict[str, Any]:
        """Leave out a stored kernel, of which the shape is kept."""
        state = vars(self).copy()
        kernel = state.get("_K")
        if kernel is not None and is_stored(kernel):
            empty = torch.zeros((), dtype=kernel.dtype, device=kernel.device)
            state["_K"] = DenseLinearOperator(empty.expand(kernel.shape))
        return state

    def predict(self, K_cross: Kernels) -> Tensor:
        """Return f(x*) = K_* U β.

        Args:
            K_cross: Kernel between new samples and all m points, ``K.cross(x_new)``: ``(M, m)``,
                ``(C, M, m)``, or a sequence. Of an operator products are taken, one column for each target;
                of a selection only the chosen columns are used.

        Returns:
            ``(M, ...)``: the shape of Y with M new samples in front.

        Raises:
            ShapeError: If the cross kernel does not fit.
            DtypeError: If its dtype is not that of the fit.
            StaleOperatorError: If it belongs to another snapshot of the network.
            NonFiniteError: If it holds NaN or infinity.

        Warns:
            RoundingWarning: If ``rounding_`` is above 1e-2.
        """
        kernel = self._read_cross(K_cross)
        dual = self._dual
        if self.indices is not None and self._space.is_spread:
            # Rows of the chosen columns are on this rank, and are a matrix of its own.
            kernel, dual = DenseLinearOperator(taken_columns(kernel, self.indices)), self._beta
        elif self.indices is not None:
            kernel, dual = kernel[..., :, self.indices], dual[..., self.indices, :]
        columns, added = precise_product(kernel, dual)
        self.rounding_ = added_share(kernel, columns, added)
        return self._layout.restore(columns).to(kernel.dtype)

    def weights(self) -> dict[str, Tensor]:
        r"""Return the change of the parameters, :math:`\Delta\theta = J^\top U \beta`.

        Returns:
            As `ntkops.KernelRidge.weights`. Cost: one vjp a target over all m points, over the chosen ones
            alone where U selects points.

        Raises:
            UnsupportedOperationError: If the kernel does not know its Jacobian, or is traced over outputs and
                has several targets.

        Warns:
            RoundingWarning: If rounding may have added more than 1e-2 of their length.
        """
        return self._change().named()

    def predictor(self) -> Predictor:
        """Return a function of new samples that predicts from directional derivatives along `weights`.

        Returns:
            `ntkops.regression.Predictor`, with C jvps a sample for C class kernels, one for a kernel over all
            outputs, whatever was distilled. It holds none of the m points.

        Raises:
            UnsupportedOperationError: As for `weights`; and if the kernel's rows are an uneven selection of
                samples and outputs.
            DifferentiationError: If the network has no directional derivatives.
        """
        return Predictor(self._change(), self._layout, _no_offset)

    def _change(self) -> ParameterChange:
        kernel, dual = self._K, self._dual
        if self._space.is_spread:
            raise UnsupportedOperationError(
                "there are no weights of points that lie on several ranks: predict from K.cross(x_new), or "
                "distil a kernel of one process"
            )
        if self.indices is not None:
            kernel, dual = kernel[..., :, self.indices], dual[..., self.indices, :]
        return ParameterChange.of(kernel, dual, self._layout)

    def variance(self, K_cross: Kernels, K_diag: Tensor) -> Tensor:
        r"""Return the posterior variance of the noiseless function, given what was fitted.

        "nystrom": that of the features, plus the prior variance outside their span. "sketch": that of a
        Gaussian process observed in the s combinations :math:`U^\top f` with noise r.

        Args:
            K_cross: As for `predict`; s columns of products are taken.
            K_diag: Prior variances K(x*, x*), ``(M,)`` or ``(C, M)``.

        Returns:
            ``(M,)`` for one kernel, ``(M, C)`` for one a class, float64.

        Raises:
            InputError: If a variance is negative beyond rounding.
            ShapeError: If the arguments do not fit.
            NonFiniteError: If a prior variance is NaN or infinite.
        """
        kernel = self._read_cross(K_cross)
        rows = self._U.products(kernel).double()

        def work() -> Tensor:
            prior = require_finite(torch.as_tensor(K_diag).detach().double(), "K_diag")
            if tuple(prior.shape) != tuple(kernel.shape[:-1]):
                raise ShapeError(
                    f"K_diag has shape {tuple(prior.shape)}, one entry for each row of the cross kernel is "
                    f"due: {tuple(kernel.shape[:-1])}"
                )
            left = prior - self._span.explained(rows, self.ridge_)
            negative = left < -self._span.share * prior.abs()
            if bool(negative.any()):
                raise InputError(
                    f"the variance at row {int(negative.nonzero()[0, -1])} would be negative: K_diag does "
                    "not belong to the rows of this cross kernel"
                )
            return left.clamp(min=0)

        return self._layout.restore_rows(self._space.together(work, "the variance"))

    def score(self, K_cross: Kernels, Y: Tensor) -> float:
        """Return accuracy for class numbers, R² for numbers, as `ntkops.KernelRidge.score` does.

        Args:
            K_cross: As for `predict`.
            Y: ``(M,)`` integer classes, or targets in the shape of the predictions.

        Returns:
            A number up to 1.

        Raises:
            ShapeError: If Y does not fit the predictions.
            UnsupportedOperationError: If the fit is over a process group: it would be that of one rank.
        """
        if self._space.is_spread:
            raise UnsupportedOperationError(
                "the rows lie on several ranks, and a score would be that of this rank's: gather the "
                "predictions, and score them once"
            )
        predictions, truth = self.predict(K_cross), torch.as_tensor(Y).detach()
        numbers = truth.dtype.is_floating_point
        return r2_score(predictions, truth) if numbers else accuracy(predictions, truth)

    def _read_cross(self, K_cross: Any) -> LinearOperator:
        spread = self._space.is_spread
        kernel = read_kernels(K_cross, "the cross kernel", over_ranks=spread)
        if spread and not self._space.matches(capabilities(kernel).domain):
            raise ShapeError(
                "the columns of the cross kernel do not lie on the ranks as the points of the fit do: make "
                "it with K.cross(x_new)"
            )

        def check() -> None:
            self._layout.check_rows(kernel.shape, self._K.shape[-1])
            if kernel.dtype != self._K.dtype:
                raise DtypeError(
                    f"the fitted kernel has dtype {self._K.dtype}, the cross kernel {kernel.dtype}; cast one"
                )
            require_same_snapshot(self._K, kernel)

        self._space.together(check, "reading the cross kernel")
        return kernel

    def __repr__(self) -> str:
        """Show the kind of the fit, its size and its ridge."""
        shape = " x ".join(map(str, self._U.shape))
        fitted = f", ridge_={self.ridge_:.3g}" if hasattr(self, "ridge_") else ""
        return f"DistilledRidge({self.fit_method!r}, U: {shape}{fitted})"


def _no_offset(*_: Any) -> None:
    """Return None: what is distilled is the kernel's picture of the labels alone."""


@dataclass(frozen=True, eq=False)
class _Span:
    """What a fit leaves of its regression for variances, of rows K_* U.

    Attributes:
        root: ``(*batch, r, r)``: T with Tᵀ T = Fᵀ F of the features F = K U W, or Uᵀ K U itself.
        whitening: ``(*batch, s, r)`` W, or None.
        share: Share of a prior variance that rounding explains.
    """

    root: Tensor
    whitening: Tensor | None
    share: float

    def explained(self, rows: Tensor, ridge: float) -> Tensor:
        r"""Return the prior variance that is explained, ``(*batch, M)``.

        With the features φ of a new sample :math:`\phi^\top F^\top (F F^\top + r)^{-1} F \phi`, which is
        :math:`\sum_j \sigma_j^2 / (\sigma_j^2 + r) (v_j^\top \phi)^2` by the singular pairs of F, those of T.
        """
        if self.whitening is None:
            values, vectors = torch.linalg.eigh(self.root)
            return ((rows @ vectors).square() @ (1 / (values + ridge)).unsqueeze(-1)).squeeze(-1)
        _, singular, right = torch.linalg.svd(self.root)
        noise = singular.shape[-1] * torch.finfo(singular.dtype).eps * singular.amax(-1, keepdim=True)
        shrunk = torch.where(singular > noise, singular.square() / (singular.square() + ridge), 0.0)
        return ((rows @ self.whitening @ right.mT).square() @ shrunk.unsqueeze(-1)).squeeze(-1)


_Solved = tuple[KernelRidge, _Span, Tensor]


def _flat_labels(layout: Layout, columns: Tensor) -> Tensor:
    """Return right-hand sides ``(*batch, n, k)`` as labels of a regression: ``(n, k)`` or ``(n, C)``."""
    return columns.squeeze(-1).mT if layout.kind == "each" else columns


def _columns_of(layout: Layout, values: Tensor) -> Tensor:
    """Undo `_flat_labels`."""
    return values.mT.unsqueeze(-1) if layout.kind == "each" else values


def _labels_of(layout: Layout, columns: Tensor) -> Tensor:
    """Return coefficients ``(*batch, s, k)`` as ``(s, ...)`` with the targets behind."""
    found = _flat_labels(layout, columns)
    if layout.kind == "shared":
        return found.reshape(len(found), *layout.tail)
    return found.squeeze(-1) if layout.kind == "flat" else found


def _sketch(small: Tensor, targets: Tensor, layout: Layout, ridges: list[float]) -> _Solved:
    """Solve (Uᵀ K U + r) β = Uᵀ Y."""
    labels = _flat_labels(layout, targets)
    inner = KernelRidge(ridges if len(ridges) > 1 else ridges[0], False).fit(small, labels)
    scale = float(small.diagonal(dim1=-2, dim2=-1).mean())
    share = rounding_share(small.shape[-1], small.dtype, scale, inner.ridge_)
    return inner, _Span(small, None, share), _columns_of(layout, inner.dual_coef_)


def _nystrom(
    products: Tensor,
    small: Tensor,
    columns: Tensor,
    layout: Layout,
    ridges: list[float],
    dtype: torch.dtype,
    space: Space,
) -> _Solved:
    """Minimise |Y - K U β|² + r βᵀ Uᵀ K U β, as a regression on K U (Uᵀ K U)^{-1/2}."""
    whitening = _whitening(small, dtype)  # (*batch, s, r)
    features = _whitened(products, whitening)
    if isinstance(space, ShardedSpace):
        features, columns = _shared_rows(features, columns, space)
    kernel = RootLinearOperator(DenseLinearOperator(require_finite(features, "the distilled features")))
    inner = KernelRidge(ridges if len(ridges) > 1 else ridges[0], False, "features")
    inner.fit(kernel, _flat_labels(layout, columns).to(features.dtype))  # which they came in
    # The weights are what the regression predicts at the unit vectors of the feature space.
    unit = torch.eye(features.shape[-1], dtype=features.dtype, device=features.device)
    unit = unit.expand(*features.shape[:-2], *unit.shape)
    at_units = MatmulLinearOperator(DenseLinearOperator(unit), DenseLinearOperator(features.mT))
    weights = _columns_of(layout, inner.predict(at_units))
    root = TallFeatures(features).triangle()
    rows = features.shape[:-2].numel() * space.size
    scale = float(root.square().sum()) / rows  # the mean diagonal of F Fᵀ
    share = rounding_share(features.shape[-2], features.dtype, scale, inner.ridge_)
    return inner, _Span(root, whitening, share), whitening @ weights.double()


def _shared_rows(features: Tensor, columns: Tensor, space: ShardedSpace) -> tuple[Tensor, Tensor]:
    """Return rows that all ranks have, with the FᵀF and FᵀY of the rows on all of them.

    Each rank has F_i = Q_i R_i, and the R_i one below the other, beside the Q_iᵀ Y_i, have both sums: the
    regression on them has the same weights, and no product FᵀF squares its condition.
    """
    own, triangle = torch.linalg.qr(features.double())
    heights = [min(length, features.shape[-1]) for length in space.lengths]
    return space.ranks.gather(triangle, heights), space.ranks.gather(own.mT @ columns, heights)


def _whitened(products: Tensor, whitening: Tensor) -> Tensor:
    """Return K U W, in float64; of very many products in their own place."""
    rank = whitening.shape[-1]
    if products.numel() <= _TALL:
        return products.double() @ whitening
    for start in range(0, products.shape[-2], _ROWS):
        rows = slice(start, start + _ROWS)
        products[..., rows, :rank] = (products[..., rows, :].double() @ whitening).to(products.dtype)
    return products[..., :rank]


def _whitening(small: Tensor, dtype: torch.dtype) -> Tensor:
    """Return W with W Wᵀ = (Uᵀ K U)⁺, columns of zeros where a class has a lower rank than others.

    Raises:
        SingularKernelError: If a distilled kernel is zero.
    """
    lengths = small.diagonal(dim1=-2, dim2=-1).clamp(min=0).sqrt()
    if not bool((lengths.amax(-1) > 0).all()):
        raise SingularKernelError("the distilled gradients of a class are zero: distil into others")
    # Columns of U of different lengths are no reason to take the short ones for rounding.
    inverse = torch.where(lengths > 0, 1 / lengths, torch.zeros_like(lengths))
    values, vectors = torch.linalg.eigh(small * inverse.unsqueeze(-1) * inverse.unsqueeze(-2))
    noise = small.shape[-1] * torch.finfo(dtype).eps * values.amax(-1, keepdim=True)
    used = values > noise
    scale = torch.where(used, values.clamp(min=noise).rsqrt(), torch.zeros_like(values))
    rank = int(used.sum(-1).max())
    return inverse.unsqueeze(-1) * (vectors * scale.unsqueeze(-2))[..., -rank:]
