"""The numbers of a report: kernels, their alignment, and how fast estimators converge."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch

from ..constructors import ntk
from ..errors import ZeroKernelError
from ..estimators import alignment, effective_rank, eigsh, frobenius_norm, trace, truncation_rank
from ..operators import NTKOperator
from ..results import Eigenpairs, EngineInfo, Estimate, TruncationRank
from .subjects import Subject

__all__ = ["Convergence", "KernelReport", "Report", "Settings", "build", "number_of_steps"]

_TraceMethod = Literal["hutchinson", "hutch++", "rhutch", "fhutch"]
_TRACE_METHODS: tuple[_TraceMethod, ...] = get_args(_TraceMethod)
_WARM_UP = 16  # columns
_MOST_CLASSES = 32  # above that, outputs are hardly classes, and their spectra no longer a picture


@dataclass(frozen=True)
class Settings:
    """What is computed, and how precisely.

    Attributes:
        rtol: Relative error asked of estimates, in (0, 1).
        leading: Number of leading eigenvalues.
        epsilon: Share of the trace that truncation ranks may lose, in (0, 1).
        repeats: Repetitions of each estimator against the exact trace; 0 for none.
        passes: Budgets at which they are compared.
        max_dense_bytes: Largest dense block, in bytes. A fixed number rather than a share of free memory,
            so that a report does not depend on the machine.
        seed: Seed of all probes.
        engine: Engine of the kernels, as in `ntkops.ntk`.
    """

    rtol: float = 1e-2
    leading: int = 30
    epsilon: float = 0.05
    repeats: int = 10
    passes: tuple[int, ...] = (8, 16, 32, 64, 128, 256)
    max_dense_bytes: int = 16 * 2**20
    seed: int = 0
    engine: str = "auto"


@dataclass(frozen=True, eq=False)
class KernelReport:
    """One kernel K, ``(n, n)`` with n = N·O.

    Attributes:
        name: Which state of the network.
        num_samples: N.
        num_outputs: O.
        num_parameters: P.
        dtype: Dtype of products.
        device: Where they are made.
        engine: How they are made.
        trace: tr K.
        frobenius_norm: ‖K‖_F.
        effective_rank: (tr K)² / ‖K‖_F²; None for a kernel that is zero.
        leading: Leading eigenpairs.
        classes: The kernels of single outputs; None if they were left out.
    """

    name: str
    num_samples: int
    num_outputs: int
    num_parameters: int
    dtype: str
    device: str
    engine: EngineInfo
    trace: Estimate
    frobenius_norm: Estimate
    effective_rank: Estimate | None
    leading: Eigenpairs
    classes: TruncationRank | None

    @property
    def size(self) -> int:
        """Number n of rows."""
        return self.num_samples * self.num_outputs


@dataclass(frozen=True, eq=False)
class Convergence:
    """Estimates of one trace with growing numbers of passes.

    Attributes:
        kernel: Name of the kernel.
        reference: The exact trace.
        estimates: Method to its estimates, ``repeats`` for each budget.
        repeats: Repetitions.
    """

    kernel: str
    reference: Estimate
    estimates: dict[str, list[Estimate]]
    repeats: int


@dataclass(frozen=True, eq=False)
class Report:
    """All numbers of a report.

    Attributes:
        title: What it is about.
        settings: What was asked.
        kernels: One entry for each state of the network.
        alignment: Between the first and the last kernel; None for one kernel, or a zero one.
        accuracies: State of the network to the share of samples classified correctly.
        convergence: Errors of estimators; None if they were left out.
        notes: What was left out, and why.
        seconds: Wall-clock time of the computation.
    """

    title: str
    settings: Settings
    kernels: list[KernelReport]
    alignment: Estimate | None
    accuracies: dict[str, Estimate]
    convergence: Convergence | None
    notes: list[str]
    seconds: float


class _Builder:
    """Goes through the parts of one report, announcing each."""

    def __init__(self, subject: Subject, settings: Settings, announce: Callable[[str], None] | None) -> None:
        self.subject, self.settings = subject, settings
        self.announce = announce or (lambda step: None)
        self.notes = list(subject.notes)
        self._drawn = 0

    def generator(self) -> torch.Generator:
        """Return a generator of its own for the next quantity, so that errors are independent."""
        self._drawn += 1
        # a prime apart, so that reports of neighbouring seeds share no generator in the first million draws
        return torch.Generator().manual_seed(self.settings.seed * 1_000_003 + self._drawn)

    def kernel(self, name: str, **choice: Any) -> NTKOperator:
        """Return the lazy kernel of one state of the network."""
        linearization = self.subject.linearizations[name]
        settings = self.settings
        choice = {"max_dense_bytes": settings.max_dense_bytes, "engine": settings.engine, **choice}
        return ntk(linearization, self.subject.x, **choice)

    def measure(self, name: str) -> KernelReport:
        """Return all numbers of one kernel."""
        kernel, settings = self.kernel(name), self.settings
        self.announce(f"{name}: trace and norm")
        traced = trace(kernel, rtol=settings.rtol, generator=self.generator())
        norm = frobenius_norm(kernel, rtol=settings.rtol, generator=self.generator())
        self.announce(f"{name}: effective rank")
        rank = self._unless_zero(
            f"effective rank {name}",
            lambda: effective_rank(kernel, rtol=settings.rtol, generator=self.generator()),
        )
        self.announce(f"{name}: leading eigenvalues")
        leading = eigsh(kernel, k=min(settings.leading, kernel.shape[-1]), generator=self.generator())
        self.announce(f"{name}: classes")
        classes = self._classes(name)
        return KernelReport(
            name=name,
            num_samples=kernel.num_samples,
            num_outputs=kernel.num_outputs,
            num_parameters=kernel.num_parameters,
            dtype=str(kernel.dtype).removeprefix("torch."),
            device=str(kernel.device),
            engine=kernel.engine_info,
            trace=traced,
            frobenius_norm=norm,
            effective_rank=rank,
            leading=leading,
            classes=classes,
        )

    def _unless_zero(self, what: str, estimate: Callable[[], Estimate]) -> Estimate | None:
        try:
            return estimate()
        except ZeroKernelError as error:
            self._note(f"no {what}: {error}")
            return None

    def _note(self, text: str) -> None:
        if text not in self.notes:
            self.notes.append(text)

    def _classes(self, name: str) -> TruncationRank | None:
        """Return truncation ranks and spectra of single outputs, where these are few."""
        kernels = self.kernel(name, outputs="each")
        outputs = kernels.shape[0]
        if outputs > _MOST_CLASSES:
            self._note(f"no truncation ranks: {outputs} outputs a sample, more than {_MOST_CLASSES}")
            return None
        # Three float64 matrices of each class at once, or leading eigenvalues one class after another.
        dense = 24 * kernels.shape.numel() <= 4 * self.settings.max_dense_bytes
        try:
            return truncation_rank(
                kernels,
                self.settings.epsilon,
                method="auto" if dense else "lanczos",
                generator=self.generator(),
            )
        except ZeroKernelError as error:
            self._note(f"no truncation ranks {name}: {error}")
            return None

    def alignment(self) -> Estimate | None:
        """Return the alignment of the first and the last kernel."""
        names = list(self.subject.linearizations)
        if len(names) < 2:
            return None
        self.announce("alignment")
        first, last = self.kernel(names[0]), self.kernel(names[-1])
        return self._unless_zero(
            "alignment", lambda: alignment(first, last, rtol=self.settings.rtol, generator=self.generator())
        )

    def convergence(self) -> Convergence | None:
        """Return estimates of the last kernel's trace with growing budgets."""
        settings = self.settings
        if not settings.repeats:
            return None
        name = list(self.subject.linearizations)[-1]
        kernel = self.kernel(name, max_dense_bytes=0)  # else a dense block would make products free
        self.announce("estimators")
        reference = trace(kernel, method="exact")
        if not float(reference):
            return None
        # What an engine keeps between products is made now, and not counted with the first estimate.
        kernel @ torch.ones(kernel.shape[-1], _WARM_UP, dtype=kernel.dtype, device=kernel.device)
        estimates: dict[str, list[Estimate]] = {}
        for method in _TRACE_METHODS:
            self.announce(f"estimators: {method}")
            estimates[method] = [
                trace(kernel, method=method, num_passes=passes, generator=self.generator())
                for passes in settings.passes
                for _ in range(settings.repeats)
            ]
        return Convergence(name, reference, estimates, settings.repeats)


def build(
    subject: Subject,
    settings: Settings | None = None,
    announce: Callable[[str], None] | None = None,
) -> Report:
    """Compute a report.

    Args:
        subject: Networks and samples.
        settings: What is computed, and how precisely.
        announce: Called with a line of text before each step; `number_of_steps` counts them.

    Returns:
        All numbers, each with its error, method and passes.

    Raises:
        NtkopsError: The one that fits, if a network or the samples cannot be linearised.
    """
    started = time.perf_counter()
    builder = _Builder(subject, settings or Settings(), announce)
    kernels = [builder.measure(name) for name in subject.linearizations]
    return Report(
        title=subject.title,
        settings=builder.settings,
        kernels=kernels,
        alignment=builder.alignment(),
        accuracies=dict(subject.accuracies),
        convergence=builder.convergence(),
        notes=builder.notes,
        seconds=time.perf_counter() - started,
    )


def number_of_steps(settings: Settings, kernels: int) -> int:
    """Return how often `build` announces a step."""
    return 4 * kernels + (kernels > 1) + (1 + len(_TRACE_METHODS) if settings.repeats else 0)
