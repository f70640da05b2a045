"""What a distilled set is good for beyond the targets that it was made for."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from ..arguments import checked
from ..errors import InputError
from ..operators.capabilities import multiply
from ..regression import KernelRidge
from ..regression.metrics import accuracy
from ..results import VarianceTransfer
from ._kernels import Kernels, dense_of, read_kernels, read_square
from .coverage import read_coefficients, variance_coverage, whitening
from .distilled import Distilled

__all__ = ["nystrom_error", "posterior_variance_error", "transfer_accuracy"]

Fit = Literal["nystrom", "sketch"]


@checked
def transfer_accuracy(
    K: Kernels,
    distilled: Distilled,
    Y: Tensor,
    K_cross: Kernels,
    labels: Tensor,
    *,
    ridge: float = 1e-4,
    fit: Fit = "nystrom",
) -> float:
    """Return the accuracy on new samples for targets that the distilled set was not made for.

    A set that is distilled for one task can be perfect for it and worthless for any other.

    Args:
        K: Kernel ``(m, m)``, or kernels ``(C, m, m)``, of the points.
        distilled: The distilled set.
        Y: Targets of the other task at all m points, ``(m, T)``; T is C for class kernels.
        K_cross: Kernel between new samples and the m points, ``(M, m)`` or ``(C, M, m)``.
        labels: ``(M,)`` class numbers of the other task, integers.
        ridge: Relative to the mean diagonal of K.
        fit: "nystrom" or "sketch", as `Distilled.fit` takes it.

    Returns:
        A number from 0 to 1. Cost: that of `Distilled.fit` and its predictions.

    Raises:
        InputError: If an option is not understood.
        ShapeError: If the shapes do not fit.

    Example:
        >>> import torch
        >>> from ntkops.distill import Distilled, transfer_accuracy
        >>> F = torch.randn(40, 3, generator=torch.Generator().manual_seed(0)).double()
        >>> other = (F[:, 0] > 0).long()
        >>> Y = torch.nn.functional.one_hot(other, 2).double() - 0.5
        >>> K = F @ F.mT
        >>> transfer_accuracy(K, Distilled.of(K, range(3)), Y, K, other) > 0.9
        True
    """
    fitted = distilled.fit(read_square(K), Y, ridge=ridge, fit=fit)
    return accuracy(fitted.predict(K_cross), labels)


@checked
def posterior_variance_error(
    K: Kernels,
    distilled: Distilled,
    K_cross: Kernels,
    K_diag: Tensor,
    *,
    ridge: float = 1e-4,
    fit: Fit = "nystrom",
) -> VarianceTransfer:
    r"""Compare posterior variances from a distilled set with those from all points.

    The error is the mean of :math:`|v_s - v|` over the mean of :math:`v`, both with the same absolute
    ridge as noise. With an orthonormal U and ``fit="sketch"`` it conditions on the noisy combinations
    :math:`U^\top y` alone, so that :math:`v_s \ge v` everywhere; "nystrom" has no such order.

    Args:
        K: Kernel ``(m, m)``, or kernels ``(C, m, m)``; made dense for the variances of all points.
        distilled: The distilled set.
        K_cross: Kernel between new samples and the m points, ``(M, m)`` or ``(C, M, m)``.
        K_diag: Prior variances K(x*, x*), ``(M,)`` or ``(C, M)``.
        ridge: Relative to the mean diagonal of K, positive.
        fit: "nystrom" or "sketch".

    Returns:
        `VarianceTransfer`. Cost: a factorisation of K.

    Raises:
        InputError: If the ridge is not positive.
        ShapeError: If the shapes do not fit.
        DenseMemoryError: If K refuses to be dense.

    Example:
        >>> import torch
        >>> from ntkops.distill import Distilled, posterior_variance_error
        >>> K = torch.diag(torch.tensor([4.0, 1.0])).double()
        >>> half = Distilled.of(K, [0])
        >>> round(
        ...     float(
        ...         posterior_variance_error(
        ...             K, half, K, K.diagonal(), ridge=0.4
        ...         ).relative
        ...     ),
        ...     4,
        ... )
        0.3846
    """
    if isinstance(ridge, bool) or not isinstance(ridge, int | float) or not ridge > 0:
        raise InputError(f"ridge={ridge!r}: a variance of noise is positive")
    kernel = read_square(K)
    shape = (kernel.shape[-1], *kernel.shape[:-2])  # (m,) or (m, C): variances do not depend on targets
    targets = torch.ones(shape, dtype=kernel.dtype, device=kernel.device)
    small = distilled.fit(kernel, targets, ridge=ridge, fit=fit)
    cross = read_kernels(K_cross, "the cross kernel")
    whole = KernelRidge(small.ridge_, False).fit(kernel, targets)
    first, second = whole.variance(cross, K_diag).double(), small.variance(cross, K_diag)
    return VarianceTransfer(
        relative=(second - first).abs().mean(0) / first.mean(0),
        variance=first,
        distilled=second,
        ridge=small.ridge_,
    )


@checked
def nystrom_error(K: Kernels, distilled: Distilled | Tensor, *, norm: str = "trace") -> Tensor:
    r"""Return the relative error of the Nyström kernel of a distilled set.

    That kernel is :math:`K U (U^\top K U)^+ U^\top K`. In the trace norm its error is
    what `variance_coverage` leaves of 1, since K minus that kernel is positive semidefinite.

    Args:
        K: Kernel ``(m, m)``, kernels ``(C, m, m)``, or a sequence of them.
        distilled: The distilled set, or its U ``(m, s)`` or ``(C, m, s)``.
        norm: "trace", from products; "frobenius" or "spectral", which make K dense.

    Returns:
        ``()``, or ``(C,)`` for class kernels, float64. Cost: as for `variance_coverage`; a dense K and
        for "spectral" its eigenvalues.

    Raises:
        InputError: If the norm is unknown.
        ShapeError: If K and U do not fit.
        DtypeError: If their dtypes differ.
        ZeroKernelError: If a kernel is zero.
        SingularKernelError: If the distilled gradients are zero.
        DenseMemoryError: If a norm needs the dense K and it refuses.

    References:
        Distilled NTK paper, Proposition 3.6.

    Example:
        >>> import torch
        >>> from ntkops.distill import nystrom_error
        >>> K, U = torch.diag(torch.tensor([4.0, 3.0])), torch.eye(2)[:, :1]
        >>> [
        ...     round(float(nystrom_error(K, U, norm=n)), 4)
        ...     for n in ("trace", "frobenius", "spectral")
        ... ]
        [0.4286, 0.6, 0.75]
    """
    if norm not in ("trace", "frobenius", "spectral"):
        raise InputError(f"norm={norm!r}: choose 'trace', 'frobenius' or 'spectral'")
    if norm == "trace":
        return 1 - variance_coverage(K, distilled, per="class")
    kernel = read_square(K)
    dense = dense_of(kernel, f"nystrom_error(norm={norm!r})")
    U = read_coefficients(distilled, kernel.shape, kernel.dtype)
    products = multiply(dense, U.double().expand(*dense.shape[:-2], *U.shape[-2:]).contiguous())
    features = products @ whitening(U.double().mT @ products, kernel.dtype)
    order: str | int = "fro" if norm == "frobenius" else 2
    missed = torch.linalg.matrix_norm(dense - features @ features.mT, ord=order)
    return missed / torch.linalg.matrix_norm(dense, ord=order)
