"""Samples that stand for all, chosen by inputs or by activations of a layer: no Jacobian is taken."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from ..arguments import checked
from ..errors import InputError, NonFiniteError, ShapeError
from ..model import linearize
from ..results import SelectedInputs
from ..solvers import rpcholesky
from ..vectors import resolve_generator
from ._medoids import farthest_points, nearest_points, seed_points, vector_medoids

if TYPE_CHECKING:
    from ..model.accepted import InputsLike, ModelLike

__all__ = ["class_members", "class_quotas", "select_inputs"]

Method = Literal["kmedoids", "kmeans++", "fps", "rpcholesky", "random"]

_BATCH = 256  # samples that go through the model at a time
_STARTS = 4  # of k-medoids


@checked
def select_inputs(
    x: InputsLike,
    m: int,
    method: Method = "kmedoids",
    *,
    model: ModelLike | None = None,
    features: str | None = None,
    labels: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> SelectedInputs:
    r"""Choose m of N samples by what they look like, before any gradient is taken.

    Vectors z are the inputs, flattened, or the activations of a layer. With labels each class has as many of
    the m samples as the others, up to one and up to what it has, and samples meet those of their class alone.

    * "kmedoids": least mean squared distance to the nearest chosen sample, by alternation: samples go to
      the nearest medoid, and a cluster's medoid becomes the member nearest to its mean, which is the one
      with the least sum of squared distances; from the best of 4 starts by "kmeans++".
    * "kmeans++": each sample in proportion to the squared distance to those before it.
    * "fps": farthest point sampling, from a random sample on.
    * "rpcholesky": randomly pivoted Cholesky on the kernel :math:`\exp(-|z - z'|^2 / 2 h^2)` with the mean
      squared distance from the mean for :math:`h^2`.
    * "random": uniformly, without replacement.

    Args:
        x: N samples: a tensor ``(N, ...)``, or what the model takes.
        m: Number of samples to choose, 1 ≤ m ≤ N, at least one a class.
        method: One of the names above.
        model: For ``features``: the network.
        features: Path of a module of the model, whose output is flattened (``"rnn[0]"``, ``"block@1"``); None
            for the inputs themselves.
        labels: ``(N,)`` class numbers; None without classes.
        generator: CPU generator of the draws; None draws a seed from the operating system.

    Returns:
        `SelectedInputs`: positions, and weights for ``KernelRidge.fit(..., sample_weight=)``. Cost: for
        activations a forward pass; O(n s d) flops for s of the n vectors of a class in d dimensions, for
        "kmedoids" in each of some ten rounds. Memory: the vectors of all samples, and those of a class in
        float64.

    Raises:
        InputError: If an option is not understood, the labels are no class numbers, or m is too small or
            too large.
        ShapeError: If the labels do not fit.
        NonFiniteError: If an input or an activation is NaN or infinite, or squared distances overflow.
        NtkopsError: What is wrong with the model, its inputs, or the layer; see `ntkops.errors`.

    References:
        Park, Jun (2009), A simple and fast algorithm for K-medoids clustering; Arthur, Vassilvitskii (2007),
        k-means++; Gonzalez (1985), Clustering to minimize the maximum intercluster distance; Chen, Epperly,
        Tropp, Webber (2025), Randomly pivoted Cholesky. Balanced classes: distilled NTK paper, section 5.

    Example:
        >>> import torch
        >>> from ntkops import distill
        >>> line = torch.tensor([[0.0], [1.0], [2.0], [10.0]])
        >>> found = distill.select_inputs(
        ...     line, 2, generator=torch.Generator().manual_seed(0)
        ... )
        >>> sorted(zip(found.indices.tolist(), found.weights.tolist())), found.cost
        ([(1, 1.5), (3, 0.5)], 0.5)
    """
    started = time.perf_counter()
    if method not in _METHODS:
        raise InputError(f"method={method!r}: choose one of {', '.join(map(repr, _METHODS))}")
    if (model is None) != (features is None):
        raise InputError("features= names a layer of model=: pass both, or none for the inputs themselves")
    vectors = _inputs(x) if features is None else _activations(model, features, x)
    count = len(vectors)
    if not 1 <= m <= count:
        raise InputError(f"m={m}: choose from 1 to {count} samples")
    members = class_members(labels, count)
    generator, seed = resolve_generator(generator)
    chosen, shares, total = [], [], 0.0
    for own, size in zip(members, class_quotas([len(own) for own in members], m), strict=True):
        z = vectors[own].double()
        z = z - z.mean(0)  # distances are those of centred vectors, without the rounding of a large mean
        if not bool(z.square().sum().isfinite()):
            raise NonFiniteError("squared distances overflow float64: scale the inputs")
        found = torch.tensor(_METHODS[method](z, size, generator))
        owner, squares = nearest_points(z, found)
        chosen.append(own[found])
        shares.append(torch.bincount(owner, minlength=size))
        total += float(squares.sum())
    indices = torch.cat(chosen)
    return SelectedInputs(
        indices=indices,
        weights=torch.cat(shares).double() * (m / count),
        labels=None if labels is None else torch.as_tensor(labels).detach().cpu().long()[indices],
        cost=total / count,
        method=method,
        seed=seed,
        seconds=time.perf_counter() - started,
    )


# as many of each class


def class_members(labels: Any, count: int) -> list[Tensor]:
    """Return the positions of the samples of each class that occurs, in the order of the class numbers.

    Raises:
        InputError: If labels are no integers.
        ShapeError: If there is not one for each sample.
    """
    if labels is None:
        return [torch.arange(count)]
    numbers = torch.as_tensor(labels).detach().cpu()
    if numbers.dtype.is_floating_point or numbers.is_complex() or numbers.dtype == torch.bool:
        raise InputError(f"labels are class numbers, integers; got {numbers.dtype}")
    if tuple(numbers.shape) != (count,):
        raise ShapeError(f"labels have shape {tuple(numbers.shape)}, due is ({count},): one for each sample")
    return [(numbers == number).nonzero().flatten() for number in numbers.unique()]


def class_quotas(sizes: list[int], m: int) -> list[int]:
    """Return how many samples each class gives: as many as the others, larger classes first.

    Raises:
        InputError: If there are more classes than samples to choose.
    """
    if m < len(sizes):
        raise InputError(f"m={m} is below the number of classes, {len(sizes)}: choose at least one of each")
    found, left = [0] * len(sizes), m
    while left:
        open_ones = [number for number, size in enumerate(sizes) if found[number] < size]
        if left < len(open_ones):
            open_ones = sorted(open_ones, key=lambda number: -sizes[number])[:left]
        step = max(1, min(left // len(open_ones), min(sizes[n] - found[n] for n in open_ones)))
        for number in open_ones:
            found[number] += step
        left -= step * len(open_ones)
    return found


# vectors


def _inputs(x: Any) -> Tensor:
    """Return flattened inputs ``(N, d)``, on the CPU.

    Raises:
        InputError: If they are no tensor of real numbers.
        ShapeError: If there is none.
        NonFiniteError: If one is NaN or infinite.
    """
    if not isinstance(x, Tensor) and not hasattr(x, "__array__"):
        raise InputError(
            f"x is a {type(x).__name__}: pass a tensor (N, ...), or model= and features=, which take what "
            "the model takes"
        )
    values = torch.as_tensor(x).detach().cpu()
    if values.is_complex():
        raise InputError("x is complex: pass its real and imaginary parts, torch.view_as_real(x)")
    if values.dim() < 1 or not values.numel():
        raise ShapeError(f"x has shape {tuple(values.shape)}: pass samples first, (N, ...)")
    return _finite(values.reshape(len(values), -1), "x")


def _activations(model: Any, features: str, x: Any) -> Tensor:
    """Return flattened outputs of a layer, ``(N, d)``, on the CPU."""
    # All parameters: those that are frozen make no difference to a forward pass.
    linearization = linearize(model, params=lambda name, value: value.is_floating_point(), output=features)
    inputs = linearization.inputs(x)
    inputs.hand_over_recordings()  # nobody needs them
    parts = []
    with torch.no_grad(), linearization.safe_context():
        for _, _, batch in inputs.batches(_BATCH):
            parts.append(linearization.function(linearization.parameters, batch).detach().cpu())
    return _finite(torch.cat(parts), f"the output of {features!r}")


def _finite(vectors: Tensor, what: str) -> Tensor:
    if not bool(torch.isfinite(vectors).all()):
        row = int((~torch.isfinite(vectors)).any(1).nonzero()[0])
        raise NonFiniteError(f"{what} is NaN or infinite at sample {row}")
    return vectors


# methods: centred vectors (n, d) in float64, how many, and a source of draws


def _columns(z: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda chosen: z @ z[chosen].mT


def _random(z: Tensor, size: int, generator: torch.Generator) -> list[int]:
    return torch.randperm(len(z), generator=generator)[:size].tolist()


def _seeds(z: Tensor, size: int, generator: torch.Generator) -> list[int]:
    return seed_points(_columns(z), z.square().sum(1), size, generator)


def _farthest(z: Tensor, size: int, generator: torch.Generator) -> list[int]:
    start = int(torch.randint(len(z), (), generator=generator))
    return farthest_points(_columns(z), z.square().sum(1), size, start)[0]


def _medoids(z: Tensor, size: int, generator: torch.Generator) -> list[int]:
    return vector_medoids(z, size, generator, _STARTS)[0]


def _rpcholesky(z: Tensor, size: int, generator: torch.Generator) -> list[int]:
    lengths = z.square().sum(1)
    width = float(lengths.mean())

    def columns(chosen: Tensor) -> Tensor:
        squares = (lengths.unsqueeze(1) + lengths[chosen] - 2 * z @ z[chosen].mT).clamp_(min=0)
        return torch.exp(-squares / (2 * width)) if width > 0 else torch.ones_like(squares)

    found = rpcholesky(
        columns,
        torch.ones(len(z), dtype=z.dtype),
        size,
        block_size=min(25, max(1, size // 4)),
        generator=generator,
    ).pivots.tolist()
    if len(found) == size:
        return found
    taken = set(found)  # nothing but copies is left
    return [*found, *(p for p in _random(z, len(z), generator) if p not in taken)][:size]


_METHODS: dict[str, Callable[[Tensor, int, torch.Generator], list[int]]] = {
    "kmedoids": _medoids,
    "kmeans++": _seeds,
    "fps": _farthest,
    "rpcholesky": _rpcholesky,
    "random": _random,
}
