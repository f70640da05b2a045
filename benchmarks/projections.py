"""Projections to k numbers: time, memory, adjoints, bits, and errors (docs/rooms/projections.md)."""

from __future__ import annotations

import argparse
import math
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from _measure import Series, digits, interleaved, peak_memory, ratio
from _models import cnn, digit_images, mlp, normal, seeded
from _tables import Benchmark, say, table, verdict
from torch import Generator, Tensor, nn

import ntkops
from ntkops import projections
from ntkops.projections import Projection

K, ROWS = 512, 16
MAPS = {
    "CountSketch": "cyclic count sketch, one nonzero a column", "SJLT": "four nonzeros a column",
    "SRHT": "blocks of 4096, Hadamard, k rows of each",
    "LayerKronecker": "16 x 32 for each parameter matrix, on gradients that are written down",
    "RowSample": "one entry out of each of k strata", "Rademacher": "dense signs, regenerated block by block",
    "Gaussian": "dense normal variates, regenerated block by block",
    "Haar": "orthogonal rows by Cholesky-QR; its set-up apart",
}  # fmt: skip
SPARSE = ("CountSketch", "SJLT", "RowSample")
SLOW, PART = ("Rademacher", "Gaussian", "Haar"), 500_000  # timed on a part of the parameters, and scaled up
REFERENCE = "BasicProjector"
# What is claimed of CountSketch and SJLT: passes over the block, speed-up, memory.
PASSES = {"CountSketch": 12.0, "SJLT": 45.0}
SPEEDUP, MEMORY_MB, ADJOINT, ERROR = 100.0, 64.0, 1e-5, 1.6
EXEMPT = ("RowSample", "LayerKronecker")  # whose errors depend on the rows


def make(name: str, shapes: Sequence[Sequence[int]], k: int, seed: int = 0) -> Projection:
    """Return a map of all parameters of these shapes."""
    if name == "LayerKronecker":
        rows = 2 ** ((k.bit_length() - 1) // 2)
        return projections.LayerKronecker(shapes, rows, k // rows, seed)
    made: Projection = getattr(projections, name)(sum(math.prod(shape) for shape in shapes), k, seed)
    return made


def layers(params: int) -> list[tuple[int, ...]]:
    """Return shapes of square layers with biases that have about so many entries, and exactly in all."""
    width = max(8, min(1024, math.isqrt(params // 4)))
    shapes: list[tuple[int, ...]] = []
    left = params
    while left >= width * (width + 1):
        shapes += [(width, width), (width,)]
        left -= width * (width + 1)
    return [*shapes, (left,)] if left else shapes


def block(params: int) -> Tensor:
    """Return the rows that everybody projects."""
    return normal(ROWS, params, seed=2)


def prepare(name: str, params: int, k: int) -> Callable[[], object]:
    """Return the work whose memory is measured, after the same on few parameters has loaded the code."""
    make(name, layers(20_000), min(k, 64)).apply(block(20_000))
    projection, x = make(name, layers(params), k), block(params)
    return lambda: projection.apply(x)


def basic_projector(x: Tensor, k: int, seed: int = 0, width: int = 100, blocks: int | None = None) -> Tensor:
    """Project as the BasicProjector of TRAK (Park et al., 2023): signs drawn again for each block."""
    result = x.new_zeros((len(x), k))
    matrix = x.new_empty((x.shape[1], width))
    generator = Generator()
    for number, start in enumerate(range(0, k, width)[:blocks]):
        stop = min(start + width, k)
        generator.manual_seed(seed + 1000 * number)
        matrix.bernoulli_(0.5, generator=generator).mul_(2).sub_(1)
        torch.mm(x, matrix[:, : stop - start], out=result[:, start:stop])
    return result


# time, memory, adjoints, bits


def measure_times(
    params: int, k: int, *, repetitions: int, memory: bool, names: Sequence[str] = tuple(MAPS)
) -> dict[str, Any]:
    """Time the maps on one block of 16 rows, against reading it once; dense ones on a part, scaled up."""
    x, part = block(params), min(params, PART)
    fast = {name: make(name, layers(params), k) for name in names if name not in SLOW}
    slow = {name: make(name, layers(part), k) for name in names if name in SLOW}
    work = {"read": x.sum} | {name: partial(projection.apply, x) for name, projection in fast.items()}
    series = interleaved(work, repetitions)
    read = series["read"]
    entries = []
    for name, projection in fast.items():
        entries.append(
            {
                "map": name, **series[name].summary(), "passes": ratio(series[name], read)["cpu"],
                "scaled_from": None, "memory_mb": peak_memory(prepare, name, params, k) if memory else None,
                **soundness(projection, x, name in SPARSE),
            }
        )  # fmt: skip
    some = x[:, :part]
    for name, projection in slow.items():
        setup = None
        if name == "Haar":  # the triangular factor, once
            start = time.process_time()
            projection.apply(some[:1, :1])
            setup = digits((time.process_time() - start) * params / part)
        entries.append(
            {
                "map": name, **_once(partial(projection.apply, some), params / part, read),
                "scaled_from": part if part < params else None, "setup_s": setup, "memory_mb": None,
                **soundness(projection, some, False),
            }
        )  # fmt: skip
    width = min(100, k)
    piece = partial(basic_projector, some, k, width=width, blocks=1)
    reference = {
        "name": REFERENCE,
        **_once(piece, params / part * k / width, read),
        "scaled_from": {"params": part, "columns": width},
    }
    for entry in entries:
        entry["speedup"] = digits(reference["cpu_ms"]["median"] / entry["cpu_ms"]["median"])
    taken = {**read.summary(), "bytes": x.nbytes}
    return {"params": params, "rows": ROWS, "k": k, "read": taken, "reference": reference, "maps": entries}


def _once(work: Callable[[], object], factor: float, read: Series) -> dict[str, Any]:
    """Time work on a part, to which its cost is proportional."""
    found = interleaved({"work": work}, 1, shortest=0.0)["work"].times(factor)
    passes = found.cpu[0] / statistics.median(read.cpu)
    return {**found.summary(), "passes": {key: digits(passes, 4) for key in ("median", "min", "max")}}


def soundness(projection: Projection, x: Tensor, sparse: bool) -> dict[str, Any]:
    """Return how far the adjoint is off, and whether chunks give the same bits."""
    generator = Generator().manual_seed(3)
    y = torch.randn(len(x), projection.k, generator=generator)
    image, pulled = projection.apply(x), projection.adjoint(y)
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
    return {"adjoint": digits(float(((left - right) / scale).abs().max()), 2), "same_bits": same}


# errors on gradients of trained networks


def _perceptron(width: int) -> nn.Module:
    return mlp(64, width, width, 10, act=nn.ReLU)


def _convolutional(width: int) -> nn.Module:
    return nn.Sequential(nn.Unflatten(1, (1, 8, 8)), *cnn([1, width // 2, width, width], strides=(1, 2, 1)))


NETWORKS = {"mlp": _perceptron, "cnn": _convolutional}


def gradients(
    network: str, *, width: int, steps: int, samples: int
) -> tuple[Tensor, list[tuple[int, ...]], float]:
    """Train a network on digits; return gradients of its logits, shapes of parameters, and its accuracy."""
    images, labels = digit_images()
    images = images.float()
    model = seeded(NETWORKS[network], width)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    generator = Generator().manual_seed(1)
    for _ in range(steps):
        chosen = torch.randint(len(images), (64,), generator=generator)
        loss = nn.functional.cross_entropy(model(images[chosen]), labels[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        accuracy = float((model(images).argmax(1) == labels).float().mean())
    rows = ntkops.jacobian(model, images[:samples], max_dense_bytes=2**34).to_dense()
    return rows, [tuple(p.shape) for p in model.parameters()], accuracy


def _errors(projection: Projection, unit: Tensor) -> dict[str, float]:
    """Return errors of inner products of unit vectors, times √k: mean squares, and the largest."""
    image = projection.apply(unit.float()).double()
    error = (image @ image.mT - unit @ unit.mT) * math.sqrt(projection.k)
    off = error[~torch.eye(len(error), dtype=torch.bool)]
    squares = {"off": float(off.square().mean()), "diagonal": float(error.diagonal().square().mean())}
    return {**squares, "largest": float(off.abs().max())}


def measure_quality(
    network: str, k: int, *, width: int, steps: int, samples: int, seeds: int,
    names: Sequence[str] = tuple(MAPS),
) -> dict[str, Any]:  # fmt: skip
    """Return root mean square errors of inner products of a network's gradients, times √k."""
    x, shapes, accuracy = gradients(network, width=width, steps=steps, samples=samples)
    x = x[torch.linalg.vector_norm(x, dim=1) > 0].double()
    unit = x / x.norm(dim=1, keepdim=True)
    entries = []
    for name in names:
        found = [_errors(make(name, shapes, k, seed), unit) for seed in range(seeds)]
        means = {w: digits(math.sqrt(statistics.fmean(f[w] for f in found))) for w in ("off", "diagonal")}
        entries.append({"map": name, **means, "largest": digits(max(f["largest"] for f in found))})
    return {
        "network": network, "params": x.shape[1], "gradients": len(x), "accuracy": digits(accuracy), "k": k,
        "seeds": seeds, "expected_off": digits(float((1 + (unit @ unit.mT).square()).mean().sqrt())),
        "maps": entries,
    }  # fmt: skip


# the whole


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Measure times and errors."""
    params, k = (100_000, 64) if options.quick else (11_000_000, K)
    width, steps, samples, seeds = (16, 20, 4, 2) if options.quick else (64, 600, 20, 8)
    say(f"times, P = {params:,}")
    times = measure_times(params, k, repetitions=options.repetitions, memory=options.memory)
    quality = []
    for network in NETWORKS:
        say(f"errors on gradients, {network}")
        quality.append(measure_quality(network, k, width=width, steps=steps, samples=samples, seeds=seeds))
    return {
        "options": {"params": params, "dtype": "float32"},
        "variants": {**MAPS, REFERENCE: "dense signs, blocks of 100 columns drawn again for each call"},
        "times": times,
        "quality": quality,
    }


def judge(result: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Say what is claimed, what was found, and whether it is held."""
    maps = result["times"]["maps"]
    own = [entry for entry in maps if entry["map"] in PASSES]
    sparse = [entry for entry in maps if entry["same_bits"] is not None]
    errors = [(case["network"], entry) for case in result["quality"] for entry in case["maps"]]
    return [
        *(verdict("reads of the block", e["map"], e["passes"]["median"], most=PASSES[e["map"]]) for e in own),
        *(verdict(f"times faster than {REFERENCE}", e["map"], e["speedup"], least=SPEEDUP) for e in own),
        *(verdict("peak memory, MB", e["map"], e["memory_mb"], most=MEMORY_MB) for e in own),
        *(verdict("relative error of the adjoint", e["map"], e["adjoint"], most=ADJOINT) for e in maps),
        *(verdict("same bits for any chunks", e["map"], int(e["same_bits"]), least=1) for e in sparse),
        *(
            verdict("rms error, times √k", f"{e['map']} on {network}", e["off"], most=ERROR)
            for network, e in errors
            if e["map"] not in EXEMPT
        ),
    ]


def tables(result: Mapping[str, Any]) -> list[str]:
    """Return times, and errors on gradients."""
    times, networks = result["times"], result["quality"]
    part = times["reference"]["scaled_from"]
    errors = [
        {"map": rows[0]["map"]}
        | {
            case["network"]: f"{row['off']:.2f} / {row['diagonal']:.2f} / {row['largest']:.1f}"
            for case, row in zip(networks, rows, strict=True)
        }
        for rows in zip(*(case["maps"] for case in networks), strict=True)
    ]
    return [
        "",
        f"B = {times['rows']} rows, k = {times['k']}, P = {times['params']:,}; reading the block once takes "
        f"{times['read']['cpu_ms']['median']:.3g} ms of CPU time, BasicProjector "
        f"{times['reference']['cpu_ms']['median'] / 1e3:.3g} s (scaled up from {part['columns']} columns and "
        f"{part['params']:,} parameters).",
        *table(
            times["maps"],
            {
                "Map": lambda e: f"{e['map']}{'' if e['scaled_from'] is None else ' *'}",
                "CPU ms": "cpu_ms.median", "reads of the block": "passes.median",
                "faster than BasicProjector": "speedup", "MB": "memory_mb:.0f", "adjoint": "adjoint:.1e",
                "same bits": "same_bits",
            },
        ),
        "", f"\\* timed on {part['params']:,} parameters and scaled up.",
        *table(
            errors,
            {"Map": "map", **{f"{c['network']}, P = {c['params']:,}": c["network"] for c in networks}},
            title="Root mean square errors of inner products of unit gradients, times √k (off the diagonal / "
            "squared lengths / largest off the diagonal):",
        ),
    ]  # fmt: skip


BENCHMARK = Benchmark("projections", __doc__, measure, tables, judge, repetitions=(5, 1), memory=True)
main = BENCHMARK.main

if __name__ == "__main__":
    sys.exit(main())
