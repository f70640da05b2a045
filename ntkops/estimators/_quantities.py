"""What can be estimated: each quantity as a function of traces and inner products of its operators."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import ZeroKernelError
from ..operators.capabilities import paired_tiles, tile_count
from ._exact import ExactWork, Terms
from ._request import Operand, require_finite
from ._statistics import Combination

__all__ = [
    # quantities
    "ALIGNMENT",
    "EFFECTIVE_RANK",
    "FROBENIUS_NORM",
    "INNER",
    "TRACE",
    # what they are made of
    "Inner",
    "Quantity",
    "Trace",
    # exact values
    "exact_cost",
    "exact_moments",
]


@dataclass(frozen=True)
class Trace:
    """tr K of an operator, by its position."""

    of: int = 0


@dataclass(frozen=True)
class Inner:
    """tr(K₁ᵀ K₂) of two operators, by their positions."""

    first: int
    second: int


@dataclass(frozen=True)
class Quantity:
    """A function of moments.

    Attributes:
        name: How messages call it.
        moments: What it is made of.
        combine: ``(..., q) -> (...)``.
        divisors: Positions of moments that must not vanish.
        bounds: Least and greatest value, which also bound the interval.
        free: The function without its bounds, if it has them: what is cut off does not vary, and would seem
            to have no error.
        spectral: Whether zero eigenvalues do not change it, so that L Lᵀ may be looked at as LᵀL.
    """

    name: str
    moments: tuple[Trace | Inner, ...]
    combine: Combination
    divisors: tuple[int, ...] = ()
    bounds: tuple[float, float] = (-torch.inf, torch.inf)
    free: Combination | None = None
    spectral: bool = False

    @property
    def needs_square(self) -> bool:
        """Whether a trace is among the moments."""
        return any(isinstance(moment, Trace) for moment in self.moments)

    @property
    def needs_pairs(self) -> bool:
        """Whether an inner product is among the moments."""
        return any(isinstance(moment, Inner) for moment in self.moments)

    def require_defined(self, moments: Tensor) -> None:
        """Raise where a divisor vanishes."""
        for position in self.divisors:
            zero = moments[..., position] <= 0
            if bool(zero.any()):
                where = f" (batch entry {zero.nonzero()[0].tolist()})" if zero.dim() else ""
                raise ZeroKernelError(
                    f"{self.name} is undefined: kernel {position if len(self.divisors) > 1 else 1} is zero"
                    f"{where}; does the output depend on the selected parameters?"
                )


def _first(moments: Tensor) -> Tensor:
    return moments[..., 0]


def _root(moments: Tensor) -> Tensor:
    return moments[..., 0].clamp(min=0).sqrt()


def _cosine(moments: Tensor) -> Tensor:
    return _free_cosine(moments).clamp(-1, 1)


def _free_cosine(moments: Tensor) -> Tensor:
    norms = moments[..., 1].clamp(min=0).sqrt() * moments[..., 2].clamp(min=0).sqrt()
    return moments[..., 0] / norms


def _participation(moments: Tensor) -> Tensor:
    # t (t / f) and not t² / f: the square of a trace leaves the range of float64 long before the ratio does.
    return moments[..., 0] * (moments[..., 0] / moments[..., 1])


TRACE = Quantity("the trace", (Trace(),), _first)
INNER = Quantity("the inner product", (Inner(0, 1),), _first)
FROBENIUS_NORM = Quantity("the Frobenius norm", (Inner(0, 0),), _root, bounds=(0.0, torch.inf), spectral=True)
ALIGNMENT = Quantity(
    "the alignment",
    (Inner(0, 1), Inner(0, 0), Inner(1, 1)),
    _cosine,
    divisors=(1, 2),
    bounds=(-1.0, 1.0),
    free=_free_cosine,
)
EFFECTIVE_RANK = Quantity(
    "the effective rank",
    (Trace(), Inner(0, 0)),
    _participation,
    divisors=(1,),
    bounds=(0.0, torch.inf),
    spectral=True,
)


def exact_cost(quantity: Quantity, operands: Sequence[Operand]) -> float:
    """Return the passes that the exact moments take."""
    # tr K needs the diagonal alone; |K|² = Σ K_ij² needs every entry once.
    what = "tiles" if quantity.needs_pairs else "diagonal"
    return float(sum(operand.capabilities.exact_cost(what) for operand in operands))


def exact_moments(quantity: Quantity, operands: Sequence[Operand], work: ExactWork | None = None) -> Tensor:
    """Return the moments ``(*batch, q)``, summed in float64 over the diagonal, or tile by tile."""
    work = work or ExactWork(quantity.name)
    first = operands[0]
    # (*batch, q); float64, as millions of squares are added
    zero = torch.zeros((*first.batch_shape, len(quantity.moments)), dtype=torch.float64, device=first.device)
    terms = _tile_terms(quantity) if quantity.needs_pairs else _DIAGONAL_TERMS
    sums = work.add_up(operands, zero, terms)
    return require_finite(first.rows.total(sums), quantity.name)  # over all processes that share the rows


def _diagonal_step(operands: Sequence[Operand]) -> int:
    return operands[0].capabilities.diagonal_step()


def _rows(operands: Sequence[Operand], size: int) -> int:
    return operands[0].shape[-2]


def _sums_of_diagonal(operands: Sequence[Operand], size: int, done: int) -> Generator[tuple[int, Tensor]]:
    """Yield the sums over parts of the rows, of those that this process holds."""
    if operands[0].rows.is_spread:  # other processes have other numbers of rows
        if not done:
            yield 1, operands[0].capabilities.diagonal().double().sum(-1, keepdim=True)
        return
    for rows, part in operands[0].capabilities.diagonal_parts(size, done):
        yield rows.stop, part.double().sum(-1, keepdim=True)


_DIAGONAL_TERMS = Terms("row", _diagonal_step, _rows, _sums_of_diagonal)


def _tile_terms(quantity: Quantity) -> Terms:
    """Return the sums over single tiles as terms."""

    def size(operands: Sequence[Operand]) -> int:
        return min(operand.capabilities.tile_size() for operand in operands)

    def count(operands: Sequence[Operand], size: int) -> int | None:
        first = operands[0]
        if first.rows.length != first.rows.size:  # other processes have tiles, too
            return None
        return tile_count(first.capabilities, operands[-1].capabilities, size)

    def after(operands: Sequence[Operand], size: int, done: int) -> Generator[tuple[int, Tensor]]:
        for blocks, on_diagonal, mirrored in _tiles(operands, size, done):
            done += 1
            # A tile above the diagonal of a symmetric kernel stands for its mirror image, too; it has no part
            # of a trace, whose zero may be doubled.
            yield done, _tile_sums(quantity, blocks, on_diagonal) * (2 if mirrored else 1)

    return Terms("tile", size, count, after)


def _tiles(
    operands: Sequence[Operand], size: int, done: int
) -> Iterator[tuple[tuple[Tensor, ...], bool, bool]]:
    """Yield blocks in float64, whether they lie on the diagonal, and whether they stand for two."""
    first, last = operands[0].capabilities, operands[-1].capabilities
    if len(operands) > 1:
        # tiles of two operators side by side: (*batch, r, c) each, at the same place
        for one, other, mirrored in paired_tiles(first, last, size, done):
            blocks = one.block.double(), other.block.double()
            yield blocks, one.rows.start == one.cols.start, mirrored
        return
    for tile in first.tiles_after(size, done):
        on_diagonal = tile.rows.start == tile.cols.start
        yield (tile.block.double(),), on_diagonal, first.symmetric and not on_diagonal


def _tile_sums(quantity: Quantity, blocks: Sequence[Tensor], on_diagonal: bool) -> Tensor:
    parts = []
    for moment in quantity.moments:
        if isinstance(moment, Inner):
            parts.append((blocks[moment.first] * blocks[moment.second]).sum((-2, -1)))
        elif on_diagonal:
            parts.append(blocks[moment.of].diagonal(dim1=-2, dim2=-1).sum(-1))
        else:
            parts.append(blocks[moment.of].new_zeros(blocks[moment.of].shape[:-2]))
    return torch.stack(parts, dim=-1)
