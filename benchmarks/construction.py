"""What it takes to make an operator, before anything is computed with it: passes, time, memory.

Run it with ``python benchmarks/construction.py``; docs/performance.md explains and shows the result.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from _construction_networks import NETWORKS, ROW_NETWORKS, random_network
from _construction_tables import judge, markdown
from _kernel_peers import contraction
from _kernel_work import distance, require_close
from _measure import Series, environment, interleaved, one_thread, peak_memory, ratio
from _tables import fill
from torch import Tensor, nn

import ntkops
from ntkops.model import Linearization, linearize

__all__ = ["measure_network", "measure_rows", "measure_score", "passes_of", "prepare", "run"]

FEW = 4  # samples of a training step, which are as many as the library tries a model on
OUTPUTS = (10, 2, 1)
SEARCHED = 30
REPETITIONS = {"mlp": 9, "cnn": 9}
CALLS = {"mlp": 10, "cnn": 5}  # in one timing, of what takes no time
USUAL = 3
NO_MEMORY = ("mlp", "cnn")  # below what the system tells


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
    v = torch.randn(
        ntkops.ntk(known, x).num_outputs * len(few), 1, generator=torch.Generator().manual_seed(2)
    )
    return lambda: ntkops.ntk(known, few, engine="autograd", max_dense_bytes=0) @ v


def passes_of(model: nn.Module, x: Tensor) -> dict[str, int]:
    """Return how often the model runs, for each of the ways in which operators are made."""
    counted = Counted(model).eval()

    def passes(work: Callable[[], object]) -> int:
        before = Counted.passes
        kept.append(work())
        return Counted.passes - before

    kept: list[object] = []
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
    """Count passes, time the making of operators beside a training step, and take its memory.

    Args:
        name: Among `NETWORKS`.
        quick: Take the small size.
        repetitions: Times that each is timed.
        memory: Whether to start processes for peak memory.

    Returns:
        One entry of the JSON.
    """
    case = NETWORKS[name]
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
        "step": step(model, x),
        "make": lambda: ntkops.ntk(next(modules), x),
        "same_module": lambda: ntkops.ntk(model, x),
        "same_linearization": lambda: ntkops.ntk(known, x),
    }
    products = {
        "step": step(model, x),
        "first_product": lambda: next(unknown)(),
        "later_product": differentiated(known, x),
    }
    several = {key: _repeated(piece, calls) for key, piece in making.items()}
    series = interleaved(several, repetitions, shortest=0)
    series = {key: _scaled(times, 1 / calls) for key, times in series.items()}
    del kept
    differentiating = interleaved(products, few, shortest=0)
    adds = _difference(differentiating["first_product"], differentiating["later_product"])
    steps = {
        "make": ratio(series["make"], series["step"]),
        "differentiate": ratio(adds, differentiating["step"]),
    }
    return {
        "model": name,
        "title": f"{case.title}, small" if quick else case.title,
        "samples": len(x),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "selected": sum(parameter.numel() for parameter in selected),
        "selected_mb": round(sum(parameter.nbytes for parameter in selected) / 1e6, 2),
        "repetitions": repetitions,
        "passes": found,
        "time": {key: times.summary() for key, times in (differentiating | series).items()},
        "steps": steps,
        "memory_mb": {
            what: peak_memory(prepare, name, quick, what) if memory else None
            for what in ("step", "make", "differentiate")
        },
    }


def prepare(name: str, quick: bool, what: str) -> Callable[[], object]:
    """Return the work whose memory is measured, after the same on the small network has loaded the code."""

    def work(small: bool) -> Callable[[], object]:
        model, x = NETWORKS[name].make(small)
        if what == "make":
            return lambda: ntkops.ntk(model, x)
        return step(model, x) if what == "step" else differentiated(linearize(model), x)

    work(True)()
    return work(quick)


def measure_score(*, quick: bool, repetitions: int) -> dict[str, Any]:
    """Time a search: the condition number of the traced kernel of random networks, ours and by torch.func."""
    count, samples, side = (1, 4, 8) if quick else (SEARCHED, 16, 16)
    networks = [random_network(seed, quick) for seed in range(count)]
    x = torch.randn(samples, 3, side, side, generator=torch.Generator().manual_seed(1))
    for seed, network in enumerate(networks):
        exact = contraction(copy.deepcopy(network).double(), x.double(), "trace", None)()
        agreement = {
            "ntkops": distance(ntkops.ntk(network, x, outputs="trace").to_dense(), exact),
            "func": distance(contraction(network, x, "trace", None)(), exact),
        }
        require_close(f"network {seed} of the search", agreement)
    searches = iter([[fresh(network) for network in networks] for _ in range(repetitions + 1)])

    def score(kernels: Iterator[Tensor]) -> list[float]:
        return [float(torch.linalg.cond(kernel)) for kernel in kernels]

    work = {
        "ntkops": lambda: score(ntkops.ntk(n, x, outputs="trace").to_dense() for n in next(searches)),
        "func": lambda: score(contraction(n, x, "trace", None)() for n in networks),
    }
    series = interleaved(work, repetitions, shortest=0)
    return {
        "networks": count,
        "samples": samples,
        "repetitions": repetitions,
        "time": {key: times.summary() for key, times in series.items()},
        "ratio": ratio(series["ntkops"], series["func"]),
    }


def measure_rows(name: str, outputs: int, *, quick: bool, repetitions: int) -> dict[str, Any]:
    """Time the kernel on samples that are new and on samples that are known, beside its passes by hand."""
    network = ROW_NETWORKS[name]
    model, x = network.make(outputs, quick)
    known = linearize(model)
    kernels = [ntkops.ntk(known, x) for _ in range(repetitions + 2)]
    checked = kernels.pop()
    checked.to_dense()
    unchecked = iter(kernels)

    def again() -> Tensor:
        checked.free()
        return checked.to_dense()

    work = {
        "new": lambda: next(unchecked).to_dense(),
        "known": again,
        "forward": lambda: _passes(model, x, 0),
        "passes": lambda: _passes(model, x, outputs),
    }
    series = interleaved(work, repetitions, shortest=0)
    extra = _difference(series["new"], series["known"])
    one = _difference(series["passes"], series["forward"])
    return {
        "model": name,
        "title": network.title,
        "outputs": outputs,
        "samples": len(x),
        "repetitions": repetitions,
        "time": {key: times.summary() for key, times in series.items()},
        "share": ratio(extra, series["passes"]),
        "pass_share": ratio(_scaled(one, 1 / outputs), series["passes"]),
    }


def _passes(model: nn.Module, x: Tensor, outputs: int) -> None:
    """Run a forward pass, and a backward pass to the results of all layers for each output."""
    results: list[Tensor] = []
    layers = [
        module for module in model.modules() if next(module.parameters(recurse=False), None) is not None
    ]
    hooks = [layer.register_forward_hook(lambda _, given, result: results.append(result)) for layer in layers]
    try:
        found = model(x).sum(0)
    finally:
        for hook in hooks:
            hook.remove()
    wanted = [result if isinstance(result, Tensor) else result[0] for result in results]
    for number in range(outputs):
        torch.autograd.grad(found[number], wanted, retain_graph=True, allow_unused=True)


def _difference(above: Series, below: Series) -> Series:
    """Return what one takes more than the other, repetition by repetition."""
    return Series(
        [a - b for a, b in zip(above.cpu, below.cpu, strict=True)],
        [a - b for a, b in zip(above.wall, below.wall, strict=True)],
    )


def _repeated(piece: Callable[[], object], calls: int) -> Callable[[], object]:
    return lambda: [piece() for _ in range(calls)]


def _scaled(series: Series, factor: float) -> Series:
    return Series([factor * value for value in series.cpu], [factor * value for value in series.wall])


def run(
    networks: Sequence[str] = tuple(NETWORKS),
    *,
    quick: bool = False,
    memory: bool = True,
    say: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Measure and return what the JSON file holds.

    Args:
        networks: Names among `NETWORKS`; those whose libraries are missing are left out.
        quick: Small networks, one repetition.
        memory: Whether peak memory is measured.
        say: Told what comes next.

    Returns:
        Environment, load of the machine, options, all entries, and whether the targets are held.
    """
    started, load = time.perf_counter(), os.getloadavg()
    result: dict[str, Any] = {"networks": [], "rows": []}
    with one_thread():
        surroundings = environment()
        for name in networks:
            say(NETWORKS[name].title)
            repetitions = 1 if quick else REPETITIONS.get(name, USUAL)
            with_memory = memory and name not in NO_MEMORY
            try:
                entry = measure_network(name, quick=quick, repetitions=repetitions, memory=with_memory)
            except ImportError as missing:
                say(f"left out: {missing}")
                continue
            result["networks"].append(entry)
        say("a search")
        result["score"] = measure_score(quick=quick, repetitions=1 if quick else USUAL)
        for name in list(ROW_NETWORKS)[: 1 if quick else None]:
            for outputs in OUTPUTS[1:2] if quick else OUTPUTS:
                say(f"row check, {ROW_NETWORKS[name].title}, {outputs} outputs")
                result["rows"].append(measure_rows(name, outputs, quick=quick, repetitions=1 if quick else 7))
    return {
        "benchmark": "construction",
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "environment": surroundings,
        # Processes that want to run, over the minute before the start and before the end; this one is one.
        "load": {"before": round(load[0], 1), "after": round(os.getloadavg()[0], 1), "cpus": os.cpu_count()},
        "options": {"quick": quick, "dtype": "float32", "device": "cpu"},
        **result,
        "targets": [] if quick else judge(result),
        "seconds": round(time.perf_counter() - started, 1),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    names = tuple(NETWORKS)
    parser.add_argument("--networks", nargs="+", choices=names, default=names, help="which networks")
    parser.add_argument("--quick", action="store_true", help="small sizes: a smoke test, not a measurement")
    parser.add_argument("--no-memory", action="store_true", help="leave peak memory out")
    parser.add_argument("--out", type=Path, help="JSON file to write (none by default)")
    parser.add_argument(
        "--markdown", type=Path, metavar="JSON", help="print a result as Markdown, run nothing"
    )
    parser.add_argument("--page", type=Path, help="with --markdown: put the tables into this page")
    options = parser.parse_args(arguments)
    if options.markdown is not None:
        text = markdown(json.loads(options.markdown.read_text(encoding="utf-8")))
        print(text)
        if options.page is not None:
            page = options.page.read_text(encoding="utf-8")
            options.page.write_text(fill(page, "construction", text + "\n"), encoding="utf-8")
        return 0
    result = run(
        options.networks,
        quick=options.quick,
        memory=not options.no_memory,
        say=lambda text: print(text, file=sys.stderr, flush=True),
    )
    print(markdown(result))
    if options.out is not None:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
