"""Numbers that neural-tangents 0.6.5 gave for a kernel of three layers, recorded once.

Its squared error is half the mean, so that its time is twice ours. Its integration of the cross-entropy ran
at tolerances of 1e-12; by itself it takes 1.4e-8.
"""

from pathlib import Path

import numpy as np
import pytest
import torch

import ntkops

FILE = Path(__file__).with_name("neural_tangents.npz")


@pytest.fixture(scope="module")
def recorded():
    with np.load(FILE) as found:
        return {name: torch.from_numpy(np.array(found[name])) for name in found.files}


@pytest.mark.parametrize("method", ["eigh", "krylov"])
def test_squared_error(recorded, method):
    path = ntkops.gradient_flow(
        recorded["ntk"],
        recorded["labels"],
        recorded["mse_times"] / 2,
        offset=recorded["start"],
        method=method,
        tol=1e-11,
    )
    torch.testing.assert_close(path.outputs, recorded["mse_train"], rtol=0, atol=1e-8)
    found = path.predict(recorded["ntk_cross"], offset=recorded["start_test"])
    torch.testing.assert_close(found, recorded["mse_test"], rtol=0, atol=1e-8)


def test_cross_entropy(recorded):
    path = ntkops.gradient_flow(
        recorded["ntk"],
        recorded["classes"],
        recorded["entropy_times"],
        loss="cross_entropy",
        offset=recorded["start"],
        tol=1e-9,
    )
    torch.testing.assert_close(path.outputs, recorded["entropy_train"], rtol=0, atol=1e-8)
    found = path.predict(recorded["ntk_cross"], offset=recorded["start_test"])
    torch.testing.assert_close(found, recorded["entropy_test"], rtol=0, atol=1e-8)


def test_ensembles(recorded):
    blocks = [[recorded["nngp_test"], recorded["nngp_cross"]], [recorded["nngp_cross"].T, recorded["nngp"]]]
    prior = torch.cat([torch.cat(row, dim=1) for row in blocks])
    times = torch.cat([recorded["ensemble_times"] / 2, torch.tensor([float("inf")])])
    path = ntkops.gradient_flow(recorded["ntk"], recorded["labels"], times)
    found = path.ensemble(prior, recorded["ntk_cross"])
    mean = torch.cat([recorded["ensemble_mean"], recorded["limit_mean"].unsqueeze(0)])
    covariance = torch.cat([recorded["ensemble_covariance"], recorded["limit_covariance"].unsqueeze(0)])
    torch.testing.assert_close(found.mean, mean, rtol=0, atol=1e-8)
    torch.testing.assert_close(found.variance(), covariance.diagonal(dim1=-2, dim2=-1), rtol=0, atol=1e-8)
    for place, t in enumerate(times.tolist()):
        torch.testing.assert_close(found.covariance(t).to_dense(), covariance[place], rtol=0, atol=1e-8)


def test_learning_rates(recorded):
    for name, momentum in (("rate", 0.0), ("rate_momentum", 0.9)):
        found = ntkops.max_learning_rate(recorded["ntk"], momentum=momentum, num_targets=3)
        assert 2 * float(found) == pytest.approx(float(recorded[name]), rel=1e-6)
