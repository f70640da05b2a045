"""The thrice-distilled chain: fewer points, features and gradients, and each stage left out in turn."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from os import PathLike
from typing import TYPE_CHECKING, Any, Literal

import torch
from linear_operator.operators import LinearOperator, to_linear_operator
from torch import Tensor

from ..arguments import checked
from ..constructors import ntk, projected_ntk
from ..engines import count_passes
from ..errors import DenseMemoryError, InputError
from ..operators import NTKOperator
from ..operators.projected import ProjectedNTKOperator
from ..projections import Projection, check_interpolation
from ..regression import KernelRidge
from ..regression._snapshots import network_outputs
from ..regression.metrics import accuracy, fidelity, mean_squared_error
from ..results import ChainReport, ChainRun, ChainStep
from .distilled import Distilled

if TYPE_CHECKING:
    from ..model.accepted import InputsLike, ModelLike

__all__ = ["chain"]

Gradients = Callable[[LinearOperator, Tensor], Distilled]


@checked
def chain(
    model: ModelLike,
    inputs: InputsLike,
    test_inputs: InputsLike,
    test_labels: Tensor | None = None,
    *,
    data: InputsLike | None = None,
    projection: Projection | int | None = None,
    gradients: Gradients | None = None,
    ridge: float = 1e-4,
    fit: Literal["nystrom", "sketch"] = "nystrom",
    baseline: Literal["nothing", "projected"] = "nothing",
    ablate: bool = True,
    seeds: int = 1,
    memmap: str | PathLike[str] | None = None,
    generator: torch.Generator | None = None,
    **options: Any,
) -> ChainReport:
    r"""Distil the data, project, distil the gradients, regress; and say what each stage costs and saves.

    From n training samples of a network with C outputs and P parameters:

    1. "data": m points :math:`\tilde X` stand for the n samples.
    2. "projection": gradients of k numbers, :math:`\tilde\Phi^c = \Phi^c P^\top`, stand for those of P.
    3. "gradients": s combinations :math:`U^\top \tilde\Phi^c` stand for the m gradients.

    Each run ends in kernel ridge regression of the network's logits, one kernel for each output, and its
    predictions at the test samples. The runs are: nothing distilled, then each stage added to those
    before; and, for the ablations, the whole chain without one of its stages. Where kernels of n samples are
    out of reach, ``baseline="projected"`` has every run projected, and memory that is flat in n but for the
    k C features of a sample, which may lie in files.

    What the stages do not save: the gradients of all m points are made before any of them is distilled,
    and a prediction takes C gradients of its sample, or C directional derivatives
    (`DistilledRidge.predictor`), whatever was distilled before.

    Args:
        model: The network, or what `ntkops.ntk` takes for it; its outputs ``(N, C)`` are the targets.
        inputs: The n training samples.
        test_inputs: Samples to predict.
        test_labels: ``(M,)`` their classes, for the accuracy; None without.
        data: The m points, or a function without arguments that makes them, whose time counts;
            None leaves the stage out.
        projection: One of `ntkops.projections` for the P parameters, or k for a random one, as
            `ntkops.projected_ntk` takes it; None leaves the stage out.
        gradients: From kernels ``(C, m, m)`` and targets ``(m, C)`` to a `Distilled`, such as
            ``lambda K, Y: synthesize(K, 10, "krylov", Y=Y)``; None leaves the stage out.
        ridge: Relative to the mean diagonal of the kernel.
        fit: How distilled gradients are fitted, as for `Distilled.fit`.
        baseline: What the runs start from: "nothing" distilled, or "projected" gradients, so that the kernel
            of all P parameters is never asked for.
        ablate: Whether to run the chain without each stage too.
        seeds: How many times to run it: functions are called again, so that a generator of theirs should go
            on rather than start anew, and a projection that is given by k is drawn again. A run whose stages
            are given draws nothing and is made once.
        memmap: A directory for the features, as for `ntkops.projected_ntk`; None keeps them in memory.
        generator: CPU generator of a projection that is given by k; None for one of seed 0.
        **options: Passed on to `ntkops.ntk`.

    Returns:
        `ntkops.results.ChainReport`. Cost: that of all runs; runs with the same points and the same
        projection share their features, which count for each of them. Memory of a projected run of n points:
        the features and three arrays of n s C numbers.

    Raises:
        InputError: If no stage is given, an argument is not understood or out of range, or the baseline is
            projected and there is no projection.

    Warns:
        InterpolationWarning: If k is near m and the ridge is small.

    References:
        Distilled NTK paper, section 4.

    Example:
        >>> import torch
        >>> from ntkops.distill import chain, synthesize
        >>> _ = torch.manual_seed(0)
        >>> network = torch.nn.Sequential(
        ...     torch.nn.Linear(3, 16), torch.nn.Tanh(), torch.nn.Linear(16, 2)
        ... )
        >>> x, x_new = torch.randn(40, 3), torch.randn(20, 3)
        >>> report = chain(
        ...     network.double(),
        ...     x.double(),
        ...     x_new.double(),
        ...     data=x[:20].double(),
        ...     projection=60,
        ...     gradients=lambda K, Y: synthesize(K, 6, "krylov", Y=Y),
        ... )
        >>> [run.stages for run in report.stages][1:]
        [('data',), ('data', 'projection'), ('data', 'projection', 'gradients')]
        >>> sorted(report.ablations), report.reduction()["jacobian_rows"]
        (['data', 'gradients', 'projection'], 2.0)
    """
    named = (("data", data), ("projection", projection), ("gradients", gradients))
    given = tuple(name for name, stage in named if stage is not None)
    _check(given, projection, gradients, fit)
    if baseline not in ("nothing", "projected") or (baseline == "projected" and projection is None):
        raise InputError(f"baseline={baseline!r}: 'nothing', or 'projected' with a projection")
    first: tuple[str, ...] = ("projection",) if baseline == "projected" else ()
    if isinstance(seeds, bool) or not isinstance(seeds, int) or seeds < 1:
        raise InputError(f"seeds={seeds!r}: a positive number of repetitions")
    added = tuple(name for name in given if name not in first)
    fixed = {"data": not callable(data), "projection": isinstance(projection, Projection), "gradients": False}
    known: dict[tuple[str, ...], ChainRun] = {}  # what draws nothing, for all seeds

    def repeated(project: _Projection) -> ChainReport:
        task = _Task(model, inputs, test_inputs, test_labels, project, gradients, ridge, fit, options)
        points = task.distil(data) if data is not None else None
        runs = known.copy()

        def run(chosen: tuple[str, ...]) -> ChainRun:
            stages = tuple(name for name in given if name in (*first, *chosen))
            if stages not in runs:
                runs[stages] = task.run(stages, points)
                if all(fixed[name] for name in stages):
                    known[stages] = runs[stages]
            return runs[stages]

        upon = tuple(run(added[:count]) for count in range(len(added) + 1))
        left_out = {name: run(tuple(other for other in added if other != name)) for name in added if ablate}
        return ChainReport(upon, left_out)

    drawn = _draws(projection, generator)
    reports = [repeated(_Projection(projection, next(drawn), memmap)) for _ in range(seeds)]
    return dataclasses.replace(reports[0], repeats=tuple(reports[1:]))


def _draws(projection: Projection | int | None, generator: torch.Generator | None) -> Iterator[Tensor | None]:
    """Yield the states that the projections of one seed after another are drawn from."""
    own = torch.Generator().manual_seed(0)
    if generator is not None:
        own.set_state(generator.get_state())
    while True:
        yield own.get_state() if isinstance(projection, int) else None
        torch.randint(2**31, (), generator=own)


def _check(given: tuple[str, ...], projection: Any, gradients: Any, fit: str) -> None:
    """Raise before any work is done.

    Raises:
        InputError: If no stage is given, or an argument is not understood.
    """
    if not given:
        raise InputError("a chain needs a stage: give data=, projection= or gradients=")
    whole = isinstance(projection, int) and not isinstance(projection, bool) and projection > 0
    if projection is not None and not whole and not isinstance(projection, Projection):
        raise InputError(f"projection={projection!r}: a positive number of features, or a projection")
    if gradients is not None and not callable(gradients):
        raise InputError(
            "gradients= is a function of kernels and targets, such as a lambda around synthesize"
        )
    if fit not in ("nystrom", "sketch"):
        raise InputError(f"fit={fit!r}: choose 'nystrom' (all labels) or 'sketch' (the distilled ones)")


@dataclass
class _Clock:
    """Steps with their passes and times."""

    steps: list[ChainStep] = field(default_factory=list)

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        """Measure what happens inside the block."""
        started = time.perf_counter()
        with count_passes() as counter:
            yield
        self.steps.append(ChainStep(name, counter.count, time.perf_counter() - started))


@dataclass(frozen=True)
class _Points:
    """Distilled points and what they took."""

    inputs: InputsLike
    step: ChainStep


@dataclass(frozen=True)
class _Projection:
    """How gradients are projected: what was asked for, the state that draws it, where features lie."""

    given: Projection | int | None
    state: Tensor | None
    memmap: str | PathLike[str] | None

    def __call__(self, K: NTKOperator, ridge: float) -> ProjectedNTKOperator:
        """Return the projected kernel."""
        generator = None
        if isinstance(self.given, int) and self.state is not None:  # the same for every run
            generator = torch.Generator()
            generator.set_state(self.state)
        found = projected_ntk(K, self.given, memmap=self.memmap, generator=generator)
        check_interpolation(found.projection.k, K.shape[-1], ridge)
        return found


@dataclass(frozen=True)
class _Made:
    """A kernel, its targets, and what they took."""

    K: NTKOperator
    targets: Tensor
    step: ChainStep


@dataclass(frozen=True)
class _Task:
    """What every run of a chain has in common."""

    model: ModelLike
    inputs: InputsLike
    test_inputs: InputsLike
    test_labels: Tensor | None
    projection: _Projection
    gradients: Gradients | None
    ridge: float
    fit: Literal["nystrom", "sketch"]
    options: dict[str, Any]
    projected: dict[bool, _Made] = field(default_factory=dict)

    def distil(self, data: InputsLike | Callable[[], Any]) -> _Points:
        """Return the distilled points, made here if they come as a function."""
        clock = _Clock()
        with clock.step("data"):
            made = data() if callable(data) else data
        return _Points(made, clock.steps[0])

    def run(self, stages: tuple[str, ...], points: _Points | None) -> ChainRun:
        """Return one run with some stages."""
        clock = _Clock()
        inputs = self.inputs
        if "data" in stages:
            assert points is not None
            inputs = points.inputs
            clock.steps.append(points.step)
        made = self._made(inputs, "projection" in stages, "data" in stages)
        clock.steps.append(made.step)
        K, targets = made.K, made.targets
        fitted, size = self._fit(K, targets, "gradients" in stages, clock)
        with clock.step("prediction"):
            across = K.cross(self.test_inputs)
            predictions = fitted.predict(across)
        logits = network_outputs(across).mT
        return _summary(K, size, stages, predictions, logits, self.test_labels, tuple(clock.steps))

    def _made(self, inputs: InputsLike, projected: bool, distilled: bool) -> _Made:
        """Return the kernels of a run, evaluated where they may be kept; features are kept for other runs."""
        if projected and distilled in self.projected:
            return self.projected[distilled]
        clock = _Clock()
        with clock.step("kernel"):
            K = ntk(self.model, inputs, outputs="each", **self.options)
            if projected:
                K = self.projection(K, self.ridge)
            with torch.no_grad(), suppress(DenseMemoryError):  # beyond the limit products make what they need
                _evaluate(K)
            targets = network_outputs(K).mT.contiguous()
        made = _Made(K, targets, clock.steps[0])
        if projected:
            self.projected[distilled] = made
        return made

    def _fit(self, K: NTKOperator, targets: Tensor, distilled: bool, clock: _Clock) -> tuple[Any, int]:
        """Return the fitted regression and the number of gradients that it is in."""
        if not distilled:
            with clock.step("regression"):
                return KernelRidge(self.ridge).fit(K, targets), K.shape[-1]
        assert self.gradients is not None
        known = _known(K)
        with clock.step("gradients"):
            found = self.gradients(known, targets)
        if not isinstance(found, Distilled):
            raise InputError(f"gradients= returned a {type(found).__name__}, due is a Distilled")
        with clock.step("regression"):
            return found.fit(known, targets, ridge=self.ridge, fit=self.fit), found.size


def _evaluate(K: NTKOperator) -> None:
    """Make what later products use: the features of a projected kernel, or the kernel itself."""
    if isinstance(K, ProjectedNTKOperator):
        K.features()
    else:
        K.to_dense()


def _known(K: NTKOperator) -> LinearOperator:
    """Return the kernel as numbers where they are allowed: distilling them takes no more passes.

    Features that are fewer than points are that already.
    """
    if isinstance(K, ProjectedNTKOperator) and K.projection.k < K.shape[-1]:
        return K
    with torch.no_grad(), suppress(DenseMemoryError):
        return to_linear_operator(K.to_dense())
    return K


def _summary(
    K: NTKOperator,
    size: int,
    stages: tuple[str, ...],
    predictions: Tensor,
    logits: Tensor,
    labels: Tensor | None,
    steps: tuple[ChainStep, ...],
) -> ChainRun:
    outputs, points = K.shape[0], K.shape[-1]
    features = K.projection.k if isinstance(K, ProjectedNTKOperator) else K.num_parameters
    return ChainRun(
        stages=stages,
        num_points=points,
        num_features=features,
        num_gradients=size,
        num_outputs=outputs,
        fidelity=fidelity(predictions, logits) if outputs > 1 else None,
        accuracy=None if labels is None else accuracy(predictions, labels),
        mean_squared_error=mean_squared_error(predictions, logits),
        jacobian_rows=points * outputs,
        gradient_bytes=size * features * outputs * K.dtype.itemsize,
        kernel_bytes=outputs * points**2 * K.dtype.itemsize,
        solve_flops=outputs * size**3 / 3,
        steps=steps,
    )
