"""One byte budget for the whole process: what is free, what is cached, what must go.

Every engine puts the tensors that it could recompute into the same store, which drops the least
recently used ones when they would exceed a quarter of the memory that is free.
"""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Hashable
from pathlib import Path

import torch
from torch import Tensor

__all__ = ["TensorStore", "format_bytes", "free_bytes", "shared_store", "tensor_bytes"]

_FRACTION = 0.25
_CGROUP_LIMITS = (
    (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")),
    (
        Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"),
        Path("/sys/fs/cgroup/memory/memory.usage_in_bytes"),
    ),
)


def format_bytes(count: float) -> str:
    """Return a byte count with a binary unit.

    Example:
        >>> from ntkops.engines.budget import format_bytes
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
    try:
        return int(path.read_text().strip())
    except (OSError, ValueError):  # "max" means no limit
        return None


def _free_host_bytes() -> int:
    free = None
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                free = int(line.split()[1]) * 1024
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
    """Return the bytes that can still be allocated on a device.

    On the CPU this is the smaller of what the kernel says is available and what the control group
    leaves; on CUDA what the driver reports as free plus what torch holds unused.

    Args:
        device: The device asked about.

    Returns:
        Bytes, at least 0.
    """
    device = torch.device(device)
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(free + held)
    return _free_host_bytes()


class TensorStore:
    """Recomputable tensors of all engines, least recently used first out.

    Args:
        fraction: Share of free memory that the store may hold, in (0, 1].
    """

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
        return self._items.pop(key)[0]

    def put(self, owner: int, key: Hashable, item: Tensor) -> bool:
        """Store a tensor, dropping older ones on its device where needed.

        Returns:
            Whether it was stored: a tensor larger than the whole budget is not.
        """
        size = tensor_bytes(item.shape, item.dtype)
        with self._lock:
            limit = self.fraction * (free_bytes(item.device) + self.held_bytes(item.device))
            if size > limit:
                return False
            self._items[owner, key] = item, item._version
            self._items.move_to_end((owner, key))
            for oldest in list(self._items):
                if self.held_bytes(item.device) <= limit or oldest == (owner, key):
                    break
                if self._items[oldest][0].device == item.device:
                    self._drop(oldest)
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
