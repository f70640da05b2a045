"""The density of a spectrum, by stochastic Lanczos quadrature."""

from __future__ import annotations

import math
import time
import warnings
from dataclasses import dataclass
from typing import Any, Literal

import torch
from linear_operator.operators import LinearOperator
from torch import Tensor
from tqdm import tqdm

from ..arguments import checked
from ..engines import count_passes
from ..errors import InputError, NotConvergedWarning, ShapeError, ZeroKernelError
from ..operators.capabilities import fits_dense
from ..operators.sandwich import smaller_side
from ..results import SpectralDensity
from ..results.spectra import shares, smoothed
from ..spectra import Jacobi, scaled_chi_squares
from ..vectors import rank_cutoff
from ._request import Operand, Request
from .eigenvalues import eigenvalues_by_tiles

__all__ = ["spectral_density"]

_DENSE = 2048  # rows up to which all eigenvalues are computed where tiles are cheap
_STEPS, _PROBES = 64, 10
_FIRST = 8  # probes before the error is looked at for the first time
_GROWTH = (1.3, 4.0)
_LEVEL = 0.05
_POINTS, _FINE = 256, 4  # points of the grid, and how many finer the bound is integrated
_MEMORY = 2**28  # bytes for the Krylov spaces of probes that run together
_CAP = 20_000  # products where only a tolerance is given


@checked
def spectral_density(
    operator: LinearOperator | Tensor,
    *,
    num_steps: int | None = None,
    num_probes: int | None = None,
    rtol: float | None = None,
    num_passes: int | None = None,
    grid: Tensor | None = None,
    bandwidth: float | None = None,
    scale: str = "linear",
    method: Literal["auto", "exact", "slq"] = "auto",
    generator: torch.Generator | None = None,
    progress: bool = False,
) -> SpectralDensity:
    r"""Compute or estimate the density of the eigenvalues of a symmetric operator.

    .. math:: \varphi(x) = \frac{1}{n} \sum_i g_\sigma(x - \lambda_i)

    with a Gaussian of standard deviation σ. For random directions z of length 1,
    :math:`E[z^\top g_\sigma(x - K) z] = \varphi(x)`; the Gauss rules of m Lanczos steps with full
    reorthogonalisation give each form. The probes' error falls with the square root of their number times
    that of the eigenvalues within σ; the quadrature's falls exponentially with m. Both are reported, apart.
    An operator whose dense matrix is small and cheap, or that is L Lᵀ with such an LᵀL, is decomposed
    instead, without any error.

    Args:
        operator: Symmetric ``(n, n)`` operator or tensor.
        num_steps: Lanczos steps m of each probe; default 64, at most n.
        num_probes: Random directions; default 10, where neither ``rtol`` nor ``num_passes`` is given.
        rtol: Draw probes until the half width of their 95 % band is at most ``rtol`` times the density, in
            the Euclidean norm over the grid. The quadrature's error is apart: ``num_steps`` sets it.
        num_passes: Passes to spend on probes; with ``rtol`` a cap (default 20,000 products).
        grid: ``(g,)`` values of λ, ascending; default 256 points across the spectrum found.
        bandwidth: σ, in units of λ, or in decades on the logarithmic scale. Default: a 50th of the width of
            the spectrum.
        scale: "linear", or "log" for the density of log10 λ, where eigenvalues of the size of rounding and
            below are left out.
        method: "auto", "exact" or "slq".
        generator: CPU generator of the probes; None draws a seed from the operating system.
        progress: Show a bar of products.

    Returns:
        `SpectralDensity`. Cost: m products for each probe, and n × m numbers for each of those that run
        together (256 MB at most, or those of one probe).

    Raises:
        InputError: If an option is out of range.
        ShapeError: If the operator is not square, or is a batch.
        DtypeError: If the operator is not of a real floating dtype.
        UnsupportedOperationError: If a dense operator is not symmetric.
        ZeroKernelError: If the operator has no positive eigenvalue, on the logarithmic scale.
        NonFiniteError: If the operator has entries that are not finite.

    Warns:
        NotConvergedWarning: If the passes were spent before the tolerance was met.

    References:
        Lin, Saad, Yang 2016 (densities); Akhiezer 1965, section 2.5 (bounds).

    Example:
        >>> import torch
        >>> from ntkops.estimators import spectral_density
        >>> found = spectral_density(
        ...     torch.diag(torch.linspace(0, 1, 100)), bandwidth=0.05
        ... )
        >>> found.exact, round(float(found.cdf(torch.tensor([0.5]))), 2)
        (True, 0.5)
    """
    start = time.perf_counter()
    asked = Request.check(
        ("exact", "slq"),
        method=method,
        rtol=rtol,
        num_passes=num_passes,
        generator=generator,
        progress=progress,
    )
    operand = Operand(operator)
    asked = asked.shared(operand.rows)
    _check(operand, num_steps, num_probes, grid, bandwidth, scale)
    if operand.batch_shape:
        raise ShapeError(
            f"a spectral density is that of one operator, this is a batch {tuple(operand.batch_shape)}: "
            "index it first, as in K[0]"
        )
    frame = _Frame(grid, bandwidth, scale, operand.dtype, operand.rows.size)
    with torch.no_grad(), count_passes() as counter:
        # L Lᵀ has the eigenvalues of LᵀL, and zeros.
        other = None if method == "slq" else smaller_side(operator)
        side = operand if other is None else Operand(other)
        if method == "exact" or method == "auto" and _dense_pays(side, asked):
            nodes = eigenvalues_by_tiles(side.capabilities).cpu().flip(-1)
            zeros = operand.rows.size - len(nodes)
            nodes = torch.cat([nodes, nodes.new_zeros(min(zeros, 1))]).unsqueeze(0)
            weights = torch.full_like(nodes, 1 / operand.rows.size)
            if zeros:
                weights[:, -1] *= zeros
            sampled = _Rules(nodes, weights, [], True)
        else:
            steps = min(num_steps or _STEPS, operand.size)
            target = _Target.of(operand, steps, num_probes, rtol, num_passes)
            with (
                asked.capped(),
                tqdm(desc="spectral density", unit="product", disable=not progress) as bar,
            ):
                sampled = _Sampler(operand, asked.generator, steps, bar).sample(target, frame)
    found = frame.summary(sampled, _LEVEL if rtol is None else sampled.level)
    exact = not sampled.jacobis
    if not sampled.converged:
        warnings.warn(
            f"the spectral density ended after {counter.total} passes with a band wider than rtol={rtol}; "
            "raise num_passes or the bandwidth, or loosen rtol",
            NotConvergedWarning,
            stacklevel=3,
        )
    return SpectralDensity(
        nodes=sampled.nodes,
        weights=sampled.weights,
        size=operand.rows.size,
        bandwidth=frame.width(sampled.nodes),
        scale=scale,
        cutoff=frame.cutoff(sampled.nodes),
        method="exact" if exact else "slq",
        exact=exact,
        passes=counter.total,
        converged=sampled.converged,
        seed=None if exact else asked.seed,
        seconds=time.perf_counter() - start,
        **found,
    )


def _check(
    operand: Operand,
    num_steps: int | None,
    num_probes: int | None,
    grid: Tensor | None,
    bandwidth: float | None,
    scale: str,
) -> None:
    operand.require_square("the spectral density")
    for name, count in (("num_steps", num_steps), ("num_probes", num_probes)):
        if count is not None and (type(count) is not int or count < 1):
            raise InputError(f"{name}={count!r}: pass a positive integer")
    if scale not in ("linear", "log"):
        raise InputError(f"scale={scale!r}: choose 'linear' or 'log'")
    if bandwidth is not None and not (isinstance(bandwidth, int | float) and 0 < bandwidth < math.inf):
        raise InputError(f"bandwidth={bandwidth!r}: pass a positive number")
    if grid is None:
        return
    if not isinstance(grid, Tensor) or grid.dim() != 1 or not len(grid) or not bool(grid.isfinite().all()):
        raise InputError("grid: pass a tensor (g,) of finite numbers")
    if bool((grid.diff() <= 0).any()) or scale == "log" and not bool(grid[0] > 0):
        raise InputError("grid: pass ascending numbers, and positive ones on the logarithmic scale")


def _dense_pays(operand: Operand, request: Request) -> bool:
    tiles = operand.capabilities.exact_cost("tiles")
    if not request.allows(tiles):
        return False
    usual = _STEPS * _PROBES * max(operand.cost, 1)
    return operand.size <= _DENSE and fits_dense(operand.operator) and tiles <= 2 * usual


@dataclass(frozen=True, eq=False)
class _Rules:
    """Quadrature rules ``(p, m)``, and the Jacobi matrices that they come from."""

    nodes: Tensor
    weights: Tensor
    jacobis: list[Jacobi]
    converged: bool
    level: float = _LEVEL


@dataclass(frozen=True)
class _Target:
    """How many probes, or how narrow a band."""

    probes: int
    rtol: float | None

    @classmethod
    def of(
        cls, operand: Operand, steps: int, num_probes: int | None, rtol: float | None, passes: int | None
    ) -> _Target:
        """Return the target; ``probes`` is the cap where there is a tolerance."""
        if passes is None:
            most = max(_CAP // steps, 1) if rtol is not None else _PROBES
        else:
            most = passes // (steps * max(operand.cost, 1))
        if most < 1:
            raise InputError(
                f"num_passes={passes} does not pay for one probe of {steps} steps, which takes "
                f"{steps * operand.cost} passes; lower num_steps"
            )
        return cls(min(most, num_probes or most) if passes or rtol else num_probes or most, rtol)


class _Sampler:
    """Probes and their rules."""

    def __init__(self, operand: Operand, generator: torch.Generator, steps: int, bar: tqdm) -> None:
        self._operand, self._generator, self._steps, self._bar = operand, generator, steps, bar
        self._space = operand.rows
        self._jacobis: list[Jacobi] = []

    def sample(self, target: _Target, frame: _Frame) -> _Rules:
        """Draw the probes."""
        if target.rtol is None:
            return self._rules(target.probes, True, _LEVEL)
        probes = _FIRST
        for look in range(1, 200):
            probes = min(probes, target.probes)
            # Σ_{k≥1} 1 / (k (k + 1)) = 1: all looks together miss with _LEVEL.
            level = _LEVEL / (look * (look + 1))
            rules = self._rules(probes, True, level)
            found = frame.summary(rules, level, bounds=False)
            low, high = found["band"]
            half = torch.maximum(high - found["values"], found["values"] - low)
            excess = float(half.norm() / found["values"].norm()) / target.rtol
            if excess <= 1 or probes >= target.probes:
                return _Rules(rules.nodes, rules.weights, rules.jacobis, excess <= 1, level)
            least, most = _GROWTH
            # the band narrows with 1 / √probes
            probes = math.ceil(probes * min(max(1.1 * excess**2, least), most))
        raise AssertionError("unreachable: the number of probes grows geometrically")

    def _rules(self, probes: int, converged: bool, level: float) -> _Rules:
        width = max(1, _MEMORY // (3 * 8 * self._space.size * self._steps))
        count = sum(len(jacobi.alphas) for jacobi in self._jacobis)
        while count < probes:
            drawn = self._space.probes(min(width, probes - count), self._generator, "gaussian")
            jacobi = Jacobi(self._operand.multiply, self._space, drawn, report=self._bar.update)
            jacobi.extend(self._steps)
            jacobi.forget()
            self._jacobis.append(jacobi)
            count += drawn.shape[-1]
        parts = [jacobi.gauss() for jacobi in self._jacobis]
        missing = [max(len(nodes.mT) for nodes, _ in parts) - len(nodes.mT) for nodes, _ in parts]
        # Rules that ended early repeat their last node, without weight.
        nodes = [
            torch.cat([x, x[:, -1:].expand(-1, count)], -1)
            for (x, _), count in zip(parts, missing, strict=True)
        ]
        weights = [
            torch.nn.functional.pad(w, (0, count)) for (_, w), count in zip(parts, missing, strict=True)
        ]
        return _Rules(torch.cat(nodes).cpu(), torch.cat(weights).cpu(), self._jacobis, converged, level)


@dataclass(frozen=True, eq=False)
class _Frame:
    """Grid, bandwidth and scale: what is asked, or what suits the spectrum that is found."""

    grid: Tensor | None
    bandwidth: float | None
    scale: str
    dtype: torch.dtype
    size: int

    def cutoff(self, nodes: Tensor) -> float:
        """Return the largest eigenvalue that may be rounding."""
        return float(nodes.abs().max()) * rank_cutoff(self.size, self.dtype)

    def width(self, nodes: Tensor) -> float:
        """Return the bandwidth."""
        if self.bandwidth is not None:
            return float(self.bandwidth)
        low, high = self._ends(nodes)
        largest = float(nodes.abs().max())
        # No spectrum is sharper.
        least = 0.02 if self.scale == "log" else 100 * torch.finfo(self.dtype).eps * largest or 1.0
        return max((high - low) / 50, least)

    def _ends(self, nodes: Tensor) -> tuple[float, float]:
        """Return the ends of the spectrum, in decades on the logarithmic scale."""
        if self.scale == "linear":
            return float(nodes.min()), float(nodes.max())
        positive = nodes[nodes > self.cutoff(nodes)]
        if not len(positive):
            raise ZeroKernelError(
                "no eigenvalue is positive beyond rounding, so that there is no density on a logarithmic "
                "scale; does the output depend on the selected parameters?"
            )
        return math.log10(float(positive.min())), math.log10(float(positive.max()))

    def points(self, nodes: Tensor) -> Tensor:
        """Return the grid."""
        if self.grid is not None:
            return self.grid.detach().double().cpu()
        low, high = self._ends(nodes)
        margin = 4 * self.width(nodes)
        points = torch.linspace(low - margin, high + margin, _POINTS, dtype=torch.float64)
        return points if self.scale == "linear" else 10**points

    def summary(self, rules: _Rules, level: float, *, bounds: bool = True) -> dict[str, Any]:
        """Return the fields of the result that live on the grid."""
        nodes, weights = rules.nodes, rules.weights
        grid, width = self.points(nodes), self.width(nodes)
        first, second = smoothed(nodes, weights, grid, width, self.scale, self.cutoff(nodes))
        values, share = first.mean(0), shares(nodes, weights, grid).mean(0)
        zero = torch.zeros_like(values)
        fields: dict[str, Any] = {"grid": grid, "values": values, "cumulative": share}
        if not rules.jacobis:
            sure = {"band": (values, values), "cumulative_band": (share, share)}
            return fields | sure | {"quadrature_error": zero, "cumulative_error": zero}
        probes, factor = len(nodes), 2 / (self.size + 2)
        # For z uniform on the unit sphere Var zᵀ g(K) z = 2 / (n + 2) (mean of g² - (mean of g)²) over the
        # spectrum.
        variances = factor * (second.mean(0) - values.square()).clamp(min=0)
        fields["band"] = scaled_chi_squares(values, variances / probes, probes, level)
        fields["cumulative_band"] = _share_band(share, factor, probes, level)
        if bounds:
            fields["quadrature_error"] = self._density_error(rules, grid, width)
            fields["cumulative_error"] = _largest_mass(rules, grid)
        return fields

    def _density_error(self, rules: _Rules, grid: Tensor, width: float) -> Tensor:
        """Return the integral of the distribution function's error against the slope of the Gaussian."""
        # ∫ g dμ - ∫ g dμ_m = -∫ g' (F - F_m) by parts, so that |g'| times the bound of |F - F_m| bounds it.
        places = grid.log10() if self.scale == "log" else grid
        low, high = float(places[0]) - 5 * width, float(places[-1]) + 5 * width
        count = min(max(_POINTS, math.ceil(_FINE * (high - low) / width)), 8192)
        fine = torch.linspace(low, high, count, dtype=torch.float64)
        mass = _largest_mass(rules, 10**fine if self.scale == "log" else fine)
        distance = (places.unsqueeze(-1) - fine) / width  # (g, fine)
        slope = distance.abs() * torch.exp(-distance.square() / 2) / (width**2 * math.sqrt(2 * math.pi))
        return (slope * mass).sum(-1) * (high - low) / (count - 1)


def _largest_mass(rules: _Rules, points: Tensor) -> Tensor:
    masses = torch.cat([jacobi.largest_mass(points) for jacobi in rules.jacobis])
    return masses.mean(0).cpu()


def _share_band(share: Tensor, factor: float, probes: int, level: float) -> tuple[Tensor, Tensor]:
    """Return the interval of a share: that of the smaller one of it and its complement."""
    # g is 0 or 1, so that its mean square is its mean. The matched χ² is close for forms far below their
    # greatest value: of a share near 1 that is the complement.
    variances = factor * share * (1 - share) / probes
    low, high = scaled_chi_squares(share, variances, probes, level)
    rest_low, rest_high = scaled_chi_squares(1 - share, variances, probes, level)
    small = share <= 0.5
    ends = torch.where(small, low, 1 - rest_high), torch.where(small, high, 1 - rest_low)
    return ends[0].clamp(0, 1), ends[1].clamp(0, 1)
