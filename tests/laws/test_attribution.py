"""Models whose rows are not one block a sample, where the first samples do not show it.

Layer structure gives the rows of a layer's call to samples. Here a model sorts, packs, routes, scatters or
deduplicates the samples of its batch, by data that look innocent in the first four samples: their kernel is
right all the same, from every engine and in batches of any size. Where a sample's output depends on others,
the only right answer is that there is no kernel.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

import ntkops
from ntkops.errors import CoupledSamplesError
from tests.pairs import pairs

from .reference import close, jacobian, kernel, normal

N, TIME, WIDTH = 8, 3, 2
INNOCENT = 4  # the first samples do not show what the model does to its batch
LENGTHS = torch.tensor([3, 3, 3, 3, 1, 2, 3, 2])  # a total of 20, which 8 does not divide
EVEN = torch.tensor([2, 2, 2, 2, 1, 3, 3, 1])  # a total of 16, which it does


class Two(nn.Module):
    """Two layers; what lies between them and the samples is what the models below are about."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.head = nn.Linear(3, 4), nn.Linear(4, WIDTH)

    def hidden(self, rows: Tensor) -> Tensor:
        return torch.tanh(self.inner(rows))


class Sorting(Two):
    """Sorts its samples, runs a layer, and sorts back."""

    def forward(self, x: Tensor) -> Tensor:
        order = x[:, 0].argsort(descending=True)
        return self.head(self.hidden(x[order])[order.argsort()])


class HalfSorting(Two):
    """Sorts back between the two layers' activations and reads the sorted ones as well."""

    def forward(self, x: Tensor) -> Tensor:
        order = x[:, 0].argsort(descending=True)
        straight = self.hidden(x)
        return self.head(self.hidden(x[order]))[order.argsort()] * straight[:, :1]


class Packing(Two):
    """Runs a layer on the words that are there, and writes them to their places."""

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        hidden = x.new_zeros(*mask.shape, 4)
        hidden[mask] = self.hidden(x[mask])
        return self.head(hidden.sum(1) / mask.sum(1, keepdim=True))


class Scattering(Two):
    """The nodes of all graphs in one list, summed up for their graphs."""

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        sample, place = mask.nonzero(as_tuple=True)
        return self.head(x.new_zeros(len(x), 4).index_add(0, sample, self.hidden(x[sample, place])))


class Concatenating(Two):
    """All samples' words one after the other, cut into samples again."""

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        lengths = mask.sum(1).tolist()
        rows = torch.cat([sample[:length] for sample, length in zip(x, lengths, strict=True)])
        return self.head(torch.stack([part.mean(0) for part in self.hidden(rows).split(lengths)]))


class Experts(Two):
    """Each sample goes to one of two layers, by its data."""

    def __init__(self) -> None:
        super().__init__()
        self.other = nn.Linear(3, 4)

    def forward(self, x: Tensor) -> Tensor:
        to_other = x[:, 0] < 0
        hidden = x.new_zeros(len(x), 4)
        hidden[~to_other] = self.hidden(x[~to_other])
        hidden[to_other] = torch.sin(self.other(x[to_other]))
        return self.head(hidden)


class TopExperts(Two):
    """Each sample goes to two of three experts, weighted; the router is learnt."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(3, 3)
        self.experts = nn.ModuleList(nn.Linear(3, 4) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        values, chosen = self.router(x).softmax(-1).topk(2, dim=-1)
        hidden = self.hidden(x)
        for number, expert in enumerate(self.experts):
            sample, rank = (chosen == number).nonzero(as_tuple=True)
            hidden = hidden.index_add(0, sample, values[sample, rank, None] * torch.tanh(expert(x[sample])))
        return self.head(hidden)


class LearntRouting(Two):
    """Routes by a parameter, so that an update of it may send a sample elsewhere."""

    def __init__(self) -> None:
        super().__init__()
        self.threshold = nn.Parameter(torch.tensor(-100.0))

    def forward(self, x: Tensor) -> Tensor:
        order = torch.where(x[:, 0] > self.threshold, torch.arange(len(x)), -torch.arange(len(x))).argsort()
        return self.head(self.hidden(x[order])[order.argsort()])


class Deduplicating(Two):
    """Runs a layer once for rows that are equal."""

    def forward(self, x: Tensor) -> Tensor:
        rows, which = torch.unique(x, dim=0, return_inverse=True)
        return self.head(self.hidden(rows)[which])


class DeduplicatingWords(Two):
    """Embeds each word of a batch once; there are as many different words as samples in the first batch."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(9, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        words, which = tokens.unique(return_inverse=True)
        return self.head(self.hidden(self.embed(words))[which].sum(1))


class Looping(Two):
    """As many steps as the longest sample of the batch has."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.GRUCell(3, 4)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        hidden = x.new_zeros(len(x), 4)
        for step in range(int(lengths.max())):
            active = (step < lengths)[:, None]
            hidden = torch.where(active, self.cell(x[:, step], hidden), hidden)
        return self.head(hidden)


class Shrinking(Two):
    """At each step only the samples that are not at their end."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.Linear(4, 4)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        hidden = x.new_zeros(len(x), 4)
        for step in range(int(lengths.max())):
            alive = (step < lengths).nonzero()[:, 0]
            moved = torch.tanh(self.inner(x[alive, step]) + self.cell(hidden[alive]))
            hidden = hidden.index_copy(0, alive, moved)
        return self.head(hidden)


class Bucketing(Two):
    """Samples of one length at a time, the longest first."""

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        lengths = mask.sum(1)
        parts, numbers = [], []
        for length in lengths.unique().flip(0).tolist():
            bucket = (lengths == length).nonzero()[:, 0]
            parts.append(self.hidden(x[bucket, :length]).sum(1))
            numbers.append(bucket)
        return self.head(torch.cat(parts)[torch.cat(numbers).argsort()])


class PackedSequences(Two):
    """A recurrent layer on packed sequences that torch sorts by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.GRU(3, 4, batch_first=True)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        packed = nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        return self.head(self.layer(packed)[1][0])


class CoupledLate(Two):
    """Samples of a negative first number read the mean of all others of them."""

    def forward(self, x: Tensor) -> Tensor:
        hidden, late = self.hidden(x), x[:, :1] < 0
        mean = (hidden * late).sum(0) / late.sum().clamp(min=1)
        return self.head(torch.where(late, hidden + mean, hidden))


class CoupledNeighbours(Two):
    """A sample of a negative first number reads its neighbour's layer."""

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.hidden(x)
        return self.head(torch.where(x[:, :1] < 0, hidden + hidden.roll(1, 0), hidden))


class NeverSortedBack(Two):
    """Sorts its samples and forgets to sort them back: rows are consistent, and of other samples."""

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.hidden(x[x[:, 0].argsort(descending=True)]))


# -- samples, of which the first look innocent


def _descending(seed: int) -> Tensor:
    """The first samples are in order already; those after them are not."""
    x = normal(N, 3, seed=seed)
    x[:INNOCENT, 0] = torch.tensor([9.0, 8.0, 7.0, 6.0])
    return x


def _positive(seed: int) -> Tensor:
    """The first samples are on one side; of the later ones most are on the other."""
    x = normal(N, 3, seed=seed)
    x[:, 0] = x[:, 0].abs() * torch.tensor([1.0] * INNOCENT + [-1.0, 1.0, -1.0, -1.0])
    return x


def _repeated(seed: int) -> Tensor:
    """The first samples differ and are sorted; later ones are equal to them, or to one another."""
    x = normal(N, 3, seed=seed)
    x = x[x[:, 0].argsort()]
    return x[torch.tensor([0, 2, 4, 6, 1, 1, 2, 5])]


def _words(seed: int) -> Tensor:
    drawn = torch.randint(0, 9, (N, TIME), generator=torch.Generator().manual_seed(seed))
    drawn[:INNOCENT] = torch.arange(INNOCENT)[:, None]  # one word a sample, in order
    return drawn


def _masked(lengths: Tensor) -> Callable[[int], tuple[Tensor, Tensor]]:
    return lambda seed: (normal(N, TIME, 3, seed=seed), torch.arange(TIME) < lengths[:, None])


def _growing(seed: int) -> tuple[Tensor, Tensor]:
    """Short samples first: their batch takes fewer steps."""
    lengths = torch.tensor([1, 1, 1, 1, 2, 3, 1, 2])
    return normal(N, TIME, 3, seed=seed), lengths


def _shrinking(seed: int) -> tuple[Tensor, Tensor]:
    return normal(N, TIME, 3, seed=seed), LENGTHS


@dataclass(frozen=True)
class Story:
    """A model with its samples."""

    build: Callable[[], nn.Module]
    data: Callable[[int], Tensor | tuple[Tensor, ...]]

    def make(self, dtype: torch.dtype) -> nn.Module:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return self.build().to(dtype).eval()

    def samples(self, dtype: torch.dtype, seed: int = 1):
        def cast(leaf: Tensor) -> Tensor:
            return leaf.to(dtype) if leaf.is_floating_point() else leaf

        x = self.data(seed)
        return tuple(map(cast, x)) if isinstance(x, tuple) else cast(x)


STORIES = {
    "sorting": Story(Sorting, _descending),
    "half sorting": Story(HalfSorting, _descending),
    "packing": Story(Packing, _masked(LENGTHS)),
    "packing evenly": Story(Packing, _masked(EVEN)),
    "scattering": Story(Scattering, _masked(LENGTHS)),
    "scattering evenly": Story(Scattering, _masked(EVEN)),
    "concatenating": Story(Concatenating, _masked(LENGTHS)),
    "concatenating evenly": Story(Concatenating, _masked(EVEN)),
    "experts": Story(Experts, _positive),
    "top experts": Story(TopExperts, _positive),
    "deduplicating": Story(Deduplicating, _repeated),
    "deduplicating words": Story(DeduplicatingWords, _words),
    "looping": Story(Looping, _growing),
    "looping over fewer": Story(Shrinking, _shrinking),
    "bucketing": Story(Bucketing, _masked(LENGTHS)),
    "packed sequences": Story(PackedSequences, _shrinking),
}
COUPLED = {
    "coupled late": Story(CoupledLate, _positive),
    "coupled neighbours": Story(CoupledNeighbours, _positive),
    "never sorted back": Story(NeverSortedBack, _descending),
}
SIZES = (1, 2, 3, N)
TOLERANCES = {torch.float64: 1e-9, torch.float32: 2e-5}


@functools.cache
def reference(name: str, dtype: torch.dtype, seed: int = 1) -> Tensor:
    story = STORIES[name]
    x = story.samples(dtype, seed)
    doubled = tuple(t.double() if t.is_floating_point() else t for t in (x if isinstance(x, tuple) else (x,)))
    return jacobian(story.make(dtype).double(), doubled)


# -- every quantity, as a function of an operator maker; each makes its own operator


def _dense(make, J, J2, x2, close):
    close(make().to_dense(), kernel(J, J, WIDTH))


def _each(make, J, J2, x2, close):
    close(make(outputs="each").to_dense(), kernel(J, J, WIDTH, "each"))


def _traced(make, J, J2, x2, close):
    close(make(outputs="trace").to_dense(), kernel(J, J, WIDTH, "trace"))


def _diagonal(make, J, J2, x2, close):
    close(make().diagonal(), J.square().sum(1))


def _trace(make, J, J2, x2, close):
    found = float(ntkops.trace(make(), method="exact"))
    close(torch.tensor(found, dtype=torch.float64), J.square().sum())


def _pulled(make, J, J2, x2, close):
    K = make(max_dense_bytes=0)
    v = normal(len(J), 2, seed=5)
    for number in range(2):  # the second from a cache
        close(K.left.mT @ v.to(K.dtype), J.T @ v, number)


def _pushed(make, J, J2, x2, close):
    K = make(max_dense_bytes=0)
    p = normal(J.shape[1], 2, seed=5)
    close(K.left @ p.to(K.dtype), J @ p)


def _products(make, J, J2, x2, close):
    for knobs, times in (({}, 5), ({"max_dense_bytes": 0}, 2)):  # until a dense block pays, or a cache
        K = make(**knobs)
        v = normal(len(J), 2, seed=5)
        for number in range(times):
            close(K @ v.to(K.dtype), J @ (J.T @ v), number)


def _cross(make, J, J2, x2, close):
    crossed = make().cross(x2)
    v = normal(len(J), 2, seed=5)
    close(crossed @ v.to(crossed.dtype), J2 @ (J.T @ v))
    close(crossed.to_dense(), J2 @ J.T)


def _gram(make, J, J2, x2, close):
    K = make()
    v = normal(N, 2, WIDTH, seed=3)
    g = torch.einsum("nop,nro->nrp", J.unflatten(0, (N, WIDTH)), v)
    close(K.sample_gram(v.to(K.dtype)), torch.einsum("nrp,msp->nrms", g, g))


QUANTITIES = {
    "dense": _dense, "each": _each, "traced": _traced, "diagonal": _diagonal, "trace": _trace,
    "pulled": _pulled, "pushed": _pushed, "products": _products, "cross": _cross, "gram": _gram,
}  # fmt: skip


def examine(source, name: str, engine: str, dtype: torch.dtype, size: int, quantity: str) -> None:
    """Hold one quantity of one model, or of its linearization, against the reference."""
    story = STORIES[name]
    x, x2 = story.samples(dtype), story.samples(dtype, seed=2)
    options = {"engine": engine, "batch_size": size}
    tolerance = TOLERANCES[dtype]
    QUANTITIES[quantity](
        lambda **more: ntkops.ntk(source, x, **options, **more),
        reference(name, dtype),
        reference(name, dtype, 2),
        x2,
        lambda found, expected, what="": close(found, expected, tolerance, str(what)),
    )


def complaints(
    name: str, engine: str, dtype: torch.dtype, sizes: dict[str, tuple[int, ...]], *, fresh: bool = False
) -> list[str]:
    """Return what is wrong, quantity by quantity, or refused, which none of these models may be.

    With one linearization for all, nothing that was found of one way of batching may be believed of another;
    if ``fresh``, every other quantity is of a model about which nothing is known.
    """
    found, model = [], STORIES[name].make(dtype)
    linearization = ntkops.linearize(model)
    # Four models at a time meet a quantity in every size: the next four exchange the halves.
    for number, (quantity, tried) in enumerate(sizes.items(), list(STORIES).index(name) // len(SIZES)):
        source = model if fresh and number % 2 == 0 else linearization
        for size in tried:
            try:
                examine(source, name, engine, dtype, size, quantity)
            except (AssertionError, RuntimeError, IndexError, ntkops.NtkopsError) as error:
                found.append(f"{quantity} in batches of {size}: {type(error).__name__}: {error}"[:300])
    return found


def in_turn(name: str, *shifts: int) -> dict[str, tuple[int, ...]]:
    """Return for every quantity other sizes, and for every model others again."""
    first = list(STORIES).index(name)
    return {
        quantity: tuple(SIZES[(first + number + shift) % 4] for shift in shifts)
        for number, quantity in enumerate(QUANTITIES)
    }


@pytest.mark.parametrize("name", STORIES)
def test_rows_belong_to_their_samples(name):
    """Every quantity, each in batches of another size; half of them are the first asked of a model."""
    assert complaints(name, "auto", torch.float64, in_turn(name, 0), fresh=True) == []


@pytest.mark.long
@pytest.mark.parametrize("name", STORIES)
def test_every_quantity_in_batches_of_every_size(name):
    """The sizes that are left, one in float32: over all models each quantity meets each size in it."""
    assert complaints(name, "auto", torch.float64, in_turn(name, 1, 2)) == []
    assert complaints(name, "auto", torch.float32, in_turn(name, 3)) == []


@pytest.mark.long
@pytest.mark.parametrize("name", STORIES)
def test_automatic_differentiation(name):
    """Which knows no rows: one size for each quantity and dtype, another one for every model."""
    assert complaints(name, "autograd", torch.float64, in_turn(name, 0)) == []
    assert complaints(name, "autograd", torch.float32, in_turn(name, 2)) == []


@pytest.mark.parametrize("shared", [True, False])
def test_routing_that_is_learnt(shared):
    """What was found with other parameters, or of other samples, is not believed of these."""
    torch.manual_seed(0)
    model, x = LearntRouting().double(), _positive(1)
    for threshold in (-100.0, 0.0):
        model.threshold.data.fill_(threshold)
        J = jacobian(model, x)
        source = ntkops.linearize(model) if shared else model
        close(ntkops.ntk(source, _positive(1)[:INNOCENT]).to_dense(), (J @ J.T)[:8, :8], 1e-9, "innocent")
        K = ntkops.ntk(source, x)
        v = normal(len(J), 2, seed=5)
        for _ in range(5):
            close(K @ v, J @ (J.T @ v), 1e-9, "product")
        close(K.to_dense(), J @ J.T, 1e-9, "dense")


class CoupledByParameter(Two):
    """Samples read one another's mean as soon as a parameter is positive."""

    def __init__(self) -> None:
        super().__init__()
        self.share = nn.Parameter(torch.tensor(-1.0))

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.hidden(x)
        return self.head(hidden + self.share.clamp(min=0) * hidden.mean(0))


def test_coupling_that_an_update_brings():
    """A kernel of live parameters looks again once they have changed: others were looked at."""
    torch.manual_seed(0)
    model, x = CoupledByParameter().double(), normal(N, 3, seed=1)
    K = ntkops.ntk(model, x, differentiable=True, max_dense_bytes=0, batch_size=3)
    close(K.diagonal().detach(), jacobian(model, x).square().sum(1), 1e-9)
    K.diagonal()
    with torch.no_grad():
        model.share.fill_(1.0)
    with pytest.raises(CoupledSamplesError):
        K.diagonal()


WORK = {
    "dense": lambda K: K.to_dense(),
    "diagonal": lambda K: K.diagonal(),
    "trace": lambda K: ntkops.trace(K, method="exact"),
    "Jᵀ v": lambda K: K.left.mT @ normal(K.shape[0], 1, seed=5),
    "K v": lambda K: K @ normal(K.shape[0], 1, seed=5),
}


@pytest.mark.parametrize("name, engine, work", pairs(COUPLED, ["autograd", "auto"], WORK), ids=str)
def test_coupling_that_later_samples_show(name, engine, work):
    """There is no kernel of samples, whichever way the batch is cut; a product may see it as one batch.

    In batches of one sample there is nothing that could be coupled.
    """
    story = COUPLED[name]
    for size in SIZES[1:]:
        if engine == "autograd" and size == N and work in ("Jᵀ v", "K v"):
            continue
        with pytest.raises(CoupledSamplesError):
            WORK[work](
                ntkops.ntk(
                    story.make(torch.float64), story.samples(torch.float64), engine=engine, batch_size=size
                )
            )
