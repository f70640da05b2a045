"""The subspace of parameters that the gradients of a few samples span, and what lies outside it."""

from __future__ import annotations

from typing import Any, Self

import torch
from linear_operator.operators import DenseLinearOperator, LinearOperator, to_linear_operator
from torch import Tensor

from ..arguments import checked
from ..engines import format_bytes, tensor_bytes
from ..errors import DenseMemoryError, DtypeError, InputError, NonFiniteError, ShapeError, ZeroKernelError
from ..operators import JacobianOperator
from ..operators.capabilities import capabilities, multiply
from ..operators.products import dense_limit
from ..vectors import rank_cutoff
from ._operands import require_finite, to_float64

__all__ = ["TangentProjector", "optimal_residual", "projection_residual", "tangent_projector"]


class TangentProjector(LinearOperator):
    """Π = Jᵀ (J Jᵀ)⁺ J, ``(*batch, P, P)``: never formed, only multiplied. Make one with `tangent_projector`.

    Args:
        jacobian: J, ``(*batch, n, P)``.
        whitening: ``(*batch, n, r)`` W with W Wᵀ = (J Jᵀ)⁺, float64.
    """

    def __init__(self, jacobian: LinearOperator, whitening: Tensor) -> None:
        super().__init__(jacobian, whitening)
        self.jacobian, self._whitening = jacobian, whitening

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the vectors that it multiplies."""
        return self.jacobian.dtype

    @property
    def device(self) -> torch.device:
        """Device of the vectors that it multiplies."""
        return self._whitening.device

    @property
    def rank(self) -> Tensor:
        """Dimension of the subspace, ``(*batch)``, int64: the trace of Π."""
        return (self._whitening.abs().amax(-2) > 0).sum(-1)

    def _size(self) -> torch.Size:
        count = self.jacobian.shape[-1]
        return torch.Size((*self.jacobian.shape[:-2], count, count))

    def _transpose_nonbatch(self) -> Self:
        return self

    def _matmul(self, rhs: Tensor) -> Tensor:
        block = rhs.unsqueeze(-1) if rhs.dim() == 1 else rhs
        block = block.expand(*self.batch_shape, *block.shape[-2:])
        product = multiply(self.jacobian.mT, self.coefficients(block).to(self.dtype))
        return product.squeeze(-1) if rhs.dim() == 1 else product

    def coefficients(self, gradients: Tensor) -> Tensor:
        """Return δ = (J Jᵀ)⁺ J g, the shortest with Jᵀ δ = Π g: what soft labels would have to give.

        Under a squared loss the labels f(z) - δ make the step along the gradients of the samples that of Π g.

        Args:
            gradients: ``(P,)`` or ``(*batch, P, k)``.

        Returns:
            ``(n,)`` or ``(*batch, n, k)``, float64. Cost: one product with J a column.
        """
        block = gradients.unsqueeze(-1) if gradients.dim() == 1 else gradients
        inside = multiply(self.jacobian, block).double()
        found = self._whitening @ (self._whitening.mT @ inside)
        return found.squeeze(-1) if gradients.dim() == 1 and not self.batch_shape else found

    def _diagonal(self) -> Tensor:
        return multiply(self.jacobian.mT, self._whitening.to(self.dtype)).square().sum(-1)

    def to_dense(self) -> Tensor:
        """Return the dense P x P matrix, if it fits into a quarter of the free memory.

        Raises:
            DenseMemoryError: If it does not.
        """
        needed, limit = tensor_bytes(self.shape, self.dtype), dense_limit("auto", self.device)
        if needed > limit:
            raise DenseMemoryError(
                f"the dense {'x'.join(map(str, self.shape))} projector needs {format_bytes(needed)}, "
                "more than "
                f"{format_bytes(limit)}; multiply with it instead"
            )
        basis = multiply(self.jacobian.mT, self._whitening.to(self.dtype))  # (*batch, P, r)
        return basis @ basis.mT


@checked
def tangent_projector(x: LinearOperator | Tensor, *, rtol: float | None = None) -> TangentProjector:
    r"""Return the orthogonal projector onto the span of the rows of J, :math:`\Pi = J^\top (J J^\top)^+ J`.

    Of a kernel over all outputs it is the stacked subspace, :math:`V = \mathrm{span}\{\nabla f^c(z_i)\}`; of
    kernels of each output one projector for each class.

    Args:
        x: The samples' kernel (``ntkops.ntk(model, z)``; outputs "all", "each", or a number), their
            Jacobian, or a dense J ``(*batch, n, P)``.
        rtol: Eigenvalues of J Jᵀ below ``rtol`` times the largest count as zero; default n times the machine
            precision of its dtype.

    Returns:
        `TangentProjector`, ``(*batch, P, P)``, with `.rank` and `.coefficients`. Cost: one dense n x n kernel
        here, and for each product one with J and one with Jᵀ.

    Raises:
        InputError: If x is neither, or ``rtol`` is not between 0 and 1.
        ShapeError: If a dense J is no matrix.
        NonFiniteError: If a gradient is NaN or infinite.
        DenseMemoryError: If the n x n kernel must not be dense.
        ZeroKernelError: If all gradients vanish.

    References:
        Distilled NTK paper, equations (3) and (8).

    Example:
        >>> import torch, ntkops
        >>> from ntkops.regression import projection_residual, tangent_projector
        >>> _ = torch.manual_seed(0)
        >>> layers = torch.nn.Linear(3, 8), torch.nn.Tanh(), torch.nn.Linear(8, 2)
        >>> model = torch.nn.Sequential(*layers).double()
        >>> K = ntkops.ntk(model, torch.randn(4, 3).double())
        >>> projector = tangent_projector(K)
        >>> projector.shape, int(projector.rank)
        (torch.Size([50, 50]), 8)
        >>> gradient = K.left.mT @ torch.randn(8).double()
        >>> bool(projection_residual(projector, gradient) < 1e-20)
        True
    """
    if rtol is not None and not (isinstance(rtol, float) and 0 <= rtol < 1):
        raise InputError(f"rtol={rtol!r}: a number from 0 to 1")
    jacobian, kernel = _jacobian_and_kernel(x)
    values, vectors = torch.linalg.eigh((kernel + kernel.mT) / 2)
    largest = values.amax(-1, keepdim=True)
    if not bool((largest > 0).all()):
        raise ZeroKernelError("all gradients vanish: they span no subspace")
    tolerance = rank_cutoff(kernel.shape[-1], jacobian.dtype) if rtol is None else rtol
    kept = values > tolerance * largest
    rank = int(kept.sum(-1).max())
    scale = torch.where(kept, values.clamp(min=0).rsqrt(), torch.zeros_like(values))
    return TangentProjector(jacobian, (vectors * scale.unsqueeze(-2))[..., -rank:])


def _jacobian_and_kernel(x: Any) -> tuple[LinearOperator, Tensor]:
    """Return J, ``(*batch, n, P)``, and J Jᵀ in float64."""
    if isinstance(x, Tensor):
        if x.dim() < 2 or not x.numel():
            raise ShapeError(f"a dense J needs shape (*batch, n, P) with entries, got {tuple(x.shape)}")
        if not x.dtype.is_floating_point:
            raise DtypeError(f"J has dtype {x.dtype}; cast it to a floating dtype")
        require_finite(x, "J")
        return to_linear_operator(x.detach()), x.detach().double() @ x.detach().double().mT
    if isinstance(x, DenseLinearOperator):
        return _jacobian_and_kernel(x.to_dense())
    if isinstance(x, JacobianOperator):
        product = x @ x.mT
        assert isinstance(product, LinearOperator)
        return x, to_float64(product, "tangent_projector")
    if isinstance(x, LinearOperator):
        factors = capabilities(x).factors()
        if factors is not None and capabilities(x).symmetric:
            return factors[0], to_float64(x, "tangent_projector")
    raise InputError(
        f"tangent_projector takes a square kernel that knows its Jacobian (ntkops.ntk), a Jacobian "
        f"(ntkops.jacobian) or a dense J, got {type(x).__name__}"
    )


def _columns(projector: LinearOperator, gradients: Tensor) -> Tensor:
    if not isinstance(gradients, Tensor) or gradients.dim() not in (1, 2):
        raise ShapeError("gradients need shape (P,) or (P, k): one column for each task")
    if gradients.shape[0] != projector.shape[-1]:
        raise ShapeError(
            f"gradients of {gradients.shape[0]} parameters, the projector has {projector.shape[-1]}: flatten "
            "them in the order of model.named_parameters()"
        )
    if not bool(torch.isfinite(gradients).all()):
        raise NonFiniteError("a gradient holds NaN or infinity")
    block = gradients.detach().unsqueeze(-1) if gradients.dim() == 1 else gradients.detach()
    return block.to(projector.dtype)


@checked
def projection_residual(projector: LinearOperator, gradients: Tensor) -> Tensor:
    r"""Return :math:`|(I - \Pi) g|^2`, what of a task's gradient no step along the samples' gradients gives.

    The residual is projected a second time, so that it is zero to rounding in the span.

    Args:
        projector: From `tangent_projector`, ``(*batch, P, P)``.
        gradients: ``(P,)`` or ``(P, k)``, one column for each task; their mean is the expectation over tasks.

    Returns:
        ``(*batch)`` or ``(*batch, k)``, float64. Cost: four passes a column.

    Raises:
        ShapeError: If the gradients do not fit.
        NonFiniteError: If one is NaN or infinite.

    References:
        Distilled NTK paper, Theorem 3.3, equation (6), and Lemma C.1.
    """
    block = _columns(projector, gradients)
    rest = block - projector @ block
    rest = rest - projector @ rest
    found = rest.double().square().sum(-2)
    return found.squeeze(-1) if gradients.dim() == 1 else found


@checked
def optimal_residual(gradients: Tensor, rank: int) -> float:
    r"""Return the smallest mean residual that any subspace of a dimension leaves.

    It is :math:`\sum_{j>r} \lambda_j` over the eigenvalues of :math:`G = E[g g^\top]`, g the tasks'
    gradients; the best subspace is spanned by the leading eigenvectors.

    Args:
        gradients: ``(P, k)``, one column for each task.
        rank: Dimension r of the subspace, 0 or more.

    Returns:
        The mean of |(I - Π) g|² over the tasks for the best Π.

    Raises:
        ShapeError: If the gradients are no matrix.
        InputError: If the rank is negative.

    References:
        Distilled NTK paper, Corollary 3.5 (Ky Fan's maximum principle).
    """
    if gradients.dim() != 2:
        raise ShapeError(f"gradients need shape (P, k), got {tuple(gradients.shape)}")
    if rank < 0:
        raise InputError(f"rank={rank}: a dimension is 0 or more")
    singular = torch.linalg.svdvals(gradients.detach().double())
    return float(singular[rank:].square().sum() / gradients.shape[1])
