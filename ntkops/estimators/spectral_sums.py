"""Sums of a function over the spectrum of K: what the log-determinant and the effective dimension share."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch
from linear_operator.operators import AddedDiagLinearOperator, LinearOperator
from torch import Tensor
from tqdm import tqdm

from ..arguments import checked
from ..engines import count_passes
from ..errors import InputError, NotConvergedWarning, SingularKernelError, ZeroKernelError
from ..operators.capabilities import capabilities, fits_dense
from ..operators.sandwich import smaller_side
from ..results import Estimate, PassCount
from ..shortage import memory_for
from ..spectra import FunctionTrace, function_trace
from ._request import Operand, Request, require_finite
from .eigenvalues import eigenvalues_by_tiles, members

__all__ = [
    "effective_dimension",
    "logdet",
]


SumMethod = Literal["auto", "exact", "slq"]
METHODS = get_args(SumMethod)[1:]

_DENSE = 2048  # rows up to which all eigenvalues are computed at once where tiles are cheap
_USUAL = 800  # products that an estimate may well take
_EIGENVALUES = 1.5  # all eigenvalues of a dense matrix cost about so many products a row
_CAP = 20_000  # products where only a tolerance is given and the exact value is out of reach


@dataclass(frozen=True)
class SpectralSum:
    r"""A sum :math:`n c + \sum_i f(\lambda_i - s)` over the eigenvalues of a symmetric operator.

    Attributes:
        name: Name of the quantity.
        function: f, a Bernstein function with f(0) = 0, on float64 tensors.
        constant: c.
        floor: s, a number that no eigenvalue lies below but by rounding.
        ridge: What is added to λ - s under the logarithm or in the denominator.
    """

    name: str
    function: Callable[[Tensor], Tensor]
    constant: float
    floor: float
    ridge: float

    def exact(self, values: Tensor, eps: float) -> Tensor:
        """Return the sum from all eigenvalues, ``(*batch, n)``, largest first.

        Raises:
            InputError: If an eigenvalue lies below the floor by more than rounding.
        """
        largest, least = values.abs().amax(-1), values[..., -1] - self.floor
        for low, high in zip(least.reshape(-1).tolist(), largest.reshape(-1).tolist(), strict=True):
            self.require_semidefinite(low, high, values.shape[-1], eps)
        self.require_regular(float(least.min()), float(largest.max()), eps)
        return values.shape[-1] * self.constant + self.function((values - self.floor).clamp(min=0)).sum(-1)

    def require_semidefinite(self, least: float, largest: float, size: int, eps: float) -> None:
        """Raise where an eigenvalue of K - s lies below 0 by more than rounding.

        Raises:
            InputError: If one does.
        """
        if least < -10 * eps * size * largest:
            raise InputError(
                f"the operator is not positive semidefinite: its eigenvalues reach down to "
                f"{least + self.floor:.3g}, the largest has size {largest:.3g}; {self.name} is defined here "
                "for kernels"
            )

    def require_regular(self, least: float, largest: float, eps: float) -> None:
        """Raise where rounding of the operator decides the result.

        Raises:
            SingularKernelError: If K + ridge is singular to working precision.
        """
        if max(least, 0.0) + self.ridge <= eps * largest:
            raise SingularKernelError(
                f"{self.name}: the kernel with its ridge is numerically singular: its smallest eigenvalue is "
                f"{max(least, 0.0) + self.ridge:.3g}, the largest {largest:.3g}, which products do not tell "
                f"from 0 at a precision of {eps:.1g}; raise the ridge, or use float64"
            )


@dataclass(frozen=True)
class Options:
    """What both quantities are asked with, checked.

    Attributes:
        request: Method, tolerance, passes, generator.
        atol: Absolute tolerance that is enough as well.
        deflation: Leading eigenvectors that are split off; None to choose.
    """

    request: Request
    atol: float
    deflation: int | None

    @classmethod
    def check(cls, request: Request, atol: float, deflation: int | None) -> Options:
        """Return the options, checked.

        Args:
            request: Method, tolerance, passes, generator.
            atol: Absolute tolerance.
            deflation: Number of eigenvectors, or None.

        Returns:
            The options.

        Raises:
            InputError: If one is out of range.
        """
        if isinstance(atol, bool) or not isinstance(atol, int | float) or not 0 <= atol < math.inf:
            raise InputError(f"atol={atol!r}: an absolute tolerance is a number ≥ 0")
        if deflation is not None and (type(deflation) is not int or deflation < 0):
            raise InputError(f"deflation={deflation!r}: pass None, or a number of eigenvectors ≥ 0")
        return cls(request, float(atol), deflation)


def absolute_ridge(operand: Operand, ridge: float, relative: bool) -> float:
    """Return the ridge as a number that is added to eigenvalues.

    Raises:
        InputError: If it is not a finite number ≥ 0.
        ZeroKernelError: If it is relative to a mean diagonal that is zero.
    """
    if isinstance(ridge, bool) or not isinstance(ridge, int | float) or not 0 <= ridge < math.inf:
        raise InputError(f"ridge={ridge!r}: pass a finite number ≥ 0")
    if not relative or not ridge:
        return float(ridge)
    diagonal = require_finite(operand.capabilities.diagonal(), "the diagonal")
    mean = float(operand.rows.sum(diagonal).mean()) / operand.rows.size
    if not mean > 0:
        raise ZeroKernelError(
            f"a ridge relative to the mean diagonal needs a positive one, it is {mean:.3g}; pass an absolute "
            "ridge with relative=False"
        )
    return float(ridge) * mean


def without_jitter(operator: LinearOperator | Tensor) -> tuple[LinearOperator | Tensor, float]:
    """Return K and c for an operator K + c I with c > 0, which may be added in steps."""
    if not isinstance(operator, AddedDiagLinearOperator) or capabilities(operator).space.is_spread:
        return operator, 0.0
    entries = operator._diag_tensor._diagonal().detach().double()
    least, largest = float(entries.min()), float(entries.max())
    if not 0 < least == largest:
        return operator, 0.0
    inner, more = without_jitter(operator._linear_op)
    return inner, least + more


def added_diagonal(operator: LinearOperator | Tensor) -> float:
    """Return the least entry ≥ 0 of the diagonals that an operator K + D carries, or 0."""
    if not isinstance(operator, AddedDiagLinearOperator):
        return 0.0
    entries = operator._diag_tensor._diagonal().double()
    least = -capabilities(operator).space.largest(-float(entries.min()) if entries.numel() else -math.inf)
    return max(least, 0.0) + added_diagonal(operator._linear_op)


def spectral_sum(operand: Operand, quantity: SpectralSum, options: Options) -> Estimate:
    """Compute or estimate a sum over the spectrum, of LᵀL for an operator L Lᵀ where that is smaller.

    Args:
        operand: Square ``(*batch, n, n)``.
        quantity: The sum.
        options: Tolerances, method.

    Returns:
        An estimate of shape ``(*batch)``.

    Raises:
        InputError: If the passes do not pay for the method.
    """
    start = time.perf_counter()
    # f(0) = 0, so that the eigenvalues that one side has more count for nothing but the constant.
    other = smaller_side(operand.operator) if quantity.ridge > 0 and not quantity.floor else None
    if other is not None:
        # n c = r (c n / r) for the r eigenvalues of the other side
        ratio = operand.size / other.shape[-1]
        operand, quantity = Operand(other), replace(quantity, constant=quantity.constant * ratio)
    options = replace(options, request=options.request.shared(operand.rows))
    request, eps = options.request, torch.finfo(operand.dtype).eps
    exact_passes = float(operand.capabilities.exact_cost("tiles"))
    with (
        torch.no_grad(),
        count_passes() as counter,
        memory_for(quantity.name, "give fewer passes with num_passes=, or call K.free() first"),
        tqdm(desc=quantity.name, unit="product", disable=not request.progress) as bar,
    ):
        fits = fits_dense(operand.operator) and request.allows(exact_passes)
        found: list[FunctionTrace] | None = None
        if request.method == "exact" and math.isfinite(exact_passes) and not request.allows(exact_passes):
            raise InputError(
                f"the exact value of {quantity.name} costs about {exact_passes:.0f} passes, more than "
                f"num_passes={request.num_passes}; raise it, or choose 'slq'"
            )
        if (
            request.method == "slq"
            or request.method == "auto"
            and not (fits and _pays(operand, exact_passes))
        ):
            cap = _cap(operand, request, exact_passes, fits)
            with request.capped():
                found = _by_quadrature(operand, quantity, options, cap, bar)
            spent = request.num_passes is not None and counter.total + exact_passes > request.num_passes
            if request.method == "auto" and fits and not spent and not all(one.converged for one in found):
                found = None  # as much again as the exact value costs would be spent: take that
        if found is None:
            value = quantity.exact(eigenvalues_by_tiles(operand.capabilities).cpu(), eps)
            return Estimate.of_exact(
                value,
                passes=counter.total,
                seconds=time.perf_counter() - start,
                checks=counter.count.checks,
            )
    result = _wrap(operand, found, request.seed, counter.count, time.perf_counter() - start)
    if not result.converged:
        _warn(quantity.name, found, options)
    return result


def _pays(operand: Operand, exact_passes: float) -> bool:
    return operand.size <= _DENSE and exact_passes <= _USUAL * max(operand.cost, 1)


def _cap(operand: Operand, request: Request, exact_passes: float, fits: bool) -> int:
    """Return the products that one member may take."""
    if request.num_passes is not None:
        return (request.num_passes) // (max(operand.cost, 1) * max(operand.batch_shape.numel(), 1))
    if request.method == "auto" and fits:
        exact = exact_passes / max(operand.cost, 1)
        return math.ceil(max(exact, _EIGENVALUES * operand.size, _USUAL))
    return _CAP


def _by_quadrature(
    operand: Operand, quantity: SpectralSum, options: Options, cap: int, bar: tqdm
) -> list[FunctionTrace]:
    """Return the estimate for each member."""
    request, eps = options.request, torch.finfo(operand.dtype).eps
    if not quantity.ridge > 0:
        raise SingularKernelError(
            f"{quantity.name}: without a ridge nothing bounds the eigenvalues from below, and no number of "
            "products tells a small one from 0; pass ridge=, or method='exact' where the dense matrix fits"
        )
    found = []
    for member in members(operand):
        space = member.rows
        found.append(
            function_trace(
                _shifted(member, quantity.floor),
                space,
                quantity.function,
                generator=request.generator,
                rtol=request.rtol,
                atol=options.atol,
                offset=space.size * quantity.constant,
                deflation=options.deflation,
                max_products=cap,
                report=bar.update,
            )
        )
        largest = found[-1].scale + quantity.floor
        quantity.require_semidefinite(found[-1].least, largest, space.size, eps)
        # The least eigenvalue is not known, and may be 0: the ridge alone has to stand out of the rounding.
        quantity.require_regular(0.0, found[-1].scale, eps)
    return found


def _shifted(operand: Operand, floor: float) -> Callable[[Tensor], Tensor]:
    """Return the product with K - s."""
    if not floor:
        return operand.multiply
    return lambda block: operand.multiply(block) - floor * block


def _wrap(
    operand: Operand, found: Sequence[FunctionTrace], seed: int, passes: PassCount, seconds: float
) -> Estimate:
    def stack(numbers: Sequence[float]) -> Tensor:
        return torch.tensor(numbers, dtype=torch.float64).reshape(operand.batch_shape)

    return Estimate(
        value=stack([one.value for one in found]),
        stderr=stack([one.stderr for one in found]),
        interval=(stack([one.interval[0] for one in found]), stack([one.interval[1] for one in found])),
        method="slq",
        exact=False,
        passes=passes.total,
        checks=passes.checks,
        converged=all(one.converged for one in found),
        seed=seed,
        seconds=seconds,
    )


def _warn(name: str, found: Sequence[FunctionTrace], options: Options) -> None:
    width = max(max(one.value - one.interval[0], one.interval[1] - one.value) for one in found)
    bracket = max(one.quadrature for one in found)
    warnings.warn(
        f"{name} ended with an interval of ± {width:.3g}, of which ± {bracket:.3g} are the quadrature's and "
        f"the rounding of products; rtol={options.request.rtol} and atol={options.atol:g} are not met: raise "
        "num_passes or the ridge, use float64, or loosen the tolerance",
        NotConvergedWarning,
        stacklevel=5,
    )


# -- the log-determinant of a kernel with a ridge


@checked
def logdet(
    operator: LinearOperator | Tensor,
    ridge: float = 0.0,
    *,
    relative: bool = False,
    rtol: float | None = None,
    atol: float = 0.0,
    num_passes: int | None = None,
    deflation: int | None = None,
    method: SumMethod = "auto",
    generator: torch.Generator | None = None,
    progress: bool = False,
) -> Estimate:
    r"""Compute or estimate :math:`\log \det (K + r I)` for a positive semidefinite K.

    With c = r plus the diagonal that the operator carries already (``K.add_jitter(c)``), it is

    .. math:: n \log c + \sum_i \log(1 + \lambda_i / c),

    whose second part is estimated: exactly from all eigenvalues where the dense matrix fits and costs less,
    else by stochastic Lanczos quadrature. Of an operator L Lᵀ whose L is known, such as `ntkops.ggn`, or the
    kernel of more outputs than parameters, the eigenvalues are those of LᵀL where that is smaller: the others
    are zero. Gauss rules are upper and Gauss-Radau rules lower bounds of every quadratic form, so that the
    interval contains the quadrature's error and not an estimate of it. The interval of the probes is that of
    a χ² with matched variance.

    Args:
        operator: Symmetric positive semidefinite ``(*batch, n, n)`` operator or tensor, with or without an
            added diagonal. Negative eigenvalues of rounding size count as zero.
        ridge: r ≥ 0, absolute like the argument of ``K.add_jitter``.
        relative: Multiply r by the mean diagonal (over the batch: one scale), which is computed exactly.
        rtol: Tolerance relative to the absolute value of the result. Default 1e-2 where ``num_passes`` is
            None too. The result may be close to zero: then pass ``atol``.
        atol: Absolute tolerance that is enough as well. 0.1 is a factor of 1.1 in the determinant.
        num_passes: Passes to spend; with a tolerance a cap (default: what the exact value costs, or 20,000
            products where that is out of reach).
        deflation: Number of leading eigenvectors that are computed and split off, which leaves the probes
            less to see; None to choose it from what the first probes see of the spectrum, 0 for none.
        method: "auto", "exact" or "slq".
        generator: CPU generator of the probes; None draws a seed from the operating system.
        progress: Show a bar of products.

    Returns:
        `Estimate` of shape ``(*batch)``. Exact: all tiles of K and n³ operations. Else two passes a product
        for a kernel of ours, memory up to 256 MB of Krylov vectors, or those of one probe.

    Raises:
        InputError: If an option is out of range, or the operator is far from positive semidefinite.
        ShapeError: If the operator is not square.
        DtypeError: If the operator is not of a real floating dtype.
        UnsupportedOperationError: If a dense operator is not symmetric.
        SingularKernelError: If K + r is singular to working precision, or has no ridge while its dense
            matrix is out of reach.
        ZeroKernelError: If the ridge is relative to a diagonal that is zero.
        NonFiniteError: If the operator has entries that are not finite.

    Warns:
        NotConvergedWarning: If the passes were spent before the tolerance was met.

    References:
        Ubaru, Chen, Saad 2017 (stochastic Lanczos quadrature); Golub, Meurant 2010, chapter 6 (bounds).

    Example:
        >>> import math, torch, ntkops
        >>> from ntkops.estimators import logdet
        >>> K = torch.diag(torch.tensor([1.0, 3.0], dtype=torch.float64))
        >>> math.isclose(float(logdet(K, ridge=1.0)), math.log(8.0))
        True
    """
    request = Request.check(
        METHODS, method=method, rtol=rtol, num_passes=num_passes, generator=generator, progress=progress
    )
    options = Options.check(request, atol, deflation)
    operand = Operand(operator)
    operand.require_square("the log-determinant")
    with torch.no_grad():
        bare, jitter = without_jitter(operator)
        floor = added_diagonal(bare)
        scale = absolute_ridge(operand, ridge, relative) + jitter + floor
    operand = Operand(bare)
    if scale > 0:
        quantity = SpectralSum(
            "the log-determinant", lambda x: torch.log1p(x / scale), math.log(scale), floor, scale
        )
    else:
        quantity = SpectralSum("the log-determinant", torch.log, 0.0, 0.0, 0.0)
    return spectral_sum(operand, quantity, options)


# -- the effective dimension of kernel ridge regression


@checked
def effective_dimension(
    operator: LinearOperator | Tensor,
    ridge: float,
    *,
    relative: bool = False,
    rtol: float | None = None,
    atol: float = 0.0,
    num_passes: int | None = None,
    deflation: int | None = None,
    method: SumMethod = "auto",
    generator: torch.Generator | None = None,
    progress: bool = False,
) -> Estimate:
    r"""Compute or estimate the effective dimension (degrees of freedom) of ridge regression with kernel K.

    .. math:: \mathrm{tr}\, K (K + r I)^{-1} = \sum_i \frac{\lambda_i}{\lambda_i + r}

    It is the number of eigenvalues above the ridge, each counted by how far it stands above it. The numerics
    are those of `logdet`, with the same bounds: exactly from all eigenvalues where that fits and costs
    less, else stochastic Lanczos quadrature with Gauss and Gauss-Radau rules.

    Args:
        operator: Symmetric positive semidefinite ``(*batch, n, n)`` operator or tensor. A diagonal that it
            carries already counts as part of K. Negative eigenvalues of rounding size count as zero.
        ridge: r > 0, absolute like the argument of ``K.add_jitter``.
        relative: Multiply r by the mean diagonal (over the batch: one scale), which is computed exactly.
        rtol: Tolerance relative to the result. Default 1e-2 where ``num_passes`` is None too.
        atol: Absolute tolerance that is enough as well.
        num_passes: Passes to spend; with a tolerance a cap (default: what the exact value costs, or 20,000
            products where that is out of reach).
        deflation: Number of leading eigenvectors that are computed and split off; None to choose it.
        method: "auto", "exact" or "slq".
        generator: CPU generator of the probes; None draws a seed from the operating system.
        progress: Show a bar of products.

    Returns:
        `Estimate` of shape ``(*batch)``, between 0 and n; costs as for `logdet`.

    Raises:
        InputError: If an option is out of range, or the operator is far from positive semidefinite.
        ShapeError: If the operator is not square.
        DtypeError: If the operator is not of a real floating dtype.
        UnsupportedOperationError: If a dense operator is not symmetric.
        SingularKernelError: If the ridge is below the rounding of K, where the sum is a numerical rank.
        ZeroKernelError: If the ridge is relative to a diagonal that is zero.
        NonFiniteError: If the operator has entries that are not finite.

    Warns:
        NotConvergedWarning: If the passes were spent before the tolerance was met.

    References:
        Caponnetto, De Vito 2007 (definition); Ubaru, Chen, Saad 2017 (stochastic Lanczos quadrature).

    Example:
        >>> import torch
        >>> from ntkops.estimators import effective_dimension
        >>> float(effective_dimension(torch.diag(torch.tensor([1.0, 3.0])), ridge=1.0))
        1.25
    """
    request = Request.check(
        METHODS, method=method, rtol=rtol, num_passes=num_passes, generator=generator, progress=progress
    )
    options = Options.check(request, atol, deflation)
    operand = Operand(operator)
    operand.require_square("the effective dimension")
    with torch.no_grad():
        scale = absolute_ridge(operand, ridge, relative)
    if not scale > 0:
        raise InputError(
            "ridge=0: the effective dimension is then the rank, which rounding decides; pass r > 0"
        )
    quantity = SpectralSum("the effective dimension", lambda x: x / (x + scale), 0.0, 0.0, scale)
    return spectral_sum(operand, quantity, options)
