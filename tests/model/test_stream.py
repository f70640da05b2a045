"""Re-iterables of batches: read in every pass, checked in every pass."""

import pickle
import random

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from ntkops.errors import DtypeError, InputError, NonDeterministicDataError, NonFiniteError
from ntkops.model import linearize
from tests.model.zoo import BY_NAME, LastStep, untouched

X = torch.randn(11, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


class Changing:
    """A source whose batches can be exchanged between passes."""

    def __init__(self, *batches):
        self.content = list(batches)

    def __iter__(self):
        return iter(self.content)


class Augmented(Dataset):
    """Noise on every access."""

    def __init__(self, draw):
        self.draw = draw

    def __len__(self):
        return 8

    def __getitem__(self, index):
        return X[index] + self.draw()


def _model():
    return nn.Linear(3, 2).double()


def _states(lin, inputs, size):
    pieces = list(inputs.batches(size))
    stops = [stop for _, stop, _ in pieces]
    assert [start for start, *_ in pieces] == [0, *stops[:-1]]
    assert all(stop - start == batch.num_samples for start, stop, batch in pieces)
    return torch.cat([lin.function(lin.parameters, batch) for *_, batch in pieces]), stops


SOURCES = {
    "list": lambda: [X[:4], X[4:8], X[8:]],
    "list of tuples": lambda: [(X[:4],), (X[4:],)],
    "loader of tensors": lambda: DataLoader(X, batch_size=4),
    "loader of lists": lambda: DataLoader(TensorDataset(X), batch_size=4),
    "custom": lambda: Changing(X[:1], X[1:9], X[9:]),
    "loader with a generator": lambda: DataLoader(X, batch_size=4, generator=torch.Generator()),
}


@pytest.mark.parametrize("kind", SOURCES)
@pytest.mark.parametrize("size", [None, 1, 3, 4, 100])
def test_batches_are_split_and_joined(kind, size):
    model, source = _model(), SOURCES[kind]()
    wanted = model(X).detach()
    with untouched(model, X):
        lin = linearize(model)
        inputs = lin.inputs(source)
        states, stops = _states(lin, inputs, size)
    assert (inputs.num_samples, inputs.output_shape) == (11, (2,))
    torch.testing.assert_close(states, wanted)
    if size:
        assert stops == [*range(size, 11, size), 11]


@pytest.mark.parametrize("kind", SOURCES)
def test_selections_are_read_in_one_pass(kind):
    model = _model()
    wanted = model(X).detach()
    lin = linearize(model)
    inputs = lin.inputs(SOURCES[kind]())
    for index in ([10, 0, 5, 5], [3, 4, 5], [0], list(range(11))):
        states, _ = _states(lin, inputs.select(torch.tensor(index)), 2)
        torch.testing.assert_close(states, wanted[index])


def test_dict_batches_with_other_leaves():
    specimen = BY_NAME["dict"]
    model, x = specimen.make(), specimen.inputs(6)
    halves = [{k: v[a : a + 3] if isinstance(v, torch.Tensor) else v for k, v in x.items()} for a in (0, 3)]
    lin = linearize(model, output="logits")
    inputs = lin.inputs(halves)
    for size in (None, 2, 4, 6):
        torch.testing.assert_close(_states(lin, inputs, size)[0], specimen.reference(model, x).detach())
    # Batches whose other leaves differ are not joined.
    halves[1]["square"] = False
    assert _states(lin, lin.inputs(halves), 6)[1] == [3, 6]


def test_batches_of_different_length_in_time_are_not_joined():
    model = LastStep(nn.GRU(3, 2, batch_first=True)).double()
    batches = [torch.randn(3, 4, 3).double(), torch.randn(2, 6, 3).double(), torch.randn(2, 6, 3).double()]
    lin = linearize(model)
    inputs = lin.inputs(batches)
    states, stops = _states(lin, inputs, 5)
    assert stops == [3, 7]
    torch.testing.assert_close(states, torch.cat([model(b) for b in batches]).detach())
    found, _ = _states(lin, inputs.select(torch.tensor([6, 0, 3])), None)
    torch.testing.assert_close(found, torch.cat([model(b) for b in batches]).detach()[[6, 0, 3]])
    assert inputs.select(torch.tensor([6, 3])).num_samples == 2


def test_outputs_of_unlike_length_have_zeros_behind_them():
    model = nn.Sequential(nn.Linear(1, 1), nn.Flatten()).double()
    lin = linearize(model)
    batches = [torch.randn(3, 4, 1).double(), torch.randn(2, 6, 1).double()]
    inputs = lin.inputs(batches)
    assert (
        inputs.lengths.tolist() == [4, 4, 4, 6, 6] and inputs.output_shape == (6,) and inputs.num_rows == 24
    )
    states, _ = _states(lin, inputs, None)
    short = nn.functional.pad(model(batches[0]), (0, 2))
    torch.testing.assert_close(states, torch.cat([short, model(batches[1])]).detach())


class Varying(nn.Module):
    """Leaves out an output where a value is large."""

    def __init__(self):
        super().__init__()
        self.body = nn.Linear(1, 1)

    def forward(self, x):
        found = self.body(x).flatten(1)
        return found[:, 1:] if float(x.max()) > 4 else found


def test_outputs_that_change_their_number_between_batches_are_noticed():
    lin = linearize(Varying().double())
    inputs = lin.inputs([torch.rand(3, 4, 1).double(), 5 + torch.rand(3, 4, 1).double()])
    with pytest.raises(TypeError, match="3 outputs per sample are due"):
        _states(lin, inputs, None)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (lambda: iter([X]), "one-shot iterator .list_iterator.*pass a list of batches"),
        (lambda: (x for x in [X]), "one-shot iterator .generator"),
        (lambda: map(lambda x: x, [X]), "one-shot iterator .map"),
        (lambda: TensorDataset(X), r"data set .TensorDataset. of single samples; pass DataLoader"),
        (lambda: [], "the list yields no batch"),
        (lambda: [X[:0]], "batch 0 has no samples"),
        (lambda: ["a"], "batch 0 holds no tensor"),
        (lambda: [1.0, 2.0], "batch 0 holds no tensor"),
    ],
)
def test_sources_that_cannot_be_read_again_or_at_all(source, message):
    model = _model()
    with untouched(model), pytest.raises(InputError, match=message):
        linearize(model).inputs(source())


@pytest.mark.parametrize(
    "draw",
    [lambda: torch.randn(3).double(), lambda: random.random(), lambda: np.random.rand()],
    ids=["torch", "python", "numpy"],
)
def test_augmentation_is_noticed(draw):
    model = _model()
    with (
        untouched(model),
        pytest.raises(NonDeterministicDataError, match="differ at batch 0; pass shuffle=False"),
    ):
        linearize(model).inputs(DataLoader(Augmented(draw), batch_size=4))


@pytest.mark.parametrize("own", [True, False])
def test_shuffling_is_noticed_and_the_loaders_generator_stays_as_it_was(own):
    generator = torch.Generator().manual_seed(5) if own else None
    state = generator.get_state() if own else None
    model = _model()
    loader = DataLoader(X, batch_size=11, shuffle=True, generator=generator)
    with untouched(model), pytest.raises(NonDeterministicDataError, match="DataLoader differ at batch 0"):
        linearize(model).inputs(loader)
    assert not own or torch.equal(generator.get_state(), state)


def test_every_later_pass_is_compared_with_the_first():
    model, source = _model(), Changing(X[:4].clone(), X[4:8].clone(), X[8:].clone())
    lin = linearize(model)
    inputs = lin.inputs(source)
    source.content[1] = X[[5, 4, 6, 7]]  # the same samples in another order
    with pytest.raises(NonDeterministicDataError, match="differ at batch 1"):
        list(inputs.batches(2))
    source.content[1] = X[4:8]
    assert len(list(inputs.batches(11))) == 1
    source.content.append(X[:1])
    with pytest.raises(NonDeterministicDataError, match="differ at batch 3"):
        list(inputs.batches(None))
    del source.content[2:]
    with pytest.raises(NonDeterministicDataError, match="differ at batch 3|ends after 2"):
        list(inputs.batches(None))
    source.content[0][0, 0] += 1e-9
    with pytest.raises(NonDeterministicDataError, match="differ at batch 0"):
        inputs.select(torch.tensor([0]))


def test_a_source_that_is_used_up_is_noticed():
    class Once:
        def __init__(self):
            self.left = [X]

        def __iter__(self):
            while self.left:
                yield self.left.pop()

    with pytest.raises(NonDeterministicDataError, match="yields nothing in a second pass"):
        linearize(_model()).inputs(Once())


def test_all_batches_are_checked_with_their_own_row_numbers():
    bad = X.clone()
    bad[9, 1] = float("nan")
    with pytest.raises(NonFiniteError, match="batch 2 row 9 is not finite"):
        linearize(_model()).inputs([bad[:4], bad[4:8], bad[8:]])
    with pytest.raises(DtypeError, match="batch 1 is float32, the model float64"):
        linearize(_model()).inputs([X[:4], X[4:].float()])


def test_iterable_data_sets_work():
    class Rows(IterableDataset):
        def __iter__(self):
            return iter(X)

    lin = linearize(_model())
    inputs = lin.inputs(DataLoader(Rows(), batch_size=4))
    assert inputs.num_samples == 11


def test_casts_apply_to_every_pass():
    lin = linearize(_model())
    inputs = lin.inputs([X[:4], X[4:]]).to(torch.float32)
    assert {batch.tensors[0].dtype for *_, batch in inputs.batches(3)} == {torch.float32}
    single = lin.to(torch.float32)
    states, _ = _states(single, inputs, 3)
    assert states.dtype == torch.float32


def test_pickles_carry_the_source():
    lin = linearize(_model())
    inputs = pickle.loads(pickle.dumps(lin.inputs([X[:4], X[4:]])))
    torch.testing.assert_close(_states(lin, inputs, 5)[0], _states(lin, lin.inputs(X), 5)[0])


def test_one_sample_a_batch():
    lin = linearize(_model())
    assert lin.inputs([row[None] for row in X]).num_samples == 11
