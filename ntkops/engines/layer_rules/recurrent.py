"""Recurrent layers and cells, one matrix product a step instead of one fused call."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["RECURRENT", "SEQUENCES", "State", "Step"]

State = tuple[Tensor, ...]
Step = Callable[[Tensor, State, Callable[[Tensor], Tensor]], State]


# Gates in torch's order: reset, update, new; input, forget, cell, output. ``driven`` is W x + b, recur(h) is
# V h + c, which a GRU's new gate sees after the reset gate.


def _gru_step(driven: Tensor, state: State, recur: Callable[[Tensor], Tensor]) -> State:
    (hidden,) = state
    own, new = driven.chunk(3, -1), recur(hidden).chunk(3, -1)
    reset = torch.sigmoid(own[0] + new[0])
    update = torch.sigmoid(own[1] + new[1])
    candidate = torch.tanh(own[2] + reset * new[2])
    return (candidate + update * (hidden - candidate),)  # (1 - z) n + z h


def _lstm_step(driven: Tensor, state: State, recur: Callable[[Tensor], Tensor]) -> State:
    hidden, cell = state
    gates = (driven + recur(hidden)).chunk(4, -1)
    cell = torch.sigmoid(gates[1]) * cell + torch.sigmoid(gates[0]) * torch.tanh(gates[2])
    return torch.sigmoid(gates[3]) * torch.tanh(cell), cell


def _tanh_step(driven: Tensor, state: State, recur: Callable[[Tensor], Tensor]) -> State:
    return (torch.tanh(driven + recur(state[0])),)


def _relu_step(driven: Tensor, state: State, recur: Callable[[Tensor], Tensor]) -> State:
    return (torch.relu(driven + recur(state[0])),)


def _layer(
    step: Step,
    inputs: Tensor,
    state: State,
    weights: Sequence[Tensor],
    backwards: bool,
) -> tuple[Tensor, State]:
    """Run one direction of one layer over ``(T, N, d)``."""
    input_weight, hidden_weight, *biases = weights
    input_bias, hidden_bias = biases or (None, None)
    driven = F.linear(inputs, input_weight, input_bias).unbind(0)
    outputs = []
    for now in reversed(driven) if backwards else driven:
        state = step(now, state, lambda hidden: F.linear(hidden, hidden_weight, hidden_bias))
        outputs.append(state[0])
    return torch.stack(outputs[::-1] if backwards else outputs), state


def _sequence(step: Step, parts: int, inputs: Tensor, hx: Any, params: Any, *rest: Any, **named: Any) -> Any:
    """Return what ``torch.gru``, ``torch.lstm``, ``torch.rnn_tanh`` and ``torch.rnn_relu`` do.

    NotImplemented for packed sequences, projections and dropout. The rest are has_biases, num_layers,
    dropout, train, bidirectional and batch_first; inputs are ``(T, N, d)``, or ``(N, T, d)`` with
    batch_first.
    """
    packed = not isinstance(params, (list, tuple)) or len(rest) != 6 or named
    if packed:  # (data, batch_sizes, state, ...): the samples of each step differ in number
        return NotImplemented
    biases, layers, dropout, train, bidirectional, batch_first = rest
    directions, width = (2 if bidirectional else 1), (4 if biases else 2)
    if (train and dropout) or len(params) != layers * directions * width:  # a projection has a weight more
        return NotImplemented
    first = hx if parts == 2 else (hx,)
    flow = inputs.transpose(0, 1) if batch_first else inputs
    ends: list[State] = []
    for layer in range(layers):
        sides = []
        for direction in range(directions):
            number = layer * directions + direction
            state = tuple(part[number] for part in first)
            weights = params[number * width : (number + 1) * width]
            side, end = _layer(step, flow, state, weights, direction == 1)
            sides.append(side)
            ends.append(end)
        flow = sides[0] if directions == 1 else torch.cat(sides, dim=-1)
    output = flow.transpose(0, 1) if batch_first else flow
    return output, *(torch.stack(part) for part in zip(*ends, strict=True))


def _cell(step: Step, parts: int, inputs: Tensor, hx: Any, *weights: Tensor | None, **named: Any) -> Any:
    """Return what ``torch.gru_cell``, ``torch.lstm_cell``, ``torch.rnn_tanh_cell`` and so on do."""
    if named or len(weights) not in (2, 4):
        return NotImplemented
    input_weight, hidden_weight, *biases = weights
    input_bias, hidden_bias = biases or (None, None)
    assert input_weight is not None and hidden_weight is not None
    state = tuple(hx) if parts == 2 else (hx,)
    driven = F.linear(inputs, input_weight, input_bias)
    result = step(driven, state, lambda hidden: F.linear(hidden, hidden_weight, hidden_bias))
    return result if parts == 2 else result[0]


# One step, and the number of tensors in a state, of each function that runs whole sequences.
SEQUENCES: dict[Any, tuple[Step, int]] = {
    torch.gru: (_gru_step, 1),
    torch.lstm: (_lstm_step, 2),
    torch.rnn_tanh: (_tanh_step, 1),
    torch.rnn_relu: (_relu_step, 1),
}

RECURRENT: dict[Any, Callable[..., Any]] = {
    **{function: partial(_sequence, *found) for function, found in SEQUENCES.items()},
    torch.gru_cell: partial(_cell, _gru_step, 1),
    torch.lstm_cell: partial(_cell, _lstm_step, 2),
    torch.rnn_tanh_cell: partial(_cell, _tanh_step, 1),
    torch.rnn_relu_cell: partial(_cell, _relu_step, 1),
}
