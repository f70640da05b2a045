"""Products whose passes are counted, for any operator.

Our engines report the passes that they make. Columns that a foreign operator or a dense tensor
multiplies are reported here, once, wherever such an operator stands inside a sum or a multiple.
"""

from __future__ import annotations

import torch
from linear_operator.operators import (
    BlockDiagLinearOperator,
    CatLinearOperator,
    ConstantMulLinearOperator,
    DenseLinearOperator,
    DiagLinearOperator,
    LinearOperator,
    MatmulLinearOperator,
    RootLinearOperator,
    SumLinearOperator,
)
from torch import Tensor

from ..engines import LayerwiseEngine, count_passes
from ..engines.passes import report_passes
from ..errors import NonFiniteError
from ..model.context import full_precision
from ..vectors import Space
from .axes import StateAxis
from .products import ProductOperator

__all__ = ["cache_cost", "column_space", "multiply", "product_cost", "row_space"]


def multiply(operator: LinearOperator | Tensor, block: Tensor) -> Tensor:
    """Return ``operator @ block`` without a graph, its passes counted and its entries checked.

    Args:
        operator: ``(*batch, n, m)``.
        block: ``(*batch, m, k)``.

    Returns:
        ``(*batch, n, k)``.

    Raises:
        NonFiniteError: If the product is not finite.
    """
    with torch.no_grad(), full_precision(block.device):  # autocast takes no digits
        result = _multiply(operator, block)
    if not bool(torch.isfinite(result).all()):
        column = int((~torch.isfinite(result)).flatten(0, -2).any(0).nonzero()[0])
        raise NonFiniteError(
            f"the product of a {tuple(operator.shape)} operator ({type(operator).__name__}) with column "
            f"{column} holds NaN or infinity: entries of the operator do, or they overflow {operator.dtype}"
        )
    return result


def _multiply(operator: LinearOperator | Tensor, block: Tensor) -> Tensor:
    if isinstance(operator, Tensor | DenseLinearOperator):
        report_passes(products=_columns(operator, block))
        return operator @ block if isinstance(operator, Tensor) else operator.tensor @ block
    if isinstance(operator, DiagLinearOperator):
        return operator._matmul(block)
    if isinstance(operator, SumLinearOperator):
        total = _multiply(operator.linear_ops[0], block)
        for part in operator.linear_ops[1:]:
            total = total + _multiply(part, block)
        return total
    if isinstance(operator, ConstantMulLinearOperator):
        return operator.expanded_constant * _multiply(operator.base_linear_op, block)
    if isinstance(operator, BlockDiagLinearOperator):
        base = operator.base_linear_op
        split = block.unflatten(-2, (base.shape[-3], base.shape[-1]))
        return _multiply(base, split).flatten(-3, -2)
    with count_passes() as tally:
        result = operator._matmul(block)
    if tally.total == 0 and not _is_ours(operator):
        report_passes(products=_columns(operator, block))
    return result


def _is_ours(operator: LinearOperator) -> bool:
    return hasattr(operator, "structure") or isinstance(operator, ProductOperator)


def _columns(operator: LinearOperator | Tensor, block: Tensor) -> int:
    batch = torch.broadcast_shapes(operator.shape[:-2], block.shape[:-2])
    return batch.numel() * block.shape[-1]


def product_cost(operator: LinearOperator | Tensor) -> int:
    """Return the passes that one column of a product takes: what `multiply` will count.

    Args:
        operator: ``(*batch, n, m)``.

    Returns:
        Passes for one column in every batch entry; 0 for a diagonal operator.
    """
    if isinstance(operator, ProductOperator):
        axes = (operator._core.rows, operator._core.columns)
        directions = sum(isinstance(axis, StateAxis) for axis in axes)
        return directions * axes[0].batch_shape.numel() * axes[0].terms
    if hasattr(operator, "structure"):
        found = operator.structure.factors()
        return sum(product_cost(factor) for factor in found) if found else operator.shape[:-2].numel()
    if isinstance(operator, DiagLinearOperator):
        return 0
    if isinstance(operator, SumLinearOperator | CatLinearOperator):
        return sum(product_cost(part) for part in operator.linear_ops)
    if isinstance(operator, ConstantMulLinearOperator | BlockDiagLinearOperator):
        return product_cost(operator.base_linear_op)
    inside = _inner(operator)
    if any(_holds_ours(part) for part in inside):
        return sum(product_cost(part) for part in inside if _holds_ours(part))
    return operator.shape[:-2].numel()


def cache_cost(operator: LinearOperator | Tensor) -> float:
    """Return the most passes that caches of an operator may take once, which make its products faster."""
    if isinstance(operator, ProductOperator):
        engine = operator._core.engine
        if not isinstance(engine, LayerwiseEngine):
            return 0.0
        axes = (operator._core.rows, operator._core.columns)
        inputs = {id(axis.inputs): axis.inputs for axis in axes if isinstance(axis, StateAxis)}
        return sum(engine.diagonal_passes(known, known.num_outputs) for known in inputs.values())
    if hasattr(operator, "structure"):
        found = operator.structure.factors()
        return max((cache_cost(factor) for factor in found), default=0.0) if found else 0.0
    if isinstance(operator, SumLinearOperator):
        return sum(cache_cost(part) for part in operator.linear_ops)
    if isinstance(operator, ConstantMulLinearOperator | BlockDiagLinearOperator):
        return cache_cost(operator.base_linear_op)
    return sum(cache_cost(part) for part in _inner(operator) if _holds_ours(part))


def _inner(operator: LinearOperator | Tensor) -> tuple[LinearOperator, ...]:
    if isinstance(operator, MatmulLinearOperator):
        return operator.left_linear_op, operator.right_linear_op
    if isinstance(operator, RootLinearOperator):
        return operator.root, operator.root
    return ()


def _holds_ours(operator: LinearOperator) -> bool:
    parts = _inner(operator)
    if isinstance(operator, SumLinearOperator | CatLinearOperator):
        parts = tuple(operator.linear_ops)
    elif isinstance(operator, ConstantMulLinearOperator | BlockDiagLinearOperator):
        parts = (operator.base_linear_op,)
    return _is_ours(operator) or any(_holds_ours(part) for part in parts)


def column_space(operator: LinearOperator | Tensor) -> Space:
    """Return the space of the vectors that an operator multiplies."""
    own = getattr(operator, "domain", None)
    if isinstance(own, Space):
        return own
    if operator.shape[-2] == operator.shape[-1]:
        return row_space(operator)
    return row_space(operator.mT)


def row_space(operator: LinearOperator | Tensor) -> Space:
    """Return the space of an operator's rows: its own, that of its parts, or a local one."""
    own = getattr(operator, "space", None)
    if isinstance(own, Space):
        return own
    if isinstance(operator, SumLinearOperator):
        return next(
            (part.space for part in operator.linear_ops if isinstance(getattr(part, "space", None), Space)),
            Space(operator.shape[-2], operator.dtype, operator.device or "cpu"),
        )
    if isinstance(operator, ConstantMulLinearOperator):
        return row_space(operator.base_linear_op)
    return Space(operator.shape[-2], operator.dtype, operator.device or "cpu")  # an identity may have none
