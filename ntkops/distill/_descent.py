"""Gradient descent on a few samples: Adam, the best iterate, and a file to go on from."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from tqdm.auto import tqdm

from .. import checkpoint
from ..errors import InputError, NonFiniteError
from ..vectors import resolve_generator

__all__ = ["Descended", "Objective", "Options", "Record", "descend", "resolve_run"]

_EPSILON = 1e-12  # far below torch's 1e-8: losses are shares, and their gradients small


class Objective(Protocol):
    """What is minimised.

    Attributes:
        sampled: Whether `evaluate` sees a random part of the data, so that `judge` has to compare iterates.
        terms: Names of the parts that `evaluate` returns.
    """

    sampled: bool
    terms: tuple[str, ...]

    def evaluate(self, z: Tensor) -> tuple[float, Tensor, tuple[float, ...]]:
        """Return the loss, its gradient and its parts."""
        ...

    def judge(self, z: Tensor) -> float:
        """Return the loss on all data."""
        ...

    def state(self) -> dict[str, float]:
        """Return what the next evaluation depends on beside z."""
        ...

    def restore(self, state: Mapping[str, float]) -> None:
        """Take that back."""
        ...


@dataclass(frozen=True)
class Options:
    """How long, how fast.

    Attributes:
        iterations: Steps; 0 only evaluates the start.
        learning_rate: First step of Adam in units of the data's standard deviation; it falls to zero along
            half a cosine.
        betas: Decay of Adam's two averages.
        progress: Show a bar of iterations.
        judge_every: Iterations between two comparisons of a sampled objective on all data.
        keep_last: Return the last iterate and not the best.
        patience: Iterations without a better iterate after which the descent goes back to the best and goes
            on at half the rate; None for never. Not for sampled objectives.
    """

    iterations: int
    learning_rate: float
    betas: tuple[float, float] = (0.9, 0.999)
    progress: bool = False
    judge_every: int = 1
    keep_last: bool = False
    patience: int | None = None

    def check(self) -> None:
        """Raise unless the numbers make sense.

        Raises:
            InputError: If they do not.
        """
        whole = isinstance(self.iterations, int) and not isinstance(self.iterations, bool)
        if not whole or self.iterations < 0:
            raise InputError(f"iterations={self.iterations!r}; it is a number of steps, at least 0")
        if not math.isfinite(self.learning_rate) or self.learning_rate <= 0:
            raise InputError(
                f"learning_rate={self.learning_rate!r}; it is a positive number, in units of the standard "
                "deviation of the data"
            )

    def rate(self, step: int) -> float:
        """Return the learning rate of a step."""
        return self.learning_rate * (1 + math.cos(math.pi * step / max(self.iterations, 1))) / 2


@dataclass(frozen=True, eq=False)
class Record:
    """The file that a descent goes on from.

    Attributes:
        path: Where; None for no file.
        kind: What writes it.
        every: Iterations between two writings.
        fingerprint: What it must agree with; None to take any.
    """

    path: str | os.PathLike[str] | None
    kind: str
    every: int
    fingerprint: Mapping[str, str] | None = None

    def of(self, **parts: Any) -> Record:
        """Return the record of a run that depends on these parts."""
        return replace(self, fingerprint=None if self.path is None else checkpoint.fingerprint(**parts))

    def check(self) -> None:
        """Raise unless the interval makes sense.

        Raises:
            InputError: If it does not.
        """
        if isinstance(self.every, bool) or not isinstance(self.every, int) or self.every < 1:
            raise InputError(f"checkpoint_every={self.every!r}; it is a number of iterations, at least 1")

    def read(self) -> checkpoint.Checkpoint | None:
        """Return what the file holds; None where there is none yet."""
        if self.path is None or not Path(self.path).exists():
            return None
        return checkpoint.load(self.path, self.fingerprint, kind=self.kind)


@dataclass(frozen=True, eq=False)
class Descended:
    """Where a descent ended.

    Attributes:
        z: The best iterate, or the last.
        loss: Its loss, judged on all data.
        start_loss: The start's.
        iteration: Its number.
        history: ``(iterations + 1, 1 + terms)`` float64: losses, and their parts.
    """

    z: Tensor
    loss: float
    start_loss: float
    iteration: int
    history: Tensor


def resolve_run(generator: torch.Generator | None, record: Record) -> tuple[torch.Generator, int]:
    """Return the generator and seed of a run: without a generator, those of the run that it continues."""
    if generator is None and (found := record.read()) is not None:
        generator = torch.Generator().manual_seed(int(found.metadata["seed"]))
    return resolve_generator(generator)


class _State:
    """Everything that the rest of a descent depends on."""

    def __init__(self, start: Tensor, options: Options, scale: float, terms: int, seed: int) -> None:
        self.z = start.detach().clone()
        self.best = self.z.clone()
        self.best_loss = self.start_loss = math.inf
        self.best_step = self.step = self.stalled = 0
        self.slowing = 1.0
        self.history = torch.zeros(options.iterations + 1, 1 + terms, dtype=torch.float64)
        self.seed = seed
        self._scale = scale
        self.adam = torch.optim.Adam([self.z], lr=options.rate(0) * scale, betas=options.betas, eps=_EPSILON)

    def move(self, gradient: Tensor, rate: float) -> None:
        """Take one step."""
        self.z.grad = gradient
        self.adam.param_groups[0]["lr"] = rate * self.slowing * self._scale
        self.adam.step()
        self.z.grad = None
        self.step += 1

    def retreat(self) -> None:
        """Go back to the best iterate, to leave it at half the rate."""
        self.z.copy_(self.best)
        self.adam.state.clear()
        self.stalled, self.slowing = 0, self.slowing / 2
        self.step += 1

    def write(self, record: Record, objective: Objective, generator: torch.Generator) -> None:
        """Put everything into the file."""
        if record.path is None:
            return
        moments = self.adam.state.get(self.z, {})
        tensors = {"z": self.z, "best": self.best, "history": self.history}
        tensors |= {f"adam/{name}": value for name, value in moments.items()}
        tensors |= {
            "losses": torch.tensor([self.best_loss, self.start_loss], dtype=torch.float64),
            "generator": generator.get_state(),
        }
        numbers = {"step": self.step, "best_step": self.best_step, "seed": self.seed}
        numbers |= {"stalled": self.stalled}
        metadata = {**numbers, "slowing": self.slowing, "objective": objective.state()}
        checkpoint.save(record.path, tensors, metadata, record.fingerprint or {}, kind=record.kind)

    def read(self, found: checkpoint.Checkpoint, objective: Objective, generator: torch.Generator) -> None:
        """Take everything from the file."""
        tensors, metadata = found.tensors, found.metadata
        self.z.copy_(tensors["z"])
        self.best.copy_(tensors["best"])
        self.history.copy_(tensors["history"])
        self.best_loss, self.start_loss = tensors["losses"].tolist()
        self.step, self.best_step = metadata["step"], metadata["best_step"]
        self.stalled, self.slowing = metadata["stalled"], metadata["slowing"]
        for name, value in tensors.items():
            if name.startswith("adam/"):
                place = self.z.device if value.dim() else value.device
                self.adam.state[self.z][name.removeprefix("adam/")] = value.to(place)
        objective.restore(metadata["objective"])
        generator.set_state(tensors["generator"])


def descend(
    objective: Objective,
    start: Tensor,
    options: Options,
    record: Record,
    generator: torch.Generator,
    *,
    seed: int,
    scale: float,
) -> Descended:
    """Minimise an objective over samples.

    Args:
        objective: The loss.
        start: The first iterate; it stays as it is.
        options: How long, how fast.
        record: The file to write to.
        generator: What a sampled objective draws from; its state is kept in the file.
        seed: Its seed.
        scale: Standard deviation of the data.

    Returns:
        The best iterate, or the last.

    Raises:
        NonFiniteError: If the loss or its gradient is NaN or infinite.
        CheckpointError: If the file is damaged, or of another run.
    """
    state = _State(start, options, scale, len(objective.terms), seed)
    if (found := record.read()) is not None:
        state.read(found, objective, generator)
    with tqdm(
        total=options.iterations,
        initial=min(state.step, options.iterations),
        desc=record.kind,
        unit="step",
        disable=not options.progress,
    ) as bar:
        while state.step <= options.iterations:
            _advance(state, objective, options)
            if state.step % record.every == 0 or state.step > options.iterations:
                state.write(record, objective, generator)
            bar.update(state.step <= options.iterations)
            bar.set_postfix(loss=f"{state.history[state.step - 1, 0]:.4g}", refresh=False)
    last = options.keep_last
    return Descended(
        z=state.z.clone() if last else state.best,
        loss=objective.judge(state.z) if last else state.best_loss,
        start_loss=state.start_loss,
        iteration=options.iterations if last else state.best_step,
        history=state.history,
    )


def _advance(state: _State, objective: Objective, options: Options) -> None:
    """Evaluate the iterate, compare it with the best, and step unless it is the last."""
    step = state.step
    loss, gradient, parts = objective.evaluate(state.z)
    if not math.isfinite(loss) or not bool(torch.isfinite(gradient).all()):
        raise NonFiniteError(
            f"the loss is {loss} at iteration {step}, or its gradient not finite: the samples have left the "
            "region where the model is smooth; take a smaller learning_rate"
        )
    state.history[step] = torch.tensor([loss, *parts], dtype=torch.float64)
    last = step == options.iterations
    if not objective.sampled or last or step % options.judge_every == 0:
        judged = objective.judge(state.z) if objective.sampled else loss
        state.start_loss = judged if step == 0 else state.start_loss
        if judged < state.best_loss:
            state.best_loss, state.best_step, state.stalled = judged, step, 0
            state.best.copy_(state.z)
        else:
            state.stalled += 1
    if last:
        state.step += 1
    elif options.patience is not None and state.stalled >= options.patience and not objective.sampled:
        state.retreat()
    else:
        state.move(gradient, options.rate(step))
