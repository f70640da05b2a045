"""Training dynamics: bounds on random problems, products for a large kernel, and time beside an eigenbasis.

A problem is a kernel with a prescribed spectrum (clusters, zeros, conditions from 1 to 1e12), flow or
descent, with weight decay and momentum; its reference is dense, in float64.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from typing import Any

import numpy as np
import scipy.linalg
import torch
from _measure import interleaved, ratio
from _models import cnn, seeded
from _tables import Benchmark, say, table, verdict
from linear_operator.operators import DiagLinearOperator
from torch import Tensor, nn

import ntkops

KINDS = ("log-uniform", "clusters", "zeros", "power law", "two scales")
PHASE = 1e4  # τ λmax
MEDIAN, PRODUCTS, RATIO = 3.0, 400, 10.0  # what is claimed: bounds over errors, products, times an eigenbasis


def problem(seed: int, kind: str, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, np.ndarray]:
    """Return a kernel with a prescribed spectrum, labels, and the spectrum; the kernel rounded to a dtype."""
    draw = np.random.default_rng(seed)
    size = int(draw.integers(2, 60))
    condition = 10.0 ** draw.uniform(0, 12)
    values = {
        "log-uniform": condition ** -draw.uniform(0, 1, size),
        "clusters": condition ** -draw.choice(draw.uniform(0, 1, 3), size) * (1 + 1e-9 * draw.normal(size)),
        "zeros": np.where(draw.uniform(size=size) < 0.5, 0.0, condition ** -draw.uniform(0, 1, size)),
        "power law": np.arange(1, size + 1) ** -draw.uniform(0.5, 4),
        "two scales": np.where(draw.uniform(size=size) < 0.2, 1.0, 1 / condition),
    }[kind]
    values = np.sort(np.append(values[1:], 1.0) * 10.0 ** draw.uniform(-3, 3))
    turn = np.linalg.qr(draw.normal(size=(size, size)))[0]
    labels = turn @ (
        draw.normal(size=size) * np.where(draw.uniform() < 0.5, 1.0, np.sqrt(values / values.max() + 1e-30))
    )
    kernel = (turn * values) @ turn.T
    return torch.from_numpy((kernel + kernel.T) / 2).to(dtype), torch.from_numpy(labels).to(dtype), values


def flow(kernel: np.ndarray, residual: np.ndarray, tau: float, shift: float) -> tuple[np.ndarray, np.ndarray]:
    """Return exp(-τ A) r, and a, from a dense eigendecomposition."""
    values, vectors = scipy.linalg.eigh(kernel, driver="evd")  # relatively robust ones are less orthogonal
    rates, parts = values.clip(0) + shift, vectors.T @ residual
    small = rates * tau < 1e-300
    dual = np.where(small, tau, -np.expm1(-rates * tau) / np.where(small, 1.0, rates))
    return vectors @ (np.exp(-rates * tau) * parts), vectors @ (dual * parts)


def descent(
    kernel: np.ndarray, residual: np.ndarray, steps: int, step: float, momentum: float, shift: float
) -> tuple[np.ndarray, np.ndarray]:
    """Return the same after steps of descent, one by one."""
    dual = change = np.zeros_like(residual)
    for _ in range(steps):
        change = step * (residual - kernel @ dual - shift * dual) + momentum * change
        dual = dual + change
    return residual - kernel @ dual - shift * dual, dual


def violations(count: int, dtype: torch.dtype = torch.float64, first: int = 0) -> dict[str, Any]:
    """Return how many bounds were violated, and how far they are above the errors."""
    found: dict[str, list[float]] = {"outputs": [], "weights": []}
    beyond, tried = [], 0
    for seed in range(first, first + count):
        kind = KINDS[seed % len(KINDS)]
        kernel, labels, values = problem(seed, kind, dtype)
        exact, _, _ = problem(seed, kind)
        draw = np.random.default_rng(seed + 10**6)
        size, top = len(labels), values.max()
        decay = 0.0 if draw.uniform() < 0.6 else 2 / size * top * 10.0 ** draw.uniform(-6, 0)
        shift = decay * size / 2
        tol = 10.0 ** draw.uniform(-10, -1)
        descends = draw.uniform() < 0.3
        residual = labels.double().numpy()
        if descends:
            momentum = 0.0 if draw.uniform() < 0.5 else draw.uniform(0, 0.95)
            step = draw.uniform(0.05, 1.95) * (1 + momentum) / (top + shift)
            moments = np.unique(draw.integers(0, 300, 3))
            path = ntkops.gradient_descent(
                kernel, labels, moments.tolist(), lr=step * size / 2, momentum=momentum, weight_decay=decay,
                method="krylov", tol=tol,
            )  # fmt: skip
            references = [descent(exact.numpy(), residual, int(k), step, momentum, shift) for k in moments]
        else:
            moments = np.sort(10.0 ** draw.uniform(-2, 5, 3)) / top
            path = ntkops.gradient_flow(
                kernel, labels, (moments * size / 2).tolist(), weight_decay=decay, method="krylov", tol=tol
            )
            references = [flow(exact.numpy(), residual, tau, shift) for tau in moments]
        roots = scipy.linalg.eigh(exact.numpy(), driver="evd")
        half = np.sqrt(roots[0].clip(0))[:, None] * roots[1].T
        for place, (rest, dual) in enumerate(references):
            tried += 1
            output = residual - rest - shift * dual
            error = float(np.linalg.norm(path.outputs[place].double().numpy() - output))
            weight = float(np.linalg.norm(half @ (path.dual[place].numpy() - dual)))
            bound, noise = float(path.bounds[place]), float(path.info.rounding[place])
            heavy = float(path.weight_bounds[place])
            if error > bound:
                beyond.append((seed, kind, "outputs", error / bound))
            if weight > heavy:
                beyond.append((seed, kind, "weights", weight / heavy))
            if bound > 10 * noise and error > 0:  # where the method's own error counts
                found["outputs"].append(bound / error)
                found["weights"].append(heavy / weight)
    quantiles = {
        name: {f"q{q}": float(f"{np.quantile(ratios, q / 100):.4g}") for q in (10, 50, 90)}
        | {"count": len(ratios)}
        for name, ratios in found.items()
        if ratios
    }
    return {
        "problems": count, "bounds": 2 * tried, "violations": beyond, "ratios": quantiles,
        "dtype": str(dtype),
    }  # fmt: skip


def _network(dtype: torch.dtype = torch.float64) -> nn.Module:
    return seeded(lambda: cnn([1, 8, 8], 1, strides=(1, 2), flat=128)).to(dtype)


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
                    "kernel": name, "rows": count, "dtype": str(dtype).removeprefix("torch."),
                    "products": path.info.products, "converged": path.info.converged,
                    "bound": float(path.bounds[-1]) / float(labels.norm()),
                    "rounding": float(path.info.rounding[-1]) / float(labels.norm()),
                    "seconds": path.info.seconds,
                }
            )  # fmt: skip
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
        "rows": count, "phase": phase, "products": path.info.products, "error": error / float(labels.norm()),
        "bound": float(path.bounds.max()) / float(labels.norm()), "krylov": series["krylov"].summary(),
        "eigenbasis": series["eigenbasis"].summary(), "ratio": ratio(series["eigenbasis"], series["krylov"]),
    }  # fmt: skip
    return row


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Measure bounds on as many problems as there are repetitions, half of them in float32, and times."""
    count, dense, times = (200, 200, 1) if options.quick else (20_000, 3000, 3)
    say("bounds")
    half = options.repetitions // 2
    bounds = [violations(half, dtype, first=0) for dtype in (torch.float64, torch.float32)]
    say("a large kernel")
    rows = large(count)
    say("an eigenbasis")
    beside = [against_eigenbasis(dense, phase, times) for phase in (1e2, PHASE)]
    return {"bounds": bounds, "large": rows, "eigenbasis": beside}


def judge(result: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Say of each claim what was found."""
    exact = [row for row in result["large"] if row["dtype"] == "float64"]
    own = [found for found in result["bounds"] if "outputs" in found["ratios"]]
    median, products = "bound of outputs over error, median", "products of a flow to τ λmax = 10⁴"
    return [
        *(verdict("bounds violated", b["dtype"], len(b["violations"]), most=0) for b in result["bounds"]),
        *(verdict(median, b["dtype"], b["ratios"]["outputs"]["q50"], most=MEDIAN) for b in own),
        *(verdict(products, row["kernel"], row["products"], most=PRODUCTS) for row in exact),
        *(
            verdict(
                "CPU time of an eigenbasis over ours", f"τ λmax = {row['phase']:g}",
                row["ratio"]["cpu"]["median"], least=RATIO,
            )
            for row in result["eigenbasis"]
        ),
    ]  # fmt: skip


def tables(result: Mapping[str, Any]) -> list[str]:
    """Return bounds, the large kernel, and times beside an eigenbasis."""
    return [
        *table(
            result["bounds"],
            {
                "dtype": "dtype", "problems": "problems", "bounds": "bounds",
                "violated": lambda b: len(b["violations"]),
                **{f"{w}, bound / error": f"ratios.{w}.q50" for w in ("outputs", "weights")},
            },
        ),
        *table(
            result["large"],
            {
                "kernel": "kernel", "rows": "rows", "dtype": "dtype", "products": "products",
                "converged": "converged", "bound": "bound:.1e", "rounding": "rounding:.1e", "s": "seconds",
            },
        ),
        *table(
            result["eigenbasis"],
            {
                "rows": "rows", "τ λmax": "phase", "products": "products", "error": "error:.1e",
                "bound": "bound:.1e", "ms": "krylov.cpu_ms.median",
                "eigenbasis, ms": "eigenbasis.cpu_ms.median", "ratio": "ratio.cpu",
            },
        ),
    ]  # fmt: skip


BENCHMARK = Benchmark("dynamics", __doc__, measure, tables, judge, repetitions=(10_000, 20))
main = BENCHMARK.main

if __name__ == "__main__":
    sys.exit(main())
