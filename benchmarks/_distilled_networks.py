"""The networks of the distilled-kernel benchmark, their data, and their exact kernels, made once."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, interpolate, kl_div, log_softmax, softmax

import ntkops

__all__ = [
    "Data", "Folder", "Problem", "ResNet18", "convolutional", "digits", "equal_classes", "from_file",
    "perceptron", "rounded", "seeded", "train",
]  # fmt: skip

_CLASSES = 10


@dataclass(frozen=True, eq=False)
class Data:
    """Labelled images, for training and for testing."""

    name: str
    title: str
    x: Tensor
    y: Tensor
    x_test: Tensor
    y_test: Tensor

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return int(self.y.max()) + 1

    def part(self, train: int, test: int) -> Data:
        """Return the first images of both kinds."""
        return Data(
            self.name, self.title, self.x[:train], self.y[:train], self.x_test[:test], self.y_test[:test]
        )


def digits(quick: bool = False) -> Data:
    """Return scikit-learn's digits, enlarged to 28 x 28: 1197 for training, 600 for testing."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(labels))
    x = torch.from_numpy(images[order]).float().reshape(-1, 1, 8, 8) / 16
    x = interpolate(x, size=(28, 28), mode="bilinear")
    y = torch.from_numpy(labels[order]).long()
    test = 60 if quick else 600
    return Data("digits", "digits", x[:1197], y[:1197], x[1197 : 1197 + test], y[1197 : 1197 + test])


def from_file(path: Path) -> Data:
    """Read an ``.npz`` file: ``x_train``, ``y_train``, ``x_test``, ``y_test``, or ``images``, ``labels``."""
    with np.load(path) as found:
        parts = {key: np.asarray(found[key]) for key in found.files}
    if "images" in parts:
        cut = len(parts["images"]) * 4 // 5
        for name, values in (("x", parts["images"]), ("y", parts["labels"])):
            parts |= {f"{name}_train": values[:cut], f"{name}_test": values[cut:]}
    images = {}
    for key in ("x_train", "x_test"):
        values = torch.from_numpy(parts[key]).float() / (255 if parts[key].dtype == np.uint8 else 1)
        if values.dim() == 3:
            values = values[:, None]
        elif values.shape[-1] in (1, 3):
            values = values.permute(0, 3, 1, 2)
        images[key] = values
    y, y_test = (torch.from_numpy(parts[key]).long().flatten() for key in ("y_train", "y_test"))
    title = "MNIST" if path.stem.startswith("mnist") else path.stem
    return Data(path.stem, title, images["x_train"], y, images["x_test"], y_test)


def convolutional(channels: int = 1, classes: int = _CLASSES, width: int = 8) -> nn.Sequential:
    """Return conv5-BN-ReLU-pool twice and a linear head; 6,018 parameters for 28 x 28 pixels."""
    layers: list[nn.Module] = []
    for before, after in ((channels, width), (width, 2 * width)):
        layers += [nn.Conv2d(before, after, 5, bias=False), nn.BatchNorm2d(after), nn.ReLU(), nn.AvgPool2d(2)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(32 * width, classes))


def perceptron(classes: int = _CLASSES, width: int = 64) -> nn.Sequential:
    """Return 784-64-classes with ReLU; 50,890 parameters."""
    return nn.Sequential(nn.Flatten(), nn.Linear(784, width), nn.ReLU(), nn.Linear(width, classes))


def train(
    x: Any,
    y: Tensor,
    *,
    seed: int,
    epochs: int = 8,
    batch: int = 64,
    soft: Tensor | None = None,
    network: Callable[[], nn.Module] | None = None,
    rate: float = 4e-3,
) -> nn.Module:
    """Return a network trained by Adam with a one-cycle rate, in eval mode."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = network() if network is not None else convolutional(x.shape[1], int(y.max()) + 1)
        optimiser = torch.optim.Adam(model.parameters(), lr=rate, weight_decay=1e-5)
        steps = epochs * -(-len(x) // batch)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, rate, total_steps=steps)
        model.train()
        for _ in range(epochs):
            for index in torch.randperm(len(x)).split(batch):
                found = model(x[index])
                if soft is None:
                    loss = cross_entropy(found, y[index])
                else:
                    loss = kl_div(log_softmax(found, -1), softmax(soft[index], -1), reduction="batchmean")
                optimiser.zero_grad()
                loss.backward()
                optimiser.step()
                schedule.step()
    return model.eval()


def equal_classes(y: Tensor, per_class: int, *, seed: int) -> Tensor:
    """Return positions of as many random samples of each class."""
    generator = torch.Generator().manual_seed(seed)
    chosen = []
    for label in range(int(y.max()) + 1):
        own = (y == label).nonzero().squeeze(-1)
        chosen.append(own[torch.randperm(len(own), generator=generator)[:per_class]])
    return torch.cat(chosen)


@dataclass(eq=False)
class Problem:
    """A trained network, the points whose kernel is taken, and what it is measured on."""

    name: str
    model: nn.Module
    data: Data
    points: Tensor
    classes: Tensor
    subset: Tensor | None = None
    seconds: dict[str, float] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        name: str,
        model: nn.Module,
        data: Data,
        points: Tensor,
        classes: Tensor,
        subset: Tensor | None = None,
    ) -> Problem:
        """Return a problem with a copy of the network in float64."""
        double = copy.deepcopy(model).double().eval()
        for parameter in double.parameters():
            parameter.requires_grad_(True)
        return cls(name, double, data, points.double(), classes, subset)

    @cached_property
    def operator(self) -> ntkops.NTKOperator:
        """The lazy per-class kernel of the points."""
        return ntkops.ntk(self.model, self.points, outputs="each")

    @cached_property
    def x_test(self) -> Tensor:
        """Test images in float64."""
        return self.data.x_test.double()

    @cached_property
    def K(self) -> Tensor:
        """``(C, m, m)`` exact kernels."""
        started = time.process_time()
        with torch.no_grad():
            found = self.operator.to_dense().detach()
        self.seconds["kernels"] = time.process_time() - started
        return found

    @cached_property
    def cross(self) -> Tensor:
        """``(C, M, m)`` exact kernels between test images and points."""
        started = time.process_time()
        with torch.no_grad():
            found = self.operator.cross(self.x_test).to_dense().detach()
        self.seconds["cross kernels"] = time.process_time() - started
        return found

    @cached_property
    def mean(self) -> Tensor:
        """``(m, m)`` mean of the class kernels."""
        return self.K.mean(0)

    @cached_property
    def targets(self) -> Tensor:
        """``(m, C)`` logits at the points."""
        with torch.no_grad():
            return self.model(self.points)

    @cached_property
    def logits_test(self) -> Tensor:
        """``(M, C)`` logits at the test images."""
        with torch.no_grad():
            return self.model(self.x_test)

    @property
    def num_parameters(self) -> int:
        """Number P of parameters."""
        return sum(p.numel() for p in self.model.parameters())

    @cached_property
    def accuracy(self) -> float:
        """Share of test images that the network gets right."""
        return float((self.logits_test.argmax(-1) == self.data.y_test).double().mean())


def seeded(seed: int = 0) -> torch.Generator:
    """Return a generator with a seed."""
    return torch.Generator().manual_seed(seed)


def rounded(value: float, digits: int = 5) -> float:
    """Return a number to as many digits."""
    return float(f"{value:.{digits}g}")


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
    """Images of ``path/<class>/*``, read when they are asked for: the middle square of each, normalised."""

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
