"""One batch of samples, in whatever nesting the model takes it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from ..errors import DeviceError, DtypeError, InputError, NonFiniteError
from .call import tensors_within
from .watch import tracked

__all__ = [
    "Batch",
    "Layout",
    "concatenate",
    "copied",
    "cut",
    "matching",
    "normalise",
    "require_sound",
    "same_kind",
    "take",
]

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
        batch_dim: Their sample axis.
    """

    nesting: Any
    labels: tuple[str, ...]
    batch_dim: int


def _map_nesting(node: Any, change: Callable[[Any, str], Any], label: str = "") -> Any:
    """Change every leaf of nested dicts, tuples and lists."""
    if isinstance(node, dict):
        return {key: _map_nesting(value, change, f"{label}[{key!r}]") for key, value in node.items()}
    if isinstance(node, (tuple, list)) and not isinstance(node, PackedSequence):
        parts = [_map_nesting(value, change, f"{label}[{i}]") for i, value in enumerate(node)]
        if isinstance(node, list):
            return parts
        return type(node)(*parts) if hasattr(node, "_fields") else tuple(parts)
    return change(node, label)


@dataclass(frozen=True, eq=False)
class Batch:
    """A batch of samples, ready for one call of the model.

    Attributes:
        tensors: The leaves that carry the sample axis, at dimension ``batch_dim``.
        layout: The nesting around them.
        num_outputs: Outputs per sample that the call must give; None if not known yet.
    """

    tensors: tuple[Tensor, ...]
    layout: Layout
    num_outputs: int | None = None

    @property
    def batch_dim(self) -> int:
        """The sample axis of every tensor."""
        return self.layout.batch_dim

    @property
    def num_samples(self) -> int:
        """Number B of samples."""
        return self.tensors[0].shape[self.batch_dim]

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


def take(batch: Batch, index: Tensor) -> Batch:
    """Return copies of the samples at the given positions."""
    return batch.map(lambda tensor: tensor.index_select(batch.batch_dim, index.to(tensor.device)))


def cut(batch: Batch, start: int, stop: int) -> Batch:
    """Return a range of samples as views."""
    if start == 0 and stop == batch.num_samples:
        return batch
    return batch.map(lambda tensor: tensor.narrow(batch.batch_dim, start, stop - start))


def copied(batch: Batch) -> Batch:
    """Return the samples in memory of their own."""
    return batch.map(torch.clone)


def matching(left: Batch, right: Batch) -> bool:
    """Whether two batches can be joined: same nesting, same other leaves, same shapes per sample."""
    if not _same_nesting(left.layout.nesting, right.layout.nesting):
        return False
    axis = left.batch_dim
    return all(
        a.dtype == b.dtype and a.shape[:axis] == b.shape[:axis] and a.shape[axis + 1 :] == b.shape[axis + 1 :]
        for a, b in zip(left.tensors, right.tensors, strict=True)
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
    return batches[0].replace([tracked(torch.cat(column, dim=batches[0].batch_dim)) for column in columns])


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


def normalise(x: Any, batch_dim: int, label: str = "input") -> Batch:
    """Return a tensor, tuple or mapping (nested ones too) as its sample tensors and the rest.

    Leaves that are no tensors, and tensors without axes, pass through to the model as they are.

    Raises:
        InputError: If there is no sample axis, or tensors differ in length along it.
    """
    tensors: list[Tensor] = []
    labels: list[str] = []

    def sort(leaf: Any, path: str) -> Any:
        _require_leaf(leaf, path)
        if not isinstance(leaf, Tensor) or leaf.dim() == 0:
            return leaf
        tensors.append(leaf)
        labels.append(path)
        return Place(len(tensors) - 1)

    nesting = _map_nesting(_plain(x), sort, label)
    if not tensors:
        raise InputError(
            f"{label} holds no tensor with a sample axis; pass a tensor, or a tuple or dict of them"
        )
    for name, tensor in zip(labels, tensors, strict=True):
        if tensor.dim() <= batch_dim:
            raise InputError(
                f"{name} of shape {tuple(tensor.shape)} has no axis {batch_dim}, where batch_dim= says that "
                "the samples lie; move its sample axis there, or make it a buffer of the model"
            )
        length, expected = tensor.shape[batch_dim], tensors[0].shape[batch_dim]
        if length != expected:
            other = next((axis for axis, size in enumerate(tensor.shape[:2]) if size == expected), None)
            if other is None:
                way_out = "pass tensors of one length, and make what all share a buffer of the model"
            else:
                way_out = (
                    f"its samples seem to lie on dimension {other} (time first?): transpose it, and what the "
                    "model makes of it"
                )
            raise InputError(
                f"{name} has {length} samples and {labels[0]} has {expected} (dimension {batch_dim}); "
                f"{way_out}"
            )
    return Batch(tuple(tensors), Layout(nesting, tuple(labels), batch_dim))


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
    for label, tensor in zip(batch.layout.labels, batch.tensors, strict=True):
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
        row = _first_bad_row(tensor, batch.batch_dim)
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
        # A sum is finite only if all are, and takes one pass; it may overflow, though.
        if not math.isfinite(part.sum()) and not bool(torch.isfinite(part).all()):
            finite = torch.isfinite(part).movedim(axis, 0).reshape(part.shape[axis], -1).all(1)
            return start + int((~finite).nonzero()[0, 0])
    return None
