"""Which layers of a network make up its kernel, and do they agree?

Run as: python examples/partition.py
"""

from __future__ import annotations

import torch
from torch import nn

import ntkops


def main() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(8, 16, 3, stride=2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(16 * 3 * 3, 10),
    )
    K = ntkops.ntk(model, torch.randn(40, 1, 8, 8))
    p = ntkops.partition(K)
    share = p.trace.value / p.trace.value.sum()
    for name, part, whole in zip(p.names, share, p.whole_alignment.value, strict=True):
        print(f"layer {name}: {part:.1%} of the trace, alignment with the whole kernel {whole:.3f}")
    print("alignment of layers with each other:")
    print(p.alignment.value.round(decimals=2))
    print("effective rank of the last layer alone:", ntkops.effective_rank(p["5"]))


if __name__ == "__main__":
    main()
