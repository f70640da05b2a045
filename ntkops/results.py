"""The small frozen results that users read: estimates, spectra, and what an engine did."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .errors import EstimateError

__all__ = ["Eigenpairs", "EngineInfo", "Estimate", "LayerInfo", "PassCount", "TruncationRank"]


@dataclass(frozen=True)
class PassCount:
    """Passes really made, one per vector: Jᵀv (vjp), Jp (jvp) and per-sample gradient passes.

    Attributes:
        vjp: Products with Jᵀ.
        jvp: Products with J.
        per_sample: Per-sample gradient passes (one for each output row of every sample).
        products: Columns multiplied by operators that are not ours.
    """

    vjp: int = 0
    jvp: int = 0
    per_sample: int = 0
    products: int = 0

    @property
    def total(self) -> int:
        """Sum of all passes."""
        return self.vjp + self.jvp + self.per_sample + self.products


@dataclass(frozen=True)
class LayerInfo:
    """How one parameter, or a range of its rows, enters kernels, diagonals and products.

    Attributes:
        parameter: Its name, with the range of rows where different functions use different ones.
        rule: Names of the functions that use it; "none" where automatic differentiation takes it.
        kind: "outer" (sums of outer products of output gradients and activations), "direct" (gradients
            that are small enough to be written down), "tail" (a linear layer at the end, wider than what
            it reads: one backward pass for each of its columns instead of each output) or "autograd".
        kernel_route: "gram", "gradient" or "autograd": how dense kernels are made.
        diagonal_route: The same for diagonals.
        product_route: "factors", "dual", "gradient" or "autograd": how products are made from cached
            factors, once these pay.
        positions: Number of positions (pixels, time steps, calls) of one sample that share it; 0 where
            its gradients are written down.
        bias: Name of the bias that is computed together with it, if any.
    """

    parameter: str
    rule: str
    kind: str
    kernel_route: str
    diagonal_route: str
    product_route: str
    positions: int
    bias: str | None = None


@dataclass(frozen=True)
class EngineInfo:
    """How an operator computes its products.

    Attributes:
        engine: Name of the engine.
        rung: Rung of the differentiation ladder: "forward" (torch.func vjp and jvp), "double"
            (double backward through torch.func), "classic" (torch.autograd.grad, twice) or
            "reverse" (only Jᵀ exists).
        per_sample: How per-sample Jacobians are made: "vmap" or "loop".
        reasons: Why higher rungs were left, one line each.
        dense: Whether products now use a dense block that was built because it is cheaper.
        batch_size: Samples per pass.
        chunk_size: Columns per pass.
        max_dense_bytes: Limit for one dense result, in bytes.
        passes: Passes made by this engine so far.
        covered: Parameters that the layerwise engine computes from layer structure.
        layers: How the layerwise engine computes each parameter for this operator.
    """

    engine: str
    rung: str
    per_sample: str
    reasons: tuple[str, ...] = ()
    dense: bool = False
    batch_size: int | None = None
    chunk_size: int | None = None
    max_dense_bytes: int | None = None
    passes: PassCount = field(default_factory=PassCount)
    covered: tuple[str, ...] = ()
    layers: tuple[LayerInfo, ...] = ()


def _scaled(value: Any, factor: float) -> Any:
    return None if value is None else value * factor


@dataclass(frozen=True, eq=False)
class Estimate:
    """A number with its error and what it cost.

    Attributes:
        value: The estimate: float64, shape () or the operator's batch shape.
        stderr: Standard error of ``value``, same shape; 0 for exact results.
        interval: The 95 % interval ``(low, high)``, two tensors of the same shape.
        method: Name of the method that was used.
        exact: Whether the value is exact up to rounding.
        passes: vjp, jvp and per-sample passes that were really made, one per vector.
        converged: False if a pass limit came before the requested tolerance.
        seed: Seed of the generator that drew the probes; None if nothing was drawn.
        seconds: Wall-clock time.

    Example:
        >>> import torch
        >>> from ntkops.results import Estimate
        >>> e = Estimate.of_exact(torch.tensor(2.0), passes=3)
        >>> float(e), float((10 * e).value), e.exact
        (2.0, 20.0, True)
    """

    value: Tensor
    stderr: Tensor
    interval: tuple[Tensor, Tensor]
    method: str
    exact: bool
    passes: int
    converged: bool = True
    seed: int | None = None
    seconds: float = 0.0

    @classmethod
    def of_exact(cls, value: Tensor, *, passes: int, seconds: float = 0.0, method: str = "exact") -> Estimate:
        """Wrap an exact value: no error, an interval of zero width."""
        return cls(
            value=value,
            stderr=torch.zeros_like(value),
            interval=(value, value),
            method=method,
            exact=True,
            passes=passes,
            seconds=seconds,
        )

    def __float__(self) -> float:
        """Return the value where it is a scalar."""
        if self.value.numel() != 1:
            raise EstimateError(
                f"this estimate has shape {tuple(self.value.shape)}; float() needs a scalar: index .value"
            )
        return float(self.value)

    def __mul__(self, factor: float) -> Estimate:
        """Scale value, error and interval by an exact number."""
        if isinstance(factor, Estimate):
            raise self._combination("*")
        if not isinstance(factor, (int, float)):
            return NotImplemented
        low, high = (_scaled(end, factor) for end in self.interval)
        return dataclasses.replace(
            self,
            value=self.value * factor,
            stderr=self.stderr * abs(factor),
            interval=(low, high) if factor >= 0 else (high, low),
        )

    __rmul__ = __mul__

    def __truediv__(self, divisor: float) -> Estimate:
        """Divide by an exact number."""
        if isinstance(divisor, Estimate):
            raise self._combination("/")
        if not isinstance(divisor, (int, float)):
            return NotImplemented
        return self * (1.0 / divisor)

    def __neg__(self) -> Estimate:
        """Flip the sign."""
        return self * -1.0

    def _refuse(self, other: object) -> Estimate:
        raise self._combination("+, -, **, <, > or /")

    __add__ = __radd__ = __sub__ = __rsub__ = __rtruediv__ = __pow__ = _refuse

    def _combination(self, symbol: str) -> EstimateError:
        return EstimateError(
            f"an Estimate does not go into {symbol} with another number or estimate, since the errors "
            "may be correlated: use ntkops.alignment or ntkops.effective_rank for those ratios, or "
            "take .value and .stderr and combine them yourself"
        )

    def to_dict(self) -> dict[str, Any]:
        """Return plain numbers and lists, ready for JSON."""
        return {
            "value": self.value.tolist(),
            "stderr": self.stderr.tolist(),
            "interval": [end.tolist() for end in self.interval],
            "method": self.method,
            "exact": self.exact,
            "passes": self.passes,
            "converged": self.converged,
            "seed": self.seed,
            "seconds": self.seconds,
        }

    def __str__(self) -> str:
        """Show the value with its error, method and passes."""
        if self.value.numel() != 1:
            return f"Estimate(shape={tuple(self.value.shape)}, method={self.method!r}, passes={self.passes})"
        error = "exact" if self.exact else f"± {float(self.stderr):.2g}"
        return f"{float(self.value):.6g} ({error}, {self.method}, {self.passes} passes)"


@dataclass(frozen=True, eq=False)
class Eigenpairs:
    """Leading eigenpairs of a symmetric operator.

    Attributes:
        values: ``(*batch, k)`` eigenvalues from the wanted end inwards (largest first unless the smallest
            were asked for), float64. Small negative ones are reported, not clamped.
        vectors: ``(*batch, n, k)`` orthonormal eigenvectors in the operator's dtype.
        residuals: ``(*batch, k)`` true residual norms |K v - λ v|, recomputed at the end.
        converged: Whether every residual met the tolerance, and no hidden copy was found.
        passes: Passes made.
        method: "lanczos" or "dense".
        seed: Seed of the starting vector; None if none was drawn.
        seconds: Wall-clock time.
    """

    values: Tensor
    vectors: Tensor
    residuals: Tensor
    converged: bool
    passes: int
    method: str
    seed: int | None = None
    seconds: float = 0.0


@dataclass(frozen=True, eq=False)
class TruncationRank:
    """How many leading eigenvalues hold a given share of the trace.

    Attributes:
        rank: ``(*batch)`` smallest r with Σ_{i≤r} λ_i ≥ (1 - ε) tr K, int64.
        captured: ``(*batch)`` the share that they hold, float64.
        epsilon: ε.
        values: ``(*batch, r_max)`` leading eigenvalues that were used, largest first, float64.
        exact: Whether all eigenvalues were computed (else Lanczos, converged as said).
        converged: Whether every eigenvalue that decides the rank met its tolerance.
        passes: Passes made.
        seed: Seed of the starting vectors; None if none was drawn.
        seconds: Wall-clock time.
        interval: The 95 % interval ``(low, high)`` of the rank, two int64 tensors ``(*batch)``; both ends
            are the rank where the trace is exact.
    """

    rank: Tensor
    captured: Tensor
    epsilon: float
    values: Tensor
    exact: bool
    converged: bool
    passes: int
    seed: int | None = None
    seconds: float = 0.0
    interval: tuple[Tensor, Tensor] | None = None

    def __int__(self) -> int:
        """Return the rank of a single kernel."""
        if self.rank.numel() != 1:
            raise EstimateError(
                f"there is one rank for each of {tuple(self.rank.shape)} kernels: index .rank"
            )
        return int(self.rank)
