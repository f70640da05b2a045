"""The kernel's picture of a trained network: fidelity on digits with exact kernels."""

import pytest
import torch
from torch import nn

import ntkops
from ntkops.regression import KernelRidge, metrics

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def digits():
    datasets = pytest.importorskip("sklearn.datasets")
    images, truth = datasets.load_digits(return_X_y=True)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    x = (torch.from_numpy(images) / 16).float()[order].reshape(-1, 1, 8, 8)
    y = torch.from_numpy(truth)[order]
    return x[:1197], y[:1197], x[1197:], y[1197:]


def convolutional():
    layers, channels = [], 1
    for width, stride in ((16, 1), (32, 2), (32, 1)):
        layers += [nn.Conv2d(channels, width, 3, stride, 1), nn.BatchNorm2d(width), nn.ReLU()]
        channels = width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 10))


def dense():
    return nn.Sequential(
        nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10)
    )


def trained(build, x, y, seed, epochs):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = build()
        optimiser = torch.optim.Adam(model.parameters(), lr=3e-3)
        for _ in range(epochs):
            for batch in torch.randperm(len(x)).split(64):
                optimiser.zero_grad()
                nn.functional.cross_entropy(model(x[batch]), y[batch]).backward()
                optimiser.step()
    return model.eval()


@pytest.mark.parametrize("build, epochs", [(convolutional, 12), (dense, 25)])
@pytest.mark.parametrize("seed", [0, 1])
def test_fidelity_to_the_network(digits, build, epochs, seed):
    x, y, x_test, y_test = digits
    model = trained(build, x, y, seed, epochs)
    z = x[:500]
    with torch.no_grad():
        logits, logits_test = model(z), model(x_test)
    K = ntkops.ntk(model, z, outputs="each")
    fitted = KernelRidge(1e-4).fit(K, logits)
    predictions = fitted.predict(K.cross(x_test))
    fidelity = metrics.fidelity(predictions, logits_test)
    accuracy, of_network = metrics.accuracy(predictions, y_test), metrics.accuracy(logits_test, y_test)
    error = metrics.mean_squared_error(predictions, logits_test)
    left_out = fitted.leave_one_out().mean_squared_error
    print(
        f"{build.__name__} {seed}: fidelity {fidelity:.4f}, accuracy {accuracy:.3f} (network "
        f"{of_network:.3f}), mse {error:.3f}, leave-one-out mse {left_out:.3f}"
    )
    assert of_network >= 0.96
    assert fidelity >= 0.985
    assert abs(accuracy - of_network) <= 0.012
    assert 0.3 * error < left_out < 3 * error
