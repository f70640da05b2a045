"""Small models of many kinds with an input for each, and the proof that a model was left alone."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

MODULE_HOOKS = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_state_dict_hooks",
    "_load_state_dict_pre_hooks",
)


class TiedAutoencoder(nn.Module):
    """Two layers of one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Linear(3, 3)
        self.decoder = nn.Linear(3, 3)
        self.decoder.weight = self.encoder.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.decoder(torch.tanh(self.encoder(x)))


class SharedSubmodule(nn.Module):
    """One module under two names and called by both."""

    def __init__(self) -> None:
        super().__init__()
        self.left = nn.Linear(3, 3)
        self.right = self.left
        self.inner = nn.ModuleDict({"again": self.left})

    def forward(self, x: Tensor) -> Tensor:
        return self.inner["again"](self.right(torch.tanh(self.left(x))))


class LastStep(nn.Module):
    """The last hidden state of a recurrent layer."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)[0][:, -1]


class SelfAttention(nn.Module):
    """Attention without weights, which takes the fused kernel."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x, need_weights=False)[0]


class Checkpointed(nn.Module):
    """A block that is computed again in the backward pass."""

    def __init__(self, use_reentrant: bool = False) -> None:
        super().__init__()
        self.block = nn.Sequential(nn.Linear(3, 3), nn.Tanh())
        self.head = nn.Linear(3, 2)
        self.use_reentrant = use_reentrant

    def forward(self, x: Tensor) -> Tensor:
        return self.head(checkpoint(self.block, x, use_reentrant=self.use_reentrant))


class LowRank(nn.Module):
    """A frozen layer with a trained low-rank update."""

    def __init__(self) -> None:
        super().__init__()
        self.base = nn.Linear(3, 2).requires_grad_(False)
        self.lora_a = nn.Parameter(torch.randn(1, 3))
        self.lora_b = nn.Parameter(torch.randn(2, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + x @ self.lora_a.T @ self.lora_b.T


class DictModel(nn.Module):
    """Keyword inputs of two kinds, an integer among them, and a dict of outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 3)
        self.body = nn.Linear(3, 3)
        self.head = nn.Linear(3, 2)

    def forward(self, *, tokens: Tensor, scale: Tensor, square: bool = False) -> dict[str, Tensor]:
        hidden = torch.tanh(self.body(self.embed(tokens))) * scale[:, None, None]
        hidden = hidden * hidden if square else hidden
        return {"hidden": hidden, "logits": self.head(hidden.mean(1)), "labels": tokens}


class Padded(nn.Module):
    """An embedding with a padding row that is not zero."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(5, 3, padding_idx=0)
        with torch.no_grad():
            self.embed.weight[0] = torch.tensor([0.5, -1.0, 2.0])
        self.head = nn.Linear(3, 2)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(torch.tanh(self.embed(tokens)).mean(1))


class Residual(nn.Module):
    """A network that differentiates in its input, as physics-informed ones do."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = x.requires_grad_()
        (slope,) = torch.autograd.grad(self.net(x).sum(), x, create_graph=True)
        return slope


@dataclass(frozen=True)
class Specimen:
    """A model, its input for N samples, and what to select of its output."""

    name: str
    build: Callable[[], nn.Module]
    data: Callable[[int], Any]
    output: Any = None

    def make(self, dtype: torch.dtype = torch.float64) -> nn.Module:
        """Return the seeded model in eval mode."""
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return self.build().to(dtype).eval()

    def inputs(self, count: int = 5, dtype: torch.dtype = torch.float64) -> Any:
        """Return seeded inputs."""
        with torch.random.fork_rng():
            torch.manual_seed(1)
            x = self.data(count)
        cast = lambda t: t.to(dtype) if isinstance(t, Tensor) and t.is_floating_point() else t  # noqa: E731
        return {k: cast(v) for k, v in x.items()} if isinstance(x, dict) else cast(x)

    def reference(self, model: nn.Module, x: Any) -> Tensor:
        """Return the state, (N, O), by an ordinary call of the user's model."""
        raw = model(**x) if isinstance(x, dict) else model(x)
        state = raw if self.output is None else raw[self.output]
        return state.reshape(state.shape[0], -1)


def _rows(*shape: int) -> Callable[[int], Tensor]:
    return lambda count: torch.randn(count, *shape)


ZOO = [
    Specimen("mlp", lambda: nn.Sequential(nn.Linear(3, 4), nn.ReLU(inplace=True), nn.Linear(4, 2)), _rows(3)),
    Specimen("tied", TiedAutoencoder, _rows(3)),
    Specimen("shared", SharedSubmodule, _rows(3)),
    Specimen("lstm", lambda: LastStep(nn.LSTM(3, 4, 2, batch_first=True)), _rows(6, 3)),
    Specimen("gru", lambda: LastStep(nn.GRU(3, 4, batch_first=True, bidirectional=True)), _rows(6, 3)),
    Specimen("rnn", lambda: LastStep(nn.RNN(3, 4, batch_first=True)), _rows(6, 3)),
    Specimen(
        "normed-rnn",
        lambda: LastStep(parametrizations.weight_norm(nn.GRU(3, 4, batch_first=True), "weight_hh_l0")),
        _rows(6, 3),
    ),
    Specimen("attention", SelfAttention, _rows(5, 4)),
    Specimen("encoder", lambda: nn.TransformerEncoderLayer(4, 2, 8, batch_first=True), _rows(5, 4)),
    Specimen(
        "batchnorm", lambda: nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)), _rows(3)
    ),
    Specimen("weight-norm", lambda: nn.Sequential(parametrizations.weight_norm(nn.Linear(3, 2))), _rows(3)),
    Specimen("spectral", lambda: nn.Sequential(parametrizations.spectral_norm(nn.Linear(3, 2))), _rows(3)),
    Specimen("checkpointed", Checkpointed, _rows(3)),
    Specimen("low-rank", LowRank, _rows(3)),
    Specimen(
        "dict",
        DictModel,
        lambda n: {"tokens": torch.randint(0, 7, (n, 4)), "scale": torch.rand(n) + 0.5, "square": True},
        "logits",
    ),
    Specimen("padded", Padded, lambda n: torch.randint(0, 5, (n, 4))),
    Specimen("residual", Residual, _rows(2)),
    Specimen("compiled", lambda: torch.compile(nn.Linear(3, 2), backend="eager"), _rows(3)),
]
BY_NAME = {specimen.name: specimen for specimen in ZOO}


def _hooks(module: nn.Module) -> dict[str, list[tuple[int, Any]]]:
    return {name: list(getattr(module, name).items()) for name in MODULE_HOOKS}


def _tensors(model: nn.Module) -> list[tuple[str, Tensor]]:
    return [
        (f"{path}.{kind}.{name}", tensor)
        for path, module in model.named_modules(remove_duplicate=False)
        for kind in ("_parameters", "_buffers", "__dict__")
        for name, tensor in (vars(module) if kind == "__dict__" else vars(module)[kind]).items()
        if isinstance(tensor, Tensor)
    ]


@contextmanager
def untouched(model: nn.Module, *inputs: Any) -> Iterator[None]:
    """Prove that nothing of a model, its inputs or the global state changes inside the block."""
    with left_alone(), unchanged(model, *inputs):
        yield


@contextmanager
def left_alone() -> Iterator[None]:
    """Prove that nothing of the global state changes inside the block."""
    state = torch.get_rng_state(), random.getstate(), copy.deepcopy(np.random.get_state())
    settings = _settings()
    try:
        yield
    finally:
        assert torch.equal(torch.get_rng_state(), state[0])
        assert random.getstate() == state[1]
        now = np.random.get_state()
        assert all(np.array_equal(a, b) for a, b in zip(now, state[2], strict=True))
        assert _settings() == settings


@contextmanager
def unchanged(model: nn.Module, *inputs: Any) -> Iterator[None]:
    """Prove that nothing of a model and its inputs changes inside the block."""
    leaves = [t for t in torch.utils._pytree.tree_leaves(inputs) if isinstance(t, Tensor)]
    named = [*_tensors(model), *((f"input {i}", t) for i, t in enumerate(leaves))]
    before = [
        (n, t, t.detach().clone(), t._version, t.data_ptr(), t.requires_grad, _gradient(t)) for n, t in named
    ]
    modules = [
        (path, module, module.training, set(vars(module)), _hooks(module))
        for path, module in model.named_modules(remove_duplicate=False)
    ]
    flat = {id(m): list(m._flat_weights) for m in model.modules() if isinstance(m, nn.RNNBase)}
    padding = {id(m): (m.padding_idx, m.sparse) for m in model.modules() if isinstance(m, nn.Embedding)}
    try:
        yield
    finally:
        after = dict(_tensors(model))
        for name, tensor, value, version, pointer, requires_grad, grad in before:
            assert name.startswith("input") or after[name] is tensor, name
            assert _same(tensor, value), name
            assert (tensor._version, tensor.data_ptr()) == (version, pointer), name
            assert tensor.requires_grad == requires_grad and _gradient(tensor) is grad, name
        assert [(p, m) for p, m, *_ in modules] == list(model.named_modules(remove_duplicate=False))
        for path, module, training, keys, hooks in modules:
            assert (module.training, set(vars(module)), _hooks(module)) == (training, keys, hooks), path
        for module in model.modules():
            if isinstance(module, nn.RNNBase):
                assert all(a is b for a, b in zip(module._flat_weights, flat[id(module)], strict=True))
            if isinstance(module, nn.Embedding):
                assert (module.padding_idx, module.sparse) == padding[id(module)]


def _gradient(tensor: Tensor) -> Tensor | None:
    return tensor.grad if tensor.is_leaf else None


def _same(left: Tensor, right: Tensor) -> bool:
    """Equal bit for bit, NaN included."""
    left, right = (t.detach().contiguous().flatten().view(torch.uint8) for t in (left, right))
    return torch.equal(left, right)


def _settings() -> tuple[Any, ...]:
    cuda = torch.backends.cuda
    return (
        cuda.math_sdp_enabled(),
        cuda.flash_sdp_enabled(),
        cuda.mem_efficient_sdp_enabled(),
        cuda.cudnn_sdp_enabled(),
        torch.backends.mha.get_fastpath_enabled(),
        torch.backends.mkldnn.enabled,
        torch.backends.cudnn.enabled,
        torch.get_float32_matmul_precision(),
        torch.is_autocast_enabled("cpu"),
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
    )
