"""One rank's share of the samples, which may be none."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..model import Inputs, Linearization
from ..model.batch import Batch, BatchDim, Layout, Place, normalise

__all__ = ["no_samples", "take_shard"]


def take_shard(linearization: Linearization, x: Any) -> Inputs | None:
    """Return this rank's samples, checked; None where it has none."""
    return None if _is_empty(x, linearization.batch_dim) else linearization.inputs(x)


def _is_empty(x: Any, batch_dim: BatchDim) -> bool:
    """Whether there is no sample in what a rank was given."""
    if x is None:
        return True
    if isinstance(x, Inputs):
        return x.num_samples == 0
    if isinstance(x, Tensor) and isinstance(batch_dim, int):
        return x.dim() > batch_dim and x.shape[batch_dim] == 0
    if isinstance(x, tuple | Mapping):
        return normalise(x, batch_dim).num_samples == 0
    return hasattr(x, "__len__") and len(x) == 0


def no_samples(linearization: Linearization, output_shape: torch.Size) -> Inputs:
    """Return a view of no samples, whose outputs would have a shape."""
    # No model is run over it: a tensor without entries, and the number of outputs that samples would have.
    axis = linearization.state_dim or 0
    nothing = torch.empty((0,) * (axis + 1), dtype=linearization.dtype, device=linearization.device)
    batch = Batch((nothing,), Layout(Place(0), ("input",), (axis,)), output_shape.numel())
    return Inputs(batch, output_shape)
