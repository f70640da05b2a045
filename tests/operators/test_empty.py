"""Layers of width zero, parameters without entries, outputs of none: right, or told."""

import gc

import pytest
import torch
from torch import nn

import ntkops
from ntkops.errors import OutputError, ParameterSelectionError


class Beside(nn.Module):
    """A layer beside a parameter of some shape, which is used or not."""

    def __init__(self, shape, used):
        super().__init__()
        self.layer, self.empty, self.used = nn.Linear(3, 2), nn.Parameter(torch.zeros(shape)), used

    def forward(self, x):
        return self.layer(x) + (self.empty.sum() if self.used else 0)


# torch says of every layer of width zero that its entries are not drawn.
pytestmark = pytest.mark.filterwarnings("ignore:Initializing zero-element tensors:UserWarning")


def tokens():
    return torch.tensor([[0, 1, 3], [2, 2, 1], [3, 0, 0], [1, 1, 2], [0, 3, 2]])


def samples(*shape):
    return torch.randn(5, *shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


MODELS = {
    "no inputs": lambda: (nn.Linear(0, 2), samples(0)),
    "hidden": lambda: (nn.Sequential(nn.Linear(3, 0), nn.Tanh(), nn.Linear(0, 2)), samples(3)),
    "deep": lambda: (nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 0), nn.Linear(0, 6)), samples(3)),
    "norm": lambda: (nn.Sequential(nn.Linear(3, 0), nn.LayerNorm(0), nn.Linear(0, 2)), samples(3)),
    "embedding": lambda: (nn.Sequential(nn.Embedding(4, 0), nn.Flatten(), nn.Linear(0, 2)), tokens()),
    "positions": lambda: (nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 0), nn.Linear(0, 2)), samples(2, 3)),
    "beside": lambda: (Beside((0, 4), used=False), samples(3)),
    "beside and used": lambda: (Beside((0,), used=True), samples(3)),
}


def dense_jacobian(model, x):
    names, values = zip(*((n, p.detach()) for n, p in model.named_parameters()), strict=True)

    def outputs(*params):
        return torch.func.functional_call(model, dict(zip(names, params, strict=True)), (x,)).flatten()

    parts = torch.autograd.functional.jacobian(outputs, values)
    return torch.cat([part.flatten(1) for part in parts], dim=1)


@pytest.mark.parametrize("engine", ["auto", "autograd", "layerwise"])
@pytest.mark.parametrize("name", MODELS)
def test_width_zero_is_right(name, engine):
    torch.manual_seed(0)
    model, x = MODELS[name]()
    model = model.double()
    J, shared = dense_jacobian(model, x), ntkops.linearize(model)
    K, count = J @ J.T, len(x)
    blocks = K.reshape(count, -1, count, K.shape[0] // count)
    expected = {"all": K, "each": blocks.permute(1, 3, 0, 2).diagonal().permute(2, 0, 1)}
    expected["trace"] = expected["each"].sum(0)
    for outputs, dense in expected.items():
        v = torch.ones(*dense.shape[:-2], dense.shape[-1], 2, dtype=torch.float64)
        for limit in ("auto", 0):
            found = ntkops.ntk(shared, x, outputs=outputs, engine=engine, max_dense_bytes=limit)
            torch.testing.assert_close(found @ v, dense @ v)
            torch.testing.assert_close(found.diagonal(), dense.diagonal(dim1=-2, dim2=-1))
        torch.testing.assert_close(ntkops.ntk(shared, x, outputs=outputs, engine=engine).to_dense(), dense)
    found = ntkops.jacobian(shared, x, engine=engine)
    torch.testing.assert_close(found.to_dense(), J)
    torch.testing.assert_close(found @ J.T, K)
    torch.testing.assert_close(found.mT @ K, J.T @ K)
    one = samples(1)[:1].expand(J.shape[0], 1)
    torch.testing.assert_close(found.mT @ one[:, 0], J.T @ one[:, 0])


@pytest.mark.parametrize("engine", ["auto", "autograd", "layerwise"])
def test_nothing_at_all_is_told(engine):
    for model in (nn.Linear(0, 2, bias=False), nn.Linear(3, 0)):
        with pytest.raises(ParameterSelectionError, match="no entries"):
            ntkops.ntk(model, torch.ones(4, model.in_features), engine=engine)
    with pytest.raises(ParameterSelectionError, match="'w'"):
        ntkops.ntk(lambda p, x: x @ p["w"], torch.ones(4, 0), params={"w": torch.ones(0, 2)}, engine=engine)
    with pytest.raises(OutputError, match="no entries"):
        ntkops.ntk(nn.Linear(3, 2), torch.ones(4, 0, 3), engine=engine)
    with pytest.raises(OutputError, match="no entries"):
        ntkops.jacobian(nn.Linear(3, 2), torch.ones(4, 3), output=lambda y: y[:, :0], engine=engine)


def test_operators_that_are_gone_leave_no_tensor_behind():
    model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 3), nn.Sigmoid())
    x = torch.randn(10, 8)

    def storages():
        gc.collect()
        return sum(issubclass(type(item), torch.UntypedStorage | torch.Tensor) for item in gc.get_objects())

    for engine in ("auto", "autograd"):
        for _ in range(3):
            ntkops.ntk(model, x, engine=engine)
        before = storages()
        for _ in range(10):
            ntkops.ntk(model, x, engine=engine)
        assert storages() <= before + 3
