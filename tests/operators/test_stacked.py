"""Several functions of the same parameters: stacks of Jacobians, and kernels with blocks."""

from __future__ import annotations

import functools
import math
import pickle

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, hessian, vmap

import ntkops
from ntkops.errors import DenseMemoryError, InputError, ParameterSelectionError, ShapeError, ZeroKernelError
from ntkops.operators.capabilities import capabilities

from ..laws.reference import close, jacobian, normal

TOLERANCES = {torch.float64: 1e-12, torch.float32: 1e-5}
NU, NR = 4, 9  # 13 rows


def network(dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(2, 7), nn.Tanh(), nn.Linear(7, 6), nn.Tanh(), nn.Linear(6, 1))
    return net.to(dtype)


def values(net: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach() for name, p in net.named_parameters()}


NET = network()


def solution(p: dict[str, Tensor], x: Tensor) -> Tensor:
    return functional_call(NET, p, (x,))


def residual(p: dict[str, Tensor], x: Tensor) -> Tensor:
    """The Laplacian plus a source."""
    second = vmap(hessian(lambda z: functional_call(NET, p, (z[None],))[0, 0]))(x)
    return second.diagonal(dim1=-2, dim2=-1).sum(-1) + torch.sin(x[:, 0])


def points(count: int, seed: int) -> Tensor:
    return normal(count, 2, seed=seed, dtype=torch.float32).double()


def plain_residual(net: nn.Module, x: Tensor) -> Tensor:
    """The same by autograd twice."""
    x = x.clone().requires_grad_()
    (first,) = torch.autograd.grad(net(x).sum(), x, create_graph=True)
    parts = [torch.autograd.grad(first[:, i].sum(), x, create_graph=True)[0][:, i] for i in range(2)]
    return parts[0] + parts[1] + torch.sin(x[:, 0])


class Residual(nn.Module):
    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        return plain_residual(self.net, x)


@functools.cache
def dense() -> dict[str, Tensor]:
    """Rows of J in float64 of the float32 values, by plain backward passes."""
    net = network(torch.float32).double()
    return {
        "u": jacobian(net, points(NU, 1)),
        "r": jacobian(Residual(net), points(NR, 2)),
        "v": jacobian(net, points(3, 5)),
    }


def stacked(dtype: torch.dtype = torch.float64, weights: object = None, **options: object) -> object:
    p = values(network(torch.float32).to(dtype))
    return ntkops.stack(
        {
            "u": ntkops.jacobian(solution, points(NU, 1).to(dtype), params=p, **options),
            "r": ntkops.jacobian(residual, points(NR, 2).to(dtype), params=p, **options),
        },
        weights,
    )


def square(**options: object) -> ntkops.BlockKernelOperator:
    J = stacked(**options)
    return J @ J.mT


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_blocks_traces_and_eigenvalues(dtype):
    J, tolerance = stacked(dtype), TOLERANCES[dtype]
    own = dense()
    rows = torch.cat([own["u"], own["r"]])
    expected = rows @ rows.mT
    K = J @ J.mT
    assert isinstance(K, ntkops.BlockKernelOperator) and K.blocks.names == ("u", "r")
    close(J.to_dense(), rows, tolerance)
    close(K.to_dense(), expected, tolerance)
    for a in own.keys() - {"v"}:
        for b in own.keys() - {"v"}:
            close(K.blocks[a, b].to_dense(), own[a] @ own[b].mT, tolerance)
    traces = torch.stack([own[name].square().sum() for name in ("u", "r")])
    found = (J @ J.mT).blocks.trace
    assert found.exact
    close(found.value, traces, tolerance)
    close(ntkops.eigsh(K, 3).values, torch.linalg.eigvalsh(expected).flip(0)[:3], 10 * tolerance)
    v = normal(NU + NR, 3, seed=3)
    lazy = stacked(dtype, max_dense_bytes=0)
    close((lazy @ lazy.mT) @ v.to(dtype), expected @ v, tolerance)
    close((lazy @ lazy.mT).diagonal(), expected.diagonal(), tolerance)
    close(ntkops.trace(lazy @ lazy.mT).value, expected.trace(), tolerance)


def test_balance_and_weights():
    K, own = square(), dense()
    traces = {name: float(own[name].square().sum()) for name in ("u", "r")}
    total = sum(traces.values())
    w = ntkops.balance(K)
    assert w == pytest.approx({name: total / trace for name, trace in traces.items()}, rel=1e-12)
    means = {"u": traces["u"] / NU, "r": traces["r"] / NR}
    mean = ntkops.balance(K, per="mean")
    assert mean == pytest.approx({name: sum(means.values()) / m for name, m in means.items()}, rel=1e-12)
    scale = torch.tensor([w["u"]] * NU + [w["r"]] * NR, dtype=torch.float64).sqrt()
    rows = torch.cat([own["u"], own["r"]]) * scale[:, None]
    expected = rows @ rows.mT
    for weighted in (K.weighted(w), K.weighted(list(w.values())), square(weights=w)):
        close(weighted.to_dense(), expected, 1e-12)
        close(weighted.blocks.trace.value, torch.tensor([total, total], dtype=torch.float64), 1e-12)
    close(K.weighted(w).blocks["u", "r"].to_dense(), expected[:NU, NU:], 1e-12)
    twice = K.weighted(w).weighted({"u": 2.0, "r": 1.0})
    close(twice.blocks["u", "u"].to_dense(), 2 * expected[:NU, :NU], 1e-12)
    # The spectrum is that of K Λ, which weighted training has.
    spectrum = torch.linalg.eigvals((K.to_dense() * scale.square()).double()).real.sort().values
    close(torch.linalg.eigvalsh(K.weighted(w).to_dense()), spectrum, 1e-10)


def test_ridge_solves_and_regression():
    K = square()
    rows = torch.cat([dense()["u"], dense()["r"]])
    b = normal(NU + NR, 2, seed=4)
    ridge = rows @ rows.mT + 0.1 * torch.eye(NU + NR, dtype=torch.float64)
    close(K.add_jitter(0.1).solve(b), torch.linalg.solve(ridge, b), 1e-9)
    fit = ntkops.KernelRidge(0.1, relative=False).fit(K, b)
    new = ntkops.stack(
        {"v": ntkops.jacobian(solution, points(3, 5), params=values(network(torch.float32).double()))}
    )
    cross = new @ stacked().mT
    expected = dense()["v"] @ rows.mT
    close(cross.to_dense(), expected, 1e-12)
    close(cross.blocks["v", "r"].to_dense(), expected[:, NU:], 1e-12)
    close(fit.predict(cross), expected @ torch.linalg.solve(ridge, b), 1e-8)


def test_slices_casts_and_pickles():
    K = square()
    rows = torch.cat([dense()["u"], dense()["r"]])
    expected = rows @ rows.mT
    close(K[2:7, 1:].to_dense(), expected[2:7, 1:], 1e-12)
    close(K[5:, 5:].to_dense(), expected[5:, 5:], 1e-12)
    numbers = torch.tensor([12, 0, 5])
    close(K[numbers][:, numbers] @ torch.eye(3).double(), expected[numbers][:, numbers], 1e-12)
    close(K[numbers, torch.tensor([1, 1, 7])], expected[numbers, torch.tensor([1, 1, 7])], 1e-12)
    close(K.to(torch.float32).to_dense(), expected, 1e-5)
    again = pickle.loads(pickle.dumps(K))
    assert again.blocks.names == ("u", "r")
    close(again.to_dense(), expected, 1e-12)
    assert capabilities(again).symmetric
    with pytest.raises(DenseMemoryError):
        small = stacked(max_dense_bytes=0)
        (small @ small.mT).to_dense()


def test_cat_makes_the_same():
    p = values(network(torch.float32).double())
    parts = [
        ntkops.jacobian(solution, points(NU, 1), params=p),
        ntkops.jacobian(residual, points(NR, 2), params=p),
    ]
    J = torch.cat(parts)
    rows = torch.cat([dense()["u"], dense()["r"]])
    K = J @ J.mT
    assert K.blocks.names == ("0", "1")
    close(K.to_dense(), rows @ rows.mT, 1e-12)
    nested = torch.cat([parts[0], torch.cat(parts)])
    both = torch.cat([dense()["u"], rows])
    close((nested @ nested.mT).to_dense(), both @ both.mT, 1e-12)
    block = parts[0] @ parts[1].mT
    close(block.to_dense(), dense()["u"] @ dense()["r"].mT, 1e-12)


def test_modules_and_functions_of_the_same_parameters():
    net = network()
    J = ntkops.stack(
        {
            "u": ntkops.jacobian(net, points(NU, 1)),
            "r": ntkops.jacobian(residual, points(NR, 2), params=dict(net.named_parameters())),
        }
    )
    rows = torch.cat([jacobian(net, points(NU, 1)), jacobian(Residual(net), points(NR, 2))])
    close((J @ J.mT).to_dense(), rows @ rows.mT, 1e-12)


def test_a_product_takes_a_vjp_and_a_jvp_for_each_function():
    J = stacked(max_dense_bytes=0, engine="autograd")
    K = J @ J.mT
    with ntkops.count_passes() as counter:
        K @ normal(NU + NR, 3, seed=3)
    assert counter.count.vjp == 6 and counter.count.jvp == 6 and counter.total == 12


def other_values() -> dict[str, Tensor]:
    p = values(network())
    return {**p, "0.bias": p["0.bias"] + 1e-3}


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda J: ntkops.stack({}), InputError, "no Jacobian"),
        (lambda J: ntkops.stack({"u": J @ J.mT}), InputError, "'u' is a NTKOperator"),
        (lambda J: ntkops.stack({"u": J, "r": J.mT}), InputError, "'r' is a JacobianOperator of shape"),
        (lambda J: ntkops.stack({"u": J[:, :5]}), InputError, "some columns"),
        (lambda J: ntkops.stack({1: J}), InputError, "is no string"),
        (lambda J: ntkops.stack({"u": J}, {"v": 1.0}), InputError, "the functions are"),
        (lambda J: ntkops.stack({"u": J}, [1.0, 2.0]), InputError, "2 weights are given for 1"),
        (lambda J: ntkops.stack({"u": J}, {"u": 0.0}), InputError, "not a positive"),
        (lambda J: ntkops.stack({"u": J}, {"u": math.nan}), InputError, "not a positive"),
        (lambda J: ntkops.stack({"u": J}, 3.0), InputError, "pass a number for each"),
        (lambda J: ntkops.balance(J @ J.mT), InputError, "the kernel of a stack"),
        (lambda J: ntkops.balance(square(), per="median"), InputError, "'sum' or 'mean'"),
        (lambda J: (square()).blocks["u"], InputError, "name the functions"),
        (lambda J: (square()).blocks["u", "w"], InputError, "no function 'w'"),
        (
            lambda J: ntkops.stack({"each": ntkops.ntk(NET, points(3, 1), outputs="each").left}),
            ShapeError,
            "batch",
        ),
    ],
)
def test_bad_stacks(make, error, message):
    with pytest.raises(error, match=message):
        make(ntkops.jacobian(solution, points(NU, 1), params=values(network())))


@pytest.mark.parametrize(
    "other",
    [
        lambda: ntkops.jacobian(residual, points(NR, 2), params=other_values()),
        lambda: ntkops.jacobian(network(), points(3, 1), params=["0.*", "2.*"]),
        lambda: ntkops.jacobian(nn.Sequential(nn.Linear(2, 7), nn.Linear(7, 1)).double(), points(3, 1)),
    ],
    ids=["values", "selection", "model"],
)
def test_other_parameters_are_refused(other):
    J, strange = ntkops.jacobian(solution, points(NU, 1), params=values(network())), other()
    with pytest.raises(
        ParameterSelectionError, match=r"'u' and 'r' have different .*(0.bias|6 and 4|2.weight)"
    ):
        ntkops.stack({"u": J, "r": strange})
    if strange.shape[1] == J.shape[1]:
        with pytest.raises(ParameterSelectionError, match="to_dense"):
            torch.cat([J, strange])
        with pytest.raises(ParameterSelectionError, match="to_dense"):
            J @ strange.mT


def test_a_constant_residual_has_no_weight():
    net = network()
    p = values(net)
    constant = ntkops.jacobian(lambda q, x: 0 * solution(q, x) + 1, points(3, 1), params=p)
    J = ntkops.stack({"u": ntkops.jacobian(solution, points(NU, 1), params=p), "c": constant})
    with pytest.raises(ZeroKernelError, match="'c' is zero"):
        ntkops.balance(J @ J.mT)


def test_copies_keep_the_names():
    net = network()
    p = values(net)
    parts = {name: ntkops.jacobian(solution, points(n, 1), params=p) for name, n in (("u", NU), ("v", 2))}
    J = ntkops.stack(parts)
    for copy in (J.clone(), J.detach(), (J @ J.mT).clone(), (J @ J.mT).detach()):
        K = copy if copy.shape[0] == copy.shape[1] else copy @ copy.mT
        assert K.blocks["u", "v"].shape == (NU, 2)
