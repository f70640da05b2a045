"""Projected features as data attribution stores them: written once, mapped into memory, same kernel."""

import pytest
import torch
from safetensors import safe_open
from torch import nn

import ntkops
from ntkops import checkpoint
from ntkops.errors import CheckpointError
from ntkops.projections import Rademacher


@pytest.fixture
def kernel():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 2)).double()
    K = ntkops.ntk(network, torch.randn(6, 3).double())
    projected = ntkops.projected_ntk(K, Rademacher(K.left.shape[-1], 20, seed=3))
    return network, K, projected, torch.randn(4, 3).double()


def prints(network):
    return checkpoint.fingerprint(
        parameters=dict(network.named_parameters()), projection=("rademacher", 20, 3)
    )


def test_features_from_a_mapped_file_give_the_same_kernel(kernel, tmp_path):
    network, _, projected, x_new = kernel
    place = tmp_path / "features.safetensors"
    features = projected.features()
    checkpoint.save(place, {"features": features}, {"k": 20, "seed": 3}, prints(network), kind="features")
    found = checkpoint.load(place, prints(network), kind="features")
    assert torch.equal(found.tensors["features"], features)
    with safe_open(place, framework="pt") as file:  # any reader of the format, mapped, a few rows at a time
        mapped = torch.cat([file.get_slice("features")[start : start + 5] for start in range(0, 12, 5)])
    assert torch.equal(mapped, features)
    torch.testing.assert_close(mapped @ mapped.T, projected.to_dense(), rtol=1e-12, atol=1e-12)
    # new samples are scored against the stored features alone
    crossed = projected.cross(x_new)
    new = crossed.left.to_dense()
    torch.testing.assert_close(new @ mapped.T, crossed.to_dense(), rtol=1e-12, atol=1e-12)


def test_features_of_other_parameters_are_refused(kernel, tmp_path):
    network, _, projected, _ = kernel
    place = tmp_path / "features.safetensors"
    checkpoint.save(place, {"features": projected.features()}, {}, prints(network), kind="features")
    with torch.no_grad():
        network[0].weight.add_(1e-9)
    with pytest.raises(CheckpointError, match="parameters"):
        checkpoint.load(place, prints(network), kind="features")
