"""Where the error of a kernel regression comes from: approximation, bias, variance, truncation."""

from __future__ import annotations

import math

import torch
from linear_operator.operators import LinearOperator
from torch import Tensor

from ..arguments import checked
from ..errors import InputError, ShapeError, ZeroKernelError
from ..results import ErrorTerms, TruncationError
from ..vectors import rank_cutoff
from ._operands import Layout, read_kernel, read_labels, to_float64

__all__ = ["error_terms", "truncation_error"]


@checked
def error_terms(
    K: LinearOperator | Tensor,
    Y: Tensor,
    ridge: float,
    *,
    num_samples: int | None = None,
    noise: float | Tensor | None = None,
) -> ErrorTerms:
    r"""Return approximation error, bias and variance of kernel ridge regression, and the labels' energy.

    The N samples of K stand for the population: :math:`\Sigma = \Phi^\top \Phi / N` with eigenvalues
    :math:`\mu_j`, eigenvectors :math:`u_j` of K, :math:`\lambda = r / N` and label coefficients
    :math:`c_j = u_j^\top y / \sqrt N`:

    * approximation :math:`E^2 = |y|^2/N - \sum_j c_j^2`, what no linear function of the features gives,
      and :math:`R^2 = 1 - E^2 N / |y|^2` (about zero, as the paper centres its outputs);
    * bias :math:`\sum_j (\lambda / (\mu_j + \lambda))^2 c_j^2`, which falls like λ² and no faster, however
      smooth the target;
    * variance :math:`\frac{\sigma^2}{n} \sum_j \mu_j^2 / (\mu_j + \lambda)^2
      \le \frac{\sigma^2}{n} d(\lambda)`, with :math:`d(\lambda) = \sum_j \mu_j / (\mu_j + \lambda)`.

    All three are squared errors. In the paper the signal weight of equation (22) has a factor 1/n too many,
    and the variance's sum has :math:`\mu^3`, which makes it depend on the units of the kernel.

    Args:
        K: Kernel of N samples: ``(N, N)``, ``(C, N, N)``, or ``(N·O, N·O)``, where rows count as samples;
            made dense.
        Y: Labels, as for `KernelRidge`.
        ridge: Absolute ridge r > 0 of K + r I.
        num_samples: Size n of the training sets that variance is about; default the rows N of K.
        noise: Variance σ² of what the features do not explain; default the approximation error. It is zero
            whenever K has full rank: N samples cannot show what N features miss. Then take the mean
            squared leave-one-out residual, or an error on other samples.

    Returns:
        `ErrorTerms`, one number for each target. Cost: an eigendecomposition of K.

    Raises:
        InputError: If ridge, num_samples or noise is out of range, or labels are integers.
        ShapeError: If kernel and labels do not fit.
        ZeroKernelError: If the kernel is zero.

    References:
        Distilled NTK paper, appendix B.1, corrected.

    Example:
        >>> import torch
        >>> from ntkops.regression import error_terms
        >>> F = torch.tensor([[1.0], [-1.0], [1.0], [-1.0]]).double()
        >>> terms = error_terms(
        ...     F @ F.mT, torch.tensor([1.0, -1.0, 3.0, -3.0]).double(), ridge=4.0
        ... )
        >>> [
        ...     round(float(v), 9)
        ...     for v in (terms.approximation, terms.r2, terms.bias, terms.variance)
        ... ]
        [1.0, 0.8, 1.0, 0.0625]
    """
    kernel = read_kernel(K)
    if kernel.shape[-1] != kernel.shape[-2]:
        raise ShapeError(f"error_terms takes a square kernel, this one is {tuple(kernel.shape)}")
    layout, labels = read_labels(Y, kernel.shape, kernel.dtype, kernel.device)
    _require_positive("ridge", ridge)
    size = kernel.shape[-1]
    count = size if num_samples is None else num_samples
    _require_positive("num_samples", count)
    values, vectors, used = _spectrum(kernel)  # descending
    weight = ridge / size
    mu = torch.where(used, values / size, torch.zeros_like(values)).unsqueeze(-1)  # (*batch, n, 1)
    rhs = layout.columns(labels.double())
    seen = vectors * used.unsqueeze(-2)
    energy = (seen.mT @ rhs).square() / size  # (*batch, n, k): c²
    rest = rhs - seen @ (seen.mT @ rhs)
    total = rhs.square().sum(-2) / size  # (*batch, k)
    approximation = rest.square().sum(-2) / size
    variance_noise = approximation if noise is None else _noise(noise, layout, approximation)
    shrunk = mu / (mu + weight)
    dimension = shrunk.sum(-2)
    share = torch.where(total > 0, total, torch.ones_like(total))
    return ErrorTerms(
        approximation=_one(layout, approximation),
        r2=_one(layout, 1 - approximation / share),
        bias=_one(layout, ((weight / (mu + weight)).square() * energy).sum(-2)),
        variance=_one(layout, variance_noise * shrunk.square().sum(-2) / count),
        variance_bound=_one(layout, variance_noise * dimension / count),
        effective_dimension=dimension.squeeze(-1),
        eigenvalues=values,
        label_energy=energy / share.unsqueeze(-2),
        num_samples=int(count),
    )


def _require_positive(name: str, value: float) -> None:
    if isinstance(value, bool) or not (isinstance(value, int | float) and math.isfinite(value) and value > 0):
        raise InputError(f"{name}={value!r}: a positive number")


def _noise(noise: float | Tensor, layout: Layout, like: Tensor) -> Tensor:
    values = torch.as_tensor(noise, dtype=torch.float64, device=like.device)
    if not bool(((values >= 0) & values.isfinite()).all()):
        raise InputError("noise: a variance is finite, and 0 or more")
    if layout.kind == "each" and values.dim() == 1:
        values = values.unsqueeze(-1)  # one for each class
    try:
        return values.expand(like.shape)
    except RuntimeError as error:
        raise ShapeError(f"noise of shape {tuple(values.shape)} does not fit the labels") from error


def _one(layout: Layout, values: Tensor) -> Tensor:
    """Return ``(*batch, k)`` as one number for each target."""
    if layout.kind == "each":
        return values.squeeze(-1)
    return values.reshape(layout.tail) if layout.kind == "shared" else values.reshape(())


def _spectrum(kernel: LinearOperator | Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return eigenvalues, largest first, eigenvectors, and which of them are no rounding error."""
    values, vectors = torch.linalg.eigh(to_float64(kernel, "eigh"))
    values, vectors = values.flip(-1), vectors.flip(-1)
    largest = values[..., :1]
    if not bool((largest > 0).all()):
        raise ZeroKernelError("the kernel is zero: it has no features")
    return values, vectors, values > rank_cutoff(kernel.shape[-1], kernel.dtype) * largest


@checked
def truncation_error(K: LinearOperator | Tensor, delta: float) -> TruncationError:
    r"""Return the error of the best kernel of truncation rank, and the bound on it.

    With r the smallest rank that holds a share 1 - δ of the trace,

    .. math:: \frac{|K - K_r|_F}{|K|_F} \le \sqrt{\delta\, \lambda_{r+1} / \bar\lambda},

    where the mean runs over all n eigenvalues. The published proposition leaves the square root out; its
    proof bounds the square.

    Args:
        K: Square ``(*batch, n, n)``; made dense.
        delta: Share δ of the trace that may be lost, in (0, 1).

    Returns:
        `TruncationError`. Cost: an eigendecomposition.

    Raises:
        InputError: If delta is not between 0 and 1.
        ShapeError: If K is not square.
        ZeroKernelError: If K is zero.

    References:
        Distilled NTK paper, Definition 3.2, Proposition B.6 and equation (26), corrected.

    Example:
        >>> import torch
        >>> from ntkops.regression import truncation_error
        >>> found = truncation_error(torch.eye(20), 0.05)
        >>> int(found.rank), round(float(found.error), 3), round(float(found.bound), 3)
        (19, 0.224, 0.224)
    """
    kernel = read_kernel(K)
    if kernel.shape[-1] != kernel.shape[-2]:
        raise ShapeError(f"truncation_error takes a square kernel, this one is {tuple(kernel.shape)}")
    if not (isinstance(delta, float) and 0 < delta < 1):
        raise InputError(f"delta={delta!r}: a share between 0 and 1")
    values = _spectrum(kernel)[0].clamp(min=0)
    captured = values.cumsum(-1) / values.sum(-1, keepdim=True)
    # A share that is reached up to rounding counts as reached.
    size = values.shape[-1]
    rank = ((captured < 1 - delta - size * torch.finfo(torch.float64).eps).sum(-1) + 1).clamp(max=size)
    lost = torch.where(torch.arange(size, device=values.device) >= rank.unsqueeze(-1), values, 0.0)
    error = lost.square().sum(-1).sqrt() / values.square().sum(-1).sqrt()
    following = lost.amax(-1)
    return TruncationError(
        rank=rank, error=error, bound=(delta * following / values.mean(-1)).sqrt(), delta=delta
    )
