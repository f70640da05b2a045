"""Product columns that solving (K + ridge) x = b takes, and the memory of a large solve (docs/solvers.md)."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from _measure import alone, memory_mb
from _models import digit_images, mlp, normal, seeded
from _tables import Benchmark, say, table, verdict
from torch import Tensor, nn

import ntkops
from ntkops.operators import RidgeOperator

RIDGE = 1e-4  # times the mean diagonal
TOLERANCE = 1e-6
COLUMNS, PRECISE, MEGABYTES = 75, 8, 1000  # what is claimed
SEEDS = (0, 1, 2)
INPUTS = {
    "plain": "pixels in [0, 1]",
    "standardised": "every pixel with mean 0 and variance 1",
    "normalised": "every image of length 1",
}


def digits(count: int, inputs: str) -> tuple[Tensor, Tensor]:
    """Return images of digits and labels ±1, whether the digit is odd."""
    x, labels = digit_images()
    if inputs == "standardised":
        x = (x - x.mean(0)) / x.std(0).clamp(min=1e-8 / 16)
    elif inputs == "normalised":
        x = x / x.norm(dim=1, keepdim=True)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))[:count]
    return x[order], (labels[order] % 2 * 2 - 1).double()


def network() -> nn.Module:
    """Return ReLU 64-128-128-1 with torch's usual initial distribution."""
    return mlp(64, 128, 128, 1, act=nn.ReLU).double()


def problem(inputs: str, seed: int, dtype: torch.dtype, count: int) -> tuple[RidgeOperator, Tensor]:
    """Return K + ridge and a right-hand side."""
    x, y = digits(count, inputs)
    kernel = ntkops.ntk(seeded(network, seed=seed).to(dtype), x.to(dtype))
    kernel.to_dense()  # what is counted here are columns, whatever makes them
    ridge = RIDGE * float(kernel.diagonal().mean())
    return RidgeOperator(kernel, ridge), y.to(dtype)


def columns_of(inputs: str, seed: int, count: int = 1000, rank: int = 200) -> list[dict[str, Any]]:
    """Return what each way of solving takes on one problem."""
    rows = []
    for dtype in (torch.float64, torch.float32):
        operator, y = problem(inputs, seed, dtype, count)
        method = "cg" if dtype == torch.float64 else "refinement"
        for name in (None, "nystrom", "pivoted cholesky", "rpcholesky"):
            solver = operator.with_solver(
                method=method, preconditioner=name, rank=rank, tolerance=TOLERANCE, max_iterations=3000
            )
            _, info = solver.solve_with_info(y, raise_on_failure=False)
            rows.append(
                {
                    "inputs": inputs, "seed": seed, "dtype": str(dtype).removeprefix("torch."),
                    "preconditioner": name, "converged": info.converged,
                    "residual": float(info.residuals.max()), "columns": info.products,
                    "precise": info.precise_products, "preconditioner_columns": info.preconditioner_products,
                }
            )  # fmt: skip
    return rows


def large_solve(count: int, width: int = 16, rank: int = 100) -> dict[str, Any]:
    """Solve once with nothing dense, in this process, and return what it took and the peak memory."""
    x = normal(count, 64, seed=0)
    kernel = ntkops.ntk(seeded(mlp, 64, width, 1), x, max_dense_bytes=0)
    ridge = 1e-2 * float(kernel.diagonal().mean())
    operator = RidgeOperator(kernel, ridge).with_solver(method="refinement", rank=rank)
    y = torch.sin(x.sum(1))
    start = memory_mb()
    _, info = operator.solve_with_info(y, raise_on_failure=False)
    return {
        "samples": count, "width": width, "converged": info.converged,
        "residual": float(info.residuals.max()), "columns": info.products, "precise": info.precise_products,
        "preconditioner_columns": info.preconditioner_products, "start_megabytes": round(start or 0),
        "peak_megabytes": round(memory_mb() or 0), "seconds": round(info.seconds, 1),
    }  # fmt: skip


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Measure columns, and the large solve in a process of its own."""
    count, rank, seeds = (120, 24, SEEDS[:1]) if options.quick else (1000, 200, SEEDS)
    rows = []
    for inputs in INPUTS:
        for seed in seeds:
            say(f"{inputs}, seed {seed}")
            rows += columns_of(inputs, seed, count, rank)
    return {
        "inputs": INPUTS, "samples": count, "rank": rank, "seeds": list(seeds), "ridge": RIDGE,
        "tolerance": TOLERANCE, "rows": rows, "large": alone(large_solve, 400 if options.quick else 20_000),
    }  # fmt: skip


def judge(result: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Say of each claim what was found, with the default preconditioner."""
    rows, large = result["rows"], result["large"]
    preconditioned = [row for row in rows if row["preconditioner"]]
    ours = [row for row in rows if row["preconditioner"] == "nystrom"]
    double = [row for row in ours if row["dtype"] == "float64"]
    plain = [row["columns"] for row in double if row["inputs"] == "plain"]
    others = [row["columns"] for row in double if row["inputs"] != "plain"]
    unmet = sum(not row["converged"] for row in preconditioned) + (not large["converged"])
    precise = max(row["precise"] for row in ours)
    return [
        verdict(
            "solves that did not converge", "all that are preconditioned, and the large one", unmet, most=0
        ),
        verdict("product columns, float64", "first network, plain pixels", plain[0], most=COLUMNS),
        verdict("product columns, float64, worst", "every network, plain pixels", max(plain), most=COLUMNS),
        verdict("product columns, float64, worst of", "other scalings", max(others), most=COLUMNS),
        verdict("float64 products of float32 systems, worst", "every network", precise, most=PRECISE),
        verdict("peak memory, MB", "the large solve", large["peak_megabytes"], most=MEGABYTES),
    ]


def tables(result: Mapping[str, Any]) -> list[str]:
    """Return product columns, and what the large solve took."""
    large, seeds = result["large"], ", ".join(map(str, result["seeds"]))
    groups: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
    for row in result["rows"]:
        groups.setdefault((row["inputs"], row["dtype"], row["preconditioner"]), []).append(row)

    def each(key: str, failed: str) -> Callable[[Mapping[str, Any]], str]:
        def cell(entry: Mapping[str, Any]) -> str:
            rows: Sequence[Mapping[str, Any]] = entry["rows"]
            if key == "precise" and entry["dtype"] == "float64":
                return "all"
            return " / ".join(str(row[key]) if row["converged"] or not failed else failed for row in rows)

        return cell

    return [
        *table(
            (
                {"inputs": inputs, "dtype": dtype, "name": name or "none", "rows": group}
                for (inputs, dtype, name), group in groups.items()
            ),
            {
                "inputs": "inputs", "products": "dtype", "preconditioner": "name",
                "columns": each("columns", "not met"), "of these float64": each("precise", "-"),
                "to make the preconditioner": each("preconditioner_columns", ""),
            },
            left=3,
            title=f"Product columns to a relative residual of {result['tolerance']:g}, for the networks with "
            f"seeds {seeds}; n = {result['samples']}, relative ridge {result['ridge']:g}, rank "
            f"{result['rank']}. The columns that made the preconditioner are counted apart.",
        ),
        "",
        f"n = {large['samples']:,} by float32 products with nothing dense (tanh 64-{large['width']}-1, "
        f"{large['preconditioner_columns']} columns for the preconditioner): relative residual "
        f"{large['residual']:.1e} after {large['columns']} product columns, {large['precise']} of them "
        f"float64, in {large['seconds']:.0f} s; the process's peak was {large['peak_megabytes']} MB, "
        f"{large['start_megabytes']} MB of them before the solve.",
    ]  # fmt: skip


BENCHMARK = Benchmark("solvers", __doc__, measure, tables, judge)
main = BENCHMARK.main

if __name__ == "__main__":
    sys.exit(main())
