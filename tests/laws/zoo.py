"""The networks that every law is held on: few parameters, and every way in which a layer is used."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tests.cases import BY_NAME, Case

__all__ = ["ZOO"]


class CellLoop(nn.Module):
    """A cell called at every step: each of its parameters is used as often as there are steps."""

    def __init__(self) -> None:
        super().__init__()
        self.cell, self.head = nn.GRUCell(2, 3), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        hidden = x.new_zeros(len(x), 3)
        for now in x.unbind(1):
            hidden = self.cell(now, hidden)
        return self.head(hidden)


class PaddedTied(nn.Module):
    """Words with a padding row, which is left alone by the lookup but not by the head that shares it."""

    def __init__(self, tied: bool) -> None:
        super().__init__()
        self.embed = nn.Embedding(5, 3, padding_idx=0)
        self.mix, self.head = nn.Linear(3, 3), nn.Linear(3, 5, bias=False)
        if tied:
            self.head.weight = self.embed.weight
        with torch.no_grad():
            self.embed.weight[0] = torch.randn(3)  # as if training had begun from a row that is not zero

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(torch.tanh(self.mix(self.embed(tokens))).mean(1))


class Mixed(nn.Module):
    """Several in one: tied words, a convolution over time, a layer used twice, a free weight."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(4, 3)
        self.convolution = nn.Conv1d(3, 2, 2)
        self.again = nn.Linear(2, 2)
        self.gain = nn.Parameter(torch.tensor([1.3, 0.8, -0.9]))
        self.up, self.head = nn.Linear(2, 3), nn.Linear(3, 4)
        self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor, scale: Tensor) -> Tensor:
        hidden = self.gain * self.embed(tokens) * scale[:, None, None]
        hidden = torch.tanh(self.convolution(hidden.mT)).mT
        hidden = self.again(torch.tanh(self.again(hidden)))
        return self.head(torch.tanh(self.up(hidden)).mean(1))[:, 1:]


def _words(count: int) -> Tensor:
    tokens = torch.randint(1, 5, (count, 3))
    tokens[:, -1] *= (torch.arange(count) > 0).long()  # padding in all samples but the first
    return tokens


_OWN = (
    Case("loop", CellLoop, lambda n: torch.randn(n, 3, 2)),
    Case("padded", lambda: PaddedTied(False), _words),
    Case("padded tied", lambda: PaddedTied(True), _words),
    Case("mixed", Mixed, lambda n: (torch.randint(0, 4, (n, 3)), torch.randn(n))),
)
_KNOWN = ("mlp", "conv", "tied", "shared", "gru-time", "attention", "dict", "adapter", "scalar", "frozen")
ZOO = {case.name: case for case in (*(BY_NAME[name] for name in _KNOWN), *_OWN)}
