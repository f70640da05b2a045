"""Properties that show in products alone."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property

import torch
from linear_operator.operators import LinearOperator
from torch import Tensor

from ..curvature import GGNOperator
from ..engines import free_bytes
from ..estimators._two_sided import draw_probes
from ..model.rounding import lowest_dtype
from ..operators import JacobianOperator, NTKOperator
from ..operators.axes import StateAxis
from ..results import Check
from ..vectors import Space

__all__ = [
    "Products",
    "duality_checks",
    "product_checks",
    "relative",
]


_UNITS = 1e3  # rounding units that pass


class Products:
    """Test vectors and the products with them.

    Args:
        operator: ``(*batch, n, m)``.
        columns: Vectors of each side.
        generator: CPU generator.
    """

    def __init__(self, operator: LinearOperator | Tensor, columns: int, generator: torch.Generator) -> None:
        self.operator = operator
        self.generator = generator
        self.left = self._draw(operator.shape[-2], columns)  # (*batch, n, k)
        self.right = self._draw(operator.shape[-1], columns)  # (*batch, m, k)
        self.bound = _UNITS * torch.finfo(self._precision()).eps

    def _draw(self, size: int, columns: int) -> Tensor:
        operator = self.operator
        batch = operator.shape[:-2]
        space = Space(size, operator.dtype, operator.device)
        return draw_probes(space, batch, columns, self.generator, "gaussian")

    def _precision(self) -> torch.dtype:
        """The coarsest dtype that enters a product."""
        operator = self.operator
        if not isinstance(operator, JacobianOperator | NTKOperator):
            return operator.dtype
        axes = (operator._core.rows, operator._core.columns)
        inputs = next(axis.inputs for axis in axes if isinstance(axis, StateAxis))
        _, _, batch = next(iter(inputs.select(torch.arange(1)).batches(None)))
        return lowest_dtype(operator._core.engine.linearization, batch)

    @cached_property
    def forward(self) -> Tensor:
        """K V."""
        return self.operator @ self.right

    @cached_property
    def backward(self) -> Tensor:
        """Kᵀ U."""
        return self.operator.mT @ self.left

    @property
    def is_square(self) -> bool:
        """Whether rows and columns are the same."""
        return self.operator.shape[-1] == self.operator.shape[-2]

    @property
    def is_symmetric(self) -> bool:
        """Whether the operator has to be symmetric: a kernel of one set of samples, a curvature."""
        operator = self.operator
        if isinstance(operator, NTKOperator):
            return operator._core.symmetric
        return isinstance(operator, GGNOperator)

    def adjoint(self, name: str, detail: str) -> Check:
        """Return the entry of the adjoint identity."""
        left = (self.left.double() * self.forward.double()).sum(-2)
        right = (self.backward.double() * self.right.double()).sum(-2)
        # relative to |u| |K v| and not to <u, K v>, which may vanish by chance
        scale = self.left.double().norm(dim=-2) * self.forward.double().norm(dim=-2)
        scale = scale + self.backward.double().norm(dim=-2) * self.right.double().norm(dim=-2)
        error = torch.where(scale > 0, (left - right).abs() / scale, 0.0)
        return self.judge(name, float(error.max()), detail)

    def judge(self, name: str, error: float, detail: str, bound: float | None = None) -> Check:
        """Return the entry of a property by its error."""
        bound = self.bound if bound is None else bound
        return Check(name, error <= bound, error, bound, detail)


def relative(found: Tensor, expected: Tensor) -> float:
    """Return the distance of two results relative to their length; 0 where both vanish."""
    found, expected = found.double(), expected.double()
    scale = max(float(found.norm()), float(expected.norm()))
    return float((found - expected).norm()) / scale if scale > 0 else 0.0


def product_checks(products: Products) -> Iterator[Check]:
    """Check what any operator has to satisfy."""
    K, V = products.operator, products.right
    forward, backward = products.forward, products.backward
    finite = bool(torch.isfinite(forward).all() and torch.isfinite(backward).all())
    yield Check("finite values", finite, None, 0.0, "" if finite else "a product has NaN or infinite entries")
    if not finite:
        return
    yield _repeatability(products)
    yield products.adjoint("adjoint", "<u, K v> = <Kᵀ u, v>")
    # unlike in size and sign, so that no error of scale cancels
    weights = torch.tensor([2.0, -3.0], dtype=K.dtype, device=K.device)
    combined = K @ (V[..., :2] @ weights.unsqueeze(-1))
    yield products.judge(
        "linearity",
        relative(combined, forward[..., :2] @ weights.unsqueeze(-1)),
        "K (2 v - 3 w) = 2 K v - 3 K w",
    )
    yield from _symmetry(products)
    yield _diagonal(products)


def _repeatability(products: Products) -> Check:
    operator, V = products.operator, products.right
    before = torch.random.get_rng_state()
    found = [products.forward]
    for _ in range(4):
        found.append(operator @ V)
        if len(found) > 2 and torch.equal(found[-1], found[-2]):
            break
    if not torch.equal(before, torch.random.get_rng_state()):
        return Check("repeatability", False, None, 0.0, "a product advances the global random state")
    # The first products may go by passes, later ones by what was cached since: once, and up to rounding.
    error = relative(found[-1], found[-2])
    same = error == 0 and all(relative(one, found[-1]) <= products.bound for one in found)
    detail = "the same product twice has the same bits, and the global random state is not used"
    return Check(
        "repeatability", same, error, 0.0, detail if same else f"two equal products differ by {error:.1e}"
    )


def _symmetry(products: Products) -> Iterator[Check]:
    if not products.is_symmetric:
        yield Check(
            "symmetry", None, None, products.bound, "rows and columns differ, or nothing says they agree"
        )
        yield Check("definiteness", None, None, products.bound, "for kernels of one set of samples")
        return
    K, V = products.operator, products.right
    transposed = K.mT @ V
    yield products.judge("symmetry", relative(transposed, products.forward), "K v = Kᵀ v")
    quadratic = (V.double() * products.forward.double()).sum(-2)
    scale = V.double().norm(dim=-2) * products.forward.double().norm(dim=-2)
    worst = torch.where(scale > 0, -quadratic / scale, 0.0).clamp(min=0).max()
    yield products.judge("definiteness", float(worst), "vᵀ K v >= 0")


def _diagonal(products: Products) -> Check:
    operator = products.operator
    if not products.is_square or not isinstance(operator, NTKOperator):
        return Check("diagonal", None, None, products.bound, "for square kernels")
    if operator.shape[-1] * operator.dtype.itemsize > free_bytes(operator.device) // 4:
        return Check("diagonal", None, None, products.bound, "too large for memory")
    rows = torch.randint(operator.shape[-1], (min(3, operator.shape[-1]),), generator=products.generator)
    unit = torch.zeros((*operator.shape[:-1], len(rows)), dtype=operator.dtype, device=operator.device)
    unit[..., rows, torch.arange(len(rows))] = 1
    entries = (operator @ unit)[..., rows, torch.arange(len(rows))]
    return products.judge(
        "diagonal", relative(operator.diagonal()[..., rows], entries), f"entries {rows.tolist()} by products"
    )


# -- whether the two sides of a Gauss-Newton matrix, F Fᵀ and Fᵀ F, are those of one F


def duality_checks(G: GGNOperator, products: Products) -> Iterator[Check]:
    """Compare G = F Fᵀ with A = Fᵀ F, whose nonzero eigenvalues are the same."""
    F, A = G.left_linear_op, G.function_space
    vectors = Space(A.shape[-1], A.dtype, A.device).probes(
        products.right.shape[-1], products.generator, "gaussian"
    )
    error = relative(G @ (F @ vectors), F @ (A @ vectors))
    yield products.judge("duality", error, "(F Fᵀ) F v = F (Fᵀ F) v, with Fᵀ F = Sᵀ K S")
    traces = [side.diagonal().double().sum() for side in (G, A)]
    yield products.judge("traces of both sides", relative(*traces), "tr Jᵀ H J = tr Sᵀ K S")
