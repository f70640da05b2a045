"""What float32 leaves of kernel ridge regression: duals, predictions, ridges that mean something.

Run it with ``python benchmarks/regression.py``; docs/solvers.md explains and shows the result.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from _measure import environment, one_thread
from _regression_tables import judge, markdown
from _tables import fill
from torch import Tensor, nn

import ntkops
from ntkops.errors import NotConvergedError, RoundingWarning, SingularKernelError
from ntkops.regression import KernelRidge
from ntkops.regression._rounding import precise_product

__all__ = ["duals", "eigenvalues", "lazy_products", "near_duplicates", "run"]

TARGETS = {"predictions": 1e-6, "residual_ratio": 10.0, "coverage": 0.95, "silent": 0.1}
METHODS = ("cholesky", "eigh", "nystrom", "cg")
DTYPE = torch.float64


def network(seed: int, *widths: int) -> nn.Sequential:
    """Return a tanh network with torch's usual initial distribution."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        layers: list[nn.Module] = []
        for first, second in zip(widths, widths[1:], strict=False):
            layers += [nn.Linear(first, second), nn.Tanh()]
        return nn.Sequential(*layers[:-1])


def draw(*shape: int, seed: int) -> Tensor:
    """Return normal float32 numbers."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def twin(model: nn.Module) -> nn.Module:
    """Return the same network in float64."""
    return copy.deepcopy(model).double()


def error_of(found: Tensor, expected: Tensor) -> float:
    """Return the relative error of predictions."""
    found = found.double().reshape(expected.shape)
    return float((found - expected).norm() / expected.norm())


def duals(count: int) -> list[dict[str, Any]]:
    """Return how far each method is from float64 on one stored float32 kernel, 8-64-1 on normal inputs."""
    model, x, y = network(0, 8, 64, 1), draw(count, 8, seed=1), draw(count, 1, seed=2)
    rows = []
    for params, ridge in ((None, 1e-4), (None, 1e-6), ("2.*", 1e-4), ("2.*", 1e-6)):
        dense = ntkops.ntk(model, x, params=params).to_dense()
        K = dense.double()
        r = ridge * float(K.diagonal().mean())
        A = K + r * torch.eye(count, dtype=DTYPE)
        dual = torch.linalg.solve(A, y.double())
        rounded = error_of((dense @ dual.float()), K @ dual)
        for method in METHODS[:2] + METHODS[3:]:
            row: dict[str, Any] = {"params": params or "all", "ridge": ridge, "method": method}
            row["rounded_dual"] = rounded
            try:
                fitted = KernelRidge(ridge, method=method).fit(dense, y)
            except (SingularKernelError, NotConvergedError) as error:
                rows.append({**row, "refused": type(error).__name__})
                continue
            residual = float((A @ fitted.dual_coef_ - y.double()).norm() / y.norm())
            row |= {"refused": None, "predictions": error_of(fitted.predict(dense), K @ dual)}
            row |= {"residual": residual, "reported": float(fitted.solve_info_.residuals.max())}
            rows.append(row)
    return rows


def near_duplicates(count: int) -> list[dict[str, Any]]:
    """Return what each method says of inputs that differ by a hundredth, beside the float64 answer."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1), nn.ReLU(),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 2),
        )  # fmt: skip
        for parameter in model.parameters():
            parameter.data.mul_(6)
    x = draw(1, 3, 8, 8, seed=3) + 0.01 * draw(count, 3, 8, 8, seed=4)
    K, y = ntkops.ntk(model, x), draw(count, 2, seed=5)
    exact = ntkops.ntk(twin(model), x.double()).to_dense()
    dense, scale = K.to_dense(), float(exact.diagonal().mean())
    rows = []
    for exponent in range(3, 11):
        ridge = 10.0**-exponent
        A = exact + ridge * scale * torch.eye(len(exact), dtype=DTYPE)
        expected = exact @ torch.linalg.solve(A, y.double().reshape(-1, 1))
        for method in ("cholesky", "eigh", "cg"):
            row: dict[str, Any] = {"ridge": ridge, "method": method, "error": None}
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                try:
                    found = KernelRidge(ridge, method=method).fit(dense, y).predict(dense)
                    row["error"], row["outcome"] = error_of(found, expected), "silent"
                except (SingularKernelError, NotConvergedError):
                    row["outcome"] = "refused"
            if any(issubclass(w.category, RoundingWarning) for w in caught) and row["error"] is not None:
                row["outcome"] = "warned"
            rows.append(row)
    return rows


def lazy_products(cases: int) -> dict[str, Any]:
    """Return how often the rounding that is said of lazy products covers the true one, on random networks."""
    covered, ratios, gains = 0, [], []
    for seed in range(cases):
        generator = torch.Generator().manual_seed(seed)

        def one_of(*values: int, source: torch.Generator = generator) -> int:
            return values[int(torch.randint(len(values), (), generator=source))]

        inputs, width, count = one_of(2, 6, 20), one_of(8, 32, 128), one_of(20, 60)
        model = network(seed, inputs, *(width,) * one_of(1, 2, 3), one_of(1, 3))
        x, new = draw(count, inputs, seed=seed) * one_of(1, 3), draw(10, inputs, seed=seed + cases)
        exact = ntkops.ntk(twin(model), x.double(), outputs="trace")
        dense = exact.to_dense()
        r = 10 ** (-1 - 5 * float(torch.rand((), generator=generator))) * float(dense.diagonal().mean())
        labels = torch.randn(count, 1, generator=generator, dtype=DTYPE)
        dual = torch.linalg.solve(dense + r * torch.eye(count, dtype=DTYPE), labels)
        across = exact.cross(new.double()).to_dense() @ dual
        engine = "layerwise" if seed % 2 else "autograd"
        lazy = ntkops.ntk(model, new, x, outputs="trace", engine=engine, max_dense_bytes=0)
        found, added = precise_product(lazy, dual)
        error = float((found - across).norm())
        covered += error <= float(added)
        ratios.append(float(added) / error if error else math.inf)
        gains.append(float(((lazy @ dual.float()).double() - across).norm()) / error if error else 1.0)
    middle = cases // 2
    return {
        "cases": cases,
        "covered": covered / cases,
        "bound_over_error": sorted(ratios)[middle],
        "one_product_over_two": sorted(gains)[middle],
    }


def eigenvalues(count: int) -> dict[str, Any]:
    """Return |E|₂ / (eps λmax) of float32 kernels, least and largest."""
    shares = []
    for seed, widths in enumerate(((8, 64, 1), (8, 32, 32, 2), (20, 128, 128, 1), (6, 256, 256, 1))):
        model, x = network(seed, *widths), draw(count, widths[0], seed=seed)
        exact = ntkops.ntk(twin(model), x.double()).to_dense()
        largest = float(torch.linalg.eigvalsh(exact)[-1]) * torch.finfo(torch.float32).eps
        for engine in ("layerwise", "autograd"):
            for limit in ("auto", 0):
                K = ntkops.ntk(model, x, engine=engine, max_dense_bytes=limit)
                made = K.to_dense() if limit else K @ torch.eye(K.shape[-1])
                shares.append(float(torch.linalg.matrix_norm(made.double() - exact, 2)) / largest)
    return {"least": min(shares), "largest": max(shares), "kernels": len(shares)}


def run(quick: bool) -> dict[str, Any]:
    """Measure everything."""
    result = {
        "benchmark": "regression",
        "quick": quick,
        "environment": environment(),
        "targets": TARGETS,
        "samples": 60 if quick else 300,
        "duals": duals(60 if quick else 300),
        "near_duplicates": near_duplicates(20 if quick else 60),
        "lazy_products": lazy_products(10 if quick else 500),
        "eigenvalues": eigenvalues(30 if quick else 300),
    }
    return {**result, "met": judge(result)}


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, or print the tables of a stored result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="small sizes: shows that it runs")
    parser.add_argument("--out", type=Path, default=None, help="JSON file to write")
    parser.add_argument("--markdown", type=Path, default=None, help="print the tables of this JSON")
    parser.add_argument("--page", type=Path, default=None, help="with --markdown: put them into this page")
    options = parser.parse_args(arguments)
    if options.markdown is not None:
        text = markdown(json.loads(options.markdown.read_text(encoding="utf-8")))
        if options.page is None:
            print(text, end="")
        else:
            page = options.page.read_text(encoding="utf-8")
            options.page.write_text(fill(page, "regression", text), encoding="utf-8")
        return 0
    with one_thread():
        result = run(options.quick)
    print(markdown(result))
    if options.out is not None:
        options.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
