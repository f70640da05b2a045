"""Build hook: table and chart of the performance page, and other figures, from the results of the benchmarks.

No figure of theirs is written by hand: each is a ratio of CPU times on the same work, from `benchmarks/results`.
"""

from __future__ import annotations

import html
import json
import math
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parents[1] / "benchmarks" / "results"

Bars = list[tuple[str, float]]


def _read(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(
        (RESULTS / f"{name}.json").read_text(encoding="utf-8")
    )
    return found


def _seconds(entry: dict[str, Any], what: str) -> float:
    """CPU seconds of one call; infinite where the library ended in an error."""
    return float(entry.get(what, {}).get("seconds", math.inf))


def measured() -> dict[str, Bars]:
    """How many times the CPU time of ntkops each library takes, by library and piece of work."""
    exact, real = _read("exact_kernels"), _read("real_networks")
    found: dict[str, Bars] = {
        "torch.func": [
            (
                f"dense kernel, {case['title']}, N = {case['samples']}",
                case["ratio"]["cpu"]["median"],
            )
            for case in exact["kernels"]
            if case["kind"] == "all"
        ]
    }
    titles = {case["model"]: case["title"] for case in exact["kernels"]}
    found["NNGeometry"] = [
        (
            f"dense kernel, {titles[case['model']]}, N = {case['samples']}",
            case["ratio"]["cpu"]["median"],
        )
        for case in exact["peers"]
        if case["peer"] == "nngeometry"
    ]
    found["curvlinops"] = []
    for entry in real["entries"]:
        made = _seconds(entry, "make")
        for library, work, theirs, ours in (
            ("torch.func", "dense kernel", "torch.func dense", "dense"),
            ("curvlinops", "first product", "curvlinops K V", "K V"),
        ):
            ratio = _seconds(entry, theirs) / (made + _seconds(entry, ours))
            if math.isfinite(ratio):
                found[library].append(
                    (
                        f"{work}, {entry['title']}, N = {entry['samples']}",
                        ratio,
                    )
                )
    times = _read("projections")["times"]
    found["TRAK"] = [
        (
            f"gradients of {times['params'] // 10**6} M to {times['k']} by {one['map']}",
            one["speedup"],
        )
        for one in times["maps"]
        if one["map"] in ("CountSketch", "SJLT")
    ]
    found["kpflow"] = [
        (f"exact trace, {case['title']}, n = {case['n']:,}", case["ratio"])
        for case in exact["paper"]
    ]
    return found


def _times(ratio: float) -> str:
    return f"{ratio:.2g}×" if ratio < 10 else f"{ratio:.0f}×"


def _range(bars: Bars) -> str:
    values = sorted(value for _, value in bars)
    ends = list(dict.fromkeys([_times(values[0]), _times(values[-1])]))
    return " to ".join(ends)


def memory() -> str:
    """Peak memory of the dense kernel of a vision transformer, theirs and ours."""
    (entry,) = (
        one
        for one in _read("real_networks")["entries"]
        if one["model"] == "vit"
    )
    theirs, ours = (
        entry[what]["peak_mb"] for what in ("torch.func dense", "dense")
    )
    return f"{theirs:,} MB and {ours:,} MB"


OFFERS = {
    "torch.func": (
        "Jacobians, vjp and jvp of any function; part of torch",
        "the model fits and the kernel is small: `jacrev` and a product are five lines",
    ),
    "neural-tangents": (
        "kernels of infinitely wide networks in closed form; empirical ones; JAX, archived",
        "you want the infinite width, or work in JAX",
    ),
    "NNGeometry": (
        "Fisher and Gram matrices in KFAC, EKFAC, diagonal and dense form",
        "you want a metric of the parameters, for natural gradients or pruning",
    ),
    "curvlinops": (
        "Hessian, GGN, Fisher, KFAC and inverses of them as operators",
        "the curvature of a loss is the question, and not the kernel",
    ),
    "TRAK": (
        "attribution scores, with CUDA kernels for projections",
        "attribution at scale on GPUs is all that you want",
    ),
    "kpflow": (
        "products and trace estimates of kernels of recurrent networks",
        "you repeat the experiments of its paper",
    ),
    "laplace-torch": (
        "Laplace approximations: KFAC, last layer, diagonal, subnetworks; tuned by evidence",
        "P × P or its approximations suit you, or sampling and calibration of many kinds",
    ),
}
UNTIMED = {
    "neural-tangents": "not timed: JAX",
    "laplace-torch": "not timed; [the same numbers](uncertainty.md#for-users-of-laplace-torch)",
}


def table(found: dict[str, Bars]) -> str:
    """One row a library."""
    lines = [
        "| library | what it offers | its CPU time, as a multiple of ours | take it when |",
        "|:--|:--|--:|:--|",
    ]
    for library, (offer, when) in OFFERS.items():
        speed = (
            _range(found[library]) if found.get(library) else UNTIMED[library]
        )
        lines.append(f"| **{library}** | {offer} | {speed} | {when} |")
    return "\n".join(lines)


def chart(found: dict[str, Bars]) -> str:
    """Bars on a logarithmic scale from one: to the right ntkops is faster, to the left slower."""
    rows = [(name, *bar) for name, bars in found.items() for bar in bars]
    left, unit, step = 505, 105, 21  # pixels: labels, a factor of ten, a row
    zero = left + 45
    width, height = zero + 3 * unit + 45, step * len(rows) + 26
    parts = [
        f'<div class="chart"><svg class="bars" viewBox="0 0 {width} {height}" role="img"'
        ' aria-label="CPU times of other libraries, as multiples of ours">'
    ]
    for power in range(4):
        x = zero + power * unit
        parts.append(f'<path d="M{x} 0V{height - 18}"/>')
        parts.append(
            f'<text x="{x}" y="{height - 4}" text-anchor="middle">{10**power}×</text>'
        )
    for i, (library, work, ratio) in enumerate(rows):
        y = i * step
        end = zero + unit * math.log10(ratio)
        kind = "faster" if ratio >= 1 else "slower"
        parts.append(
            f'<text x="{left - 8}" y="{y + 15}" text-anchor="end"><tspan class="name">{library}</tspan> '
            f"{html.escape(work)}</text>"
            f'<rect class="{kind}" x="{min(zero, end):.1f}" y="{y + 4}" width="{abs(end - zero):.1f}"'
            f' height="{step - 8}"/>'
            f'<text x="{max(zero, end) + 5:.1f}" y="{y + 15}">{_times(ratio)}</text>'
        )
    return "".join([*parts, "</svg></div>"])


def size() -> str:
    """CPU seconds of exact work on the largest streams of images that were measured."""
    streams = _read("scale")["streams"]

    def largest(what: str) -> dict[str, Any]:
        """The run of one kind with the most samples."""
        return max(
            (one for one in streams if one["what"] == what),
            key=lambda one: one["samples"],
        )

    trace, norm = largest("trace, exact"), largest("norm, exact by tiles")
    return (
        f"{trace['cpu_s']:.0f} s for the exact trace of {trace['samples']:,} images, and "
        f"{norm['cpu_s']:.0f} s for the exact norm of {norm['samples']:,}"
    )


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Put table, chart and figures where a page asks for them."""
    if "<!-- size -->" in markdown:
        markdown = markdown.replace("<!-- size -->", size())
    if "<!-- comparison -->" not in markdown:
        return markdown
    found = measured()
    markdown = markdown.replace("<!-- comparison -->", table(found))
    markdown = markdown.replace("<!-- memory -->", memory())
    return markdown.replace("<!-- chart -->", chart(found))
