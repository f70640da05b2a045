"""Bounds of trajectories against dense references, on random positive semidefinite problems."""

from __future__ import annotations

from typing import Any

import numpy as np
import scipy.linalg
import torch
from torch import Tensor

import ntkops

__all__ = ["descent", "flow", "problem", "violations"]

KINDS = ("log-uniform", "clusters", "zeros", "power law", "two scales")


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
                kernel,
                labels,
                moments.tolist(),
                lr=step * size / 2,
                momentum=momentum,
                weight_decay=decay,
                method="krylov",
                tol=tol,
            )
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
        "problems": count,
        "bounds": 2 * tried,
        "violations": beyond,
        "ratios": quantiles,
        "dtype": str(dtype),
    }
