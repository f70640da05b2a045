"""Parts of a kernel by parameters."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..errors import ShapeError
from ..results import Partition
from ._axes import COLOURS, finite_array, new_axes

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["plot_partition"]


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
