"""A recurrent layer whose hidden states over time are all that a model returns, caught in a forward pass."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from ..model import Batch, Inputs
from .attribution import CoverageChanged
from .differentiation import Parameters
from .layer_rules.recurrent import SEQUENCES, Step
from .recurrence import Steps, linearize_steps
from .source import LayerSource

__all__ = ["RecurrentLayer", "recurrent_layers", "steps_of"]


@dataclass(frozen=True, eq=False)
class RecurrentLayer:
    """The call of a recurrent layer, with the samples first.

    Attributes:
        step: One step.
        inputs: ``(B, T, d)``.
        state: The first state.
        weights: Its two weights, and its two biases or nothing more.
        places: The number of the selected parameter that each of them is, or None.
    """

    step: Step
    inputs: Tensor
    state: tuple[Tensor, ...]
    weights: tuple[Tensor, ...]
    places: tuple[int | None, ...]

    def linearize(self) -> Steps:
        """Linearise every step."""
        selected = [place is not None for place in self.places]
        return linearize_steps(self.step, self.inputs, self.state, self.weights, selected)


class _Catcher(TorchFunctionMode):
    """Cuts the graph behind recurrent layers with selected parameters: their results become leaves."""

    def __init__(self, leaves: tuple[Tensor, ...]) -> None:
        super().__init__()
        self._numbers = {id(leaf): number for number, leaf in enumerate(leaves)}
        self.calls: list[tuple[Any, tuple[Any, ...], tuple[Tensor, ...]]] = []

    def number(self, weight: Tensor) -> int | None:
        """Return the number of the selected parameter that a weight is."""
        return self._numbers.get(id(weight))

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        whole = function in SEQUENCES and len(args) == 9 and not kwargs and isinstance(args[2], (list, tuple))
        if not whole or all(self.number(weight) is None for weight in args[2]):
            return function(*args, **(kwargs or {}))
        with torch.no_grad():
            cut = tuple(part.detach().requires_grad_() for part in function(*args))
        self.calls.append((function, args, cut))
        return cut


def _require(condition: bool, reason: str) -> None:
    if not condition:
        raise CoverageChanged({}, f"not all hidden states of one recurrent layer: {reason}")


def _caught(source: LayerSource, params: Parameters, batch: Batch) -> RecurrentLayer:
    """Run a forward pass and look for the layer whose hidden states are its output."""
    leaves = tuple(p.detach().requires_grad_() for p in params)
    catcher = _Catcher(leaves)
    with torch.enable_grad():
        with catcher:
            output = source.linearization.function(leaves, batch)
        _require(len(catcher.calls) == 1 and output.requires_grad, f"{len(catcher.calls)} such calls")
        function, args, cut = catcher.calls[0]
        flat = _identical_output(output, args, cut)
        gradients = torch.autograd.grad(output, (*cut, *leaves), flat, allow_unused=True)
    own = gradients[0]
    _require(own is not None and torch.equal(_sample_rows(own, args[8]), flat), "they are changed on the way")
    _require(all(g is None for g in gradients[1:]), "other ways lead from the parameters to the output")
    return _layer_of(source, catcher, function, args, batch)


def _sample_rows(sequence: Tensor, batch_first: bool) -> Tensor:
    """Flatten a sequence of states to one row per sample."""
    return (sequence if batch_first else sequence.transpose(0, 1)).flatten(1)


def _identical_output(output: Tensor, args: tuple[Any, ...], cut: tuple[Tensor, ...]) -> Tensor:
    """Return random cotangents of an output that is the hidden states, sample by sample."""
    _require(cut[0].dim() == 3 and output.dtype == cut[0].dtype, "they are not a batch of sequences")
    states = _sample_rows(cut[0].detach(), args[8])
    _require(states.shape == output.shape and torch.equal(states, output.detach()), "the output differs")
    generator = torch.Generator().manual_seed(17)
    return torch.randn(output.shape, generator=generator, dtype=torch.float64).to(output)


def _layer_of(
    source: LayerSource, catcher: _Catcher, function: Any, args: tuple[Any, ...], batch: Batch
) -> RecurrentLayer:
    step, parts = SEQUENCES[function]
    inputs, first, weights, biases, layers, dropout, train, bidirectional, batch_first = args
    state = tuple(first) if parts == 2 else (first,)
    _require(layers == 1 and not bidirectional, "it has several layers, or runs in both directions")
    _require(not (train and dropout) and len(weights) == (4 if biases else 2), "dropout, or a projection")
    places = tuple(catcher.number(weight) for weight in weights)
    used = [place for place in places if place is not None]
    _require(len(set(used)) == len(used), "weights are shared")
    others = [weight for weight, place in zip(weights, places, strict=True) if place is None]
    _require(
        not any(tensor.requires_grad for tensor in (inputs, *state, *others)),
        "its inputs, its first state or another weight depend on the parameters",
    )
    dtypes = {tensor.dtype for tensor in (inputs, *state, *weights)}
    _require(dtypes == {source.dtype}, "it computes in another dtype")
    inputs = inputs if batch_first else inputs.transpose(0, 1)
    _require(inputs.shape[0] == batch.num_samples, "its sequences are not the samples")
    return RecurrentLayer(
        step,
        inputs.detach(),
        tuple(part[0].detach() for part in state),
        tuple(weight.detach() for weight in weights),
        places,
    )


def steps_of(source: LayerSource, params: Parameters, inputs: Inputs) -> Steps:
    """Return the linearised steps of all samples."""
    made = [layer.linearize() for layer in recurrent_layers(source, params, inputs)]
    if len(made) == 1:
        return made[0]
    return Steps(
        torch.cat([steps.transitions for steps in made]),
        tuple(torch.cat(gates) for gates in zip(*(steps.gates for steps in made), strict=True)),
        tuple(torch.cat(parts) for parts in zip(*(steps.activations for steps in made), strict=True)),
    )


def recurrent_layers(
    source: LayerSource, params: Parameters, inputs: Inputs, batch_size: int | None = None
) -> Iterator[RecurrentLayer]:
    """Yield the layer as it is called for each batch of samples. Cost: one forward pass."""
    with source.linearization.safe_context():
        for _, _, batch in inputs.batches(batch_size or source.sizes.batch_size(inputs)):
            yield _caught(source, params, batch)
