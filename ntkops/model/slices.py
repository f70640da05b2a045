"""Batches of what is read by slices: memory-mapped and chunked arrays, and data sets of columns."""

from __future__ import annotations

import mmap
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from typing import Any, Protocol, overload

import numpy as np
import torch
from torch import Tensor

from ..errors import InputError

__all__ = ["Batches", "Sliceable"]

_KINDS = "biuf"  # NumPy's booleans, integers and floating numbers


class Sliceable(Protocol):
    """What has a length and parts: an array on disk or in memory, a tuple, a mapping, a data set."""

    def __len__(self) -> int:
        """Return how many there are."""

    def __getitem__(self, part: Any, /) -> Any:
        """Return one part, or a slice."""


class Batches(Sequence[Any]):
    """Batches of arrays or columns that do not fit into memory, read one slice at a time.

    A sequence of batches, to be passed where inputs go: ``ntkops.ntk(model, Batches(array, 256))``. Every
    pass reads each slice once. Of an array that is memory-mapped for reading, the pages of a slice are given
    back as soon as it is copied: they stay in the cache of the file system alone.

    Args:
        source: What is sliced along its first axis: an array (``numpy.memmap``, h5py, zarr, a tensor), a
            tuple of arrays of one length (positional inputs of the model), a mapping of them (keyword
            inputs), or a data set of columns whose slices are mappings, such as that of Hugging Face. With
            ``collate``, whatever has a length and gives a sample for a number: a list, a data set.
        batch_size: Samples of a batch; the last may be smaller. Operators join and split batches as they
            need, so that it decides memory and speed, never results.
        columns: Of a mapping or a data set: the name of one column (the model gets a tensor), a sequence of
            names (positional inputs), a mapping from keyword to name, or None for all (keyword inputs). For
            arrays leave it None.
        dtype: Dtype of the tensors: one for all floating columns, and for a single column whatever it holds;
            or a mapping by keyword, or by position. None leaves what is stored.
        collate: Makes a batch of a list of samples, as the ``collate_fn`` of a DataLoader does; it may pad
            them to one length. ``columns`` are then those of the batch.
        mask: Which positions of a batch are states, ``(B, T)``, true (or 1) where a position is real: a key,
            or place, of the batch, or a function of it. The batch is that of ``collate``, whatever
            ``columns`` takes from it. Rows of an operator are real positions only, and that padding does not
            move them is checked by running a sample at two lengths.

    Raises:
        InputError: If the source has no slices or no samples, lengths differ, a column is missing, has rows
            of different lengths, or holds no numbers; if ``collate`` gives no batch, or a mask is none.

    Example:
        >>> import numpy as np, torch, ntkops
        >>> stored = np.arange(15.0).reshape(5, 3)
        >>> batches = ntkops.Batches(stored, 2, dtype=torch.float32)
        >>> len(batches), batches.num_samples, batches[2].shape
        (3, 5, torch.Size([1, 3]))
        >>> ntkops.ntk(torch.nn.Linear(3, 2), batches).shape
        torch.Size([10, 10])

        Sequences of unlike length, padded within a batch; only real positions have rows:

        >>> def pad(sequences):
        ...     lengths = torch.tensor([len(sequence) for sequence in sequences])
        ...     x = torch.nn.utils.rnn.pad_sequence(sequences, batch_first=True)
        ...     return {"input": x, "real": torch.arange(x.shape[1]) < lengths[:, None]}
        >>> sequences = [torch.ones(length, 3) for length in (2, 4, 1)]
        >>> padded = ntkops.Batches(sequences, 2, columns="input", collate=pad, mask="real")
        >>> K = ntkops.ntk(torch.nn.Linear(3, 2), padded)
        >>> K.shape, K.offsets.tolist()
        (torch.Size([14, 14]), [0, 4, 12, 14])
    """

    def __init__(
        self,
        source: Sliceable,
        batch_size: int,
        columns: str | Sequence[str] | Mapping[str, str] | None = None,
        dtype: torch.dtype | Mapping[Any, torch.dtype] | None = None,
        *,
        collate: Callable[[list[Any]], Any] | None = None,
        mask: Hashable | Callable[[Any], Any] | None = None,
    ) -> None:
        if not isinstance(batch_size, int) or isinstance(batch_size, bool) or batch_size < 1:
            raise InputError(f"batch_size={batch_size!r}: pass a positive number of samples")
        if collate is not None and not callable(collate):
            raise InputError(
                f"collate={collate!r}: pass a function of a list of samples, as a DataLoader has it"
            )
        self._batch_size, self._collate, self._mask = batch_size, collate, mask
        if collate is None:
            self._table, self._columns = _columns_of(source, columns)
            self._shape = _shape_of(source, columns)
            self._dtypes = _dtypes_of(dtype, list(self._columns))
            self.num_samples = self._length()
        else:
            self._source, self._chosen, self._dtypes = source, columns, dtype
            self.num_samples = _count(source)
        self.read(0, 1)  # what cannot be read is found now

    @property
    def collates(self) -> bool:
        """Whether batches are made of single samples, so that a sample can be had alone."""
        return self._collate is not None

    def read(self, start: int, stop: int) -> tuple[Any, Tensor | None]:
        """Read some samples as one batch.

        Args:
            start: The first of them.
            stop: One past the last.

        Returns:
            The inputs of the model, and which of their positions are real: ``(B, T)``, or None.
        """
        if self._collate is None:
            whole = chosen = self._convert(slice(start, stop))
        else:
            whole = self._collate([_sample(self._source, number) for number in range(start, stop)])
            chosen = self._cast(_chosen_of(whole, self._chosen))
        return chosen, None if self._mask is None else _mask_of(whole, self._mask, stop - start)

    def batch(self, position: int) -> tuple[Any, Tensor | None]:
        """Read the batch of a number from 0, with its mask; see `read`."""
        start = position * self._batch_size
        return self.read(start, min(start + self._batch_size, self.num_samples))

    def _cast(self, chosen: Any) -> Any:
        """Return a batch that was made of samples in the dtypes that are wanted."""
        if self._dtypes is None:
            return chosen
        parts = (
            chosen
            if isinstance(chosen, Mapping)
            else dict(enumerate(chosen if isinstance(chosen, tuple) else [chosen]))
        )
        self._shape = "tensor" if isinstance(chosen, Tensor) else ""
        cast = {
            key: part.to(self._dtype_for(key, part)) if isinstance(part, Tensor) else part
            for key, part in parts.items()
        }
        if isinstance(chosen, Mapping):
            return cast
        return tuple(cast.values()) if isinstance(chosen, tuple) else cast[0]

    @property
    def batch_size(self) -> int:
        """Samples of a batch."""
        return self._batch_size

    def _length(self) -> int:
        if self._table is not None:
            lengths = {"the data set": len(self._table)}
        else:
            lengths = {_label(key): len(array) for key, array in self._columns.items()}
        if len(set(lengths.values())) > 1:
            raise InputError(f"arrays of different lengths: {lengths}; pass one row of each for every sample")
        (length, *_) = lengths.values()
        if length == 0:
            raise InputError("the source has no samples; pass at least one")
        return int(length)

    def __len__(self) -> int:
        """Return the number of batches."""
        return -(-self.num_samples // self._batch_size)

    @overload
    def __getitem__(self, index: int) -> Any: ...

    @overload
    def __getitem__(self, index: slice) -> list[Any]: ...

    def __getitem__(self, index: int | slice) -> Any:
        """Read one batch, or several.

        Args:
            index: Number of the batch, from the end where it is negative, or a slice of such numbers.

        Returns:
            A tensor, or a tuple or dict of tensors ``(B, ...)``; a list of these for a slice.

        Raises:
            IndexError: If there is no such batch.
        """
        if isinstance(index, slice):
            return [self[position] for position in range(*index.indices(len(self)))]
        position = index + len(self) if index < 0 else index
        if not 0 <= position < len(self):
            raise IndexError(f"batch {index} does not exist: there are {len(self)}")
        return self.batch(position)[0]

    def __iter__(self) -> Iterator[Any]:
        """Read the batches one after the other."""
        return (self[position] for position in range(len(self)))

    def __repr__(self) -> str:
        """Show the number of samples and the size of a batch."""
        return f"Batches({self.num_samples} samples in batches of {self._batch_size})"

    def _convert(self, rows: slice) -> Any:
        read = self._columns if self._table is None else self._table[rows]
        tensors = {}
        for key, place in self._columns.items():
            found = place[rows] if self._table is None else read[place]
            label = _label(key if self._table is None else place)
            tensor = _tensor(found, label, rows.stop - rows.start)
            _give_back(place)
            tensors[key] = tensor.to(self._dtype_for(key, tensor))
        if self._shape == "tensor":
            return next(iter(tensors.values()))
        return tuple(tensors.values()) if self._shape == "tuple" else tensors

    def _dtype_for(self, key: Any, tensor: Tensor) -> torch.dtype:
        if isinstance(self._dtypes, Mapping):
            return self._dtypes.get(key, tensor.dtype)
        if self._dtypes is None or not (self._shape == "tensor" or tensor.is_floating_point()):
            return tensor.dtype
        return self._dtypes


def _count(source: Any) -> int:
    """Return the number of samples of what gives one for a number."""
    if isinstance(source, (Mapping, tuple)):
        lengths = {len(array) for array in (source.values() if isinstance(source, Mapping) else source)}
        if len(lengths) != 1:
            raise InputError(
                f"arrays of different lengths: {sorted(lengths)}; pass one row of each for every sample"
            )
        return lengths.pop()
    if not hasattr(source, "__getitem__") or not hasattr(source, "__len__"):
        raise InputError(
            f"collate= makes batches of single samples, and a {type(source).__name__} does not give them by "
            "number; pass a list, or the data set of a loader: Batches(loader.dataset, size, "
            "collate=loader.collate_fn)"
        )
    if len(source) == 0:
        raise InputError("the source has no samples; pass at least one")
    return len(source)


def _sample(source: Any, number: int) -> Any:
    if isinstance(source, Mapping):
        return {key: array[number] for key, array in source.items()}
    return tuple(array[number] for array in source) if isinstance(source, tuple) else source[number]


def _chosen_of(whole: Any, columns: Any) -> Any:
    """Return what the model gets of a batch."""
    if isinstance(whole, list):
        whole = tuple(whole)
    if columns is None:
        return dict(whole) if isinstance(whole, Mapping) else whole
    if isinstance(columns, (str, int)):
        return _part(whole, columns, "columns")
    if isinstance(columns, Mapping):
        return {key: _part(whole, name, "columns") for key, name in columns.items()}
    return tuple(_part(whole, name, "columns") for name in columns)


def _part(whole: Any, key: Any, option: str) -> Any:
    present = (
        list(whole)
        if isinstance(whole, Mapping)
        else list(range(len(whole)))
        if isinstance(whole, tuple)
        else []
    )
    if key not in present:
        has = f"it has {present}" if present else f"it is a {type(whole).__name__}: pass a function of it"
        raise InputError(f"{option}: there is no {key!r} in a batch; {has}")
    return whole[key]


def _mask_of(whole: Any, mask: Any, count: int) -> Tensor:
    """Return which positions of a batch are real."""
    whole = tuple(whole) if isinstance(whole, list) else whole
    found = mask(whole) if callable(mask) else _part(whole, mask, "mask")
    if not isinstance(found, Tensor) or found.dim() != 2 or len(found) != count:
        shown = type(found).__name__
        if isinstance(found, Tensor):
            shown = f"tensor of shape {tuple(found.shape)}"
        raise InputError(f"mask= gives a {shown} for {count} samples; it must be (samples, positions)")
    if found.is_floating_point() or found.is_complex() or bool(((found != 0) & (found != 1)).any()):
        raise InputError(
            f"mask= gives a {found.dtype} tensor, or other values than 0 and 1; true, or 1, says that a "
            "position is real (an additive mask has it the other way round: mask=lambda b: b[...] == 0)"
        )
    return found.bool()


def _label(key: Any) -> str:
    return f"column {key!r}" if isinstance(key, str) else f"array {key}"


def _shape_of(source: Any, columns: Any) -> str:
    """Return what a batch is: "tensor", "tuple" or "dict"."""
    if isinstance(source, Mapping) or hasattr(source, "column_names"):
        if isinstance(columns, str):
            return "tensor"
        return "dict" if columns is None or isinstance(columns, Mapping) else "tuple"
    return "tuple" if isinstance(source, tuple) else "tensor"


def _columns_of(source: Any, columns: Any) -> tuple[Any, dict[Any, Any]]:
    """Return the data set, or None, and the arrays, or names of its columns, by keyword or position."""
    if isinstance(source, Mapping) or hasattr(source, "column_names"):
        present = list(source) if isinstance(source, Mapping) else list(source.column_names or [])
        chosen = _chosen(columns, present)
        if isinstance(source, Mapping):
            return None, {key: _sliceable(source[name], _label(name)) for key, name in chosen.items()}
        if not hasattr(source, "__getitem__") or not hasattr(source, "__len__"):
            raise InputError(
                f"a {type(source).__name__} has no slices, it can only be read in order; pass "
                "DataLoader(dataset, batch_size=64) itself, or a data set that is stored"
            )
        names = list(dict.fromkeys(chosen.values()))
        return (source.select_columns(names) if hasattr(source, "select_columns") else source), chosen
    if columns is not None:
        raise InputError("columns= is for mappings and data sets of columns; pass the arrays themselves")
    arrays = source if isinstance(source, tuple) else (source,)
    if not arrays:
        raise InputError("an empty tuple has no arrays; pass at least one")
    return None, {i: _sliceable(array, f"array {i}") for i, array in enumerate(arrays)}


def _chosen(columns: Any, present: list[str]) -> dict[Any, str]:
    if columns is None:
        chosen: dict[Any, str] = {name: name for name in present}
    elif isinstance(columns, str):
        chosen = {columns: columns}
    elif isinstance(columns, Mapping):
        chosen = dict(columns)
    else:
        chosen = dict(enumerate(columns))
    missing = [name for name in chosen.values() if name not in present]
    if missing or not chosen:
        raise InputError(f"columns={columns!r}: there is no {missing or 'column'}; there are {present}")
    return chosen


def _sliceable(array: Any, label: str) -> Any:
    if isinstance(array, str | bytes) or not hasattr(array, "__getitem__") or not hasattr(array, "__len__"):
        raise InputError(f"{label} is a {type(array).__name__}, which has no slices; pass an array")
    return array


def _dtypes_of(dtype: Any, keys: list[Any]) -> Any:
    wanted = list(dtype.values()) if isinstance(dtype, Mapping) else [dtype]
    if dtype is not None and not all(isinstance(one, torch.dtype) for one in wanted):
        raise InputError(f"dtype={dtype!r}: pass a torch.dtype, or a mapping to torch.dtype")
    if isinstance(dtype, Mapping) and not set(dtype) <= set(keys):
        raise InputError(f"dtype names {sorted(map(str, set(dtype) - set(keys)))}; there are {keys}")
    return dtype


def _tensor(found: Any, label: str, count: int) -> Tensor:
    """Return a slice as a tensor in memory of its own."""
    if isinstance(found, Tensor):
        tensor = found.detach().clone()
    else:
        if isinstance(found, list) and found and isinstance(found[0], Tensor):
            found = [row.numpy() for row in found]
        try:
            array = np.array(found)
        except ValueError as error:  # rows of different lengths
            raise InputError(f"{label} has rows of different shapes ({error}); pad them to one") from error
        if array.dtype.kind not in _KINDS:
            raise InputError(
                f"{label} holds {array.dtype} and no numbers; choose other columns (columns=), or convert it"
            )
        tensor = torch.from_numpy(array.astype(array.dtype.newbyteorder("="), copy=False))
    if tensor.dim() == 0 or len(tensor) != count:
        raise InputError(f"{label}: a slice of {count} samples has shape {tuple(tensor.shape)}")
    return tensor


def _give_back(array: Any) -> None:
    """Drop the pages of a file that is mapped for reading: they would count as memory of this process."""
    mapped = getattr(array, "_mmap", None)
    if isinstance(array, np.memmap) and array.mode == "r" and isinstance(mapped, mmap.mmap):
        advice = getattr(mmap, "MADV_DONTNEED", None)
        if advice is not None:
            mapped.madvise(advice)
