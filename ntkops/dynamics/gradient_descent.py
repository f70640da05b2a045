"""Gradient descent of a linearised network without going through the steps, and its largest learning rate."""

from __future__ import annotations

import dataclasses
import time
from typing import TYPE_CHECKING, Any, Literal

import torch
from linear_operator.operators import LinearOperator
from torch import Tensor

from ..arguments import checked
from ..errors import InputError, ZeroKernelError
from ..estimators import eigsh
from ..operators.capabilities import capabilities
from ..regression._operands import read_kernel
from ..results import Eigenpairs, Estimate
from ._filters import Descent
from ._problem import check_positive, check_tolerance, read_problem, read_times
from ._result import check_method, linear_trajectory
from .trajectory import Trajectory

if TYPE_CHECKING:
    from ..model.accepted import ArrayLike, OffsetLike

__all__ = [
    "check_momentum",
    "gradient_descent",
    "largest_eigenvalue",
    "max_learning_rate",
]


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
    # Δθ = Jᵀ a, and ∇L = Jᵀ 2 (f - Y) / n: a step of a is h (r - (K + μ n / 2) a) with h = 2 lr / n
    step = 2 * lr / problem.count
    _require_stable(problem.K, lr, momentum, weight_decay, problem.count)
    descent = Descent(numbers, step, momentum)
    return linear_trajectory(problem, descent, numbers, method=method, tol=tol, max_products=max_products)


def _require_stable(K: Any, lr: float, momentum: float, decay: float, count: int) -> None:
    """Raise where training diverges."""
    largest = max(float(largest_eigenvalue(K)[1]), 0.0)
    # h (λ + μ n / 2) ≤ 2 (1 + β) with h = 2 lr / n
    limit = 2 * (1 + momentum) / (2 * largest / count + decay) if largest or decay else float("inf")
    if lr > limit * (1 + 1e-9):
        raise InputError(
            f"lr={lr:.6g}: training diverges above {limit:.6g} = 2 (1 + momentum) / (2 λmax / n + "
            f"weight_decay), with λmax = {largest:.6g} and n = {count} labels; see ntkops.max_learning_rate"
        )


# -- the largest learning rate at which training does not diverge


def check_momentum(momentum: float) -> None:
    """Raise unless a momentum lies in [0, 1).

    Raises:
        InputError: If it does not.
    """
    if not 0 <= momentum < 1:
        raise InputError(f"momentum={momentum!r}: pass a number from 0 to below 1")


def largest_eigenvalue(K: LinearOperator | Tensor) -> tuple[Eigenpairs, Tensor, Tensor]:
    """Return the leading pairs, the largest eigenvalue of all kernels, and its residual."""
    # The seed is a choice of start, and no estimate hangs on it.
    pairs = eigsh(K, 1, generator=torch.Generator().manual_seed(0))
    place = int(pairs.values.argmax())
    return pairs, pairs.values.reshape(-1)[place].double(), pairs.residuals.reshape(-1)[place].double()


@checked
def max_learning_rate(
    K: LinearOperator | Tensor,
    loss: Literal["mse", "cross_entropy"] = "mse",
    momentum: float = 0.0,
    *,
    num_targets: int = 1,
) -> Estimate:
    r"""Return the largest learning rate at which gradient descent of a linearised network does not diverge.

    A step multiplies errors along an eigenvector of K by 1 - h λ, so that h λmax ≤ 2 (1 + momentum) is due,
    where h = 2 lr / n for the mean of n squared errors: :math:`(1 + \beta)\, n / \lambda_{max}`. The Hessian
    of the cross-entropy is at most 1/2, so that there :math:`4 (1 + \beta)\, N / \lambda_{max}` is enough
    for N samples, and larger ones may do.

    Args:
        K: Square kernel of the training samples, ``(N, N)``, ``(C, N, N)`` or ``(N·O, N·O)``.
        loss: "mse", the mean over all labels, or "cross_entropy", the mean over samples.
        momentum: β of heavy-ball momentum, 0 ≤ β < 1.
        num_targets: Targets of one sample that share a kernel ``(N, N)``: they count in the mean. For
            "cross_entropy" with a kernel over all outputs the number of outputs.

    Returns:
        `Estimate`, exact up to the convergence of the largest eigenvalue, which bounds λmax from below; the
        interval has what its residual allows. Cost: some 30 products.

    Raises:
        InputError: If an option is not understood.
        ShapeError: If the kernel is not square.
        ZeroKernelError: If the kernel is zero: then nothing ever diverges.
        NonFiniteError: If a product is not finite.

    Warns:
        NotConvergedWarning: If the eigenvalue did not converge.

    References:
        Böhning, Multinomial logistic regression algorithm (1992), for the bound 1/2.

    Example:
        >>> import torch, ntkops
        >>> K = torch.diag(torch.tensor([4.0, 1.0]).double())
        >>> float(ntkops.max_learning_rate(K)), float(ntkops.max_learning_rate(K, momentum=0.5))
        (0.5, 0.75)
    """
    started = time.perf_counter()
    if loss not in ("mse", "cross_entropy"):
        raise InputError(f"loss={loss!r}: choose 'mse' or 'cross_entropy'")
    check_momentum(momentum)
    if num_targets < 1:
        raise InputError(f"num_targets={num_targets}: pass a positive number")
    K = read_kernel(K)
    pairs, largest, residual = largest_eigenvalue(K)
    if not float(largest) > 0:
        raise ZeroKernelError(
            "the largest eigenvalue of the kernel is not positive: no learning rate diverges"
        )
    rows = capabilities(K).space.size
    samples = rows / num_targets if loss == "cross_entropy" and K.dim() == 2 else rows
    # h λ ≤ 2 (1 + β): h = 2 lr / n for the mean of squares; for the cross-entropy the Hessian is at most 1/2
    # of each of N terms, h λ = lr λ / (2 N)
    factor = 4 * samples if loss == "cross_entropy" else rows * K.shape[:-2].numel() * num_targets
    value = (1 + momentum) * factor / largest
    low = (1 + momentum) * factor / (largest + residual)
    return Estimate(
        value=value,
        stderr=torch.zeros_like(value),
        interval=(low, value),
        method=pairs.method,
        exact=pairs.method == "dense",
        passes=pairs.passes,
        converged=pairs.converged,
        seed=pairs.seed,
        seconds=time.perf_counter() - started,
    )
