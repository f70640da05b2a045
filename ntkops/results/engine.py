"""What an engine did, and how each layer entered."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field

from ..errors import NtkopsWarning
from .estimate import PassCount
from .html import facts_html, table_html

__all__ = ["EngineInfo", "LayerInfo"]


@dataclass(frozen=True)
class LayerInfo:
    """How one parameter, or a range of its rows, enters kernels, diagonals and products.

    Attributes:
        parameter: Its name, with the range of rows where different functions use different ones.
        rule: Names of the functions that use it; "none" where automatic differentiation takes it.
        kind: "outer" (sums of outer products of output gradients and activations), "direct" (gradients
            that are small enough to be written down), "readout" (a linear layer at the end, wider than what
            it reads: one backward pass for each of its columns instead of each output) or "autograd".
        kernel_route: "gram", "gradient" or "autograd": how dense kernels are made.
        diagonal_route: The same for diagonals.
        product_route: "factors", "dual", "gradient" or "autograd": how products are made from cached
            factors, once these pay.
        positions: Number of positions (pixels, time steps, calls) of one sample that share it; 0 where
            its gradients are written down.
        bias: Name of the bias that is computed together with it, if any.
        why: Why dense kernels take their route: the operations of each way, or what leaves no choice.
    """

    parameter: str
    rule: str
    kind: str
    kernel_route: str
    diagonal_route: str
    product_route: str
    positions: int
    bias: str | None = None
    why: str = ""


@dataclass(frozen=True)
class EngineInfo:
    """How an operator computes its products.

    Attributes:
        engine: Name of the engine.
        mode: Mode of differentiation: "forward" (torch.func vjp and jvp), "double"
            (double backward through torch.func), "classic" (torch.autograd.grad, twice) or
            "reverse" (only Jᵀ exists).
        per_sample: How per-sample Jacobians are made: "vmap" over samples and outputs, vmap over samples for
            one output after the other ("rows"), or a "loop" over samples.
        reasons: Why earlier modes were left, one line each.
        dense: Whether products now use a dense block that was built because it is cheaper.
        batch_size: Samples per pass.
        chunk_size: Columns per pass.
        max_dense_bytes: Limit for one dense result, in bytes.
        passes: Passes made by this engine so far.
        covered: Parameters that the layerwise engine computes from layer structure.
        layers: How the layerwise engine computes each parameter for this operator.
    """

    engine: str
    mode: str
    per_sample: str
    reasons: tuple[str, ...] = ()
    dense: bool = False
    batch_size: int | None = None
    chunk_size: int | None = None
    max_dense_bytes: int | None = None
    passes: PassCount = field(default_factory=PassCount)
    covered: tuple[str, ...] = ()
    layers: tuple[LayerInfo, ...] = ()

    def __repr__(self) -> str:
        """Show what was chosen, a line for each parameter that layer rules compute, and the reasons."""
        lines = [f"EngineInfo: {self.engine!r}, mode {self.mode!r}, {self.passes.total} passes so far"]
        lines.append(
            f"  {self.batch_size} samples and {self.chunk_size} columns a pass; dense results up to "
            f"{self.max_dense_bytes} bytes{'; products from a dense block' if self.dense else ''}"
        )
        lines += [
            f"  {layer.parameter}: {layer.rule}; kernel by {layer.kernel_route}"
            f"{f' ({layer.why})' if layer.why else ''}, diagonal by {layer.diagonal_route}, products by "
            f"{layer.product_route}"
            for layer in self.layers
        ]
        return "\n".join([*lines, *(f"  {reason}" for reason in self.reasons)])

    def _repr_html_(self) -> str:
        """Show the same in a notebook, with a table of the layers."""
        title, *_ = repr(self).splitlines()
        header = ("parameter", "rule", "kernel by", "why", "diagonal by", "products by", "positions")
        rows = [
            (
                layer.parameter,
                layer.rule,
                layer.kernel_route,
                layer.why,
                layer.diagonal_route,
                layer.product_route,
                layer.positions or "",
            )
            for layer in self.layers
        ]
        facts: dict[str, object] = {"samples a pass": self.batch_size, "columns a pass": self.chunk_size}
        reasons: dict[str, object] = {
            f"reason {number}": reason for number, reason in enumerate(self.reasons, 1)
        }
        return facts_html(title, facts | reasons) + (table_html(header, rows) if rows else "")

    @property
    def rung(self) -> str:
        """The former name of `mode`."""
        warnings.warn(
            "EngineInfo.rung is EngineInfo.mode now; the old name goes after two releases",
            NtkopsWarning,
            stacklevel=2,
        )
        return self.mode
