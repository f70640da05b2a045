"""Hidden states of recurrent layers over time, against dense float64 Jacobians."""

import copy
import functools
import logging
import pickle

import pytest
import torch
from torch import nn

import ntkops
from ntkops.engines import Layerwise, count_passes
from ntkops.engines.layer_rules.recurrent import SEQUENCES
from ntkops.engines.recurrence import linearize_steps, pulled_signals, same_time_diagonal, state_kernel

LAYERS = {
    "gru": (torch.gru, nn.GRU, {}),
    "gru-no-bias": (torch.gru, nn.GRU, {"bias": False}),
    "lstm": (torch.lstm, nn.LSTM, {}),
    "tanh": (torch.rnn_tanh, nn.RNN, {}),
    "relu": (torch.rnn_relu, nn.RNN, {"nonlinearity": "relu"}),
}
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-7}

every_layer = pytest.mark.parametrize("name", LAYERS)
both_dtypes = pytest.mark.parametrize("dtype", TOLERANCE, ids=["float64", "float32"])


def make(name, dtype=torch.float64, batch_first=True, seed=0, **options):
    _, kind, fixed = LAYERS[name]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = kind(3, 5, batch_first=batch_first, **{**fixed, **options}).to(dtype)
        for parameter in model.parameters():  # large enough that states depend on the far past
            nn.init.normal_(parameter, std=0.5)
    return model


def sequences(count=4, length=6, dtype=torch.float64, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, length, 3, generator=generator, dtype=torch.float64).to(dtype)


def jacobian(model, x, state=lambda raw: raw[0]):
    """Return J of the hidden states in float64, one backward pass for each row."""
    model = copy.deepcopy(model).double()
    leaves, rows = list(model.parameters()), []
    for entry in state(model(x.double())).flatten():
        gradients = torch.autograd.grad(entry, leaves, retain_graph=True, materialize_grads=True)
        rows.append(torch.cat([gradient.flatten() for gradient in gradients]))
    return torch.stack(rows)


@functools.cache
def _reference(name, dtype):
    return jacobian(make(name, dtype), sequences(dtype=dtype))


def reference(name, dtype=torch.float64, names=None):
    """Return J of `make` at `sequences`, made once for all tests, or its columns of some parameters."""
    J, sizes = _reference(name, dtype), {n: p.numel() for n, p in make(name).named_parameters()}
    chosen = sizes if names is None else names
    return torch.cat(
        [part for n, part in zip(sizes, J.split(list(sizes.values()), 1), strict=True) if n in chosen], 1
    )


def assert_near(found, wanted, dtype):
    assert found.shape == wanted.shape
    difference = (found.double() - wanted).detach()
    assert float(difference.norm() / wanted.detach().norm()) < TOLERANCE[dtype]


def linearized(name, dtype, selected=None):
    function, _, _ = LAYERS[name]
    step, parts = SEQUENCES[function]
    model, x = make(name, dtype), sequences(dtype=dtype)
    state = tuple(x.new_zeros(len(x), 5) for _ in range(parts))
    weights = [p.detach() for p in model.parameters()]
    selected = [True] * len(weights) if selected is None else selected
    return x, linearize_steps(step, x, state, weights, selected)


# pure functions


@every_layer
@both_dtypes
def test_diagonal_kernel_and_pulled_signals_of_linearised_steps(name, dtype):
    x, steps = linearized(name, dtype)
    J = reference(name, dtype)
    K = J @ J.T
    assert_near(same_time_diagonal(steps).flatten(), K.diagonal(), dtype)
    columns = [state_kernel(steps, steps.take(number, number + 1)) for number in range(len(x))]
    assert_near(torch.stack(columns, dim=3).reshape(K.shape), K, dtype)
    # pulled back, they give the gradients of single samples
    generator = torch.Generator().manual_seed(2)
    cotangents = torch.randn(4, 2, 6, 5, generator=generator, dtype=torch.float64).to(dtype)
    weights = []
    for signal, activations, width in zip(
        pulled_signals(steps, cotangents), steps.activations, (3, 5), strict=True
    ):
        weights.append((signal.mT @ activations[..., :width].unsqueeze(1)).flatten(2))
    found = torch.cat(weights, dim=2)
    wanted = cotangents.double().flatten(2) @ J.unflatten(0, (4, 30))
    assert_near(found, wanted[..., : found.shape[-1]], dtype)


@every_layer
def test_kernel_in_chunks_of_time_and_into_given_memory(name):
    _, steps = linearized(name, torch.float64)
    one = steps.take(1, 2)
    wanted = state_kernel(steps, one)
    torch.testing.assert_close(state_kernel(steps, one, entries=1), wanted, rtol=0, atol=1e-14)
    memory = torch.full((4, 6, 5, 2, 6, 5), torch.nan, dtype=torch.float64)
    state_kernel(steps, one, out=memory[:, :, :, 1])
    torch.testing.assert_close(memory[:, :, :, 1], wanted, rtol=0, atol=1e-14)
    assert bool(memory[:, :, :, 0].isnan().all())


@pytest.mark.parametrize("selected", [(1, 0, 0, 0), (0, 1, 0, 0), (0, 0, 1, 0), (0, 1, 1, 0), (1, 0, 0, 1)])
@pytest.mark.parametrize("name", ["gru", "lstm"])
def test_some_of_the_weights(name, selected):
    _, steps = linearized(name, torch.float64, [bool(flag) for flag in selected])
    chosen = [n for (n, _), flag in zip(make(name).named_parameters(), selected, strict=True) if flag]
    J = reference(name, names=chosen)
    assert_near(same_time_diagonal(steps).flatten(), (J * J).sum(1), torch.float64)


def test_a_single_step_and_a_start_that_is_not_zero():
    step, _ = SEQUENCES[torch.lstm]
    model, x = make("lstm"), sequences(length=1)
    h, c = torch.randn(2, 4, 5, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    J = jacobian(Started(model, h, c), x, state=lambda raw: raw)
    weights = [p.detach() for p in model.parameters()]
    steps = linearize_steps(step, x, (h, c), weights, [True] * 4)
    assert_near(same_time_diagonal(steps).flatten(), J.square().sum(1), torch.float64)


class Started(nn.Module):
    """States that start from what is given, not from zero."""

    def __init__(self, rnn, h, c):
        super().__init__()
        self.rnn, self.start = rnn, (h, c)

    def forward(self, x):
        return self.rnn(x, tuple(part[: len(x)].unsqueeze(0) for part in self.start))[0]


# kernels


@every_layer
@pytest.mark.parametrize(("dtype", "batch_first"), [(torch.float64, False), (torch.float32, True)])
def test_everything_exact_of_the_kernel(name, dtype, batch_first):
    model, x = make(name, dtype, batch_first), sequences(dtype=dtype)
    J = reference(name, dtype)
    K = J @ J.T
    f = ntkops.linearize(model, output=0, batch_dim=0 if batch_first else 1)
    given = x if batch_first else x.transpose(0, 1)
    kernel = ntkops.ntk(f, given)
    assert kernel._core.engine.over_time
    dense = kernel.to_dense()
    assert_near(dense, K, dtype)
    assert torch.equal(dense, dense.mT)
    fresh = ntkops.ntk(f, given, max_dense_bytes=0)
    assert_near(fresh.diagonal(), K.diagonal(), dtype)
    trace, norm = ntkops.trace(fresh, method="exact"), ntkops.frobenius_norm(fresh, method="exact")
    assert trace.exact and norm.exact
    assert float((trace.value - K.trace()) / K.trace()) == pytest.approx(0, abs=TOLERANCE[dtype])
    assert float((norm.value - K.norm()) / K.norm()) == pytest.approx(0, abs=TOLERANCE[dtype])


@pytest.mark.parametrize("name", ["gru", "lstm"])
def test_parts_and_sums_of_the_kernel(name):
    model, x, new = make(name), sequences(), sequences(3, seed=5)
    J, J_new = reference(name), jacobian(model, new)
    K = ntkops.ntk(model, x, output=0)
    assert_near(K.cross(new).to_dense(), J_new @ J.T, torch.float64)
    assert_near(K[30:60, 30:60].to_dense(), J[30:60] @ J[30:60].T, torch.float64)  # one sample's own block
    assert_near(K[7:50:3, 5:100].to_dense(), (J @ J.T)[7:50:3, 5:100], torch.float64)
    split, split_new = J.unflatten(0, (4, 30)), J_new.unflatten(0, (3, 30))
    trace = ntkops.ntk(model, x, new, outputs="trace", output=0)
    assert_near(trace.to_dense(), torch.einsum("nop,mop->nm", split, split_new), torch.float64)
    each = ntkops.ntk(model, x, outputs="each", output=0)
    assert_near(each.to_dense(), torch.einsum("nop,mop->onm", split, split), torch.float64)
    chosen = ntkops.ntk(model, x, outputs=[3, 17, 29, 4], output=0)
    some = split[:, [3, 17, 29, 4]].flatten(0, 1)
    assert_near(chosen.to_dense(), some @ some.T, torch.float64)
    assert_near(chosen.diagonal(), some.square().sum(1), torch.float64)


def test_samples_in_batches_of_one_and_in_small_tiles(monkeypatch):
    model, x, J = make("gru"), sequences(), reference("gru")
    K = ntkops.ntk(model, x, output=0, batch_size=1, max_dense_bytes=0)
    assert K._core.engine.over_time
    assert_near(K.diagonal(), J.square().sum(1), torch.float64)
    monkeypatch.setattr("ntkops.engines.hidden_states._ENTRIES", 2 * 6 * 25)
    assert_near(K.diagonal(), J.square().sum(1), torch.float64)
    tiles = list(K.tiles(30))
    assert [tile.block.shape for tile in tiles] == [(30, 30)] * 10
    whole = K._core.engine.kernel(
        K._args, K._rows.inputs, K._rows.inputs, K._rows.flat_outputs, K._rows.flat_outputs
    )
    assert_near(whole[0], J @ J.T, torch.float64)


@pytest.mark.parametrize("names", [["weight_hh_l0"], ["weight_ih_l0", "bias_hh_l0"], ["bias_*"]])
def test_selected_parameters(names):
    model, x = make("gru"), sequences()
    chosen = [n for n, _ in model.named_parameters() if n in names or (names == ["bias_*"] and "bias" in n)]
    J = reference("gru", names=chosen)
    K = ntkops.ntk(model, x, output=0, params=names)
    assert K._core.engine.over_time
    assert_near(K.diagonal(), J.square().sum(1), torch.float64)
    assert_near(K.to_dense(), J @ J.T, torch.float64)


def test_passes_do_not_grow_with_the_number_of_states():
    model, counts = make("lstm"), []
    for length in (8, 24):
        K = ntkops.ntk(model, sequences(length=length), output=0)
        with count_passes() as tally:
            K.diagonal()
        assert tally.total == tally.count.per_sample == K.exact_cost("diagonal")
        counts.append(tally.total)
    assert counts == [10, 10]


def test_after_a_cast_and_after_pickling():
    model, x, J = make("gru"), sequences(), reference("gru")
    K = ntkops.ntk(model, x, output=0, max_dense_bytes=0)
    assert_near(pickle.loads(pickle.dumps(K)).diagonal(), J.square().sum(1), torch.float64)
    single = K.to(torch.float32)
    assert single._core.engine.over_time
    J = jacobian(model.float(), x.float())
    assert_near(single.diagonal(), J.square().sum(1), torch.float32)


def test_routes_of_ones_own_choice_are_kept():
    model, x = make("gru"), sequences()
    own = Layerwise(kernel_route="gradient", diagonal_route="gradient")
    K = ntkops.ntk(model, x, output=0, engine=own)
    J = reference("gru")
    with count_passes() as tally:
        assert_near(K.diagonal(), J.square().sum(1), torch.float64)
    assert tally.total == 30
    assert_near(K.to_dense(), J @ J.T, torch.float64)


# what goes another way


class Wrapped(nn.Module):
    """A GRU with something done to its input, its weights, its states or its parameters."""

    def __init__(self, kind):
        super().__init__()
        self.kind, self.rnn = kind, make("gru")
        if kind == "embedded":
            self.read = nn.Linear(3, 3).double()
        if kind == "started":
            self.first = nn.Parameter(torch.full((1, 1, 5), 0.3, dtype=torch.float64))

    def forward(self, x):
        if self.kind == "embedded":
            x = self.read(x)
        if self.kind == "started":
            return self.rnn(x, self.first.expand(-1, len(x), -1).contiguous())[0]
        states, last = self.rnn(x)
        if self.kind == "scaled":
            return states * 1.5
        if self.kind == "plus-last":
            return states + 0 * last.movedim(0, 1)
        if self.kind == "reversed":
            return states.flip(1)
        if self.kind == "transposed":
            return states.transpose(1, 2)
        if self.kind == "detached":
            return torch.cat([states[:, :3].detach(), states[:, 3:]], dim=1)
        if self.kind == "twice":
            return self.rnn(torch.cat([x[..., :1], states[..., :2]], -1))[0]
        if self.kind == "penalised":
            return states + 0 * self.rnn.weight_hh_l0.sum()
        if self.kind == "last":
            return states[:, -1]
        return states


KINDS = ["embedded", "started", "scaled", "plus-last", "reversed", "transposed", "detached", "twice"]


@pytest.mark.parametrize("kind", [*KINDS, "penalised", "last"])
def test_anything_else_goes_the_ordinary_way(kind):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Wrapped(kind)
    x = sequences(2)
    J = jacobian(model, x, state=lambda raw: raw)
    K = ntkops.ntk(model, x)
    assert not K._core.engine.over_time
    assert_near(K.diagonal(), J.square().sum(1), torch.float64)
    assert_near(K.to_dense(), J @ J.T, torch.float64)


@pytest.mark.parametrize("options", [{"num_layers": 2}, {"bidirectional": True}])
@pytest.mark.parametrize("name", ["gru", "lstm"])
def test_several_layers_and_both_directions_go_the_ordinary_way(name, options):
    model, x = make(name, **options), sequences(2, 4)
    J = jacobian(model, x)
    K = ntkops.ntk(model, x, output=0)
    assert not K._core.engine.over_time
    assert_near(K.diagonal(), J.square().sum(1), torch.float64)


class Deciding(nn.Module):
    """Samples with large values leave the ordinary way only when they are met."""

    def __init__(self):
        super().__init__()
        self.rnn = make("gru")

    def forward(self, x):
        states, _ = self.rnn(x)
        large = (x.abs().amax((1, 2)) > 50).to(x.dtype)
        return states * (1 + large[:, None, None])


def test_a_later_batch_that_differs_is_found_and_told(caplog):
    model, x = Deciding(), sequences(6)
    K = ntkops.ntk(model, x, batch_size=2)
    assert K._core.engine.over_time
    new = x.clone()
    new[5] *= 100
    J, J_new = (jacobian(model, y, state=lambda raw: raw) for y in (x, new))
    with caplog.at_level(logging.WARNING, logger="ntkops"):
        assert_near(K.cross(new).to_dense(), J_new @ J.T, torch.float64)
    assert any("the output differs" in record.getMessage() for record in caplog.records)
    assert not K._core.engine.over_time
    assert_near(K.diagonal(), J.square().sum(1), torch.float64)


def test_a_wrong_step_is_found_at_construction(caplog, monkeypatch):
    def wrong(driven, state, recur):
        own, new = driven.chunk(3, -1), recur(state[0]).chunk(3, -1)
        update = torch.sigmoid(own[1] + new[1])
        candidate = torch.tanh(own[2] + torch.sigmoid(own[0] + new[0]) * new[2])
        return (candidate + update.detach() * (state[0] - candidate),)

    monkeypatch.setitem(SEQUENCES, torch.gru, (wrong, 1))
    model, x = make("gru"), sequences()
    with caplog.at_level(logging.WARNING, logger="ntkops"):
        K = ntkops.ntk(model, x, output=0)
    assert any("automatic differentiation differ" in record.getMessage() for record in caplog.records)
    assert not K._core.engine.over_time
    J = jacobian(model, x)
    assert_near(K.diagonal(), J.square().sum(1), torch.float64)
