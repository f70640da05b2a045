"""A re-iterable of batches, such as a DataLoader: read again in every pass, and compared with the first."""

from __future__ import annotations

from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, default_collate

from ..errors import InputError, NonDeterministicDataError
from .batch import Batch, BatchDim, Held, concatenate, copied, cut, matching, normalise, require_sound, take
from .context import disturb_randomness, untouched_randomness
from .slices import Batches
from .watch import bits_of, tracked

__all__ = ["Stream", "StreamReader", "moved_ahead"]


_OTHER_SEED = 7238763  # any that a user is unlikely to have set
_HASHED = 2**18  # words hashed at a time
_CPU = torch.device("cpu")


def _fingerprint(batch: Batch) -> tuple[int, ...]:
    """Return a hash of the bits of each tensor, which any change alters, also an exchange of entries."""
    return tuple(_bit_hash(tensor.movedim(axis or 0, 0)) for tensor, axis in batch.placed)


def _bit_hash(tensor: Tensor) -> int:
    """Return a sum of 32-bit words with random odd weights modulo 2**64, which is a universal hash."""
    bits = bits_of(tensor).reshape(tensor.shape[0], tensor.shape[1:].numel())  # a row a sample
    words = bits.view(torch.int32) if bits.element_size() == 8 and bits.shape[1] else bits
    weights = _weights(words.shape[1]).to(words.device)
    step = max(1, _HASHED // max(1, words.shape[1]))
    rows = torch.cat([(part.long() * weights).sum(1) for part in words.split(step)])  # (B,)
    return int((rows * _weights(len(rows)).to(rows.device)).sum())


@lru_cache(maxsize=8)
def _weights(count: int) -> Tensor:
    """Return ``(count,)`` odd weights, the same in every pass."""
    generator = torch.Generator().manual_seed(80 + count)
    return torch.randint(-(2**62), 2**62, (count,), generator=generator) * 2 + 1


def _generators(source: Any) -> list[torch.Generator]:
    """Return the generators that a loader draws from, each once: its own, and those of its samplers."""
    holders = [source, getattr(source, "sampler", None)]
    holders.append(getattr(getattr(source, "batch_sampler", None), "sampler", None))
    found = [getattr(holder, "generator", None) for holder in holders]
    return list({id(g): g for g in found if isinstance(g, torch.Generator)}.values())


@contextmanager
def _untouched(source: Any) -> Iterator[None]:
    """Keep the global random state and the source's own generators as they are."""
    states = [(generator, generator.get_state()) for generator in _generators(source)]
    try:
        with untouched_randomness():
            yield
    finally:
        for generator, state in states:
            generator.set_state(state)


@dataclass(frozen=True, eq=False)
class Real:
    """How many positions of the samples of a batch are real.

    Attributes:
        positions: Number T of positions, padding included.
        counts: ``(B,)``.
    """

    positions: int
    counts: Tensor


class Stream:
    """Batches that are read from their source in every pass.

    Construction reads the source once in full, and its first batch once more. A pass that starts later than
    at the first sample reads what is before, too, unless the source is a sequence of batches (a list,
    `ntkops.Batches`). Batches on the CPU for a model elsewhere are moved one by one.

    Args:
        source: A re-iterable of tensors, tuples, lists (taken as tuples) or mappings.
        batch_dim: The sample axis, or axes.
        dtypes: Floating dtypes of the model.
        device: The model's device.

    Attributes:
        lengths: Samples in each batch of the source.
        kinds: Shapes of one sample's tensors, in each batch.
        examples: A sample of each kind.
        real: How many positions of the samples of each batch are real; None without a mask.
        sample_bytes: Bytes of one sample, of the largest one where they differ.

    Raises:
        InputError: For a one-shot iterator, a data set without batches, or an empty source.
        NonDeterministicDataError: If a second pass begins with other data.
    """

    def __init__(
        self,
        source: Iterable[Any],
        batch_dim: BatchDim,
        dtypes: Collection[torch.dtype],
        device: torch.device,
    ) -> None:
        _require_reiterable(source)
        self._source = source
        self._batch_dim = batch_dim
        self._dtype: torch.dtype | None = None
        self._device: torch.device | str | None = None
        self._num_outputs: int | None = None
        self._inner: int | None = None
        self.kinds: list[tuple[torch.Size, ...]] = []
        self.examples: dict[tuple[torch.Size, ...], Batch] = {}
        self.real: list[Real | None] = []
        self._prints: tuple[tuple[int, ...], ...] = ()
        self.sample_bytes = 1
        lengths: list[int] = []
        prints: list[tuple[int, ...]] = []
        samples = 0
        for batch in self._read():
            away = device != _CPU and all(tensor.device == _CPU for tensor in batch.tensors)
            require_sound(batch, dtypes, _CPU if away else device, offset=samples)
            if away:
                self._device = device
            lengths.append(batch.num_samples)
            self.kinds.append(batch.sample_shapes())
            if self.kinds[-1] not in self.examples:
                self.examples[self.kinds[-1]] = copied(cut(batch, 0, 1))
            mask = batch.mask
            self.real.append(None if mask is None else Real(mask.shape[1], mask.sum(1).cpu()))
            prints.append(_fingerprint(batch))
            samples += batch.num_samples
            bytes_held = sum(tensor.numel() * tensor.element_size() for tensor in batch.tensors)
            self.sample_bytes = max(self.sample_bytes, -(-bytes_held // batch.num_samples))
        if not lengths:
            raise InputError(f"the {type(source).__name__} yields no batch; pass at least one")
        self.lengths = tuple(lengths)
        self._stops = tuple(accumulate(lengths))
        self._prints = tuple(prints)
        self._require_repeatable()

    @property
    def num_samples(self) -> int:
        """Number of samples in all batches."""
        return self._stops[-1]

    def differ(self, other: Stream) -> bool:
        """Whether the fingerprints of the batches differ, where both come in batches of the same lengths."""
        return self.lengths == other.lengths and self._prints != other._prints

    @property
    def is_masked(self) -> bool:
        """Whether masks say which positions are real."""
        return self.real[0] is not None

    @property
    def seeks(self) -> bool:
        """Whether a pass may start at any batch without reading those before."""
        return isinstance(self._source, Sequence)

    def _require_repeatable(self) -> None:
        """Raise if the source begins with other data in a second pass."""
        # In another random state, so that a shuffling loader cannot repeat itself by chance of the state.
        with _untouched(self._source):
            disturb_randomness(_OTHER_SEED)
            for generator in _generators(self._source):
                generator.manual_seed(_OTHER_SEED)
            self._compare(0, self._normalise(next(self._from(0), None), 0))

    def _normalise(self, item: tuple[Any, Tensor | None] | None, position: int) -> Batch:
        """Return what a source gives as a batch."""
        if item is None:
            raise NonDeterministicDataError(
                f"the {type(self._source).__name__} yields nothing in a second pass; pass an iterable that "
                "can be read again"
            )
        inputs, mask = item
        inputs = tuple(inputs) if isinstance(inputs, list) else inputs
        return normalise(inputs, self._batch_dim, label=f"batch {position}", mask=mask).map(tracked)

    def _compare(self, position: int, batch: Batch) -> None:
        """Raise if a batch is not what it was at first."""
        if position >= len(self._prints) or _fingerprint(batch) != self._prints[position]:
            self._fail(position)

    def _fail(self, position: int) -> NoReturn:
        """Raise, naming a batch that differs."""
        raise NonDeterministicDataError(
            f"two passes over the {type(self._source).__name__} differ at batch {position}; pass "
            "shuffle=False and no random augmentation, since every product needs the same data"
        )

    def _read(self, first: int = 0) -> Iterator[Batch]:
        """Yield the batches of one pass from the first one wanted, the random states untouched in between."""
        position = first if self.seeks else 0
        with _untouched(self._source):
            iterator = self._from(position)
        while True:
            with _untouched(self._source):
                try:
                    item = next(iterator)
                except StopIteration:
                    return
            if position >= first:
                yield self._normalise(item, position)
            position += 1

    def _from(self, first: int) -> Iterator[tuple[Any, Tensor | None]]:
        """Yield batches, and which of their positions are real where that is said."""
        source = self._source
        if isinstance(source, Batches):
            yield from (source.batch(position) for position in range(first, len(source)))
        elif isinstance(source, Sequence):
            yield from ((source[position], None) for position in range(first, len(source)))
        else:
            yield from ((item, None) for item in source)

    def _compared(self, first: int) -> Iterator[Batch]:
        """Yield batches that are what they were, floating tensors cast."""
        position = first - 1
        for position, batch in enumerate(self._read(first), first):
            self._compare(position, batch)
            yield batch.map(self._cast) if self._dtype else batch
        if position + 1 != len(self.lengths):
            raise NonDeterministicDataError(
                f"a later pass over the {type(self._source).__name__} ends after {position + 1} of "
                f"{len(self.lengths)} batches; every product needs the same data"
            )

    def _checked(self, first: int = 0) -> Iterator[Batch]:
        """Yield batches that are what they were, where the model is, with the outputs that are due."""
        arriving = self._compared(first)
        if self._device is not None:
            arriving = moved_ahead(arriving, torch.device(self._device))
        for batch in arriving:
            yield Batch(batch.tensors, batch.layout, self._num_outputs, self._inner)

    def _cast(self, tensor: Tensor) -> Tensor:
        """Return a floating tensor in the dtype that is wanted."""
        return tensor.to(self._dtype) if tensor.is_floating_point() else tensor

    def batches_from(self, start: int) -> Iterator[tuple[int, Batch]]:
        """Yield the batches of one pass, from that which holds a sample on, each with its first sample."""
        first = bisect_right(self._stops, start)
        for stop, batch in zip(self._stops[first:], self._checked(first), strict=True):
            yield stop - batch.num_samples, batch

    def batches(self, size: int | None = None) -> Iterator[Batch]:
        """Yield batches of ``size``, as far as neighbouring samples can be joined; None: as they come."""
        held: list[Batch] = []
        room = size or 0  # for how many samples there is room in the batch that is put together
        for batch in self._checked():
            if size is None:
                yield batch
                continue
            if held and not matching(held[-1], batch):
                yield concatenate(held)
                held, room = [], size
            start = 0
            while start < batch.num_samples:
                part = cut(batch, start, min(start + room, batch.num_samples))
                start, room = start + part.num_samples, room - part.num_samples
                held.append(part)
                if room == 0:
                    yield concatenate(held)
                    held, room = [], size
            if held:  # a source may write its next batch over this one
                held[-1] = copied(held[-1])
        if held:
            yield concatenate(held)

    def pick(self, index: Tensor) -> Held:
        """Return the samples at the given positions, in their order, read in one pass."""
        wanted, order = torch.unique(index, return_inverse=True)
        parts: list[Batch] = []
        for start, batch in self.batches_from(int(wanted[0])):
            stop = start + batch.num_samples
            inside = wanted[(wanted >= start) & (wanted < stop)]
            if len(inside):
                parts.append(take(batch, inside - start))
            if stop > int(wanted[-1]):
                break
        return Held.of(Held.of(parts).taken(order))

    def to(self, dtype: torch.dtype | None, device: torch.device | str | None) -> Stream:
        """Return the same batches with floating tensors cast to ``dtype``, all on ``device``."""
        moved = self.__class__.__new__(self.__class__)
        vars(moved).update(vars(self))
        moved._dtype, moved._device = dtype or self._dtype, device or self._device
        return moved

    def expecting(self, num_outputs: int, inner: int | None = None) -> Stream:
        """Return the same batches, whose calls must give so many outputs a sample, ``inner`` a position."""
        known = self.to(None, None)
        known._num_outputs, known._inner = num_outputs, inner
        return known

    # padding

    def batch_of(self, sample: int) -> int:
        """Return the number of the batch in which a sample is."""
        return bisect_right(self._stops, sample)

    def most_padded(self) -> int | None:
        """Return the sample that has most positions beside its own; None where none is known to be padded."""
        best, found, single = 0, None, self._single()
        # Of a loader's batches of one length the first tells how they are made.
        is_one_kind = isinstance(self._source, DataLoader) and len(self.examples) == 1
        for number, (real, count) in enumerate(zip(self.real, self.lengths, strict=True)):
            first = self._stops[number] - count
            if real is not None:
                missing = real.positions - real.counts
                most, sample = int(missing.max()), first + int(missing.argmax())
            elif count > 1 and single is not None and not (is_one_kind and number):
                own = self._own_shapes(single, range(first, first + count), is_one_kind)
                if own is None:
                    continue
                entries = torch.tensor([sum(shape.numel() for shape in shapes) for shapes in own])
                whole = sum(shape.numel() for shape in self.kinds[number])
                most, sample = whole - int(entries.min()), first + int(entries.argmin())
            else:
                continue
            if most > best:
                best, found = most, sample
        return found

    def _own_shapes(
        self, single: Callable[[int], tuple[Any, Tensor | None]], samples: range, may_fail: bool
    ) -> list[tuple[torch.Size, ...]] | None:
        """Return the shapes of samples by themselves; None where the loader makes none, and may."""
        try:
            return [self._alone(single, sample).sample_shapes() for sample in samples]
        except Exception:  # a loader's own code, such as one that puts pairs together
            if not may_fail:
                raise
            return None

    def _single(self) -> Callable[[int], tuple[Any, Tensor | None]] | None:
        """What reads one sample alone; None where batches come as they are."""
        source: Any = self._source
        if isinstance(source, Batches):
            return (lambda number: source.read(number, number + 1)) if source.collates else None
        if not isinstance(source, DataLoader) or isinstance(source.dataset, IterableDataset):
            return None
        if source.batch_sampler is None or source.collate_fn is default_collate:
            return None
        numbers = [number for batch in source.batch_sampler for number in batch]
        return lambda number: (source.collate_fn([source.dataset[numbers[number]]]), None)

    def _alone(self, single: Callable[[int], tuple[Any, Tensor | None]], sample: int) -> Batch:
        """Return a batch of one sample, as the source makes it by itself."""
        with _untouched(self._source):
            batch = self._normalise(single(sample), self.batch_of(sample))
        device = self._device or _CPU
        batch = batch.map(lambda tensor: self._cast(tensor).to(device) if self._dtype else tensor.to(device))
        return Batch(batch.tensors, batch.layout, self._num_outputs, self._inner)

    def alone(self, sample: int, padded: Batch) -> Batch | None:
        """Return a sample, ``padded`` in its batch, at or nearer its own length; None: not known."""
        if (single := self._single()) is not None:
            own = self._alone(single, sample)
            if own.sample_shapes() != padded.sample_shapes():
                return own
        mask = padded.mask
        if mask is None:
            return None
        kept = mask[0].nonzero().flatten()

        def trim(tensor: Tensor, axis: int) -> Tensor:
            """Leave out the positions that are not real."""
            along = 1 if axis == 0 else 0
            is_long = tensor.dim() > 1 and tensor.shape[along] == len(mask[0])
            return tensor.index_select(along, kept.to(tensor.device)) if is_long else tensor

        return padded.map_samples(trim)


def _require_reiterable(source: Any) -> None:
    """Raise unless a source gives batches, and gives them again."""
    kind = type(source).__name__
    if isinstance(source, Iterator):
        raise InputError(
            f"the inputs are a one-shot iterator ({kind}), and every product reads them again; pass a list "
            "of batches, or a DataLoader"
        )
    if isinstance(source, Dataset) and not isinstance(source, IterableDataset):
        raise InputError(
            f"the inputs are a data set ({kind}) of single samples; pass DataLoader(dataset, batch_size=64), "
            "or its tensors"
        )
    if hasattr(source, "column_names") or (hasattr(source, "shape") and hasattr(source, "__getitem__")):
        raise InputError(
            f"the inputs are a {kind} of single samples; pass ntkops.Batches(data, batch_size=64), which "
            "reads one slice at a time"
        )
    if isinstance(source, (str, bytes)) or not isinstance(source, Iterable):
        raise InputError(
            f"the inputs are a {kind}; pass a tensor, a tuple or dict of tensors, or a re-iterable of "
            "batches of these"
        )


def moved_ahead(batches: Iterator[Batch], device: torch.device) -> Iterator[Batch]:
    """Yield batches on a device.

    On CUDA the next batch is read, pinned and copied on a side stream while the work on this one is still
    queued: at most two batches are on the device at a time. Elsewhere each is copied as it is asked for.
    """
    if device.type != "cuda":
        for batch in batches:
            yield batch.map(lambda tensor: tensor.to(device))
        return
    side = torch.cuda.Stream(device)
    coming: deque[tuple[Batch, Any]] = deque()
    for batch in batches:
        coming.append(_sent(batch, device, side))
        if len(coming) > 1:
            yield _arrived(*coming.popleft(), device)
    while coming:
        yield _arrived(*coming.popleft(), device)


def _sent(batch: Batch, device: torch.device, side: Any) -> tuple[Batch, Any]:
    """Start the copy of a batch, and return it with the event of its arrival."""

    def send(tensor: Tensor) -> Tensor:
        # The allocator of pinned memory keeps it until the copy is done.
        pinned = tensor.pin_memory() if tensor.device.type == "cpu" else tensor
        return pinned.to(device, non_blocking=True)

    with torch.cuda.stream(side):
        sent = batch.map(send)
        return sent, side.record_event()


def _arrived(batch: Batch, event: Any, device: torch.device) -> Batch:
    """Let the work that follows wait for the copy, and keep its memory from being used again before that."""
    current = torch.cuda.current_stream(device)
    current.wait_event(event)
    for tensor in batch.tensors:
        tensor.record_stream(current)
    return batch


class StreamReader:
    """Gives ranges of samples of a stream; ranges that follow each other are read in one pass.

    What was given last, and the rest of the batch after it, is kept: a range may be asked for again, or
    in smaller pieces. One that begins earlier starts another pass.
    """

    def __init__(self, stream: Stream) -> None:
        self._stream = stream
        self._arriving: Iterator[tuple[int, Batch]] | None = None
        self._held: list[Batch] = []
        self._start = self._stop = 0  # samples that are held

    def read(self, start: int, stop: int) -> Held:
        """Return the samples from ``start`` up to ``stop``, in memory of their own.

        Raises:
            NonDeterministicDataError: If the source gives other data than at first.
        """
        # A new pass where there is none, where the samples have gone by, and where those between need not be
        # read.
        if self._arriving is None or start < self._start or (start > self._stop and self._stream.seeks):
            self._arriving = self._stream.batches_from(start)
            self._held, self._start, self._stop = [], start, start
        self._forget(start)
        while self._stop < stop:
            first, batch = next(self._arriving)
            end = first + batch.num_samples
            if end > start:  # copied: a source may write its next batch over this one
                self._held.append(copied(cut(batch, max(0, start - first), batch.num_samples)))
            self._stop = end
        if stop == self._stream.num_samples:
            next(self._arriving, None)  # nothing may follow
        taken, at = [], self._start
        for batch in self._held:
            taken.append(cut(batch, 0, min(batch.num_samples, stop - at)))
            at += batch.num_samples
            if at >= stop:
                break
        return Held.of(taken)

    def _forget(self, start: int) -> None:
        """Drop the samples before the first one wanted."""
        while self._start < start:
            first = self._held.pop(0) if self._held else None
            if first is None:
                self._start = start
            elif self._start + first.num_samples <= start:
                self._start += first.num_samples
            else:
                self._held.insert(0, cut(first, start - self._start, first.num_samples))
                self._start = start
