"""One driver for all scalar estimates: choose a method, grow it to the tolerance, wrap the result."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence

import torch
from tqdm import tqdm

from ..engines import Tally, count_passes
from ..errors import NotConvergedWarning
from ..results import Estimate
from ._methods import hutch_plus_plus, hutchinson, one_sided_trace, pairs
from ._moments import MeanMoments, Moments, half_width, jackknife_error
from ._quantities import Quantity, Trace
from ._request import Operand, Request

__all__ = ["PRODUCT_METHODS", "TRACE_METHODS", "estimate"]

TRACE_METHODS = ("exact", "hutchinson", "hutch++", "rhutch", "fhutch")
PRODUCT_METHODS = ("exact", "hutchinson", "hutch++", "reverse", "forward")

_FIRST = 16  # probes before a tolerance is looked at
# A tolerance is tested after every doubling: the width is taken larger, so that stopping early on a
# lucky stderr does not eat the coverage.
_CAUTION = 1.3

Sampler = Callable[[int, torch.Generator], Moments]


def estimate(
    make: Callable[[], Quantity],
    rtol: float | None,
    num_passes: int | None,
    method: str,
    methods: Sequence[str],
    generator: torch.Generator | None,
    progress: bool,
    orthogonalize: bool = False,
) -> Estimate:
    """Estimate a quantity; see `ntkops.trace` for the arguments."""
    request = Request.check(rtol, num_passes, method, methods, generator, progress)
    with torch.no_grad(), count_passes() as tally:
        quantity = make()
        chosen = _choose(quantity, request) if method == "auto" else method
        if chosen != "exact" and _products_cover(quantity, request, chosen):
            chosen = "exact"
        if chosen == "exact":
            value = quantity.result(quantity.exact())
            return Estimate.of_exact(value, passes=tally.total, seconds=request.seconds)
        sampler, unit = _sampler(quantity, chosen, orthogonalize)
        return _grow(quantity, request, chosen, sampler, unit, tally, orthogonalize)


def _choose(quantity: Quantity, request: Request) -> str:
    """Return "exact" where it costs no more than the estimate would, else the best estimator there is."""
    predicted = 6.0 / (request.rtol or 1e-2)  # Hutch++ reaches a tolerance with a multiple of its inverse
    if request.num_passes is not None:
        predicted = min(predicted, request.num_passes) if request.rtol else request.num_passes
    if quantity.exact_cost() <= predicted:
        return "exact"
    if _has_forward(quantity.first):
        return "hutch++"
    return "rhutch" if isinstance(quantity, Trace) else "reverse"


def _has_forward(operand: Operand) -> bool:
    info = getattr(operand.operator, "engine_info", None)
    return info is None or info.rung != "reverse"


def _products_cover(quantity: Quantity, request: Request, method: str) -> bool:
    """Whether the passes allowed would span the whole space, so that exact is no dearer."""
    if (
        request.num_passes is None
        or request.rtol is not None
        or method in ("rhutch", "fhutch", "reverse", "forward")
    ):
        return False
    columns = request.num_passes // quantity.passes_per_column
    return columns >= quantity.first.size and quantity.exact_cost() <= request.num_passes


def _sampler(quantity: Quantity, method: str, orthogonalize: bool) -> tuple[Sampler, int]:
    """Return the sampler of a method and the passes that one of its columns takes."""
    if method == "hutchinson":
        return lambda m, g: hutchinson(quantity, m, g), quantity.passes_per_column
    if method == "hutch++":
        return lambda m, g: hutch_plus_plus(quantity, m, g), quantity.passes_per_column
    one_sided = sum(
        _one_sided_passes(operand) * (1 if operand.structure.symmetric else 2)
        for operand in quantity.operands
    )
    if method in ("rhutch", "fhutch"):
        forward = method == "fhutch"
        return (
            lambda m, g: one_sided_trace(quantity.first, m, g, forward=forward, orthogonalize=orthogonalize),
            one_sided,
        )
    forward = method == "forward"
    return lambda m, g: pairs(quantity, m, g, forward=forward), one_sided


def _one_sided_passes(operand: Operand) -> int:
    return max(1, operand.passes_per_column // 2)


def _grow(
    quantity: Quantity,
    request: Request,
    method: str,
    sampler: Sampler,
    unit: int,
    tally: Tally,
    orthogonalize: bool,
) -> Estimate:
    """Draw probes until the tolerance or the cap is met, and wrap what was found."""
    cap = None if request.num_passes is None else max(1, request.num_passes // unit)
    bar = tqdm(total=request.num_passes, desc=f"{quantity.name} ({method})", disable=not request.progress)
    with bar:
        if request.rtol is None:
            assert cap is not None
            found = sampler(cap, request.generator)
            return _wrap(quantity, request, method, found, tally, converged=True, caution=1.0)
        # Without a cap of the user's, no more than a few times the products that span the whole space.
        limit = cap if cap is not None else max(_FIRST, 4 * quantity.first.size)
        extends = method in ("hutchinson", "rhutch", "fhutch") and not orthogonalize
        size = spent = min(_FIRST, limit)
        found = sampler(size, request.generator)
        while True:
            bar.update(tally.total - bar.n)
            result = _wrap(quantity, request, method, found, tally, converged=True, caution=_CAUTION)
            if _meets(result, request.rtol):
                return result
            if cap is None and 2 * spent * unit >= quantity.exact_cost():
                value = quantity.result(quantity.exact())
                return Estimate.of_exact(value, passes=tally.total, seconds=request.seconds)
            more = min(size if extends else 2 * size, limit - spent)
            if more < (1 if extends else size + 1):
                return _not_converged(quantity, request, method, found, tally)
            fresh = sampler(more, request.generator)
            if extends and isinstance(found, MeanMoments) and isinstance(fresh, MeanMoments):
                found, size = found.extended(fresh.samples), size + more
            else:  # a sketch or a set of pairs is drawn afresh, larger
                found, size = fresh, more
            spent += more


def _meets(result: Estimate, rtol: float) -> bool:
    low, high = result.interval
    width = (high - low) / 2
    return bool((width <= rtol * result.value.abs()).all())


def _wrap(
    quantity: Quantity,
    request: Request,
    method: str,
    moments: Moments,
    tally: Tally,
    *,
    converged: bool,
    caution: float,
) -> Estimate:
    value = quantity.result(moments.point())
    stderr = jackknife_error(moments, quantity.combine)
    width = caution * half_width(stderr, moments.count)
    return Estimate(
        value=value,
        stderr=stderr,
        interval=(value - width, value + width),
        method=method,
        exact=False,
        passes=tally.total,
        converged=converged,
        seed=request.seed,
        seconds=request.seconds,
    )


def _not_converged(
    quantity: Quantity, request: Request, method: str, moments: Moments, tally: Tally
) -> Estimate:
    result = _wrap(quantity, request, method, moments, tally, converged=False, caution=_CAUTION)
    width = (result.interval[1] - result.interval[0]) / 2
    reached = float((width / result.value.abs()).max())
    warnings.warn(
        f"{quantity.name} by {method!r} ended at {tally.total} passes with a relative half width of "
        f"{reached:.2g}, above rtol={request.rtol:g}; raise num_passes, or loosen rtol",
        NotConvergedWarning,
        stacklevel=5,
    )
    return result
