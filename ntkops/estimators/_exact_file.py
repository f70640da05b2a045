"""A sum of terms in a file: how far it is, what it is made of, and the route by which it goes on."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..checkpoint import fingerprint
from ..engines import Engine, EngineChoice, LayerwiseEngine
from ..errors import CheckpointError
from ..operators.kernel import NTKOperator
from ..operators.provenance import kernel_route, made_of, place_of
from ..operators.sharded import ShardedKernelOperator
from ..part_files import PartFiles
from ._request import Operand

__all__ = ["ExactFile", "Standing"]

logger = logging.getLogger(__name__)

KIND = "exact"
_FOLLOWED = ("batch_size", "chunk_size", "workspace")


@dataclass(frozen=True)
class Standing:
    """How far a sum is.

    Attributes:
        done: Units that are in it.
        sums: The sum of these, ``(*batch, q)``, float64.
    """

    done: int
    sums: Tensor


class ExactFile:
    """A file of one exact quantity.

    Args:
        path: Where it is, or will be.
        name: What is computed.
        unit: What is counted.
        operands: What it is computed from.

    Attributes:
        passes: Passes made before this run.
        seconds: Time spent before this run.
        threads: Threads that the work began with.

    Raises:
        CheckpointError: If an operand could not be recognised, or the folder does not exist.
    """

    def __init__(self, path: Path, name: str, unit: str, operands: Sequence[Operand]) -> None:
        self._path, self._operands = path, list(operands)
        if not path.parent.is_dir():
            raise CheckpointError(f"there is no folder {path.parent} for {path.name}; make it first")
        parts: dict[str, Any] = {"quantity": [name, unit]}
        for number, operand in enumerate(operands):
            suffix = "" if len(operands) == 1 else str(number + 1)
            for key, part in made_of(operand.operator, name).items():
                parts[key + suffix] = part
        self._fingerprint = fingerprint(**parts)
        self._files = PartFiles(path, operands[0].rows, KIND)
        self.passes, self.seconds, self.threads = 0, 0.0, torch.get_num_threads()
        self._route: dict[str, Any] = {}

    def begin(
        self, zero: Tensor, size: Callable[[Sequence[Operand]], int]
    ) -> tuple[list[Operand], Standing, int]:
        """Return operands that take the file's route, how far the sum is, and the size of a step.

        The operands have engines of their own, in the first run too: what a kernel has kept from earlier work
        would decide how it rounds.

        Args:
            zero: The sum of nothing.
            size: Given operands, returns the size of a step.

        Raises:
            CheckpointError: If the file is unreadable, belongs to other work, or its route cannot be taken.
        """
        found = self._files.read(self._fingerprint)
        if found is None:
            operands = [_following(operand, kernel_route(operand.operator)) for operand in self._operands]
            self._route = self._route_of(operands, size(operands))
            return operands, Standing(0, zero), self._route["size"]
        record = found.metadata
        self._route = route = record["route"]
        self.threads, self.passes, self.seconds = route["threads"], record["passes"], record["seconds"]
        operands = [
            _following(operand, then) for operand, then in zip(self._operands, route["operands"], strict=True)
        ]
        self._require_same(self._route_of(operands, route["size"]))
        standing = Standing(record["done"], found.tensors["sums"].to(zero.device))
        logger.info("going on after %d steps of %s", standing.done, self._path)
        return operands, standing, route["size"]

    def write(self, standing: Standing, passes: int, seconds: float) -> None:
        """Put the sum into the file, atomically."""
        metadata = {"done": standing.done, "route": self._route, "passes": passes, "seconds": seconds}
        self._files.write(standing.done, {"sums": standing.sums}, metadata, self._fingerprint)

    def _route_of(self, operands: Sequence[Operand], size: int) -> dict[str, Any]:
        return {
            **place_of(operands[0].device),
            "threads": self.threads,
            "size": size,
            "operands": [kernel_route(operand.operator) for operand in operands],
        }

    def _require_same(self, now: dict[str, Any]) -> None:
        then = self._route
        pairs = [(then, now), *zip(then["operands"], now["operands"], strict=True)]
        different = [
            f"{name} {old.get(name)!r}, now {new[name]!r}"
            for old, new in pairs
            for name in new
            if name != "operands" and old.get(name) != new[name]
        ]
        if different:
            raise CheckpointError(
                f"{self._path} was computed by another route, and would not go on with the same bits: "
                f"{'; '.join(different)}; build the operator as it was built then, or use another path"
            )


def _following(operand: Operand, route: dict[str, Any]) -> Operand:
    """Return an operand whose sums are split as a route says, with an engine of its own."""
    operator = operand.operator
    if isinstance(operator, ShardedKernelOperator):
        same = operator.with_engine(
            batch_size=route.get("batch_size", "auto"), chunk_size=route.get("chunk_size", "auto")
        )
        _keep_workspace(same._engine.local, route)
        return Operand(same)
    if not isinstance(operator, NTKOperator) or not set(_FOLLOWED) <= set(route):
        return operand
    engine = operator._core.engine
    choice: EngineChoice = engine.options if isinstance(engine, LayerwiseEngine) else "autograd"
    same = operator.with_engine(choice, batch_size=route["batch_size"], chunk_size=route["chunk_size"])
    _keep_workspace(same._core.engine, route)
    return Operand(same)


def _keep_workspace(engine: Engine | None, route: dict[str, Any]) -> None:
    if engine is not None:
        engine.keep_workspace(route["workspace"])
