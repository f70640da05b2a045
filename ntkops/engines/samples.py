"""Per-sample gradients: one gradient a sample and cotangent, never summed over samples."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor

from ..model import Batch
from .rungs import Columns, Parameters, Rung, linearize_batch

__all__ = ["SampleMode", "sample_gradients"]

SampleMode = Literal["vmap", "rows", "loop"]
Function = Callable[[Sequence[Tensor], Batch], Tensor]


def sample_gradients(
    mode: SampleMode,
    rung: Rung,
    function: Function,
    params: Parameters,
    batch: Batch,
    cotangents: Tensor,
    columns: Columns = "vmap",
) -> Parameters:
    r"""Return :math:`J_i^\top v_{ir}` for every sample i and its own cotangents r.

    Args:
        mode: "vmap" over samples and cotangents, vmap over samples for one of the cotangents ("rows") after
            the other, or a "loop" over batches of one sample.
        rung: Rung of the ladder for the loop; vmap always goes through torch.func.
        function: Pure ``(params, batch) -> (B, O)``.
        params: The selected parameters.
        batch: B samples.
        cotangents: ``(B, r, O)``.
        columns: Whether the r cotangents of one sample go through vmap.

    Returns:
        One ``(B, r, *shape)`` for each parameter. Cost: r per-sample passes.
    """
    if mode != "loop" and rung in ("forward", "double"):
        if mode == "vmap" or cotangents.shape[1] == 1:
            return _vmapped(function, params, batch, cotangents)
        single = [_vmapped(function, params, batch, row) for row in cotangents.split(1, dim=1)]
        return tuple(torch.cat(blocks, dim=1) for blocks in zip(*single, strict=True))
    rows = []
    for index, tensors in enumerate(_single_samples(batch)):
        linearized = linearize_batch(
            "double" if rung == "forward" else rung, function, params, batch.replace(tensors), columns
        )
        rows.append(linearized.pull(cotangents[index].unsqueeze(1)))  # (r, 1, O)
    return tuple(torch.stack(blocks) for blocks in zip(*rows, strict=True))


def _single_samples(batch: Batch) -> list[tuple[Tensor, ...]]:
    axis = batch.batch_dim
    return list(zip(*(leaf.split(1, dim=axis) for leaf in batch.tensors), strict=True))


def _vmapped(function: Function, params: Parameters, batch: Batch, cotangents: Tensor) -> Parameters:
    axis = batch.batch_dim

    def single(leaves: tuple[Tensor, ...], vectors: Tensor) -> Parameters:
        sample = batch.replace(tuple(leaf.unsqueeze(axis) for leaf in leaves))
        pull = torch.func.vjp(lambda *values: function(values, sample)[0], *params)[1]
        if len(vectors) == 1:
            return tuple(g.unsqueeze(0) for g in pull(vectors[0]))
        return torch.func.vmap(pull)(vectors)

    return torch.func.vmap(single, in_dims=((axis,) * len(batch.tensors), 0))(batch.tensors, cotangents)
