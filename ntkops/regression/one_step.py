"""One gradient step along the span of a few samples, against the best step there."""

from __future__ import annotations

import math

from linear_operator.operators import LinearOperator
from torch import Tensor

from ..arguments import checked
from ..errors import InputError, ShapeError
from ..results import OneStepRegret
from .tangent_projector import _columns

__all__ = ["one_step_regret"]

_INSIDE = 1e-3  # share of an update that may lie outside the subspace by rounding


@checked
def one_step_regret(
    projector: LinearOperator,
    gradients: Tensor,
    update: Tensor,
    *,
    step_size: float,
    smoothness: float,
    convex: bool = False,
) -> OneStepRegret:
    r"""Bound how much a task loses by a realised step against the best step in the same subspace.

    With :math:`M(\Delta) = \langle g, \Delta \rangle + \tfrac L2 |\Delta|^2`, the realised step
    :math:`\Delta = -\eta u` and the best one in the model :math:`\Delta^* = -\Pi g / L`,

    .. math::
        E[L_t(\theta + \Delta) - L_t(\theta + \Delta^*)] \le E[M(\Delta) - M(\Delta^*)] + L E|\Delta^*|^2.

    The last term is missing in the published theorem, whose first term also has the wrong sign: smoothness
    bounds the loss at Δ* from above by M, but from below only by M minus L |Δ*|². For convex losses half of
    the last term is enough.

    Args:
        projector: From `tangent_projector`, one ``(P, P)``.
        gradients: ``(P,)`` or ``(P, k)``, the gradients of the tasks; the mean is over columns.
        update: ``(P,)``, the gradient u of the loss on the samples, in the subspace.
        step_size: η > 0.
        smoothness: L > 0, the Lipschitz constant of the tasks' gradients.
        convex: Whether the tasks' losses are convex.

    Returns:
        `OneStepRegret`: the bound, its parts, and the decrease that is guaranteed for the best step.
        Cost: some passes a task.

    Raises:
        InputError: If a constant is not positive, or the update lies outside the subspace.
        ShapeError: If projector or gradients do not fit.
        NonFiniteError: If a gradient is NaN or infinite.

    References:
        Distilled NTK paper, Theorem 3.3, equations (5), corrected, and (6).

    Example:
        >>> import torch
        >>> from ntkops.regression import one_step_regret, tangent_projector
        >>> projector = tangent_projector(
        ...     torch.eye(4).double()[:2]
        ... )  # the first two of four parameters
        >>> g = torch.tensor([3.0, 4.0, 0.0, 12.0]).double()
        >>> best = torch.tensor([3.0, 4.0, 0.0, 0.0]).double()
        >>> regret = one_step_regret(projector, g, best, step_size=0.5, smoothness=2.0)
        >>> regret.model_gap, regret.guaranteed_decrease, regret.residual
        (0.0, 6.25, 144.0)
    """
    for name, value in (("step_size", step_size), ("smoothness", smoothness)):
        if not (isinstance(value, int | float) and math.isfinite(value) and value > 0):
            raise InputError(f"{name}={value!r}: a positive number")
    if projector.dim() != 2:
        raise ShapeError("one_step_regret takes one subspace: index the batch of projectors first")
    tasks, step = _columns(projector, gradients), _columns(projector, update)  # (P, k), (P, 1)
    outside = (step - projector @ step).double().norm()
    if not bool(outside <= _INSIDE * step.double().norm()):
        raise InputError(
            "the update lies outside the subspace: it has to be the gradient of a loss on the same samples, "
            "J.mT @ delta"
        )
    inside = (projector @ tasks).double()
    rest = tasks.double() - inside
    tasks, step = tasks.double(), step.double()
    realised = -step_size * (tasks.mT @ step)[:, 0] + 0.5 * smoothness * step_size**2 * step.square().sum()
    captured = inside.square().sum(0)  # (k,) |Π g|²
    best = -captured / (2 * smoothness)
    # Of the two, the one that does not cancel: M(Δ) - M(Δ*) = L/2 |Δ - Δ*|² for steps in the subspace.
    gap = 0.5 * smoothness * (step_size * step - inside / smoothness).square().sum(0)
    missing = captured / smoothness * (0.5 if convex else 1.0)
    return OneStepRegret(
        bound=float((gap + missing).mean()),
        model_gap=float(gap.mean()),
        curvature_term=float(missing.mean()),
        realised_model=float(realised.mean()),
        best_model=float(best.mean()),
        guaranteed_decrease=float(-best.mean()),
        residual=float(rest.square().sum(0).mean()),
    )
