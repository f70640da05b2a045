"""How many columns and samples an engine takes at a time: what the memory holds, less where it ran out."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Literal, TypeVar

from ..errors import InputError
from ..model import Batch, Inputs, Linearization
from ..model.batches import cut
from .budget import free_bytes
from .choose import Ladder
from .retries import Portion, in_parts

__all__ = ["EngineSizes"]

Auto = Literal["auto"]
Result = TypeVar("Result")

_CPU_CHUNK = 8  # measured best or equal on MLP, GRU and transformer; larger chunks cost memory only
_DEVICE_CHUNK = 32
_WORKSPACE_SHARE = 1 / 16
_WORKSPACE_RANGE = (2**24, 2**28)  # one tile of per-sample gradients, in bytes


class EngineSizes:
    """Batch size, chunk size and workspace of an engine.

    Args:
        linearization: The pure function and its snapshot.
        ladder: What the model allows.
        batch_size: Samples per pass, or "auto" for as many as the memory holds.
        chunk_size: Columns per pass, or "auto".

    Raises:
        InputError: If a size is neither "auto" nor a positive integer.
    """

    def __init__(
        self,
        linearization: Linearization,
        ladder: Ladder,
        batch_size: int | Auto,
        chunk_size: int | Auto,
    ) -> None:
        for what, size in (("batch_size", batch_size), ("chunk_size", chunk_size)):
            if size != "auto" and (not isinstance(size, int) or isinstance(size, bool) or size < 1):
                raise InputError(f"{what}={size!r}: pass 'auto' or a positive integer")
        self.linearization = linearization
        self.ladder = ladder
        self._batch_size: int | Auto = batch_size
        self._chunk_size: int | Auto = chunk_size
        # Looked up once: chunks that follow the free memory of the moment would change rounding.
        self._free_bytes = free_bytes(linearization.device)
        self._kept_workspace: int | None = None
        self._limits: dict[str, int] = {}  # what has proved to be too much, less one step

    def _within(self, what: str, size: int) -> int:
        return max(1, min(size, self._limits.get(what, size)))

    def chunk_size(self) -> int:
        """Columns that go through one pass."""
        if self._chunk_size != "auto":
            return self._chunk_size
        device = self.linearization.device
        preferred = _CPU_CHUNK if device.type == "cpu" else _DEVICE_CHUNK
        column = self.linearization.num_parameters * self.linearization.dtype.itemsize
        # By the workspace of the start: tiles that did not fit say nothing about columns.
        return self._within("columns", max(1, min(preferred, self._workspace() * 4 // max(column, 1))))

    def batch_size(self, inputs: Inputs) -> int:
        """Samples that go through one pass: what the activations of a chunk of columns leave room for."""
        if self._batch_size != "auto":
            return self._batch_size
        needed = self._sample_bytes(inputs) * (2 + 2 * self.chunk_size())
        fitting = max(1, int(self._free_bytes // 4 // needed))
        if inputs.is_streamed:  # else memory would grow with the number of samples
            fitting = min(fitting, inputs.largest_batch)
        return self._within("samples", fitting)

    def workspace_bytes(self) -> int:
        """Bytes for one tile of per-sample gradients."""
        return self._within("workspace", self._workspace())

    def tile_samples(self, rows: int) -> int:
        """Return how many samples with ``rows`` gradients each fit into the workspace."""
        sample = max(1, rows * self.linearization.num_parameters * self.linearization.dtype.itemsize)
        return max(1, self.workspace_bytes() // sample)

    def keep_workspace(self, count: int) -> None:
        """Use so many bytes for a tile from now on, whatever is free: resumed work must round alike."""
        self._kept_workspace = count

    def _workspace(self) -> int:
        if self._kept_workspace is not None:
            return self._kept_workspace
        low, high = _WORKSPACE_RANGE
        return max(low, min(high, int(self._free_bytes * _WORKSPACE_SHARE)))

    def _sample_bytes(self, inputs: Inputs) -> int:
        return max(1, self.ladder.activation_bytes + inputs.num_outputs * self.linearization.dtype.itemsize)

    # in portions, smaller ones where memory runs out

    def _parameter_bytes(self) -> int:
        return self.linearization.num_parameters * self.linearization.dtype.itemsize

    def column_portion(self) -> Portion:
        """Return how many columns are taken at a time."""
        return Portion(
            "chunk_size",
            self.chunk_size,
            lambda failed: self._limits.update(columns=max(1, failed // 2)),
            self.linearization.device,
            lambda: 2 * self._parameter_bytes() + self.ladder.activation_bytes,
            self._chunk_size != "auto",
        )

    def sample_portion(self, inputs: Inputs) -> Portion:
        """Return how many samples are taken at a time."""
        return Portion(
            "batch_size",
            lambda: self.batch_size(inputs),
            lambda failed: self._limits.update(samples=max(1, failed // 2)),
            self.linearization.device,
            lambda: self._parameter_bytes() + self._sample_bytes(inputs) * (2 + 2 * self.chunk_size()),
            self._batch_size != "auto",
        )

    def tile_portion(self, rows: int, read: Callable[[], int] | None = None) -> Portion:
        """Return how many samples with ``rows`` gradients each are taken at a time.

        Args:
            rows: Gradients of each sample.
            read: Another way to find the number from `workspace_bytes`; None for `tile_samples`.
        """
        size = read or (lambda: self.tile_samples(rows))

        def lower(failed: int) -> None:
            while size() >= failed and self.workspace_bytes() > 1:
                self._limits["workspace"] = self.workspace_bytes() // 2

        return Portion(
            "samples of a tile",
            size,
            lower,
            self.linearization.device,
            lambda: 2 * rows * self._parameter_bytes() + 2 * self.ladder.activation_bytes,
        )

    def over_samples(
        self, inputs: Inputs, work: Callable[[int, int, Batch], Result]
    ) -> Iterator[tuple[int, int, Result]]:
        """Do work on batches of samples, smaller ones from where memory runs out.

        Args:
            inputs: N samples.
            work: Given the first sample, one past the last, and the batch.

        Yields:
            First sample, one past the last, and the result.
        """
        portion = self.sample_portion(inputs)
        for start, stop, batch in inputs.batches(self.batch_size(inputs)):

            def part(first: int, last: int, start: int = start, batch: Batch = batch) -> Result:
                return work(start + first, start + last, cut(batch, first, last))

            for first, last, result in in_parts(stop - start, portion, part):
                yield start + first, start + last, result
