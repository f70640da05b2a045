"""Training dynamics: bounds on random problems, products for a large kernel, and time beside an eigenbasis.

Run it with ``python benchmarks/dynamics.py``; docs/rooms/dynamics.md explains.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from _dynamics_bounds import violations
from _measure import environment, interleaved, one_thread, ratio
from linear_operator.operators import DiagLinearOperator
from torch import Tensor, nn

import ntkops

__all__ = ["against_eigenbasis", "large", "run"]

TARGETS = {"violations": 0, "median": 3.0, "products": 400, "ratio": 10.0}
PHASE = 1e4  # τ λmax


def _network(dtype: torch.dtype = torch.float64) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layers = nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, stride=2, padding=1), nn.ReLU()
        return nn.Sequential(*layers, nn.Flatten(), nn.Linear(128, 1)).to(dtype)


def large(count: int) -> list[dict[str, Any]]:
    """Return what flows to τ λmax = 10⁴ take: of a lazy convolution network, and of a flat spectrum."""
    generator = torch.Generator().manual_seed(0)
    rows = []
    for dtype in (torch.float64, torch.float32):
        x = torch.randn(count, 1, 8, 8, generator=generator, dtype=torch.float64).to(dtype)
        spectrum = 10 ** (-6 * torch.rand(count, generator=generator, dtype=torch.float64))
        labels = torch.randn(count, 1, generator=generator, dtype=torch.float64).to(dtype)
        kernels = {
            "convolution network": ntkops.ntk(_network(dtype), x, max_dense_bytes=0),
            "log-uniform, condition 1e6": DiagLinearOperator(spectrum.to(dtype)),
        }
        for name, kernel in kernels.items():
            top = float(ntkops.eigsh(kernel, 1, generator=torch.Generator().manual_seed(0)).values[0])
            times = torch.logspace(-3, 0, 20, dtype=torch.float64) * PHASE / top * count / 2
            path = ntkops.gradient_flow(kernel, labels, times, method="krylov")
            rows.append(
                {
                    "kernel": name,
                    "rows": count,
                    "dtype": str(dtype).removeprefix("torch."),
                    "products": path.info.products,
                    "converged": path.info.converged,
                    "bound": float(path.bounds[-1]) / float(labels.norm()),
                    "rounding": float(path.info.rounding[-1]) / float(labels.norm()),
                    "seconds": path.info.seconds,
                }
            )
            print(json.dumps(rows[-1]))
    return rows


def eigenbasis(kernel: Tensor, labels: Tensor, times: Tensor) -> Tensor:
    """Return outputs by a dense eigendecomposition, as neural-tangents has them."""
    values, vectors = torch.linalg.eigh(kernel)
    rates = 2 / len(labels) * values.clamp(min=0)
    rest = torch.exp(-times[:, None, None] * rates[:, None]) * (vectors.mT @ labels)
    return labels - vectors @ rest


def against_eigenbasis(count: int, phase: float, repetitions: int) -> dict[str, Any]:
    """Return times of a trajectory on a dense kernel: by a Krylov space, and by its eigenbasis."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(count, 1, 8, 8, generator=generator, dtype=torch.float64)
    kernel = ntkops.ntk(_network(), x).to_dense()
    labels = torch.randn(count, 1, generator=generator, dtype=torch.float64)
    top = float(ntkops.eigsh(kernel, 1, generator=torch.Generator().manual_seed(0)).values[0])
    times = torch.logspace(-3, 0, 20, dtype=torch.float64) * phase / top * count / 2
    found: dict[str, Any] = {}

    def krylov() -> None:
        found["path"] = ntkops.gradient_flow(kernel, labels, times, method="krylov")

    def dense() -> None:
        found["reference"] = eigenbasis(kernel, labels, times)

    series = interleaved({"krylov": krylov, "eigenbasis": dense}, repetitions)
    path = found["path"]
    error = float((path.outputs - found["reference"]).flatten(1).norm(dim=1).max())
    row = {
        "rows": count,
        "phase": phase,
        "products": path.info.products,
        "error": error / float(labels.norm()),
        "bound": float(path.bounds.max()) / float(labels.norm()),
        "krylov": series["krylov"].summary(),
        "eigenbasis": series["eigenbasis"].summary(),
        "ratio": ratio(series["eigenbasis"], series["krylov"]),
    }
    print(json.dumps(row))
    return row


def run(problems: int, count: int, dense: int, repetitions: int) -> dict[str, Any]:
    """Return everything, with what is claimed and whether it is held."""
    with one_thread():
        bounds = [violations(problems // 2, dtype, first=0) for dtype in (torch.float64, torch.float32)]
        for found in bounds:
            print(json.dumps(found))
        rows = large(count)
        times = [against_eigenbasis(dense, phase, repetitions) for phase in (1e2, PHASE)]
    medians = [found["ratios"].get("outputs", {}).get("q50", 0.0) for found in bounds]
    exact = [row["products"] for row in rows if row["dtype"] == "float64"]
    held = {
        "violations": sum(len(found["violations"]) for found in bounds) <= TARGETS["violations"],
        "median": max(medians) <= TARGETS["median"],
        "products": max(exact) <= TARGETS["products"],
        "ratio": min(row["ratio"]["cpu"]["median"] for row in times) >= TARGETS["ratio"],
    }
    return {
        "environment": environment(),
        "bounds": bounds,
        "large": rows,
        "eigenbasis": times,
        "targets": {name: {"target": TARGETS[name], "held": held[name]} for name in TARGETS},
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Run, print, and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--problems", type=int, default=10_000, help="random problems, half of them in float32"
    )
    parser.add_argument("--quick", action="store_true", help="small sizes: shows that it runs")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    given = parser.parse_args(arguments)
    found = run(20, 200, 200, 1) if given.quick else run(given.problems, 20_000, 3000, 3)
    print(json.dumps(found["targets"], indent=1))
    if given.out is not None:
        given.out.parent.mkdir(parents=True, exist_ok=True)
        given.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
