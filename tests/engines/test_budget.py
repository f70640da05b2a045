"""The byte budget: what is free, what is kept, what goes first."""

import torch

from ntkops.engines.memory import TensorStore, format_bytes, free_bytes, tensor_bytes


def test_free_bytes_is_positive_and_not_more_than_the_machine_has():
    import os

    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert 0 < free_bytes("cpu") <= total


def test_bytes_of_shapes():
    assert tensor_bytes((3, 5), torch.float32) == 60
    assert format_bytes(60) == "60 B" and format_bytes(2**40) == "1.0 TiB"


def test_the_least_recently_used_goes_first(monkeypatch):
    store = TensorStore(fraction=1.0)
    # Free memory shrinks as the store fills, so that the sum is what can be held in all.
    monkeypatch.setattr("ntkops.engines.memory.free_bytes", lambda device: 256 - store.held_bytes())
    first, second, third = (torch.zeros(16, dtype=torch.float64) for _ in range(3))  # 128 bytes each
    assert store.put(0, "a", first) and store.put(1, "b", second)
    assert store.get(0, "a") is first
    assert store.put(0, "c", third)
    assert store.get(1, "b") is None and store.get(0, "a") is first and store.get(0, "c") is third
    assert not store.put(0, "d", torch.zeros(33, dtype=torch.float64))
    assert store.release(0) == 256 and store.held_bytes() == 0


def test_a_tensor_written_to_after_it_was_stored_is_dropped():
    store = TensorStore()
    item = torch.zeros(4)
    store.put(0, "a", item)
    item.add_(1)
    assert store.get(0, "a") is None and store.held_bytes() == 0
