"""Fewer parameters than outputs: J is made column by column, by jvps of all samples."""

import pytest
import torch
from torch import nn

import ntkops
from ntkops.engines.autograd import AutogradEngine
from ntkops.engines.cost import KernelShape, tile_repeats

N, STEPS = 4, 6


class Loop(nn.Module):
    """A recurrent loop written by hand: 22 parameters, 18 outputs a sample."""

    def __init__(self, size: int = 3) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(size, size, bias=False), nn.Linear(2, size)
        self.gain = nn.Parameter(torch.ones(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = x.new_zeros(len(x), self.inner.in_features)
        states = []
        for step in range(x.shape[1]):
            h = torch.tanh(self.inner(h) + self.outer(x[:, step]) * self.gain.sum())
            states.append(h)
        return torch.stack(states, 1).flatten(1)


def made(params, dtype):
    torch.manual_seed(0)
    model, x = Loop().to(dtype), torch.randn(N, STEPS, 2, dtype=dtype)
    for name, p in model.named_parameters():
        p.requires_grad_(name in params)
    return model, x


def reference(model, x):
    """J in float64 by one backward pass an entry."""
    model, x = model.double(), x.double()
    chosen = [p for p in model.parameters() if p.requires_grad]
    rows = [
        torch.cat([g.flatten() for g in torch.autograd.grad(y, chosen, retain_graph=True)])
        for y in model(x).flatten()
    ]
    return torch.stack(rows)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(
    ("params", "by_columns"), [(("inner.weight",), True), (("inner.weight", "outer.weight", "gain"), False)]
)
def test_a_model_of_few_parameters_is_pushed_forward(params, by_columns, dtype, monkeypatch):
    calls = []
    plain = AutogradEngine._by_columns
    monkeypatch.setattr(AutogradEngine, "_by_columns", lambda *args: calls.append(1) or plain(*args))
    model, x = made(params, dtype)
    K = ntkops.ntk(model, x, engine="autograd")
    each = ntkops.ntk(model, x, engine="autograd", outputs="each")
    crossed = K.cross(x[:2]).to_dense()
    dense, diagonal, blocks = K.to_dense(), K.diagonal(), each.to_dense()
    assert bool(calls) == by_columns
    J = reference(model, x)
    tolerance = 1e-12 if dtype == torch.float64 else 2e-6

    def close(found, exact):
        assert float((found.double() - exact).norm() / exact.norm()) < tolerance

    close(dense, J @ J.T)
    close(diagonal, (J * J).sum(1))
    close(crossed, J[: 2 * STEPS * 3] @ J.T)
    parts = J.view(N, -1, J.shape[1]).transpose(0, 1)
    close(blocks, parts @ parts.mT)


def test_sizes_change_no_number():
    model, x = made(("inner.weight",), torch.float64)
    plain = ntkops.ntk(model, x, engine="autograd").to_dense()
    small = ntkops.ntk(model, x, engine="autograd", batch_size=3, chunk_size=2).to_dense()
    torch.testing.assert_close(small, plain, rtol=1e-13, atol=1e-13)


def test_a_recorded_kernel_is_differentiated_backward():
    model, x = made(("inner.weight",), torch.float64)
    K = ntkops.ntk(model, x, engine="autograd", differentiable=True)
    value = ntkops.trace(K, method="exact", differentiable=True).value
    (found,) = torch.autograd.grad(value, [model.inner.weight])
    step = 1e-6
    direction = torch.randn_like(found)

    def at(scale):
        with torch.no_grad():
            model.inner.weight += scale * direction
            exact = float(ntkops.ntk(model, x, engine="autograd").to_dense().diagonal().sum())
            model.inner.weight -= scale * direction
        return exact

    slope = (at(step) - at(-step)) / (2 * step)
    assert slope == pytest.approx(float((found * direction).sum()), rel=1e-6)


@pytest.mark.parametrize("samples", [1, 2, 3, 7])
@pytest.mark.parametrize("outputs", ["all", "each", "trace"])
def test_passes_of_tiles_that_meet_are_foreseen(samples, outputs, monkeypatch):
    """The passes that are really made, with tiles of so many samples with all outputs at a time."""
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)), torch.randn(7, 3)
    monkeypatch.setattr(AutogradEngine, "tile_samples", lambda self, rows: max(1, 2 * samples // rows))
    monkeypatch.setattr(AutogradEngine, "tile", lambda self, rows: 2 * samples // rows)
    K = ntkops.ntk(model, x, engine="autograd", outputs=outputs)
    shape = {
        "all": KernelShape(7, 7, 2, 2, symmetric=True),
        "each": KernelShape(7, 7, 1, 1, kernels=2, symmetric=True),
        "trace": KernelShape(7, 7, 1, 1, terms=2, symmetric=True),
    }[outputs]
    foreseen = 2 * tile_repeats(lambda rows: 2 * samples // rows, shape, 2)
    with ntkops.count_passes() as passes:
        K.to_dense()
    assert 0.7 * foreseen <= passes.total <= foreseen
