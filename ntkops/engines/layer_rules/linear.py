"""Matrix products: `torch.nn.functional.linear` and ``x @ W``."""

from __future__ import annotations

from collections.abc import Hashable

import torch
import torch.nn.functional as F
from torch import Tensor

from ...model.record import Call, Entry
from .base import Activation, Kind, Layout, Rule, flat_positions

__all__ = ["AffineProduct", "Linear", "MatrixProduct"]


class Linear(Rule):
    """y = x Wᵀ + b: the gradient is Σ_s g_s x_sᵀ, and Σ_s g_s for the bias."""

    entry = Entry("linear", ("input", "weight", "bias"), ("weight", "bias"))
    functions: tuple[Hashable, ...] = (F.linear,)
    shares_bias = True
    _features = "input"

    def supports(self, call: Call) -> bool:
        """A matrix, and samples beside the features."""
        return call.arguments["weight"].dim() == 2 and len(call.shape) >= 2

    def sample_axes(self, call: Call) -> range:
        """Every axis but that of the features."""
        return range(len(call.shape) - 1)

    def kind(self, role: str) -> Kind:
        """Outer products for the weight."""
        return "outer" if role == "weight" else "direct"

    def activation(self, call: Call, layout: Layout, count: int) -> Activation:
        """The input, ``(B, 1, d_in, S)``."""
        exposed = layout.expose(call.arguments[self._features], count)
        return flat_positions(exposed, 0).unsqueeze(1)

    def gradient(self, call: Call, layout: Layout, count: int, gradients: Tensor) -> Tensor:
        """The output gradients, ``(B, K, 1, d_out, S)``."""
        return flat_positions(layout.expose(gradients, count, 1), 1).unsqueeze(2)

    def direct(
        self, call: Call, role: str, activation: object, layout: Layout, count: int, gradients: Tensor
    ) -> Tensor:
        """The bias: output gradients summed over positions."""
        return layout.expose(gradients, count, 1).flatten(2, -2).sum(2)


class MatrixProduct(Linear):
    """y = x W with a matrix W, as functional code writes it."""

    entry = Entry("matmul", ("input", "other"), ("other",))
    functions: tuple[Hashable, ...] = (
        torch.matmul,
        torch.mm,
        torch.Tensor.matmul,
        torch.Tensor.mm,
        torch.Tensor.__matmul__,
    )

    def supports(self, call: Call) -> bool:
        """A matrix on the right, and samples beside the features on the left."""
        return call.arguments["other"].dim() == 2 and len(call.shape) >= 2

    def kind(self, role: str) -> Kind:
        """Outer products."""
        return "outer"

    def transposed(self, role: str) -> bool:
        """W is d_in × d_out."""
        return True


class AffineProduct(MatrixProduct):
    """y = b + x W in one call, `torch.addmm`."""

    entry = Entry("addmm", ("input", "mat1", "mat2"), ("input", "mat2"))
    functions = (torch.addmm,)
    _features = "mat1"

    def supports(self, call: Call) -> bool:
        """A vector added to a matrix product, neither of them scaled."""
        return call.arguments.keys() == {"input", "mat1", "mat2"} and call.arguments["input"].dim() == 1

    def kind(self, role: str) -> Kind:
        """Outer products for the matrix."""
        return "outer" if role == "mat2" else "direct"
