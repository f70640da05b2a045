"""As many of each class: the members of classes, and how many each gives."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..errors import InputError, ShapeError

__all__ = ["class_members", "class_quotas"]


def class_members(labels: Any, count: int) -> list[Tensor]:
    """Return the positions of the samples of each class that occurs, in the order of the class numbers.

    Raises:
        InputError: If labels are no integers.
        ShapeError: If there is not one for each sample.
    """
    if labels is None:
        return [torch.arange(count)]
    numbers = torch.as_tensor(labels).detach().cpu()
    if numbers.dtype.is_floating_point or numbers.is_complex() or numbers.dtype == torch.bool:
        raise InputError(f"labels are class numbers, integers; got {numbers.dtype}")
    if tuple(numbers.shape) != (count,):
        raise ShapeError(f"labels have shape {tuple(numbers.shape)}, due is ({count},): one for each sample")
    return [(numbers == number).nonzero().flatten() for number in numbers.unique()]


def class_quotas(sizes: list[int], m: int) -> list[int]:
    """Return how many samples each class gives: as many as the others, larger classes first.

    Raises:
        InputError: If there are more classes than samples to choose.
    """
    if m < len(sizes):
        raise InputError(f"m={m} is below the number of classes, {len(sizes)}: choose at least one of each")
    found, left = [0] * len(sizes), m
    while left:
        open_ones = [number for number, size in enumerate(sizes) if found[number] < size]
        if left < len(open_ones):
            open_ones = sorted(open_ones, key=lambda number: -sizes[number])[:left]
        step = max(1, min(left // len(open_ones), min(sizes[n] - found[n] for n in open_ones)))
        for number in open_ones:
            found[number] += step
        left -= step * len(open_ones)
    return found
