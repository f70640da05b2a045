"""The layerwise engine against dense float64 Jacobians, on ordinary and on odd models."""

import copy
import functools
import itertools
import logging
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import ntkops
from ntkops.engines import count_passes, shared_store
from ntkops.engines.layerwise import LayerwiseEngine
from ntkops.engines.summation import Workspace
from ntkops.model import linearize
from tests.cases import BY_NAME, CASES, REVERSE_ONLY, Case, reference_jacobian


class Reused(nn.Module):
    """One layer three times, once through a transposed view."""

    def __init__(self):
        super().__init__()
        self.layer, self.head = nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x):
        hidden = torch.tanh(self.layer(torch.relu(self.layer(x))))
        return self.head(torch.tanh(hidden @ self.layer.weight.T))


class Functional(nn.Module):
    """A weight that is used by a layer and in arithmetic that no rule covers."""

    def __init__(self):
        super().__init__()
        self.layer, self.head = nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x):
        return self.head(torch.tanh(self.layer(x))) * self.layer.weight.square().sum()


class Detached(nn.Module):
    """Branches that carry no gradient."""

    def __init__(self):
        super().__init__()
        self.layer, self.gate, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x):
        gate = torch.sigmoid(self.gate(x)).detach()
        hidden = torch.tanh(self.layer(x)) * gate + torch.tanh(self.layer(x).detach())
        return self.head(hidden + F.linear(x, self.layer.weight.detach()))


class InPlace(nn.Module):
    """Activations that are overwritten."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv1d(2, 3, 3), nn.GroupNorm(3, 3), nn.Linear(12, 2)

    def forward(self, x):
        hidden = self.norm(F.relu_(self.conv(x))).tanh_()
        return self.head(hidden.flatten(1)).add_(1)


class TimeFirst(nn.Module):
    """Samples on the second axis inside, and folded with time."""

    def __init__(self):
        super().__init__()
        self.read, self.rnn, self.head = nn.Linear(3, 4), nn.RNN(4, 3, 2, bidirectional=True), nn.Linear(6, 2)

    def forward(self, x):
        flow, _ = self.rnn(torch.tanh(self.read(x)).transpose(0, 1))
        return self.head(flow.flatten(0, 1)).unflatten(0, flow.shape[:2]).transpose(0, 1).flatten(1)


class Cells(nn.Module):
    """Cells called in a loop."""

    def __init__(self):
        super().__init__()
        self.gru, self.lstm, self.head = nn.GRUCell(3, 4), nn.LSTMCell(4, 3), nn.Linear(3, 2)

    def forward(self, x):
        hidden = x.new_zeros(len(x), 4)
        state = x.new_zeros(len(x), 3), x.new_zeros(len(x), 3)
        for step in x.unbind(1):
            hidden = self.gru(step, hidden)
            state = self.lstm(hidden, state)
        return self.head(state[0])


class Positions(nn.Module):
    """A table of positions that is looked up once for all samples, and a class token."""

    def __init__(self):
        super().__init__()
        self.token, self.place = nn.Parameter(torch.randn(1, 1, 4)), nn.Embedding(4, 4)
        self.layer, self.head = nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x):
        whole = torch.cat([self.token.expand(len(x), -1, -1), x], dim=1)
        return self.head(torch.tanh(self.layer(whole + self.place(torch.arange(4)))).mean(1))


class Decoder(nn.Module):
    """Cross-attention with masks."""

    def __init__(self):
        super().__init__()
        self.layer = nn.TransformerDecoderLayer(4, 2, 6, batch_first=True)
        self.head = nn.Linear(4, 2)

    def forward(self, x, memory):
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1], dtype=x.dtype)
        return self.head(self.layer(x, memory, tgt_mask=mask)).mean(1)


class InnerDerivative(nn.Module):
    """The output holds a derivative of a layer: its weight enters through double backward, too."""

    def __init__(self):
        super().__init__()
        self.layer, self.head = nn.Linear(3, 4), nn.Linear(4, 1)

    def forward(self, x):
        with torch.enable_grad():
            x = x.requires_grad_() if x.is_leaf else x
            energy = self.head(torch.tanh(self.layer(x))).sum()
            (slope,) = torch.autograd.grad(energy, x, create_graph=True)
        return slope


def frozen_weight():
    model = nn.Sequential(nn.Conv2d(2, 4, 2, groups=2, dilation=2), nn.Tanh(), nn.Flatten(), nn.Linear(16, 2))
    model[0].weight.requires_grad_(False)
    model[3].weight.requires_grad_(False)
    return model


def padded_embedding():
    return nn.Sequential(nn.Embedding(6, 3, padding_idx=0), nn.LSTM(3, 4, 2, batch_first=True))


def grouped():
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding="same", dilation=2, groups=2),
        nn.InstanceNorm2d(4, affine=True),
        nn.GELU(),
        nn.ConvTranspose2d(4, 2, 2, stride=2, groups=2),
        nn.Tanh(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
    )


def images(n):
    return torch.randn(n, 2, 4, 4)


ODD = {
    case.name: case
    for case in (
        Case("reused", Reused, lambda n: torch.randn(n, 4)),
        Case("functional", Functional, lambda n: torch.randn(n, 4)),
        Case("detached", Detached, lambda n: torch.randn(n, 4)),
        Case("in-place", InPlace, lambda n: torch.randn(n, 2, 6)),
        Case("time-first", TimeFirst, lambda n: torch.randn(n, 5, 3)),
        Case("cells", Cells, lambda n: torch.randn(n, 4, 3)),
        Case("positions", Positions, lambda n: torch.randn(n, 3, 4)),
        Case("decoder", Decoder, lambda n: (torch.randn(n, 3, 4), torch.randn(n, 5, 4))),
        Case("frozen-weight", frozen_weight, images),
        Case(
            "padded",
            padded_embedding,
            lambda n: torch.randint(0, 6, (n, 4)),
            {"output": 0},
            lambda raw: raw[0],
        ),
        Case("grouped", grouped, images),
    )
}
# Everything else is covered whole.
UNCOVERED = {
    "weight-norm": {"0.parametrizations.weight.original0", "0.parametrizations.weight.original1"},
    "embedding-bag": {"bag.weight"},
    "functional": {"layer.weight"},
}
ALL = [*CASES, REVERSE_ONLY, *ODD.values()]
# Every model in one dtype, in turn, and in the other one for its products.
TURNS = [(case, (torch.float64, torch.float32)[number % 2]) for number, case in enumerate(ALL)]


def named(value):
    return getattr(value, "name", str(value))


def build(case, dtype=torch.float64, count=3):
    model = case.make(dtype)
    linearization = linearize(model, output=case.options.get("output"))
    inputs = linearization.inputs(case.data(count, dtype))
    return LayerwiseEngine.build(linearization, inputs), linearization, inputs


def jacobian(case, dtype=torch.float64, count=3, seed=1, precision=torch.float64):
    """The reference at exactly the numbers that the engine sees."""
    model = case.make(dtype).to(precision)
    x = case.data(count, dtype, seed)
    cast = torch.utils._pytree.tree_map(lambda t: t.to(precision) if t.is_floating_point() else t, x)
    return reference_jacobian(case, model, cast)


def distance(actual, expected):
    return float((actual.double() - expected).norm() / expected.norm())


class Reference:
    """Jacobians in float64 of the very numbers that the engine sees, and what float32 passes lose of them.

    A float32 quantity must be within 2e-7 of the one from the float64 Jacobian. No contraction can give
    back what the passes through the network lost: where the same quantity, made in float64 from automatic
    differentiation's float32 Jacobian, is further off than that, half more than its error is allowed.
    """

    def __init__(self, case, dtype, *sizes):
        self.exact = [jacobian(case, dtype, count, seed=seed) for count, seed in sizes]
        self.dtype = dtype
        if dtype == torch.float32:
            rounded = [jacobian(case, dtype, count, seed=seed, precision=dtype) for count, seed in sizes]
            self.rounded = [J.double() for J in rounded]

    def check(self, found, make, name=""):
        """Compare with ``make(*jacobians)``."""
        assert found.dtype == self.dtype, name
        expected = make(*self.exact)
        limit = 1e-12
        if self.dtype == torch.float32:
            limit = max(2e-7, 1.5 * distance(make(*self.rounded), expected))
        error = distance(found, expected)
        assert error < limit, (name, error, limit)


@functools.cache
def reference_of(name, dtype):
    """Return that of three samples and of two others, made once for all tests of a model."""
    return Reference(next(case for case in ALL if case.name == name), dtype, (3, 1), (2, 9))


def block(*shape, seed=4):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def outputs_of(count):
    numbers = torch.arange(count)
    return {"all": numbers.view(1, 1, -1), "trace": numbers.view(1, -1, 1), "each": numbers.view(-1, 1, 1)}


def contractions(J, count):
    blocks = (J @ J.T).reshape(count, len(J) // count, count, -1)
    return {
        "all": (J @ J.T).unsqueeze(0),
        "trace": torch.einsum("icjc->ij", blocks).unsqueeze(0),
        "each": torch.einsum("icjc->cij", blocks),
    }


@pytest.mark.parametrize(("case", "dtype"), TURNS, ids=named)
def test_blocks(case, dtype):
    engine, linearization, inputs = build(case, dtype)
    names = set(linearization.names)
    assert set(engine.covered) == names - UNCOVERED.get(case.name, set()), engine.differentiation.reasons
    reference = reference_of(case.name, dtype)
    count, width = 3, len(reference.exact[0]) // 3
    params = linearization.parameters
    for name, numbers in outputs_of(width).items():
        found = engine.kernel(params, inputs, inputs, numbers, numbers)
        reference.check(found, lambda J, _, name=name: contractions(J, count)[name], name)
        assert torch.equal(found, found.mT), name
        lengths = engine.diagonal(params, inputs, numbers)
        reference.check(
            lengths, lambda J, _, name=name: contractions(J, count)[name].diagonal(dim1=1, dim2=2), name
        )
    every = outputs_of(width)["all"]
    other = linearization.inputs(case.data(2, dtype, seed=9))
    reference.check(engine.kernel(params, other, inputs, every, every)[0], lambda J, J2: J2 @ J.T, "cross")
    tile = engine.jacobian_tile(params, inputs, every.flatten()).flatten(0, 1)
    reference.check(tile, lambda J, _: J, "tile")
    cotangents = block(count, 2, width).to(dtype)

    def gram(J, _):
        gradients = torch.einsum("iro,iop->irp", cotangents.double(), J.reshape(count, width, -1))
        return torch.einsum("irp,jsp->irjs", gradients, gradients)

    reference.check(engine.sample_gram(params, inputs, cotangents), gram, "sample Gram")


@pytest.mark.parametrize(("case", "dtype"), TURNS, ids=named)
def test_products_from_the_cache(case, dtype):
    dtype = torch.float32 if dtype == torch.float64 else torch.float64
    engine, linearization, inputs = build(case, dtype)
    reference = reference_of(case.name, dtype)
    rows, size = reference.exact[0].shape
    width, params = rows // 3, linearization.parameters
    other = linearization.inputs(case.data(2, dtype, seed=9))
    columns = width + 1  # enough to pay for the factors at once
    v, p = block(columns, 3, width).to(dtype), block(columns, size).to(dtype)
    flat = v.flatten(1).double()
    jvps = engine.passes.jvp
    reference.check(engine.vjp(params, inputs, v), lambda J, _: flat @ J, "vjp")
    assert engine._cache._held
    if engine.differentiation.mode != "reverse":
        reference.check(engine.jvp(params, inputs, p).flatten(1), lambda J, _: p.double() @ J.T, "jvp")
        assert engine.passes.jvp - jvps == columns
        for count in (1, columns):
            product = engine.product(params, inputs, inputs, v[:count]).flatten(1)
            reference.check(product, lambda J, _, count=count: flat[:count] @ J @ J.T, "product")
        crossed = engine.product(params, other, inputs, v).flatten(1)
        reference.check(crossed, lambda J, J2: flat @ J @ J2.T, "cross")
    assert engine.free() > 0


def test_products_without_covered_parameters_left_make_no_automatic_differentiation(monkeypatch):
    engine, linearization, inputs = build(BY_NAME["conv"])
    params, v = linearization.parameters, block(4, 3, 2)
    engine.product(params, inputs, inputs, v)
    expected = engine.product(params, inputs, inputs, v)

    def refuse(*args, **kwargs):
        raise AssertionError("automatic differentiation was used")

    monkeypatch.setattr("ntkops.engines.autograd.linearize_batch", refuse)
    monkeypatch.setattr("ntkops.engines.source.record", refuse)
    assert torch.equal(engine.product(params, inputs, inputs, v), expected)


def test_a_single_product_does_not_pay_for_the_cache():
    engine, linearization, inputs = build(BY_NAME["gru-time"])
    v = block(1, 3, 12)
    engine.product(linearization.parameters, inputs, inputs, v)
    assert not engine._cache._held
    for _ in range(3):
        engine.product(linearization.parameters, inputs, inputs, v)
    assert engine._cache._held


def test_the_cache_is_left_when_the_store_drops_it_or_parameters_change():
    engine, linearization, inputs = build(BY_NAME["mlp"])
    params, v = linearization.parameters, block(4, 3, 2)
    first = engine.product(params, inputs, inputs, v)
    shared_store.release(engine.identity)
    torch.testing.assert_close(engine.product(params, inputs, inputs, v), first, rtol=1e-14, atol=1e-14)
    other = tuple(p + 0.1 for p in params)
    changed = engine.product(other, inputs, inputs, v)
    expected = engine.fallback.product(other, inputs, inputs, v)
    torch.testing.assert_close(changed, expected)
    assert not torch.allclose(changed, first)


@pytest.mark.parametrize("name", ["conv", "tied", "lstm", "encoder-eval", "grouped", "mlp"])
def test_every_route_gives_the_same_kernel(name):
    case = {**BY_NAME, **ODD}[name]
    engine, linearization, inputs = build(case)
    J = jacobian(case)
    width = len(J) // 3
    factors = engine._source.of_outputs(linearization.parameters, inputs, torch.arange(width))
    for route, (kind, numbers) in itertools.product(("gram", "gradient"), outputs_of(width).items()):
        expected = contractions(J, 3)[kind]
        for symmetric in (True, False):
            result = torch.zeros_like(expected)
            factors.kernel(
                factors, result, numbers, numbers, same=symmetric, workspace=Workspace(), force=route
            )
            shown = (result.tril(), expected.tril()) if symmetric else (result, expected)
            assert distance(*shown) < 1e-12
        assert distance(factors.lengths(Workspace(), route).flatten(), (J * J).sum(1)) < 1e-12


def test_unusual_choices_of_outputs():
    """Partial traces, repeated and reordered outputs, expanded batches, different sides."""
    case = BY_NAME["lstm"]
    engine, linearization, inputs = build(case)
    J = jacobian(case).reshape(3, 12, -1)
    params = linearization.parameters
    left = torch.tensor([[[3, 1], [0, 5]], [[7, 7], [2, 11]], [[3, 1], [0, 5]]])
    right = torch.tensor([[[1, 2, 3], [4, 5, 6]], [[0, 0, 1], [9, 8, 7]], [[1, 2, 3], [4, 5, 6]]])
    found = engine.kernel(params, inputs, inputs, left, right)
    expected = torch.stack(
        [
            sum(J[:, a].flatten(0, 1) @ J[:, b].flatten(0, 1).T for a, b in zip(rows, columns, strict=True))
            for rows, columns in zip(left, right, strict=True)
        ]
    )
    assert distance(found, expected) < 1e-12
    same = engine.kernel(params, inputs, inputs, left, left)
    for m in range(3):
        wanted = sum(J[:, a].flatten(0, 1) @ J[:, a].flatten(0, 1).T for a in left[m])
        assert distance(same[m], wanted) < 1e-12
    lengths = engine.diagonal(params, inputs, left)
    assert distance(lengths[1], (J[:, left[1]] ** 2).sum(-1).sum(1).flatten()) < 1e-12


@pytest.mark.parametrize(
    "name, samples", [("conv", 0), ("lstm", 1), ("tied", 1), ("functional", 2), ("conv", 2)]
)
def test_small_tiles_give_the_same_blocks(name, samples, monkeypatch):
    case = {**BY_NAME, **ODD}[name]
    engine, linearization, inputs = build(case, count=5)
    J = jacobian(case, count=5)
    width, params = len(J) // 5, linearization.parameters
    # `samples` samples with all outputs fit, or less than one.
    monkeypatch.setattr(
        engine._source, "tile", lambda r: samples * width // r or int(r == 1 and samples == 0)
    )
    for kind, numbers in outputs_of(width).items():
        expected = contractions(J, 5)[kind]
        assert distance(engine.kernel(params, inputs, inputs, numbers, numbers), expected) < 1e-12
        lengths = engine.diagonal(params, inputs, numbers)
        assert distance(lengths, expected.diagonal(dim1=1, dim2=2)) < 1e-12
    other = linearization.inputs(case.data(4, seed=9))
    every = outputs_of(width)["all"]
    cross = engine.kernel(params, other, inputs, every, every)[0]
    assert distance(cross, jacobian(case, count=4, seed=9) @ J.T) < 1e-12
    gram = engine.sample_gram(params, inputs, block(5, 2, width))
    gradients = torch.einsum("iro,iop->irp", block(5, 2, width), J.reshape(5, width, -1))
    assert distance(gram, torch.einsum("irp,jsp->irjs", gradients, gradients)) < 1e-12


def test_symmetric_blocks_of_many_rows():
    case = Case(
        "wide",
        lambda: nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 5)),
        lambda n: torch.randn(n, 3),
    )
    engine, linearization, inputs = build(case, count=150)
    J = jacobian(case, count=150)
    for kind, numbers in outputs_of(5).items():
        found = engine.kernel(linearization.parameters, inputs, inputs, numbers, numbers)
        assert distance(found, contractions(J, 150)[kind]) < 1e-12
        assert torch.equal(found, found.mT)


def test_a_batch_size_does_not_change_results():
    case = BY_NAME["lstm"]
    linearization = linearize(case.make(), output=0)
    inputs = linearization.inputs(case.data(5))
    numbers = outputs_of(12)["all"]
    J = jacobian(case, count=5)
    for size in (1, 2, 5):
        engine = LayerwiseEngine.build(linearization, inputs, batch_size=size)
        found = engine.kernel(linearization.parameters, inputs, inputs, numbers, numbers)[0]
        assert distance(found, J @ J.T) < 1e-12
        v = block(20, 5, 12)
        product = engine.product(linearization.parameters, inputs, inputs, v)
        assert distance(product.flatten(1), v.flatten(1) @ J @ J.T) < 1e-12


def test_recorded_gradients_go_to_automatic_differentiation():
    case = BY_NAME["mlp"]
    engine, linearization, inputs = build(case)
    numbers = outputs_of(2)["trace"]
    live = tuple(p.clone().requires_grad_() for p in linearization.parameters)
    kernel = engine.kernel(live, inputs, inputs, numbers, numbers)
    (gradient,) = torch.autograd.grad(kernel.sum(), live[0])
    step = 1e-5
    moved = []
    for sign in (1, -1):
        shifted = [p.detach().clone() for p in live]
        shifted[0][0, 0] += sign * step
        moved.append(engine.kernel(tuple(shifted), inputs, inputs, numbers, numbers).sum())
    assert float(gradient[0, 0]) == pytest.approx(float(moved[0] - moved[1]) / (2 * step), rel=1e-6)
    tangent = tuple(torch.ones_like(p) for p in linearization.parameters)
    _, derivative = torch.func.jvp(
        lambda *params: engine.diagonal(params, inputs, numbers), linearization.parameters, tangent
    )
    assert derivative.shape == (1, 3) and bool(derivative.any())


def test_a_batch_used_in_another_way_is_left_to_automatic_differentiation(caplog):
    class Moody(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(3, 2)

        def forward(self, x):
            result = self.layer(x)
            if bool((x > 50).any()):
                result = result + x @ self.layer.weight.square().mT
            return result

    case = Case("moody", Moody, lambda n: torch.randn(n, 3))
    engine, linearization, inputs = build(case)
    assert engine.covered == ("layer.weight", "layer.bias")
    model, x = case.make(), case.data(3) + 100
    J = reference_jacobian(case, model, x)
    numbers = outputs_of(2)["all"]
    far = linearization.inputs(x)
    with caplog.at_level(logging.WARNING):
        found = engine.kernel(linearization.parameters, far, far, numbers, numbers)[0]
    assert distance(found, J @ J.T) < 1e-12
    assert "'layer.weight' goes to automatic differentiation: no rule for square" in caplog.text
    assert engine.covered == ("layer.bias",)
    assert any("no rule for square" in reason for reason in engine.differentiation.reasons)


def test_a_wrong_rule_is_found_at_construction(monkeypatch, caplog):
    from ntkops.engines.layer_rules import RULES

    right = type(RULES["linear"]).activation
    monkeypatch.setattr(type(RULES["linear"]), "activation", lambda *args: right(*args).flip(0))
    with caplog.at_level(logging.WARNING):
        engine, linearization, inputs = build(BY_NAME["mlp"])
    assert engine.covered == ("0.bias", "2.bias")
    assert "'0.weight'" in caplog.text
    assert any("differ by" in reason for reason in engine.differentiation.reasons)
    J = jacobian(BY_NAME["mlp"])
    numbers = outputs_of(2)["all"]
    found = engine.kernel(linearization.parameters, inputs, inputs, numbers, numbers)[0]
    assert distance(found, J @ J.T) < 1e-12


def test_a_derivative_inside_the_model_is_not_mistaken():
    """The weights enter through double backward as well: no call stands for all of their effect."""
    model = InnerDerivative().double()
    x = torch.randn(3, 3, dtype=torch.float64)
    linearization = linearize(model)
    inputs = linearization.inputs(x)
    engine = LayerwiseEngine.build(linearization, inputs)
    assert "layer.weight" not in engine.covered and "head.weight" not in engine.covered
    numbers = outputs_of(3)["all"]
    expected = engine.fallback.kernel(linearization.parameters, inputs, inputs, numbers, numbers)
    found = engine.kernel(linearization.parameters, inputs, inputs, numbers, numbers)
    torch.testing.assert_close(found, expected)


def test_two_samples_and_one():
    for count in (1, 2):
        engine, linearization, inputs = build(BY_NAME["lstm"], count=count)
        assert engine.covered == linearization.names
        J = jacobian(BY_NAME["lstm"], count=count)
        numbers = outputs_of(12)["all"]
        found = engine.kernel(linearization.parameters, inputs, inputs, numbers, numbers)[0]
        assert distance(found, J @ J.T) < 1e-12


def test_pickling_copying_and_casting():
    engine, linearization, inputs = build(BY_NAME["conv"])
    params, v = linearization.parameters, block(4, 3, 2)
    expected = engine.product(params, inputs, inputs, v)
    for again in (pickle.loads(pickle.dumps(engine)), copy.deepcopy(engine)):
        assert not again._cache._held and again.identity != engine.identity
        assert again.covered == engine.covered
        torch.testing.assert_close(again.product(params, inputs, inputs, v), expected)
    single = engine.to(dtype=torch.float32)
    assert single.name == "layerwise" and single.covered == engine.covered
    cast = single.linearization.parameters
    numbers = outputs_of(2)["all"]
    small = inputs.to(dtype=torch.float32)
    found = single.kernel(cast, small, small, numbers, numbers)
    assert found.dtype == torch.float32
    assert distance(found[0], jacobian(BY_NAME["conv"]) @ jacobian(BY_NAME["conv"]).T) < 1e-5


def test_passes_are_counted_once_an_output():
    engine, linearization, inputs = build(BY_NAME["mlp"])
    numbers = outputs_of(2)["all"]
    with count_passes() as tally:
        engine.kernel(linearization.parameters, inputs, inputs, numbers, numbers)
    assert tally.total == 2
    with count_passes() as tally:
        engine.diagonal(linearization.parameters, inputs, numbers)
    assert tally.total == 2


def test_the_users_model_and_the_random_state_stay_as_they_were():
    model = BY_NAME["encoder-eval"].make()
    before = {name: (p, p.clone(), p.requires_grad) for name, p in model.named_parameters()}
    state = torch.random.get_rng_state()
    linearization = linearize(model)
    inputs = linearization.inputs(BY_NAME["encoder-eval"].data())
    engine = LayerwiseEngine.build(linearization, inputs)
    numbers = outputs_of(2)["each"]
    engine.kernel(linearization.parameters, inputs, inputs, numbers, numbers)
    assert torch.equal(state, torch.random.get_rng_state())
    for name, parameter in model.named_parameters():
        kept, values, needs = before[name]
        assert parameter is kept and torch.equal(parameter, values) and parameter.requires_grad == needs
        assert parameter.grad is None


def test_results_that_are_not_finite_are_named():
    model = nn.Sequential(nn.Linear(2, 2)).double()
    linearization = linearize(
        lambda p, x: (x @ p["w"]).abs().sum(1, keepdim=True).sqrt(), {"w": torch.zeros(2, 2).double()}
    )
    del model
    x = torch.ones(3, 2, dtype=torch.float64)
    inputs = linearization.inputs(x)
    engine = LayerwiseEngine.build(linearization, inputs)
    numbers = outputs_of(1)["all"]
    with pytest.raises(ntkops.errors.NonFiniteError):
        engine.kernel(linearization.parameters, inputs, inputs, numbers, numbers)
    with pytest.raises(ntkops.errors.NonFiniteError):
        engine.diagonal(linearization.parameters, inputs, numbers)
