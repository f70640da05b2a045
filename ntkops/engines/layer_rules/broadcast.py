"""Parameters that meet activations elementwise: added, subtracted, multiplied, or expanded."""

from __future__ import annotations

import torch
from torch import Tensor

from ...model.record import Call, Entry
from .base import Kind, Layout, Rule

__all__ = ["Add", "Expand", "Multiply", "Subtract"]


class _Broadcast(Rule):
    """A parameter that is repeated along axes on which it has one entry, or none."""

    def supports(self, call: Call) -> bool:
        """Plain sums and products."""
        return not ({"alpha", "out"} & call.arguments.keys())

    def sample_axes(self, call: Call) -> range:
        """The axes along which every parameter is repeated."""
        # The first run of axes on which every parameter has one entry: the samples are among them.
        free = []
        for axis in range(len(call.shape)):
            sizes = [self._padded(call, role)[axis] for role in call.places]
            free.append(all(size == 1 for size in sizes))
        first = next((i for i, is_free in enumerate(free) if is_free), 0)
        last = next((i for i in range(first, len(free)) if not free[i]), len(free))
        return range(first, last) if any(free) else range(0)

    def kind(self, role: str) -> Kind:
        """Written down."""
        return "direct"

    def _padded(self, call: Call, role: str) -> tuple[int, ...]:
        """Return the shape of a parameter with as many axes as the result has."""
        shape = tuple(call.arguments[role].shape)
        return (1,) * (len(call.shape) - len(shape)) + shape

    def activation(self, call: Call, layout: Layout, count: int) -> Tensor:
        """Nothing is needed but the arguments."""
        return torch.empty(0)

    def _scaled(self, call: Call, role: str, gradients: Tensor) -> Tensor:
        """Return what each entry of the repeated parameter gets of the output gradients."""
        return gradients

    def direct(
        self, call: Call, role: str, activation: object, layout: Layout, count: int, gradients: Tensor
    ) -> Tensor:
        """Output gradients summed over the axes along which the parameter is repeated."""
        exposed = layout.expose(self._scaled(call, role, gradients), count, 1)  # (B, K, k, rest...)
        padded = self._padded(call, role)
        rest = padded[: layout.axis] + padded[layout.axis + 1 :]
        repeated = [2, *(3 + i for i, size in enumerate(rest) if size == 1)]
        summed = exposed.sum(repeated)
        # A parameter of one entry is repeated along all axes, and has one left: (B, K, 1).
        return summed.flatten(2) if summed.dim() > 2 else summed.unsqueeze(2)


class Add(_Broadcast):
    """A sum."""

    entry = Entry("add", ("input", "other"), ("input", "other"))
    functions = (torch.add, torch.Tensor.add, torch.Tensor.__add__, torch.Tensor.__radd__)


class Subtract(_Broadcast):
    """A difference."""

    entry = Entry("sub", ("input", "other"), ("input", "other"))
    functions = (torch.sub, torch.Tensor.sub, torch.Tensor.__sub__)

    def _scaled(self, call: Call, role: str, gradients: Tensor) -> Tensor:
        return gradients if role == "input" else -gradients


class Multiply(_Broadcast):
    """An elementwise product."""

    entry = Entry("mul", ("input", "other"), ("input", "other"))
    functions = (torch.mul, torch.Tensor.mul, torch.Tensor.__mul__, torch.Tensor.__rmul__)

    def _scaled(self, call: Call, role: str, gradients: Tensor) -> Tensor:
        return gradients * call.arguments["other" if role == "input" else "input"]


class Expand(_Broadcast):
    """A parameter repeated for each sample, such as a class token."""

    entry = Entry("expand", ("input", *(f"size{i}" for i in range(8))), ("input",))
    functions = (torch.Tensor.expand,)
