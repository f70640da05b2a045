"""What Gaussian processes leave open about new samples: variances, and lazy covariances."""

from __future__ import annotations

from typing import Any, Self

import torch
from linear_operator.operators import LinearOperator, to_linear_operator
from linear_operator.utils.getitem import _is_noop_index, _noop_index
from torch import Tensor

from ..engines import format_bytes, tensor_bytes
from ..errors import DenseMemoryError, DtypeError, InputError, ShapeError, UnsupportedOperationError
from ..operators.algebra import KernelAlgebra
from ..operators.capabilities import capabilities, dense_bytes_allowed
from ..operators.dense import DenseFallbacks
from ..operators.positions import same_index
from ._fits import Fit
from ._operands import Kernel, Layout, read_kernel, require_finite
from ._rounding import precise_product
from ._snapshots import require_same_rows, require_same_snapshot

__all__ = [
    "PosteriorCovariance",
    "posterior_variance",
    "prior_variances",
    "read_cross",
    "read_prior",
    "require_choice",
    "rounding_share",
]

_ROWS = 256  # rows of a cross kernel that are dense at a time for variances


def require_choice(prior: Any, return_std: bool, return_cov: bool) -> None:
    """Check what `predict` is asked for.

    Raises:
        InputError: If both kinds of uncertainty are asked for, or the prior is missing or not needed.
    """
    if not isinstance(return_std, bool) or not isinstance(return_cov, bool):
        raise InputError("return_std and return_cov: pass True or False")
    if return_std and return_cov:
        raise InputError(
            "return_std and return_cov: ask for one of them; the deviations are cov.diagonal().sqrt()"
        )
    if (return_std or return_cov) and prior is None:
        raise InputError(
            "uncertainties need the kernel of the new samples with themselves: "
            "predict(K.cross(x_new), prior=ntkops.ntk(model, x_new), return_std=True)"
        )
    if prior is not None and not (return_std or return_cov):
        raise InputError("prior= is for return_std=True or return_cov=True; the mean does not depend on it")


def read_cross(given: Any, K: Kernel, layout: Layout) -> Kernel:
    """Return a cross kernel, checked against the kernel of the fit.

    Raises:
        ShapeError: If it does not fit.
        DtypeError: If its dtype is not that of the fit.
        StaleOperatorError: If it belongs to another snapshot of the network.
        NonFiniteError: If it holds NaN or infinity.
    """
    cross = read_kernel(given, "the cross kernel", K.dtype)
    layout.check_rows(cross.shape, K.shape[-1])
    if cross.dtype != K.dtype:
        raise DtypeError(
            f"the fitted kernel has dtype {K.dtype}, the cross kernel {cross.dtype}; cast one of them"
        )
    require_same_snapshot(K, cross)
    return cross


def read_prior(prior: Any, K: Kernel, K_cross: Kernel) -> Kernel:
    """Return the prior covariance of new samples, checked against the kernels of fit and prediction.

    Raises:
        ShapeError: If it is not square over the rows of the cross kernel.
        DtypeError: If its dtype is not that of the fit.
        StaleOperatorError: If it belongs to another snapshot of the network.
        InputError: If it is the kernel of other samples.
    """
    prior = read_kernel(prior, "the prior", K.dtype)
    due = (*K_cross.shape[:-1], K_cross.shape[-2])
    if tuple(prior.shape) != due:
        raise ShapeError(
            f"the prior has shape {tuple(prior.shape)}, due is {due}: the kernel of the new samples with "
            "themselves, ntkops.ntk(model, x_new, ...) with the options of the fitted kernel"
        )
    if prior.dtype != K.dtype:
        raise DtypeError(f"the fitted kernel has dtype {K.dtype}, the prior {prior.dtype}; cast one of them")
    require_same_rows(K, K_cross, prior)
    return prior


def prior_variances(prior: Kernel) -> Tensor:
    """Return the exact diagonal of a prior, ``(*batch, m)``, float64."""
    with torch.no_grad():
        return require_finite(capabilities(prior).diagonal(), "the prior").double()


def rounding_share(rows: int, dtype: torch.dtype, scale: float, ridge: float, tol: float = 1e-6) -> float:
    """Return the share of a prior variance by which rounding in K can move the posterior one.

    Args:
        rows: Rows of K.
        dtype: Its dtype.
        scale: Its mean diagonal.
        ridge: Absolute r.
        tol: Relative residual of the solve.
    """
    # An error E of K moves kᵀ A⁻¹ k by |A⁻¹ k|² |E| at most, and |A⁻¹ k|² <= k(x*, x*) / (4 r).
    entries = rows * torch.finfo(dtype).eps * scale
    return 1e-6 + 10 * tol + entries / (4 * ridge) if ridge > 0 else float("inf")


def posterior_variance(fit: Fit, K_cross: Kernel, prior: Tensor, share: float) -> Tensor:
    """Return k_** - k_*ᵀ A⁻¹ k_* for each row of a cross kernel, ``(*batch, m)``, float64.

    Args:
        fit: What was made of A.
        K_cross: ``(*batch, m, n)``.
        prior: ``(*batch, m)`` prior variances, float64.
        share: Share of a prior variance that rounding explains.

    Raises:
        InputError: If one is negative beyond rounding.
    """
    rows = K_cross.shape[-2]
    starts = range(0, rows, _ROWS)
    explained = torch.cat([fit.explained(K_cross, a, min(a + _ROWS, rows)) for a in starts], dim=-1)
    values = prior - explained
    slack = share * prior.abs()
    if bool((values < -slack).any()):
        row = int((values + slack).reshape(-1, rows).amin(0).argmin())
        raise InputError(
            f"the variance at row {row} would be negative: the prior does not belong to the rows of this "
            "cross kernel, which need K(x*, x*) of the same network, samples and outputs"
        )
    return values.clamp(min=0)


class PosteriorCovariance(KernelAlgebra, DenseFallbacks):
    r"""The joint covariance of a Gaussian process at new samples, :math:`c (K_{**} - C A^{-1} C^\top)`.

    `ntkops.KernelRidge.predict` returns it for ``return_cov=True``, lazily. Its diagonal is made in blocks of
    rows of C and is never negative; a dense result is refused above the smallest ``max_dense_bytes`` of K_**
    and C.

    Args:
        prior: K_**, ``(*batch, m, k)``.
        left: C, ``(*batch, m, n)``.
        right: C at the columns, ``(*batch, k, n)``.
        fit: What was made of A.
        factor: c.
        share: Share of a prior variance that rounding explains.

    Cost: a column takes one product with the prior, two with C and a solve.
    """

    def __init__(
        self, prior: Any, left: Any, right: Any, *, fit: Any, factor: float = 1.0, share: float = 1e-6
    ) -> None:
        left_operator = to_linear_operator(left).detach()
        right_operator = left_operator if right is left else to_linear_operator(right).detach()
        options = {"fit": fit, "factor": factor, "share": share}
        super().__init__(to_linear_operator(prior).detach(), left_operator, right_operator, **options)
        self._prior, self._left, self._right = self._args
        self._fit, self._factor_, self._share = fit, factor, share

    def _like(self, prior: LinearOperator, left: LinearOperator, right: LinearOperator) -> Self:
        return type(self)(prior, left, right, fit=self._fit, factor=self._factor_, share=self._share)

    def _size(self) -> torch.Size:
        return self._prior.shape

    def _transpose_nonbatch(self) -> Self:
        return self._like(self._prior.mT, self._right, self._left)

    def _matmul(self, rhs: Tensor) -> Tensor:
        block = (rhs.unsqueeze(-1) if rhs.dim() == 1 else rhs).double()
        block = block.expand(*self.batch_shape, *block.shape[-2:])
        with torch.no_grad():
            pulled = precise_product(self._right.mT, block)[0]
            explained = precise_product(self._left, self._fit.explain(pulled))[0]
            found = self._factor_ * (precise_product(self._prior, block)[0] - explained)
        return (found.squeeze(-1) if rhs.dim() == 1 else found).to(rhs.dtype)

    def to_dense(self) -> Tensor:
        """Return the dense covariance, inside the ``max_dense_bytes`` of its parts.

        Raises:
            DenseMemoryError: If it is larger than a part allows, before anything is allocated.
        """
        needed, limit = tensor_bytes(self.shape, self.dtype), dense_bytes_allowed(self)
        if min(self.shape[-2:]) > 1 and needed > limit:
            raise DenseMemoryError(
                f"the dense {' x '.join(map(str, self.shape))} covariance needs {format_bytes(needed)}, "
                f"above max_dense_bytes={format_bytes(limit)} of the prior or the cross kernel; use "
                "products or .diagonal(), or raise max_dense_bytes"
            )
        dense = self._matmul(torch.eye(self.shape[-1], dtype=self.dtype, device=self.device))
        return (dense + dense.mT) / 2 if self._left is self._right else dense

    def _diagonal(self) -> Tensor:
        if self._left is not self._right:
            return self.to_dense().diagonal(dim1=-2, dim2=-1)
        prior = prior_variances(self._prior)
        return (self._factor_ * posterior_variance(self._fit, self._left, prior, self._share)).to(self.dtype)

    def _get_indices(self, row_index: Tensor, col_index: Tensor, *batch_indices: Tensor) -> Tensor:
        rows, cols, *batch = torch.broadcast_tensors(row_index, col_index, *batch_indices)
        (some_rows, i), (some_cols, j) = (torch.unique(k, return_inverse=True) for k in (rows, cols))
        block = self._getitem(some_rows, some_cols, *(_noop_index for _ in self.batch_shape))
        return block.to_dense()[(*batch, i, j)]

    def _getitem(self, row_index: Any, col_index: Any, *batch_indices: Any) -> LinearOperator:
        if not all(_is_noop_index(index) for index in batch_indices):
            raise UnsupportedOperationError(
                "covariances of a batch share one fit: take members of .to_dense(), or index samples alone"
            )
        left = self._left._getitem(row_index, _noop_index, *batch_indices)
        same = self._left is self._right and same_index(row_index, col_index)
        right = left if same else self._right._getitem(col_index, _noop_index, *batch_indices)
        return self._like(self._prior._getitem(row_index, col_index, *batch_indices), left, right)
