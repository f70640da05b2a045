"""What is known of a model, kept on its `Linearization`: nobody asks twice."""

from __future__ import annotations

import weakref
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .batch import Batch, same_kind
from .watch import Watch

if TYPE_CHECKING:
    from .inputs import Inputs

__all__ = ["StateFacts", "Verdict"]


@dataclass(eq=False)
class StateFacts:
    """What the trial of values found for inputs of one kind.

    Attributes:
        example: The first samples, for their nesting, dtypes and numbers of axes, which make the kind.
        tried: Number of differing samples in the trial.
        output_shapes: Shape of the output of one sample, by the shapes of its inputs.
        watches: Tensors outside the model that the output depends on.
        activation_bytes: Bytes of what one sample's forward pass computes.
        lowest_dtype: The coarsest floating dtype in which the model computes.
        is_complex: Whether it computes with complex numbers.
        convolves: Whether it has convolutions.
    """

    example: Batch
    tried: int
    output_shapes: dict[tuple[torch.Size, ...], torch.Size]
    watches: tuple[Watch, ...]
    activation_bytes: int
    lowest_dtype: torch.dtype
    is_complex: bool
    convolves: bool


@dataclass(eq=False)
class Verdict:
    """What is known of a model: its states by kind of input, its derivatives, and the batches looked at.

    Attributes:
        states: One entry for each kind of input.
        coverage: What the layer rules cover; None as long as nobody has asked.
        differentiation: How it is differentiated; None as long as nothing has been.
        batched: Whether several backward passes may go through one batched pass, by the parameters for which
            they are made.
        layers: Sizes of layers, by the parameters that rules cover and the shapes of a sample.
    """

    states: list[StateFacts] = field(default_factory=list)
    coverage: object | None = None
    differentiation: object | None = None
    batched: dict[Hashable, bool] = field(default_factory=dict)
    layers: dict[Hashable, Any] = field(default_factory=dict)
    _seen: weakref.WeakKeyDictionary[object, dict[Hashable, Tensor]] = field(
        default_factory=weakref.WeakKeyDictionary
    )

    def copied(self) -> Verdict:
        """Return what is known for the same model at other values; which batches were looked at is not."""
        # A tensor outside the model may have other values by now: what depends on one is tried again.
        states = [facts for facts in self.states if not facts.watches]
        return Verdict(states, self.coverage, self.differentiation, dict(self.batched), dict(self.layers))

    def restricted(self) -> Verdict:
        """Return what is known for some of the parameters: nothing that names them by number."""
        return Verdict(self.states, None, self.differentiation)

    def facts(self, batch: Batch) -> StateFacts | None:
        """Return what is known of inputs like these."""
        return next((facts for facts in self.states if same_kind(facts.example, batch)), None)

    def learn(self, facts: StateFacts) -> None:
        """Keep what was found, in the place of what was known of inputs like these."""
        self.states = [other for other in self.states if not same_kind(other.example, facts.example)]
        self.states.append(facts)

    def seen(
        self, inputs: Inputs, start: int, stop: int, key: Hashable, size: int, versions: Sequence[int]
    ) -> Tensor:
        """Return ``(size,)``: which directions of some samples were looked at; writing to it says so.

        ``key`` is what else the outcome depends on, beside the versions of the parameters. It is kept as long
        as the samples.
        """
        root, numbers = inputs.place(start, stop)
        held = self._seen.setdefault(root, {})
        whole = (key, numbers, tuple(versions))
        if whole not in held:
            held[whole] = torch.zeros(size, dtype=torch.bool)
        return held[whole]

    def __getstate__(self) -> dict[str, object]:
        """Leave out what depends on this process: batches, outer tensors, what torch can batch."""
        kept = "coverage", "differentiation", "layers"
        return {name: getattr(self, name) for name in kept}

    def __setstate__(self, state: dict[str, object]) -> None:
        """Start with no kinds of input and no batches."""
        vars(self).update(state, states=[], batched={}, _seen=weakref.WeakKeyDictionary())
