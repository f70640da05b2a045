"""Axes, colours and numbers that every drawing needs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ..errors import MissingDependencyError, NonFiniteError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = [
    "COLOURS",
    "finite_array",
    "legend",
    "line_style",
    "logarithmic",
    "marker",
    "new_axes",
    "next_line",
]

# Okabe and Ito's palette without its yellow, which is too pale for lines on white.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
"""Colours of lines, in their order; told apart with every common kind of colour blindness."""
_DASHES = ("-", "--", ":", "-.")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X")
_DECADES = 1.5  # data that span more than this many decades get a logarithmic axis


def new_axes(ax: Axes | None) -> Axes:
    """Return the given axes, or those of a new figure."""
    if ax is not None:
        return ax
    try:
        from matplotlib import pyplot
    except ImportError as error:
        raise MissingDependencyError(
            "plots need matplotlib, which is not installed: pip install matplotlib"
        ) from error
    return pyplot.subplots(layout="constrained")[1]


def finite_array(x: Any, what: str) -> np.ndarray:
    """Return finite float64 numbers of a tensor, array or nested list."""
    numbers = x.detach().to("cpu", torch.float64).numpy() if isinstance(x, Tensor) else np.asarray(x, float)
    if not np.isfinite(numbers).all():
        # the first of them, so that it can be found in the data
        place = tuple(int(i) for i in np.argwhere(~np.isfinite(numbers))[0])
        raise NonFiniteError(f"{what} is not finite at position {place}; only finite numbers can be drawn")
    return numbers


def line_style(position: int) -> dict[str, Any]:
    """Return colour and dashes of the line with this number."""
    cycle, colour = divmod(position, len(COLOURS))
    return {"color": COLOURS[colour], "linestyle": _DASHES[cycle % len(_DASHES)]}


def marker(position: int) -> str:
    return _MARKERS[position % len(_MARKERS)]


def next_line(ax: Axes) -> dict[str, Any]:
    """Return colour and dashes that the lines already on the axes do not have."""
    labels = [str(line.get_label()) for line in ax.get_lines()]  # caps and marks have labels of their own
    return line_style(sum(label[:1] != "_" or label.startswith("_child") for label in labels))


def logarithmic(ax: Axes, values: np.ndarray) -> None:
    """Give the vertical axis a logarithmic scale where positive values span decades."""
    positive = values[values > 0]
    if positive.size and np.log10(positive.max() / positive.min()) > _DECADES:
        ax.set_yscale("log")


def legend(ax: Axes, **kwargs: Any) -> None:
    """Add a small legend, without a frame: a curve that runs along its edge, or below it, stays visible."""
    ax.legend(**{"fontsize": "small", "frameon": False, **kwargs})
