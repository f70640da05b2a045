"""Estimators from products with K, Hutchinson's and Hutch++, and Hutch++ from the factors of K."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..errors import InputError, UnsupportedOperationError
from ..vectors import Distribution, Space
from ._quantities import Inner, Quantity, Trace
from ._request import Operand, factors_of
from ._statistics import Mean

__all__ = [
    "NtkAware",
    "TwoSided",
    "by_parts",
    "column_dots",
    "draw_probes",
    "extend_basis",
    "project_out",
    "sphere_factor",
]

_WIDTH = 64  # columns multiplied at a time


class TwoSided:
    r"""Moments of operators from products with shared probes.

    Hutchinson: :math:`\mathrm{tr}\,A = E[v^\top A v]`. Hutch++ (paper, Algorithm 1) splits the space by an
    orthonormal Q that does not depend on the probes,

    .. math:: \mathrm{tr}\,A = \mathrm{tr}(Q^\top A Q) + \mathrm{tr}((I - QQ^\top) A (I - QQ^\top)),

    takes the first term exactly and the second by Hutchinson. That holds for any A and any such Q, so one Q
    and one set of probes serve every moment: A = K for the trace, K₁ᵀK₂ for inner products, for which
    :math:`v^\top K_1^\top K_2 v = (K_1 v)^\top (K_2 v)` takes one product with each operator and not two. Q
    spans the products of all operators with one random sketch. All products are kept, so that growing
    repeats none: the sketch is widened, and old probes are projected on from the products that exist.
    """

    name = "hutch++"
    one_sided = False

    def __init__(
        self, quantity: Quantity, operands: Sequence[Operand], generator: torch.Generator, *, sketched: bool
    ) -> None:
        self._quantity, self._operands, self._generator = quantity, operands, generator
        self._space: Space = operands[0].columns
        self._batch = operands[0].batch_shape
        self._sketched = sketched
        # A square operator that is not symmetric has its trace in its range, its norm in that of Kᵀ.
        self._transposed = [
            not (op.capabilities.symmetric or (op.is_square and quantity.needs_square)) for op in operands
        ]
        self._width = 0
        self._basis = self._empty(self._space.length)
        self._fixed = torch.zeros((len(quantity.moments), *self._batch), dtype=torch.float64)
        self._probes = self._empty(self._space.length)
        self._products = [self._empty(length) for length in self._lengths()]

    @property
    def unit(self) -> int:
        """Passes of one column through every operator."""
        return sum(operand.cost for operand in self._operands)

    @property
    def least(self) -> int:
        """Fewest columns."""
        # one column of the sketch, which is one of Q for each operator, and as many residual probes as those
        return 1 + 2 * len(self._operands) if self._sketched else 1

    @property
    def order(self) -> float:
        """Power of the number of columns with which the variance falls, for planning."""
        return 2.0 if self._sketched else 1.0

    def _lengths(self) -> list[int]:
        """Return the lengths of the products of each operator."""
        return [operand.shape[-2] for operand in self._operands]

    def _split(self, columns: int) -> tuple[int, int]:
        """Return how wide the sketch is and how many residual probes there are.

        With one operator a third goes into the sketch, a third into the products with Q, the rest into
        residual probes; with two, each sketch column gives two columns of Q.
        """
        if not self._sketched:
            return 0, columns
        # No more columns of Q than dimensions: then the residual is empty and the first term exact.
        width = min(columns // self.least, self._space.size // len(self._operands))
        return width, columns - width - width * len(self._operands)

    def grow(self, columns: int) -> None:
        """Go on to so many columns for each operator in all."""
        if columns < self.least:
            raise InputError(
                f"{self.name} needs at least {self.least} product columns for {self._quantity.name}, that is "
                f"num_passes={self.least * self.unit}; {columns} can be paid for"
            )
        width, count = self._split(columns)
        if width > self._width:
            self._widen(width)
        if count > self._probes.shape[-1]:
            self._draw(count - self._probes.shape[-1])

    def _widen(self, width: int) -> None:
        fresh = self._sketch(width - self._width)
        self._width = width
        basis = extend_basis(self._space, self._basis, fresh)
        if not basis.shape[-1]:
            return
        products = [self._multiply(operand, basis) for operand in self._operands]
        self._fixed = self._fixed + self._terms(basis, products).sum(-1)
        if self._probes.shape[-1]:  # K (I - QQᵀ) v from K v and K Q, with no new product
            coefficients = self._space.inner(basis, self._probes).to(basis.dtype)
            # Kept probes are projected on, not drawn again: v - Q (Qᵀ v) is uniform on the smaller sphere
            # once its length is set, and K of it is K v - (K Q) (Qᵀ v).
            projected = self._probes - basis @ coefficients
            rank = self._basis.shape[-1] + basis.shape[-1]
            factor = sphere_factor(self._space, projected, self._space.size - rank)
            self._probes = projected * factor
            self._products = [
                (old - new @ coefficients) * factor for old, new in zip(self._products, products, strict=True)
            ]
        self._basis = torch.cat([self._basis, basis], dim=-1)

    def _sketch(self, width: int) -> Tensor:
        parts, drawn = [], {}
        for operand, transposed in zip(self._operands, self._transposed, strict=True):
            if transposed not in drawn:  # operators of one kind share the sketch
                space = operand.rows if transposed else self._space
                drawn[transposed] = self._draw_from(space, width)
            parts.append(operand.pull(drawn[True]) if transposed else self._multiply(operand, drawn[False]))
        return torch.cat(parts, dim=-1)

    def _draw_from(self, space: Space, count: int) -> Tensor:
        return draw_probes(space, self._batch, count, self._generator)

    def _draw(self, count: int) -> None:
        probes = project_out(self._space, self._basis, self._draw_from(self._space, count))
        probes = probes * sphere_factor(self._space, probes, self._space.size - self._basis.shape[-1])
        products = [self._multiply(operand, probes) for operand in self._operands]
        self._probes = torch.cat([self._probes, probes], dim=-1)
        self._products = [torch.cat(pair, dim=-1) for pair in zip(self._products, products, strict=True)]

    def moments(self) -> list[Mean]:
        """Return the moments as they stand."""
        terms = self._terms(self._probes, self._products)
        return [
            Mean(samples, fixed, variances=self._variances(moment, samples))
            for moment, samples, fixed in zip(self._quantity.moments, terms, self._fixed, strict=True)
        ]

    def _variances(self, moment: Trace | Inner, samples: Tensor) -> Tensor | None:
        """Return the variance of each residual sample of a trace, from (I - QQᵀ) K v; else None."""
        if isinstance(moment, Inner):
            return None
        images = self._products[moment.of]
        rest = images - self._basis @ self._space.inner(self._basis, images).to(images)
        count = max(self._space.size - self._basis.shape[-1], 1)
        # |A v|² - (vᵀ A v)² / d, as the length of what is left: the difference itself would cancel near c I.
        rest = rest - self._probes * (samples / count).unsqueeze(-2).to(rest)
        return 2 * self._space.sum_squares(rest).cpu()

    def _terms(self, probes: Tensor, products: Sequence[Tensor]) -> Tensor:
        """Return what each column adds to each moment, ``(q, *batch, k)``, float64, on the CPU."""
        parts = []
        for moment in self._quantity.moments:
            if isinstance(moment, Inner):
                left, right, space = products[moment.first], products[moment.second], self._operands[0].rows
            else:
                left, right, space = probes, products[moment.of], self._space
            parts.append(column_dots(space, left, right))
        return torch.stack(parts).cpu()

    def _multiply(self, operand: Operand, block: Tensor) -> Tensor:
        return by_parts(operand.multiply, block)

    def _empty(self, length: int) -> Tensor:
        first = self._operands[0]
        return torch.empty((*first.batch_shape, length, 0), dtype=first.dtype, device=first.device)


def by_parts(apply: Callable[[Tensor], Tensor], block: Tensor) -> Tensor:
    """Return the image of a block, some columns at a time."""
    parts = [apply(part) for part in block.split(_WIDTH, dim=-1)]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)


def draw_probes(
    space: Space,
    batch: torch.Size,
    count: int,
    generator: torch.Generator,
    distribution: Distribution = "sphere",
) -> Tensor:
    """Draw independent probes for every batch entry, ``(*batch, n, count)``, by default on the sphere."""
    # Signs would do for the variance, but their samples can agree by chance: of v₁v₂ they are ±1. Uniform
    # directions make the error depend on the spectrum alone, and the hardest spectrum is known.
    wide = space.probes(count * batch.numel(), generator, distribution)
    return wide.unflatten(-1, (*batch, count)).movedim(0, -2) if batch else wide


def sphere_factor(space: Space, probes: Tensor, dimension: int) -> Tensor:
    """Return what brings projected probes back to the sphere of radius √dimension, ``(*batch, 1, k)``.

    Its direction is all that matters of a projected probe: the length is noise, and would be counted.
    """
    squares = space.sum_squares(probes)
    factor = torch.where(squares > 0, max(dimension, 0) / squares, 0.0).sqrt()
    return factor.unsqueeze(-2).to(probes.dtype)


def column_dots(space: Space, left: Tensor, right: Tensor) -> Tensor:
    """Return the inner products of matching columns, ``(*batch, k)``."""
    return space.inner(left.mT.unsqueeze(-1), right.mT.unsqueeze(-1)).flatten(-3)


def project_out(space: Space, basis: Tensor, block: Tensor) -> Tensor:
    """Return the part of a block that is orthogonal to a basis; twice, as cancellation leaves a rest."""
    if basis.shape[-1]:
        for _ in range(2):
            block = block - basis @ space.inner(basis, block).to(block.dtype)
    return block


def extend_basis(space: Space, basis: Tensor, block: Tensor) -> Tensor:
    """Return orthonormal directions that a block adds to an orthonormal basis, ``(*batch, n, r)``."""
    fresh = project_out(space, basis, block)
    if block.dim() == 2:  # what is left of a dependent column is rounding
        kept = space.sum_squares(fresh).sqrt()
        cutoff = 1e2 * torch.finfo(block.dtype).eps * space.sum_squares(block).sqrt()
        fresh = fresh[:, kept > cutoff]
    if not basis.shape[-1] or not fresh.shape[-1]:
        return space.orthonormalize(fresh)
    return space.orthonormalize(project_out(space, basis, space.orthonormalize(fresh)))


# -- Hutch++ for K = J Jᵀ from its factors: a range from jvps alone, quadratic forms from vjps alone


class NtkAware(TwoSided):
    r"""Hutch++ with one pass where a product takes two.

    K and J have the same range, so that J p with random parameters p (one jvp) sketches it, if with less
    weight on large eigenvalues than K v has. The trace then takes quadratic forms alone,
    :math:`q^\top K q = |J^\top q|^2` (one vjp), on Q as on the residual probes. Norms and inner products need
    K q itself, two passes a column, and save only in the sketch.

    Raises:
        UnsupportedOperationError: If an operator is not symmetric, or does not know its factors.
    """

    name = "ntk-hutch++"

    def __init__(self, quantity: Quantity, operands: Sequence[Operand], generator: torch.Generator) -> None:
        self._factors = [factors_of(operand)[0] for operand in operands]
        if not all(operand.capabilities.symmetric for operand in operands):
            raise UnsupportedOperationError(
                "method='ntk-hutch++' needs a symmetric kernel J Jᵀ; use method='hutch++'"
            )
        # qᵀ K q = |Jᵀ q|² needs no K q; (K q)ᵀ (K q) does
        self._vjps_only = not quantity.needs_pairs
        super().__init__(quantity, operands, generator, sketched=True)

    @property
    def unit(self) -> int:
        """Passes of one column of Q or one residual probe through every operator."""
        return sum(factor.cost for factor in self._factors) * (1 if self._vjps_only else 2)

    def _lengths(self) -> list[int]:
        if self._vjps_only:
            return [factor.columns.length for factor in self._factors]
        return super()._lengths()

    def _split(self, columns: int) -> tuple[int, int]:
        """Return the widths; a sketch column costs one unit, or half of one beside products."""
        if self._vjps_only:
            return super()._split(columns)
        kernels = len(self._operands)
        # A column of the sketch is half a unit, one of Q or a probe a whole one, and as many probes as
        # columns of Q are wanted: width (1/2 + 2 kernels) = columns.
        width = min(2 * columns // (1 + 4 * kernels), self._space.size // kernels)
        return width, columns - -(-width // 2) - width * kernels

    def _sketch(self, width: int) -> Tensor:
        drawn: dict[int, Tensor] = {}
        parts = []
        for factor in self._factors:  # kernels over equally many parameters share the sketch
            space = factor.columns
            if space.size not in drawn:
                drawn[space.size] = draw_probes(space, self._batch, width, self._generator)
            parts.append(by_parts(factor.multiply, drawn[space.size]))
        return torch.cat(parts, dim=-1)

    def _multiply(self, operand: Operand, block: Tensor) -> Tensor:
        if not self._vjps_only:
            return super()._multiply(operand, block)
        return by_parts(self._factors[self._operands.index(operand)].pull, block)

    def _terms(self, probes: Tensor, products: Sequence[Tensor]) -> Tensor:
        if not self._vjps_only:
            return super()._terms(probes, products)
        spaces = [factor.columns for factor in self._factors]
        return torch.stack(
            [column_dots(space, image, image) for space, image in zip(spaces, products, strict=True)]
        ).cpu()

    def _variances(self, moment: Trace | Inner, samples: Tensor) -> Tensor | None:
        return None if self._vjps_only else super()._variances(moment, samples)  # K v is not made
