"""What the trial run finds: randomness, writes, coupled samples."""

import contextlib
import copy
import pickle
import random

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ntkops.errors import (
    CoupledSamplesError,
    ModelMutationError,
    NonFiniteError,
    StaleOperatorError,
    StochasticModelError,
    UnsupportedModelError,
)
from ntkops.model import linearize
from tests.model.zoo import LastStep, untouched
from tests.pairs import pairs

DTYPES = [torch.float64, torch.float32, torch.bfloat16]

TORCH = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])


class Apply(nn.Module):
    """A linear layer followed by a function."""

    def __init__(self, function, width: int = 3) -> None:
        super().__init__()
        self.layer = nn.Linear(3, width)
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self.layer(x))


def _data(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0)).to(dtype)


# -- randomness


@pytest.mark.parametrize(
    "function",
    [
        lambda y: F.dropout(y, 0.5),
        lambda y: y + torch.randn_like(y),
        lambda y: y * random.random(),
        lambda y: y * (torch.rand(len(y), 1) > 0.2),
        lambda y: F.scaled_dot_product_attention(y[:, None], y[:, None], y[:, None], dropout_p=0.5)[:, 0],
    ],
    ids=["dropout", "noise", "python", "drop path", "attention"],
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_hidden_randomness_is_found_and_located(function, dtype):
    model = nn.Sequential(nn.Linear(3, 3), Apply(function)).to(dtype)
    x = _data(6, 3, dtype=dtype)
    with untouched(model, x), pytest.raises(StochasticModelError, match="two passes .*F.dropout training="):
        linearize(model).inputs(x)


def test_the_random_module_is_named():
    class Noise(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + torch.randn_like(x)

    model = nn.Sequential(nn.Linear(3, 3), Noise(), nn.Linear(3, 2))
    with untouched(model), pytest.raises(StochasticModelError, match=r"first at module '1'"):
        linearize(model).inputs(_data(4, 3))


def test_rare_randomness_is_found_by_further_passes():
    def rarely(y: Tensor) -> Tensor:
        return F.dropout(y, 0.1)

    model = Apply(rarely, width=1)
    misses = 0
    for seed in range(10):
        torch.manual_seed(seed)
        try:
            linearize(model).inputs(_data(2, 3))
            misses += 1
        except StochasticModelError:
            pass
    # Five passes over two samples keep all ten numbers with probability 0.9 ** 10.
    assert misses <= 7


def test_random_numbers_without_effect_are_allowed_and_leave_the_global_state_alone():
    model = Apply(lambda y: (torch.rand(2), y)[1])
    x = _data(4, 3)
    with untouched(model, x):
        lin = linearize(model)
        ((_, _, batch),) = lin.inputs(x).batches(None)
        with lin.safe_context():
            lin.function(lin.parameters, batch)
    assert lin.call.draws


@pytest.mark.parametrize("draw", [random.random, np.random.rand], ids=["python", "numpy"])
def test_other_generators_are_left_alone_too(draw):
    model, x = Apply(lambda y: (draw(), y)[1]), _data(4, 3)
    with untouched(model, x):
        lin = linearize(model)
        ((_, _, batch),) = lin.inputs(x).batches(None)
        lin.function(lin.parameters, batch)


def test_a_model_that_counts_its_calls_outside_itself_is_refused():
    calls = []
    model = Apply(lambda y: (calls.append(1), y * len(calls))[1])
    with pytest.raises(StochasticModelError, match="or keeps a state"):
        linearize(model).inputs(_data(4, 3))


# -- writes


class Writes(nn.Module):
    """Changes one of its own tensors, or its input, in the forward pass."""

    def __init__(self, what: str) -> None:
        super().__init__()
        self.what = what
        self.layer = nn.Linear(3, 2)
        self.scale = nn.Parameter(torch.ones(2), requires_grad=False)
        self.register_buffer("count", torch.zeros(()))
        self.register_buffer("mean", torch.zeros(2))
        self.cache = torch.zeros(2)

    def forward(self, x: Tensor) -> Tensor:
        if self.what == "input":
            x[:, 0] = 0.0
        y = self.layer(x)
        with torch.no_grad():
            if self.what == "scale":
                self.scale.mul_(0.9)
            if self.what == "layer.weight":
                self.layer.weight.data.clamp_(-0.01, 0.01)
            if self.what == "count":
                self.count += 1
            if self.what == "mean":
                self.mean = 0.9 * self.mean + 0.1 * y.mean(0)
            if self.what == "cache":
                self.cache.copy_(y[0])
        return y * self.scale


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("input", r"changes input in place \(by aten::"),
        ("scale", r"changes parameter 'scale' in place \(by aten::mul_\)"),
        ("layer.weight", r"changes parameter 'layer\.weight' in place"),
        ("count", r"changes buffer 'count' in place"),
        ("mean", r"assigns new tensors to 'mean'"),
        ("cache", r"changes cache in place"),
    ],
)
@pytest.mark.parametrize("differentiable", [False, True])
def test_writes_are_refused_before_they_happen(what, message, differentiable):
    model, x = Writes(what), _data(5, 3)
    lin = linearize(model, differentiable=differentiable)
    held = [t.clone() for t in (*lin.parameters, *lin.constants)]
    with untouched(model, x), pytest.raises(ModelMutationError, match=message):
        lin.inputs(x)
    assert all(map(torch.equal, held, (*lin.parameters, *lin.constants)))


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda model, x: model.count.numpy().fill(1.0), "changes buffer 'count' in place;"),
        (lambda model, x: x.numpy().fill(1.0), "changes input in place;"),
    ],
    ids=["buffer", "input"],
)
def test_writes_that_bypass_torch_are_found_afterwards(write, message):
    class Bypasses(Writes):
        def forward(self, x: Tensor) -> Tensor:
            y = super().forward(x)
            write(self, x)
            return y

    model, x = Bypasses("nothing"), _data(4, 3)
    lin = linearize(model)
    with untouched(model, x), pytest.raises(ModelMutationError, match=message):
        lin.inputs(x)
    assert float(lin.buffers["count"]) == 0.0


def test_writes_are_refused_even_if_the_model_swallows_the_exception():
    class Swallows(Writes):
        def forward(self, x: Tensor) -> Tensor:
            try:
                return super().forward(x)
            except Exception:
                return self.layer(x)

    model = Swallows("scale")
    with untouched(model), pytest.raises(ModelMutationError, match="'scale'"):
        linearize(model).inputs(_data(4, 3))


def test_running_statistics_written_by_a_functional_call_are_refused():
    class Functional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 2)
            self.register_buffer("mean", torch.zeros(2))
            self.register_buffer("var", torch.ones(2))

        def forward(self, x: Tensor) -> Tensor:
            return F.batch_norm(self.layer(x), self.mean, self.var, training=True)

    model = Functional()
    with (
        untouched(model),
        pytest.raises(ModelMutationError, match=r"buffer 'mean' in place \(by aten::native_batch"),
    ):
        linearize(model).inputs(_data(5, 3))


def test_running_statistics_of_instance_norm():
    model = nn.Sequential(nn.Conv1d(2, 3, 1), nn.InstanceNorm1d(3, affine=True, track_running_stats=True))
    x = _data(4, 2, 5)
    with untouched(model, x), pytest.raises(ModelMutationError, match=r"buffer '1\.running_"):
        linearize(model).inputs(x)
    model.eval()
    if TORCH >= (2, 13):
        assert linearize(model).inputs(x).num_outputs == 15
    else:  # torch 2.8 writes the statistics back even where it only reads them
        with contextlib.suppress(ModelMutationError):
            assert linearize(model).inputs(x).num_outputs == 15
    plain = nn.Sequential(nn.Conv1d(2, 3, 1), nn.InstanceNorm1d(3, affine=True))
    assert linearize(plain).inputs(x).num_outputs == 15


def test_inplace_layers_on_the_models_own_tensors_are_fine():
    model = nn.Sequential(nn.Linear(3, 3), nn.ReLU(inplace=True), nn.Linear(3, 2))
    linearize(model).inputs(_data(4, 3))
    with pytest.raises(ModelMutationError, match=r"changes input in place \(by aten::relu_\)"):
        linearize(nn.Sequential(nn.ReLU(inplace=True), nn.Linear(3, 2))).inputs(_data(4, 3))


# -- coupled samples


COUPLINGS = {
    "mean": lambda y: y - y.mean(0),
    "batch norm": lambda y: F.batch_norm(y, None, None, training=True),
    "softmax over samples": lambda y: y.softmax(0),
    "sorted": lambda y: y.sort(0).values,
    "running": lambda y: y.cumsum(0),
    "running backwards": lambda y: y.flip(0).cumsum(0).flip(0),
    "last one": lambda y: y + 0.2 * y[-1:],
    "largest": lambda y: y / y.abs().max(),
}


@pytest.mark.parametrize("kind", COUPLINGS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_coupled_samples_are_found(kind, dtype):
    model, x = Apply(COUPLINGS[kind]).to(dtype), _data(6, 3, dtype=dtype)
    with (
        untouched(model, x),
        pytest.raises(CoupledSamplesError, match="samples are coupled: changing sample"),
    ):
        linearize(model).inputs(x)


PLACES = {
    "position": lambda y: y * torch.arange(1, len(y) + 1)[:, None].to(y),
    "number of samples": lambda y: y / len(y),
    "first is another": lambda y: torch.cat([y[:1], 2 * y[1:]]),
    "noise of one seed": lambda y: y + torch.randn(y.shape, generator=torch.Generator().manual_seed(0)).to(y),
}


@pytest.mark.parametrize("count, dtype, kind", pairs([2, 6], DTYPES, PLACES), ids=str)
def test_outputs_that_depend_on_the_place_in_the_batch_are_found(kind, dtype, count):
    model, x = Apply(PLACES[kind]).to(dtype), _data(count, 3, dtype=dtype)
    with (
        untouched(model, x),
        pytest.raises(CoupledSamplesError, match="without the first sample the others have other outputs"),
    ):
        linearize(model).inputs(x)


def test_rounding_that_a_model_enlarges_is_no_dependence_on_the_place():
    """In a chaotic recurrence the rounding of another batch size grows to the size of the state."""

    class Chaos(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rate = nn.Parameter(torch.tensor([3.9]))

        def forward(self, x: Tensor) -> Tensor:
            state = torch.sigmoid(x) * (1 - 1e-7 * len(x))
            for _ in range(300):
                state = self.rate * state * (1 - state)
            return state

    model, x = Chaos(), _data(6, 3)
    assert not torch.allclose(model(x)[1:], model(x[1:]), rtol=1e-2)
    assert linearize(model).inputs(x).num_samples == 6


def test_arithmetic_of_lower_precision_is_no_dependence_on_the_place():
    model = Apply(lambda y: (y.float() / (1 + 1e-6 * len(y))).double()).double()
    assert linearize(model).inputs(_data(6, 3, dtype=torch.float64)).num_samples == 6


def test_models_for_a_fixed_number_of_samples_are_refused():
    model, x = Apply(lambda y: y.reshape(3, 3)), _data(3, 3)
    with untouched(model, x), pytest.raises(UnsupportedModelError, match=r"works on a batch of 3 samples"):
        linearize(model).inputs(x)


def test_padding_to_the_longest_works():
    def trimmed(y: Tensor) -> Tensor:
        return y[:, : len(y)]

    assert linearize(Apply(trimmed)).inputs(_data(3, 3)).num_outputs == 3


class Caching(nn.Module):
    """Keeps what it made of its weight, somewhere."""

    def __init__(self, place) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3, bias=False)
        self.place = place

    def forward(self, x: Tensor) -> Tensor:
        place = self.place
        kept = place.get("weight") if isinstance(place, dict) else place[0] if place else None
        if kept is None:
            kept = 2 * self.layer.weight
            place.update(weight=kept) if isinstance(place, dict) else place.append(kept)
        return x @ kept.T


@pytest.mark.parametrize("place", [{}, [], {"of": 1}], ids=str)
def test_what_a_call_leaves_in_containers_is_taken_out_again(place):
    model, x = Caching(place), _data(4, 3)
    before = copy.copy(place)
    with untouched(model, x):
        lin = linearize(model)
        inputs = lin.inputs(x)
        for scale in (1.0, 3.0):
            values = (scale * lin.parameters[0],)
            found = lin.function(values, next(iter(inputs.batches(None)))[2])
            torch.testing.assert_close(found, 2 * scale * x @ model.layer.weight.T)
    assert place == before


def test_containers_inside_of_others_are_emptied_too():
    model = Caching({})
    model.places = ([model.place], "name")
    lin = linearize(model)
    lin.inputs(_data(4, 3))
    assert lin.call.root.place == {}
    assert pickle.loads(pickle.dumps(lin)).inputs(_data(4, 3)).num_samples == 4


@pytest.mark.parametrize("make", [lambda weight: 2 * weight, lambda weight: weight[:]], ids=["new", "view"])
def test_a_cache_outside_of_containers_is_refused(make):
    class Cache:
        def __init__(self) -> None:
            self.kept: Tensor | None = None

    class Kept(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.cache = nn.Linear(3, 3), Cache()

        def forward(self, x: Tensor) -> Tensor:
            if self.cache.kept is None:
                self.cache.kept = make(self.layer.weight)
            return x @ self.cache.kept.clone().T + self.layer.bias

    model, x = Kept(), _data(4, 3)
    with (
        untouched(model, x),
        pytest.raises(ModelMutationError, match=r"reads parameter 'layer.weight' in its first call only"),
    ):
        linearize(model).inputs(x)
    assert model.cache.kept is None


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_recurrent_layer_with_time_first_is_told_its_batch_dim(dtype):
    model, x = nn.GRU(3, 2).to(dtype), _data(6, 5, 3, dtype=dtype)
    with untouched(model, x), pytest.raises(CoupledSamplesError, match=r"pass batch_dim=1 .*batch_first"):
        linearize(model, output=0).inputs(x)
    assert linearize(model, output=0, batch_dim=1).inputs(x).num_samples == 5
    batch_first = LastStep(nn.GRU(3, 2, batch_first=True)).to(dtype)
    assert linearize(batch_first).inputs(x).num_samples == 6


def test_one_sample_and_equal_samples_are_checked_by_doubling():
    for x in (_data(1, 4, 3), _data(1, 4, 3).expand(5, -1, -1)):
        with pytest.raises(CoupledSamplesError):
            linearize(nn.GRU(3, 2), output=0).inputs(x)
        assert linearize(LastStep(nn.GRU(3, 2, batch_first=True))).inputs(x).num_outputs == 2


def test_differing_samples_are_looked_for():
    x = _data(1, 3).repeat(20, 1)
    x[13] += 1.0
    with pytest.raises(CoupledSamplesError):
        linearize(Apply(lambda y: y - y.mean(0))).inputs(x)


def test_models_for_sorted_lengths_work():
    class Packed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.GRU(3, 2, batch_first=True)

        def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
            packed = nn.utils.rnn.pack_padded_sequence(x, lengths.cpu(), batch_first=True)
            return self.layer(packed)[1][0]

    x, lengths = _data(5, 6, 3), torch.tensor([6, 5, 3, 3, 1])
    assert linearize(Packed()).inputs((x, lengths)).num_samples == 5


def test_leaves_move_together():
    """A mask that belongs to its sample must be exchanged with it."""

    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 2)

        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            if bool((x.abs().sum(-1)[~mask] > 0).any()):
                raise ValueError("entries behind the mask")
            return (self.layer(x) * mask[..., None]).sum(1)

    mask = torch.arange(4)[None] < torch.tensor([1, 3, 2, 4, 2])[:, None]
    x = _data(5, 4, 3) * mask[..., None]
    assert linearize(Masked()).inputs((x, mask)).num_samples == 5


def test_models_for_single_samples_work():
    def single(y: Tensor) -> Tensor:
        if len(y) > 1:
            raise ValueError("one at a time")
        return y

    assert linearize(Apply(single)).inputs(_data(1, 3)).num_samples == 1


def test_outputs_far_apart_in_size_are_compared_each_with_itself():
    def uneven(y: Tensor) -> Tensor:
        return torch.cat([1e3 * y, (y - y.mean(0)) * 0.01], 1)

    with pytest.raises(CoupledSamplesError):
        linearize(Apply(uneven)).inputs(_data(4, 3))


def test_infinite_outputs_are_allowed_and_nan_is_not():
    masked = Apply(lambda y: torch.cat([y, torch.full_like(y, -float("inf"))], 1))
    assert linearize(masked).inputs(_data(4, 3)).num_outputs == 6
    x = _data(4, 3)
    broken = Apply(lambda y: torch.where(torch.arange(len(y))[:, None] == 2, float("nan"), y))
    with pytest.raises(NonFiniteError, match="output is NaN for input row 2 although"):
        linearize(broken).inputs(x)


# -- tensors outside the model


def test_tensors_outside_the_model_are_watched():
    outside = torch.ones(3, requires_grad=True)
    model = Apply(lambda y: y * outside)
    inputs = linearize(model).inputs(_data(4, 3))
    inputs.check_fresh()
    with torch.no_grad():
        outside.mul_(2)
    with pytest.raises(StaleOperatorError, match="a tensor outside the model"):
        inputs.check_fresh()


def test_modules_hidden_in_lists_are_watched():
    model = Apply(lambda y: y)
    model.teachers = [nn.Linear(3, 3)]
    lin = linearize(model)
    with torch.no_grad():
        model.teachers[0].weight.mul_(2)
    with pytest.raises(StaleOperatorError, match="attribute 'teachers'"):
        lin.check_fresh()
