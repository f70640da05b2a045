"""Kernels over axes by name: every axis, the samples included, is kept, summed over, or taken one by one."""

from __future__ import annotations

import functools
import itertools
import pickle

import pytest
import torch
from torch import Tensor, nn

import ntkops
from ntkops.errors import DenseMemoryError, InputError, ShapeError

from ..laws.reference import close, jacobian, normal

N, T, C = 3, 2, 3
AXES = ("time", "class")
TOLERANCES = {torch.float64: 1e-12, torch.float32: 2e-6}
CHOICES = ("all", "trace", "each")


class Sequences(nn.Module):
    """Outputs (N, T, C): rules cover all of it but the scale."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 5), nn.Linear(5, C)
        self.scale = nn.Parameter(torch.tensor(1.3))

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.first(x))
        return self.last(hidden.cumsum(1) * self.scale)


def model(dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(0)
    return Sequences().to(dtype)


@functools.cache
def point(dtype: torch.dtype) -> ntkops.Linearization:
    return ntkops.linearize(model(torch.float32).to(dtype))


def data(count: int = N, seed: int = 1, dtype: torch.dtype = torch.float64) -> Tensor:
    return normal(count, T, 4, seed=seed, dtype=torch.float32).to(dtype)


@functools.cache
def full(cross: bool = False) -> Tensor:
    """The dense kernel (N, T, C, M, T, C) in float64 of the float32 numbers."""
    net = model(torch.float32).double()
    right = jacobian(net, data())
    left = jacobian(net, data(4, 2)) if cross else right
    return (left @ right.mT).unflatten(1, (N, T, C)).unflatten(0, (-1, T, C))


def contracted(whole: Tensor, choice: dict[str, str]) -> Tensor:
    """What neural-tangents calls trace_axes and diagonal_axes, as one sum, not divided by sizes."""
    # The batch holds the samples first, then the other axes in their order.
    left, right, batch, rows, columns = "", "", "", "", ""
    for name, (one, other) in zip(("samples", *AXES), ("aA", "bB", "cC"), strict=True):
        kind = choice.get(name, "all")
        left, right = left + one, right + (other if kind == "all" else one)
        batch += one if kind == "each" else ""
        rows, columns = (rows + one, columns + other) if kind == "all" else (rows, columns)
    found = torch.einsum(f"{left}{right}->{batch}{rows}{columns}", whole)
    lead = found.shape[: len(batch)]
    return found.reshape(*lead, *(found.shape[len(lead) :][: len(rows)].numel(),), -1)


# A row for each of neural-tangents' (trace_axes, diagonal_axes) over the axes (0, 1, 2) of the output.
SQUARE = [dict(zip(("samples", *AXES), kinds, strict=True)) for kinds in itertools.product(CHOICES, repeat=3)]
CROSS = [dict(zip(AXES, kinds, strict=True)) for kinds in itertools.product(CHOICES, repeat=2)]


def row(choice: dict[str, str]) -> str:
    positions = {name: number for number, name in enumerate(("samples", *AXES))}
    traced = tuple(positions[name] for name, kind in choice.items() if kind == "trace")
    diagonal = tuple(positions[name] for name, kind in choice.items() if kind == "each")
    return f"trace_axes={traced} diagonal_axes={diagonal}".replace(" ", "_")


@pytest.mark.parametrize(("engine", "dtype"), [("auto", torch.float32), ("autograd", torch.float64)])
@pytest.mark.parametrize("choice", SQUARE, ids=row)
def test_every_choice_of_a_square_kernel(choice, engine, dtype):
    options = {"axes": AXES, "outputs": choice, "engine": engine}
    K = ntkops.ntk(point(dtype), data(dtype=dtype), **options)
    expected = contracted(full(), choice)
    close(K.to_dense(), expected, TOLERANCES[dtype])
    lazy = ntkops.ntk(point(dtype), data(dtype=dtype), **options, max_dense_bytes=0)
    close(lazy.diagonal(), expected.diagonal(dim1=-2, dim2=-1), TOLERANCES[dtype])
    v = normal(*expected.shape[:-1], 2, seed=3)
    close(lazy @ v.to(dtype), expected @ v, 4 * TOLERANCES[dtype])


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("choice", CROSS, ids=row)
def test_every_choice_of_a_cross_kernel(choice, dtype):
    new = data(4, 2, dtype)
    both = ntkops.ntk(point(dtype), new, data(dtype=dtype), axes=AXES, outputs=choice)
    later = ntkops.ntk(point(dtype), data(dtype=dtype), axes=AXES, outputs=choice).cross(new)
    expected = contracted(full(cross=True), choice)
    for K in (both, later):
        close(K.to_dense(), expected, TOLERANCES[dtype])
        v = normal(*expected.shape[:-2], expected.shape[-1], 2, seed=3)
        close(K @ v.to(dtype), expected @ v, 4 * TOLERANCES[dtype])


@pytest.mark.parametrize("kind", ["trace", "each"])
def test_samples_of_outputs_without_names(kind):
    K = ntkops.ntk(model(), data(), outputs={"samples": kind})
    J = jacobian(model(), data()).unflatten(0, (N, -1))
    own = J @ J.mT
    close(K.to_dense(), own if kind == "each" else own.sum(0), 1e-12)


@pytest.mark.parametrize("kind", ["trace", "each"])
def test_slices_of_kernels_of_samples(kind):
    K = ntkops.ntk(model(), data(), outputs={"samples": kind}, max_dense_bytes=0)
    J = jacobian(model(), data()).unflatten(0, (N, -1))
    own = J @ J.mT if kind == "each" else (J @ J.mT).sum(0)
    part = K[..., 1:4, :][..., :, torch.tensor([5, 0])]
    close(part @ torch.eye(2).double().expand(*own.shape[:-2], 2, 2), own[..., 1:4, [5, 0]], 1e-12)
    rows = torch.tensor([4, 0, 2])
    some = K.submatrix(rows, rows)
    close(some @ torch.eye(3).double().expand(*own.shape[:-2], 3, 3), own[..., rows, :][..., rows], 1e-12)
    if kind == "each":
        close(K[1] @ torch.eye(6).double(), own[1], 1e-12)


def test_kernels_of_samples_take_a_pass_an_output():
    K = ntkops.ntk(model(), data(20), outputs={"samples": "trace"}, max_dense_bytes=0)
    with ntkops.count_passes() as counter:
        traced = ntkops.trace(K)
    assert counter.total <= T * C + 1
    close(traced.value, jacobian(model(), data(20)).square().sum(), 1e-12)
    with pytest.raises(DenseMemoryError):
        K.to_dense()


def test_kernels_of_samples_in_compositions():
    K = ntkops.ntk(model(), data(), axes=AXES, outputs={"samples": "trace", "time": "trace"})
    J = jacobian(model(), data()).unflatten(0, (N, T, C))
    dense = torch.einsum("ntcp,ntdp->cd", J, J)
    b = normal(C, 1, seed=4)
    close(K.add_jitter(0.5).solve(b), torch.linalg.solve(dense + 0.5 * torch.eye(C), b), 1e-10)
    close((2 * K + K) @ b, 3 * dense @ b, 1e-12)
    close(ntkops.frobenius_norm(K).value, dense.norm(), 1e-10)
    close(pickle.loads(pickle.dumps(K)).to_dense(), dense, 1e-12)
    close(K.to(torch.float32).to_dense(), dense, 2e-6)


def test_kernels_of_samples_from_batches_and_differentiably():
    J = jacobian(model(), data()).unflatten(0, (N, -1))
    K = ntkops.ntk(model(), [data()[:2], data()[2:]], outputs={"samples": "each"})
    close(K.to_dense(), J @ J.mT, 1e-12)
    net = model()
    live = ntkops.ntk(net, data(), outputs={"samples": "trace"}, differentiable=True)
    (found,) = torch.autograd.grad(live.to_dense().square().sum(), [net.scale])
    step = 1e-5
    ends = []
    for sign in (1, -1):
        moved = model()
        with torch.no_grad():
            moved.scale += sign * step
        rows = jacobian(moved, data()).unflatten(0, (N, -1))
        ends.append((rows @ rows.mT).sum(0).square().sum())
    close(found, (ends[0] - ends[1]) / (2 * step), 1e-7)


def test_names_stay_with_the_rows():
    J = ntkops.jacobian(model(), data(), axes=AXES)
    K = J @ J.mT
    assert K.axes == {"time": T, "class": C}
    J0 = jacobian(model(), data()).unflatten(0, (N, T, C))
    expected = torch.einsum("ntcp,mtdp->ncmd", J0, J0).flatten(2).flatten(0, 1)
    close(ntkops.partial_trace(K, over="time").value, expected, 1e-12)
    some = ntkops.ntk(model(), data(), axes=AXES, outputs={"time": "trace"})
    assert some.axes == {"class": C} and some[: 2 * C, : 2 * C].axes == {"class": C}
    over = torch.einsum("ntcp,mtcp->nm", J0, J0)
    close(ntkops.partial_trace(some, over="class").value, over, 1e-12)
    assert some.submatrix([0, 4], [0, 4]).axes == {}
    assert ntkops.ntk(model(), data()).axes == {}


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"axes": ("time", "time")}, InputError, "must differ"),
        ({"axes": ("samples", "class")}, InputError, "'samples' is the name"),
        ({"axes": ("time",)}, ShapeError, r"shape \(2, 3\): name each of its 2 axes"),
        ({"axes": ("time", 1)}, InputError, "a list|pass names"),
        ({"axes": AXES, "outputs": {"clas": "each"}}, InputError, "'samples', 'time', 'class'"),
        ({"outputs": {"time": "each"}}, InputError, "with axes="),
        ({"axes": AXES, "outputs": {"time": "sum"}}, InputError, "'all', 'each' or 'trace'"),
        ({"axes": AXES, "outputs": {"time": 1}}, InputError, "'all', 'each' or 'trace'"),
        ({"outputs": {"samples": "trace"}, "x2": data()}, InputError, "square"),
        ({"outputs": {"samples": "each"}, "group": "world"}, InputError, "one process"),
    ],
)
def test_bad_input(options, error, message):
    with pytest.raises(error, match=message):
        ntkops.ntk(model(), data(), **options)
