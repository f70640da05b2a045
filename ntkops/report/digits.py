"""The default subject: a small classifier of handwritten digits, before and after training."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..errors import InputError, MissingDependencyError

__all__ = ["Digits", "classifier", "limited_threads", "load_digits", "train"]

_PIXELS, _CLASSES = 64, 10
_NUM_TEST = 397
_BATCH = 64


@dataclass(frozen=True, eq=False)
class Digits:
    """Images of handwritten digits, 8 x 8 pixels in [0, 1], shuffled and split.

    Attributes:
        x: ``(1400, 64)`` training images.
        y: ``(1400,)`` their digits.
        x_test: ``(397, 64)`` images kept for testing.
        y_test: ``(397,)`` their digits.
    """

    x: Tensor
    y: Tensor
    x_test: Tensor
    y_test: Tensor


def load_digits(generator: torch.Generator, dtype: torch.dtype = torch.float32) -> Digits:
    """Return the digits that scikit-learn carries, so that no network is needed.

    Args:
        generator: CPU generator that shuffles the images before they are split.
        dtype: Floating dtype of the images.

    Returns:
        1400 images for training and 397 for testing.

    Raises:
        MissingDependencyError: If scikit-learn is not installed.
    """
    try:
        from sklearn import datasets
    except ImportError as error:
        raise MissingDependencyError(
            "the digits come with scikit-learn, which is not installed: pip install 'ntkops[demo]'"
        ) from error
    images, labels = datasets.load_digits(return_X_y=True)
    order = torch.randperm(len(images), generator=generator)
    x = (torch.from_numpy(images) / 16.0).to(dtype)[order]
    y = torch.from_numpy(labels).long()[order]
    return Digits(x[:-_NUM_TEST], y[:-_NUM_TEST], x[-_NUM_TEST:], y[-_NUM_TEST:])


def classifier(
    generator: torch.Generator, width: int = 128, dtype: torch.dtype = torch.float32
) -> nn.Sequential:
    """Return an untrained network 64 - width - 10 with torch's usual initial distribution.

    Args:
        generator: CPU generator that draws the weights; the global random state is not touched.
        width: Hidden units.
        dtype: Floating dtype of the parameters.

    Returns:
        The network in evaluation mode.
    """
    hidden, head = (
        nn.utils.skip_init(nn.Linear, inputs, outputs, dtype=dtype)
        for inputs, outputs in ((_PIXELS, width), (width, _CLASSES))
    )
    with torch.no_grad():
        for layer in (hidden, head):
            bound = layer.in_features**-0.5
            layer.weight.uniform_(-bound, bound, generator=generator)
            layer.bias.uniform_(-bound, bound, generator=generator)
    return nn.Sequential(hidden, nn.ReLU(), head).eval()


@contextmanager
def limited_threads(count: int | None) -> Iterator[None]:
    """Give torch this many threads inside the block; None changes nothing."""
    threads = torch.get_num_threads()
    torch.set_num_threads(threads if count is None else count)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def train(
    model: nn.Module,
    digits: Digits,
    epochs: int,
    generator: torch.Generator,
    announce: Callable[[str], None] | None = None,
) -> nn.Module:
    """Return a copy of a classifier after training with Adam on the cross entropy.

    Args:
        model: The untrained network; it stays as it is.
        digits: Images and their digits.
        epochs: Passes through the training images, in batches of 64; at least 1.
        generator: CPU generator that shuffles the images.
        announce: Called with a line of text after each epoch.

    Returns:
        The trained network in evaluation mode.

    Raises:
        InputError: If ``epochs`` is not positive.
    """
    if epochs < 1:
        raise InputError(f"training needs at least one epoch, got {epochs}")
    trained = copy.deepcopy(model)
    optimiser = torch.optim.Adam(trained.parameters(), lr=2e-3)
    with torch.enable_grad(), limited_threads(1):  # batches this small are slower on more
        for epoch in range(1, epochs + 1):
            for batch in torch.randperm(len(digits.x), generator=generator).split(_BATCH):
                loss = nn.functional.cross_entropy(trained(digits.x[batch]), digits.y[batch])
                optimiser.zero_grad()
                loss.backward()
                optimiser.step()
            if announce is not None:
                announce(f"training, epoch {epoch} of {epochs}")
    return trained.eval()
