"""Groups of samples left out of a regression, without fitting again."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from linear_operator.operators import LinearOperator
from torch import Tensor

from ..arguments import ArrayLike
from ..errors import InputError, OutOfRangeError, RoundingWarning
from ..operators.positions import resolve_index
from ._fits import Fit
from ._operands import Kernel, Layout
from ._rounding import precise_product
from .predictor import Offset

__all__ = ["GroupLeaveOut", "leave_out"]

_ROUNDED = 1e-2  # of the residuals


@dataclass(frozen=True, eq=False)
class GroupLeaveOut:
    r"""What a regression would be without each of G groups of its samples; `KernelRidge.leave_out` makes it.

    Attributes:
        groups: Positions of the samples of each group.
        dual_coef: ``(G, N, ...)`` α₋S in the shape of Y, float64; zero at the samples of the group. With a
            spectral cut-off, or "nystrom", whose directions stay, it is not zero there.
        residuals: For each group ``(|S|, ...)`` labels minus what the regression without it predicts there.
        mean_squared_error: ``(G,)`` mean squared residual over the group and targets, float64.
        rounding: ``(G,)`` what rounding may have added to residuals, relative to their size: large where a
            group alone determines a direction, and the ridge is small. 0 for "cg" and "lsmr", whose solves
            are as good as their tolerance.
    """

    groups: tuple[Tensor, ...]
    dual_coef: Tensor
    residuals: tuple[Tensor, ...]
    mean_squared_error: Tensor
    rounding: Tensor
    _active: Tensor = field(repr=False)  # (G, *batch, n, k)
    _layout: Layout = field(repr=False)
    _read: Callable[[Any], Kernel] = field(repr=False)
    _offset: Offset = field(repr=False)

    def predict(self, K_cross: LinearOperator | Tensor, *, offset: Tensor | None = None) -> Tensor:
        """Return what the regression without each group says at new samples.

        Args:
            K_cross: Kernel between new samples (rows) and all those of the fit (columns), ``K.cross(x_new)``.
            offset: As for `KernelRidge.predict`.

        Returns:
            ``(G, M, ...)`` in the dtype of the cross kernel; less `KernelRidge.predict`, what each group does
            to each prediction. Cost: a product column for each group and target, twice in float32.

        Raises:
            InputError: If an offset is missing or too many.
            ShapeError: If the cross kernel does not fit.
            DtypeError: If its dtype is not that of the fit.
            StaleOperatorError: If it belongs to another snapshot of the network.
            NonFiniteError: If it holds NaN or infinity.
        """
        cross, layout = self._read(K_cross), self._layout
        count, width = len(self._active), self._active.shape[-1]
        wide = self._active.movedim(0, -1).flatten(-2)  # (*batch, n, k G)
        found = precise_product(cross, wide)[0].unflatten(-1, (width, count)).movedim(-1, 0)
        values = torch.stack([layout.restore(part) for part in found])
        base = self._offset(cross, layout, values.shape[1], offset)
        return (values if base is None else values + base.double()).to(cross.dtype)

    def __repr__(self) -> str:
        """Show the groups' number and sizes, and the error."""
        sizes = [len(group) for group in self.groups]
        return (
            f"GroupLeaveOut({len(sizes)} groups of {min(sizes)} to {max(sizes)} samples, mean squared error "
            f"{float(self.mean_squared_error.mean()):.3g})"
        )


def leave_out(
    fit: Fit,
    layout: Layout,
    groups: Iterable[ArrayLike],
    dtype: torch.dtype,
    read: Callable[[Any], Kernel],
    offset: Offset,
) -> GroupLeaveOut:
    """Return a regression without each of some groups; see `KernelRidge.leave_out`.

    Args:
        fit: The regression.
        layout: How its rows and targets belong together.
        groups: What the user passed.
        dtype: Dtype of the kernel.
        read: Checks a cross kernel.
        offset: What predictions are added to.
    """
    chosen = _read_groups(groups, fit.dual.shape[-2] // layout.group)
    duals, active, residuals, errors, rounding = [], [], [], [], []
    for group in chosen:
        rows = (group.unsqueeze(1) * layout.group + torch.arange(layout.group)).flatten()
        found = fit.without(rows.to(fit.dual.device))
        duals.append(layout.restore(found.dual))
        active.append(found.active)
        off = layout.restore(found.residuals)
        residuals.append(off.to(dtype))
        errors.append(off.square().mean())
        rounding.append(found.rounding)
    worst = max(range(len(chosen)), key=rounding.__getitem__)
    if rounding[worst] > _ROUNDED:
        warnings.warn(
            f"rounding may have added {rounding[worst]:.2g} of their size to residuals of group {worst}, "
            "which alone determines what others say nothing of: raise the ridge, or fit without the group",
            RoundingWarning,
            stacklevel=3,
        )
    return GroupLeaveOut(
        chosen,
        torch.stack(duals),
        tuple(residuals),
        torch.stack(errors),
        torch.tensor(rounding, dtype=torch.float64),
        torch.stack(active),
        layout,
        read,
        offset,
    )


def _read_groups(groups: Any, count: int) -> tuple[Tensor, ...]:
    """Return positions of the samples of each group, on the CPU.

    Raises:
        InputError: If one is empty, holds a sample twice or all of them, or is no vector of positions.
        OutOfRangeError: If a sample does not exist.
    """
    if not isinstance(groups, Iterable) or isinstance(groups, str | bytes):
        raise InputError(f"groups={groups!r}: pass a list of groups, each a vector of positions or a mask")
    found = []
    for number, group in enumerate(groups):
        where = f"group {number}"
        try:
            at = torch.as_tensor(group)
        except (TypeError, ValueError, RuntimeError) as error:
            raise InputError(f"{where} is no vector of positions: {error}") from error
        if at.shape == (0,):  # an empty list has a floating dtype
            raise InputError(f"{where} has no sample")
        if at.dim() != 1 or at.dtype not in (torch.bool, torch.int64, torch.int32):
            raise InputError(
                f"{where} has shape {tuple(at.shape)} and dtype {at.dtype}: pass a list of groups, each a "
                "vector of positions or a mask of samples; a single group is a list of one, [positions]"
            )
        try:
            at = resolve_index(at, count)
        except OutOfRangeError as error:
            raise OutOfRangeError(f"{where}: {error}") from None
        if not len(at):
            raise InputError(f"{where} has no sample")
        if len(at.unique()) < len(at):
            raise InputError(f"{where} names a sample twice")
        if len(at) == count:
            raise InputError(f"{where} holds all {count} samples: nothing is left to predict from")
        found.append(at)
    if not found:
        raise InputError("groups is empty: pass one group at least")
    return tuple(found)
