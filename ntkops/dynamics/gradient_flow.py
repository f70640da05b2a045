"""Gradient flow of a linearised network."""

from __future__ import annotations

import dataclasses
import functools
from typing import TYPE_CHECKING, Literal

from linear_operator.operators import LinearOperator
from torch import Tensor

from ..arguments import checked
from ..curvature.losses import CrossEntropy, PerSample, read_loss
from ..errors import InputError
from ._filters import Flow
from ._ode import by_ode
from ._problem import check_positive, check_tolerance, read_problem, read_times
from ._result import check_method, linear_trajectory
from .trajectory import Trajectory

if TYPE_CHECKING:
    from ..model.accepted import ArrayLike, LossLike, OffsetLike

__all__ = ["gradient_flow"]


@checked
def gradient_flow(
    K: LinearOperator | Tensor,
    Y: ArrayLike,
    times: ArrayLike,
    *,
    loss: LossLike = "mse",
    lr: float = 1.0,
    weight_decay: float = 0.0,
    offset: OffsetLike = None,
    method: Literal["auto", "krylov", "eigh", "ode"] = "auto",
    tol: float = 1e-6,
    max_products: int | None = None,
) -> Trajectory:
    r"""Train a linearised network by gradient flow, and say how exact the result is.

    The flow :math:`\Delta\theta' = -\mathrm{lr}\,(\nabla L(f_0 + J \Delta\theta) + \mu \Delta\theta)` stays
    in the range of Jᵀ: :math:`\Delta\theta = J^\top a`, f = f₀ + K a, and
    :math:`a' = -\mathrm{lr}\,(\nabla_f L + \mu a)`. The decay pulls towards the parameters at the start, not
    towards zero.

    For the squared error (torch's mean over n labels, :math:`\nabla_f L = 2 (f - Y) / n`) with
    :math:`A = K + \mu n / 2` and :math:`\tau = 2\,\mathrm{lr}\,t / n`,

    .. math:: a(t) = \varphi(A)(Y - f_0), \qquad \varphi(x) = (1 - e^{-x \tau}) / x.

    "eigh" takes the dense eigendecomposition. "krylov" runs Lanczos with full reorthogonalisation from
    Y - f₀, one basis for all times, until bounds that are known in closed form from its small matrix meet the
    tolerance at the last. "ode", for the other losses, integrates by a Runge-Kutta pair of order 8 and
    bounds its error by the defect of its interpolant, since gradient flow of a convex loss is a contraction.

    Args:
        K: Square kernel of the training samples, ``(N, N)``, ``(C, N, N)`` or ``(N·O, N·O)``: an operator,
            also over several ranks, or a tensor.
        Y: Labels as for `KernelRidge`, ``(N, ...)``; for "cross_entropy" class numbers ``(N,)`` or
            probabilities ``(N, C)``.
        times: Times t ≥ 0, ascending; ``math.inf`` for the limit of the squared error: the least-norm fit, or
            with weight decay a ridge regression.
        loss: "mse", "cross_entropy" (the mean over samples), or a function of one sample's outputs and
            targets, of which the mean over samples is taken. It has to be convex for bounds.
        lr: What time is multiplied by: t counts steps of descent with this learning rate.
        weight_decay: μ ≥ 0.
        offset: f₀: None for 0; "network", the outputs of the network at the rows of K, which makes this the
            linearised network; a number or tensor for every sample; or outputs in the shape of Y.
        method: "auto" takes "eigh" up to 512 rows, and up to 5000 where a limit without decay is asked for.
        tol: Error of the outputs relative to |Y - f₀|. In float32 nothing below eps τ λmax is reached.
        max_products: Most columns multiplied with K, or None.

    Returns:
        `Trajectory`. Cost of "krylov": some √(τ λmax log(1 / tol)) products for each right-hand side at
        worst, and as many vectors; where these do not fit into a quarter of the free memory it goes on in
        parts of the time. Outputs of training samples at any number of times cost nothing more.

    Raises:
        InputError: If an option, times or labels are not understood, the kernel is not positive
            semidefinite, or the loss has no limit at t = ∞.
        ShapeError: If kernel, labels and offset do not fit.
        DtypeError: If dtypes differ.
        NonFiniteError: If one of them holds NaN or infinity.
        NotConvergedError: If ``max_products`` ended an integration.

    References:
        Lee et al., Wide Neural Networks of Any Depth Evolve as Linear Models (2019); Jawecki, Auzinger, Koch,
        Computable upper error bounds for Krylov approximations to matrix exponentials (2020).

    Example:
        >>> import math, torch, ntkops
        >>> _ = torch.manual_seed(0)
        >>> layers = torch.nn.Linear(3, 16), torch.nn.Tanh(), torch.nn.Linear(16, 1)
        >>> network = torch.nn.Sequential(*layers).double()
        >>> x, x_new = torch.randn(20, 3).double(), torch.randn(5, 3).double()
        >>> K = ntkops.ntk(network, x)
        >>> path = ntkops.gradient_flow(
        ...     K, x.prod(1, keepdim=True), [1.0, 10.0, math.inf], offset="network"
        ... )
        >>> path.outputs.shape, path.predict(K.cross(x_new)).shape, path.info.converged
        (torch.Size([3, 20, 1]), torch.Size([3, 5, 1]), True)
        >>> list(path.weights(10.0)), bool(path.losses[0] > path.losses[1] > path.losses[2])
        (['0.weight', '0.bias', '2.weight', '2.bias'], True)
    """
    kind = read_loss(loss)
    check_positive(lr, "lr")
    check_positive(weight_decay, "weight_decay", zero=True)
    check_tolerance(tol, max_products)
    problem = read_problem(K, Y, offset, classes=kind == "cross_entropy")
    instants = read_times(times, "times", whole=False, device=problem.rhs.device)
    check_method(method, ("krylov", "eigh") if kind == "mse" else ("ode",), problem)
    if kind != "mse":
        # The squared error has a least-norm limit in closed form; the cross-entropy of separable classes has
        # none.
        if bool(instants.isinf().any()):
            name = "loss='cross_entropy'" if kind == "cross_entropy" else "a loss of your own"
            raise InputError(
                f"t = ∞ with {name}: the limit has no closed form, and without weight decay it need not "
                "exist (outputs of separable classes grow for ever); pass a large finite time"
            )
        with_targets = functools.partial(PerSample, loss) if callable(loss) else CrossEntropy
        return by_ode(
            problem,
            with_targets,
            instants,
            lr=lr,
            weight_decay=weight_decay,
            tol=tol,
            max_products=max_products,
        )
    # a' = -lr (2 (K a - r) / n + μ a) = -(2 lr / n) ((K + μ n / 2) a - r): shift μ n / 2, time τ = 2 lr t / n
    problem = dataclasses.replace(problem, shift=weight_decay * problem.count / 2)
    flow = Flow(2 * lr / problem.count * instants)
    return linear_trajectory(problem, flow, instants, method=method, tol=tol, max_products=max_products)
