"""Batches on their way to the model's device, one ahead of the work."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from .batches import Batch

__all__ = ["moved_ahead"]


def moved_ahead(batches: Iterator[Batch], device: torch.device) -> Iterator[Batch]:
    """Yield batches on a device.

    On CUDA the next batch is read, pinned and copied on a side stream while the work on this one is still
    queued: at most two batches are on the device at a time. Elsewhere each is copied as it is asked for.

    Args:
        batches: Batches on any device.
        device: Where they are wanted.
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
