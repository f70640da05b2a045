"""On digits: what the fits and the syntheses are worth for a small network."""

import pytest
import torch
from torch import nn

import ntkops
from ntkops.distill import select, synthesize
from ntkops.regression import KernelRidge

from .problems import generator

datasets = pytest.importorskip("sklearn.datasets")


@pytest.fixture(scope="module")
def digits():
    """Class kernels of 150 samples, cross kernels of 400, the network's outputs at both."""
    images, numbers = datasets.load_digits(return_X_y=True)
    x, y = torch.tensor(images) / 16, torch.tensor(numbers)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(64, 24), nn.Tanh(), nn.Linear(24, 10)).double()
        order = torch.randperm(len(y))
    x, y = x[order], y[order]
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(120):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x[:1000]), y[:1000]).backward()
        optimizer.step()
    kernel = ntkops.ntk(model, x[:150], outputs="each")
    outputs = model(x).detach()
    return kernel.to_dense(), kernel.cross(x[1000:1400]).to_dense(), outputs[:150], outputs[1000:1400]


def fidelity(predictions, outputs):
    return float((predictions.argmax(-1) == outputs.argmax(-1)).double().mean())


def test_all_labels_are_worth_more_than_those_of_the_chosen_points(digits):
    K, cross, Y, outputs = digits
    gains = []
    for seed in range(4):
        chosen = select(K, 10, "random", generator=generator(seed))
        nystrom, sketch = (
            fidelity(chosen.fit(K, Y, fit=f).predict(cross), outputs) for f in ("nystrom", "sketch")
        )
        gains.append(nystrom - sketch)
    assert sum(gains) / 4 >= 0.10


def test_few_combinations_for_all_classes(digits):
    K, cross, Y, outputs = digits
    full = fidelity(KernelRidge(1e-4).fit(K, Y).predict(cross), outputs)
    found = {
        method: fidelity(
            synthesize(K, 5, method, Y=Y, generator=generator()).fit(K, Y).predict(cross), outputs
        )
        for method in ("pca", "krylov", "als")
    }
    assert full > 0.95
    assert found["als"] > 0.9 > max(found["pca"], found["krylov"])
