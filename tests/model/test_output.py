"""Output selectors, and what the selected state must be."""

from collections import OrderedDict, namedtuple
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

from ntkops.errors import InputError, NtkopsWarning, OutputError, UnsupportedModelError
from ntkops.model import linearize
from tests.model.zoo import BY_NAME, DictModel, untouched

X = torch.randn(5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


class Twice(nn.Module):
    """A block called twice, a recurrent layer with a tuple, and a layer that is overwritten in place."""

    def __init__(self) -> None:
        super().__init__()
        self.block = nn.Linear(3, 3)
        self.activation = nn.Sequential(nn.Linear(3, 3), nn.ReLU(inplace=True))
        self.rnn = nn.GRU(3, 2, batch_first=True)
        self.unused = nn.Linear(3, 3)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.activation(self.block(torch.tanh(self.block(x))))
        return self.rnn(hidden[:, None].expand(-1, 4, -1))[1][0]


class Returns(nn.Module):
    """Returns what a function makes of a linear layer's output."""

    def __init__(self, make) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 2)
        self.make = make
        self.double()

    def forward(self, x: Tensor):
        return self.make(self.layer(x))


def _state(model, output, x=X, **options):
    with untouched(model, x):
        lin = linearize(model, output=output, **options)
        inputs = lin.inputs(x)
        ((_, _, batch),) = inputs.batches(None)
        state = lin.function(lin.parameters, batch)
    return state.reshape(inputs.num_samples, *inputs.output_shape)


Pair = namedtuple("Pair", ["first", "second"])


@dataclass
class Record:
    first: Tensor
    second: Tensor


STRUCTURES = {
    "tuple": lambda y: (y, 2 * y),
    "list": lambda y: [y, 2 * y],
    "dict": lambda y: {"first": y, "second": 2 * y},
    "ordered": lambda y: OrderedDict(first=y, second=2 * y),
    "named": lambda y: Pair(y, 2 * y),
    "record": lambda y: Record(y, 2 * y),
}


@pytest.mark.parametrize("kind", STRUCTURES)
def test_keys_and_positions(kind):
    model = Returns(STRUCTURES[kind])
    wanted = 2 * model.layer(X).detach()
    if kind not in ("tuple", "list"):
        torch.testing.assert_close(_state(model, "second"), wanted)
    if kind != "record":
        torch.testing.assert_close(_state(model, 1), wanted)
        torch.testing.assert_close(_state(model, -1), wanted)


@pytest.mark.parametrize("kind", STRUCTURES)
def test_structured_outputs_ask_for_a_selection_and_list_the_choice(kind):
    model = Returns(STRUCTURES[kind])
    first = "0" if kind in ("tuple", "list") else "'first'"
    shape = r"tensor of shape \(4, 2\)"
    with untouched(model, X), pytest.raises(OutputError, match=rf"{first} \({shape}\).*pass output={first}"):
        linearize(model).inputs(X)


def test_a_callable_takes_the_raw_output():
    model = Returns(lambda y: {"a": y})
    torch.testing.assert_close(_state(model, lambda raw: raw["a"].square()), model.layer(X).square().detach())


def test_module_paths_are_captured():
    model = Twice()
    first = model.block(X).detach()
    second = model.block(torch.tanh(first)).detach()
    torch.testing.assert_close(_state(model, "block@0"), first)
    torch.testing.assert_close(_state(model, "block@1"), second)
    steps = model.rnn(model.activation(second)[:, None].expand(-1, 4, -1))[0].detach()
    torch.testing.assert_close(_state(model, "rnn[0]"), steps)
    torch.testing.assert_close(_state(model, "rnn@0[0]"), steps)
    assert _state(model, "rnn[0]").shape == (5, 4, 2)


def test_a_captured_output_is_not_overwritten_by_an_inplace_layer_after_it():
    model = Twice()
    raw = model.activation[0](model.block(torch.tanh(model.block(X)))).detach()
    assert bool((raw < 0).any())
    torch.testing.assert_close(_state(model, "activation.0"), raw)


def test_a_captured_state_is_differentiated():
    model = Twice()
    lin = linearize(model, params="block.*", output="block@1")
    ((_, _, batch),) = lin.inputs(X).batches(None)
    function = lambda w, b: lin.function((w, b), batch)  # noqa: E731
    direct = lambda w, b: nn.functional.linear(torch.tanh(nn.functional.linear(X, w, b)), w, b)  # noqa: E731
    for transform in (torch.func.jacrev, torch.func.jacfwd):
        torch.testing.assert_close(transform(function)(*lin.parameters), transform(direct)(*lin.parameters))


def test_captured_entries_of_a_dict():
    model = nn.Sequential(Returns(lambda y: {"a": y, "b": 2 * y}), Returns(lambda y: y))
    model[1].forward = lambda raw: raw["a"] + raw["b"]
    wanted = 2 * model[0].layer(X).detach()
    with pytest.raises(OutputError, match=r"select one, as in output='0\[a\]'"):
        linearize(model, params="0.*", output="0").inputs(X)
    torch.testing.assert_close(_state(model, "0[b]", params="0.*"), wanted)


def test_hooks_of_the_capture_are_gone_after_the_call():
    model = Twice()
    lin = linearize(model, output="block@1")
    lin.inputs(X)
    assert not any(m._forward_hooks for m in lin.call.root.modules())
    with pytest.raises(OutputError):
        linearize(model, output="block").inputs(X)
    assert not any(m._forward_hooks for m in model.modules())


def test_a_key_wins_over_a_module_of_the_same_name():
    specimen = BY_NAME["dict"]
    model, x = DictModel().double(), specimen.inputs()
    model.logits = nn.Linear(3, 2)
    wanted = model(**x)["logits"].detach()
    torch.testing.assert_close(_state(model, "logits", x, params="head.*"), wanted)


@pytest.mark.parametrize(
    ("make", "output", "message"),
    [
        (STRUCTURES["dict"], "secnd", "neither a key .*nor the path of a module; did you mean 'second'"),
        (STRUCTURES["dict"], "laier", "did you mean 'layer'"),
        (STRUCTURES["dict"], 5, r"returned a dict without 5; it has 'first'"),
        (STRUCTURES["tuple"], 2, "returned a tuple without 2; it has 0 "),
        (lambda y: y, 0, "returned a tensor of shape .*, which has no part 0.*outputs= the columns"),
        (lambda y: y, "logits", "returned a tensor of shape"),
        (lambda y: None, None, "returned a NoneType, not a tensor; pass output= a callable"),
        (lambda y: {"a": "text"}, "a", "is a str, not a tensor"),
        (lambda y: y.argmax(1), None, "dtype torch.int64, through which no derivative flows"),
        (lambda y: y > 0, None, "dtype torch.bool"),
        (lambda y: torch.complex(y, y), None, "complex outputs.*view_as_real"),
        (lambda y: y.to_sparse(), None, "sparse_coo tensor; return a dense one"),
        (lambda y: y.sum(), None, r"shape \(\) has no sample axis of 4 at dimension 0.*reduction='none'"),
        (lambda y: y.sum(0), None, r"shape \(2,\) has no sample axis of 4"),
        (lambda y: y.flatten(), None, r"shape \(8,\) has no sample axis of 4"),
    ],
)
def test_wrong_outputs_say_what_they_are(make, output, message):
    model = Returns(make)
    with untouched(model, X), pytest.raises(OutputError, match=message):
        linearize(model, output=output).inputs(X)


@pytest.mark.parametrize(
    ("output", "message"),
    [
        ("block", r"called 2 times; say which call, from 'block@0' to 'block@1'"),
        ("block@2", r"asks for call 2 of module 'block', which was called 2 time"),
        ("unused", "module 'unused' was not called"),
        ("rnn", r"returned a tuple with 0 .*as in output='rnn\[0\]'"),
        ("rnn[7]", "module 'rnn' returned a tuple without 7"),
        ("blok", "did you mean 'block'"),
        ("blok@1", "neither a key"),
    ],
)
def test_wrong_paths_say_why(output, message):
    model = Twice()
    with untouched(model, X), pytest.raises(OutputError, match=message):
        linearize(model, output=output).inputs(X)


@pytest.mark.parametrize("output", [True, 1.5, ["a"]])
def test_selectors_of_unknown_kind_are_refused_at_once(output):
    with pytest.raises(InputError, match="pass a string, or an integer, or a function, or None"):
        linearize(nn.Linear(3, 2), output=output)


def test_an_output_callable_that_uses_the_original_model_is_refused():
    model = nn.ModuleDict({"body": nn.Linear(3, 3), "head": nn.Linear(3, 2)}).double()
    model.forward = None
    wrapped = nn.Sequential(model["body"], nn.Tanh())
    wrapped.head = model["head"]
    wrapped.forward = lambda x: wrapped[1](wrapped[0](x))  # a closure over the original
    with (
        untouched(wrapped, X),
        pytest.raises(UnsupportedModelError, match="parameter '0.weight' of the original"),
    ):
        linearize(wrapped).inputs(X)

    class Body(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = nn.Linear(3, 3), nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.body(x)

    for frozen in (False, True):
        for differentiable in (False, True):
            whole = Body().double()
            whole.head.requires_grad_(not frozen)
            lin = linearize(
                whole, params="*", output=lambda raw, m=whole: m.head(raw), differentiable=differentiable
            )
            with (
                untouched(whole, X),
                pytest.raises(UnsupportedModelError, match="'head.weight'.*output='head'"),
            ):
                lin.inputs(X)


def test_a_hook_that_uses_the_original_model_is_refused():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2)).double()
    model[0].register_forward_hook(lambda module, args, output: output @ model[0].weight)
    with untouched(model, X), pytest.raises(UnsupportedModelError, match=r"'0\.weight'"):
        linearize(model).inputs(X)


def test_a_use_of_the_original_model_that_shows_in_the_graph_only():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2)).double()

    def hook(module, args, output):
        return output + (0 * model[0].weight.sum() if torch.is_grad_enabled() else 0)

    model[1].register_forward_hook(hook)
    with untouched(model, X), pytest.raises(UnsupportedModelError, match=r"'0\.weight' of the original"):
        linearize(model).inputs(X)


def test_a_function_that_ignores_its_parameters_is_refused():
    model = nn.Linear(3, 2).double()
    lin = linearize(lambda params, x: model(x), params=dict(model.named_parameters()))
    with untouched(model, X), pytest.raises(UnsupportedModelError, match="'weight' of the original model"):
        lin.inputs(X)


@pytest.mark.parametrize("make", [lambda y: y.detach(), lambda y: torch.ones(len(y), 2).double()])
def test_an_output_that_does_not_depend_on_the_parameters_warns(make):
    with pytest.warns(NtkopsWarning, match=r"does not depend on the selected parameters \(layer.weight"):
        linearize(Returns(make)).inputs(X)


def test_scalar_outputs_per_sample():
    model = Returns(lambda y: y.square().sum(1))
    lin = linearize(model)
    inputs = lin.inputs(X)
    assert inputs.output_shape == () and inputs.num_outputs == 1
    ((_, _, batch),) = inputs.batches(None)
    torch.testing.assert_close(lin.function(lin.parameters, batch), model(X).detach()[:, None])


def test_the_state_has_the_dtype_of_the_parameters():
    model = nn.Linear(3, 2)
    lin = linearize(lambda p, x: (x @ p["w"]).double(), params={"w": model.weight.detach().T})
    ((_, _, batch),) = lin.inputs(X.float()).batches(None)
    assert lin.function(lin.parameters, batch).dtype == torch.float32
