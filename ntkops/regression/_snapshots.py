"""Which networks a kernel was made from, and what they say at its rows."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from linear_operator.operators import LinearOperator, MatmulLinearOperator
from torch import Tensor

from ..errors import InputError, ShapeError, StaleOperatorError, UnsupportedOperationError
from ..operators.axes import StateAxis
from ..operators.capabilities import Capabilities
from ..operators.chain import product_factors
from ..operators.jacobian import network_states
from ..operators.products import ProductOperator
from ._operands import Kernel, Layout

__all__ = [
    "has_unlike_lengths",
    "is_stored",
    "network_labels",
    "network_outputs",
    "require_same_rows",
    "require_same_snapshot",
    "row_axis",
]


def _sources(operator: object) -> Iterator[ProductOperator]:
    """Yield the operators of ours inside sums, multiples, projections and the like."""
    if isinstance(operator, ProductOperator):
        yield operator
    elif isinstance(operator, LinearOperator):
        for part in (*operator._args, *operator._kwargs.values()):
            yield from _sources(part)


def is_stored(operator: Kernel) -> bool:
    """Whether a kernel is made of numbers alone, with no network inside."""
    return next(_sources(operator), None) is None


def _snapshots(operator: Kernel) -> dict[int, ProductOperator]:
    return {id(source._core.engine.linearization): source for source in _sources(operator)}


def require_same_snapshot(fitted: Kernel, cross: Kernel) -> None:
    """Raise if a cross kernel was made from other parameters, or over other columns, than the fitted kernel.

    Operators of one `Linearization` share it. Others are compared tensor by tensor, so that a second
    kernel of an unchanged model is welcome. Dense matrices say nothing of their origin.

    Raises:
        InputError: If one is an approximation of the kernel, and the other is not.
        StaleOperatorError: If parameters, buffers, the choice of the output or a projection differ.
        ShapeError: If the columns are other outputs, or another choice of rows, than those of the fit.
    """
    kinds = [type(k).__name__ for k in (fitted, cross) if isinstance(k, Capabilities)]
    if len(set(kinds)) > 1:
        raise InputError(
            f"the fitted kernel is a {kinds[0]}, the cross kernel a {kinds[1]}: make it with .cross(x_new) "
            "from the kernel that was fitted"
        )
    _require_snapshot(fitted, cross, "the cross kernel", "Make it with K.cross(x_new), or fit again")
    if isinstance(fitted, ProductOperator) and isinstance(cross, ProductOperator):
        _require_same_columns(fitted, cross)
        keys = [getattr(getattr(k._core, "projection", None), "key", None) for k in (fitted, cross)]
        if keys[0] != keys[1]:
            raise StaleOperatorError(
                "the cross kernel is seen through another projection than the fitted kernel; make it with "
                "K.cross(x_new) from the kernel that was fitted"
            )


def _require_snapshot(fitted: Kernel, other: Kernel, what: str, way_out: str) -> None:
    known = _snapshots(fitted)
    for key, source in _snapshots(other).items():
        if known and key not in known:
            reasons = [_difference(source, one) for one in known.values()]
            if all(reason is not None for reason in reasons):
                raise StaleOperatorError(
                    f"{what} belongs to another snapshot of the network than the fitted kernel: "
                    f"{reasons[0]}. {way_out}"
                )


def require_same_rows(fitted: Kernel, cross: Kernel, prior: Kernel) -> None:
    """Raise if a prior covariance is not over the rows of a cross kernel. Dense matrices say nothing.

    Raises:
        StaleOperatorError: If it was made from other parameters than the fitted kernel.
        InputError: If its samples, its outputs or its choice of rows are not those of the cross kernel.
    """
    _require_snapshot(fitted, prior, "the prior", "Make it with ntkops.ntk(model, x_new), or fit again")
    one, two = row_axis(cross), row_axis(prior)
    if one is None or two is None or one is two:
        return
    picks = [None if axis.pick is None else axis.pick.tolist() for axis in (one, two)]
    if not torch.equal(one.outputs, two.outputs) or picks[0] != picks[1]:
        raise InputError(
            "the rows of the prior are other outputs, or another choice of rows, than those of the cross "
            "kernel: make it with the options of the fitted kernel"
        )
    if one.inputs.differ(two.inputs):
        raise InputError(
            "the prior is the kernel of other samples than the rows of the cross kernel: with K.cross(x_new) "
            "goes ntkops.ntk(model, x_new)"
        )


def row_axis(K: Kernel) -> StateAxis | None:
    """Return the axis of the rows of a kernel, or None where it is not known, or not one."""
    axes = {
        source._core.rows.key: source._core.rows
        for source in _sources(K)
        if isinstance(source._core.rows, StateAxis) and source.shape[-2] == K.shape[-2]
    }
    return next(iter(axes.values())) if len(axes) == 1 else None


def has_unlike_lengths(K: Kernel) -> bool:
    """Whether the samples of a kernel are known to have different numbers of rows."""
    axis = row_axis(K)
    return axis is not None and axis.pick is None and axis.index is not None


def _difference(first: ProductOperator, second: ProductOperator) -> str | None:
    """Return the first difference between two snapshots, or None."""
    one, two = first._core.engine.linearization, second._core.engine.linearization
    if one.names != two.names:
        return "other parameters are selected"
    if one.output_name != two.output_name:
        return f"its state is {one.output_name}, not {two.output_name}"
    pairs = zip(one.names, first._args, second._args, strict=True)
    for name, a, b in pairs:
        if not _equal(a, b):
            return f"parameter {name!r} differs"
    for kind, left, right in (("parameter", one.frozen, two.frozen), ("buffer", one.buffers, two.buffers)):
        for name in left.keys() | right.keys():
            if name not in left or name not in right or not _equal(left[name], right[name]):
                return f"{kind} {name!r} differs"
    return None


def _equal(first: Tensor, second: Tensor) -> bool:
    same = first.shape == second.shape and first.dtype == second.dtype and first.device == second.device
    return same and torch.equal(first, second)


def _require_same_columns(fitted: ProductOperator, cross: ProductOperator) -> None:
    rows, columns = fitted._core.columns, cross._core.columns
    if rows is columns or not (isinstance(rows, StateAxis) and isinstance(columns, StateAxis)):
        return
    picks = (rows.pick, columns.pick)
    same_pick = picks[0] is picks[1] or (
        picks[0] is not None and picks[1] is not None and torch.equal(picks[0], picks[1])
    )
    if not torch.equal(rows.outputs, columns.outputs) or not same_pick:
        raise ShapeError(
            "the columns of the cross kernel are other outputs, or another choice of rows, than those of the "
            "fitted kernel; make it with K.cross(x_new) from the kernel that was fitted"
        )


def network_outputs(K: Kernel) -> Tensor:
    """Return what the network says at the rows of a kernel, ``(*batch, n)``: f(x) at its snapshot.

    Cost: one forward pass over the samples.

    Raises:
        InputError: If the kernel is not made from one network (a dense matrix, a sum over several).
        UnsupportedOperationError: If it is traced over outputs, so that no row belongs to one output.
    """
    # The rows of a product are those of its first factor: of S K S they are no outputs of the network.
    first = product_factors(K)[0] if isinstance(K, MatmulLinearOperator) else K
    found = [s for s in _sources(first) if isinstance(s._core.rows, StateAxis) and s.shape[-2] == K.shape[-2]]
    # A cross kernel J₁ M J₂ᵀ may have its columns from another Jacobian, whose snapshot was compared.
    if len({id(source._core.engine.linearization) for source in found}) != 1:
        raise InputError(
            "offset='network' evaluates the network that the kernel was made from, and this one does "
            "not name "
            "one network: pass its outputs yourself, fit(K, Y, offset=f_x) and predict(K_cross, offset=f_new)"
        )
    source = found[0]
    axis = source._core.rows
    assert isinstance(axis, StateAxis)
    if axis.terms != 1:
        raise UnsupportedOperationError(
            "a kernel traced over outputs has no output of the network at its rows: use outputs='each' or "
            "'all', or pass the offset yourself"
        )
    outputs = network_states(source._core.engine.linearization, source._args, axis.inputs)  # (N, O)
    rows = outputs[:, axis.flat_outputs[:, 0].to(outputs.device)].movedim(1, 0).flatten(1)  # (batch, N*r)
    if axis.index is not None:
        rows = rows[:, axis.index.to(rows.device)]
    return rows.reshape(*axis.batch_shape, rows.shape[-1])


def network_labels(K: Kernel, layout: Layout, shape: tuple[int, ...]) -> Tensor:
    """Return what the network says at the rows of a kernel, in the shape of labels.

    Raises:
        ShapeError: If it has other outputs than the labels.
    """
    outputs = layout.restore_rows(network_outputs(K))
    if outputs.numel() == math.prod(shape):  # (N, 1) labels of one output, too
        return outputs.reshape(shape)
    if layout.kind == "shared" and outputs.dim() == 1:
        raise ShapeError(
            f"the kernel's rows belong to one output of the network, the labels {shape} have several "
            "targets: offset='network' needs outputs='each' or 'all'"
        )
    raise ShapeError(f"the network's outputs {tuple(outputs.shape)} do not fit labels of shape {shape}")
