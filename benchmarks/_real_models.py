"""Networks of the sizes that people have, with random weights: nothing is downloaded."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["REAL_CASES", "RealCase"]


class _Attention(nn.Module):
    """Self-attention with one matrix for queries, keys and values."""

    def __init__(self, width: int, heads: int, causal: bool, adapt: Callable[[nn.Linear], nn.Module]) -> None:
        super().__init__()
        self.heads, self.causal = heads, causal
        self.qkv = adapt(nn.Linear(width, 3 * width))
        self.proj = adapt(nn.Linear(width, width))

    def forward(self, x: Tensor) -> Tensor:
        split = self.qkv(x).unflatten(-1, (3, self.heads, -1)).movedim(-3, 0).transpose(2, 3)
        mixed = F.scaled_dot_product_attention(*split.unbind(), is_causal=self.causal)
        return self.proj(mixed.transpose(1, 2).flatten(-2))


class _Block(nn.Module):
    """A pre-norm transformer block."""

    def __init__(self, width: int, heads: int, causal: bool, adapt: Callable[[nn.Linear], nn.Module]) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = _Attention(width, heads, causal, adapt)
        self.fc1, self.fc2 = adapt(nn.Linear(width, 4 * width)), adapt(nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x))))


class ViT(nn.Module):
    """A vision transformer that reads its class token."""

    def __init__(
        self, width: int, depth: int, heads: int, classes: int, side: int = 32, patch: int = 4
    ) -> None:
        super().__init__()
        tokens = (side // patch) ** 2
        self.patches = nn.Conv2d(3, width, patch, patch)
        self.token = nn.Parameter(0.02 * torch.randn(1, 1, width))
        self.places = nn.Parameter(0.02 * torch.randn(1, tokens + 1, width))
        self.blocks = nn.Sequential(*(_Block(width, heads, False, lambda layer: layer) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.patches(x).flatten(2).mT
        tokens = torch.cat([self.token.expand(len(x), -1, -1), tokens], 1) + self.places
        return self.head(self.norm(self.blocks(tokens))[:, 0])


class _LoRA(nn.Module):
    """A fixed linear layer and a learned update of low rank."""

    def __init__(self, base: nn.Linear, rank: int) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.down = nn.Linear(base.in_features, rank, bias=False)
        self.up = nn.Linear(rank, base.out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.up(self.down(x))


class GPT(nn.Module):
    """A decoder that reads its last position; with a rank, only updates of low rank are selected."""

    def __init__(
        self, width: int, depth: int, heads: int, vocabulary: int, length: int, outputs: int, rank: int = 0
    ) -> None:
        super().__init__()

        def adapt(layer: nn.Linear) -> nn.Module:
            return _LoRA(layer, rank) if rank else layer

        self.tokens, self.places = nn.Embedding(vocabulary, width), nn.Embedding(length, width)
        self.blocks = nn.Sequential(*(_Block(width, heads, True, adapt) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, outputs)
        if rank:
            for name, parameter in self.named_parameters():
                parameter.requires_grad_(".down." in name or ".up." in name)

    def forward(self, x: Tensor) -> Tensor:
        h = self.tokens(x) + self.places(torch.arange(x.shape[1], device=x.device))
        return self.head(self.norm(self.blocks(h))[:, -1])


class _Residual(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(outputs)
        self.short = nn.Sequential()
        if stride > 1 or inputs != outputs:
            self.short = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)
            )

    def forward(self, x: Tensor) -> Tensor:
        inner = self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x)))))
        return F.relu(inner + self.short(x))


class ResNet(nn.Module):
    """ResNet-18; last scales of the residual branches are zero, as most recipes make them, or random."""

    def __init__(self, width: int, classes: int, scales: bool) -> None:
        super().__init__()
        layers: list[nn.Module] = [
            nn.Conv2d(3, width, 7, 2, 3, bias=False), nn.BatchNorm2d(width), nn.ReLU(), nn.MaxPool2d(3, 2, 1)
        ]  # fmt: skip
        inputs = width
        for stage in range(4):
            for number in range(2):
                outputs = width * 2**stage
                layers.append(_Residual(inputs, outputs, 2 if stage and not number else 1))
                inputs = outputs
        self.body, self.head = nn.Sequential(*layers), nn.Linear(inputs, classes)
        for layer in self.modules():
            if isinstance(layer, nn.BatchNorm2d) and scales:
                nn.init.uniform_(layer.weight, 0.5, 1.5)
            elif isinstance(layer, _Residual):
                nn.init.zeros_(layer.norm2.weight)
        if scales:
            for layer in self.modules():
                if isinstance(layer, _Residual):
                    nn.init.uniform_(layer.norm2.weight, 0.5, 1.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x).mean((2, 3)))


class CellLoop(nn.Module):
    """A recurrence written by hand; every state is output."""

    def __init__(self, inputs: int, states: int) -> None:
        super().__init__()
        self.read, self.move = nn.Linear(inputs, states), nn.Linear(states, states, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        h, found = x.new_zeros(len(x), self.move.in_features), []
        for step in x.unbind(1):
            h = torch.tanh(self.read(step) + self.move(h))
            found.append(h)
        return torch.stack(found, 1).flatten(1)


class GRULoop(nn.Module):
    """A loop over `torch.nn.GRUCell`; every state is output."""

    def __init__(self, inputs: int, states: int) -> None:
        super().__init__()
        self.cell = nn.GRUCell(inputs, states)

    def forward(self, x: Tensor) -> Tensor:
        h, found = x.new_zeros(len(x), self.cell.hidden_size), []
        for step in x.unbind(1):
            h = self.cell(step, h)
            found.append(h)
        return torch.stack(found, 1).flatten(1)


@dataclass(frozen=True)
class RealCase:
    """A network, its samples, and small ones for a smoke test.

    Attributes:
        name: How it is chosen.
        title: How it is shown.
        samples: Number N of samples.
        build: Makes the network, a small one for True.
        inputs: Makes N samples for it.
    """

    name: str
    title: str
    samples: int
    build: Callable[[bool], nn.Module]
    inputs: Callable[[int, bool], Tensor]

    def make(self, quick: bool = False, samples: int | None = None) -> tuple[nn.Module, Tensor]:
        """Return the network in evaluation mode and its samples, seeded."""
        torch.manual_seed(0)
        model = self.build(quick).eval()
        return model, self.inputs(samples or (3 if quick else self.samples), quick)


def _images(side: int) -> Callable[[int, bool], Tensor]:
    return lambda count, quick: torch.randn(count, 3, 16 if quick else side, 16 if quick else side)


def _tokens(vocabulary: int, length: int) -> Callable[[int, bool], Tensor]:
    return lambda n, quick: torch.randint(20 if quick else vocabulary, (n, 6 if quick else length))


def _vit(quick: bool) -> nn.Module:
    return ViT(12, 2, 2, 3, 16, 8) if quick else ViT(192, 12, 3, 10)


def _gpt(
    rank: int, width: int = 384, depth: int = 6, heads: int = 6, words: int = 1000
) -> Callable[[bool], GPT]:
    return lambda quick: (
        GPT(8, 2, 2, 20, 6, 2, rank and 2) if quick else GPT(width, depth, heads, words, 64, 2, rank)
    )


def _steps(count: int, quick: bool) -> Tensor:
    return torch.randn(count, 3 if quick else 30, 4)


REAL_CASES = {
    case.name: case
    for case in (
        RealCase("vit", "ViT-tiny, 5.4 M", 16, _vit, _images(32)),
        RealCase(
            "resnet18_scales", "ResNet-18, 11.2 M, scales .5 to 1.5", 16,
            lambda quick: ResNet(4 if quick else 64, 10, True), _images(64),
        ),
        RealCase(
            "resnet18", "ResNet-18, 11.2 M, as made", 16,
            lambda quick: ResNet(4 if quick else 64, 10, False), _images(64),
        ),
        RealCase("gpt", "GPT, 11 M", 16, _gpt(0), _tokens(1000, 64)),
        RealCase("gpt_lora", "GPT, 11 M, LoRA of rank 8", 16, _gpt(8), _tokens(1000, 64)),
        RealCase("gpt2_lora", "GPT-2, 124 M, LoRA", 4, _gpt(8, 768, 12, 12, 50257), _tokens(50257, 64)),
        RealCase("cell", "cell written by hand", 12, lambda quick: CellLoop(4, 3 if quick else 24), _steps),
        RealCase("gru_cell", "loop over GRUCell", 12, lambda quick: GRULoop(4, 3 if quick else 13), _steps),
    )
}  # fmt: skip
