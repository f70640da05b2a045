"""Hutch++ for K = J Jᵀ that uses the factors: a range from jvps alone, quadratic forms from vjps alone."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..errors import UnsupportedOperationError
from ._one_sided import factors_of
from ._quantities import Inner, Quantity, Trace
from ._request import Operand
from ._sketch import by_parts
from ._two_sided import TwoSided, column_dots, draw_probes

__all__ = ["NtkAware"]


class NtkAware(TwoSided):
    r"""Hutch++ with one pass where a product takes two.

    K and J have the same range, so that J p with random parameters p (one jvp) sketches it, if with less
    weight on large eigenvalues than K v has. The trace then takes quadratic forms alone,
    :math:`q^\top K q = |J^\top q|^2` (one vjp), on Q as on the residual probes. Norms and inner products need
    K q itself, two passes a column, and save only in the sketch.

    Args:
        quantity: What is estimated.
        operands: Symmetric operators with factors.
        generator: Draws sketch and probes.

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
