"""The result of the benchmark of exact kernels: targets, tables on the terminal and in Markdown."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

__all__ = ["RECORDED", "judge", "markdown", "show"]

Row = Sequence[str]

_KINDS = {
    "all": "all outputs",
    "trace": "traced",
    "each": "per class",
    "scalar": "scalar trace",
    "diagonal": "diagonal",
}
# neural-tangents 0.6.5 from its repository on JAX 0.4.30, on another machine, one thread, CPU
# milliseconds; "func" is torch.func there, so that ratios of one row can be compared.
RECORDED = [
    {"model": "mlp", "samples": 32, "kind": "all", "func": 397.7, "jacobian": 448.2, "structured": 4.1},
    {"model": "mlp", "samples": 32, "kind": "trace", "func": 131.7, "jacobian": 396.2, "structured": 3.4},
    {"model": "mlp", "samples": 32, "kind": "each", "func": 197.9, "jacobian": 304.9, "structured": 3.2},
    {"model": "mlp", "samples": 128, "kind": "all", "func": 6762.0, "jacobian": None, "structured": 68.2},
    {"model": "cnn", "samples": 32, "kind": "all", "func": 312.8, "jacobian": 381.0, "structured": 328.2},
    {
        "model": "resnet",
        "samples": 16,
        "kind": "all",
        "func": 1160.6,
        "jacobian": 1573.9,
        "structured": 935.6,
    },
    {"model": "gru", "samples": 32, "kind": "all", "func": 114.1, "jacobian": 633.8, "structured": 459.7},
    {
        "model": "transformer",
        "samples": 32,
        "kind": "all",
        "func": 385.5,
        "jacobian": 467.1,
        "structured": 3623.3,
    },
]
# What is claimed of kernels: (network, samples, kind, least ratio).
_KERNELS = (
    ("mlp", 32, "all", 40.0),
    ("mlp", 128, "all", 100.0),
    ("mlp", 32, "trace", 30.0),
    ("mlp", 32, "each", 30.0),
    ("gru", 32, "all", 2.0),
    ("gru", 128, "all", 4.0),
    ("resnet", 16, "all", 1.5),
    ("resnet", 16, "trace", 2.0),
    ("cnn", 32, "all", 1.2),
    ("cnn", 96, "all", 1.5),
    ("transformer", 32, "all", 1.2),
    ("transformer", 96, "all", 1.5),
)
_HOOKS = {"cnn": 10.0, "resnet": 10.0}
_PRODUCTS = {1: 2.0, 8: 5.0, 64: 5.0}
_PAPER = {"deep": 250.0, "states": 300.0}
_FLAT = 1.25  # largest over smallest peak, with 10 MB of slack
_SLACK = 10.0
_ERROR = 2e-7
_FROBENIUS_MB = 2000.0


def judge(result: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Say for each target what was measured and whether that reaches it."""
    return [
        *_judge_kernels(result["kernels"]),
        *_judge_peers(result["peers"]),
        *_judge_products(result["products"]),
        *_judge_memory(result),
        *_judge_paper(result["paper"]),
        *_judge_errors(result),
    ]


def _verdict(
    what: str, against: str, least: float, measured: float, held: bool | None = None
) -> dict[str, Any]:
    value = float(f"{measured:.4g}")
    return {
        "what": what,
        "against": against,
        "target": least,
        "measured": value,
        "held": value >= least if held is None else held,
    }


def _judge_kernels(entries: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    found = {(e["model"], e["samples"], e["kind"]): e["ratio"]["cpu"]["median"] for e in entries}
    return [
        _verdict(
            f"{name}, N = {samples}, {_KINDS[kind]}: time", "torch.func", least, found[name, samples, kind]
        )
        for name, samples, kind, least in _KERNELS
        if (name, samples, kind) in found
    ]


def _judge_peers(entries: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    return [
        _verdict(
            f"{e['model']}, N = {e['samples']}, all outputs: time",
            "NNGeometry",
            _HOOKS[e["model"]],
            e["ratio"]["cpu"]["median"],
        )
        for e in entries
        if e["peer"] == "nngeometry" and e["model"] in _HOOKS
    ]


def _judge_products(entries: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    return [
        _verdict(
            f"{e['model']}, N = {e['samples']}, K V lazy, k = {e['columns']}: time",
            f"automatic differentiation, best: {e['best']}",
            _PRODUCTS[e["columns"]],
            e["ratio"]["cpu"]["median"],
        )
        for e in entries
        if e["columns"] in _PRODUCTS
    ]


def _judge_memory(result: Mapping[str, Any]) -> list[dict[str, Any]]:
    verdicts = []
    for entry in result["kernels"]:
        peaks = entry["memory_mb"]
        if peaks.get("layerwise") and peaks.get("func"):
            verdicts.append(
                _verdict(
                    f"{entry['model']}, N = {entry['samples']}, {_KINDS[entry['kind']]}: peak memory",
                    "torch.func",
                    10.0 if entry["model"] == "mlp" else 2.0,
                    peaks["func"] / peaks["layerwise"],
                )
            )
    for growth in result["growth"]:
        for kind, peaks in growth["memory_mb"].items():
            if None in peaks:
                continue
            factor = max(peaks) / max(min(peaks), _SLACK)
            sizes = ", ".join(map(str, growth["samples"]))
            what = (
                f"{growth['model']}, N = {sizes}, {_KINDS[kind]}: largest over smallest peak memory, at most"
            )
            verdicts.append(_verdict(what, "itself", _FLAT, factor, factor <= _FLAT))
    norm = result.get("frobenius")
    if norm and norm["memory_mb"] is not None:
        what = f"Frobenius norm, n = {norm['n']:,}: peak memory in MB, at most"
        held = norm["memory_mb"] <= _FROBENIUS_MB
        verdicts.append(_verdict(what, "-", _FROBENIUS_MB, norm["memory_mb"], held))
    return verdicts


def _judge_paper(entries: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    return [
        _verdict(f"{e['title']}, n = {e['n']:,}: exact trace", "n products", _PAPER[e["name"]], e["ratio"])
        for e in entries
    ]


def _judge_errors(result: Mapping[str, Any]) -> list[dict[str, Any]]:
    entries = [e for key in ("kernels", "products") for e in result[key]]
    if not entries:
        return []
    worst = max(entries, key=lambda e: e["agreement"]["layerwise"])
    error = worst["agreement"]["layerwise"]
    what = f"relative Frobenius error of float32, worst ({worst['model']}), at most"
    return [_verdict(what, "float64 Jacobians", _ERROR, error, error <= _ERROR)]


# tables


def _target_rows(result: Mapping[str, Any]) -> list[Row]:
    return [
        (
            t["what"],
            t["against"],
            _number(t["target"]),
            _number(t["measured"]),
            "yes" if t["held"] else "**no**",
        )
        for t in result["targets"]
    ]


def _kernel_rows(result: Mapping[str, Any]) -> list[Row]:
    rows: list[Row] = []
    for e in result["kernels"]:
        times = [_number(e["time"][name]["cpu_ms"]["median"]) for name in ("layerwise", "func")]
        peaks = [_megabytes(e["memory_mb"].get(name)) for name in ("layerwise", "func")]
        rows.append(
            (
                e["title"],
                str(e["samples"]),
                _KINDS[e["kind"]],
                *times,
                _range(e["ratio"]["cpu"]),
                *peaks,
                f"{e['agreement']['layerwise']:.0e}",
            )
        )
    return rows


def _peer_rows(result: Mapping[str, Any]) -> list[Row]:
    names = {"nngeometry": "NNGeometry", "tutorial": "functorch tutorial"}
    return [
        (
            e["model"],
            str(e["samples"]),
            names[e["peer"]],
            *(_number(e["time"][name]["cpu_ms"]["median"]) for name in ("layerwise", e["peer"])),
            _range(e["ratio"]["cpu"]),
        )
        for e in result["peers"]
    ]


def _product_rows(result: Mapping[str, Any]) -> list[Row]:
    ways = ("layerwise", "fused", "loop", "vmap", "double", "linearize")
    return [
        (
            e["model"],
            str(e["samples"]),
            str(e["columns"]),
            *(
                _number(e["time"][w]["cpu_ms"]["median"])
                if w in e["time"]
                else ("wrong" if w in e["wrong"] else "-")
                for w in ways
            ),
            _range(e["ratio"]["cpu"]),
        )
        for e in result["products"]
    ]


def _growth_rows(result: Mapping[str, Any]) -> list[Row]:
    return [
        (
            g["model"],
            _KINDS[kind],
            *(f"{n}: {_megabytes(mb)}" for n, mb in zip(g["samples"], peaks, strict=True)),
        )
        for g in result["growth"]
        for kind, peaks in g["memory_mb"].items()
    ]


def _paper_rows(result: Mapping[str, Any]) -> list[Row]:
    return [
        (
            e["title"],
            f"{e['n']:,}",
            f"{e['parameters']:,}",
            _seconds(e, "layerwise"),
            f"{_seconds(e, 'products')} ({e['columns_at_once']} at once)",
            _number(e["ratio"]),
        )
        for e in result["paper"]
    ]


def _seconds(entry: Mapping[str, Any], key: str) -> str:
    return _number(entry[f"{key}_s"]) + (" (extrapolated)" if key in entry["extrapolated"] else "")


def _recorded_rows(result: Mapping[str, Any]) -> list[Row]:
    return [
        (
            r["model"],
            str(r["samples"]),
            _KINDS[r["kind"]],
            *("-" if r[key] is None else _number(r[key]) for key in ("func", "jacobian", "structured")),
            f"{r['func'] / r['structured']:.2g}",
        )
        for r in result["recorded"]
    ]


_Table = tuple[str, Row, Callable[[Mapping[str, Any]], list[Row]], int]
_TABLES: tuple[_Table, ...] = (
    ("Targets", ("What", "against", "target", "measured", "held"), _target_rows, 2),
    (
        "Kernels, CPU milliseconds and peak megabytes",
        ("Network", "N", "kind", "layerwise", "torch.func", "ratio", "MB", "MB torch.func", "error"),
        _kernel_rows,
        1,
    ),
    (
        "Kernel of all outputs beside other ways, CPU milliseconds",
        ("Network", "N", "other", "layerwise", "other's", "ratio"),
        _peer_rows,
        1,
    ),
    (
        "K V that stays lazy, CPU milliseconds a block",
        (
            "Network",
            "N",
            "k",
            "layerwise",
            "fused",
            "loop",
            "vmap",
            "double",
            "linearize",
            "best / layerwise",
        ),
        _product_rows,
        1,
    ),
    ("Peak megabytes for N samples", ("Network", "kind", "N: MB", "N: MB", "N: MB"), _growth_rows, 2),
    (
        "Exact traces of the paper's networks, CPU seconds",
        ("Network", "n", "P", "layerwise", "n products", "ratio"),
        _paper_rows,
        1,
    ),
    (
        "neural-tangents, recorded elsewhere, CPU milliseconds",
        (
            "Network",
            "N",
            "kind",
            "torch.func there",
            "Jacobian contraction",
            "structured",
            "torch.func / structured",
        ),
        _recorded_rows,
        1,
    ),
)


def markdown(result: Mapping[str, Any]) -> str:
    """Return the tables of a result in Markdown."""
    place, options = result["environment"], result["options"]
    threads = "one thread" if place["threads"] == 1 else f"{place['threads']} threads"
    lines = [
        f"Measured on {result['date']}: {place['cpu']} ({place['platform']}, {place['cpu_capability']}), "
        f"{threads}, Python {place['python']}, torch {place['torch']}, linear_operator "
        f"{place['linear_operator']}, ntkops {place['ntkops']}, {options['dtype']}, {options['device']}, "
        f"{options['repetitions']} repetitions (3 for N of 96 and more).",
    ]
    for title, header, rows, left in _TABLES:
        found = rows(result)
        if found:
            lines += ["", f"**{title}**", "", *_grid(header, found, left)]
    norm = result.get("frobenius")
    if norm:
        lines += [
            "",
            f"The exact Frobenius norm of the MLP's kernel, n = {norm['n']:,}, took {norm['cpu_s']:.3g} CPU "
            f"seconds and {_megabytes(norm['memory_mb'])} MB.",
        ]
    return "\n".join(lines)


def show(result: Mapping[str, Any]) -> None:
    """Print the tables, and the targets that are missed once more."""
    print(markdown(result))
    for target in result["targets"]:
        if not target["held"]:
            print(f"MISSED {target['what']}: {target['measured']:.3g}, target {target['target']:.3g}")


def _grid(header: Row, rows: Sequence[Row], left: int) -> list[str]:
    rule = [":--" if position < left else "--:" for position in range(len(header))]
    return [f"| {' | '.join(row)} |" for row in (header, rule, *rows)]


def _megabytes(value: float | None) -> str:
    return "-" if value is None else f"{value:.0f}"


def _number(value: float) -> str:
    if value and abs(value) < 1e-3:
        return f"{value:.1e}"
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def _range(values: Mapping[str, float]) -> str:
    return f"{values['median']:.2f} ({values['min']:.2f} - {values['max']:.2f})"
