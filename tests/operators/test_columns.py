"""Columns that are taken are those of the dense kernel, and no product with unit columns."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from linear_operator.operators import DenseLinearOperator, LinearOperator
from torch import Tensor, nn

import ntkops
from ntkops.distill import class_mean
from ntkops.errors import InputError, NonFiniteError, OutOfRangeError
from ntkops.operators import nystrom_ntk
from ntkops.operators.capabilities import taken_columns
from tests.cases import REVERSE_ONLY

CHOSEN = torch.tensor([7, 0, 7, 3])


class Gated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.gate, self.last = nn.Linear(3, 6), nn.Linear(3, 6), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.sin(self.first(x)) * torch.sigmoid(self.gate(x)))


def rows_of_gradients(model: nn.Module, x: Tensor) -> Tensor:
    """Return ``(C, N, P)`` by torch.autograd alone."""
    parameters, found = list(model.parameters()), []
    for output in model(x).flatten():
        gradients = torch.autograd.grad(output, parameters, retain_graph=True)
        found.append(torch.cat([g.flatten() for g in gradients]))
    return torch.stack(found).unflatten(0, (len(x), -1)).transpose(0, 1)


@pytest.fixture(scope="module")
def problem() -> tuple[nn.Module, Tensor, Tensor]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        model, x = Gated().double(), torch.randn(9, 3, dtype=torch.float64)
    return model, x, rows_of_gradients(model, x)


KINDS: dict[str, Callable[[nn.Module, Tensor], LinearOperator]] = {
    "each": lambda model, x: ntkops.ntk(model, x, outputs="each"),
    "trace": lambda model, x: ntkops.ntk(model, x, outputs="trace"),
    "never dense": lambda model, x: ntkops.ntk(model, x, outputs="each", max_dense_bytes=0),
    "mean": lambda model, x: class_mean(ntkops.ntk(model, x, outputs="each")),
    "weighted mean": lambda model, x: class_mean(
        ntkops.ntk(model, x, outputs="each"), weights=torch.tensor([1.0, 3.0], dtype=torch.float64) / 4
    ),
    "sum": lambda model, x: ntkops.ntk(model, x, outputs="trace") * 2 + torch.eye(9, dtype=torch.float64),
    "ridge": lambda model, x: ntkops.ntk(model, x, outputs="trace").add_jitter(0.5),
    "stacked": lambda model, x: class_mean([ntkops.ntk(model, x, outputs=c) for c in (0, 1)]),
    "nystrom": lambda model, x: nystrom_ntk(ntkops.ntk(model, x, outputs="each"), range(9)),
    "dense": lambda model, x: DenseLinearOperator(ntkops.ntk(model, x, outputs="each").to_dense().detach()),
}


@pytest.mark.parametrize("chosen", [CHOSEN, CHOSEN[:1]], ids=["four", "one"])
@pytest.mark.parametrize("kind", KINDS)
def test_columns_are_those_of_a_reference_without_the_library(kind, chosen, problem) -> None:
    model, x, rows = problem
    each = rows @ rows.mT
    expected = {
        "trace": each.sum(0),
        "mean": each.mean(0),
        "weighted mean": 0.25 * each[0] + 0.75 * each[1],
        "sum": 2 * each.sum(0) + torch.eye(9, dtype=torch.float64),
        "ridge": each.sum(0) + 0.5 * torch.eye(9, dtype=torch.float64),
        "stacked": each.mean(0),
    }.get(kind, each)[..., chosen]
    found = taken_columns(KINDS[kind](model, x), chosen)
    assert found.shape == expected.shape
    assert not found.requires_grad
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-9 * float(each.abs().max()))


@pytest.mark.parametrize("limit", [None, 0])
@pytest.mark.parametrize("mean", [False, True])
def test_columns_of_a_projected_kernel(limit, mean, problem) -> None:
    model, x, rows = problem
    generator = torch.Generator().manual_seed(0)
    P = torch.randn(7, rows.shape[-1], dtype=torch.float64, generator=generator)
    K = ntkops.projected_ntk(ntkops.ntk(model, x, outputs="each"), P, max_dense_bytes=limit)
    expected = (rows @ P.mT @ (rows @ P.mT).mT)[..., CHOSEN]
    found = taken_columns(class_mean(K) if mean else K, CHOSEN)
    torch.testing.assert_close(found, expected.mean(0) if mean else expected, rtol=1e-9, atol=1e-9)


def test_a_column_of_a_networks_kernel_makes_no_product(problem) -> None:
    model, x, _ = problem
    K = ntkops.ntk(model, x, outputs="each", max_dense_bytes=0)
    with ntkops.count_passes() as passes:
        taken_columns(K, CHOSEN)
    assert passes.count.jvp == passes.count.vjp == 0


@pytest.mark.parametrize("outputs", ["each", "trace"])
def test_one_column_is_a_product_where_that_takes_fewer_passes(problem, outputs) -> None:
    model, x, _ = problem
    K = ntkops.ntk(model, x, outputs=outputs, max_dense_bytes=0)
    with ntkops.count_passes() as passes:
        taken_columns(K, CHOSEN[:1])
    assert passes.count.jvp == passes.count.vjp == 2  # one for each output, as a product with K has


@pytest.mark.parametrize("outputs", ["all", "each", "trace"])
@pytest.mark.parametrize("chosen", [[5], [3, 7, 9]])
def test_columns_of_a_model_without_j_come_from_tiles(chosen, outputs) -> None:
    torch.manual_seed(0)
    model, x = REVERSE_ONLY.make(), REVERSE_ONLY.data(20)
    wanted = ntkops.ntk(model, x, outputs=outputs).to_dense()[..., chosen]
    K = ntkops.ntk(model, x, outputs=outputs, max_dense_bytes=0)  # where a column is cheaper as a product
    found = taken_columns(K, torch.tensor(chosen))
    torch.testing.assert_close(found, wanted)


def test_a_column_that_is_not_finite_is_named() -> None:
    K = torch.eye(4)
    K[2, 3] = torch.nan
    with pytest.raises(NonFiniteError, match="column 3"):
        taken_columns(K, torch.tensor([0, 3]))


def test_columns_over_ranks_are_those_of_one_process(tmp_path, problem) -> None:
    import torch.distributed as dist

    model, x, _ = problem
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'meeting'}", rank=0, world_size=1)
    try:
        found = []
        for group in (None, "world"):
            K = ntkops.ntk(model, x, outputs="each", group=group)
            P = ntkops.projected_ntk(K, 5, generator=torch.Generator().manual_seed(0))
            found.append([taken_columns(kernel, CHOSEN) for kernel in (K, P)])
        torch.testing.assert_close(found[1], found[0], rtol=1e-9, atol=1e-9)
        with pytest.raises(OutOfRangeError, match="from 0 to 8"):
            taken_columns(K, torch.tensor([9]))
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("max_dense_bytes", [0, "auto"])
def test_columns_and_tiles_that_do_not_exist_are_refused(max_dense_bytes):
    model, x = torch.nn.Linear(3, 2), torch.randn(5, 3)
    dense = ntkops.ntk(model, x).to_dense()
    K = ntkops.ntk(model, x, max_dense_bytes=max_dense_bytes)
    if max_dense_bytes:
        K.to_dense()  # whose columns are then those that are stored
    torch.testing.assert_close(K.take_columns([3, -1, 3]), dense[:, [3, 9, 3]])
    with pytest.raises(OutOfRangeError, match="10 is out of range"):
        K.take_columns([10])
    with pytest.raises(InputError, match="at least one row"):
        list(K.tiles(-1))
