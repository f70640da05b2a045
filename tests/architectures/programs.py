"""Random programs: networks as people write them by hand, whose steps read data and free weights.

A program is a value that prints as what builds it. Every intermediate is (N, T, D), so that a step may read
the result of any step before it, and add it up: a residual graph. What a step does to samples may depend on
the data; with `hidden` the first four samples look innocent: sorted, of one length, on one side, distinct.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

__all__ = ["COUPLED", "ONE_WAY", "STEPS", "WRITING", "Batch", "Program", "draw_program", "shorter"]

D, T = 3, 3
INNOCENT = 4


class Batch(NamedTuple):
    """Samples: N sequences of T positions, how many of these are there, and a number to sort and route by."""

    x: Tensor
    lengths: Tensor
    key: Tensor

    @property
    def mask(self) -> Tensor:
        """Which positions are there, (N, T)."""
        return torch.arange(T) < self.lengths[:, None]


class Step(nn.Module):
    """A step with a layer, a free weight and buffers, from (N, T, D) to (N, T, D)."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.weight = nn.Linear(D, D), nn.Parameter(torch.randn(D, D))
        self.register_buffer("scale", torch.rand(D) + 0.5)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, h: Tensor, batch: Batch) -> Tensor:
        raise NotImplementedError


STEPS: dict[str, type[Step]] = {}
Forward = Callable[[Step, Tensor, Batch], Tensor]


def step(function: Forward) -> Forward:
    """Make a kind of step from its forward pass."""
    name = function.__name__
    STEPS[name.replace("_", " ")] = type(name, (Step,), {"forward": function})
    return function


# -- weights by other ways than a layer


@step
def dense(self, h, batch):
    return torch.tanh(self.layer(h))


@step
def twice(self, h, batch):
    return self.layer(torch.tanh(self.layer(h)))


@step
def weight_by_views(self, h, batch):
    flat = self.weight.view(-1)[: D * (D - 1)].view(D - 1, D)
    return F.pad(torch.tanh(h @ flat.t()), (1, 0)) + self.weight[0]


@step
def weight_by_einsum(self, h, batch):
    return torch.einsum("ntd,de,te->nte", h, self.weight, self.layer.weight)


@step
def weight_of_a_product(self, h, batch):
    return torch.sin(F.linear(h, self.layer.weight + 0.5 * self.weight @ self.weight.T, self.layer.bias))


@step
def weights_of_each_sample(self, h, batch):
    made = torch.tanh(self.layer(h.mean(1)))[:, :, None] * self.weight
    return torch.bmm(h, made)


@step
def weights_from_a_code(self, h, batch):
    return F.linear(torch.tanh(h), torch.outer(self.weight[0], self.layer(self.weight[1])))


@step
def stacked_weights(self, h, batch):
    both = torch.cat([self.layer.weight, self.weight])
    left, right = F.linear(h, both).chunk(2, -1)
    return left * torch.sigmoid(right)


@step
def normed_weight(self, h, batch):
    return F.linear(h, self.weight / (1 + self.weight.norm(dim=1, keepdim=True)))


@step
def over_time(self, h, batch):
    return torch.tanh(
        F.conv1d(h.mT, self.weight[:, :, None].expand(D, D, 2), self.layer.bias, padding=1).mT[:, 1:]
    )


@step
def mixed_over_time(self, h, batch):
    """A layer whose features are the positions."""
    return self.layer(h.mT).mT


@step
def attention(self, h, batch):
    return F.scaled_dot_product_attention(h @ self.weight, self.layer(h), h)


@step
def norm(self, h, batch):
    return F.layer_norm(h, (D,), self.weight[0], self.layer.bias, eps=0.1)


@step
def embedded(self, h, batch):
    """Words from the numbers, and a padding word."""
    words = (batch.lengths[:, None] + torch.arange(T)) % D
    return h + F.embedding(words, self.weight)


# -- samples taken apart by data


@step
def sorted_samples(self, h, batch):
    order = batch.key.argsort(descending=True)
    return torch.tanh(self.layer(h[order]))[order.argsort()]


@step
def sorted_between(self, h, batch):
    order = batch.key.argsort(descending=True)
    return self.layer(torch.tanh(h[order] @ self.weight))[order.argsort()]


@step
def packed(self, h, batch):
    found = torch.zeros_like(h)
    found[batch.mask] = torch.tanh(self.layer(h[batch.mask]))
    return found


@step
def packed_by_index_put(self, h, batch):
    places = batch.mask.nonzero(as_tuple=True)
    return h.index_put(places, self.layer(h[places]))


@step
def node_list(self, h, batch):
    sample, place = batch.mask.nonzero(as_tuple=True)
    rows = torch.tanh(self.layer(h[sample, place]))
    return h.new_zeros(len(h), D).index_add(0, sample, rows)[:, None] + h @ self.weight


@step
def messages(self, h, batch):
    """Edges between the positions of each sample, in one list."""
    sample, place = batch.mask.nonzero(as_tuple=True)
    start = torch.arange(len(sample))
    end = (start + 1).clamp(max=len(start) - 1)
    end = torch.where(sample == sample[end], end, start)
    rows = h[sample, place]
    sent = self.layer(torch.cat([rows[start], rows[end]])).chunk(2)[0] * torch.sigmoid(
        rows[end] @ self.weight
    )
    return h.index_put((sample, place), torch.zeros_like(rows).index_add(0, end, sent))


@step
def scattered(self, h, batch):
    place = (torch.arange(T) + batch.lengths[:, None]) % T
    return h.scatter(1, place[:, :, None].expand_as(h), self.layer(h))


@step
def gathered(self, h, batch):
    place = (torch.arange(T) * batch.lengths[:, None]) % T
    return self.layer(h.gather(1, place[:, :, None].expand_as(h)))


@step
def sorted_positions(self, h, batch):
    return self.layer(h.sort(dim=1).values)


@step
def largest(self, h, batch):
    values, places = self.layer(h).topk(2, dim=-1)
    return torch.zeros_like(h).scatter(-1, places, values.softmax(-1)) @ self.weight


@step
def two_experts(self, h, batch):
    right = batch.key < 0
    found = torch.zeros_like(h)
    found[~right] = torch.tanh(self.layer(h[~right]))
    found[right] = torch.sin(h[right] @ self.weight)
    return found


@step
def routed_words(self, h, batch):
    """The words of a batch that a learnt router sends to an expert."""
    scores = h.detach() @ self.weight
    sample, place = (scores.argmax(-1) == 0).nonzero(as_tuple=True)
    return h.index_put((sample, place), self.layer(h[sample, place]) * scores[sample, place].sigmoid())


@step
def ragged(self, h, batch):
    lengths = batch.lengths.tolist()
    rows = torch.cat([sample[:length] for sample, length in zip(h, lengths, strict=True)])
    parts = torch.tanh(self.layer(rows)).split(lengths)
    return torch.stack([F.pad(part, (0, 0, 0, T - len(part))) for part in parts])


@step
def padded_sequences(self, h, batch):
    rows = [self.layer(sample[:length]) for sample, length in zip(h, batch.lengths.tolist(), strict=True)]
    found = nn.utils.rnn.pad_sequence(rows, batch_first=True)
    return F.pad(found, (0, 0, 0, T - found.shape[1]))


@step
def distinct_rows(self, h, batch):
    rows, which = torch.unique(batch.x.flatten(0, 1), dim=0, return_inverse=True)
    return h + torch.tanh(self.layer(rows))[which].view_as(h)


@step
def distinct_samples(self, h, batch):
    samples, which = torch.unique(batch.x[:, 0], dim=0, return_inverse=True)
    return h * torch.tanh(self.layer(samples))[which][:, None]


@step
def to_the_longest(self, h, batch):
    state = torch.zeros_like(h[:, 0])
    for now in range(int(batch.lengths.max())):
        moved = torch.tanh(self.layer(h[:, now]) + state @ self.weight)
        state = torch.where((now < batch.lengths)[:, None], moved, state)
    return h + state[:, None]


@step
def fewer_at_every_step(self, h, batch):
    state = torch.zeros_like(h[:, 0])
    for now in range(int(batch.lengths.max())):
        alive = (now < batch.lengths).nonzero()[:, 0]
        state = state.index_copy(0, alive, torch.tanh(self.layer(h[alive, now]) + state[alive] @ self.weight))
    return h + state[:, None]


@step
def buckets(self, h, batch):
    found = torch.zeros_like(h)
    for length in batch.lengths.unique().flip(0).tolist():
        bucket = batch.lengths == length
        found[bucket, :length] = torch.tanh(self.layer(h[bucket, :length]))
    return found


@step
def one_by_one(self, h, batch):
    return torch.stack([torch.tanh(self.layer(sample)) for sample in h])


@step
def time_first(self, h, batch):
    return torch.tanh(self.layer(h.transpose(0, 1))).transpose(0, 1)


@step
def positions_as_samples(self, h, batch):
    """All samples of one position after those of another."""
    return torch.tanh(self.layer(h.transpose(0, 1).reshape(-1, D))).view(T, -1, D).transpose(0, 1)


# -- torch's corners


@step
def in_place(self, h, batch):
    return self.layer(h).mul_(1.5).tanh_()


@step
def added_in_place(self, h, batch):
    found = h.clone()
    found[:, 1:] += self.layer(h[:, :-1])
    found[:, 0].mul_(self.weight[0])
    return found


@step
def complex_numbers(self, h, batch):
    spectrum = torch.fft.rfft(self.layer(h), dim=-1)  # two numbers
    factor = torch.view_as_complex(self.weight.flatten()[:4].view(2, 2))
    return torch.fft.irfft(spectrum * factor, n=D, dim=-1)


@step
def complex_size(self, h, batch):
    return (torch.complex(self.layer(h), h @ self.weight).abs().square() + 1).sqrt()


@step
def float64_island(self, h, batch):
    return F.linear(h.double(), self.layer.weight.double()).tanh().to(h.dtype) + self.layer.bias


class _Square(torch.autograd.Function):
    """x², with all that torch asks for."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x):
        return x * x

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx, gradient):
        return 2 * ctx.saved_tensors[0] * gradient

    @staticmethod
    def jvp(ctx, tangent):
        return 2 * ctx.saved_tensors[0] * tangent


class _Cube(torch.autograd.Function):
    """x³, without forward mode and without vmap."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx, gradient):
        (x,) = ctx.saved_tensors
        return 3 * x**2 * gradient


class _Sine(torch.autograd.Function):
    """The sine, whose backward pass cannot be differentiated."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return torch.sin(x)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient):
        return ctx.saved_tensors[0].cos() * gradient


class _Scaled(torch.autograd.Function):
    """x W of its own, with a backward pass that gives W a third of its gradient."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return x @ weight

    @staticmethod
    def backward(ctx, gradient):
        x, weight = ctx.saved_tensors
        return gradient @ weight.T, torch.einsum("ntd,nte->de", x, gradient) / 3


@step
def own_function(self, h, batch):
    return _Square.apply(self.layer(h))


@step
def own_function_without_forward_mode(self, h, batch):
    return _Cube.apply(torch.tanh(self.layer(h)))


@step
def own_function_once(self, h, batch):
    return _Sine.apply(self.layer(h))


@step
def own_product(self, h, batch):
    return _Scaled.apply(torch.tanh(h), self.weight)


@step
def checkpointed(self, h, batch):
    return checkpoint(lambda now: torch.tanh(self.layer(now @ self.weight)), h, use_reentrant=False)


@step
def checkpointed_rows(self, h, batch):
    """A checkpointed block on the rows that are there."""
    rows = checkpoint(lambda now: torch.tanh(self.layer(now)), h[batch.mask], use_reentrant=False)
    return h.index_put((batch.mask,), rows)


@step
def partly_detached(self, h, batch):
    return torch.tanh(self.layer(h)) + (h @ self.weight).detach() * h


@step
def detached_weight(self, h, batch):
    return F.linear(self.layer(h), self.layer.weight.detach())


@step
def straight_through(self, h, batch):
    flow = torch.tanh(self.layer(h))
    return flow + (flow.sign() - flow).detach()


@step
def alias_of_the_input(self, h, batch):
    return batch.x.view(batch.x.shape) * self.weight[0] + self.layer(batch.x.detach()[...])


@step
def state_in_a_buffer(self, h, batch):
    return self.layer(h) * self.scale


# -- what has no kernel of samples, or none at all


@step
def counting_calls(self, h, batch):
    self.calls.add_(1.0)
    return torch.tanh(self.layer(h))


@step
def writing_to_the_input(self, h, batch):
    batch.x.mul_(1.0 + 1e-3)
    return torch.tanh(self.layer(h))


@step
def coupled_late(self, h, batch):
    late = (batch.key < 0)[:, None, None]
    return torch.tanh(self.layer(h + late * (h * late).sum(0)))


@step
def never_sorted_back(self, h, batch):
    return torch.tanh(self.layer(h[batch.key.argsort(descending=True)]))


@step
def centred(self, h, batch):
    return torch.tanh(self.layer(h - h.mean(0)))


WRITING = ("counting calls", "writing to the input")
COUPLED = ("coupled late", "never sorted back", "centred")
ONE_WAY = ("own function once",)  # Jᵀ alone exists
_RARE = (*WRITING, *COUPLED, *ONE_WAY)


class _Network(nn.Module):
    def __init__(self, program: Program) -> None:
        super().__init__()
        self.steps = nn.ModuleList(STEPS[name]() for name, _, _ in program.steps)
        self.wiring = [(source, adds) for _, source, adds in program.steps]
        self.head = nn.Linear(D, program.outputs)

    def forward(self, x: Tensor, lengths: Tensor, key: Tensor) -> Tensor:
        batch = Batch(x, lengths, key)
        values = [x]
        for made, (source, adds) in zip(self.steps, self.wiring, strict=True):
            read = values[source % len(values)]
            found = made(read, batch)
            values.append(read + found if adds else found)
        weights = batch.mask / lengths[:, None]
        return self.head(torch.tanh(torch.einsum("ntd,nt->nd", values[-1], weights.to(x.dtype))))


@dataclass(frozen=True)
class Program:
    """A network of steps with its samples.

    Attributes:
        steps: Each a kind, the number (modulo their count) of the value that it reads, and whether it adds
            its result to that.
        samples: Number of samples.
        outputs: Outputs of a sample.
        seed: Of weights and data.
        hidden: Whether the first samples look innocent.
        frozen: Numbers (modulo their count) of parameters that do not require grad.
    """

    steps: tuple[tuple[str, int, bool], ...]
    samples: int = 7
    outputs: int = 2
    seed: int = 0
    hidden: bool = True
    frozen: tuple[int, ...] = ()

    def build(self, dtype: torch.dtype = torch.float64) -> nn.Module:
        """Return the network in eval mode; the global random state is put back."""
        with torch.random.fork_rng():
            torch.manual_seed(self.seed)
            model = _Network(self).to(dtype).eval()
        parameters = list(model.parameters())
        for number in self.frozen:
            parameters[number % (len(parameters) - 2)].requires_grad_(False)
        return model

    def data(self, dtype: torch.dtype = torch.float64, seed: int = 1) -> Batch:
        """Return samples; what depends on them shows at once, or after the first four."""
        generator = torch.Generator().manual_seed(self.seed * 1000 + seed)
        n = self.samples
        x = torch.randn(n, T, D, generator=generator, dtype=torch.float64)
        key = torch.randn(n, generator=generator, dtype=torch.float64)
        lengths = torch.randint(1, T + 1, (n,), generator=generator)
        again = torch.randint(0, n, (n,), generator=generator)
        first = INNOCENT if self.hidden else 0
        x[first:, 0] = x[again[first:], 0]  # rows that are there before
        x[first:, 1] = x[again[first:], 2]
        if first:
            key[:first] = key[:first].abs().sort(descending=True).values + 3
            lengths[:first] = 1 + self.seed % T
            # Distinct rows, in the order in which they are sorted.
            x[:first, :, 0] = torch.arange(min(first, n) * T).view(-1, T) / 8 - 1
        return Batch(x.to(dtype), lengths, key.to(dtype))

    @property
    def kinds(self) -> set[str]:
        """The kinds of its steps."""
        return {name for name, _, _ in self.steps}

    def is_coupled(self, seed: int = 1, size: int | None = None) -> bool:
        """Whether a sample has another output in its batch of the samples of a seed than alone."""
        if not self.kinds & set(COUPLED):
            return False
        model, batch = self.build(), self.data(seed=seed)
        singles = [[tensor[n : n + 1] for tensor in batch] for n in range(self.samples)]
        with torch.no_grad():
            alone = torch.cat([model(*sample) for sample in singles])
            parts = zip(*(tensor.split(size or self.samples) for tensor in batch), strict=True)
            together = torch.cat([model(*part) for part in parts])
            return not torch.allclose(together, alone, rtol=0, atol=1e-9)


def draw_program(random: random.Random) -> Program:
    """Draw a program of up to four steps; few of them have a kind that has no kernel."""
    usual = [name for name in STEPS if name not in _RARE]
    steps = []
    for number in range(random.randint(1, 4)):
        name = random.choice(_RARE) if random.randint(0, 29) == 29 else random.choice(usual)
        steps.append((name, number - random.choice((0, 0, 0, 1, 2)), random.choice((False, True))))
    return Program(
        tuple((name, max(source, 0), adds) for name, source, adds in steps),
        samples=random.choice((7, 6, 5, 2, 1)),
        outputs=random.randint(1, 3),
        seed=random.randint(0, 99),
        hidden=random.choice((True, True, False)),
        frozen=tuple(random.randint(0, 12) for _ in range(random.choice((0, 0, 1, 3)))),
    )


def shorter(program: Program, fails: Callable[[Program], bool]) -> Program:
    """Leave out steps, samples and choices as long as it fails."""

    def smaller(now: Program):
        for number in range(len(now.steps)):
            if len(now.steps) > 1:
                yield replace(now, steps=now.steps[:number] + now.steps[number + 1 :])
        for number, (name, source, adds) in enumerate(now.steps):
            if adds:
                yield replace(
                    now, steps=(*now.steps[:number], (name, source, False), *now.steps[number + 1 :])
                )
        for change in ({"frozen": ()}, {"outputs": 1}, {"samples": 5}):
            if replace(now, **change) != now and change.get("samples", 0) <= now.samples:
                yield replace(now, **change)

    found = program
    while True:
        for candidate in smaller(found):
            if fails(candidate):
                found = candidate
                break
        else:
            return found
