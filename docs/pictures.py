"""The pictures of the first pages: `python docs/pictures.py` writes them to docs/images."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import ntkops
import torch
from ntkops import plotting
from sklearn.datasets import load_digits

IMAGES = Path(__file__).parent / "images"


def train(
    steps: int = 300,
) -> tuple[
    torch.nn.Module, torch.Tensor, torch.Tensor, list[dict[str, torch.Tensor]]
]:
    """Return a classifier of digits, 100 images in the order of their classes, and its states before and after."""
    data = load_digits()
    images = torch.tensor(data.data / 16, dtype=torch.float32)
    labels = torch.tensor(data.target)
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Linear(64, 64), torch.nn.Tanh(), torch.nn.Linear(64, 10)
    )
    states = [deepcopy(model.state_dict())]
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(steps):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(
            model(images[:1000]), labels[:1000]
        ).backward()
        optimizer.step()
    states.append(deepcopy(model.state_dict()))
    order = labels[:100].argsort(stable=True)
    return model, images[:100][order], labels[:100][order], states


def landing() -> None:
    """Kernel of 100 digits, class by class, and its spectrum, before and after training."""
    model, x, labels, states = train()
    palette = plt.cycler(color=plotting.COLOURS)
    with plt.rc_context(
        {"font.size": 9, "axes.titlesize": 10, "axes.prop_cycle": palette}
    ):
        figure, axes = plt.subplots(
            1,
            3,
            figsize=(9.6, 3.1),
            layout="constrained",
            width_ratios=(1, 1, 1.25),
        )
        for place, state, name in zip(
            axes[:2], states, ("at the start", "after training"), strict=True
        ):
            model.load_state_dict(state)
            K = ntkops.ntk(model, x, outputs="trace").to_dense()
            scale = K.diagonal().rsqrt()
            place.imshow(
                scale[:, None] * K * scale, vmin=0, vmax=1, cmap="viridis"
            )
            ends = torch.bincount(labels).cumsum(0)
            middles = (ends - torch.bincount(labels) / 2).tolist()
            place.set_xticks(middles, range(10), fontsize=7)
            place.set_yticks(middles, range(10), fontsize=7)
            place.tick_params(length=0)
            place.set(title=f"kernel {name}", xlabel="digit")
            values = torch.linalg.eigvalsh(
                ntkops.ntk(model, x).to_dense().double()
            ).flip(0)
            axes[2].loglog(
                range(1, 1001),
                (values / values.sum()).clamp_min(1e-12),
                label=name,
            )
        axes[0].set_ylabel("digit")
        axes[2].set(
            title="spectrum",
            xlabel="eigenvalue, largest first",
            ylabel="share of the trace",
            ylim=(1e-8, 1),
        )
        axes[2].legend(frameon=False)
        figure.savefig(IMAGES / "landing.png", dpi=150)


if __name__ == "__main__":
    landing()
