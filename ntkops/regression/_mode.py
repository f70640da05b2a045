"""The mode of a linearised network's posterior: Newton's method on the side of the outputs."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..curvature.losses import Loss
from ..errors import NotConvergedError
from ..operators.sandwich import sandwich
from ._factorizations import CholeskyFactor
from ._operands import Kernel, may_be_dense, to_float64
from ._rounding import precise_product
from ._routes import kernel_solver

__all__ = ["Likelihood", "differentiable_evidence", "find_mode"]

_DIRECT = 5000  # rows up to which a factorisation in each step is a matter of seconds
_STEPS, _HALVINGS = 100, 40
_GAP = 1e-13  # of the objective, that a last step of Newton's method may have before it


@dataclass(frozen=True, eq=False)
class Likelihood:
    """ℓ(f), the negative log-likelihood of outputs as rows ``(n,)``, float64, up to a constant.

    Attributes:
        loss: Its terms.
        scale: What their sum is multiplied by.
        shape: ``(N, *tail)`` of the outputs.
    """

    loss: Loss
    scale: float
    shape: tuple[int, ...]

    def value(self, rows: Tensor) -> Tensor:
        """Return ℓ, ``()``."""
        outputs = rows.reshape(self.shape)
        return self.scale * self.loss.terms(outputs) * self.loss.value(outputs)

    def gradient(self, rows: Tensor) -> Tensor:
        """Return ∇ℓ, ``(n,)``."""
        outputs = rows.reshape(self.shape)
        return self.scale * self.loss.terms(outputs) * self.loss.gradient(outputs).flatten()

    def hessians(self, rows: Tensor) -> Tensor:
        """Return ∇²ℓ as blocks ``(N, O, O)``, differentiable in the rows: O derivatives of the gradient."""
        count = self.shape[0]
        width = len(rows) // count
        columns = []
        for place in range(width):
            unit = torch.zeros(count, width, dtype=rows.dtype, device=rows.device)
            unit[:, place] = 1
            columns.append(torch.func.jvp(self.gradient, (rows,), (unit.flatten(),))[1])
        return torch.stack(columns, dim=-1).reshape(count, width, width)


@dataclass(frozen=True, eq=False)
class Found:
    """A mode.

    Attributes:
        dual: a ``(n,)``, float64: the weights have moved by Jᵀ a.
        outputs: start + K a.
        value: ℓ + δ/2 aᵀ K a there.
    """

    dual: Tensor
    outputs: Tensor
    value: Tensor


def find_mode(K: Kernel, likelihood: Likelihood, start: Tensor, precision: float) -> Found:
    """Minimise ℓ(start + K a) + δ/2 aᵀ K a by Newton's method with backtracking.

    A step solves the quadratic model exactly: with g and H = S Sᵀ at f it is a = (b - S u) / δ for b = H (f -
    start) - g and (Sᵀ K S + δ) u = Sᵀ K b, so that no Hessian is inverted.

    Returns:
        The mode. Cost: a factorisation a step up to 5000 rows, conjugate gradients beyond.

    Raises:
        NotConvergedError: If it does not get there.
    """
    dense = to_float64(K, "cholesky") if may_be_dense(K) and K.shape[-1] <= _DIRECT else None

    def pull(vector: Tensor) -> Tensor:
        if dense is not None:
            return dense @ vector
        return precise_product(K, vector.unsqueeze(-1))[0].squeeze(-1)

    dual, outputs = torch.zeros_like(start), start
    value = likelihood.value(outputs)
    for _ in range(_STEPS):
        gradient = likelihood.gradient(outputs)
        factor = likelihood.loss.hessian_factor(outputs.reshape(likelihood.shape), likelihood.scale)
        moved = factor.matmul(factor.mT.matmul((outputs - start).unsqueeze(-1))).squeeze(-1)
        aim = moved - gradient
        pulled = factor.mT.matmul(pull(aim).unsqueeze(-1))
        if dense is None:
            system = sandwich(factor.mT.to(dtype=K.dtype), K)
            solver = kernel_solver(system, precision, tol=1e-8, max_products=None, generator=None)
            inner = solver(pulled).solution
        else:
            half = factor.mT.matmul(dense)
            middle = factor.mT.matmul(half.mT)
            inner = CholeskyFactor((middle + middle.mT) / 2, precision, K.dtype, None).dual(pulled)
        direction = (aim - factor.matmul(inner).squeeze(-1)) / precision - dual
        change = pull(direction)
        # The slope of the objective along the step, minus Newton's decrement squared.
        slope = (gradient + precision * dual) @ change
        last = bool(-slope <= _GAP * (1 + value.abs()))
        step = 1.0
        for _ in range(_HALVINGS):
            here, there = dual + step * direction, outputs + step * change
            reached = likelihood.value(there) + precision / 2 * (here @ (there - start))
            if last or bool(reached <= value + 1e-4 * step * slope):
                break
            step /= 2
        dual, outputs, value = here, there, reached
        if last:
            return Found(dual, outputs, value)
    raise NotConvergedError(
        f"the mode was not reached in {_STEPS} steps of Newton's method, the last slope was "
        f"{float(slope):.2g}: is the loss convex and smooth in the outputs?"
    )


def differentiable_evidence(
    K: Kernel, likelihood: Likelihood, start: Tensor, dual: Tensor, precision: Tensor
) -> Tensor:
    """Return -ℓ - δ/2 aᵀ K a - ½ log|I + A/δ| at the mode, differentiable in δ up to third order.

    The mode is a fixed point of Newton's steps, which converge quadratically: one step from the mode, with δ
    in the graph, has its first derivative, and two have its first three.
    """
    dense = to_float64(K, "cholesky")
    identity = torch.eye(len(start), dtype=torch.float64, device=start.device)
    for _ in range(2):
        outputs = start + dense @ dual
        blocks = likelihood.hessians(outputs)
        aim = _product(blocks, (outputs - start).unsqueeze(-1)).squeeze(-1) - likelihood.gradient(outputs)
        dual = torch.linalg.solve(_product(blocks, dense) + precision * identity, aim)
    outputs = start + dense @ dual
    weighted = _product(likelihood.hessians(outputs), dense)  # H K has the spectrum of A
    determinant = torch.linalg.slogdet(identity + weighted / precision).logabsdet
    penalty = precision / 2 * (dual @ (outputs - start))
    return -likelihood.value(outputs) - penalty - determinant / 2


def _product(blocks: Tensor, matrix: Tensor) -> Tensor:
    return (blocks @ matrix.unflatten(0, (len(blocks), -1))).flatten(0, 1)
