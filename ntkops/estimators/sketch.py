"""One sketch of a kernel for its trace, norm, effective rank, alignment and Ritz values."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import torch
from linear_operator.operators import LinearOperator
from torch import Tensor

from ..arguments import checked
from ..checkpoint import Checkpoint, PartFiles, fingerprint
from ..distributed import ShardedKernelOperator
from ..engines import LayerwiseEngine, count_passes
from ..errors import CheckpointError, InputError, ShapeError
from ..operators.axes import StateAxis
from ..operators.kernel import NTKOperator
from ..results import Estimate
from ..vectors import Distribution
from ._exact import kernel_route, made_of
from ._leave_out import ritz_values
from ._quantities import ALIGNMENT, EFFECTIVE_RANK, FROBENIUS_NORM, TRACE, Quantity
from ._request import Operand, checked_generator, operands
from ._sketch import SketchCore, _Factored, _Multiplied
from ._statistics import LEVEL, interval_of

__all__ = [
    "Sketch",
]


class Sketch:
    r"""A randomised Nyström sketch of a positive semidefinite kernel that answers many questions.

    With m random probes Ω, :math:`G = J^\top \Omega = Q R` (m vjps) and :math:`F = J Q` (m jvps),
    :math:`\hat K = F F^\top` approximates K = J Jᵀ from below. R and :math:`M = F^\top F` are all that the
    estimates need: each probe is judged by the sketch of the others, which makes trace and squared norm
    unbiased; see `ntkops.trace` for the intervals, which rest on a third of the probes judged by the other
    two. An operator without factors is multiplied, Y = K Ω, with the same numbers up to rounding. All is
    exact, and says so, once m reaches min(n, P).

    Source: XNysTrace of Epperly, Tropp & Webber (SIAM J. Matrix Anal. Appl. 45, 2024), in QR form, and
    carried over to norm and alignment.

    Args:
        operator: Symmetric positive semidefinite ``(*batch, n, n)`` operator or tensor.
        columns: Number m of probes, at least 3; capped at min(n, P).
        generator: CPU generator of the probes; None draws a seed.
        distribution: "sphere" or "gaussian". Only the directions of projected probes are used, so that it
            decides little.

    Cost: one vjp and one jvp a column. Memory: Ω, G, Q and F, that is 2 m (n + P) numbers.

    Raises:
        InputError: If an argument is not understood, or products show that K is not positive semidefinite.
        ShapeError: If the operator is not square.
        DtypeError: If the operator is not of a real floating dtype.
        NonFiniteError: If a product is not finite.

    Example:
        >>> import torch, ntkops
        >>> from ntkops.estimators import Sketch
        >>> J = torch.randn(
        ...     50, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64
        ... )
        >>> sketch = Sketch(J @ J.T, 4, generator=torch.Generator().manual_seed(1))
        >>> low, high = sketch.trace().interval
        >>> bool(low <= J.square().sum() <= high)
        True
        >>> abs(float(sketch.extend(5).trace()) / float(J.square().sum()) - 1) < 1e-10
        True
    """

    @checked
    def __init__(
        self,
        operator: LinearOperator | Tensor,
        columns: int,
        *,
        generator: torch.Generator | None = None,
        distribution: Distribution = "sphere",
    ) -> None:
        (operand,) = operands(operator)
        operand.require_square("a sketch")
        if distribution not in ("sphere", "gaussian"):
            raise InputError(f"distribution={distribution!r}: choose 'sphere' or 'gaussian'")
        if not isinstance(columns, int) or isinstance(columns, bool) or columns < 1:
            raise InputError(f"columns={columns!r}: pass a positive integer")
        drawn, self._seed = checked_generator(generator, operand.rows)
        self._eps = operand.rounding
        self._shape, self._passes, self._seconds = operand.shape, 0, 0.0
        self._core = SketchCore([operand], drawn, distribution)
        self._grow(columns)

    @property
    def columns(self) -> int:
        """Number m of probes."""
        return self._core.columns

    @property
    def passes(self) -> int:
        """Passes made so far."""
        return self._passes

    @property
    def exact(self) -> bool:
        """Whether the sketch holds the whole kernel."""
        return self._core.full

    def extend(self, columns: int) -> Sketch:
        """Add so many probes; no product is repeated, and the numbers are those of one sketch at once.

        Args:
            columns: Number of further probes.

        Returns:
            This sketch.

        Raises:
            InputError: If it is not a positive integer.
        """
        if not isinstance(columns, int) or isinstance(columns, bool) or columns < 1:
            raise InputError(f"columns={columns!r}: pass a positive integer")
        self._grow(self.columns + columns)
        return self

    def _grow(self, columns: int) -> None:
        started = time.perf_counter()
        with torch.no_grad(), count_passes() as counter:
            self._core.grow(columns)
            _ = self._core.numbers  # which refuse a kernel that is not positive semidefinite
        self._passes += counter.total
        self._seconds += time.perf_counter() - started

    def trace(self) -> Estimate:
        """Return the trace, unbiased."""
        return self._estimate(TRACE, self._core)

    def frobenius_norm(self) -> Estimate:
        """Return the Frobenius norm; its square is unbiased."""
        return self._estimate(FROBENIUS_NORM, self._core)

    def effective_rank(self) -> Estimate:
        """Return the effective rank (tr K)² / |K|²; its error counts what cancels in the ratio.

        Raises:
            ZeroKernelError: If the kernel is zero.
        """
        return self._estimate(EFFECTIVE_RANK, self._core)

    def alignment(self, other: Sketch) -> Estimate:
        """Return the alignment with the kernel of another sketch over the same probes; no pass is made.

        Args:
            other: A sketch of as many columns, whose generator had the same seed, so that noise cancels.

        Returns:
            The alignment. Its passes are those of both sketches.

        Raises:
            ShapeError: If the kernels have different shapes.
            InputError: If the probes differ.
            ZeroKernelError: If one of the kernels is zero.
        """
        if self._shape != other._shape:
            raise ShapeError(f"the operators have shapes {tuple(self._shape)} and {tuple(other._shape)}")
        if not self._core.shares_probes(other._core):
            raise InputError(
                "the sketches have different probes: make both with as many columns, and each with its own "
                "torch.Generator().manual_seed(s) of the same s"
            )
        both = SketchCore.joined(self._core, other._core)
        found = self._estimate(ALIGNMENT, both, passes=self._passes + other._passes)
        return found

    def ritz_values(self) -> Estimate:
        """Return the eigenvalues of K̂, ``(*batch, r)``, from the largest: each at most that of K.

        They are lower bounds without randomness in their direction; the standard error and the upper end of
        the interval are infinite unless the sketch is exact.
        """
        values = ritz_values(self._core.numbers)
        if self.exact:
            return Estimate.of_exact(values, passes=self._passes, seconds=self._seconds, method="sketch")
        unknown = torch.full_like(values, torch.inf)
        return Estimate(
            value=values,
            stderr=unknown,
            # F Fᵀ ≤ K, so that its eigenvalues are below those of K in order; 8 units of rounding are allowed
            # for.
            interval=(values * (1 - 8 * self._eps), unknown),
            method="sketch",
            exact=False,
            passes=self._passes,
            seed=self._seed,
            seconds=self._seconds,
        )

    def _estimate(self, quantity: Quantity, core: SketchCore, passes: int | None = None) -> Estimate:
        quantity.require_defined(core.approximate(quantity.moments))
        summary = core.summary(quantity.moments, quantity.combine)
        return Estimate(
            value=summary.value,
            stderr=summary.stderr,
            interval=interval_of(summary, LEVEL, eps=self._eps, bounds=quantity.bounds),
            method="sketch",
            exact=summary.exact,
            passes=self._passes if passes is None else passes,
            seed=self._seed,
            seconds=self._seconds,
        )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the sketch to a file, atomically: probes, products, and the state of the generator.

        Args:
            path: Where; a file that is there is replaced.

        Raises:
            CheckpointError: If the operator is neither a kernel of `ntkops.ntk` nor a tensor, or the disk
                refuses.
        """
        save_sketch(self, path)

    @classmethod
    def load(cls, path: str | os.PathLike[str], operator: LinearOperator | Tensor) -> Sketch:
        """Read a sketch, which goes on bit for bit as the one that was saved.

        Args:
            path: A file of `save`.
            operator: The operator that it was made of, built in the same way.

        Returns:
            The sketch.

        Raises:
            CheckpointError: If the file is damaged or foreign, or the operator, the number of threads, or
                the sizes of its chunks differ; the message names what does.
        """
        return load_sketch(cls.__new__(cls), path, operator)

    def __repr__(self) -> str:
        """Show the shape, the columns and the passes."""
        return f"Sketch(shape={tuple(self._shape)}, columns={self.columns}, passes={self._passes})"


# -- a sketch in a file: what it holds, what it was made of, and the route by which it goes on bit for bit


KIND = "sketch"
_PARTS = {_Factored: ("images", "_basis", "_pulled"), _Multiplied: ("images",)}


def save_sketch(sketch: Sketch, path: str | os.PathLike[str]) -> None:
    """Write a sketch atomically; see `Sketch.save`."""
    core = sketch._core
    (operand,), (side,) = core._operands, core._sides
    tensors = {"probes": core._probes, "generator": core._generator.get_state()}
    tensors |= {name: getattr(side, name) for name in _PARTS[type(side)]}
    metadata = {
        "seed": sketch._seed,
        "passes": sketch._passes,
        "seconds": sketch._seconds,
        "distribution": core._distribution,
        "route": _route(operand, side),
        "spent": _spent(operand.operator),
    }
    files = PartFiles(path, operand.rows, KIND)
    files.write(core.columns, tensors, metadata, _fingerprint(operand))


def load_sketch(empty: Sketch, path: str | os.PathLike[str], operator: LinearOperator | Tensor) -> Sketch:
    """Fill an empty sketch of an operator from a file; see `Sketch.load`."""
    (operand,) = operands(operator)
    operand.require_square("a sketch")
    files = PartFiles(path, operand.rows, KIND)
    found = files.read(_fingerprint(operand), lambda held: _require_route(operand, held, files.path))
    if found is None:
        raise CheckpointError(f"there is no file {path}, or no columns that all processes have saved")
    record, tensors = found.metadata, found.tensors
    generator = torch.Generator()
    generator.set_state(tensors["generator"])
    core = SketchCore([operand], generator, record["distribution"])
    (side,) = core._sides
    device = operand.device
    core._probes = tensors["probes"].to(device)
    for name in _PARTS[type(side)]:
        setattr(side, name, tensors[name].to(device))
    _restore_spent(operator, record["spent"])
    empty._seed, empty._passes, empty._seconds = record["seed"], record["passes"], record["seconds"]
    empty._eps, empty._shape, empty._core = torch.finfo(operand.dtype).eps, operand.shape, core
    return empty


# what it was made of


def _fingerprint(operand: Operand) -> dict[str, str]:
    return fingerprint(**made_of(operand.operator, "a sketch"))


# how it was computed


def _require_route(operand: Operand, held: Checkpoint, path: Path) -> None:
    (side,) = SketchCore([operand], torch.Generator(), held.metadata["distribution"])._sides
    route, then = _route(operand, side), held.metadata["route"]
    changed = [name for name in route if then.get(name) != route[name]]
    different = [f"{name} {then.get(name)!r}, now {route[name]!r}" for name in changed]
    if different:
        raise CheckpointError(
            f"{path} was computed by another route, and would not go on with the same bits: "
            f"{'; '.join(different)}; build the operator with the same engine=, batch_size= and chunk_size=, "
            "and call torch.set_num_threads with the same number"
        )


def _route(operand: Operand, side: _Factored | _Multiplied) -> dict[str, Any]:
    """Return what sums are split by: what decides the last bits."""
    route: dict[str, Any] = {
        "torch": str(torch.__version__),
        "threads": torch.get_num_threads(),
        "device": operand.device.type,
        "way": "factors" if isinstance(side, _Factored) else "products",
    }
    operator = operand.operator
    if isinstance(operator, ShardedKernelOperator):
        route |= kernel_route(operator)
    if isinstance(operator, NTKOperator):
        core = operator._core
        axis = core.rows
        assert isinstance(axis, StateAxis)
        route["engine"] = core.engine.name
        route["batch_size"] = min(core.engine.batch_size(axis.inputs), axis.inputs.num_samples)
        route["chunk_size"] = core.engine.chunk_size()
        route["max_dense_bytes"] = core.max_dense_bytes > 0
    return route


def _spent(operator: LinearOperator | Tensor) -> dict[str, float]:
    """Return what decides when products change over to caches: the passes spent so far."""
    if not isinstance(operator, NTKOperator):
        return {}
    core = operator._core
    # Products change over to a dense block, or to factors, once enough passes are spent; a sketch that goes
    # on has to change over where the first run would have.
    spent = {"products": float(core.spending.passes)}
    if isinstance(core.engine, LayerwiseEngine) and isinstance(core.rows, StateAxis):
        spent["factors"] = core.engine._cache._spent.get(core.rows.inputs, 0.0)
    return spent


def _restore_spent(operator: LinearOperator | Tensor, spent: dict[str, float]) -> None:
    if not isinstance(operator, NTKOperator):
        return
    core = operator._core
    core.spending.passes = max(core.spending.passes, spent["products"])
    if "factors" in spent and isinstance(core.engine, LayerwiseEngine) and isinstance(core.rows, StateAxis):
        before = core.engine._cache._spent.get(core.rows.inputs, 0.0)
        core.engine._cache._spent[core.rows.inputs] = max(before, spent["factors"])
