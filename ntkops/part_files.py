"""Checkpoints of a computation whose processes each hold a part of it, and write at the same steps."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from .checkpoint import Checkpoint, load, save
from .errors import CheckpointError
from .vectors import Space

__all__ = ["PartFiles"]

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
        >>> from ntkops.part_files import PartFiles
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
        last = self._last or max(there, key=lambda path: path.stat().st_mtime_ns, default=None)
        return next((path for path in self._paths if path != last), self._paths[0])
