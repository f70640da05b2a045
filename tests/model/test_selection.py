"""Which parameters are selected, and what a wrong selection says."""

import copy

import pytest
import torch
from torch import nn

import ntkops
from ntkops.errors import (
    DeviceError,
    DtypeError,
    ParameterSelectionError,
    ParameterShapeError,
    UnknownParameterError,
)
from ntkops.model import linearize
from ntkops.model.selection import select_parameters
from tests.model.zoo import LowRank, TiedAutoencoder, untouched


def _model():
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))


ALL = ("0.weight", "0.bias", "2.weight", "2.bias")


@pytest.mark.parametrize(
    ("selector", "names"),
    [
        (None, ALL),
        ("*", ALL),
        ("2.weight", ("2.weight",)),
        ("*.bias", ("0.bias", "2.bias")),
        (["2.bias", "0.*"], ("0.weight", "0.bias", "2.bias")),
        (("2.bias", "2.bias"), ("2.bias",)),
        ({"2.bias"}, ("2.bias",)),
        (lambda name, parameter: parameter.dim() == 2, ("0.weight", "2.weight")),
        ("[02].weight", ("0.weight", "2.weight")),
    ],
)
def test_selectors(selector, names):
    model = _model()
    with untouched(model):
        lin = linearize(model, params=selector)
    assert lin.names == names
    assert lin.shapes == tuple(model.get_parameter(name).shape for name in names)
    assert lin.num_parameters == sum(lin.sizes) == sum(model.get_parameter(n).numel() for n in names)
    for name, value in zip(names, lin.parameters, strict=True):
        assert torch.equal(value, model.get_parameter(name)) and not value.requires_grad


def test_none_selects_what_requires_grad_and_names_select_frozen_ones_too():
    model = LowRank()
    assert linearize(model).names == ("lora_a", "lora_b")
    assert linearize(model, params="*lora*").names == ("lora_a", "lora_b")
    assert linearize(model, params=["base.bias", "lora_b"]).names == ("lora_b", "base.bias")


def test_modules_select_all_of_their_parameters():
    model = nn.Sequential(_model(), nn.Linear(2, 2)).requires_grad_(False)
    model.extra = nn.ModuleList([model[1]])  # reached by two paths
    assert linearize(model, params=model[1]).names == ("1.weight", "1.bias")
    assert linearize(model, params=model.extra).names == ("1.weight", "1.bias")
    assert linearize(model, params=[model[1], "0.0.bias", model[0][2]]).names == (
        "0.0.bias",
        "0.2.weight",
        "0.2.bias",
        "1.weight",
        "1.bias",
    )
    assert linearize(model, params=model).names == linearize(model, params="*").names
    tied = TiedAutoencoder()
    assert linearize(tied, params=tied.decoder).names[0] == "encoder.weight"


def test_a_kernel_of_a_module_is_that_of_its_parameters():
    model, x = _model().double(), torch.randn(4, 3, dtype=torch.float64)
    by_name = ntkops.ntk(model, x, params="2.*").to_dense()
    assert torch.equal(ntkops.ntk(model, x, params=model[2]).to_dense(), by_name)


@pytest.mark.parametrize("several", [False, True])
def test_a_module_that_is_no_part_of_the_model_is_refused(several):
    model = _model()
    other = copy.deepcopy(model[2])
    with pytest.raises(UnknownParameterError, match="Linear that is no part of the model"):
        linearize(model, params=[model[0], other] if several else other)
    with pytest.raises(ParameterSelectionError, match="Tanh, which has no parameters"):
        linearize(model, params=[model[0], model[1]] if several else model[1])


def test_aliases_of_tied_weights_select_one_parameter():
    model = TiedAutoencoder()
    for selector in ("decoder.weight", "encoder.weight", "*.weight", ["decoder.weight", "encoder.weight"]):
        assert linearize(model, params=selector).names == ("encoder.weight",)
    value = torch.zeros(3, 3)
    assert torch.equal(linearize(model, params={"decoder.weight": value}).parameters[0], value)
    both = {"decoder.weight": value, "encoder.weight": value}
    assert linearize(model, params=both).names == ("encoder.weight",)


def test_two_values_for_one_tied_parameter_are_refused():
    values = {"encoder.weight": torch.zeros(3, 3), "decoder.weight": torch.ones(3, 3)}
    with pytest.raises(ParameterSelectionError, match="'decoder.weight' is another name of 'encoder.weight'"):
        linearize(TiedAutoencoder(), params=values)


def test_values_are_those_at_which_the_model_is_linearised():
    model, x = _model().double(), torch.randn(4, 3, dtype=torch.float64)
    value = torch.randn(2, 4, dtype=torch.float64)
    lin = linearize(model, params={"2.weight": value})
    ((_, _, batch),) = lin.inputs(x).batches(None)
    hidden = torch.tanh(model[0](x))
    torch.testing.assert_close(
        lin.function(lin.parameters, batch), (hidden @ value.T + model[2].bias).detach()
    )
    value.zero_()
    assert bool(lin.parameters[0].any())  # a copy


@pytest.mark.parametrize(
    ("selector", "error", "message"),
    [
        ("2.wieght", UnknownParameterError, r"unknown parameter '2\.wieght'; did you mean '2\.weight'"),
        ("*.gamma", UnknownParameterError, r"no parameter matches pattern '\*\.gamma'; did you mean"),
        (["2.weight", "zzz"], UnknownParameterError, "'zzz'"),
        ("2", UnknownParameterError, r"it is a module; for all of its 2 parameters pass '2\.\*'"),
        ([], ParameterSelectionError, "no parameter is selected: params= names none of 4"),
        (lambda n, p: False, ParameterSelectionError, "the predicate is true for none of 4"),
        (3, ParameterSelectionError, "params= is a int"),
        (torch.zeros(3), ParameterSelectionError, "params= is a Tensor"),
        ([3], ParameterSelectionError, "holds a int where a name is due"),
        ({}, ParameterSelectionError, "no parameter is selected"),
        ({"nope": torch.zeros(2)}, UnknownParameterError, "unknown parameter 'nope'"),
        ({"2.bias": [0.0, 0.0]}, ParameterSelectionError, r"params\['2\.bias'\] is a list, not a tensor"),
        (
            {"2.bias": torch.zeros(1)},
            ParameterShapeError,
            r"'2\.bias'\]: expected shape \(2,\), got \(1,\)",
        ),
        (
            {"2.bias": torch.zeros(2).double()},
            DtypeError,
            "torch.float64, the model's parameter torch.float32",
        ),
        (
            {"2.bias": torch.zeros(2, device="meta")},
            DeviceError,
            "lives on meta, the model's parameter on cpu",
        ),
    ],
)
def test_wrong_selections_say_what_and_what_to_do(selector, error, message):
    model = _model()
    with untouched(model), pytest.raises(error, match=message):
        linearize(model, params=selector)


def test_unknown_names_are_key_errors_with_a_readable_message():
    with pytest.raises(KeyError) as caught:
        linearize(_model(), params="0.wight")
    assert str(caught.value).startswith("unknown parameter '0.wight'")


def test_all_frozen_is_refused_with_the_way_out():
    model = _model().requires_grad_(False)
    with pytest.raises(ParameterSelectionError, match=r"none of the 4 requires grad.*params='\*'"):
        linearize(model)
    assert linearize(model, params="*").names == ALL


def test_a_model_without_parameters_is_refused():
    with pytest.raises(ParameterSelectionError, match="has no parameters"):
        linearize(nn.ReLU())
    with pytest.raises(UnknownParameterError, match="the model has no parameters"):
        linearize(nn.ReLU(), params="weight")


def test_the_order_is_that_of_the_model_whatever_the_selector_says():
    named = {name: torch.zeros(1, requires_grad=True) for name in "cab"}
    assert list(select_parameters(named, ["b", "c", "a"])) == ["c", "a", "b"]
    assert list(select_parameters(named, {"b": torch.ones(1), "c": torch.ones(1)})) == ["c", "b"]
