"""What each way costs: through a layer, in floating-point operations; of a dense kernel, in passes.

A layer's kernel can be made of its per-sample gradients ("gradient": build them, then one matrix
product) or of Gram matrices ("gram": activations with activations, output gradients with output
gradients, multiplied entry by entry and summed over positions). Products with cached factors can also
go through activations and output gradients one after the other ("factors").

Passes are the unit in which products and estimates are counted. A pass over N samples takes some
6 N S d_in d_out operations in a layer: two in each of the forward pass, the gradients of the activations
and those of the weight.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

__all__ = [
    "DiagonalRoute",
    "KernelRoute",
    "KernelShape",
    "LayerShape",
    "ProductRoute",
    "autograd_kernel_passes",
    "choose_diagonal",
    "choose_kernel",
    "choose_product",
    "diagonal_costs",
    "kernel_costs",
    "kernel_reason",
    "layerwise_kernel_passes",
    "product_costs",
    "tile_repeats",
    "written_at_once",
]

KernelRoute = Literal["gram", "gradient"]
DiagonalRoute = Literal["gram", "gradient"]
ProductRoute = Literal["factors", "dual", "gradient"]

# An entrywise operation on a large array costs about as much as this many multiplications inside a
# matrix product, since it is bound by memory: 140 against 2 billion a second and core.
_ENTRYWISE = 64
_NARROW = 1.3  # of products of two samples against products of all: 65 against 83 billion a second
# Share of a product of a matrix with its own transpose that T blocks of rows, each up to its diagonal, need:
# (1 + 1/T) / 2, .67 for three of them and .56 for eight.
_SYMMETRIC = 0.6
# Operations of a pass for each weight and position: two for the output, two for the gradient of the input,
# two for that of the weight.
_PASS = 6.0
_SPEED = 4.0  # of matrix products against passes, which spend their time on memory and on calls


@dataclass(frozen=True)
class LayerShape:
    """Sizes of one layer's factors.

    Attributes:
        positions: Number S of positions (pixels, time steps, calls) that share the weight.
        inputs: Length d_in of an activation.
        outputs: Length d_out of an output gradient.
        groups: Number of groups, each with its own d_in × d_out block.
        one_hot: Whether activations are unit vectors.
    """

    positions: int
    inputs: int
    outputs: int
    groups: int = 1
    one_hot: bool = False

    @property
    def entries(self) -> int:
        """Entries of the weight."""
        return self.groups * self.inputs * self.outputs


@dataclass(frozen=True)
class KernelShape:
    """Sizes of the kernel that is wanted.

    Attributes:
        left: Samples of the rows.
        right: Samples of the columns.
        rows: Outputs per sample in the rows of one kernel.
        columns: Outputs per sample in its columns.
        terms: Number of terms that are summed.
        kernels: Number of kernels.
        symmetric: Whether rows and columns are the same.
    """

    left: int
    right: int
    rows: int
    columns: int
    terms: int = 1
    kernels: int = 1
    symmetric: bool = False

    @property
    def entries(self) -> int:
        """Entries of all kernels."""
        return self.left * self.rows * self.right * self.columns * self.kernels


def written_at_once(layer: LayerShape) -> bool:
    """Return whether gradients are no larger than what they are made of: at least d_in positions.

    Then kernels and diagonals from gradients are also the cheapest ones.
    """
    return not layer.one_hot and layer.positions > 1 and layer.inputs <= layer.positions


def kernel_costs(layer: LayerShape, wanted: KernelShape) -> dict[KernelRoute, float]:
    r"""Return the cost of each way to a kernel.

    With N samples, C outputs and S positions: per-sample gradients cost
    :math:`2 N C S d_{in} d_{out} + 2 (N C)^2 d_{in} d_{out}`. Gram matrices (one group only) cost
    :math:`2 (N S)^2 d_{in}`, and for one output, or the sum of C, :math:`2 (N S)^2 C d_{out}` with an
    entrywise product; for C outputs the output gradients are moved through the Gram matrix of activations,
    :math:`2 (N S)^2 C d_{out} + 2 (N C)^2 S d_{out}`.
    """
    share = _SYMMETRIC if wanted.symmetric else 1.0
    # Gradients of single samples: one a row of each side, which is one side where both are the same.
    sides = wanted.left * wanted.rows + (0 if wanted.symmetric else wanted.right * wanted.columns)
    repeats = wanted.kernels * wanted.terms
    # A unit vector has one entry: Σ_s g_s e_{i_s}ᵀ costs S d_out, whatever d_in is.
    build = 2 * layer.positions * (layer.entries // (layer.inputs if layer.one_hot else 1)) * sides * repeats
    # Third term: each entry of the gradients is written and read once more, at the rate of memory.
    costs: dict[KernelRoute, float] = {
        "gradient": build
        + share * 2 * wanted.entries * wanted.terms * layer.entries
        + _ENTRYWISE * sides * repeats * layer.entries / 8
    }
    if layer.groups == 1:
        pairs = layer.positions**2
        inner = 1 if layer.one_hot else layer.inputs
        gram = 2.0 * wanted.left * wanted.right * pairs * inner
        products = wanted.entries * wanted.terms
        if layer.positions == 1:
            # ⟨g aᵀ, g' a'ᵀ⟩ = ⟨g, g'⟩ ⟨a, a'⟩, multiplied entry by entry as the sum is made.
            gram += 2 * products * layer.outputs + 4 * wanted.entries
        elif wanted.rows == wanted.columns == 1:
            # ⟨Σ_s g_s a_sᵀ, Σ_t g'_t a'_tᵀ⟩ = Σ_st ⟨g_s, g'_t⟩ ⟨a_s, a'_t⟩, all pairs of positions.
            gram += 2 * products * pairs * layer.outputs + _ENTRYWISE * wanted.entries * pairs
        else:
            # The same as Σ_s ⟨g_s, h_s⟩ with h_s = Σ_t ⟨a_s, a'_t⟩ g'_t, which all rows share.
            moved = wanted.left * wanted.right * wanted.columns * repeats * pairs * layer.outputs
            gram += _NARROW * 2 * (moved + products * layer.positions * layer.outputs)
        costs["gram"] = share * gram
    return costs


def _settled(layer: LayerShape, force: KernelRoute | None) -> tuple[KernelRoute, str] | None:
    """Return the way that needs no comparison of costs, and why, if there is one."""
    # The weight of a group sees its own activations alone: a Gram matrix would have to be made for each
    # group.
    if layer.groups > 1:
        return "gradient", "grouped: gradients alone"
    if force is not None:
        return force, "as chosen"
    if layer.positions == 1:
        return "gram", "no shared weights"
    return ("gradient", "gradients are no larger than their factors") if written_at_once(layer) else None


def choose_kernel(layer: LayerShape, wanted: KernelShape, force: KernelRoute | None = None) -> KernelRoute:
    """Return the cheaper way to a kernel, or the forced one; without shared weights always Gram matrices."""
    settled = _settled(layer, force)
    if settled is not None:
        return settled[0]
    costs = kernel_costs(layer, wanted)
    return min(costs, key=lambda route: costs[route])


def kernel_reason(layer: LayerShape, wanted: KernelShape, force: KernelRoute | None = None) -> str:
    """Return why `choose_kernel` takes its way, for whoever reads the table of layers."""
    settled = _settled(layer, force)
    if settled is not None:
        return settled[1]
    costs = kernel_costs(layer, wanted)
    return ", ".join(f"{route} {cost / 1e9:.2g} GFLOP" for route, cost in sorted(costs.items()))


def diagonal_costs(layer: LayerShape) -> dict[DiagonalRoute, float]:
    """Return the cost of one squared gradient length of one sample, for each way."""
    # |Σ_s g_s a_sᵀ|² from the sum itself, or as Σ_st ⟨a_s, a_t⟩ ⟨g_s, g_t⟩, the g moved through the Gram
    # matrix of the a.
    if layer.one_hot:
        size = layer.positions * layer.outputs
        return {"gradient": 4.0 * size * layer.positions, "gram": 2.0 * layer.positions * size}
    costs: dict[DiagonalRoute, float] = {
        "gradient": 2.0 * layer.positions * layer.entries + _ENTRYWISE / 8 * layer.entries
    }
    if layer.groups == 1:
        costs["gram"] = layer.positions**2 * (layer.inputs + 2.0 * layer.outputs + _ENTRYWISE)
    return costs


def choose_diagonal(layer: LayerShape, force: DiagonalRoute | None = None) -> DiagonalRoute:
    """Return the cheaper way to the diagonal, or the forced one; without shared weights lengths multiply."""
    settled = _settled(layer, force)
    if settled is not None:
        return settled[0]
    costs = diagonal_costs(layer)
    return min(costs, key=lambda route: costs[route])


def product_costs(layer: LayerShape, left: int, right: int, outputs: int) -> dict[ProductRoute, float]:
    r"""Return the cost of one column of K v through one layer, for each way.

    With N samples on each side, C outputs and S positions: :math:`4 N S d_{in} d_{out} + 4 N S C d_{out}`
    for "factors"; :math:`2 (N S)^2 d_{out} + 4 N S C d_{out}` for "dual" (with the Gram matrix of
    activations); :math:`4 N C d_{in} d_{out}` for "gradient" (with the per-sample gradients kept).
    """
    both = left + right
    signals = 2.0 * both * layer.positions * outputs * layer.outputs * layer.groups
    costs: dict[ProductRoute, float] = {
        "factors": 2.0 * both * layer.positions * (layer.entries // (layer.inputs if layer.one_hot else 1))
        + signals,
        "gradient": 2.0 * both * outputs * layer.entries,
    }
    if layer.groups == 1:
        costs["dual"] = 2.0 * left * right * layer.positions**2 * layer.outputs + signals
    return costs


def choose_product(
    layer: LayerShape, left: int, right: int, outputs: int, force: ProductRoute | None = None
) -> ProductRoute:
    """Return the cheapest way for products with cached factors, or the forced one where the layer has it.

    Gradients are kept only for layers with shared weights, and whether they are does not depend on the
    number of samples: both sides of a cross kernel are then made ready in the same way.
    """
    if force == "dual" and layer.groups > 1:
        return "factors"
    if force is not None:
        return force
    if (layer.positions > 1 or layer.groups > 1) and not layer.one_hot:
        costs = product_costs(layer, 1, 1, outputs)  # of one sample on each side: both grow with N alike
        if costs["gradient"] < costs["factors"]:
            return "gradient"
    costs = product_costs(layer, left, right, outputs)
    return "dual" if costs.get("dual", math.inf) < costs["factors"] else "factors"


def _sides(wanted: KernelShape, distinct: int) -> float:
    """Return the gradient passes for the outputs of both sides, in passes over the rows' samples."""
    return distinct * (1.0 if wanted.symmetric else 1.0 + wanted.right / wanted.left)


def autograd_kernel_passes(wanted: KernelShape, distinct: int, nodes: int | None = None) -> float:
    """Return the passes, over the rows' samples, of a kernel from per-sample gradients.

    ``nodes`` is the number of coupled samples: to the engine they are one, whose pass goes over all of them.
    """
    entries = wanted.entries * wanted.terms
    share = 0.5 if wanted.symmetric else 1.0
    # A pass over N samples takes _PASS N P operations, a product of two gradients 2 P, at _SPEED times the
    # rate: P cancels.
    if nodes is not None:
        return _sides(wanted, distinct) + share * 2.0 * entries / (_PASS * _SPEED * nodes)
    # Per-sample gradients count twice, as they are slower.
    return 2.0 * _sides(wanted, distinct) + share * 2.0 * entries / (_PASS * _SPEED * wanted.left)


def tile_repeats(tile: Callable[[int], int], wanted: KernelShape, distinct: int) -> float:
    """Return how many times each gradient pass of a kernel is made at most, where tiles meet in pairs.

    With T tiles, passes of the rows are made once, those of the columns for each of them: (1 + T) N rows for
    two sides, half as many of a symmetric kernel. Where not even two samples fit with all outputs, pairs of G
    parts of the outputs meet, too: each part is made G times. The walk keeps a tile from one pair to the
    next, which saves up to a quarter where there are few. ``tile`` says how many samples fit with so many
    outputs, of which ``distinct`` ones occur.
    """
    size, few = max(wanted.rows, wanted.columns, 1), min(2, wanted.left)
    directions, fitting = distinct, tile(distinct)
    if fitting < few:  # outputs in groups: those of one kernel or term, then halves of them, as the walk cuts
        directions, fitting = size, tile(size)
    while directions > 1 and fitting < few:
        directions = -(-directions // 2)
        fitting = tile(directions)
    # Of the 2 N rows of both sides, once each, (1 + T) N are made: (1 + T) / 2 times.
    tiles = math.ceil(wanted.left / max(1, fitting))
    groups = math.ceil(size / directions) if directions < size else 1
    return groups * (1 + tiles) / 2


def layerwise_kernel_passes(
    wanted: KernelShape, distinct: int, layers: Sequence[LayerShape], force: KernelRoute | None = None
) -> float:
    """Return the passes, over the rows' samples, of a kernel from layers, each by its cheaper way."""
    one_pass = sum(_PASS * wanted.left * layer.positions * layer.entries for layer in layers)
    # Backward passes by what is asked for, and products in units of one pass over the same layers.
    contractions = sum(kernel_costs(layer, wanted)[choose_kernel(layer, wanted, force)] for layer in layers)
    return _sides(wanted, distinct) + contractions / max(_SPEED * one_pass, 1.0)
