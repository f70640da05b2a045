"""Distilled gradients: the coefficient matrix that selection and synthesis share."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal, Self

import torch
from linear_operator.operators import LinearOperator
from torch import Tensor

from ..engines import count_passes
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
from ._coefficients import Coefficients
from ._kernels import Kernels, read_kernels, read_square
from ._operator import DistilledOperator
from .ridge import DistilledRidge

__all__ = ["Distilled", "Record", "recording"]

_CHOSEN = (
    "of a kernel over several ranks points are chosen, by their numbers among the rows of all ranks; "
    "combinations of gradients take a kernel of one process"
)


_GIVEN = DistillationInfo("given")


class Distilled:
    r"""s combinations :math:`U^\top \Phi` of the gradients of m points, by their coefficients U.

    A selection of points has unit vectors in U; a synthesis has anything. Whatever a distilled set is asked
    needs U and the kernel alone, since its gradients meet others only in inner products:
    :math:`U^\top K U` among themselves, :math:`K_{*X} U` with new samples.

    Attributes:
        U: ``(m, s)``, one for all classes, or ``(C, m, s)``, one a class; the kernel's dtype. The m rows are
            those of the kernel: samples, or samples times outputs for ``outputs="all"``. A selection keeps
            ``indices`` alone, and makes U when it is asked for.
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

    def __init__(
        self,
        U: Tensor | Coefficients,
        features: LinearOperator | None = None,
        targets: Tensor | None = None,
        info: DistillationInfo = _GIVEN,
    ) -> None:
        self._U = U if isinstance(U, Coefficients) else _checked(U)
        self.features, self.targets, self.info = features, targets, info

    @property
    def U(self) -> Tensor:  # noqa: N802
        """Coefficients ``(m, s)`` or ``(C, m, s)``; those of a selection are written down here alone."""
        return self._U.dense()

    @property
    def indices(self) -> Tensor | None:
        """The points that were chosen, ``(s,)``, where U is a selection; None elsewhere."""
        return self._U.indices

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
        found = _read_coefficients(U, kernel, space)
        factors = None if space.is_spread else capabilities(kernel).factors()
        features = None
        if factors is not None:
            if found.matrix is not None:
                features = DistilledOperator.between(factors[0], found.matrix, None)
            else:
                features = factors[0][..., found.indices, :]
        targets = None if Y is None else _targets(kernel, found, Y)
        return cls(found, features, targets, info or _GIVEN)

    @property
    def size(self) -> int:
        """Number s of distilled gradients."""
        return self._U.shape[-1]

    @property
    def num_points(self) -> int:
        """Number m of points that they are combinations of."""
        return self._U.shape[-2]

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
        return self._U.combined_columns(kernel)

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
        return DistilledRidge(self._U, ridge, relative, fit).fit(kernel, Y)

    def orthonormalized(self) -> Distilled:
        r"""Return the same span with :math:`U^\top U = I`, so that the sketch's ridge is that of a basis.

        Directions that are rounding are dropped, so that s may shrink. A selection is orthonormal already.

        Returns:
            A new set without `features` and `targets`; make them by `of`.
        """
        if self.indices is not None:
            return self
        return Distilled(self._U.space.orthonormalize(self.U), info=self.info)

    def _check(self, kernel: LinearOperator) -> None:
        if kernel.shape[-1] != self.num_points:
            raise ShapeError(
                f"the kernel has {kernel.shape[-1]} columns, the distilled set is made of "
                f"{self.num_points} points"
            )
        shape = self._U.shape
        if len(shape) == 3 and tuple(kernel.shape[:-2]) != (shape[0],):
            raise ShapeError(
                f"U has coefficients for {shape[0]} classes, the kernel has shape {tuple(kernel.shape)}"
            )
        _require_match(self._U, kernel)

    def _repr_html_(self) -> str:
        """Show the same in a notebook."""
        facts = {
            "method": self.info.method,
            "made by": "selection" if self.indices is not None else "synthesis",
            "U": " x ".join(map(str, self._U.shape)),
            "dtype": self._U.dtype,
            "seconds": f"{self.info.seconds:.3g}",
        }
        return facts_html("Distilled", facts)

    def __repr__(self) -> str:
        """Show the method, the sizes and what there is."""
        kind = "selection" if self.indices is not None else "synthesis"
        shape = " x ".join(map(str, self._U.shape))
        return f"Distilled({self.info.method!r}, {kind}, U: {shape}, {self._U.dtype})"


def _require_match(U: Tensor | Coefficients, kernel: LinearOperator) -> None:
    if U.dtype != kernel.dtype:
        raise DtypeError(f"U has dtype {U.dtype}, the kernel {kernel.dtype}; cast one of them")
    if kernel.device is not None and U.device != kernel.device:
        raise DeviceError(f"U lives on {U.device}, the kernel on {kernel.device}; move one of them")


def _grid(kernel: LinearOperator, indices: Tensor) -> LinearOperator:
    submatrix = getattr(kernel, "submatrix", None)  # keeps the symmetry of a network's kernel
    if submatrix is not None:
        return submatrix(indices, indices)
    return kernel[..., indices, :][..., :, indices]


def _checked(U: Any) -> Coefficients:
    """Return a matrix that was given, once it is one."""
    if not isinstance(U, Tensor) or U.dim() not in (2, 3) or 0 in U.shape:
        shape = tuple(U.shape) if isinstance(U, Tensor) else type(U).__name__
        raise ShapeError(f"U needs shape (m, s) or (C, m, s) with entries, got {shape}")
    if not U.dtype.is_floating_point:
        raise DtypeError(f"U has dtype {U.dtype}; indices of points go to Distilled.of(K, indices)")
    if not bool(torch.isfinite(U).all()):
        raise NonFiniteError("U holds NaN or infinity")
    return Coefficients(Space(U.shape[-2], U.dtype, U.device), U)


def _read_coefficients(U: Any, kernel: LinearOperator, space: Space) -> Coefficients:
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
        return _checked(values)
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
    return Coefficients(space, indices=chosen.to(kernel.device or "cpu"))


def _targets(kernel: LinearOperator, U: Coefficients, Y: Tensor) -> Tensor:
    space = capabilities(kernel).space
    layout, labels = read_labels(
        Y, kernel.shape, kernel.dtype, kernel.device, space if space.is_spread else None
    )
    columns = layout.columns(labels.double())  # (*batch, m, k)
    found = U.inside(columns).to(kernel.dtype)
    if layout.kind == "each":
        return found.squeeze(-1).mT
    return found.squeeze(-1) if layout.kind == "flat" else found.reshape(U.shape[-1], *layout.tail)


# what a distillation took, noted while it runs


class Record:
    """Passes and time since it was opened; `info` closes it."""

    def __init__(self, counter: Any) -> None:
        self._counter, self._start = counter, time.perf_counter()

    def info(
        self,
        method: str,
        *,
        class_mean: bool,
        seed: int | None = None,
        converged: bool = True,
        details: Mapping[str, Any] | None = None,
    ) -> DistillationInfo:
        """Return the info of a method that has ended."""
        seconds = time.perf_counter() - self._start
        return DistillationInfo(
            method, class_mean, converged, self._counter.total, seed, seconds, dict(details or {})
        )


@contextmanager
def recording() -> Iterator[Record]:
    """Count passes and time without recording a graph.

    Yields:
        The record.
    """
    with torch.no_grad(), count_passes() as counter:
        yield Record(counter)
