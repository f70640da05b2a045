"""Jobs in which something goes wrong on one rank."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

import ntkops
from ntkops.distributed import ShardedKernelOperator
from ntkops.solvers import conjugate_gradient, nystrom_preconditioner

from .problems import block, generator, network, rows, samples, share


def refused(rank: int, count: int, what: str) -> tuple[str, str]:
    """Bring something that does not fit on the last rank, and return the exception of this one."""
    last = rank == count - 1
    model: Any = network()
    x: Any = samples()[share(rank, count)]
    options: dict[str, Any] = {}
    if what == "another model" and last:
        model = network(seed=7)
    if what == "another architecture" and last:
        model = nn.Linear(5, 3).double()
    if what == "other outputs" and last:
        model = network()
        options["output"] = lambda y: y[:, :2]
    if what == "another choice of outputs":
        options["outputs"] = "trace" if last else "all"
    if what == "a sample that is not finite" and last:
        x = x.clone()
        x[1, 2] = torch.nan
    if what == "an iterator" and last:
        x = iter([x])
    if what == "no samples anywhere":
        x = x[:0]
    if what == "x2 of another size":
        options["x2"] = samples()[:, :4] if last else x
    try:
        ntkops.ntk(model, x, group="world", **options)
    except ntkops.NtkopsError as error:
        return type(error).__name__, str(error)
    return "nothing", ""


def raising(rank: int, count: int, what: str) -> tuple[str, str, float]:
    """Let the last rank fail in the middle of a product, and return exception, text and seconds."""
    K = ntkops.ntk(network(), samples()[share(rank, count)], group="world")
    v = block()[rows(rank, count)]
    K @ v
    if rank == count - 1:
        if what == "out of memory":

            def fail(*args: Any, **kwargs: Any) -> Any:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")

        elif what == "interrupt":

            def fail(*args: Any, **kwargs: Any) -> Any:
                raise KeyboardInterrupt

        else:

            def fail(*args: Any, **kwargs: Any) -> Any:
                raise RuntimeError("a kernel launch failed")

        K._engine._linearized = fail
    started = time.monotonic()
    try:
        K @ v
    except BaseException as error:
        return type(error).__name__, str(error), time.monotonic() - started
    return "nothing", "", 0.0


def absent(rank: int, count: int) -> tuple[str, str, float]:
    """Let the last rank do something else, and return what the others raise after the timeout."""
    K = ntkops.ntk(network(), samples()[share(rank, count)], group="world")
    v = block()[rows(rank, count)]
    started = time.monotonic()
    if rank == count - 1:
        time.sleep(6)
        return "nothing", "", 0.0
    try:
        K @ v
    except ntkops.NtkopsError as error:
        return type(error).__name__, str(error), time.monotonic() - started
    return "nothing", "", 0.0


def gradients(rank: int, count: int, folder: Path, victim: int | None, every: int = 3) -> Any:
    """Solve by conjugate gradients with a file; the victim is killed in the middle of a write's interval."""
    x = samples(count=60)
    cuts = [0, 24, 39, 60]
    part = slice(cuts[rank], cuts[rank + 1])
    K = ntkops.ntk(network(), x[part], group="world")
    b = block(2, 180)[3 * part.start : 3 * part.stop]
    made = nystrom_preconditioner(lambda V: K @ V, 0.1, K.space, 10, generator=generator())

    def after(iteration: Any) -> None:
        if rank == victim and iteration.iterations == 8:
            os.kill(os.getpid(), signal.SIGKILL)

    started = time.monotonic()
    try:
        solution, info = conjugate_gradient(
            lambda V: K @ V + 0.1 * V,
            b,
            K.space,
            preconditioner=made,
            tolerance=1e-9,
            checkpoint=folder / "solve.safetensors",
            checkpoint_every=every,
            callback=after,
        )
    except ntkops.NtkopsError as error:
        return type(error).__name__, str(error), time.monotonic() - started
    return solution, info.iterations, info.converged


def reductions(rank: int, count: int) -> dict[str, str]:
    """Return what each of linear_operator's own reductions raises."""
    K = ntkops.ntk(network(), samples()[share(rank, count)], group="world")
    operators = {"kernel": K, "sum": K + K, "multiple": 2 * K, "ridge": K.add_jitter(0.1), "factor": K.left}
    found = {}
    for name, operator in operators.items():
        b = block()[rows(rank, count)] if name != "factor" else torch.ones(operator.shape[-1], 1).double()
        for what, call in CALLS.items():
            if (name, what) in ALLOWED:
                continue
            try:
                call(operator, b)
                found[f"{what} of {name}"] = "nothing"
            except Exception as error:
                found[f"{what} of {name}"] = type(error).__name__
    return found


CALLS: dict[str, Any] = {
    "to_dense": lambda A, b: A.to_dense(),
    "numpy": lambda A, b: A.numpy(),
    "sum": lambda A, b: A.sum(),
    "row sums": lambda A, b: A.sum(-1),
    "trace": lambda A, b: torch.trace(A),
    "solve": lambda A, b: A.solve(b),
    "inv_quad": lambda A, b: A.inv_quad(b),
    "inv_quad_logdet": lambda A, b: A.inv_quad_logdet(b, logdet=True),
    "logdet": lambda A, b: A.logdet(),
    "torch.logdet": lambda A, b: torch.logdet(A),
    "eigh": lambda A, b: A.eigh(),
    "eigvalsh": lambda A, b: A.eigvalsh(),
    "svd": lambda A, b: A.svd(),
    "cholesky": lambda A, b: A.cholesky(),
    "roots": lambda A, b: A.root_decomposition().to_dense(),
    "inverse roots": lambda A, b: A.root_inv_decomposition().to_dense(),
    "pivoted Cholesky": lambda A, b: A.pivoted_cholesky(3),
    "samples": lambda A, b: A.zero_mean_mvn_samples(2),
    "sqrt_inv_matmul": lambda A, b: A.sqrt_inv_matmul(b),
    "rows": lambda A, b: A[0:1],
    "an entry": lambda A, b: A[0, 0],
    "elementwise": lambda A, b: (A * A).to_dense(),
    "a norm": lambda A, b: torch.linalg.norm(A),
    "a mean": lambda A, b: torch.mean(A),
    "a number added": lambda A, b: A + 1.0,
    "a local operator": lambda A, b: A + torch.eye(A.shape[-1], dtype=A.dtype),
    "the product of two": lambda A, b: (A @ A.mT).to_dense(),
    "a derivative": lambda A, b: A @ b.requires_grad_(),
    "a pickle": lambda A, b: __import__("pickle").dumps(A),
    "diagonalization": lambda A, b: A.diagonalization(),
    "scipy": lambda A, b: A.to_scipy(),
}
ALLOWED = {("ridge", "solve")}


def norm(rank: int, count: int, folder: Path, victim: int | None) -> Any:
    """Compute an exact norm tile by tile with a file; the victim is killed in its fourth tile."""
    x = samples(count=60)
    cuts = [0, 24, 39, 60]
    K = ntkops.ntk(network(), x[cuts[rank] : cuts[rank + 1]], group="world", batch_size=8)
    made = []
    if rank == victim:
        make = ShardedKernelOperator._tile

        def dying(self: Any, *args: Any) -> Any:
            made.append(1)
            if len(made) == 4:
                os.kill(os.getpid(), signal.SIGKILL)
            return make(self, *args)

        ShardedKernelOperator._tile = dying
    ShardedKernelOperator.tile_size = lambda self: 36  # twelve samples
    try:
        found = ntkops.frobenius_norm(K, checkpoint=folder / "norm.safetensors", checkpoint_every=0)
    except ntkops.NtkopsError as error:
        return type(error).__name__, str(error)
    return found.value, found.exact, found.passes


def sketch(rank: int, count: int, folder: Path, victim: int | None) -> Any:
    """Grow a sketch in blocks, each kept in a file; the victim is killed before the third is saved."""
    K = ntkops.ntk(network(), samples(count=60)[20 * rank : 20 * rank + 20], group="world")
    path = folder / "sketch.safetensors"
    try:
        try:
            held = ntkops.Sketch.load(path, K)
        except ntkops.errors.CheckpointError:
            held = ntkops.Sketch(K, 4, generator=generator())
            held.save(path)
        while held.columns < 16:
            held.extend(4)
            if rank == victim and held.columns == 12:
                os.kill(os.getpid(), signal.SIGKILL)
            held.save(path)
    except ntkops.NtkopsError as error:
        return type(error).__name__, str(error)
    return torch.stack([held.trace().value, held.frobenius_norm().value]), held.columns
