"""Files that an interrupted computation goes on from: safetensors and JSON, written atomically.

A checkpoint is one safetensors file. Its header carries a JSON document: the version of the format, what
kind of computation wrote it, that computation's metadata, fingerprints of what it was computed from, and a
checksum of everything. Nothing in such a file is ever executed. A file that is truncated, altered, written
by something else, or a pickle is refused before any tensor of it is used.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .errors import CheckpointError
from .vectors import Space

__all__ = [
    "Checkpoint",
    "FORMAT",
    "PartFiles",
    "fingerprint",
    "load",
    "only_writer",
    "save",
    "threads",
]

# In format 1 the padding row of an embedding had a gradient.
FORMAT = 2
"""Format of the JSON document in a file; raised when it would be misread, or means something else."""

_KEY = "ntkops"  # entry of the safetensors header that holds the document
_PICKLES = (b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")
_HASH_BYTES = 1 << 26  # bytes of a tensor hashed at a time


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """What a file holds.

    Attributes:
        tensors: By name, on the CPU.
        metadata: What `save` was given.
        fingerprint: Digests by name of what it was computed from; see `fingerprint`.
        kind: What wrote it.
    """

    tensors: dict[str, Tensor]
    metadata: dict[str, Any]
    fingerprint: dict[str, str]
    kind: str


# -- fingerprints


def fingerprint(**parts: Any) -> dict[str, str]:
    """Return a digest of each part that a result depends on.

    Args:
        **parts: Tensors, NumPy arrays, strings, bytes, numbers, None, dtypes, devices, shapes, and mappings
            (in any order), lists and tuples of these. Floats and tensors count bit by bit, dtypes too; where
            a tensor lives does not count.

    Returns:
        SHA-256 in hexadecimal for each name.

    Raises:
        CheckpointError: If a part holds something else, whose identity is not known.

    Example:
        >>> import torch
        >>> from ntkops.checkpoint import fingerprint
        >>> one = fingerprint(data=torch.ones(2), options={"rtol": 0.1, "seed": 3})
        >>> two = fingerprint(data=torch.ones(2), options={"seed": 3, "rtol": 0.2})
        >>> one["data"] == two["data"], one["options"] == two["options"]
        (True, False)
    """
    digests = {}
    for name, part in parts.items():
        digest = hashlib.sha256()
        _absorb(digest, part, name)
        digests[name] = digest.hexdigest()
    return digests


def _absorb(digest: Any, value: Any, where: str) -> None:
    """Feed a value to a hash so that different values feed different bytes."""
    if isinstance(value, np.ndarray) and value.dtype != object:
        value = torch.from_numpy(np.ascontiguousarray(value))
    if isinstance(value, Tensor):
        _absorb_text(digest, f"tensor {value.dtype} {tuple(value.shape)}")
        _absorb_tensor(digest, value)
    elif isinstance(value, Mapping):
        _absorb_text(digest, f"mapping {len(value)}")
        # by kind and text: keys of different kinds do not compare
        for key in sorted(value, key=lambda key: (type(key).__name__, repr(key))):
            _absorb(digest, key, where)
            _absorb(digest, value[key], f"{where}[{key!r}]")
    elif isinstance(value, bytes):
        _absorb_text(digest, f"bytes {len(value)}")
        digest.update(value)
    elif isinstance(value, Sequence) and not isinstance(value, str):  # torch.Size and ranges are some, too
        _absorb_text(digest, f"sequence {len(value)}")
        for position, item in enumerate(value):
            _absorb(digest, item, f"{where}[{position}]")
    elif value is None or isinstance(value, str | bool | int | float | torch.dtype | torch.device):
        text = value.hex() if isinstance(value, float) else str(value)
        _absorb_text(digest, f"{type(value).__name__} {text}")
    else:
        raise CheckpointError(
            f"{where} holds a {type(value).__name__}, which cannot be told from another one in a later run; "
            "pass tensors, numbers, strings, and mappings and lists of these"
        )


def _absorb_text(digest: Any, text: str) -> None:
    # length first: "ab", "c" and "a", "bc" feed different bytes
    encoded = text.encode("utf-8", "surrogatepass")
    digest.update(len(encoded).to_bytes(8, "little"))
    digest.update(encoded)


def _absorb_tensor(digest: Any, tensor: Tensor) -> None:
    flat = tensor.detach().resolve_conj().resolve_neg().reshape(-1)
    step = max(1, _HASH_BYTES // max(1, tensor.element_size()))
    for start in range(0, flat.numel(), step):
        part = flat[start : start + step].cpu().contiguous()
        digest.update(part.view(torch.uint8).numpy().data)


# -- writing


def save(
    path: str | os.PathLike[str],
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, Any] | None = None,
    fingerprint: Mapping[str, str] | None = None,
    *,
    kind: str = "state",
) -> None:
    """Write a checkpoint atomically.

    The file is written beside its place, flushed to the disk, and then put there in one step: whatever
    happens on the way, a reader finds the old file or the new one, whole.

    Args:
        path: Where; a file that is there is replaced.
        tensors: Dense tensors by name, on any device.
        metadata: Anything that JSON holds; numbers must be finite (NaN belongs into tensors).
        fingerprint: What `fingerprint` gave for that from which the tensors were computed.
        kind: What writes it, so that another computation refuses it.

    Raises:
        CheckpointError: If the metadata is not JSON, a tensor cannot be stored, or the disk refuses; the old
            file is then as it was.

    Cost: one copy of tensors that are not contiguous or share memory, and one pass for the checksum.
    """
    place = Path(path)
    stored = {str(name): _storable(tensor, str(name)) for name, tensor in tensors.items()}
    _separate(stored)
    document = {
        "format": FORMAT,
        "kind": kind,
        "metadata": dict(metadata or {}),
        "fingerprint": dict(fingerprint or {}),
    }
    document["checksum"] = _checksum(document, stored)
    header = {_KEY: _to_json(document)}
    temporary = place.with_name(f".{place.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
    try:
        save_file(stored, temporary, metadata=header)
        _flush(temporary)
        # the data are on the disk before the name is: a crash leaves the old file or the new one
        os.replace(temporary, place)
        _flush_directory(place.parent)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"{place} cannot be written ({error}); what was there before is unchanged"
        ) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def _storable(tensor: Any, name: str) -> Tensor:
    if not isinstance(tensor, Tensor) or tensor.layout != torch.strided or tensor.device.type == "meta":
        kind = type(tensor).__name__ if not isinstance(tensor, Tensor) else f"{tensor.layout} tensor"
        raise CheckpointError(f"{name!r} is a {kind} on which nothing can be stored; pass a dense tensor")
    return tensor.detach().to("cpu").resolve_conj().resolve_neg().contiguous()


def _separate(tensors: dict[str, Tensor]) -> None:
    """Copy tensors that share memory, which the format cannot express."""
    seen: set[int] = set()
    for name, tensor in tensors.items():
        storage = tensor.untyped_storage()
        if storage.nbytes() != tensor.nbytes or storage.data_ptr() in seen:
            tensors[name] = tensor.clone()
        seen.add(storage.data_ptr())


def _to_json(document: Mapping[str, Any]) -> str:
    try:
        return json.dumps(document, sort_keys=True, allow_nan=False, ensure_ascii=True)
    except (TypeError, ValueError, RecursionError) as error:
        raise CheckpointError(
            f"the metadata cannot be written as JSON ({error}); put tensors and NaN among the tensors"
        ) from error


def _checksum(document: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    plain = {key: value for key, value in document.items() if key != "checksum"}
    return fingerprint(all=(_to_json(plain), tensors))["all"]


def _flush(path: Path) -> None:
    with open(path, "rb+") as file:
        os.fsync(file.fileno())


def _flush_directory(path: Path) -> None:
    """Make the new name itself durable, where directories can be opened."""
    with contextlib.suppress(OSError):
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


@contextlib.contextmanager
def only_writer(path: str | os.PathLike[str]) -> Iterator[None]:
    """Write alone: hold a lock file, which the system releases however this process ends.

    Args:
        path: The lock file; it is made where it is missing, and stays.

    Raises:
        CheckpointError: If another process, or thread, holds it, or the system has no such locks.
    """
    place = Path(path)
    with contextlib.ExitStack() as stack:
        try:
            import fcntl  # POSIX

            file = stack.enter_context(open(place, "ab"))
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise CheckpointError(
                f"{place.parent} is being written to by another process: wait for it, or give another path"
            ) from error
        except (ImportError, OSError) as error:
            raise CheckpointError(
                f"{place} cannot be locked ({error}): give a path on a local disk"
            ) from error
        yield


# -- reading


def load(
    path: str | os.PathLike[str],
    fingerprint: Mapping[str, str] | None = None,
    *,
    kind: str = "state",
    mapped: bool = False,
) -> Checkpoint:
    """Read a checkpoint, after every check.

    Args:
        path: The file.
        fingerprint: What `fingerprint` gives for the present parameters, data and options; None to take
            any.
        kind: What must have written it.
        mapped: Map tensors into memory instead of copying them: pages are read where they are used. The
            checksum, for which everything is read, is not compared then. What is written to such a tensor
            never reaches the file.

    Returns:
        Its tensors (on the CPU), metadata and fingerprint.

    Raises:
        CheckpointError: If the file is missing, truncated, altered, of another kind or format, a pickle, or
            was computed from something else; the message names what differs. Nothing is executed.

    Example:
        >>> import tempfile, torch
        >>> from ntkops import checkpoint
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     checkpoint.save(
        ...         f"{folder}/sums.safetensors", {"sum": torch.ones(2)}, {"done": 3}
        ...     )
        ...     found = checkpoint.load(f"{folder}/sums.safetensors")
        >>> found.tensors["sum"].tolist(), found.metadata
        ([1.0, 1.0], {'done': 3})
    """
    place = Path(path)
    _require_readable(place)
    try:
        with safe_open(place, framework="pt", device="cpu") as file:
            header = file.metadata() or {}
            document = _document(header.get(_KEY), place)
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{place} is no whole safetensors file ({error}); it was cut short, altered, or is something else"
        ) from error
    _require_format(document, kind, place)
    if not mapped:
        tensors = {name: tensor.clone() for name, tensor in tensors.items()}
        if document["checksum"] != _checksum(document, tensors):
            raise CheckpointError(f"{place} was altered after it was written: its checksum differs")
    _require_same(document["fingerprint"], fingerprint, place)
    return Checkpoint(tensors, document["metadata"], document["fingerprint"], kind)


def _require_readable(place: Path) -> None:
    try:
        with open(place, "rb") as file:
            start = file.read(9)
    except FileNotFoundError as error:
        raise CheckpointError(f"there is no file {place}") from error
    except OSError as error:
        raise CheckpointError(f"{place} cannot be read ({error.strerror or error})") from error
    # A safetensors file begins with the length of its header, which may be the same bytes, and a brace.
    if start.startswith(_PICKLES) and start[8:] != b"{":
        raise CheckpointError(
            f"{place} is a pickle or a file of torch.save, which may execute code when it is read; it was "
            "not opened. Checkpoints are safetensors files that ntkops wrote"
        )


def _document(text: str | None, place: Path) -> dict[str, Any]:
    if text is None:
        raise CheckpointError(f"{place} is a safetensors file that ntkops did not write: it has no record")
    try:
        document = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{place} has a damaged record ({error})") from error
    if not isinstance(document, dict):
        raise CheckpointError(f"{place} has a damaged record: it is no table")
    return document


def _require_format(document: Mapping[str, Any], kind: str, place: Path) -> None:
    version = document.get("format")
    if version != FORMAT:
        raise CheckpointError(
            f"{place} has format {version!r}, this version of ntkops reads {FORMAT} (up to format 1 padding "
            "rows of embeddings had a gradient); use the version that wrote it, or start again with another "
            "path"
        )
    parts: tuple[tuple[str, type], ...] = (
        ("metadata", dict),
        ("fingerprint", dict),
        ("checksum", str),
        ("kind", str),
    )
    for name, expected in parts:
        if not isinstance(document.get(name), expected):
            raise CheckpointError(f"{place} has a damaged record: {name} is missing or of another kind")
    if document["kind"] != kind:
        raise CheckpointError(f"{place} was written by {document['kind']!r}, not by {kind!r}")


def _require_same(found: Mapping[str, str], wanted: Mapping[str, str] | None, place: Path) -> None:
    if wanted is None:
        return
    names = sorted({*found, *wanted})
    different = [name for name in names if found.get(name) != wanted.get(name)]
    if different:
        raise CheckpointError(
            f"{place} belongs to another computation: fingerprint differs: {', '.join(different)}; give what "
            "it was started with, or another path"
        )


# -- going on by the same route


@contextlib.contextmanager
def threads(count: int) -> Iterator[None]:
    """Compute with so many threads, since sums depend on how they are split; then put it back.

    Args:
        count: Number of threads that a computation began with.

    Example:
        >>> import torch
        >>> from ntkops import checkpoint
        >>> with checkpoint.threads(1):
        ...     torch.get_num_threads()
        1
    """
    before = torch.get_num_threads()
    if count == before:
        yield
        return
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


# -- checkpoints of a computation whose processes each hold a part, and write at the same steps


_SLOTS = "ab"


class PartFiles:
    """The files of one computation.

    One process writes the file that was asked for. Of several, each writes files of its own beside it, two in
    turn: one that dies between two writes leaves a step that all of them have.

    Args:
        path: Where; with several processes the rank and a letter are added.
        space: Says which process this is, and agrees with the others.
        kind: What is written; see `ntkops.checkpoint.save`.

    Example:
        >>> import tempfile, torch
        >>> from ntkops.checkpoint import PartFiles
        >>> from ntkops.vectors import Space
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     files = PartFiles(f"{folder}/sums", Space(3, torch.float64), "sums")
        ...     files.write(5, {"sum": torch.ones(2)}, {}, {})
        ...     found = PartFiles(
        ...         f"{folder}/sums", Space(3, torch.float64), "sums"
        ...     ).read()
        >>> found.metadata["step"], found.tensors["sum"].tolist()
        (5, [1.0, 1.0])
    """

    def __init__(self, path: str | os.PathLike[str], space: Space, kind: str) -> None:
        self._space, self._kind = space, kind
        self._last: Path | None = None
        self.path = Path(path)
        rank, count = space.part
        self._paths = [self.path]
        if count > 1:
            self._paths = [
                self.path.with_name(f"{self.path.name}.rank{rank}of{count}.{slot}") for slot in _SLOTS
            ]

    def read(
        self,
        fingerprint: Mapping[str, str] | None = None,
        check: Callable[[Checkpoint], None] = lambda held: None,
    ) -> Checkpoint | None:
        """Return the last step that all processes have; None where there is none.

        Args:
            fingerprint: What it has to be computed from; None takes any.
            check: Raises `CheckpointError` for a file that belongs to another computation.

        Raises:
            CheckpointError: If a file of this process, or of another one, is damaged or foreign.
        """
        found, problem = self._held(fingerprint, check)
        if self._space.any(problem is not None):
            text = f"the part of {self.path} that another process holds cannot be gone on from"
            raise problem or CheckpointError(text)
        common = set.intersection(*(set(steps) for steps in self._space.share(sorted(found))))
        if not common:
            return None
        self._last, held = found[max(common)]
        return held

    def _held(
        self, fingerprint: Mapping[str, str] | None, check: Callable[[Checkpoint], None]
    ) -> tuple[dict[int, tuple[Path, Checkpoint]], CheckpointError | None]:
        """Return what this process has by step, and what is wrong with it."""
        found = {}
        for path in self._paths:
            if not path.exists():
                continue
            try:
                held = load(path, fingerprint, kind=self._kind)
                check(held)
            except CheckpointError as error:
                return {}, error
            found[int(held.metadata["step"])] = path, held
        return found, None

    def write(
        self,
        step: int,
        tensors: Mapping[str, Tensor],
        metadata: Mapping[str, Any],
        fingerprint: Mapping[str, str],
    ) -> None:
        """Write a step; all processes do so at the same one.

        Args:
            step: How far the computation is.
            tensors: This process's part.
            metadata: Anything that JSON holds.
            fingerprint: What it is computed from.

        Raises:
            CheckpointError: If one of the processes cannot write.
        """
        path, problem = self._next(), None
        try:
            save(path, tensors, {**metadata, "step": step}, fingerprint, kind=self._kind)
        except (OSError, CheckpointError) as error:
            problem = error
        if self._space.any(problem is not None):
            raise CheckpointError(f"{path} could not be written by all processes: {problem}") from problem
        self._last = path

    def _next(self) -> Path:
        """Return the file to replace: not the one that was written last, in this run or before it."""
        there = [path for path in self._paths if path.exists()]
        # the step that all processes have may be the last one written: the older slot is replaced
        last = self._last or max(there, key=lambda path: path.stat().st_mtime_ns, default=None)
        return next((path for path in self._paths if path != last), self._paths[0])
