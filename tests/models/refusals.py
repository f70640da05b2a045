"""The models of the table that are refused, with the way out that each message names."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from ntkops.errors import (
    CoupledSamplesError,
    DifferentiationError,
    DtypeError,
    ModelMutationError,
    OutputError,
    StochasticModelError,
    UnsupportedModelError,
)
from tests.model.zoo import Checkpointed

from . import networks as nets
from .rows import Refusal
from .torch_rows import SEQUENCE, THREE, WORDS, encoder, mlp, normed, recurrent, tokens


def _trained(model: nn.Module) -> nn.Module:
    return model.train()


def _evaluated(model: nn.Module) -> nn.Module:
    return model.eval()


def _scripted() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit is deprecated
        return torch.jit.script(mlp(nn.Tanh()))


def _with_detach(model: nets.HiddenNoGrad) -> nn.Module:
    model.detach = True
    return model


def _renormalised(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        weight, embed = model.embed.weight, model.embed
        weight.copy_(torch.renorm(weight, embed.norm_type, 0, embed.max_norm))
    model.embed.max_norm = None
    return model


def _not_reentrant(model: Checkpointed) -> nn.Module:
    model.use_reentrant = False
    return model


class _Mean(nets.SampleLoss):
    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        return super().forward(x, labels).mean()


class _Classes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = mlp(nn.Tanh())

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x).argmax(-1)


class _Placed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = mlp(nn.Tanh())

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x) / len(x)


class _Fixed(_Placed):
    def forward(self, x: Tensor) -> Tensor:
        return self.net(x).reshape(3, -1)


class _Store:
    def __init__(self) -> None:
        self.weight: Tensor | None = None


class _Cached(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net, self.store = nn.Linear(3, 2), _Store()

    def forward(self, x: Tensor) -> Tensor:
        if self.store.weight is None:
            self.store.weight = self.net.weight.T
        return x @ self.store.weight.clone() + self.net.bias


class _Complex(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(2, 3, dtype=torch.complex128))

    def forward(self, x: Tensor) -> Tensor:
        return (x.to(torch.complex128) @ self.weight.mT).abs()


def _half_single() -> nn.Module:
    model = mlp(nn.Tanh()).double()
    model[0].float()
    return model


def _labelled(count: int) -> tuple[Tensor, Tensor]:
    return torch.randn(count, 3), torch.arange(count) % 3


def _two(count: int) -> dict[str, Tensor]:
    return {"a": torch.randn(count, 3), "b": torch.randn(count, 2)}


EVAL = ("call model.eval()",)
REFUSALS: list[Refusal] = [
    Refusal(
        "nn.BatchNorm1d train()",
        lambda: _trained(normed(nn.BatchNorm1d(4))),
        THREE,
        CoupledSamplesError,
        (*EVAL, "another normalisation"),
        _evaluated,
        note="`model.eval()`, or another normalisation",
    ),
    Refusal(
        "nn.BatchNorm1d without running statistics",
        lambda: normed(nn.BatchNorm1d(4, track_running_stats=False)).eval(),
        THREE,
        CoupledSamplesError,
        ("track_running_stats=True", "another normalisation"),
        note="`track_running_stats=True`, or another normalisation",
    ),
    Refusal(
        "nn.Dropout train()",
        lambda: _trained(mlp(nn.Dropout(0.5))),
        THREE,
        StochasticModelError,
        EVAL,
        _evaluated,
        note="`model.eval()`, or p=0",
    ),
    Refusal(
        "nn.TransformerEncoderLayer train() p>0",
        lambda: _trained(encoder(0.1)),
        WORDS,
        StochasticModelError,
        EVAL,
        _evaluated,
        note="`model.eval()`, or p=0",
    ),
    Refusal(
        "nn.GRU with dropout, train()",
        lambda: _trained(recurrent(nn.GRU, num_layers=2, dropout=0.5)),
        SEQUENCE,
        StochasticModelError,
        EVAL,
        _evaluated,
        {"output": 0},
        note="`model.eval()`, or dropout=0",
    ),
    Refusal(
        "F.dropout that ignores eval()",
        lambda: nets.FunctionalDropout().eval(),
        THREE,
        StochasticModelError,
        ("training=self.training",),
        note="`F.dropout(..., training=self.training)`",
    ),
    Refusal(
        "spectral_norm parametrization train()",
        lambda: _trained(nn.Sequential(parametrizations.spectral_norm(nn.Linear(3, 4)))),
        THREE,
        ModelMutationError,
        EVAL,
        _evaluated,
        note="`model.eval()`",
    ),
    Refusal(
        "nn.Embedding(max_norm=1)",
        lambda: nets.FlatTokens(max_norm=1.0),
        tokens(6, 4),
        ModelMutationError,
        ("torch.renorm", "max_norm=None"),
        _renormalised,
        note="renormalise once with `torch.renorm`, then `max_norm=None`",
    ),
    Refusal(
        "nn.EmbeddingBag(max_norm=1)",
        lambda: nn.EmbeddingBag(6, 3, max_norm=1.0),
        tokens(6, 4),
        ModelMutationError,
        ("torch.renorm", "max_norm=None"),
        note="renormalise once with `torch.renorm`, then `max_norm=None`",
    ),
    Refusal(
        "checkpointed block (use_reentrant=True)",
        lambda: Checkpointed(use_reentrant=True),
        THREE,
        UnsupportedModelError,
        ("use_reentrant=False",),
        _not_reentrant,
        note="`use_reentrant=False`",
    ),
    Refusal(
        "torch.no_grad() inside the model",
        nets.HiddenNoGrad,
        THREE,
        DifferentiationError,
        ("torch.no_grad()", ".detach()"),
        _with_detach,
        note="`.detach()` for a constant",
    ),
    Refusal(
        "torch.jit.script(model)",
        _scripted,
        THREE,
        UnsupportedModelError,
        ("pass the eager module",),
        note="the eager module that it was made from",
    ),
    Refusal(
        "nn.DataParallel(model)",
        lambda: nn.DataParallel(mlp(nn.Tanh())),
        THREE,
        UnsupportedModelError,
        ("pass its .module",),
        lambda model: model.module,
        note="its `.module`",
    ),
    Refusal(
        "lazy modules before their first call",
        lambda: nn.Sequential(nn.LazyLinear(3)),
        THREE,
        UnsupportedModelError,
        ("call the model once",),
        note="call the model once",
    ),
    Refusal(
        "parameters on the meta device",
        lambda: mlp(nn.Tanh()).to("meta"),
        THREE,
        UnsupportedModelError,
        ("to_empty", "load_state_dict"),
        note="`to_empty` and `load_state_dict`",
    ),
    Refusal(
        "parameters of two dtypes",
        _half_single,
        THREE,
        DtypeError,
        ("model.to(dtype)",),
        lambda model: model.double(),
        note="`model.to(dtype)`, or select those of one dtype",
    ),
    Refusal(
        "complex parameters",
        _Complex,
        THREE,
        UnsupportedModelError,
        ("torch.view_as_real",),
        note="real and imaginary parts (`torch.view_as_real`)",
    ),
    Refusal(
        "dict output without output=",
        nets.TwoInputs,
        _two,
        OutputError,
        ("pass output='hidden'",),
        note="`output='logits'`",
    ),
    Refusal(
        "integer output (argmax)",
        _Classes,
        THREE,
        OutputError,
        ("floating-point scores",),
        lambda model: model.net,
        note="the scores",
    ),
    Refusal(
        "mean loss as output",
        _Mean,
        _labelled,
        OutputError,
        ("reduction='none'",),
        note="`reduction='none'`",
    ),
    Refusal(
        "output that depends on the place in the batch, or on len(x)",
        _Placed,
        THREE,
        CoupledSamplesError,
        ("a position in the batch", "len(x)"),
        lambda model: model.net,
        note="take the place, or the number of samples, out of the model",
    ),
    Refusal(
        "reshape to a number of samples that is written down",
        _Fixed,
        THREE,
        UnsupportedModelError,
        ("x.shape[0], -1",),
        lambda model: model.net,
        note="`x.shape[0]`, or -1",
    ),
    Refusal(
        "cache of a computed weight, kept between calls",
        _Cached,
        THREE,
        ModelMutationError,
        ("switch that cache off",),
        lambda model: model.net,
        note="switch the cache off (one in a list or dict attribute is emptied after every call)",
    ),
    Refusal(
        "recurrent layer with time first, samples taken for time",
        lambda: nn.GRU(nets.FEATURES, nets.HIDDEN),
        SEQUENCE,
        CoupledSamplesError,
        ("pass batch_dim=1",),
        options={"output": 0},
        note="`batch_dim=1`",
    ),
]


def state_of(options: dict[str, Any]) -> Any:
    """Return the selection for the reference."""
    return (lambda raw: raw[options["output"]]) if options else (lambda raw: raw)
