"""The networks on which the making of operators is measured, seeded, in float32; nothing is loaded."""

from __future__ import annotations

import importlib
import random
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from _models import Case, Size, _convolutional, _images, _ResidualBlock, _vectors
from torch import Generator, Tensor, nn

__all__ = ["NETWORKS", "ROW_NETWORKS", "RowNetwork", "random_network"]

_CLASSES, _WORDS = 10, 1000


@dataclass(frozen=True)
class Deep(Size):
    """A size with a number of blocks."""

    depth: int


def _small(size: Size) -> nn.Module:
    return nn.Sequential(nn.Linear(64, size.width), nn.Tanh(), nn.Linear(size.width, _CLASSES))


def _resnet18(size: Size) -> nn.Module:
    """The layout of torchvision's, for ten classes."""
    width = before = size.width
    stem = nn.Conv2d(3, width, 7, 2, padding=3, bias=False)
    layers: list[nn.Module] = [stem, nn.BatchNorm2d(width), nn.ReLU(), nn.MaxPool2d(3, 2, padding=1)]
    for stage in range(4):
        after = width * 2**stage
        layers += [_ResidualBlock(before, after, 1 if stage == 0 else 2), _ResidualBlock(after, after, 1)]
        before = after
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(before, _CLASSES))


class _Blocks(nn.Module):
    """Pre-norm encoder layers with learnt positions, read out at one position."""

    def __init__(self, size: Deep, heads: int, positions: int, outputs: int, place: int) -> None:
        super().__init__()
        width = size.width
        self.position = nn.Parameter(0.02 * torch.randn(positions, width))
        make = partial(nn.TransformerEncoderLayer, dropout=0.0, activation="gelu", batch_first=True)
        self.blocks = nn.ModuleList(make(width, heads, 4 * width, norm_first=True) for _ in range(size.depth))
        self.norm, self.head, self.place = nn.LayerNorm(width), nn.Linear(width, outputs), place

    def forward(self, hidden: Tensor, mask: Tensor | None = None) -> Tensor:
        hidden = hidden + self.position
        for block in self.blocks:
            hidden = block(hidden, src_mask=mask, is_causal=mask is not None)
        return self.head(self.norm(hidden[:, self.place]))


class _VisionTransformer(nn.Module):
    """ViT: patches of 8 x 8 and a class token."""

    def __init__(self, size: Deep) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, size.width, 8, stride=8)
        self.token = nn.Parameter(0.02 * torch.randn(1, size.width))
        self.blocks = _Blocks(size, 3, 1 + (size.length // 8) ** 2, _CLASSES, place=0)

    def forward(self, images: Tensor) -> Tensor:
        patches = self.patches(images).flatten(2).mT
        return self.blocks(torch.cat([self.token.expand(len(images), 1, -1), patches], dim=1))


class _LanguageModel(nn.Module):
    """A causal transformer with two outputs at the last word."""

    def __init__(self, size: Deep) -> None:
        super().__init__()
        self.embed = nn.Embedding(_WORDS, size.width)
        self.blocks = _Blocks(size, 6, size.length, 2, place=-1)
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(size.length))

    def forward(self, words: Tensor) -> Tensor:
        return self.blocks(self.embed(words), self.mask)


class _Adapted(nn.Module):
    """GPT-2 with low-rank adapters, and two outputs at the last word."""

    def __init__(self, size: Deep) -> None:
        super().__init__()
        transformers, peft = _library("transformers"), _library("peft")
        config = transformers.GPT2Config(
            n_embd=size.width, n_layer=size.depth, n_head=12, attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0
        )
        adapters = peft.LoraConfig(r=8, target_modules=["c_attn"], fan_in_fan_out=True)
        self.model = peft.get_peft_model(transformers.GPT2Model(config), adapters)
        for name, parameter in self.model.named_parameters():
            if "lora_B" in name:  # zero as they are made, so that half of the gradients would be
                nn.init.normal_(parameter, std=0.02)
        self.head = nn.Linear(size.width, 2)

    def forward(self, words: Tensor) -> Tensor:
        return self.head(self.model(input_ids=words).last_hidden_state[:, -1])


def _library(name: str) -> object:
    """Import a library of models; a torchvision that was built for another torch is not needed by it."""
    try:
        importlib.import_module("torchvision")
    except ImportError:
        pass
    except RuntimeError:
        sys.modules["torchvision"] = None  # type: ignore[assignment]
    return importlib.import_module(name)


def _words(size: Size, generator: Generator) -> Tensor:
    return torch.randint(_WORDS, (size.samples, size.length), generator=generator)


NETWORKS: dict[str, Case] = {
    case.name: case
    for case in (
        Case("mlp", "MLP 64-64-10", _small, _vectors, Size(16, 64, 1), Size(4, 8, 1)),
        Case("cnn", "CNN, 16-32-32, 16 x 16", _convolutional, _images, Size(16, 32, 16), Size(4, 8, 8)),
        Case("resnet18", "ResNet-18, 64 x 64", _resnet18, _images, Size(16, 64, 64), Size(4, 2, 32)),
        Case(
            "vit",
            "ViT-tiny, 65 tokens",
            _VisionTransformer,
            _images,
            Deep(16, 192, 64, 12),
            Deep(4, 12, 16, 1),
        ),
        Case(
            "gpt",
            "transformer, 6 x 384, 64 words",
            _LanguageModel,
            _words,
            Deep(4, 384, 64, 6),
            Deep(4, 12, 4, 1),
        ),
        Case("gpt2", "GPT-2 with LoRA, 16 words", _Adapted, _words, Deep(4, 768, 16, 12), Deep(4, 24, 4, 1)),
    )
}


def random_network(seed: int, quick: bool = False) -> nn.Module:
    """Return a convolutional network as a search draws them, with ten outputs."""
    draw = random.Random(seed)
    layers: list[nn.Module] = []
    before = 3
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for _ in range(draw.randint(2, 2 if quick else 4)):
            width, kernel = draw.choice((4,) if quick else (8, 16, 24)), draw.choice((1, 3, 3))
            layers += [nn.Conv2d(before, width, kernel, padding=kernel // 2)]
            layers += [
                draw.choice((nn.ReLU, nn.GELU, nn.Tanh))(),
                draw.choice((nn.Identity(), nn.AvgPool2d(2))),
            ]
            before = width
        layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(before, _CLASSES)]
        return nn.Sequential(*layers).eval()


# -- networks with any number of outputs, for what the row check costs


class _Layer(nn.Module):
    """One encoder layer, averaged over positions."""

    def __init__(self, outputs: int, width: int) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(width, 4, 4 * width, 0.0, "gelu", batch_first=True)
        self.head = nn.Linear(width, outputs)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.head(self.layer(hidden).mean(1))


def _wide(outputs: int, width: int) -> nn.Module:
    hidden = nn.Linear(784, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU()
    return nn.Sequential(*hidden, nn.Linear(width, outputs))


def _three_convolutions(outputs: int, width: int) -> nn.Module:
    layers: list[nn.Module] = []
    for before, after in ((3, width // 2), (width // 2, width), (width, width)):
        layers += [nn.Conv2d(before, after, 3, padding=1), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, outputs))


@dataclass(frozen=True)
class RowNetwork:
    """A network for any number of outputs.

    Attributes:
        title: What the table says.
        network: Builds it from the number of outputs and a width.
        shape: Of one sample.
        samples: Their number.
        width: The width that is measured.
        quick: The one that takes no time.
    """

    title: str
    network: Callable[[int, int], nn.Module]
    shape: tuple[int, ...]
    samples: int
    width: int
    quick: int

    def make(self, outputs: int, quick: bool) -> tuple[nn.Module, Tensor]:
        """Return the network in eval mode and its samples."""
        width, samples = (self.quick, 3) if quick else (self.width, self.samples)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = self.network(outputs, width).eval()
        shape = tuple(width if size < 0 else size for size in self.shape)
        return model, torch.randn(samples, *shape, generator=Generator().manual_seed(1))


ROW_NETWORKS: dict[str, RowNetwork] = {
    "mlp": RowNetwork("MLP 784-1024-1024", _wide, (784,), 128, 1024, 16),
    "transformer": RowNetwork("transformer layer, 128", _Layer, (32, -1), 16, 128, 8),
    "cnn": RowNetwork("three convolutions", _three_convolutions, (3, 16, 16), 16, 64, 4),
}
