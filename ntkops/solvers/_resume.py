"""A file that an interrupted iteration goes on from, bit for bit."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor

from ..checkpoint import Checkpoint, fingerprint
from ..errors import CheckpointError, InputError
from ..part_files import PartFiles
from ..vectors import Space
from ._outcome import Product
from .iteration import ConjugateGradient, Preconditioner

__all__ = ["SolverFile"]

_KIND = "conjugate gradient"


class SolverFile:
    """The state of an iteration on disk.

    Args:
        path: Where; see `ntkops.part_files.PartFiles`.
        every: Steps from one write to the next: all processes that share the vectors write at the same ones.
        space: The space of the columns.
        multiply: The product with A.
        rhs: The right-hand sides.
        preconditioner: The preconditioner, or None.
        tolerance: Tolerance of the iteration.

    Raises:
        InputError: If ``every`` is not a positive integer.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        every: int,
        *,
        space: Space,
        multiply: Product,
        rhs: Tensor,
        preconditioner: Preconditioner | None,
        tolerance: float,
    ) -> None:
        if not isinstance(every, int) or isinstance(every, bool) or every < 1:
            raise InputError(f"checkpoint_every={every!r}: pass a number of steps, at least 1")
        self._every, self._written = every, -1
        self._device = space.device
        self._files = PartFiles(path, space, _KIND)
        self._fingerprint = _identity(space, multiply, rhs, preconditioner, tolerance)

    def resume(self, iteration: ConjugateGradient) -> None:
        """Let an iteration go on from where the file is, if there is one.

        Raises:
            CheckpointError: If the file is damaged, or belongs to another system.
        """
        held = self._files.read(check=self._require_same)
        if held is not None:
            iteration.load_state({name: tensor.to(self._device) for name, tensor in held.tensors.items()})
            self._written = iteration.iterations

    def __call__(self, iteration: ConjugateGradient) -> None:
        """Write the state where it is time to, and at the end.

        Raises:
            CheckpointError: If one of the processes cannot write.
        """
        step = iteration.iterations
        if step != self._written and (step % self._every == 0 or not iteration.running):
            self._files.write(step, iteration.state(), {}, self._fingerprint)
            self._written = step

    def _require_same(self, held: Checkpoint) -> None:
        for name, meaning in _MEANINGS.items():
            if held.fingerprint.get(name) != self._fingerprint[name]:
                raise CheckpointError(
                    f"{self._files.path} belongs to another computation: {meaning}; remove the file to start "
                    "anew"
                )


def _identity(
    space: Space,
    multiply: Product,
    rhs: Tensor,
    preconditioner: Preconditioner | None,
    tolerance: float,
) -> dict[str, str]:
    """Return digests of the system: its right-hand sides, and the bits of one product.

    Products are what cannot be looked into: another operator, route or machine shows itself in the bits of
    one of them.
    """
    first = rhs[..., :1]
    options: dict[str, Any] = {"tolerance": tolerance, "size": space.size, "part": space.part}
    return fingerprint(
        rhs=rhs,
        options=options,
        product=multiply(first),
        preconditioner=None if preconditioner is None else preconditioner(first),
        threads=torch.get_num_threads(),
    )


_MEANINGS = {
    "rhs": "the right-hand side is another one",
    "options": "the tolerance or the number of processes is another one",
    "threads": "the number of threads is another one (torch.set_num_threads)",
    "product": "products have other bits: another operator, another route through it, or another machine",
    "preconditioner": "the preconditioner is another one; give it the same generator",
}
