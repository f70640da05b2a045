"""The byte budget bounds what kernels and diagonals hold beyond model, samples and result."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

import ntkops
from ntkops.engines import source as sources
from ntkops.errors import InputError

BUDGET = 6 * 2**20


def peak(work: Callable[[], Tensor]) -> tuple[int, Tensor]:
    """Return the most bytes of tensors that are held at a time of what is made inside, and the result."""
    with torch.no_grad(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        result = work()
    events = [event for event in found.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most, result


@pytest.fixture
def budget() -> Iterator[int]:
    ntkops.set_memory_budget(BUDGET)
    yield BUDGET
    ntkops.set_memory_budget(None)


class Deep(nn.Module):
    """Convolutions whose graph and output gradients, of all samples and outputs, fill the budget."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(2, 16, 3, padding=1)
        self.layers = nn.ModuleList(nn.Conv2d(16, 16, 3, padding=1) for _ in range(8))
        self.head = nn.Linear(16, 6)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.stem(x))
        for layer in self.layers:
            h = h + torch.tanh(layer(h))
        return self.head(h.mean((2, 3)))


N, SIDE, WIDTH = 12, 8, 6
ROUTES = {
    "sweep": lambda model, x: ntkops.ntk(model, x).to_dense,
    "trace": lambda model, x: ntkops.ntk(model, x, outputs="trace").to_dense,
    "each": lambda model, x: ntkops.ntk(model, x, outputs="each").to_dense,
    "cross": lambda model, x: ntkops.ntk(model, x, x.flip(0)).to_dense,
    "diagonal": lambda model, x: ntkops.ntk(model, x).diagonal,
    "product": lambda model, x: partial(torch.matmul, ntkops.ntk(model, x), columns(8)),
    "product of many columns": lambda model, x: partial(torch.matmul, ntkops.ntk(model, x), columns(200)),
    "vjp": lambda model, x: partial(torch.matmul, ntkops.jacobian(model, x).mT, columns(3)),
    "dense by differentiation": lambda model, x: ntkops.ntk(model, x[:4], engine="autograd").to_dense,
    "product by differentiation": lambda model, x: partial(
        torch.matmul, ntkops.ntk(model, x, engine="autograd"), columns(8)
    ),
}


def columns(count: int) -> Tensor:
    return torch.randn(N * WIDTH, count, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("route", ROUTES)
def test_a_route_stays_inside_the_budget(route, budget, monkeypatch):
    monkeypatch.setattr(sources, "_STAGE_BYTES", 2**18)
    torch.manual_seed(0)
    model, x = Deep(), torch.randn(N, 2, SIDE, SIDE)
    most, result = peak(ROUTES[route](model, x))
    own = result.numel() * result.element_size()
    assert most <= budget + own, f"{most / 2**20:.1f} MiB"


def test_products_with_a_small_budget_make_no_kernel_of_many_tiles(budget):
    """A dense block of N / 2 tiles and one output at a time takes ten times the passes of eight columns."""
    torch.manual_seed(0)
    model, x = Deep(), torch.randn(N, 2, SIDE, SIDE)
    K = ntkops.ntk(model, x)
    with ntkops.count_passes() as passes, torch.no_grad():
        found = K @ columns(8)
    assert passes.total <= 2 * 8
    ntkops.set_memory_budget(None)
    exact = ntkops.ntk(model.double(), x.double()).to_dense() @ columns(8).double()
    assert float((found.double() - exact).norm() / exact.norm()) < 1e-6


def test_budgets_are_numbers_of_bytes():
    for wrong in (0, -1, 1.5, True, "1 GB"):
        with pytest.raises(InputError, match="number of bytes"):
            ntkops.set_memory_budget(wrong)
