"""The parts of random networks that torch has no module for; samples lie on the first axis."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


class Apply(nn.Module):
    """A function without parameters."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


class Pick(nn.Module):
    """The first of what a module returns."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)[0]


class TimeFirst(nn.Module):
    """A recurrent layer with time on the first axis."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x.transpose(0, 1))[0].transpose(0, 1)


class LastState(nn.Module):
    """The last hidden state of every layer and direction."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        last = self.inner(x)[1]
        return (last[0] if isinstance(last, tuple) else last).transpose(0, 1).flatten(1)


class CellLoop(nn.Module):
    """A cell called at every step; all its states, or the last."""

    def __init__(self, kind, features, hidden, bias, whole):
        super().__init__()
        self.cell = {"rnn": nn.RNNCell, "gru": nn.GRUCell, "lstm": nn.LSTMCell}[kind](features, hidden, bias)
        self.whole = whole

    def forward(self, x: Tensor) -> Tensor:
        state = None
        seen = []
        for now in x.unbind(1):
            state = self.cell(now, state)
            seen.append(state[0] if isinstance(state, tuple) else state)
        return torch.stack(seen, 1) if self.whole else seen[-1]


class Elman(nn.Module):
    """A recurrence written by hand, whose weights are used in every step."""

    def __init__(self, features, hidden):
        super().__init__()
        self.read, self.keep = nn.Linear(features, hidden), nn.Linear(hidden, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.read(x[:, 0]))
        for now in x.unbind(1)[1:]:
            hidden = torch.tanh(self.read(now) + self.keep(hidden))
        return hidden


class SelfAttention(nn.Module):
    """`nn.MultiheadAttention` on one sequence."""

    def __init__(self, width, heads, bias, need_weights, time_first):
        super().__init__()
        self.inner = nn.MultiheadAttention(width, heads, bias=bias, batch_first=not time_first)
        self.need_weights, self.time_first = need_weights, time_first

    def forward(self, x: Tensor) -> Tensor:
        flow = x.transpose(0, 1) if self.time_first else x
        mixed, _ = self.inner(flow, flow, flow, need_weights=self.need_weights)
        return mixed.transpose(0, 1) if self.time_first else mixed


class OwnAttention(nn.Module):
    """Attention from one packed projection and the fused function."""

    def __init__(self, width, causal):
        super().__init__()
        self.project, self.out, self.causal = nn.Linear(width, 3 * width), nn.Linear(width, width), causal

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.project(x).chunk(3, -1)
        return self.out(F.scaled_dot_product_attention(q, k, v, is_causal=self.causal))


class Residual(nn.Module):
    """x + f(x), in place if asked."""

    def __init__(self, inner, in_place=False):
        super().__init__()
        self.inner, self.in_place = inner, in_place

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x).add_(x) if self.in_place else x + self.inner(x)


class Twice(nn.Module):
    """One module called two times."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner
        self.alias = inner  # the same module by a second path

    def forward(self, x: Tensor) -> Tensor:
        return self.alias(torch.tanh(self.inner(x)))


class Halted(nn.Module):
    """Branches that carry no gradient, or a part of it."""

    def __init__(self, inner, form):
        super().__init__()
        self.inner, self.form = inner, form

    def forward(self, x: Tensor) -> Tensor:
        y = self.inner(x)
        if self.form == "gate":
            return y * torch.sigmoid(y).detach()
        if self.form == "sum":
            return y + self.inner(x.detach())
        return torch.tanh(y) + y.detach()


class Checkpointed(nn.Module):
    """A block that is computed again in the backward pass."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.inner, x, use_reentrant=False)


class TiedPair(nn.Module):
    """A linear layer and another one with its weight, as it is or transposed."""

    def __init__(self, width, inner, transposed):
        super().__init__()
        self.first = nn.Linear(width, inner)
        self.second = nn.Linear(width if transposed else inner, inner if transposed else width)
        if transposed:
            self.second.weight = self.first.weight
        self.transposed = transposed

    def forward(self, x: Tensor) -> Tensor:
        if self.transposed:  # two layers with one weight, side by side
            return torch.tanh(self.first(x)) * self.second(x)
        return F.linear(torch.tanh(self.first(x)), self.first.weight.T, self.second.bias) + self.second(
            torch.sigmoid(self.first(x))
        )


class Adapter(nn.Module):
    """A frozen linear layer with a low-rank correction, which is zero while it is fresh."""

    def __init__(self, features, width, rank, fresh):
        super().__init__()
        self.base = nn.Linear(features, width).requires_grad_(False)
        self.down = nn.Parameter(torch.randn(rank, features))
        self.up = nn.Parameter(torch.randn(width, rank))
        self.fresh = fresh

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + x @ self.down.mT @ self.up.mT


class Gate(nn.Module):
    """The product of two linear layers."""

    def __init__(self, features, width):
        super().__init__()
        self.value, self.gate = nn.Linear(features, width), nn.Linear(features, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.value(x) * torch.sigmoid(self.gate(x))


class GainIsBias(nn.Module):
    """One vector as the bias of a layer and the gain of a norm."""

    def __init__(self, width):
        super().__init__()
        self.layer, self.norm = nn.Linear(width, width), nn.LayerNorm(width)
        self.norm.weight = self.layer.bias

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(torch.tanh(self.layer(x)) + x)


class Raw(nn.Module):
    """A weight used without a layer."""

    FORMS = (
        "linear",
        "matmul",
        "addmm",
        "einsum",
        "normed",
        "squared",
        "slices",
        "halves",
        "stacked",
        "scale",
        "shift",
        "scale in place",
        "shift in place",
        "first feature",
        "outer",
        "row and column",
        "scalar",
    )

    def __init__(self, width, form):
        super().__init__()
        self.form = form
        self.weight = nn.Parameter(torch.randn(width, width) * 0.7)
        self.bias = nn.Parameter(torch.randn(width) * 0.7)

    def forward(self, x: Tensor) -> Tensor:
        w, b, form = self.weight, self.bias, self.form
        if form == "linear":
            return F.linear(x, w, b) + F.linear(x, w.T)
        if form == "matmul":
            return x @ w + torch.matmul(x, w.mT) - b
        if form == "addmm":
            return torch.addmm(b, x.flatten(0, -2), w).reshape(x.shape)
        if form == "einsum":
            return torch.einsum("...i,oi->...o", x, w) * b
        if form == "normed":
            return F.linear(x, w / (0.01 + w.square().sum()).sqrt()) + b / (1 + b.square().sum())
        if form == "squared":
            return F.linear(x, w.square()) * w.abs().sum() + b.exp()
        if form == "slices":
            return torch.cat([x @ w[:, :1], F.linear(x, w[1:], b[1:])], -1)
        if form == "halves":
            return torch.cat([F.linear(x, part, bias) for part, bias in zip(w.split(1), b.split(1))], -1)  # noqa: B905
        if form == "stacked":
            return F.linear(x, torch.stack([b, *w.unbind(0)][:-1]))
        if form == "scale":
            return x * b + b * torch.tanh(x)
        if form == "shift":
            return torch.tanh(b + x) - (b - x)
        if form == "scale in place":
            return (x * w[0]).mul_(b).tanh_()
        if form == "shift in place":
            y = F.linear(x, w)
            y += b
            return y
        if form == "first feature":
            y = F.linear(x, w, b)
            y[..., 0] = b[0] * x[..., 0]
            return y
        if form == "outer":
            return F.linear(x, torch.outer(b, b) + torch.diag(b), w[0])
        if form == "row and column":
            return x * w[0] + x * w[:, 0]
        return x * b[0] + b.mean()


class Token(nn.Module):
    """A learnt step put before every sequence, and learnt positions."""

    def __init__(self, steps, width, table):
        super().__init__()
        self.token = nn.Parameter(torch.randn(1, 1, width) * 0.7)
        self.places = nn.Embedding(steps + 1, width) if table else nn.Parameter(torch.randn(steps + 1, width))

    def forward(self, x: Tensor) -> Tensor:
        whole = torch.cat([self.token.expand(len(x), -1, -1), x], 1)
        if isinstance(self.places, nn.Embedding):
            return whole + self.places(torch.arange(whole.shape[1]))
        return whole + self.places


class Folded(nn.Module):
    """A layer on samples and steps in one axis, time first or samples first."""

    def __init__(self, inner, time_first):
        super().__init__()
        self.inner, self.time_first = inner, time_first

    def forward(self, x: Tensor) -> Tensor:
        flow = x.transpose(0, 1) if self.time_first else x
        flow = self.inner(flow.flatten(0, 1)).unflatten(0, flow.shape[:2])
        return flow.transpose(0, 1) if self.time_first else flow


class Rounded(nn.Module):
    """A block that computes in float32, whatever its input is."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x.float()).to(x.dtype)


class TokenEmbedding(nn.Module):
    """Words to vectors, and, if tied, a second look through the same table."""

    def __init__(self, words, width, padding, tied):
        super().__init__()
        self.table = nn.Embedding(words, width, padding_idx=0 if padding else None)
        self.tied = tied

    def forward(self, tokens: Tensor) -> Tensor:
        found = self.table(tokens)
        return F.linear(torch.tanh(found), self.table.weight) if self.tied else found
