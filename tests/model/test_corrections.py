"""Norms in front of a transpose, and PReLU at zero: right where torch is not."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import ntkops
from ntkops.errors import DifferentiationError, InputError
from tests.pairs import pairs


class Patches(nn.Module):
    """A convolution, a norm, and its result as a sequence of positions."""

    def __init__(self, norm):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(2, 2, 1), norm

    def forward(self, x):
        return self.norm(self.conv(x)).flatten(2).mT


class Functional(nn.Module):
    """A norm without a module."""

    def __init__(self):
        super().__init__()
        self.weight, self.bias = (
            nn.Parameter(torch.tensor([0.7, 1.4])),
            nn.Parameter(torch.tensor([0.1, 0.2])),
        )
        self.register_buffer("mean", torch.tensor([0.3, -0.2]))
        self.register_buffer("variance", torch.tensor([1.1, 0.6]))

    def forward(self, x):
        return F.batch_norm(x, self.mean, self.variance, self.weight, self.bias)


NORMS = {
    "batch": lambda: nn.BatchNorm2d(2),
    "instance": lambda: nn.InstanceNorm2d(2, affine=True),
    "functional": Functional,
}


def built(name, dtype, shape=(2, 2, 2)):
    torch.manual_seed(0)
    model = Patches(NORMS[name]()).to(dtype).eval()
    return model, torch.randn(5, *shape, dtype=dtype)


def forward_mode(model, x):
    """J in forward mode, which does not pass through that code."""
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    blocks = torch.func.jacfwd(lambda p: torch.func.functional_call(model, p, (x,)).flatten())(parameters)
    return torch.cat([b.flatten(1) for b in blocks.values()], 1)


@pytest.mark.parametrize(
    "name, engine, dtype, shape",
    pairs(
        NORMS, ["autograd", "layerwise"], [torch.float32, torch.float64], [(2, 2, 2), (2, 1, 3), (2, 3, 1)]
    ),
    ids=str,
)
def test_every_number_of_samples_in_a_pass(name, engine, dtype, shape):
    model, x = built(name, dtype, shape)
    J = forward_mode(model, x)
    v = torch.randn(len(J), 2, dtype=dtype)
    limits = {"rtol": 1e-10, "atol": 1e-10} if dtype == torch.float64 else {"rtol": 1e-4, "atol": 1e-4}
    for size in (1, 2, 4, "auto"):
        K = ntkops.ntk(model, x, engine=engine, batch_size=size, max_dense_bytes=0)
        torch.testing.assert_close(K.left.mT @ v, J.mT @ v, **limits)
        torch.testing.assert_close(K @ v, J @ (J.mT @ v), **limits)
        torch.testing.assert_close(K.diagonal(), J.square().sum(1), **limits)


@pytest.mark.parametrize("engine", ["autograd", "layerwise"])
@pytest.mark.parametrize("name", NORMS)
def test_a_cross_kernel_with_one_sample(name, engine):
    model, x = built(name, torch.float64)
    J = forward_mode(model, x)
    K = ntkops.ntk(model, x[:4], engine=engine).cross(x[4:])
    torch.testing.assert_close(K.to_dense(), J[32:] @ J[:32].mT)
    assert ntkops.ntk(model, x[:1], engine=engine).shape == (8, 8)


def test_a_function_that_calls_the_model():
    model, x = built("batch", torch.float64)

    def function(parameters, inputs):
        return torch.func.functional_call(model, parameters, (inputs,))

    J = forward_mode(model, x)
    K = ntkops.ntk(function, x, params=dict(model.named_parameters()), batch_size=4)
    torch.testing.assert_close(K.to_dense(), J @ J.mT)


def test_other_models_run_without_the_mode():
    K = ntkops.ntk(nn.Linear(3, 2), torch.randn(4, 3))
    assert not K._core.engine.linearization._is_corrected
    model, x = built("batch", torch.float64)
    assert ntkops.ntk(model, x)._core.engine.linearization._is_corrected


class Slopes(nn.Module):
    """A linear layer without bias, and a PReLU of channels behind it, by module or by function."""

    def __init__(self, form):
        super().__init__()
        self.layer, self.prelu, self.form = nn.Linear(3, 4, bias=False), nn.PReLU(4), form
        self.prelu.weight.data.copy_(torch.tensor([0.1, 0.2, 0.3, 0.4]))

    def forward(self, x):
        hidden, weight = self.layer(x), self.prelu.weight
        if self.form == "module":
            return self.prelu(hidden)
        if self.form == "function":
            return F.prelu(weight=weight, input=hidden)
        if self.form == "method":
            return hidden.prelu(weight)
        return F.prelu(hidden.unflatten(1, (2, 2)).unsqueeze(-1), weight[:2]).flatten(1)


@pytest.mark.parametrize(
    "form, engine, dtype",
    pairs(
        ["module", "function", "method", "images"], ["autograd", "layerwise"], [torch.float32, torch.float64]
    ),
    ids=str,
)
def test_prelu_has_one_slope_at_zero(form, engine, dtype):
    torch.manual_seed(0)
    model, x = Slopes(form).to(dtype), torch.randn(4, 3, dtype=dtype)
    x[1] = 0
    rows = []
    for entry in model(x).flatten():
        found = torch.autograd.grad(entry, list(model.parameters()), retain_graph=True)
        rows.append(torch.cat([part.flatten() for part in found]).detach())
    expected = torch.stack(rows)
    K = ntkops.ntk(model, x, engine=engine, max_dense_bytes=0)
    eye = torch.eye(expected.shape[1], dtype=dtype)
    torch.testing.assert_close(K.left @ eye, expected)
    torch.testing.assert_close(K @ (expected @ eye), expected @ expected.mT @ expected)
    torch.testing.assert_close(ntkops.ntk(model, x, engine=engine).to_dense(), expected @ expected.mT)


@pytest.mark.skipif(not torch.__version__.startswith("2.13."), reason="other versions have other faults")
def test_torch_has_two_slopes_at_zero():
    """When this fails torch has corrected it."""
    weight, zero, one = torch.tensor([0.25]), torch.zeros(1), torch.ones(1)
    reverse = torch.func.vjp(lambda x: F.prelu(x, weight), zero)[1](one)[0]
    forward = torch.func.jvp(lambda x: F.prelu(x, weight), (zero,), (one,))[1]
    assert reverse != forward


def test_a_prelu_that_does_not_fit_says_so_in_torchs_words():
    with pytest.raises(InputError, match="cannot be called with these samples"):
        ntkops.ntk(nn.PReLU(5), torch.randn(3, 4))


KINKS = {
    "relu": (F.relu, 0.0),
    "relu6 above": (F.relu6, 6.0),
    "leaky relu": (lambda x: F.leaky_relu(x, 0.2), 0.0),
    "elu": (F.elu, 0.0),
    "selu": (F.selu, 0.0),
    "celu": (F.celu, 0.0),
    "prelu": (lambda x: F.prelu(x, torch.full((1,), 0.25, dtype=x.dtype)), 0.0),
    "hardtanh": (F.hardtanh, 1.0),
    "hardtanh below": (F.hardtanh, -1.0),
    "hardswish": (F.hardswish, 3.0),
    "hardswish below": (F.hardswish, -3.0),
    "hardsigmoid": (F.hardsigmoid, 3.0),
    "hardshrink": (F.hardshrink, 0.5),
    "softshrink": (F.softshrink, 0.5),
    "threshold": (lambda x: F.threshold(x, 1.0, 0.0), 1.0),
    "abs": (torch.abs, 0.0),
    "clamp": (lambda x: x.clamp(0, 1), 0.0),
    "clamp above": (lambda x: x.clamp(0, 1), 1.0),
    "maximum": (lambda x: torch.maximum(x, torch.zeros_like(x)), 0.0),
    "norm": (lambda x: x.norm(dim=1, keepdim=True), 0.0),
    "largest of equals": (lambda x: torch.cat([x, x], 1).max(1, keepdim=True).values, 1.0),
    "amax of equals": (lambda x: torch.cat([x, x], 1).amax(1, keepdim=True), 1.0),
    "median of equals": (lambda x: torch.cat([x, x, x], 1).median(1, keepdim=True).values, 1.0),
    "pool of equals": (lambda x: F.max_pool1d(x.expand(-1, 4).unsqueeze(1), 2).squeeze(1), 1.0),
    "product with zeros": (lambda x: torch.cat([x, x, x + 1], 1).prod(1, keepdim=True), 0.0),
    "cumprod with zeros": (lambda x: torch.cat([x, x + 1, x], 1).cumprod(1), 0.0),
}


@pytest.mark.parametrize("engine", ["autograd", "layerwise"])
@pytest.mark.parametrize("name", KINKS)
def test_both_modes_agree_at_kinks(name, engine):
    """A model is often exactly there: with parameters that are zero, or at the edge of an image."""
    function, place = KINKS[name]

    class Kinked(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(2, 1).double()
            nn.init.zeros_(self.layer.weight)
            nn.init.constant_(self.layer.bias, place)

        def forward(self, x):
            return function(self.layer(x))

    model, x = Kinked(), torch.randn(3, 2, dtype=torch.float64)
    state = model(x).flatten()
    rows = [torch.autograd.grad(entry, list(model.parameters()), retain_graph=True) for entry in state]
    expected = torch.stack([torch.cat([part.flatten() for part in row]) for row in rows])
    K = ntkops.ntk(model, x, engine=engine, max_dense_bytes=0)
    torch.testing.assert_close(K.left @ torch.eye(3, dtype=torch.float64), expected)
    torch.testing.assert_close(K @ torch.eye(len(expected), dtype=torch.float64), expected @ expected.mT)
    torch.testing.assert_close(ntkops.ntk(model, x, engine=engine).to_dense(), expected @ expected.mT)


class Block(nn.Module):
    """A layer in a checkpointed block."""

    def __init__(self, layer):
        super().__init__()
        self.front, self.layer, self.head = nn.Linear(3, 4), layer, nn.Linear(4, 2)

    def forward(self, x):
        inner = lambda y: torch.tanh(self.layer(self.front(y)))  # noqa: E731
        return self.head(checkpoint(inner, x, use_reentrant=False))


@pytest.mark.parametrize("layer", [nn.PReLU(4), nn.LayerNorm(4), nn.BatchNorm1d(4)], ids=repr)
def test_checkpointed_blocks(layer):
    torch.manual_seed(0)
    model, x = Block(layer).double().eval(), torch.randn(3, 3, dtype=torch.float64)
    plain = nn.Sequential(model.front, model.layer, nn.Tanh(), model.head)
    J = ntkops.jacobian(plain, x).to_dense()
    V = torch.randn(6, 2, dtype=torch.float64)
    torch.testing.assert_close(ntkops.ntk(model, x, max_dense_bytes=0) @ V, J @ (J.mT @ V))


def test_a_checkpointed_layer_norm_has_no_derivative_of_its_kernel():
    """It runs again in plain torch, whose third derivatives are wrong: loud, and not a number."""
    torch.manual_seed(0)
    model, x = Block(nn.LayerNorm(4)).double(), torch.randn(3, 3, dtype=torch.float64, requires_grad=True)
    with pytest.raises(DifferentiationError, match="switch activation checkpointing off"):
        ntkops.ntk(model, x, differentiable=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_model_without_double_backward(dtype):
    """Its products are right, and torch says that they have no derivatives."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Hardsigmoid(), nn.Linear(4, 2)).to(dtype)
    x = torch.randn(3, 3, dtype=dtype, requires_grad=True)
    K, V = ntkops.ntk(model, x, differentiable=True), torch.randn(6, 2, dtype=dtype)
    assert K.engine_info.mode == "forward"
    assert any("derivatives of J p do not exist" in reason for reason in K.engine_info.reasons)
    found = K @ V
    torch.testing.assert_close(found.detach(), ntkops.ntk(model, x.detach()).to_dense() @ V)
    with pytest.raises(RuntimeError, match="hardsigmoid_backward"):
        torch.autograd.grad(found.sum(), x)


class First(torch.autograd.Function):
    """A derivative that has none itself."""

    @staticmethod
    def forward(x, gradient):
        return 2 * x * gradient

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, gradient):
        raise NotImplementedError("no second derivative")


class Held(torch.autograd.Function):
    """A square whose forward mode takes its own slope for a constant."""

    @staticmethod
    def forward(x):
        return x.square()

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx, gradient):
        return First.apply(ctx.saved_tensors[0], gradient)

    @staticmethod
    def jvp(ctx, tangent):
        return 2 * ctx.saved_tensors[0].detach() * tangent


class Squared(nn.Module):
    """A network with it."""

    def __init__(self):
        super().__init__()
        self.front, self.head = nn.Linear(3, 4).double(), nn.Linear(4, 2).double()

    def forward(self, x):
        return self.head(Held.apply(self.front(x)))


def test_wrong_derivatives_of_forward_mode_are_refused_where_there_is_no_other():
    torch.manual_seed(0)
    x = torch.randn(3, 3, dtype=torch.float64)
    assert ntkops.ntk(Squared(), x).engine_info.mode == "forward"
    with pytest.raises(DifferentiationError, match="derivatives of J p are wrong on the only mode"):
        ntkops.ntk(Squared(), x.requires_grad_(), differentiable=True)
