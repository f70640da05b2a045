"""The small networks of the table that torch alone can build."""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

FEATURES, STEPS, HIDDEN = 2, 4, 3


class Classifier(nn.Module):
    """A recurrent layer and a read-out: the hidden states are inside."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.rnn = layer
        self.head = nn.Linear(HIDDEN, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(x)[0][:, -1])


class Inner(nn.Module):
    """The recurrent layer of a classifier alone, under the names that its parameters have there."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.rnn, self.head = model.rnn, model.head

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.rnn(x)


class CellLoop(nn.Module):
    """A recurrent cell called once a step."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.GRUCell(FEATURES, HIDDEN)

    def forward(self, x: Tensor) -> Tensor:
        hidden, states = x.new_zeros(len(x), HIDDEN), []
        for step in x.unbind(1):
            hidden = self.cell(step, hidden)
            states.append(hidden)
        return torch.stack(states, 1)


class LinearLoop(nn.Module):
    """A recurrent network written with linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.inward, self.recurrent = nn.Linear(FEATURES, HIDDEN), nn.Linear(HIDDEN, HIDDEN)

    def forward(self, x: Tensor) -> Tensor:
        hidden, states = x.new_zeros(len(x), HIDDEN), []
        for step in x.unbind(1):
            hidden = torch.tanh(self.inward(step) + self.recurrent(hidden))
            states.append(hidden)
        return torch.stack(states, 1)


class UnrolledGRU(nn.Module):
    """The weights of an nn.GRU, used by plain operations."""

    def __init__(self) -> None:
        super().__init__()
        self.gru = nn.GRU(FEATURES, HIDDEN, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        gru, hidden, states = self.gru, x.new_zeros(len(x), HIDDEN), []
        for step in x.unbind(1):
            inward = F.linear(step, gru.weight_ih_l0, gru.bias_ih_l0).chunk(3, -1)
            recurrent = F.linear(hidden, gru.weight_hh_l0, gru.bias_hh_l0).chunk(3, -1)
            reset = torch.sigmoid(inward[0] + recurrent[0])
            update = torch.sigmoid(inward[1] + recurrent[1])
            new = torch.tanh(inward[2] + reset * recurrent[2])
            hidden = (1 - update) * new + update * hidden
            states.append(hidden)
        return torch.stack(states, 1)


class SelfAttention(nn.Module):
    """nn.MultiheadAttention on one sequence."""

    def __init__(self, need_weights: bool) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.need_weights = need_weights

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x, need_weights=self.need_weights)[0]


class FunctionalAttention(nn.Module):
    """F.scaled_dot_product_attention."""

    def __init__(self, causal: bool) -> None:
        super().__init__()
        self.inward, self.outward = nn.Linear(4, 12), nn.Linear(4, 4)
        self.causal = causal

    def forward(self, x: Tensor) -> Tensor:
        parts = self.inward(x).unflatten(-1, (3, 2, 2)).permute(2, 0, 3, 1, 4)  # (3, B, heads, T, 2)
        mixed = F.scaled_dot_product_attention(*parts, is_causal=self.causal)
        return self.outward(mixed.transpose(1, 2).flatten(2))


class FlatTokens(nn.Module):
    """An embedding and a read-out of its mean."""

    def __init__(self, **options: object) -> None:
        super().__init__()
        self.embed = nn.Embedding(6, 3)
        for name, value in options.items():  # after the weights are drawn: the padding row is not zero
            setattr(self.embed, name, value)
        self.head = nn.Linear(3, 2)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(torch.tanh(self.embed(tokens)).mean(1))


class MeanOfEmbedding(nn.Module):
    """What replaces an nn.EmbeddingBag of means."""

    def __init__(self, bag: nn.EmbeddingBag) -> None:
        super().__init__()
        self.embed = nn.Embedding.from_pretrained(bag.weight.detach(), freeze=False)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.embed(tokens).mean(1)


class TwoInputs(nn.Module):
    """A positional and a keyword input, a dictionary of outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(3, 4), nn.Linear(2, 4)
        self.head = nn.Linear(4, 2)

    def forward(self, a: Tensor, *, b: Tensor) -> dict[str, Tensor]:
        hidden = torch.tanh(self.left(a) * self.right(b))
        return {"hidden": hidden, "logits": self.head(hidden)}


class Physics(nn.Module):
    """u'' + u for a network u of one variable."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(1, 5), nn.Tanh(), nn.Linear(5, 1))

    def at(self, point: Tensor) -> Tensor:
        return self.net(point).squeeze(-1)


class FunctionalResidual(Physics):
    """The derivatives by torch.func, inside the model."""

    def forward(self, x: Tensor) -> Tensor:
        curvature = torch.func.vmap(torch.func.hessian(self.at))(x)
        return curvature.reshape(len(x), 1) + self.net(x)


class AutogradResidual(Physics):
    """The derivatives by torch.autograd.grad, inside the model."""

    def forward(self, x: Tensor) -> Tensor:
        x = x.detach().requires_grad_()
        value = self.net(x)
        (slope,) = torch.autograd.grad(value.sum(), x, create_graph=True)
        (curvature,) = torch.autograd.grad(slope.sum(), x, create_graph=True)
        return curvature + value


class Branching(nn.Module):
    """Control flow that looks at values."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.body(x))
        if hidden.abs().max().item() > 10:
            hidden = hidden / 10
        return self.head(hidden)


class SampleLoss(nn.Module):
    """The cross entropy of each sample as output."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3))

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(self.net(x), labels, reduction="none")


class TokenLoss(nn.Module):
    """The cross entropy of each token as output."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.body, self.head = nn.Embedding(6, 4), nn.Linear(4, 4), nn.Linear(4, 6)

    def forward(self, tokens: Tensor, labels: Tensor) -> Tensor:
        scores = self.head(torch.tanh(self.body(self.embed(tokens))))  # (B, T, 6)
        return F.cross_entropy(scores.transpose(1, 2), labels, reduction="none", ignore_index=-100)


class HiddenNoGrad(nn.Module):
    """A part of the model under torch.no_grad, where .detach() was meant."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(3, 4), nn.Linear(4, 2)
        self.detach = False

    def forward(self, x: Tensor) -> Tensor:
        if self.detach:
            scale = self.body(x).mean(1, keepdim=True).detach()
        else:
            with torch.no_grad():
                scale = self.body(x).mean(1, keepdim=True)
        return self.head(torch.tanh(self.body(x)) * scale)


class FunctionalDropout(nn.Module):
    """F.dropout, which does not know about eval()."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(3, 8), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.dropout(self.body(x), 0.5))
