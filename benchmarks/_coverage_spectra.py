"""Spectra on which intervals are tried, and operators that have them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from linear_operator.operators import LinearOperator
from torch import Tensor, nn

import ntkops
from ntkops.engines import report_passes
from ntkops.operators.capabilities import Capabilities

__all__ = ["HELD_OUT", "Known", "network_spectra", "networks", "turned"]


def _indices(n: int) -> Tensor:
    return torch.arange(1, n + 1, dtype=torch.float64)


def _levels(n: int, *parts: tuple[int, float]) -> Tensor:
    """Return values level by level: (count, value), the last level filling up."""
    values = torch.full((n,), parts[-1][1], dtype=torch.float64)
    start = 0
    for count, value in parts[:-1]:
        values[start : start + count] = value
        start += count
    return values


# No rule of an estimator was set on any of these: the quantiles come from squares of normal variables.
HELD_OUT: Mapping[str, Callable[[int], Tensor]] = {
    "power law 1/2": lambda n: _indices(n) ** -0.5,
    "power law 1": lambda n: _indices(n) ** -1.0,
    "power law 2": lambda n: _indices(n) ** -2.0,
    "exponential": lambda n: 0.7 ** _indices(n),
    "slow exponential": lambda n: 0.97 ** _indices(n),
    "step": lambda n: _levels(n, (n // 10, 1.0), (0, 1e-3)),
    "high step": lambda n: _levels(n, (n // 10, 1.0), (0, 0.1)),
    "clusters": lambda n: _levels(n, (2, 10.0), (7, 3.0), (20, 1.0), (0, 0.01)),
    "spike": lambda n: _levels(n, (1, float(n)), (0, 1.0)),
    "three spikes": lambda n: _levels(n, (3, float(n)), (0, 0.3)),
    "flat": lambda n: 1.0 + 0.1 * torch.sin(_indices(n)),
    "cliff at 9": lambda n: _levels(n, (9, 1.0), (0, 0.0)),
    "cliff at 30": lambda n: _levels(n, (30, 1.0), (0, 1e-9)),
}


def networks(samples: int = 24) -> dict[str, tuple[nn.Module, Tensor]]:
    """Return three small networks after a few steps of training, with their samples."""
    generator = torch.Generator().manual_seed(7)

    def data(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    cases: dict[str, tuple[Callable[[], nn.Module], Tensor]] = {
        "trained MLP": (_mlp, data(samples, 8)),
        "trained CNN": (_cnn, data(samples, 1, 8, 8)),
        "trained GRU": (_States, data(samples // 4, 5, 3)),
    }
    return {name: (_trained(make, x), x) for name, (make, x) in cases.items()}


def _trained(make: Callable[[], nn.Module], x: Tensor) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = make().double()
        optimizer = torch.optim.Adam(model.parameters(), 1e-2)
        target = torch.sin(x.flatten(1).sum(1))
        for _ in range(60):
            optimizer.zero_grad()
            (model(x).flatten(1).mean(1) - target).square().mean().backward()
            optimizer.step()
    return model


def network_spectra() -> dict[str, Tensor]:
    """Return the spectra of the kernels of `networks`."""
    return {
        name: torch.linalg.eigvalsh(ntkops.ntk(model, x).to_dense()).flip(0).detach().clamp(min=0)
        for name, (model, x) in networks().items()
    }


def _mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 5))


def _cnn() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 6, 3), nn.ReLU(), nn.Conv2d(6, 6, 3, stride=2), nn.ReLU(), nn.Flatten(), nn.Linear(24, 5)
    )


class _States(nn.Module):
    """Hidden states of a small GRU over time."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.GRU(3, 6, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        states: Tensor = self.cell(x)[0]
        return states


class Known(LinearOperator, Capabilities):
    """K = J Jᵀ by its factor, counting a vjp and a jvp a column, and refusing to become dense.

    Args:
        factor: J, ``(*batch, n, P)``. A batch of equal ones is so many runs at once: each entry has probes of
            its own.
    """

    def __init__(self, factor: Tensor) -> None:
        super().__init__(factor)
        self.factor = factor

    @classmethod
    def diagonal_of(cls, values: Tensor) -> Known:
        """Return the diagonal kernel with these eigenvalues, which stands for all with this spectrum."""
        return cls(torch.diag(values.sqrt()))

    def times(self, count: int) -> Known:
        """Return a batch of copies, for as many runs at once."""
        return Known(self.factor.expand(count, *self.factor.shape))

    def _size(self) -> torch.Size:
        return torch.Size((*self.factor.shape[:-1], self.factor.shape[-2]))

    def _matmul(self, rhs: Tensor) -> Tensor:
        made = rhs.shape[-1] * self.factor.shape[:-2].numel()
        report_passes(vjp=made, jvp=made)
        return self.factor @ (self.factor.mT @ rhs)

    def _transpose_nonbatch(self) -> Known:
        return self

    symmetric = True

    def factors(self) -> tuple[LinearOperator, LinearOperator]:
        """Return J twice."""
        factor = _Factor(self.factor)
        return factor, factor

    def exact_cost(self, quantity: str) -> float:
        """Return infinity: the exact value is out of reach."""
        return math.inf


class _Factor(LinearOperator):
    """J, or its transpose, by products alone."""

    def __init__(self, matrix: Tensor) -> None:
        super().__init__(matrix)
        self.matrix = matrix

    def _size(self) -> torch.Size:
        return self.matrix.shape

    def _matmul(self, rhs: Tensor) -> Tensor:
        return self.matrix @ rhs

    def _transpose_nonbatch(self) -> _Factor:
        return _Factor(self.matrix.mT)


def turned(values: Tensor, angle: float, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Return factors of two kernels: one diagonal, and another with its eigenvectors turned a little."""
    n = len(values)
    noise = torch.randn(n, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) / math.sqrt(
        n
    )
    turn = torch.matrix_exp(angle * (noise - noise.T))
    roots = values.sqrt()
    return torch.diag(roots), turn * roots
