"""Kernels: dense blocks, and their parts by parameters."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from torch import Tensor

from ..arguments import ArrayLike
from ..errors import ShapeError
from ..results import Estimate, Partition
from ._axes import COLOURS, finite_array, new_axes

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = [
    "plot_kernel",
    "plot_partition",
]


class LazyMatrix(Protocol):
    """An operator: what can be made dense."""

    def to_dense(self) -> Tensor:
        """Return all entries."""


def plot_kernel(
    matrix: ArrayLike | LazyMatrix | Estimate,
    ax: Axes | None = None,
    *,
    labels: Sequence[str] | None = None,
    **kwargs: Any,
) -> Axes:
    """Draw a kernel, or a block of one, as an image; the colours start at zero, or are symmetric around it.

    Lines divide the blocks of a kernel of several functions, ``ntkops.stack``, and these are named.

    Args:
        matrix: ``(r, c)`` entries: a tensor, an operator such as ``K[:50, :50]``, which is made dense, or an
            `Estimate` of a matrix, such as ``ntkops.partial_trace(K, over="samples")``.
        ax: Axes to draw on; None for new ones.
        labels: r names of the rows, and of the columns where these are as many, such as the classes; None for
            numbers, or for the names of blocks.
        **kwargs: For `matplotlib.axes.Axes.imshow`.

    Returns:
        The axes.

    Raises:
        ShapeError: If the entries are not a matrix, or its rows do not number as the labels.
        DenseMemoryError: If an operator is too large to be made dense.
        NonFiniteError: If one is not finite.
        MissingDependencyError: If matplotlib is missing.

    Example:
        >>> import ntkops, torch
        >>> from matplotlib.figure import Figure
        >>> K = ntkops.ntk(torch.nn.Linear(3, 2), torch.ones(4, 3))
        >>> classes = ntkops.partial_trace(K, over="samples")
        >>> ax = ntkops.plotting.plot_kernel(classes, Figure().subplots(), labels=("cat", "dog"))
        >>> [label.get_text() for label in ax.get_yticklabels()]
        ['cat', 'dog']
    """
    blocks = getattr(matrix, "blocks", None)  # of a kernel of several functions
    if isinstance(matrix, Estimate):
        matrix = matrix.value
    elif hasattr(matrix, "to_dense") and not isinstance(matrix, Tensor):
        matrix = matrix.to_dense()
    entries = finite_array(matrix, "the matrix")
    if entries.ndim != 2 or not entries.size:
        raise ShapeError(f"an image needs a matrix, got shape {entries.shape}")
    names = None if labels is None else [str(name) for name in labels]
    if names is not None and len(names) != len(entries):
        raise ShapeError(f"the matrix has {len(entries)} rows, but there are {len(names)} labels")
    ax = new_axes(ax)
    top = float(np.abs(entries).max()) or 1.0
    signed = bool((entries < 0).any())
    scale = {"cmap": "PuOr_r" if signed else "Oranges", "vmin": -top if signed else 0.0, "vmax": top}
    image = ax.imshow(entries, **{**scale, **kwargs})
    ax.figure.colorbar(image, ax=ax, label="entry of K", shrink=0.8)
    ax.set_xlabel("column")
    ax.set_ylabel("row")
    ax.locator_params(integer=True)
    if names is not None:
        ax.set_yticks(range(len(names)), names)
        if entries.shape[1] == len(names):
            ax.set_xticks(range(len(names)), names, rotation=90 if max(map(len, names)) > 2 else 0)
    elif blocks is not None:
        _divide(ax.axvline, ax.set_xticks, blocks.columns)
        _divide(ax.axhline, ax.set_yticks, blocks.rows)
    return ax


def _divide(line: Callable[..., Any], ticks: Callable[..., Any], parts: Mapping[str, Any]) -> None:
    """Draw a line between parts, and the name of each at its middle."""
    ends = np.cumsum([part.shape[-2] for part in parts.values()])
    starts = np.concatenate([[0], ends[:-1]])
    for end in ends[:-1]:
        line(end - 0.5, color="0.4", linewidth=0.8)
    ticks((starts + ends - 1) / 2, list(parts))


# -- parts of a kernel by parameters


def plot_partition(partition: Partition, ax: Axes | None = None, **kwargs: Any) -> Axes:
    """Draw the traces of the parts as bars, in the order of the partition.

    Args:
        partition: Of a square kernel without a batch.
        ax: Axes to draw on; None for new ones.
        **kwargs: For `matplotlib.axes.Axes.barh`.

    Returns:
        The axes.

    Raises:
        ShapeError: If the kernel has a batch, or is not square.
        MissingDependencyError: If matplotlib is missing.

    Example:
        >>> import ntkops, torch
        >>> from matplotlib.figure import Figure
        >>> model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 1))
        >>> parts = ntkops.partition(ntkops.ntk(model, torch.ones(5, 3)))
        >>> ax = ntkops.plotting.plot_partition(parts, Figure().subplots())
        >>> [label.get_text() for label in ax.get_yticklabels()]
        ['0', '2']
    """
    traces = finite_array(partition.trace.value, "a trace")
    if traces.ndim != 1:
        raise ShapeError(f"bars need one kernel, this partition is of a batch of {traces.shape[:-1]}")
    ax = new_axes(ax)
    ax.barh(range(len(traces)), traces, **{"color": COLOURS[0], **kwargs})
    ax.set_yticks(range(len(traces)), partition.names)
    ax.invert_yaxis()
    ax.set_xlabel("trace")
    ax.locator_params(axis="x", nbins=5)  # large numbers have no room for more
    ax.grid(visible=True, axis="x", alpha=0.3)
    return ax
