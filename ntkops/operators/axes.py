"""The two kinds of axes that an operator can have: states of samples, and parameters.

An axis knows how vectors in the operator's coordinates are laid into the block that an engine
multiplies, and how the engine's result is read back. Slicing, batching and reordering an operator
change only its axes: no engine is built and nothing is checked again.

Every axis carries the operator's batch. A batch entry is a sum of R terms (R > 1 for kernels that are
traced over outputs): the kernel of an entry is Σ_r J_r J_rᵀ, each term with its own outputs.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from ..errors import InputError, OutOfRangeError, ShapeError
from ..model import Inputs
from .positions import resolve_index

__all__ = [
    "Axis",
    "AxisReader",
    "Outputs",
    "ParameterAxis",
    "StateAxis",
    "at_places",
    "require_own_positions",
]

_keys = itertools.count()  # an axis is known by its number, so that dense blocks can be kept by it


def at_places(numbers: Tensor, count: int, width: int) -> Tensor:
    """Return output numbers ``(*batch, R, r)`` below ``width`` at each of ``count`` places, in order."""
    # Outputs are flattened as place · width + number: (count, 1) + (*batch, R, 1, r) -> (*batch, R, count·r).
    return (torch.arange(count)[:, None] * width + numbers.unsqueeze(-2)).flatten(-2)


def require_own_positions(inputs: Inputs, numbers: Tensor) -> None:
    """Raise where samples differ in length, and rows are neither all of their positions nor a sum.

    Raises:
        InputError: Saying which choices there are.
    """
    if inputs.lengths is None:
        return
    inner = inputs.output_shape[1:].numel()  # outputs at one position: number = position · inner + output
    positions = numbers // inner  # (*batch, R, r)
    # Members of a batch at positions of their own would have rows of fewer and fewer samples.
    in_batch = numbers.dim() > 2 and not torch.equal(positions, positions[:1].expand_as(positions))
    if in_batch or len(torch.unique(positions)) < inputs.output_shape[0]:
        raise InputError(
            "samples differ in length, and not all of them have each position: choose all positions, or "
            "their sum. With axes=('time', 'class') one kernel a class is outputs={'class': 'each'}, and a "
            "sum over positions, as far as both samples have them, {'time': 'trace'}"
        )


def _is_constant(numbers: Tensor, axis: int) -> bool:
    """Whether numbers do not change along an axis."""
    return torch.equal(numbers, numbers.narrow(axis, 0, 1).expand_as(numbers))


@dataclass(frozen=True, eq=False)
class StateAxis:
    """Rows (sample, output) of a Jacobian, sample-major.

    Coupled samples, the nodes of a graph, are one sample to an engine, whose outputs are (node, class): the
    rows of this axis are then output numbers alone, and its samples are the nodes.

    Samples of unlike length have as many output numbers as the longest; those of positions that a sample does
    not have are zero, and no rows.

    Attributes:
        inputs: The N samples.
        outputs: ``(*batch, R, r)`` output numbers on the CPU.
        pick: ``(n,)`` positions among the N·r outputs, or None for all that samples have, in order.
        labels: Names and sizes of the axes into which the r outputs unfold, where they have names.
        folded: Whether samples count as outputs: the numbers are then sample · O + output, there are r rows,
            and a term or a member of the batch may be a single sample.
    """

    inputs: Inputs
    outputs: Tensor
    pick: Tensor | None = None
    labels: tuple[tuple[str, int], ...] = ()
    folded: bool = False
    key: int = field(default_factory=lambda: next(_keys))

    def __getstate__(self) -> dict[str, object]:
        """Leave out what is computed from the rest."""
        return {part.name: getattr(self, part.name) for part in dataclasses.fields(self)}

    @cached_property
    def batch_shape(self) -> torch.Size:
        """Shape of the operator's batch."""
        return self.outputs.shape[:-2]

    @cached_property
    def terms(self) -> int:
        """Number R of terms that are summed."""
        return self.outputs.shape[-2]

    @cached_property
    def _shape(self) -> tuple[int, int]:
        """Samples and outputs that the numbers count: N and O, or 1 and N·O where samples are folded."""
        count, outputs = self.inputs.num_samples, self.inputs.num_outputs
        return (1, count * outputs) if self.folded else (count, outputs)

    @cached_property
    def output_shape(self) -> torch.Size:
        """Shape of the output of one sample, or of one node."""
        # The engine's output of a graph is (nodes, classes).
        shape = self.inputs.output_shape
        return shape[1:] if self.inputs.is_coupled else shape

    @cached_property
    def num_samples(self) -> int:
        """Number of samples, or of nodes, that have rows here."""
        if not self.inputs.is_coupled:
            return self.inputs.num_samples
        return len(torch.unique(self.outputs // self.output_shape.numel()))

    @cached_property
    def num_outputs(self) -> int:
        """Number of rows that a sample, or a node, has."""
        if not self.inputs.is_coupled:
            return self.outputs.shape[-1]
        return len(torch.unique(self.flat_outputs[0, 0] % self.output_shape.numel()))

    @cached_property
    def grid(self) -> int:
        """Number N·r of rows before picking, r where samples are folded."""
        return self._shape[0] * self.outputs.shape[-1]

    @cached_property
    def index(self) -> Tensor | None:
        """``(n,)`` positions of the rows among the N·r outputs; None where they are all of them."""
        real = self._real
        # Of samples that are shorter than the longest the rows of missing positions drop out.
        return real.flatten().nonzero().flatten() if self.pick is None and real is not None else self.pick

    @cached_property
    def _real(self) -> Tensor | None:
        """Which outputs samples have, ``(N, r)``; None where they have all."""
        lengths = self.inputs.lengths
        if lengths is None or self.folded:
            return None
        # A sum over positions is there where one of its terms is.
        position = self.flat_outputs.amin((0, 1)) // self.inputs.output_shape[1:].numel()
        real = position < lengths[:, None]
        return None if bool(real.all()) else real

    @property
    def offsets(self) -> Tensor:
        """``(N + 1,)`` first row of each sample, and the number of all rows, where nothing is picked."""
        count, width = self.num_samples, self.num_outputs
        if self._real is None:
            return torch.arange(count + 1) * width
        # Row i is of sample n where offsets[n] <= i < offsets[n + 1]: (N, r) -> rows a sample, summed up.
        return torch.cat([torch.zeros(1, dtype=torch.long), self._real.sum(1).cumsum(0)])

    @cached_property
    def length(self) -> int:
        """Number n of rows."""
        return self.grid if self.index is None else len(self.index)

    @property
    def flat_outputs(self) -> Tensor:
        """``(M, R, r)`` output numbers with the batch flattened."""
        return self.outputs.reshape(-1, *self.outputs.shape[-2:])

    @property
    def distinct_outputs(self) -> Tensor:
        """The output numbers that occur."""
        return torch.unique(self.outputs % self.inputs.num_outputs if self.folded else self.outputs)

    @cached_property
    def num_distinct(self) -> int:
        """How many output numbers occur."""
        return len(self.distinct_outputs)

    @cached_property
    def is_whole(self) -> bool:
        """Whether the rows are all outputs of all samples, in their order."""
        count = self._shape[1]
        flat = self.flat_outputs
        return flat.shape == (1, 1, count) and torch.equal(flat[0, 0], torch.arange(count))

    def embed(self, vectors: Tensor) -> Tensor:
        """Lay ``(*batch, n, k)`` into the engine's block ``(M·R·k, N, O)``."""
        (count, width), columns = self._shape, vectors.shape[-1]
        whole = self.inputs.num_samples, self.inputs.num_outputs
        # Three steps, each the transpose of one of `extract`: n picked rows -> N·r rows -> N·O outputs, and a
        # copy of the vector for each of the R terms, since Σ_r J_r J_rᵀ v multiplies v by each J_rᵀ.
        flat = vectors.reshape(self.batch_shape.numel(), self.length, columns)  # (M, n, k)
        if self.index is not None:
            index = self.index.to(flat.device)
            # Added, not written: a row that is picked twice has two entries of the vector.
            flat = flat.new_zeros((len(flat), self.grid, columns)).index_add(1, index, flat)
        rows = flat.reshape(len(flat), count, self.outputs.shape[-1], columns)
        rows = rows.permute(0, 3, 1, 2)  # (M, k, N, r)
        if self.is_whole:
            return rows.reshape(columns, *whole)
        outputs = self.flat_outputs.to(rows.device)
        shape = (len(outputs), self.terms, columns, count)
        index = outputs[:, :, None, None, :].expand(*shape, outputs.shape[-1])  # (M, R, k, N, r)
        block = rows.new_zeros((*shape, width)).scatter_add(-1, index, rows.unsqueeze(1).expand_as(index))
        return block.reshape(math.prod(shape[:3]), *whole)  # also of a process without samples

    def extract(self, block: Tensor) -> Tensor:
        """Read ``(*batch, n, k)`` back from the engine's ``(M·R·k, N, O)``, summing the terms."""
        kernels, (count, width) = self.batch_shape.numel(), self._shape
        if self.is_whole:
            rows = block.unsqueeze(0)  # (1, k, N, O)
        else:
            outputs = self.flat_outputs.to(block.device)
            columns = len(block) // max(kernels * self.terms, 1)
            split = block.reshape(kernels, self.terms, columns, count, width)  # (M, R, k, N, O)
            index = outputs[:, :, None, None, :].expand(*split.shape[:-1], outputs.shape[-1])
            rows = split.gather(-1, index).sum(1)  # (M, k, N, r)
        flat = rows.reshape(kernels, rows.shape[1], self.grid)  # (M, k, N·r)
        if self.index is not None:
            flat = flat[..., self.index.to(flat.device)]
        return flat.mT.reshape(*self.batch_shape, self.length, flat.shape[1])

    def take(self, index: slice | Tensor) -> StateAxis:
        """Return the axis of some rows; samples and outputs that no row needs are left out."""
        chosen = resolve_index(index, self.length)
        if torch.equal(chosen, torch.arange(self.length)):  # a dense block stays the block of this very axis
            return self
        if len(chosen) == 0:
            raise OutOfRangeError("the index selects no row; an operator needs at least one")
        rows = chosen if self.index is None else self.index[chosen]
        if self.inputs.is_coupled:  # no node can be left out of a pass: its outputs can
            return StateAxis(self.inputs, self.outputs[..., rows])
        # Row = sample · r + output number: the smallest grid of samples and outputs that has all chosen rows,
        # and their positions in it.
        width = self.outputs.shape[-1]
        samples, sample = torch.unique(rows // width, return_inverse=True)
        columns, column = torch.unique(rows % width, return_inverse=True)
        pick = sample * len(columns) + column
        whole = len(samples) == self._shape[0]
        axis = StateAxis(
            inputs=self.inputs if whole else self.inputs.select(samples),
            outputs=self.outputs[..., columns],
            labels=self.labels if len(columns) == width else (),
            folded=self.folded,
        )
        # An axis over all of its grid has no pick: engines then read no rows out of their blocks.
        everything = torch.arange(axis.grid) if axis.index is None else axis.index
        return (
            axis if torch.equal(pick, everything) else dataclasses.replace(axis, pick=pick, key=next(_keys))
        )

    def map_batch(self, change: Callable[[Tensor], Tensor]) -> StateAxis:
        """Apply a reshaping of ``(*batch, R, r)`` to the output numbers."""
        return StateAxis(self.inputs, change(self.outputs), self.pick, self.labels, self.folded)

    def of(self, inputs: Inputs) -> StateAxis:
        """Return the same rows of these samples held elsewhere."""
        return StateAxis(inputs, self.outputs, self.pick, self.labels, self.folded)

    def over(self, inputs: Inputs) -> StateAxis:
        """Return the same outputs of all of other samples.

        Where the first axis of the output, time or the nodes of a graph, has another length there, these rows
        must be all of that axis, or whole nodes.

        Raises:
            ShapeError: If the outputs of the other samples are others, or these rows are an uneven selection.
            InputError: If not all of the other samples have these outputs.
        """
        return self.outputs_alone.over(inputs)

    @property
    def outputs_alone(self) -> Outputs:
        """Which outputs of each sample these rows are, without the samples."""
        return Outputs(
            self.outputs, self.inputs.output_shape, self.inputs.is_coupled, self.pick is not None, self.labels
        )


@dataclass(frozen=True, eq=False)
class Outputs:
    """The outputs of a `StateAxis`, to be had of other samples: it holds none itself.

    Attributes:
        outputs: ``(*batch, R, r)`` output numbers on the CPU.
        shape: Shape of the output of a sample, or of all nodes of a graph.
        is_coupled: Whether it is that of a graph.
        is_picked: Whether rows were an uneven selection of samples and outputs.
        labels: Names and sizes of the axes into which the r outputs unfold, where they have names.
    """

    outputs: Tensor
    shape: torch.Size
    is_coupled: bool
    is_picked: bool
    labels: tuple[tuple[str, int], ...]

    def over(self, inputs: Inputs) -> StateAxis:
        """Return these outputs of all of some samples; see `StateAxis.over`.

        Raises:
            ShapeError: If the outputs of the samples are others, or these are an uneven selection.
            InputError: If not all of the samples have these outputs.
        """
        own, new = self.shape, inputs.output_shape
        if self.is_picked:
            raise ShapeError(
                "cross needs whole samples in the columns; take it before slicing: K.cross(x_new)[:, a:b]"
            )
        if new == own and not inputs.is_coupled:
            require_own_positions(inputs, self.outputs)
            return StateAxis(inputs, self.outputs, None, self.labels)
        if len(new) != len(own) or new[1:] != own[1:] or not own:
            raise ShapeError(
                f"the new samples have outputs of shape {tuple(new)}, those of the kernel {tuple(own)}: all "
                "axes but the first must agree"
            )
        inner = own[1:].numel()
        width = len(torch.unique(self.outputs.flatten(0, -2)[0] % inner))  # outputs at a place
        grid = self.outputs.unflatten(-1, (-1, width)) if self.outputs.shape[-1] % width == 0 else None
        # The same outputs, at the same places in each term and member of the batch:
        if grid is None or not (
            _is_constant(grid % inner, -2)
            and all(_is_constant(grid // inner, axis) for axis in range(-grid.dim(), 0) if axis != -2)
        ):
            raise ShapeError(
                f"the new samples have outputs of shape {tuple(new)}, those of the kernel {tuple(own)}, and "
                "its columns are an uneven selection of these, or summed over the first axis; take the cross "
                "kernel of all of them, and slice it"
            )
        if not self.is_coupled and grid.shape[-2] < own[0]:
            raise ShapeError(
                f"the columns of the kernel are some entries of the first axis of outputs of shape "
                f"{tuple(own)}, and the new samples have {tuple(new)}: which of theirs are meant is open"
            )
        numbers = at_places(grid[..., 0, :] % inner, new[0], inner)
        labels = self.labels
        if not inputs.is_coupled and labels and labels[0][1] == own[0]:
            labels = ((labels[0][0], new[0]), *labels[1:])
        return StateAxis(inputs, numbers, None, labels)


@dataclass(frozen=True, eq=False)
class ParameterAxis:
    """Entries of the flattened parameter vector, R copies one after the other for a sum of R terms.

    Attributes:
        size: Number P of parameters' entries.
        slots: ``(*batch, R, 1)`` zeros that carry the batch shape.
        pick: ``(n,)`` positions among the R·P entries, or None for all in order.
    """

    size: int
    slots: Tensor
    pick: Tensor | None = None
    key: int = field(default_factory=lambda: next(_keys))

    def __getstate__(self) -> dict[str, object]:
        """Leave out what is computed from the rest."""
        return {part.name: getattr(self, part.name) for part in dataclasses.fields(self)}

    @classmethod
    def beside(cls, axis: StateAxis, size: int) -> ParameterAxis:
        """Return the parameter axis of the Jacobian whose rows are ``axis``."""
        return cls(size, torch.zeros((*axis.batch_shape, axis.terms, 1), dtype=torch.long))

    @cached_property
    def batch_shape(self) -> torch.Size:
        """Shape of the operator's batch."""
        return self.slots.shape[:-2]

    @cached_property
    def terms(self) -> int:
        """Number R of terms."""
        return self.slots.shape[-2]

    @cached_property
    def length(self) -> int:
        """Number n of entries."""
        return self.terms * self.size if self.pick is None else len(self.pick)

    def embed(self, vectors: Tensor) -> Tensor:
        """Lay ``(*batch, n, k)`` into the engine's block ``(M·R·k, P)``."""
        columns, kernels = vectors.shape[-1], self.batch_shape.numel()
        flat = vectors.reshape(kernels, self.length, columns)
        if self.pick is not None:
            pick = self.pick.to(flat.device)
            flat = flat.new_zeros((len(flat), self.terms * self.size, columns)).index_add(1, pick, flat)
        split = flat.reshape(kernels, self.terms, self.size, columns)  # (M, R, P, k): a term has its own J_r
        return split.permute(0, 1, 3, 2).flatten(0, 2)

    def extract(self, block: Tensor) -> Tensor:
        """Read ``(*batch, n, k)`` back from the engine's ``(M·R·k, P)``."""
        kernels = self.batch_shape.numel()
        columns = len(block) // max(kernels * self.terms, 1)
        split = block.reshape(kernels, self.terms, columns, self.size)  # (M, R, k, P)
        flat = split.permute(0, 1, 3, 2).flatten(1, 2)  # (M, R·P, k)
        if self.pick is not None:
            flat = flat[:, self.pick.to(flat.device)]
        return flat.reshape(*self.batch_shape, self.length, flat.shape[-1])

    def take(self, index: slice | Tensor) -> ParameterAxis:
        """Return the axis of some entries."""
        chosen = resolve_index(index, self.length)
        if torch.equal(chosen, torch.arange(self.length)):
            return self
        if len(chosen) == 0:
            raise OutOfRangeError("the index selects no column; an operator needs at least one")
        return ParameterAxis(self.size, self.slots, chosen if self.pick is None else self.pick[chosen])

    def map_batch(self, change: Callable[[Tensor], Tensor]) -> ParameterAxis:
        """Apply a reshaping of ``(*batch, R, 1)``."""
        return ParameterAxis(self.size, change(self.slots), self.pick)


Axis = StateAxis | ParameterAxis


class AxisReader:
    """Slices of an axis, to be asked for in order: what is streamed is read in one pass."""

    def __init__(self, axis: StateAxis) -> None:
        self._axis = axis
        # Picked rows may lie in any order: they are taken by `StateAxis.take`, which reads what it needs.
        in_order = axis.inputs.is_streamed and axis.pick is None
        self._between = axis.inputs.in_order() if in_order else None

    def take(self, rows: slice) -> StateAxis:
        """Return the axis of some consecutive rows, its samples in memory."""
        if self._between is None:
            return self._axis.take(rows)
        # The samples from that of the first row to that of the last: rows may start and stop inside one.
        offsets = self._axis.offsets
        first = int(torch.searchsorted(offsets, rows.start, right=True)) - 1
        last = int(torch.searchsorted(offsets, rows.stop))
        part = StateAxis(self._between(first, last), self._axis.outputs)
        start = int(offsets[first])
        return part.take(slice(rows.start - start, rows.stop - start))
