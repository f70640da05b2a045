"""Tables: `torch.nn.functional.embedding`."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from ...model.record import Call, Entry
from .base import Activation, Kind, Layout, OneHot, Rule, flat_positions

__all__ = ["Embedding"]


class Embedding(Rule):
    """y_s = W[i_s]: the gradient is Σ_s e_{i_s} g_sᵀ, and the unit vectors are never written down."""

    entry = Entry(
        "embedding",
        ("input", "weight", "padding_idx", "max_norm", "norm_type", "scale_grad_by_freq", "sparse"),
        ("weight",),
    )
    functions = (F.embedding,)

    def supports(self, call: Call) -> bool:
        """Plain look-up: a padding row, renormalisation or scaled gradients are not its derivative."""
        given = call.arguments
        return (
            given.get("padding_idx") is None
            and given.get("max_norm") is None
            and not given.get("scale_grad_by_freq")
            and not given.get("sparse")
        )

    def sample_axes(self, call: Call) -> range:
        """Every axis of the indices."""
        return range(len(call.shape) - 1)

    def kind(self, role: str) -> Kind:
        """Outer products."""
        return "outer"

    def transposed(self, role: str) -> bool:
        """The table is d_in × d_out: one row for each unit vector."""
        return True

    def activation(self, call: Call, layout: Layout, count: int) -> Activation:
        """The rows that were looked up."""
        index = layout.expose(call.arguments["input"], count).flatten(1)
        return OneHot(index.long(), call.arguments["weight"].shape[0])

    def gradient(self, call: Call, layout: Layout, count: int, gradients: Tensor) -> Tensor:
        """The output gradients, ``(B, K, 1, d, S)``."""
        return flat_positions(layout.expose(gradients, count, 1), 1).unsqueeze(2)
