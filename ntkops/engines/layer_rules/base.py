"""What a rule is: how the gradient of one sample follows from a call's arguments and output gradients."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from ...model.record import Call, Entry

__all__ = ["Activation", "Kind", "Layout", "OneHot", "Rule", "flat_positions"]

Kind = Literal["outer", "direct"]


@dataclass(frozen=True)
class Layout:
    """Where the samples are in a result.

    Attributes:
        axis: The axis that carries them.
        major: Where they share that axis with k others: whether the index is sample · k + other
            (else other · B + sample).
    """

    axis: int
    major: bool = True

    def expose(self, tensor: Tensor, count: int, lead: int = 0) -> Tensor:
        """Return ``(*lead, ...)`` with B·k entries along the axis as ``(B, *lead, k, rest...)``."""
        axis = self.axis + lead  # that of the result of a call, behind the directions
        split = (count, -1) if self.major else (-1, count)
        pair = tensor.unflatten(axis, split)
        samples, others = (axis, axis + 1) if self.major else (axis + 1, axis)
        return pair.movedim((samples, others), (0, 1 + lead))


@dataclass(frozen=True, eq=False)
class OneHot:
    """Activations of an embedding: one unit vector a position, kept as its number.

    Attributes:
        index: ``(B, S)`` rows of the table.
        size: Number of rows.
    """

    index: Tensor
    size: int


Activation = Tensor | OneHot


class Rule:
    r"""How one function's parameters get their per-sample gradients.

    A role is of kind "outer" if the gradient of sample i is :math:`\sum_s g_{is} a_{is}^\top`, a sum of
    outer products over positions, and "direct" if it is small enough to be written down.

    Attributes:
        entry: Name, arguments and roles of the function.
        functions: The functions that it describes.
        shares_bias: Whether the gradient of the role "bias" is the sum of the weight's output gradients.
    """

    entry: Entry
    functions: tuple[Hashable, ...]
    shares_bias = False

    def supports(self, call: Call) -> bool:
        """Return whether these arguments are understood."""
        return True

    def sample_axes(self, call: Call) -> range:
        """Return the axes of the result on which samples may lie."""
        raise NotImplementedError

    def kind(self, role: str) -> Kind:
        """Return how the gradient of a role is given."""
        raise NotImplementedError

    def transposed(self, role: str) -> bool:
        """Return whether the outer product gives the transpose of the parameter."""
        return False

    def activation(self, call: Call, layout: Layout, count: int) -> Activation:
        """Return the part that no direction changes.

        Returns:
            ``(B, groups, d_in, S)`` for outer roles; anything that `direct` wants else.
        """
        raise NotImplementedError

    def gradient(self, call: Call, layout: Layout, count: int, gradients: Tensor) -> Tensor:
        """Return output gradients of an outer role.

        Args:
            call: The call.
            layout: Where its samples are.
            count: Number B of samples.
            gradients: ``(K, *shape)`` for K directions.

        Returns:
            ``(B, K, groups, d_out, S)``.
        """
        raise NotImplementedError

    def direct(
        self, call: Call, role: str, activation: object, layout: Layout, count: int, gradients: Tensor
    ) -> Tensor:
        """Return the gradient of a direct role, ``(B, K, p)``, for ``(K, *shape)`` output gradients."""
        raise NotImplementedError


def flat_positions(exposed: Tensor, lead: int) -> Tensor:
    """Turn ``(B, *lead, k, rest..., d)`` into ``(B, *lead, d, S)``."""
    return exposed.flatten(1 + lead, -2).mT
