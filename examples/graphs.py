"""Does a network that sees the edges of a graph label its nodes better than one that does not?

Kernel regression with the node kernels of both, from a few labelled nodes, and on another graph.

Run as: python examples/graphs.py
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

import ntkops

CLASSES = 3


class Convolutions(nn.Module):
    """Two graph convolutions; with ``see=False`` every node is left alone."""

    def __init__(self, features: int, width: int, see: bool) -> None:
        super().__init__()
        self.first, self.last, self.see = nn.Linear(features, width), nn.Linear(width, CLASSES), see

    def forward(self, x: Tensor, adjacency: Tensor) -> Tensor:
        spread = adjacency if self.see else torch.eye(len(x))
        return spread @ self.last(torch.relu(spread @ self.first(x)))


def communities(nodes: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return features, a normalised adjacency, and the community of each node."""
    drawn = torch.Generator().manual_seed(seed)
    community = torch.arange(nodes) % CLASSES
    x = torch.randn(nodes, 8, generator=drawn)
    x[:, :CLASSES] += 0.7 * nn.functional.one_hot(community, CLASSES)
    likely = torch.where(community[:, None] == community, 0.15, 0.02)
    linked = (torch.rand(nodes, nodes, generator=drawn) < likely).float().triu(1)
    linked = linked + linked.mT + torch.eye(nodes)
    scale = linked.sum(1).rsqrt()
    return x, scale[:, None] * linked * scale, community


def main() -> None:
    x, adjacency, community = communities(120, seed=1)
    new_x, new_adjacency, new_community = communities(90, seed=2)
    train, test = torch.arange(24), torch.arange(24, 120)
    targets = nn.functional.one_hot(community[train], CLASSES).float()
    for see in (False, True):
        torch.manual_seed(0)
        model = Convolutions(8, 64, see)
        K = ntkops.ntk(model, (x, adjacency), batch_dim=None, outputs="trace")  # (nodes, nodes)
        known = K.submatrix(train, train)
        fit = ntkops.KernelRidge(1e-2).fit(known, targets)
        here = fit.predict(K.submatrix(test, train)).argmax(1) == community[test]
        there = fit.predict(known.cross((new_x, new_adjacency))).argmax(1) == new_community
        rates = f"{here.float().mean():.0%} of the other nodes, {there.float().mean():.0%} of another graph"
        print(f"{'with' if see else 'without'} edges: {rates}")


if __name__ == "__main__":
    main()
