"""The workloads of the cost sheet, the machines that are assumed, and the model held to what was measured."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from _scale_costs import (
    Machine,
    Workload,
    assumptions,
    gradients,
    held_product,
    sheet,
    sketch,
    stratified_trace,
)
from _scale_flops import count_operations, resnet50
from _scale_process import alone, cores, launch
from _scale_stream import BATCH, SKETCH_COLUMNS
from _scale_work import CLASSES, network, samples

from ntkops.engines.cost import LayerShape, product_costs
from ntkops.vectors import Distribution, Space

__all__ = ["cost_sheets", "lora_1b", "measure_machine", "resnet50_on_imagenet", "validate"]

_FRACTION = 0.4
_FP32, _BF16 = 67e12, 989e12
_RANK, _TOKENS = 16, 512


def resnet50_on_imagenet() -> Workload:
    """Return ResNet-50 on 1.28 million images, 1000 outputs, in float32; operations are counted by torch."""
    counted = count_operations(resnet50(), torch.empty(1, 3, 224, 224, device="meta"))
    return Workload(
        title="ResNet-50, 1.28 M images 3 x 224 x 224, 1000 outputs, all parameters, float32",
        samples=1_280_000,
        outputs=1000,
        parameters=counted["parameters"],
        forward=counted["forward"],
        pull=counted["pull"],
        push=counted["push"],
        kept_bytes=counted["kept_bytes"],
        weight_bytes=4 * counted["parameters"],
    )


def lora_1b() -> Workload:
    """Return a language model of 1.2 billion parameters with adapters, one loss a sequence; by formula.

    16 layers of width 2048, 32 heads of which keys and values share 8, gated feed-forward of 8192, a
    vocabulary of 128,256; adapters of rank 16 on all seven matrices of a layer.
    """
    layers, width, inner, shared, words, heads = 16, 2048, 8192, 512, 128_256, 32
    shapes = [(width, width)] * 2 + [(width, shared)] * 2 + [(width, inner)] * 3
    frozen = layers * sum(a * b for a, b in shapes) + words * width
    adapters = layers * sum(_RANK * (a + b) for a, b in shapes)
    attention = 4.0 * layers * _TOKENS**2 * width
    dense, own = 2.0 * _TOKENS * frozen, 2.0 * _TOKENS * adapters
    kept = layers * (34 * _TOKENS * width + 5 * heads * _TOKENS**2) + 6 * _TOKENS * words
    return Workload(
        title=f"1.2 B-parameter language model, LoRA of rank {_RANK}, 50,000 sequences of {_TOKENS} tokens, "
        "one loss a sequence, bfloat16 products, float32 vectors",
        samples=50_000,
        outputs=1,
        parameters=adapters,
        forward=dense + own + attention,
        pull=dense + 2 * own + 2 * attention,
        push=dense + 2 * own + 2 * attention,
        kept_bytes=kept,
        weight_bytes=2.0 * (frozen + adapters),
        batch=2,
    )


def _gpu(peak: float, title: str, drawing: float) -> Machine:
    """Return 80 GB devices, eight of them in a node."""
    wires = {1: float("inf"), 8: 300e9}
    return Machine(
        title=title,
        rate=_FRACTION * peak,
        bandwidth=0.7 * 3.35e12,
        memory=80e9,
        wire=lambda ranks: wires.get(ranks, 40e9),
        latency=10e-6,
        drawing=drawing,
    )


def cost_sheets(drawing: float) -> list[dict[str, Any]]:
    """Return the sheets of both workloads.

    Args:
        drawing: Seconds of a random number, as measured.
    """
    pairs = (
        (resnet50_on_imagenet(), _gpu(_FP32, "80 GB GPU, float32", drawing)),
        (lora_1b(), _gpu(_BF16, "80 GB GPU, bfloat16", drawing)),
    )
    return [
        {
            "workload": vars(work),
            "machine": {**assumptions(machine), "fraction": _FRACTION, "wire": {"8": 300e9, "64": 40e9}},
            "rows": sheet(work, machine),
        }
        for work, machine in pairs
    ]


# this machine


def _rates(rank: int, count: int, seconds: float) -> dict[str, float]:
    """Return the operations a second that plain backward passes reach, all ranks at once."""
    found = {}
    for name in ("cnn", "mlp"):
        model, x = network(name), samples(name, BATCH)[0:BATCH]
        counted = count_operations(model, x[:1])
        dist.barrier()
        began, steps = time.perf_counter(), 0
        while time.perf_counter() - began < seconds:
            torch.autograd.grad(model(x).sum(), list(model.parameters()))
            steps += 1
        spent = time.perf_counter() - began
        found[name] = steps * BATCH * (counted["forward"] + counted["pull"]) / spent
    return found


def _drawing(quick: bool) -> dict[str, float]:
    """Return the seconds of one random number of each distribution."""
    count = 2**18 if quick else 2**22
    space, generator = Space(count, torch.float32), torch.Generator().manual_seed(0)
    found: dict[str, float] = {}
    kinds: tuple[Distribution, ...] = ("rademacher", "sphere")
    for kind in kinds:
        times = []
        for _ in range(3):
            began = time.perf_counter()
            space.probes(1, generator, kind)
            times.append((time.perf_counter() - began) / count)
        found[kind] = float(f"{statistics.median(times):.3g}")
    return found


def measure_machine(quick: bool, ranks: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return what the model needs to know of this machine.

    Args:
        quick: Few repetitions.
        ranks: Measured products, of which the largest sum over two ranks gives the bandwidth.
    """
    turns = 1 if quick else 3
    one, both = [], []
    for _ in range(turns):
        one.append(launch(_rates, cores(1), 0.1 if quick else 2.0)[0])
        both.append(launch(_rates, cores(2), 0.1 if quick else 2.0))
    found: dict[str, Any] = {"rate": {}, "two_cores": {}, "drawing": alone(_drawing, quick)}
    for name in one[0]:
        rate = statistics.median(run[name] for run in one)
        together = statistics.median(sum(rank[name] for rank in run) for run in both)
        found["rate"][name] = float(f"{rate:.4g}")
        found["two_cores"][name] = float(f"{together / rate:.3g}")
    two = [entry for entry in ranks if entry["ranks"] == 2]
    largest = max(two, key=lambda entry: entry["asked"])
    found["wire"] = float(f"{largest['asked'] / largest['all_reduce_s']:.4g}")  # 2 (R - 1) / R = 1
    return found


def _workload(name: str, count: int, reading: float = 0.0) -> Workload:
    model = network(name)
    counted = count_operations(model, samples(name, 1)[0:1])
    return Workload(
        title=name,
        samples=count,
        outputs=CLASSES,
        parameters=counted["parameters"],
        forward=counted["forward"],
        pull=counted["pull"],
        push=counted["push"],
        kept_bytes=counted["kept_bytes"],
        weight_bytes=4 * counted["parameters"],
        batch=BATCH,
        reading=reading,
    )


def _held(name: str) -> float:
    """Return operations of a sample and column of K V from factors, by the engine's own formulas."""
    shapes = [LayerShape(1, 64, 256), *[LayerShape(1, 256, 256)] * 2, LayerShape(1, 256, CLASSES)]
    if name == "cnn":
        shapes = [LayerShape(256, 27, 8), LayerShape(64, 72, 16), LayerShape(16, 144, 16)]
        shapes.append(LayerShape(1, 256, CLASSES))
    costs = [product_costs(shape, 1, 1, CLASSES) for shape in shapes]
    return float(sum(min(found["factors"], found["gradient"]) for found in costs))


def validate(
    machine: dict[str, Any], streams: Sequence[dict[str, Any]], ranks: Sequence[dict[str, Any]]
) -> list[dict[str, Any]]:
    """Return what the model says of work that was measured here, beside it.

    Args:
        machine: What `measure_machine` has found.
        streams: What was measured over streamed images.
        ranks: What was measured over ranks.
    """
    entries = []
    for run in streams:
        # Opening reads everything once, and does little else where there is much of it.
        work = _workload("cnn", run["samples"], run["opening_s"] / run["samples"])
        here = _here(machine, "cnn", machine["drawing"]["sphere"])
        if run["what"] == "trace, exact":
            cost = gradients(work, here, 1, CLASSES)
        elif run["what"] == "trace, stratified":
            cost = stratified_trace(work, here, 1)
        elif run["what"].endswith("sketch"):
            cost = sketch(SKETCH_COLUMNS)(work, here, 1)
        else:
            continue
        entries.append(_compared(run["what"], run["samples"], 1, cost.seconds, run["cpu_s"]))
    for entry in ranks:
        if entry["ranks"] > entry["cores"] or not entry["cached"]:
            continue
        work = _workload(entry["network"], entry["samples"])
        here = _here(machine, entry["network"], 0.0)
        cost = held_product(work, here, entry["ranks"], entry["k"], _held(entry["network"]))
        what = f"product, {entry['network'].upper()}, k = {entry['k']}"
        entries.append(_compared(what, entry["samples"], entry["ranks"], cost.seconds, entry["s"]))
    return entries


def _here(machine: dict[str, Any], name: str, drawing: float) -> Machine:
    def wire(ranks: int) -> float:
        return float(machine["wire"])

    rate = machine["rate"][name]
    return Machine("this machine", rate, float("inf"), float("inf"), wire, 0.0, drawing)


def _compared(what: str, count: int, ranks: int, predicted: float, measured: float) -> dict[str, Any]:
    return {
        "what": what,
        "samples": count,
        "ranks": ranks,
        "predicted_s": float(f"{predicted:.3g}"),
        "measured_s": float(f"{measured:.3g}"),
        "ratio": float(f"{measured / predicted:.3g}"),
    }
