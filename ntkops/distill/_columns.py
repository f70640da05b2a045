"""The columns that Algorithm 1 collects: their order, and which of them add a direction."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import InputError
from ._local_spectra import LocalSpectra

__all__ = ["Columns", "collect", "cut", "distinct", "orthonormal", "sorted_columns"]

_REDUNDANT = 1e-6  # the paper leaves its ε open


@dataclass(frozen=True, eq=False)
class Columns:
    """Unit coefficient vectors and where they come from.

    Attributes:
        matrix: ``(m, s)``.
        values: ``(s,)`` the eigenvalue of each.
        cluster: ``(s,)`` the number of its cluster; -1 for a gap vector of the whole kernel.
        position: ``(s,)`` its place among the eigenvectors of that cluster, or of the whole kernel, from 0.
    """

    matrix: Tensor
    values: Tensor
    cluster: Tensor
    position: Tensor

    def __len__(self) -> int:
        return self.matrix.shape[1]

    def __getitem__(self, chosen: Tensor | slice) -> Columns:
        if isinstance(chosen, Tensor):
            chosen = chosen.cpu()  # where origins are, whatever the device of the matrix
        parts = (self.values[chosen], self.cluster[chosen], self.position[chosen])
        return Columns(self.matrix[:, chosen], *parts)


def collect(spectra: LocalSpectra, local_ranks: tuple[int, ...], gaps: Tensor) -> Columns:
    """Return the leading eigenvectors of all clusters, lifted, then the gap vectors: the paper's order."""
    blocks = [spectra.lifted(h, rank) for h, rank in enumerate(local_ranks)] + [spectra.vectors[:, gaps]]
    values = [v[:rank] for v, rank in zip(spectra.local_values, local_ranks, strict=True)]
    origin = [torch.full((rank,), h) for h, rank in enumerate(local_ranks)]
    return Columns(
        matrix=torch.cat(blocks, dim=1),
        values=torch.cat([*values, spectra.values[gaps]]),
        cluster=torch.cat([*origin, torch.full((len(gaps),), -1)]),
        position=torch.cat([*(torch.arange(rank) for rank in local_ranks), gaps.cpu()]),
    )


def sorted_columns(columns: Columns, order: str) -> Columns:
    """Return the columns in the paper's order, or by eigenvalue, largest first.

    Raises:
        InputError: If the order is unknown.
    """
    if order == "paper":
        return columns
    if order != "energy":
        raise InputError(f"order={order!r}: choose 'paper' or 'energy'")
    return columns[torch.argsort(columns.values, descending=True, stable=True)]


def distinct(columns: Columns) -> Columns:
    """Return what the paper's filter keeps: columns with |R_ii| > ε max |R_jj| in one QR without pivoting.

    They stay as they were, not orthonormal. Two faults of the filter stay, too: columns after the m-th have
    no R_ii and are dropped, and a column that depends on earlier ones adds an arbitrary direction to Q, by
    which later ones may be dropped that add to the span. `orthonormal` has neither.

    Returns:
        The columns that are kept, in their order.
    """
    pivots = torch.linalg.qr(columns.matrix).R.diagonal().abs()
    return columns[(pivots > _REDUNDANT * pivots.max()).nonzero().squeeze(-1).cpu()]


def orthonormal(columns: Columns) -> Columns:
    """Replace the columns by an orthonormal basis of their span, each by what it adds to those before it."""
    matrix = columns.matrix
    basis = matrix.new_empty(matrix.shape[0], min(matrix.shape))
    kept: list[int] = []
    for number in range(len(columns)):
        if len(kept) == matrix.shape[0]:
            break
        done = basis[:, : len(kept)]
        vector = matrix[:, number]
        for _ in range(2):  # once leaves rounding errors of the size of what was subtracted
            vector = vector - done @ (done.mT @ vector)
        length = torch.linalg.vector_norm(vector)
        if bool(length > _REDUNDANT):
            basis[:, len(kept)] = vector / length
            kept.append(number)
    found = columns[torch.tensor(kept, dtype=torch.int64)]
    return Columns(basis[:, : len(kept)].contiguous(), found.values, found.cluster, found.position)


def cut(columns: Columns, budget: int | None) -> Columns:
    """Return the first columns, or all."""
    return columns if budget is None else columns[: min(budget, len(columns))]
