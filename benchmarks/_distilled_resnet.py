"""The paper's own setting, ResNet-18 on a folder of images; it needs the data and a GPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from _distilled_curves import RIDGE, seeded
from _distilled_networks import equal_classes, train
from torch import Tensor, nn

import ntkops
from ntkops.distill import chain, search_local_global, synthesize
from ntkops.distill.wasserstein import wasserstein

__all__ = ["ResNet18", "read_folder", "run_imagenette"]


class Block(nn.Module):
    """Two 3 x 3 convolutions beside a shortcut."""

    def __init__(self, before: int, after: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(before, after, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(after)
        self.conv2 = nn.Conv2d(after, after, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(after)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or before != after:
            self.shortcut = nn.Sequential(
                nn.Conv2d(before, after, 1, stride, bias=False), nn.BatchNorm2d(after)
            )

    def forward(self, x: Tensor) -> Tensor:
        """Return the block's output."""
        inner = torch.relu(self.bn1(self.conv1(x)))
        return torch.relu(self.bn2(self.conv2(inner)) + self.shortcut(x))


class ResNet18(nn.Module):
    """ResNet-18 (He et al., 2016) with 11.2 million parameters for 10 classes."""

    def __init__(self, classes: int = 10, width: int = 64) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, width, 7, 2, 3, bias=False), nn.BatchNorm2d(width), nn.ReLU(), nn.MaxPool2d(3, 2, 1)
        )
        blocks, before = [], width
        for stage in range(4):
            after = width * 2**stage
            blocks += [Block(before, after, 1 if stage == 0 else 2), Block(after, after, 1)]
            before = after
        self.blocks = nn.Sequential(*blocks)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(before, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits ``(N, classes)``."""
        return self.fc(self.pool(self.blocks(self.stem(x))).flatten(1))


def read_folder(path: Path, size: int) -> tuple[Tensor, Tensor, list[str]]:
    """Read ``path/<class>/*`` as normalised images ``(N, 3, size, size)``, the middle square of each.

    Args:
        path: Folder with one folder a class.
        size: Height and width.

    Returns:
        Images, classes, and the names of the classes.
    """
    import numpy as np
    from PIL import Image

    names = sorted(folder.name for folder in path.iterdir() if folder.is_dir())
    images, labels = [], []
    for number, name in enumerate(names):
        for file in sorted((path / name).iterdir()):
            with Image.open(file) as found:
                image = found.convert("RGB")
                side = min(image.size)
                left, top = (image.width - side) // 2, (image.height - side) // 2
                image = image.crop((left, top, left + side, top + side)).resize((size, size))
                images.append(torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1))
            labels.append(number)
    x = torch.stack(images).float() / 255
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    return (x - mean[:, None, None]) / std[:, None, None], torch.tensor(labels), names


def run_imagenette(
    path: Path, *, size: int = 224, epochs: int = 50, per_class: int = 50, k: int = 2048, s: int = 5,
    iterations: int = 2000,
) -> dict[str, Any]:  # fmt: skip
    """Run the paper's chain: ResNet-18 on ``path/train`` and ``path/val``, as ImageNette is distributed.

    Args:
        path: The unpacked data.
        size: Height and width of the images.
        epochs: Passes through the data.
        per_class: Distilled images a class; the paper has 50.
        k: Projected features; the paper does not say how many.
        s: Distilled gradients; the paper's smallest is 5.
        iterations: Steps of the distillation of data.

    Returns:
        The chain's reports, ready for JSON.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    x, y, names = read_folder(path / "train", size)
    x_test, y_test, _ = read_folder(path / "val", size)
    x, y, x_test, y_test = (part.to(device) for part in (x, y, x_test, y_test))
    model = train(x, y, seed=0, epochs=epochs, batch=32, network=ResNet18(len(names)).to(device), rate=1e-3)
    loader = [(x[i : i + 256], y[i : i + 256]) for i in range(0, len(x), 256)]
    points = wasserstein(model, loader, per_class, iterations=iterations, generator=seeded()).inputs
    chosen = equal_classes(y.cpu(), per_class, seed=0).to(device)
    found: dict[str, Any] = {"classes": names, "device": device}
    ways = {
        "algorithm 1, sketch": (lambda K, Y: search_local_global(K, Y, s, generator=seeded()), "sketch"),
        "krylov, nystrom": (lambda K, Y: synthesize(K, s, "krylov", Y=Y, generator=seeded()), "nystrom"),
    }
    for name, (gradients, fit) in ways.items():
        # All training images would be too many for one kernel: real images of the same number stand for them.
        report = chain(
            model, x[chosen], x_test, y_test, data=points, projection=k, gradients=gradients, ridge=RIDGE,
            fit=fit, ablate=False,
        )  # fmt: skip
        found[name] = [str(run) for run in report.stages]
    found["parameters"] = ntkops.ntk(model, x[:1]).num_parameters
    return found
