"""Laws that hold for every kernel: adjoints, linearity, definiteness, order, additivity, sub-kernels."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import ntkops

pytestmark = pytest.mark.long

ACTIVATIONS = {"tanh": nn.Tanh, "relu": nn.ReLU, "gelu": nn.GELU, "softplus": nn.Softplus}


@st.composite
def settings_of_a_kernel(draw):
    """A small random network, samples, and the choices that must not change any result."""
    sizes = draw(st.lists(st.integers(1, 5), min_size=2, max_size=4))
    activation = ACTIVATIONS[draw(st.sampled_from(sorted(ACTIVATIONS)))]
    seed = draw(st.integers(0, 2**16))
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        layers = []
        for a, b in zip(sizes[:-1], sizes[1:], strict=True):
            layers += [nn.Linear(a, b, bias=draw(st.booleans())), activation()]
        model = nn.Sequential(*layers[:-1]).double()
        x = torch.randn(draw(st.integers(1, 5)), sizes[0], dtype=torch.float64)
    knobs = {
        "batch_size": draw(st.sampled_from(["auto", 1, 2, 3])),
        "chunk_size": draw(st.sampled_from(["auto", 1, 2])),
        "max_dense_bytes": draw(st.sampled_from(["auto", 0])),
    }
    return model, x, knobs, seed


def vectors(rows, columns, seed):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def dense(model, x):
    """K by `torch.func.jacrev`, without ntkops."""
    params = dict(model.named_parameters())
    blocks = torch.func.jacrev(lambda p: torch.func.functional_call(model, p, (x,)))(params)
    J = torch.cat([b.flatten(2) for b in blocks.values()], dim=2).flatten(0, 1).detach()
    return J


@settings(max_examples=40, deadline=None)
@given(settings_of_a_kernel())
def test_adjoint_linearity_symmetry_and_definiteness(setting):
    model, x, knobs, seed = setting
    J = ntkops.jacobian(model, x, **knobs)
    K = ntkops.ntk(model, x, **knobs)
    n, parameters = J.shape
    u, p = vectors(n, 2, seed), vectors(parameters, 2, seed + 1)
    torch.testing.assert_close((u * (J @ p)).sum(), ((J.mT @ u) * p).sum())
    torch.testing.assert_close(K @ (2.0 * u[:, :1] - u[:, 1:]), 2.0 * (K @ u[:, :1]) - K @ u[:, 1:])
    torch.testing.assert_close(u[:, 0] @ (K @ u[:, 1]), u[:, 1] @ (K @ u[:, 0]))
    quadratic = (u * (K @ u)).sum(0)
    torch.testing.assert_close(quadratic, (J.mT @ u).square().sum(0))
    assert (quadratic >= 0).all()


@settings(max_examples=40, deadline=None)
@given(settings_of_a_kernel())
def test_products_blocks_and_trace_match_the_reference(setting):
    model, x, knobs, seed = setting
    reference = dense(model, x)
    K = ntkops.ntk(model, x, **knobs)
    v = vectors(len(reference), 3, seed)
    torch.testing.assert_close(K @ v, reference @ (reference.T @ v))
    torch.testing.assert_close(K.diagonal(), reference.square().sum(1))
    torch.testing.assert_close(float(K.diagonal().sum()), float(reference.square().sum()))
    torch.testing.assert_close(ntkops.ntk(model, x).to_dense(), reference @ reference.T)


@settings(max_examples=30, deadline=None)
@given(settings_of_a_kernel(), st.randoms(use_true_random=False))
def test_permuting_samples_permutes_the_kernel(setting, random):
    model, x, knobs, seed = setting
    order = list(range(len(x)))
    random.shuffle(order)
    outputs = dense(model, x[:1]).shape[0]
    rows = torch.tensor([i * outputs + o for i in order for o in range(outputs)])
    K, permuted = ntkops.ntk(model, x, **knobs), ntkops.ntk(model, x[order], **knobs)
    v = vectors(K.shape[0], 1, seed)
    torch.testing.assert_close(permuted @ v[rows], (K @ v)[rows])
    torch.testing.assert_close(K.submatrix(rows, rows) @ v, permuted @ v)


@settings(max_examples=30, deadline=None)
@given(settings_of_a_kernel())
def test_kernels_add_over_parameters_and_outputs(setting):
    model, x, knobs, seed = setting
    K = ntkops.ntk(model, x, **knobs)
    v = vectors(K.shape[0], 2, seed)
    parts = [ntkops.ntk(model, x, params=name, **knobs) for name, _ in model.named_parameters()]
    torch.testing.assert_close(sum(part @ v for part in parts), K @ v)
    each, traced = (ntkops.ntk(model, x, outputs=choice, **knobs) for choice in ("each", "trace"))
    w = vectors(len(x), 2, seed + 1)
    torch.testing.assert_close((each @ w).sum(0), traced @ w)
    for number in range(each.shape[0]):
        torch.testing.assert_close(ntkops.ntk(model, x, outputs=number, **knobs) @ w, each[number] @ w)


@settings(max_examples=40, deadline=None)
@given(settings_of_a_kernel(), st.data())
def test_indexing_agrees_with_the_dense_matrix(setting, data):
    model, x, knobs, seed = setting
    reference = dense(model, x)
    reference = reference @ reference.T
    K = ntkops.ntk(model, x, **knobs)
    n = len(reference)
    indices = st.lists(st.integers(-n, n - 1), min_size=1, max_size=6)
    rows, columns = data.draw(indices), data.draw(indices)
    grid = K.submatrix(rows, columns)
    v = vectors(len(columns), 2, seed)
    torch.testing.assert_close(grid @ v, reference[rows][:, columns] @ v)
    torch.testing.assert_close(
        grid.mT @ vectors(len(rows), 1, seed), reference[columns][:, rows] @ vectors(len(rows), 1, seed)
    )
    length = min(len(rows), len(columns))
    torch.testing.assert_close(K[rows[:length], columns[:length]], reference[rows[:length], columns[:length]])
    start, stop = sorted((data.draw(st.integers(0, n - 1)), data.draw(st.integers(1, n))))
    if start < stop:
        part = K[start:stop, start:stop]
        torch.testing.assert_close(
            part @ torch.ones(stop - start, 1, dtype=x.dtype),
            reference[start:stop, start:stop].sum(1, keepdim=True),
        )
        torch.testing.assert_close(part.diagonal(), reference[start:stop, start:stop].diagonal())
    torch.testing.assert_close(K[rows[0]], reference[rows[0]])


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 4), st.integers(1, 5), st.integers(1, 4), st.integers(0, 1000))
def test_a_linear_model_has_the_gram_kernel(features, count, outputs, seed):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = nn.Linear(features, outputs, bias=False).double()
        x = torch.randn(count, features, dtype=torch.float64)
    expected = torch.kron(x @ x.T, torch.eye(outputs, dtype=torch.float64))
    torch.testing.assert_close(ntkops.ntk(model, x).to_dense(), expected)
