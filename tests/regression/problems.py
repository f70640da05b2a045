"""A small network, its samples, and dense references that never go through the package."""

import torch
from torch import Tensor, nn


def network(
    outputs: int = 3, inputs: int = 4, width: int = 12, dtype=torch.float64, seed: int = 0
) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(inputs, width), nn.Tanh(), nn.Linear(width, outputs)).to(dtype)


def samples(count: int, inputs: int = 4, dtype=torch.float64, seed: int = 1) -> Tensor:
    return torch.randn(count, inputs, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(
        dtype
    )


def reference_jacobian(model: nn.Module, x: Tensor) -> Tensor:
    """Return J, (N, O, P), by `torch.func.jacrev`."""
    params = {name: p.detach() for name, p in model.named_parameters()}
    blocks = torch.func.jacrev(lambda p: torch.func.functional_call(model, p, (x,)))(params)
    return torch.cat([b.flatten(2) for b in blocks.values()], dim=2).detach()


def gram(rank: int, size: int = 12, seed: int = 0, dtype=torch.float64) -> Tensor:
    """Return a random kernel of a given rank."""
    factor = torch.randn(size, rank, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (factor @ factor.mT).to(dtype)


def labels(*shape: int, seed: int = 7, dtype=torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)
