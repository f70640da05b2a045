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

from ..arguments import checked
from ..errors import InputError, ShapeError
from ..vectors import Space, resolve_generator
from ._outcome import Product, require_finite
from .pivoted_cholesky import PivotedFactor

__all__ = ["FactorPreconditioner", "factor_preconditioner", "nystrom_factor", "nystrom_preconditioner"]

_TINY = torch.finfo(torch.float64).tiny


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
        ridge: Tensor,
        scaling: Tensor | None,
        space: Space,
        *,
        sketch: Tensor | None = None,
        name: str,
        products: int,
        seed: int | None,
    ) -> None:
        self._basis, self._scaling, self._space = basis, scaling, space
        self.values, self.name, self.products, self.seed = values, name, products, seed
        self.rank = values.shape[-1]
        # U (λ_r + μ) (Λ + μ)⁻¹ Uᵀ + I - U Uᵀ = I + U w Uᵀ with w = (λ_r + μ) / (Λ + μ) - 1 in (-1, 0].
        smallest = values[..., -1:] if self.rank else torch.zeros_like(ridge)
        self._weights = ((smallest + ridge) / (values + ridge) - 1).unsqueeze(-1)  # (*batch, r, 1)
        self._known = None
        if sketch is not None and self.rank:
            self._known = _KnownSpace(sketch, basis, values, ridge, smallest + ridge, space)

    def __call__(self, block: Tensor) -> Tensor:
        """Return M⁻¹ V, ``(*batch, n, k)``; cost 4 n r k flops, four times that with a sketch; no product."""
        scaled = block if self._scaling is None else block * self._scaling
        scaled = self._smooth(scaled) if self._known is None else self._known.balance(scaled, self._smooth)
        return scaled if self._scaling is None else scaled * self._scaling

    def _smooth(self, block: Tensor) -> Tensor:
        inside = self._space.inner(self._basis, block)  # (*batch, r, k), float64
        return block + self._basis @ (self._weights * inside).to(block.dtype)

    def __repr__(self) -> str:
        """Show how it was made, and its rank."""
        return f"FactorPreconditioner({self.name!r}, rank={self.rank}, products={self.products})"


class _KnownSpace:
    """The span of columns W whose products with A = K + μ are known, on which A is inverted exactly.

    There K W = U Λ Uᵀ W, which makes E = Wᵀ A W positive definite in any rounding.
    """

    def __init__(
        self, sketch: Tensor, basis: Tensor, values: Tensor, ridge: Tensor, level: Tensor, space: Space
    ) -> None:
        self._sketch, self._basis, self._space = sketch, basis, space
        self._ridge, self._level = ridge.unsqueeze(-1), level.unsqueeze(-1)
        self._weighted = values.unsqueeze(-1) * space.inner(basis, sketch)  # Λ Uᵀ W, (*batch, r, s)
        # E = Wᵀ (K + μ) W = (Λ Uᵀ W)ᵀ Λ⁻¹ (Λ Uᵀ W) + μ Wᵀ W: a sum of two squares, where Wᵀ (K W) would be
        # symmetric up to rounding alone.
        core = space.inner(sketch, sketch) * self._ridge
        core = core + (self._weighted.mT / values.clamp(min=_TINY).unsqueeze(-2)) @ self._weighted
        self._core = torch.linalg.cholesky((core + core.mT) / 2)

    def balance(self, block: Tensor, smooth: Product) -> Tensor:
        """Return (Pᵀ S P + (λ_r + μ) W E⁻¹ Wᵀ) V with P = I - A W E⁻¹ Wᵀ and the smoother S."""
        inside = torch.cholesky_solve(self._space.inner(self._sketch, block), self._core)
        image = self._basis @ (self._weighted @ inside).to(block.dtype)
        image = image + self._sketch @ (self._ridge * inside).to(block.dtype)  # A W E⁻¹ Wᵀ V
        smoothed = smooth(block - image)
        back = self._weighted.mT @ self._space.inner(self._basis, smoothed)
        back = back + self._ridge * self._space.inner(self._sketch, smoothed)  # (A W)ᵀ S P V
        inside = self._level * inside - torch.cholesky_solve(back, self._core)
        return smoothed + self._sketch @ inside.to(block.dtype)


@checked
def factor_preconditioner(
    factor: Tensor | PivotedFactor,
    diagonal: float | Tensor,
    space: Space,
    *,
    sketch: Tensor | None = None,
    name: str | None = None,
    products: int | None = None,
    seed: int | None = None,
) -> FactorPreconditioner:
    r"""Make a preconditioner of K + D from any factor K ≈ F Fᵀ.

    F is factorised once, :math:`F = U \Lambda^{1/2} V^\top`, in float64; the columns that are rounding are
    left out. With a diagonal D that is not constant, the same is done for :math:`D^{-1/2} K D^{-1/2} + I`.

    A factor from products with K knows more than its eigenpairs: columns Ω with K Ω = F Fᵀ Ω. Given these,
    A = K + D is inverted exactly on their span, and the form above, S, acts on the rest (balancing):

    .. math:: M^{-1} = P^\top S P + (\lambda_r + \mu)\, \Omega E^{-1} \Omega^\top, \quad
              E = \Omega^\top A \Omega, \quad P = I - A \Omega E^{-1} \Omega^\top

    It takes no further product with K, and saves some of those that conjugate gradients need where the
    spectrum decays slowly: about a tenth on kernels of digits.

    Args:
        factor: F, ``(*batch, n, r)``, or what `pivoted_cholesky` returns.
        diagonal: The ridge μ > 0, a number or ``(*batch, 1)``; or D, ``(*batch, n)``, with positive
            entries.
        space: The space of the columns.
        sketch: Ω, ``(*batch, n, s)``, linearly independent columns with K Ω = F Fᵀ Ω: the test matrix of a
            Nyström factor. A pivoted factor brings its own, the unit vectors of its pivots.
        name: What to call it in `SolveInfo`; default "factor", or the method of a pivoted factor.
        products: Columns multiplied to make F.
        seed: Seed of what was drawn for F.

    Returns:
        The preconditioner. Cost: a thin singular value decomposition of F, O(n r²); memory: U, n × r,
        and Ω.

    Raises:
        InputError: If an entry of the diagonal is not positive.
        ShapeError: If factor, sketch or diagonal do not fit the space.
        NonFiniteError: If the factor is not finite.

    References:
        Frangella, Tropp, Udell (2023), Randomized Nyström preconditioning, eq. 1.3; Tang, Nabben, Vuik,
        Erlangga (2009), Comparison of two-level preconditioners, section 2 (BNN).

    Example:
        >>> import torch
        >>> from ntkops.solvers import factor_preconditioner
        >>> from ntkops.vectors import Space
        >>> F = torch.tensor([[2.0], [0.0]], dtype=torch.float64)
        >>> M = factor_preconditioner(F, 1.0, Space(2, torch.float64))
        >>> M(
        ...     torch.ones(2, 1, dtype=torch.float64)
        ... ).flatten().tolist()  # λ_r + μ = λ + μ = 5
        [1.0, 1.0]
    """
    if products is not None and products < 0:
        raise InputError(f"products={products!r}: pass the number of products that the factor took")
    if isinstance(factor, PivotedFactor):
        name, seed = name or factor.method, factor.seed if seed is None else seed
        products = factor.products if products is None else products
        sketch = _unit_vectors(factor) if sketch is None else sketch
        factor = factor.factor
    if factor.dim() < 2 or factor.shape[-2] != space.length:
        raise ShapeError(f"the factor needs shape (..., {space.length}, r), got {tuple(factor.shape)}")
    require_finite(factor, space, "the factor")
    entries = _checked_diagonal(diagonal, factor, space)
    whole = entries.shape[-1] != 1 or space.size == 1
    scaling = entries.rsqrt().unsqueeze(-1) if space.any(whole) else None
    ridge = entries if scaling is None else entries.new_ones((*entries.shape[:-1], 1))
    scaled = factor.double() if scaling is None else factor.double() * scaling
    basis, values = _eigenpairs(scaled, factor.dtype, space)
    if sketch is not None:
        sketch = _known_columns(sketch, scaling, factor.dtype, space)
    return FactorPreconditioner(
        basis,
        values,
        ridge,
        None if scaling is None else scaling.to(factor.dtype),
        space,
        sketch=sketch,
        name=name or "factor",
        products=products or 0,
        seed=seed,
    )


def _unit_vectors(factor: PivotedFactor) -> Tensor:
    """Return the unit vectors of the pivots: K - F Fᵀ is zero in their columns."""
    known = factor.factor
    unit = torch.zeros((known.shape[-2], factor.rank), dtype=known.dtype, device=known.device)
    unit[factor.pivots, torch.arange(factor.rank, device=known.device)] = 1
    return unit


def _known_columns(sketch: Tensor, scaling: Tensor | None, dtype: torch.dtype, space: Space) -> Tensor:
    """Return an orthonormal basis of the span of D^{1/2} Ω, ``(*batch, n, s)``."""
    if sketch.dim() < 2 or sketch.shape[-2] != space.length:
        raise ShapeError(f"the sketch needs shape (..., {space.length}, s), got {tuple(sketch.shape)}")
    columns = require_finite(sketch, space, "the sketch").double()
    return space.orthonormalize(columns if scaling is None else columns / scaling).to(dtype)


def _checked_diagonal(diagonal: float | Tensor, factor: Tensor, space: Space) -> Tensor:
    entries = torch.as_tensor(diagonal, dtype=torch.float64, device=factor.device)
    entries = entries.unsqueeze(-1) if entries.dim() == 0 else entries
    if entries.shape[-1] not in (1, space.length):
        raise ShapeError(f"the diagonal needs 1 or {space.length} entries, got {tuple(entries.shape)}")
    if space.any(not bool(((entries > 0) & entries.isfinite()).all())):
        raise InputError(
            f"the smallest entry of the diagonal is {float(entries.min()):.3g}: a preconditioner needs a "
            "positive, finite ridge"
        )
    return entries


def _eigenpairs(factor: Tensor, dtype: torch.dtype, space: Space) -> tuple[Tensor, Tensor]:
    """Return U and Λ with F Fᵀ = U Λ Uᵀ, largest first."""
    # F = Q T = Q (U' S V'ᵀ): eigenvectors Q U' and eigenvalues S² without F Fᵀ, whose condition number is
    # squared
    basis = space.orthonormalize(factor)  # (*batch, n, r)
    triangle = space.inner(basis, factor)  # (*batch, r, r'), float64
    rotation, singular, _ = torch.linalg.svd(triangle, full_matrices=False)
    return (basis @ rotation).to(dtype), singular.square()


@checked
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
    factor, _, seed = _nystrom(multiply, space, rank, batch_shape, generator)
    return factor, seed


def _nystrom(
    multiply: Product,
    space: Space,
    rank: int,
    batch_shape: torch.Size | tuple[int, ...],
    generator: torch.Generator | None,
) -> tuple[Tensor, Tensor, int]:
    """Return F, Ω and the seed of a Nyström factor."""
    check_rank(rank, space)
    generator, seed = resolve_generator(generator)
    with torch.no_grad():
        sketch = space.orthonormalize(space.probes(rank, generator, "gaussian"))  # (n, r)
        sketch = sketch.expand(*batch_shape, *sketch.shape)
        image = require_finite(multiply(sketch), space, "a product of the operator")
        scale = space.sum_squares(image).sum(-1).sqrt()[..., None, None]  # |Y|_F, (*batch, 1, 1)
        scale = torch.where(scale > 0, scale, torch.ones_like(scale))
        # K + ν has no eigenvalue below ν, so that the core can be inverted in this rounding; ν is taken off
        # the eigenvalues of F Fᵀ again (Tropp et al. 2017, Algorithm 3).
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
        return factor.to(image.dtype), sketch, seed


@checked
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
        >>> K, space = (
        ...     torch.diag(torch.arange(8.0).double() ** 4),
        ...     Space(8, torch.float64),
        ... )
        >>> seeded = torch.Generator().manual_seed(0)
        >>> M = nystrom_preconditioner(lambda V: K @ V, 1.0, space, 7, generator=seeded)
        >>> b = torch.ones(8, dtype=torch.float64)
        >>> conjugate_gradient(
        ...     lambda V: K @ V + V, b, space, preconditioner=M
        ... ).info.iterations < 5
        True
    """
    factor, sketch, seed = _nystrom(multiply, space, rank, batch_shape, generator)
    products = rank * torch.Size(batch_shape).numel()
    return factor_preconditioner(
        factor, diagonal, space, sketch=sketch, name="nystrom", products=products, seed=seed
    )


def check_rank(rank: Any, space: Space) -> None:
    """Check the rank of an approximation.

    Raises:
        InputError: If it is not an integer from 1 to n.
    """
    if not isinstance(rank, int) or isinstance(rank, bool) or not 1 <= rank <= space.size:
        raise InputError(f"rank={rank!r}: pass an integer from 1 to the number {space.size} of rows")
