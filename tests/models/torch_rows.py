"""The rows of the table that need torch alone."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from tests.cases import OldStyle, SharedBlock, Tied
from tests.model.zoo import Checkpointed

from . import networks as nets
from .rows import Row


def normal(*shape: int) -> Callable[[int], Tensor]:
    """Make N normal samples of a shape."""
    return lambda count: torch.randn(count, *shape)


def tokens(vocabulary: int, length: int) -> Callable[[int], Tensor]:
    """Make N sequences of tokens."""
    return lambda count: torch.randint(0, vocabulary, (count, length))


def _first(raw: Any) -> Tensor:
    return raw[0]


def _both(raw: dict[str, Tensor]) -> Tensor:
    return torch.cat([raw["hidden"], raw["logits"]], -1)


def _dense_embedding(model: nn.Module) -> nn.Module:
    model.embed.sparse = False
    return model


def _uncompiled(model: nn.Module) -> nn.Module:
    return model._orig_mod


SEQUENCE = normal(nets.STEPS, nets.FEATURES)
WORDS = normal(3, 4)
THREE = normal(3)


def mlp(activation: nn.Module) -> nn.Module:
    """Make the smallest network."""
    return nn.Sequential(nn.Linear(3, 5), activation, nn.Linear(5, 2))


def recurrent(kind: type[nn.RNNBase], **options: Any) -> nn.Module:
    """Make a recurrent layer."""
    return kind(nets.FEATURES, nets.HIDDEN, batch_first=True, **options)


def _hidden_states() -> list[Row]:
    """Hidden states over time, by selector and by module path, in three precisions."""
    rows = []
    for kind in (nn.RNN, nn.GRU, nn.LSTM):
        name = f"nn.{kind.__name__}"
        bare = partial(recurrent, kind)
        inside = lambda kind=kind: nets.Classifier(recurrent(kind))  # noqa: E731
        rows += [
            Row(
                f"{name} hidden over time",
                bare,
                SEQUENCE,
                options={"output": 0},
                state=_first,
                samples="loop",
            ),
            Row(
                f"{name} hidden over time by module path",
                inside,
                SEQUENCE,
                options={"output": "rnn[0]"},
                twin=nets.Inner,
                state=_first,
                samples="loop",
            ),
            Row(f"{name} classifier", inside, SEQUENCE, samples="loop"),
        ]
        for dtype in (torch.float32, torch.bfloat16):
            label = f"{str(dtype).removeprefix('torch.')} {name}"
            rows.append(
                Row(
                    label,
                    bare,
                    SEQUENCE,
                    options={"output": 0},
                    state=_first,
                    samples="loop",
                    dtype=dtype,
                    precision=dtype,
                )
            )
    return rows


RECURRENT = [
    *_hidden_states(),
    Row(
        "nn.GRU 2-layer bidirectional",
        partial(recurrent, nn.GRU, num_layers=2, bidirectional=True),
        SEQUENCE,
        options={"output": 0},
        state=_first,
        samples="loop",
    ),
    Row("nn.GRUCell loop", nets.CellLoop, SEQUENCE),
    Row("hand-written RNN loop (Linear)", nets.LinearLoop, SEQUENCE),
    Row("unrolled nn.GRU weights, pure operations", nets.UnrolledGRU, SEQUENCE),
]


def encoder(dropout: float = 0.1) -> nn.Module:
    """Make an encoder layer."""
    return nn.TransformerEncoderLayer(4, 2, dim_feedforward=6, dropout=dropout, batch_first=True)


ATTENTION = [
    Row("nn.MultiheadAttention need_weights=True", lambda: nets.SelfAttention(True), WORDS),
    Row("nn.MultiheadAttention need_weights=False", lambda: nets.SelfAttention(False), WORDS),
    Row("F.scaled_dot_product_attention", lambda: nets.FunctionalAttention(False), WORDS),
    Row("F.scaled_dot_product_attention causal", lambda: nets.FunctionalAttention(True), WORDS),
    Row("nn.TransformerEncoderLayer train() p=0", lambda: encoder(0.0), WORDS, training=True),
    Row("nn.TransformerEncoderLayer eval()", encoder, WORDS),
    Row(
        "nn.TransformerEncoderLayer eval(), frozen, params='*'",
        lambda: encoder().requires_grad_(False),
        WORDS,
        options={"params": "*"},
    ),
]


def cnn() -> nn.Module:
    """Make a small convolutional network with pooling."""
    return nn.Sequential(
        nn.Conv2d(1, 3, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(3, 4, 3, padding=1),
        nn.Tanh(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(4, 2),
    )


def normed(norm: nn.Module) -> nn.Module:
    """Make a small network around a normalisation of four features."""
    return nn.Sequential(nn.Linear(3, 4), norm, nn.Tanh(), nn.Linear(4, 2))


def _normed_conv() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1),
        nn.GroupNorm(2, 4),
        nn.ReLU(),
        nn.Flatten(),
        nn.LayerNorm(64),
        nn.Linear(64, 2),
    )


def _instance_norm() -> nn.Module:
    norm = nn.InstanceNorm2d(4, affine=True, track_running_stats=True)
    return nn.Sequential(nn.Conv2d(1, 4, 3), norm, nn.Tanh(), nn.Flatten(), nn.Linear(16, 2))


IMAGE = normal(1, 4, 4)
LAYERS = [
    Row("MLP", lambda: mlp(nn.Tanh()), THREE),
    Row("MLP ReLU(inplace=True)", lambda: mlp(nn.ReLU(inplace=True)), THREE),
    Row("nn.BatchNorm1d eval()", lambda: normed(nn.BatchNorm1d(4)), THREE),
    Row("nn.GroupNorm and nn.LayerNorm", _normed_conv, IMAGE),
    Row("nn.InstanceNorm2d(affine, track) eval()", _instance_norm, IMAGE),
    Row("nn.Dropout eval()", lambda: mlp(nn.Dropout(0.5)), THREE),
    Row("MaxPool / AdaptiveAvgPool CNN", cnn, IMAGE),
    Row(
        "nn.Hardsigmoid (mobilenet)",
        lambda: mlp(nn.Hardsigmoid()),
        THREE,
        note="forward mode: it has no double backward",
    ),
    Row("nn.Embedding", nets.FlatTokens, tokens(6, 4)),
    Row(
        "nn.Embedding(padding_idx=0)",
        lambda: nets.FlatTokens(padding_idx=0),
        lambda count: torch.arange(4 * count).reshape(count, 4) % 6,
        note="the padding row has no gradient, as in training",
    ),
    Row(
        "nn.Embedding(sparse=True)",
        lambda: nets.FlatTokens(sparse=True),
        tokens(6, 4),
        twin=_dense_embedding,
        note="without effect on the private copy",
    ),
    Row(
        "nn.EmbeddingBag mean",
        lambda: nn.Sequential(nn.EmbeddingBag(6, 3, mode="mean"), nn.Tanh(), nn.Linear(3, 2)),
        tokens(6, 4),
        mode="reverse",
        note="Jᵀ, exact kernels and traces, one-sided estimates; nn.Embedding and .mean(1) for J",
    ),
]


PARAMETERS = [
    Row("tied weights", Tied, tokens(7, 3)),
    Row("shared submodule", SharedBlock, THREE),
    Row(
        "weight_norm parametrization",
        lambda: nn.Sequential(parametrizations.weight_norm(nn.Linear(3, 4)), nn.Tanh(), nn.Linear(4, 2)),
        THREE,
        mode="double",
        samples="loop",
    ),
    Row(
        "spectral_norm parametrization eval()",
        lambda: nn.Sequential(parametrizations.spectral_norm(nn.Linear(3, 4)), nn.Tanh(), nn.Linear(4, 2)),
        THREE,
    ),
    Row(
        "orthogonal parametrization",
        lambda: nn.Sequential(parametrizations.orthogonal(nn.Linear(3, 3)), nn.Tanh(), nn.Linear(3, 2)),
        THREE,
    ),
    Row(
        "one frozen layer",
        lambda: nn.Sequential(nn.Linear(3, 4).requires_grad_(False), nn.Tanh(), nn.Linear(4, 2)),
        THREE,
    ),
]


def _two(count: int) -> dict[str, Tensor]:
    return {"a": torch.randn(count, 3), "b": torch.randn(count, 2)}


def _labelled(count: int) -> tuple[Tensor, Tensor]:
    return torch.randn(count, 3), torch.arange(count) % 3


def _token_labels(count: int) -> tuple[Tensor, Tensor]:
    labels = torch.randint(0, 6, (count, 4))
    labels[:, -1] = -100
    return torch.randint(0, 6, (count, 4)), labels


CALLS = [
    Row(
        "2 inputs (keywords), dict output",
        nets.TwoInputs,
        _two,
        options={"output": "logits"},
        state=lambda raw: raw["logits"],
    ),
    Row("dict output, both parts", nets.TwoInputs, _two, options={"output": _both}, state=_both),
    Row("cross entropy of each sample as output", nets.SampleLoss, _labelled),
    Row("loss of each token as output", nets.TokenLoss, _token_labels),
    Row("PINN residual by torch.func", nets.FunctionalResidual, normal(1), engine="autograd"),
    Row(
        "PINN residual by autograd.grad", nets.AutogradResidual, normal(1), engine="autograd", mode="classic"
    ),
    Row(
        "control flow that looks at values (.item())",
        nets.Branching,
        THREE,
        samples="loop",
        note="per-sample gradients by a loop",
    ),
    Row("checkpointed block (use_reentrant=False)", Checkpointed, THREE, mode="classic"),
    Row("custom autograd.Function (old style)", OldStyle, THREE, mode="classic"),
    Row(
        "torch.compile(model)",
        lambda: torch.compile(mlp(nn.Tanh()), backend="eager"),
        THREE,
        twin=_uncompiled,
        note="unwrapped: products go through the module that was compiled",
    ),
]

TORCH_ROWS = [*LAYERS, *RECURRENT, *ATTENTION, *PARAMETERS, *CALLS]
