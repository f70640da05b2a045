"""How much of the kernel do the weights hold that magnitude pruning keeps?

Run as: python examples/entries.py
"""

from __future__ import annotations

import torch
from torch import nn

import ntkops


def main() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 4))
    x = torch.randn(30, 8)
    weights = {name: p.detach() for name, p in model.named_parameters() if p.dim() == 2}
    whole = ntkops.ntk(model, x, params=list(weights))
    for share in (0.5, 0.2, 0.05):
        masks = {name: w.abs() >= w.abs().flatten().quantile(1 - share) for name, w in weights.items()}
        K = ntkops.ntk(model, x, params=ntkops.Entries(masks))
        part, aligned = ntkops.trace(K) / ntkops.trace(whole), ntkops.alignment(K, whole)
        print(f"{K.num_parameters} weights: {part:.3f} of the trace, alignment {aligned:.3f}")


if __name__ == "__main__":
    main()
