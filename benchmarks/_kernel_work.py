"""Our side of the comparison of exact kernels, and what is checked before anything is timed."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping

import torch
from _kernel_peers import Kind
from _measure import Series
from torch import Tensor, nn

import ntkops

__all__ = ["TOLERANCE", "Disagreement", "distance", "ours", "paired", "require_close"]

TOLERANCE = 1e-5  # beyond this two results are not of the same thing


class Disagreement(RuntimeError):
    """A result is not that of the float64 Jacobians, so that its time says nothing."""


def ours(model: nn.Module, x: Tensor, kind: Kind, engine: str = "layerwise") -> Callable[[], Tensor]:
    """Return the work that makes a kernel, a trace or a diagonal from nothing that was kept."""
    outputs = kind if kind in ("all", "trace", "each") else "all"
    kernel = ntkops.ntk(model, x, outputs=outputs, engine=engine)  # type: ignore[arg-type]

    def work() -> Tensor:
        kernel.free()
        if kind == "scalar":
            return ntkops.trace(kernel, method="exact").value
        return kernel.diagonal() if kind == "diagonal" else kernel.to_dense()

    return work


def distance(found: Tensor, wanted: Tensor) -> float:
    """Return the relative Frobenius distance, to two digits."""
    return float(f"{float((found.double() - wanted).norm() / wanted.norm()):.2g}")


def require_close(what: str, agreement: Mapping[str, float]) -> None:
    """Refuse to go on where a result is wrong.

    Raises:
        Disagreement: If a relative distance exceeds 1e-5.
    """
    for name, found in agreement.items():
        if not found <= TOLERANCE:
            raise Disagreement(f"{what}: {name} differs from the float64 Jacobians by {found:.1e}")


def paired(
    work: Mapping[str, Callable[[], Tensor]], repetitions: int
) -> tuple[dict[str, Series], dict[str, Tensor]]:
    """Time work that is too slow to be warmed up twice; return the last results, too."""
    series = {name: Series() for name in work}
    found: dict[str, Tensor] = {}
    with torch.no_grad():
        work["layerwise"]()
    for _ in range(repetitions):
        for name, piece in work.items():
            gc.collect()
            wall, cpu = time.perf_counter(), time.process_time()
            found[name] = piece()
            series[name].cpu.append(1e3 * (time.process_time() - cpu))
            series[name].wall.append(1e3 * (time.perf_counter() - wall))
    return series, found
