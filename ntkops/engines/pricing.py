"""What a dense kernel costs, in passes: the unit in which products and estimates are counted.

A pass over N samples takes some 6 N S d_in d_out operations in a layer; matrix products run at about
four times the speed of passes, which spend their time on memory and on calls.
"""

from __future__ import annotations

from collections.abc import Sequence

from .cost import KernelRoute, KernelShape, LayerShape, choose_kernel, kernel_costs

__all__ = ["autograd_kernel_passes", "layerwise_kernel_passes"]

_PASS = 6.0
_SPEED = 4.0


def _sides(wanted: KernelShape, distinct: int) -> float:
    """Return the gradient passes for the outputs of both sides, in passes over the rows' samples."""
    return distinct * (1.0 if wanted.symmetric else 1.0 + wanted.right / wanted.left)


def autograd_kernel_passes(wanted: KernelShape, distinct: int) -> float:
    """Return the passes of a kernel from per-sample gradients, whose products cost 2 P an entry.

    Args:
        wanted: The kernel.
        distinct: Number of distinct outputs in it.

    Returns:
        Passes over the samples of the rows. Per-sample gradients count twice: they are slower.
    """
    entries = wanted.left * wanted.rows * wanted.right * wanted.columns * wanted.kernels * wanted.terms
    share = 0.5 if wanted.symmetric else 1.0
    return 2.0 * _sides(wanted, distinct) + share * 2.0 * entries / (_PASS * _SPEED * wanted.left)


def layerwise_kernel_passes(
    wanted: KernelShape, distinct: int, layers: Sequence[LayerShape], force: KernelRoute | None = None
) -> float:
    """Return the passes of a kernel from layer structure, each layer by its cheaper way.

    Args:
        wanted: The kernel.
        distinct: Number of distinct outputs in it.
        layers: The layers' sizes.
        force: A way to take whatever it costs, where a layer has it.

    Returns:
        Passes over the samples of the rows.
    """
    one_pass = sum(_PASS * wanted.left * layer.positions * layer.entries for layer in layers)
    contractions = sum(kernel_costs(layer, wanted)[choose_kernel(layer, wanted, force)] for layer in layers)
    return _sides(wanted, distinct) + contractions / max(_SPEED * one_pass, 1.0)
