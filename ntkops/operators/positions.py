"""Indices of an operator, read as those of a tensor of its shape."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import OutOfRangeError

__all__ = ["require_index", "tensor_positions"]


def tensor_positions(index: Any, shape: torch.Size) -> tuple[Any, ...]:
    """Return an index as integers, slices, one Ellipsis and integer tensors, checked against a shape.

    A boolean tensor stands for the positions where it is true, along as many axes as it has.

    Args:
        index: What stands in the brackets.
        shape: Shape of what is indexed.

    Returns:
        As many items as the index has, and one more for each further axis of a boolean one; no integer is
        negative.

    Raises:
        OutOfRangeError: If an item is no index, lies outside its axis, does not have the length of its axis
            (booleans), or there are too many.
    """
    items = index if isinstance(index, tuple) else (index,)
    items = tuple(torch.as_tensor(i) if isinstance(i, (np.ndarray, list, range)) else i for i in items)
    for item in items:
        require_index(item)
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
    return isinstance(item, Tensor) and item.dtype == torch.bool


def _within(item: Any, size: int) -> Any:
    """Check positions against their axis, and make an integer non-negative."""
    if isinstance(item, slice):
        return item
    if isinstance(item, Tensor) and item.dim():
        outside = (item < -size) | (item >= size)
        if bool(outside.any()):
            raise OutOfRangeError(f"index {int(item[outside][0])} is out of range for an axis of {size}")
        return torch.where(item < 0, item + size, item).long()
    if not -size <= int(item) < size:
        raise OutOfRangeError(f"index {int(item)} is out of range for an axis of {size}")
    return int(item) % size
