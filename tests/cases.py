"""Tiny models of every kind that a user has, each with its inputs and a dense reference Jacobian.

The reference never goes through ntkops: it is `torch.func.jacrev` over `functional_call` in float64,
or, where that refuses, one classic backward pass for each output.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ntkops.operators.capabilities import capabilities


@dataclass(frozen=True)
class Case:
    """A model, its inputs, and how ntkops is to be called on them."""

    name: str
    build: Callable[[], nn.Module]
    inputs: Callable[[int], Any]
    options: dict[str, Any] = field(default_factory=dict)
    state: Callable[[Any], Tensor] = lambda raw: raw

    def make(self, dtype: torch.dtype = torch.float64) -> nn.Module:
        """Return the model in eval mode with seeded weights; the global random state is put back."""
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = self.build()
        return model.to(dtype).eval()

    def data(self, count: int = 3, dtype: torch.dtype = torch.float64, seed: int = 1) -> Any:
        """Return ``count`` samples."""
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return _cast(self.inputs(count), dtype)


def _cast(x: Any, dtype: torch.dtype) -> Any:
    if isinstance(x, Tensor):
        return x.to(dtype) if x.is_floating_point() else x
    if isinstance(x, dict):
        return {key: _cast(value, dtype) for key, value in x.items()}
    return tuple(_cast(value, dtype) for value in x)


def reference_jacobian(case: Case, model: nn.Module, x: Any, names: list[str] | None = None) -> Tensor:
    """Return J, (N·O, P), one backward pass for each row, without ntkops."""
    parameters = dict(model.named_parameters())
    names = [n for n, p in parameters.items() if p.requires_grad] if names is None else names
    leaves = [parameters[n] for n in names]
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        raw = model(**x) if isinstance(x, dict) else model(*x) if isinstance(x, tuple) else model(x)
    state = case.state(raw).flatten()
    rows = []
    for entry in state:
        gradients = torch.autograd.grad(entry, leaves, retain_graph=True, allow_unused=True)
        rows.append(
            torch.cat(
                [
                    torch.zeros_like(p).flatten() if g is None else g.flatten()
                    for p, g in zip(leaves, gradients, strict=True)
                ]
            )
        )
    return torch.stack(rows).detach()


class Tied(nn.Module):
    """A weight used twice: embedding and read-out."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 4)
        self.mix = nn.Linear(4, 4)
        self.head = nn.Linear(4, 7, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(torch.tanh(self.mix(self.embed(tokens)))).mean(1)


class SharedBlock(nn.Module):
    """One submodule reached by two paths and called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 3)
        self.again = self.first
        self.head = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.again(torch.tanh(self.first(x)))))


class DictNet(nn.Module):
    """Keyword inputs, dictionary output, a boolean mask."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(3, 5), nn.Linear(2, 5)
        self.head = nn.Linear(5, 2)

    def forward(self, a: Tensor, b: Tensor, mask: Tensor) -> dict[str, Tensor]:
        hidden = torch.tanh(self.left(a) + self.right(b)) * mask.unsqueeze(-1)
        return {"hidden": hidden, "logits": self.head(hidden)}


class LowRankAdapter(nn.Module):
    """A frozen weight with a trainable low-rank update."""

    def __init__(self) -> None:
        super().__init__()
        self.base = nn.Linear(4, 3)
        self.down = nn.Parameter(torch.randn(2, 4) * 0.5)
        self.up = nn.Parameter(torch.randn(3, 2) * 0.5)
        for parameter in self.base.parameters():
            parameter.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.base(x) + x @ self.down.T @ self.up.T)


class Attention(nn.Module):
    """Self-attention without weights returned: the fused kernel's path."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        mixed, _ = self.attention(x, x, x, need_weights=False)
        return self.head(x + mixed).mean(1)


class OldStyleSquare(torch.autograd.Function):
    """An autograd function without setup_context, which torch.func refuses."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx, gradient):
        (x,) = ctx.saved_tensors
        return 2 * x * gradient


class OldStyle(nn.Module):
    """A model with an old-style autograd function inside."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(OldStyleSquare.apply(self.first(x)))


class Bag(nn.Module):
    """EmbeddingBag: reverse mode only."""

    def __init__(self) -> None:
        super().__init__()
        self.bag = nn.EmbeddingBag(9, 4, mode="mean")
        self.head = nn.Linear(4, 2)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.bag(tokens))


class Checkpointed(nn.Module):
    """Activation checkpointing, which torch.func's reverse mode refuses."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(3, 4), nn.Tanh())
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.utils.checkpoint.checkpoint(self.body, x, use_reentrant=False))


class Branching(nn.Module):
    """Control flow that looks at values."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.first(x))
        if hidden.isnan().any().item():
            hidden = torch.nan_to_num(hidden)
        return self.second(hidden)


class ScalarGain(nn.Module):
    """A parameter without axes beside an ordinary layer."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.tensor(1.5))
        self.body = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.gain * self.body(x))


def _frozen_mlp() -> nn.Module:
    model = nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 2))
    model[0].weight.requires_grad_(False)
    return model


def _weight_norm() -> nn.Module:
    return nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(3, 4)), nn.Tanh(), nn.Linear(4, 2))


def _encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(4, 2, dim_feedforward=6, dropout=0.1, batch_first=True)
    return nn.Sequential(layer, nn.Flatten(), nn.Linear(12, 2))


CASES: tuple[Case, ...] = (
    Case(
        "mlp", lambda: nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 2)), lambda n: torch.randn(n, 3)
    ),
    Case(
        "conv",
        lambda: nn.Sequential(
            nn.Conv2d(1, 3, 3, padding=1),
            nn.ReLU(inplace=True),
            nn.AvgPool2d(2),
            nn.Flatten(),
            nn.Linear(12, 2),
        ),
        lambda n: torch.randn(n, 1, 4, 4),
    ),
    Case(
        "batchnorm-eval",
        lambda: nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 2)),
        lambda n: torch.randn(n, 3),
    ),
    Case("tied", Tied, lambda n: torch.randint(0, 7, (n, 3))),
    Case("shared", SharedBlock, lambda n: torch.randn(n, 3)),
    Case(
        "gru-time",
        lambda: nn.GRU(2, 3, batch_first=True),
        lambda n: torch.randn(n, 4, 2),
        {"output": 0},
        lambda raw: raw[0],
    ),
    Case(
        "lstm",
        lambda: nn.LSTM(2, 3, batch_first=True),
        lambda n: torch.randn(n, 4, 2),
        {"output": 0},
        lambda raw: raw[0],
    ),
    Case("attention", Attention, lambda n: torch.randn(n, 3, 4)),
    Case("encoder-eval", _encoder, lambda n: torch.randn(n, 3, 4)),
    Case(
        "dict",
        DictNet,
        lambda n: {"a": torch.randn(n, 3), "b": torch.randn(n, 2), "mask": torch.arange(n) % 2 == 0},
        {"output": "logits"},
        lambda raw: raw["logits"],
    ),
    Case("frozen", _frozen_mlp, lambda n: torch.randn(n, 3)),
    Case("adapter", LowRankAdapter, lambda n: torch.randn(n, 4)),
    Case("scalar", ScalarGain, lambda n: torch.randn(n, 3)),
    Case("weight-norm", _weight_norm, lambda n: torch.randn(n, 3)),
    Case("old-style", OldStyle, lambda n: torch.randn(n, 3)),
    Case("checkpointed", Checkpointed, lambda n: torch.randn(n, 3)),
    Case("branching", Branching, lambda n: torch.randn(n, 3)),
)
REVERSE_ONLY = Case("embedding-bag", Bag, lambda n: torch.randint(0, 9, (n, 4)))
BY_NAME = {case.name: case for case in (*CASES, REVERSE_ONLY)}
EXPECTED_RUNGS = {
    "weight-norm": "double",
    "old-style": "classic",
    "checkpointed": "classic",
    "embedding-bag": "reverse",
}


def from_all_tiles(operator, size=None):
    """Return the dense matrix, put together from the tiles of both triangles."""
    source = capabilities(operator)
    dense = torch.full(source.shape, torch.nan, dtype=source.dtype)
    for tile in source.all_tiles(size):
        dense[..., tile.rows, tile.cols] = tile.block
    return dense
