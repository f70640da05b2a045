"""Inducing points: who they are, and the kernels between samples and them."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import torch
from linear_operator.operators import LinearOperator
from torch import Tensor

from ..errors import (
    InputError,
    MissingDependencyError,
    ShapeError,
    ShardingError,
    UnsupportedOperationError,
)
from ..model import Inputs
from ..solvers import rpcholesky
from ..vectors import resolve_generator
from ._ridge_system import kernel_columns, kernel_entries
from .axes import StateAxis
from .base import EngineOperator
from .capabilities import capabilities

__all__ = ["Inducing", "induce", "induce_over_ranks"]

logger = logging.getLogger(__name__)

_RULES = ("kmeans", "random", "rpcholesky")


class Inducing:
    """The kernels that a Nyström approximation is made of.

    Attributes:
        cross: K_XZ, ``(*batch, n, m)``.
        square: K_ZZ, ``(*batch, m, m)``.
        indices: ``(m,)`` samples that the inducing points are, or None.
        seed: Seed of what was drawn; None if nothing was.
    """

    def __init__(
        self, cross: LinearOperator, square: LinearOperator, indices: Tensor | None, seed: int | None
    ) -> None:
        self.cross, self.square, self.indices, self.seed = cross, square, indices, seed


def induce(
    kernel: LinearOperator, inducing: Any, num_inducing: int | None, generator: torch.Generator | None
) -> Inducing:
    """Return K_XZ and K_ZZ for inducing points given as inputs, as indices, or by a rule.

    Raises:
        InputError: If there are none or too many of them, or the rule is unknown.
        ShapeError: If the kernel is not square, or not over whole samples.
    """
    if kernel.shape[-1] != kernel.shape[-2]:
        raise ShapeError(f"a Nyström approximation is of a square kernel, this one is {tuple(kernel.shape)}")
    if not isinstance(kernel, EngineOperator):
        return _of_any(kernel, inducing)
    rows = kernel._core.rows
    if not kernel._core.symmetric or not isinstance(rows, StateAxis) or rows.pick is not None:
        raise ShapeError(
            "inducing points are whole samples, and this kernel is a slice or between two sets: take "
            "nystrom_ntk(K, ...) of the square kernel, and slice the result"
        )
    seed = None
    if isinstance(inducing, str):
        inducing, seed = _by_rule(kernel, rows, inducing, num_inducing, generator)
    elif num_inducing is not None:
        raise InputError("num_inducing goes with a rule ('kmeans', 'random', 'rpcholesky') alone")
    indices = _indices(inducing, rows.num_samples)
    points = rows.over(_inputs(kernel, rows, inducing)) if indices is None else _samples(rows, indices)
    core = kernel._core
    return Inducing(
        kernel._rebuild(core.with_axes(rows, points)),
        kernel._rebuild(core.with_axes(points, points)),
        indices,
        seed,
    )


def induce_over_ranks(
    kernel: Any, inducing: Any, num_inducing: int | None, generator: torch.Generator | None
) -> tuple[Tensor, Tensor, int | None]:
    """Return the samples that are inducing points of a kernel over ranks, their rows, and the seed of a draw.

    Raises:
        InputError: If there are none or too many of them.
        ShardingError: If ranks give different ones.
        UnsupportedOperationError: If they are neither indices nor "random", or the kernel is not square, or
            none of a model.
    """
    space, shape = kernel.space, getattr(kernel, "sample_counts", None)
    if shape is None or not kernel.symmetric:
        raise UnsupportedOperationError(
            f"inducing points of a {type(kernel).__name__} over several ranks: take the square kernel of "
            "ntkops.ntk(model, shard, group=group)"
        )
    count, width = shape
    seed = None
    if isinstance(inducing, str) and inducing == "random":
        if not isinstance(num_inducing, int) or isinstance(num_inducing, bool):
            raise InputError(
                f"inducing='random' needs num_inducing, the number of points; got {num_inducing!r}"
            )
        _check_count(max(num_inducing, 0), count)
        generator = space.common(resolve_generator(generator)[0])
        seed = generator.initial_seed()
        inducing = torch.randperm(count, generator=generator)[:num_inducing]
    elif num_inducing is not None and not isinstance(inducing, str):
        raise InputError("num_inducing goes with a rule, which over several ranks is 'random'")
    indices = space.together(lambda: _indices(inducing, count), "reading the inducing points")
    given = space.share(None if indices is None else indices.tolist())
    if indices is None or None in given:
        raise UnsupportedOperationError(
            "inducing points of a kernel over several ranks are 'random', or numbers of samples counted over "
            "all ranks; ntkops.distill.select(K, m, 'rpcholesky') chooses some"
        )
    if any(other != given[0] for other in given):
        raise ShardingError("ranks give different inducing points: give all of them the same numbers")
    return indices, (indices[:, None] * width + torch.arange(width)).flatten(), seed


def _samples(rows: StateAxis, indices: Tensor) -> StateAxis:
    """Return all rows of some samples, or nodes."""
    if not rows.inputs.is_coupled:
        return StateAxis(rows.inputs.select(indices), rows.outputs)
    width = rows.num_outputs
    return rows.take((indices[:, None] * width + torch.arange(width)).flatten())


def _of_any(kernel: LinearOperator, inducing: Any) -> Inducing:
    """Return the blocks of an operator that is not ours, whose inducing points are among its rows."""
    indices = None if isinstance(inducing, str) else _indices(inducing, kernel.shape[-1])
    if indices is None:
        raise UnsupportedOperationError(
            f"{type(kernel).__name__} is no kernel of a model: give its inducing points as indices"
        )
    return Inducing(kernel[..., :, indices], kernel[..., indices, :][..., :, indices], indices, None)


def _inputs(kernel: EngineOperator, rows: StateAxis, inducing: Any) -> Inputs:
    """Return inducing points that are samples of their own, checked against the kernel's."""
    inputs = kernel._core.engine.linearization.inputs(inducing)
    if inputs.output_shape[inputs.is_coupled :] != rows.output_shape:
        raise ShapeError(
            f"the inducing points have outputs of shape {tuple(inputs.output_shape)}, those of the kernel "
            f"{tuple(rows.output_shape)}"
        )
    _check_count(inputs.output_shape[0] if inputs.is_coupled else inputs.num_samples, rows.num_samples)
    return inputs


def _indices(inducing: Any, count: int) -> Tensor | None:
    """Return distinct sample numbers, or None where these are inputs."""
    if isinstance(inducing, list | range | np.ndarray):
        if len(inducing) == 0:
            _check_count(0, count)
        inducing = torch.as_tensor(np.asarray(inducing))
    if not isinstance(inducing, Tensor) or inducing.dim() != 1 or inducing.is_floating_point():
        return None
    if inducing.dtype == torch.bool:
        if len(inducing) != count:
            raise InputError(f"a mask of inducing points needs {count} entries, got {len(inducing)}")
        inducing = inducing.nonzero().flatten()
    numbers = inducing.detach().cpu().long()
    outside = (numbers < -count) | (numbers >= count)
    if bool(outside.any()):
        raise InputError(
            f"inducing point {int(numbers[outside][0])} does not exist: there are {count} samples"
        )
    numbers = torch.where(numbers < 0, numbers + count, numbers)
    # The first of equal numbers stays, in the given order: the least position among those of each value.
    _, inverse = torch.unique(numbers, return_inverse=True)
    first = torch.full((int(inverse.max()) + 1 if len(numbers) else 0,), len(numbers), dtype=torch.int64)
    first = first.scatter_reduce(0, inverse, torch.arange(len(numbers)), "amin")
    distinct = numbers[first.sort().values]
    if len(distinct) < len(numbers):
        logger.info(
            "%d of %d inducing points are duplicates and left out", len(numbers) - len(distinct), len(numbers)
        )
    _check_count(len(distinct), count)
    return distinct


def _check_count(number: int, count: int) -> None:
    """Raise unless there is a point, and no more points than samples."""
    if number == 0:
        raise InputError("there are no inducing points: give at least one")
    if number > count:
        raise InputError(
            f"{number} inducing points for {count} samples: with more points than samples the kernel itself "
            "is cheaper; give at most as many"
        )


def _by_rule(
    kernel: EngineOperator,
    rows: StateAxis,
    rule: str,
    number: int | None,
    generator: torch.Generator | None,
) -> tuple[Any, int]:
    """Return inducing points by a rule: sample numbers, or new inputs for "kmeans"."""
    if rule not in _RULES:
        raise InputError(f"inducing={rule!r}: choose 'kmeans', 'random' or 'rpcholesky', inputs, or indices")
    count = rows.num_samples
    if not isinstance(number, int) or isinstance(number, bool):
        raise InputError(f"inducing={rule!r} needs num_inducing, the number of points; got {number!r}")
    _check_count(max(number, 0), count)
    generator, seed = resolve_generator(generator)
    if rule == "random":
        return torch.randperm(count, generator=generator)[:number], seed
    if rows.inputs.is_coupled:
        raise UnsupportedOperationError(
            f"inducing={rule!r} chooses among samples by themselves, and the nodes of a graph are coupled: "
            "use 'random', or numbers of nodes"
        )
    if rule == "kmeans":
        return _centres(rows.inputs, number, generator), seed
    every = StateAxis(rows.inputs, rows.outputs.reshape(-1, 1))  # summed over outputs and batch
    traced = kernel._rebuild(kernel._core.with_axes(every, every))
    found = rpcholesky(
        kernel_columns(traced),
        capabilities(traced).diagonal(),
        number,
        block_size=min(100, max(25, number // 4)),  # each block is one pass through all gradients
        entries=kernel_entries(traced),
        generator=generator,
    )
    if found.rank < number:
        logger.info("%d inducing points reproduce the kernel: no more are taken", found.rank)
    return found.pivots, seed


def _centres(inputs: Inputs, number: int, generator: torch.Generator) -> Tensor:
    """Return the centres of k-means clusters of the inputs."""
    try:
        from sklearn.cluster import KMeans
    except ImportError as error:
        raise MissingDependencyError(
            "inducing='kmeans' uses scikit-learn, which is not installed: pip install scikit-learn"
        ) from error
    parts = [batch.tensors for _, _, batch in inputs.batches()]
    if any(len(part) != 1 or not part[0].is_floating_point() for part in parts):
        raise InputError(
            "inducing='kmeans' needs samples that are one floating tensor each, since their means have to "
            "be inputs: use 'random' or 'rpcholesky'"
        )
    x = torch.cat([part[0] for part in parts]).detach()
    state = int(torch.randint(0, 2**31 - 1, (1,), generator=generator))
    found = KMeans(number, n_init=1, random_state=state).fit(x.flatten(1).double().cpu().numpy())
    centres = torch.as_tensor(found.cluster_centers_, dtype=x.dtype, device=x.device)
    return centres.reshape(number, *x.shape[1:])
