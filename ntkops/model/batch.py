"""One batch of samples, in whatever nesting the model takes it."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from ..errors import DeviceError, DtypeError, InputError, NonFiniteError
from .call import tensors_within
from .watch import all_finite, tracked

__all__ = [
    "Batch",
    "BatchDim",
    "Held",
    "Layout",
    "are_coupled",
    "concatenate",
    "copied",
    "cut",
    "matching",
    "normalise",
    "require_batch_dim",
    "require_sound",
    "same_kind",
    "take",
]

# Where samples lie: one axis for all tensors, None where all samples share them, or these by key or position.
BatchDim: TypeAlias = int | None | Mapping[Any, Any] | Sequence[Any]
"""The sample axis of inputs and outputs: a position; None for coupled samples; or an axis for each input, by
keyword or position, ``{"x": 0, "h": 1, "edges": None}``."""

_FINITE_CHUNK = 1 << 24  # entries looked at together, to bound the memory of the check


@dataclass(frozen=True)
class Place:
    """Where a sample tensor goes in the nesting."""

    number: int


@dataclass(frozen=True, eq=False)
class Layout:
    """Everything of an input but its sample tensors.

    Attributes:
        nesting: The inputs with a `Place` for each sample tensor; other leaves pass through.
        labels: How messages call the sample tensors.
        axes: Their sample axes; None for a tensor that all samples share.
        masked: Whether the last tensor is a mask of real positions, which the model is not given.
    """

    nesting: Any
    labels: tuple[str, ...]
    axes: tuple[int | None, ...]
    masked: bool = False

    @property
    def coupled(self) -> bool:
        """Whether no tensor has a sample axis, so that all of it is one sample."""
        return all(axis is None for axis in self.axes)


def _map_nesting(node: Any, change: Callable[[Any, str], Any], label: str = "") -> Any:
    """Change every leaf of nested dicts, tuples and lists."""
    if isinstance(node, dict):
        return {key: _map_nesting(value, change, f"{label}[{key!r}]") for key, value in node.items()}
    if isinstance(node, (tuple, list)) and not isinstance(node, PackedSequence):
        parts = [_map_nesting(value, change, f"{label}[{i}]") for i, value in enumerate(node)]
        if isinstance(node, list):
            return parts
        return type(node)(*parts) if hasattr(node, "_fields") else tuple(parts)  # a named tuple stays one
    return change(node, label)


@dataclass(frozen=True, eq=False)
class Batch:
    """A batch of samples, ready for one call of the model.

    Attributes:
        tensors: The leaves that are tensors.
        layout: The nesting around them, and their sample axes.
        num_outputs: Outputs per sample that the call must give; None if not known yet.
        inner: Outputs at one position, where samples differ in length: the outputs are then those of real
            positions, with zeros behind them.
    """

    tensors: tuple[Tensor, ...]
    layout: Layout
    num_outputs: int | None = None
    inner: int | None = None

    @property
    def mask(self) -> Tensor | None:
        """Which positions of the samples are real, ``(B, T)``; None where all are."""
        return self.tensors[-1] if self.layout.masked else None

    @functools.cached_property
    def num_samples(self) -> int:
        """Number B of samples, one where they are coupled."""
        return next((t.shape[axis] for t, axis in self.placed if axis is not None), 1)

    @property
    def placed(self) -> Iterator[tuple[Tensor, int | None]]:
        """Every tensor with its sample axis."""
        return zip(self.tensors, self.layout.axes, strict=True)

    @property
    def inputs(self) -> Any:
        """The inputs as the model takes them: a tensor or tuple (positional), or a dict (keywords)."""
        tensors = self.tensors
        return _map_nesting(
            self.layout.nesting, lambda leaf, _: tensors[leaf.number] if type(leaf) is Place else leaf
        )

    def replace(self, tensors: Sequence[Tensor]) -> Batch:
        """Return the same batch around other sample tensors."""
        return dataclasses.replace(self, tensors=tuple(tensors))

    def map(self, change: Callable[[Tensor], Tensor]) -> Batch:
        """Return the batch with every sample tensor changed."""
        return self.replace([tracked(change(tensor)) for tensor in self.tensors])

    def aliased(self, live: bool) -> Batch:
        """Return fresh aliases, on which a model may call requires_grad_(); live ones keep their graph."""

        def alias(tensor: Tensor) -> Tensor:
            if not live:
                return tensor.detach()
            return tensor if tensor.requires_grad else tensor.view_as(tensor)

        return self.map(alias)

    def map_samples(self, change: Callable[[Tensor, int], Tensor]) -> Batch:
        """Return the batch with every tensor changed that has a sample axis, given that axis."""
        changed = [tensor if axis is None else change(tensor, axis) for tensor, axis in self.placed]
        return self.replace([tracked(tensor) for tensor in changed])

    def sample_shapes(self) -> tuple[torch.Size, ...]:
        """Return the shapes of what one sample has."""
        return tuple(
            t.shape if axis is None else t.shape[:axis] + t.shape[axis + 1 :] for t, axis in self.placed
        )


def take(batch: Batch, index: Tensor) -> Batch:
    """Return copies of the samples at the given positions."""
    return batch.map_samples(lambda tensor, axis: tensor.index_select(axis, index.to(tensor.device)))


def cut(batch: Batch, start: int, stop: int) -> Batch:
    """Return a range of samples as views."""
    if start == 0 and stop == batch.num_samples:
        return batch
    return batch.map_samples(lambda tensor, axis: tensor.narrow(axis, start, stop - start))


def copied(batch: Batch) -> Batch:
    """Return the samples in memory of their own."""
    return batch.map(torch.clone)


def matching(left: Batch, right: Batch) -> bool:
    """Whether two batches can be joined: same nesting, same other leaves, same shapes per sample."""
    if left.layout.coupled or not _same_nesting(left.layout.nesting, right.layout.nesting):
        return False
    # What all samples share must be the same tensor, or equal: it is given once for the joined batch.
    return left.sample_shapes() == right.sample_shapes() and all(
        a.dtype == b.dtype and (axis is not None or a is b or torch.equal(a, b))
        for (a, axis), b in zip(left.placed, right.tensors, strict=True)
    )


def same_kind(left: Batch, right: Batch) -> bool:
    """Whether two batches differ in numbers and lengths alone: same nesting, dtypes and numbers of axes."""
    return (
        len(left.tensors) == len(right.tensors)
        and all(
            a.dtype == b.dtype and a.dim() == b.dim()
            for a, b in zip(left.tensors, right.tensors, strict=True)
        )
        and _same_nesting(left.layout.nesting, right.layout.nesting)
    )


def _same_nesting(left: Any, right: Any) -> bool:
    """Whether two nestings, with places for tensors and other leaves, are equal at every depth."""
    if isinstance(left, Tensor) and isinstance(right, Tensor):
        return left.dtype == right.dtype and torch.equal(left, right)
    if type(left) is not type(right):
        return False
    if isinstance(left, dict):
        return list(left) == list(right) and all(_same_nesting(left[key], right[key]) for key in left)
    if isinstance(left, (tuple, list)):
        return len(left) == len(right) and all(map(_same_nesting, left, right))
    return left is right or bool(left == right)


def concatenate(batches: Sequence[Batch]) -> Batch:
    """Join matching batches."""
    if len(batches) == 1:
        return batches[0]
    columns = zip(*(batch.tensors for batch in batches), strict=True)
    joined = [
        column[0] if axis is None else torch.cat(column, dim=axis)
        for column, axis in zip(columns, batches[0].layout.axes, strict=True)
    ]
    return batches[0].replace([tracked(tensor) for tensor in joined])


@dataclass(frozen=True, eq=False)
class Held:
    """Samples in memory, in one batch as far as they can be joined.

    Attributes:
        batches: No two neighbours of them match.
    """

    batches: tuple[Batch, ...]

    @classmethod
    def of(cls, parts: Iterable[Batch]) -> Held:
        """Join neighbours that match."""
        runs: list[list[Batch]] = []
        for part in parts:
            if runs and matching(runs[-1][-1], part):
                runs[-1].append(part)
            else:
                runs.append([part])
        return cls(tuple(map(concatenate, runs)))

    @property
    def num_samples(self) -> int:
        """Number N of samples."""
        return sum(batch.num_samples for batch in self.batches)

    def map(self, change: Callable[[Tensor], Tensor]) -> Held:
        """Return the samples with every tensor changed."""
        return Held(tuple(batch.map(change) for batch in self.batches))

    def taken(self, index: Tensor | range) -> Iterator[Batch]:
        """Yield the samples at the given positions, in their order: views of a range, copies of others."""
        starts = [0, *itertools.accumulate(batch.num_samples for batch in self.batches)]
        if isinstance(index, range):
            for batch, start, stop in zip(self.batches, starts, starts[1:], strict=False):
                first, last = max(index.start, start), min(index.stop, stop)
                # An empty batch is yielded where an empty range is asked for: a rank without samples has one.
                if first < last or start == stop == index.start:
                    yield cut(batch, first - start, last - start)
            return
        # Runs of positions in one batch: each is one copy, in the order that was asked for.
        owners = torch.bucketize(index, torch.tensor(starts[1:]), right=True)
        numbers, counts = torch.unique_consecutive(owners, return_counts=True)
        for number, part in zip(numbers.tolist(), index.split(counts.tolist()), strict=True):
            yield take(self.batches[number], part - starts[number])


def _plain(x: Any) -> Any:
    """Turn mappings at any depth into dicts."""
    if isinstance(x, PackedSequence):
        return x
    if isinstance(x, Mapping):
        return {key: _plain(value) for key, value in x.items()}
    if isinstance(x, (tuple, list)):
        parts = [_plain(value) for value in x]
        if isinstance(x, list):
            return parts
        return type(x)(*parts) if hasattr(x, "_fields") else tuple(parts)
    return x


def _require_leaf(leaf: Any, label: str) -> None:
    """Raise if a leaf can be neither a sample tensor nor passed through."""
    if isinstance(leaf, PackedSequence):
        raise InputError(
            f"{label} is a PackedSequence, which has no sample axis; pass the padded tensor and the lengths, "
            "and pack inside the model"
        )
    if isinstance(leaf, Tensor):
        if leaf.layout != torch.strided or leaf.is_nested:
            kind = "nested" if leaf.is_nested else str(leaf.layout).removeprefix("torch.")
            raise InputError(
                f"{label} is a {kind} tensor; pass a dense one (to_dense, or padded with a mask)"
            )
    elif isinstance(leaf, np.memmap):
        raise InputError(
            f"{label} is a memory-mapped NumPy array; pass ntkops.Batches(array, batch_size=64), which reads "
            "one slice at a time, or torch.from_numpy(np.array(array)) to hold all of it"
        )
    elif type(leaf).__module__ == "numpy" and getattr(leaf, "ndim", 0) > 0:
        raise InputError(f"{label} is a NumPy array; pass torch.from_numpy(array), in the model's dtype")
    elif tensors_within(leaf):
        raise InputError(
            f"{label} is a {type(leaf).__name__} that holds tensors, whose samples cannot be told apart; "
            "pass its tensors in a tuple or dict"
        )


def require_batch_dim(batch_dim: BatchDim) -> None:
    """Raise unless all that is said of sample axes are axes, or None.

    Raises:
        InputError: Naming what is not.
    """
    is_axis = isinstance(batch_dim, int) and not isinstance(batch_dim, bool) and batch_dim >= 0
    if batch_dim is None or is_axis:
        return
    inner = list(batch_dim.values()) if isinstance(batch_dim, Mapping) else batch_dim
    if not isinstance(inner, (list, tuple)) or not inner:
        raise InputError(
            f"batch_dim={batch_dim!r}; it is the number of an axis, counted from 0, None where there is none "
            "of samples, or a dict or tuple of these, as the inputs are"
        )
    for one in inner:
        require_batch_dim(one)


def are_coupled(batch_dim: BatchDim) -> bool:
    """Whether no input has a sample axis, so that all of them are one sample."""
    if isinstance(batch_dim, Mapping | Sequence):
        return all(map(are_coupled, batch_dim.values() if isinstance(batch_dim, Mapping) else batch_dim))
    return batch_dim is None


def _note_axes(node: Any, batch_dim: BatchDim, label: str, found: dict[str, int | None]) -> None:
    """Write down the sample axis of every leaf, by its label."""
    if batch_dim is None or isinstance(batch_dim, int):
        _map_nesting(node, lambda _, path: found.update({path: batch_dim}), label)
        return
    by_key = isinstance(batch_dim, Mapping)
    if by_key != isinstance(node, dict) or not isinstance(node, (dict, list, tuple)):
        raise InputError(
            f"batch_dim={batch_dim!r} has axes by {'key' if by_key else 'position'}, and {label} is a "
            f"{type(node).__name__}; give them as the inputs are: a dict by keyword, a tuple by position"
        )
    parts = node if isinstance(node, dict) else dict(enumerate(node))
    axes: Mapping[Any, Any] = batch_dim if isinstance(batch_dim, Mapping) else dict(enumerate(batch_dim))
    if parts.keys() != axes.keys():
        other = next(key for key in (*parts, *axes) if key not in parts or key not in axes)
        what = f"has no axis for {label}[{other!r}]" if other in parts else f"names {other!r}, not in {label}"
        raise InputError(
            f"batch_dim={batch_dim!r} {what}; say for every input on which axis the samples lie, or None "
            "where all samples share it"
        )
    for key, part in parts.items():
        _note_axes(part, axes[key], f"{label}[{key!r}]", found)


def normalise(x: Any, batch_dim: BatchDim, label: str = "input", mask: Tensor | None = None) -> Batch:
    """Return a tensor, tuple or mapping (nested ones too) as its tensors and the rest.

    Leaves that are no tensors, and tensors without axes, pass through to the model as they are. A mask of
    real positions, ``(B, T)``, goes with the samples and not to the model.

    Raises:
        InputError: If there is no sample axis where one is said to be, or tensors differ in length along it.
    """
    tensors: list[Tensor] = []
    labels: list[str] = []
    axes: list[int | None] = []
    own: dict[str, int | None] = {}

    def sort(leaf: Any, path: str) -> Any:
        _require_leaf(leaf, path)
        if not isinstance(leaf, Tensor) or leaf.dim() == 0:
            return leaf
        tensors.append(leaf)
        labels.append(path)
        axes.append(own[path])
        return Place(len(tensors) - 1)

    plain = _plain(x)
    _note_axes(plain, batch_dim, label, own)
    nesting = _map_nesting(plain, sort, label)
    if mask is not None:
        tensors.append(mask)
        labels.append(f"the mask of {label}")
        axes.append(0)
    batch = Batch(tuple(tensors), Layout(nesting, tuple(labels), tuple(axes), mask is not None))
    if not tensors:
        raise InputError(
            f"{label} holds no tensor with a sample axis; pass a tensor, or a tuple or dict of them"
        )
    first: tuple[str, int] | None = None
    for name, (tensor, axis) in zip(labels, batch.placed, strict=True):
        if axis is None:
            continue
        if tensor.dim() <= axis:
            raise InputError(
                f"{name} of shape {tuple(tensor.shape)} has no axis {axis}, where batch_dim= says that "
                "the samples lie; move its sample axis there, or make it a buffer of the model"
            )
        length = tensor.shape[axis]
        first = first or (name, length)
        if length != first[1]:
            other = next((axis for axis, size in enumerate(tensor.shape[:2]) if size == first[1]), None)
            if other is None:
                way_out = (
                    "pass tensors of one length, and make what all share a buffer of the model, or say None "
                    "for it in batch_dim={...}"
                )
            else:
                way_out = (
                    f"its samples seem to lie on dimension {other} (time first?): transpose it, and what the "
                    "model makes of it, or say so in batch_dim={...}"
                )
            raise InputError(
                f"{name} has {length} samples and {first[0]} has {first[1]} (dimension {axis}); {way_out}"
            )
    return batch


def require_sound(
    batch: Batch, dtypes: Collection[torch.dtype], device: torch.device, offset: int = 0
) -> None:
    """Raise if a batch is empty, not finite, or does not fit the model's dtype or device.

    ``dtypes`` are those of the model, the selected parameters' first; ``offset`` samples came before.

    Raises:
        InputError: If there is no sample.
        DtypeError: For a floating dtype that the model does not have.
        DeviceError: For another device than the model's.
        NonFiniteError: Naming the first sample that holds NaN or infinity.
    """
    if batch.num_samples == 0:
        raise InputError(f"{batch.layout.labels[0]} has no samples; pass at least one")
    for label, (tensor, axis) in zip(batch.layout.labels, batch.placed, strict=True):
        if tensor.device != device:
            raise DeviceError(
                f"{label} lives on {tensor.device}, the model on {device}; move it with .to({str(device)!r})"
            )
        if not tensor.is_floating_point():
            continue
        if dtypes and tensor.dtype not in dtypes:
            own = str(next(iter(dtypes))).removeprefix("torch.")
            raise DtypeError(
                f"{label} is {str(tensor.dtype).removeprefix('torch.')}, the model {own}; cast with "
                f"x.to(torch.{own}), or the model with model.to({tensor.dtype})"
            )
        if axis is None:
            if not all_finite(tensor):
                raise NonFiniteError(
                    f"{label} is not finite (NaN or infinity), first at position "
                    f"{tuple((~torch.isfinite(tensor)).nonzero()[0].tolist())}; drop or mend what is there"
                )
            continue
        row = _first_bad_row(tensor, axis)
        if row is not None:
            raise NonFiniteError(
                f"{label} row {row + offset} is not finite (NaN or infinity); drop or mend that sample (in "
                "an additive mask use torch.finfo(dtype).min, or a boolean mask)"
            )


def _first_bad_row(tensor: Tensor, axis: int) -> int | None:
    """Return the first sample that holds NaN or infinity."""
    rows = max(1, _FINITE_CHUNK // max(1, tensor.numel() // tensor.shape[axis]))
    for start in range(0, tensor.shape[axis], rows):
        part = tensor.detach().narrow(axis, start, min(rows, tensor.shape[axis] - start))
        if not all_finite(part):
            finite = torch.isfinite(part).movedim(axis, 0).reshape(part.shape[axis], -1).all(1)
            return start + int((~finite).nonzero()[0, 0])
    return None
