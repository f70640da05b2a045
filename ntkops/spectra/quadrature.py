"""The trace of a function of a positive semidefinite operator, from products, with a bracket and an interval.

For f(K) = log(1 + K / r) and f(K) = K (K + r)⁻¹, as for every Bernstein function (f ≥ 0, with derivatives
whose signs alternate), the Gauss rule of zᵀ f(K) z is an upper bound and the Gauss-Radau rule with a node
at 0 a lower one (Golub, Meurant 2010, section 6.2): what the quadrature has not resolved is known, not
guessed. What the random z leave open is a weighted sum of squares, near a χ² of known variance.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..arguments import checked
from ..errors import InputError
from ..vectors import Space
from .intervals import guarded_freedom, scaled_chi_square
from .jacobi import Jacobi
from .lanczos import Lanczos, RitzPairs, choose_deflation

__all__ = ["FunctionTrace", "function_trace"]

_LEVEL = 0.05  # the interval may miss with this probability
_LEAST = 4  # probes, below which the effective number of squares cannot be told
_FIRST = 8  # probes before the error is looked at for the first time
_STEPS = 6  # steps before the bracket is looked at for the first time
_GROWTH = (1.3, 4.0)  # least and greatest factor from one look to the next
_SHARE = 0.1  # of the tolerance, that the quadrature may take
_ROUNDING = 4.0  # rounding units of the largest eigenvalue by which products may shift the spectrum
_MEMORY = 2**28  # bytes for the Krylov spaces of probes that run together


@dataclass(frozen=True)
class FunctionTrace:
    """The trace of f(K), with the errors of probes and quadrature told apart.

    Attributes:
        value: The estimate, the given offset included.
        stderr: Standard error that the probes leave.
        interval: 95 % interval (low, high): the probes' widened by the quadrature's bracket.
        quadrature: Half width of the quadrature's bracket, rounding of the products included.
        probes: Number of probes; 0 where nothing was left to chance.
        steps: Largest number of Lanczos steps of one probe.
        products: Columns multiplied.
        scale: The largest |eigenvalue| seen, up to a small factor.
        least: The least node seen: no eigenvalue need lie there, but one lies there or below.
        converged: Whether the tolerance was met, true where none was asked.
    """

    value: float
    stderr: float
    interval: tuple[float, float]
    quadrature: float
    probes: int
    steps: int
    products: int
    scale: float
    least: float
    converged: bool


@checked
def function_trace(
    multiply: Callable[[Tensor], Tensor],
    space: Space,
    function: Callable[[Tensor], Tensor],
    *,
    generator: torch.Generator,
    rtol: float | None = None,
    atol: float = 0.0,
    offset: float = 0.0,
    deflation: int | None = None,
    max_products: int | None = None,
    report: Callable[[int], None] | None = None,
) -> FunctionTrace:
    r"""Estimate offset + tr f(K) for a symmetric positive semidefinite K by stochastic Lanczos quadrature.

    Random directions z of length √n make :math:`E[z^\top f(K) z] = \mathrm{tr} f(K)` (Ubaru, Chen, Saad
    2017). With ``deflation`` = k, the trace is split by an orthonormal basis Q of k approximate eigenvectors,

    .. math:: \mathrm{tr} f(K) = \sum_i q_i^\top f(K) q_i + \mathrm{tr}((I - QQ^\top) f(K) (I - QQ^\top)),

    which is right for any Q: the first part has a bracket from the residuals alone, and the random
    directions see only the rest.

    Args:
        multiply: ``(n, b) -> (n, b)``, the product with K.
        space: The space of its vectors.
        function: f on float64 tensors of numbers ≥ 0; a Bernstein function with f(0) = 0, such as
            ``lambda x: torch.log1p(x / ridge)`` or ``lambda x: x / (x + ridge)``.
        generator: Draws the directions.
        rtol: Tolerance relative to |offset + tr f(K)|, or None.
        atol: Tolerance that is enough as well, absolute.
        offset: A number that is added.
        deflation: Number k of leading eigenvectors that are split off; None to choose it from the spectrum
            that the first directions see.
        max_products: Columns that may be multiplied; None for no limit, where a tolerance is given.
        report: Called with the number of columns after each product.

    Returns:
        The trace. Its interval holds in the mean over the directions with probability 0.95 or more, also
        where ``rtol`` ended the estimate: the k-th look may miss with probability 0.05 / (k (k + 1)).
        Memory: at most about 256 MB of Krylov vectors, or those of one probe.

    Raises:
        InputError: If neither a tolerance nor a number of products is given, or too few products.

    Example:
        >>> import torch
        >>> from ntkops.spectra import function_trace
        >>> from ntkops.vectors import Space
        >>> values = torch.logspace(0, -6, 100, dtype=torch.float64)
        >>> found = function_trace(
        ...     lambda V: values[:, None] * V,
        ...     Space(100, torch.float64),
        ...     lambda x: torch.log1p(x / 1e-3),
        ...     generator=torch.Generator().manual_seed(0),
        ...     rtol=0.05,
        ... )
        >>> exact = float(torch.log1p(values / 1e-3).sum())
        >>> found.converged, found.interval[0] <= exact <= found.interval[1]
        (True, True)
    """
    if rtol is not None and not 0 < rtol < 1:
        raise InputError(f"rtol={rtol!r}: pass a relative tolerance between 0 and 1, or None")
    if not 0 <= atol < math.inf:
        raise InputError(f"atol={atol!r}: pass a finite number ≥ 0")
    if not math.isfinite(offset):
        raise InputError(f"offset={offset!r}: pass a finite number")
    if deflation is not None and deflation < 0:
        raise InputError(f"deflation={deflation!r}: pass a number of eigenvectors ≥ 0, or None")
    tolerant = rtol is not None or atol > 0
    if not tolerant and max_products is None:
        raise InputError("pass rtol, atol or max_products: nothing else ends the estimate")
    if max_products is not None and max_products < 2 * _LEAST:
        raise InputError(
            f"{max_products} products are not enough: {_LEAST} probes of 2 steps take {2 * _LEAST}"
        )
    work = _Work(multiply, space, function, generator, offset, rtol or 0.0, atol, max_products, report)
    work.deflate(min(deflation or 0, space.size))
    if work.dimension == 0:
        return work.result(_LEVEL, met=True)
    probes = _FIRST
    look = 0
    while True:
        look += 1
        probes = work.affordable(probes)
        spent = work.draw(probes)
        level = _LEVEL / (look * (look + 1)) if tolerant else _LEVEL
        excess = work.excess(level)
        if tolerant and excess <= 1:
            return work.result(level, met=True)
        if spent:
            return work.result(level, met=not tolerant)
        if look == 1 and deflation is None and (better := work.better_deflation()):
            work.deflate(better)
            probes = _FIRST
            continue
        low, high = _GROWTH
        factor = min(max(1.1 * excess**2, low), high) if math.isfinite(excess) and tolerant else high
        probes = math.ceil(work.count * factor)
        # Rounding shifts the spectrum by the same amount for every probe: no mean over probes makes that
        # smaller.
        if tolerant and work.hopeless():
            return work.result(level, met=False)


@dataclass
class _Work:
    """Sums over the probes drawn so far, and the part that was split off."""

    multiply: Callable[[Tensor], Tensor]
    space: Space
    function: Callable[[Tensor], Tensor]
    generator: torch.Generator
    offset: float
    rtol: float
    atol: float
    limit: int | None
    report: Callable[[int], None] | None

    products: int = 0
    count: int = 0
    steps: int = _STEPS  # that the next probes begin with
    longest: int = 0
    scale: float = 0.0  # the largest |eigenvalue| seen
    least: float = math.inf  # the least node
    fixed: tuple[float, float] = (0.0, 0.0)  # bracket of the part split off
    basis: Tensor | None = None
    spectrum: tuple[Tensor, Tensor] = field(default_factory=lambda: (torch.zeros(1), torch.zeros(1)))
    sums: Tensor = field(default_factory=lambda: torch.zeros(6, dtype=torch.float64))

    @property
    def dimension(self) -> int:
        """Dimension of the space that the probes see."""
        return self.space.size - (0 if self.basis is None else self.basis.shape[-1])

    def deflate(self, count: int) -> None:
        """Split off leading eigenvectors: one-step Gauss and Radau rules bracket their part."""
        if not count:
            return
        self.count, self.sums = 0, torch.zeros_like(self.sums)
        spent = self.products
        limit = None if self.limit is None else max((self.limit - spent) // 2, 1)
        count = count if limit is None else min(count, limit)
        solver = Lanczos(self.multiply, self.space, self.generator)
        # Residuals enter squared, so the square root of a small tolerance is enough.
        pairs = solver.solve(count, tolerance=1e-3, max_products=limit)
        self._count_products(solver.products)
        self.basis = pairs.vectors
        self.scale = float(pairs.values.abs().max())
        self.least = min(self.least, float(pairs.values.min()))
        self.fixed = self._split(pairs)

    def better_deflation(self) -> int:
        """Return the number of eigenvectors that should have been split off, judged by the rules at hand."""
        values, counts = self.spectrum
        error = max(self.rtol * abs(self.ends(_LEVEL)[0]), self.atol) or None
        left = math.inf if self.limit is None else self.limit - self.products
        return choose_deflation(values, counts, steps=self.steps, drawn=self.count, error=error, left=left)

    def _split(self, pairs: RitzPairs) -> tuple[float, float]:
        shift = self._shift()
        values = pairs.values.clamp(min=0)
        upper = self.function(values + shift).sum()
        # The rule with nodes 0 and ω that has the mean θ and the variance of the residual, f(0) = 0.
        ratio = (pairs.residuals / torch.where(values > 0, values, 1.0)).square()
        node = (values * (1 + ratio) - shift).clamp(min=0)
        lower = (self.function(node) / (1 + ratio))[values > 0].sum()
        return float(lower), float(upper)

    def affordable(self, probes: int) -> int:
        """Return how many probes in all the products allow at the present number of steps."""
        if self.limit is None:
            return probes
        left = self.limit - self.products
        if not self.count:
            # Few enough that each may take some 50 steps.
            return max(min(probes, left // 50, _FIRST), min(_LEAST, max(left, 1)))
        return min(probes, self.count + left // max(self.steps, 1))

    def draw(self, probes: int) -> bool:
        """Draw probes up to a number in all; return whether the products are spent."""
        bytes_each = 3 * self.space.size * max(self.steps, 32) * 8
        width = max(1, _MEMORY // bytes_each)
        while self.count < probes:
            count = min(width, probes - self.count)
            if self.limit is not None and self.limit - self.products < count * (2 if self.count else 1):
                return True
            self._run(count)
        return self.limit is not None and self.limit - self.products < self.steps

    def _run(self, count: int) -> None:
        starts = self.space.probes(count, self.generator, "gaussian")
        if self.basis is not None:
            for _ in range(2):
                starts = starts - self.basis @ self.space.inner(self.basis, starts).to(starts.dtype)
        rules = Jacobi(self.multiply, self.space, starts, report=self.report)
        most = self.space.size
        if self.limit is not None:
            most = max(1, min(most, (self.limit - self.products) // count))
        steps = min(self.steps, most)
        while True:
            rules.extend(steps)
            self.scale = max(self.scale, rules.scale)
            found = self._integrals(rules)  # (6, count)
            if rules.steps < steps or steps >= most or not bool(rules.alive.any()):
                break
            if self._resolved(found):
                break
            steps = min(math.ceil(1.4 * steps), most)
        self.products += rules.products
        self.longest = max(self.longest, rules.steps)
        self.steps = max(self.steps, min(steps, rules.steps))
        self.sums += found.sum(-1)
        self.count += count

    def _integrals(self, rules: Jacobi) -> Tensor:
        """Return what each probe adds to the sums, ``(6, p)``, for directions of length 1.

        The rows: lower and upper bound, the same with the rounding of products, best value, mean square.
        """
        shift = self._shift()
        nodes, weights = rules.gauss()
        # Bernstein functions have f^(2m) ≤ 0 and f^(2m+1) ≥ 0: the Gauss rule errs upwards, the Radau rule
        # with a node at 0 downwards, at every m.
        self.least = min(self.least, float(nodes.min()))
        radau_nodes, radau_weights = rules.radau(0.0)
        values = self._at(nodes)
        gauss, radau = (weights * values).sum(-1), (radau_weights * self._at(radau_nodes)).sum(-1)
        low = (radau_weights * self._at(radau_nodes - shift)).sum(-1)
        high = (weights * self._at(nodes + shift)).sum(-1)
        square = (weights * values.square()).sum(-1)
        self.spectrum = values.flatten().cpu(), weights.flatten().cpu() * (self.dimension / len(weights))
        return torch.stack([radau, gauss, low, high, (gauss + radau) / 2, square]).cpu()

    def _at(self, nodes: Tensor) -> Tensor:
        return self.function(nodes.clamp(min=0))

    def _shift(self) -> float:
        """How far the rounding of products may have moved an eigenvalue."""
        return _ROUNDING * torch.finfo(self.space.dtype).eps * self.scale

    def _resolved(self, found: Tensor) -> bool:
        """Whether the quadrature's bracket is a small part of the error that is asked, or that remains."""
        lower, upper, _, _, best, square = (float(x) for x in found.mean(-1))
        d = self.dimension
        target = _SHARE * max(self.rtol * abs(self.offset + sum(self.fixed) / 2 + d * best), self.atol)
        if not target:
            # Without a tolerance: of the error that the probes will leave when the products are spent.
            assert self.limit is not None
            expected = max(1.0, self.limit / max(self.steps, 1))
            # Twice the standard error of the mean over the probes that the products will pay for, times d for
            # the trace.
            target = 2 * _SHARE * d * math.sqrt(2 / (d + 2) * max(square - best**2, 0.0) / expected)
        floor = 64 * torch.finfo(torch.float64).eps * d * abs(upper)  # what more steps cannot narrow
        return d * (upper - lower) <= max(2 * target, floor)

    def _means(self) -> list[float]:
        return (self.sums / max(self.count, 1)).tolist()

    def _variance(self) -> float:
        """Return the variance of zᵀ f(K) z for one random direction of length 1."""
        best, square = self._means()[-2:]
        # Uniform on the sphere: 2 / (d + 2) times the variance of f over the spectrum.
        return 2 / (self.dimension + 2) * max(square - best**2, 0.0)

    def _half_bracket(self) -> float:
        low, high = self._means()[2:4]
        return (self.fixed[1] - self.fixed[0] + self.dimension * (high - low)) / 2

    def ends(self, level: float) -> tuple[float, float, float]:
        """Return value, low and high at a level of error."""
        lower, upper, low, high, best, _ = self._means()
        if self.count:
            freedom = guarded_freedom(best, self._variance() / self.count, self.count)
            below, above = scaled_chi_square(freedom, level)
            # What rounding may have done is no matter of chance, and is added to the ends.
            low, high = below * lower + (low - lower), above * upper + (high - upper)
        d, known_low, known_high = self.dimension, *self.fixed
        value = self.offset + (known_low + known_high) / 2 + d * best
        return value, self.offset + known_low + d * low, self.offset + known_high + d * high

    def excess(self, level: float) -> float:
        """Return the half width of the interval in units of the tolerance, which holds for the true value."""
        value, low, high = self.ends(level)
        width = max(value - low, high - value)
        least = 0.0 if low <= 0 <= high else min(abs(low), abs(high))
        target = max(self.rtol * least, self.atol)
        if not target:  # on the way there, the value that is found has to do for the growth
            target = self.rtol * abs(value)
            return max(width / target, 1.01) if target else (0.0 if width == 0 else math.inf)
        return width / target

    def hopeless(self) -> bool:
        """Whether the rounding of products alone exceeds the tolerance, so that no probe helps."""
        value = self.ends(_LEVEL)[0]
        return self._half_bracket() > max(self.rtol * abs(value), self.atol)

    def result(self, level: float, *, met: bool) -> FunctionTrace:
        """Return what was found."""
        value, low, high = self.ends(level)
        stderr = self.dimension * math.sqrt(self._variance() / self.count) if self.count else 0.0
        counts = self.count, self.longest, self.products
        bracket, seen = self._half_bracket(), (self.scale, self.least)
        return FunctionTrace(value, stderr, (low, high), bracket, *counts, *seen, met)

    def _count_products(self, columns: int) -> None:
        self.products += columns
        if self.report is not None:
            self.report(columns)
