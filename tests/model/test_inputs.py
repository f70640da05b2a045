"""Inputs in memory: what is accepted, how it is cut, and what bad data say."""

import pickle
from collections import UserDict, namedtuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_sequence

from ntkops.errors import DeviceError, DtypeError, InputError, NonFiniteError, ShapeError, StaleOperatorError
from ntkops.model import linearize
from tests.model.zoo import BY_NAME, untouched


class Sum(nn.Module):
    """Adds what it is given, so that any nesting can be tried."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 2)
        self.double()

    def forward(self, *args, scale=1.0, **kwargs) -> Tensor:
        leaves = torch.utils._pytree.tree_leaves((args, kwargs))
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.dim() > 0]
        return self.layer(sum(tensors)) * scale


def _rows(count: int = 5, seed: int = 0, **options) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 3, dtype=torch.float64, generator=generator, **options)


Nested = namedtuple("Nested", ["x", "y"])
NESTINGS = {
    "tensor": lambda: _rows(),
    "tuple": lambda: (_rows(), _rows(seed=1)),
    "named tuple": lambda: Nested(_rows(), _rows(seed=1)),
    "dict": lambda: {"x": _rows(), "scale": 2.0},
    "user dict": lambda: UserDict(x=_rows(), nested=UserDict(y=_rows(seed=1))),
    "nested": lambda: ({"a": _rows(), "b": [_rows(seed=1), None]}, "text", 3),
    "scalar tensor": lambda: {"x": _rows(), "scale": torch.tensor(3.0)},
}


def _call(model, x):
    if isinstance(x, UserDict):
        x = {key: dict(value) if isinstance(value, UserDict) else value for key, value in x.items()}
    return (model(**x) if isinstance(x, dict) else model(*x) if isinstance(x, tuple) else model(x)).detach()


@pytest.mark.parametrize("kind", NESTINGS)
@pytest.mark.parametrize("size", [None, 1, 2, 5, 9])
def test_nestings_are_passed_on_as_they_are_and_cut_in_batches(kind, size):
    model, x = Sum(), NESTINGS[kind]()
    wanted = _call(model, x)
    with untouched(model, x):
        lin = linearize(model)
        inputs = lin.inputs(x)
        pieces = [(a, b, lin.function(lin.parameters, batch)) for a, b, batch in inputs.batches(size)]
    assert (inputs.num_samples, inputs.num_outputs, inputs.output_shape) == (5, 2, torch.Size([2]))
    step = size or 5
    assert [(a, b) for a, b, _ in pieces] == [(a, min(a + step, 5)) for a in range(0, 5, step)]
    torch.testing.assert_close(torch.cat([piece for *_, piece in pieces]), wanted)


@pytest.mark.parametrize("kind", NESTINGS)
def test_selections_and_selections_of_selections(kind):
    model, x = Sum(), NESTINGS[kind]()
    wanted = _call(model, x)
    lin = linearize(model)
    inputs = lin.inputs(x)

    def states(view, size):
        return torch.cat([lin.function(lin.parameters, batch) for _, _, batch in view.batches(size)])

    for index in ([4, 0, 0, 2], [1, 2, 3], [0], [0, 1, 2, 3, 4], [3, 2]):
        view = inputs.select(torch.tensor(index))
        assert view.num_samples == len(index)
        for size in (None, 1, 2):
            torch.testing.assert_close(states(view, size), wanted[index])
        for inner in ([0], list(range(len(index)))[::-1], list(range(len(index)))[1:]):
            if inner:
                torch.testing.assert_close(
                    states(view.select(torch.tensor(inner)), 2), wanted[[index[i] for i in inner]]
                )


def test_nothing_is_copied_for_ranges():
    x = _rows()
    inputs = linearize(Sum()).inputs(x)
    for view in (
        inputs,
        inputs.select(torch.arange(1, 4)),
        inputs.select(torch.arange(1, 4)).select(torch.tensor([1])),
    ):
        for _, _, batch in view.batches(2):
            assert batch.tensors[0].untyped_storage().data_ptr() == x.untyped_storage().data_ptr()


def test_inputs_of_inputs_are_themselves():
    lin = linearize(Sum())
    inputs = lin.inputs(_rows())
    assert lin.inputs(inputs) is inputs


def test_one_sample_works():
    lin = linearize(Sum())
    inputs = lin.inputs(_rows(1))
    assert inputs.num_samples == 1
    assert [batch.num_samples for _, _, batch in inputs.batches(None)] == [1]


def test_batches_can_be_rebuilt_around_other_tensors():
    lin = linearize(Sum())
    x = {"x": _rows(), "scale": 2.0}
    ((_, _, batch),) = lin.inputs(x).batches(None)
    assert batch.layout.axes == (0,) and len(batch.tensors) == 1
    other = batch.replace([t + 1 for t in batch.tensors])
    assert torch.equal(other.inputs["x"], x["x"] + 1) and other.inputs["scale"] == 2.0
    torch.testing.assert_close(
        lin.function(lin.parameters, other), _call(_copy_of(lin), {**x, "x": x["x"] + 1})
    )


def _copy_of(lin):
    model = Sum()
    model.load_state_dict(dict(zip(lin.names, lin.parameters, strict=True)))
    return model


def test_another_sample_axis():
    model = nn.GRU(3, 2).double()
    x = torch.randn(6, 4, 3, dtype=torch.float64)
    wanted = model(x)[0].detach()
    lin = linearize(model, output=0, batch_dim=1)
    inputs = lin.inputs(x)
    assert (inputs.num_samples, inputs.output_shape) == (4, (6, 2))
    states = torch.cat([lin.function(lin.parameters, batch) for _, _, batch in inputs.batches(3)])
    torch.testing.assert_close(states.reshape(4, 6, 2), wanted.movedim(1, 0))
    view = inputs.select(torch.tensor([2, 0]))
    ((_, _, batch),) = view.batches(None)
    torch.testing.assert_close(
        lin.function(lin.parameters, batch).reshape(2, 6, 2), wanted.movedim(1, 0)[[2, 0]]
    )


def test_per_sample_transform_over_the_batch():
    specimen = BY_NAME["dict"]
    model, x = specimen.make(), specimen.inputs()
    lin = linearize(model, output="logits")
    ((_, _, batch),) = lin.inputs(x).batches(None)

    def single(*tensors):
        return lin.function(lin.parameters, batch.replace([t.unsqueeze(0) for t in tensors]))[0]

    torch.testing.assert_close(torch.func.vmap(single)(*batch.tensors), specimen.reference(model, x).detach())


@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        (_rows(0), InputError, "input has no samples"),
        ((_rows(5), _rows(4)), InputError, r"input\[1\] has 4 samples and input\[0\] has 5"),
        ({"x": _rows(5), "y": _rows(3)}, InputError, r"input\['y'\] has 3 samples and input\['x'\] has 5"),
        (np.zeros((5, 3)), InputError, r"input is a NumPy array; pass torch.from_numpy"),
        ((_rows(), np.zeros((5, 3))), InputError, r"input\[1\] is a NumPy array"),
        ({}, InputError, "holds no tensor with a sample axis"),
        ((), InputError, "holds no tensor with a sample axis"),
        (torch.tensor(1.0), InputError, "holds no tensor with a sample axis"),
        (3, InputError, "the inputs are a int"),
        ("text", InputError, "the inputs are a str"),
        (None, InputError, "the inputs are a NoneType"),
        (_rows().to_sparse(), InputError, "sparse_coo tensor; pass a dense one"),
        (pack_sequence([_rows(3), _rows(2)]), InputError, "PackedSequence.*padded"),
        (
            ({"a": {1, 2}}, _rows(), [torch.nn.Linear(2, 2)]),
            InputError,
            r"input\[2\]\[0\] is a Linear that holds",
        ),
        (
            _rows().float(),
            DtypeError,
            r"input is float32, the model float64; cast with x.to\(torch.float64\)",
        ),
        (_rows().to("meta"), DeviceError, r"input lives on meta, the model on cpu"),
    ],
)
def test_bad_inputs_say_what_and_where(x, error, message):
    model = Sum()
    lin = linearize(model)
    with untouched(model), pytest.raises(error, match=message):
        lin.inputs(x)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_the_first_row_that_is_not_finite_is_named(value):
    x = torch.randn(40, 3, dtype=torch.float64)
    x[17, 2] = value
    x[30] = value
    with pytest.raises(NonFiniteError, match="input row 17 is not finite"):
        linearize(Sum()).inputs(x)
    with pytest.raises(NonFiniteError, match=r"input\['y'\] row 17"):
        linearize(Sum()).inputs({"x": torch.zeros(40, 3).double(), "y": x})


def test_rows_are_counted_along_the_sample_axis():
    x = torch.zeros(6, 4, 3, dtype=torch.float64)
    x[5, 2, 0] = float("nan")
    with pytest.raises(NonFiniteError, match="row 2 "):
        linearize(nn.GRU(3, 2).double(), output=0, batch_dim=1).inputs(x)


def test_leaves_without_the_sample_axis_are_refused():
    with pytest.raises(InputError, match=r"input\[1\] of shape \(4,\) has no axis 1"):
        linearize(Sum(), batch_dim=1).inputs((torch.zeros(6, 4, 3).double(), torch.zeros(4).double()))


@pytest.mark.parametrize("batch_dim", [-1, True, 1.0, (), {"x": -1}])
def test_batch_dim_is_an_axis(batch_dim):
    with pytest.raises(InputError, match="batch_dim="):
        linearize(Sum(), batch_dim=batch_dim)


def test_integers_have_no_dtype_to_agree_in():
    lin = linearize(BY_NAME["padded"].make())
    assert lin.inputs(torch.randint(0, 5, (3, 4))).num_samples == 3
    assert lin.inputs(torch.randint(0, 5, (3, 4), dtype=torch.int32)).num_samples == 3


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ([5], "sample index 5 is out of range for 5 samples"),
        ([0, -1], "sample index -1 is out of range"),
        ([], "sample index of shape"),
        ([[0]], "sample index of shape"),
        ([True], "torch.bool"),
    ],
)
def test_wrong_selections_of_samples(index, message):
    with pytest.raises(ShapeError, match=message):
        linearize(Sum()).inputs(_rows()).select(torch.tensor(index))


@pytest.mark.parametrize("size", [0, -3])
def test_wrong_batch_sizes(size):
    with pytest.raises(ShapeError, match="batch_size="):
        next(linearize(Sum()).inputs(_rows()).batches(size))


def test_a_change_in_place_is_noticed_and_named():
    x = {"x": _rows(), "y": _rows(seed=1)}
    inputs = linearize(Sum()).inputs(x)
    view = inputs.select(torch.tensor([1, 0]))
    view.check_fresh()
    x["y"][3, 0] = 7.0
    for stale in (inputs, view):
        with pytest.raises(StaleOperatorError, match=r"inputs held by reference were changed.*input\['y'\]"):
            stale.check_fresh()
    assert "input['x']" not in str(pytest.raises(StaleOperatorError, inputs.check_fresh).value)


def test_inputs_made_in_inference_mode_are_copied():
    with torch.inference_mode():
        x = _rows()
    lin = linearize(Sum())
    inputs = lin.inputs(x)
    ((_, _, batch),) = inputs.batches(None)
    assert not batch.tensors[0].is_inference() and torch.equal(batch.tensors[0], x)
    inputs.check_fresh()
    with torch.inference_mode():
        again = lin.inputs(x)
        again.check_fresh()
        ((_, _, batch),) = again.batches(None)
        with lin.safe_context():
            _, pull = torch.func.vjp(lambda *p: lin.function(p, batch), *lin.parameters)
            assert bool(pull(torch.ones(5, 2, dtype=torch.float64))[0].any())


def test_inputs_lose_their_graph_unless_differentiable():
    x = _rows().requires_grad_()
    lin = linearize(Sum())
    ((_, _, batch),) = lin.inputs(x).batches(None)
    assert not lin.function(lin.parameters, batch).requires_grad
    live = linearize(Sum(), differentiable=True)
    inputs = live.inputs(x * 2)
    ((_, _, batch),) = inputs.batches(None)
    state = live.function(live.parameters, batch)
    (gradient,) = torch.autograd.grad(state.sum(), x)
    torch.testing.assert_close(gradient, 2 * live.parameters[0].detach().sum(0).expand(5, 3))
    inputs.check_fresh()


@pytest.mark.parametrize("differentiable", [False, True])
def test_a_model_that_asks_for_gradients_of_its_input_leaves_the_inputs_alone(differentiable):
    specimen = BY_NAME["residual"]
    model, x = specimen.make(), specimen.inputs()
    lin = linearize(model, differentiable=differentiable)
    inputs = lin.inputs(x)
    ((_, _, batch),) = inputs.batches(None)
    with untouched(model, x):
        lin.function(lin.parameters, batch)
    ((_, _, again),) = inputs.batches(None)
    assert batch.tensors[0].requires_grad and not again.tensors[0].requires_grad


def test_casts_move_floats_and_keep_integers():
    specimen = BY_NAME["dict"]
    lin = linearize(specimen.make(), output="logits")
    x = specimen.inputs()
    inputs = lin.inputs(x).to(torch.float32)
    ((_, _, batch),) = inputs.batches(None)
    assert {k: getattr(v, "dtype", None) for k, v in batch.inputs.items()} == {
        "tokens": torch.int64,
        "scale": torch.float32,
        "square": None,
    }
    assert lin.inputs(x).to(torch.float64).num_samples == 5
    # What was copied is no longer watched; what is still held is.
    x["scale"].add_(1)
    inputs.check_fresh()
    x["tokens"].add_(0)
    with pytest.raises(StaleOperatorError, match="tokens"):
        inputs.check_fresh()


def test_casts_of_views():
    specimen = BY_NAME["dict"]
    lin, x = linearize(specimen.make(), output="logits"), specimen.inputs()
    inputs = lin.inputs(x)
    chosen, cut = inputs.select(torch.tensor([4, 1])), inputs.select(torch.arange(1, 3))
    for view, index in ((chosen, [4, 1]), (cut, [1, 2])):
        ((_, _, batch),) = view.to(torch.float32).batches(None)
        assert torch.equal(batch.inputs["scale"], x["scale"][index].float())
        assert torch.equal(batch.inputs["tokens"], x["tokens"][index])
    cast = cut.to(torch.float32)
    x["tokens"].add_(0)
    with pytest.raises(StaleOperatorError, match="tokens"):
        cast.check_fresh()
    chosen.to(torch.float32).check_fresh()


def test_a_cast_that_changes_nothing_returns_the_inputs_themselves():
    inputs = linearize(Sum()).inputs(_rows())
    assert inputs.to(torch.float64, "cpu") is inputs


def test_pickles_hold_the_samples_of_the_view_only():
    x = torch.randn(4000, 3, dtype=torch.float64)
    lin = linearize(Sum())
    inputs = lin.inputs(x)
    for view, wanted in (
        (inputs.select(torch.tensor([7, 3])), x[[7, 3]]),
        (inputs.select(torch.arange(2, 5)), x[2:5]),
    ):
        data = pickle.dumps(view)
        assert len(data) < 5000
        loaded = pickle.loads(data)
        ((_, _, batch),) = loaded.batches(None)
        assert torch.equal(batch.inputs, wanted) and loaded.output_shape == (2,)
        loaded.check_fresh()
        batch.inputs.zero_()
        with pytest.raises(StaleOperatorError):
            loaded.check_fresh()


def test_a_batch_with_another_number_of_outputs_is_noticed():
    class Ragged(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(1, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x[..., None])[..., 0]

    lin = linearize(Ragged())
    ((_, _, batch),) = lin.inputs(torch.randn(4, 3)).batches(None)
    with pytest.raises(
        TypeError, match=r"\(4, 2\) on a batch of 4 samples, where 3 outputs per sample are due"
    ):
        lin.function(lin.parameters, batch.replace([torch.randn(4, 2)]))


def test_a_wrong_call_of_the_model_says_how_it_was_called():
    with pytest.raises(TypeError) as caught:
        linearize(nn.Linear(3, 2)).inputs((torch.randn(4, 3), torch.randint(0, 2, (4,))))
    assert "with 2 positional input(s)" in caught.value.__notes__[0]
