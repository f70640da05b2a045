"""Which outputs a kernel is over: all, each, their trace, some; by the names of the state's axes, too."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from ..errors import InputError, OutOfRangeError, ShapeError
from .axes import StateAxis, at_places, require_own_positions

__all__ = ["OutputChoice", "choose_outputs", "labelled", "over_samples"]

AxisChoice: TypeAlias = Literal["all", "each", "trace"]

OutputChoice: TypeAlias = AxisChoice | int | Sequence[int] | Mapping[str, AxisChoice]
"""Outputs: "all", "each" or "trace"; the number of one, or numbers of some; or a choice for each axis by its
name, ``{"time": "trace", "class": "each"}``."""

_CHOICES = ("all", "each", "trace")


def labelled(axis: StateAxis, axes: Sequence[str] | None) -> StateAxis:
    """Return the axis of all outputs with names for the axes of one sample's output.

    Raises:
        InputError: If names are no different strings, or "samples" is among them.
        ShapeError: If there are not as many as the output of a sample has axes.
    """
    if axes is None:
        return axis
    names, shape = (axes,) if isinstance(axes, str) else tuple(axes), tuple(axis.output_shape)
    if not all(isinstance(name, str) and name for name in names):
        raise InputError(f"axes={axes!r}: pass names, such as axes=('time', 'class')")
    if len({"samples", *names}) < len(names) + 1:
        raise InputError(
            f"axes={axes!r}: the names must differ, and 'samples' is the name of the axis of the samples"
        )
    if len(names) != len(shape):
        raise ShapeError(
            f"axes={axes!r}: the output of one sample has shape {shape}: name each of its {len(shape)} axes"
        )
    return StateAxis(axis.inputs, axis.outputs, axis.pick, tuple(zip(names, shape, strict=True)))


def over_samples(outputs: OutputChoice) -> bool:
    """Whether the samples are summed over, or taken one by one."""
    return isinstance(outputs, Mapping) and outputs.get("samples", "all") != "all"


def choose_outputs(axis: StateAxis, outputs: OutputChoice) -> StateAxis:
    """Return the axis for a choice of outputs; its output numbers have shape (*batch, R, r).

    Args:
        axis: All outputs of all samples, with or without names.
        outputs: See `ntkops.ntk`.

    Raises:
        InputError: If the choice is not understood.
        OutOfRangeError: If an output number does not exist.
    """
    if isinstance(outputs, Mapping):
        return _by_axes(axis, outputs)
    count = axis.output_shape.numel()
    if isinstance(outputs, str):
        shapes = {"all": (1, count), "each": (count, 1, 1), "trace": (count, 1)}
        if outputs in shapes:
            labels = axis.labels if outputs == "all" else ()
            return _of_samples(axis, torch.arange(count).reshape(shapes[outputs]), labels)
        if str(outputs) == "sum":
            raise InputError(
                "outputs='sum' has two readings: outputs='trace' sums the kernels of the outputs; for the "
                "kernel of the summed output pass output=lambda y: y.sum(-1, keepdim=True)"
            )
        raise InputError(_not_understood(outputs))
    numbers = [outputs] if isinstance(outputs, int) else outputs
    if (
        not isinstance(numbers, Sequence)
        or not numbers
        or not all(isinstance(n, int) and not isinstance(n, bool) for n in numbers)
    ):
        raise InputError(_not_understood(outputs))
    for number in numbers:
        if not -count <= number < count:
            raise OutOfRangeError(f"output {number} does not exist: the model has {count} outputs a sample")
    return _of_samples(axis, torch.tensor([[n % count for n in numbers]]))


def _of_samples(axis: StateAxis, numbers: Tensor, labels: tuple[tuple[str, int], ...] = ()) -> StateAxis:
    """Return the axis of some outputs of every sample, or of every node.

    Raises:
        InputError: If samples differ in length, and rows are neither all of their positions nor a sum.
    """
    require_own_positions(axis.inputs, numbers)
    if axis.inputs.is_coupled:
        numbers = at_places(numbers, axis.num_samples, axis.output_shape.numel())
    return StateAxis(axis.inputs, numbers, None, labels)


def _not_understood(outputs: Any) -> str:
    """Say which choices there are."""
    return (
        f"outputs={outputs!r}: choose 'all', 'each', 'trace', an output number, a list of them, or, by the "
        "names of axes=, {'time': 'trace'}"
    )


def _by_axes(axis: StateAxis, outputs: Mapping[Any, Any]) -> StateAxis:
    """Sort the axes of the output into the batch ("each"), the terms ("trace") and the rows ("all")."""
    known = ("samples", *(name for name, _ in axis.labels))
    for name, choice in outputs.items():
        if name not in known:
            hint = "" if axis.labels else "; name the axes of one sample's output with axes="
            raise InputError(f"outputs={{{name!r}: ...}}: the axes are {', '.join(map(repr, known))}{hint}")
        if choice not in _CHOICES or not isinstance(choice, str):
            raise InputError(f"outputs={{{name!r}: {choice!r}}}: choose 'all', 'each' or 'trace' for an axis")
    shape = tuple(axis.output_shape)
    chosen = [outputs.get(name, "all") for name in known[1:]]
    labels = tuple(label for label, kind in zip(axis.labels, chosen, strict=True) if kind == "all")
    if not axis.labels:  # nothing but the samples has a name: all outputs
        shape, chosen = (axis.output_shape.numel(),), ["all"]
    groups = [[i for i, kind in enumerate(chosen) if kind == sort] for sort in ("each", "trace", "all")]
    batch, terms, rows = ([shape[i] for i in group] for group in groups)
    numbers = (
        torch.arange(axis.output_shape.numel()).reshape(shape).permute([i for group in groups for i in group])
    )
    numbers = numbers.reshape(*batch, torch.Size(terms).numel(), torch.Size(rows).numel())
    if not over_samples(outputs):
        return _of_samples(axis, numbers, labels)
    return StateAxis(axis.inputs, _folded(axis, numbers, outputs["samples"]), None, labels, folded=True)


def _folded(axis: StateAxis, numbers: Tensor, choice: str) -> Tensor:
    """Return numbers of (sample, output): a sample is a member of the batch, the first, or a term."""
    if axis.inputs.lengths is not None:
        raise InputError(
            "samples differ in length, so that their own kernels do: take them from K, by K.offsets"
        )
    samples = torch.arange(axis.num_samples) * axis.output_shape.numel()
    if choice == "each":
        return samples.reshape(-1, *[1] * numbers.dim()) + numbers  # (N, *batch, R, r)
    return (samples[:, None, None] + numbers.unsqueeze(-3)).flatten(-3, -2)  # (*batch, N·R, r)
