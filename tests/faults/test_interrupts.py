"""Interrupts, threads, copies and forked workers: everything stays as it was, and results stay right."""

from __future__ import annotations

import contextlib
import copy
import itertools
import pickle
import random
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

import ntkops
from ntkops.engines.memory import _guarded
from ntkops.model import Linearization
from ntkops.model.context import _FULL_MATMUL, _MATH_ATTENTION, _NO_FAST_PATH
from tests.cases import BY_NAME

NAMES = ["mlp", "shared", "conv", "gru-time", "attention", "weight-norm", "old-style"]
ENGINES = ["autograd", "layerwise"]
IN_TURN = pytest.mark.parametrize(
    ("name", "engine"), list(zip(NAMES, itertools.cycle(ENGINES), strict=False))
)
CALLS = {
    "product": lambda K, v: K @ v,
    "transposed product": lambda K, v: K.left.mT @ v,
    "dense": lambda K, v: K.to_dense(),
    "diagonal": lambda K, v: K.diagonal(),
    "trace": lambda K, v: ntkops.trace(K, method="exact").value,
    "cross": lambda K, v: K.cross(K._core.rows.inputs.select(torch.arange(2))) @ v,
}


def _modes():
    return (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.get_float32_matmul_precision(),
        torch.backends.mha.get_fastpath_enabled(),
        torch.backends.cuda.flash_sdp_enabled(),
        torch._C._get_mkldnn_enabled(),
        torch.is_autocast_enabled("cpu"),
        torch._C._functorch.peek_interpreter_stack(),
        [switch._depth for switch in (_FULL_MATMUL, _MATH_ATTENTION, _NO_FAST_PATH)],
        _guarded.get(),
    )


def _randomness():
    return torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist()


def _model_state(model):
    tensors = {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers())}
    return (
        {name: (id(t), t.detach().clone(), t.requires_grad, t._version) for name, t in tensors.items()},
        [m.training for m in model.modules()],
        [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()],
    )


def _assert_same(before, after):
    assert before[1:] == after[1:] and before[0].keys() == after[0].keys()
    for name, (identity, value, needs, version) in before[0].items():
        other = after[0][name]
        assert identity == other[0] and torch.equal(value, other[1])
        assert (needs, version) == (other[2], other[3])


@contextlib.contextmanager
def interrupt_in_pass(monkeypatch, number, inside):
    """Interrupt the given pass, before the model runs or after it."""
    function, passes = Linearization.function, []

    def limited(self, params, batch):
        passes.append(1)
        if len(passes) == number and not inside:
            raise KeyboardInterrupt
        result = function(self, params, batch)
        if len(passes) == number:
            raise KeyboardInterrupt
        return result

    with monkeypatch.context() as patch:
        patch.setattr(Linearization, "function", limited)
        yield passes


@IN_TURN
def test_an_interrupt_leaves_everything_as_it_was(monkeypatch, name, engine):
    case = BY_NAME[name]
    model, x = case.make(), case.data(4)
    reference = ntkops.ntk(model, x, engine="autograd", **case.options)
    dense, J = reference.to_dense(), reference.left.to_dense()
    v = torch.linspace(-1, 1, len(dense), dtype=torch.float64).unsqueeze(-1)
    expected = {
        "product": dense @ v,
        "transposed product": J.mT @ v,
        "dense": dense,
        "diagonal": dense.diagonal(),
        "trace": dense.trace(),
        "cross": dense[: len(dense) // 2] @ v,
    }
    before, modes, drawn = _model_state(model), _modes(), _randomness()
    # Every call of either engine meets every moment in turn: of its names, three numbers differ modulo 3.
    for turn, (what, call) in enumerate(CALLS.items(), NAMES.index(name)):
        number, inside = [(1, False), (1, True), (2, False)][turn % 3]
        K = ntkops.ntk(model, x, engine=engine, batch_size=2, **case.options)
        with (
            interrupt_in_pass(monkeypatch, number, inside) as passes,
            contextlib.suppress(KeyboardInterrupt),
        ):
            call(K, v)
        assert passes
        assert _modes() == modes and _randomness() == drawn
        _assert_same(before, _model_state(model))
        torch.testing.assert_close(call(K, v), expected[what])
        torch.testing.assert_close(call(K, v), expected[what])  # from caches


def test_an_interrupt_inside_the_model_itself():
    model, x, armed = BY_NAME["mlp"].make(), BY_NAME["mlp"].data(4), [False]

    def forward(params, inputs):
        if armed[0]:
            raise KeyboardInterrupt
        return torch.func.functional_call(model, params, (inputs,))

    parameters = dict(model.named_parameters())
    K = ntkops.ntk(forward, x, params=parameters, engine="autograd", max_dense_bytes=0)
    modes, v = _modes(), torch.ones(8, dtype=torch.float64)
    expected = K @ v
    armed[0] = True
    for call in (lambda: ntkops.ntk(forward, x, params=parameters), lambda: K @ v, K.diagonal):
        with pytest.raises(KeyboardInterrupt):
            call()
        assert _modes() == modes
    armed[0] = False
    torch.testing.assert_close(K @ v, expected)
    torch.testing.assert_close(ntkops.ntk(model, x) @ v, expected)


# threads


@IN_TURN
def test_threads_on_one_operator(name, engine):
    case = BY_NAME[name]
    K = ntkops.ntk(case.make(), case.data(4), engine=engine, **case.options)
    dense = ntkops.ntk(case.make(), case.data(4), engine="autograd", **case.options).to_dense()
    v = torch.linspace(-1, 1, len(dense), dtype=torch.float64).unsqueeze(-1)
    modes = _modes()

    def work(number):
        if number % 7 == 0:
            K.free()
        if number % 3 == 0:
            return K @ v, dense @ v
        if number % 3 == 1:
            return K.diagonal(), dense.diagonal()
        return K[1:, :2].to_dense(), dense[1:, :2]

    with ThreadPoolExecutor(4) as pool:
        for found, expected in pool.map(work, range(22)):
            torch.testing.assert_close(found, expected)
    assert _modes() == modes


@pytest.mark.parametrize("name", ["shared", "conv", "gru-time"])
def test_threads_that_build_operators_of_one_model(name):
    case = BY_NAME[name]
    model, x = case.make(), case.data(4)
    expected = ntkops.ntk(model, x, **case.options).to_dense()
    before, modes = _model_state(model), _modes()
    with ThreadPoolExecutor(3) as pool:
        for found in pool.map(lambda _: ntkops.ntk(model, x, **case.options).to_dense(), range(12)):
            torch.testing.assert_close(found, expected)
    _assert_same(before, _model_state(model))
    assert _modes() == modes


def test_estimates_in_threads_are_those_of_their_seeds():
    case = BY_NAME["mlp"]
    K = ntkops.ntk(case.make(), case.data(12), max_dense_bytes=0)

    def estimate(seed):
        generator = torch.Generator().manual_seed(seed)
        return ntkops.trace(K, method="hutchinson", num_passes=20, generator=generator).value

    alone = [estimate(seed) for seed in range(8)]
    with ThreadPoolExecutor(4) as pool:
        for one, other in zip(alone, pool.map(estimate, range(8)), strict=True):
            torch.testing.assert_close(one, other)


# copies


@IN_TURN
def test_copies_of_operators_and_of_what_is_made_of_them(name, engine):
    case = BY_NAME[name]
    K = ntkops.ntk(case.make(), case.data(4), engine=engine, **case.options)
    J, A = K.left, K.add_jitter(0.5)
    for operator in (K, K[1:3], J, J.mT, 2 * K, A, K.cross(case.data(2, seed=3))):
        dense = operator.to_dense()
        for other in (pickle.loads(pickle.dumps(operator)), copy.deepcopy(operator)):
            assert type(other) is type(operator)
            torch.testing.assert_close(other.to_dense(), dense)
    single = K.to(torch.float32)
    assert single.dtype == torch.float32 and K.dtype == torch.float64
    torch.testing.assert_close(single.to_dense().double(), K.to_dense(), rtol=1e-4, atol=1e-4)


# forked workers


@pytest.mark.parametrize("engine", ENGINES)
def test_forked_workers_of_a_loader(engine):
    case = BY_NAME["mlp"]
    x = case.data(10)
    loader = DataLoader(
        TensorDataset(x), batch_size=4, num_workers=2, multiprocessing_context="fork", collate_fn=_stacked
    )
    expected = ntkops.ntk(case.make(), x).to_dense()
    modes, drawn = _modes(), _randomness()
    K = ntkops.ntk(case.make(), loader, engine=engine, max_dense_bytes=0)
    v = torch.ones(20, 1, dtype=torch.float64)
    torch.testing.assert_close(K @ v, expected @ v)
    torch.testing.assert_close(K.diagonal(), expected.diagonal())
    assert _modes() == modes and _randomness() == drawn


def _stacked(rows):
    return torch.stack([row[0] for row in rows])
