"""Partial traces: exact against dense references over every choice of axes; estimates unbiased, covered."""

import functools
import itertools
import math

import pytest
import scipy.stats
import torch
from linear_operator.operators import DenseLinearOperator

import ntkops
from ntkops.errors import (
    DenseMemoryError,
    InputError,
    NotConvergedWarning,
    OutOfRangeError,
    ShapeError,
    UnsupportedOperationError,
)
from ntkops.estimators.partial_trace import partial_trace
from tests.cases import BY_NAME
from tests.estimators.problems import OnlyProducts, generator
from tests.estimators.sampled import SampledDense

SHAPE = (4, 3, 2)
CHOICES = [c for k in (1, 2) for c in itertools.combinations(range(3), k)]
NAMES = ("samples", "time", "hidden")


def reference(matrix, shape, over):
    """The definition: pair the traced axes of rows and columns, letter by letter."""
    letters = "abcdef"[: len(shape)]
    other = "".join(a if i in over else a.upper() for i, a in enumerate(letters))
    kept = "".join(a for i, a in enumerate(letters) if i not in over)
    batch = matrix.shape[:-2]
    tensor = matrix.reshape(*batch, *shape, *shape)
    found = torch.einsum(f"...{letters}{other}->...{kept}{kept.upper()}", tensor)
    size = math.prod(shape[i] for i in range(len(shape)) if i not in over)
    return found.reshape(*batch, size, size)


def psd(n, rank=None, seed=0):
    root = torch.randn(n, rank or n, generator=generator(seed), dtype=torch.float64)
    return root @ root.mT


@pytest.mark.parametrize("over", CHOICES)
@pytest.mark.parametrize(
    "wrap", [lambda m: m, DenseLinearOperator, OnlyProducts], ids=["tensor", "dense", "products"]
)
def test_exact_for_any_operator(over, wrap):
    matrix = torch.randn(24, 24, generator=generator(1), dtype=torch.float64)
    result = partial_trace(wrap(matrix), over, shape=SHAPE, method="exact")
    assert result.exact and torch.allclose(result.value, reference(matrix, SHAPE, over), atol=1e-12)
    assert float(result.stderr.abs().max()) == 0 and result.value.shape == result.interval[0].shape


@functools.cache
def hidden_states(engine):
    """Return the kernel of hidden states over time, lazy, and its dense matrix."""
    case = BY_NAME["gru-time"]
    model, x = case.make(), case.data(5)
    lazy = ntkops.ntk(model, x, engine=engine, max_dense_bytes=0, **case.options)
    return lazy, ntkops.ntk(model, x, engine="autograd", **case.options).to_dense()


@pytest.mark.parametrize("over", CHOICES)
@pytest.mark.parametrize("engine", ["auto", "autograd"])
def test_exact_for_hidden_states_over_time(over, engine):
    K, dense = hidden_states(engine)
    shape = (5, *K.output_shape)
    named = tuple(NAMES[i] for i in over)
    result = partial_trace(K, named, axes=NAMES[1:])
    assert result.exact and result.passes > 0
    torch.testing.assert_close(result.value, reference(dense, shape, over).double(), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("name", ["mlp", "conv", "tied", "attention"])
def test_over_outputs_and_over_samples(name):
    case = BY_NAME[name]
    model, x = case.make(), case.data(6)
    K = ntkops.ntk(model, x, max_dense_bytes=0, **case.options)
    dense = ntkops.ntk(model, x, **case.options).to_dense().double()
    outputs = K.num_outputs
    traced = ntkops.ntk(model, x, outputs="trace", **case.options).to_dense().double()
    torch.testing.assert_close(partial_trace(K, "outputs").value, traced, rtol=1e-9, atol=1e-11)
    between = partial_trace(K, "samples")
    torch.testing.assert_close(between.value, reference(dense, (6, outputs), (0,)), rtol=1e-9, atol=1e-11)
    assert between.passes <= outputs


def test_chosen_outputs_and_the_batch_of_classes():
    case = BY_NAME["mlp"]
    model, x = case.make(), case.data(6)
    each = ntkops.ntk(model, x, outputs=[1], max_dense_bytes=0)
    dense = ntkops.ntk(model, x, outputs=[1]).to_dense()
    torch.testing.assert_close(partial_trace(each, "outputs").value, dense.double())
    batch = torch.stack([psd(12, seed=s) for s in range(2)])
    found = partial_trace(batch, 1, shape=(4, 3)).value
    torch.testing.assert_close(found, reference(batch, (4, 3), (1,)))


def test_stored_dense_kernels_cost_nothing():
    case = BY_NAME["mlp"]
    K = ntkops.ntk(case.make(), case.data(6))
    dense = K.to_dense()
    result = partial_trace(K, "samples")
    assert result.passes == 0
    torch.testing.assert_close(result.value, reference(dense, (6, 2), (0,)).double())


def test_recurrent_estimates_over_time_from_shared_probes():
    K, _ = hidden_states("auto")
    truth = partial_trace(K, "time", axes=NAMES[1:], method="exact").value
    results = [
        partial_trace(K, "time", axes=NAMES[1:], method="hutchinson", num_passes=6, generator=generator(s))
        for s in range(30)
    ]
    assert all(r.passes == 6 and r.method == "hutchinson" for r in results)  # two probes, three hidden units
    _no_bias(results, truth)


def _no_bias(results, truth):
    values = torch.stack([r.value for r in results])
    spread = values.std(0) / len(values) ** 0.5
    assert ((values.mean(0) - truth).abs() <= 5 * spread + 1e-10).all()


@pytest.mark.parametrize(
    "method, over", [("hutchinson", o) for o in CHOICES] + [("stratified", o) for o in CHOICES if 0 in o]
)
def test_estimates_are_unbiased_and_exact_with_all_probes(method, over):
    matrix = psd(24, 5)
    K = SampledDense(matrix, 4)
    shape = (4, 6) if method == "stratified" and over == (0,) else SHAPE
    truth = reference(matrix, shape, over)
    options = {"shape": shape, "method": method}
    all_of_them = 6 if method == "stratified" else math.prod(shape[i] for i in over)
    unit = partial_unit(K, shape, over, method)
    results = [
        partial_trace(K, over, num_passes=2 * unit, generator=generator(s), **options) for s in range(120)
    ]
    if not results[0].exact:
        _no_bias(results, truth)
    full = partial_trace(K, over, num_passes=all_of_them * unit, **options)
    torch.testing.assert_close(full.value, truth, rtol=1e-9, atol=1e-9)


def partial_unit(K, shape, over, method):
    size = math.prod(shape[i] for i in range(len(shape)) if i not in over)
    if method == "stratified":
        return 1
    return size if 0 in over else size // shape[0]


@pytest.mark.parametrize("method, axis", [("hutchinson", 1), ("stratified", 0)])
def test_entries_and_norm_are_covered(method, axis):
    matrix = psd(20 * 6, 30)
    K, truth = SampledDense(matrix, 20), reference(matrix, (20, 6), (axis,))
    inside, within = [], 0
    for seed in range(120):
        result = partial_trace(K, axis, shape=(20, 6), method=method, num_passes=4, generator=generator(seed))
        low, high = result.interval
        inside.append(((low <= truth) & (truth <= high)).double().mean())
        width = (high - result.value).norm()
        within += bool((result.value - truth).norm() <= width)
    assert float(torch.stack(inside).mean()) > 0.93
    assert scipy.stats.binom.cdf(within, 120, 0.95) > 1e-3, within


def test_a_tolerance_is_relative_in_the_frobenius_norm():
    matrix = psd(30 * 8, 40)
    K, truth = SampledDense(matrix, 30), reference(matrix, (30, 8), (0,))
    hits = 0
    for seed in range(20):
        result = partial_trace(
            K, "samples", shape=(30, 8), method="stratified", rtol=0.3, generator=generator(seed)
        )
        assert result.converged
        hits += bool((result.value - truth).norm() <= 0.3 * truth.norm())
    assert scipy.stats.binom.cdf(hits, 20, 0.95) > 1e-3
    with pytest.warns(NotConvergedWarning, match="raise num_passes"):
        result = partial_trace(
            OnlyProducts(matrix), "samples", shape=(30, 8), rtol=1e-3, num_passes=80, method="hutchinson"
        )
    assert not result.converged and result.passes <= 80


def test_one_probe_has_no_error_bar():
    matrix = psd(24)
    result = partial_trace(
        SampledDense(matrix, 4), "outputs", shape=(4, 6), method="hutchinson", num_passes=1
    )
    assert result.passes == 1 and torch.isinf(result.stderr).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scale", [1e-20, 1e18])
def test_scales(dtype, scale):
    matrix = psd(24, 3).to(dtype) * scale
    for method, over in [("exact", 0), ("hutchinson", 1), ("stratified", 0)]:
        result = partial_trace(
            SampledDense(matrix, 4),
            over,
            shape=(4, 6),
            method=method,
            num_passes=None if method == "exact" else 4,
            generator=generator(0),
        )
        assert torch.isfinite(result.value).all() and torch.isfinite(result.stderr).all()


@pytest.mark.parametrize(
    "options, error, message",
    [
        ({"over": ()}, InputError, "traces nothing"),
        ({"over": ("samples", "outputs")}, InputError, "use ntkops.trace"),
        ({"over": "time"}, InputError, "other names are given in axes"),
        ({"over": 5}, OutOfRangeError, "has 3 axes"),
        ({"over": (1.5,)}, InputError, "names or positions"),
        ({"over": 0, "axes": ("time",)}, InputError, "name each of the 2 axes"),
        ({"over": 0, "axes": ("a", "a")}, InputError, "must differ"),
        ({"over": 0, "shape": (5, 5)}, ShapeError, "25 entries"),
        ({"over": 0, "shape": (24,)}, InputError, "single axis"),
        ({"over": 0, "shape": (-4, -6)}, InputError, "positive integers"),
        ({"over": 0, "shape": None}, InputError, "pass shape="),
        ({"over": 1, "method": "stratified"}, UnsupportedOperationError, "keeps them"),
        ({"over": 0, "method": "stratified"}, UnsupportedOperationError, "sample by sample"),
    ],
)
def test_bad_arguments(options, error, message):
    options = {"shape": SHAPE, **options}
    with pytest.raises(error, match=message):
        partial_trace(psd(24), **options)


def test_a_result_above_the_limit_is_refused_before_any_work():
    model = torch.nn.Linear(2, 3)
    K = ntkops.ntk(model, torch.randn(5000, 2), max_dense_bytes=0)
    with (
        ntkops.count_passes() as passes,
        pytest.raises(DenseMemoryError, match="5000 x 5000 entries"),
    ):
        partial_trace(K)  # over the outputs: the kernel between samples
    assert passes.count.total == 0
    assert partial_trace(K, "samples").value.shape == (3, 3)
