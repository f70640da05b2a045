"""Sub-kernels by indices of every kind, and the one kernel that is known by its formula.

What else holds for every kernel is in tests/laws and tests/architectures.
"""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import ntkops
from tests.architectures.profiles import LAWS as RUN

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


@RUN
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


@RUN
@given(st.integers(1, 4), st.integers(1, 5), st.integers(1, 4), st.integers(0, 1000))
def test_a_linear_model_has_the_gram_kernel(features, count, outputs, seed):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = nn.Linear(features, outputs, bias=False).double()
        x = torch.randn(count, features, dtype=torch.float64)
    expected = torch.kron(x @ x.T, torch.eye(outputs, dtype=torch.float64))
    torch.testing.assert_close(ntkops.ntk(model, x).to_dense(), expected)
