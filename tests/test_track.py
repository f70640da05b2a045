"""Quantities along training: right, resumable to the bit, and without a trace on the model."""

from __future__ import annotations

import copy
import csv
import os
import pickle

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import ntkops
from ntkops import functional
from ntkops.errors import (
    CheckpointError,
    DtypeError,
    InputError,
    NonFiniteError,
    NtkopsError,
    ParameterShapeError,
    ShapeError,
    UnknownParameterError,
    UnsupportedOperationError,
)
from ntkops.results import Estimate, History
from ntkops.track import Tracker, track
from tests.cases import BY_NAME

ALL = (
    "trace",
    "frobenius_norm",
    "effective_rank",
    "alignment",
    "kernel_distance",
    "target_alignment",
    "top_eigenvalues",
    "parameter_distance",
    "linearization_error",
)
CASE = BY_NAME["mlp"]
TARGETS = torch.randn(5, 2, generator=torch.Generator().manual_seed(9), dtype=torch.float64)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def trained(model: nn.Module, count: int = 4, scale: float = 0.1) -> list[dict[str, torch.Tensor]]:
    """Return state dicts of a walk that starts at the model, which is left alone."""
    walker = copy.deepcopy(model)
    generator = seeded(5)
    states = []
    for _ in range(count):
        states.append(copy.deepcopy(walker.state_dict()))
        with torch.no_grad():
            for parameter in walker.parameters():
                noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                parameter += scale * noise.to(parameter.dtype)
    return states


@pytest.fixture
def setting():
    model = CASE.make()
    return model, CASE.data(5), trained(model)


def dense_kernels(model, x, states):
    for state in states:
        names = [name for name, _ in model.named_parameters()]

        def outputs(*values, names=names):
            return torch.func.functional_call(model, dict(zip(names, values, strict=True)), (x,)).flatten()

        values = tuple(state[name] for name in names)
        J = torch.cat(
            [j.flatten(1) for j in torch.func.jacrev(outputs, argnums=tuple(range(len(names))))(*values)],
            dim=1,
        )
        yield J @ J.T


def references(model, x, states, targets):
    """Return each quantity of each state by plain formulas."""
    kernels = list(dense_kernels(model, x, states))
    y = targets.flatten()

    def function(params, inputs):
        return torch.func.functional_call(model, params, (inputs,))

    f0 = function(states[0], x)
    found = {name: [] for name in ALL}
    for state, K in zip(states, kernels, strict=True):
        cosine = (K * kernels[0]).sum() / K.norm() / kernels[0].norm()
        found["trace"].append(K.trace())
        found["frobenius_norm"].append(K.norm())
        found["effective_rank"].append(K.trace() ** 2 / K.norm() ** 2)
        found["alignment"].append(cosine)
        found["kernel_distance"].append(1 - cosine)
        found["target_alignment"].append(y @ K @ y / K.norm() / (y @ y))
        found["top_eigenvalues"].append(torch.linalg.eigvalsh(K).flip(0)[:5])
        squares = sum((state[name] - states[0][name]).square().sum() for name in state)
        found["parameter_distance"].append(squares.sqrt())
        f, linear = function(state, x), functional.linearized(function, states[0], x, state)
        found["linearization_error"].append((f - linear).norm() / (f - f0).norm())
    return {name: torch.stack(values) for name, values in found.items()}


def test_every_quantity_matches_its_formula(setting):
    model, x, states = setting
    history = track(model, x, states, ALL, targets=TARGETS, method="exact")
    expected = references(model, x, states, TARGETS)
    assert history.quantities == ALL and history.steps == (0, 1, 2, 3)
    for name in ALL:
        torch.testing.assert_close(
            history[name], expected[name], rtol=1e-9, atol=1e-12, equal_nan=True, msg=lambda m, n=name: n + m
        )
    assert history["linearization_error"].isnan().tolist() == [True, False, False, False]
    assert all(bool(column.all()) for column in history.converged.values())
    assert float(history.stderrs["trace"].max()) == 0 and bool(history.exact["trace"].all())


@pytest.mark.parametrize("outputs", ["trace", "each", 1, [1, 0]])
def test_kernels_over_some_outputs(setting, outputs):
    model, x, states = setting
    targets = TARGETS[:, 1] if outputs == 1 else TARGETS
    history = track(
        model, x, states, ["trace", "target_alignment"], targets=targets, outputs=outputs, method="exact"
    )
    for row, state in enumerate(states):
        model.load_state_dict(state)
        K = ntkops.ntk(model, x, outputs=outputs).to_dense()
        if outputs == "each":
            T = torch.einsum("ic,jc->cij", targets, targets)
        else:
            y = targets if outputs == "trace" else targets.reshape(-1, 1)
            T = y @ y.mT
        norms = torch.linalg.matrix_norm(K) * torch.linalg.matrix_norm(T)
        torch.testing.assert_close(history["target_alignment"][row], (K * T).sum((-2, -1)) / norms)
        torch.testing.assert_close(history["trace"][row], K.diagonal(dim1=-2, dim2=-1).sum(-1))


def test_the_lazy_regime_shows():
    model, x = CASE.make(), CASE.data(5)
    errors = []
    for scale in (1e-4, 1e-2):
        states = trained(model, 2, scale)
        errors.append(float(track(model, x, states, "linearization_error")["linearization_error"][1]))
    assert 30 < errors[1] / errors[0] < 300  # the error is of first order in the distance
    linear = nn.Linear(3, 2).double()
    exact = track(linear, x, trained(linear), "linearization_error")
    assert float(exact["linearization_error"][1:].max()) < 1e-12


def test_rounding_is_the_error_of_a_small_change_in_float32():
    model, x = CASE.make(torch.float32), CASE.data(5, torch.float32)
    history = track(model, x, trained(model, 2, 1e-6), "linearization_error")
    value, error = (
        float(t[1]) for t in (history["linearization_error"], history.stderrs["linearization_error"])
    )
    assert value < 10 * error and error > 1e-3


def test_the_same_probes_serve_every_checkpoint():
    model = nn.Sequential(nn.Linear(4, 12), nn.Tanh(), nn.Linear(12, 6)).double()
    x = torch.randn(12, 4, dtype=torch.float64)
    states = trained(model, 3, 1e-3)
    options = {"method": "hutchinson", "num_passes": 20}
    history = track(model, x, states, ["trace"], generator=seeded(3), **options)
    exact = track(model, x, states, ["trace"], method="exact")
    error = history["trace"] - exact["trace"]
    assert float(error[0].abs()) > 20 * float((error[1:] - error[0]).abs().max())
    again = track(model, x, states, ["trace"], generator=seeded(3), **options)
    assert torch.equal(history["trace"], again["trace"]) and history.seed == again.seed
    assert not bool(history.exact["trace"].any()) and float(history.stderrs["trace"].min()) > 0
    free = track(model, x, states, ["trace"], **options)
    assert free.seed != history.seed


def test_own_quantities(setting):
    model, x, states = setting

    def largest_entry(K):
        return K.to_dense().max()

    history = track(
        model,
        x,
        states,
        [largest_entry, "trace"],
    )
    assert history.quantities == ("largest_entry", "trace")
    expected = torch.stack([K.max() for K in dense_kernels(model, x, states)])
    torch.testing.assert_close(history["largest_entry"], expected)
    estimated = track(model, x, states[:2], {"mine": lambda K: ntkops.trace(K), "three": lambda K: 3})
    torch.testing.assert_close(estimated["mine"], history["trace"][:2])
    assert estimated["three"].tolist() == [3.0, 3.0]
    with pytest.raises(InputError, match="'bad' returned a str"):
        track(model, x, states, {"bad": lambda K: "text"})
    sizes = iter((2, 3))
    with pytest.raises(ShapeError, match="keeps its shape"):
        track(model, x, states, {"odd": lambda K: torch.ones(next(sizes))})


def loop(tracker: Tracker, model: nn.Module, x: torch.Tensor, steps: range) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for step in range(steps.stop):
        if step >= steps.start:
            tracker.record(step)
        optimizer.zero_grad()
        model(x).square().sum().backward()
        optimizer.step()


def test_inside_a_training_loop():
    model, x = CASE.make(), CASE.data(5)
    plain = copy.deepcopy(model)
    tracker = track(model, x, quantities=["trace", "alignment", "linearization_error"])
    assert isinstance(tracker, Tracker) and len(tracker.history) == 0
    loop(tracker, model, x, range(3))
    states = []
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.05)
    for _ in range(3):
        states.append(copy.deepcopy(plain.state_dict()))
        optimizer.zero_grad()
        plain(x).square().sum().backward()
        optimizer.step()
    for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(ours, theirs)  # training went as without a tracker
    listed = track(plain, x, states, ["trace", "alignment", "linearization_error"])
    for name in listed.quantities:
        torch.testing.assert_close(tracker.history[name], listed[name], rtol=0, atol=0, equal_nan=True)


def test_dropout_and_batch_normalisation_while_training():
    model = nn.Sequential(
        nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Tanh(), nn.Linear(4, 2)
    ).double()
    x = torch.randn(5, 3, dtype=torch.float64)
    tracker = track(model.eval(), x, quantities=["trace"])
    for step in range(3):
        tracker.record(step)
        model.train()
        model(x).sum().backward()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter -= 0.1 * parameter.grad
        if step == 1:
            expected = ntkops.trace(ntkops.ntk(copy.deepcopy(model).eval(), x))
    assert model.training
    assert float(tracker.history["trace"][2]) == pytest.approx(float(expected), rel=1e-12)


def test_the_model_is_left_alone(setting):
    model, x, states = setting
    model.train()
    before = copy.deepcopy(model.state_dict())
    pointers = [p.data_ptr() for p in model.parameters()]
    versions = [p._version for p in model.parameters()]
    random = torch.get_rng_state()
    track(model, x, states, ALL, targets=TARGETS)
    with pytest.raises(NtkopsError):
        track(model, x, [*states, {"0.weight": torch.ones(1)}])
    assert torch.equal(random, torch.get_rng_state())
    assert model.training and [p.data_ptr() for p in model.parameters()] == pointers
    assert [p._version for p in model.parameters()] == versions
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])


def test_checkpoints_from_files(setting, tmp_path, monkeypatch):
    model, x, states = setting
    expected = track(model, x, states[:4], ["trace"])
    torch.save(states[0], tmp_path / "a.pt")
    torch.save(states[1], tmp_path / "b.pt", _use_new_zipfile_serialization=False)
    save_file(states[2], tmp_path / "c.safetensors")
    last = copy.deepcopy(model)
    last.load_state_dict(states[3])
    found = track(
        model, x, [tmp_path / "a.pt", str(tmp_path / "b.pt"), tmp_path / "c.safetensors", last], "trace"
    )
    assert torch.equal(found["trace"], expected["trace"])

    monkeypatch.chdir(tmp_path)

    class Bomb:
        def __reduce__(self):
            return os.mkdir, ("exploded",)

    torch.save({"weight": Bomb()}, "bomb.pt")
    (tmp_path / "plain.pkl").write_bytes(pickle.dumps(Bomb()))
    torch.save({"model": states[0]}, "nested.pt")
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "c.safetensors").read_bytes()[:-3])
    (tmp_path / "cut.pt").write_bytes((tmp_path / "a.pt").read_bytes()[:-300])
    for name, error, message in (
        ("bomb.pt", CheckpointError, "execute code"),
        ("plain.pkl", CheckpointError, "execute code|neither a whole"),
        ("nested.pt", InputError, "pass one of model"),
        ("cut.safetensors", CheckpointError, "neither a whole"),
        ("cut.pt", CheckpointError, "neither a whole"),
        ("missing.pt", CheckpointError, "cannot be read"),
    ):
        with pytest.raises(error, match=message):
            track(model, x, [name], "trace")
    assert not (tmp_path / "exploded").exists()


def test_tied_frozen_buffers_and_wrapped_names():
    tied = BY_NAME["tied"]
    model, x = tied.make(), tied.data(4)
    history = track(model, x, [model.state_dict()], "trace")
    assert float(history["trace"][0]) == pytest.approx(float(ntkops.trace(ntkops.ntk(model, x))), rel=1e-12)
    torn = dict(model.state_dict())
    torn["head.weight"] = torn["head.weight"] + 1
    with pytest.raises(InputError, match="two values"):
        track(model, x, [torn], "trace")
    prefixed = {f"module.{name}": value for name, value in model.state_dict().items()}
    assert torch.equal(track(model, x, [prefixed], "trace")["trace"], history["trace"])

    adapter = BY_NAME["adapter"]
    model, x = adapter.make(), adapter.data(4)
    partial = {name: value for name, value in model.state_dict().items() if name in ("down", "up")}
    assert float(track(model, x, [partial], "trace")["trace"][0]) == pytest.approx(
        float(ntkops.trace(ntkops.ntk(model, x))), rel=1e-12
    )
    changed = dict(model.state_dict())
    changed["base.weight"] = 2 * changed["base.weight"]
    model.load_state_dict(changed)
    expected = float(ntkops.trace(ntkops.ntk(model, x)))
    assert float(track(adapter.make(), x, [changed], "trace")["trace"][0]) == pytest.approx(
        expected, rel=1e-12
    )

    norm = BY_NAME["batchnorm-eval"]
    model, x = norm.make(), norm.data(4)
    changed = dict(model.state_dict())
    changed["1.running_var"] = 3 * changed["1.running_var"]
    other = copy.deepcopy(model)
    other.load_state_dict(changed)
    assert float(track(model, x, [changed], "trace")["trace"][0]) == pytest.approx(
        float(ntkops.trace(ntkops.ntk(other, x))), rel=1e-12
    )


@pytest.mark.parametrize("name", ["gru-time", "dict", "weight-norm", "attention", "old-style"])
def test_models_of_other_kinds(name):
    case = BY_NAME[name]
    model, x = case.make(), case.data(3)
    states = trained(model, 2, 0.01)
    history = track(model, x, states, ["trace", "alignment", "linearization_error"], **case.options)
    model.load_state_dict(states[1])
    expected = float(ntkops.trace(ntkops.ntk(model, x, **case.options)))
    assert float(history["trace"][1]) == pytest.approx(expected, rel=1e-9)
    assert 0 < float(history["linearization_error"][1]) < 0.5


def test_a_function_with_its_parameters():
    params = {"w": torch.randn(3, 2, dtype=torch.float64)}
    x = torch.randn(4, 3, dtype=torch.float64)
    tracker = track(lambda p, batch: torch.tanh(batch @ p["w"]), x, quantities=["trace"], params=params)
    tracker.record()
    params["w"].mul_(2)
    tracker.record()
    again = track(lambda p, b: torch.tanh(b @ p["w"]), x, [{"w": params["w"]}], "trace", params=params)
    assert torch.equal(again["trace"][0], tracker.history["trace"][1])


def test_a_linearisation_needs_weights(setting):
    model, x, states = setting
    tracker = track(ntkops.linearize(model), x, quantities=["trace"])
    with pytest.raises(UnsupportedOperationError, match="weights=state_dict"):
        tracker.record(0)
    tracker.record(0, states[1])
    assert float(tracker.history["trace"][0]) == float(track(model, x, states[1:2], "trace")["trace"][0])


# -- resuming


ESTIMATED = {"method": "hutch++", "num_passes": 24, "targets": TARGETS}


def columns_equal(one: History, other: History) -> None:
    assert one.steps == other.steps and one.quantities == other.quantities and one.seed == other.seed
    for part in ("values", "stderrs", "intervals", "exact", "converged", "passes"):
        for name in one.quantities:
            left, right = getattr(one, part)[name], getattr(other, part)[name]
            torch.testing.assert_close(left, right, rtol=0, atol=0, equal_nan=True)


def test_an_interrupted_run_goes_on_with_the_same_bits(setting, tmp_path):
    model, x, states = setting
    whole = track(model, x, states, ALL, generator=seeded(1), **ESTIMATED)
    path = tmp_path / "run.safetensors"

    def interrupted():
        yield from states[:2]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        track(model, x, interrupted(), ALL, generator=seeded(1), path=path, **ESTIMATED)
    assert os.listdir(tmp_path) == [path.name]
    resumed = track(model, x, states, ALL, path=path, **ESTIMATED)  # the seed is that of the file
    columns_equal(resumed, whole)
    third = track(model, x, states, ALL, generator=seeded(1), path=path, **ESTIMATED)
    columns_equal(third, whole)
    with ntkops.count_passes() as tally:
        track(model, x, states, ALL, path=path, **ESTIMATED)
    assert tally.total == 0  # nothing is computed again


def test_a_training_loop_goes_on(tmp_path):
    x, path = CASE.data(5), tmp_path / "run"
    names = ["trace", "alignment", "parameter_distance", "linearization_error"]
    model = CASE.make()
    whole = track(model, x, quantities=names, generator=seeded())
    loop(whole, model, x, range(5))
    model = CASE.make()
    loop(track(model, x, quantities=names, generator=seeded(), path=path), model, x, range(3))
    model = CASE.make()  # training starts again, and steps over the rows that are there
    tracker = track(model, x, quantities=names, generator=seeded(), path=path)
    assert tracker.history.steps == (0, 1, 2)
    loop(tracker, model, x, range(5))
    columns_equal(tracker.history, whole.history)
    model = CASE.make()  # training goes on at step 2 from a state of its own
    tracker = track(model, x, quantities=names, path=path)
    tracker.rewind(2)
    loop(tracker, model, x, range(3, 5))
    columns_equal(tracker.history, whole.history)
    with pytest.raises(CheckpointError, match="step 4 was recorded with other parameters"):
        tracker.record(4)  # after one more step of training


def test_threads_and_chunks_of_the_first_run_are_followed(setting, tmp_path, monkeypatch):
    model, x, states = setting
    path = tmp_path / "run"
    before = torch.get_num_threads()
    seen = []

    def watch(K):
        info = K.engine_info
        seen.append((torch.get_num_threads(), info.batch_size, info.chunk_size, info.max_dense_bytes))
        return 1.0

    torch.set_num_threads(2)
    try:
        track(model, x, states[:1], {"watch": watch}, path=path)
        torch.set_num_threads(1)
        track(model, x, states, {"watch": watch}, path=path)
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)
    assert len(seen) == 4 and len(set(seen)) == 1 and seen[0][0] == 2


def test_a_file_of_something_else_is_refused(setting, tmp_path):
    model, x, states = setting
    path = tmp_path / "run"
    track(model, x, states[:2], ["trace"], generator=seeded(), path=path, num_passes=9)
    content = path.read_bytes()
    other = nn.Sequential(nn.Linear(3, 6), nn.ReLU(), nn.Linear(6, 2)).double()
    for change, message in (
        ({"x": x + 1e-9}, "fingerprint differs: data"),
        ({"model": other}, "fingerprint differs: model"),
        ({"params": "0.*"}, "fingerprint differs: model"),
        ({"quantities": ["frobenius_norm"]}, "fingerprint differs: options"),
        ({"num_passes": 10}, "fingerprint differs: options"),
        ({"outputs": "trace"}, "fingerprint differs: options"),
        ({"chunk_size": 2}, "fingerprint differs: options"),
        ({"generator": seeded(1)}, "seed"),
        ({"checkpoints": states[1:]}, "fingerprint differs: parameters"),
    ):
        given = {"model": model, "x": x, "checkpoints": states, "quantities": ["trace"], "num_passes": 9}
        with pytest.raises(CheckpointError, match=message):
            track(**{**given, "path": path, **change})
    assert path.read_bytes() == content
    path.write_bytes(content[:-1])
    with pytest.raises(CheckpointError):
        track(model, x, states, ["trace"], path=path, num_passes=9)


@pytest.mark.parametrize("kind", ["dict", "loader", "tied", "gru-time"])
def test_every_kind_of_data_and_model_goes_on(kind, tmp_path):
    case = BY_NAME["mlp" if kind == "loader" else kind]
    model, x, path = case.make(), case.data(4), tmp_path / "run"
    if kind == "loader":
        x = torch.utils.data.DataLoader(x, batch_size=3)
    states, names = trained(model, 3), ["trace", "alignment", "linearization_error"]
    options = {**case.options, "generator": seeded(), "method": "hutch++", "num_passes": 24}
    whole = track(model, x, states, names, **options)
    for count in (1, 3):
        options["generator"] = seeded()
        resumed = track(model, x, states[:count], names, path=path, **options)
    columns_equal(resumed, whole)


def test_a_row_that_fails_leaves_the_others(setting, tmp_path):
    model, x, states = setting
    path = tmp_path / "run"
    broken = {name: value * float("nan") for name, value in states[2].items()}
    with pytest.raises(NonFiniteError, match="0.weight"):
        track(model, x, [*states[:2], broken], ["trace", "alignment"], path=path)
    with ntkops.count_passes() as tally:
        kept = track(model, x, states[:2], ["trace", "alignment"], path=path)
    assert tally.total == 0 and kept.steps == (0, 1)
    assert len(track(model, x, states, ["trace", "alignment"], path=path)) == 4


# -- bad input


def test_bad_options_are_refused_before_any_work(setting):
    model, x, states = setting
    for options, error, message in (
        ({"quantities": "tracé"}, InputError, "did you mean 'trace'"),
        ({"quantities": []}, InputError, "no quantity"),
        ({"quantities": ["trace", "trace"]}, InputError, "two quantities"),
        ({"quantities": [3]}, InputError, "int"),
        ({"quantities": "target_alignment"}, InputError, "needs targets="),
        ({"targets": TARGETS}, InputError, "not asked for"),
        ({"quantities": "target_alignment", "targets": TARGETS.long()}, DtypeError, "one_hot"),
        ({"quantities": "target_alignment", "targets": TARGETS * 0}, InputError, "all zero"),
        ({"quantities": "target_alignment", "targets": TARGETS * torch.nan}, NonFiniteError, "NaN"),
        ({"quantities": "target_alignment", "targets": TARGETS[:3]}, ShapeError, "do not fit"),
        ({"num_eigenvalues": 0}, InputError, "num_eigenvalues"),
        ({"steps": [0, 0, 1, 2]}, InputError, "twice"),
        ({"steps": [0, 1]}, InputError, "4 checkpoints, but 2 steps"),
        ({"checkpoints": states[0]}, InputError, "one state dict"),
        ({"checkpoints": "run.pt"}, InputError, "pass a list"),
        ({"checkpoints": [3]}, InputError, "a checkpoint is a int"),
        ({"checkpoints": None, "steps": [1]}, InputError, "record"),
        ({"generator": 3}, InputError, "generator=3"),
        ({"rtol": 2.0}, InputError, "rtol"),
    ):
        with pytest.raises(error, match=message):
            track(**{"model": model, "x": x, "checkpoints": states, **options})


def test_checkpoints_that_do_not_fit_are_refused(setting):
    model, x, states = setting
    good = states[0]
    for change, error, message in (
        ({"0.weihgt": torch.ones(1)}, UnknownParameterError, "did you mean '0.weight'"),
        ({"0.bias": torch.ones(1).double()}, ParameterShapeError, "expected shape"),
        ({"0.bias": good["0.bias"].float()}, DtypeError, "float32"),
    ):
        with pytest.raises(error, match=message):
            track(model, x, [{**good, **change}], "trace")
    with pytest.raises(InputError, match="no value for '0.bias'"):
        track(model, x, [{name: value for name, value in good.items() if name != "0.bias"}], "trace")
    tracker = track(model, x, quantities="trace")
    tracker.record(0)
    for step in (0, float("nan"), "1", True):
        with pytest.raises(InputError):
            tracker.record(step)
    with pytest.raises(InputError, match="no row has step 7"):
        tracker.rewind(7)


# -- the table


def history() -> History:
    table = History.empty(["a", "b"], seed=1)
    for step in range(3):
        a = Estimate.of_exact(torch.tensor(1.0 + step), passes=2)
        b = Estimate(
            value=torch.tensor([step, 2.0]).double(),
            stderr=torch.tensor([0.5, 0.0]).double(),
            interval=(torch.tensor([step - 1.0, 2.0]), torch.tensor([step + 1.0, 2.0])),
            method="m",
            exact=False,
            passes=3,
            converged=step < 2,
        )
        table = table.appended(10 * step, {"a": a, "b": b})
    return table


def test_the_table(tmp_path):
    table = history()
    assert len(table) == 3 and table["b"].shape == (3, 2) and repr(table).startswith("History(3 rows")
    assert table.to_dict()["quantities"]["a"]["values"] == [1.0, 2.0, 3.0]
    assert table.converged["b"].tolist() == [True, True, False] and table.passes["b"].tolist() == [3] * 3
    text = table.to_csv(tmp_path / "table.csv")
    assert (tmp_path / "table.csv").read_text() == text
    rows = list(csv.DictReader(text.splitlines()))
    assert [float(row["b[0]"]) for row in rows] == [0.0, 1.0, 2.0]
    assert [row["step"] for row in rows] == ["0", "10", "20"] and float(rows[0]["b[0]_stderr"]) == 0.5
    assert (float(rows[2]["b[0]_low"]), float(rows[2]["b[0]_high"])) == (1.0, 3.0)
    assert str(table).splitlines()[1].split() == ["0", "1", "0.0", "(-1.0", "to", "1.0)", "2"]
    assert str(History.empty(["a"])) == "step"
    for name in ("c", "a"):
        with pytest.raises(InputError):
            History.empty(["a"])[name]


def test_the_plot_has_a_panel_for_each_quantity():
    from matplotlib.figure import Figure

    from ntkops.plotting import plot_history

    table = history()
    figure = Figure()
    panels = plot_history(table, figure.subplots(1, 2))
    assert [ax.get_ylabel() for ax in panels][1] == "b"
    assert [c.lines[0].get_ydata().tolist() for c in panels[0].containers] == [[1.0, 2.0, 3.0]]
    first, second = panels[1].containers
    assert first.lines[0].get_xdata().tolist() == [0.0, 10.0, 20.0]
    (segments,) = first.lines[2]
    assert segments.get_segments()[1].tolist() == [[10.0, 0.0], [10.0, 2.0]]  # the interval
    assert first.lines[0].get_color() != second.lines[0].get_color()
    plot_history(table, panels[0], quantities=["a"], label="again")
    colours = [c.lines[0].get_color() for c in panels[0].containers]
    assert colours[0] != colours[1]
    assert [text.get_text() for text in panels[0].get_legend().get_texts()] == ["again"]
    undefined = Estimate.of_exact(torch.tensor(float("nan")), passes=0)
    gap = History.empty(["x"]).appended(0, {"x": undefined}).appended(1, {"x": undefined * 0.0})
    assert plot_history(gap, Figure().subplots())[0].containers[0].lines[0].get_xdata().size == 0
    for given, axes in ((table, panels[:1]), (History.empty(["a"]), None)):
        with pytest.raises(ShapeError):
            plot_history(given, axes)
