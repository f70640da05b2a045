"""Indices of an operator, read as those of a tensor of its shape."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import OutOfRangeError

__all__ = ["require_index", "resolve_index", "same_index", "tensor_positions"]


def tensor_positions(index: Any, shape: torch.Size) -> tuple[Any, ...]:
    """Return an index as integers, slices, one Ellipsis and integer tensors, checked against a shape.

    A boolean tensor stands for the positions where it is true, along as many axes as it has: it becomes one
    item for each of them. No integer is negative.

    Raises:
        OutOfRangeError: If an item is no index, lies outside its axis, does not have the length of its axis
            (booleans), or there are too many.
    """
    items = index if isinstance(index, tuple) else (index,)
    items = tuple(torch.as_tensor(i) if isinstance(i, (np.ndarray, list, range)) else i for i in items)
    for item in items:
        require_index(item)
    # Axes that an item takes: a mask as many as it has, the Ellipsis what the others leave.
    widths = [0 if i is Ellipsis else max(i.dim(), 1) if _is_mask(i) else 1 for i in items]
    spare = len(shape) - sum(widths)
    if spare < 0:
        raise OutOfRangeError(f"{sum(widths)} indices for an operator of shape {tuple(shape)}")
    found: list[Any] = []
    axis = 0
    for item, width in zip(items, widths, strict=True):
        sizes = shape[axis : axis + width]
        if item is Ellipsis:
            found.append(item)
            axis += spare
        elif _is_mask(item):
            if item.shape != sizes:
                raise OutOfRangeError(
                    f"a boolean index needs {' x '.join(map(str, sizes))} entries, one for each position of "
                    f"the axis, got shape {tuple(item.shape)}"
                )
            found.extend(item.nonzero(as_tuple=True))
        else:
            found.append(_within(item, sizes[0]))
        axis += width
    return tuple(found)


def resolve_index(index: slice | Tensor, length: int) -> Tensor:
    """Return the non-negative positions that a slice or an index tensor selects, on the CPU.

    Raises:
        OutOfRangeError: If a position lies outside ``[-length, length)``.
    """
    if isinstance(index, slice):
        return torch.arange(length)[index]
    index = index.detach().cpu()
    if index.dtype == torch.bool:
        if index.shape != (length,):
            raise OutOfRangeError(f"a boolean index needs {length} entries, got shape {tuple(index.shape)}")
        return index.nonzero().flatten()
    return _non_negative(index, length)


def same_index(first: Any, second: Any) -> bool:
    """Whether two indices of one axis select the same positions, in the same order."""
    if isinstance(first, Tensor) and isinstance(second, Tensor):
        return first.shape == second.shape and bool((first == second).all())
    # A slice and a tensor may select the same, too: taken for unlike, they lose the symmetry alone.
    return isinstance(first, slice) and isinstance(second, slice) and first == second


def require_index(item: Any) -> None:
    """Refuse what is no position: a float would be cut to an integer, None and a bool mean other things."""
    if item is Ellipsis or (isinstance(item, int) and not isinstance(item, bool)):
        return
    if isinstance(item, slice):
        for bound in (item.start, item.stop, item.step):
            if bound is not None and (isinstance(bound, bool) or not hasattr(bound, "__index__")):
                raise OutOfRangeError(f"a slice of positions has integers as bounds, not {bound!r}")
        return
    if isinstance(item, Tensor) and not (item.is_floating_point() or item.is_complex()):
        return
    if isinstance(item, np.integer):
        return
    what = f"a tensor of {item.dtype}" if isinstance(item, Tensor) else f"{item!r}"
    raise OutOfRangeError(
        f"an operator is indexed by integers, slices, and tensors or lists of integers or booleans, not by "
        f"{what}"
    )


def _is_mask(item: Any) -> bool:
    """Whether an item is a boolean tensor."""
    return isinstance(item, Tensor) and item.dtype == torch.bool


def _within(item: Any, size: int) -> Any:
    """Check positions against their axis, and make an integer non-negative."""
    if isinstance(item, slice):
        return item
    if isinstance(item, Tensor) and item.dim():
        return _non_negative(item, size)
    if not -size <= int(item) < size:
        raise OutOfRangeError(f"index {int(item)} is out of range for an axis of {size}")
    return int(item) % size


def _non_negative(positions: Tensor, size: int) -> Tensor:
    """Return positions counted from the start, those counted from the end too; raise where there is none."""
    outside = (positions < -size) | (positions >= size)
    if bool(outside.any()):
        raise OutOfRangeError(f"index {int(positions[outside][0])} is out of range for an axis of {size}")
    return torch.where(positions < 0, positions + size, positions).long()
