"""Gradient descent of a linearised network, step by step, without going through the steps."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, Literal

from linear_operator.operators import LinearOperator
from torch import Tensor

from ..arguments import checked
from ..errors import InputError
from ._filters import Descent
from ._problem import check_positive, check_tolerance, read_problem, read_times
from ._result import check_method, linear_trajectory
from .learning_rate import check_momentum, largest_eigenvalue
from .trajectory import Trajectory

if TYPE_CHECKING:
    from ..model.accepted import ArrayLike, OffsetLike

__all__ = ["gradient_descent"]


@checked
def gradient_descent(
    K: LinearOperator | Tensor,
    Y: ArrayLike,
    steps: ArrayLike,
    *,
    lr: float,
    momentum: float = 0.0,
    weight_decay: float = 0.0,
    offset: OffsetLike = None,
    method: Literal["auto", "krylov", "eigh"] = "auto",
    tol: float = 1e-6,
    max_products: int | None = None,
) -> Trajectory:
    r"""Train a linearised network by full-batch gradient descent on the squared error.

    The steps are those of `torch.optim.SGD`, on torch's mean over n labels, with heavy-ball momentum β:

    .. math:: \Delta\theta_{k+1} = \Delta\theta_k - \mathrm{lr}\,(\nabla L + \mu \Delta\theta_k)
        + \beta (\Delta\theta_k - \Delta\theta_{k-1}).

    Their result is a polynomial of :math:`A = K + \mu n / 2` times Y - f₀, computed by `gradient_flow`'s
    methods and with bounds as there: a million steps take no more products than the Krylov space needs. The
    decay pulls towards the parameters at the start; torch's pulls towards zero.

    Args:
        K: Square kernel of the training samples, as for `gradient_flow`.
        Y: Labels, ``(N, ...)``.
        steps: Numbers of steps, ascending, from 0.
        lr: Learning rate, at most (1 + momentum) n / (λmax + μ n / 2): see `max_learning_rate`.
        momentum: β, 0 ≤ β < 1.
        weight_decay: μ ≥ 0.
        offset: f₀, as for `gradient_flow`.
        method: "krylov", "eigh" or "auto".
        tol: Error of the outputs relative to |Y - f₀|.
        max_products: Most columns multiplied with K, beside those that check the learning rate, or None.

    Returns:
        `Trajectory`, its ``times`` the numbers of steps. Cost: as for `gradient_flow`, and some 30 products
        for λmax; with momentum, or beyond lr = n / (2 λmax), also the steps themselves on as many numbers as
        the basis has vectors. Momentum has no restarts: where the basis does not fit it ends unconverged.

    Raises:
        InputError: If an option, steps or labels are not understood, the kernel is not positive
            semidefinite, or the learning rate is so large that training diverges.
        ShapeError: If kernel, labels and offset do not fit.
        DtypeError: If dtypes differ.
        NonFiniteError: If one of them holds NaN or infinity.

    Example:
        >>> import torch, ntkops
        >>> K = torch.diag(torch.tensor([1.0, 0.1]).double())
        >>> path = ntkops.gradient_descent(K, torch.ones(2).double(), [0, 1, 2], lr=0.5)
        >>> path.outputs
        tensor([[0.0000, 0.0000],
                [0.5000, 0.0500],
                [0.7500, 0.0975]], dtype=torch.float64)
    """
    check_positive(lr, "lr")
    check_momentum(momentum)
    check_positive(weight_decay, "weight_decay", zero=True)
    check_tolerance(tol, max_products)
    problem = read_problem(K, Y, offset)
    numbers = read_times(steps, "steps", whole=True, device=problem.rhs.device)
    check_method(method, ("krylov", "eigh"), problem)
    problem = dataclasses.replace(problem, shift=weight_decay * problem.count / 2)
    step = 2 * lr / problem.count
    _require_stable(problem.K, lr, momentum, weight_decay, problem.count)
    descent = Descent(numbers, step, momentum)
    return linear_trajectory(problem, descent, numbers, method=method, tol=tol, max_products=max_products)


def _require_stable(K: Any, lr: float, momentum: float, decay: float, count: int) -> None:
    """Raise where training diverges.

    Raises:
        InputError: With the largest learning rate that does not.
    """
    largest = max(float(largest_eigenvalue(K)[1]), 0.0)
    limit = 2 * (1 + momentum) / (2 * largest / count + decay) if largest or decay else float("inf")
    if lr > limit * (1 + 1e-9):
        raise InputError(
            f"lr={lr:.6g}: training diverges above {limit:.6g} = 2 (1 + momentum) / (2 λmax / n + "
            f"weight_decay), with λmax = {largest:.6g} and n = {count} labels; see ntkops.max_learning_rate"
        )
