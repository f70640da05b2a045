"""Which axes of the state a partial trace sums over, and which rows of the operator belong together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from linear_operator.operators import LinearOperator
from torch import Tensor

from ..errors import InputError, OutOfRangeError, ShapeError

__all__ = ["StateAxes", "Over"]

Over = str | int | Sequence[str | int]


@dataclass(frozen=True)
class StateAxes:
    """Axes of the state, the samples first, some of them traced.

    Attributes:
        sizes: Size of each axis; their product is the operator's size.
        traced: Positions of the axes that are summed over, ascending.
    """

    sizes: tuple[int, ...]
    traced: tuple[int, ...]

    @classmethod
    def resolve(
        cls,
        operator: LinearOperator | Tensor,
        over: Over,
        axes: Sequence[str] | None,
        shape: Sequence[int] | None,
    ) -> StateAxes:
        """Read the arguments of `ntkops.partial_trace`.

        Args:
            operator: The operator.
            over: What is summed over.
            axes: Names of the axes of one sample's output, or None.
            shape: Sizes of all axes, or None where the operator knows them.

        Returns:
            The axes.

        Raises:
            InputError: If a name or a shape is not understood.
            OutOfRangeError: If a position does not exist.
            ShapeError: If the shape does not fit the operator.
        """
        sizes = _sizes(operator, shape)
        own: dict[str, int] = getattr(operator, "axes", {})
        if axes is None and own and sizes[1:] == tuple(own.values()):  # named when the kernel was made
            axes = list(own)
        names = _names(axes, sizes)
        items: Sequence[Any] = (
            list(over) if isinstance(over, Sequence) and not isinstance(over, str) else [over]
        )
        found: set[int] = set()
        for item in items:
            if item == "outputs" and "outputs" not in names:
                found |= set(range(1, len(sizes)))
            else:
                found.add(_position(item, names, len(sizes)))
        if not found:
            raise InputError("over=() traces nothing: name at least one axis, such as 'outputs' or 'samples'")
        if len(found) == len(sizes):
            raise InputError(f"over={over!r} traces every axis: use ntkops.trace(operator)")
        return cls(sizes, tuple(sorted(found)))

    @property
    def kept(self) -> tuple[int, ...]:
        """Positions of the axes of the result."""
        return tuple(i for i in range(len(self.sizes)) if i not in self.traced)

    @property
    def over_samples(self) -> bool:
        """Whether samples are summed over."""
        return 0 in self.traced

    @property
    def size(self) -> int:
        """Rows of the result."""
        return self._count(self.kept)

    @property
    def terms(self) -> int:
        """Number of blocks that are added."""
        return self._count(self.traced)

    def _count(self, axes: Sequence[int]) -> int:
        return int(torch.tensor([self.sizes[i] for i in axes], dtype=torch.long).prod())

    def rows(self) -> Tensor:
        """Return the rows of the operator as ``(terms, size)``: traced index, then kept index."""
        grid = torch.arange(self._count(range(len(self.sizes)))).view(self.sizes)
        return grid.permute(*self.traced, *self.kept).reshape(self.terms, self.size)

    def of_outputs(self) -> StateAxes:
        """Return the axes of the outputs of one sample alone; there may be nothing traced among them."""
        return StateAxes(self.sizes[1:], tuple(i - 1 for i in self.traced if i))


def _sizes(operator: LinearOperator | Tensor, shape: Sequence[int] | None) -> tuple[int, ...]:
    length = operator.shape[-1]
    if shape is None:
        shape = _own_shape(operator)
        if shape is None:
            raise InputError(
                f"the axes of a {type(operator).__name__} are not known: pass shape=(samples, ...), sizes "
                f"whose product is {length}"
            )
    sizes = tuple(shape)
    if not all(isinstance(size, int) and not isinstance(size, bool) and size > 0 for size in sizes):
        raise InputError(f"shape={sizes}: pass positive integers, the number of samples first")
    if int(torch.tensor(sizes, dtype=torch.long).prod()) != length:
        raise ShapeError(f"shape={sizes} has {torch.Size(sizes).numel()} entries, the operator {length}")
    if len(sizes) < 2:
        raise InputError(f"shape={sizes} has a single axis: use ntkops.trace(operator)")
    return sizes


def _own_shape(operator: Any) -> tuple[int, ...] | None:
    """Return samples and output axes of a kernel of ours, or samples and outputs of a selection."""
    if not hasattr(operator, "output_shape"):
        return None
    samples, outputs = operator.num_samples, operator.num_outputs
    if operator._core.rows.inputs.lengths is not None and samples * outputs != operator.shape[-1]:
        raise InputError(
            "samples differ in length, so that rows are no grid of axes: sum over axes when the kernel is "
            "made, as in ntkops.ntk(..., axes=('time', 'class'), outputs={'class': 'trace'})"
        )
    if samples * outputs != operator.shape[-1]:
        return None
    whole = operator.output_shape.numel() == outputs
    inner = tuple(getattr(operator, "axes", {}).values()) or (
        tuple(operator.output_shape) if whole else (outputs,)
    )
    return (samples, *(inner or (1,)))


def _names(axes: Sequence[str] | None, sizes: tuple[int, ...]) -> tuple[str | None, ...]:
    if axes is None:
        return ("samples", *([None] * (len(sizes) - 1)))
    names = (axes,) if isinstance(axes, str) else tuple(axes)
    if len(names) != len(sizes) - 1 or not all(isinstance(name, str) for name in names):
        raise InputError(
            f"axes={axes!r}: name each of the {len(sizes) - 1} axes of the output of one sample, which has "
            f"shape {sizes[1:]}; the axis of the samples is called 'samples'"
        )
    if len({"samples", *names}) < len(sizes):
        raise InputError(f"axes={axes!r}: the names, and 'samples', must differ")
    return ("samples", *names)


def _position(item: Any, names: tuple[str | None, ...], count: int) -> int:
    if isinstance(item, str):
        if item not in names:
            known = ["samples", "outputs", *(name for name in names[1:] if name)]
            raise InputError(
                f"over={item!r}: choose among {', '.join(map(repr, known))}, or a position from 0 (samples) "
                f"to {count - 1}; other names are given in axes="
            )
        return names.index(item)
    if isinstance(item, bool) or not isinstance(item, int):
        raise InputError(f"over={item!r}: pass names or positions of axes")
    if not -count <= item < count:
        raise OutOfRangeError(f"over={item}: the state has {count} axes, the samples first")
    return item % count
