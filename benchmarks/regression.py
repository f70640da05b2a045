"""What float32 leaves of kernel ridge regression: duals, predictions, ridges (docs/solvers.md)."""

from __future__ import annotations

import argparse
import copy
import math
import sys
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from _models import cnn, mlp, normal, seeded
from _tables import Benchmark, table, verdict
from torch import Tensor, nn

import ntkops
from ntkops.errors import NotConvergedError, RoundingWarning, SingularKernelError
from ntkops.regression import KernelRidge
from ntkops.regression._rounding import precise_product

# Errors of predictions, reported over true residuals, share covered, error without a warning.
PREDICTIONS, RESIDUALS, COVERAGE, SILENT = 1e-6, 10.0, 0.95, 0.1
METHODS = ("cholesky", "eigh", "cg")
DTYPE = torch.float64


def twin(model: nn.Module) -> nn.Module:
    """Return the same network in float64."""
    return copy.deepcopy(model).double()


def error_of(found: Tensor, expected: Tensor) -> float:
    """Return the relative error of predictions."""
    found = found.double().reshape(expected.shape)
    return float((found - expected).norm() / expected.norm())


def duals(count: int) -> list[dict[str, Any]]:
    """Return how far each method is from float64 on one stored float32 kernel, 8-64-1 on normal inputs."""
    model, x, y = seeded(mlp, 8, 64, 1), normal(count, 8, seed=1), normal(count, 1, seed=2)
    rows = []
    for params, ridge in ((None, 1e-4), (None, 1e-6), ("2.*", 1e-4), ("2.*", 1e-6)):
        dense = ntkops.ntk(model, x, params=params).to_dense()
        K = dense.double()
        r = ridge * float(K.diagonal().mean())
        A = K + r * torch.eye(count, dtype=DTYPE)
        dual = torch.linalg.solve(A, y.double())
        rounded = error_of((dense @ dual.float()), K @ dual)
        for method in METHODS:
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
    model = seeded(cnn, [3, 16, 16], 2)
    for parameter in model.parameters():
        parameter.data.mul_(6)
    x = normal(1, 3, 8, 8, seed=3) + 0.01 * normal(count, 3, 8, 8, seed=4)
    K, y = ntkops.ntk(model, x), normal(count, 2, seed=5)
    exact = ntkops.ntk(twin(model), x.double()).to_dense()
    dense, scale = K.to_dense(), float(exact.diagonal().mean())
    rows = []
    for exponent in range(3, 11):
        ridge = 10.0**-exponent
        A = exact + ridge * scale * torch.eye(len(exact), dtype=DTYPE)
        expected = exact @ torch.linalg.solve(A, y.double().reshape(-1, 1))
        for method in METHODS:
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
        model = seeded(mlp, inputs, *(width,) * one_of(1, 2, 3), one_of(1, 3), seed=seed)
        x, new = normal(count, inputs, seed=seed) * one_of(1, 3), normal(10, inputs, seed=seed + cases)
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
        "cases": cases, "covered": covered / cases, "bound_over_error": sorted(ratios)[middle],
        "one_product_over_two": sorted(gains)[middle],
    }  # fmt: skip


def eigenvalues(count: int) -> dict[str, Any]:
    """Return |E|₂ / (eps λmax) of float32 kernels, least and largest."""
    shares = []
    for seed, widths in enumerate(((8, 64, 1), (8, 32, 32, 2), (20, 128, 128, 1), (6, 256, 256, 1))):
        model, x = seeded(mlp, *widths, seed=seed), normal(count, widths[0], seed=seed)
        exact = ntkops.ntk(twin(model), x.double()).to_dense()
        largest = float(torch.linalg.eigvalsh(exact)[-1]) * torch.finfo(torch.float32).eps
        for engine in ("layerwise", "autograd"):
            for limit in ("auto", 0):
                K = ntkops.ntk(model, x, engine=engine, max_dense_bytes=limit)
                made = K.to_dense() if limit else K @ torch.eye(K.shape[-1])
                shares.append(float(torch.linalg.matrix_norm(made.double() - exact, 2)) / largest)
    return {"least": min(shares), "largest": max(shares), "kernels": len(shares)}


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Measure everything."""
    quick = options.quick
    return {
        "samples": 60 if quick else 300, "duals": duals(60 if quick else 300),
        "near_duplicates": near_duplicates(20 if quick else 60),
        "lazy_products": lazy_products(10 if quick else 500),
        "eigenvalues": eigenvalues(30 if quick else 300),
    }  # fmt: skip


def judge(result: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Say of each claim what was found."""
    rows, near = result["duals"], result["near_duplicates"]
    fitted = [row for row in rows if row["refused"] is None]
    lost = [row for row in rows if row["params"] == "2.*" and row["ridge"] == 1e-6]
    outcomes = {(row["ridge"], row["method"]): row["outcome"] for row in near}
    ridges = {row["ridge"] for row in near}
    of = f"{result['samples']} samples"

    def most(values: list[float], absent: float = 0.0) -> float:
        return max(values, default=absent)

    return [
        verdict(
            "error of predictions, direct methods", of,
            most([row["predictions"] for row in fitted if row["method"] != "cg"]), most=PREDICTIONS,
        ),
        verdict(
            "residual over what is reported, or the inverse", of,
            most([max(r["reported"] / r["residual"], r["residual"] / r["reported"]) for r in fitted]),
            most=RESIDUALS,
        ),
        verdict(
            "fits whose ridge the kernel's rounding decides, not refused", of,
            sum(row["refused"] is None for row in lost), most=0,
        ),
        verdict(
            "error of an answer without a word", "inputs that differ by a hundredth",
            most([row["error"] for row in near if row["outcome"] == "silent"]), most=SILENT,
        ),
        verdict(
            "ridges of which direct methods disagree", "inputs that differ by a hundredth",
            sum(outcomes[ridge, "eigh"] != outcomes[ridge, "cholesky"] for ridge in ridges), most=0,
        ),
        verdict(
            "rounding of lazy products covered", f"{result['lazy_products']['cases']} networks",
            result["lazy_products"]["covered"], least=COVERAGE,
        ),
    ]  # fmt: skip


def _power(value: float) -> str:
    return f"{value:.0e}".replace("e-0", "e-")


def tables(result: Mapping[str, Any]) -> list[str]:
    """Return errors on a stored kernel, those of near-duplicates, and what rounding does."""
    lazy, values = result["lazy_products"], result["eigenvalues"]
    near: dict[float, dict[str, Any]] = {}
    for row in result["near_duplicates"]:
        error = "" if row["error"] is None else f"{row['error']:.1e}, "
        said = f"{error}{row['outcome']}".replace(", silent", "")
        near.setdefault(row["ridge"], {"ridge": _power(row["ridge"])})[row["method"]] = said

    def fit(name: str) -> Callable[[Mapping[str, Any]], str]:
        refused = "refused" if name == "predictions" else "-"
        return lambda row: refused if row["refused"] else f"{row[name]:.1e}"

    return [
        *table(
            result["duals"],
            {
                "parameters": "params", "ridge": lambda row: _power(row["ridge"]), "method": "method",
                "predictions": fit("predictions"), "residual": fit("residual"), "reported": fit("reported"),
                "dual in float32": "rounded_dual:.1e",
            },
            left=3,
            title=f"A stored float32 kernel of {result['samples']} samples, 8-64-1, against the same kernel "
            "solved in float64: relative errors of predictions, and residuals of `dual_coef_`. The last "
            "column is what a dual rounded to float32 would give.",
        ),
        *table(
            near.values(), {name: name for name in ("ridge", *METHODS)},
            title="Inputs that differ by a hundredth, a convolution net: errors of fitted values against "
            "float64.",
        ),
        "",
        f"Lazy float32 cross kernels of {lazy['cases']} random networks: `rounding_` covered the error in "
        f"{100 * lazy['covered']:.1f} %, in the median {lazy['bound_over_error']:.0f} times the error; one "
        f"product in place of two had {lazy['one_product_over_two']:.2g} times the error. Of "
        f"{values['kernels']} float32 kernels |E|₂ / (eps λmax) was {values['least']:.2f} to "
        f"{values['largest']:.2f}.",
    ]  # fmt: skip


BENCHMARK = Benchmark("regression", __doc__, measure, tables, judge)
main = BENCHMARK.main

if __name__ == "__main__":
    sys.exit(main())
