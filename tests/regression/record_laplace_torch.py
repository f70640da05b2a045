"""Record what laplace-torch says of two small networks; run by hand where it is installed.

``python tests/regression/record_laplace_torch.py`` writes laplace_torch.npz beside this file. The
networks are made of stored weights, so that the tests need neither laplace-torch nor its random numbers.
"""

from pathlib import Path

import numpy as np
import torch
from laplace import FunctionalLaplace, Laplace
from torch.utils.data import DataLoader, TensorDataset

PRECISIONS = (0.3, 1.0, 20.0)


def network(outputs):
    torch.manual_seed(outputs)
    return torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.Tanh(), torch.nn.Linear(8, outputs)).double()


def train(model, x, y, loss, decay):
    # Not to the end: what is recorded holds at any weights.
    optimizer = torch.optim.Adam(model.parameters(), lr=0.03)
    for _ in range(80):
        optimizer.zero_grad()
        penalty = decay / 2 * sum(p.square().sum() for p in model.parameters())
        (loss(model(x), y) + penalty).backward()
        optimizer.step()


def record(found, name, model, x, y, x_new, likelihood, **options):
    loader = DataLoader(TensorDataset(x, y), batch_size=len(x))
    found |= {f"{name}_{key}": p.detach().numpy() for key, p in model.state_dict().items()}
    found |= {f"{name}_x": x.numpy(), f"{name}_y": y.numpy(), f"{name}_x_new": x_new.numpy()}
    full = Laplace(model, likelihood, "all", "full", **options)
    full.fit(loader)
    for number, delta in enumerate(PRECISIONS):
        full.prior_precision = delta
        mean, covariance = full._glm_predictive_distribution(x_new, joint=True)
        found[f"{name}_mean"] = mean.detach().numpy().reshape(len(x_new), -1)
        found[f"{name}_covariance_{number}"] = covariance.detach().numpy()
        found[f"{name}_evidence_{number}"] = full.log_marginal_likelihood().detach().numpy()
        found[f"{name}_likelihood"] = np.array(float(full.log_likelihood))


def record_functional(found, name, model, x, y, x_new, likelihood, **options):
    """Its route over outputs, which takes the diagonal of each sample's Hessian and inverts it."""
    functional = FunctionalLaplace(
        model, likelihood, n_subset=len(x), prior_precision=1.0, independent_outputs=False, **options
    )
    functional.fit(DataLoader(TensorDataset(x, y), batch_size=len(x)))
    _, variance = functional._glm_predictive_distribution(x_new)
    found[f"{name}_functional_variance"] = variance.detach().numpy()
    found[f"{name}_functional_evidence"] = functional.log_marginal_likelihood().detach().numpy()


def main():
    torch.set_default_dtype(torch.float64)  # the Hessian and the prior are made in the default dtype
    generator = torch.Generator().manual_seed(0)
    x, x_new = (torch.randn(n, 3, generator=generator).double() for n in (30, 6))
    classes = (x[:, 0] + 0.3 * x[:, 1] ** 2 > 0.2).long() + (x[:, 2] > 0.8).long()
    numbers = torch.stack([x[:, 0] * x[:, 1], x[:, 2].sin()], dim=1)
    numbers = numbers + 0.3 * torch.randn(30, 2, generator=generator).double()
    found = {"precisions": np.array(PRECISIONS)}
    model = network(3)
    train(model, x, classes, torch.nn.CrossEntropyLoss(reduction="sum"), 1.0)
    record(found, "classes", model, x, classes, x_new, "classification")
    record_functional(found, "classes", model, x, classes, x_new, "classification")
    model = network(2)
    train(model, x, numbers, lambda f, y: 0.5 * (f - y).square().sum() / 0.3**2, 1.0)
    record(found, "numbers", model, x, numbers, x_new, "regression", sigma_noise=0.3)
    record_functional(found, "numbers", model, x, numbers, x_new, "regression", sigma_noise=0.3)
    np.savez_compressed(Path(__file__).with_name("laplace_torch.npz"), **found)
    for key, value in found.items():
        print(key, value.shape, value.dtype)


if __name__ == "__main__":
    main()
