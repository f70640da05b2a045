"""A linearisation is a value: copies, references that are watched, casts, pickles."""

import copy
import pickle
import weakref

import pytest
import torch
from torch import nn

from ntkops.errors import DtypeError, StaleOperatorError
from ntkops.model import linearize
from tests.model.zoo import BY_NAME, ZOO, LowRank, untouched


def _state(lin, x):
    ((_, _, batch),) = lin.inputs(x).batches(None)
    with lin.safe_context():
        return lin.function(lin.parameters, batch).detach()


@pytest.mark.parametrize("params", [None, "0.*"])
def test_training_the_model_afterwards_changes_nothing(params):
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)).eval().double()
    x = torch.randn(6, 3, dtype=torch.float64)
    lin = linearize(model, params=params)
    before = _state(lin, x)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    model.train()
    model(x).square().sum().backward()
    optimizer.step()
    model.eval()
    assert not torch.allclose(model(x), before)
    lin.check_fresh()
    assert torch.equal(_state(lin, x), before)


def test_frozen_parameters_are_held_by_reference_and_watched():
    model, x = LowRank(), torch.randn(4, 3)
    lin = linearize(model)
    held = dict(zip(lin.frozen_names, lin.constants, strict=False))
    assert held["base.weight"].data_ptr() == model.base.weight.data_ptr()
    _state(lin, x)
    with torch.no_grad():
        model.lora_a.mul_(2)
    lin.check_fresh()  # selected: copied
    with torch.no_grad():
        model.base.bias.add_(1)
    with pytest.raises(
        StaleOperatorError, match=r"parameters held by reference.*: parameter 'base\.bias'; build"
    ):
        lin.check_fresh()


def test_unselected_parameters_are_copied_if_any_requires_grad():
    model = LowRank()
    lin = linearize(model, params="lora_a")  # lora_b requires grad
    held = dict(zip(lin.frozen_names, lin.constants, strict=False))
    assert held["base.weight"].data_ptr() != model.base.weight.data_ptr()
    with torch.no_grad():
        model.base.bias.add_(1)
        model.lora_b.add_(1)
    lin.check_fresh()


def test_new_data_behind_a_frozen_parameter_does_not_reach_the_snapshot():
    model, x = LowRank(), torch.randn(4, 3)
    lin = linearize(model)
    before = _state(lin, x)
    model.base.weight.data = torch.zeros(2, 3)
    model.base = nn.Linear(3, 2)
    assert torch.equal(_state(lin, x), before)


def test_buffers_are_copied():
    model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)).eval()
    x = torch.randn(4, 3)
    lin = linearize(model)
    before = _state(lin, x)
    model[1].running_mean.fill_(9.0)
    lin.check_fresh()
    assert torch.equal(_state(lin, x), before)


def test_parameters_made_in_inference_mode_are_copied():
    with torch.inference_mode():
        model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2))
    model.requires_grad_(False)
    lin = linearize(model, params="1.*")
    assert not any(t.is_inference() for t in (*lin.parameters, *lin.constants))
    lin.check_fresh()
    assert torch.equal(_state(lin, torch.ones(4, 3)), model(torch.ones(4, 3)))


def test_the_snapshot_does_not_keep_the_model_alive():
    model = nn.Linear(3, 2)
    lin = linearize(model)
    module, weight = weakref.ref(model), weakref.ref(model.weight)
    del model
    assert module() is None and weight() is None
    _state(lin, torch.randn(4, 3))


def test_live_parameters_keep_their_identity_and_graph():
    model = nn.Linear(3, 2).double()
    x = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    with untouched(model, x):
        lin = linearize(model, differentiable=True)
        assert lin.parameters[0] is model.weight and lin.parameters[1] is model.bias
        ((_, _, batch),) = lin.inputs(x).batches(None)
        state = lin.function(lin.parameters, batch)
        first = torch.autograd.grad(state.square().sum(), (model.weight, x))
    torch.testing.assert_close(first, torch.autograd.grad(model(x).square().sum(), (model.weight, x)))
    with torch.no_grad():
        model.weight.mul_(2)
    lin.check_fresh()
    torch.testing.assert_close(lin.function(lin.parameters, batch), model(x))


def test_live_values_with_a_graph():
    model = nn.Linear(3, 2).double()
    scale = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    lin = linearize(model, params={"weight": model.weight.detach() * scale}, differentiable=True)
    ((_, _, batch),) = lin.inputs(torch.ones(4, 3).double()).batches(None)
    (gradient,) = torch.autograd.grad(lin.function(lin.parameters, batch).sum(), scale)
    torch.testing.assert_close(gradient, 4 * model.weight.detach().sum())


@pytest.mark.parametrize("specimen", [s for s in ZOO if s.name != "compiled"], ids=lambda s: s.name)
def test_casts_agree_with_the_cast_model(specimen):
    model, x = specimen.make(torch.float64), specimen.inputs(5, torch.float32)
    with untouched(model):
        lin = linearize(model, output=specimen.output).to(torch.float32)
    assert lin.dtype == torch.float32
    torch.testing.assert_close(
        _state(lin, x), specimen.reference(specimen.make(torch.float32), x).detach(), rtol=1e-4, atol=1e-5
    )
    back = lin.to(dtype=torch.float64, device="cpu")
    assert back.dtype == torch.float64
    _state(back, specimen.inputs(5, torch.float64))


def test_casts_keep_integers_and_cast_buffers():
    model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)).eval()
    lin = linearize(model).to(torch.float64)
    dtypes = {name: tensor.dtype for name, tensor in lin.buffers.items()}
    assert dtypes["1.num_batches_tracked"] == torch.int64 and dtypes["1.running_mean"] == torch.float64
    assert lin.to(torch.float64) is lin
    with pytest.raises(DtypeError, match="pass a floating dtype"):
        lin.to(torch.int32)


def test_casts_keep_watching_what_they_still_hold():
    model = LowRank()
    model.register_parameter("flags", nn.Parameter(torch.tensor([1, 0]), requires_grad=False))
    lin = linearize(model).to(torch.float64)
    with torch.no_grad():
        model.base.bias.add_(1)
    lin.check_fresh()  # copied by the cast
    model.flags.add_(1)
    with pytest.raises(StaleOperatorError, match="'flags'"):
        lin.check_fresh()


def test_casts_of_live_parameters_keep_the_graph():
    model = nn.Linear(3, 2)
    lin = linearize(model, differentiable=True).to(torch.float64)
    ((_, _, batch),) = lin.inputs(torch.ones(4, 3).double()).batches(None)
    (gradient,) = torch.autograd.grad(lin.function(lin.parameters, batch).sum(), model.bias)
    assert torch.equal(gradient, torch.full((2,), 4.0))


@pytest.mark.parametrize("specimen", ZOO, ids=lambda s: s.name)
def test_pickles_give_the_same_numbers(specimen):
    model, x = specimen.make(), specimen.inputs()
    lin = linearize(model, output=specimen.output)
    before = _state(lin, x)
    loaded = pickle.loads(pickle.dumps(lin))
    assert (loaded.names, loaded.shapes, loaded.dtype) == (lin.names, lin.shapes, lin.dtype)
    assert torch.equal(_state(loaded, x), before)
    loaded.check_fresh()


def test_pickles_watch_their_own_copies():
    loaded = pickle.loads(pickle.dumps(linearize(LowRank())))
    loaded.check_fresh()
    loaded.constants[0].add_(1)
    with pytest.raises(StaleOperatorError, match=r"base\.weight"):
        loaded.check_fresh()


def test_pickled_functions_by_name():
    lin = pickle.loads(pickle.dumps(linearize(_product, params={"w": torch.ones(3, 2)})))
    assert _state(lin, torch.ones(4, 3)).tolist() == [[3.0, 3.0]] * 4


def _product(params, x):
    return x @ params["w"]


def test_deep_copies_are_the_value_itself():
    lin = linearize(nn.Linear(3, 2))
    inputs = lin.inputs(torch.randn(4, 3))
    assert copy.deepcopy({"a": [lin, inputs]})["a"] == [lin, inputs]


def test_representations_say_what_is_there():
    lin = linearize(nn.Linear(3, 2))
    assert repr(lin) == "Linearization(2 parameter tensors, P=8, float32, cpu)"
    assert repr(lin.inputs(torch.randn(4, 3))) == "Inputs(num_samples=4, output_shape=(2,), memory)"
    assert repr(lin.inputs([torch.randn(4, 3)])) == "Inputs(num_samples=4, output_shape=(2,), stream)"


def test_the_wrong_number_of_parameters():
    lin = linearize(nn.Linear(3, 2))
    ((_, _, batch),) = lin.inputs(torch.randn(4, 3)).batches(None)
    with pytest.raises(ValueError, match="1 parameter tensors given, 2 are selected"):
        lin.function(lin.parameters[:1], batch)


def test_models_that_differentiate_inside_work_without_gradient_mode():
    specimen = BY_NAME["residual"]
    model, x = specimen.make(), specimen.inputs()
    wanted = specimen.reference(model, x).detach()
    with untouched(model, x), torch.no_grad():
        lin = linearize(model)
        assert torch.equal(_state(lin, x), wanted)
