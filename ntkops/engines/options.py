"""What a user may decide about the layerwise engine, instead of leaving it to the cost model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from ..errors import InputError
from .cost import DiagonalRoute, KernelRoute, ProductRoute

__all__ = ["Layerwise"]

Auto = Literal["auto"]


@dataclass(frozen=True)
class Layerwise:
    r"""The layerwise engine with choices of your own: pass it as ``engine=`` instead of a name.

    With activations a and output gradients g of S positions, a layer's kernel is
    :math:`\sum_{s,t} (a_s^\top a_t') (g_s^\top g_t')` ("gram") or the product of the per-sample gradients
    :math:`\sum_s g_s a_s^\top` ("gradient"). For several outputs "gram" moves the output gradients of one
    side through the inner products of activations, instead of making those of output gradients. All
    routes give the same numbers up to rounding; "auto" takes the one with the fewest operations, layer by
    layer, and ``K.engine_info.layers`` shows which.
    A layer for which a route does not exist (Gram matrices of grouped convolutions; parameters whose
    gradients are written down in any case) takes the other one.

    Args:
        kernel_route: "auto", "gram" or "gradient": how dense kernels and their tiles are made.
        diagonal_route: "auto", "gram" or "gradient": how diagonals and traces are made.
        product_route: "auto", "factors" (activations and output gradients one after the other), "dual"
            (with the Gram matrix of activations) or "gradient" (per-sample gradients, kept in memory):
            how products are made once factors are cached.
        max_backwards: Largest number of backward passes for one kernel or diagonal, above which it is
            refused; products then go without cached factors. A model takes one backward pass for each
            output, or, if it ends with a linear layer that reads d features, d for each position.

    Raises:
        InputError: If a route does not exist, or the limit is not a positive number.

    Example:
        >>> import torch, ntkops
        >>> _ = torch.manual_seed(0)
        >>> model = torch.nn.Sequential(torch.nn.Conv1d(2, 3, 3), torch.nn.Flatten(), torch.nn.Linear(12, 2))
        >>> x = torch.randn(4, 2, 6)
        >>> K = ntkops.ntk(model, x, engine=ntkops.Layerwise(kernel_route="gram"))
        >>> [(layer.parameter, layer.rule, layer.kernel_route) for layer in K.engine_info.layers]
        [('0.weight', 'convolution', 'gram'), ('2.weight', 'linear', 'gram')]
    """

    kernel_route: KernelRoute | Auto = "auto"
    diagonal_route: DiagonalRoute | Auto = "auto"
    product_route: ProductRoute | Auto = "auto"
    max_backwards: int = 4096

    def __post_init__(self) -> None:
        """Refuse what is not a route."""
        for name, routes in (
            ("kernel_route", get_args(KernelRoute)),
            ("diagonal_route", get_args(DiagonalRoute)),
            ("product_route", get_args(ProductRoute)),
        ):
            if getattr(self, name) not in ("auto", *routes):
                choices = ", ".join(repr(route) for route in routes)
                raise InputError(f"{name}={getattr(self, name)!r}: choose 'auto', {choices}")
        limit = self.max_backwards
        if not isinstance(limit, int) or isinstance(limit, bool) or limit < 1:
            raise InputError(f"max_backwards={limit!r}: pass a positive whole number")

    @property
    def kernel(self) -> KernelRoute | None:
        """The forced route of kernels, None for the cost model's."""
        return None if self.kernel_route == "auto" else self.kernel_route

    @property
    def diagonal(self) -> DiagonalRoute | None:
        """The forced route of diagonals, None for the cost model's."""
        return None if self.diagonal_route == "auto" else self.diagonal_route

    @property
    def product(self) -> ProductRoute | None:
        """The forced route of products, None for the cost model's."""
        return None if self.product_route == "auto" else self.product_route
