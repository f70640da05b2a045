"""SciPy's solvers on lazy kernels and Jacobians, against dense linear algebra."""

import numpy as np
import pytest
import scipy.linalg
import scipy.sparse.linalg as sparse
import torch
from torch import nn

import ntkops
from ntkops.operators.expression import to_scipy


@pytest.fixture
def problem():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 2)).double()
    x = torch.randn(7, 3, dtype=torch.float64)
    J = ntkops.jacobian(model, x, max_dense_bytes=0)
    dense = ntkops.jacobian(model, x).to_dense().numpy()
    return ntkops.ntk(model, x, max_dense_bytes=0), J, dense


def test_eigsh(problem):
    K, _, dense = problem
    values, vectors = sparse.eigsh(K.to_scipy(), k=4, v0=np.ones(len(dense)))
    expected = scipy.linalg.eigvalsh(dense @ dense.T)[-4:]
    np.testing.assert_allclose(np.sort(values), expected, rtol=1e-10)
    np.testing.assert_allclose(dense @ (dense.T @ vectors), vectors * values, atol=1e-9 * expected[-1])


def test_cg(problem):
    K, _, dense = problem
    y = np.linspace(-1.0, 1.0, len(dense))
    found, info = sparse.cg(to_scipy(K.add_jitter(0.1)), y, rtol=1e-12, maxiter=500)
    assert info == 0
    np.testing.assert_allclose(found, np.linalg.solve(dense @ dense.T + 0.1 * np.eye(len(y)), y), rtol=1e-9)


def test_lsmr(problem):
    _, J, dense = problem
    y = np.linspace(-1.0, 1.0, len(dense))
    found = sparse.lsmr(J.to_scipy(), y, damp=0.3, atol=1e-14, btol=1e-14, maxiter=500)[0]
    gram = dense.T @ dense + 0.09 * np.eye(dense.shape[1])
    np.testing.assert_allclose(found, np.linalg.solve(gram, dense.T @ y), rtol=1e-7, atol=1e-9)


def test_svds(problem):
    _, J, dense = problem
    left, values, right = sparse.svds(J.to_scipy(), k=3, v0=np.ones(min(dense.shape)))
    order = np.argsort(values)
    np.testing.assert_allclose(values[order], scipy.linalg.svdvals(dense)[2::-1], rtol=1e-10)
    np.testing.assert_allclose(dense @ right.T, left * values, atol=1e-9 * values.max())


def test_aslinearoperator_algebra(problem):
    """SciPy's own sums and products of operators, and blocks of vectors."""
    K, J, dense = problem
    block = np.random.default_rng(0).standard_normal((len(dense), 3))
    composed = J.to_scipy() @ J.to_scipy().T
    np.testing.assert_allclose(composed @ block, dense @ dense.T @ block, rtol=1e-10)
    np.testing.assert_allclose((2 * K.to_scipy() - composed) @ block, dense @ dense.T @ block, rtol=1e-9)
    assert K.to_scipy().dtype == np.float64
