"""Inputs as an immutable view of N samples, in memory or read batch by batch."""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..errors import InputError, ShapeError
from .batch import Batch, BatchDim, Held, are_coupled, matching, normalise, require_sound, same_kind
from .stream import Stream, StreamReader
from .watch import Watch, hold, require_fresh, tracked

if TYPE_CHECKING:
    from .record import Recordings

__all__ = ["Batch", "Inputs", "joined", "read_inputs"]


class Inputs:
    """An immutable view of N samples on which a model has been checked.

    Made by `Linearization.inputs`. Tensors are held by reference; a change in place is noticed by
    `check_fresh`. A re-iterable of batches is read anew in every pass, and compared with the first.

    Attributes:
        num_samples: Number N of samples in this view.
        num_outputs: Number O of outputs per sample.
        output_shape: Shape of the output of one sample, of the longest where they differ in length.
        lengths: ``(N,)`` how many entries of its first axis each sample has; None where all have all.
        is_coupled: Whether all of it is one sample, whose outputs, node after node, are the rows.
    """

    def __init__(
        self,
        source: Batch | Held | Stream,
        output_shape: torch.Size,
        *,
        lengths: Tensor | None = None,
        index: Tensor | range | None = None,
        watches: tuple[Watch, ...] = (),
        live: bool = False,
        recordings: Recordings | None = None,
        origin: tuple[Stream, int] | None = None,
    ) -> None:
        self._recordings, self._origin = recordings, origin
        self._source = Held((source,)) if isinstance(source, Batch) else source
        self._index = index
        self.lengths = lengths
        layout = None if isinstance(self._source, Stream) else self._source.batches[0].layout
        self.is_coupled = layout is not None and layout.axes[0] is None and layout.coupled
        self._watches = watches
        self._live = live
        self.output_shape = torch.Size(output_shape)
        # Attributes, since every product asks for them many times.
        self.num_samples: int = self._source.num_samples if index is None else len(index)
        self.num_outputs: int = self.output_shape.numel()

    @property
    def num_rows(self) -> int:
        """Number of outputs of all samples together."""
        if self.lengths is None:
            return self.num_samples * self.num_outputs
        return int(self.lengths.sum()) * self.output_shape[1:].numel()

    @property
    def is_one_batch(self) -> bool:
        """Whether one pass can take all samples: they are in memory, and of one shape."""
        return isinstance(self._source, Held) and len(self._source.batches) == 1

    def hand_over_recordings(self) -> Recordings | None:
        """Return the recorded passes of the trial, once: their graphs take memory."""
        recordings, self._recordings = self._recordings, None
        return recordings

    def head(self, count: int) -> Inputs:
        """Return copies of the first samples, fewer where there are not so many."""
        batch = next(self._cut(min(count, self.num_samples)))
        lengths = None if self.lengths is None else self.lengths[: batch.num_samples]
        return Inputs(batch.map(lambda t: t.detach().clone()), self.output_shape, lengths=lengths)

    def place(self, start: int, stop: int) -> tuple[object, Hashable]:
        """Return what holds some samples, and which of it they are; a stream is the same in every pass."""
        # What was checked of some samples holds for them in every view: by their numbers in what holds them
        # all.
        if isinstance(self._index, Tensor):
            return self._source, self._index[start:stop].numpy().tobytes()
        first = 0 if self._index is None else self._index.start
        root, before = (self._source, 0) if self._origin is None else self._origin
        return root, (before + first + start, before + first + stop)

    @property
    def is_streamed(self) -> bool:
        """Whether the samples are read anew in every pass."""
        return isinstance(self._source, Stream)

    @property
    def sample_bytes(self) -> int:
        """Bytes of one sample, of the largest one where they differ."""
        if isinstance(self._source, Stream):
            return self._source.sample_bytes
        held = sum(t.numel() * t.element_size() for batch in self._source.batches for t in batch.tensors)
        return max(1, -(-held // self._source.num_samples))

    @property
    def sample_shapes(self) -> tuple[torch.Size, ...] | None:
        """Shapes of one sample's tensors, None where they may differ from sample to sample."""
        source = self._source
        if isinstance(source, Stream) or len(source.batches) > 1:
            return None
        return source.batches[0].sample_shapes()

    @property
    def largest_batch(self) -> int:
        """Samples of the largest batch that a re-iterable gives; all of them where they are in memory."""
        return max(self._source.lengths) if isinstance(self._source, Stream) else self.num_samples

    @property
    def requires_grad(self) -> bool:
        """Whether derivatives flow to the samples: they are live, and one of them asks for it."""
        source = self._source
        if not self._live or isinstance(source, Stream):
            return False
        return any(t.requires_grad for batch in source.batches for t in batch.tensors)

    def differ(self, other: Inputs) -> bool:
        """Whether other inputs are known to hold other samples; of a stream beside tensors nothing is."""
        count = self.num_samples
        if count != other.num_samples:
            return True
        # Streams are compared by the hashes of their batches, and not read.
        left, right = self._source, other._source
        if isinstance(left, Stream) or isinstance(right, Stream):
            return isinstance(left, Stream) and isinstance(right, Stream) and left.differ(right)
        if self.place(0, count) == other.place(0, count):
            return False
        one, two = Held.of(self._cut(None)).batches, Held.of(other._cut(None)).batches
        return len(one) != len(two) or not all(
            (same_kind if a.layout.coupled and b.layout.coupled else matching)(a, b)
            and a.num_samples == b.num_samples
            and all(map(torch.equal, a.tensors, b.tensors))
            for a, b in zip(one, two, strict=True)
        )

    def batches(self, batch_size: int | None = None) -> Iterator[tuple[int, int, Batch]]:
        """Yield ``(start, stop, batch)`` in the order of this view.

        Args:
            batch_size: Samples per batch; None for all of them at once, or for the batches of a
                re-iterable as they come. Batches of a re-iterable are split and joined as needed; those
                whose samples differ in shape are not joined.

        Yields:
            First sample, one past the last, and the batch.

        Raises:
            ShapeError: If ``batch_size`` is not positive.
        """
        if batch_size is not None and batch_size < 1:
            raise ShapeError(f"batch_size={batch_size}; it is a number of samples, at least 1")
        start = 0
        for batch in self._cut(batch_size):
            stop = start + batch.num_samples
            yield start, stop, batch.aliased(self._live)
            start = stop

    def _cut(self, size: int | None) -> Iterator[Batch]:
        """Yield the samples of this view in batches of a size, as they are held."""
        source, index = self._source, self._index
        if isinstance(source, Stream):
            yield from source.batches(size)
            return
        count = self.num_samples
        for start in range(0, count, size or count):
            stop = min(start + (size or count), count)
            yield from source.taken(range(start, stop) if index is None else index[start:stop])

    def in_order(self) -> Callable[[int, int], Inputs]:
        """Return what gives ranges of consecutive samples, in memory, to be asked for in their order.

        Returns:
            A function of the first sample and one past the last. Of a re-iterable, ranges that follow each
            other, or are asked for again at once, are read in one pass; one that lies before starts another
            pass. Memory: the range, and one batch. All samples in memory are these inputs themselves.
        """
        if isinstance(self._source, Stream):
            stream, reader = self._source, StreamReader(self._source)
            return lambda start, stop: Inputs(
                reader.read(start, stop),
                self.output_shape,
                lengths=self._lengths_at(range(start, stop)),
                live=self._live,
                origin=(stream, start),
            )

        def between(start: int, stop: int) -> Inputs:
            return self if stop - start == self.num_samples else self.select(torch.arange(start, stop))

        return between

    def select(self, index: Tensor) -> Inputs:
        """Return a view of the samples at the given positions of this view.

        Ranges of consecutive samples are views; other choices are copied batch by batch. Samples of a
        re-iterable are read in one pass and then held in memory.

        Args:
            index: ``(M,)`` positions from 0 to N - 1, in any order, repeated ones allowed.

        Raises:
            ShapeError: If a position is out of range, or none is given.
        """
        at = self._positions(index)
        if isinstance(self._source, Stream):
            if isinstance(at, range) and len(at) == self.num_samples:
                return self
            picked = self._source.pick(torch.arange(at.start, at.stop) if isinstance(at, range) else at)
            return Inputs(picked, self.output_shape, lengths=self._lengths_at(at), live=self._live)
        return Inputs(
            self._source,
            self.output_shape,
            lengths=self._lengths_at(at),
            index=self._compose(at),
            watches=self._watches,
            live=self._live,
            origin=self._origin,
        )

    def _lengths_at(self, at: Tensor | range) -> Tensor | None:
        """Return the lengths of samples at some positions of this view."""
        if self.lengths is None:
            return None
        return self.lengths[at.start : at.stop] if isinstance(at, range) else self.lengths[at]

    def _positions(self, index: Tensor) -> Tensor | range:
        """Return checked positions, as a range where they follow each other: then batches are views."""
        index = torch.as_tensor(index).detach().cpu()
        if index.dim() != 1 or len(index) == 0 or index.dtype not in (torch.int64, torch.int32):
            raise ShapeError(
                f"sample index of shape {tuple(index.shape)} and dtype {index.dtype}; pass a vector of "
                "positions"
            )
        index = index.long()
        low, high = int(index.min()), int(index.max())
        if low < 0 or high >= self.num_samples:
            raise ShapeError(
                f"sample index {low if low < 0 else high} is out of range for {self.num_samples} samples"
            )
        first = int(index[0])
        if torch.equal(index, torch.arange(first, first + len(index))):
            return range(first, first + len(index))
        return index.clone()

    def _compose(self, at: Tensor | range) -> Tensor | range:
        """Return positions of this view as positions of its source."""
        if self._index is None:
            return at
        if isinstance(self._index, range):
            start = self._index.start
            return range(at.start + start, at.stop + start) if isinstance(at, range) else at + start
        return self._index[at.start : at.stop] if isinstance(at, range) else self._index[at]

    def check_fresh(self) -> None:
        """Raise `StaleOperatorError` if an input was changed in place since it was taken."""
        require_fresh(self._watches, "inputs")

    def to(self, dtype: torch.dtype | None = None, device: torch.device | str | None = None) -> Inputs:
        """Return the samples with floating tensors cast to ``dtype``, all of them on ``device``.

        Integer and boolean tensors keep their dtype. What needs no change stays held by reference.
        """
        if isinstance(self._source, Stream):
            kept: dict[str, Any] = {"lengths": self.lengths, "watches": self._watches, "live": self._live}
            return Inputs(self._source.to(dtype, device), self.output_shape, **kept)
        whole = self._whole()
        moved = whole.map(lambda t: t.to(device=device, dtype=dtype if t.is_floating_point() else None))
        pairs = [
            (label, old, new)
            for one, other in zip(whole.batches, moved.batches, strict=True)
            for label, old, new in zip(one.layout.labels, one.tensors, other.tensors, strict=True)
        ]
        copied = {label for label, old, new in pairs if new is not old}
        if not copied:
            return self
        if isinstance(self._index, Tensor):  # nothing that is held by reference is left to be watched
            copied = {label for label, _, _ in pairs}  # by the choice of samples
        watches = tuple(watch for watch in self._watches if watch.label not in copied)
        return Inputs(moved, self.output_shape, lengths=self.lengths, watches=watches, live=self._live)

    def _whole(self) -> Held:
        """Return the samples of this view in memory."""
        return Held(tuple(self._cut(None)))

    def __getstate__(self) -> dict[str, Any]:
        """Keep the samples of this view only, and no versions: they are this process's."""
        state = dict(vars(self), _watches=(), _recordings=None, _origin=None)
        if isinstance(self._source, Held):
            whole = self._whole()
            state |= {"_source": whole.map(lambda t: t.detach().clone()), "_index": None}
            state["_watched"] = bool(self._watches)
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Watch the new tensors if the old ones were watched."""
        watched = state.pop("_watched", False)
        if isinstance(state["_source"], Held):
            state["_source"] = state["_source"].map(tracked)
        vars(self).update(state)
        if watched and isinstance(self._source, Held):
            self._watches = tuple(watch for batch in self._source.batches for watch in _watches(batch))

    def __deepcopy__(self, memo: dict[int, Any]) -> Inputs:
        """Return itself: nothing in it is ever changed."""
        return self

    def __repr__(self) -> str:
        """Show the number of samples and the output's shape."""
        kind = "stream" if isinstance(self._source, Stream) else "memory"
        return f"Inputs(num_samples={self.num_samples}, output_shape={tuple(self.output_shape)}, {kind})"


def joined(parts: Sequence[Inputs]) -> Inputs:
    """Return the samples of several parts of one set of inputs, one part after the other, in memory."""
    if len(parts) == 1:
        return parts[0]
    held = Held.of(batch for part in parts for batch in part._whole().batches)
    lengths = [part.lengths for part in parts if part.lengths is not None]
    return Inputs(
        held,
        parts[0].output_shape,
        lengths=torch.cat(lengths) if lengths else None,
        live=parts[0]._live,
    )


def _watches(batch: Batch) -> tuple[Watch, ...]:
    """Start watching all tensors of a batch."""
    pairs = zip(batch.layout.labels, batch.tensors, strict=True)
    return tuple(Watch.of(label, tensor) for label, tensor in pairs)


def _is_batches(x: Any) -> bool:
    """Whether inputs are several batches and not one."""
    return not isinstance(x, (torch.Tensor, tuple, Mapping)) and type(x).__module__ != "numpy"


def read_inputs(
    x: Any, batch_dim: BatchDim, dtypes: Collection[torch.dtype], device: torch.device, *, live: bool = False
) -> tuple[Batch | Stream, tuple[Watch, ...]]:
    """Return inputs taken apart and looked at, and the watches of what is held by reference.

    ``dtypes`` are the floating ones of the model, that of the selected parameters first; ``live`` keeps
    tensors in their autograd graph, and watches none.

    Raises:
        InputError: If they are no such thing, or live and made in inference mode.
    """
    if _is_batches(x):
        if are_coupled(batch_dim):
            raise InputError(
                f"the inputs are a {type(x).__name__}, and with batch_dim=None they are one whole: pass a "
                "tensor, a tuple or a dict, and join several graphs by ntkops.stack of their Jacobians"
            )
        return Stream(x, batch_dim, dtypes, device), ()
    batch = normalise(x, batch_dim)
    require_sound(batch, dtypes, device)
    if live:
        for label, tensor in zip(batch.layout.labels, batch.tensors, strict=True):
            if tensor.is_inference():
                raise InputError(
                    f"{label} was made in inference mode, so that no derivative can flow to it; make it "
                    "outside (or pass a .clone()), or leave out differentiable=True"
                )
        return batch, ()
    held = [hold(*named) for named in zip(batch.layout.labels, batch.tensors, strict=True)]
    watches = tuple(watch for _, watch in held if watch is not None)
    return batch.replace([tensor for tensor, _ in held]), watches
