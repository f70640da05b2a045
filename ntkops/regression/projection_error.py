"""What a random projection of the features changes in the predictions of kernel ridge regression."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..arguments import checked
from ..errors import InputError, ShapeError, SingularKernelError, ZeroKernelError
from ..results import ProjectionError
from ._operands import Kernel, read_kernel, read_labels, require_finite, to_float64

__all__ = ["projection_error"]


@checked
def projection_error(
    K: Kernel,
    K_cross: Kernel,
    projected: Kernel,
    projected_cross: Kernel,
    Y: Tensor,
    ridge: float,
    *,
    K_diag: Tensor,
) -> ProjectionError:
    r"""Split the change of predictions by a projection into its two terms, each with its bound.

    With :math:`A = K + r I` and :math:`\tilde A = \tilde K + r I`, exactly,

    .. math:: f - \tilde f = \underbrace{(K_* - \tilde K_*) \tilde A^{-1} y}_{\text{(I) the test kernel}}
        + \underbrace{K_* (A^{-1} - \tilde A^{-1}) y}_{\text{(II) the inverse}}.

    A projection preserves inner products up to ε times the lengths of both features, not up to ε times the
    entry, which may vanish. So :math:`|K_* - \tilde K_*| \le \varepsilon |\phi_*| \sqrt{\mathrm{tr} K}` and
    :math:`|K - \tilde K| \le \varepsilon\, \mathrm{tr} K`, and

    .. math::
        |\text{(I)}| \le \frac{\varepsilon |\phi_*| \sqrt{\mathrm{tr} K}\, |y|}{\tilde\mu_{\min} + r}, \qquad
        |\text{(II)}| \le
        \frac{\varepsilon |K_*|\, \mathrm{tr} K\, |y|}{(\mu_{\min} + r)(\tilde\mu_{\min} + r)}.

    Args:
        K: Exact kernel ``(N, N)``; made dense, as the others.
        K_cross: Exact cross kernel ``(M, N)``.
        projected: The kernel of the projected features, ``(N, N)``.
        projected_cross: Their cross kernel, ``(M, N)``.
        Y: Labels ``(N,)`` or ``(N, C)``.
        ridge: Absolute ridge r > 0, the same for both.
        K_diag: ``(M,)`` prior variances K(x*, x*) = |φ(x*)|².

    Returns:
        `ProjectionError`, with ε as it was measured on these samples. Cost: two Cholesky factorisations.

    Raises:
        InputError: If the ridge is not positive.
        ShapeError: If the shapes do not fit.
        ZeroKernelError: If a feature is zero, so that no error is relative to it.
        SingularKernelError: If a ridged kernel is not positive definite.

    References:
        Distilled NTK paper, appendix B.2, corrected.
    """
    kernels = [read_kernel(k) for k in (K, K_cross, projected, projected_cross)]
    size, rows = kernels[0].shape[-1], kernels[1].shape[0]
    for kernel, due in zip(kernels, ((size, size), (rows, size)) * 2, strict=True):
        if tuple(kernel.shape) != due:
            raise ShapeError(f"a kernel has shape {tuple(kernel.shape)}, due is {due}; no batch")
    if not (isinstance(ridge, int | float) and not isinstance(ridge, bool) and 0 < ridge < math.inf):
        raise InputError(f"ridge={ridge!r}: a positive number; without a ridge the terms have no bound")
    layout, labels = read_labels(Y, kernels[0].shape, kernels[0].dtype, kernels[0].device)
    if layout.kind != "shared":
        raise ShapeError("projection_error takes one label for each row, (N,) or (N, C)")
    y = layout.columns(labels.double())
    exact, cross, approximate, approximate_cross = (to_float64(k, "cholesky") for k in kernels)
    prior = require_finite(torch.as_tensor(K_diag).double(), "K_diag")
    if tuple(prior.shape) != (rows,):
        raise ShapeError(f"K_diag has shape {tuple(prior.shape)}, due is ({rows},)")

    epsilon = _epsilon(exact, approximate, cross, approximate_cross, prior)
    alpha, smallest = _solve(exact, y, ridge)
    alpha_projected, smallest_projected = _solve(approximate, y, ridge)
    trace = exact.diagonal().sum()
    size_y = y.norm(dim=0)  # (C,)
    bound_test = epsilon * (prior * trace).sqrt().unsqueeze(1) * size_y / (smallest_projected + ridge)
    bound_inverse = epsilon * cross.norm(dim=1, keepdim=True) * trace * size_y
    bound_inverse = bound_inverse / ((smallest + ridge) * (smallest_projected + ridge))
    shape = (rows, *layout.tail)
    return ProjectionError(
        test_kernel=((cross - approximate_cross) @ alpha_projected).reshape(shape),
        inverse=(cross @ (alpha - alpha_projected)).reshape(shape),
        test_kernel_bound=bound_test.reshape(shape),
        inverse_bound=bound_inverse.reshape(shape),
        epsilon=float(epsilon),
    )


def _epsilon(
    exact: Tensor, approximate: Tensor, cross: Tensor, approximate_cross: Tensor, prior: Tensor
) -> Tensor:
    """Return the largest error of an inner product, relative to the lengths of the two features."""
    lengths, lengths_new = exact.diagonal().sqrt(), prior.sqrt()
    if not bool((lengths > 0).all() and (lengths_new > 0).all()):
        raise ZeroKernelError("a feature is zero: no error is relative to its length; leave that sample out")
    within = (exact - approximate).abs() / (lengths.unsqueeze(1) * lengths)
    across = (cross - approximate_cross).abs() / (lengths_new.unsqueeze(1) * lengths)
    return torch.maximum(within.max(), across.max())


def _solve(matrix: Tensor, y: Tensor, ridge: float) -> tuple[Tensor, Tensor]:
    """Return (K + r)⁻¹ y and the smallest eigenvalue of K, at least 0."""
    values, vectors = torch.linalg.eigh(matrix)
    if not bool(values[0] + ridge > 0):
        raise SingularKernelError(
            f"the ridge {ridge:.2g} does not exceed the rounding of the kernel, whose smallest eigenvalue is "
            f"{float(values[0]):.2g}"
        )
    return vectors @ ((vectors.mT @ y) / (values + ridge).unsqueeze(1)), values[0].clamp(min=0)
