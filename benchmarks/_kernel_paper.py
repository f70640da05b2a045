"""The exact traces of a paper on trace estimation, beside the way its code computes them."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from _kernel_peers import vmapped_route
from _kernel_work import distance, require_close
from _models import PAPER_CASES
from torch import Tensor

import ntkops
from ntkops.engines.memory import free_bytes

__all__ = ["measure_deep", "measure_states"]

_ROUTE_BYTES = 10e9  # what all columns of the MLP in one vmap need, generously
_SOME = 200  # products that stand for all of the GRU's
_BLOCK = 50
_PATIENCE = 60.0  # seconds that our own trace may take before it is extrapolated, too


def _timed(work: Callable[[], Tensor]) -> tuple[float, Tensor]:
    started = time.process_time()
    found = work()
    return time.process_time() - started, found


def _trace(route: Callable[[Tensor], Tensor], shape: torch.Size, size: int, chosen: Tensor) -> Tensor:
    """Return the sum of the chosen diagonal entries, ``size`` products at a time."""
    total = torch.zeros((), dtype=torch.float64)
    for rows in chosen.split(size):
        unit = torch.zeros(len(rows), shape.numel())
        unit[torch.arange(len(rows)), rows] = 1
        products = route(unit.view(-1, *shape)).reshape(len(rows), -1)
        total += products[torch.arange(len(rows)), rows].double().sum()
    return total


def _spread(count: int) -> Tensor:
    """Return some rows from everywhere, so that all time steps are checked."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(3))[:_SOME]


def _middle(times: list[float]) -> float:
    return sorted(times)[len(times) // 2]


def measure_deep(*, quick: bool = False) -> dict[str, Any]:
    """The MLP: all n products in one vmap where memory allows it, else 256 at a time."""
    model, x = PAPER_CASES["deep"].make(quick)
    kernel = ntkops.ntk(model, x, engine="layerwise", max_dense_bytes=0)
    rows = kernel.shape[0]
    size = rows if quick or free_bytes() > _ROUTE_BYTES else 256
    route = vmapped_route(model, x)

    def ours() -> Tensor:
        kernel.free()
        return ntkops.trace(kernel, method="exact").value

    ours()
    _trace(route, torch.Size([len(x), rows // len(x)]), 8, torch.arange(8))
    own, other = [], []
    for _ in range(1 if quick else 3):
        own += [_timed(ours)[0] for _ in range(1 if quick else 5)]
        spent, wanted = _timed(
            lambda: _trace(route, torch.Size([len(x), rows // len(x)]), size, torch.arange(rows))
        )
        other.append(spent)
    agreement = {"layerwise": distance(ours(), wanted)}
    require_close("the paper's MLP", agreement)
    return {
        "name": "deep",
        "title": PAPER_CASES["deep"].title,
        "n": rows,
        "parameters": kernel.num_parameters,
        "columns_at_once": size,
        "extrapolated": [],
        "agreement": agreement,
        **_seconds(_middle(own), _middle(other)),
    }


def measure_states(*, quick: bool = False) -> dict[str, Any]:
    """The hidden states of a GRU: n products extrapolated from some."""
    case = PAPER_CASES["states"]
    model, x = case.make(quick)
    few = x[: max(1, len(x) // 5)]
    own, _ = _own_trace(model, few)
    # Without a recursion over time the cost grows with the cube of the steps.
    patient = quick or 125 * own <= _PATIENCE
    if patient:
        own = _middle([_own_trace(model, x)[0] for _ in range(3)])
    checked = x if patient else few
    _, kernel = _own_trace(model, checked)
    agreement = {"layerwise": distance(_chosen_part(kernel, checked), _products(model, checked)[1])}
    require_close("the hidden states", agreement)
    rows = x.shape[0] * x.shape[1] * kernel.shape[0] // (checked.shape[0] * checked.shape[1])
    spent, _ = _products(model, x)
    some = min(_SOME, rows)
    return {
        "name": "states",
        "title": case.title,
        "n": rows,
        "parameters": kernel.num_parameters,
        "columns_at_once": min(_BLOCK, some),
        "extrapolated": ([] if patient else ["layerwise"]) + (["products"] if some < rows else []),
        "agreement": agreement,
        **_seconds(own if patient else 125 * own, spent * rows / some),
    }


def _products(model: torch.nn.Module, x: Tensor) -> tuple[float, Tensor]:
    """Return the time of some products, and the part of the trace that they give."""
    route = vmapped_route(model, x, state=0)
    with torch.no_grad():
        shape = model(x)[0].shape
    chosen = _spread(shape.numel())
    _trace(route, shape, 2, chosen[:2])
    return _timed(lambda: _trace(route, shape, _BLOCK, chosen))


def _chosen_part(kernel: ntkops.NTKOperator, x: Tensor) -> Tensor:
    """Return the same part of the trace: time comes first in the rows of the products, samples in ours."""
    diagonal = kernel.diagonal().view(x.shape[1], x.shape[0], -1).transpose(0, 1).flatten()
    return diagonal[_spread(len(diagonal))].double().sum()


def _own_trace(model: torch.nn.Module, x: Tensor) -> tuple[float, ntkops.NTKOperator]:
    kernel = ntkops.ntk(model, x, output=0, batch_dim=1, engine="layerwise", max_dense_bytes=0)
    spent, _ = _timed(lambda: ntkops.trace(kernel, method="exact").value)
    return spent, kernel


def _seconds(own: float, other: float) -> dict[str, float]:
    return {
        "layerwise_s": float(f"{own:.4g}"),
        "products_s": float(f"{other:.4g}"),
        "ratio": float(f"{other / own:.4g}"),
    }
