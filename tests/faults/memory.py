"""A model that runs out of memory above a limit of samples or of numbers in one pass."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

from ntkops.engines.memory import _guarded
from ntkops.model import Linearization

CPU_TEXT = (
    "[enforce fail at alloc_cpu.cpp:121] . DefaultCPUAllocator: can't allocate memory: you tried to allocate "
    "4096 bytes. Error code 12 (Cannot allocate memory)"
)
CUDA_TEXT = "CUDA out of memory. Tried to allocate 2.00 MiB. GPU 0 has a total capacity of 139.00 GiB"


@contextlib.contextmanager
def short_of_memory(monkeypatch, *, samples: int, kind: str = "cpu") -> Iterator[list[int]]:
    """Let every forward pass over more than ``samples`` samples fail as torch does; collect what passed."""
    passed: list[int] = []
    function = Linearization.function

    def limited(self, params, batch):
        if batch.num_samples > samples:
            raise RuntimeError(CPU_TEXT) if kind == "cpu" else torch.OutOfMemoryError(CUDA_TEXT)
        passed.append(batch.num_samples)
        return function(self, params, batch)

    with monkeypatch.context() as patch:
        patch.setattr(Linearization, "function", limited)
        yield passed
    assert _guarded.get() is False
