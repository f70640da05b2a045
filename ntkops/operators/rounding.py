"""What rounding leaves of a kernel's eigenvalues, and which ridges still mean something beside it.

A kernel that was computed in float32 is K + E, with an E that nobody knows. Then an eigenvalue is known up
to |E|₂, and a ridge below it decides nothing: the answers of two engines are unlike each other, each with a
residual of zero. The one rule for all methods: the smallest eigenvalue of K + ridge has to be above |E|₂.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import InputError, SingularKernelError
from ..vectors import rank_cutoff

__all__ = [
    "asymmetry",
    "eigenvalue_rounding",
    "ends",
    "require_resolved",
    "require_semidefinite",
    "resolved",
    "symmetric",
]

# |E|₂ / (eps λmax), measured on nineteen networks (dense, convolution, near-duplicate inputs; 30 to 800 rows)
# with both engines, by blocks and by columns: up to .59 at 30 rows, .39 at 100, .31 at 300, .29 at 800; the
# lower half lies at .1 to .2. Few rows have more, since the errors of entries are then not yet averaged out.
_SHARE, _FEW = 0.25, 2.0
# A negative eigenvalue that is so many times the rounding is not due to it.
_INDEFINITE = 10
# Asymmetry, relative to the largest entry, that no rounding explains.
_ASYMMETRIC = 1e-4
_STEPS, _COLUMNS = 12, 4  # of power iteration, and vectors that it starts from


def eigenvalue_rounding(largest: Tensor, dtype: torch.dtype, size: int) -> Tensor:
    """Return what rounding does to eigenvalues of n rows computed in a dtype and factored in float64."""
    share = _SHARE + _FEW / size**0.5
    return (share * torch.finfo(dtype).eps + torch.finfo(torch.float64).eps) * largest


def resolved(least: Tensor, largest: Tensor, ridge: float, dtype: torch.dtype, size: int) -> bool:
    """Whether the smallest eigenvalue of K + ridge is above what rounding does; see `require_resolved`."""
    # Without a ridge it is the rank that is decided.
    limit = eigenvalue_rounding(largest, dtype, size) if ridge > 0 else rank_cutoff(size, dtype) * largest
    return bool((least + ridge > limit).all())


def ends(matrix: Tensor, factor: Tensor) -> tuple[Tensor, Tensor]:
    """Return the least and the largest eigenvalue of L Lᵀ, ``(*batch)``, up to some per cent."""
    # |A x| / |x| is at most the largest eigenvalue, and |A⁻¹ x| / |x| at most 1 over the least: λmax comes
    # from below and λmin from above. A step multiplies the share of an eigenvector by its eigenvalue, so that
    # after twelve those of less than half the largest are below 1e-3. Both take 2 n² operations a column and
    # step, 200 n² in all, beside n³ / 3 of the factorisation.
    generator = torch.Generator().manual_seed(0)  # a choice of start, and no estimate hangs on it
    start = torch.randn(matrix.shape[-1], _COLUMNS, generator=generator, dtype=torch.float64)
    low = high = start.to(matrix.device).expand(*matrix.shape[:-2], *start.shape)
    growth = decay = low
    for _ in range(_STEPS):
        low, high = (x / torch.linalg.vector_norm(x, dim=-2, keepdim=True) for x in (low, high))
        low, high = torch.cholesky_solve(low, factor), matrix @ high
        decay, growth = (torch.linalg.vector_norm(x, dim=-2).amax(-1) for x in (low, high))
    return 1 / decay, growth


def require_resolved(
    least: Tensor,
    largest: Tensor,
    ridge: float,
    dtype: torch.dtype,
    size: int,
    *,
    scale: float | None = None,
    kept: int | None = None,
    rank: Tensor | None = None,
    way_out: str = "pass ridge=1e-6 or more",
) -> None:
    """Raise unless the smallest eigenvalue of K + ridge is above what rounding does to those of K.

    ``least`` and ``largest`` are those of K, ``(*batch)``, which was computed in ``dtype`` and has ``size``
    rows. For the message: ``scale`` is what a relative ridge is relative to, ``kept`` the number of
    eigenvalues that a cut-off keeps, ``rank`` the numerical rank, ``(*batch)``, and ``way_out`` what to do
    without a ridge.

    Raises:
        SingularKernelError: With the smallest ridge that means something, and the way out.
    """
    if resolved(least, largest, ridge, dtype, size):
        return
    worst = require_semidefinite(least, largest, dtype, size)
    low, high = float(least.reshape(-1)[worst]), float(largest.reshape(-1)[worst])
    found = None if rank is None else int(rank.reshape(-1)[worst])
    rounding = float(eigenvalue_rounding(torch.tensor(high, dtype=torch.float64), dtype, size))
    ends_are = f"smallest eigenvalue {low:.2g}, largest {high:.2g}"
    if ridge == 0 and kept is not None:
        raise SingularKernelError(
            f"the cut-off keeps eigenvalues that are rounding errors; keep at most {found}, or add a ridge"
        )
    if ridge == 0:
        known = "" if found is None else f"rank {found} of {size}, "
        cut = "" if found is None else f", or cutoff={found} for the pseudo-inverse"
        raise SingularKernelError(
            f"the kernel is numerically singular ({known}{ends_are}), so without a ridge it has no inverse: "
            f"{way_out}{cut}"
        )
    smallest = rounding - min(low, 0.0)  # what rounding has pushed below 0 is made good first
    relative = "" if scale is None else f" (relative: {smallest / scale:.2g})"
    finer = (
        "" if dtype == torch.float64 else ", or compute the kernel in float64 (model.double(), inputs too)"
    )
    raise SingularKernelError(
        f"the ridge {ridge:.2g} is below the rounding of this {dtype} kernel ({ends_are}): the smallest "
        f"ridge that means something here is {smallest:.2g}{relative}; pass one well above it{finer}"
    )


def require_semidefinite(least: Tensor, largest: Tensor, dtype: torch.dtype, size: int) -> int:
    """Return which member of the flattened batch has the smallest least eigenvalue, beside its largest.

    Raises:
        SingularKernelError: If that eigenvalue lies below zero by more than rounding.
    """
    worst = int((least / largest.clamp(min=torch.finfo(torch.float64).tiny)).argmin())
    low, high = float(least.reshape(-1)[worst]), float(largest.reshape(-1)[worst])
    rounding = float(eigenvalue_rounding(torch.tensor(high, dtype=torch.float64), dtype, size))
    if low < -_INDEFINITE * max(rounding, torch.finfo(dtype).eps * high):
        raise SingularKernelError(
            f"the kernel is not positive semidefinite (smallest eigenvalue {low:.2g}, largest {high:.2g}; "
            f"its {dtype} rounds eigenvalues by {rounding:.2g}): it is no Gram matrix, or was computed in a "
            f"coarser dtype than it has; look at how it was made, or pass a ridge well above {-low:.2g}"
        )
    return worst


def asymmetry(matrix: Tensor) -> float:
    """Return the largest |K - Kᵀ| relative to the largest |K| of a dense matrix; 0 for a matrix of zeros."""
    largest = float(matrix.abs().amax()) if matrix.numel() else 0.0
    return float((matrix - matrix.mT).abs().amax()) / largest if largest else 0.0


def symmetric(matrix: Tensor) -> Tensor:
    """Return the symmetric part of a dense matrix, whose other part has to be rounding.

    Factorisations read one triangle: the other would be left in their residuals.

    Raises:
        InputError: If it is not, with the largest difference.
    """
    found = asymmetry(matrix.detach())
    if found > _ASYMMETRIC:
        raise InputError(
            f"the kernel is not symmetric: entries differ from their mirror images by {found:.2g} of the "
            "largest; a solve takes the kernel of one set of samples with itself, and cross kernels go to "
            "predict"
        )
    if not found:
        return matrix
    # K + (Kᵀ - K) / 2 = (K + Kᵀ) / 2, with the gradient of K alone.
    with torch.no_grad():
        rest = (matrix.mT - matrix) / 2
    return matrix + rest  # a derivative of what follows is symmetric by itself
