r"""The kernel of the hidden states of a recurrent layer over time, from Jacobians of single steps.

Each step :math:`z_s = F(z_{s-1}, x_s)` works entry by entry on the results :math:`u = W x + b` and
:math:`v = V h + c` of two matrix products. With :math:`M_s = ∂z_s/∂z_{s-1}`,
:math:`Φ(t, s) = M_t \cdots M_{s+1}` and :math:`D_s^g = ∂z_s/∂(u \text{ or } v)`, the gradient of state t is
:math:`\sum_{s ≤ t} (Φ(t, s) D_s^g) ⊗ a_s^g`, with :math:`a_s = x_s` or :math:`h_{s-1}`. Hence the kernel of
the states, for samples with and without a prime, is

.. math:: Γ_{tt'} = \sum_{s ≤ t, s' ≤ t'} Φ(t, s) N_{ss'} Φ'(t', s')^\top, \qquad
    N_{ss'} = \sum_g ⟨a_s^g, a_{s'}'^g⟩ D_s^g D_{s'}'^{g\top},

whose cross terms over time need no product of gradients with gradients: N has diagonal blocks, since a
step works entry by entry, and two recursions do the rest,

.. math:: C_{tt'} = C_{t,t'-1} M_{t'}'^\top + N_{tt'}, \qquad Γ_{tt'} = M_t Γ_{t-1,t'} + C_{tt'}.

On the diagonal :math:`Γ_{tt} = M_t Γ_{t-1,t-1} M_t^\top + C_{t,t-1} M_t^\top + M_t C_{t,t-1}^\top + N_{tt}`,
a controllability Gramian. Its dual, the observability Gramian
:math:`A_s = E + M_{s+1}^\top A_{s+1} M_{s+1}`, would give the trace alone at the same cost.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .layer_rules.recurrent import State, Step
from .summation import wide_dtype

__all__ = ["Steps", "linearize_steps", "pulled_signals", "same_time_diagonal", "state_kernel"]

_SMALL_ENTRIES = 2**14  # of step Jacobians below which float64 costs no time


@dataclass(frozen=True, eq=False)
class Steps:
    """The steps of B sequences, linearised; a state has p parts of H entries, D = p·H.

    Attributes:
        transitions: ``(B, T, D, D)``, M.
        gates: For inputs and states, ``(B, T, p, Q, H)``: ∂(part)/∂(gate), entry by entry.
        activations: For inputs and states, ``(B, T, d)``: what their gates' gradients are multiplied
            with, with a one at the end where a bias is selected; empty where nothing is.
    """

    transitions: Tensor
    gates: tuple[Tensor, ...]
    activations: tuple[Tensor, ...]

    @property
    def count(self) -> int:
        """Number B of sequences."""
        return self.transitions.shape[0]

    @property
    def length(self) -> int:
        """Number T of steps."""
        return self.transitions.shape[1]

    @property
    def hidden(self) -> int:
        """Number H of hidden units."""
        return self.gates[0].shape[-1]

    @property
    def parts(self) -> int:
        """Number p of parts of a state: 2 for an LSTM, else 1."""
        return self.gates[0].shape[2]

    def to(self, dtype: torch.dtype) -> Steps:
        """Return the same in another dtype."""
        gates = tuple(gate.to(dtype) for gate in self.gates)
        return Steps(self.transitions.to(dtype), gates, tuple(a.to(dtype) for a in self.activations))

    def take(self, start: int, stop: int) -> Steps:
        """Return some of the sequences."""
        return self._cut((slice(start, stop),))

    def between(self, start: int, stop: int) -> Steps:
        """Return some of the steps of every sequence."""
        return self._cut((slice(None), slice(start, stop)))

    def _cut(self, chosen: tuple[slice, ...]) -> Steps:
        """Return the steps of some samples, or at some times."""
        return Steps(
            self.transitions[chosen],
            tuple(gate[chosen] for gate in self.gates),
            tuple(activation[chosen] for activation in self.activations),
        )


def linearize_steps(
    step: Step,
    inputs: Tensor,
    state: State,
    weights: Sequence[Tensor],
    selected: Sequence[bool],
) -> Steps:
    """Return the linearised steps of a recurrent layer over inputs ``(B, T, d)``, all steps at once.

    ``state`` is the first state, p tensors ``(B, H)``, and ``weights`` are W ``(Q·H, d)``, V ``(Q·H, H)``,
    and their biases or nothing more, of which ``selected`` says which the kernel is about. Cost: one forward
    pass and p backward passes over single steps; memory: B T D².
    """
    # States and derivatives are few, and every product of Jacobians inherits their errors: in float64.
    dtype, wide = inputs.dtype, wide_dtype(inputs)
    wide_inputs, state = inputs.to(wide), tuple(part.to(wide) for part in state)
    input_weight, hidden_weight, *biases = (weight.to(wide) for weight in weights)
    input_bias, hidden_bias = biases or (None, None)
    driven = torch.nn.functional.linear(wide_inputs, input_weight, input_bias)  # (B, T, Q·H)
    states, recurred = [], []
    for now in driven.unbind(1):  # (B, Q·H)
        back = torch.nn.functional.linear(state[0], hidden_weight, hidden_bias)
        states.append(state)
        recurred.append(back)
        state = step(now, state, lambda _, back=back: back)  # type: ignore[misc]
    before = tuple(torch.stack(part, dim=1) for part in zip(*states, strict=True))  # p of (B, T, H)
    found = _partials(step, driven, torch.stack(recurred, dim=1), before)
    own, other, carried = (derivative.to(dtype) for derivative in found)
    parts, hidden = len(before), before[0].shape[-1]
    # M_s = ∂z/∂v V + ∂z/∂z_{s-1}: V is multiplied with h alone, the first part of the state, and what is
    # carried past the matrix products acts entry by entry.
    blocks = torch.einsum("btpqh,qhk->btphk", other, weights[1].unflatten(0, (-1, hidden)))
    transitions = inputs.new_zeros((*inputs.shape[:2], parts, hidden, parts, hidden))
    transitions[:, :, :, :, 0] = blocks
    transitions.diagonal(dim1=3, dim2=5).add_(carried)
    wanted = (*selected, False, False)  # without biases, none is selected
    activations = (
        _widened(inputs, wanted[0], wanted[2]),
        _widened(before[0].to(dtype), wanted[1], wanted[3]),
    )
    return Steps(transitions.flatten(4, 5).flatten(2, 3), (own, other), activations)


def _widened(activations: Tensor, weight: bool, bias: bool) -> Tensor:
    """Leave out what no selected weight sees, and add the one that a selected bias sees."""
    ones = activations.new_ones((*activations.shape[:2], 1 if bias else 0))
    return torch.cat([activations if weight else activations[..., :0], ones], dim=-1)


def _partials(step: Step, driven: Tensor, recurred: Tensor, before: State) -> tuple[Tensor, Tensor, Tensor]:
    """Return the derivatives of a step entry by entry.

    Returns:
        ``(B, T, p, Q, H)`` with respect to both results of matrix products, and ``(B, T, p, p, H)`` with
        respect to the state before, at fixed results.
    """
    # A step works entry by entry: the sum over all entries has in each of them its own derivative.
    leaves = [tensor.detach().requires_grad_() for tensor in (driven, recurred, *before)]
    with torch.enable_grad():
        after = step(leaves[0], tuple(leaves[2:]), lambda _: leaves[1])
        rows = [
            torch.autograd.grad(part.sum(), leaves, retain_graph=True, materialize_grads=True)
            for part in after
        ]
    hidden = before[0].shape[-1]
    columns = [torch.stack(column, dim=2) for column in zip(*rows, strict=True)]  # (B, T, p, ·)
    split = [column.unflatten(3, (-1, hidden)) for column in columns[:2]]
    return split[0], split[1], torch.stack(columns[2:], dim=3)


def _add_sources(target: Tensor, left: Steps, right: Steps, start: int, now: int) -> None:
    """Add N between steps ``start:`` of the left and step ``now`` of the right, ``(B, T - start, D, D)``."""
    # D_s^g D'_s'^gᵀ is diagonal between each part of one state and each of the other: Σ_Q entry by entry.
    hidden = left.hidden
    for gate, other, one, two in zip(
        left.gates, right.gates, left.activations, right.activations, strict=True
    ):
        inner = (one[:, start:] * two[:, now : now + 1]).sum(-1)  # (B, T - start)
        for p in range(left.parts):
            for q in range(right.parts):
                found = (gate[:, start:, p] * other[:, now : now + 1, q]).sum(2)  # (B, T - start, H)
                rows, columns = slice(p * hidden, (p + 1) * hidden), slice(q * hidden, (q + 1) * hidden)
                block = target[:, :, rows, columns]
                block.diagonal(dim1=2, dim2=3).addcmul_(found, inner.unsqueeze(-1))


def same_time_diagonal(steps: Steps) -> Tensor:
    """Return the kernel's diagonal, ``(B, T, H)``. Cost: B T² D³ operations; memory: B T D²."""
    size, hidden, length = steps.transitions.shape[-1], steps.hidden, steps.length
    moves = steps.transitions.mT  # Mᵀ
    result = moves.new_empty((steps.count, length, hidden))
    gramian = moves.new_zeros((steps.count, size, size))
    readout = moves.new_zeros((steps.count, length, size, size))  # C of the steps that are left
    for now in range(length):
        move = moves[:, now]
        # C_{t, now} = C_{t, now-1} Mᵀ_now + N_{t, now} for the steps t >= now that are left.
        if now:  # from C at t' = now - 1 to t' = now, the rows of steps before now left behind
            readout = torch.bmm(readout[:, 1:].flatten(1, 2), move).view(steps.count, -1, size, size)
        cross = readout[:, 0]
        own = torch.zeros_like(readout[:, :1])
        _add_sources(own, steps.between(now, now + 1), steps, 0, now)
        # Γ_tt = M Γ_{t-1,t-1} Mᵀ + C_{t,t-1} Mᵀ + (C_{t,t-1} Mᵀ)ᵀ + N_tt; ``cross`` is C_{t,t-1} Mᵀ.
        gramian = move.mT @ gramian @ move + cross + cross.mT + own[:, 0]
        result[:, now] = gramian.diagonal(dim1=1, dim2=2)[:, :hidden]
        if now + 1 < length:
            _add_sources(readout[:, 1:], steps, steps, now + 1, now)
    return result


def state_kernel(left: Steps, right: Steps, entries: int = 2**22, out: Tensor | None = None) -> Tensor:
    """Return the kernel of B sequences with one, ``(B, T, H, T', H)``. Cost: 4 B T T' D³ operations."""
    size, hidden, count = left.transitions.shape[-1], left.hidden, left.count
    if out is None:
        out = left.transitions.new_empty((count, left.length, hidden, right.length, hidden))
    moves = left.transitions
    if moves.dtype == torch.float32 and moves.numel() <= _SMALL_ENTRIES and moves.device.type != "mps":
        # So small that calls cost more than arithmetic: nothing need be lost over time.
        return out.copy_(state_kernel(left.to(torch.float64), right.to(torch.float64), entries))
    width = max(1, min(right.length, entries // max(1, count * left.length * size * size)))
    width = right.length if size == hidden else width  # in place, the result is all the memory it takes
    column = left.transitions.new_zeros((count, left.length, size, size))  # C at one t'
    for start in range(0, right.length, width):
        stop = min(start + width, right.length)
        shape = (count, left.length, size, stop - start, size)
        chunk = out if size == hidden else column.new_empty(shape)
        for now in range(start, stop):
            if now:  # C_{t, t'} = C_{t, t'-1} M'ᵀ_t' + N_{t, t'}, all t at once
                column = (column.view(-1, size) @ right.transitions[0, now].mT).view_as(column)
            _add_sources(column, left, right, 0, now)
            chunk[:, :, :, now - start] = column
        flat = chunk.view(*shape[:3], -1)  # (B, T, D, width·D)
        # Γ_{t, t'} = M_t Γ_{t-1, t'} + C_{t, t'}, all t' of the chunk at once.
        for time in range(1, left.length):
            flat[:, time].baddbmm_(left.transitions[:, time], flat[:, time - 1])
        if chunk is not out:
            out[:, :, :, start:stop] = chunk[:, :, :hidden, :, :hidden]
    return out


def pulled_signals(steps: Steps, cotangents: Tensor) -> list[Tensor]:
    """Return ``(B, C, T, Q·H)`` gradients at inputs and states for ``(B, C, T, H)``. Cost: 2 B C T D²."""
    count, directions, length, hidden = cotangents.shape
    signal = cotangents.new_zeros((count, directions, steps.parts * hidden))
    found: list[list[Tensor]] = [[] for _ in steps.gates]
    for now in reversed(range(length)):
        # ∂/∂z_now: that of the later steps, moved through M_{now+1}, and that of the state itself.
        signal[..., :hidden] += cotangents[:, :, now]
        split = signal.unflatten(-1, (steps.parts, 1, hidden))  # (B, C, p, 1, H)
        for pieces, gate in zip(found, steps.gates, strict=True):
            pieces.append((split * gate[:, now].unsqueeze(1)).sum(2).flatten(2))
        signal = signal @ steps.transitions[:, now]
    return [torch.stack(pieces[::-1], dim=2) for pieces in found]
