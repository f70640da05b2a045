"""The largest learning rate at which training of a linearised network does not diverge."""

from __future__ import annotations

import time
from typing import Literal

import torch
from linear_operator.operators import LinearOperator
from torch import Tensor

from ..arguments import checked
from ..errors import InputError, ZeroKernelError
from ..estimators import eigsh
from ..operators.capabilities import capabilities
from ..regression._operands import read_kernel
from ..results import Eigenpairs, Estimate

__all__ = ["check_momentum", "largest_eigenvalue", "max_learning_rate"]


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
