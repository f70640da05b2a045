"""What a route holds does not grow with n beyond a few numbers a row: nothing n x n, nothing copied whole."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

import ntkops
from ntkops.distill import class_mean, local_global, select, synthesize
from ntkops.operators import nystrom_ntk

N, CLASSES, WIDTH, K_FEATURES = 1800, 3, 12, 10
BUDGET = 2 * 2**20
FEATURES = CLASSES * N * K_FEATURES * 4


def peak(work: Callable[[], Any]) -> int:
    """Return the most bytes of tensors that are held at a time of what is made inside."""
    with torch.no_grad(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        work()
    events = [event for event in found.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.fixture(scope="module", autouse=True)
def budget():
    ntkops.set_memory_budget(BUDGET)
    yield
    ntkops.set_memory_budget(None)


@pytest.fixture(scope="module")
def kernels(budget) -> tuple[Any, Any, Tensor]:
    """Lazy kernels, projected ones whose features are there, and labels."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(5, WIDTH), nn.Tanh(), nn.Linear(WIDTH, CLASSES))
        x, Y = torch.randn(N, 5), torch.randn(N, CLASSES)
    K = ntkops.ntk(model, x, outputs="each", max_dense_bytes=FEATURES)
    P = ntkops.projected_ntk(K, K_FEATURES, generator=seeded())
    P.features()
    return K, P, Y


ROUTES: dict[str, tuple[int, Callable[[Any, Any, Tensor], Callable[[], Any]]]] = {
    # Numbers of float64 a row that a route may hold beside its kernel, and the route.
    "random": (60, lambda K, P, Y: lambda: select(K, 20, "random", generator=seeded())),
    "columns of the mean": (60, lambda K, P, Y: lambda: select(K, 8, "rpcholesky", generator=seeded())),
    "farthest points": (60, lambda K, P, Y: lambda: select(K, 2, "fps", generator=seeded())),
    "projected columns": (90, lambda K, P, Y: lambda: select(P, 20, "rpcholesky", generator=seeded())),
    "leverage": (90, lambda K, P, Y: lambda: select(P, 20, "leverage", generator=seeded())),
    "k-medoids": (120, lambda K, P, Y: lambda: select(P, 20, "kmedoids", generator=seeded())),
    "algorithm 1": (150, lambda K, P, Y: lambda: local_global(P, Y, 4, 0.5, 0.5, generator=seeded())),
    "nystrom": (
        60, lambda K, P, Y: lambda: nystrom_ntk(K, "rpcholesky", num_inducing=8, generator=seeded())),
    "nystrom diagonal": (60, lambda K, P, Y: nystrom_ntk(K, range(10)).diagonal),
    "class mean": (60, lambda K, P, Y: lambda: class_mean(K) @ Y),
    "projected features": (60, lambda K, P, Y: ntkops.projected_ntk(K, K_FEATURES).features),
    "krylov": (90, lambda K, P, Y: lambda: synthesize(P, 6, "krylov", Y=Y, generator=seeded())),
    "ridge regression": (120, lambda K, P, Y: lambda: ntkops.KernelRidge(1e-2).fit(P, Y)),
    "distilled regression": (
        150, lambda K, P, Y: lambda: select(P, 10, "random", generator=seeded()).fit(P, Y)),
}  # fmt: skip


@pytest.mark.parametrize("route", ROUTES)
def test_a_route_holds_a_few_numbers_a_row(route, kernels) -> None:
    numbers, make = ROUTES[route]
    allowed = BUDGET + 8 * numbers * N  # the budget, and what the route may hold
    assert allowed < N * N * 4 / 3, "less than a dense kernel, or the test says nothing"
    most = peak(make(*kernels))
    assert most <= allowed, f"{most / 2**20:.1f} of {allowed / 2**20:.1f} MiB"
