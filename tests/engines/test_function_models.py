"""Functions (params, inputs) -> output get layer rules as modules do."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import ntkops

D = torch.float64


def draw(*shapes):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator, dtype=D) for shape in shapes]


def called(module, read=lambda output: output):
    """A module as a function, with its parameters."""
    params = dict(module.double().named_parameters())
    return lambda params, x: read(torch.func.functional_call(module, params, (x,))), params


def written(function, **shapes):
    return function, dict(zip(shapes, draw(*shapes.values()), strict=True))


def tied(params, x):
    return F.linear(torch.tanh(F.linear(x, params["one"])), params["other"])


def with_tied():
    (weight,) = draw((3, 3))
    return tied, {"one": weight, "other": weight}


(ROWS,) = draw((4, 3))
(SEQUENCE,) = draw((4, 5, 4))
MODELS = {
    "linear": lambda: (
        *written(
            lambda p, x: F.linear(torch.tanh(F.linear(x, p["w"], p["b"])), p["v"]), w=(5, 3), b=(5,), v=(2, 5)
        ),
        ROWS,
    ),
    "matrices": lambda: (
        *written(lambda p, x: torch.tanh(x @ p["w"] / 3**0.5 + p["b"]) @ p["v"], w=(3, 5), b=(5,), v=(5, 2)),
        ROWS,
    ),
    "transposed": lambda: (
        *written(lambda p, x: p["s"] * torch.tanh(x @ p["w"].T) @ p["v"].mT, w=(5, 3), v=(2, 5), s=()),
        ROWS,
    ),
    "addmm": lambda: (*written(lambda p, x: torch.addmm(p["b"], x, p["w"].T), w=(5, 3), b=(5,)), ROWS),
    "norm": lambda: (
        *written(lambda p, x: F.linear(F.rms_norm(x, (3,), p["g"]), p["w"]), g=(3,), w=(2, 3)),
        ROWS,
    ),
    "tied": lambda: (*with_tied(), ROWS),
    "module": lambda: (*called(nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2))), ROWS),
    "tokens": lambda: (
        *called(nn.Sequential(nn.Embedding(5, 3, padding_idx=0), nn.Flatten(), nn.Linear(9, 2))),
        torch.tensor([[1, 2, 3], [4, 0, 0], [1, 1, 2]]),
    ),
    "encoder": lambda: (
        *called(nn.TransformerEncoderLayer(4, 2, 6, 0.0, batch_first=True), lambda y: y.mean(1)),
        SEQUENCE,
    ),
    "recurrent": lambda: (*called(nn.GRU(4, 3, batch_first=True), lambda y: y[0][:, -1]), SEQUENCE),
}


@pytest.mark.parametrize("name", MODELS)
def test_functions_are_covered_and_right(name):
    torch.manual_seed(0)
    function, params, x = MODELS[name]()
    leaves = {id(p): p.detach().clone().requires_grad_() for p in params.values()}
    output = function({key: leaves[id(p)] for key, p in params.items()}, x).flatten()
    rows = [torch.autograd.grad(entry, list(leaves.values()), retain_graph=True) for entry in output]
    J = torch.stack([torch.cat([part.flatten() for part in row]) for row in rows])
    K = ntkops.ntk(function, x, params=params)
    assert len(K.engine_info.covered) == len(leaves), K.engine_info.reasons
    torch.testing.assert_close(K.to_dense(), J @ J.mT)
    v = torch.ones(len(J), dtype=D)
    torch.testing.assert_close(ntkops.ntk(function, x, params=params, max_dense_bytes=0) @ v, J @ (J.mT @ v))
    torch.testing.assert_close(K.diagonal(), J.square().sum(1))
