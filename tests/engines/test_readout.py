"""Models that end with a linear layer wider than what it reads: few backward passes, the same numbers."""

import logging
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import ntkops
from ntkops.engines import count_passes
from tests.cases import Case
from tests.engines.test_layerwise import (
    Reference,
    block,
    build,
    contractions,
    distance,
    jacobian,
    named,
    outputs_of,
)


class Language(nn.Module):
    """A small language model with logits at every, or only the last, position."""

    def __init__(self, last=False, bias=False, tied=False):
        super().__init__()
        self.embed, self.mix, self.head = nn.Embedding(9, 2), nn.Linear(2, 2), nn.Linear(2, 9, bias=bias)
        self.last = last
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, tokens):
        hidden = torch.tanh(self.mix(self.embed(tokens)).cumsum(1))
        logits = self.head(hidden)
        return logits[:, -1] if self.last else logits


class Functional(nn.Module):
    """A head that is written as a matrix product."""

    def __init__(self, kind):
        super().__init__()
        self.layer, self.kind = nn.Linear(3, 2), kind
        self.weight, self.bias = nn.Parameter(torch.randn(2, 7)), nn.Parameter(torch.randn(7))

    def forward(self, x):
        hidden = torch.tanh(self.layer(x))
        if self.kind == "matmul":
            return hidden @ self.weight + 0 * self.bias.detach()
        if self.kind == "addmm":
            return torch.addmm(self.bias, hidden, self.weight)
        return F.linear(hidden, self.weight.T, self.bias)


class Changed(nn.Module):
    """The wide layer is not the end: something nonlinear, or a second way, goes past it."""

    def __init__(self, kind):
        super().__init__()
        self.layer, self.head, self.kind = nn.Linear(3, 2), nn.Linear(2, 6), kind
        self.skip = nn.Linear(3, 6)

    def forward(self, x):
        hidden = torch.tanh(self.layer(x))
        skip = self.skip(x)
        logits = self.head(hidden)
        if self.kind == "nonlinear":
            return torch.tanh(logits)
        if self.kind == "scaled":
            return 2 * logits
        if self.kind == "flipped":
            return logits.flip(1)
        if self.kind == "second way":
            return logits + skip
        return logits + hidden.sum(1, keepdim=True).square()


def wide():
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2), nn.GELU(), nn.Linear(2, 8))


def conv():
    return nn.Sequential(
        nn.Conv2d(1, 2, 2), nn.Tanh(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2, 5)
    )


def tokens(n):
    return torch.randint(0, 9, (n, 4))


def vectors(n):
    return torch.randn(n, 3)


def shallow():
    """A head of deficient rank."""
    model = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 7))
    with torch.no_grad():
        model[2].weight[:, 2] = model[2].weight[:, 0]
    return model


# The cases, and the backward passes that all outputs take.
TAILS = [
    (Case("wide", wide, vectors), 2),
    (Case("conv", conv, lambda n: torch.randn(n, 1, 3, 3)), 2),
    (Case("shallow", shallow, vectors), 3),
    (Case("language", Language, tokens), 8),
    (Case("language-last", lambda: Language(last=True, bias=True), tokens), 2),
    (Case("matmul", lambda: Functional("matmul"), vectors), 2),
    (Case("addmm", lambda: Functional("addmm"), vectors), 2),
    (Case("transposed", lambda: Functional("linear"), vectors), 2),
]
# Each in one dtype, in turn, and in the other one for its products.
TURNS = [(*tail, (torch.float64, torch.float32)[number % 2]) for number, tail in enumerate(TAILS)]


@pytest.mark.parametrize(("case", "rank", "dtype"), TURNS, ids=named)
def test_kernels_and_diagonals(case, rank, dtype):
    engine, linearization, inputs = build(case, dtype)
    reference = Reference(case, dtype, (3, 1), (2, 9))
    assert engine._coverage.readout is not None and engine._coverage.readout.rank == rank
    width, params = len(reference.exact[0]) // 3, linearization.parameters
    other = linearization.inputs(case.data(2, dtype, seed=9))
    for kind, numbers in outputs_of(width).items():
        found = engine.kernel(params, inputs, inputs, numbers, numbers)
        reference.check(found, lambda J, _, kind=kind: contractions(J, 3)[kind], kind)
        assert torch.equal(found, found.mT)
        lengths = engine.diagonal(params, inputs, numbers)
        reference.check(
            lengths, lambda J, _, kind=kind: contractions(J, 3)[kind].diagonal(dim1=1, dim2=2), kind
        )
    every = outputs_of(width)["all"]
    crossed = engine.kernel(params, other, inputs, every, every)[0]
    reference.check(crossed, lambda J, J2: J2 @ J.T, "cross")


@pytest.mark.parametrize(("case", "rank", "dtype"), TURNS, ids=named)
def test_products(case, rank, dtype):
    dtype = torch.float32 if dtype == torch.float64 else torch.float64
    engine, linearization, inputs = build(case, dtype)
    reference = Reference(case, dtype, (3, 1), (2, 9))
    rows, size = reference.exact[0].shape
    width, params = rows // 3, linearization.parameters
    other = linearization.inputs(case.data(2, dtype, seed=9))
    v, p = block(rank + 1, 3, width).to(dtype), block(2, size).to(dtype)
    flat = v.flatten(1).double()
    for few in (len(v), 1):
        product = engine.product(params, inputs, inputs, v[:few]).flatten(1)
        reference.check(product, lambda J, _, few=few: flat[:few] @ J @ J.T, "product")
    assert engine._cache._held
    reference.check(engine.vjp(params, inputs, v), lambda J, _: flat @ J, "vjp")
    reference.check(engine.jvp(params, inputs, p).flatten(1), lambda J, _: p.double() @ J.T, "jvp")
    crossed = engine.product(params, other, inputs, v).flatten(1)
    reference.check(crossed, lambda J, J2: flat @ J @ J2.T, "cross")


@pytest.mark.parametrize("name", ["language", "wide"])
def test_unusual_choices_of_outputs(name):
    case = next(case for case, _ in TAILS if case.name == name)
    engine, linearization, inputs = build(case)
    J, params = jacobian(case).reshape(3, len(jacobian(case)) // 3, -1), linearization.parameters
    left = torch.tensor([[[3, 1, 2], [0, 5, 7]], [[7, 7, 6], [2, 4, 1]], [[3, 1, 2], [0, 5, 7]]])
    right = torch.tensor([[[1, 2], [4, 5]], [[0, 0], [7, 6]], [[1, 2], [4, 5]]])
    found = engine.kernel(params, inputs, inputs, left, right)
    for m in range(3):
        wanted = sum(
            J[:, a].flatten(0, 1) @ J[:, b].flatten(0, 1).T for a, b in zip(left[m], right[m], strict=True)
        )
        assert distance(found[m], wanted) < 1e-12
    lengths = engine.diagonal(params, inputs, left)
    assert distance(lengths[1], (J[:, left[1]] ** 2).sum(-1).sum(1).flatten()) < 1e-12
    partial = torch.tensor([[[0], [1], [2], [3], [5], [5]]])  # a trace over some outputs, one of them twice
    wanted = sum(J[:, o] @ J[:, o].T for o in partial.flatten())
    assert distance(engine.kernel(params, inputs, inputs, partial, partial)[0], wanted) < 1e-12
    assert distance(engine.diagonal(params, inputs, partial)[0], wanted.diagonal()) < 1e-12


@pytest.mark.parametrize("entries", [1, 2**8])
def test_small_parts_give_the_same_kernels(entries, monkeypatch):
    monkeypatch.setattr("ntkops.engines.readout._ENTRIES", entries)
    case = TAILS[3][0]
    engine, linearization, inputs = build(case, count=5)
    J, params = jacobian(case, count=5), linearization.parameters
    other = linearization.inputs(case.data(2, seed=9))
    for kind, numbers in outputs_of(36).items():
        found = engine.kernel(params, inputs, inputs, numbers, numbers)
        assert distance(found, contractions(J, 5)[kind]) < 1e-12
    every = outputs_of(36)["all"]
    found = engine.kernel(params, other, inputs, every, every)[0]
    assert distance(found, jacobian(case, count=2, seed=9) @ J.T) < 1e-12


def test_small_tiles_give_the_same_results(monkeypatch):
    monkeypatch.setattr("ntkops.engines.source.LayerSource.tile", lambda self, directions: 2)
    case = TAILS[3][0]
    engine, linearization, inputs = build(case, count=5)
    J, params = jacobian(case, count=5), linearization.parameters
    for kind, numbers in outputs_of(36).items():
        expected = contractions(J, 5)[kind]
        assert distance(engine.kernel(params, inputs, inputs, numbers, numbers), expected) < 1e-12
        lengths = engine.diagonal(params, inputs, numbers)
        assert distance(lengths, expected.diagonal(dim1=1, dim2=2)) < 1e-12


@pytest.mark.parametrize("kind", ["all", "each", "trace"])
def test_backward_passes_are_those_of_the_width(kind):
    engine, linearization, inputs = build(TAILS[0][0])
    numbers = outputs_of(8)[kind]
    with count_passes() as tally:
        engine.kernel(linearization.parameters, inputs, inputs, numbers, numbers)
    assert tally.total == 2
    with count_passes() as tally:
        engine.diagonal(linearization.parameters, inputs, numbers)
    assert tally.total == 2


@pytest.mark.parametrize("kind", ["nonlinear", "scaled", "flipped", "second way", "added"])
def test_what_only_looks_like_a_tail_is_not_taken_for_one(kind):
    case = Case(kind, lambda: Changed(kind), vectors)
    engine, linearization, inputs = build(case)
    assert engine._coverage.readout is None
    J = jacobian(case)
    every = outputs_of(6)["all"]
    found = engine.kernel(linearization.parameters, inputs, inputs, every, every)[0]
    assert distance(found, J @ J.T) < 1e-12


def test_a_tied_head_takes_a_pass_for_each_output():
    case = Case("tied", lambda: Language(tied=True), tokens)
    engine, linearization, inputs = build(case)
    assert engine._coverage.readout is None
    J, every = jacobian(case), outputs_of(36)["all"]
    found = engine.kernel(linearization.parameters, inputs, inputs, every, every)[0]
    assert distance(found, J @ J.T) < 1e-12


@pytest.mark.parametrize("frozen", ["4.weight", "4.bias", "0.weight", "2.weight"])
def test_frozen_parameters(frozen):
    def make():
        model = wide()
        model.get_parameter(frozen).requires_grad_(False)
        return model

    case = Case("frozen", make, vectors)
    engine, linearization, inputs = build(case)
    J, params = jacobian(case), linearization.parameters
    for kind, numbers in outputs_of(8).items():
        expected = contractions(J, 3)[kind]
        assert distance(engine.kernel(params, inputs, inputs, numbers, numbers), expected) < 1e-12
        lengths = engine.diagonal(params, inputs, numbers)
        assert distance(lengths, expected.diagonal(dim1=1, dim2=2)) < 1e-12


def test_a_batch_that_ends_in_another_way_is_found(caplog):
    class Moody(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.head = nn.Linear(3, 2), nn.Linear(2, 6)

        def forward(self, x):
            logits = self.head(torch.tanh(self.layer(x)))
            return logits.square() if bool((x > 50).any()) else logits

    case = Case("moody", Moody, vectors)
    engine, linearization, inputs = build(case)
    assert engine._coverage.readout is not None
    far = linearization.inputs(case.data(3) + 100)
    model, every = case.make(), outputs_of(6)["all"]
    rows = [
        torch.cat(
            [g.flatten() for g in torch.autograd.grad(entry, list(model.parameters()), retain_graph=True)]
        )
        for entry in model(case.data(3) + 100).flatten()
    ]
    J = torch.stack(rows)
    with caplog.at_level(logging.WARNING):
        found = engine.kernel(linearization.parameters, far, far, every, every)[0]
    assert distance(found, J @ J.T) < 1e-12
    assert "does not end with the linear layer" in caplog.text


def test_other_parameters_than_the_snapshot():
    case = TAILS[0][0]
    engine, linearization, inputs = build(case)
    moved = tuple(p + 0.1 * torch.ones_like(p) for p in linearization.parameters)
    every = outputs_of(8)["all"]
    found = engine.kernel(moved, inputs, inputs, every, every)
    torch.testing.assert_close(found, engine.fallback.kernel(moved, inputs, inputs, every, every))


def test_the_operator_shows_the_tail_and_survives_pickling():
    case = TAILS[3][0]
    K = ntkops.ntk(case.make(), case.data(3))
    assert [layer.kind for layer in K.engine_info.layers][-1] == "readout"
    J = jacobian(case)
    for kernel in (K, pickle.loads(pickle.dumps(K)), K[:40, :40]):
        n = kernel.shape[0]
        assert distance(kernel.materialize(), (J @ J.T)[:n, :n]) < 1e-12
    assert distance(ntkops.trace(K).value, (J * J).sum()) < 1e-12


def test_too_many_backward_passes_are_refused_before_any_work():
    model = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 8), nn.Tanh()).double()
    x = torch.ones(2, 3).double()
    K = ntkops.ntk(model, x, engine=ntkops.Layerwise(max_backwards=7), max_dense_bytes=0)
    with count_passes() as tally, pytest.raises(ntkops.errors.BackwardLimitError) as caught:
        K.diagonal()
    assert tally.total == 0
    for part in ("8 outputs", "8 backward passes", "max_backwards=7", "outputs=[...]", "ntkops.trace"):
        assert part in str(caught.value)
    generator = torch.Generator().manual_seed(0)
    for estimate in (ntkops.trace, ntkops.frobenius_norm):  # the ways out that the message names
        assert float(estimate(K, method="hutchinson", num_passes=20, generator=generator)) > 0
    some = ntkops.ntk(model, x, outputs=[0, 3], engine=ntkops.Layerwise(max_backwards=7))
    assert some.diagonal().shape == (4,)
    assert K.matmul(torch.ones(16, 9).double()).shape == (16, 9)  # products go without cached factors
    wide_enough = ntkops.ntk(wide(), torch.ones(2, 3), engine=ntkops.Layerwise(max_backwards=2))
    assert wide_enough.diagonal().shape == (16,)


@pytest.mark.parametrize("limit", [0, -1, 2.5, True, "many"])
def test_a_limit_that_is_no_number_of_passes_is_refused(limit):
    with pytest.raises(ntkops.errors.InputError, match="max_backwards"):
        ntkops.Layerwise(max_backwards=limit)
