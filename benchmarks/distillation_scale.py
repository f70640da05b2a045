"""The distilled chain and its routes at a hundred thousand samples: peak memory and processor time.

Run it with ``python benchmarks/distillation_scale.py --data mnist10k.npz --out
benchmarks/results/distillation_scale.json``; ``--markdown FILE`` prints the tables of a stored result, with
``--page docs/scale.md`` into the page.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _measure import Clock, cores, environment, launch, memory_mb, settle
from _tables import fill
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import ntkops
from ntkops.distill import chain, local_global, select, synthesize
from ntkops.errors import DenseMemoryError

__all__ = ["chain_at", "main", "routes_at"]

FEATURES, GRADIENTS, TEST = 240, 60, 2000
LIMIT_MB, LIMIT_CPU = 2000.0, 900.0
_TIMEOUT = 7200  # seconds after which a process is given up

Row = dict[str, Any]


def network() -> nn.Sequential:
    """Return a convolutional network with mean pooling and 2,410 parameters."""
    return nn.Sequential(
        nn.Conv2d(1, 6, 3, 2, 1), nn.ReLU(), nn.Conv2d(6, 36, 3, 2, 1), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(36, 10),
    )  # fmt: skip


def images(path: str | None, count: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return training images, shifted by up to two pixels, their classes, test images and their classes."""
    generator = torch.Generator().manual_seed(0)
    if path is None:
        x, y = torch.rand(600, 1, 28, 28, generator=generator), torch.arange(600) % 10
    else:
        with np.load(path) as found:
            x = torch.from_numpy(found["images"]).float().unsqueeze(1) / 255
            y = torch.from_numpy(found["labels"]).long()
    test = min(TEST, len(x) // 5)
    own, classes = x[:-test], y[:-test]
    chosen = torch.arange(count) % len(own)
    shifts = torch.randint(-2, 3, (count, 2), generator=generator)
    shifts[: len(own)] = 0
    made = torch.empty(count, 1, 28, 28)
    for shift in shifts.unique(dim=0):
        here = (shifts == shift).all(-1)
        made[here] = torch.roll(own[chosen[here]], tuple(shift.tolist()), (2, 3))
    return made, classes[chosen], x[-test:], y[-test:]


def trained(x: Tensor, y: Tensor, epochs: int) -> nn.Module:
    """Return the network, trained by Adam with a one-cycle rate."""
    torch.manual_seed(0)
    model = network()
    steps = max(1, epochs * -(-len(x) // 64))
    optimiser = torch.optim.Adam(model.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 2e-2, total_steps=steps)
    for _ in range(epochs):
        for some in torch.randperm(len(x)).split(64):
            optimiser.zero_grad()
            cross_entropy(model(x[some]), y[some]).backward()
            optimiser.step()
            schedule.step()
    return model.eval()


class _Watch(threading.Thread):
    """The largest anonymous memory while it runs: what is in files the system may write and drop."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.most, self._done = memory_mb("RssAnon"), threading.Event()

    def run(self) -> None:
        while not self._done.wait(0.01):
            now = memory_mb("RssAnon")
            self.most = None if now is None or self.most is None else max(self.most, now)

    def stop(self) -> float | None:
        self._done.set()
        self.join()
        return self.most


def measured(work: Callable[[], Any]) -> tuple[Any, Row]:
    """Return what work has found, its peaks above what was resident before (all, anonymous), its times."""
    before, anonymous = settle(), memory_mb("RssAnon")
    watch, clock = _Watch(), Clock()
    watch.start()
    found = work()
    times, most, peak = clock.read(), watch.stop(), memory_mb()
    above = None if peak is None or before is None else round(peak - before, 1)
    beside = None if most is None or anonymous is None else round(most - anonymous, 1)
    return found, {"peak_mb": above, "anonymous_mb": beside, "inputs_and_model_mb": before, **times}


def _scene(path: str | None, count: int, epochs: int) -> tuple[nn.Module, tuple[Tensor, ...], int]:
    x, y, x_test, y_test = images(path, count)
    first = min(8000, count)
    model = trained(x[:first], y[:first], epochs)
    k = min(FEATURES, count // 4)
    # A first run loads what is loaded once.
    few = max(200, 4 * GRADIENTS)
    chain(model, x[:few], x_test[:10], projection=20, gradients=_distil, baseline="projected", ablate=False)
    return model, (x, x_test, y_test), k


def _distil(K: Any, Y: Tensor) -> Any:
    count = min(GRADIENTS, K.shape[-1] // 2)
    return synthesize(K, count, "krylov", Y=Y, generator=torch.Generator().manual_seed(0))


def chain_at(path: str | None, count: int, epochs: int, memmap: bool) -> Row:
    """Measure the chain that starts from projected gradients, end to end."""
    model, (x, x_test, y_test), k = _scene(path, count, epochs)
    with tempfile.TemporaryDirectory() as folder:
        report, costs = measured(
            lambda: chain(
                model, x, x_test, y_test, projection=k, gradients=_distil, baseline="projected",
                ablate=False, memmap=folder if memmap else None,
            )
        )  # fmt: skip
        with torch.no_grad():
            accuracy = float((model(x_test).argmax(-1) == y_test).double().mean())
    runs = [
        {
            "stages": list(run.stages),
            "fidelity": round(run.fidelity, 4),
            "accuracy": round(run.accuracy, 4),
            "steps": {step.name: round(step.seconds, 1) for step in run.steps},
        }
        for run in report.stages
    ]
    return {
        "n": count, "k": k, "s": report.distilled.num_gradients, "memmap": memmap,
        "parameters": sum(p.numel() for p in model.parameters()),
        "features_mb": round(10 * count * k * 4 / 1e6, 1), "network_accuracy": round(accuracy, 4),
        "runs": runs, **costs,
    }  # fmt: skip


def routes_at(path: str | None, count: int, epochs: int, out: str) -> list[Row]:
    """Measure every route on projected kernels, and what is refused without, writing each row to a file."""
    model, (x, _, _), k = _scene(path, count, epochs)
    K = ntkops.ntk(model, x, outputs="each", max_dense_bytes=2**31)
    P = ntkops.projected_ntk(K, k, generator=torch.Generator().manual_seed(0), max_dense_bytes=2**31)
    _, making = measured(P.features)
    with torch.no_grad():
        Y = torch.cat([model(part) for part in x.split(1000)])
    s = min(100, count // 4)
    thresholds = (10, 0.5, 0.5)

    def chosen(method: Any) -> Callable[[], Any]:
        return lambda: select(P, s, method, generator=torch.Generator().manual_seed(0))

    ways: dict[str, Callable[[], Any]] = {
        **{name: chosen(name) for name in ("random", "fps", "rpcholesky", "leverage", "kmedoids")},
        "algorithm 1": lambda: local_global(P, Y, *thresholds, generator=torch.Generator().manual_seed(0)),
        "krylov": lambda: _distil(P, Y),
        "ridge regression": lambda: ntkops.KernelRidge(1e-4).fit(P, Y),
        "distilled regression": lambda: chosen("random")().fit(P, Y),
    }
    rows: list[Row] = []

    def keep(route: str, costs: Row) -> None:
        rows.append({"route": route, "n": count, **costs})
        Path(out).write_text(json.dumps(rows), encoding="utf-8")

    keep("features", making)
    for name in ("leverage", "kmedoids"):  # without features: refused, and nothing done
        keep(f"{name}, not projected", _refused(K, s, name))
    for name, way in ways.items():
        keep(name, measured(way)[1])
    return rows


def _refused(K: Any, s: int, name: Any) -> Row:
    def work() -> str | None:
        try:
            select(K, s, name)
        except DenseMemoryError as error:
            return str(error)
        return None

    message, costs = measured(work)
    return {**costs, "refused": message}


def run(path: str | None, sizes: Sequence[int], epochs: int, parts: Sequence[str]) -> Row:
    """Measure every part in a fresh process on one core."""
    found: Row = {"benchmark": "distillation_scale", "data": path is not None, "environment": environment()}
    if "chain" in parts:
        found["chain"] = [_alone(chain_at, path, count, epochs, False) for count in sizes]
        found["chain"].append(_alone(chain_at, path, sizes[-1], epochs, True))
    if "routes" in parts:
        found["routes"] = _routes(path, sizes[-1], epochs)
    return found


def _routes(path: str | None, count: int, epochs: int) -> list[Row]:
    """Return the rows of all routes, or of those that were done when time was up."""
    with tempfile.TemporaryDirectory() as folder:
        kept = Path(folder) / "routes.json"
        try:
            _alone(routes_at, path, count, epochs, str(kept))
        except RuntimeError:
            if not kept.exists():
                raise
        rows: list[Row] = json.loads(kept.read_text(encoding="utf-8"))
        return rows


def _alone(job: Callable[..., Any], *arguments: Any) -> Any:
    return launch(job, cores(1)[-1:], *arguments, group=False, timeout=_TIMEOUT)[0]


def met(found: Row) -> dict[str, bool]:
    """Return whether each bar is met."""
    last = [row for row in found["chain"] if not row["memmap"]][-1]
    held = {
        "the chain's peak above inputs, at most 2 GB": last["peak_mb"] is not None
        and last["peak_mb"] <= LIMIT_MB,
        "its processor time, at most 15 minutes": last["cpu_s"] <= LIMIT_CPU,
    }
    for row in found["chain"]:
        if row["memmap"] and row.get("anonymous_mb") is not None:
            what = f"n = {row['n']:,}, features in a file: memory that is in no file, at most 2 GB"
            held[what] = row["anonymous_mb"] <= LIMIT_MB
    for row in found.get("routes", []):
        what = "refused before any work" if "refused" in row else "at most 2 GB above the features"
        below = row["peak_mb"] is not None and row["peak_mb"] <= LIMIT_MB
        held[f"{row['route']}: {what}"] = below and row.get("refused", True) is not None
    return held


def tables(found: Row) -> str:
    """Return the tables of a result in Markdown."""
    lines = [
        "| n | features | kept in | peak above inputs | of it in no file | CPU | fidelity | and distilled |",
        "|--:|--:|:--|--:|--:|--:|--:|--:|",
    ]
    for row in found["chain"]:
        first, last = row["runs"][0], row["runs"][-1]
        place = "a file" if row["memmap"] else "memory"
        lines.append(
            f"| {row['n']:,} | {row['features_mb']:.0f} MB | {place} | {row['peak_mb']:.0f} MB | "
            f"{_anonymous(row)} | {row['cpu_s']:.0f} s | {first['fidelity']:.3f} | {last['fidelity']:.3f} |"
        )
    if "routes" in found:
        lines += ["", "| route | n | peak beside the features | CPU |", "|:--|--:|--:|--:|"]
    for row in found.get("routes", []):
        said = "refused" if "refused" in row else f"{row['cpu_s']:.0f} s"
        lines.append(f"| {row['route']} | {row['n']:,} | {row['peak_mb']:.0f} MB | {said} |")
    return "\n".join(lines)


def _anonymous(row: Row) -> str:
    """Return the peak of anonymous memory, where it was measured."""
    known = row.get("anonymous_mb")
    return "-" if known is None else f"{known:.0f} MB"


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, or print what was measured; 1 where a bar is missed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", help="an .npz file with images and labels; noise without")
    parser.add_argument("--sizes", type=int, nargs="+", default=[20_000, 100_000])
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--parts", nargs="+", choices=("chain", "routes"), default=["chain", "routes"])
    parser.add_argument("--out", type=Path, help="JSON file; parts that are not measured are kept")
    parser.add_argument("--markdown", type=Path, help="print the tables of a stored result")
    parser.add_argument("--page", type=Path, help="with --markdown: the page to put them into")
    options = parser.parse_args(arguments)
    if options.markdown is not None:
        text = tables(json.loads(options.markdown.read_text(encoding="utf-8")))
        print(text)
        if options.page is not None:
            page = fill(options.page.read_text(encoding="utf-8"), "distillation_scale", f"{text}\n")
            options.page.write_text(page, encoding="utf-8")
        return 0
    found = run(options.data, options.sizes, options.epochs, options.parts)
    if options.out is not None and options.out.exists():
        found = {**json.loads(options.out.read_text(encoding="utf-8")), **found}
    found["met"] = met(found)
    print(tables(found))
    if options.out is not None:
        options.out.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return 0 if all(found["met"].values()) else 1


if __name__ == "__main__":
    sys.exit(main())
