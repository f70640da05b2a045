"""Every layer rule alone: per-sample gradients of one call against float64 Jacobians."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ntkops.engines.layer_rules import RULES
from ntkops.engines.layer_rules.attention import multi_head_attention
from ntkops.engines.layerwise import LayerwiseEngine
from ntkops.model import linearize
from ntkops.model.record import _CATALOGUE, _EXPANSIONS, record
from tests.pairs import pairs


class Call(nn.Module):
    """One function of the input and of parameters; a smooth read-out makes gradients vary."""

    def __init__(self, function, **shapes):
        super().__init__()
        self.function = function
        for name, shape in shapes.items():
            setattr(self, name, nn.Parameter(torch.randn(shape) * 0.5))

    def forward(self, x):
        y = self.function(self, x)
        y = y.reshape(len(x), -1)
        return torch.stack([torch.sin(y * (k + 1) * 0.2).sum(1) for k in range(3)], dim=1)


def conv(axes, **options):
    function = (F.conv1d, F.conv2d, F.conv3d)[axes - 1]
    return lambda m, x: function(x, m.weight, m.bias, **options)


def transposed(axes, **options):
    function = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)[axes - 1]
    return lambda m, x: function(x, m.weight, m.bias, **options)


def tokens(*shape):
    return torch.randint(0, 7, shape)


NORMAL = torch.randn
RUNNING = torch.linspace(-1, 1, 4).double()

# name: (function, shapes of the parameters, inputs, number of samples)
CALLS = {
    "linear": (lambda m, x: F.linear(x, m.weight, m.bias), {"weight": (3, 4), "bias": (3,)}, (4,)),
    "linear over positions": (
        lambda m, x: F.linear(x, m.weight, m.bias),
        {"weight": (3, 4), "bias": (3,)},
        (5, 4),
    ),
    "linear without bias": (lambda m, x: F.linear(x, m.weight), {"weight": (3, 4)}, (2, 5, 4)),
    "linear, samples second": (
        lambda m, x: F.linear(x.transpose(0, 1), m.weight, m.bias).transpose(0, 1),
        {"weight": (3, 4), "bias": (3,)},
        (5, 4),
    ),
    "linear, samples folded first": (
        lambda m, x: F.linear(x.flatten(0, 1), m.weight, m.bias).unflatten(0, (-1, 5)),
        {"weight": (3, 4), "bias": (3,)},
        (5, 4),
    ),
    "linear, samples folded last": (
        lambda m, x: (
            F.linear(x.transpose(0, 1).flatten(0, 1), m.weight).unflatten(0, (5, -1)).transpose(0, 1)
        ),
        {"weight": (3, 4)},
        (5, 4),
    ),
    "linear with a transposed view": (lambda m, x: F.linear(x, m.weight.T), {"weight": (4, 3)}, (2, 4)),
    "linear with row slices": (
        lambda m, x: F.linear(x, m.weight[:2]) + F.linear(x, m.weight[2:]) * F.linear(x, m.weight[2:]),
        {"weight": (4, 4)},
        (3, 4),
    ),
    "linear with overlapping slices": (
        lambda m, x: F.linear(x, m.weight[:3]) * F.linear(x, m.weight[1:]),
        {"weight": (4, 4)},
        (3, 4),
    ),
    "matmul": (lambda m, x: x @ m.weight + m.bias, {"weight": (4, 3), "bias": (3,)}, (4,)),
    "matmul with a transposed view": (lambda m, x: x @ m.weight.T, {"weight": (3, 4)}, (5, 4)),
    "weight and its transpose": (
        lambda m, x: torch.tanh(x @ m.weight) @ m.weight.T,
        {"weight": (4, 3)},
        (2, 4),
    ),
    "addmm": (
        lambda m, x: torch.addmm(m.bias, x.flatten(0, 1), m.weight).unflatten(0, (-1, 5)),
        {"weight": (4, 3), "bias": (3,)},
        (5, 4),
    ),
    "layer called twice": (
        lambda m, x: F.linear(torch.tanh(F.linear(x, m.weight, m.bias)), m.weight, m.bias),
        {"weight": (4, 4), "bias": (4,)},
        (4,),
    ),
    "bias shared by two weights": (
        lambda m, x: F.linear(torch.tanh(F.linear(x, m.one, m.bias)), m.two, m.bias),
        {"one": (4, 4), "two": (4, 4), "bias": (4,)},
        (3, 4),
    ),
    "conv1d": (conv(1, padding=1), {"weight": (3, 2, 3), "bias": (3,)}, (2, 6)),
    "conv1d, stride and dilation": (
        conv(1, stride=2, padding=2, dilation=2),
        {"weight": (3, 2, 3), "bias": (3,)},
        (2, 9),
    ),
    "conv1d, same": (conv(1, padding="same", dilation=3), {"weight": (3, 2, 4), "bias": (3,)}, (2, 9)),
    "conv1d, valid": (conv(1, padding="valid"), {"weight": (3, 2, 4), "bias": (3,)}, (2, 9)),
    "conv2d": (conv(2, padding=(1, 0)), {"weight": (3, 2, 3, 2), "bias": (3,)}, (2, 5, 4)),
    "conv2d, dilated and grouped": (
        conv(2, stride=(2, 1), padding=2, dilation=(1, 2), groups=2),
        {"weight": (4, 2, 3, 2), "bias": (4,)},
        (4, 5, 6),
    ),
    "conv2d, depthwise": (conv(2, groups=4), {"weight": (4, 1, 2, 2), "bias": (4,)}, (4, 3, 3)),
    "conv2d, frames folded": (
        lambda m, x: F.conv2d(x.flatten(0, 1), m.weight, m.bias).unflatten(0, (-1, 3)),
        {"weight": (2, 2, 2, 2), "bias": (2,)},
        (3, 2, 3, 3),
    ),
    "conv3d": (conv(3, padding=1, stride=2), {"weight": (2, 2, 2, 2, 2), "bias": (2,)}, (2, 3, 3, 4)),
    "conv_transpose1d": (
        transposed(1, stride=2, padding=1, output_padding=1),
        {"weight": (2, 3, 3), "bias": (3,)},
        (2, 5),
    ),
    "conv_transpose2d, grouped": (
        transposed(2, stride=(1, 2), padding=(0, 1), groups=2, dilation=(2, 1)),
        {"weight": (4, 3, 2, 3), "bias": (6,)},
        (4, 3, 3),
    ),
    "conv_transpose3d": (transposed(3), {"weight": (2, 2, 2, 1, 2), "bias": (2,)}, (2, 2, 2, 3)),
    "embedding": (lambda m, x: F.embedding(x, m.weight), {"weight": (7, 3)}, tokens),
    "embedding and read-out": (
        lambda m, x: F.linear(torch.tanh(F.embedding(x, m.weight)), m.weight),
        {"weight": (7, 3)},
        tokens,
    ),
    "layer_norm": (
        lambda m, x: F.layer_norm(x, (4,), m.weight, m.bias, 1e-3),
        {"weight": (4,), "bias": (4,)},
        (3, 4),
    ),
    "layer_norm over two axes": (
        lambda m, x: F.layer_norm(x, (3, 4), m.weight, m.bias),
        {"weight": (3, 4), "bias": (3, 4)},
        (2, 3, 4),
    ),
    "rms_norm": (lambda m, x: F.rms_norm(x, (4,), m.weight), {"weight": (4,)}, (3, 4)),
    "group_norm": (
        lambda m, x: F.group_norm(x, 2, m.weight, m.bias),
        {"weight": (4,), "bias": (4,)},
        (4, 3, 2),
    ),
    "instance_norm": (
        lambda m, x: F.instance_norm(x, weight=m.weight, bias=m.bias),
        {"weight": (4,), "bias": (4,)},
        (4, 5),
    ),
    "batch_norm": (
        lambda m, x: F.batch_norm(x, RUNNING.to(x), RUNNING.to(x) ** 2 + 0.5, m.weight, m.bias),
        {"weight": (4,), "bias": (4,)},
        (4, 3, 2),
    ),
    "batch_norm of features": (
        lambda m, x: F.batch_norm(x, RUNNING.to(x), RUNNING.to(x) ** 2 + 0.5, m.weight, m.bias),
        {"weight": (4,), "bias": (4,)},
        (4,),
    ),
    "add": (lambda m, x: x + m.bias, {"bias": (5, 1)}, (5, 4)),
    "subtract": (lambda m, x: m.bias - x * x, {"bias": (4,)}, (5, 4)),
    "multiply": (lambda m, x: x * m.scale, {"scale": (5, 4)}, (5, 4)),
    "multiply by a number": (lambda m, x: m.scale * x, {"scale": (1,)}, (5, 4)),
    "expand": (
        lambda m, x: torch.cat([m.token.expand(len(x), -1, -1), x], dim=1) * 2,
        {"token": (1, 1, 4)},
        (3, 4),
    ),
}


def make(name, dtype):
    function, shapes, shape = CALLS[name]
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = Call(function, **shapes).double()
        x = shape(4, 5) if callable(shape) else torch.randn(4, *shape, dtype=torch.float64)
    return model, model.to(dtype), x if x.dtype == torch.int64 else x.to(dtype)


def reference(model, x, dtype=torch.float64):
    model = model.to(dtype)
    x = x if x.dtype == torch.int64 else x.to(dtype)
    leaves = list(model.parameters())
    rows = [torch.autograd.grad(value, leaves, retain_graph=True) for value in model(x).flatten()]
    return torch.stack([torch.cat([g.flatten() for g in row]) for row in rows])


def distance(actual, expected):
    return float((actual.double() - expected).norm() / expected.norm())


# In one dtype in turn: rules know none, and whole models are held to both.
@pytest.mark.parametrize(
    ("name", "dtype"),
    list(zip(CALLS, itertools.cycle([torch.float64, torch.float32]), strict=False)),
    ids=str,
)
def test_rule_alone(name, dtype):
    model, cast, x = make(name, dtype)
    linearization = linearize(cast)
    inputs = linearization.inputs(x)
    engine = LayerwiseEngine.build(linearization, inputs)
    assert engine.covered == linearization.names, engine.differentiation.reasons
    rounded, exact = reference(model, x, dtype).double(), reference(model, x)

    def check(found, make):
        assert found.dtype == dtype
        expected, limit = make(exact), 1e-12
        if dtype == torch.float32:  # the functions themselves round, too
            limit = max(2e-7, 1.5 * distance(make(rounded), expected))
        assert distance(found, expected) < limit

    def blocks(J):
        return (J @ J.T).reshape(4, 3, 4, 3)

    outputs = torch.arange(3)
    params = linearization.parameters
    check(engine.jacobian_tile(params, inputs, outputs).flatten(0, 1), lambda J: J)
    every, trace, each = outputs.view(1, 1, 3), outputs.view(1, 3, 1), outputs.view(3, 1, 1)
    check(engine.kernel(params, inputs, inputs, every, every)[0], lambda J: J @ J.T)
    traced = engine.kernel(params, inputs, inputs, trace, trace)[0]
    check(traced, lambda J: torch.einsum("icjc->ij", blocks(J)))
    single = engine.kernel(params, inputs, inputs, each, each)
    check(single, lambda J: torch.einsum("icjc->cij", blocks(J)))
    check(engine.diagonal(params, inputs, every)[0], lambda J: (J * J).sum(1))
    assert engine.passes.jvp == 0  # nothing came from a product with J


def test_every_rule_is_tested():
    used = set()
    for name in CALLS:
        _, model, x = make(name, torch.float64)
        linearization = linearize(model)
        _, _, batch = next(iter(linearization.inputs(x).batches(None)))
        used |= {call.rule for call in record(linearization.function, linearization.parameters, batch).calls}
    assert used == set(RULES)


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("layers, bias, batch_first", [(1, True, True), (2, False, False)])
@pytest.mark.parametrize(
    "make_layer",
    [nn.GRU, nn.LSTM, nn.RNN, lambda *a, **k: nn.RNN(*a, nonlinearity="relu", **k)],
    ids=["gru", "lstm", "tanh", "relu"],
)
def test_unrolled_recurrent_layers_give_the_fused_result(
    make_layer, bidirectional, layers, bias, batch_first
):
    with torch.random.fork_rng():
        torch.manual_seed(5)
        layer = make_layer(
            3, 4, layers, bias=bias, batch_first=batch_first, bidirectional=bidirectional
        ).double()
        x = torch.randn(2, 5, 3, dtype=torch.float64)
    output, state = layer(x)
    is_pair = isinstance(state, tuple)
    name = {"GRU": torch.gru, "LSTM": torch.lstm}.get(
        type(layer).__name__, torch.rnn_relu if layer.mode == "RNN_RELU" else torch.rnn_tanh
    )
    zeros = torch.zeros_like(state[0] if is_pair else state)
    found, *ends = _EXPANSIONS[name](
        x,
        (zeros, zeros) if is_pair else zeros,
        layer._flat_weights,
        bias,
        layers,
        0.0,
        False,
        bidirectional,
        batch_first,
    )
    torch.testing.assert_close(found, output, rtol=1e-13, atol=1e-13)
    for end, expected in zip(ends, state if is_pair else (state,), strict=True):
        torch.testing.assert_close(end, expected, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize(
    "kind, mask, average, need_weights",
    pairs(
        ["self", "cross", "separate"],
        [None, "bool", "float", "per head", "padding", "both"],
        [False, True],
        [False, True],
    ),
    ids=str,
)
def test_attention_by_matrix_products_gives_the_fused_result(kind, mask, average, need_weights):
    with torch.random.fork_rng():
        torch.manual_seed(6)
        sizes = {"kdim": 3, "vdim": 5} if kind == "separate" else {}
        layer = nn.MultiheadAttention(4, 2, **sizes).double()
        query = torch.randn(5, 3, 4, dtype=torch.float64)
        key = query if kind == "self" else torch.randn(6, 3, sizes.get("kdim", 4), dtype=torch.float64)
        value = query if kind == "self" else torch.randn(6, 3, sizes.get("vdim", 4), dtype=torch.float64)
        nn.init.normal_(layer.in_proj_bias)
    length = len(key)
    triangle = torch.ones(5, length, dtype=torch.bool).triu(2)
    attn_mask = {
        "bool": triangle,
        "both": triangle,
        "float": triangle * -3.0,
        "per head": torch.linspace(-1, 1, 6 * 5 * length).view(6, 5, length),
    }.get(mask)
    if attn_mask is not None and attn_mask.dtype != torch.bool:
        attn_mask = attn_mask.double()
    padding = torch.arange(length)[None, :] >= torch.tensor([length, 4, 3])[:, None]
    given = {}

    def spy(*args, **kwargs):
        given["found"] = multi_head_attention(*args, **kwargs)
        return original(*args, **kwargs)

    original = F.multi_head_attention_forward
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        F.multi_head_attention_forward = spy
        try:
            output, weights = layer(
                query,
                key,
                value,
                key_padding_mask=padding if mask in ("padding", "both") else None,
                need_weights=need_weights,
                attn_mask=attn_mask,
                average_attn_weights=average,
            )
        finally:
            F.multi_head_attention_forward = original
    found, found_weights = given["found"]
    torch.testing.assert_close(found, output, rtol=1e-13, atol=1e-13)
    assert (weights is None) == (found_weights is None)
    if weights is not None:
        torch.testing.assert_close(found_weights, weights, rtol=1e-13, atol=1e-13)


def test_what_unrolling_does_not_handle_is_left_alone():
    layer = nn.LSTM(3, 4, proj_size=2, batch_first=True)
    zeros = torch.zeros(1, 2, 4), torch.zeros(1, 2, 4)
    result = _EXPANSIONS[torch.lstm](
        torch.zeros(2, 5, 3), zeros, layer._flat_weights, True, 1, 0.0, False, False, True
    )
    assert result is NotImplemented
    dropout = _EXPANSIONS[torch.gru](
        torch.zeros(2, 5, 3), zeros[0], nn.GRU(3, 4)._flat_weights, True, 1, 0.5, True, False, True
    )
    assert dropout is NotImplemented


def test_catalogue_names_the_arguments_of_its_functions():
    """A wrong order of arguments would bind a weight to another role."""
    import inspect

    for function, entry in _CATALOGUE.items():
        if inspect.isfunction(function):
            names = tuple(inspect.signature(function).parameters)
            assert entry.arguments == names[: len(entry.arguments)], entry.name
