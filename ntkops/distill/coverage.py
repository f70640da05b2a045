"""How much of the gradients of all points lies in the span of the distilled ones."""

from __future__ import annotations

import torch
from torch import Tensor

from ..arguments import checked
from ..errors import DtypeError, InputError, ShapeError, SingularKernelError, ZeroKernelError
from ..operators.capabilities import capabilities, multiply
from ._kernels import Kernels, read_square
from .distilled import Distilled

__all__ = ["reconstruction_error", "variance_coverage"]

_SCOPES = ("stacked", "class")


@checked
def variance_coverage(
    K: Kernels, distilled: Distilled | Tensor, *, per: str = "stacked", centred: bool = False
) -> Tensor:
    r"""Return the share of the gradients' variance inside the span of the distilled gradients.

    With Φ the gradients, V an orthonormal basis of the rows of :math:`U^\top \Phi`, and H the identity or
    :math:`I - 1 1^\top / m`,

    .. math::
        \frac{|H \Phi V V^\top|_F^2}{|H \Phi|_F^2}
        = \frac{\mathrm{tr}\, (U^\top K U)^+ U^\top K H K U}{\mathrm{tr}\, H K H},

    so that the kernel is enough. By Ky Fan no U of the same size covers more of the stacked, uncentred
    gradients than the leading eigenvectors of the mean kernel do (``synthesize(K, s, "pca")``); coverages of
    single classes, their mean and centred ones carry no such law.

    Args:
        K: Kernel ``(m, m)``, kernels ``(C, m, m)``, or a sequence of them.
        distilled: The distilled set, or its U ``(m, s)`` or ``(C, m, s)``.
        per: "stacked": the gradients of all classes side by side, one number. "class": one number a class.
        centred: Whether the mean gradient over points is subtracted, as the paper does; the distilled
            gradients stay as they are.

    Returns:
        ``()``, or ``(C,)`` for "class" of several kernels, float64, from 0 to 1. Cost: a product with K for
        each of s columns, and the exact diagonal of K.

    Raises:
        InputError: If per is unknown.
        ShapeError: If K and U do not fit.
        DtypeError: If their dtypes differ.
        ZeroKernelError: If there is no variance.
        SingularKernelError: If the distilled gradients are zero.

    References:
        Distilled NTK paper, figure 6.

    Example:
        >>> import torch
        >>> from ntkops.distill import variance_coverage
        >>> K, U = torch.diag(torch.tensor([6.0, 3.0, 1.0])), torch.eye(3)[:, :2]
        >>> round(float(variance_coverage(K, U)), 12)
        0.9
    """
    inside, total, _ = _energies(K, distilled, per, centred)
    return (inside / total).clamp(max=1)


@checked
def reconstruction_error(
    K: Kernels, distilled: Distilled | Tensor, *, per: str = "stacked", centred: bool = False
) -> Tensor:
    r"""Return the mean squared distance of the gradients from the span of the distilled ones.

    That is :math:`|H \Phi - H \Phi V V^\top|_F^2 / m`; see `variance_coverage`, whose arguments these are.

    Args:
        K: Kernel ``(m, m)``, kernels ``(C, m, m)``, or a sequence of them.
        distilled: The distilled set, or its U ``(m, s)`` or ``(C, m, s)``.
        per: "stacked" or "class".
        centred: Whether the mean gradient is subtracted.

    Returns:
        ``()``, or ``(C,)`` for "class" of several kernels, float64, in the units of K. Costs and
        exceptions are those of `variance_coverage`.

    References:
        Distilled NTK paper, figure 6.

    Example:
        >>> import torch
        >>> from ntkops.distill import reconstruction_error
        >>> K, U = torch.diag(torch.tensor([6.0, 3.0, 1.0])), torch.eye(3)[:, :2]
        >>> round(float(reconstruction_error(K, U)), 12)
        0.333333333333
    """
    inside, total, size = _energies(K, distilled, per, centred)
    return (total - inside).clamp(min=0) / size


def _energies(
    K: Kernels, distilled: Distilled | Tensor, per: str, centred: bool
) -> tuple[Tensor, Tensor, int]:
    """Return the squares inside the span and altogether, and the number of points.

    Raises:
        InputError: If per is unknown.
        ZeroKernelError: If there is no variance.
    """
    if per not in _SCOPES:
        raise InputError(f"per={per!r}: choose one of {', '.join(map(repr, _SCOPES))}")
    kernel = read_square(K)
    U = read_coefficients(distilled, kernel.shape, kernel.dtype)
    batch, size = kernel.shape[:-2], kernel.shape[-1]
    one = torch.ones(size, 1, dtype=U.dtype, device=U.device)
    block = torch.cat([U, one.expand(*U.shape[:-2], size, 1)], dim=-1) if centred else U
    products = multiply(kernel, block.expand(*batch, *block.shape[-2:]).contiguous()).double()
    with torch.no_grad():
        total = capabilities(kernel).diagonal().double().sum(-1)
    if centred:
        total = total - products[..., -1].sum(-1) / size
        products = products[..., :-1]
    small = U.double().mT @ products
    if per == "stacked" and batch:  # the gradients of all classes as one: their inner products add up
        small, products, total = small.sum(0), products.sum(0), total.sum(0)
    if not bool((total > 0).all()):
        raise ZeroKernelError("the gradients have no variance of which a share could be covered")
    features = products @ whitening(small, kernel.dtype)
    if centred:
        features = features - features.mean(-2, keepdim=True)
    return features.square().sum((-2, -1)), total, size


def read_coefficients(distilled: Distilled | Tensor, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """Return an orthonormal basis of the coefficients' span, with zeros where they depend on each other.

    Raises:
        ShapeError: If they do not belong to a kernel of this shape.
        DtypeError: If they have another dtype.
    """
    U = distilled.U if isinstance(distilled, Distilled) else Distilled(distilled).U
    if U.shape[-2] != shape[-1] or (U.dim() == 3 and U.shape[0] != (shape[0] if len(shape) == 3 else 1)):
        raise ShapeError(f"coefficients {tuple(U.shape)} do not fit a kernel of shape {tuple(shape)}")
    if U.dtype != dtype:
        raise DtypeError(f"U has dtype {U.dtype}, the kernel {dtype}; cast one of them")
    lengths = torch.linalg.vector_norm(U.double(), dim=-2, keepdim=True)
    unit = U.double() / torch.where(lengths > 0, lengths, torch.ones_like(lengths))
    basis, sizes, _ = torch.linalg.svd(unit, full_matrices=False)
    noise = max(U.shape[-2:]) * torch.finfo(dtype).eps * sizes[..., :1]
    return (basis * (sizes > noise).unsqueeze(-2)).to(dtype)


def whitening(small: Tensor, dtype: torch.dtype) -> Tensor:
    """Return W with W Wᵀ = A⁺ for A = Uᵀ K U ``(*batch, s, s)``; directions of rounding size become zero.

    Args:
        small: A, float64.
        dtype: That of the kernel's products, which sets what rounding is.

    Raises:
        SingularKernelError: If A is zero.
    """
    values, vectors = torch.linalg.eigh((small + small.mT) / 2)
    largest = values[..., -1:]
    if not bool((largest > 0).all()):
        raise SingularKernelError("the distilled gradients are zero: their span covers nothing")
    used = values > small.shape[-1] * torch.finfo(dtype).eps * largest
    return vectors * torch.where(used, values.clamp(min=0).rsqrt(), 0.0).nan_to_num(0.0).unsqueeze(-2)
