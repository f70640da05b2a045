"""Product columns that solving (K + ridge) x = b takes, and the memory of a large lazy solve.

Run it with ``python benchmarks/solvers.py``; see README.md beside it for what is measured and how.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from _measure import environment, one_thread
from torch import Tensor, nn

import ntkops
from ntkops.operators import RidgeOperator

__all__ = ["columns_of", "large_solve", "problem", "run"]

RESULTS = Path(__file__).parent / "results" / "solvers.json"
RIDGE = 1e-4  # times the mean diagonal
TOLERANCE = 1e-6
TARGETS = {"columns": 75, "precise": 8, "megabytes": 1000}
SEEDS = (0, 1, 2)
INPUTS = {"standardised": "every pixel with mean 0 and variance 1", "plain": "pixels in [0, 1]"}


def digits(count: int, inputs: str) -> tuple[Tensor, Tensor]:
    """Return images of digits and labels ±1, whether the digit is odd."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    x = torch.from_numpy(images)
    x = (x - x.mean(0)) / x.std(0).clamp(min=1e-8) if inputs == "standardised" else x / 16
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))[:count]
    return x[order], (torch.from_numpy(labels)[order] % 2 * 2 - 1).double()


def network(seed: int, width: int = 128) -> nn.Sequential:
    """Return ReLU 64-width-width-1 with torch's usual initial distribution."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Linear(64, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 1)
        ).double()


def problem(inputs: str, seed: int, dtype: torch.dtype, count: int) -> tuple[RidgeOperator, Tensor]:
    """Return K + ridge and a right-hand side.

    Products use the dense block once that has been built: what is counted here are columns.
    """
    x, y = digits(count, inputs)
    kernel = ntkops.ntk(network(seed).to(dtype), x.to(dtype))
    kernel.to_dense()
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
                    "inputs": inputs,
                    "seed": seed,
                    "dtype": str(dtype).removeprefix("torch."),
                    "preconditioner": name,
                    "converged": info.converged,
                    "residual": float(info.residuals.max()),
                    "columns": info.products,
                    "precise": info.precise_products,
                    "preconditioner_columns": info.preconditioner_products,
                }
            )
            print(rows[-1])
    return rows


def large_solve(count: int, width: int = 16, rank: int = 100) -> dict[str, Any]:
    """Solve once with nothing dense, in this process, and return what it took and the peak memory."""
    import resource

    generator = torch.Generator().manual_seed(0)
    x = torch.randn(count, 64, generator=generator)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(64, width), nn.Tanh(), nn.Linear(width, 1))
    kernel = ntkops.ntk(model, x, max_dense_bytes=0)
    ridge = 1e-2 * float(kernel.diagonal().mean())
    operator = RidgeOperator(kernel, ridge).with_solver(method="refinement", rank=rank)
    y = torch.sin(x.sum(1))
    _, info = operator.solve_with_info(y, raise_on_failure=False)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6
    return {
        "samples": count,
        "converged": info.converged,
        "residual": float(info.residuals.max()),
        "columns": info.products,
        "preconditioner_columns": info.preconditioner_products,
        "peak_megabytes": round(peak),
        "seconds": round(info.seconds, 1),
    }


def in_a_process(count: int) -> dict[str, Any]:
    """Run `large_solve` in a fresh process, whose peak memory is then its own."""
    command = [sys.executable, __file__, "--large-only", str(count)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def run(quick: bool) -> dict[str, Any]:
    """Measure everything."""
    count, rank, seeds = (120, 24, SEEDS[:1]) if quick else (1000, 200, SEEDS)
    rows = [row for inputs in INPUTS for seed in seeds for row in columns_of(inputs, seed, count, rank)]
    large = in_a_process(400 if quick else 20_000)
    print(large)
    claimed = [row for row in rows if row["preconditioner"] and row["inputs"] == "standardised"]
    return {
        "environment": environment(),
        "quick": quick,
        "inputs": INPUTS,
        "ridge": RIDGE,
        "tolerance": TOLERANCE,
        "rows": rows,
        "large": large,
        "targets": TARGETS,
        "met": {
            "converged": all(row["converged"] for row in claimed),
            "columns": all(row["columns"] <= TARGETS["columns"] for row in claimed),
            "precise": all(row["precise"] <= TARGETS["precise"] for row in claimed),
            "megabytes": large["converged"] and large["peak_megabytes"] <= TARGETS["megabytes"],
        },
    }


def main() -> None:
    """Measure, print and store."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="small sizes: shows that it runs")
    parser.add_argument("--out", type=Path, default=None, help="JSON file to write")
    parser.add_argument("--large-only", type=int, default=None, help="only the large solve, of this size")
    options = parser.parse_args()
    if options.large_only is not None:
        print(json.dumps(large_solve(options.large_only)))
        return
    with one_thread():
        result = run(options.quick)
    print(json.dumps(result["met"]))
    if options.out is not None:
        options.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
