"""Preconditioners of K + D made from a factor of K, in the form that does not cancel.

With K ≈ U Λ Uᵀ of rank r and a ridge μ, Frangella, Tropp and Udell (2023, eq. 1.3) take

    M⁻¹ = U (λ_r + μ) (Λ + μ)⁻¹ Uᵀ + (I - U Uᵀ).

Woodbury's formula for the same matrix subtracts two numbers of the size of 1/μ and loses everything in
float32; here nothing is subtracted but a projection. The factor may come from anywhere.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..errors import InputError, ShapeError
from ..vectors import Space, resolve_generator
from ._columns import Product, require_finite
from .pivoted_cholesky import PivotedFactor

__all__ = ["FactorPreconditioner", "factor_preconditioner", "nystrom_factor", "nystrom_preconditioner"]


class FactorPreconditioner:
    """M⁻¹ for K + D, with K ≈ U Λ Uᵀ after scaling by D; see `factor_preconditioner`.

    Attributes:
        name: How the factor was made.
        rank: Number r of eigenpairs.
        products: Columns multiplied to make the factor.
        seed: Seed of what was drawn; None if nothing was.
        values: ``(*batch, r)`` eigenvalues Λ, largest first, float64.
    """

    def __init__(
        self,
        basis: Tensor,
        values: Tensor,
        weights: Tensor,
        scaling: Tensor | None,
        space: Space,
        *,
        name: str,
        products: int,
        seed: int | None,
    ) -> None:
        self._basis, self._weights, self._scaling, self._space = basis, weights, scaling, space
        self.values, self.name, self.products, self.seed = values, name, products, seed
        self.rank = values.shape[-1]

    def __call__(self, block: Tensor) -> Tensor:
        """Return M⁻¹ V, ``(*batch, n, k)``; cost 4 n r k flops, no product."""
        scaled = block if self._scaling is None else block * self._scaling
        inside = self._space.inner(self._basis, scaled)  # (*batch, r, k), float64
        scaled = scaled + self._basis @ ((self._weights - 1).unsqueeze(-1) * inside).to(block.dtype)
        return scaled if self._scaling is None else scaled * self._scaling

    def __repr__(self) -> str:
        """Show how it was made, and its rank."""
        return f"FactorPreconditioner({self.name!r}, rank={self.rank}, products={self.products})"


def factor_preconditioner(
    factor: Tensor | PivotedFactor,
    diagonal: float | Tensor,
    space: Space,
    *,
    name: str | None = None,
    products: int | None = None,
    seed: int | None = None,
) -> FactorPreconditioner:
    r"""Make a preconditioner of K + D from any factor K ≈ F Fᵀ.

    F is factorised once, :math:`F = U \Lambda^{1/2} W^\top`, in float64; the columns that are rounding are
    left out. With a diagonal D that is not constant, the same is done for :math:`D^{-1/2} K D^{-1/2} + I`.

    Args:
        factor: F, ``(*batch, n, r)``, or what `pivoted_cholesky` returns.
        diagonal: The ridge μ > 0, a number or ``(*batch, 1)``; or D, ``(*batch, n)``, with positive
            entries.
        space: The space of the columns.
        name: What to call it in `SolveInfo`; default "factor", or the method of a pivoted factor.
        products: Columns multiplied to make F.
        seed: Seed of what was drawn for F.

    Returns:
        The preconditioner. Cost: a thin singular value decomposition of F, O(n r²); memory: U, n × r.

    Raises:
        InputError: If an entry of the diagonal is not positive.
        ShapeError: If factor or diagonal do not fit the space.
        NonFiniteError: If the factor is not finite.

    References:
        Frangella, Tropp, Udell (2023), Randomized Nyström preconditioning, eq. 1.3.

    Example:
        >>> import torch
        >>> from ntkops.solvers import factor_preconditioner
        >>> from ntkops.vectors import Space
        >>> F = torch.tensor([[2.0], [0.0]], dtype=torch.float64)
        >>> M = factor_preconditioner(F, 1.0, Space(2, torch.float64))
        >>> M(torch.ones(2, 1, dtype=torch.float64)).flatten().tolist()  # λ_r + μ = λ + μ = 5
        [1.0, 1.0]
    """
    if isinstance(factor, PivotedFactor):
        name, seed = name or factor.method, factor.seed if seed is None else seed
        products, factor = factor.products if products is None else products, factor.factor
    if factor.dim() < 2 or factor.shape[-2] != space.size:
        raise ShapeError(f"the factor needs shape (..., {space.size}, r), got {tuple(factor.shape)}")
    require_finite(factor, space, "the factor")
    entries = _checked_diagonal(diagonal, factor, space)
    scaling = None if entries.shape[-1] == 1 and space.size > 1 else entries.rsqrt().unsqueeze(-1)
    ridge = entries if scaling is None else torch.ones_like(entries[..., :1])
    scaled = factor.double() if scaling is None else factor.double() * scaling
    basis, values = _eigenpairs(scaled, factor.dtype, space)
    smallest = values[..., -1:] if values.shape[-1] else torch.zeros_like(ridge)
    weights = (smallest + ridge) / (values + ridge)
    return FactorPreconditioner(
        basis,
        values,
        weights,
        None if scaling is None else scaling.to(factor.dtype),
        space,
        name=name or "factor",
        products=products or 0,
        seed=seed,
    )


def _checked_diagonal(diagonal: float | Tensor, factor: Tensor, space: Space) -> Tensor:
    entries = torch.as_tensor(diagonal, dtype=torch.float64, device=factor.device)
    entries = entries.unsqueeze(-1) if entries.dim() == 0 else entries
    if entries.shape[-1] not in (1, space.size):
        raise ShapeError(f"the diagonal needs 1 or {space.size} entries, got {tuple(entries.shape)}")
    if space.any(not bool((entries > 0).all())):
        raise InputError(
            f"the smallest entry of the diagonal is {float(entries.min()):.3g}: a preconditioner needs a "
            "positive ridge"
        )
    return entries


def _eigenpairs(factor: Tensor, dtype: torch.dtype, space: Space) -> tuple[Tensor, Tensor]:
    """Return U and Λ with F Fᵀ = U Λ Uᵀ, largest first."""
    basis = space.orthonormalize(factor)  # (*batch, n, r)
    triangle = space.inner(basis, factor)  # (*batch, r, r'), float64
    rotation, singular, _ = torch.linalg.svd(triangle, full_matrices=False)
    return (basis @ rotation).to(dtype), singular.square()


def nystrom_factor(
    multiply: Product,
    space: Space,
    rank: int,
    *,
    batch_shape: torch.Size | tuple[int, ...] = (),
    generator: torch.Generator | None = None,
) -> tuple[Tensor, int]:
    r"""Return a randomised Nyström factor F, K ≈ F Fᵀ, from one block of products with K.

    With orthonormal random columns Ω and Y = K Ω, it is :math:`F F^\top = Y (Ω^\top Y)^+ Y^\top`, made
    stable by a shift of the size of rounding that is taken off again.

    Args:
        multiply: ``(*batch, n, r) -> (*batch, n, r)``, the product with positive semidefinite K, without
            the ridge.
        space: The space of the columns.
        rank: Number r of columns, at most n.
        batch_shape: Batch of K. All members share Ω.
        generator: CPU generator of Ω; None draws a seed.

    Returns:
        F, ``(*batch, n, r)``, with fewer columns where K has a smaller rank; and the seed. Cost: r
        product columns in one block, O(n r²) flops.

    Raises:
        InputError: If the rank is out of range.
        NonFiniteError: If a product is not finite.

    References:
        Tropp, Yurtsever, Udell, Cevher (2017), Algorithm 3; Frangella, Tropp, Udell (2023), Algorithm 2.1.

    Example:
        >>> import torch
        >>> from ntkops.solvers import nystrom_factor
        >>> from ntkops.vectors import Space
        >>> K = torch.diag(torch.tensor([4.0, 1.0, 0.0], dtype=torch.float64))
        >>> space, generator = Space(3, torch.float64), torch.Generator().manual_seed(0)
        >>> F, seed = nystrom_factor(lambda V: K @ V, space, 2, generator=generator)
        >>> bool(torch.allclose(F @ F.mT, K, atol=1e-7)), seed
        (True, 0)
    """
    check_rank(rank, space)
    generator, seed = resolve_generator(generator)
    with torch.no_grad():
        sketch = space.orthonormalize(space.probes(rank, generator, "gaussian"))  # (n, r)
        sketch = sketch.expand(*batch_shape, *sketch.shape)
        image = require_finite(multiply(sketch), space, "a product of the operator")
        scale = space.sum_squares(image).sum(-1).sqrt()[..., None, None]  # |Y|_F, (*batch, 1, 1)
        scale = torch.where(scale > 0, scale, torch.ones_like(scale))
        shift = torch.finfo(image.dtype).eps
        shifted = image.double() / scale + shift * sketch.double()
        core = space.inner(sketch, shifted)  # (*batch, r, r)
        values, vectors = torch.linalg.eigh((core + core.mT) / 2)
        floor = shift * values[..., -1:].clamp(min=shift)
        inverse = torch.where(values > floor, values.clamp(min=floor).rsqrt(), torch.zeros_like(values))
        root = shifted @ (vectors * inverse.unsqueeze(-2))  # (*batch, n, r)
        basis, found = _eigenpairs(root, torch.float64, space)
        kept = torch.where(found > 4 * shift, found - shift, torch.zeros_like(found))  # the rest is the shift
        factor = basis * (kept.sqrt().unsqueeze(-2) * scale.sqrt())
        if not batch_shape:
            factor = factor[..., kept > 0]
        return factor.to(image.dtype), seed


def nystrom_preconditioner(
    multiply: Product,
    diagonal: float | Tensor,
    space: Space,
    rank: int,
    *,
    batch_shape: torch.Size | tuple[int, ...] = (),
    generator: torch.Generator | None = None,
) -> FactorPreconditioner:
    """Make the randomised Nyström preconditioner of K + D from one block of products with K.

    Args:
        multiply: ``(*batch, n, r) -> (*batch, n, r)``, the product with K, without the ridge.
        diagonal: The ridge μ > 0, or D; see `factor_preconditioner`.
        space: The space of the columns.
        rank: Number r of columns, at most n. Past the effective dimension tr K (K + μ)⁻¹ the condition
            number is bounded by a constant.
        batch_shape: Batch of K.
        generator: CPU generator of the sketch; None draws a seed.

    Returns:
        The preconditioner. Cost: r product columns in one block; memory: n × r.

    Raises:
        InputError: If rank or diagonal are out of range.
        ShapeError: If the diagonal does not fit.
        NonFiniteError: If a product is not finite.

    References:
        Frangella, Tropp, Udell (2023), Randomized Nyström preconditioning.

    Example:
        >>> import torch
        >>> from ntkops.solvers import conjugate_gradient, nystrom_preconditioner
        >>> from ntkops.vectors import Space
        >>> K, space = torch.diag(torch.arange(8.0).double() ** 4), Space(8, torch.float64)
        >>> seeded = torch.Generator().manual_seed(0)
        >>> M = nystrom_preconditioner(lambda V: K @ V, 1.0, space, 7, generator=seeded)
        >>> b = torch.ones(8, dtype=torch.float64)
        >>> conjugate_gradient(lambda V: K @ V + V, b, space, preconditioner=M).info.iterations < 5
        True
    """
    factor, seed = nystrom_factor(multiply, space, rank, batch_shape=batch_shape, generator=generator)
    products = rank * torch.Size(batch_shape).numel()
    return factor_preconditioner(factor, diagonal, space, name="nystrom", products=products, seed=seed)


def check_rank(rank: Any, space: Space) -> None:
    """Check the rank of an approximation.

    Raises:
        InputError: If it is not an integer from 1 to n.
    """
    if not isinstance(rank, int) or isinstance(rank, bool) or not 1 <= rank <= space.size:
        raise InputError(f"rank={rank!r}: pass an integer from 1 to the number {space.size} of rows")
