"""Preconditioned conjugate gradients on a block of columns, each held to its own true residual."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from ..arguments import checked
from ..checkpoint import Checkpoint, PartFiles, fingerprint
from ..errors import CheckpointError, InputError, ShapeError
from ..results import Solution, SolveInfo
from ..vectors import Space
from ._outcome import Product, as_block, check_options, described, finished, steady_products
from .iteration import ConjugateGradient, Preconditioner

__all__ = [
    "SolverFile",
    "conjugate_gradient",
    "iterate",
]

Callback = Callable[[ConjugateGradient], object]


def iterate(
    iteration: ConjugateGradient,
    max_iterations: int,
    callback: Callback | None = None,
    progress: bool = False,
) -> None:
    """Make steps until every column has ended, or as many as are allowed."""
    with tqdm(desc="conjugate gradient", unit="step", disable=not progress) as bar:
        while iteration.running and iteration.iterations < max_iterations:
            iteration.step()
            bar.update()
            if callback is not None:
                callback(iteration)
    iteration.limit()


def _both(*calls: Callback | None) -> Callback | None:
    """Return a callback that makes several."""
    made = [call for call in calls if call is not None]
    return (lambda iteration: [call(iteration) for call in made]) if made else None


@checked
def conjugate_gradient(
    multiply: Product,
    rhs: Tensor,
    space: Space,
    *,
    preconditioner: Preconditioner | None = None,
    tolerance: float = 1e-6,
    max_iterations: int | None = None,
    initial: Tensor | None = None,
    state: dict[str, Tensor] | None = None,
    callback: Callback | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    checkpoint_every: int = 25,
    progress: bool = False,
    raise_on_failure: bool = True,
) -> Solution:
    r"""Solve A X = B by preconditioned conjugate gradients, for symmetric positive definite A.

    Every column has its own coefficients and its own tolerance, :math:`|b - A x| \le t |b|`, which is
    checked on the true residual, by a product that the recursion does not share; columns that meet it
    leave the products. A column whose true residual lags behind the recursion goes on from there; one
    that gains nothing by that has come to the accuracy of its products, and ends as "stagnated".

    Args:
        multiply: ``(*batch, n, k) -> (*batch, n, k)``, the product with A (the ridge included). With a
            batch there is one system for each member; a column leaves once it has converged in all.
        rhs: B, ``(n,)`` or ``(*batch, n, k)``.
        space: The space of the columns.
        preconditioner: An approximate inverse of A; see `ntkops.solvers.nystrom_preconditioner`.
        tolerance: Relative residual asked of every column, in (0, 1).
        max_iterations: Most steps; default max(1000, n).
        initial: First guess, of the shape of ``rhs``.
        state: Where an earlier iteration stopped (`ConjugateGradient.state`), to go on from.
        callback: Called with the `ConjugateGradient` after each step.
        checkpoint: File that the iteration is written to, and goes on from where it is there; with vectors
            over several processes, one for each of them beside it. What goes on has the same bits: operators
            of ours go one way from their first product here to the last. Takes one more product.
        checkpoint_every: Steps from one write to the next.
        progress: Show a bar of steps.
        raise_on_failure: Raise where a column fails; False returns what there is, with
            ``info.converged`` False.

    Returns:
        `Solution`: x of the shape of ``rhs``, and its `SolveInfo`. Cost: a product column for each
        running column and step, and one for each check; memory: six blocks ``(*batch, n, k)``.

    Raises:
        InputError: If an option is out of range.
        ShapeError: If the blocks do not fit.
        NonFiniteError: If B or a product holds NaN or infinity.
        CheckpointError: If the file is damaged, or belongs to another system.
        NotConvergedError: If a column misses its tolerance; ``result`` is the partial `Solution`.

    References:
        Hestenes, Stiefel (1952); restarts on the true residual instead of the replacement of van der
        Vorst, Ye (2000), which diverges where products round too coarsely.

    Example:
        >>> import torch
        >>> from ntkops.solvers import conjugate_gradient
        >>> from ntkops.vectors import Space
        >>> A = torch.diag(torch.tensor([1.0, 2.0, 4.0], dtype=torch.float64))
        >>> x, info = conjugate_gradient(
        ...     lambda V: A @ V, torch.ones(3).double(), Space(3, torch.float64)
        ... )
        >>> (
        ...     [round(v, 9) for v in x.tolist()],
        ...     info.converged,
        ...     info.iterations,
        ...     info.products,
        ... )
        ([1.0, 0.5, 0.25], True, 3, 4)
    """
    start = time.perf_counter()
    check_options(tolerance, max_iterations)
    if checkpoint_every < 1:
        raise InputError(f"checkpoint_every={checkpoint_every!r}: pass a number of steps, at least 1")
    block = as_block(rhs, space)
    if initial is not None and initial.shape != rhs.shape:
        raise ShapeError(f"initial has shape {tuple(initial.shape)}, the right-hand side {tuple(rhs.shape)}")
    most = max(1000, space.size) if max_iterations is None else max_iterations
    with torch.no_grad(), steady_products():
        iteration = ConjugateGradient(
            multiply,
            block.detach(),
            space,
            preconditioner=preconditioner,
            tolerance=tolerance,
            initial=None if initial is None else as_block(initial, space, "initial"),
        )
        if state is not None:
            iteration.load_state(state)
        # The file is read after the iteration is made: a state is loaded into one of the same system, and its
        # shapes are compared.
        file = None
        if checkpoint is not None:
            file = SolverFile(
                checkpoint,
                checkpoint_every,
                space=space,
                multiply=multiply,
                rhs=block.detach(),
                preconditioner=preconditioner,
                tolerance=tolerance,
            )
            file.resume(iteration)
        iterate(iteration, most, _both(file, callback), progress)
        found = iteration.solution()
    info = SolveInfo(
        converged=iteration.reason == "converged",
        residuals=iteration.residuals,
        tolerance=tolerance,
        iterations=iteration.iterations,
        products=iteration.products,
        reason=iteration.reason,
        method="conjugate gradient",
        restarts=iteration.restarts,
        history=iteration.history,
        seconds=time.perf_counter() - start,
        **described(preconditioner),
    )
    return finished(Solution(found.reshape(rhs.shape), info), raise_on_failure)


# -- a file that an interrupted iteration goes on from, bit for bit


_KIND = "conjugate gradient"


class SolverFile:
    """The state of an iteration on disk.

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
        # Vectors are moved to where the products are made; their bits are those of the file.
        if held is not None:
            iteration.load_state({name: tensor.to(self._device) for name, tensor in held.tensors.items()})
            self._written = iteration.iterations

    def __call__(self, iteration: ConjugateGradient) -> None:
        """Write the state where it is time to, and at the end.

        Raises:
            CheckpointError: If one of the processes cannot write.
        """
        step = iteration.iterations
        # counted in steps, not in seconds: all processes that share the vectors write at the same ones
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
    # One column is enough: another operator, route or machine changes bits of nearly every product.
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
