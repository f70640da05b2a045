"""A re-iterable of batches, such as a DataLoader: read again in every pass, and compared with the first."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset

from ..errors import InputError, NonDeterministicDataError
from .batches import Batch, concatenate, cut, matching, normalise, require_sound, take
from .freshness import bits_of
from .randomness import disturb_randomness, untouched_randomness

__all__ = ["Stream"]

_OTHER_SEED = 7238763


def _fingerprint(batch: Batch) -> tuple[int, ...]:
    """Return exact sums over the bits of each tensor, weighted by sample, which any change alters."""
    return tuple(_bit_sum(tensor.movedim(batch.batch_dim, 0)) for tensor in batch.tensors)


def _bit_sum(tensor: Tensor) -> int:
    bits = bits_of(tensor)
    rows = bits.reshape(bits.shape[0], -1).sum(1, dtype=torch.int64)  # (B,)
    return int((rows * torch.arange(1, len(rows) + 1, device=rows.device)).sum())


def _generators(source: Any) -> list[torch.Generator]:
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


class Stream:
    """Batches that are read from their source in every pass.

    Construction reads the source once in full, and its first batch once more.

    Args:
        source: A re-iterable of tensors, tuples, lists (taken as tuples) or mappings.
        batch_dim: The sample axis.
        dtypes: Floating dtypes of the model.
        device: The model's device.

    Attributes:
        lengths: Samples in each batch of the source.

    Raises:
        InputError: For a one-shot iterator, a data set without batches, or an empty source.
        NonDeterministicDataError: If a second pass begins with other data.
    """

    def __init__(
        self, source: Iterable[Any], batch_dim: int, dtypes: Collection[torch.dtype], device: torch.device
    ) -> None:
        _require_reiterable(source)
        self._source = source
        self._batch_dim = batch_dim
        self._dtype: torch.dtype | None = None
        self._device: torch.device | str | None = None
        self._num_outputs: int | None = None
        self._prints: tuple[tuple[int, ...], ...] = ()
        lengths: list[int] = []
        prints: list[tuple[int, ...]] = []
        for batch in self._read():
            require_sound(batch, dtypes, device, offset=sum(lengths))
            lengths.append(batch.num_samples)
            prints.append(_fingerprint(batch))
        if not lengths:
            raise InputError(f"the {type(source).__name__} yields no batch; pass at least one")
        self.lengths = tuple(lengths)
        self._prints = tuple(prints)
        self._require_repeatable()

    @property
    def num_samples(self) -> int:
        """Number of samples in all batches."""
        return sum(self.lengths)

    def _require_repeatable(self) -> None:
        # In another random state, so that a shuffling loader cannot repeat itself by chance of the state.
        with _untouched(self._source):
            disturb_randomness(_OTHER_SEED)
            for generator in _generators(self._source):
                generator.manual_seed(_OTHER_SEED)
            self._compare(0, self._normalise(next(iter(self._source), None), 0))

    def _normalise(self, item: Any, position: int) -> Batch:
        if item is None:
            raise NonDeterministicDataError(
                f"the {type(self._source).__name__} yields nothing in a second pass; pass an iterable that "
                "can be read again"
            )
        return normalise(
            tuple(item) if isinstance(item, list) else item, self._batch_dim, label=f"batch {position}"
        )

    def _compare(self, position: int, batch: Batch) -> None:
        if position >= len(self._prints) or _fingerprint(batch) != self._prints[position]:
            raise NonDeterministicDataError(
                f"two passes over the {type(self._source).__name__} differ at batch {position}; pass "
                "shuffle=False and no random augmentation, since every product needs the same data"
            )

    def _read(self) -> Iterator[Batch]:
        """Yield the batches of one pass as they come, the random states untouched in between."""
        with _untouched(self._source):
            iterator = iter(self._source)
        position = 0
        while True:
            with _untouched(self._source):
                try:
                    item = next(iterator)
                except StopIteration:
                    return
            yield self._normalise(item, position)
            position += 1

    def _checked(self) -> Iterator[Batch]:
        position = -1
        for position, batch in enumerate(self._read()):
            self._compare(position, batch)
            cast = batch.map(self._cast) if self._dtype or self._device else batch
            yield Batch(cast.tensors, cast.layout, self._num_outputs)
        if position + 1 != len(self.lengths):
            self._compare(len(self._prints), batch)

    def _cast(self, tensor: Tensor) -> Tensor:
        return tensor.to(device=self._device, dtype=self._dtype if tensor.is_floating_point() else None)

    def batches(self, size: int | None = None) -> Iterator[Batch]:
        """Yield the samples in batches of ``size``, as far as neighbouring batches can be joined.

        Args:
            size: Samples per batch; None for the batches of the source.
        """
        held: list[Batch] = []
        room = size or 0
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
        if held:
            yield concatenate(held)

    def pick(self, index: Tensor) -> Batch:
        """Return the samples at the given positions, in their order, read in one pass.

        Raises:
            InputError: If they come from batches of different shapes.
        """
        wanted, order = torch.unique(index, return_inverse=True)
        parts: list[Batch] = []
        start = 0
        for batch in self._checked():
            stop = start + batch.num_samples
            inside = wanted[(wanted >= start) & (wanted < stop)]
            if len(inside):
                parts.append(take(batch, inside - start))
                if not matching(parts[0], parts[-1]):
                    raise InputError(
                        f"samples {int(index.min())} to {int(index.max())} come from batches of different "
                        "shapes, and cannot be joined; pad all batches to one length"
                    )
            start = stop
            if len(wanted) and start > int(wanted[-1]):
                break
        return take(concatenate(parts), order)

    def to(self, dtype: torch.dtype | None, device: torch.device | str | None) -> Stream:
        """Return the same batches with floating tensors cast to ``dtype``, all on ``device``."""
        moved = self.__class__.__new__(self.__class__)
        vars(moved).update(vars(self))
        moved._dtype, moved._device = dtype or self._dtype, device or self._device
        return moved

    def expecting(self, num_outputs: int) -> Stream:
        """Return the same batches, whose calls must give this many outputs per sample."""
        known = self.to(None, None)
        known._num_outputs = num_outputs
        return known


def _require_reiterable(source: Any) -> None:
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
    if isinstance(source, (str, bytes)) or not isinstance(source, Iterable):
        raise InputError(
            f"the inputs are a {kind}; pass a tensor, a tuple or dict of tensors, or a re-iterable of "
            "batches of these"
        )
