"""Memory: one byte budget for the process, sizes that fit into it, and going on with less where they do not.

Every engine puts the tensors that it could recompute into the same store, which drops the least recently
used ones when they would exceed a quarter of the memory that is free. How many columns and samples are taken
at a time follows from what is free when an engine is made.

Work on many things is done in parts. A part for which memory does not suffice is made smaller and tried
again, and what is finished is kept. Where parts are nested (samples inside columns), the outermost that
can still be made smaller is, so that no part is cut down for the sake of another.
"""

from __future__ import annotations

import logging
import math
import os
import re
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Literal, TypeVar

import torch
from torch import Tensor

from ..errors import InputError, OutOfMemoryError
from ..model import Batch, Inputs, Linearization
from ..model.batch import cut
from ..model.watch import tracked
from ..results import PassCount
from ..shortage import is_out_of_memory
from .passes import PassCounter, report_passes

__all__ = [
    "EngineSizes",
    "Share",
    "TensorStore",
    "budget_bytes",
    "even_size",
    "format_bytes",
    "free_bytes",
    "if_it_fits",
    "parts",
    "retry",
    "set_memory_budget",
    "shared_store",
    "tensor_bytes",
]

logger = logging.getLogger(__name__)

Auto = Literal["auto"]
Result = TypeVar("Result")

_FRACTION = 0.25  # of free memory, for what is cached
_CGROUP_LIMITS = (
    (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")),
    (
        Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"),
        Path("/sys/fs/cgroup/memory/memory.usage_in_bytes"),
    ),
)
_CPU_CHUNK = 8  # measured best or equal on MLP, GRU and transformer; larger chunks cost memory only
_DEVICE_CHUNK = 32
_WORKSPACE_SHARE = 1 / 16  # of free memory: two tiles meet, beside the graphs that they are made from
_WORKSPACE_RANGE = (2**24, 2**28)  # one tile of per-sample gradients, in bytes

_guarded: ContextVar[bool] = ContextVar("ntkops_memory_guarded", default=False)
_BYTES = re.compile(r"allocate ([0-9.]+) ?(bytes|KiB|MiB|GiB|TiB)")
_UNITS = {"bytes": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}


def format_bytes(count: float) -> str:
    """Return a byte count with a binary unit.

    Example:
        >>> from ntkops.engines.memory import format_bytes
        >>> format_bytes(80e9)
        '74.5 GiB'
    """
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(count) < 1024:
            return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


def tensor_bytes(shape: tuple[int, ...] | torch.Size, dtype: torch.dtype) -> int:
    """Return the bytes of a tensor of this shape and dtype."""
    count = dtype.itemsize
    for size in shape:
        count *= int(size)
    return count


def _read_integer(path: Path) -> int | None:
    """Return the number that a file holds, None where there is no file, or no number in it."""
    try:
        with path.open() as file:
            return int(file.read().strip())
    except (OSError, ValueError):  # "max" means no limit
        return None


def _free_host_bytes() -> int:
    """Return what the system says is available, else half of what it has, within the control group."""
    free = None
    try:
        with open("/proc/meminfo") as file:
            for line in file:
                if line.startswith("MemAvailable:"):
                    free = int(line.split()[1]) * 1024
                    break
    except OSError:
        pass
    if free is None:
        try:
            free = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
        except (AttributeError, OSError, ValueError):
            free = 4 * 1024**3
    for limit_path, used_path in _CGROUP_LIMITS:
        limit, used = _read_integer(limit_path), _read_integer(used_path)
        if limit is not None and used is not None:
            free = min(free, max(limit - used, 0))
    return free


def free_bytes(device: torch.device | str = "cpu") -> int:
    """Return the bytes that can still be allocated on a device, at least 0.

    On the CPU this is the smaller of what the kernel says is available and what the control group
    leaves; on CUDA what the driver reports as free plus what torch holds unused.
    """
    device = torch.device(device)
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(free + held)
    return _free_host_bytes()


_budget: int | None = None


def set_memory_budget(budget: int | None) -> None:
    """Limit what this process holds beside models, samples and results: passes, tiles and caches.

    A quarter of it is for what is kept (dense kernels and factors that products come from), the rest for what
    work holds while it runs; sizes that you choose (``batch_size``, ``chunk_size``) stand as they are.
    Operators that are made from now on follow it; results are limited by ``max_dense_bytes``.

    Args:
        budget: Bytes, on each device; None for what is free there, which is the default.

    Raises:
        InputError: If that is neither None nor a positive whole number.

    Example:
        >>> import ntkops
        >>> ntkops.set_memory_budget(2 * 1024**3)
        >>> ntkops.set_memory_budget(None)
    """
    global _budget
    if budget is not None and (not isinstance(budget, int) or isinstance(budget, bool) or budget < 1):
        raise InputError(f"budget={budget!r}: pass a positive number of bytes, or None for what is free")
    _budget = budget


def budget_bytes(device: torch.device | str = "cpu") -> int:
    """Return the bytes that passes, tiles and caches may take on a device: the budget, or what is free."""
    free = free_bytes(device)
    return free if _budget is None else min(free, _budget)


class TensorStore:
    """Recomputable tensors of all engines, least recently used first out, up to a fraction of free memory."""

    def __init__(self, fraction: float = _FRACTION) -> None:
        self.fraction = fraction
        # Each with its version when it was stored, in one entry: an interrupt cannot tear them apart.
        self._items: OrderedDict[tuple[int, Hashable], tuple[Tensor, int]] = OrderedDict()
        self._lock = threading.Lock()

    def held_bytes(self, device: torch.device | None = None) -> int:
        """Return the bytes held, on one device or on all."""
        return sum(
            tensor_bytes(item.shape, item.dtype)
            for item, _ in list(self._items.values())
            if device is None or item.device == device
        )

    def get(self, owner: int, key: Hashable) -> Tensor | None:
        """Return a stored tensor, or None if it was never stored, had to go, or was written to since."""
        with self._lock:
            held = self._items.get((owner, key))
            if held is None:
                return None
            item, version = held
            if item._version != version:  # handed out, and changed in place
                self._drop((owner, key))
                return None
            self._items.move_to_end((owner, key))
            return item

    def _drop(self, key: tuple[int, Hashable]) -> Tensor:
        """Forget a tensor and return it."""
        return self._items.pop(key)[0]

    def put(self, owner: int, key: Hashable, item: Tensor) -> bool:
        """Store a tensor, older ones on its device dropped where needed; False if it exceeds the budget."""
        size = tensor_bytes(item.shape, item.dtype)
        item = tracked(item)  # also used outside of the inference mode in which it may have been made
        with self._lock:
            # A share of what would be free without the store; of a given budget, which counts it, of the
            # budget.
            limit = self.fraction * budget_bytes(item.device)
            if _budget is None:  # what is held is not free
                limit += self.fraction * self.held_bytes(item.device)
            if size > limit:
                return False
            self._items[owner, key] = item, item._version
            self._items.move_to_end((owner, key))
            held = self.held_bytes(item.device)
            for oldest in list(self._items) if held > limit else ():
                if held <= limit or oldest == (owner, key):
                    break
                if self._items[oldest][0].device == item.device:
                    dropped = self._drop(oldest)
                    held -= tensor_bytes(dropped.shape, dropped.dtype)
            return True

    def clear(self, device: torch.device | None = None) -> int:
        """Drop everything on one device, or on all, and return the bytes set free."""
        with self._lock:
            keys = [key for key, (item, _) in self._items.items() if device is None or item.device == device]
            dropped = [self._drop(key) for key in keys]
        return sum(tensor_bytes(item.shape, item.dtype) for item in dropped)

    def release(self, owner: int) -> int:
        """Drop everything that an owner stored and return the bytes set free."""
        with self._lock:
            keys = [key for key in self._items if key[0] == owner]
            dropped = [self._drop(key) for key in keys]
        return sum(tensor_bytes(item.shape, item.dtype) for item in dropped)


shared_store = TensorStore()


def _asked_for(error: BaseException) -> int:
    """Return the bytes that the failed allocation asked for, 0 where it does not say."""
    found = _BYTES.search(str(error))
    return int(float(found[1]) * _UNITS[found[2]]) if found else 0


@dataclass(frozen=True)
class Share:
    """How many things are taken at a time.

    Attributes:
        what: The option or quantity that it is, for messages.
        read: Returns the number; it may change from one part to the next.
        lower: Makes ``read`` return less than what it is given.
        device: Where memory runs out.
        needed: Returns the bytes that one thing is thought to need.
        chosen: Whether the user chose the number, so that it stays.
    """

    what: str
    read: Callable[[], int]
    lower: Callable[[int], None]
    device: torch.device
    needed: Callable[[], int]
    chosen: bool = False


def retry(share: Share, count: int, work: Callable[[], Result]) -> tuple[Result] | None:
    """Do some work on ``count`` things.

    Where the work around this one can be made smaller, torch's own error passes through.

    Returns:
        The result in a tuple; None where memory ran out and fewer things are to be taken: ``share`` was
        lowered, and caches on its device were dropped.

    Raises:
        OutOfMemoryError: If memory ran out, and there is no smaller part.
    """
    reducible = count > 1 and not share.chosen
    outside = _guarded.get()
    token = _guarded.set(outside or reducible)
    try:
        return (work(),)
    except Exception as error:
        if outside or not is_out_of_memory(error):  # the work around this one is made smaller first
            raise
        asked, text = _asked_for(error), str(error).strip().splitlines()
        if not reducible:
            raise OutOfMemoryError(_last_words(share, count, asked)) from error
    finally:
        _guarded.reset(token)
    # The exception, and with it what its frames held, is gone by now.
    freed = shared_store.clear(share.device)
    if share.device.type == "cuda":
        torch.cuda.empty_cache()
    share.lower(count)
    logger.warning(
        "out of memory on %s with %s of %d (%s): going on with %d; %s of caches were dropped",
        share.device,
        share.what,
        count,
        text[0][:160] if text else "no message",
        share.read(),
        format_bytes(freed),
    )
    return None


def if_it_fits(work: Callable[[], Result]) -> tuple[Result] | str:
    """Do work for which there is another way; the result in a tuple, or torch's message if memory ran out."""
    token = _guarded.set(True)
    try:
        return (work(),)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        return str(error).strip()[:160]
    finally:
        _guarded.reset(token)


def _last_words(share: Share, count: int, asked: int) -> str:
    """Return the message where there is no smaller part."""
    needed, free = max(share.needed() * count, asked), free_bytes(share.device)
    if share.chosen and count > 1:
        return (
            f"out of memory on {share.device}: {share.what}={count}, as chosen, needs about "
            f"{format_bytes(needed)}, and {format_bytes(free)} are free; pass a smaller {share.what}, or "
            "'auto', which shrinks by itself"
        )
    return (
        f"out of memory on {share.device}: even one at a time ({share.what}) needs about "
        f"{format_bytes(needed)}, and {format_bytes(free)} are free; choose fewer parameters (params=) or "
        "outputs (outputs=), call K.free(), or move to a device with more memory"
    )


def even_size(count: int, size: int) -> int:
    """Return a part size of at most ``size`` that fills ``count`` evenly."""
    size = max(1, min(size, count))
    # ⌈count / ⌈count / size⌉⌉: as many parts, none of them nearly empty.
    return -(-count // -(-count // size))


def parts(
    count: int,
    share: Share,
    work: Callable[[int, int], Result],
    *,
    even: bool = False,
    beside: int = 1,
) -> Iterator[tuple[int, int, Result]]:
    """Yield start, stop and result of work on ``count`` things, in smaller parts where memory runs out.

    ``even`` fills parts evenly. As many of ``beside`` other things are taken at the same time, so that a part
    of one thing may still be made smaller.
    """
    start, limit, size = 0, 0, 0
    while start < count:
        if limit != (read := share.read()):
            limit = read
            size = even_size(count - start, limit) if even else limit
        stop = min(start + size, count)
        found = retry(share, max(stop - start, min(limit, beside)), partial(work, start, stop))
        if found is None:
            continue
        yield start, stop, found[0]
        start = stop


@dataclass
class _Room:
    """What engines for parts of the same work share."""

    device: torch.device
    kept_workspace: int | None = None
    limits: dict[str, int] = field(default_factory=dict)  # what has proved to be too much, less one step
    counter: PassCounter = field(default_factory=PassCounter)

    @cached_property
    def free_bytes(self) -> int:
        """Looked up once: chunks that follow the free memory of the moment would change rounding."""
        return budget_bytes(self.device)

    def __getstate__(self) -> dict[str, object]:
        """Look it up before: a copy rounds as the original does."""
        return {**vars(self), "free_bytes": self.free_bytes}


class EngineSizes:
    """Batch size (samples a pass), chunk size (columns a pass), workspace and passes of an engine.

    "auto" takes as much as the memory holds. Engines for parts of the same work share what is ``like``.

    Raises:
        InputError: If a size is neither "auto" nor a positive integer.
    """

    def __init__(
        self,
        linearization: Linearization,
        batch_size: int | Auto,
        chunk_size: int | Auto,
        like: EngineSizes | None = None,
    ) -> None:
        for what, size in (("batch_size", batch_size), ("chunk_size", chunk_size)):
            if size != "auto" and (not isinstance(size, int) or isinstance(size, bool) or size < 1):
                raise InputError(f"{what}={size!r}: pass 'auto' or a positive integer")
        self.linearization = linearization
        self._batch_size: int | Auto = batch_size
        self._chunk_size: int | Auto = chunk_size
        self._room: _Room = _Room(linearization.device) if like is None else like._room

    @property
    def passes(self) -> PassCount:
        """Passes made so far."""
        return self._room.counter.count

    @property
    def free_bytes(self) -> int:
        """Bytes that were free when it was first asked."""
        return self._room.free_bytes

    def report(self, *, vjp: int = 0, jvp: int = 0, per_sample: int = 0) -> None:
        """Count passes that were made."""
        self._room.counter.add(vjp=vjp, jvp=jvp, per_sample=per_sample)
        report_passes(vjp=vjp, jvp=jvp, per_sample=per_sample)

    def count_rows(self, rows: int, inputs: Inputs) -> None:
        """Report ``rows`` gradients of single samples as passes over all of ``inputs``."""
        self.report(per_sample=math.ceil(rows / inputs.num_samples))

    def _halve(self, what: str, failed: int) -> None:
        """Take at most half of what was too much from now on."""
        self._room.limits[what] = max(1, failed // 2)

    def _within(self, what: str, size: int) -> int:
        """Return a size, less where that has proved to be too much."""
        return max(1, min(size, self._room.limits.get(what, size)))

    def chunk_size(self) -> int:
        """Columns that go through one pass."""
        if self._chunk_size != "auto":
            return self._chunk_size
        device = self.linearization.device
        preferred = _CPU_CHUNK if device.type == "cpu" else _DEVICE_CHUNK
        column = max(1, self._parameter_bytes())
        # By the workspace of the start: tiles that did not fit say nothing about columns.
        return self._within("columns", max(1, min(preferred, self._workspace() * 4 // column)))

    def batch_size(self, inputs: Inputs) -> int:
        """Samples that go through one pass: what the activations of a chunk of columns leave room for."""
        return self.sample_share(inputs).read()

    def may_hold(self, count: int) -> bool:
        """Whether one pass may take so many samples: nobody chose fewer, and memory has not run out."""
        if self._batch_size != "auto":
            return count <= self._batch_size
        return count <= self._room.limits.get("samples", count)

    def workspace_bytes(self) -> int:
        """Bytes for one tile of per-sample gradients."""
        return self._within("workspace", self._workspace())

    def tile_samples(self, rows: int) -> int:
        """Return how many samples with ``rows`` gradients each fit into the workspace."""
        return max(1, self.workspace_bytes() // max(1, rows * self._parameter_bytes()))

    def keep_workspace(self, count: int) -> None:
        """Use so many bytes for a tile from now on, whatever is free: resumed work must round alike."""
        self._room.kept_workspace = count

    def _workspace(self) -> int:
        """Bytes for one tile as long as none has proved to be too large."""
        if self._room.kept_workspace is not None:
            return self._room.kept_workspace
        low, high = _WORKSPACE_RANGE
        share = int(self.free_bytes * _WORKSPACE_SHARE)
        return max(min(low, share) if _budget is not None else low, min(high, share))

    def _parameter_bytes(self) -> int:
        """Bytes of one vector over the parameters."""
        return self.linearization.num_parameters * self.linearization.dtype.itemsize

    def _sample_bytes(self, inputs: Inputs) -> int:
        """Bytes of what a pass computes of one sample, and of its outputs."""
        return max(
            1, self.linearization.activation_bytes + inputs.num_outputs * self.linearization.dtype.itemsize
        )

    # how much is taken at a time, less where memory runs out

    def column_share(self) -> Share:
        """Return how many columns are taken at a time."""
        return Share(
            "chunk_size",
            self.chunk_size,
            lambda failed: self._halve("columns", failed),
            self.linearization.device,
            lambda: 2 * self._parameter_bytes() + self.linearization.activation_bytes,
            self._chunk_size != "auto",
        )

    def sample_share(self, inputs: Inputs) -> Share:
        """Return how many samples are taken at a time."""
        chosen, sample = self._batch_size, self._sample_bytes(inputs)
        # Of a stream no more than a batch of it: else memory would grow with the number of samples.
        most = inputs.largest_batch

        def needed() -> int:
            # Values and gradients of a forward pass, and both for each column of a chunk.
            return sample * (2 + 2 * self.chunk_size())

        def read() -> int:
            if chosen != "auto":
                return chosen
            return self._within("samples", min(most, int(self.free_bytes // 4 // needed())))

        return Share(
            "batch_size",
            read,
            lambda failed: self._halve("samples", failed),
            self.linearization.device,
            lambda: self._parameter_bytes() + needed(),
            chosen != "auto",
        )

    def tile_share(self, rows: int, read: Callable[[], int] | None = None) -> Share:
        """Return how many samples with ``rows`` gradients each are taken at a time, ``read()`` if given."""
        size = read or (lambda: self.tile_samples(rows))

        def lower(failed: int) -> None:
            # By bytes, which tiles of all sorts share, until this one takes fewer samples.
            while size() >= failed and self.workspace_bytes() > 1:
                self._room.limits["workspace"] = self.workspace_bytes() // 2

        return Share(
            "samples of a tile",
            size,
            lower,
            self.linearization.device,
            lambda: 2 * rows * self._parameter_bytes() + 2 * self.linearization.activation_bytes,
        )

    def over_samples(
        self, inputs: Inputs, work: Callable[[int, int, Batch], Result]
    ) -> Iterator[tuple[int, int, Result]]:
        """Yield start, stop and result of work on batches of samples, smaller ones where memory runs out."""
        share = self.sample_share(inputs)
        for start, stop, batch in inputs.batches(share.read()):

            def part(first: int, last: int, start: int = start, batch: Batch = batch) -> Result:
                return work(start + first, start + last, cut(batch, first, last))

            for first, last, result in parts(stop - start, share, part):
                yield start + first, start + last, result
