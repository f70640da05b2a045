"""Product columns that solving (K + ridge) x = b takes, and the memory of a large lazy solve.

Run it with ``python benchmarks/solvers.py``; docs/solvers.md explains and shows the result.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from _measure import environment, one_thread
from _solver_tables import judge, markdown
from _tables import fill
from torch import Tensor, nn

import ntkops
from ntkops.operators import RidgeOperator

__all__ = ["columns_of", "digits", "large_solve", "network", "problem", "run"]

RIDGE = 1e-4  # times the mean diagonal
TOLERANCE = 1e-6
TARGETS = {"columns": 75, "precise": 8, "megabytes": 1000}
SEEDS = (0, 1, 2)
INPUTS = {
    "plain": "pixels in [0, 1]",
    "standardised": "every pixel with mean 0 and variance 1",
    "normalised": "every image of length 1",
}


def digits(count: int, inputs: str) -> tuple[Tensor, Tensor]:
    """Return images of digits and labels ±1, whether the digit is odd."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    x = torch.from_numpy(images)
    if inputs == "standardised":
        x = (x - x.mean(0)) / x.std(0).clamp(min=1e-8)
    elif inputs == "normalised":
        x = x / x.norm(dim=1, keepdim=True)
    else:
        x = x / 16
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
            print(json.dumps(rows[-1]))
    return rows


def large_solve(count: int, width: int = 16, rank: int = 100) -> dict[str, Any]:
    """Solve once with nothing dense, in this process, and return what it took and the peak memory."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(count, 64, generator=generator)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(64, width), nn.Tanh(), nn.Linear(width, 1))
    kernel = ntkops.ntk(model, x, max_dense_bytes=0)
    ridge = 1e-2 * float(kernel.diagonal().mean())
    operator = RidgeOperator(kernel, ridge).with_solver(method="refinement", rank=rank)
    y = torch.sin(x.sum(1))
    start = _peak_megabytes()
    _, info = operator.solve_with_info(y, raise_on_failure=False)
    return {
        "samples": count,
        "width": width,
        "converged": info.converged,
        "residual": float(info.residuals.max()),
        "columns": info.products,
        "precise": info.precise_products,
        "preconditioner_columns": info.preconditioner_products,
        "start_megabytes": round(start),
        "peak_megabytes": round(_peak_megabytes()),
        "seconds": round(info.seconds, 1),
    }


def _peak_megabytes() -> float:
    """Return the highest resident memory of this process so far."""
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6


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
    print(json.dumps(large))
    return {
        "benchmark": "solvers",
        "environment": environment(),
        "quick": quick,
        "inputs": INPUTS,
        "samples": count,
        "rank": rank,
        "seeds": list(seeds),
        "ridge": RIDGE,
        "tolerance": TOLERANCE,
        "rows": rows,
        "large": large,
        "targets": TARGETS,
        "met": judge(rows, large, TARGETS),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, or print the tables of a stored result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="small sizes: shows that it runs")
    parser.add_argument("--out", type=Path, default=None, help="JSON file to write")
    parser.add_argument("--large-only", type=int, default=None, help="only the large solve, of this size")
    parser.add_argument("--markdown", type=Path, default=None, help="print the tables of this JSON")
    parser.add_argument("--page", type=Path, default=None, help="with --markdown: put them into this page")
    options = parser.parse_args(arguments)
    if options.markdown is not None:
        text = markdown(json.loads(options.markdown.read_text(encoding="utf-8")))
        if options.page is None:
            print(text, end="")
        else:
            page = options.page.read_text(encoding="utf-8")
            options.page.write_text(fill(page, "solvers", text), encoding="utf-8")
        return 0
    with one_thread():
        if options.large_only is not None:
            print(json.dumps(large_solve(options.large_only)))
            return 0
        result = run(options.quick)
    print(markdown(result))
    if options.out is not None:
        options.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
