"""What is projected and timed: maps, a block of rows, a reference algorithm, gradients of trained nets."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Generator, Tensor, nn

import ntkops
from ntkops.projections import (
    SJLT,
    SRHT,
    CountSketch,
    Gaussian,
    Haar,
    LayerKronecker,
    Projection,
    Rademacher,
    RowSample,
)

__all__ = ["MAPS", "SPARSE", "basic_projector", "block", "gradients", "make", "prepare", "rms_errors"]

ROWS = 16
SPARSE = ("CountSketch", "SJLT", "RowSample")
MAPS: dict[str, str] = {
    "CountSketch": "cyclic count sketch, one nonzero a column",
    "SJLT": "four nonzeros a column",
    "SRHT": "blocks of 4096, Hadamard, k rows of each",
    "LayerKronecker": "16 x 32 for each parameter matrix, on gradients that are written down",
    "RowSample": "one entry out of each of k strata",
    "Rademacher": "dense signs, regenerated block by block",
    "Gaussian": "dense normal variates, regenerated block by block",
    "Haar": "orthogonal rows by Cholesky-QR; its set-up apart",
}


def make(name: str, shapes: Sequence[Sequence[int]], k: int, seed: int = 0) -> Projection:
    """Return a map of all parameters of these shapes."""
    dim = sum(math.prod(shape) for shape in shapes)
    if name == "LayerKronecker":
        rows = 2 ** ((k.bit_length() - 1) // 2)
        return LayerKronecker(shapes, rows, k // rows, seed)
    plain = {
        "CountSketch": CountSketch,
        "SJLT": SJLT,
        "SRHT": SRHT,
        "RowSample": RowSample,
        "Rademacher": Rademacher,
        "Gaussian": Gaussian,
        "Haar": Haar,
    }
    return plain[name](dim, k, seed)


def layers(params: int) -> list[tuple[int, ...]]:
    """Return shapes of square layers with biases that have about so many entries, and exactly in all."""
    width = max(8, min(1024, math.isqrt(params // 4)))
    shapes: list[tuple[int, ...]] = []
    left = params
    while left >= width * (width + 1):
        shapes += [(width, width), (width,)]
        left -= width * (width + 1)
    return [*shapes, (left,)] if left else shapes


def block(params: int, rows: int = ROWS) -> Tensor:
    """Return the rows that everybody projects, ``(rows, params)``."""
    return torch.randn(rows, params, generator=Generator().manual_seed(2))


def prepare(name: str, params: int, k: int) -> Callable[[], object]:
    """Return the work whose memory is measured, after the same on few parameters has loaded the code."""
    few = layers(20_000)
    make(name, few, min(k, 64)).apply(block(20_000))
    projection, x = make(name, layers(params), k), block(params)
    return lambda: projection.apply(x)


def basic_projector(x: Tensor, k: int, seed: int = 0, width: int = 100, blocks: int | None = None) -> Tensor:
    """Project by dense sign matrices of ``width`` columns that are drawn again for each call.

    This is the algorithm of the BasicProjector of TRAK (Park et al., 2023), written anew: a (P, width)
    matrix is filled by Bernoulli draws for each block of the image, turned into signs, and multiplied with.

    Args:
        x: ``(rows, P)``.
        k: Number of entries of the image.
        seed: Seed of the first block.
        width: Columns of a block.
        blocks: Blocks that are made; None for all.

    Returns:
        ``(rows, k)``, zero where no block was made.
    """
    result = x.new_zeros((len(x), k))
    matrix = x.new_empty((x.shape[1], width))
    generator = Generator()
    for number, start in enumerate(range(0, k, width)[:blocks]):
        stop = min(start + width, k)
        generator.manual_seed(seed + 1000 * number)
        matrix.bernoulli_(0.5, generator=generator).mul_(2).sub_(1)
        torch.mm(x, matrix[:, : stop - start], out=result[:, start:stop])
    return result


# gradients of trained networks


def _digits() -> tuple[Tensor, Tensor]:
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    return torch.tensor(images / 16, dtype=torch.float32), torch.tensor(labels)


def _perceptron(width: int) -> nn.Module:
    return nn.Sequential(
        nn.Linear(64, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 10)
    )


def _convolutional(width: int) -> nn.Module:
    return nn.Sequential(
        nn.Unflatten(1, (1, 8, 8)),
        nn.Conv2d(1, width // 2, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(width // 2, width, 3, padding=1, stride=2),
        nn.ReLU(),
        nn.Conv2d(width, width, 3, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(width, 10),
    )


NETWORKS = {"mlp": _perceptron, "cnn": _convolutional}


def gradients(
    network: str, *, width: int, steps: int, samples: int
) -> tuple[Tensor, list[tuple[int, ...]], float]:
    """Train a network on digits and return gradients of its logits.

    Returns:
        ``(10 · samples, P)`` rows in float32, the shapes of the parameters, and the training accuracy.
    """
    images, labels = _digits()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = NETWORKS[network](width)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    generator = Generator().manual_seed(1)
    for _ in range(steps):
        chosen = torch.randint(len(images), (64,), generator=generator)
        loss = nn.functional.cross_entropy(model(images[chosen]), labels[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        accuracy = float((model(images).argmax(1) == labels).float().mean())
    rows = ntkops.jacobian(model, images[:samples], max_dense_bytes=2**34).to_dense()
    return rows, [tuple(p.shape) for p in model.parameters()], accuracy


def rms_errors(projection: Projection, x: Tensor) -> dict[str, float]:
    """Return the errors of inner products of unit vectors, times √k.

    Args:
        projection: The map.
        x: ``(n, P)`` rows.

    Returns:
        Sums of squares and largest errors of pairs ("off") and of squared lengths ("diagonal").
    """
    unit = x.double() / x.double().norm(dim=1, keepdim=True)
    image = projection.apply(unit.float()).double()
    error = (image @ image.mT - unit @ unit.mT) * math.sqrt(projection.k)
    diagonal = error.diagonal()
    off = error[~torch.eye(len(error), dtype=torch.bool)]
    return {
        "off": float(off.square().mean()),
        "diagonal": float(diagonal.square().mean()),
        "largest": float(off.abs().max()),
    }
