"""Kernels of single weights, against the columns of a dense Jacobian."""

from __future__ import annotations

import pickle

import pytest
import torch
from torch import Tensor, nn

import ntkops
from ntkops import Entries
from ntkops.errors import OutOfRangeError, ParameterSelectionError, ParameterShapeError, UnknownParameterError

from ..laws.reference import close, jacobian, normal

TOLERANCES = {torch.float64: 1e-12, torch.float32: 2e-6}


def network(dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv1d(2, 3, 2), nn.Tanh(), nn.Flatten(), nn.Linear(9, 2)).to(dtype)


def data(count: int = 5, seed: int = 1) -> Tensor:
    return normal(count, 2, 4, seed=seed, dtype=torch.float32).double()


def columns(net: nn.Module, x: Tensor, chosen: dict[str, list[int]]) -> Tensor:
    names = [name for name, _ in net.named_parameters()]
    parts = dict(zip(names, jacobian(net, x).split([p.numel() for p in net.parameters()], 1), strict=True))
    return torch.cat([parts[name][:, index] for name, index in chosen.items()], dim=1)


MASK = torch.arange(18).reshape(2, 9) % 4 == 1
CHOSEN = {"0.weight": [11, 0, 5], "3.weight": [1, 5, 9, 13, 17]}
GIVEN = {"3.weight": MASK, "0.weight": torch.tensor([-1, 0, 5])}


@pytest.mark.parametrize("engine", ["auto", "autograd"])
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_entries_are_columns(dtype, engine):
    net, x, tolerance = network(torch.float32).to(dtype), data().to(dtype), TOLERANCES[dtype]
    expected = columns(network(torch.float32).double(), data(), CHOSEN)
    J = ntkops.jacobian(net, x, params=Entries(GIVEN), engine=engine, max_dense_bytes=0)
    assert J.shape == (10, 8)
    p, v = normal(8, 3, seed=2), normal(10, 3, seed=3)
    close(J @ p.to(dtype), expected @ p, tolerance)
    close(J.mT @ v.to(dtype), expected.mT @ v, tolerance)
    K = ntkops.ntk(net, x, params=Entries(GIVEN), engine=engine)
    assert K.num_parameters == 8
    close(K.to_dense(), expected @ expected.mT, tolerance)
    close(ntkops.trace(K).value, expected.square().sum(), tolerance)
    new = data(3, 7)
    close(
        K.cross(new.to(dtype)).to_dense(),
        columns(network(torch.float32).double(), new, CHOSEN) @ expected.mT,
        tolerance,
    )


def test_all_entries_are_the_kernel_itself():
    net = network()
    every = {name: torch.ones_like(p, dtype=torch.bool) for name, p in net.named_parameters()}
    J = jacobian(net, data())
    close(ntkops.ntk(net, data(), params=Entries(every)).to_dense(), J @ J.mT, 1e-12)


def test_projections_partitions_casts_and_pickles():
    expected = columns(network(), data(), CHOSEN)
    K = ntkops.ntk(network(), data(), params=Entries(GIVEN))
    projection = ntkops.projections.Gaussian(8, 4, 3)
    features = projection.apply(expected)
    close(ntkops.projected_ntk(K, projection).to_dense(), features @ features.mT, 1e-12)
    p = ntkops.partition(K)
    assert p.names == ("0", "3")
    close(p.trace.value, torch.stack([expected[:, :3].square().sum(), expected[:, 3:].square().sum()]), 1e-12)
    close(p["3"].to_dense(), expected[:, 3:] @ expected[:, 3:].mT, 1e-12)
    close(K.to(torch.float32).to_dense(), expected @ expected.mT, 2e-6)
    close(p["3"].to(torch.float32).to_dense(), expected[:, 3:] @ expected[:, 3:].mT, 2e-6)
    close(pickle.loads(pickle.dumps(K)).to_dense(), expected @ expected.mT, 1e-12)


def test_derivatives_flow_to_the_whole_parameter():
    net = network()
    K = ntkops.ntk(net, data(), params=Entries({"0.weight": [11, 0, 5]}), differentiable=True)
    (found,) = torch.autograd.grad(K.to_dense().square().sum(), [net[0].weight])
    for place in ((0, 0, 0), (1, 0, 0)):  # an entry that is selected, and one that is not
        ends, step = [], 1e-5
        for sign in (1, -1):
            moved = network()
            with torch.no_grad():
                moved[0].weight[place] += sign * step
            rows = columns(moved, data(), {"0.weight": [11, 0, 5]})
            ends.append((rows @ rows.mT).square().sum())
        close(found[place], (ends[0] - ends[1]) / (2 * step), 1e-6)


def test_the_snapshot_is_independent_and_the_mask_is_copied():
    net, mask = network(), MASK.clone()
    K = ntkops.ntk(net, data(), params=Entries({"3.weight": mask}), max_dense_bytes=0)
    rows = columns(net, data(), {"3.weight": CHOSEN["3.weight"]})
    mask.zero_()
    with torch.no_grad():
        net[3].weight.zero_()
        net[0].weight.zero_()
    v = normal(10, 2, seed=3)
    close(K @ v, rows @ (rows.mT @ v), 1e-12)


def test_a_tied_weight_by_any_of_its_names():
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False)
            self.second.weight = self.first.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.second(torch.tanh(self.first(x)))

    torch.manual_seed(0)
    net, x = Tied().double(), normal(4, 3, seed=1)
    J = jacobian(net, x)[:, [2, 4]]
    close(ntkops.ntk(net, x, params=Entries({"second.weight": [2, 4]})).to_dense(), J @ J.mT, 1e-12)
    with pytest.raises(ParameterSelectionError, match="another name"):
        ntkops.ntk(net, x, params=Entries({"first.weight": [0], "second.weight": [1]}))


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: Entries([1, 2]), ParameterSelectionError, "a dict"),
        (lambda: Entries({}), ParameterSelectionError, "a dict"),
        (lambda: Entries({3: [0]}), ParameterSelectionError, "no name"),
        (lambda: Entries({"0.weight": "all"}), ParameterSelectionError, "boolean mask"),
        (lambda: Entries({"0.weight": torch.rand(3, 2, 2)}), ParameterSelectionError, "torch.float32"),
        (lambda: Entries({"0.weight": [[0, 1]]}), ParameterSelectionError, r"shape \(1, 2\)"),
        (
            lambda: ntkops.ntk(network(), data(), params=Entries({"0.weigth": [0]})),
            UnknownParameterError,
            "0.weight",
        ),
        (
            lambda: ntkops.ntk(network(), data(), params=Entries({"*.weight": [0]})),
            ParameterSelectionError,
            "pattern",
        ),
        (
            lambda: ntkops.ntk(network(), data(), params=Entries({"0.weight": MASK})),
            ParameterShapeError,
            r"\(2, 9\)",
        ),
        (
            lambda: ntkops.ntk(network(), data(), params=Entries({"0.weight": [12]})),
            OutOfRangeError,
            "position 12",
        ),
        (
            lambda: ntkops.ntk(network(), data(), params=Entries({"0.weight": [1, -11]})),
            ParameterSelectionError,
            "twice",
        ),
        (
            lambda: ntkops.ntk(network(), data(), params=Entries({"0.weight": []})),
            ParameterSelectionError,
            "no entry",
        ),
        (
            lambda: ntkops.ntk(lambda p, x: x * p["a"], data(), params=Entries({"a": [0]})),
            ParameterSelectionError,
            "a plain function",
        ),
    ],
)
def test_bad_entries(make, error, message):
    with pytest.raises(error, match=message):
        make()
