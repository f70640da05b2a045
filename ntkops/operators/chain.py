"""A product of operators as the chain of its factors, and whether it reads the same from both ends."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from linear_operator.operators import (
    DiagLinearOperator,
    LinearOperator,
    MatmulLinearOperator,
    RootLinearOperator,
    to_linear_operator,
)
from torch import Tensor

from .axes import Axis, ParameterAxis, StateAxis
from .jacobian import JacobianOperator
from .products import Core

__all__ = ["is_symmetric_chain", "multiplied", "product_factors", "same_operator"]

Chain = tuple[LinearOperator, ...]


def product_factors(operator: LinearOperator) -> Chain:
    """Return the factors of a product from left to right: J beside a Jᵀ as a kernel, two diagonals as one."""
    if isinstance(operator, RootLinearOperator):
        root = product_factors(operator.root)
        return _joined((*root, *(factor.mT for factor in reversed(root))))
    if isinstance(operator, MatmulLinearOperator):
        return _joined(
            (*product_factors(operator.left_linear_op), *product_factors(operator.right_linear_op))
        )
    return (operator,)


def _joined(chain: Chain) -> Chain:
    """Multiply neighbours that make one operator: two Jacobians a kernel, two diagonals one."""
    found: list[LinearOperator] = []
    for factor in chain:
        last = found[-1] if found else None
        diagonals = isinstance(last, DiagLinearOperator) and isinstance(factor, DiagLinearOperator)
        if diagonals or isinstance(last, JacobianOperator) and isinstance(factor, JacobianOperator):
            assert last is not None
            together = last.matmul(factor)
            # Jᵀ J, or Jacobians of two snapshots, is a product like any other: both stay.
            if not isinstance(together, MatmulLinearOperator):
                found[-1] = to_linear_operator(together)
                continue
        found.append(factor)
    return tuple(found)


def multiplied(chain: Chain) -> LinearOperator:
    """Return the lazy product of a chain of one factor or more."""
    product = chain[0]
    for factor in chain[1:]:
        product = MatmulLinearOperator(product, factor)
    return product


def is_symmetric_chain(chain: Chain, middle: bool) -> bool:
    """Whether it is A M Aᵀ by what it is made of; ``middle``: whether M, if there is one, is symmetric."""
    # (A₁ ... A_h M B_h ... B₁)ᵀ is the chain itself if every B_i is A_iᵀ, and M, if there is one, symmetric.
    half = len(chain) // 2
    pairs = zip(chain[:half], reversed(chain), strict=False)
    return (middle or len(chain) % 2 == 0) and all(same_operator(a, b.mT) for a, b in pairs)


def same_operator(first: Any, second: Any) -> bool:
    """Whether two operators are the same matrix by what they are made of; False where that is not known."""
    if first is second:
        return True
    if isinstance(first, Tensor) and isinstance(second, Tensor):
        alike = first.shape == second.shape and first.dtype == second.dtype and first.device == second.device
        return alike and torch.equal(first, second)
    if isinstance(first, Core) and isinstance(second, Core):
        return _same_core(first, second)
    if not isinstance(first, LinearOperator):  # an option, such as the names of a stack's parts
        simple = isinstance(first, int | float | str | tuple | torch.Size | torch.device | None)
        return simple and type(first) is type(second) and first == second
    if type(first) is not type(second) or first.shape != second.shape:
        return False
    # linear_operator makes an operator anew of its arguments: equal ones make equal matrices.
    args = len(first._args) == len(second._args)
    args = args and all(same_operator(a, b) for a, b in zip(first._args, second._args, strict=True))
    # The axes of ours know their differences without a look at P parameters; linear_operator's are few.
    kept = (first._kwargs, second._kwargs)
    return (
        args
        and kept[0].keys() == kept[1].keys()
        and all(same_operator(v, kept[1][k]) for k, v in kept[0].items())
    )


def _same_core(first: Core, second: Core) -> bool:
    """Whether two cores have one snapshot, equal axes, and equal options of a kind, such as a projection."""
    one, two = first.engine.linearization, second.engine.linearization
    # How products are made, and what they have cost so far, does not change the matrix.
    others = [
        f.name for f in dataclasses.fields(first) if f.name not in ("engine", "rows", "columns", "spending")
    ]
    return (
        type(first) is type(second)
        and one is two
        and _same_axis(first.rows, second.rows)
        and _same_axis(first.columns, second.columns)
        and all(
            getattr(first, name) is getattr(second, name) or getattr(first, name) == getattr(second, name)
            for name in others
        )
    )


def _same_axis(first: Axis, second: Axis) -> bool:
    """Whether two axes have the same rows of the same samples, or the same entries of the parameters."""
    if first is second:
        return True
    if first.pick is None or second.pick is None:
        same = first.pick is second.pick
    else:
        same = torch.equal(first.pick, second.pick)
    if isinstance(first, StateAxis) and isinstance(second, StateAxis):
        return same and first.inputs is second.inputs and torch.equal(first.outputs, second.outputs)
    if isinstance(first, ParameterAxis) and isinstance(second, ParameterAxis):
        return same and first.size == second.size and first.slots.shape == second.slots.shape
    return False
