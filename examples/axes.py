"""Which times, and which classes, of a sequence model share what they learn?

Run as: python examples/axes.py
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

import ntkops


class Tagger(nn.Module):
    """A class at every time."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.GRU(4, 16, batch_first=True)
        self.head = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        states, _ = self.body(x)
        return self.head(states)


def main() -> None:
    torch.manual_seed(0)
    model, x = Tagger(), torch.randn(20, 6, 4)
    axes = ("time", "class")

    each = ntkops.ntk(model, x, axes=axes, outputs={"time": "trace", "class": "each"})
    print("one kernel between samples a class", tuple(each.shape), ntkops.trace(each).value)

    times = ntkops.ntk(model, x, axes=axes, outputs={"samples": "trace", "class": "trace"})
    dense = times.to_dense()
    scale = dense.diagonal().sqrt()
    print("how much times move together:")
    print((dense / scale / scale[:, None]).round(decimals=2))

    K = ntkops.ntk(model, x, axes=axes)
    print("classes, summed over samples and times:")
    print(ntkops.partial_trace(K, over=("samples", "time")).value.round(decimals=1))


if __name__ == "__main__":
    main()
