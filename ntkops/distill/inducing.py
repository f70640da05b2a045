"""Inducing inputs moved by gradient descent, until their gradients span what the kernel needs."""

from __future__ import annotations

import logging
import math
import os
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from ..arguments import ArrayLike, checked
from ..errors import InputError, ShapeError, UnsupportedOperationError, ZeroKernelError
from ..operators import NTKOperator
from ..operators._inducing import induce
from ..operators.capabilities import capabilities
from ..regression._operands import Layout, read_labels
from ..results import InducingPoints
from ._descent import Options, Record, descend, resolve_run
from ._frames import Scene, moving_tensor
from ._objectives import EnergyObjective, RegressionObjective

if TYPE_CHECKING:
    from ..model.accepted import InputsLike

__all__ = ["kernel_inducing"]

logger = logging.getLogger(__name__)

_KIND = "kernel_inducing"
_PATIENCE = 4  # iterations without a better iterate before the descent goes back to the best
_ROUNDINGS = 10.0  # jitter: this times the rounding of the dtype times the number of rows of K_ZZ


@checked
def kernel_inducing(
    kernel: NTKOperator,
    num_points: int | None = None,
    *,
    start: InputsLike = "rpcholesky",
    objective: Literal["energy", "regression"] = "energy",
    targets: ArrayLike | None = None,
    ridge: float = 1e-4,
    learn_targets: bool = False,
    iterations: int = 100,
    learning_rate: float = 0.03,
    batch_size: int | None = None,
    jitter: float | Literal["auto"] = "auto",
    generator: torch.Generator | None = None,
    progress: bool = False,
    path: str | os.PathLike[str] | None = None,
    checkpoint_every: int = 25,
) -> InducingPoints:
    r"""Move inducing inputs Z down the gradient of what their Nyström kernel leaves out, or mispredicts.

    "energy" minimises the energy gap of Proposition 3.6 as a share of the energy,

    .. math:: \frac{\operatorname{tr}(K - K_{XZ} (K_{ZZ} + \delta I)^{-1} K_{ZX})}{\operatorname{tr} K},

    with a jitter δ, which makes it an upper bound of the gap itself. "regression" minimises the squared
    error on all real targets of a ridge regression on (Z, T) alone: the outer loss of data distillation in
    the lazy regime, where training is kernel regression,

    .. math:: \frac{\|Y - K_{XZ} (K_{ZZ} + \lambda I)^{-1} T\|_F^2}{\|Y\|_F^2}.

    The gradient in Z is exact: factorisations are differentiated in closed form in float64, the blocks of
    the kernel by its twice differentiable core. The best iterate is returned, so that the loss is never
    above the start's. Parameters stay fixed, the model is never touched.

    The gradients of a network with kinks (ReLU, max pooling) jump where a unit switches, and no derivative
    sees a jump: the descent then gains less than on a smooth network, and least from a good start.

    Args:
        kernel: `ntkops.ntk` of the real samples, square and over whole samples that are one floating
            tensor. With ``outputs="trace"`` all outputs share one span of m gradients, at the least cost;
            with "each" every class has its own span, and the losses add up; "all" spans m·C gradients. A
            gap is that of this kernel: compare sets of points by one kernel.
        num_points: Number m of points where ``start`` is a rule.
        start: "rpcholesky", "random" or "kmeans", as in `ntkops.nystrom_ntk`; indices of real samples, such
            as medoids; or inputs.
        objective: "energy" or "regression".
        targets: Y for "regression": ``(N,)`` or ``(N, C)`` as for `ntkops.KernelRidge`; None for the model's
            outputs.
        ridge: λ for "regression", relative to the mean diagonal of the real kernel; at least 0.
        learn_targets: Solve for T too: regression on all real targets with weights in the span of the
            inducing gradients, its penalty included in the loss; T then gives the same predictions. If
            not, T is the model's output at Z, following it, or the given targets of the start's samples.
        iterations: Steps of Adam; the learning rate falls to zero along half a cosine.
        learning_rate: First step, in units of the standard deviation of all entries of the real samples.
            After four iterations without a better iterate the descent goes back to the best one, and goes on
            at half the rate; on batches it does not.
        batch_size: Real samples an iteration, drawn anew each time; None for all. The iterates are then
            compared on all samples about once a pass through these.
        jitter: δ relative to the mean diagonal of K_ZZ; "auto" is 10 m ε. Where Cholesky fails it is raised
            tenfold, up to .01; the result says what it was.
        generator: CPU generator for start and batches; None draws a seed.
        progress: Show a bar of iterations.
        path: File to go on from: written every ``checkpoint_every`` iterations and at the end, read if it
            is there. A run that was interrupted ends with the same bits.
        checkpoint_every: Iterations between two writings.

    Returns:
        `InducingPoints`. Cost of an iteration: where the gradients of the real samples fit into
        ``max_dense_bytes`` they are kept, ``(N, C·P)`` for "trace", and it is one Jacobian of Z, its
        derivative, and products; else the block K_XZ and its derivative, chunk by chunk. O(m³) flops.

    Raises:
        InputError: If an option is not understood, samples are not floating, or T is not known.
        ShapeError: If the kernel is not square over whole samples, or the targets do not fit.
        UnsupportedOperationError: If ``kernel`` is no kernel of a model, or learnt targets meet batches.
        ZeroKernelError: If the kernel, or every target, is zero.
        SingularKernelError: If K_ZZ has no Cholesky factor with the largest jitter.
        NonFiniteError: If the descent diverges.
        CheckpointError: If the file is damaged, or of another run.

    References:
        Proposition 3.6 and eq. 2 of the distilled-kernel paper; Nguyen, Chen, Lee (2021) for the
        regression with fixed targets.

    Example:
        >>> import torch, ntkops
        >>> from ntkops.distill.inducing import kernel_inducing
        >>> _ = torch.manual_seed(0)
        >>> model = torch.nn.Sequential(
        ...     torch.nn.Linear(3, 8), torch.nn.Tanh(), torch.nn.Linear(8, 2)
        ... )
        >>> K = ntkops.ntk(
        ...     model.double(), torch.randn(30, 3, dtype=torch.float64), outputs="trace"
        ... )
        >>> found = kernel_inducing(K, start=range(4), iterations=30)
        >>> found.inputs.shape, found.loss < found.start_loss
        (torch.Size([4, 3]), True)
    """
    started = time.perf_counter()
    _check_kernel(kernel)
    choice = _Choice(objective, targets, ridge, learn_targets, batch_size, jitter)
    choice.check(kernel.num_samples)
    options = Options(
        iterations,
        learning_rate,
        progress=progress,
        patience=_PATIENCE,
        judge_every=1 if batch_size is None else max(1, -(-kernel.num_samples // batch_size)),
    )
    record = Record(path, _KIND, checkpoint_every)
    options.check()
    record.check()
    generator, seed = resolve_run(generator, record)
    with torch.inference_mode(False), torch.enable_grad():
        scene = Scene(kernel)
        with scene.linearization.safe_context():
            drawn = generator.get_state()
            z, indices = _starting_points(kernel, start, num_points, generator)
            real = moving_tensor(scene.rows.inputs)
            record = record.of(
                **scene.parts(),
                samples=real,
                start=z,
                objective=choice.parts(),
                options=[iterations, float(learning_rate)],
                generator=drawn,
            )
            logger.info("gradients of the real samples kept: %s", scene.keep_gradients())
            losses = _objective(choice, scene, indices, z, generator)
            scale = float(real.double().std(correction=0)) or 1.0
            ended = descend(losses, z, options, record, generator, seed=seed, scale=scale)
            regression = losses if isinstance(losses, RegressionObjective) else None
            solved = None if regression is None else regression.point_targets(ended.z).to(kernel.dtype)
    return InducingPoints(
        inputs=ended.z,
        targets=solved,
        objective=objective,
        loss=ended.loss,
        start_loss=ended.start_loss,
        losses=ended.history[:, 0],
        iteration=ended.iteration,
        jitter=losses.jitter,
        ridge=None if regression is None else regression.ridge,
        indices=indices,
        seed=seed,
        seconds=time.perf_counter() - started,
    )


@dataclass(frozen=True, eq=False)
class _Choice:
    """What is minimised, as it was asked for."""

    objective: str
    targets: ArrayLike | None
    ridge: float
    learn_targets: bool
    batch_size: int | None
    jitter: float | Literal["auto"]

    def check(self, num_samples: int) -> None:
        """Raise unless the choices make sense together."""
        if self.objective not in ("energy", "regression"):
            raise InputError(f"objective={self.objective!r}: choose 'energy' or 'regression'")
        if self.objective == "energy" and (self.targets is not None or self.learn_targets):
            raise InputError(
                "the energy gap has no targets: leave targets and learn_targets out, or take "
                "objective='regression'"
            )
        if not math.isfinite(self.ridge) or self.ridge < 0:
            raise InputError(f"ridge={self.ridge!r}; it is relative to the mean diagonal, and at least 0")
        if self.jitter != "auto" and (isinstance(self.jitter, str) or not 0 < self.jitter <= 1e-2):
            raise InputError(f"jitter={self.jitter!r}; it is 'auto' or a number above 0, up to .01")
        size = self.batch_size
        if size is not None and (isinstance(size, bool) or not isinstance(size, int) or size < 1):
            raise InputError(f"batch_size={size!r}; it is a number of samples, at least 1, or None for all")
        if self.learn_targets and size is not None and size < num_samples:
            raise UnsupportedOperationError(
                "targets solved for on a batch would fit that batch alone: leave batch_size out, or "
                "learn_targets"
            )

    def parts(self) -> list[Any]:
        """Return what tells one choice from another."""
        targets = None if self.targets is None else torch.as_tensor(self.targets)
        jitter = self.jitter if self.jitter == "auto" else float(self.jitter)
        return [self.objective, targets, float(self.ridge), self.learn_targets, self.batch_size, jitter]


def _check_kernel(kernel: Any) -> None:
    if not isinstance(kernel, NTKOperator):
        raise UnsupportedOperationError(
            f"{type(kernel).__name__} is no kernel of a model, so that no gradient flows to its samples: "
            "pass ntkops.ntk(model, x, outputs='trace')"
        )
    if not kernel._core.symmetric or kernel._rows.pick is not None:
        raise ShapeError(
            "inducing points are whole samples, and this kernel is a slice or between two sets: pass the "
            "square kernel"
        )


def _starting_points(
    kernel: NTKOperator, start: InputsLike, num_points: int | None, generator: torch.Generator
) -> tuple[Tensor, Tensor | None]:
    """Return the first inducing inputs, and which real samples they are."""
    rule = isinstance(start, str)
    if rule != (num_points is not None):
        raise InputError(
            f"start={start!r} is a rule, which needs num_points"
            if rule
            else "num_points goes with a rule alone ('kmeans', 'random', 'rpcholesky'): the start is given"
        )
    found = induce(kernel.detach(), start, num_points, generator)
    axis = found.square._core.rows
    return moving_tensor(axis.inputs), found.indices


def _objective(
    choice: _Choice, scene: Scene, indices: Tensor | None, z: Tensor, generator: torch.Generator
) -> EnergyObjective | RegressionObjective:
    kernel, width = scene.kernel, scene.rows.outputs.shape[-1]
    diagonal = capabilities(kernel).diagonal().detach().double()
    if not float(diagonal.sum()) > 0:
        raise ZeroKernelError("the kernel is zero: no inducing points are better than others")
    rounding = _ROUNDINGS * torch.finfo(kernel.dtype).eps * len(z) * width
    jitter = min(rounding, 1e-2) if choice.jitter == "auto" else float(choice.jitter)
    if choice.objective == "energy":
        samples = diagonal.unflatten(-1, (scene.num_samples, width)).sum(-1)
        samples = samples.reshape(-1, scene.num_samples).sum(0)
        return EnergyObjective(
            scene, samples, batch_size=choice.batch_size, jitter=jitter, generator=generator
        )
    given = scene.real_states() if choice.targets is None else choice.targets
    layout, values = read_labels(given, kernel.shape, kernel.dtype, kernel.device)
    if not bool(values.any()):
        raise ZeroKernelError("every target is zero: there is nothing to regress on")
    return RegressionObjective(
        scene,
        layout,
        values,
        ridge=choice.ridge * float(diagonal.mean()),
        points_targets=_held_targets(choice, layout, values, indices),
        learn=choice.learn_targets,
        batch_size=choice.batch_size,
        jitter=jitter,
        generator=generator,
    )


def _held_targets(choice: _Choice, layout: Layout, values: Tensor, indices: Tensor | None) -> Tensor | None:
    """Return the targets of the start's samples where they were given and stay fixed."""
    if choice.targets is None or choice.learn_targets:
        return None
    if indices is None:
        raise InputError(
            "the targets of inducing points that are no real samples are not known: start at indices or by "
            "'random' or 'rpcholesky', take learn_targets=True, or leave targets out for the model's outputs"
        )
    return values[indices.to(values.device)]
