"""What a fit is in the space of the parameters: the change Δθ with K_* α = J_* Δθ."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

import torch
from linear_operator.operators import (
    ConstantMulLinearOperator,
    DiagLinearOperator,
    LinearOperator,
    MatmulLinearOperator,
    RootLinearOperator,
    SumLinearOperator,
)
from torch import Tensor

from ..distributed import ShardedKernelOperator
from ..distributed.kernel import ShardedJacobianOperator
from ..errors import UnsupportedOperationError
from ..operators import JacobianOperator, NTKOperator
from ..operators.axes import ParameterAxis, StateAxis
from ..operators.capabilities import capabilities, multiply
from ..operators.chain import multiplied, product_factors
from ..operators.joined import JoinedOperator, is_stack
from ..operators.nystrom import NystromOperator
from ..operators.products import ProductOperator
from ..operators.projected import FeatureOperator
from ._fits import FeatureFit, Fit
from ._operands import Kernel, Layout
from ._rounding import added_share, precise_product

__all__ = ["ParameterChange", "parameter_change"]

Rows: TypeAlias = JacobianOperator | JoinedOperator | ShardedJacobianOperator


@dataclass(frozen=True, eq=False)
class ParameterChange:
    """Changes Δθ of the parameters, one for each column of a fit.

    Attributes:
        rows: J over the rows of the fitted kernel; a stack of J where it is of several functions; or J over
            this rank's rows.
        columns: ``(*batch, R·P, k)``, float64; R terms where the kernel is a trace over R outputs.
        tail: Shape of the targets that share a kernel; ``()`` where each has its own, or they are one column.
    """

    rows: Rows
    columns: Tensor
    tail: tuple[int, ...]

    @classmethod
    def of(cls, A: Kernel, block: Tensor, layout: Layout) -> ParameterChange:
        """Return G V for an operator A = J G; see `lift`."""
        return cls(*lift(A, block), layout.tail if layout.kind == "shared" else ())

    def named(self) -> dict[str, Tensor]:
        """Return the changes by parameter, ``(*batch, [R,] *tail, *shape)`` in the dtype of J."""
        jacobian = _first(self.rows)
        lin, terms = jacobian._core.engine.linearization, jacobian._core.columns.terms
        flat = self.columns.to(jacobian.dtype).unflatten(-2, (terms, lin.num_parameters)).mT
        targets = self.tail if self.columns.shape[-1] > 1 else ()
        lead = (*flat.shape[:-3], *((terms,) if terms > 1 else ()), *targets)
        parts = flat.split(list(lin.sizes), dim=-1)
        return {n: p.reshape(*lead, *s) for n, p, s in zip(lin.names, parts, lin.shapes, strict=True)}


def parameter_change(K: Kernel, fit: Fit, layout: Layout) -> ParameterChange:
    """Return the change of the parameters that a fit with K means.

    Raises:
        UnsupportedOperationError: If K does not know its Jacobian, or is traced over outputs and has several
            targets.
    """
    factors = capabilities(K).factors() if isinstance(fit, FeatureFit) else None
    if factors is None or not isinstance(fit, FeatureFit):
        return ParameterChange.of(K, fit.active, layout)
    # Weights of features are at most |y| / (2 √ridge), the dual coefficients |y| / ridge.
    return ParameterChange.of(factors[0], fit.weights, layout)


def lift(A: Kernel, block: Tensor) -> tuple[Rows, Tensor]:
    """Return J and G V for an operator A = J G whose first factor is a Jacobian over all its parameters.

    A kernel is J Jᵀ, so that G α are weights; its features seen through a projection are J Pᵀ, a Nyström
    kernel is K_XZ (K_ZZ⁺ K_ZX), and so on: whatever A is made of, its columns are combinations of gradients.

    Args:
        A: ``(*batch, n, m)``.
        block: V, ``(*batch, m, k)``, float64.

    Returns:
        J, and ``(*batch, R·P, k)`` in float64.

    Raises:
        UnsupportedOperationError: If A is not made from one Jacobian, or is traced over outputs and V has
            several columns: R outputs' worth of parameters for each.
    """
    if isinstance(A, ShardedKernelOperator):
        assert isinstance(A._core.rows, StateAxis)
        _require_few(A._core.rows, block)
        return A.left, _product(A.right.mT, block)
    if isinstance(A, NTKOperator):
        _require_few(A._rows, block)
        return lift(A.left, _product(A.right.mT, block))
    if isinstance(A, NystromOperator):
        root = A._root.double()
        return lift(A._left, root @ (root.mT @ _product(A._right.mT, block)))
    if isinstance(A, ConstantMulLinearOperator):
        rows, found = lift(A.base_linear_op, block)
        return rows, A.expanded_constant.double() * found
    if isinstance(A, SumLinearOperator):  # a diagonal is between the samples of the fit alone
        parts = [part for part in A.linear_ops if not isinstance(part, DiagLinearOperator)]
        if len(parts) == 1:
            return lift(parts[0], block)
    if isinstance(A, MatmulLinearOperator | RootLinearOperator):
        first, *rest = product_factors(A)
        return lift(first, _product(multiplied(tuple(rest)), block) if rest else block)
    if isinstance(A, JoinedOperator) and is_stack(A):  # weights of a loss scale rows, not parameters
        return A, block
    axis = A._core.columns if isinstance(A, JacobianOperator | FeatureOperator) else None
    if isinstance(axis, ParameterAxis) and axis.pick is None:
        assert isinstance(A, JacobianOperator | FeatureOperator)
        states = A._state_axes()[0]
        _require_few(states, block)
        if isinstance(A, JacobianOperator):
            return A, block
        whole = ParameterAxis.beside(states, A.num_parameters)
        jacobian = JacobianOperator(*A._args, core=A._core.with_axes(states, whole))
        return jacobian, whole.extract(A.projection.adjoint(axis.embed(block)))
    raise UnsupportedOperationError(
        f"the weights are Δθ = Jᵀ α, and a {type(A).__name__} does not know its Jacobian: take a kernel of "
        "ntkops.ntk, projected_ntk, nystrom_ntk or sandwich(J, M)"
    )


def _require_few(axis: StateAxis, block: Tensor) -> None:
    terms, columns = axis.terms, block.shape[-1]
    if terms > 1 and columns > 1:
        raise UnsupportedOperationError(
            f"a kernel traced over {terms} outputs has {terms} gradients a sample, so that {columns} targets "
            f"would take {terms * columns} copies of the parameters: fit outputs='each' or 'all', or one "
            "target; or predict with K.cross(x_new)"
        )


def _product(operator: LinearOperator, block: Tensor) -> Tensor:
    """Return a product in float64, with the digits of both parts.

    Warns:
        RoundingWarning: If what rounding may have added is above 1e-2 of its length.
    """
    if capabilities(operator).domain.is_spread:  # all ranks sum over their rows, and none warns alone
        high = block.to(operator.dtype)
        parts = torch.cat([high, (block - high.double()).to(operator.dtype)], dim=-1)
        made = multiply(operator, parts).double()
        return made[..., : block.shape[-1]] + made[..., block.shape[-1] :]
    found, added = precise_product(operator, block)
    added_share(operator, found, added, "weights")
    return found


def _first(rows: LinearOperator) -> ProductOperator:
    """Return the Jacobian of the first function of a stack."""
    while not isinstance(rows, ProductOperator):
        rows = rows.linear_ops[0] if isinstance(rows, JoinedOperator) else rows._args[0]
    return rows
