"""Distilled gradients: the coefficient matrix that selection and synthesis share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Self

import torch
from linear_operator.operators import LinearOperator
from torch import Tensor

from ..errors import (
    DeviceError,
    DtypeError,
    InputError,
    NonFiniteError,
    OutOfRangeError,
    ShapeError,
    ShardingError,
    UnsupportedOperationError,
)
from ..operators.capabilities import capabilities
from ..regression._operands import read_labels
from ..results import DistillationInfo
from ..results.html import facts_html
from ..vectors import Space
from ._kernels import Kernels, read_kernels, read_square
from ._operator import DistilledOperator
from .ridge import DistilledRidge, unit_columns

__all__ = ["Distilled"]

_CHOSEN = (
    "of a kernel over several ranks points are chosen, by their numbers among the rows of all ranks; "
    "combinations of gradients take a kernel of one process"
)


@dataclass(frozen=True, eq=False)
class Distilled:
    r"""s combinations :math:`U^\top \Phi` of the gradients of m points, by their coefficients U.

    A selection of points has unit vectors in U; a synthesis has anything. Whatever a distilled set is asked
    needs U and the kernel alone, since its gradients meet others only in inner products:
    :math:`U^\top K U` among themselves, :math:`K_{*X} U` with new samples.

    Attributes:
        U: ``(m, s)``, one for all classes, or ``(C, m, s)``, one a class; the kernel's dtype. The m rows are
            those of the kernel: samples, or samples times outputs for ``outputs="all"``.
        features: Lazy :math:`U^\top \Phi`, ``(*batch, s, P)``, where the kernel knows its factor Φ; None
            elsewhere.
        targets: :math:`U^\top Y`, ``(s, ...)`` in the shape of Y, where there was a Y; None elsewhere.
        indices: ``(s,)`` the points that were chosen, where U is a selection; None elsewhere. Of a kernel
            over a process group they count the rows of all ranks; U and Y are this rank's rows.
        info: How it came about: `ntkops.results.DistillationInfo`.

    Raises:
        ShapeError: If U is not ``(m, s)`` or ``(C, m, s)``.
        DtypeError: If U is not of a floating dtype.
        NonFiniteError: If U has entries that are not finite.

    References:
        Distilled NTK paper, section 4.3 and Algorithm 1.

    Example:
        >>> import torch
        >>> from ntkops.distill import Distilled
        >>> K = torch.diag(torch.tensor([4.0, 2.0, 1.0], dtype=torch.float64))
        >>> chosen = Distilled.of(K, torch.tensor([2, 0]))
        >>> chosen.operator(K).to_dense().diagonal().tolist()
        [1.0, 4.0]
        >>> mean = Distilled.of(K, torch.full((3, 1), 1 / 3, dtype=torch.float64))
        >>> mean.cross(K).to_dense().squeeze().tolist() == [4 / 3, 2 / 3, 1 / 3]
        True
    """

    U: Tensor
    features: LinearOperator | None = None
    targets: Tensor | None = None
    info: DistillationInfo = DistillationInfo("given")
    indices: Tensor | None = None

    def __post_init__(self) -> None:
        """Check U before anything is done with it."""
        first = 0 if self.indices is None else -1  # a rank may have none of the rows that were chosen from
        if not isinstance(self.U, Tensor) or self.U.dim() not in (2, 3) or 0 in self.U.shape[first:]:
            shape = tuple(self.U.shape) if isinstance(self.U, Tensor) else type(self.U).__name__
            raise ShapeError(f"U needs shape (m, s) or (C, m, s) with entries, got {shape}")
        if not self.U.dtype.is_floating_point:
            raise DtypeError(f"U has dtype {self.U.dtype}; indices of points go to Distilled.of(K, indices)")
        if not bool(torch.isfinite(self.U).all()):
            raise NonFiniteError("U holds NaN or infinity")

    @classmethod
    def of(
        cls,
        K: Kernels,
        U: Tensor | Sequence[int],
        Y: Tensor | None = None,
        *,
        info: DistillationInfo | None = None,
    ) -> Self:
        """Return a distilled set of the points of a kernel.

        Args:
            K: Square kernel ``(m, m)``, kernels ``(C, m, m)``, or a sequence of C kernels ``(m, m)``.
            U: Coefficients ``(m, s)`` or ``(C, m, s)``; or integers, the points that are chosen.
            Y: Labels as `ntkops.KernelRidge.fit` takes them with K, or None.
            info: How U came about; None says that it was given.

        Returns:
            The set, with `features` where K has factors and `targets` where there is Y. Nothing is computed
            but the latter.

        Raises:
            ShapeError: If U, Y and K do not fit.
            DtypeError: If their dtypes differ.
            DeviceError: If they live on different devices.
            InputError: If no point, or one twice, is chosen.
            ShardingError: If ranks choose different points.
            UnsupportedOperationError: If the kernel lies on several ranks, and U is no choice of points.
            OutOfRangeError: If a point does not exist.
        """
        kernel = read_square(K, over_ranks=True)
        space = capabilities(kernel).space
        U, indices = _read_coefficients(U, kernel, space)
        factors = None if space.is_spread else capabilities(kernel).factors()
        features = None
        if factors is not None:
            if indices is None:
                features = DistilledOperator.between(factors[0], U, None)
            else:
                features = factors[0][..., indices, :]
        targets = None if Y is None else _targets(kernel, U, Y)
        return cls(U, features, targets, info or DistillationInfo("given"), indices)

    @property
    def size(self) -> int:
        """Number s of distilled gradients."""
        return self.U.shape[-1]

    @property
    def num_points(self) -> int:
        """Number m of points that they are combinations of."""
        return self.U.shape[-2]

    def operator(self, K: Kernels) -> LinearOperator:
        r"""Return :math:`U^\top K U`, the kernel among the distilled gradients, lazily.

        Args:
            K: Square kernel ``(m, m)``, kernels ``(C, m, m)``, or a sequence of them.

        Returns:
            ``(s, s)`` or ``(C, s, s)``: of a selection the kernel of the chosen points alone, so that the
            others' Jacobians are never made. Cost of a product: one with K a column.

        Raises:
            ShapeError: If K is not square over the m points.
            DtypeError: If its dtype is not that of U.
            DeviceError: If it lives elsewhere.
        """
        kernel = read_square(K)
        self._check(kernel)
        if self.indices is not None:
            return _grid(kernel, self.indices)
        return DistilledOperator(kernel, self.U, self.U)

    def cross(self, K_cross: Kernels) -> LinearOperator:
        r"""Return :math:`K_{*X} U`, the kernel between samples and the distilled gradients, lazily.

        Args:
            K_cross: Kernel with the m points in its columns, ``K.cross(x_new)`` or K itself; ``(n, m)``,
                ``(C, n, m)``, or a sequence.

        Returns:
            ``(n, s)`` or ``(C, n, s)``: for a selection the columns of the chosen points.

        Raises:
            ShapeError: If the columns are not the m points.
            DtypeError: If its dtype is not that of U.
            DeviceError: If it lives elsewhere.
        """
        kernel = read_kernels(K_cross, "the cross kernel")
        self._check(kernel)
        if self.indices is not None:
            return kernel[..., :, self.indices]
        return DistilledOperator(kernel, self.U, which="right")

    def fit(
        self,
        K: Kernels,
        Y: Tensor,
        *,
        ridge: float | Sequence[float] | Literal["loo"] = 1e-4,
        relative: bool = True,
        fit: Literal["nystrom", "sketch"] = "nystrom",
    ) -> DistilledRidge:
        r"""Fit kernel ridge regression whose weights are combinations of the distilled gradients.

        The predictor is :math:`f(x_*) = K_{*X} U \beta`, s numbers for each target:

        * "nystrom": all m labels, :math:`\min_\beta |Y - K U \beta|^2 + r\, \beta^\top U^\top K U \beta`,
          the best predictor with weights in the span of :math:`U^\top \Phi`.
        * "sketch": the s labels :math:`U^\top Y` alone, :math:`(U^\top K U + r)\, \beta = U^\top Y`, the
          fit of the paper.

        Args:
            K: Square kernel ``(m, m)``, kernels ``(C, m, m)``, or a sequence of them. Over a process group
                every rank gives its rows of Y, and has its rows of predictions and dual coefficients.
            Y: Labels as `ntkops.KernelRidge.fit` takes them: ``(m,)`` or ``(m, C)`` for one kernel,
                ``(m, C)`` for one a class.
            ridge: r ≥ 0; several, or "loo" for a grid, from which leave-one-out chooses.
            relative: Whether ridges are multiples of the mean diagonal of K over all points and classes,
                so that the same number means the same ridge for every distilled set.
            fit: "nystrom" or "sketch".

        Returns:
            A fitted `DistilledRidge`; predict from the cross kernel with all m points. Cost: a product
            with K for each of s columns, and O(m s²) flops.

        Raises:
            InputError: If an option is not understood, or labels are integers.
            ShapeError: If kernel, labels and U do not fit.
            DtypeError: If their dtypes differ.
            ZeroKernelError: If ridges are relative to a kernel of zeros.
            SingularKernelError: If the distilled kernel is singular and no ridge mends it.
            UnsupportedOperationError: If the kernel lies on several ranks and "nystrom" is to choose among
                ridges: leave-one-out errors are made of rows.

        References:
            Distilled NTK paper, section 4.3; Williams, Seeger (2001).

        Example:
            >>> import torch
            >>> from ntkops import distill
            >>> F = torch.randn(
            ...     30, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64
            ... )
            >>> K, Y = F @ F.T, F[:, :2]
            >>> points = distill.select(
            ...     K, 4, "random", generator=torch.Generator().manual_seed(0)
            ... )
            >>> fitted = points.fit(K, Y, ridge=1e-10)
            >>> bool((fitted.predict(K) - Y).abs().max() < 1e-6)
            True
        """
        if fit not in ("nystrom", "sketch"):
            raise InputError(f"fit={fit!r}: choose 'nystrom' (all labels) or 'sketch' (the distilled ones)")
        kernel = read_square(K, over_ranks=True)
        space = capabilities(kernel).space
        if space.is_spread and self.indices is None:
            raise UnsupportedOperationError(_CHOSEN)
        space.together(lambda: self._check(kernel), "fitting a distilled set")
        return DistilledRidge(self.U, self.indices, ridge, relative, fit).fit(kernel, Y)

    def orthonormalized(self) -> Distilled:
        r"""Return the same span with :math:`U^\top U = I`, so that the sketch's ridge is that of a basis.

        Directions that are rounding are dropped, so that s may shrink. A selection is orthonormal already.

        Returns:
            A new set without `features` and `targets`; make them by `of`.
        """
        if self.indices is not None:
            return self
        space = Space(self.num_points, self.U.dtype, self.U.device)
        return Distilled(space.orthonormalize(self.U), info=self.info)

    def _check(self, kernel: LinearOperator) -> None:
        if kernel.shape[-1] != self.num_points:
            raise ShapeError(
                f"the kernel has {kernel.shape[-1]} columns, the distilled set is made of "
                f"{self.num_points} points"
            )
        if self.U.dim() == 3 and tuple(kernel.shape[:-2]) != (self.U.shape[0],):
            raise ShapeError(
                f"U has coefficients for {self.U.shape[0]} classes, the kernel has shape "
                f"{tuple(kernel.shape)}"
            )
        _require_match(self.U, kernel)

    def _repr_html_(self) -> str:
        """Show the same in a notebook."""
        facts = {
            "method": self.info.method,
            "made by": "selection" if self.indices is not None else "synthesis",
            "U": " x ".join(map(str, self.U.shape)),
            "dtype": self.U.dtype,
            "seconds": f"{self.info.seconds:.3g}",
        }
        return facts_html("Distilled", facts)

    def __repr__(self) -> str:
        """Show the method, the sizes and what there is."""
        kind = "selection" if self.indices is not None else "synthesis"
        shape = " x ".join(map(str, self.U.shape))
        return f"Distilled({self.info.method!r}, {kind}, U: {shape}, {self.U.dtype})"


def _require_match(U: Tensor, kernel: LinearOperator) -> None:
    if U.dtype != kernel.dtype:
        raise DtypeError(f"U has dtype {U.dtype}, the kernel {kernel.dtype}; cast one of them")
    if kernel.device is not None and U.device != kernel.device:
        raise DeviceError(f"U lives on {U.device}, the kernel on {kernel.device}; move one of them")


def _grid(kernel: LinearOperator, indices: Tensor) -> LinearOperator:
    submatrix = getattr(kernel, "submatrix", None)  # keeps the symmetry of a network's kernel
    if submatrix is not None:
        return submatrix(indices, indices)
    return kernel[..., indices, :][..., :, indices]


def _read_coefficients(U: Any, kernel: LinearOperator, space: Space) -> tuple[Tensor, Tensor | None]:
    values = U.detach() if isinstance(U, Tensor) else torch.as_tensor(U)
    size = space.size
    if space.is_spread and values.dtype.is_floating_point:
        raise UnsupportedOperationError(_CHOSEN)
    if values.dtype.is_floating_point:
        if values.dim() not in (2, 3) or values.shape[-2] != size:
            raise ShapeError(f"U has shape {tuple(values.shape)}, the kernel {size} points: pass ({size}, s)")
        if values.dim() == 3 and tuple(kernel.shape[:-2]) != tuple(values.shape[:1]):
            raise ShapeError(
                f"U has coefficients for {values.shape[0]} classes, the kernel has shape "
                f"{tuple(kernel.shape)}"
            )
        _require_match(values, kernel)
        return values, None
    if values.dim() != 1 or not len(values):
        raise InputError(
            f"chosen points are a vector of at least one integer, got shape {tuple(values.shape)}"
        )
    chosen = values.long().cpu()
    outside = (chosen < -size) | (chosen >= size)
    if bool(outside.any()):
        raise OutOfRangeError(f"point {int(chosen[outside][0])} does not exist: there are {size}")
    chosen = torch.where(chosen < 0, chosen + size, chosen)
    if len(chosen.unique()) < len(chosen):
        raise InputError("a point is chosen twice: its gradient would count for two")
    if any(other != chosen.tolist() for other in space.share(chosen.tolist())):
        raise ShardingError("ranks choose different points: give all of them the same numbers")
    chosen = chosen.to(kernel.device or "cpu")
    return unit_columns(chosen, space), chosen


def _targets(kernel: LinearOperator, U: Tensor, Y: Tensor) -> Tensor:
    space = capabilities(kernel).space
    layout, labels = read_labels(
        Y, kernel.shape, kernel.dtype, kernel.device, space if space.is_spread else None
    )
    columns = layout.columns(labels.double())  # (*batch, m, k)
    found = space.inner(U, columns).to(kernel.dtype)
    if layout.kind == "each":
        return found.squeeze(-1).mT
    return found.squeeze(-1) if layout.kind == "flat" else found.reshape(U.shape[-1], *layout.tail)
