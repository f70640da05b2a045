"""How curved is the loss of a classifier, and is the empirical Fisher the Fisher?

Run as: python examples/curvature.py
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import ntkops


def spirals(count: int) -> tuple[Tensor, Tensor]:
    """Return points of three noisy spiral arms, and the arm of each."""
    y = torch.arange(count) % 3
    radius = torch.rand(count).double() + 0.1
    angle = 3 * radius + 2 * math.pi / 3 * y + 0.2 * torch.randn(count).double()
    return torch.stack([radius * angle.cos(), radius * angle.sin()], 1), y


def main() -> None:
    torch.manual_seed(0)
    x, y = spirals(90)
    model = nn.Sequential(
        nn.Linear(2, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 3)
    ).double()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)

    for step in range(301):
        loss = F.cross_entropy(model(x), y)
        if step in (0, 300):
            G = ntkops.ggn(model, x)
            E = ntkops.ggn(model, x, targets=y, fisher="empirical")
            print(f"after {step} steps, loss {loss.item():.3f}: {G}")
            print(f"  eigenvalues {[round(v, 2) for v in ntkops.eigsh(G, 4).values.tolist()]}")
            print(f"  trace {ntkops.trace(G)}, effective rank {ntkops.effective_rank(G)}")
            print(f"  empirical Fisher: trace {ntkops.trace(E)}, alignment {ntkops.alignment(G, E)}")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    G = ntkops.ggn(model, x)
    weights = torch.cat([p.detach().flatten() for p in model.parameters()])
    fit = F.cross_entropy(model(x), y, reduction="sum").item()
    print(
        f"\nlog evidence of the Laplace approximation, from determinants of {tuple(G.function_space.shape)}:"
    )
    for precision in (0.01, 0.1, 1.0):
        volume = float(ntkops.logdet(G, precision)) - len(weights) * math.log(precision)
        evidence = -fit - precision / 2 * float(weights.square().sum()) - volume / 2
        print(f"  prior precision {precision}: {evidence:.1f}")


if __name__ == "__main__":
    main()
