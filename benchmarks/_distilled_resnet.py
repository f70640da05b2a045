"""The paper's own setting, ResNet-18 on a folder of images; it needs the data and a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from _distilled_curves import RIDGE, seeded
from _distilled_networks import equal_classes, train
from torch import Tensor, nn

from ntkops.distill import chain, search_local_global, synthesize
from ntkops.distill.wasserstein import wasserstein

__all__ = ["Folder", "ResNet18", "run_imagenette"]

_BATCH = 64  # images that are in memory at a time, but for the points


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
    """ResNet-18 (He et al., 2016), in torchvision's layout; 11.2 million parameters for 10 classes."""

    def __init__(self, classes: int = 10, width: int = 64, channels: int = 3) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(channels, width, 7, 2, 3, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.MaxPool2d(3, 2, 1),
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


class Folder:
    """Images of ``path/<class>/*``, read when they are asked for: the middle square of each, normalised.

    Args:
        path: Folder with one folder a class.
        size: Height and width.
        device: Where images go.
        labelled: Whether batches are pairs with classes, or images alone.
    """

    def __init__(self, path: Path, size: int, device: str = "cpu", *, labelled: bool = True) -> None:
        self.names = sorted(folder.name for folder in path.iterdir() if folder.is_dir())
        found = [(n, file) for n, name in enumerate(self.names) for file in sorted((path / name).iterdir())]
        self.y, self._files = torch.tensor([n for n, _ in found]), [file for _, file in found]
        self._size, self._device, self._labelled = size, device, labelled

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, index: Tensor) -> Tensor:
        """Return some images ``(B, 3, size, size)``."""
        images = torch.stack([self._read(self._files[i]) for i in index.tolist()]).float() / 255
        mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
        return ((images - mean[:, None, None]) / std[:, None, None]).to(self._device)

    def __iter__(self) -> Iterator[Any]:
        for index in torch.arange(len(self)).split(_BATCH):
            yield (self[index], self.y[index]) if self._labelled else self[index]

    def _read(self, file: Path) -> Tensor:
        import numpy as np
        from PIL import Image

        with Image.open(file) as found:
            image = found.convert("RGB")
            side = min(image.size)
            left, top = (image.width - side) // 2, (image.height - side) // 2
            image = image.crop((left, top, left + side, top + side)).resize((self._size, self._size))
            return torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1)


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
    images, tests = Folder(path / "train", size, device), Folder(path / "val", size, device, labelled=False)
    make = lambda: ResNet18(len(images.names)).to(device)  # noqa: E731
    model = train(images, images.y.to(device), seed=0, epochs=epochs, batch=32, network=make, rate=1e-3)
    points = wasserstein(model, images, per_class, iterations=iterations, generator=seeded()).inputs
    chosen = images[equal_classes(images.y, per_class, seed=0)]
    found: dict[str, Any] = {"classes": images.names, "device": device}
    ways = {
        "algorithm 1, sketch": (lambda K, Y: search_local_global(K, Y, s, generator=seeded()), "sketch"),
        "krylov, nystrom": (lambda K, Y: synthesize(K, s, "krylov", Y=Y, generator=seeded()), "nystrom"),
    }
    for name, (gradients, fit) in ways.items():
        # All training images would be too many for one kernel: real images of the same number stand for them.
        report = chain(
            model, chosen, tests, tests.y.to(device), data=points, projection=k, gradients=gradients,
            ridge=RIDGE, fit=fit, ablate=False,
        )  # fmt: skip
        found[name] = [str(run) for run in report.stages]
    found["parameters"] = sum(p.numel() for p in model.parameters())
    return found
