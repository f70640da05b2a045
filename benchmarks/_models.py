"""The networks that are measured: one of each kind, seeded, in float32."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Generator, Tensor, nn

__all__ = ["CASES", "KERNEL_CASES", "PAPER_CASES", "Case"]

_CLASSES = 10


@dataclass(frozen=True)
class Size:
    """Number of samples, and what else a case scales with."""

    samples: int
    width: int
    length: int


@dataclass(frozen=True)
class Case:
    """A network with its inputs.

    Attributes:
        name: Short name, as on the command line.
        title: What the table says.
        network: Builds the network for a size.
        inputs: Draws the inputs for a size.
        full: The size that is measured.
        quick: A size that takes no time.
    """

    name: str
    title: str
    network: Callable[[Size], nn.Module]
    inputs: Callable[[Size, Generator], Tensor]
    full: Size
    quick: Size

    def make(self, quick: bool = False, samples: int | None = None) -> tuple[nn.Module, Tensor]:
        """Return the network in eval mode and its inputs, always the same ones."""
        size = self.quick if quick else self.full
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = self.network(size).eval()
        x = self.inputs(size, Generator().manual_seed(1))
        return model, x[:samples]


def _perceptron(size: Size) -> nn.Module:
    hidden = [nn.Linear(64, size.width)]
    hidden += [nn.Linear(size.width, size.width) for _ in range(2)]
    layers = [part for layer in hidden for part in (layer, nn.Tanh())]
    return nn.Sequential(*layers, nn.Linear(size.width, _CLASSES))


def _convolutional(size: Size) -> nn.Module:
    width = size.width
    return nn.Sequential(
        nn.Conv2d(3, width // 2, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(width // 2, width, 3, padding=1, stride=2),
        nn.ReLU(),
        nn.Conv2d(width, width, 3, padding=1, stride=2),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(width, _CLASSES),
    )


class _Recurrent(nn.Module):
    """A GRU read out at its last step."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.rnn = nn.GRU(8, size.width, batch_first=True)
        self.head = nn.Linear(size.width, _CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(x)[0][:, -1])


class _Transformer(nn.Module):
    """Two encoder layers over embedded tokens, averaged over positions."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        width = size.width
        self.embed = nn.Embedding(100, width)
        self.position = nn.Parameter(0.1 * torch.randn(size.length, width))
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(width, 4, 4 * width, 0.0, "gelu", batch_first=True) for _ in range(2)
        )
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, _CLASSES)

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.embed(tokens) + self.position
        for layer in self.layers:
            hidden = layer(hidden)
        return self.head(self.norm(hidden).mean(1))


def _vectors(size: Size, generator: Generator) -> Tensor:
    return torch.randn(size.samples, 64, generator=generator)


def _images(size: Size, generator: Generator) -> Tensor:
    return torch.randn(size.samples, 3, size.length, size.length, generator=generator)


def _sequences(size: Size, generator: Generator) -> Tensor:
    return torch.randn(size.samples, size.length, 8, generator=generator)


def _tokens(size: Size, generator: Generator) -> Tensor:
    return torch.randint(100, (size.samples, size.length), generator=generator)


CASES: dict[str, Case] = {
    case.name: case
    for case in (
        Case("mlp", "MLP, 3 x 256, tanh", _perceptron, _vectors, Size(64, 256, 1), Size(4, 16, 1)),
        Case("cnn", "CNN, 32-64-64, 16 x 16", _convolutional, _images, Size(16, 64, 16), Size(3, 8, 8)),
        Case("gru", "GRU, 64 units, 24 steps", _Recurrent, _sequences, Size(32, 64, 24), Size(3, 8, 4)),
        Case("transformer", "transformer, 2 x 64", _Transformer, _tokens, Size(16, 64, 32), Size(3, 8, 4)),
    )
}


# kernels: the same four, images of CIFAR's size, the recurrent cell in a loop, and a residual network


class _RecurrentCells(nn.Module):
    """A GRU cell called in a loop, which `torch.func.vmap` can differentiate, read out at its last step."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.cell = nn.GRUCell(8, size.width)
        self.head = nn.Linear(size.width, _CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        hidden = x.new_zeros(len(x), self.cell.hidden_size)
        for step in range(x.shape[1]):
            hidden = self.cell(x[:, step], hidden)
        return self.head(hidden)


class _ResidualBlock(nn.Module):
    """Two 3 x 3 convolutions with batch normalisation, and a way around them."""

    def __init__(self, before: int, width: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(before, width, 3, stride, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width),
        )
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or before != width:
            self.shortcut = nn.Sequential(
                nn.Conv2d(before, width, 1, stride, bias=False), nn.BatchNorm2d(width)
            )

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.body(x) + self.shortcut(x))


def _residual(size: Size) -> nn.Module:
    """Eight residual blocks in four stages, each twice as wide as the one before: the layout of ResNet-18."""
    width = before = size.width
    layers: list[nn.Module] = [
        nn.Conv2d(3, width, 3, padding=1, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(),
    ]
    for stage in range(4):
        after = width * 2**stage
        layers += [_ResidualBlock(before, after, 1 if stage == 0 else 2), _ResidualBlock(after, after, 1)]
        before = after
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(before, _CLASSES))


# The full sizes hold as many samples as any measurement takes; each takes the first of them.
KERNEL_CASES: dict[str, Case] = {
    case.name: case
    for case in (
        Case("mlp", "MLP, 3 x 256", _perceptron, _vectors, Size(2048, 256, 1), Size(4, 16, 1)),
        Case("cnn", "CNN, 32-64-64, 32 x 32", _convolutional, _images, Size(512, 64, 32), Size(3, 8, 8)),
        Case(
            "resnet", "ResNet-18 layout, 16-128, 16 x 16", _residual, _images, Size(64, 16, 16), Size(2, 2, 8)
        ),
        Case(
            "gru", "GRU, 64 units, 24 steps", _RecurrentCells, _sequences, Size(2048, 64, 24), Size(3, 8, 4)
        ),
        Case("transformer", "transformer, 2 x 64", _Transformer, _tokens, Size(512, 64, 32), Size(3, 8, 4)),
    )
}


# the two networks on which a paper on trace estimation is evaluated


def _deep(size: Size) -> nn.Module:
    widths = [100, *[size.width] * 15]
    pairs = zip(widths, widths[1:], strict=False)
    return nn.Sequential(*(part for a, b in pairs for part in (nn.Linear(a, b), nn.ReLU())))


def _features(size: Size, generator: Generator) -> Tensor:
    return torch.randn(size.samples, 100, generator=generator)


def _time_major(size: Size, generator: Generator) -> Tensor:
    return torch.randn(size.length, size.samples, 10, generator=generator)


def _states(size: Size) -> nn.Module:
    return nn.GRU(10, size.width)


PAPER_CASES: dict[str, Case] = {
    case.name: case
    for case in (
        Case("deep", "15 x Linear 64, ReLU after each", _deep, _features, Size(50, 64, 1), Size(3, 8, 1)),
        Case("states", "hidden states of a GRU", _states, _time_major, Size(15, 64, 50), Size(2, 8, 4)),
    )
}
