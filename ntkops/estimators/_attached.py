"""Sums of terms whose derivative is made term by term, and dense parts of operators with their graph.

A value that is a sum of many terms is computed without a graph. Its derivative is attached in one node, which
makes the terms again in the backward pass, one at a time: the memory is that of one term. Under
``create_graph`` it keeps the graphs of all terms, so that second derivatives exist.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from linear_operator.operators import (
    ConstantMulLinearOperator,
    DenseLinearOperator,
    DiagLinearOperator,
    LinearOperator,
    SumLinearOperator,
)
from torch import Tensor

from ..errors import UnsupportedOperationError
from ..operators.base import EngineOperator

__all__ = ["Operators", "Term", "Total", "diagonal_part", "block_part", "require_known", "tensors_of"]

Operators = Sequence[LinearOperator | Tensor]
Term = Callable[[Operators], Tensor]  # operators -> what it adds to the moments, (*batch, q), float64


def tensors_of(operator: LinearOperator | Tensor) -> tuple[Tensor, ...]:
    return (operator,) if isinstance(operator, Tensor) else operator.representation()


def require_known(operator: LinearOperator | Tensor) -> None:
    if isinstance(operator, SumLinearOperator):
        for part in operator.linear_ops:
            require_known(part)
    elif isinstance(operator, ConstantMulLinearOperator):
        require_known(operator.base_linear_op)
    elif not isinstance(operator, Tensor | DenseLinearOperator | DiagLinearOperator | EngineOperator):
        raise UnsupportedOperationError(
            f"a {type(operator).__name__} has no differentiable form here; kernels, Jacobians, dense "
            "tensors, diagonals, and sums and multiples of these have"
        )


class _Attach(torch.autograd.Function):
    """A value, with the derivative of the sum of the terms that it is made of."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, total: Total, *tensors: Tensor) -> Tensor:
        ctx.total = total
        ctx.save_for_backward(*tensors)
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> tuple[Tensor | None, ...]:
        tensors = ctx.saved_tensors
        create_graph = torch.is_grad_enabled()
        needed = [tensor.requires_grad for tensor in tensors]
        with torch.enable_grad():
            # Views: the output's gradient may depend on the same tensors, which must not be counted here.
            live = [
                (t.view_as(t) if create_graph else t.detach().requires_grad_()) if need else t
                for t, need in zip(tensors, needed, strict=True)
            ]
            wanted = [t for t, need in zip(live, needed, strict=True) if need]
            sums: list[Tensor | None] = [None] * len(wanted)
            for term in ctx.total.terms:
                value = term(ctx.total.rebuild(live))
                if not value.requires_grad:
                    continue
                gradients = torch.autograd.grad(
                    value, wanted, grad_outputs=outputs[0], create_graph=create_graph, allow_unused=True
                )
                sums = [_add(old, new) for old, new in zip(sums, gradients, strict=True)]
        found = iter(sums)
        return None, None, *(next(found) if need else None for need in needed)


def _add(total: Tensor | None, more: Tensor | None) -> Tensor | None:
    if total is None or more is None:
        return more if total is None else total
    return total + more


class Total:
    """A sum of terms of operators, and how the operators are made from their tensors.

    Args:
        operators: The operators.
        terms: What is summed.
    """

    def __init__(self, operators: Operators, terms: Sequence[Term]) -> None:
        self.terms = terms
        self._counts = [len(tensors_of(operator)) for operator in operators]
        self._trees = [
            None if isinstance(operator, Tensor) else operator.representation_tree() for operator in operators
        ]
        self._tensors = tuple(tensor for operator in operators for tensor in tensors_of(operator))

    def rebuild(self, tensors: Sequence[Tensor]) -> list[LinearOperator | Tensor]:
        """Return the operators made of other tensors."""
        built: list[LinearOperator | Tensor] = []
        start = 0
        for tree, count in zip(self._trees, self._counts, strict=True):
            part = tensors[start : start + count]
            built.append(part[0] if tree is None else tree(*part))
            start += count
        return built

    def attach(self, value: Tensor) -> Tensor:
        """Give a value, which is the sum of the terms, their derivative."""
        result: Tensor = _Attach.apply(value, self, *self._tensors)
        return result


def block_part(operator: LinearOperator | Tensor, rows: slice, cols: slice) -> Tensor:
    """Return a dense block ``(*batch, r, c)`` with its graph."""
    if isinstance(operator, Tensor):
        return operator[..., rows, cols]
    if isinstance(operator, DenseLinearOperator):
        return operator.tensor[..., rows, cols]
    if isinstance(operator, SumLinearOperator):
        blocks = [block_part(part, rows, cols) for part in operator.linear_ops]
        return sum(blocks[1:], start=blocks[0])
    if isinstance(operator, ConstantMulLinearOperator):
        return operator.expanded_constant * block_part(operator.base_linear_op, rows, cols)
    if isinstance(operator, DiagLinearOperator):
        full = torch.diag_embed(operator._diagonal()[..., rows])
        if rows == cols:
            return full
        return full.new_zeros((*full.shape[:-1], cols.stop - cols.start))
    assert isinstance(operator, EngineOperator)
    part = operator.submatrix(rows, cols)
    part._check_fresh()
    return part._dense_values(part._args)


def diagonal_part(operator: LinearOperator | Tensor, rows: slice) -> Tensor:
    """Return a part of the diagonal ``(*batch, r)`` with its graph."""
    if isinstance(operator, Tensor):
        return operator.diagonal(dim1=-2, dim2=-1)[..., rows]
    if isinstance(operator, SumLinearOperator):
        parts = [diagonal_part(part, rows) for part in operator.linear_ops]
        return sum(parts[1:], start=parts[0])
    if isinstance(operator, ConstantMulLinearOperator):
        constant = operator._constant
        return (constant.unsqueeze(-1) if constant.dim() else constant) * diagonal_part(
            operator.base_linear_op, rows
        )
    if isinstance(operator, EngineOperator):
        return operator.submatrix(rows, rows).diagonal()
    return operator.diagonal()[..., rows]
