"""The networks that are measured, seeded, with random weights: nothing is downloaded."""

from __future__ import annotations

import importlib
import random
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn
from torch.overrides import TorchFunctionMode

_CLASSES = 10


def seeded(make: Callable[..., nn.Module], *args: Any, seed: int = 0) -> Any:
    """Return a network in eval mode, always the same one."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return make(*args).eval()


def normal(*shape: int, seed: int = 1) -> Tensor:
    """Return normal numbers, always the same ones."""
    return torch.randn(*shape, generator=Generator().manual_seed(seed))


def digit_images() -> tuple[Tensor, Tensor]:
    """Return the 1797 images of 64 pixels in [0, 1], float64, and their labels."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    return torch.from_numpy(images) / 16, torch.from_numpy(labels)


def fitted(model: nn.Module, x: Tensor, steps: int = 60) -> nn.Module:
    """Train a network by regression of its mean output on a function of the samples, and return it."""
    target = torch.sin(x.flatten(1).double().sum(1)).to(next(model.parameters()).dtype)
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(steps):
        optimizer.zero_grad()
        (model(x).flatten(1).mean(1) - target).square().mean().backward()
        optimizer.step()
    return model.eval()


# kinds


def mlp(*widths: int, act: Callable[[], nn.Module] = nn.Tanh) -> nn.Sequential:
    """Return linear layers with activations between them."""
    layers = [part for a, b in pairwise(widths) for part in (nn.Linear(a, b), act())]
    return nn.Sequential(*layers[:-1])


def cnn(
    channels: Sequence[int], outputs: int = _CLASSES, *, strides: Iterable[int] = (1,) * 9,
    act: Callable[[], nn.Module] = nn.ReLU, padding: int = 1, flat: int = 0,
) -> nn.Sequential:  # fmt: skip
    """Return 3 x 3 convolutions and a linear layer, of the mean over pixels or of all ``flat`` numbers."""
    layers: list[nn.Module] = []
    for (before, after), stride in zip(pairwise(channels), strides, strict=False):
        layers += [nn.Conv2d(before, after, 3, stride, padding), act()]
    layers += [nn.Flatten()] if flat else [nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(flat or channels[-1], outputs))


class States(nn.Module):
    """Hidden states of a GRU over time."""

    def __init__(self, inputs: int, width: int) -> None:
        super().__init__()
        self.cell = nn.GRU(inputs, width, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        states: Tensor = self.cell(x)[0]
        return states


class _Recurrent(nn.Module):
    """A GRU read out at its last step."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.rnn = nn.GRU(8, width, batch_first=True)
        self.head = nn.Linear(width, _CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(x)[0][:, -1])


class _Cells(nn.Module):
    """A GRU cell in a loop, which `torch.func.vmap` can differentiate: its last step read out, or all."""

    def __init__(self, inputs: int, width: int, outputs: int = 0) -> None:
        super().__init__()
        self.cell = nn.GRUCell(inputs, width)
        self.head = nn.Linear(width, outputs) if outputs else None

    def forward(self, x: Tensor) -> Tensor:
        hidden, found = x.new_zeros(len(x), self.cell.hidden_size), []
        for step in x.unbind(1):
            hidden = self.cell(step, hidden)
            found.append(hidden)
        return torch.stack(found, 1).flatten(1) if self.head is None else self.head(hidden)


class _ByHand(nn.Module):
    """A recurrence written by hand; every state is output."""

    def __init__(self, inputs: int, states: int) -> None:
        super().__init__()
        self.read, self.move = nn.Linear(inputs, states), nn.Linear(states, states, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        hidden, found = x.new_zeros(len(x), self.move.in_features), []
        for step in x.unbind(1):
            hidden = torch.tanh(self.read(step) + self.move(hidden))
            found.append(hidden)
        return torch.stack(found, 1).flatten(1)


def _normalised(before: int, after: int, size: int, stride: int) -> tuple[nn.Module, nn.Module]:
    convolution = nn.Conv2d(before, after, size, stride, padding=size // 2, bias=False)
    return convolution, nn.BatchNorm2d(after)


class _Residual(nn.Module):
    """Convolutions of some sizes with batch normalisation, and a way around them."""

    def __init__(self, widths: Sequence[int], sizes: Sequence[int], stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential()
        strided = sizes.index(3)
        for place, ((before, after), size) in enumerate(zip(pairwise(widths), sizes, strict=True)):
            self.body.extend(_normalised(before, after, size, stride if place == strided else 1))
            self.body.append(nn.ReLU())
        del self.body[-1]
        self.shortcut: nn.Module = nn.Identity()
        if stride > 1 or widths[0] != widths[-1]:
            self.shortcut = nn.Sequential(*_normalised(widths[0], widths[-1], 1, stride))

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.body(x) + self.shortcut(x))


def _resnet(
    width: int, outputs: int = _CLASSES, *, wide: bool = True, depths: Sequence[int] = ()
) -> nn.Module:
    """Return the layout of ResNet-18, or one with bottlenecks; a wide stem is that for large images."""
    stem = _normalised(3, width, *((7, 2) if wide else (3, 1)))
    layers: list[nn.Module] = [*stem, nn.ReLU(), *([nn.MaxPool2d(3, 2, 1)] if wide else [])]
    before = width
    for stage, depth in enumerate(depths or (2, 2, 2, 2)):
        inner = width * 2**stage
        for block in range(depth):
            widths = [before, inner, inner, 4 * inner] if depths else [before, inner, inner]
            layers.append(_Residual(widths, (1, 3, 1) if depths else (3, 3), 2 if stage and not block else 1))
            before = widths[-1]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(before, outputs))


def _scaled(model: nn.Module, scales: bool) -> nn.Module:
    """Make the last scales of residual branches zero, as most recipes do, or all scales random."""
    for layer in model.modules():
        if scales and isinstance(layer, nn.BatchNorm2d):
            nn.init.uniform_(layer.weight, 0.5, 1.5)
        elif not scales and isinstance(layer, _Residual):
            nn.init.zeros_(layer.body[-1].weight)
    return model


def resnet50() -> nn.Module:
    """Return ResNet-50 for images 3 x 224 x 224 and 1000 classes, without memory."""
    with torch.device("meta"):
        return _resnet(64, 1000, depths=(3, 4, 6, 3)).eval()


Layer = Callable[..., nn.Module]


class _Attention(nn.Module):
    """Self-attention with one matrix for queries, keys and values."""

    def __init__(self, width: int, heads: int, causal: bool, linear: Layer) -> None:
        super().__init__()
        self.heads, self.causal = heads, causal
        self.qkv, self.proj = linear(width, 3 * width), linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        split = self.qkv(x).unflatten(-1, (3, self.heads, -1)).movedim(-3, 0).transpose(2, 3)
        mixed = F.scaled_dot_product_attention(*split.unbind(), is_causal=self.causal)
        return self.proj(mixed.transpose(1, 2).flatten(-2))


class _Block(nn.Module):
    """A pre-norm transformer block written by hand."""

    def __init__(self, width: int, heads: int, causal: bool = False, linear: Layer = nn.Linear) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = _Attention(width, heads, causal, linear)
        self.fc1, self.fc2 = linear(width, 4 * width), linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x))))


class _LoRA(nn.Module):
    """A fixed linear layer and a learned update of low rank."""

    def __init__(self, inputs: int, outputs: int, rank: int) -> None:
        super().__init__()
        self.base = nn.Linear(inputs, outputs).requires_grad_(False)
        self.down = nn.Linear(inputs, rank, bias=False)
        self.up = nn.Linear(rank, outputs, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.up(self.down(x))


class _Encoder(nn.TransformerEncoderLayer):
    """Torch's own layer, pre-norm, causal or not."""

    def __init__(self, width: int, heads: int, length: int = 0) -> None:
        super().__init__(width, heads, 4 * width, 0.0, "gelu", batch_first=True, norm_first=True)
        mask = nn.Transformer.generate_square_subsequent_mask(length) if length else None
        self.register_buffer("mask", mask)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x, src_mask=self.mask, is_causal=self.mask is not None)


class _Patches(nn.Module):
    """Patches of images, after a class token."""

    def __init__(self, width: int, patch: int) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, patch, patch)
        self.token = nn.Parameter(0.02 * torch.randn(1, width))

    def forward(self, x: Tensor) -> Tensor:
        patches = self.patches(x).flatten(2).mT
        return torch.cat([self.token.expand(len(x), 1, -1), patches], dim=1)


class _Transformer(nn.Module):
    """Blocks over embedded tokens with learnt positions, read out at the first or the last of them."""

    def __init__(self, embed: nn.Module, length: int, width: int, blocks: Sequence[nn.Module], outputs: int):
        super().__init__()
        self.embed, self.blocks = embed, nn.Sequential(*blocks)
        self.places = nn.Parameter(0.02 * torch.randn(length, width))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, outputs)
        self.place = 0 if isinstance(embed, _Patches) else -1

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.blocks(self.embed(x) + self.places)[:, self.place]))


class _Pooled(nn.Module):
    """Torch's encoder layers over tokens, or over vectors, averaged over positions."""

    def __init__(self, width: int, depth: int, length: int = 0, outputs: int = _CLASSES) -> None:
        super().__init__()
        self.embed = nn.Embedding(100, width) if length else nn.Identity()
        self.position = nn.Parameter(0.1 * torch.randn(length, width)) if length else 0.0
        self.layers = nn.Sequential(
            *(
                nn.TransformerEncoderLayer(width, 4, 4 * width, 0.0, "gelu", batch_first=True)
                for _ in range(depth)
            )
        )
        self.norm = nn.LayerNorm(width) if length else nn.Identity()
        self.head = nn.Linear(width, outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.layers(self.embed(x) + self.position)).mean(1))


class _Adapted(nn.Module):
    """GPT-2 of `transformers` with adapters of `peft`, and two outputs at the last word."""

    def __init__(self, width: int, depth: int) -> None:
        super().__init__()
        transformers, peft = _library("transformers"), _library("peft")
        config = transformers.GPT2Config(
            n_embd=width, n_layer=depth, n_head=12, attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0
        )
        adapters = peft.LoraConfig(r=8, target_modules=["c_attn"], fan_in_fan_out=True)
        self.model = peft.get_peft_model(transformers.GPT2Model(config), adapters)
        for name, parameter in self.model.named_parameters():
            if "lora_B" in name:  # zero as they are made, so that half of the gradients would be
                nn.init.normal_(parameter, std=0.02)
        self.head = nn.Linear(width, 2)

    def forward(self, words: Tensor) -> Tensor:
        return self.head(self.model(input_ids=words).last_hidden_state[:, -1])


def _library(name: str) -> Any:
    """Import a library of models; a torchvision that was built for another torch is not needed by it."""
    try:
        importlib.import_module("torchvision")
    except ImportError:
        pass
    except RuntimeError:
        sys.modules["torchvision"] = None  # type: ignore[assignment]
    return importlib.import_module(name)


def random_network(seed: int, quick: bool = False) -> nn.Module:
    """Return a convolutional network as a search draws them, with ten outputs."""
    draw = random.Random(seed)

    def layers() -> nn.Module:
        found: list[nn.Module] = []
        before = 3
        for _ in range(draw.randint(2, 2 if quick else 4)):
            width, kernel = draw.choice((4,) if quick else (8, 16, 24)), draw.choice((1, 3, 3))
            found += [nn.Conv2d(before, width, kernel, padding=kernel // 2)]
            found += [draw.choice((nn.ReLU, nn.GELU, nn.Tanh))()]
            found += [draw.choice((nn.Identity(), nn.AvgPool2d(2)))]
            before = width
        found += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(before, _CLASSES)]
        return nn.Sequential(*found)

    return seeded(layers, seed=seed)


# cases


@dataclass(frozen=True)
class Size:
    """Number of samples, and what else a case scales with."""

    samples: int
    width: int
    length: int = 1
    depth: int = 1
    outputs: int = _CLASSES


class _Margins(TorchFunctionMode):
    """Keeps how near to its kink a ReLU comes at each sample."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[Tensor] = []

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function in (torch.relu, torch.nn.functional.relu):
            self.found.append(args[0].detach().abs().flatten(1).amin(1))
        return function(*args, **(kwargs or {}))


def _away_from_kinks(model: nn.Module, x: Tensor) -> Tensor:
    """Return the samples at which no ReLU is so near to zero that rounding decides its slope.

    There float32 and float64 have different derivatives, each of them right, and no error could be told.
    """
    with torch.no_grad(), _Margins() as margins:
        model(x)
    return x[torch.stack(margins.found).amin(0) > 1e-6] if margins.found else x


@dataclass(frozen=True)
class Case:
    """A network with its inputs, at the size that is measured and at one that takes no time."""

    name: str
    title: str
    network: Callable[[Size], nn.Module]
    inputs: Callable[[Size, Generator], Tensor]
    full: Size
    quick: Size
    smooth: bool = False  # without samples at which rounding decides the slope of a ReLU

    def make(
        self, quick: bool = False, samples: int | None = None, outputs: int = _CLASSES
    ) -> tuple[Any, Tensor]:
        """Return the network in eval mode and its inputs, always the same ones."""
        size = replace(self.quick if quick else self.full, outputs=outputs)
        model, x = seeded(self.network, size), self.inputs(size, Generator().manual_seed(1))
        return model, (_away_from_kinks(model, x) if self.smooth else x)[:samples]


Draw = Callable[[Size, Generator], Tensor]


def _vectors(*shape: int) -> Draw:
    """Return what draws samples of a shape; -1 stands for the width of the case, -2 for its length."""

    def draw(size: Size, generator: Generator) -> Tensor:
        sides = ({-1: size.width, -2: size.length}.get(side, side) for side in shape)
        return torch.randn(size.samples, *sides, generator=generator)

    return draw


def _tokens(words: int) -> Draw:
    return lambda size, draw: torch.randint(words, (size.samples, size.length), generator=draw)


def _time_major(size: Size, generator: Generator) -> Tensor:
    return torch.randn(size.length, size.samples, 10, generator=generator)


def _perceptron(size: Size) -> nn.Module:
    return mlp(64, *[size.width] * 3, _CLASSES)


def _convolutional(size: Size) -> nn.Module:
    return cnn([3, size.width // 2, size.width, size.width], size.outputs, strides=(1, 2, 2))


def _pooled(size: Size) -> nn.Module:
    return _Pooled(size.width, 2, size.length)


def _deep(size: Size) -> nn.Module:
    return nn.Sequential(*mlp(100, *[size.width] * 15, act=nn.ReLU), nn.ReLU())


def _vit(size: Size, patch: int, encoder: Layer) -> nn.Module:
    tokens = 1 + (size.length // patch) ** 2
    blocks = [encoder(size.width, 3) for _ in range(size.depth)]
    return _Transformer(_Patches(size.width, patch), tokens, size.width, blocks, _CLASSES)


def _causal(size: Size) -> nn.Module:
    blocks = [_Encoder(size.width, 6, size.length) for _ in range(size.depth)]
    return _Transformer(nn.Embedding(1000, size.width), size.length, size.width, blocks, 2)


def _gpt(size: Size, words: int = 1000, rank: int = 0) -> nn.Module:
    """Return a decoder with two outputs; with a rank, only updates of low rank are selected."""
    linear = partial(_LoRA, rank=rank) if rank else nn.Linear
    blocks = [_Block(size.width, max(2, size.width // 64), True, linear) for _ in range(size.depth)]
    model = _Transformer(nn.Embedding(words, size.width), size.length, size.width, blocks, 2)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not rank or ".down." in name or ".up." in name)
    return model


_images = _vectors(3, -2, -2)


def _named(*cases: Case) -> dict[str, Case]:
    return {case.name: case for case in cases}


CASES = _named(
    Case("mlp", "MLP, 3 x 256, tanh", _perceptron, _vectors(64), Size(64, 256), Size(4, 16)),
    Case("cnn", "CNN, 32-64-64, 16 x 16", _convolutional, _images, Size(16, 64, 16), Size(3, 8, 8)),
    Case(
        "gru", "GRU, 64 units, 24 steps", lambda size: _Recurrent(size.width), _vectors(-2, 8),
        Size(32, 64, 24), Size(3, 8, 4),
    ),
    Case("transformer", "transformer, 2 x 64", _pooled, _tokens(100), Size(16, 64, 32), Size(3, 8, 4)),
)  # fmt: skip

# Kernels: images of CIFAR's size, the recurrent cell in a loop, and a residual network. The full sizes
# hold as many samples as any measurement takes; each takes the first of them.
KERNEL_CASES = _named(
    Case("mlp", "MLP, 3 x 256", _perceptron, _vectors(64), Size(2048, 256), Size(4, 16)),
    Case("cnn", "CNN, 32-64-64, 32 x 32", _convolutional, _images, Size(512, 64, 32), Size(3, 8, 8), True),
    Case(
        "resnet", "ResNet-18 layout, 16-128, 16 x 16", lambda size: _resnet(size.width, wide=False),
        _images, Size(64, 16, 16), Size(2, 2, 8),
    ),
    Case(
        "gru", "GRU, 64 units, 24 steps", lambda size: _Cells(8, size.width, _CLASSES), _vectors(-2, 8),
        Size(2048, 64, 24), Size(3, 8, 4),
    ),
    Case("transformer", "transformer, 2 x 64", _pooled, _tokens(100), Size(512, 64, 32), Size(3, 8, 4)),
)  # fmt: skip

# The two networks on which a paper on trace estimation is evaluated.
PAPER_CASES = _named(
    Case("deep", "15 x Linear 64, ReLU after each", _deep, _vectors(100), Size(50, 64), Size(3, 8)),
    Case(
        "states", "hidden states of a GRU", lambda size: nn.GRU(10, size.width), _time_major,
        Size(15, 64, 50), Size(2, 8, 4),
    ),
)  # fmt: skip

CONSTRUCTION_CASES = _named(
    Case(
        "mlp", "MLP 64-64-10", lambda size: mlp(64, size.width, _CLASSES), _vectors(64), Size(16, 64),
        Size(4, 8),
    ),
    Case("cnn", "CNN, 16-32-32, 16 x 16", _convolutional, _images, Size(16, 32, 16), Size(4, 8, 8)),
    Case(
        "resnet18", "ResNet-18, 64 x 64", lambda size: _resnet(size.width), _images,
        Size(16, 64, 64), Size(4, 2, 32),
    ),
    Case(
        "vit", "ViT-tiny, 65 tokens", lambda size: _vit(size, 8, _Encoder), _images,
        Size(16, 192, 64, 12), Size(4, 12, 16, 1),
    ),
    Case(
        "gpt", "transformer, 6 x 384, 64 words", _causal, _tokens(1000), Size(4, 384, 64, 6),
        Size(4, 12, 4, 1),
    ),
    Case(
        "gpt2", "GPT-2 with LoRA, 16 words", lambda size: _Adapted(size.width, size.depth), _tokens(1000),
        Size(4, 768, 16, 12), Size(4, 24, 4, 1),
    ),
)  # fmt: skip

# With any number of outputs, for what the row check costs.
ROW_CASES = _named(
    Case(
        "mlp", "MLP 784-1024-1024", lambda size: mlp(784, size.width, size.width, size.outputs, act=nn.ReLU),
        _vectors(784), Size(128, 1024), Size(3, 16),
    ),
    Case(
        "transformer", "transformer layer, 128", lambda size: _Pooled(size.width, 1, outputs=size.outputs),
        _vectors(32, -1), Size(16, 128), Size(3, 8),
    ),
    Case(
        "cnn", "three convolutions",
        lambda size: cnn([3, size.width // 2, size.width, size.width], size.outputs),
        _vectors(3, 16, 16), Size(16, 64), Size(3, 4),
    ),
)  # fmt: skip

# Of the sizes that people have.
REAL_CASES = _named(
    Case(
        "vit", "ViT-tiny, 5.4 M", lambda size: _vit(size, 4, _Block), _images,
        Size(16, 192, 32, 12), Size(3, 12, 16, 2),
    ),
    Case(
        "resnet18_scales", "ResNet-18, 11.2 M, scales .5 to 1.5",
        lambda size: _scaled(_resnet(size.width), True), _images, Size(16, 64, 64), Size(3, 4, 16),
    ),
    Case(
        "resnet18", "ResNet-18, 11.2 M, as made", lambda size: _scaled(_resnet(size.width), False),
        _images, Size(16, 64, 64), Size(3, 4, 16),
    ),
    Case("gpt", "GPT, 11 M", _gpt, _tokens(1000), Size(16, 384, 64, 6), Size(3, 8, 6, 2)),
    Case(
        "gpt_lora", "GPT, 11 M, LoRA of rank 8", lambda size: _gpt(size, rank=8), _tokens(1000),
        Size(16, 384, 64, 6), Size(3, 8, 6, 2),
    ),
    Case(
        "gpt2_lora", "GPT-2, 124 M, LoRA", lambda size: _gpt(size, 50257, 8), _tokens(50257),
        Size(4, 768, 64, 12), Size(3, 8, 6, 2),
    ),
    Case(
        "cell", "cell written by hand", lambda size: _ByHand(4, size.width), _vectors(-2, 4),
        Size(12, 24, 30), Size(3, 3, 3),
    ),
    Case(
        "gru_cell", "loop over GRUCell", lambda size: _Cells(4, size.width), _vectors(-2, 4),
        Size(12, 13, 30), Size(3, 3, 3),
    ),
)  # fmt: skip
