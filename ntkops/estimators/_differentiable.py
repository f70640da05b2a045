r"""Sums of terms whose derivative is made term by term, and dense parts of operators with their graph.

A value that is a sum of many terms is computed without a graph. Its derivative is attached in one node, which
makes the terms again in the backward pass, one at a time: the memory is that of one term. Under
``create_graph`` it keeps the graphs of all terms, so that second derivatives exist.

A moment is a sum of many small terms: tiles of the kernel, chunks of its diagonal, or chunks of probes. The
value is computed without a graph, as always, and gets the derivative of that sum; see `_attached`.

With probes, the derivative is that of the estimate for those probes. For Hutchinson's form

.. math:: \nabla\, E[v^\top K v] = E[\nabla (v^\top K v)],

so the derivative of an unbiased estimate is unbiased. Hutch++ holds the basis Q of its sketch fixed: its form
:math:`\mathrm{tr}(Q^\top A Q) + E[v^\top (I - QQ^\top) A (I - QQ^\top) v]` is the trace of A for every A
and every fixed Q, and thus so is its derivative. Norms and ratios have the bias of relative order 1/m in
their derivatives that they have in their values.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from linear_operator.operators import (
    LinearOperator,
)
from torch import Tensor

from ..engines import count_passes
from ..errors import InputError, UnsupportedOperationError, ZeroKernelError
from ..operators.capabilities import capabilities, tile_slices
from ..results import Estimate
from ._quantities import ALIGNMENT, FROBENIUS_NORM, Inner, Quantity, exact_cost, exact_moments
from ._request import Operand, Request, operands
from ._statistics import LEVEL, Combination, Mean, Summary, interval_of, summarize
from ._two_sided import draw_probes, extend_basis, project_out

__all__ = [
    "differentiable_estimate",
]


Operators = Sequence[LinearOperator | Tensor]
Term = Callable[[Operators], Tensor]  # operators -> what it adds to the moments, (*batch, q), float64


def tensors_of(operator: LinearOperator | Tensor) -> tuple[Tensor, ...]:
    return (operator,) if isinstance(operator, Tensor) else operator.representation()


def require_recordable(operator: LinearOperator | Tensor) -> None:
    if not capabilities(operator).is_recordable:
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
    """A sum of terms of operators, and how the operators are made from their tensors."""

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


# -- quantities of live operators whose value can be differentiated with respect to the parameters


METHODS = ("exact", "hutchinson", "hutch++")

_WIDTH = 32  # probes of one term


def differentiable_estimate(
    quantity: Quantity,
    operators: Operators,
    *,
    rtol: float | None,
    num_passes: int | None,
    method: str,
    generator: torch.Generator | None,
    progress: bool,
) -> Estimate:
    """Return an estimate whose value has a graph down to the operators' tensors."""
    _require_method(method)
    request = Request.check(
        METHODS, method=method, rtol=rtol, num_passes=num_passes, generator=generator, progress=progress
    )
    given = operands(*operators)
    if quantity.needs_square:
        given[0].require_square(quantity.name)
    _require_live(operators)
    for operator in operators:
        require_recordable(operator)
    start = time.perf_counter()
    with count_passes() as counter:
        with torch.no_grad():
            cost = exact_cost(quantity, given)
        if method == "exact" or method == "auto" and request.allows(cost):
            moments, exact = _exact(quantity, operators, given, request, cost), True
            summary = None
        else:
            moments, summary = _sampled(quantity, operators, given, request, method)
            exact = False
    _require_derivative(quantity, moments.detach())
    value = _combination(quantity)(moments).cpu()
    plain = value.detach()
    result = Estimate.of_exact(plain, passes=counter.total, seconds=time.perf_counter() - start)
    if not exact:
        assert summary is not None
        result = _with_error(result, summary, request, quantity, given, method)
    return dataclasses.replace(result, value=value)


def _require_method(method: str) -> None:
    if method not in ("auto", *METHODS):
        raise UnsupportedOperationError(
            f"method={method!r} has no differentiable form; with differentiable=True choose 'auto' or one of "
            f"{', '.join(map(repr, METHODS))}"
        )


def _require_live(operators: Operators) -> None:
    if not torch.is_grad_enabled():
        raise InputError(
            "differentiable=True inside torch.no_grad() or inference mode: no graph can be recorded here; "
            "leave that context, or the option"
        )
    tensors = [tensor for operator in operators for tensor in tensors_of(operator)]
    if any(torch._C._functorch.is_functorch_wrapped_tensor(tensor) for tensor in tensors):
        raise UnsupportedOperationError(
            "differentiable=True records for torch.autograd, not for a torch.func transform around it; use "
            "torch.autograd.grad (create_graph=True for second derivatives), or K.diagonal() and products, "
            "which transforms can look into"
        )
    if any(tensor.requires_grad for tensor in tensors):
        return
    names = " and ".join(dict.fromkeys(type(operator).__name__ for operator in operators))
    raise UnsupportedOperationError(
        f"differentiable=True needs an operator with a graph, and no tensor of this {names} requires grad: a "
        "kernel is a snapshot unless it is made with ntkops.ntk(..., differentiable=True) from parameters "
        "that require grad"
    )


def _require_derivative(quantity: Quantity, moments: Tensor) -> None:
    quantity.require_defined(moments)
    if quantity is FROBENIUS_NORM and bool((moments <= 0).any()):
        raise ZeroKernelError(
            "the Frobenius norm has no derivative at a zero kernel; its square has one: "
            "ntkops.inner(K, K, differentiable=True)"
        )


def _combination(quantity: Quantity) -> Combination:
    """Return the quantity as a function of moments, without the clamps, which have no derivative."""
    if quantity is FROBENIUS_NORM:
        return lambda moments: moments[..., 0].sqrt()
    if quantity is ALIGNMENT:
        return lambda moments: moments[..., 0] / (moments[..., 1].sqrt() * moments[..., 2].sqrt())
    return quantity.combine


# -- exact


def _exact(
    quantity: Quantity, operators: Operators, given: Sequence[Operand], request: Request, cost: float
) -> Tensor:
    if not request.allows(cost):
        raise InputError(
            f"the exact value of {quantity.name} costs about {cost:.0f} passes, more than "
            f"num_passes={request.num_passes}; raise it, or choose an estimator"
        )
    with torch.no_grad():
        value = exact_moments(quantity, given)
        terms = _tile_terms(quantity, given) if quantity.needs_pairs else _diagonal_terms(given[0])
    return Total(operators, terms).attach(value)


def _diagonal_terms(operand: Operand) -> list[Term]:
    def term(rows: slice) -> Term:
        return lambda operators: (
            capabilities(operators[0]).recorded_diagonal(rows).double().sum(-1, keepdim=True)
        )

    return [term(rows) for rows in tile_slices(operand.shape[-1], operand.capabilities.tile_size())]


def _tile_terms(quantity: Quantity, given: Sequence[Operand]) -> list[Term]:
    sources = [operand.capabilities for operand in given]
    symmetric = all(source.symmetric for source in sources)
    size = min(source.tile_size() for source in sources)
    shape = given[0].shape

    def term(rows: slice, cols: slice) -> Term:
        mirrored = symmetric and cols.start > rows.start

        def sums(operators: Operators) -> Tensor:
            blocks = [capabilities(operator).recorded_tile(rows, cols).double() for operator in operators]
            return (2.0 if mirrored else 1.0) * _tile_moments(quantity, blocks, rows == cols)

        return sums

    corners = ((rows, cols) for rows in tile_slices(shape[-2], size) for cols in tile_slices(shape[-1], size))
    return [term(rows, cols) for rows, cols in corners if not symmetric or cols.start >= rows.start]


def _tile_moments(quantity: Quantity, blocks: Sequence[Tensor], on_diagonal: bool) -> Tensor:
    parts = []
    for moment in quantity.moments:
        if isinstance(moment, Inner):
            parts.append((blocks[moment.first] * blocks[moment.second]).sum((-2, -1)))
        else:
            block = blocks[moment.of]
            diagonal = block.diagonal(dim1=-2, dim2=-1).sum(-1)
            parts.append(diagonal if on_diagonal else torch.zeros_like(diagonal))
    return torch.stack(parts, dim=-1)


# -- with probes


def _sampled(
    quantity: Quantity, operators: Operators, given: Sequence[Operand], request: Request, method: str
) -> tuple[Tensor, Summary]:
    if request.num_passes is None or request.rtol is not None:
        raise InputError(
            "an estimate with differentiable=True takes num_passes= and no rtol=: a tolerance would be one "
            "of the value, and says nothing of its gradient; or take method='exact'"
        )
    unit = max(1, sum(operand.cost for operand in given))
    columns = request.num_passes // unit
    sketched = method != "hutchinson"
    least = 1 + 2 * len(given) if sketched else 1
    if columns < least:
        raise InputError(
            f"num_passes={request.num_passes} does not pay for {least} product columns of {unit} passes, "
            f"which {'hutch++' if sketched else 'hutchinson'} needs at least for {quantity.name}"
        )
    with torch.no_grad(), request.capped():
        probes, fixed = _probes(given, columns, request.generator, sketched)
        # The terms of every probe once without a graph, for the value and its error.
        counted = [operand.multiply for operand in given]
        plain = torch.cat([_products(quantity, counted, part) for part in probes.split(_WIDTH, -1)], -1)
        weights = torch.ones(probes.shape[-1], dtype=torch.float64, device=plain.device)
        # tr QᵀAQ sums its columns, the residual term is a mean over probes: one weight a column.
        weights[fixed:] = 1.0 / (probes.shape[-1] - fixed)
        value = plain @ weights  # (*batch, q)

    def term(start: int) -> Term:
        part, weight = probes[..., start : start + _WIDTH], weights[start : start + _WIDTH]
        return lambda current: _products(quantity, [one.__matmul__ for one in current], part) @ weight

    terms = [term(start) for start in range(0, probes.shape[-1], _WIDTH)]
    samples = plain.movedim(-2, 0).cpu()  # (q, *batch, k)
    means = [Mean(row[..., fixed:], row[..., :fixed].sum(-1)) for row in samples]
    return Total(operators, terms).attach(value), summarize(means, quantity.combine)


def _probes(
    given: Sequence[Operand], columns: int, generator: torch.Generator, sketched: bool
) -> tuple[Tensor, int]:
    """Return columns ``(*batch, n, k)``, and how many of them at the front are an orthonormal basis.

    The basis spans the products of all operators with one random sketch; the others are probes of its
    complement. Rows and columns play the parts that they play in `TwoSided`.
    """
    space, batch = given[0].columns, given[0].batch_shape

    def draw(where: Any, count: int) -> Tensor:
        return draw_probes(where, batch, count, generator, "rademacher")

    if not sketched:
        return draw(space, columns), 0
    width = min(columns // (1 + 2 * len(given)), space.size // len(given))
    parts, drawn = [], {}
    for operand in given:
        straight = operand.capabilities.symmetric or operand.is_square and len(given) == 1
        if straight not in drawn:
            drawn[straight] = draw(space if straight else operand.rows, width)
        parts.append(operand.multiply(drawn[True]) if straight else operand.pull(drawn[False]))
    empty = parts[0][..., :0]
    basis = extend_basis(space, empty, torch.cat(parts, dim=-1))
    rest = project_out(space, basis, draw(space, columns - width - width * len(given)))
    return torch.cat([basis, rest], dim=-1), basis.shape[-1]


def _products(quantity: Quantity, multiply: Sequence[Callable[[Tensor], Any]], probes: Tensor) -> Tensor:
    """Return what each probe adds to each moment, ``(*batch, q, k)``, float64."""
    products = [product(probes) for product in multiply]
    parts = []
    for moment in quantity.moments:
        if isinstance(moment, Inner):
            pair = products[moment.first], products[moment.second]
        else:
            pair = probes, products[moment.of]
        parts.append((pair[0].double() * pair[1].double()).sum(-2))
    return torch.stack(parts, dim=-2)


def _with_error(
    result: Estimate,
    summary: Summary,
    request: Request,
    quantity: Quantity,
    given: Sequence[Operand],
    method: str,
) -> Estimate:
    eps = given[0].rounding
    return dataclasses.replace(
        result,
        stderr=summary.stderr,
        interval=interval_of(summary, LEVEL, eps=eps, bounds=quantity.bounds),
        method="hutch++" if method == "auto" else method,
        exact=False,
        seed=request.seed,
    )
