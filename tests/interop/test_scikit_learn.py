"""Kernel ridge regression under scikit-learn's own tools, with precomputed kernels."""

import numpy as np
import pytest
import torch
from torch import nn

import ntkops
from ntkops.regression import KernelRidge

base = pytest.importorskip("sklearn.base")
model_selection = pytest.importorskip("sklearn.model_selection")
pipeline = pytest.importorskip("sklearn.pipeline")
preprocessing = pytest.importorskip("sklearn.preprocessing")
kernel_ridge = pytest.importorskip("sklearn.kernel_ridge")


@pytest.fixture
def problem():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(3, 12), nn.Tanh(), nn.Linear(12, 1)).double()
    x, x_new = torch.randn(24, 3).double(), torch.randn(6, 3).double()
    K = ntkops.ntk(network, x)
    y = torch.sin(x.sum(1))
    return K, K.cross(x_new), y


def test_same_predictions_as_scikit_learn(problem):
    K, cross, y = problem
    ours = KernelRidge(0.3, relative=False).fit(K, y).predict(cross)
    theirs = kernel_ridge.KernelRidge(alpha=0.3, kernel="precomputed").fit(K.to_dense().numpy(), y.numpy())
    np.testing.assert_allclose(ours.numpy(), theirs.predict(cross.to_dense().numpy()), rtol=1e-9)


def test_clone_and_parameters():
    model = KernelRidge(0.1, relative=False)
    twin = base.clone(model.set_params(ridge=0.2))
    assert twin.get_params() == model.get_params() and twin is not model
    assert base.is_regressor(twin)


class TangentKernel(base.TransformerMixin, base.BaseEstimator):
    """Data to kernels with the data that it was fitted on: what stands before a precomputed kernel."""

    def __init__(self, network=None):
        self.network = network

    def fit(self, X, y=None):
        self.kernel_ = ntkops.ntk(self.network, torch.as_tensor(X))
        return self

    def transform(self, X):
        return self.kernel_.cross(torch.as_tensor(X)).to_dense()


def test_pipeline(problem):
    """scale -> kernel -> regression, fitted and scored by scikit-learn."""
    torch.manual_seed(1)
    network = nn.Sequential(nn.Linear(3, 12), nn.Tanh(), nn.Linear(12, 1)).double()
    X, X_new = np.random.default_rng(0).normal(size=(24, 3)), np.random.default_rng(1).normal(size=(6, 3))
    y = torch.sin(torch.as_tensor(X).sum(1))
    ridge = KernelRidge(0.1, relative=False)
    chain = pipeline.make_pipeline(preprocessing.StandardScaler(), TangentKernel(network), ridge)
    found = chain.fit(X, y).predict(X_new)
    scaler = preprocessing.StandardScaler().fit(X)
    J, J_new = (
        ntkops.jacobian(network, torch.as_tensor(scaler.transform(part))).to_dense() for part in (X, X_new)
    )
    K = J @ J.T + 0.1 * torch.eye(24, dtype=torch.float64)
    torch.testing.assert_close(found, J_new @ J.T @ torch.linalg.solve(K, y), rtol=1e-9, atol=1e-10)
    twin = base.clone(chain)
    assert twin.named_steps["kernelridge"].get_params() == ridge.get_params()


def test_grid_search_cuts_rows_and_columns(problem):
    """scikit-learn slices precomputed kernels on both sides because the tags say that they are pairwise."""
    K, _, y = problem
    dense = K.to_dense()
    folds = model_selection.KFold(4)
    grid = {"ridge": [1e-3, 1.0]}
    ours = model_selection.GridSearchCV(KernelRidge(relative=False), grid, cv=folds).fit(
        dense.numpy(), y.numpy()
    )
    theirs = model_selection.GridSearchCV(
        kernel_ridge.KernelRidge(kernel="precomputed"), {"alpha": [1e-3, 1.0]}, cv=folds
    ).fit(dense.numpy(), y.numpy())
    np.testing.assert_allclose(
        ours.cv_results_["mean_test_score"], theirs.cv_results_["mean_test_score"], rtol=1e-6
    )
    assert ours.best_params_["ridge"] == theirs.best_params_["alpha"]
