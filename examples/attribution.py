"""Which training samples is a prediction made of, and what would it be without them?

Run as: python examples/attribution.py
"""

from __future__ import annotations

import tempfile

import torch
from torch import Tensor, nn
from torch.func import functional_call

import ntkops

CLASSES = 3


def spirals(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Return points on three arms, and the arm of each."""
    draw = torch.Generator().manual_seed(seed)
    label = torch.arange(count) % CLASSES
    radius = torch.rand(count, generator=draw)
    angle = 2 * torch.pi * label / CLASSES + 3 * radius + 0.2 * torch.randn(count, generator=draw)
    return torch.stack([radius * angle.cos(), radius * angle.sin()], dim=1).double(), label


def train(x: Tensor, y: Tensor, seed: int) -> nn.Module:
    """Return a small classifier."""
    torch.manual_seed(seed)
    network = nn.Sequential(nn.Linear(2, 32), nn.Tanh(), nn.Linear(32, CLASSES)).double()
    optimizer = torch.optim.Adam(network.parameters(), lr=0.02)
    for _ in range(200):
        optimizer.zero_grad()
        nn.functional.cross_entropy(network(x), y).backward()
        optimizer.step()
    return network


def exact(x: Tensor, y: Tensor, x_new: Tensor) -> None:
    """Leave groups out of the network that is linearised and trained to the end, in closed form."""
    network = train(x, y, 0)
    K = ntkops.ntk(network, x)
    targets = torch.nn.functional.one_hot(y, CLASSES).double()
    fitted = ntkops.KernelRidge(1e-3, offset="network").fit(K, targets)
    predict = fitted.predictor()  # one directional derivative a sample
    groups = [list(range(start, start + 10)) for start in range(0, len(x), 10)]
    left = fitted.leave_out(groups)
    moved = (predict(x_new) - left.predict(K.cross(x_new))).flatten(1).norm(dim=1)
    print(f"predictions: {tuple(predict(x_new).shape)}, from {predict.num_jvps} jvp a sample")
    print(f"a group of ten moves them by {float(moved.min()):.3f} to {float(moved.max()):.3f}")
    change = fitted.weights()
    size = sum(float(part.square().sum()) for part in change.values()) ** 0.5
    print(f"|Δθ| = {size:.3f} in {', '.join(change)}")


def margin(network: nn.Module):
    """Return log p / (1 - p) of the label, as a function of parameters and samples."""

    def state(params: dict[str, Tensor], inputs: tuple[Tensor, Tensor]) -> Tensor:
        x, y = inputs
        logits = functional_call(network, params, (x,))
        own = logits.gather(1, y[:, None])
        return own - logits.scatter(1, y[:, None], -torch.inf).logsumexp(1, keepdim=True)

    return state


def estimated(x: Tensor, y: Tensor, x_new: Tensor, y_new: Tensor) -> None:
    """Score training samples as TRAK does, from features in files, over three networks."""
    trained, tested, weights = [], [], []
    with tempfile.TemporaryDirectory() as folder:
        for seed in range(3):
            network = train(x, y, seed)
            params = {name: p.detach() for name, p in network.named_parameters()}
            count = sum(p.numel() for p in params.values())
            projection = ntkops.projections.Rademacher(count, 64, seed=seed)
            for found, inputs, name in ((trained, (x, y), "train"), (tested, (x_new, y_new), "new")):
                path = f"{folder}/{name}{seed}"
                found.append(
                    ntkops.gradient_features(margin(network), inputs, projection, path, params=params)
                )
            with torch.no_grad():
                weights.append(1 - network(x).softmax(1).gather(1, y[:, None])[:, 0])
        scores = ntkops.influence(trained, tested, ridge=1e-3, weights=weights)  # (M, N)
    top = scores.argsort(dim=1, descending=True)[:, :10]
    same = (y[top] == y_new[:, None]).double().mean()
    print(f"of the ten samples that help a new one most {float(same):.0%} have its label, a third by chance")


def main() -> None:
    x, y = spirals(120, 1)
    x_new, y_new = spirals(30, 2)
    exact(x, y, x_new)
    estimated(x, y, x_new, y_new)


if __name__ == "__main__":
    main()
