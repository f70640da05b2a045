r"""What can be tracked: each quantity as a function of one checkpoint and the first.

==================== =========================================================================================
``trace``            :math:`\mathrm{tr}\,K`
``frobenius_norm``   :math:`|K|_F`
``effective_rank``   :math:`(\mathrm{tr}\,K)^2 / |K|_F^2`
``alignment``        :math:`\langle K, K_0 \rangle / (|K|_F |K_0|_F)`, with the kernel of the first checkpoint
``kernel_distance``  :math:`1 -` alignment
``kernel_velocity``  :math:`1 - \langle K, K_- \rangle / (|K|_F |K_-|_F)`, with the kernel of the row before
                     (NaN in the first row)
``target_alignment`` :math:`\langle K, Y Y^\top \rangle / (|K|_F |Y Y^\top|_F)`
``top_eigenvalues``  the largest eigenvalues of K
``parameter_distance`` :math:`|\theta - \theta_0|_2` over the selected parameters
``linearization_error`` :math:`|f - f_{\mathrm{lin}}| / |f - f_0|` over all outputs at all samples, with
                     :math:`f_{\mathrm{lin}} = f_0 + J_0 (\theta - \theta_0)`: small where training is lazy
==================== =========================================================================================
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ..constructors import ntk
from ..engines import EngineChoice, count_passes
from ..errors import InputError, ShapeError
from ..estimators import alignment, effective_rank, eigsh, frobenius_norm, trace
from ..model import Inputs, Linearization
from ..operators import NTKOperator, jacobian
from ..operators.output_choice import OutputChoice
from ..results import Estimate

__all__ = [
    "BUILT_IN",
    "KernelOptions",
    "Options",
    "Point",
    "Quantity",
    "needs_first",
    "needs_previous",
    "own_quantity",
]


@dataclass(frozen=True)
class KernelOptions:
    """How kernels are made: the arguments of `ntkops.ntk` of the same names."""

    outputs: OutputChoice = "all"
    engine: EngineChoice = "auto"
    batch_size: Any = "auto"
    chunk_size: Any = "auto"
    max_dense_bytes: Any = "auto"


@dataclass(frozen=True, eq=False)
class Options:
    """How quantities are estimated.

    Attributes:
        seed: Seed of the probes, which are the same at every checkpoint.
        rtol: Relative tolerance, or None.
        num_passes: Passes to spend, or None.
        method: Name of a method of the estimators.
        targets: Y, or None.
        num_eigenvalues: How many eigenvalues.
    """

    seed: int
    rtol: float | None = None
    num_passes: int | None = None
    method: str = "auto"
    targets: Tensor | None = None
    num_eigenvalues: int = 5

    def estimator(self) -> dict[str, Any]:
        """Return the arguments of an estimator, with a generator at its start."""
        return {
            "rtol": self.rtol,
            "num_passes": self.num_passes,
            "method": self.method,
            "generator": self.generator(),
        }

    def generator(self) -> torch.Generator:
        """Return a generator at its start."""
        return torch.Generator().manual_seed(self.seed)


@dataclass(eq=False)
class Point:
    """A model at one checkpoint, and what several quantities need of it.

    Attributes:
        linearization: The model at the checkpoint's values.
        inputs: The samples.
        options: How the kernel is made.
        estimates: Estimates that quantities share.
        previous: The checkpoint of the row before, None for the first.
    """

    linearization: Linearization
    inputs: Inputs
    options: KernelOptions
    estimates: dict[str, Estimate] = field(default_factory=dict)
    previous: Point | None = None

    @cached_property
    def kernel(self) -> NTKOperator:
        """The kernel."""
        o = self.options
        return ntk(
            self.linearization,
            self.inputs,
            outputs=o.outputs,
            engine=o.engine,
            batch_size=o.batch_size,
            chunk_size=o.chunk_size,
            max_dense_bytes=o.max_dense_bytes,
        )

    @cached_property
    def state(self) -> Tensor:
        """All outputs at all samples, ``(N, O)``."""
        size = self.options.batch_size
        rows = []
        with torch.no_grad(), self.linearization.safe_context():
            for _, _, batch in self.inputs.batches(size if isinstance(size, int) else None):
                rows.append(self.linearization.function(self.linearization.parameters, batch))
        return torch.cat(rows)

    def free(self) -> None:
        """Drop what the kernel has cached."""
        if "kernel" in vars(self):
            self.kernel.free()

    def displacement(self, other: Linearization) -> Tensor:
        """Return the selected parameters of another checkpoint minus those of this one, ``(P,)``, float64."""
        pairs = zip(other.parameters, self.linearization.parameters, strict=True)
        return torch.cat([(new.double() - old.double()).flatten() for new, old in pairs])

    def pushed(self, direction: Tensor) -> Tensor:
        """Return J p, ``(N, O)``."""
        o = self.options
        operator = jacobian(
            self.linearization,
            self.inputs,
            engine=o.engine,
            batch_size=o.batch_size,
            chunk_size=o.chunk_size,
            max_dense_bytes=o.max_dense_bytes,
        )
        with torch.no_grad():
            rows = operator @ direction.to(operator.dtype)
        axis, _ = operator._state_axes()
        return axis.embed(rows.unsqueeze(-1))[0]  # zeros behind the positions of a shorter sample


Quantity = Callable[[Point, Point, Options], Estimate]  # at a checkpoint, with the first one


def _trace(point: Point, first: Point, options: Options) -> Estimate:
    return trace(point.kernel, **options.estimator())


def _norm(point: Point, first: Point, options: Options) -> Estimate:
    if "frobenius_norm" not in point.estimates:
        point.estimates["frobenius_norm"] = frobenius_norm(point.kernel, **options.estimator())
    return point.estimates["frobenius_norm"]


def _effective_rank(point: Point, first: Point, options: Options) -> Estimate:
    return effective_rank(point.kernel, **options.estimator())


def _alignment(point: Point, first: Point, options: Options) -> Estimate:
    if "alignment" not in point.estimates:
        point.estimates["alignment"] = alignment(point.kernel, first.kernel, **options.estimator())
    return point.estimates["alignment"]


def _kernel_distance(point: Point, first: Point, options: Options) -> Estimate:
    return _distance(_alignment(point, first, options))


def _kernel_velocity(point: Point, first: Point, options: Options) -> Estimate:
    if point.previous is None:  # nothing to compare with
        return Estimate.of_exact(
            torch.full(point.kernel.batch_shape, torch.nan, dtype=torch.float64), passes=0
        )
    return _distance(alignment(point.kernel, point.previous.kernel, **options.estimator()))


def _distance(cosine: Estimate) -> Estimate:
    low, high = cosine.interval
    return dataclasses.replace(cosine, value=1 - cosine.value, interval=(1 - high, 1 - low))


def _target_alignment(point: Point, first: Point, options: Options) -> Estimate:
    assert options.targets is not None
    columns = target_columns(options.targets, point.kernel)  # (*batch, n, c)
    with torch.no_grad(), count_passes() as counter:
        products = (point.kernel @ columns).double()
    wide = columns.double()
    # <K, Y Yᵀ> = tr Yᵀ K Y: c products, and no n x n matrix of labels
    top = (wide * products).sum((-2, -1)).cpu()  # <K, Y Yᵀ>, exact
    # |Y Yᵀ|_F = |Yᵀ Y|_F, c x c
    size = torch.linalg.matrix_norm(wide.mT @ wide).cpu()  # |Y Yᵀ|_F
    norm = _norm(point, first, options)
    low, high = norm.interval
    value = top / (norm.value * size)
    # only the norm is estimated, in which the cosine is monotone: ends of one give ends of the other
    ends = torch.stack([top / (high * size), top / (low.clamp(min=0) * size)]).clamp(-1, 1).sort(dim=0).values
    return dataclasses.replace(
        norm,
        value=value,
        stderr=value.abs() * norm.stderr / norm.value,  # the numerator has none
        interval=(value, value) if norm.exact else (ends[0], ends[1]),
        passes=norm.passes + counter.total,
    )


def _top_eigenvalues(point: Point, first: Point, options: Options) -> Estimate:
    count = min(options.num_eigenvalues, point.kernel.shape[-1])
    pairs = eigsh(point.kernel, count, generator=options.generator())
    residuals = pairs.residuals.cpu()
    values = pairs.values.cpu()
    return Estimate(
        value=values,
        stderr=residuals,  # an eigenvalue of K lies within the residual
        interval=(values - residuals, values + residuals),
        method=pairs.method,
        exact=pairs.method == "dense",
        passes=pairs.passes,
        converged=pairs.converged,
        seed=pairs.seed,
    )


def _parameter_distance(point: Point, first: Point, options: Options) -> Estimate:
    distance = first.displacement(point.linearization).square().sum().sqrt().cpu()
    return Estimate.of_exact(distance, passes=0)


def _linearization_error(point: Point, first: Point, options: Options) -> Estimate:
    step = first.displacement(point.linearization)
    with count_passes() as counter:
        linear = first.pushed(step)
    moved = point.state.double() - first.state.double()
    change = moved.square().sum().sqrt().cpu()
    error = (moved - linear.double()).square().sum().sqrt().cpu() / change  # 0 / 0 is NaN: nothing moved
    # Rounding of the outputs, beside which a small change is not seen.
    eps = torch.finfo(point.state.dtype).eps
    rounding = eps * point.state.double().square().sum().sqrt().cpu() / change
    ends = (error - rounding).clamp(min=0), error + rounding
    exact = Estimate.of_exact(error, passes=counter.total, method="jvp")
    return dataclasses.replace(exact, stderr=torch.nan_to_num(rounding, nan=0.0), interval=ends)


BUILT_IN: Mapping[str, Quantity] = {
    "trace": _trace,
    "frobenius_norm": _norm,
    "effective_rank": _effective_rank,
    "alignment": _alignment,
    "kernel_distance": _kernel_distance,
    "kernel_velocity": _kernel_velocity,
    "target_alignment": _target_alignment,
    "top_eigenvalues": _top_eigenvalues,
    "parameter_distance": _parameter_distance,
    "linearization_error": _linearization_error,
}
_WITH_FIRST = frozenset({"alignment", "kernel_distance", "parameter_distance", "linearization_error"})


def needs_previous(names: tuple[str, ...]) -> bool:
    """Whether one of the quantities compares with the row before."""
    return "kernel_velocity" in names


def needs_first(names: tuple[str, ...]) -> bool:
    """Whether one of the quantities compares with the first checkpoint."""
    return any(name in _WITH_FIRST for name in names)


def own_quantity(name: str, function: Callable[[NTKOperator], Any]) -> Quantity:
    """Return a user's function of the kernel as a quantity.

    Args:
        name: How messages call it.
        function: ``(K) -> number, tensor or Estimate``.

    Returns:
        The quantity; plain numbers count as exact.
    """

    def quantity(point: Point, first: Point, options: Options) -> Estimate:
        with count_passes() as counter:
            found = function(point.kernel)
        if isinstance(found, Estimate):
            return found
        if not isinstance(found, Tensor | int | float) or isinstance(found, bool):
            raise InputError(
                f"the quantity {name!r} returned a {type(found).__name__}; return a number, a tensor "
                "or an Estimate"
            )
        value = torch.as_tensor(found, dtype=torch.float64).detach().cpu()
        return Estimate.of_exact(value, passes=counter.total, method=name)

    return quantity


def target_columns(targets: Tensor, kernel: NTKOperator) -> Tensor:
    """Return targets as columns ``(*batch, n, c)`` with which K shares its rows.

    Args:
        targets: ``(N, O)`` for kernels over all outputs (one column, sample-major) and for
            ``outputs="each"`` (one for each kernel); ``(N,)`` or ``(N, C)`` for kernels over samples.
        kernel: The kernel.

    Returns:
        The columns, in the kernel's dtype and on its device.

    Raises:
        ShapeError: If they do not fit.
    """
    rows, batch = kernel.shape[-1], kernel.batch_shape
    if len(batch) == 1 and tuple(targets.shape) == (rows, batch[0]):
        columns = targets.mT.unsqueeze(-1)
    elif not batch and targets.numel() == rows:
        columns = targets.reshape(-1, 1)
    elif not batch and targets.dim() == 2 and targets.shape[0] == rows:
        columns = targets
    else:
        raise ShapeError(
            f"targets of shape {tuple(targets.shape)} do not fit a kernel of shape {tuple(kernel.shape)}; "
            "give one number for each sample and output, (N, O), or with outputs='trace' any (N, C)"
        )
    return columns.to(dtype=kernel.dtype, device=kernel.device)
