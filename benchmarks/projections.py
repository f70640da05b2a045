"""Projections to k numbers: time against reading the block once, memory, adjoints, bits, and errors.

Run it with ``python benchmarks/projections.py``; see README.md beside it for what is measured and how.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from _measure import Series, environment, interleaved, one_thread, peak_memory, ratio
from _projection_work import (
    MAPS,
    NETWORKS,
    ROWS,
    SPARSE,
    basic_projector,
    block,
    gradients,
    layers,
    make,
    prepare,
    rms_errors,
)
from _tables import fill
from torch import Tensor

from ntkops.projections import Projection

__all__ = ["measure_quality", "measure_times", "run"]

K = 512
SLOW = ("Rademacher", "Gaussian", "Haar")  # timed on a part of the parameters, and scaled up
PART = 500_000
REFERENCE = "BasicProjector"
# What is claimed: (what, map, bound, whether it is the most or the least).
TARGETS = (
    ("passes", "CountSketch", 12.0, "most"),
    ("passes", "SJLT", 45.0, "most"),
    ("speedup", "CountSketch", 100.0, "least"),
    ("speedup", "SJLT", 100.0, "least"),
    ("memory_mb", "CountSketch", 64.0, "most"),
    ("memory_mb", "SJLT", 64.0, "most"),
)
ADJOINT, ERROR = 1e-5, 1.6
EXEMPT = ("RowSample", "LayerKronecker")


def _digits(value: float, count: int = 3) -> float:
    return float(f"{value:.{count}g}")


# time, memory, adjoints, bits


def measure_times(
    params: int, k: int, *, repetitions: int, memory: bool, names: Sequence[str] = tuple(MAPS)
) -> dict[str, Any]:
    """Time the maps on one block of 16 rows, against reading it once.

    Args:
        params: Number P of entries of a row.
        k: Number of entries of the image.
        repetitions: Times that each is timed.
        memory: Whether to start a process for each map's peak memory.
        names: Which maps.

    Returns:
        One entry of the JSON.
    """
    x, shapes = block(params), layers(params)
    part = min(params, PART)
    fast = {name: make(name, shapes, k) for name in names if name not in SLOW}
    slow = {name: make(name, layers(part), k) for name in names if name in SLOW}
    work: dict[str, Callable[[], object]] = {"read": x.sum}
    work |= {name: _bound(projection, x) for name, projection in fast.items()}
    series = interleaved(work, repetitions)
    read = series["read"]
    entries = []
    for name, projection in fast.items():
        found = series[name]
        entries.append(
            {
                "map": name,
                **found.summary(),
                "passes": ratio(found, read)["cpu"],
                "scaled_from": None,
                "memory_mb": peak_memory(prepare, name, params, k) if memory else None,
                **_soundness(projection, x, name in SPARSE),
            }
        )
    for name, projection in slow.items():
        entries.append(_scaled(name, projection, x[:, :part], params, read))
    reference = _reference(x[:, :part], k, params, read)
    for entry in entries:
        entry["speedup"] = _digits(reference["cpu_ms"]["median"] / entry["cpu_ms"]["median"])
    return {
        "params": params,
        "rows": ROWS,
        "k": k,
        "read": {**read.summary(), "bytes": x.numel() * x.element_size()},
        "reference": reference,
        "maps": entries,
    }


def _bound(projection: Projection, x: Tensor) -> Callable[[], object]:
    return lambda: projection.apply(x)


def _once(work: Callable[[], object]) -> Series:
    return interleaved({"work": work}, 1, shortest=0.0)["work"]


def _scale(found: Series, factor: float, read: Series) -> dict[str, Any]:
    scaled = Series([factor * t for t in found.cpu], [factor * t for t in found.wall])
    passes = scaled.cpu[0] / statistics.median(read.cpu)
    return {**scaled.summary(), "passes": {key: _digits(passes, 4) for key in ("median", "min", "max")}}


def _scaled(name: str, projection: Projection, x: Tensor, params: int, read: Series) -> dict[str, Any]:
    """Time a dense map on a part of the parameters: its cost is proportional to their number."""
    setup = None
    if name == "Haar":  # the triangular factor, once
        start = time.process_time()
        projection.apply(x[:1, :1])
        setup = _digits((time.process_time() - start) * params / x.shape[1])
    found = _once(lambda: projection.apply(x))
    return {
        "map": name,
        **_scale(found, params / x.shape[1], read),
        "scaled_from": x.shape[1] if x.shape[1] < params else None,
        "setup_s": setup,
        "memory_mb": None,
        **_soundness(projection, x, False),
    }


def _reference(x: Tensor, k: int, params: int, read: Series) -> dict[str, Any]:
    """Time one block of 100 columns on a part of the parameters, and scale it up."""
    width = min(100, k)
    found = _once(lambda: basic_projector(x, k, width=width, blocks=1))
    factor = params / x.shape[1] * k / width
    return {
        "name": REFERENCE,
        **_scale(found, factor, read),
        "scaled_from": {"params": x.shape[1], "columns": width},
    }


def _soundness(projection: Projection, x: Tensor, sparse: bool) -> dict[str, Any]:
    """Return how far the adjoint is off, and whether chunks give the same bits."""
    generator = torch.Generator().manual_seed(3)
    y = torch.randn(len(x), projection.k, generator=generator)
    image = projection.apply(x)
    pulled = projection.adjoint(y)
    left = (image.double() * y.double()).sum(1)
    # Row after row: a float64 copy of the block would not fit everywhere.
    right = torch.stack([a.double() @ b.double() for a, b in zip(x, pulled, strict=True)])
    scale = torch.linalg.vector_norm(x, dim=1).double() * y.double().norm(dim=1)
    same = None
    if sparse:
        cuts = torch.randint(1, projection.dim, (20,), generator=generator).sort().values.tolist()
        state = projection.start(len(x), x.dtype)
        for a, b in zip([0, *cuts], [*cuts, projection.dim], strict=True):
            projection.accumulate(state, x[:, a:b], a)
        rows = torch.cat([projection.apply(row.unsqueeze(0)) for row in x[:2]])
        same = torch.equal(projection.finish(state), image) and torch.equal(rows, image[:2])
    return {"adjoint": _digits(float(((left - right) / scale).abs().max()), 2), "same_bits": same}


# errors on gradients


def measure_quality(
    network: str,
    k: int,
    *,
    width: int,
    steps: int,
    samples: int,
    seeds: int,
    names: Sequence[str] = tuple(MAPS),
) -> dict[str, Any]:
    """Return root mean square errors of inner products of a trained network's gradients, times √k.

    Args:
        network: Name among `NETWORKS`.
        k: Number of entries of the image.
        width: Width of the network.
        steps: Training steps.
        samples: Samples whose 10 logits are differentiated.
        seeds: Maps of each kind.
        names: Which maps.

    Returns:
        One entry of the JSON.
    """
    x, shapes, accuracy = gradients(network, width=width, steps=steps, samples=samples)
    x = x[torch.linalg.vector_norm(x, dim=1) > 0]
    unit = x / torch.linalg.vector_norm(x, dim=1, keepdim=True)
    cosines = (unit @ unit.mT).square()
    entries = []
    for name in names:
        found = [rms_errors(make(name, shapes, k, seed), x) for seed in range(seeds)]
        entries.append(
            {
                "map": name,
                "off": _digits(math.sqrt(statistics.fmean(f["off"] for f in found))),
                "diagonal": _digits(math.sqrt(statistics.fmean(f["diagonal"] for f in found))),
                "largest": _digits(max(f["largest"] for f in found)),
            }
        )
    return {
        "network": network,
        "params": x.shape[1],
        "gradients": len(x),
        "accuracy": _digits(accuracy),
        "k": k,
        "seeds": seeds,
        "expected_off": _digits(float((1 + cosines).mean().sqrt())),
        "maps": entries,
    }


# the whole


def _judge(times: Mapping[str, Any], quality: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Say what is claimed, what was found, and whether it is held."""
    by_name = {entry["map"]: entry for entry in times["maps"]}
    verdicts = []
    for what, name, bound, kind in TARGETS:
        value = by_name[name][what]
        value = value["median"] if isinstance(value, dict) else value
        held = None if value is None else value <= bound if kind == "most" else value >= bound
        verdicts.append({"what": what, "map": name, kind: bound, "found": value, "held": held})
    for entry in times["maps"]:
        found = entry["adjoint"]
        verdict = {"what": "adjoint", "map": entry["map"], "most": ADJOINT, "found": found}
        verdicts.append({**verdict, "held": found <= ADJOINT})
        if entry["same_bits"] is not None:
            same = entry["same_bits"]
            verdicts.append({"what": "same bits", "map": entry["map"], "found": same, "held": same})
    for case in quality:
        for entry in case["maps"]:
            if entry["map"] not in EXEMPT:
                what, found = f"rms error on {case['network']}", entry["off"]
                verdict = {"what": what, "map": entry["map"], "most": ERROR, "found": found}
                verdicts.append({**verdict, "held": found <= ERROR})
    return verdicts


def run(
    *,
    params: int = 11_000_000,
    quick: bool = False,
    repetitions: int | None = None,
    memory: bool = True,
    say: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Measure everything and return what the JSON file holds.

    Args:
        params: Number P of entries of a row.
        quick: Small sizes: a smoke test, not a measurement.
        repetitions: Times that each map is timed; None for 5, and 1 if quick.
        memory: Whether peak memory is measured.
        say: Told what comes next.

    Returns:
        Environment, options, times, errors, and whether the targets are held.
    """
    started = time.perf_counter()
    count = repetitions or (1 if quick else 5)
    k = 64 if quick else K
    sizes = {"width": 16, "steps": 20, "samples": 4} if quick else {"width": 64, "steps": 600, "samples": 20}
    with one_thread():
        surroundings = environment()
        say(f"times, P = {params:,}")
        times = measure_times(params, k, repetitions=count, memory=memory)
        quality = []
        for network in NETWORKS:
            say(f"errors on gradients, {network}")
            quality.append(measure_quality(network, k, seeds=2 if quick else 8, **sizes))
    return {
        "benchmark": "projections",
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "environment": surroundings,
        "options": {"quick": quick, "repetitions": count, "params": params, "dtype": "float32"},
        "variants": {**MAPS, REFERENCE: "dense signs, blocks of 100 columns drawn again for each call"},
        "times": times,
        "quality": quality,
        "targets": [] if quick else _judge(times, quality),
        "seconds": _digits(time.perf_counter() - started, 4),
    }


def markdown(result: Mapping[str, Any]) -> str:
    """Return the tables of a result in Markdown."""
    place, times = result["environment"], result["times"]
    head = "| Map | CPU ms | reads of the block | faster than BasicProjector | MB | adjoint | same bits |"
    lines = [
        f"Measured on {result['date']}: {place['cpu']} ({place['platform']}, {place['cpu_capability']}), "
        f"{place['threads']} thread, torch {place['torch']}, ntkops {place['ntkops']}, float32, "
        f"{result['options']['repetitions']} repetitions.",
        "",
        f"B = {times['rows']} rows, k = {times['k']}, P = {times['params']:,}; reading the block once takes "
        f"{times['read']['cpu_ms']['median']:.3g} ms of CPU time, BasicProjector "
        f"{times['reference']['cpu_ms']['median'] / 1e3:.3g} s (scaled up from "
        f"{times['reference']['scaled_from']['columns']} columns and "
        f"{times['reference']['scaled_from']['params']:,} parameters).",
        "",
        head,
        "|:--|--:|--:|--:|--:|--:|--:|",
    ]
    for entry in times["maps"]:
        memory = "-" if entry["memory_mb"] is None else f"{entry['memory_mb']:.0f}"
        same = {None: "-", True: "yes", False: "no"}[entry["same_bits"]]
        star = "" if entry["scaled_from"] is None else " *"
        lines.append(
            f"| {entry['map']}{star} | {entry['cpu_ms']['median']:.3g} | {entry['passes']['median']:.3g} | "
            f"{entry['speedup']:.3g} | {memory} | {entry['adjoint']:.1e} | {same} |"
        )
    lines += ["", f"\\* timed on {PART:,} parameters and scaled up.", ""]
    networks = result["quality"]
    lines += [
        "Root mean square errors of inner products of unit gradients, times √k (off the diagonal / squared "
        "lengths / largest off the diagonal):",
        "",
        "| Map | " + " | ".join(f"{case['network']}, P = {case['params']:,}" for case in networks) + " |",
        "|:--|" + "--:|" * len(networks),
    ]
    for rows in zip(*(case["maps"] for case in networks), strict=True):
        cells = [f"{row['off']:.2f} / {row['diagonal']:.2f} / {row['largest']:.1f}" for row in rows]
        lines.append(f"| {rows[0]['map']} | " + " | ".join(cells) + " |")
    missed = [target for target in result["targets"] if target["held"] is False]
    if result["targets"]:
        held = sum(target["held"] is True for target in result["targets"])
        lines += ["", f"Targets held: {held} of {len(result['targets'])}."]
        lines += [f"- missed: {t['what']} of {t['map']}, found {t['found']}" for t in missed]
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--params", type=int, help="entries of a row; 11,000,000 by default")
    parser.add_argument("--quick", action="store_true", help="small sizes: a smoke test, not a measurement")
    parser.add_argument("--repetitions", type=int, help="times that each map is timed")
    parser.add_argument("--no-memory", action="store_true", help="leave peak memory out")
    parser.add_argument("--out", type=Path, help="JSON file to write (none by default)")
    parser.add_argument(
        "--markdown", type=Path, metavar="JSON", help="print a result as Markdown, run nothing"
    )
    parser.add_argument("--page", type=Path, help="with --markdown: put it into this page instead")
    options = parser.parse_args(arguments)
    if options.markdown is not None:
        table = markdown(json.loads(options.markdown.read_text(encoding="utf-8")))
        if options.page is None:
            print(table)
        else:
            page = fill(options.page.read_text(encoding="utf-8"), "projections", table)
            options.page.write_text(page, encoding="utf-8")
        return 0
    result = run(
        params=options.params or (100_000 if options.quick else 11_000_000),
        quick=options.quick,
        repetitions=options.repetitions,
        memory=not options.no_memory,
        say=lambda text: print(text, file=sys.stderr),
    )
    print(markdown(result))
    if options.out is not None:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
