"""The routes through layers: what is chosen is shown, can be forced, and changes no number."""

import itertools
import pickle
from dataclasses import replace

import pytest
import torch
from torch import nn

import ntkops
from ntkops.engines.cost import KernelShape, LayerShape, choose_diagonal, choose_kernel, choose_product
from ntkops.engines.layerwise import LayerwiseEngine
from ntkops.results import LayerInfo
from tests.cases import BY_NAME, reference_jacobian
from tests.engines.test_layerwise import ODD, block, build, distance, reference_of

KERNEL, DIAGONAL = ("auto", "gram", "gradient"), ("auto", "gram", "gradient")
PRODUCT = ("auto", "factors", "dual", "gradient")
NAMES = ["mlp", "conv", "tied", "lstm", "encoder-eval", "grouped", "padded", "functional", "time-first"]


def rerouted(engine, options):
    """The same engine with other choices, nothing tried again."""
    return LayerwiseEngine(engine.linearization, engine._first, engine._coverage, options=options)


# A name in one dtype, in turn; each dtype in a convolution, a recurrence and an attention or a table.
@pytest.mark.parametrize(
    ("name", "dtype"),
    list(zip(NAMES, itertools.cycle([torch.float64, torch.float32]), strict=False)),
    ids=str,
)
def test_results_do_not_depend_on_the_route(name, dtype):
    case = {**BY_NAME, **ODD}[name]
    built, linearization, inputs = build(case, dtype)
    reference = reference_of(name, dtype)
    rows, size = reference.exact[0].shape
    width, params = rows // 3, linearization.parameters
    every = torch.arange(width).view(1, 1, -1)
    for kernel_route, diagonal_route in zip(KERNEL, DIAGONAL, strict=True):
        engine = rerouted(built, ntkops.Layerwise(kernel_route, diagonal_route))
        reference.check(engine.kernel(params, inputs, inputs, every, every)[0], lambda J, _: J @ J.T)
        reference.check(engine.diagonal(params, inputs, every)[0], lambda J, _: (J * J).sum(1))
    other = linearization.inputs(case.data(2, dtype, seed=9))
    v, p = block(width + 1, 3, width).to(dtype), block(2, size).to(dtype)
    flat = v.flatten(1).double()
    for product_route in PRODUCT:
        engine = rerouted(built, ntkops.Layerwise(product_route=product_route))
        for few in (len(v), 1):  # the first block pays for the factors
            found = engine.product(params, inputs, inputs, v[:few]).flatten(1)
            reference.check(found, lambda J, _, few=few: flat[:few] @ J @ J.T, product_route)
        assert engine._cache._held
        reference.check(engine.vjp(params, inputs, v), lambda J, _: flat @ J, product_route)
        pushed = engine.jvp(params, inputs, p).flatten(1)
        reference.check(pushed, lambda J, _: p.double() @ J.T, product_route)
        crossed = engine.product(params, other, inputs, v).flatten(1)
        reference.check(crossed, lambda J, J2: flat @ J @ J2.T, product_route)


@pytest.mark.parametrize("kernel_route", KERNEL)
@pytest.mark.parametrize("outputs", ["each", "trace", [1, 0]])
def test_forced_routes_of_other_kernels(kernel_route, outputs):
    case = BY_NAME["conv"]
    J = reference_jacobian(case, case.make(), case.data(3)).reshape(3, 2, -1)
    expected = {
        "each": torch.einsum("iop,jop->oij", J, J),
        "trace": torch.einsum("iop,jop->ij", J, J),
    }.get(str(outputs), torch.einsum("iop,jqp->iojq", J.flip(1), J.flip(1)).reshape(6, 6))
    engine = ntkops.Layerwise(kernel_route=kernel_route)
    K = ntkops.ntk(case.make(), case.data(3), outputs=outputs, engine=engine)
    assert distance(K.materialize(), expected) < 1e-12
    routes = {layer.kernel_route for layer in K.engine_info.layers if layer.kind == "outer"}
    assert kernel_route == "auto" or routes == {kernel_route}


def test_the_table_shows_every_parameter_once_and_what_is_done_with_it():
    case = ODD["functional"]  # a layer's weight is used in arithmetic, too; its bias and the head are not
    info = ntkops.ntk(case.make(), case.data(3)).engine_info
    weight, bias, head = info.layers
    autograd = LayerInfo("layer.weight", "none", "autograd", "autograd", "autograd", "autograd", 0)
    assert replace(weight, why="") == autograd and weight.why == "no rule for square"
    direct = LayerInfo("layer.bias", "linear", "direct", "gradient", "gradient", "gradient", 0)
    assert replace(bias, why="") == direct and bias.why == "gradients are small"
    assert head.why == "no shared weights"
    assert (head.parameter, head.bias, head.rule, head.positions) == ("head.weight", "head.bias", "linear", 1)
    assert head.kind == "outer" and head.kernel_route == head.diagonal_route == "gram"
    assert info.covered == ("layer.bias", "head.weight", "head.bias")


def test_the_table_shows_positions_and_rows():
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.GroupNorm(1, 3), nn.Flatten(), nn.Linear(48, 2)).double()
    layers = ntkops.ntk(model, torch.ones(4, 2, 6, 6).double()).engine_info.layers
    assert [layer.parameter for layer in layers] == ["0.weight", "1.weight", "1.bias", "3.weight"]
    assert [layer.positions for layer in layers] == [16, 0, 0, 1]
    assert layers[0].why.startswith("gradient ") and ", gram " in layers[0].why
    forced = ntkops.ntk(model, torch.ones(4, 2, 6, 6).double(), engine=ntkops.Layerwise("gram")).engine_info
    assert forced.layers[0].why == "as chosen"
    assert [layer.rule for layer in layers] == ["convolution", "group_norm", "group_norm", "linear"]
    case = BY_NAME["encoder-eval"]
    names = [layer.parameter for layer in ntkops.ntk(case.make(), case.data(3)).engine_info.layers]
    assert len(names) == len(set(names))
    wide = ntkops.ntk(nn.Linear(3, 2), torch.ones(2, 3), engine="autograd").engine_info
    assert wide.layers == ()


def test_the_table_is_there_for_jacobians_and_slices():
    case = BY_NAME["conv"]
    J = ntkops.jacobian(case.make(), case.data(3), engine=ntkops.Layerwise(product_route="dual"))
    for operator in (J, J.mT, J[1:3]):
        shown = [layer for layer in operator.engine_info.layers if layer.kind == "outer"]
        assert shown and all(layer.product_route == "dual" for layer in shown)
    K = ntkops.ntk(case.make(), case.data(3))
    assert [layer.parameter for layer in K[:2, :2].engine_info.layers] == [
        layer.parameter for layer in K.engine_info.layers
    ]


def test_a_choice_survives_casting_and_pickling():
    case = BY_NAME["conv"]
    K = ntkops.ntk(case.make(), case.data(3), engine=ntkops.Layerwise("gram", "gradient", "factors"))
    for other in (K.to(dtype=torch.float32), pickle.loads(pickle.dumps(K)), K.cross(case.data(2))):
        layer = next(layer for layer in other.engine_info.layers if layer.kind == "outer")
        assert (layer.kernel_route, layer.diagonal_route, layer.product_route) == (
            "gram",
            "gradient",
            "factors",
        )


def test_a_route_that_a_layer_does_not_have_is_replaced():
    grouped = LayerShape(positions=4, inputs=3, outputs=2, groups=2)
    assert choose_kernel(grouped, KernelShape(2, 2, 2, 2), "gram") == "gradient"
    assert choose_diagonal(grouped, "gram") == "gradient"
    assert choose_product(grouped, 2, 2, 2, "dual") == "factors"
    plain = LayerShape(positions=1, inputs=3, outputs=2)
    assert choose_kernel(plain, KernelShape(2, 2, 2, 2), "gradient") == "gradient"
    assert choose_product(plain, 2, 2, 2, "gradient") == "gradient"


@pytest.mark.parametrize("name", ["kernel_route", "diagonal_route", "product_route"])
def test_an_unknown_route_is_refused(name):
    with pytest.raises(ntkops.errors.InputError, match=f"{name}='fast': choose 'auto'"):
        ntkops.Layerwise(**{name: "fast"})


def test_an_unknown_engine_names_the_choices():
    with pytest.raises(ntkops.errors.InputError, match="Layerwise"):
        ntkops.ntk(nn.Linear(3, 2), torch.ones(2, 3), engine="fast")
