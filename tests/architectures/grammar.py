"""Random networks: a recipe is a value that prints as what builds it, and hypothesis draws recipes.

A block takes a tensor with samples on its first axis. Which blocks fit is a matter of the shape of a sample:
features ``(F,)``, a sequence or a signal ``(T, F)``, or an image ``(C, H, W)``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from . import layers

__all__ = ["Network", "networks"]

Shape = tuple[int, ...]
_LARGEST = 40  # entries of an activation of one sample
_OUTPUTS = 10  # of a network


@dataclass(frozen=True)
class Block:
    """A kind of block: what builds it for a shape, and what may be drawn for its options."""

    build: Callable[..., nn.Module]
    options: Callable[[Shape], Any]
    ranks: tuple[int, ...]


BLOCKS: dict[str, Block] = {}
NOTHING = st.just(())


def block(options: Callable[[Shape], Any] = lambda shape: NOTHING, ranks: tuple[int, ...] = (1, 2, 3)):
    def register(build: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
        BLOCKS[build.__name__.replace("_", " ")] = Block(build, options, ranks)
        return build

    return register


def _tuples(*strategies: Any) -> Callable[[Shape], Any]:
    return lambda shape: st.tuples(*strategies)


WIDTHS, FLAGS = st.integers(1, 4), st.booleans()
ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "tanh": nn.Tanh,
    "sigmoid": nn.Sigmoid,
    "gelu": nn.GELU,
    "softplus": nn.Softplus,
    "silu in place": lambda: nn.SiLU(inplace=True),
    "relu": nn.ReLU,
    "relu in place": lambda: nn.ReLU(inplace=True),
    "elu in place": lambda: nn.ELU(inplace=True),
    "tanh in place": lambda: layers.Apply(torch.tanh_),
    "softmax": lambda: nn.Softmax(-1),
    "sine": lambda: layers.Apply(torch.sin),
    "prelu": nn.PReLU,
    "mish": nn.Mish,
    "hardswish": nn.Hardswish,
}


# -- any shape


@block(_tuples(WIDTHS, FLAGS))
def linear(shape, width, bias):
    return nn.Linear(shape[-1], width, bias=bias)


@block(_tuples(st.sampled_from(sorted(ACTIVATIONS))))
def activation(shape, name):
    made = ACTIVATIONS[name]()
    # What comes in may be somebody else's.
    return nn.Sequential(layers.Apply(torch.clone), made) if "in place" in name else made


@block(_tuples(WIDTHS, st.sampled_from(sorted(ACTIVATIONS)), FLAGS))
def dense(shape, width, name, normed):
    """The usual pair; an activation in place overwrites the layer's result."""
    layer = nn.Linear(shape[-1], width)
    return nn.Sequential(parametrizations.weight_norm(layer) if normed else layer, ACTIVATIONS[name]())


@block(_tuples(FLAGS, FLAGS))
def layer_norm(shape, affine, whole):
    return nn.LayerNorm(shape if whole else shape[-1], elementwise_affine=affine)


@block(_tuples(FLAGS))
def rms_norm(shape, whole):
    return nn.RMSNorm(shape if whole else shape[-1], eps=1e-3)


@block(_tuples(st.sampled_from(layers.Raw.FORMS)))
def raw(shape, form):
    return layers.Raw(shape[-1], form)


@block(_tuples(WIDTHS, FLAGS))
def tied_pair(shape, inner, transposed):
    return layers.TiedPair(shape[-1], inner, transposed)


@block(_tuples(WIDTHS, st.integers(1, 2), FLAGS))
def adapter(shape, width, rank, fresh):
    return layers.Adapter(shape[-1], width, rank, fresh)


@block(_tuples(WIDTHS))
def gate(shape, width):
    return layers.Gate(shape[-1], width)


@block()
def gain_is_bias(shape):
    return layers.GainIsBias(shape[-1])


@block()
def rounded(shape):
    return layers.Rounded()


@block()
def dropout(shape):
    return nn.Dropout(0.5)


@block(lambda shape: st.tuples(st.integers(1, shape[0])))
def group_norm(shape, groups):
    return nn.GroupNorm(groups if shape[0] % groups == 0 else shape[0], shape[0])


@block()
def batch_norm(shape):
    return (nn.BatchNorm1d, nn.BatchNorm1d, nn.BatchNorm2d)[len(shape) - 1](shape[0])


# -- blocks of blocks: the inner recipe is drawn for the same shape


def _inner(shape: Shape) -> Any:
    return _recipes(shape, 2, nested=True).map(lambda drawn: drawn[0])


def _fitted(shape: Shape, recipe: tuple[Any, ...]) -> nn.Module:
    """Build a recipe with a last layer that gives back the shape it got."""
    inner, found = assemble(shape, recipe)
    if found != shape:
        count, wanted = (int(torch.Size(s).numel()) for s in (found, shape))
        tail = [nn.Flatten(), nn.Linear(count, wanted), nn.Unflatten(1, shape)]
        if found[:-1] == shape[:-1]:
            tail = [nn.Linear(found[-1], shape[-1])]
        return nn.Sequential(inner, *tail)
    return nn.Sequential(inner, nn.Linear(shape[-1], shape[-1], bias=False))


@block(lambda shape: st.tuples(_inner(shape), FLAGS))
def residual(shape, recipe, in_place):
    return layers.Residual(_fitted(shape, recipe), in_place)


@block(lambda shape: st.tuples(_inner(shape)))
def twice(shape, recipe):
    return layers.Twice(_fitted(shape, recipe))


@block(lambda shape: st.tuples(_inner(shape), st.sampled_from(["gate", "sum", "offset"])))
def halted(shape, recipe, form):
    return layers.Halted(_fitted(shape, recipe), form)


@block(lambda shape: st.tuples(_inner(shape)))
def checkpointed(shape, recipe):
    return layers.Checkpointed(_fitted(shape, recipe))


# -- features


@block(lambda shape: st.tuples(st.integers(1, shape[0])), ranks=(1,))
def unfold(shape, steps):
    steps = steps if shape[0] % steps == 0 else 1
    return nn.Unflatten(1, (steps, shape[0] // steps))


# -- sequences and signals

CONVOLUTION = (WIDTHS, st.integers(1, 3), st.integers(1, 2), st.integers(0, 2), st.integers(1, 2))
PADDINGS = st.sampled_from(["zeros", "circular", "replicate"])


def _groups(channels: int, wanted: bool) -> int:
    return channels if wanted else 1


def _convolution(kind, shape, width, size, stride, padding, dilation, grouped, mode, normed=False):
    groups = _groups(shape[0], grouped)
    made = kind(
        shape[0], width * groups, size, stride, padding, dilation, groups, not normed, padding_mode=mode
    )
    return parametrizations.weight_norm(made) if normed else made


@block(_tuples(*CONVOLUTION, FLAGS, PADDINGS, FLAGS), ranks=(2,))
def conv1d(shape, *options):
    return _convolution(nn.Conv1d, shape, *options)


@block(_tuples(*CONVOLUTION, FLAGS, PADDINGS), ranks=(3,))
def conv2d(shape, *options):
    return _convolution(nn.Conv2d, shape, *options)


@block(_tuples(WIDTHS, st.integers(1, 3), st.integers(1, 2), st.integers(0, 1), FLAGS), ranks=(2, 3))
def transposed_convolution(shape, width, size, stride, padding, grouped):
    groups = _groups(shape[0], grouped)
    kind = nn.ConvTranspose1d if len(shape) == 2 else nn.ConvTranspose2d
    return kind(shape[0], width * groups, size, stride, padding, groups=groups)


@block(ranks=(2, 3))
def instance_norm(shape):
    return (nn.InstanceNorm1d if len(shape) == 2 else nn.InstanceNorm2d)(shape[0], affine=True, eps=1e-2)


@block(_tuples(st.sampled_from(["RNN", "GRU", "LSTM"]), st.integers(1, 3), st.integers(1, 2),
               FLAGS, FLAGS, st.sampled_from(["sequence", "time first", "last"])), ranks=(2,))  # fmt: skip
def recurrent(shape, kind, hidden, depth, bias, both, form):
    inner = getattr(nn, kind)(
        shape[-1], hidden, depth, bias=bias, batch_first=form != "time first", bidirectional=both
    )
    return {"sequence": layers.Pick, "time first": layers.TimeFirst, "last": layers.LastState}[form](inner)


@block(_tuples(st.sampled_from(["rnn", "gru", "lstm"]), st.integers(1, 3), FLAGS, FLAGS), ranks=(2,))
def cells(shape, kind, hidden, bias, whole):
    return layers.CellLoop(kind, shape[-1], hidden, bias, whole)


@block(_tuples(WIDTHS), ranks=(2,))
def elman(shape, hidden):
    return layers.Elman(shape[-1], hidden)


@block(_tuples(FLAGS, FLAGS, FLAGS, FLAGS), ranks=(2,))
def attention(shape, two_heads, bias, need_weights, time_first):
    heads = 2 if two_heads and shape[-1] % 2 == 0 else 1
    return layers.SelfAttention(shape[-1], heads, bias, need_weights, time_first)


@block(_tuples(FLAGS), ranks=(2,))
def own_attention(shape, causal):
    return layers.OwnAttention(shape[-1], causal)


@block(_tuples(FLAGS, FLAGS), ranks=(2,))
def encoder_layer(shape, norm_first, gelu):
    return nn.TransformerEncoderLayer(
        shape[-1], 1, 3, activation="gelu" if gelu else "relu", batch_first=True, norm_first=norm_first
    )


@block(_tuples(FLAGS), ranks=(2,))
def token(shape, table):
    return layers.Token(*shape, table)


@block(_tuples(WIDTHS, FLAGS), ranks=(2,))
def folded(shape, width, time_first):
    return layers.Folded(nn.Sequential(nn.Linear(shape[-1], width), nn.Tanh()), time_first)


@block(ranks=(2,))
def swap(shape):
    return layers.Apply(lambda x: x.mT)


@block(ranks=(2,))
def mean_over_time(shape):
    return layers.Apply(lambda x: x.mean(1))


# -- images


@block(_tuples(st.sampled_from(["mean", "largest"])), ranks=(3,))
def pool(shape, kind):
    return (nn.AvgPool2d if kind == "mean" else nn.MaxPool2d)(2, 1)


@block(ranks=(3,))
def patches(shape):
    return layers.Apply(lambda x: x.flatten(2).mT)


@block(ranks=(2, 3))
def flatten(shape):
    return nn.Flatten()


# -- networks


def assemble(shape: Shape, recipe: tuple[Any, ...]) -> tuple[nn.Sequential, Shape]:
    """Return the modules of a recipe and the shape of their result for one sample."""
    modules = []
    for name, *options in recipe:
        module = BLOCKS[name].build(shape, *options).double().eval()
        with torch.no_grad():
            shape = tuple(module(torch.ones(1, *shape, dtype=torch.float64)).shape[1:])
        modules.append(module)
    return nn.Sequential(*modules), shape


@st.composite
def _recipes(draw: Any, shape: Shape, most: int, nested: bool = False) -> tuple[tuple[Any, ...], Shape]:
    recipe: list[Any] = []
    for _ in range(draw(st.integers(1, most))):
        composite = {"residual", "twice", "halted", "checkpointed"} if nested else set()
        special = len(shape) > 1 and draw(FLAGS)  # blocks for this kind of sample alone, half of the time
        names = [
            name
            for name, kind in BLOCKS.items()
            if len(shape) in kind.ranks and name not in composite and not (special and len(kind.ranks) == 3)
        ]
        name = draw(st.sampled_from(names))
        step = (name, *draw(BLOCKS[name].options(shape)))
        try:
            with torch.random.fork_rng():
                _, found = assemble(shape, (step,))
        except (RuntimeError, ValueError):
            continue  # a kernel larger than the signal and the like: leave the block out
        if 0 < torch.Size(found).numel() <= _LARGEST:
            recipe.append(step)
            shape = found
    return tuple(recipe), shape


@dataclass(frozen=True)
class Network:
    """A random network with its samples.

    Attributes:
        start: ("features" | "sequence" | "image", *shape) or ("tokens", length, words, width, padding, tied).
        recipe: Blocks, each a name and its options.
        head: Width of a last linear layer on the flattened result, 0 for none.
        frozen: Numbers (modulo their count) of parameters that do not require grad; one is left.
        samples: Number of samples.
        seed: Of weights and data.
        zeroed: Numbers (modulo their count) of parameters that are zero, as some are before training.
    """

    start: tuple[Any, ...]
    recipe: tuple[Any, ...]
    head: int = 2
    frozen: tuple[int, ...] = ()
    samples: int = 3
    seed: int = 0
    zeroed: tuple[int, ...] = ()

    def build(self, dtype: torch.dtype = torch.float64) -> nn.Module:
        """Return the network in eval mode; the global random state is put back."""
        with torch.random.fork_rng():
            torch.manual_seed(self.seed)
            first: list[nn.Module] = []
            shape = self.start[1:]
            if self.start[0] == "tokens":
                length, words, width, padding, tied = self.start[1:]
                first = [layers.TokenEmbedding(words, width, padding, tied)]
                shape = (length, words if tied else width)
            body, shape = assemble(shape, self.recipe)
            last = [nn.Flatten(), nn.Linear(torch.Size(shape).numel(), self.head)] if self.head else []
            model = nn.Sequential(*first, *body, *last).double()
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.add_(0.3 * torch.randn_like(parameter))
                self._write_zeros(model)
                for name, buffer in model.named_buffers():
                    if name.endswith("running_mean"):
                        buffer.normal_()
                    elif name.endswith("running_var"):
                        buffer.uniform_(0.5, 2.0)
        parameters = list(model.parameters())
        for number in self.frozen:
            if sum(p.requires_grad for p in parameters) > 1:
                parameters[number % len(parameters)].requires_grad_(False)
        return model.to(dtype).eval()

    def _write_zeros(self, model: nn.Module) -> None:
        for module in model.modules():
            if isinstance(module, layers.Adapter) and module.fresh:
                module.up.zero_()
        # A weight norm divides by the length of its direction.
        allowed = [p for name, p in model.named_parameters() if "parametrizations" not in name]
        for number in self.zeroed if allowed else ():
            allowed[number % len(allowed)].zero_()

    def data(self, dtype: torch.dtype = torch.float64, samples: int | None = None, seed: int = 1) -> Tensor:
        """Return samples of the network's kind."""
        generator = torch.Generator().manual_seed(self.seed * 1000 + seed)
        count = self.samples if samples is None else samples
        if self.start[0] == "tokens":
            return torch.randint(self.start[2], (count, self.start[1]), generator=generator)
        return torch.randn(count, *self.start[1:], generator=generator, dtype=torch.float64).to(dtype)

    @property
    def is_rounded(self) -> bool:
        """Whether some block computes in float32."""
        return "'rounded'" in repr(self.recipe)


_STARTS = st.one_of(
    st.tuples(st.just("sequence"), st.integers(1, 4), st.integers(1, 4)),
    st.tuples(st.just("features"), st.integers(1, 5)),
    st.tuples(st.just("image"), st.integers(1, 2), st.integers(2, 4), st.integers(2, 4)),
    st.tuples(st.just("tokens"), st.integers(1, 4), st.integers(2, 5), WIDTHS, FLAGS, FLAGS),
)


@st.composite
def networks(draw: Any) -> Network:
    """Draw a network of up to four blocks, some of them of blocks, with up to four samples."""
    start = draw(_STARTS)
    shape = start[1:]
    if start[0] == "tokens":
        shape = (start[1], start[2] if start[5] else start[3])
    recipe, shape = draw(_recipes(shape, 4))
    small = torch.Size(shape).numel() <= _OUTPUTS
    head = draw(st.integers(0 if small else 1, 3))
    frozen = draw(st.lists(st.integers(0, 12), max_size=3))
    samples, seed = draw(st.integers(1, 4)), draw(st.integers(0, 99))
    zeroed = tuple(draw(st.lists(st.integers(0, 12), max_size=2)))
    network = Network(start, recipe, head, tuple(frozen), samples, seed, zeroed)
    if not any(parameter.requires_grad for parameter in network.build().parameters()):
        return replace(network, head=2)
    return network
