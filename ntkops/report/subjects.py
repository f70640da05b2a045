"""What a report is about."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..errors import InputError, MissingDependencyError, NtkopsError
from ..model import Linearization, linearize
from ..results import Estimate
from .loading import brief, load_data, load_model, place

if TYPE_CHECKING:
    from ..model.accepted import OutputLike, ParamsLike


__all__ = [
    "Digits",
    "Subject",
    "accuracy",
    "classifier",
    "digits_subject",
    "limited_threads",
    "load_digits",
    "train",
    "user_subject",
]


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
            "the digits come with scikit-learn, which is not installed: pip install scikit-learn"
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


# -- what a report is about: one or more kernels of networks on the same samples


_ACCURACY_BATCH = 1024


@dataclass(frozen=True, eq=False)
class Subject:
    """Networks at fixed parameters, and the samples on which their kernels are compared.

    Attributes:
        title: What the report calls it.
        linearizations: Name of each state of the network, such as "before training".
        x: N samples.
        accuracies: Share of samples classified correctly, for states where that is known.
        notes: What a reader should know.
    """

    title: str
    linearizations: Mapping[str, Linearization]
    x: Tensor
    accuracies: Mapping[str, Estimate] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def accuracy(linearization: Linearization, x: Tensor, labels: Tensor, name: str) -> Estimate:
    """Return the share of samples whose largest output is their label, with its sampling error.

    Args:
        linearization: The network.
        x: ``(N, ...)`` samples.
        labels: ``(N,)`` integers in [0, O).
        name: What the samples are called; becomes the method of the estimate.

    Returns:
        The binomial proportion; its interval is Wilson's, which stays inside [0, 1].
    """
    hits = 0
    with torch.no_grad(), linearization.safe_context():
        for start, stop, batch in linearization.inputs(x).batches(_ACCURACY_BATCH):
            guess = linearization.function(linearization.parameters, batch).argmax(dim=1)
            hits += int((guess.cpu() == labels[start:stop]).sum())
    count, z = len(labels), 1.96
    share = hits / count
    # Wilson: all p with |share - p| ≤ z √(p (1 - p) / n), a quadratic inequality
    middle = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * (share * (1 - share) / count + (z / (2 * count)) ** 2) ** 0.5
    spread = (share * (1 - share) / count) ** 0.5
    number = torch.tensor([share, spread, middle - half, middle + half], dtype=torch.float64)
    return Estimate(
        value=number[0],
        stderr=number[1],
        interval=(number[2], number[3]),
        method=f"{count} {name}",
        exact=False,
        passes=0,
    )


def digits_subject(
    samples: int = 300,
    *,
    epochs: int = 30,
    width: int = 128,
    seed: int = 0,
    params: ParamsLike = None,
    output: OutputLike = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    announce: Callable[[str], None] | None = None,
) -> Subject:
    """Train a small classifier of digits, and keep it as it was before and after.

    Args:
        samples: Training images N on which the kernels are compared, at most 1400.
        epochs: Epochs of training.
        width: Hidden units.
        seed: Seed of the split, the initial weights and the order of training.
        params: Selects parameters, as in `ntkops.ntk`.
        output: Selects the state, as in `ntkops.ntk`.
        dtype: Floating dtype.
        device: Where the kernels are computed; training runs on the CPU.
        announce: Called with a line of text after each step.

    Returns:
        The subject, with the accuracies on the 397 test images.

    Raises:
        InputError: If there are fewer than 1 or more than 1400 samples.
        MissingDependencyError: If scikit-learn is missing.
    """
    generator = torch.Generator().manual_seed(seed)
    digits = load_digits(generator, dtype)
    if not 1 <= samples <= len(digits.x):
        raise InputError(f"--samples {samples}: the digits have 1 to {len(digits.x)} training images")
    untrained = classifier(generator, width, dtype)
    trained = train(untrained, digits, epochs, generator, announce)
    models = {"before training": untrained, "after training": trained}
    accuracies = {
        name: accuracy(linearize(model), digits.x_test, digits.y_test, "test images")
        for name, model in models.items()
    }
    return Subject(
        title=f"a 64-{width}-10 classifier of handwritten digits",
        linearizations={
            name: linearize(place(model, digits.x, None, torch.device(device))[0], params, output)
            for name, model in models.items()
        },
        x=digits.x[:samples].to(device),
        accuracies=accuracies,
    )


def user_subject(
    model: str,
    data: str | Path,
    *,
    samples: int | None = None,
    seed: int = 0,
    params: ParamsLike = None,
    output: OutputLike = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
) -> Subject:
    """Take a user's own network and data.

    Args:
        model: ``"package.module:factory"``.
        data: An ``.npz`` file with samples ``x`` and optionally integer labels ``y``.
        samples: Use a random subset of this size; None for all.
        seed: Seed of the subset, and of what the factory draws.
        params: Selects parameters, as in `ntkops.ntk`.
        output: Selects the state, as in `ntkops.ntk`.
        dtype: Floating dtype of network and samples; None to take both as they are.
        device: Device of both.

    Returns:
        The subject, with the accuracy on these samples where labels and outputs fit.

    Raises:
        InputError: If ``samples`` is not between 1 and the number there are.
        NtkopsError: The one that fits what is wrong with model or data.
    """
    x, labels = load_data(data)
    if samples is not None and not 1 <= samples <= len(x):
        raise InputError(f"--samples {samples}: the file has {len(x)} samples")
    network, x = place(load_model(model, seed), x, dtype, torch.device(device))
    linearization = linearize(network, params, output)
    count = _number_of_outputs(model, linearization, x)
    accuracies, notes = {}, []
    if labels is not None:
        low, high = int(labels.min()), int(labels.max())
        if low == 0 and high == count - 1 > 0:  # else the largest output need not mean a class
            accuracies["model"] = accuracy(linearization, x, labels, "samples of the file")
        else:
            notes.append(f"no accuracy: labels from {low} to {high} do not number the {count} outputs")
    if samples is not None:
        generator = torch.Generator().manual_seed(seed)
        chosen = torch.randperm(len(x), generator=generator)[:samples].sort().values
        x = x[chosen.to(x.device)]
    return Subject(
        title=model,
        linearizations={"model": linearization},
        x=x,
        accuracies=accuracies,
        notes=tuple(notes),
    )


def _number_of_outputs(model: str, linearization: Linearization, x: Tensor) -> int:
    """Return O from a trial run, in which the network itself may raise what it likes."""
    try:
        return linearization.inputs(x).num_outputs
    except NtkopsError:
        raise
    except Exception as error:
        raise InputError(
            f"--model {model}: on samples of shape {tuple(x.shape)} and dtype {x.dtype} the network raised "
            f"{brief(error)}; --traceback shows where"
        ) from error
