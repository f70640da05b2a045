"""What it takes to make an operator, before anything is computed with it (docs/performance.md)."""

from __future__ import annotations

import argparse
import copy
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from _measure import agreement, interleaved, peak_memory, ratio, summaries
from _models import CONSTRUCTION_CASES, ROW_CASES, normal, random_network
from _peers import contraction
from _tables import Benchmark, say, shown, table, verdict
from torch import Tensor, nn

import ntkops
from ntkops.model import Linearization, linearize

FEW = 4  # samples of a training step, which are as many as the library tries a model on
OUTPUTS = (10, 2, 1)
REPETITIONS = {"mlp": 9, "cnn": 9}
CALLS = {"mlp": 10, "cnn": 5}  # in one timing, of what takes no time
SMALL = ("mlp", "cnn")  # their memory is below what the system tells

# What it may take.
PASSES = {"make": 2, "same_linearization": 0, "cross": 0, "differentiate": 1}
STEPS = {"make": 3.5, "differentiate": 3.0}
SHORT = {"make": 3.0, "same_module": 1.0, "same_linearization": 0.2}  # milliseconds, of the perceptron
SCORE = 2.5
SHARES = {10: 0.2, 2: 0.4, 1: 0.6}

WAYS = {
    "make": "made", "same_module": "again, same module", "same_linearization": "again, same linearisation",
    "cross": "K.cross(x)", "differentiate": "first product by differentiation adds",
}  # fmt: skip


class Counted(nn.Module):
    """A model that counts its forward passes, those of its copies too."""

    passes = 0

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        """Count one, and run the model."""
        Counted.passes += 1
        return self.model(x)


def fresh(model: nn.Module) -> nn.Module:
    """Return new modules with the same tensors: nothing is known of them."""
    tensors = (*model.parameters(), *model.buffers())
    return copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})


def step(model: nn.Module, x: Tensor) -> Callable[[], object]:
    """Return a training step of a few samples: forward and backward pass, without an optimiser."""
    selected = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return lambda: torch.autograd.grad(model(x[:FEW]).square().mean(), selected)


def differentiated(known: Linearization, x: Tensor) -> Callable[[], object]:
    """Return K v by automatic differentiation for a few samples, the operator included."""
    few = x[:FEW]
    v = normal(ntkops.ntk(known, x).num_outputs * len(few), 1, seed=2)
    return lambda: ntkops.ntk(known, few, engine="autograd", max_dense_bytes=0) @ v


def passes_of(model: nn.Module, x: Tensor) -> dict[str, int]:
    """Return how often the model runs, for each of the ways in which operators are made."""
    counted, kept = Counted(model).eval(), []

    def passes(work: Callable[[], object]) -> int:
        before = Counted.passes
        kept.append(work())
        return Counted.passes - before

    found = {"make": passes(lambda: ntkops.ntk(counted, x))}
    found["same_module"] = passes(lambda: ntkops.ntk(counted, x))
    known = linearize(counted)
    kernel = ntkops.ntk(known, x)
    found["same_linearization"] = passes(lambda: ntkops.ntk(known, x))
    found["cross"] = passes(lambda: kernel.cross(x))
    multiply = differentiated(known, x)
    first = passes(multiply)
    return {**found, "differentiate": first - passes(multiply)}


def measure_network(name: str, *, quick: bool, repetitions: int, memory: bool = True) -> dict[str, Any]:
    """Count passes, time the making of operators beside a training step, and take its memory."""
    case = CONSTRUCTION_CASES[name]
    model, x = case.make(quick)
    selected = [parameter for parameter in model.parameters() if parameter.requires_grad]
    found = passes_of(model, x)
    known, few = linearize(model), max(1, repetitions // 3)
    calls = 1 if quick else CALLS.get(name, 1)
    kept: list[object] = [ntkops.ntk(known, x), ntkops.ntk(model, x)]
    # The first of each warms up.
    modules = iter([fresh(model) for _ in range(calls * (repetitions + 1))])
    unknown = iter([differentiated(linearize(fresh(model)), x) for _ in range(few + 1)])
    making = {
        "step": step(model, x), "make": lambda: ntkops.ntk(next(modules), x),
        "same_module": lambda: ntkops.ntk(model, x), "same_linearization": lambda: ntkops.ntk(known, x),
    }  # fmt: skip
    products = {
        "step": step(model, x),
        "first_product": lambda: next(unknown)(),
        "later_product": differentiated(known, x),
    }

    def several(piece: Callable[[], object]) -> Callable[[], object]:
        return lambda: [piece() for _ in range(calls)]

    made = interleaved({key: several(piece) for key, piece in making.items()}, repetitions, shortest=0)
    made = {key: times.times(1 / calls) for key, times in made.items()}
    del kept
    first = interleaved(products, few, shortest=0)
    adds = first["first_product"].minus(first["later_product"])
    kinds = ("step", "make", "differentiate")
    return {
        "model": name, "title": f"{case.title}, small" if quick else case.title, "samples": len(x),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "selected": sum(parameter.numel() for parameter in selected),
        "selected_mb": round(sum(parameter.nbytes for parameter in selected) / 1e6, 2),
        "repetitions": repetitions, "passes": found, "time": summaries(first | made),
        "steps": {"make": ratio(made["make"], made["step"]), "differentiate": ratio(adds, first["step"])},
        "memory_mb": {what: peak_memory(prepare, name, quick, what) if memory else None for what in kinds},
    }  # fmt: skip


def prepare(name: str, quick: bool, what: str) -> Callable[[], object]:
    """Return the work whose memory is measured, after the same on the small network has loaded the code."""

    def work(small: bool) -> Callable[[], object]:
        model, x = CONSTRUCTION_CASES[name].make(small)
        if what == "make":
            return lambda: ntkops.ntk(model, x)
        return step(model, x) if what == "step" else differentiated(linearize(model), x)

    work(True)()
    return work(quick)


def measure_score(*, quick: bool, repetitions: int) -> dict[str, Any]:
    """Time a search: the condition number of the traced kernel of random networks, ours and by torch.func."""
    count, samples, side = (1, 4, 8) if quick else (30, 16, 16)
    networks = [random_network(seed, quick) for seed in range(count)]
    x = normal(samples, 3, side, side)
    ways: dict[str, Callable[[nn.Module], Tensor]] = {
        "ntkops": lambda network: ntkops.ntk(network, x, outputs="trace").to_dense(),
        "func": lambda network: contraction(network, x, "trace")(),
    }
    for seed, network in enumerate(networks):
        exact = contraction(copy.deepcopy(network).double(), x.double(), "trace")()
        found = {name: way(network) for name, way in ways.items()}
        agreement(f"network {seed} of the search", found, exact)
    searches = iter([[fresh(network) for network in networks] for _ in range(repetitions + 1)])
    work = {
        "ntkops": lambda: [float(torch.linalg.cond(ways["ntkops"](network))) for network in next(searches)],
        "func": lambda: [float(torch.linalg.cond(ways["func"](network))) for network in networks],
    }
    series = interleaved(work, repetitions, shortest=0)
    sizes = {"networks": count, "samples": samples, "repetitions": repetitions}
    return {**sizes, "time": summaries(series), "ratio": ratio(series["ntkops"], series["func"])}


def measure_rows(name: str, outputs: int, *, quick: bool, repetitions: int) -> dict[str, Any]:
    """Time the kernel on samples that are new and on samples that are known, beside its passes by hand."""
    model, x = ROW_CASES[name].make(quick, outputs=outputs)
    known = linearize(model)
    kernels = [ntkops.ntk(known, x) for _ in range(repetitions + 2)]
    checked = kernels.pop()
    checked.to_dense()
    unchecked = iter(kernels)

    def again() -> Tensor:
        checked.free()
        return checked.to_dense()

    work = {
        "new": lambda: next(unchecked).to_dense(), "known": again,
        "forward": lambda: backward_passes(model, x, 0), "passes": lambda: backward_passes(model, x, outputs),
    }  # fmt: skip
    series = interleaved(work, repetitions, shortest=0)
    extra = series["new"].minus(series["known"])
    one = series["passes"].minus(series["forward"]).times(1 / outputs)
    return {
        "model": name, "title": ROW_CASES[name].title, "outputs": outputs, "samples": len(x),
        "repetitions": repetitions, "time": summaries(series), "share": ratio(extra, series["passes"]),
        "pass_share": ratio(one, series["passes"]),
    }  # fmt: skip


def backward_passes(model: nn.Module, x: Tensor, outputs: int) -> None:
    """Run a forward pass, and a backward pass to the results of all layers for each output."""
    results: list[Tensor] = []
    layers = [module for module in model.modules() if list(module.parameters(recurse=False))]
    hooks = [layer.register_forward_hook(lambda _, given, result: results.append(result)) for layer in layers]
    try:
        found = model(x).sum(0)
    finally:
        for hook in hooks:
            hook.remove()
    wanted = [result if isinstance(result, Tensor) else result[0] for result in results]
    for number in range(outputs):
        torch.autograd.grad(found[number], wanted, retain_graph=True, allow_unused=True)


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Measure networks (those whose libraries are missing are left out), a search, and the row check."""
    quick, load = options.quick, os.getloadavg()
    result: dict[str, Any] = {"networks": [], "rows": []}
    for name in options.parts:
        if name in CONSTRUCTION_CASES:
            say(name)
            count, memory = 1 if quick else REPETITIONS.get(name, 3), options.memory and name not in SMALL
            try:
                result["networks"].append(
                    measure_network(name, quick=quick, repetitions=count, memory=memory)
                )
            except ImportError as missing:
                say(f"left out: {missing}")
    if "search" in options.parts:
        say("a search")
        result["score"] = measure_score(quick=quick, repetitions=1 if quick else 3)
    for name in (list(ROW_CASES)[: 1 if quick else None]) if "rows" in options.parts else ():
        for outputs in OUTPUTS[1:2] if quick else OUTPUTS:
            say(f"row check, {name}, {outputs} outputs")
            result["rows"].append(measure_rows(name, outputs, quick=quick, repetitions=1 if quick else 7))
    # Processes that want to run, over the minute before the start and before the end; this one is one.
    before, after = (round(one[0], 1) for one in (load, os.getloadavg()))
    result["load"] = {"before": before, "after": after, "cpus": os.cpu_count()}
    return {**result, "options": {"dtype": "float32", "device": "cpu"}}


def judge(result: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Say of each target how much it may be, and how much it is."""
    networks = result["networks"]
    for way, most in PASSES.items():
        for e in networks:
            yield verdict(f"forward passes, {WAYS[way]}", e["model"], e["passes"][way], most=most)
    for way, most in SHORT.items():
        for e in (e for e in networks if e["model"] == "mlp"):
            yield verdict(f"milliseconds, {WAYS[way]}", "mlp", e["time"][way]["cpu_ms"]["median"], most=most)
    for e in (e for e in networks if e["model"] not in SMALL):
        for way, most in STEPS.items():
            found = e["steps"][way]["cpu"]["median"]
            yield verdict(f"training steps of four samples, {WAYS[way]}", e["model"], found, most=most)
        # One copy of the selected parameters above the snapshot and the passes of four samples, then two;
        # a step has gradients, which are one copy.
        own, peaks = e["selected_mb"], e["memory_mb"]
        if None not in peaks.values():
            found = peaks["make"] - own
            yield verdict("MB above model and snapshot, made", e["model"], found, most=peaks["step"])
            what = f"MB, {WAYS['differentiate']}"
            yield verdict(what, e["model"], peaks["differentiate"], most=peaks["step"] + own)
    if "score" in result:
        found = result["score"]["ratio"]["cpu"]["median"]
        yield verdict("times torch.func in a search", "30 networks", found, most=SCORE)
    for e in result["rows"]:
        most = SHARES[e["outputs"]]
        if e["model"] == "cnn" and e["outputs"] == 1:
            most = max(most, e["pass_share"]["cpu"]["median"])  # one pass more, on convolutions
        of = f"{e['title']}, {e['outputs']} outputs"
        found = e["share"]["cpu"]["median"]
        yield verdict("row check, share of forward and backward passes", of, found, most=most)


def tables(result: Mapping[str, Any]) -> list[str]:
    """Return passes, times and memory of making operators, the search, and the row check."""
    networks, load, score = result["networks"], result["load"], result.get("score")

    def ms(name: str) -> str:
        return f"time.{name}.cpu_ms.median"

    def share(name: str) -> Callable[[Mapping[str, Any]], str]:
        return lambda entry: f"{100 * entry[name]['cpu']['median']:.0f} %"

    searched = score and (
        f"A search: condition numbers of the traced kernels of {score['networks']} random convolutional "
        f"networks on {score['samples']} images take {shown(score['time']['ntkops']['cpu_ms']['median'])} "
        f"ms, by torch.func {shown(score['time']['func']['cpu_ms']['median'])} ms: "
        f"{shown(score['ratio']['cpu'])} times as much."
    )
    return [
        "", f"Load average {load['before']} before and {load['after']} after on {load['cpus']} processors.",
        *table(
            networks, {"Network": "title", **{title: f"passes.{way}" for way, title in WAYS.items()}},
            title="Forward passes:",
        ),
        *table(
            networks,
            {
                "Network": "title", "N": "samples", "P": "parameters", "selected": "selected",
                "step": ms("step"), "made": ms("make"), "same module": ms("same_module"),
                "same linearisation": ms("same_linearization"), "made, in steps": "steps.make.cpu",
                "differentiation adds, in steps": "steps.differentiate.cpu",
            },
            title="CPU milliseconds (medians), and in training steps of four samples (smallest and largest):",
        ),
        *table(
            [entry for entry in networks if entry["memory_mb"]["make"] is not None],
            {
                "Network": "title", "selected parameters": "selected_mb:.0f",
                "step of four": "memory_mb.step:.0f", "made, with the snapshot": "memory_mb.make:.0f",
                "first product by differentiation": "memory_mb.differentiate:.0f",
            },
            title="Peak memory in MB above what was resident before:",
        ),
        *(["", searched] if searched else []),
        *table(
            result["rows"],
            {
                "Network": "title", "N": "samples", "O": "outputs", "passes, ms": ms("passes"),
                "kernel, new samples": ms("new"), "known samples": ms("known"), "check": share("share"),
                "one pass": share("pass_share"),
            },
            title="The row check, as a share of a forward pass and the backward passes for O outputs:",
        ),
    ]  # fmt: skip


BENCHMARK = Benchmark(
    "construction", __doc__, measure, tables, judge,
    parts=(*CONSTRUCTION_CASES, "search", "rows"), key=("model", "outputs"), memory=True,
)  # fmt: skip
main = BENCHMARK.main

if __name__ == "__main__":
    sys.exit(main())
