"""Samples that are images: chosen, distilled, asked for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from ..arguments import ArrayLike
from ..errors import ShapeError
from ._axes import finite_array, new_axes

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["plot_images"]


def plot_images(sets: Mapping[str, ArrayLike], ax: Axes | None = None, **kwargs: Any) -> Axes:
    """Draw sets of images below each other, a row for each: real samples beside distilled ones, say.

    Every set has its own scale, from its smallest to its largest entry, since distilled images leave the
    range of real ones.

    Args:
        sets: Name to images, ``(s, h, w)``, ``(s, 1, h, w)`` or, with colours, ``(s, 3, h, w)``; as
            ``distill.wasserstein(...).inputs`` are. Sets may differ in s, not in h and w.
        ax: Axes to draw on; None for new ones.
        **kwargs: For `matplotlib.axes.Axes.imshow`.

    Returns:
        The axes.

    Raises:
        ShapeError: If a set is no set of images, or their sizes differ.
        NonFiniteError: If an entry is not finite.
        MissingDependencyError: If matplotlib is missing.

    Example:
        >>> import torch
        >>> from matplotlib.figure import Figure
        >>> from ntkops.plotting import plot_images
        >>> rows = {"real": torch.rand(5, 8, 8), "distilled": torch.rand(3, 1, 8, 8)}
        >>> ax = plot_images(rows, Figure().subplots())
        >>> [label.get_text() for label in ax.get_yticklabels()]
        ['real', 'distilled']
    """
    if not sets:
        raise ShapeError("there is no set of images")
    rows = {name: _coloured(finite_array(images, f"the set {name!r}"), name) for name, images in sets.items()}
    sizes = {images.shape[1:3] for images in rows.values()}
    if len(sizes) > 1:
        raise ShapeError(f"images of unlike sizes {sorted(sizes)} cannot stand below each other")
    ((height, width),) = sizes
    count = max(map(len, rows.values()))
    # A line of white, the largest value, between neighbours.
    page = np.ones((len(rows) * (height + 1) - 1, count * (width + 1) - 1, 3))
    for r, images in enumerate(rows.values()):
        for c, image in enumerate(images):
            top, left = r * (height + 1), c * (width + 1)
            page[top : top + height, left : left + width] = image
    ax = new_axes(ax)
    ax.imshow(page, **{"interpolation": "nearest", **kwargs})
    ax.set_xticks([])
    ax.set_yticks([r * (height + 1) + (height - 1) / 2 for r in range(len(rows))], list(rows))
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)
    return ax


def _coloured(images: np.ndarray, name: str) -> np.ndarray:
    """Return images as ``(s, h, w, 3)`` between 0 and 1."""
    if images.ndim == 3:
        images = images[:, None]
    if images.ndim != 4 or images.shape[1] not in (1, 3) or not images.size:
        raise ShapeError(
            f"the set {name!r} has shape {images.shape}: images are (s, h, w), (s, 1, h, w) or (s, 3, h, w)"
        )
    low, high = images.min(), images.max()
    scaled = (images - low) / (high - low if high > low else 1.0)
    return np.broadcast_to(np.moveaxis(scaled, 1, -1), (len(images), *images.shape[2:], 3))
