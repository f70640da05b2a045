"""Dense blocks of kernels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from ..errors import ShapeError
from ._axes import finite_array, new_axes

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["plot_kernel"]


def plot_kernel(matrix: Tensor | Sequence[Sequence[float]], ax: Axes | None = None, **kwargs: Any) -> Axes:
    """Draw a dense block of a kernel as an image; the colours start at zero, or are symmetric around it.

    Args:
        matrix: ``(r, c)`` entries, such as ``K[:50, :50].to_dense()``.
        ax: Axes to draw on; None for new ones.
        **kwargs: For `matplotlib.axes.Axes.imshow`.

    Returns:
        The axes.

    Raises:
        ShapeError: If the entries are not a matrix.
        NonFiniteError: If one is not finite.
        MissingDependencyError: If matplotlib is missing.
    """
    entries = finite_array(matrix, "the matrix")
    if entries.ndim != 2 or not entries.size:
        raise ShapeError(f"an image needs a matrix, got shape {entries.shape}")
    ax = new_axes(ax)
    top = float(np.abs(entries).max()) or 1.0
    signed = bool((entries < 0).any())
    scale = {"cmap": "PuOr_r" if signed else "Oranges", "vmin": -top if signed else 0.0, "vmax": top}
    image = ax.imshow(entries, **{**scale, **kwargs})
    ax.figure.colorbar(image, ax=ax, label="entry of K", shrink=0.8)
    ax.set_xlabel("column")
    ax.set_ylabel("row")
    return ax
