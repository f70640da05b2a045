"""Files are whole or refused, and nothing in them is executed."""

from __future__ import annotations

import json
import os
import pickle
import struct

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from ntkops import checkpoint
from ntkops.errors import CheckpointError


def everything() -> dict[str, torch.Tensor]:
    base = torch.arange(12.0)
    return {
        "float64": torch.randn(3, 2, dtype=torch.float64),
        "bfloat16": torch.randn(5).bfloat16(),
        "integers": torch.arange(4),
        "flags": torch.tensor([True, False]),
        "scalar": torch.tensor(float("nan")),
        "nothing": torch.zeros(0, 3),
        "view": base[::2],
        "shared": base,
        "shared again": base,
        "transposed": torch.randn(2, 3).mT,
        "graph": torch.randn(2, requires_grad=True) * 2,
        "a/b ü": torch.ones(1),
    }


@pytest.fixture
def path(tmp_path):
    return tmp_path / "run.safetensors"


def test_a_file_is_read_whatever_the_length_of_its_header(path):
    lengths = set()
    for size in range(0, 1200, 7):
        checkpoint.save(path, {"a": torch.ones(2)}, {"text": "x" * size})
        lengths.add(struct.unpack("<Q", path.read_bytes()[:8])[0])
        assert checkpoint.load(path).metadata["text"] == "x" * size
    # Among them those whose first bytes are the ones of pickles: 0x80, then a protocol.
    assert {0x280, 0x380, 0x480, 0x580} & lengths


def test_what_is_saved_is_loaded_bit_for_bit(path):
    tensors = everything()
    metadata = {"done": 3, "names": ["a", "ü"], "nested": {"x": 0.1, "none": None}}
    print_ = checkpoint.fingerprint(data=torch.ones(2))
    checkpoint.save(path, tensors, metadata, print_, kind="test")
    found = checkpoint.load(path, print_, kind="test")
    assert found.metadata == metadata and found.fingerprint == print_ and found.kind == "test"
    assert found.tensors.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found.tensors[name].dtype == tensor.dtype and found.tensors[name].shape == tensor.shape
        assert torch.equal(found.tensors[name].nan_to_num(7.0), tensor.detach().nan_to_num(7.0))
        assert not found.tensors[name].requires_grad
    assert os.listdir(path.parent) == [path.name]


def test_without_tensors_and_metadata(path):
    checkpoint.save(path, {})
    found = checkpoint.load(path)
    assert found.tensors == {} and found.metadata == {}


def test_loaded_tensors_outlive_the_file(path):
    checkpoint.save(path, {"a": torch.ones(1000)})
    found = checkpoint.load(path).tensors["a"]
    path.write_bytes(b"")
    found += 1
    assert float(found.sum()) == 2000


def test_every_truncation_is_refused(path):
    checkpoint.save(path, {"a": torch.randn(4)}, {"done": 1})
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(CheckpointError):
            checkpoint.load(path)
    path.write_bytes(whole + b"\0")
    with pytest.raises(CheckpointError):
        checkpoint.load(path)


def test_every_altered_byte_is_refused(path):
    checkpoint.save(path, {"a": torch.randn(4), "b": torch.arange(2)}, {"done": 1}, {"data": "00"})
    whole = path.read_bytes()
    original = checkpoint.load(path)
    for position in range(len(whole)):
        path.write_bytes(whole[:position] + bytes([whole[position] ^ 1]) + whole[position + 1 :])
        try:
            found = checkpoint.load(path)
        except CheckpointError:
            continue
        # A change that does not matter, as in the padding of the header, gives the same content.
        assert found.metadata == original.metadata and found.fingerprint == original.fingerprint
        assert all(torch.equal(found.tensors[name], original.tensors[name]) for name in original.tensors)


class Bomb:
    """Says so if it is ever unpickled."""

    def __reduce__(self):
        return os.mkdir, ("exploded",)


@pytest.mark.parametrize("protocol", range(6))
def test_pickles_are_refused_and_not_executed(path, monkeypatch, protocol):
    monkeypatch.chdir(path.parent)
    path.write_bytes(pickle.dumps(Bomb(), protocol=protocol))
    with pytest.raises(CheckpointError):
        checkpoint.load(path)
    assert not (path.parent / "exploded").exists()


@pytest.mark.parametrize("zipped", [True, False])
def test_torch_files_are_refused_and_not_executed(path, monkeypatch, zipped):
    monkeypatch.chdir(path.parent)
    torch.save({"a": Bomb()}, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(CheckpointError, match="execute code"):
        checkpoint.load(path)
    assert not (path.parent / "exploded").exists()


def test_foreign_files_are_refused(path, tmp_path):
    with pytest.raises(CheckpointError, match="there is no file"):
        checkpoint.load(path)
    with pytest.raises(CheckpointError, match="cannot be read"):
        checkpoint.load(tmp_path)
    for content in (
        b"",
        b"{}",
        b"hello world, this is text",
        os.urandom(200),
        struct.pack("<Q", 2**63) + b"{}",
    ):
        path.write_bytes(content)
        with pytest.raises(CheckpointError):
            checkpoint.load(path)
    save_file({"a": torch.ones(2)}, path)
    with pytest.raises(CheckpointError, match="did not write"):
        checkpoint.load(path)
    np.savez(tmp_path / "arrays.npz", a=np.ones(2))
    with pytest.raises(CheckpointError):
        checkpoint.load(tmp_path / "arrays.npz")


RECORD = {"format": checkpoint.FORMAT, "kind": "state", "metadata": {}, "fingerprint": {}}


@pytest.mark.parametrize(
    "record",
    [
        "not json",
        "[1, 2]",
        "[" * 100_000,
        json.dumps({"format": checkpoint.FORMAT}),
        json.dumps(RECORD | {"metadata": [], "checksum": ""}),
        json.dumps(RECORD | {"checksum": "0"}),
    ],
)
def test_damaged_records_are_refused(path, record):
    save_file({"a": torch.ones(2)}, path, metadata={"ntkops": record})
    with pytest.raises(CheckpointError):
        checkpoint.load(path)


def test_another_format_or_kind_is_refused(path, monkeypatch):
    checkpoint.save(path, {}, kind="track")
    with pytest.raises(CheckpointError, match="written by 'track', not by 'state'"):
        checkpoint.load(path)
    written = checkpoint.FORMAT
    monkeypatch.setattr(checkpoint, "FORMAT", written + 1)
    with pytest.raises(CheckpointError, match=f"format {written}, this version .* reads {written + 1}"):
        checkpoint.load(path, kind="track")


def test_sums_of_before_padding_rows_lost_their_gradient_are_refused_by_name(path, monkeypatch):
    with monkeypatch.context() as before:
        before.setattr(checkpoint, "FORMAT", 1)
        checkpoint.save(path, {"sum": torch.ones(2)}, kind="track")
    with pytest.raises(CheckpointError, match="format 1.*padding rows of embeddings had a gradient"):
        checkpoint.load(path, kind="track")


def test_the_difference_of_fingerprints_is_named(path):
    made = checkpoint.fingerprint(data=torch.ones(2), options={"rtol": 0.1}, parameters=[torch.zeros(1)])
    checkpoint.save(path, {}, fingerprint=made)
    other = checkpoint.fingerprint(data=torch.zeros(2), options={"rtol": 0.1}, parameters=[torch.zeros(1)])
    with pytest.raises(CheckpointError, match="fingerprint differs: data;"):
        checkpoint.load(path, other)
    assert checkpoint.load(path, made).fingerprint == made
    with pytest.raises(CheckpointError, match="fingerprint differs: data, options, parameters"):
        checkpoint.load(path, {})


def test_a_failed_write_leaves_the_old_file(path, monkeypatch):
    checkpoint.save(path, {"a": torch.ones(2)})

    def full(*_):
        raise OSError(28, "No space left on device")

    for step in ("fsync", "replace"):
        with monkeypatch.context() as patched:
            patched.setattr(os, step, full)
            with pytest.raises(CheckpointError, match="No space left"):
                checkpoint.save(path, {"a": torch.zeros(2)})
        assert checkpoint.load(path).tensors["a"].tolist() == [1.0, 1.0]
        assert os.listdir(path.parent) == [path.name]
    with pytest.raises(CheckpointError, match="cannot be written"):
        checkpoint.save(path.parent / "missing" / "file", {})


def test_an_interrupt_leaves_the_old_file(path, monkeypatch):
    checkpoint.save(path, {"a": torch.ones(2)})

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupt)
    with pytest.raises(KeyboardInterrupt):
        checkpoint.save(path, {"a": torch.zeros(2)})
    assert checkpoint.load(path).tensors["a"].tolist() == [1.0, 1.0]
    assert os.listdir(path.parent) == [path.name]


def test_what_cannot_be_stored_is_refused_before_writing(path):
    for tensors, metadata in (
        ({"a": [1.0]}, {}),
        ({"a": torch.ones(2).to_sparse()}, {}),
        ({"a": torch.ones(2, device="meta")}, {}),
        ({}, {"a": float("nan")}),
        ({}, {"a": torch.ones(1)}),
    ):
        with pytest.raises(CheckpointError):
            checkpoint.save(path, tensors, metadata)
    assert not os.listdir(path.parent)


def test_fingerprints_tell_apart_what_differs():
    def digest(value):
        return checkpoint.fingerprint(value=value)["value"]

    x = torch.arange(6.0)
    different = [
        x,
        x.double(),
        x.reshape(2, 3),
        x + 1e-7,
        -x,
        torch.tensor(0.0),
        torch.tensor(-0.0),
        0.0,
        -0.0,
        0,
        False,
        None,
        "0",
        b"0",
        "",
        [],
        {},
        [[], []],
        [[[]]],
        ["ab", "c"],
        ["a", "bc"],
        {"a": 1},
        {"a": 1.0},
        {1: "a"},
        torch.float32,
    ]
    assert len({digest(value) for value in different}) == len(different)
    assert digest({"a": 1, "b": 2}) == digest({"b": 2, "a": 1})
    assert digest(x.reshape(2, 3).mT) == digest(x.reshape(2, 3).mT.contiguous())
    assert digest(x.numpy()) == digest(x) and digest(torch.Size([2, 3])) == digest((2, 3))
    with pytest.raises(CheckpointError, match="options\\['rule'\\] holds a function"):
        checkpoint.fingerprint(options={"rule": digest})
