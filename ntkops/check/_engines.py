"""Properties of the operators of ntkops: other ways to the same numbers, and a model left alone."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import torch

from ..errors import NtkopsError
from ..operators import JacobianOperator, NTKOperator
from ..operators.axes import StateAxis
from ..results import Check
from ._products import Products, relative

__all__ = ["engine_checks", "lazily", "state_inputs"]

Ours = JacobianOperator | NTKOperator


def state_inputs(operator: Ours) -> StateAxis:
    """Return the axis of the samples."""
    axes = (operator._core.rows, operator._core.columns)
    return next(axis for axis in axes if isinstance(axis, StateAxis))


def lazily(operator: Ours) -> Ours:
    """Return the same operator without a dense block, whose symmetry would prove nothing."""
    return operator._rebuild(dataclasses.replace(operator._core, limit=0))


def engine_checks(operator: Ours, products: Products) -> Iterator[Check]:
    """Check that the way of computing does not matter, and that nothing of the model changes."""
    engine = operator._core.engine
    linearization = engine.linearization
    before = [tensor.detach().clone() for tensor in linearization.parameters]
    origins = [(label, tensor, tensor.detach().clone()) for label, tensor in linearization.origins()]
    count = state_inputs(operator).inputs.num_samples
    # single samples, and a size that does not divide their number
    sizes = sorted({1, max(1, count // 2 + 1)})
    for size in sizes:
        yield _variant(
            operator, products, "batches" if size == 1 else "uneven batches", engine.name,
            batch_size=size, chunk_size=1,
            detail=f"batches of {size} samples, one column at a time",
        )  # fmt: skip
    if engine.name != "autograd":
        yield _variant(operator, products, "engines", "autograd", detail="layer structure against autograd")
    else:
        yield Check("engines", None, None, products.bound, "only autograd computes this operator")
    yield _adjoint_of_jacobian(operator, products)
    yield _samples(operator, products)
    changed = [
        name
        for name, tensor, old in zip(linearization.names, linearization.parameters, before, strict=True)
        if not torch.equal(tensor.detach(), old)
    ]
    changed += [label for label, tensor, old in origins if not torch.equal(tensor.detach(), old)]
    detail = (
        f"changed: {', '.join(changed)}" if changed else "parameters and buffers have the same bits as before"
    )
    yield Check("no mutation", not changed, None, 0.0, detail)


def _variant(
    operator: Ours, products: Products, name: str, engine: str, *, detail: str, **sizes: int
) -> Check:
    try:
        other = operator.with_engine(engine, **sizes)  # type: ignore[arg-type]
        found = lazily(other) @ products.right
    except NtkopsError as error:
        return Check(name, False, None, products.bound, f"{detail}: {type(error).__name__}: {error}")
    return products.judge(name, relative(found, products.forward), detail)


def _adjoint_of_jacobian(operator: Ours, products: Products) -> Check:
    """Compare J with Jᵀ by automatic differentiation: K = J Jᵀ is symmetric whatever they are."""
    jacobian = operator.left if isinstance(operator, NTKOperator) else operator
    try:
        J = lazily(jacobian.with_engine("autograd"))
        if J.engine_info.mode == "reverse":
            return Check("adjoint of J", None, None, products.bound, "the model has no forward derivative")
        probe = Products(J, 2, products.generator)
    except NtkopsError as error:
        return Check("adjoint of J", False, None, products.bound, f"{type(error).__name__}: {error}")
    return probe.adjoint("adjoint of J", "<u, J p> = <Jᵀ u, p>, by automatic differentiation")


def _samples(operator: Ours, products: Products) -> Check:
    """Look whether a part of the samples alone gives the same rows."""
    axis = state_inputs(operator)
    count, rows = axis.inputs.num_samples, operator.shape[-2]
    is_rows = operator._core.rows is axis
    if count < 2 or axis.pick is not None or not is_rows:
        return Check("independent samples", None, None, products.bound, "needs rows of two samples at least")
    few = max(1, count // 2)
    part = operator[..., : few * (rows // count), :]
    return products.judge(
        "independent samples",
        relative(part @ products.right, products.forward[..., : few * (rows // count), :]),
        f"the first {few} samples alone give the same rows",
    )
