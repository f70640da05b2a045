"""Error against passes and time of one estimator: medians over repetitions, not first lucky crossings."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from _trace_methods import alignment, effective_rank, frobenius_norm, hutch_pp, one_sided
from _trace_networks import Problem

import ntkops
from ntkops.engines import count_passes

__all__ = ["Exact", "curve", "exact_values", "our_curves", "paper_curves", "slope"]

Once = Callable[[int, torch.Generator], tuple[float, int]]


@dataclass(frozen=True)
class Exact:
    """The exact values of one network, in float64, and what they cost in float32.

    Attributes:
        values: By quantity.
        seconds: By quantity, from layer structure, with no n × n matrix.
        columns_s: Seconds of one product column as the paper's code makes it, 60 at a time.
        identity: (tr K)² / |K|², and n cos²(K, I) computed by the alignment with the identity.
    """

    values: dict[str, float]
    seconds: dict[str, float]
    columns_s: float
    identity: tuple[float, float] | None


def _seconds(work: Callable[[], object]) -> float:
    started = time.process_time()
    work()
    return time.process_time() - started


def exact_values(problem: Problem, quantities: Sequence[str], *, quick: bool) -> Exact:
    """Return exact values in float64, and the seconds of the float32 routes.

    Args:
        problem: The network.
        quantities: Which.
        quick: Few columns only.

    Returns:
        Values, seconds and the cost of one column.
    """
    values, seconds = {}, {}
    double = [problem.kernel(double=True)]
    single = [problem.kernel()]
    if "alignment" in quantities:
        double.append(problem.kernel(double=True, before=True))
        single.append(problem.kernel(before=True))
    for quantity in quantities:
        count = 2 if quantity == "alignment" else 1
        values[quantity] = float(_quantity(quantity)(*double[:count], method="exact"))
        seconds[quantity] = _exact_seconds(quantity, single[:count])
    product = problem.product()
    block = torch.randn(2 if quick else 60, problem.size, generator=torch.Generator().manual_seed(0))
    product(block[:2])
    column = _seconds(lambda: product(block)) / len(block)
    return Exact(values, seconds, column, _identity(problem, values))


def _exact_seconds(quantity: str, kernels: Sequence[ntkops.NTKOperator]) -> float:
    """Return the median of three, after a first one that loads code; nothing is kept from one to the next."""
    spent = []
    for _ in range(4):
        for kernel in kernels:
            kernel.free()
        spent.append(_seconds(lambda: _quantity(quantity)(*kernels, method="exact")))
    return sorted(spent[1:])[1]


def _identity(problem: Problem, values: dict[str, float]) -> tuple[float, float] | None:
    """Return the effective rank beside n cos²(K, I), where both are known."""
    if "effective_rank" not in values:
        return None
    from linear_operator.operators import IdentityLinearOperator

    kernel = problem.kernel(double=True)
    same = IdentityLinearOperator(problem.size, dtype=torch.float64)
    cosine = float(ntkops.alignment(kernel, same, method="exact"))
    return values["effective_rank"], problem.size * cosine**2


def _quantity(name: str) -> Callable[..., ntkops.Estimate]:
    return getattr(ntkops, name)


def curve(once: Once, exact: float, grid: Sequence[int], repetitions: int) -> list[dict[str, float]]:
    """Return median and quartiles of the relative error, passes and seconds for each m.

    Args:
        once: Makes one estimate with m and a generator; returns it with the passes that it made.
        exact: The true value.
        grid: The values of m.
        repetitions: Estimates for each.

    Returns:
        One entry for each m that the estimator can do with.
    """
    points = []
    for m in grid:
        errors, spent, made = [], [], 0
        for repetition in range(repetitions):
            generator = torch.Generator().manual_seed(1000 * m + repetition)
            started = time.process_time()
            value, made = once(m, generator)
            spent.append(time.process_time() - started)
            errors.append(abs(value - exact) / abs(exact))
        low, middle, high = np.quantile(errors, [0.25, 0.5, 0.75])
        points.append(
            {
                "m": m,
                "passes": made,
                "error": float(f"{middle:.4g}"),
                "low": float(f"{low:.4g}"),
                "high": float(f"{high:.4g}"),
                "seconds": float(f"{np.median(spent):.4g}"),
                "repetitions": repetitions,
            }
        )
    return points


def paper_curves(
    problem: Problem, quantities: Sequence[str], exact: Exact, grid: Sequence[int], repetitions: int
) -> list[dict[str, Any]]:
    """Measure the paper's estimators on the products that the paper's code makes."""
    found = []
    for quantity in quantities:
        for method, once in _paper_methods(problem, quantity).items():
            points = curve(once, exact.values[quantity], grid, repetitions)
            found.append({"quantity": quantity, "method": method, "by": "paper", "points": points})
    return found


def _paper_methods(problem: Problem, quantity: str) -> dict[str, Once]:
    product, size = problem.product(), problem.size
    if quantity == "trace":
        reverse, forward = (problem.one_sided(forward=way) for way in (False, True))
        return {
            "hutch++": lambda m, g: _doubled(hutch_pp(product, size, m, g)),
            "rhutch": lambda m, g: one_sided(*reverse, m, g),
            "fhutch": lambda m, g: one_sided(*forward, m, g),
        }
    if quantity == "alignment":
        other = problem.product(before=True)
        return {"hutch++": lambda m, g: _doubled(alignment(product, other, size, m, g))}
    method = {"frobenius_norm": frobenius_norm, "effective_rank": effective_rank}[quantity]
    return {"hutch++": lambda m, g: _doubled(method(product, size, m, g))}


def _doubled(found: tuple[float, int]) -> tuple[float, int]:
    """A product is a vjp and a jvp."""
    return found[0], 2 * found[1]


def our_curves(
    problem: Problem, exact: Exact, plan: Sequence[tuple[str, str, Sequence[int]]], repetitions: int
) -> list[dict[str, Any]]:
    """Measure our estimators at fixed numbers of passes.

    Args:
        problem: The network.
        exact: Its exact values.
        plan: Quantity, method, and the numbers of passes to try.
        repetitions: Estimates for each.

    Returns:
        Curves as `paper_curves` returns them.
    """
    kernel = problem.kernel()
    first = problem.kernel(before=True) if problem.untrained is not None else None
    found = []
    for quantity, method, grid in plan:
        kernels = [kernel] if quantity != "alignment" else [kernel, first]

        once = _our_method(quantity, method, kernels)
        points = curve(once, exact.values[quantity], grid, repetitions)
        found.append({"quantity": quantity, "method": method, "by": "ntkops", "points": points})
    return found


def _our_method(quantity: str, method: str, kernels: Sequence[ntkops.NTKOperator | None]) -> Once:
    def once(passes: int, generator: torch.Generator) -> tuple[float, int]:
        with count_passes() as tally:
            estimate = _quantity(quantity)(*kernels, method=method, num_passes=passes, generator=generator)
        return float(estimate), tally.total

    return once


def slope(points: Sequence[dict[str, float]], floor: float = 1e-6) -> float | None:
    """Return the slope of log error against log m, above the level of rounding."""
    kept = [(p["m"], p["error"]) for p in points if p["error"] > floor]
    if len(kept) < 3:
        return None
    x, y = np.log([m for m, _ in kept]), np.log([e for _, e in kept])
    found = float(np.polyfit(x, y, 1)[0])
    return round(found, 3) if math.isfinite(found) else None
