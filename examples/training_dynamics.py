"""A convolution network on digits beside its linearisation, along training.

Run it with ``python examples/training_dynamics.py``. Both are trained by full-batch gradient descent from the
same weights with the same learning rate: the network by torch.optim.SGD, its linearisation by
`ntkops.gradient_descent`, which takes a few dozen products with the kernel for any number of steps.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import ntkops
from ntkops.plotting import plot_losses, plot_outputs

__all__ = ["compare", "draw", "main"]


def digits(train: int, test: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return images and labels: those of training, then those of the test."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))[: train + test]
    x = (torch.from_numpy(images)[order] / 16).reshape(-1, 1, 8, 8)
    y = torch.from_numpy(labels)[order]
    return x[:train], y[:train], x[train:], y[train:]


def network(channels: int) -> nn.Sequential:
    """Return a convolution network with ten outputs."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, channels, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(channels, channels, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(16 * channels, 10),
    ).double()


def train(
    model: nn.Module, x: Tensor, Y: Tensor, x_new: Tensor, steps: list[int], lr: float
) -> dict[str, Tensor]:
    """Return what the network says along its own training."""
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    outputs, predictions = [], []
    for step in range(steps[-1] + 1):
        if step in steps:
            with torch.no_grad():
                outputs.append(model(x))
                predictions.append(model(x_new))
        optimizer.zero_grad()
        (model(x) - Y).square().mean().backward()
        optimizer.step()
    return {"outputs": torch.stack(outputs), "predictions": torch.stack(predictions)}


def compare(samples: int = 80, tests: int = 300, channels: int = 16, last: int = 1000) -> dict[str, Any]:
    """Train both, and return what belongs into the figure."""
    x, labels, x_new, labels_new = digits(samples, tests)
    Y, Y_new = (nn.functional.one_hot(part, 10).double() for part in (labels, labels_new))
    model = network(channels)
    K = ntkops.ntk(model, x)
    lr = 0.2 * float(ntkops.max_learning_rate(K))
    steps = sorted({0, *(int(s) for s in torch.logspace(0, math.log10(last), 30).round())})
    path = ntkops.gradient_descent(K, Y, steps, lr=lr, offset="network", tol=1e-4)
    predictions = path.predict(K.cross(x_new))
    bounds = path.test_bound(ntkops.ntk(model, x_new).diagonal())
    real = train(model, x, Y, x_new, steps, lr)  # last: it moves the weights
    found = {
        "steps": steps,
        "lr": lr,
        "path": path,
        "predictions": predictions,
        "bounds": bounds,
        "real": real,
        "labels": labels_new,
        "Y": Y,
        "Y_new": Y_new,
    }
    found["accuracy"] = [
        (part.argmax(-1) == labels_new).double().mean(-1) for part in (real["predictions"], predictions)
    ]
    return found


def draw(found: dict[str, Any]) -> Any:
    """Return the figure: losses, accuracies, and outputs of one test sample."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 4), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    steps, path, real = found["steps"], found["path"], found["real"]
    for name, outputs, predictions in (
        ("network", real["outputs"], real["predictions"]),
        ("linearisation", path.outputs, found["predictions"]),
    ):
        plot_losses(steps, (outputs - found["Y"]).square().mean((1, 2)), left, label=f"{name}, training")
        plot_losses(steps, (predictions - found["Y_new"]).square().mean((1, 2)), left, label=f"{name}, test")
    left.set_title("squared error")
    names = (("network", "#D55E00"), ("linearisation", "#CC79A7"))  # as their test losses
    for (name, colour), accuracy in zip(names, found["accuracy"], strict=True):
        middle.plot(steps, accuracy, color=colour, label=name)
    middle.set_xscale("symlog", linthresh=1)
    middle.set_ylabel("accuracy on test samples")
    middle.legend(fontsize="small")
    middle.grid(alpha=0.3)
    sample, digit = 0, int(found["labels"][0])
    shown = [digit, (digit + 1) % 10, (digit + 5) % 10]
    plot_outputs(
        steps,
        found["predictions"][:, sample, shown],
        found["bounds"][:, sample, shown],
        right,
        labels=[f"class {c}" for c in shown],
    )
    for line, c in zip(right.get_lines(), shown, strict=True):
        right.plot(steps, real["predictions"][:, sample, c], ":", color=line.get_color(), label="_network")
    right.set_ylim(auto=True)
    right.relim()
    right.autoscale_view()
    right.set_title(f"a test image of a {digit} (dotted: network)")
    for ax in (left, middle, right):
        ax.set_xlabel("step")
    return figure


def main(arguments: list[str] | None = None) -> None:
    """Compare, print, and write the figure."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("training_dynamics.png"))
    parser.add_argument("--quick", action="store_true", help="small sizes: shows that it runs")
    given = parser.parse_args(arguments)
    found = compare(20, 30, 4, 60) if given.quick else compare()
    path, real = found["path"], found["real"]
    print(f"learning rate {found['lr']:.3g}, {path.info}")
    gap = (path.outputs - real["outputs"]).flatten(1).norm(dim=1) / real["outputs"].flatten(1).norm(dim=1)
    for place in range(0, len(found["steps"]), 6):
        loss = float((real["outputs"][place] - found["Y"]).square().mean())
        print(
            f"step {found['steps'][place]:5d}: loss {loss:.4f} (linearised {float(path.losses[place]):.4f}), "
            f"accuracy {float(found['accuracy'][0][place]):.3f} ({float(found['accuracy'][1][place]):.3f}), "
            f"outputs {float(gap[place]):.1%} apart, bound {float(path.bounds[place]):.1g}"
        )
    draw(found).savefig(given.out, dpi=110)


if __name__ == "__main__":
    main()
