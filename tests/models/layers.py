"""Every layer of torch.nn, and the operations that models are written with, each inside a small network."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["HOW", "LAYERS", "NOT_LAYERS", "OPERATIONS", "Inside", "Part"]


@dataclass(frozen=True)
class Part:
    """One layer, and the shape of a sample that it takes.

    Attributes:
        make: Makes it; the global random state is seeded.
        shape: Shape of one sample in front of it.
    """

    make: Callable[[], Callable[[Tensor], Any]]
    shape: tuple[int, ...]


class Inside(nn.Module):
    """A linear layer, the part, and a linear layer: gradients go through the part."""

    def __init__(self, part: Part, outputs: int) -> None:
        super().__init__()
        self.shape = part.shape
        self.front = nn.Linear(3, math.prod(part.shape))
        self.part = part.make()
        with torch.no_grad():
            width = self._features(torch.randn(2, 3)).shape[1]
        self.head = nn.Linear(width, outputs)

    def _features(self, x: Tensor) -> Tensor:
        result = self.part(self.front(x).unflatten(1, self.shape))
        while isinstance(result, tuple):
            result = result[0]
        return result.reshape(len(x), -1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self._features(x))


class Call(nn.Module):
    """A function of the features."""

    def __init__(self, function: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Any:
        return self.function(x)


class Against(nn.Module):
    """A loss against fixed targets, one value for each entry or sample."""

    def __init__(
        self, loss: nn.Module, target: Any, *more: Any, link: Callable[[Tensor], Tensor] | None = None
    ):
        super().__init__()
        self.loss, self.target, self.more, self.link = loss, target, more, link

    def forward(self, x: Tensor) -> Tensor:
        x = x if self.link is None else self.link(x)
        return self.loss(x, *(t.expand(len(x), *t.shape) for t in (self.target, *self.more)))


class Twice(nn.Module):
    """A layer that takes two or three tensors."""

    def __init__(self, layer: nn.Module, *maps: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.layer, self.maps = layer, maps

    def forward(self, x: Tensor) -> Any:
        return self.layer(*(one(x) for one in self.maps))


class Unpooled(nn.Module):
    """Pooling with indices, and its inverse."""

    def __init__(self, pool: type[nn.Module], unpool: type[nn.Module]) -> None:
        super().__init__()
        self.pool, self.unpool = pool(2, return_indices=True), unpool(2)

    def forward(self, x: Tensor) -> Tensor:
        return self.unpool(*self.pool(x))


class Initialised(nn.Module):
    """A lazy layer after its first call."""

    def __init__(self, layer: nn.Module, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.layer = layer
        layer(torch.randn(2, *shape))

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


def normed(layer: nn.Module) -> nn.Module:
    """Give a norm running statistics, and weights, that are not the first ones."""
    for tensor in (*layer.parameters(), *layer.buffers()):
        if tensor.is_floating_point():
            with torch.no_grad():
                tensor.copy_(torch.rand_like(tensor) + 0.5)
    return layer


def _seeded_pool(x: Tensor, dims: int) -> Tensor:
    samples = torch.full((len(x), x.shape[1], dims), 0.3, dtype=x.dtype)
    pool = F.fractional_max_pool2d if dims == 2 else F.fractional_max_pool3d
    return pool(x, 2, output_size=(2,) * dims, _random_samples=samples)


LINE, PLANE, ROOM = (2, 4), (2, 4, 4), (2, 4, 4, 4)
FLAT = (6,)
STEPS = (3, 4)
IN_DIMS = {1: LINE, 2: PLANE, 3: ROOM}


def _by_dimension() -> dict[str, Part]:
    """Layers that exist for one, two and three dimensions."""
    found: dict[str, Part] = {}
    for n, shape in IN_DIMS.items():
        kinds: dict[str, Callable[[], Any]] = {
            f"AdaptiveAvgPool{n}d": lambda n=n: getattr(nn, f"AdaptiveAvgPool{n}d")(3),
            f"AdaptiveMaxPool{n}d": lambda n=n: getattr(nn, f"AdaptiveMaxPool{n}d")(3),
            f"AvgPool{n}d": lambda n=n: getattr(nn, f"AvgPool{n}d")(3, 2, 1, count_include_pad=False),
            f"MaxPool{n}d": lambda n=n: getattr(nn, f"MaxPool{n}d")(3, 2, 1),
            f"LPPool{n}d": lambda n=n: getattr(nn, f"LPPool{n}d")(2, 2),
            f"MaxUnpool{n}d": lambda n=n: Unpooled(
                getattr(nn, f"MaxPool{n}d"), getattr(nn, f"MaxUnpool{n}d")
            ),
            f"BatchNorm{n}d": lambda n=n: normed(getattr(nn, f"BatchNorm{n}d")(2)),
            f"InstanceNorm{n}d": lambda n=n: normed(getattr(nn, f"InstanceNorm{n}d")(2, affine=True)),
            f"Conv{n}d": lambda n=n: getattr(nn, f"Conv{n}d")(2, 4, 3, padding=1, groups=2),
            f"ConvTranspose{n}d": lambda n=n: getattr(nn, f"ConvTranspose{n}d")(2, 3, 2, stride=2),
            f"CircularPad{n}d": lambda n=n: getattr(nn, f"CircularPad{n}d")(1),
            f"ConstantPad{n}d": lambda n=n: getattr(nn, f"ConstantPad{n}d")(1, 0.5),
            f"ReflectionPad{n}d": lambda n=n: getattr(nn, f"ReflectionPad{n}d")(1),
            f"ReplicationPad{n}d": lambda n=n: getattr(nn, f"ReplicationPad{n}d")(1),
            f"ZeroPad{n}d": lambda n=n: getattr(nn, f"ZeroPad{n}d")(1),
            f"Dropout{n}d": lambda n=n: getattr(nn, f"Dropout{n}d")(),
            f"LazyConv{n}d": lambda n=n, s=shape: Initialised(getattr(nn, f"LazyConv{n}d")(3, 2), s),
            f"LazyConvTranspose{n}d": lambda n=n, s=shape: Initialised(
                getattr(nn, f"LazyConvTranspose{n}d")(3, 2), s
            ),
            f"LazyBatchNorm{n}d": lambda n=n, s=shape: Initialised(getattr(nn, f"LazyBatchNorm{n}d")(), s),
            f"LazyInstanceNorm{n}d": lambda n=n, s=shape: Initialised(
                getattr(nn, f"LazyInstanceNorm{n}d")(affine=True), s
            ),
        }
        found |= {name: Part(make, shape) for name, make in kinds.items()}
    return found


def _activations() -> dict[str, Part]:
    plain = (
        "CELU ELU GELU Hardshrink Hardsigmoid Hardswish Hardtanh LeakyReLU LogSigmoid Mish PReLU RReLU ReLU "
        "ReLU6 SELU SiLU Sigmoid Softplus Softshrink Softsign Tanh Tanhshrink Identity AlphaDropout Dropout "
        "FeatureAlphaDropout Flatten"
    )
    found = {name: Part(getattr(nn, name), FLAT) for name in plain.split()}
    found |= {
        name: Part(lambda name=name: getattr(nn, name)(-1), FLAT)
        for name in ("Softmax", "LogSoftmax", "Softmin")
    }
    return found | {
        "GLU": Part(lambda: nn.GLU(1), FLAT),
        "Threshold": Part(lambda: nn.Threshold(0.1, 2.0), FLAT),
        "Softmax2d": Part(nn.Softmax2d, PLANE),
        "PReLU of channels": Part(lambda: nn.PReLU(2), PLANE),
    }


def _log_softmax(x: Tensor) -> Tensor:
    return x.log_softmax(-1)


def _losses() -> dict[str, Part]:
    every = torch.linspace(-1, 1, 6, dtype=torch.float64)
    sign = every.sign()
    one = torch.tensor(1.0, dtype=torch.float64)
    near, far = (every + 1) / 2, 0.5 - 1.5 * every
    each = {"reduction": "none"}
    return {
        "BCELoss": Part(lambda: Against(nn.BCELoss(**each), every.abs(), link=torch.sigmoid), FLAT),
        "BCEWithLogitsLoss": Part(lambda: Against(nn.BCEWithLogitsLoss(**each), every.abs()), FLAT),
        "CosineEmbeddingLoss": Part(lambda: Against(nn.CosineEmbeddingLoss(**each), every, one), FLAT),
        "CrossEntropyLoss": Part(
            lambda: Against(nn.CrossEntropyLoss(**each, label_smoothing=0.1), torch.tensor(2)), FLAT
        ),
        "CTCLoss": Part(
            lambda: Call(
                lambda x: nn.CTCLoss(**each)(
                    x.log_softmax(-1).transpose(0, 1),
                    torch.full((len(x), 1), 1),
                    torch.full((len(x),), 3),
                    torch.full((len(x),), 1),
                )
            ),
            STEPS,
        ),
        "GaussianNLLLoss": Part(lambda: Against(nn.GaussianNLLLoss(**each), every, every.abs() + 0.1), FLAT),
        "HingeEmbeddingLoss": Part(lambda: Against(nn.HingeEmbeddingLoss(**each), sign), FLAT),
        "HuberLoss": Part(lambda: Against(nn.HuberLoss(**each), every), FLAT),
        "KLDivLoss": Part(
            lambda: Against(nn.KLDivLoss(**each), every.softmax(0), link=lambda x: x.log_softmax(-1)), FLAT
        ),
        "L1Loss": Part(lambda: Against(nn.L1Loss(**each), every), FLAT),
        "MSELoss": Part(lambda: Against(nn.MSELoss(**each), every), FLAT),
        "MarginRankingLoss": Part(lambda: Against(nn.MarginRankingLoss(**each), every, sign), FLAT),
        "MultiLabelMarginLoss": Part(
            lambda: Against(nn.MultiLabelMarginLoss(**each), torch.tensor([1, 3, -1, 0, 0, 0])), FLAT
        ),
        "MultiLabelSoftMarginLoss": Part(
            lambda: Against(nn.MultiLabelSoftMarginLoss(**each), (sign > 0).double()), FLAT
        ),
        "MultiMarginLoss": Part(lambda: Against(nn.MultiMarginLoss(**each), torch.tensor(2)), FLAT),
        "NLLLoss": Part(
            lambda: Against(nn.NLLLoss(**each), torch.tensor(2), link=lambda x: x.log_softmax(-1)), FLAT
        ),
        "PoissonNLLLoss": Part(lambda: Against(nn.PoissonNLLLoss(**each), every.abs()), FLAT),
        "SmoothL1Loss": Part(lambda: Against(nn.SmoothL1Loss(**each), every), FLAT),
        "SoftMarginLoss": Part(lambda: Against(nn.SoftMarginLoss(**each), sign), FLAT),
        "TripletMarginLoss": Part(lambda: Against(nn.TripletMarginLoss(**each), near, far), FLAT),
        "TripletMarginWithDistanceLoss": Part(
            lambda: Against(nn.TripletMarginWithDistanceLoss(**each), near, far), FLAT
        ),
        "AdaptiveLogSoftmaxWithLoss": Part(
            lambda: Call(nn.AdaptiveLogSoftmaxWithLoss(6, 8, cutoffs=[3], div_value=2).log_prob), FLAT
        ),
    }


def _tokens(x: Tensor) -> Tensor:
    return torch.arange(4).expand(len(x), 4)


def _looked_up(layer: nn.Module) -> nn.Module:
    class Looked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, x: Tensor) -> Tensor:
            return x[:, None] * self.layer(_tokens(x)).reshape(len(x), -1, 6)

    return Looked()


def _others() -> dict[str, Part]:
    wide = {"batch_first": True}
    return {
        "Bilinear": Part(lambda: Twice(nn.Bilinear(6, 6, 3), lambda x: x, torch.tanh), FLAT),
        "ChannelShuffle": Part(lambda: nn.ChannelShuffle(2), (4, 2, 2)),
        "CosineSimilarity": Part(lambda: Twice(nn.CosineSimilarity(-1), lambda x: x, torch.tanh), STEPS),
        "CrossMapLRN2d": Part(lambda: nn.CrossMapLRN2d(2), PLANE),
        "LocalResponseNorm": Part(lambda: nn.LocalResponseNorm(2), PLANE),
        "Embedding": Part(lambda: _looked_up(nn.Embedding(5, 6)), FLAT),
        "EmbeddingBag": Part(lambda: _looked_up(nn.EmbeddingBag(5, 6)), FLAT),
        "Fold": Part(lambda: nn.Fold((3, 3), 2), (8, 4)),
        "Unfold": Part(lambda: nn.Unfold(2), PLANE),
        "FractionalMaxPool2d": Part(lambda: Call(lambda x: _seeded_pool(x, 2)), PLANE),
        "FractionalMaxPool3d": Part(lambda: Call(lambda x: _seeded_pool(x, 3)), ROOM),
        "GroupNorm": Part(lambda: normed(nn.GroupNorm(2, 4)), (4, 3)),
        "LayerNorm": Part(lambda: normed(nn.LayerNorm(4)), STEPS),
        "RMSNorm": Part(lambda: normed(nn.RMSNorm(4)), STEPS),
        "SyncBatchNorm": Part(lambda: normed(nn.SyncBatchNorm(2)), PLANE),
        "RNN": Part(lambda: nn.RNN(4, 3, 2, **wide), STEPS),
        "GRU": Part(lambda: nn.GRU(4, 3, bidirectional=True, **wide), STEPS),
        "LSTM": Part(lambda: nn.LSTM(4, 3, proj_size=2, **wide), STEPS),
        "RNNCell": Part(lambda: nn.RNNCell(6, 3, nonlinearity="relu"), FLAT),
        "GRUCell": Part(lambda: nn.GRUCell(6, 3), FLAT),
        "LSTMCell": Part(lambda: nn.LSTMCell(6, 3), FLAT),
        "Linear": Part(lambda: nn.Linear(4, 3), STEPS),
        "LazyLinear": Part(lambda: Initialised(nn.LazyLinear(3), STEPS), STEPS),
        "MultiheadAttention": Part(
            lambda: Twice(nn.MultiheadAttention(4, 2, **wide), lambda x: x, torch.tanh, torch.sin), STEPS
        ),
        "PairwiseDistance": Part(lambda: Twice(nn.PairwiseDistance(), lambda x: x, torch.tanh), FLAT),
        "PixelShuffle": Part(lambda: nn.PixelShuffle(2), (4, 2, 2)),
        "PixelUnshuffle": Part(lambda: nn.PixelUnshuffle(2), PLANE),
        "Sequential": Part(lambda: nn.Sequential(nn.Linear(6, 4), nn.Tanh()), FLAT),
        "Transformer": Part(
            lambda: Twice(nn.Transformer(4, 2, 1, 1, 6, **wide).eval(), lambda x: x, torch.tanh), STEPS
        ),
        "TransformerDecoder": Part(
            lambda: Twice(
                nn.TransformerDecoder(nn.TransformerDecoderLayer(4, 2, 6, **wide), 2).eval(),
                lambda x: x,
                torch.sin,
            ),
            STEPS,
        ),
        "TransformerDecoderLayer": Part(
            lambda: Twice(nn.TransformerDecoderLayer(4, 2, 6, **wide).eval(), lambda x: x, torch.sin), STEPS
        ),
        "TransformerEncoder": Part(
            lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(4, 2, 6, **wide), 2).eval(), STEPS
        ),
        "TransformerEncoderLayer": Part(
            lambda: nn.TransformerEncoderLayer(4, 2, 6, norm_first=True, **wide).eval(), STEPS
        ),
        "Unflatten": Part(lambda: nn.Unflatten(1, (2, 3)), FLAT),
        "Upsample": Part(lambda: nn.Upsample(scale_factor=1.5, mode="bicubic"), PLANE),
        "UpsamplingBilinear2d": Part(lambda: nn.UpsamplingBilinear2d(scale_factor=2), PLANE),
        "UpsamplingNearest2d": Part(lambda: nn.UpsamplingNearest2d(scale_factor=2), PLANE),
        "ModuleList": Part(lambda: Call(nn.ModuleList([nn.Linear(6, 3)])[0]), FLAT),
    }


LAYERS = {**_by_dimension(), **_activations(), **_losses(), **_others()}

# Containers of modules and parameters, bases of other classes, and a loss that holds its own linear layer.
NOT_LAYERS = {
    "Container",
    "LinearCrossEntropyLoss",
    "Module",
    "ModuleDict",
    "NLLLoss2d",
    "ParameterDict",
    "ParameterList",
    "RNNBase",
    "RNNCellBase",
}

SQUARE = (3, 3)


def _definite(x: Tensor) -> Tensor:
    return x @ x.mT + torch.eye(3)


def _sampled(x: Tensor) -> Tensor:
    where = F.affine_grid(0.3 * x[:, 0, :2, :3], [len(x), 2, 4, 4], align_corners=False)
    return F.grid_sample(x, where, align_corners=False)


def _attended(x: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(x, torch.tanh(x), torch.sin(x), is_causal=True)


def _written(x: Tensor) -> Tensor:
    result = torch.zeros_like(x)
    result[:, 1:] = torch.cumsum(x, 1)[:, :-1]
    return result.index_add(1, torch.tensor([0, 0, 2]), x[:, :3].clone()).mul_(2)


OPERATIONS: dict[str, tuple[Callable[[Tensor], Any], tuple[int, ...]]] = {
    # matrices
    "bmm": (lambda x: torch.bmm(x, x.mT), SQUARE),
    "baddbmm": (lambda x: torch.baddbmm(x, x, torch.tanh(x)), SQUARE),
    "einsum": (lambda x: torch.einsum("bij,bkj,bil->bkl", x, x, x), SQUARE),
    "matrix_exp": (torch.linalg.matrix_exp, SQUARE),
    "matrix_power": (lambda x: torch.linalg.matrix_power(x, 3), SQUARE),
    "solve": (lambda x: torch.linalg.solve(_definite(x), x), SQUARE),
    "inv": (lambda x: torch.linalg.inv(_definite(x)), SQUARE),
    "cholesky": (lambda x: torch.linalg.cholesky(_definite(x)), SQUARE),
    "cholesky_solve": (lambda x: torch.cholesky_solve(x, torch.linalg.cholesky(_definite(x))), SQUARE),
    "solve_triangular": (
        lambda x: torch.linalg.solve_triangular(_definite(x).tril(), x, upper=False),
        SQUARE,
    ),
    "det": (torch.linalg.det, SQUARE),
    "slogdet": (lambda x: torch.linalg.slogdet(_definite(x))[1], SQUARE),
    "eigvalsh": (lambda x: torch.linalg.eigvalsh(_definite(x)), SQUARE),
    "svdvals": (torch.linalg.svdvals, SQUARE),
    "qr": (lambda x: torch.linalg.qr(x)[1], SQUARE),
    "pinv": (lambda x: torch.linalg.pinv(_definite(x)), SQUARE),
    "vector_norm": (lambda x: torch.linalg.vector_norm(x, 3, -1), SQUARE),
    "matrix_norm": (lambda x: torch.linalg.matrix_norm(x, "nuc"), SQUARE),
    "cross product": (lambda x: torch.linalg.cross(x, torch.tanh(x)), SQUARE),
    "kron": (lambda x: torch.vmap(torch.kron)(x, torch.tanh(x)), (2, 2)),
    "diagonal and diag_embed": (lambda x: torch.diag_embed(x.diagonal(0, 1, 2)) + x, SQUARE),
    "tril and triu": (lambda x: x.tril() @ x.triu(1), SQUARE),
    # sums, orders and scans
    "cumsum": (lambda x: x.cumsum(1), STEPS),
    "cumprod": (lambda x: x.cumprod(1), STEPS),
    "logcumsumexp": (lambda x: x.logcumsumexp(1), STEPS),
    "cummax": (lambda x: x.cummax(1)[0], STEPS),
    "logsumexp": (lambda x: x.logsumexp(-1), STEPS),
    "prod": (lambda x: x.prod(-1), STEPS),
    "std and var": (lambda x: x.std(-1) + x.var(-1, correction=0), STEPS),
    "amax": (lambda x: x.amax((1, 2)), STEPS),
    "max and min": (lambda x: x.max(-1).values - x.min(-1).values, STEPS),
    "median": (lambda x: x.median(-1).values, STEPS),
    "quantile": (lambda x: x.quantile(0.3, -1), STEPS),
    "kthvalue": (lambda x: x.kthvalue(2, -1).values, STEPS),
    "sort": (lambda x: x.sort(-1).values * torch.arange(4), STEPS),
    "topk": (lambda x: x.topk(2, -1).values, STEPS),
    "renorm": (lambda x: torch.stack([torch.renorm(row, 2, 0, 0.5) for row in x]), STEPS),
    "normalize": (lambda x: F.normalize(x, dim=-1), STEPS),
    "cdist": (lambda x: torch.cdist(x, torch.tanh(x)), STEPS),
    "pdist": (lambda x: torch.stack([F.pdist(row) for row in x]), STEPS),
    "trapezoid": (lambda x: torch.trapezoid(x, dim=-1), STEPS),
    "diff": (lambda x: x.diff(n=2, dim=-1), STEPS),
    # indices and shapes
    "gather": (lambda x: x.gather(1, torch.tensor([[[0, 1, 2, 0]]]).expand(len(x), 2, 4)), STEPS),
    "scatter": (
        lambda x: torch.zeros_like(x).scatter_add(2, torch.tensor([0, 0, 2, 1]).expand_as(x), x),
        STEPS,
    ),
    "scatter_reduce": (
        lambda x: torch.zeros_like(x).scatter_reduce(2, torch.tensor([0, 0, 2, 1]).expand_as(x), x, "mean"),
        STEPS,
    ),
    "index_select": (lambda x: x.index_select(1, torch.tensor([2, 0, 0])), STEPS),
    "advanced index": (lambda x: x[:, [0, 2, 2], [1, 3, 3]], STEPS),
    "boolean mask": (lambda x: x[:, torch.tensor([True, False, True])], STEPS),
    "writes in place": (_written, STEPS),
    "where and masked_fill": (lambda x: torch.where(x > 0, x, 0.2 * x).masked_fill(x > 0.5, 0.5), STEPS),
    "clamp": (lambda x: x.clamp(-0.2, 0.4), STEPS),
    "roll and flip": (lambda x: x.roll(1, 1).flip(2), STEPS),
    "unfold of a tensor": (lambda x: x.unfold(2, 2, 1), STEPS),
    "as_strided": (lambda x: x.contiguous().as_strided((len(x), 3, 2), (12, 4, 2)), STEPS),
    "repeat_interleave": (lambda x: x.repeat_interleave(2, 1), STEPS),
    "tile and expand": (lambda x: x.tile(1, 1, 2) + x.sum(-1, keepdim=True).expand(-1, -1, 8), STEPS),
    "cat, stack and split": (lambda x: torch.cat([*torch.stack([x, x.sin()], 1).split([1, 1], 1)], 2), STEPS),
    "pad": (lambda x: F.pad(x, (1, 2), value=0.3), STEPS),
    "take_along_dim": (lambda x: x.take_along_dim(x.argsort(-1), -1), STEPS),
    "complex numbers": (lambda x: torch.view_as_real(torch.polar(x.abs(), x) ** 2), STEPS),
    "fft": (lambda x: torch.fft.irfft(torch.fft.rfft(x) * (1 - 0.5j), n=4), STEPS),
    "fft2": (lambda x: torch.fft.fft2(x).abs(), STEPS),
    "stft": (lambda x: torch.stft(x.flatten(1), 4, window=torch.ones(4), return_complex=True).abs(), STEPS),
    # elementwise
    "atan2": (lambda x: torch.atan2(x, x.cos()), STEPS),
    "erf and erfinv": (lambda x: torch.erfinv(0.5 * torch.erf(x)), STEPS),
    "gamma functions": (lambda x: torch.lgamma(x.exp()) + torch.digamma(x.exp()), STEPS),
    "Bessel functions": (lambda x: torch.special.i0e(x) + torch.special.i1(x), STEPS),
    "xlogy": (lambda x: torch.special.xlogy(x.abs(), x.exp()), STEPS),
    "powers": (lambda x: x.abs() ** 1.5 + 2**x + x**3, STEPS),
    "float_power": (lambda x: x.abs().float_power(0.7), STEPS),
    "remainder": (lambda x: torch.remainder(x, 0.3), STEPS),
    "lerp and addcmul": (lambda x: torch.lerp(x, x.sin(), 0.3).addcmul(x, x, value=2), STEPS),
    "logaddexp": (lambda x: torch.logaddexp(x, -x) + torch.hypot(x, x + 1), STEPS),
    "straight-through rounding": (lambda x: x + (x.round() - x).detach(), STEPS),
    # made of layers
    "attention": (_attended, STEPS),
    "grid_sample": (_sampled, PLANE),
    "interpolate to a size": (lambda x: F.interpolate(x, (3, 5), mode="bilinear", antialias=True), PLANE),
    "interpolate nearest-exact": (lambda x: F.interpolate(x, scale_factor=0.5, mode="nearest-exact"), PLANE),
    "local convolution with computed weights": (
        lambda x: torch.vmap(lambda row: F.conv2d(row[None], row[None]))(x),
        PLANE,
    ),
    "products of softmax": (lambda x: F.softmax(x, -1) @ F.softmax(x, -2).mT, STEPS),
    "derivative inside": (lambda x: torch.func.grad(lambda y: y.sin().prod(-1).sum())(x), STEPS),
    "vmap inside": (lambda x: torch.vmap(torch.func.jacrev(torch.tanh))(x[:, 0]), STEPS),
}

# No batching rule, or one that fails; a loop instead.
_LOOPED = """
MaxUnpool1d MaxUnpool2d MaxUnpool3d Mish RReLU SoftMarginLoss Bilinear FractionalMaxPool2d FractionalMaxPool3d
RNN GRU LSTM RNNCell GRUCell LSTMCell cumprod cummax quantile
"""
# Mode and per-sample gradients, where they are not "forward" and "vmap".
HOW: dict[str, tuple[str, str]] = {
    **dict.fromkeys(_LOOPED.split(), ("forward", "loop")),
    **dict.fromkeys(
        ("unfold of a tensor", "interpolate nearest-exact", "derivative inside", "renorm"),
        ("forward", "loop"),
    ),
    **dict.fromkeys(("solve", "det", "slogdet"), ("forward", "rows")),
    "grid_sample": ("double", "loop"),
    **dict.fromkeys(("CTCLoss", "MultiLabelMarginLoss", "MultiMarginLoss"), ("reverse", "vmap")),
    **dict.fromkeys(("CrossMapLRN2d", "EmbeddingBag", "cdist", "pdist"), ("reverse", "vmap")),
}
