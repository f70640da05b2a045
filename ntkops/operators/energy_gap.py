"""The energy that a Nyström kernel leaves out: the tail of the spectrum, and misalignment with it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from linear_operator.operators import LinearOperator
from torch import Tensor

from ..arguments import checked
from ..errors import InputError, ShapeError
from ..results import EnergyGap
from ..spectra import Lanczos, RitzPairs
from ._ridge_system import batch_position
from .capabilities import capabilities, dense_bytes_allowed, multiply
from .nystrom import NystromOperator, dense_by_tiles, nystrom_ntk

if TYPE_CHECKING:
    from ..model.accepted import InputsLike

__all__ = ["energy_gap"]


@checked
def energy_gap(
    kernel: LinearOperator,
    inducing: InputsLike | NystromOperator,
    *,
    num_inducing: int | None = None,
    generator: torch.Generator | None = None,
) -> EnergyGap:
    r"""Split what a Nyström kernel leaves out of K into the tail of the spectrum and misalignment.

    .. math:: \|\Phi (I - \Pi)\|_F^2 = \sum_{j > r} \lambda_j(K)
              + \Big(\sum_{j \le r} \lambda_j(K) - \mathrm{tr}\,\Phi \Pi \Phi^\top\Big)

    with the orthogonal projector Π onto the gradients of the inducing points, of rank r. Both parts are
    not negative. The left side is the nuclear norm of the positive semidefinite K - Φ Π Φᵀ, so that it
    bounds the Frobenius norm too, more tightly than eq. 10: ``gap`` ≤ ``bound``.

    Args:
        kernel: K, square.
        inducing: As for `nystrom_ntk`, or the `NystromOperator` itself.
        num_inducing: Number of points, for the rules.
        generator: CPU generator of the rules, and of the eigenvalues' starting vectors.

    Returns:
        `EnergyGap`, of the kernel's batch shape. Cost: the diagonal of K, r products with K_XZ, and the r
        leading eigenvalues of K: dense within ``max_dense_bytes``, else about 3 r products by Lanczos.

    Raises:
        InputError: If the Nyström kernel is not square.
        ShapeError: If it has another shape than K.

    References:
        Proposition 3.6 and eq. 10 of the distilled-kernel paper, for orthogonal projectors.

    Example:
        >>> import torch, ntkops
        >>> from ntkops.operators import energy_gap
        >>> _ = torch.manual_seed(0)
        >>> model = torch.nn.Sequential(
        ...     torch.nn.Linear(3, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1)
        ... )
        >>> model = model.double()
        >>> K = ntkops.ntk(model, torch.randn(20, 3, dtype=torch.float64))
        >>> found = energy_gap(K, range(5))
        >>> (
        ...     int(found.rank),
        ...     bool(found.misalignment >= 0),
        ...     bool(found.gap <= found.bound),
        ... )
        (5, True, True)
    """
    approximation = (
        inducing
        if isinstance(inducing, NystromOperator)
        else nystrom_ntk(kernel, inducing, num_inducing=num_inducing, generator=generator)
    )
    if not approximation.symmetric:
        raise InputError("the energy gap is of a square Nyström kernel, this one is between two sets")
    if approximation.shape != kernel.shape:
        raise ShapeError(f"the Nyström kernel is {tuple(approximation.shape)}, K {tuple(kernel.shape)}")
    with torch.no_grad():
        # K - Φ Π Φᵀ is positive semidefinite: its nuclear norm is its trace.
        total = capabilities(kernel).diagonal().double().sum(-1)
        captured = capabilities(approximation).diagonal().double().sum(-1)
        ranks = torch.as_tensor(approximation.rank)
        leading, converged = _leading_sums(kernel, ranks, generator)
    # The difference of two traces is known to their rounding, below which it has no sign.
    gap, tail = (total - captured).clamp(min=0), (total - leading).clamp(min=0)
    return EnergyGap(
        gap=gap,
        tail=torch.minimum(tail, gap),
        misalignment=(gap - tail).clamp(min=0),
        total=total,
        rank=ranks,
        bound=(total * gap).sqrt(),
        converged=converged,
    )


def _leading_pairs(kernel: LinearOperator, rank: int, generator: torch.Generator) -> RitzPairs:
    """Return the leading eigenvalues by Lanczos."""
    # Of residuals, relative to λmax; the error of an eigenvalue is at most its residual.
    tolerance = 1e-9 if kernel.dtype == torch.float64 else 2e-5
    width = min(8, kernel.shape[-1])

    def product(block: Tensor) -> Tensor:
        return multiply(kernel, block)

    solver = Lanczos(product, capabilities(kernel).space, generator, block_size=width)
    return solver.solve(rank, tolerance=tolerance, max_products=20 * rank + 500)


def _leading_sums(
    kernel: LinearOperator, ranks: torch.Tensor, generator: torch.Generator | None
) -> tuple[torch.Tensor, bool]:
    """Return the sums of as many leading eigenvalues as the ranks say."""
    batch, sums, converged = kernel.shape[:-2], [], True
    generator = torch.Generator().manual_seed(0) if generator is None else generator
    needed, allowed = kernel.shape[-1] ** 2 * kernel.dtype.itemsize, dense_bytes_allowed(kernel)
    # Kernels of classes share the passes of their samples: together where they fit, else one by one.
    whole = dense_by_tiles(kernel) if needed * batch.numel() <= allowed else None
    for number in range(batch.numel()):
        place = batch_position(number, batch)
        member, rank = (kernel[place] if batch else kernel), int(ranks[place])
        if needed <= allowed:
            dense = dense_by_tiles(member) if whole is None else whole[place]
            values = torch.linalg.eigvalsh(dense.double()).flip(0)[:rank]
        else:
            pairs = _leading_pairs(member, rank, generator)
            values, converged = pairs.values, converged and pairs.converged
        sums.append(values.sum())
    return torch.stack(sums).reshape(batch), converged
