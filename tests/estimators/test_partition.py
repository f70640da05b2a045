"""A kernel split by its parameters, against dense Jacobians whose columns are split."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn

import ntkops
from ntkops.errors import InputError, ShapeError, TiedPartsWarning, UnknownParameterError, ZeroKernelError

from ..laws.reference import close, jacobian, normal

TOLERANCES = {torch.float64: 1e-12, torch.float32: 2e-6}


class Mixed(nn.Module):
    """Convolutions with and without bias, a norm, a scale that no rule covers, and an unused layer."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv1d(2, 4, 3), nn.GroupNorm(2, 4), nn.Tanh(), nn.Conv1d(4, 3, 2, bias=False)
        )
        self.scale = nn.Parameter(torch.tensor([1.2, 0.7, 0.3]))
        self.head = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.body(x).mean(-1) * self.scale.sin()))


def network(dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(0)
    return Mixed().to(dtype)


def data(count: int = 4, seed: int = 1) -> Tensor:
    return normal(count, 2, 7, seed=seed, dtype=torch.float32).double()


PATTERNS = {"weights": ["*.weight", "scale"], "biases": "*.bias"}


def dense_parts(
    net: nn.Module, parts: dict[str, tuple[str, ...]], x: Tensor, x2: Tensor | None = None
) -> Tensor:
    """(L, n, m) kernels in float64 by plain backward passes."""
    net = copy.deepcopy(net).double()
    names = [name for name, _ in net.named_parameters()]
    sizes = [p.numel() for p in net.parameters()]
    left = dict(zip(names, jacobian(net, x).split(sizes, 1), strict=True))
    right = left if x2 is None else dict(zip(names, jacobian(net, x2).split(sizes, 1), strict=True))
    return torch.stack([sum(left[n] @ right[n].mT for n in own) for own in parts.values()])


def require_right(p: ntkops.Partition, K: Tensor, tolerance: float) -> None:
    inner = torch.einsum("aij,bij->ab", K, K)
    whole = K.sum(0)
    root = inner.diagonal().sqrt()
    close(p.inner.value, inner, tolerance)
    close(p.norm.value, root, tolerance)
    close(p.whole_norm.value, whole.norm(), tolerance)
    close(p.alignment.value, inner / root / root[:, None], tolerance)
    close(p.whole_alignment.value, inner.sum(1) / root / whole.norm(), tolerance)
    if K.shape[1] == K.shape[2]:
        close(p.trace.value, K.diagonal(dim1=1, dim2=2).sum(1), tolerance)
    assert p.trace.exact if K.shape[1] == K.shape[2] else p.norm.exact


@pytest.mark.parametrize("by", ["layer", PATTERNS], ids=["layer", "patterns"])
@pytest.mark.parametrize("engine", ["auto", "autograd", ntkops.Layerwise(kernel_route="gram")], ids=str)
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_parts_are_those_of_split_columns(by, engine, dtype):
    net = network(torch.float32).to(dtype)
    K = ntkops.ntk(net, data().to(dtype), engine=engine, max_dense_bytes=0)
    p = ntkops.partition(K, by=by)
    require_right(p, dense_parts(net, p.parameters, data()), TOLERANCES[dtype])


def test_names_of_layers():
    p = ntkops.partition(ntkops.ntk(network(), data()))
    assert p.names == ("scale", "body.0", "body.1", "body.3", "head")
    assert p.parameters["head"] == ("head.weight", "head.bias")
    assert ntkops.partition(ntkops.ntk(network(), data()), PATTERNS).names == ("weights", "biases")


def test_small_tiles_give_the_same(monkeypatch):
    K = ntkops.ntk(network(), data(9), max_dense_bytes=0)
    expected = dense_parts(network(), ntkops.partition(K).parameters, data(9))
    monkeypatch.setattr(type(K), "tile_size", lambda self, parts=1: 4)
    require_right(ntkops.partition(K), expected, 1e-12)
    some = K.submatrix([7, 0, 3, 12], [7, 0, 3, 12])
    rows = torch.tensor([7, 0, 3, 12])
    require_right(ntkops.partition(some), expected[:, rows][:, :, rows], 1e-12)


def test_cross_kernels_have_norms_and_no_trace():
    K = ntkops.ntk(network(), data(), data(3, 2))
    p = ntkops.partition(K)
    require_right(p, dense_parts(network(), p.parameters, data(), data(3, 2)), 1e-12)
    with pytest.raises(ShapeError, match="no trace"):
        _ = p.trace
    assert "squared norms" in repr(p)


def test_batches_of_kernels_and_streams():
    net = network()
    p = ntkops.partition(ntkops.ntk(net, data(), outputs="each"))
    K = dense_parts(net, p.parameters, data()).unflatten(1, (4, 2)).unflatten(3, (4, 2))
    each = torch.stack([K[:, :, c, :, c] for c in range(2)])  # (C, L, N, N)
    close(p.inner.value, torch.einsum("claij,cmaij->clm", each[:, :, None], each[:, :, None]), 1e-12)
    close(p.trace.value, each.diagonal(dim1=-2, dim2=-1).sum(-1), 1e-12)
    streamed = ntkops.partition(ntkops.ntk(net, [data()[:3], data()[3:]]))
    require_right(streamed, K.flatten(3).flatten(1, 2), 1e-12)


def test_the_kernel_of_a_part_is_lazy_and_right():
    net = network()
    K = ntkops.ntk(net, data(), max_dense_bytes=0)
    p = ntkops.partition(K)
    expected = dict(zip(p.names, dense_parts(net, p.parameters, data()), strict=True))
    v = normal(8, 2, seed=3)
    for name in p.names:
        close(p[name] @ v, expected[name] @ v, 1e-12)
        close(p[name].diagonal(), expected[name].diagonal(), 1e-12)
    part = p["body.0"]
    close(pickle.loads(pickle.dumps(part)) @ v, expected["body.0"] @ v, 1e-12)
    close(part.to(torch.float32) @ v.float(), expected["body.0"] @ v, 2e-6)
    close(sum(p[name] for name in p.names) @ v, sum(expected.values()) @ v, 1e-12)
    new = data(2, 5)
    close(part.cross(new) @ v, dense_parts(net, {"": p.parameters["body.0"]}, new, data())[0] @ v, 1e-12)


def test_one_sweep_takes_the_passes_of_one_kernel():
    K = ntkops.ntk(network(), data(), params=["body.0.*", "body.3.*", "head.*"])
    with ntkops.count_passes() as counter:
        p = ntkops.partition(K)
    assert counter.total == p.trace.passes == 2


def test_tied_parameters_belong_to_the_first_part():
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 3)
            self.second.weight = self.first.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.second(torch.tanh(self.first(x)))

    torch.manual_seed(0)
    net, x = Tied().double(), normal(4, 3, seed=1)
    K = ntkops.ntk(net, x)
    with pytest.warns(TiedPartsWarning, match=r"'first.weight' is tied, also named 'second.weight'"):
        p = ntkops.partition(K)
    assert p.parameters == {"first": ("first.weight", "first.bias"), "second": ("second.bias",)}
    require_right(p, dense_parts(net, p.parameters, x), 1e-12)
    with pytest.warns(TiedPartsWarning):
        ntkops.partition(K, {"second": "second.*", "first": "first.*"})
    alone = ntkops.partition(K, {"weight": "second.weight", "biases": "*.bias"})
    assert alone.parameters["weight"] == ("first.weight",)


def test_functions_have_parts_by_their_names():
    values = {"a.w": normal(3, seed=1), "a.b": normal(1, seed=2), "c": normal(1, seed=3)}
    K = ntkops.ntk(lambda q, x: (x @ q["a.w"] + q["a.b"]) * q["c"], normal(4, 3, seed=4), params=values)
    assert ntkops.partition(K).parameters == {"a": ("a.w", "a.b"), "c": ("c",)}


@pytest.mark.parametrize(
    ("by", "message"),
    [
        ("module", "pass 'layer'"),
        ({"all": "*", "head": "head.*"}, "both claim the parameter 'head.weight'"),
        ({"head": "head.*"}, "no part claims the parameters 'scale'"),
        ({"head": "head.*", "typo": "boddy.*"}, "no selected parameter has such a name"),
        ({"head": ["head.*", 3]}, "a pattern is a string"),
        ({"head": 3}, "a pattern"),
        ({}, "no part claims"),
    ],
)
def test_bad_parts(by, message):
    with pytest.raises(InputError, match=message):
        ntkops.partition(ntkops.ntk(network(), data()), by)


def test_bad_operators_and_names():
    K = ntkops.ntk(network(), data())
    for operator in (2 * K, torch.eye(3)):
        with pytest.raises(InputError, match="a kernel of ntkops.ntk"):
            ntkops.partition(operator)
    p = ntkops.partition(K)
    with pytest.raises(InputError, match="there is no part 'tail'"):
        _ = p["tail"]
    with pytest.raises(UnknownParameterError, match="'nothing'"):
        K.of_parameters(["nothing"])
    dead = network()
    with torch.no_grad():
        dead.head.weight.zero_()
    zero = ntkops.partition(ntkops.ntk(dead, data()))
    with pytest.raises(ZeroKernelError, match="'scale' is zero"):
        _ = zero.alignment
    assert float(zero.norm.value[0]) == 0


def test_bars():
    figures = pytest.importorskip("matplotlib.figure")
    p = ntkops.partition(ntkops.ntk(network(), data()))
    ax = ntkops.plotting.plot_partition(p, figures.Figure().subplots())
    assert [tick.get_text() for tick in ax.get_yticklabels()] == list(p.names)
    assert [bar.get_width() for bar in ax.patches] == p.trace.value.tolist()
    each = ntkops.partition(ntkops.ntk(network(), data(), outputs="each"))
    with pytest.raises(ShapeError, match="one kernel"):
        ntkops.plotting.plot_partition(each)
