"""What training does to one eigenvalue: filters of flow and of descent, and how their errors add up.

With A = K + shift and the residual r at the start, training gives the residual p(A) r and the dual q(A) r,
where p(x) = 1 - x q(x). In a Krylov space of m steps, K V = V T + h v eₘᵀ, the approximations |r| V p(T) e₁
and |r| V q(T) e₁ obey the same recursion but for a term h |r| eₘᵀ p(T) e₁ v. What that term becomes in the
course of training is the error; its bounds need no more than T.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

__all__ = ["Defects", "Descent", "Filter", "Flow"]

_HALF = 0.6382  # max over x of (1 - exp(-x)) / √x = .638173
_SMALL = 1e-2  # below, a power series is more accurate than a difference
_CHUNK = 1024  # steps of descent that are evaluated at a time


@dataclass(frozen=True, eq=False)
class Defects:
    """Bounds of errors in units of the coupling h times |r|, each ``(T, p)``.

    Attributes:
        residual: Of p(A) r.
        dual: Of q(A) r.
        weights: Of K^{1/2} q(A) r, which has the length of Jᵀ q(A) r.
    """

    residual: Tensor
    dual: Tensor
    weights: Tensor


class Filter(Protocol):
    """Training up to T times.

    Attributes:
        times: ``(T,)``, ascending, float64.
    """

    times: Tensor

    def residual(self, nodes: Tensor) -> Tensor:
        """Return p at eigenvalues ``(p, m)`` of A: ``(T, p, m)``."""

    def dual(self, nodes: Tensor) -> Tensor:
        """Return q: ``(T, p, m)``."""

    def defects(self, nodes: Tensor, first: Tensor, last: Tensor) -> Defects:
        """Return the bounds from eigenvalues, first and last entries of eigenvectors of T, all ``(p, m)``."""

    def span(self) -> Tensor:
        """Return q(0), what eigenvalues are multiplied by in the course of training, ``(T,)``."""

    def reach(self) -> Tensor:
        """Return a bound of |K^{1/2} q(A)|, ``(T,)``."""

    def at(self, times: Tensor) -> Filter:
        """Return the same training up to other times."""

    def can_restart(self) -> bool:
        """Whether training from p(A) r is training that goes on."""


class Flow:
    """p(x) = exp(-x τ), q(x) = (1 - exp(-x τ)) / x.

    The error of the residual is ∫ exp(-(τ - s) A) v h |r| g(s) ds with g(s) = eₘᵀ exp(-s T) e₁. As a positive
    product times a divided difference of exp(-s x), g never changes its sign (Jawecki, Auzinger, Koch 2020),
    so that ∫ |g| is |eₘᵀ q(T) e₁|, and that of the dual, once more integrated, |eₘᵀ q₂(T) e₁|.

    Args:
        times: ``(T,)`` τ, ascending.
    """

    def __init__(self, times: Tensor) -> None:
        self.times = times

    def residual(self, nodes: Tensor) -> Tensor:
        return torch.exp(-self._phase(nodes))

    def dual(self, nodes: Tensor) -> Tensor:
        phase, times = self._phase(nodes), self.times[:, None, None]
        return times * torch.where(phase > 0, -torch.expm1(-phase) / phase, 1.0)

    def _twice(self, nodes: Tensor) -> Tensor:
        """Return ∫ q over time, (x τ - 1 + exp(-x τ)) / x²."""
        z, times = self._phase(nodes), self.times[:, None, None]
        # z + exp(-z) - 1 = z² / 2 - z³ / 6 + ...: at z = 1e-2 the difference has lost two digits, and the
        # first term that the series leaves out, z⁶ / 40320, is 2e-17.
        series = 1 / 2 - z * (1 / 6 - z * (1 / 24 - z * (1 / 120 - z * (1 / 720 - z / 5040))))
        direct = (z + torch.expm1(-z)) / z.square()
        return times.square() * torch.where(z < _SMALL, series, direct)

    def _phase(self, nodes: Tensor) -> Tensor:
        return self.times[:, None, None] * nodes

    def defects(self, nodes: Tensor, first: Tensor, last: Tensor) -> Defects:
        ends = first * last
        residual = (ends * self.dual(nodes)).sum(-1).abs()
        dual = (ends * self._twice(nodes)).sum(-1).abs()
        # Weights have K^{1/2} q(A) at what is left of the time for K^{1/2} exp(-A s).
        return Defects(residual, dual, self.reach()[:, None] * residual)

    def span(self) -> Tensor:
        return self.times

    def reach(self) -> Tensor:
        return _HALF * self.times.sqrt()

    def at(self, times: Tensor) -> Flow:
        return Flow(times)

    def can_restart(self) -> bool:
        return True


class Descent:
    """Steps a ← a + h (r - A a) + β (a - a_before): p₀ = 1, p₁ = 1 - h x, pₖ₊₁ = (1 + β - h x) pₖ - β pₖ₋₁.

    The response of this recursion to a unit impulse i steps ago is at most 1 + β + ... + βⁱ wherever
    0 ≤ h x ≤ 2 (1 + β): it is β^{i/2} Uᵢ, a Chebyshev polynomial of the second kind, at
    (1 + β - h x) / (2 √β), and largest at the ends of that interval.

    Args:
        times: ``(T,)`` numbers of steps, ascending.
        step: h.
        momentum: β.
    """

    def __init__(self, times: Tensor, step: float, momentum: float) -> None:
        self.times, self._step, self._momentum = times, step, momentum

    def residual(self, nodes: Tensor) -> Tensor:
        if self._momentum:
            return self._recursion(nodes)[0]
        base = 1 - self._step * nodes
        return base.expand(len(self.times), *base.shape).pow(self.times[:, None, None])

    def dual(self, nodes: Tensor) -> Tensor:
        if self._momentum:
            return self._recursion(nodes)[1]
        z, k = self._step * nodes, self.times[:, None, None]
        # 1 - (1 - z)ᵏ without cancellation where z is small
        smooth = -torch.expm1(k * torch.log1p(-z.clamp(max=0.5)))
        # log1p(-z) loses nothing for z < 1/2; beyond, (1 - z)ᵏ is no longer close to 1, or negative.
        top = torch.where(z < 0.5, smooth, 1 - self.residual(nodes))
        return torch.where(nodes > 0, top / torch.where(nodes > 0, nodes, 1.0), self._step * k)

    def defects(self, nodes: Tensor, first: Tensor, last: Tensor) -> Defects:
        # The error E of the residual obeys E' = (1 + β - h A) E - β E_before - h h_m |r| π v, π = eₘᵀ p(T)
        # e₁.
        ends = first * last
        if not self._momentum and bool((self._step * nodes <= 1).all()):
            # (1 - h x)ʲ has divided differences of one sign: the sum of |π| is the |sum|.
            residual = (ends * self.dual(nodes)).sum(-1).abs()
        elif self._momentum:
            residual = self._step * self._recursion(nodes, ends)[2]
        else:
            residual = self._step * self._powers(nodes, ends)
        # a is a sum of residuals: a_{k+1} - a_k = h y_k + β (a_k - a_{k-1}).
        span = self.span()[:, None]
        dual = span * residual
        # |K^{1/2} e|² ≤ |e| |A e|, and A e = -E - h_m |r| (eₘᵀ q(T) e₁) v.
        slope = residual + (ends * self.dual(nodes)).sum(-1).abs()
        return Defects(residual, dual, (dual * slope).sqrt())

    def _powers(self, nodes: Tensor, ends: Tensor) -> Tensor:
        """Return Σ_{j<k} |Σ ends (1 - h x)ʲ| for each k."""
        base = (1 - self._step * nodes).unsqueeze(-1)  # (p, m, 1)
        wanted, last = self.times.long(), int(self.times[-1])
        found, before = [], torch.zeros_like(ends[:, 0])
        for start in range(0, max(last, 1), _CHUNK):
            stop = min(start + _CHUNK, last)
            steps = torch.arange(start, stop, device=nodes.device)
            sums = (ends.unsqueeze(-1) * base.pow(steps)).sum(-2).abs().cumsum(-1)  # (p, steps)
            sums = torch.cat([before.unsqueeze(-1), before.unsqueeze(-1) + sums], dim=-1)
            here = wanted[(wanted >= start) & ((wanted < stop) | (wanted == last) & (stop == last))]
            found.append(sums[:, here - start].mT)
            before = sums[:, -1]
        return torch.cat(found)

    def _recursion(self, nodes: Tensor, ends: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Return p, q, and the sums of |π| under the largest response, at each number of steps."""
        beta, step = self._momentum, self._step
        p = torch.ones_like(nodes)
        q = change = torch.zeros_like(nodes)
        total = weighted = torch.zeros_like(nodes[:, 0])
        kept: list[tuple[Tensor, Tensor, Tensor]] = []
        wanted = self.times.long().tolist()
        for number in range(wanted[-1] + 1):
            kept.extend([(p, q, weighted)] * wanted.count(number))
            if ends is not None:
                total = total + (ends * p).sum(-1).abs()
                weighted = total + beta * weighted
            change = step * p + beta * change
            q, p = q + change, p - nodes * change
        return tuple(map(torch.stack, zip(*kept, strict=True)))  # type: ignore[return-value]

    def span(self) -> Tensor:
        return self._step * self.times / (1 - self._momentum)

    def reach(self) -> Tensor:
        return (2 * self.span()).sqrt()  # without momentum, |1 - (1 - h x)ᵏ| ≤ min(k h x, 2)

    def at(self, times: Tensor) -> Descent:
        return Descent(times.floor(), self._step, self._momentum)

    def can_restart(self) -> bool:
        return self._momentum == 0
