"""Which of several networks is best conditioned, and which trains lazily?

Run as: python examples/scores.py
"""

from __future__ import annotations

import torch
from torch import nn

import ntkops


def main() -> None:
    x = torch.randn(20, 6, generator=torch.Generator().manual_seed(0)).double()
    models = {}
    for width in (16, 64, 256):
        torch.manual_seed(0)
        models[f"width {width}"] = nn.Sequential(nn.Linear(6, width), nn.Tanh(), nn.Linear(width, 3)).double()
    table = ntkops.compare(models, x, ("trace", "condition_number", "effective_rank"))
    print(table)
    print("by their traces:", ", ".join(table.order("trace")))
    for name, model in models.items():
        print(f"{name}: root mean square of |second derivative| {ntkops.hessian_norm(model, x)}")
    first, last = (ntkops.ntk(model, x) for model in (models["width 16"], models["width 256"]))
    print("alignment, centred over samples:", ntkops.alignment(first, last, center="samples"))


if __name__ == "__main__":
    main()
