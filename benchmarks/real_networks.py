"""Exact kernels and first products of networks of the sizes that people have, beside torch.func.

Run it with ``python benchmarks/real_networks.py``; docs/real_networks.md explains and shows the result.
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import sys
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from _kernel_peers import layer_hooks
from _measure import environment
from _peers import attention_with_derivatives
from _real_models import REAL_CASES, RealCase
from _tables import fill
from torch import Tensor, nn

import ntkops

__all__ = ["markdown", "measure", "run"]

_CHUNK = 4  # samples that torch.func takes at a time, so that it fits
_COLUMNS = 8
_STATUS, _RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def _resident(what: str) -> float | None:
    try:
        for line in _STATUS.read_text().splitlines():
            if line.startswith(what):
                return int(line.split()[1]) * 1024 / 1e6
    except OSError:
        pass
    return None


def _once(work: Callable[[], Any], device: torch.device) -> tuple[Any, dict[str, float | None]]:
    """Return the result of one call, its seconds (CPU time, or the clock of a device) and its peak in MB."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before: float | None = torch.cuda.memory_allocated() / 1e6
        started = time.perf_counter()
        result = work()
        torch.cuda.synchronize()
        seconds, peak = time.perf_counter() - started, torch.cuda.max_memory_allocated() / 1e6
    else:
        before = _resident("VmRSS")
        if before is not None:
            _RESET.write_text("5")  # the highest resident memory starts anew
        started = time.process_time()
        result = work()
        seconds, peak = time.process_time() - started, _resident("VmHWM") or 0.0
    return result, {
        "seconds": float(f"{seconds:.4g}"),
        "peak_mb": None if before is None else round(peak - before),
    }


def _function(model: nn.Module) -> tuple[Callable[[dict[str, Tensor], Tensor], Tensor], dict[str, Tensor]]:
    free = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    held = {name: p.detach() for name, p in model.named_parameters() if not p.requires_grad}
    held |= dict(model.named_buffers())

    def forward(params: dict[str, Tensor], sample: Tensor) -> Tensor:
        return torch.func.functional_call(model, (params, held), (sample.unsqueeze(0),)).squeeze(0)

    return forward, free


def _contracted(model: nn.Module, x: Tensor, kind: str) -> Tensor:
    """The kernel by vmap over jacrev, some samples at a time, contracted parameter by parameter."""
    forward, params = _function(model)
    with attention_with_derivatives():
        found = torch.func.vmap(torch.func.jacrev(forward), (None, 0), chunk_size=_CHUNK)(params, x)
    total: Tensor | None = None
    for name in list(found):
        rows = found.pop(name).flatten(2)
        if kind == "scalar":
            part = rows.square().sum()
        else:
            flat = rows.flatten(0, 1) if kind == "all" else rows.flatten(1)
            part = flat @ flat.mT
        total = part if total is None else total + part
    assert total is not None
    return total


def _looped(model: nn.Module, x: Tensor, block: Tensor) -> Tensor:
    """K V by a vjp and a jvp for each column."""
    params = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    held = {name: p.detach() for name, p in model.named_parameters() if not p.requires_grad}

    def forward(values: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(model, values | held, (x,)).flatten()

    with attention_with_derivatives():
        _, pull = torch.func.vjp(forward, params)
        return torch.stack([torch.func.jvp(forward, (params,), (pull(v)[0],))[1] for v in block.mT], 1)


def _hooked(model: nn.Module, x: Tensor) -> Tensor:
    """The kernel by NNGeometry, from hooks on layers; it knows linear layers, convolutions and some norms."""
    return layer_hooks(model, x)()


def _curvature(model: nn.Module, x: Tensor, block: Tensor) -> Tensor:
    """K V by the Jacobian operators of curvlinops."""
    from curvlinops import JacobianLinearOperator, TransposedJacobianLinearOperator

    params = [p for p in model.parameters() if p.requires_grad]
    data = [(x, x)]
    sizes = {"check_deterministic": False}
    with attention_with_derivatives():
        pull = TransposedJacobianLinearOperator(model, params, data, **sizes)
        push = JacobianLinearOperator(model, params, data, **sizes)
        return push @ (pull @ block)


def _peer(
    entry: dict[str, Any], name: str, work: Callable[[], Tensor], exact: Tensor, device: torch.device
) -> None:
    """Note what another library takes, or why it takes nothing: it refuses the model, or is wrong on it."""
    try:
        found, taken = _once(work, device)
    except Exception as error:
        entry[name] = {"left_out": (str(error).strip().splitlines() or [type(error).__name__])[0][:120]}
        return
    distance = float((found.double() - exact).norm() / exact.norm())
    if not distance < 1e-2:
        taken = {"left_out": f"differs by {distance:.1g}"}
    entry[name] = taken


def _error(model: nn.Module, x: Tensor, found: Tensor) -> float:
    """Return the relative error of the block of the first two samples against float64."""
    exact = _contracted(
        copy.deepcopy(model).double(), x[:2].double() if x.is_floating_point() else x[:2], "all"
    )
    part = found[: len(exact), : len(exact)].double()
    return float(f"{float((part - exact).norm() / exact.norm()):.2g}")


def _warm_up(device: torch.device, dtype: torch.dtype) -> None:
    """Import, on a network of no size, what is imported with the first kernel of a process."""
    model = nn.Sequential(nn.Linear(2, 2), nn.Tanh(), nn.Linear(2, 1)).to(device, dtype)
    x = torch.ones(2, 2, dtype=dtype, device=device)
    ntkops.ntk(model, x).to_dense()
    _contracted(model, x, "all")
    _looped(model, x, x[:, :1])


def measure(
    case: RealCase, *, quick: bool, device: torch.device, dtype: torch.dtype, peers: bool
) -> dict[str, Any]:
    """Measure one network: making K, its kernel with and without a first check, K V, and the same by hand.

    Args:
        case: The network.
        quick: Take the small one.
        device: Where.
        dtype: Of the network.
        peers: Whether torch.func and the loop of products run, too.

    Returns:
        One entry of the JSON.
    """
    model, x = case.make(quick)
    model = model.to(device, dtype)
    x = x.to(device, dtype) if x.is_floating_point() else x.to(device)
    entry: dict[str, Any] = {
        "model": case.name,
        "title": case.title,
        "samples": len(x),
        "dtype": str(dtype)[6:],
    }
    _warm_up(device, dtype)
    kernel, entry["make"] = _once(lambda: ntkops.ntk(model, x), device)
    entry["parameters"] = kernel.num_parameters
    with torch.no_grad():
        dense, entry["dense"] = _once(kernel.to_dense, device)
        entry["error"] = _error(model, x, dense)
        kernel.free()
        _, entry["dense again"] = _once(kernel.to_dense, device)  # its batch is known: no check
        kernel.free()
        traced = ntkops.ntk(model, x, outputs="trace")
        _, entry["trace"] = _once(traced.to_dense, device)
        _, entry["scalar"] = _once(lambda: ntkops.trace(kernel, method="exact"), device)
        fresh = ntkops.ntk(model, x)
        block = torch.randn(len(dense), _COLUMNS, dtype=dtype, device=device)
        product, entry["K V"] = _once(lambda: fresh @ block, device)
    if peers:
        for kind, name in (("all", "dense"), ("trace", "trace"), ("scalar", "scalar")):
            found, entry[f"torch.func {name}"] = _once(lambda kind=kind: _contracted(model, x, kind), device)
            if kind == "all":
                exact = found.double()
                wanted = exact @ block.double()
                entry["agreement"] = float(f"{float((product - wanted).norm() / wanted.norm()):.2g}")
            del found
        _, entry["loop K V"] = _once(lambda: _looped(model, x, block), device)
        _peer(entry, "nngeometry dense", lambda: _hooked(model, x), exact, device)
        _peer(entry, "curvlinops K V", lambda: _curvature(model, x, block), wanted, device)
    return entry


def run(
    models: Sequence[str] = tuple(REAL_CASES),
    *,
    quick: bool = False,
    device: str = "cpu",
    dtypes: Sequence[str] = ("float32",),
    seconds: float = float("inf"),
    say: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Measure networks until the time is up, and return what the JSON file holds."""
    started, place = time.perf_counter(), torch.device(device)
    torch.set_num_threads(1)
    entries: list[dict[str, Any]] = []
    left_out: list[str] = []
    for dtype in dtypes:
        for name in models:
            if time.perf_counter() - started > seconds:
                left_out.append(f"{name} {dtype}")
                continue
            say(f"{name}, {dtype}")
            kind = getattr(torch, dtype)
            entries.append(
                measure(REAL_CASES[name], quick=quick, device=place, dtype=kind, peers=kind == torch.float32)
            )
    return {
        "benchmark": "real_networks",
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "environment": environment(),
        "options": {
            "quick": quick,
            "device": device,
            "dtypes": list(dtypes),
            "chunk": _CHUNK,
            "columns": _COLUMNS,
        },
        "entries": entries,
        "left_out": left_out,
        "seconds": round(time.perf_counter() - started, 1),
    }


def _seconds(taken: dict[str, Any] | None) -> str:
    if taken is None:
        return "-"
    if "left_out" in taken:
        return "wrong" if taken["left_out"].startswith("differs") else "refused"
    return f"{taken['seconds']:.3g}"


def markdown(result: dict[str, Any]) -> str:
    """Return the table of a result."""
    lines = [
        "| network | N | P | K made | dense, first (again) | torch.func | ratio with, without making K "
        "| peak MB | torch.func | error | traced ratio | exact trace | NNGeometry, dense "
        "| K V, first: s (MB) | loop | curvlinops |",
        "|:--|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for entry in result["entries"]:
        func, loop = entry.get("torch.func dense"), entry.get("loop K V")
        make, dense, again = (entry[key]["seconds"] for key in ("make", "dense", "dense again"))
        shown = ["-"] * 6
        if func and loop:
            seconds = func["seconds"]
            traced = entry["torch.func trace"]["seconds"] / entry["trace"]["seconds"]
            shown = [
                f"{seconds:.3g}",
                f"{seconds / (make + dense):.2f}, {seconds / again:.2f}",
                f"{func['peak_mb']}",
                f"{traced:.2f}",
                f"{entry['torch.func scalar']['seconds'] / entry['scalar']['seconds']:.2f}",
                f"{loop['seconds']:.3g}",
            ]
        product = entry["K V"]
        cells = [
            f"{entry['title']} ({entry['dtype']})",
            str(entry["samples"]),
            f"{entry['parameters']:,}",
            f"{make:.3g}",
            f"{dense:.3g} ({again:.3g})",
            *shown[:2],
            str(entry["dense"]["peak_mb"]),
            shown[2],
            f"{entry['error']:.1e}",
            *shown[3:5],
            _seconds(entry.get("nngeometry dense")),
            f"{product['seconds']:.3g} ({product['peak_mb']})",
            shown[5],
            _seconds(entry.get("curvlinops K V")),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    names = tuple(REAL_CASES)
    parser.add_argument("--models", nargs="+", choices=names, default=names, help="which networks")
    parser.add_argument("--quick", action="store_true", help="small sizes: a smoke test, not a measurement")
    parser.add_argument("--device", default="cpu", help="cpu, or cuda")
    parser.add_argument("--dtypes", nargs="+", default=["float32"], choices=["float32", "bfloat16"])
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin no network after so many")
    parser.add_argument("--out", type=Path, help="JSON file to write (none by default)")
    parser.add_argument("--markdown", type=Path, metavar="JSON", help="print a result, run nothing")
    parser.add_argument("--page", type=Path, help="with --markdown: put the table into this page")
    options = parser.parse_args(arguments)
    if options.markdown is not None:
        text = markdown(json.loads(options.markdown.read_text(encoding="utf-8")))
        print(text)
        if options.page is not None:
            page = options.page.read_text(encoding="utf-8")
            options.page.write_text(fill(page, "real_networks", text + "\n"), encoding="utf-8")
        return 0
    result = run(
        options.models,
        quick=options.quick,
        device=options.device,
        dtypes=options.dtypes,
        seconds=options.seconds,
        say=lambda text: print(text, file=sys.stderr, flush=True),
    )
    print(markdown(result))
    if options.out is not None:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
