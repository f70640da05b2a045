"""Whether the two sides of a Gauss-Newton matrix, F Fᵀ and Fᵀ F, are those of one F."""

from __future__ import annotations

from collections.abc import Iterator

from ..curvature import GGNOperator
from ..results import Check
from ..vectors import Space
from ._products import Products, relative

__all__ = ["duality_checks"]


def duality_checks(G: GGNOperator, products: Products) -> Iterator[Check]:
    """Compare G = F Fᵀ with A = Fᵀ F, whose nonzero eigenvalues are the same.

    Args:
        G: The matrix over the parameters.
        products: Test vectors and the bound.

    Yields:
        One entry for products, and one for traces, which take other ways: products go through J and Jᵀ,
        traces through gradients of single samples and through the kernel.
    """
    F, A = G.left_linear_op, G.function_space
    vectors = Space(A.shape[-1], A.dtype, A.device).probes(
        products.right.shape[-1], products.generator, "gaussian"
    )
    error = relative(G @ (F @ vectors), F @ (A @ vectors))
    yield products.judge("duality", error, "(F Fᵀ) F v = F (Fᵀ F) v, with Fᵀ F = Sᵀ K S")
    traces = [side.diagonal().double().sum() for side in (G, A)]
    yield products.judge("traces of both sides", relative(*traces), "tr Jᵀ H J = tr Sᵀ K S")
